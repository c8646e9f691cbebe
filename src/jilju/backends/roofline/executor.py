"""RooflineExecutor: the Executor protocol without a model, on a virtual clock.

Owns the time of a step: the plan's ops on a machine of so many FLOP/s and B/s, times a factor that the caller draws. The
tokens are those of the hash chain, so that whatever an engine mixes up in blocks, tables or rows changes what it answers.
Knows nothing of sequences or requests; injects no faults.
"""

from collections.abc import Callable, Mapping, Sequence

from jilju.backends.roofline.sampling import sample
from jilju.backends.roofline.slots import Slots
from jilju.clock import VirtualClock
from jilju.plan import Batch, KvDtype, Limits, Plan, StepResult, StepShape, WeightTensor
from jilju.plan.cost import Machine, PlanCost

SCALE_BYTES = 4  # of int8 keys and values: a float32 per token, head and K or V


class RooflineExecutor:
    """`noise` makes a factor of a step's number, counted from 0."""

    name = "roofline"
    kernel_set = "roofline"
    invariant = True

    def __init__(
        self,
        clock: VirtualClock,
        plan: Plan,
        machine: Machine,
        limits: Limits,
        *,
        noise: Callable[[int], float] | None = None,
    ):
        self._clock = clock
        self._machine = machine
        self._noise = noise
        self._batch: Batch | None = None
        self.num_steps = 0
        self.load(plan, {}, limits)

    def weight_bytes(self, plan: Plan) -> int:
        return plan.weight_bytes

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "f16") -> int:
        kv = plan.kv
        if kv_dtype == "f16":
            return 2 * kv.elements_per_token
        return kv.elements_per_token + SCALE_BYTES * kv.elements_per_token // kv.head_dim

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        return plan.workspace_bytes(limits.max_tokens, limits.max_tokens)

    def load(self, plan: Plan, weights: Mapping[str, WeightTensor], limits: Limits) -> None:
        """An empty cache of these limits."""
        assert not weights, f"the roofline executor computes no model and takes no weights; given {sorted(weights)[:3]}"
        self.limits = limits
        self._vocab_size = plan.vocab_size
        self._cost = PlanCost(plan, self.kv_bytes_per_token(plan, limits.kv_dtype) // plan.kv.elements_per_token)
        self.slots = Slots(limits)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks that nobody holds, so that a read of one is seen."""
        self.slots.poison(block_ids)

    def launch(self, batch: Batch) -> None:
        limits = self.limits
        assert self._batch is None, "launch before wait of the step before"
        assert 1 <= batch.num_rows <= limits.max_rows, f"{batch.num_rows} rows; allowed: 1 to {limits.max_rows}"
        assert batch.num_rows <= batch.num_tokens <= limits.max_tokens, (
            f"{batch.num_tokens} tokens in {batch.num_rows} rows; allowed: one a row to {limits.max_tokens}"
        )
        self._batch = batch

    def wait(self) -> StepResult:
        batch, self._batch = self._batch, None
        assert batch is not None, "wait before launch"
        words = self.slots.append(batch)
        batch.wait_for_masks()
        result = sample(words, batch, self._vocab_size)
        self._clock.advance_ns(self._next_step_ns(batch.shape))
        return result

    def free(self) -> None:
        del self.slots

    def _next_step_ns(self, shape: StepShape) -> int:
        step_ns = self._cost.step_ns(shape, self._machine)
        if self._noise is not None:
            step_ns = round(step_ns * self._noise(self.num_steps))
        self.num_steps += 1
        return step_ns
