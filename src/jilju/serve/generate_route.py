"""The generating routes: one call from its head to its terminal state.

Owns the order of checks, the ledger record, and the race of the answer against the client's leaving. Knows nothing of the
fields and shapes of a family: an `Api` has those.
"""

import asyncio
import logging
from functools import partial
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from jilju.engine.admission import Admission
from jilju.engine.request import Request, SamplingParams
from jilju.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InternalError,
    JiljuError,
    NotReady,
    Overloaded,
    UnsupportedParameter,
)
from jilju.serve.answer import Head, Renderer, Usage, usage_so_far
from jilju.serve.api import Api
from jilju.serve.body import ClientLeft, read_fields
from jilju.serve.context import ServerContext
from jilju.serve.deadlines import Deadlines, HeaderTimes, header_times, make_deadlines
from jilju.serve.door.auth import cache_salt, priority_of
from jilju.serve.door.gate import Arrival, arrival_of, ignored_of
from jilju.serve.door.quota import tokens_to_charge
from jilju.serve.door.transport import ABORT
from jilju.serve.generation import Choice, EncodedPrompt, Generation, Together
from jilju.serve.ledger import CLIENT_LEFT_STATUS, Call, SequenceLife, state_of
from jilju.serve.places import Places
from jilju.serve.sampling import (
    GenerationFields,
    check_is_run,
    check_model,
    choice_seed,
    end_ids,
    estimated_tokens,
    sampling_params,
    stops_of,
)
from jilju.serve.server import Server
from jilju.serve.stream import Writer
from jilju.serve.timings import Marks, Timings, make_timings
from jilju.text.grammar import GrammarSource
from jilju.text.history import RememberedStream
from jilju.text.stops import StopStrings
from jilju.text.stream import TextOptions, TextStream

logger = logging.getLogger("jilju.serve")


class GenerateRoute:
    """An ASGI endpoint."""

    def __init__(self, server: Server, api: Api[Any]):
        self._server, self._api = server, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = arrival_of(scope)
        arrival.accepted = True
        ledger = self._server.ledger
        call = ledger.accept(
            Call(
                id=arrival.id,
                route=self._api.path,
                key_name=arrival.key.name if arrival.key else None,
                label=arrival.label,
                received_ns=arrival.received_ns,
            )
        )
        cut: asyncio.Future[JiljuError] = asyncio.get_running_loop().create_future()
        call.cut = lambda error: None if cut.done() else cut.set_result(error)
        marks = call.marks = Marks(received_ns=arrival.received_ns)
        call.run_id = self._api.id_prefix + call.id
        limits = self._server.context.limits
        writer = Writer(send, self._server.context.clock, marks.note_send)
        try:
            http = HttpRequest(scope, receive)
            times = header_times(http.headers)
            self._check_door(http.headers, arrival)
            taken = partial(self._taken, ignored_of(scope))
            fields, estimates = await read_fields(http, limits, taken, partial(self._body_came, marks))
            answer = self._answer(fields, estimates, times, arrival, call, marks, writer)
            await _unless_left(receive, answer, cut)
        except ClientLeft:
            ledger.end(call, "client_cancelled", CLIENT_LEFT_STATUS)
            if (abort := scope.get(ABORT)) is not None:  # a reader that has stalled is not waited for
                abort()
                await asyncio.sleep(0)
        except JiljuError as error:
            await self._fail(call, writer, error)
            if not writer.started:
                raise
        except Exception:
            logger.exception("call %s failed", call.id)
            ours = InternalError(f"an error inside the server; its log names it by {call.id}")
            await self._fail(call, writer, ours)
            if not writer.started:
                raise ours from None
        except BaseException:  # the server is being torn down under us
            ledger.end(call, "failed", 500, "internal")
            raise
        else:
            ledger.end(call, "completed", 200)

    def _body_came(self, marks: Marks) -> None:
        marks.body_ns = self._server.context.clock.now_ns()

    async def _fail(self, call: Call, writer: Writer, error: JiljuError) -> None:
        """An open stream is told as its last event; before that the answer is the error itself."""
        call.message = error.message
        if writer.started:
            try:
                await writer.end(writer.failure(error))
            except ClientLeft:
                logger.info("call %s: nobody was left to be told of %s", call.id, error.code)
        call.shed_reason = error.reason if isinstance(error, Overloaded) else None
        self._server.ledger.end(call, state_of(error), error.status, error.code)

    def _check_open(self) -> None:
        server = self._server
        server.drain.check()
        status = server.context.client.status()
        if status.state == "gone":
            raise EngineUnavailable("the engine ended and was given up; start the server again")
        if status.state != "ready":
            info = server.context.client.info
            raise NotReady(
                f"the engine is {status.state}; try again when /readyz answers 200",
                retry_after_s=1.0 if info is None else info.load_ms / 1000,
            )

    def _check_door(self, headers: Headers, arrival: Arrival) -> None:
        """Decided before a body is read, whose length says roughly what it brings."""
        self._check_open()
        length = headers.get("content-length", "")
        num_tokens = estimated_tokens(int(length[:20])) if length.isdecimal() else 1
        self._admission().check_queue(num_prompt_tokens=num_tokens, tenant=_tenant(arrival))

    def _admission(self) -> Admission:
        """With what the engine says of itself now."""
        client, admission = self._server.context.client, self._server.admission
        info = client.info
        assert info is not None, "an engine that is ready has said what it is"
        pool_tokens = info.num_blocks * info.block_size
        admission.update(client.status().step_coefficients, info.max_rows, pool_tokens, info.score_work)
        return admission

    def _taken(self, ignored: list[str] | None, body: dict[str, Any]) -> tuple[GenerationFields, list[int]]:
        """The fields, and roughly the tokens of each prompt."""
        fields = self._api.parse(body, ignored)
        return fields, self._api.estimates(fields)

    async def _answer(
        self,
        fields: GenerationFields,
        estimates: list[int],
        times: HeaderTimes,
        arrival: Arrival,
        call: Call,
        marks: Marks,
        writer: Writer,
    ) -> None:
        """From the fields to the last byte. The places in the queue are taken before anything is tokenized."""
        context = self._server.context
        check_is_run(fields)
        check_model(fields.model, context)
        call.request_id, call.session_id = fields.request_id, fields.session_id
        marks.parsed_ns = context.clock.now_ns()
        deadlines = make_deadlines(call.received_ns, times, fields, context.limits)
        self._check_open()
        num_sampled, asked = self._api.num_sampled(fields), self._api.asked(fields)
        if asked is not None:  # more than the context is refused later, or taken for what is left of it
            asked = min(asked, context.context_tokens())
        priority = priority_of(arrival.key, fields.priority)
        charge = tokens_to_charge(sum(estimates), asked, len(estimates) * num_sampled)
        self._server.quotas.charge(call, arrival.key, charge)
        places = Places(
            admission=self._admission(),
            clock=context.clock,
            call_id=call.id,
            priority=priority,
            tenant=_tenant(arrival),
            is_scored=self._api.prompt_logprobs(fields) is not None,
        )
        ids = places.take(estimates, num_sampled, asked, deadlines)
        try:
            salt = cache_salt(arrival.key, fields.cache_salt, is_shared=context.shared_prefix_cache)
            prompts, grammars = await self._prepared(fields, salt, deadlines, call, marks)
            lengths = [self._api.max_tokens(fields, len(prompt.ids), context) for prompt in prompts]
            params = await self._params(fields, min(lengths))
            self._check_open()
            choices = self._choices(fields, params, prompts, lengths, grammars, ids, salt, places, arrival, deadlines)
            places.settle([choice.request for choice in choices])
            await self._generate(fields, choices, deadlines, call, marks, writer)
        finally:
            places.give_back(ids)

    async def _prepared(
        self, fields: GenerationFields, salt: bytes, deadlines: Deadlines, call: Call, marks: Marks
    ) -> tuple[list[EncodedPrompt], list[str]]:
        """Prompts and grammars. That may take its time, or wait for a worker; from then on the engine keeps to deadlines."""
        context = self._server.context
        last_ns = min(deadlines.queue_ns, deadlines.total_ns)
        try:
            async with asyncio.timeout(max(0, last_ns - context.clock.now_ns()) / 1e9):
                prompts = await self._api.prompts(fields, context, marks, salt)
                return prompts, await self._grammars(fields, prompts, marks)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the prompt was not ready within {(last_ns - call.received_ns) / 1e9:g} s; allow more time, or ask again when less is going on"
            ) from None

    async def _generate(
        self,
        fields: GenerationFields,
        choices: list[Choice],
        deadlines: Deadlines,
        call: Call,
        marks: Marks,
        writer: Writer,
    ) -> None:
        context = self._server.context
        call.num_prompt_tokens = sum(c.request.num_prompt_tokens for c in choices if not c.request.sibling_of)
        options = fields.stream_options
        continuous = options is not None and options.continuous_usage_stats
        head = Head(
            id=call.run_id,
            created=int(context.unix_time()),
            model=context.model_name,
            fingerprint=context.fingerprint,
            include_usage=continuous or (options is not None and options.include_usage),
            continuous_usage=continuous,
            logprobs=self._api.shown_logprobs(fields),
            prompt_logprobs=fields.prompt_logprobs,
            return_token_ids=fields.return_token_ids,
            return_prompt_text=fields.return_prompt_text,
            skip_special_tokens=fields.skip_special_tokens,
            tokens_as_ids=fields.return_tokens_as_token_ids,
            num_choices=fields.n,
        )
        call.is_streamed, call.num_choices, call.params = fields.stream, fields.n, choices[0].request.params
        self._server.runs.begin(call, context.unix_time(), choices)
        generation = Generation(
            client=context.client,
            ledger=self._server.ledger,
            admission=self._server.admission,
            clock=context.clock,
            call=call,
            marks=marks,
            choices=choices,
            deadline_ns=deadlines.total_ns,
            is_call_named=self._api.is_named(fields),
            hold_last=fields.timings and not head.include_usage,
        )
        renderer = self._api.renderer(fields, head, choices, context)
        writer.failure = renderer.failure
        try:
            generation.submit()
            if fields.stream:
                await self._stream(generation, renderer, head, fields, writer)
            else:
                await self._whole(generation, renderer, fields, writer)
        finally:
            await generation.close()

    async def _grammars(self, fields: GenerationFields, prompts: list[EncodedPrompt], marks: Marks) -> list[str]:
        """Compiled, one of each prompt; "" where the answer is free."""
        if not self._api.has_form(fields):
            return [""] * len(prompts)
        context = self._server.context
        begin_ns = context.clock.now_ns()

        def sources() -> list[GrammarSource | None]:
            """In a thread: schemas of many tools take their time."""
            return [self._api.grammar(fields, prompt, context) for prompt in prompts]

        name = self._api.form_name(fields)
        grammars = [
            "" if source is None else await compiled(source, name, context)
            for source in await asyncio.to_thread(sources)
        ]
        marks.grammar_ns = context.clock.now_ns() - begin_ns
        return grammars

    async def _params(self, fields: GenerationFields, max_tokens: int) -> SamplingParams:
        """What all sequences share, checked and made once: there may be many, and lists may be long."""
        make = partial(
            sampling_params,
            fields,
            self._server.context,
            max_tokens=max_tokens,
            logprobs=self._api.logprobs(fields),
            seed=fields.seed or 0,
        )
        takes_time = bool(fields.bad_words) or fields.allowed_token_ids is not None
        return await asyncio.to_thread(make) if takes_time else make()

    def _choices(
        self,
        fields: GenerationFields,
        params: SamplingParams,
        prompts: list[EncodedPrompt],
        lengths: list[int],
        grammars: list[str],
        ids: list[str],
        salt: bytes,
        places: Places,
        arrival: Arrival,
        deadlines: Deadlines,
    ) -> list[Choice]:
        """All sequences. A given seed holds for every prompt, so that each answer equals that of the prompt alone."""
        context, api = self._server.context, self._api
        choices: list[Choice] = []
        ends = end_ids(params, context.tokenizer.eos_ids)
        options = TextOptions(
            stop=StopStrings(stops_of(fields)),
            min_tokens=fields.min_tokens,
            skip_special_tokens=fields.skip_special_tokens,
            shown_ids=api.shown_ids(fields, context),
            include_stop=fields.include_stop_str_in_output,
        )
        num_sampled = api.num_sampled(fields)
        for prompt_index, (prompt, max_tokens) in enumerate(zip(prompts, lengths, strict=True)):
            seed = context.draw_seed() if fields.seed is None else fields.seed
            first = prompt_index * num_sampled
            for number in range(num_sampled):
                request = Request(
                    id=ids[first + number],
                    prompt_ids=prompt.ids,
                    params=msgspec.structs.replace(params, max_tokens=max_tokens, seed=choice_seed(seed, number)),
                    end_ids=ends,
                    salt=salt,
                    grammar=grammars[prompt_index],
                    prompt_logprobs=None if number else api.prompt_logprobs(fields),
                    tenant=places.tenant,
                    priority=places.priority,
                    arrival_ns=arrival.received_ns,
                    deadline_ns=deadlines.total_ns,
                    queue_deadline_ns=deadlines.queue_ns,
                    sibling_of=ids[first] if number else "",
                    number=self._server.ledger.next_number(),
                )
                index = first + number
                life = SequenceLife(request.number, index, prompt_index, len(prompt.ids))
                parser = api.parser(fields, prompt, context)
                text = self._text(options, prompt)
                choices.append(Choice(index, request, text, life, parser=parser, prompt=prompt))
        return choices

    def _text(self, options: TextOptions, prompt: EncodedPrompt) -> TextStream:
        context = self._server.context
        if prompt.opening is None:
            return TextStream(context.tokenizer, **options)
        assert context.history is not None, "only a history knows where an answer begins"
        return RememberedStream(context.tokenizer, context.history, prompt.opening, **options)

    async def _stream(
        self, generation: Generation, renderer: Renderer, head: Head, fields: GenerationFields, writer: Writer
    ) -> None:
        silence_s = self._server.context.limits.silence_s
        call, choices = generation.call, generation.choices
        together = Together(fields.stream_interval)
        async for found in generation.deltas(lambda: silence_s if writer.started else None):
            if not found:
                await writer.events(renderer.silence)
                continue
            deltas = together.take(found)
            usage = usage_so_far(choices) if head.continuous_usage else None
            data = []
            for delta in deltas:
                last = generation.hold_last and delta is deltas[-1] and all(choice.ended for choice in choices)
                data.append(renderer.chunk(delta, usage, self._timings(generation) if last else None))
            if data:
                await writer.events(b"".join(data))
            if not call.first_token_ns and call.num_output_tokens:
                call.first_token_ns = self._server.context.clock.now_ns()
        timings = self._timings(generation) if fields.timings and head.include_usage else None
        ending = renderer.ending(self._usage(generation, fields), timings)
        generation.marks.encoded_ns = self._server.context.clock.now_ns()
        await writer.end(ending)

    async def _whole(
        self, generation: Generation, renderer: Renderer, fields: GenerationFields, writer: Writer
    ) -> None:
        call = generation.call
        async for deltas in generation.deltas(lambda: None):
            for delta in deltas:
                renderer.add(delta)
            if not call.first_token_ns and call.num_output_tokens:
                call.first_token_ns = self._server.context.clock.now_ns()
        timings = self._timings(generation) if fields.timings else None
        answer = renderer.whole(self._usage(generation, fields), timings)
        generation.marks.encoded_ns = self._server.context.clock.now_ns()
        await writer.whole(answer)

    def _usage(self, generation: Generation, fields: GenerationFields) -> Usage:
        return usage_so_far(generation.choices, self._server.context.tokenizer if fields.timings else None)

    def _timings(self, generation: Generation) -> Timings:
        """Of the sequence that ended last, for it decided how long the call took."""
        choice = max(generation.choices, key=lambda choice: choice.times.last_token_ns if choice.times else 0)
        seed = generation.choices[0].request.params.seed
        assert seed is not None, "seeds are drawn before a request is made"
        return make_timings(
            generation.marks,
            choice.times,
            first_sent_ns=generation.call.first_token_ns,
            num_tokens=choice.num_tokens,
            seed=seed,
            now_ns=self._server.context.clock.now_ns(),
        )


async def compiled(source: GrammarSource, name: str, context: ServerContext) -> str:
    """As the engine takes it. `name`: the field that it comes from."""
    if context.workers is None:
        raise UnsupportedParameter(f"{name} is given and this server holds no answer to a form", param=name)
    return await context.workers.compile(source, param=name)


def _tenant(arrival: Arrival) -> str:
    return arrival.key.name if arrival.key is not None else ""


async def _unless_left(receive: Receive, answer: Any, cut: "asyncio.Future[JiljuError]") -> None:
    """Runs the answer. Ends it and raises ClientLeft if the client leaves first, or the error that the call is cut with."""
    work = asyncio.ensure_future(answer)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({work, left, cut}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return
        if cut.done():
            raise cut.result()
        raise ClientLeft
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
        del work, left, task  # who holds an error that holds this frame would keep all of a call until a collection


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
