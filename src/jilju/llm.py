"""LLM: a model in this process, for scripts and notebooks.

    from jilju import LLM, SamplingParams

    with LLM("smollm2-135m") as llm:
        for done in llm.generate(["The sky is", "Two plus two is"], SamplingParams(temperature=0, max_tokens=16)):
            print(done.prompt, "->", done.text)
        for piece in llm.stream("Once upon a time"):
            print(piece.text, end="", flush=True)
        print(llm.chat([{"role": "user", "content": "Who are you?"}]).text)

Owns the step loop of an in-process engine and the text pipeline of its requests. All prompts of a call share the engine's
batch; a completion has the same tokens alone, in a batch and from the server. One thread at a time may use an LLM.
"""

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from jilju.assemble.engine import build_engine, open_model, resolve_engine
from jilju.assemble.gpu import find_device
from jilju.assemble.text import load_text
from jilju.config import DEFAULT_MODEL, engine_config
from jilju.engine.request import (
    EngineEvent,
    FinishReason,
    Request,
    RequestAborted,
    RequestEnded,
    RequestFailed,
    SamplingParams,
    TokenEvent,
    is_terminal,
)
from jilju.errors import ContextLengthExceeded, EmptyPrompt, InternalError, InvalidValue, Overloaded, TemplateFailed
from jilju.plan import KvDtype, WeightDtype
from jilju.text.stream import TextStream
from jilju.text.template import encode_chat

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
REST_OF_CONTEXT = -1


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (id, logprob), most probable first; or logprob_token_ids in their order


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished answer. `token_ids` counts every token that was made, the one that ended it included."""

    prompt: Prompt
    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None  # the stop string or stop id that ended it
    seed: int  # the one given, or the one drawn: with it the completion can be had again
    logprobs: list[TokenLogprob] | None
    num_cached_tokens: int


class Piece(msgspec.Struct, frozen=True):
    """What one token adds to the text of prompt `index`; `text` may be empty. The last piece carries the completion."""

    index: int
    text: str
    token_id: int | None
    completion: Completion | None = None


class _Run:
    """One prompt of a call, on its way."""

    def __init__(self, index: int, prompt: Prompt, request: Request, text: TextStream):
        self.index, self.prompt, self.request, self.stream = index, prompt, request, text
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.stop: str | None = None  # the stop string that was found; the completion waits for the engine's last word

    def completion(self, reason: FinishReason, stop: str | int | None, num_cached: int) -> Completion:
        params = self.request.params
        assert params.seed is not None
        return Completion(
            prompt=self.prompt, prompt_ids=self.request.prompt_ids, text=self.text, token_ids=self.token_ids, finish_reason=reason,
            stop_reason=stop, seed=params.seed, logprobs=self.logprobs if params.wants_logprobs else None, num_cached_tokens=num_cached,
        )  # fmt: skip


class LLM:
    """A model with an engine of its own. `model` is a name of `jilju models`, or the path of a GGUF file or a model folder.

    `device` "cuda" computes on an NVIDIA GPU, whose settings are `fast` and `weight_dtype`; `load_format` "dummy" makes up
    weights for a folder with a config.json.
    `context` is the longest sequence in tokens and `kv_memory` the memory of the KV cache ("1GiB" or bytes); by default both
    are chosen as `jilju serve` does. `packed_cache` is the folder of packed weights, or "off" to pack them at every start;
    `huge_pages` puts them into the process's own memory, which is faster. `progress` is told while a model is fetched or packed. `accept_licence` names the terms of a model that has some ("gemma"); that
    they are accepted is recorded, so it is needed once. Raises StartupError if the model cannot be had, read or held.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, device: Literal["cpu", "cuda"] = "cpu", fast: bool = False,
        weight_dtype: Literal["auto"] | WeightDtype = "auto", load_format: Literal["auto", "dummy"] = "auto",
        context: int | None = None, kv_memory: int | str | None = None, max_rows: int | None = None,
        step_tokens: int | None = None, threads: int | None = None, kv_dtype: Literal["auto"] | KvDtype = "auto",
        packed_cache: str | None = None, huge_pages: Literal["auto", "on", "off"] = "auto",
        progress: Callable[[int, int, str], None] | None = None, accept_licence: str | None = None,
    ):  # fmt: skip
        config = engine_config(
            model, device=device, fast=fast, weight_dtype=weight_dtype, load_format=load_format, context=context,
            kv_memory=kv_memory, max_rows=max_rows, step_tokens=step_tokens, threads=threads, kv_dtype=kv_dtype,
            packed_cache=packed_cache, huge_pages=huge_pages,
        )  # fmt: skip
        find_device(config)  # before a model is fetched for nothing
        model_file = open_model(model, progress or _silent, accept_licence, load_format)
        self.config, options, self.memory = resolve_engine(model_file, config)
        self.name, self.path = model_file.name, model_file.path
        self.text = load_text(model_file)
        self.engine = build_engine(options, progress=progress or _silent)
        self._num_calls = 0
        self._inboxes: dict[
            str, deque[EngineEvent]
        ] = {}  # of each request in the engine, where its stream finds its events

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the weights and the KV cache; the LLM is not used after that."""
        self.engine.close()

    @property
    def defaults(self) -> SamplingParams:
        """What a call without params uses: the model's own sampling defaults, up to the end of the context."""
        return self.text.default_params(max_tokens=REST_OF_CONTEXT)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Complete one prompt or several (texts, or lists of token ids); the completions stand in the prompts' order."""
        return self._collect(self.stream(prompts, params))

    def stream(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> Iterator[Piece]:
        """The same, token by token as they come. Leaving the loop early aborts what is left."""
        listed = _listed(prompts)
        return self._run([(p, self._encode(p)) for p in listed], params or self.defaults)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation: [{"role": "user", "content": "..."}, ...] through the model's own chat template."""
        return self._collect(self.chat_stream(messages, params))[0]

    def chat_stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Piece]:
        if self.text.template is None:
            raise TemplateFailed(f"{self.name} has no chat template: it continues text; use generate()")
        ids = encode_chat(self.text.template, self.text.tokenizer, [dict(m) for m in messages])
        return self._run([(ids, ids)], params or self.defaults)

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer = self.text.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, add_special_tokens=True)
        else:
            ids = list(prompt)
            wrong = next((i for i in ids if not (isinstance(i, int) and 0 <= i < tokenizer.vocab_size)), None)
            if wrong is not None:
                raise InvalidValue(
                    f"token id {wrong!r} is not in the vocabulary; allowed: 0 to {tokenizer.vocab_size - 1}",
                    param="prompt",
                )
        if not ids:
            raise EmptyPrompt("the prompt has no token; give at least one character", param="prompt")
        return ids

    def _run(self, prompts: list[tuple[Prompt, list[int]]], params: SamplingParams) -> Iterator[Piece]:
        """Requests are checked on the call, not on the first `next`, so that errors come where the call stands."""
        params.check()
        for _, ids in prompts:
            self._check_room(len(ids), params.max_tokens)
        params.check_ids(self.text.tokenizer.vocab_size)
        self._num_calls += 1
        runs: list[_Run] = []
        for index, (prompt, ids) in enumerate(prompts):
            wanted = (
                params.max_tokens if params.max_tokens != REST_OF_CONTEXT else self.engine.info.max_context - len(ids)
            )
            if params.min_tokens > wanted:
                raise InvalidValue(
                    f"min_tokens is {params.min_tokens}; {wanted} tokens are left of the context", param="min_tokens"
                )
            seed = params.seed if params.seed is not None else secrets.randbits(63)
            own = msgspec.structs.replace(params, max_tokens=wanted, seed=seed)
            request = Request(
                id=f"call-{self._num_calls}-{index}", prompt_ids=ids, params=own, end_ids=self.text.end_ids(own)
            )
            request.check()
            text = TextStream(self.text.tokenizer, stop=tuple(own.stop), min_tokens=own.min_tokens)
            runs.append(_Run(index, prompt, request, text))
        return self._pieces(runs)

    def _check_room(self, num_prompt_tokens: int, max_tokens: int) -> None:
        room = self.engine.info.max_context - num_prompt_tokens
        if max_tokens == REST_OF_CONTEXT and room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens and the context holds {self.engine.info.max_context}, prompt and "
                "output together; shorten the prompt or make the context larger",
                param="prompt",
            )
        if max_tokens > room:
            raise ContextLengthExceeded(
                f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the context of "
                f"{self.engine.info.max_context}; shorten one of them",
                param="max_tokens",
            )

    def _pieces(self, runs: list[_Run]) -> Iterator[Piece]:
        """Several streams may be open and read in turns: a step serves all of them, and each keeps what is its own."""
        inbox: deque[EngineEvent] = deque()
        by_id = {run.request.id: run for run in runs}
        waiting = deque(runs)
        try:
            while waiting or inbox or any(request_id in self._inboxes for request_id in by_id):
                if not inbox:
                    self._submit(waiting, inbox)
                    self._step()
                    continue
                event = inbox.popleft()
                piece = self._advance(by_id[event.request_id], event)
                if piece is not None:
                    yield piece
        finally:
            mine = [request_id for request_id in by_id if request_id in self._inboxes]
            for request_id in mine:
                self.engine.abort(request_id)
            while any(request_id in self._inboxes for request_id in mine):
                self._step()

    def _submit(self, waiting: deque[_Run], inbox: deque[EngineEvent]) -> None:
        """As many as the engine takes; the others wait here."""
        with contextlib.suppress(Overloaded):
            while waiting:
                request = waiting[0].request
                self.engine.submit(request)
                self._inboxes[request.id] = inbox
                waiting.popleft()

    def _step(self) -> None:
        for event in self.engine.step():
            self._inboxes[event.request_id].append(event)
            if is_terminal(event):
                del self._inboxes[event.request_id]

    def _advance(self, run: _Run, event: EngineEvent) -> Piece | None:
        """What an event of a request shows of its answer; None for one that shows nothing."""
        if isinstance(event, RequestFailed):
            raise InternalError(f"prompt {run.index} failed: {event.code}: {event.message}")
        if isinstance(event, RequestEnded):
            return Piece(run.index, "", None, run.completion(event.finish_reason, None, event.times.num_cached_tokens))
        if isinstance(event, RequestAborted):
            return Piece(run.index, "", None, run.completion("stop", run.stop, event.times.num_cached_tokens))
        if not isinstance(event, TokenEvent) or run.stop is not None:
            return None
        run.token_ids.append(event.token_id)
        if event.logprob is not None:
            run.logprobs.append(TokenLogprob(event.token_id, event.logprob, event.top or []))
        found = run.stream.push(event.token_id)
        text, stop = found.text, found.stop
        if stop is None and event.finish_reason is not None:
            rest = run.stream.finish()
            text, stop = text + rest.text, rest.stop
        run.text += text
        run.stop = stop
        if event.finish_reason is None:
            if stop is not None:
                self.engine.abort(run.request.id)
            return Piece(run.index, text, event.token_id)
        assert event.times is not None, "the last token of a request carries its times"
        reason: FinishReason = "stop" if stop is not None else event.finish_reason
        by_id = reason == "stop" and event.token_id in run.request.params.stop_token_ids
        reached = stop if stop is not None else event.token_id if by_id else None
        return Piece(run.index, text, event.token_id, run.completion(reason, reached, event.times.num_cached_tokens))

    @staticmethod
    def _collect(pieces: Iterator[Piece]) -> list[Completion]:
        done = [(p.index, p.completion) for p in pieces if p.completion is not None]
        return [completion for _, completion in sorted(done, key=lambda item: item[0])]


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, or ids) or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _silent(done_bytes: int, total_bytes: int, text: str) -> None:
    pass
