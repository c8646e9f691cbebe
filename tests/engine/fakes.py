"""A deterministic executor without a model, and the oracle that says what a request alone would get.

A slot of the cache holds a hash of its token, its position and every slot before it, read through the block table. A token
is a hash of its slot, seed and position. A stale block, a wrong table, a false prefix hit or a skipped chunk changes a
hash, and so changes tokens. Knows nothing of the scheduler.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jilju.engine.request import EngineEvent, PromptScored, RepetitionDetection, Request, SamplingParams
from jilju.formats.ggml import GgmlType
from jilju.plan import Batch, KvDtype, KvSpec, Limits, Plan, PlanBuilder, StepResult, WeightSpec
from jilju.plan.batch import MAX_TOP

VOCAB = 40  # tokens that are ever made
NAN_TOKEN = 40  # a prompt with this token has NaN logits from there on
RAISE_TOKEN = 41  # a step that computes this token raises
POISON = np.uint64(0xDEADDEADDEADDEAD)
MASK = 2**64 - 1


def tiny_plan(vocab_size: int = VOCAB + 2) -> Plan:
    def w(name: str, rows: int, columns: int) -> WeightSpec:
        return WeightSpec(name, GgmlType.F32, rows, columns)

    b = PlanBuilder(KvSpec(num_layers=2, num_kv_heads=1, head_dim=4), vocab_size)
    x = b.embed(w("embed", vocab_size, 8))
    for layer in range(2):
        h = b.rms_norm(x, w(f"{layer}.norm", 1, 8), 1e-5)
        q, k, v = b.split(b.linear(h, w(f"{layer}.qkv", 16, 8)), 8, 4, 4)
        b.rope(q, 4, 1e4, "halves")
        b.rope(k, 4, 1e4, "halves")
        x = b.linear(b.attention(q, k, v, layer, 2, 0.5), w(f"{layer}.o", 8, 8), add_to=x)
    b.sample(b.linear(b.take_rows(x), w("head", vocab_size, 8)))
    return b.build()


def mix(*words: int) -> int:
    """A 64-bit hash of the words (the finaliser of splitmix64, chained)."""
    h = 0x9E3779B97F4A7C15
    for word in words:
        h = (h ^ (word & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & MASK
        h ^= h >> 31
    return h


def slot_hash(before: np.ndarray, token: int) -> int:
    """The slot of `token` after slots `before` [uint64]: every slot before it enters with a weight of its position."""
    weights = np.arange(1, 2 * len(before), 2, dtype=np.uint64)
    return mix(int((before * weights).sum(dtype=np.uint64)), len(before), token)


def choose(slot: int, noise: tuple[int, int], changes: int, allowed: set[int], vocab: int) -> int:
    """`noise` is (seed, position), (0, 0) for a greedy row; `changes` stands for all that would change logits."""
    h = mix(slot, *noise, changes)
    while h % vocab not in allowed:
        h = mix(h)
    return h % vocab


def changes_of(penalties: tuple[float, ...], counts: Mapping[int, int], bias: Mapping[int, float]) -> int:
    """Penalties, how often each id is in the output (0: in the prompt alone), biases; 0 if nothing changes a logit."""
    numbers = [round(x * 1000) for x in penalties]
    hashes = [mix(token, count, *numbers) for token, count in counts.items()]
    return sum(hashes + [mix(token, round(x * 1000), 9) for token, x in bias.items()])


def logprob_of(slot: int, token: int) -> float:
    return float(np.float32(-(mix(slot, token) % 1000) / 64))


class FakeExecutor:
    name = "fake"
    kernel_set = "fake"
    invariant = True

    def __init__(self, limits: Limits, vocab: int = VOCAB, before_step: Callable[[], None] | None = None):
        self._limits = limits
        self._vocab = vocab
        self._before_step = before_step or (lambda: None)
        self.slots = np.full(limits.num_blocks * limits.block_size, POISON, np.uint64)
        self._batch: Batch | None = None
        self.num_steps = 0

    def kv_bytes_per_token(self, plan: Plan, kv_dtype: KvDtype = "f16") -> int:
        return 2 * plan.kv.elements_per_token

    def workspace_bytes(self, plan: Plan, limits: Limits) -> int:
        return plan.workspace_bytes(limits.max_tokens, limits.max_tokens)

    def load(self, plan, weights, limits) -> None:
        raise NotImplementedError("the fake has no weights to load")

    def free(self) -> None:
        self.slots = np.empty(0, np.uint64)

    def poison(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self.slots[block_id * self._limits.block_size :][: self._limits.block_size] = POISON

    def launch(self, batch: Batch) -> None:
        assert self._batch is None, "launched twice without wait"
        assert 1 <= batch.num_rows <= self._limits.max_rows and batch.num_tokens <= self._limits.max_tokens
        self._batch = batch

    def wait(self) -> StepResult:
        batch, self._batch = self._batch, None
        assert batch is not None, "waited for nothing"
        self._before_step()
        batch.wait_for_masks()
        self.num_steps += 1
        if RAISE_TOKEN in batch.token_ids:
            raise RuntimeError("a token of this step raises")
        size, token = self._limits.block_size, 0
        computed: list[int] = []  # slot hash of each token of the batch
        written: set[int] = set()
        is_nan: list[bool] = []
        for row, (start, count) in enumerate(zip(batch.starts.tolist(), batch.counts.tolist(), strict=True)):
            table = batch.block_tables[row].astype(np.int64)
            positions = np.arange(start + count)
            slots = table[positions // size] * size + positions % size
            assert (slots >= 0).all(), f"row {row} has no block for a position"
            for position in range(start, start + count):
                token_id = int(batch.token_ids[token])
                value = slot_hash(self.slots[slots[:position]], token_id)
                assert int(slots[position]) not in written, "two tokens of a step write one slot"
                written.add(int(slots[position]))
                self.slots[slots[position]] = value
                computed.append(value)
                is_nan.append(token_id == NAN_TOKEN)
                token += 1
        assert token == batch.num_tokens
        return self._sample(batch, computed, is_nan)

    def _sample(self, batch: Batch, computed: list[int], is_nan: list[bool]) -> StepResult:
        n = batch.num_logits
        result = StepResult(
            token_ids=np.zeros(n, np.int32),
            logprobs=np.zeros(n, np.float32),
            top_ids=np.full((n, MAX_TOP), -1, np.int32),
            top_logprobs=np.zeros((n, MAX_TOP), np.float32),
            wanted_logprobs=np.zeros(len(batch.wanted_ids), np.float32),
            finite=np.ones(n, np.bool_),
        )
        assert (np.diff(batch.logit_tokens) > 0).all(), "logit rows ascend"
        for i, token in enumerate(batch.logit_tokens.tolist()):
            slot = computed[token]
            chosen = int(batch.targets[i])
            result.finite[i] = not is_nan[token]
            if chosen < 0 and not (allowed := self._allowed(batch, i)):
                result.finite[i] = False
            elif chosen < 0:
                greedy = batch.temperatures[i] < 1e-4
                noise = (0, 0) if greedy else (int(batch.seeds[i]), int(batch.positions[i]))
                chosen = choose(slot, noise, self._changes(batch, i), allowed, self._vocab)
            result.token_ids[i] = chosen
            result.logprobs[i] = logprob_of(slot, chosen)
            for k in range(int(batch.num_top[i])):
                result.top_ids[i, k], result.top_logprobs[i, k] = k, logprob_of(slot, k)
            for k in range(batch.wanted_starts[i], batch.wanted_starts[i + 1]):
                result.wanted_logprobs[k] = logprob_of(slot, int(batch.wanted_ids[k]))
        return result

    @staticmethod
    def _changes(batch: Batch, i: int) -> int:
        penalised = slice(batch.penalty_starts[i], batch.penalty_starts[i + 1])
        biased = slice(batch.bias_starts[i], batch.bias_starts[i + 1])
        ids = batch.penalty_ids[penalised].tolist()
        assert len(set(ids)) == len(ids), "an id is penalised once"
        columns = (batch.repetition_penalties, batch.presence_penalties, batch.frequency_penalties)
        return changes_of(
            tuple(float(column[i]) for column in columns),
            dict(zip(ids, batch.penalty_counts[penalised].tolist(), strict=True)),
            dict(zip(batch.bias_ids[biased].tolist(), batch.biases[biased].tolist(), strict=True)),
        )

    def _allowed(self, batch: Batch, i: int) -> set[int]:
        allowed = set(range(self._vocab))
        if batch.mask_rows[i] >= 0:
            bits = np.unpackbits(batch.masks[batch.mask_rows[i]].view(np.uint8), bitorder="little")
            allowed &= set(np.flatnonzero(bits).tolist())
        return allowed - set(batch.banned_ids[batch.banned_starts[i] : batch.banned_starts[i + 1]].tolist())


def oracle(request: Request, vocab: int = VOCAB) -> tuple[list[int], str]:
    """Tokens and finish reason of the request alone: no cache, no blocks, no chunks. `output_ids` are made anew."""
    params = request.params
    assert params.seed is not None
    tokens, output = list(request.prompt_ids), []
    slots = np.empty(0, np.uint64)
    while len(output) < params.max_tokens:
        for token in tokens[len(slots) :]:
            slots = np.append(slots, np.uint64(slot_hash(slots, token)))
        banned = set(request.end_ids) if len(output) < params.min_tokens else set()
        banned |= {word[-1] for word in params.bad_words_ids if ends_with(output, word[:-1])}
        allowed = set(range(vocab) if params.allowed_token_ids is None else params.allowed_token_ids) - banned
        noise = (0, 0) if params.temperature < 1e-4 else (params.seed & MASK, len(tokens))
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        seen = tokens if params.repetition_penalty != 1 else output if penalties[1:] != (0, 0) else []
        changes = changes_of(penalties, {token: output.count(token) for token in seen}, params.logit_bias)
        chosen = choose(int(slots[-1]), noise, changes, allowed, vocab)
        tokens.append(chosen)
        output.append(chosen)
        if chosen in request.end_ids:
            return output, "stop"
        if len(output) >= params.min_tokens and repeats(output, params.repetition_detection):
            return output, "repetition"
    return output, "length"


def ends_with(output: list[int], end: Sequence[int]) -> bool:
    return output[len(output) - len(end) :] == list(end) if len(end) <= len(output) else False


def repeats(output: list[int], watched: RepetitionDetection | None) -> bool:
    """As it is written: the last tokens are one pattern, so many times."""
    if watched is None:
        return False
    sizes = range(watched.min_pattern_size, watched.max_pattern_size + 1)
    return any(ends_with(output, output[-size:] * watched.min_count) for size in sizes)


def oracle_scores(request: Request) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Logprobs of prompt_ids[1:], and the alternatives at each place if some are asked for."""
    slots = np.empty(0, np.uint64)
    scores: list[float] = []
    tops: list[list[tuple[int, float]]] = []
    for token, following in zip(request.prompt_ids, request.prompt_ids[1:], strict=False):
        slots = np.append(slots, np.uint64(slot_hash(slots, token)))
        scores.append(logprob_of(int(slots[-1]), following))
        if request.prompt_logprobs:
            tops.append([(k, logprob_of(int(slots[-1]), k)) for k in range(request.prompt_logprobs)])
    return scores, tops


def joined_scores(events: Iterable[EngineEvent]) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """What the pieces come to; each begins where the last ended."""
    scores: list[float] = []
    tops: list[list[tuple[int, float]]] = []
    for event in events:
        if isinstance(event, PromptScored):
            assert event.start == len(scores) + 1 and event.logprobs
            scores += event.logprobs
            tops += event.tops or []
    return scores, tops


def request(
    id: str, prompt: list[int], max_tokens: int = 8, *, seed: int = 0, end_ids: tuple[int, ...] = (), salt: bytes = b"",
    prompt_logprobs: int | None = None, output_ids: list[int] | None = None, **params: object,
) -> Request:  # fmt: skip
    return Request(
        id=id, prompt_ids=prompt, end_ids=end_ids, salt=salt, prompt_logprobs=prompt_logprobs, output_ids=output_ids or [],
        params=SamplingParams(seed=seed, max_tokens=max_tokens, **params),  # type: ignore[arg-type]
    )  # fmt: skip


def make_limits(
    num_blocks: int = 64, block_size: int = 4, max_rows: int = 8, max_tokens: int = 16, max_context: int = 4096
) -> Limits:
    return Limits(num_blocks, block_size, max_rows, max_tokens, max_context, num_threads=1)
