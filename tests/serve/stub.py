"""Stand-ins for the tests of the server: a byte tokenizer and an engine client whose answers are a function of the request.

Owns no law of the engine: it gives what a request's params ask for, token by token, and keeps what it was asked to do.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jilju.clock import Clock, WallClock
from jilju.engine.client import EngineClient, EngineInfo, EngineState, EngineStatus
from jilju.engine.events import EventLog, StepRecord
from jilju.engine.request import (
    EngineEvent,
    PromptScored,
    Request,
    RequestAborted,
    RequestEnded,
    RequestFailed,
    RequestTimes,
    TokenEvent,
)
from jilju.errors import InvalidValue, NotReady, StartupError
from jilju.serve.context import ServerContext
from jilju.text.grammar import GrammarSource
from jilju.text.template import ChatTemplate

BOS, EOS, EOT = 256, 257, 258
SPECIALS = {"<|bos|>": BOS, "<|eos|>": EOS, "<|im_end|>": EOT}
SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TEXTS = (
    "대한민국의 수도는 서울입니다. 🇰🇷 그리고 👩‍👩‍👧 가족.",
    "The quick brown fox jumps over the lazy dog. STOP and go on.",
    "a\nb\tc é ü ñ — “quoted” … end",
    "숫자 1 2 3 4 5 6 7 8 9 10 END 다음",
)


class ByteTokenizer:
    """One token a byte, and three control tokens."""

    vocab_size = 259
    bos_id: int | None = BOS
    eos_ids: tuple[int, ...] = (EOS, EOT)
    special_ids = frozenset(SPECIALS.values())
    special_texts: Mapping[str, int] = SPECIALS

    def __init__(self, add_bos: bool = False):
        self.add_bos = add_bos

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False, after_special: bool = False
    ) -> list[int]:
        ids = [BOS] if add_special_tokens and self.add_bos else []
        for piece in SPECIAL.split(text) if parse_special else [text]:
            ids += [SPECIALS[piece]] if parse_special and piece in SPECIALS else piece.encode()
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise InvalidValue(f"token id {token_id}; allowed: 0 to {self.vocab_size - 1}")
        return bytes([token_id]) if token_id < 256 else self.token_text(token_id).encode()

    def token_text(self, token_id: int) -> str:
        if token_id < 256:
            return bytes([token_id]).decode(errors="replace")
        return next(text for text, id_ in SPECIALS.items() if id_ == token_id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = (id_ for id_ in ids if not (skip_special_tokens and id_ in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")


def answer_ids(request: Request) -> list[int]:
    """One of the texts, chosen by prompt and seed, as bytes, then the end of turn."""
    seed = 0 if request.params.temperature < 1e-4 else request.params.seed
    digest = hashlib.sha256(repr((request.prompt_ids, seed)).encode()).digest()
    return [*TEXTS[digest[0] % len(TEXTS)].encode(), EOT]


def logprobs_of(token_id: int, count: int) -> list[tuple[int, float]]:
    """`count` ids, the chosen one first."""
    return [((token_id + step * 7) % 256, -0.25 * (step + 1)) for step in range(count)]


class StubCompiler:
    """Takes every grammar as it is, and remembers it. Renders what a busy machine had no time to render inline."""

    compile_cache_bytes = 0

    def __init__(self) -> None:
        self.sources: list[GrammarSource] = []
        self.template: ChatTemplate | None = None  # the context's

    async def compile(self, source: GrammarSource, *, param: str | None = None) -> str:
        self.sources.append(source)
        return f"{source.kind}: {source.text}"

    async def render(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, template: str | None = None
    ) -> str:
        found = self.template if template is None else ChatTemplate(template, file="the request")
        assert found is not None, "without a template nothing is rendered"
        return found.render(messages, **options)  # type: ignore[arg-type]

    async def close(self) -> None:
        pass


@dataclass(eq=False)
class StubClient:
    answer: Callable[[Request], Sequence[int]] = answer_ids
    delay_s: float = 0.0
    prefill_delay_s: float = 0.0
    state: EngineState = "ready"
    clock: Clock = field(default_factory=WallClock)
    num_cached: int = 3
    fail: Callable[[Request, int], RequestFailed | None] = lambda request, index: None
    max_context: int = 512
    queue_ns: int = 0  # told as the wait for the first step
    hang_at: int | None = None  # gives no token from that index on, until aborted
    load_error: str | None = None
    load_s: float = 0.0
    info: EngineInfo | None = None
    log: EventLog = field(default_factory=EventLog)
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    num_hanging: int = 0
    live: dict[str, asyncio.Event] = field(default_factory=dict)
    num_restarts: int = 0
    num_step_faults: int = 0
    num_quarantined: int = 0
    is_stuck: bool = False
    resume_ns: int = 0  # reported with every answer
    step_age_s: float = 0.0
    step_coefficients: tuple[float, float, float] = (0.0, 0.0, 0.0)
    stopped: bool = False

    def __post_init__(self) -> None:
        if self.state == "ready":
            self._loaded()

    def _loaded(self) -> None:
        self.state = "ready"
        self.info = EngineInfo(
            kernel_set="stub", invariant=True, num_threads=1, max_context=self.max_context, block_size=16, num_blocks=64, max_rows=8,
            step_tokens=64, token_gap_ms=50.0, score_work=0.5, weight_bytes=0, kv_bytes=0, workspace_bytes=0, load_ms=10.0,
        )  # fmt: skip

    async def start(self) -> None:
        await asyncio.sleep(self.load_s)
        if self.load_error is not None:
            raise StartupError(self.load_error)
        self._loaded()

    def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        if self.state != "ready":
            raise NotReady(f"the engine is {self.state}")
        request.check()
        assert request.params.seed is not None and request.prompt_ids and request.id not in self.live
        self.requests.append(request)
        self.live[request.id] = asyncio.Event()
        self.log.enter(request.number, request.tenant, self.clock.now_ns())
        return self._events(request)

    async def _events(self, request: Request) -> AsyncIterator[EngineEvent]:
        params, aborted = request.params, self.live[request.id]
        queued = self.clock.now_ns()
        scheduled = first = last = 0
        num_made = 0

        def times() -> RequestTimes:
            return RequestTimes(
                queued_ns=queued, resume_ns=self.resume_ns, scheduled_ns=scheduled, first_token_ns=first, last_token_ns=last,
                num_steps=num_made, num_cached_tokens=min(self.num_cached, request.num_prompt_tokens),
            )  # fmt: skip

        try:
            scheduled = queued + self.queue_ns
            await asyncio.sleep(self.prefill_delay_s)
            if request.prompt_logprobs is not None:
                for start in range(1, len(request.prompt_ids), 7):
                    ids = request.prompt_ids[start : start + 7]
                    tops = [logprobs_of(id_, request.prompt_logprobs) for id_ in ids]
                    yield PromptScored(request_id=request.id, start=start, logprobs=[-0.25] * len(ids), tops=tops)
            if params.max_tokens == 0:
                yield RequestEnded(request_id=request.id, finish_reason="length", times=times())
                return
            ids = list(self.answer(request))
            for index in range(params.max_tokens):
                await asyncio.sleep(self.delay_s)
                if self.hang_at is not None and index >= self.hang_at:
                    self.num_hanging += 1
                    await aborted.wait()
                    self.num_hanging -= 1
                if aborted.is_set():
                    yield RequestAborted(request_id=request.id, num_tokens=num_made, times=times())
                    return
                if self.stopped:
                    yield RequestFailed(request_id=request.id, code="not_ready", message="the engine was stopped")
                    return
                if (failure := self.fail(request, index)) is not None:
                    yield failure
                    return
                token_id = self._token(ids, index, request)
                last = self.clock.now_ns()
                first = first or last
                num_made += 1
                reason = "stop" if token_id in request.end_ids else "length" if num_made == params.max_tokens else None
                top = None if params.logprobs is None else logprobs_of(token_id, params.logprobs)
                if params.logprob_token_ids is not None:
                    top = [(wanted, -0.5) for wanted in params.logprob_token_ids]
                yield TokenEvent(
                    request_id=request.id, index=index, token_id=token_id, finish_reason=reason, top=top,
                    logprob=None if params.logprobs is None else -0.25, times=times() if reason or index == 0 else None,
                )  # fmt: skip
                if reason:
                    return
        finally:
            del self.live[request.id]
            self.log.leave(request.number, self.clock.now_ns())

    @staticmethod
    def _token(ids: list[int], index: int, request: Request) -> int:
        """Past its text an answer goes on with dots; end ids are banned until min_tokens."""
        token_id = ids[index] if index < len(ids) else ord(".")
        if token_id in (EOS, EOT) and (request.params.ignore_eos or index < request.params.min_tokens):
            return ord(".")
        return token_id

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self.live:
            self.live[request_id].set()

    def status(self) -> EngineStatus:
        return EngineStatus(
            state=self.state, num_running=len(self.live), num_waiting=0, num_blocks_free=60, num_blocks_cached=3,
            num_blocks_held=1, last_step_age_s=self.step_age_s, num_restarts=self.num_restarts, imbalance=0,
            step_coefficients=self.step_coefficients, is_stuck=self.is_stuck,
            num_step_faults=self.num_step_faults, num_quarantined=self.num_quarantined,
        )  # fmt: skip

    async def stop(self) -> None:
        self.stopped, self.state = True, "gone"


def step_record(**changes: Any) -> StepRecord:
    names = StepRecord.__struct_fields__
    return StepRecord(**(dict.fromkeys(names, 0) | {"closed_by": "open", "rows": b""} | changes))


def make_context(client: EngineClient | None = None, **changes: object) -> ServerContext:
    settings: dict[str, object] = {
        "model_name": "stub",
        "tokenizer": ByteTokenizer(),
        "workers": StubCompiler(),
        "template": ChatTemplate(TEMPLATE, bos_token="<|bos|>", eos_token="<|eos|>"),
        "client": client or StubClient(),
        "max_context": client.max_context if isinstance(client, StubClient) else 512,
        "fingerprint": "fp_stub",
        "version": "0.0.test",
    }
    context = ServerContext(**(settings | changes))  # type: ignore[arg-type]
    if isinstance(context.workers, StubCompiler):
        context.workers.template = context.template
    return context
