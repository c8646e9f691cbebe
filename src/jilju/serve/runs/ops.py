"""The ops of one step, in words and figures.

Owns the text of an op's shape in a step, and how modelled times are scaled to the measured one. Knows nothing of runs.
"""

from jilju.account.step_model import StepModel
from jilju.engine.events import LoggedStep
from jilju.plan import Attention, Embed, Glu, Linear, Op
from jilju.plan.cost import OpCost
from jilju.serve.runs.types import StepOp, StepOps


def step_ops(logged: LoggedStep, model: StepModel) -> StepOps:
    step = logged.step
    run_ns = step.done_ns - step.packed_ns
    costs = model.ops(logged.rows, step.num_logits) if logged.rows else []
    modelled_ns = sum(cost.ns for cost in costs)
    num_tokens = step.num_prefill_tokens + step.num_decode_tokens
    return StepOps(
        serial=logged.serial,
        run_ms=run_ns / 1e6,
        rows=step.num_rows,
        tokens=num_tokens,
        logits=step.num_logits,
        flops=step.flops,
        bytes=step.bytes,
        memory_roof_share=model.memory_roof_share(step.bytes, run_ns),
        compute_roof_share=model.compute_roof_share(step.flops, run_ns),
        is_modelled=True,
        ops=[_op(cost, run_ns, modelled_ns, num_tokens, step.num_logits) for cost in costs],
    )


def _op(cost: OpCost, run_ns: int, modelled_ns: float, num_tokens: int, num_logits: int) -> StepOp:
    share = cost.ns / modelled_ns if modelled_ns else 0.0
    return StepOp(
        op=type(cost.op).__struct_config__.tag or "",  # type: ignore[arg-type]
        shape=shape_of(cost.op, num_tokens, num_logits),
        count=cost.num_ops,
        flops=cost.flops,
        bytes=cost.num_bytes,
        ms=share * run_ns / 1e6,
        share=share,
        bound="memory" if cost.is_memory_bound else "compute",
    )


def shape_of(op: Op, num_tokens: int, num_logits: int) -> str:
    """As it is in a step of so many tokens: "[16 tokens, 896] x [896, 4864] Q4_K"."""

    def rows(name: str) -> str:
        return f"{num_tokens} tokens" if name == "tokens" else f"{num_logits} logit rows"

    if isinstance(op, Linear):
        parts = " + ".join(f"[{part.num_inputs}, {part.num_outputs}] {part.type.name}" for part in op.parts)
        return f"[{rows(op.x.rows)}, {op.x.width}] x {parts}"
    if isinstance(op, Attention):
        window = f", window {op.window}" if op.window else ""
        return f"{op.num_heads} heads of {op.head_dim} on {op.num_kv_heads} key-value heads{window}"
    if isinstance(op, Embed):
        return f"{rows(op.out.rows)} from [{op.table.num_outputs}, {op.table.num_inputs}] {op.table.type.name}"
    if isinstance(op, Glu):
        return f"[{rows(op.x.rows)}, {op.x.width}], {op.activation}"
    value = op.reads[0]
    return f"[{rows(value.rows)}, {value.width}]"
