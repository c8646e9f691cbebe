"""Step cost: FLOPs and bytes of a step, fast enough to be asked in every step.

Owns how a step's rows become the shape that the plan's cost formulas take. Knows nothing of the formulas.
"""

from jilju.engine.scheduler import Step
from jilju.plan import Plan, StepShape
from jilju.plan.cost import PlanCost, SummedShape


class StepCost:
    def __init__(self, plan: Plan, kv_element_bytes: int):
        self._cost = PlanCost(plan, kv_element_bytes)
        self.score_work = self._cost.logit_work()  # what scoring a prompt's token adds to it, in tokens

    def of(self, step: Step) -> tuple[int, int]:
        """FLOPs and bytes."""
        return self._cost.totals(step_totals(step))


def step_totals(step: Step) -> StepShape:
    counts = tuple([row.count for row in step.rows])
    return SummedShape(
        starts=tuple([row.start for row in step.rows]),
        counts=counts,
        num_logits=sum([row.num_logits for row in step.rows]),
        num_tokens=sum(counts),
    )
