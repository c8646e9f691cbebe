"""Plan: a model as a flat list of ops over named buffers, checked before it runs; and the builder that writes one.

The builder hands out a fresh buffer for each result; `build()` lets results that are never alive together share one
buffer, so that the workspace stays small. Knows nothing of files, backends or the engine.
"""

import msgspec

from jilju.plan.batch import StepShape
from jilju.plan.ops import (
    Activation,
    Attention,
    Embed,
    Glu,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Rows,
    Sample,
    TakeRows,
    Value,
    WeightSpec,
)


class Buffer(msgspec.Struct, frozen=True):
    """Float32 [rows, width], rows being the step's tokens or its logit rows."""

    rows: Rows
    width: int


class KvSpec(msgspec.Struct, frozen=True):
    """What the KV cache holds for one token: per layer, keys and values of num_kv_heads heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


class Plan(msgspec.Struct, frozen=True):
    ops: tuple[Embed | RmsNorm | Linear | Rope | Attention | Glu | TakeRows | Sample, ...]
    buffers: tuple[Buffer, ...]
    kv: KvSpec
    vocab_size: int

    @property
    def weights(self) -> dict[str, WeightSpec]:
        return {w.name: w for op in self.ops for w in op.weights}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they lie in the file, tied ones once."""
        return sum(w.num_bytes for w in self.weights.values())

    def flops(self, step: StepShape) -> int:
        return sum(op.flops(step) for op in self.ops)

    def bytes(self, step: StepShape, kv_element_bytes: int) -> int:
        return sum(op.bytes(step, kv_element_bytes) for op in self.ops)

    def workspace_bytes(self, max_tokens: int, max_logits: int) -> int:
        return sum(4 * b.width * (max_tokens if b.rows == "tokens" else max_logits) for b in self.buffers)

    def verify(self) -> None:
        """Raise ValueError naming the op unless every value is in its buffer, written before it is read, and shaped as its op says."""
        spans: dict[int, list[tuple[int, int]]] = {}
        names: dict[str, WeightSpec] = {}
        layers: set[int] = set()
        for index, op in enumerate(self.ops):
            where = f"op {index} ({type(op).__name__})"
            for value in op.reads + op.writes:
                if not 0 <= value.buffer < len(self.buffers):
                    raise ValueError(f"{where}: buffer {value.buffer} does not exist, the plan has {len(self.buffers)}")
                buffer = self.buffers[value.buffer]
                if value.offset < 0 or value.width < 1 or value.offset + value.width > buffer.width:
                    raise ValueError(
                        f"{where}: columns [{value.offset}, {value.offset + value.width}) leave a buffer of width {buffer.width}"
                    )
                if value.rows != buffer.rows:
                    raise ValueError(f"{where}: value of {value.rows} rows in a buffer of {buffer.rows} rows")
            for value in op.reads:
                if not _covered(spans.get(value.buffer, []), value.offset, value.offset + value.width):
                    raise ValueError(
                        f"{where}: reads columns [{value.offset}, {value.offset + value.width}) of buffer {value.buffer} before they are written"
                    )
            for weight in op.weights:
                if names.setdefault(weight.name, weight) != weight:
                    raise ValueError(
                        f"{where}: weight {weight.name} is used with two shapes: {names[weight.name]} and {weight}"
                    )
            _check_shapes(where, op, self)
            if isinstance(op, Attention):
                if op.layer in layers:
                    raise ValueError(f"{where}: layer {op.layer} has two attention ops")
                layers.add(op.layer)
            for value in op.writes:
                spans.setdefault(value.buffer, []).append((value.offset, value.offset + value.width))
        if layers != set(range(self.kv.num_layers)):
            raise ValueError(
                f"attention layers are {sorted(layers)}, the KV cache has layers 0..{self.kv.num_layers - 1}"
            )
        if not self.ops or not isinstance(self.ops[-1], Sample):
            raise ValueError("the last op must be sample")


def _covered(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    """True if the union of the half-open spans contains [start, end)."""
    for low, high in sorted(spans):
        if low <= start < high:
            start = high
    return start >= end


def _check_shapes(where: str, op: Op, plan: Plan) -> None:
    def require(ok: bool, text: str) -> None:
        if not ok:
            raise ValueError(f"{where}: {text}")

    match op:
        case Embed():
            require(
                op.table.num_inputs == op.out.width, f"rows of {op.table.num_inputs} columns into width {op.out.width}"
            )
            require(
                op.table.num_outputs == plan.vocab_size,
                f"{op.table.num_outputs} rows for a vocabulary of {plan.vocab_size}",
            )
        case RmsNorm():
            require(op.x.width == op.out.width, f"width {op.x.width} into {op.out.width}")
            require(
                op.weight.num_outputs == 1 and op.x.width % op.weight.num_inputs == 0,
                f"weight of {op.weight.num_inputs} for width {op.x.width}",
            )
            require(op.add_to is None or op.add_to == op.out, "add_to must be the value that is written")
        case Linear():
            require(
                all(w.num_inputs == op.x.width for w in op.parts),
                f"inputs {[w.num_inputs for w in op.parts]} for width {op.x.width}",
            )
            require(
                sum(w.num_outputs for w in op.parts) == op.out.width,
                f"outputs {[w.num_outputs for w in op.parts]} into width {op.out.width}",
            )
            biases = [w.num_inputs for w in op.biases]
            require(
                not biases or biases == [w.num_outputs for w in op.parts], f"biases {biases} do not match the parts"
            )
            require(op.add_to is None or op.add_to == op.out, "add_to must be the value that is written")
        case Rope():
            require(
                op.head_dim % 2 == 0 and op.x.width % op.head_dim == 0, f"heads of {op.head_dim} in width {op.x.width}"
            )
            require(
                all((w.num_outputs, w.num_inputs) == (1, op.head_dim // 2) for w in op.weights),
                f"factors {op.factors} for heads of {op.head_dim}, wanted a vector of {op.head_dim // 2}",
            )
        case Attention():
            require(op.num_heads % op.num_kv_heads == 0, f"{op.num_heads} query heads over {op.num_kv_heads} KV heads")
            require(
                (op.num_kv_heads, op.head_dim) == (plan.kv.num_kv_heads, plan.kv.head_dim),
                "KV heads differ from the cache's",
            )
            widths = [op.q.width, op.k.width, op.v.width, op.out.width]
            wanted = [n * op.head_dim for n in (op.num_heads, op.num_kv_heads, op.num_kv_heads, op.num_heads)]
            require(widths == wanted, f"widths {widths} of q, k, v, out, wanted {wanted}")
            require(op.window >= 0, f"a window of {op.window} keys")
        case Glu():
            require(op.x.width == 2 * op.out.width, f"width {op.x.width} into {op.out.width}")
        case TakeRows():
            require(
                op.x.width == op.out.width and op.out.rows == "logits",
                f"width {op.x.width} into {op.out.width} of {op.out.rows}",
            )
        case Sample():
            require(
                op.logits.width == plan.vocab_size,
                f"logits of width {op.logits.width} for a vocabulary of {plan.vocab_size}",
            )


class PlanBuilder:
    """Write a model as calls; each call appends an op and returns the value that it writes."""

    def __init__(self, kv: KvSpec, vocab_size: int):
        self._kv = kv
        self._vocab_size = vocab_size
        self._ops: list[Op] = []
        self._buffers: list[Buffer] = []

    def _new(self, rows: Rows, width: int) -> Value:
        self._buffers.append(Buffer(rows, width))
        return Value(len(self._buffers) - 1, 0, width, rows)

    def embed(self, table: WeightSpec, scale: float = 1.0) -> Value:
        out = self._new("tokens", table.num_inputs)
        self._ops.append(Embed(table, out, scale))
        return out

    def rms_norm(self, x: Value, weight: WeightSpec, eps: float, add_to: Value | None = None) -> Value:
        out = add_to if add_to is not None else self._new(x.rows, x.width)
        self._ops.append(RmsNorm(x, weight, eps, out, add_to))
        return out

    def linear(
        self, x: Value, *parts: WeightSpec, biases: tuple[WeightSpec, ...] = (), add_to: Value | None = None
    ) -> Value:
        out = add_to if add_to is not None else self._new(x.rows, sum(w.num_outputs for w in parts))
        self._ops.append(Linear(x, parts, out, biases, add_to))
        return out

    def split(self, x: Value, *widths: int) -> tuple[Value, ...]:
        """Views of x's columns, side by side; no op."""
        assert sum(widths) == x.width, f"widths {widths} do not sum to {x.width}"
        offsets = [sum(widths[:i]) for i in range(len(widths))]
        return tuple(Value(x.buffer, x.offset + o, w, x.rows) for o, w in zip(offsets, widths, strict=True))

    def rope(self, x: Value, head_dim: int, theta: float, style: str, factors: WeightSpec | None = None) -> Value:
        assert style in ("halves", "interleaved"), style
        self._ops.append(Rope(x, head_dim, theta, style, factors))  # type: ignore[arg-type]
        return x

    def attention(
        self, q: Value, k: Value, v: Value, layer: int, num_heads: int, scale: float, window: int = 0
    ) -> Value:
        out = self._new("tokens", q.width)
        kv = self._kv
        self._ops.append(Attention(q, k, v, out, layer, num_heads, kv.num_kv_heads, kv.head_dim, scale, window))
        return out

    def glu(self, x: Value, activation: Activation = "silu") -> Value:
        out = self._new(x.rows, x.width // 2)
        self._ops.append(Glu(x, out, activation))
        return out

    def take_rows(self, x: Value) -> Value:
        out = self._new("logits", x.width)
        self._ops.append(TakeRows(x, out))
        return out

    def sample(self, logits: Value) -> None:
        self._ops.append(Sample(logits))

    def build(self) -> Plan:
        """Check the plan as written, then share buffers between values that are never alive together."""
        written = Plan(tuple(self._ops), tuple(self._buffers), self._kv, self._vocab_size)  # type: ignore[arg-type]
        written.verify()
        plan = _share_buffers(written)
        plan.verify()
        return plan


def _share_buffers(plan: Plan) -> Plan:
    """Give each buffer the first physical one of its rows and width that is free from its first write to its last use."""
    last_use: dict[int, int] = {}
    for index, op in enumerate(plan.ops):
        for value in op.reads + op.writes:
            last_use[value.buffer] = index
    physical: list[Buffer] = []
    home: dict[int, int] = {}
    free: list[int] = []
    for index, op in enumerate(plan.ops):
        for value in op.writes:
            if value.buffer not in home:
                wanted = plan.buffers[value.buffer]
                match = next((p for p in free if physical[p] == wanted), None)
                if match is None:
                    physical.append(wanted)
                    match = len(physical) - 1
                else:
                    free.remove(match)
                home[value.buffer] = match
        free += sorted({home[v.buffer] for v in op.reads + op.writes if last_use[v.buffer] == index})

    def moved(value: object) -> object:
        return msgspec.structs.replace(value, buffer=home[value.buffer]) if isinstance(value, Value) else value

    ops = tuple(
        msgspec.structs.replace(op, **{f: moved(getattr(op, f)) for f in op.__struct_fields__}) for op in plan.ops
    )
    return Plan(ops, tuple(physical), plan.kv, plan.vocab_size)
