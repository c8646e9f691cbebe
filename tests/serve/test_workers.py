"""Worker processes: what overruns is killed and costs its own caller a 400; everybody else is served on."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jilju.assemble.worker_process import WorkerOptions, worker_command
from jilju.clock import VirtualClock
from jilju.errors import (
    GrammarTooComplex,
    InternalError,
    InvalidGrammar,
    InvalidValue,
    JiljuError,
    NotReady,
    Overloaded,
    TemplateFailed,
)
from jilju.formats.gguf import GgufFile
from jilju.serve.workers import KEPT_S, WorkerLimits, Workers
from jilju.text.grammar import GrammarSource, to_llguidance
from jilju.text.template import ChatTemplate, TemplateOverrun, guard_chat, load_template
from tests.model.tiny import add
from tests.text.conftest import make_metadata

pytestmark = pytest.mark.anyio
Start = Callable[..., AbstractAsyncContextManager[Workers]]

INTEGER = GrammarSource("json_schema", '{"type":"integer"}')
# Some 10 s of work, most of it in native code.
ENDLESS = GrammarSource("json_schema", json.dumps({"type": "object", "properties": {f"p{n}": {} for n in range(9000)}}))
LOOP = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{% endfor %}{% endfor %}{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a small vocabulary, a chat template and no model to speak of."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in make_metadata().items():
        add(writer, key, value)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def start(model: str) -> Start:
    @asynccontextmanager
    async def started(
        *, clock: VirtualClock | None = None, memory_bytes: int = 256 << 20, **limits: Any
    ) -> AsyncIterator[Workers]:
        options = WorkerOptions(model, len(make_metadata()["tokenizer.ggml.tokens"]), memory_bytes)
        workers = Workers(worker_command(options), limits=WorkerLimits(**limits), clock=clock)
        try:
            yield workers
        finally:
            process_ids = workers.process_ids
            await workers.close()
            assert [id_ for id_ in process_ids if is_alive(id_)] == []

    return started


def is_alive(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


async def told(workers: Workers, source: GrammarSource) -> str:
    """How a caller fares: "ok" or the code of its error."""
    try:
        assert await workers.compile(source) == to_llguidance(source)
    except JiljuError as error:
        return error.code
    return "ok"


LARK, REGEX, SCHEMA = "lark", "regex", "json_schema"
INVALID, COMPLEX = InvalidGrammar.code, GrammarTooComplex.code


@pytest.mark.parametrize(
    ("name", "kind", "text", "expected"),
    [
        ("B40 empty", LARK, "", INVALID),
        ("B40 rootless", LARK, 'a: "x"', INVALID),
        ("B40 unknown rule", LARK, "start: nowhere", INVALID),
        ("B40 left recursion", LARK, 'start: start "a" | "a"', INVALID),
        ("B40 endless empty loop", LARK, 'start: a*\na: ""', INVALID),
        ("B41 30,000 (", LARK, "start: " + "(" * 30_000, COMPLEX),
        ("B41 30,000 ( in a regex", REGEX, "(" * 30_000, COMPLEX),
        ("B41 100k alternatives", LARK, "start: " + "|".join(f'"a{n}"' for n in range(100_000)), COMPLEX),
        ("B41 100k short alternatives", LARK, "start: a" + "|a" * 100_000 + '\na: "x"', COMPLEX),
        ("B41 {0,1000000}", LARK, 'start: "a"{0,1000000}', COMPLEX),
        ("B41 {0,1000000} in a regex", REGEX, "a{0,1000000}", COMPLEX),
        ("B42 $ref cycle", SCHEMA, '{"$ref":"#"}', INVALID),
        ("B42 remote $ref", SCHEMA, '{"$ref":"http://127.0.0.1:1/schema.json"}', INVALID),
        ("B42 10k enum", SCHEMA, json.dumps({"enum": list(range(10_000))}), INVALID),
        ("B42 allOf depth 1000", SCHEMA, '{"allOf":[' * 1000 + "{}" + "]}" * 1000, COMPLEX),
        ("B42 contradiction", SCHEMA, '{"type":"integer","minimum":5,"maximum":3}', INVALID),
        ("B42 contradiction in allOf", SCHEMA, '{"allOf":[{"type":"string"},{"type":"null"}]}', INVALID),
        ("B42 additionalProperties", SCHEMA, '{"type":"object","required":["a"],"additionalProperties":false}', INVALID),
        ("B42 pattern of counts", SCHEMA, '{"type":"string","pattern":"(a{1000}){1000}"}', COMPLEX),
        ("B42 pattern that looks ahead", SCHEMA, '{"type":"string","pattern":"^(?=a)"}', INVALID),
        ("B42 many patterns at once", SCHEMA, json.dumps({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijkl"]}), COMPLEX),
        ("B44 (a+)+b", REGEX, "(a+)+b", "ok"),
        ("B44 (.*)*", REGEX, "(.*)*", "ok"),
        ("B44 (a|aa)+$", REGEX, "(a|aa)+$", "ok"),
        (r"B44 \w{5000}", REGEX, r"\w{5000}", "ok"),
        ("B44 ^(|.*)$", REGEX, "^(|.*)$", "ok"),
        ("B44 lookbehind", REGEX, "(?<=a)b", INVALID),
        ("B44 backreference", REGEX, r"(a)\1", INVALID),
        ("choice", "choice", '["a","b"]', "ok"),
        ("json_object", "json_object", "", "ok"),
        ("no list", "choice", '{"a":1}', INVALID),
    ],
)  # fmt: skip
async def test_bad_grammars_are_refused(shared: Workers, name, kind, text, expected):
    assert await told(shared, GrammarSource(kind, text)) == expected


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shared(model: str) -> AsyncIterator[Workers]:
    """One pool for the table: what a row does to it the next would feel."""
    workers = Workers(worker_command(WorkerOptions(model, len(make_metadata()["tokenizer.ggml.tokens"]))))
    yield workers
    assert await told(workers, GrammarSource(SCHEMA, '{"const":"still here"}')) == "ok"
    await workers.close()


async def test_b43_valid_invalid_valid_on_one_worker(start: Start):
    async with start(num_processes=1) as workers:
        assert await told(workers, INTEGER) == "ok"
        before = workers.process_ids
        assert await told(workers, GrammarSource(SCHEMA, '{"type":"nothing"}')) == INVALID
        assert await told(workers, GrammarSource(SCHEMA, '{"type":"string"}')) == "ok"
        assert workers.process_ids == before


async def test_an_error_names_the_field_it_came_from(start: Start):
    async with start() as workers:
        with pytest.raises(InvalidGrammar) as caught:
            await workers.compile(GrammarSource(SCHEMA, '{"not":{}}'), param="response_format.json_schema.schema")
        assert caught.value.param == "response_format.json_schema.schema"
        assert "not at #" in caught.value.message


async def test_what_takes_too_long_is_killed_and_the_pool_goes_on(start: Start):
    async with start(num_processes=1, grammar_s=0.2) as workers:
        first = await started_worker(workers)
        assert await told(workers, ENDLESS) == COMPLEX
        assert not is_alive(first)
        workers.limits = WorkerLimits(num_processes=1)
        assert await told(workers, INTEGER) == "ok"
        assert workers.process_ids != [first]


async def test_what_takes_too_much_memory_is_refused_and_the_pool_goes_on(start: Start):
    async with start(num_processes=1, memory_bytes=8 << 20, grammar_s=60.0) as workers:
        await started_worker(workers)
        assert await told(workers, ENDLESS) == COMPLEX
        assert await told(workers, INTEGER) == "ok"


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_worker_that_dies_in_a_job_costs_only_that_job(start: Start, signal_):
    async with start(num_processes=1) as workers:
        worker = await started_worker(workers)
        job, other = asyncio.create_task(told(workers, ENDLESS)), asyncio.create_task(told(workers, INTEGER))
        await is_working(worker)
        os.kill(worker, signal_)
        assert (await job, await other) == (COMPLEX, "ok")


async def test_a_worker_that_died_between_jobs_costs_nothing(start: Start):
    async with start(num_processes=1) as workers:
        worker = await started_worker(workers)
        os.kill(worker, signal.SIGKILL)
        assert await told(workers, INTEGER) == "ok"
        assert worker not in workers.process_ids


async def test_a_worker_that_cannot_start_is_our_fault(tmp_path):
    for command in ((sys.executable, "-c", "raise SystemExit(3)"), (str(tmp_path / "nothing"),)):
        workers = Workers(command)
        with pytest.raises(InternalError):
            await workers.compile(INTEGER)
        with pytest.raises(InternalError):  # and not remembered
            await workers.compile(INTEGER)
        await workers.close()


async def test_equal_sources_are_compiled_once_and_at_most_two_at_a_time(start: Start):
    async with start() as workers:
        texts = await asyncio.gather(*(workers.compile(INTEGER) for _ in range(20)))
        assert len(set(texts)) == 1 and len(workers.process_ids) == 1
        await asyncio.gather(*(workers.compile(GrammarSource(SCHEMA, json.dumps({"const": n}))) for n in range(20)))
        assert len(workers.process_ids) == 2


async def test_what_was_compiled_is_remembered_and_what_was_refused(start: Start):
    valid, invalid = GrammarSource(SCHEMA, "true"), GrammarSource(SCHEMA, '{"type":"nothing"}')
    async with start(num_processes=1) as workers:
        assert (await told(workers, valid), await told(workers, invalid)) == ("ok", INVALID)
        os.kill(*workers.process_ids, signal.SIGKILL)
        dead = workers.process_ids
        assert (await told(workers, valid), await told(workers, invalid)) == ("ok", INVALID)
        assert workers.process_ids == dead  # nobody was asked
        assert await told(workers, GrammarSource("regex", valid.text)) == "ok"  # the kind counts, too
        assert workers.process_ids != dead


async def test_the_cache_is_bounded_by_bytes_and_the_oldest_goes_first(start: Start):
    async with start(num_processes=1, cache_bytes=4000) as workers:
        assert workers.compile_cache_bytes == 0
        sources = [GrammarSource(SCHEMA, json.dumps({"const": n})) for n in range(20)]
        for source in sources:
            await workers.compile(source)
            assert 0 < workers.compile_cache_bytes <= 4000
        full = workers.compile_cache_bytes
        await workers.compile(GrammarSource("choice", json.dumps(["x" * 4000])))  # larger than all of it
        assert workers.compile_cache_bytes <= full
        os.kill(*workers.process_ids, signal.SIGKILL)
        dead = workers.process_ids
        await workers.compile(sources[0])
        assert workers.process_ids != dead


async def test_an_overrun_is_told_again_for_a_while(start: Start):
    clock = VirtualClock()
    async with start(num_processes=1, grammar_s=0.2, clock=clock) as workers:
        await started_worker(workers)
        assert await told(workers, ENDLESS) == COMPLEX and workers.process_ids == []
        assert await told(workers, ENDLESS) == COMPLEX and workers.process_ids == []
        clock.advance_ns(int(KEPT_S * 1e9))
        job = asyncio.create_task(told(workers, ENDLESS))
        while not workers.process_ids:
            await asyncio.sleep(0.01)
        assert await job == COMPLEX


async def test_the_queue_is_bounded(start: Start):
    async with start(num_processes=1, num_waiting=2, grammar_s=0.5) as workers:
        await started_worker(workers)
        jobs = [
            asyncio.create_task(told(workers, source)) for source in (ENDLESS, INTEGER, GrammarSource("json_object"))
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await workers.compile(GrammarSource("regex", "a"))
        assert caught.value.retry_after_s
        assert await told(workers, GrammarSource("regex", "a")) == Overloaded.code
        assert await asyncio.gather(*jobs) == [COMPLEX, "ok", "ok"]
        assert await told(workers, GrammarSource("regex", "a")) == "ok"


async def test_a_caller_that_leaves_takes_nothing_from_the_others(start: Start):
    async with start(num_processes=1) as workers:
        await started_worker(workers)
        leaving, staying = asyncio.create_task(told(workers, INTEGER)), asyncio.create_task(told(workers, INTEGER))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == "ok"
        assert leaving.cancelled() or leaving.done()


async def test_closing_ends_every_worker_and_tells_those_who_wait(start: Start):
    async with start() as workers:
        worker = await started_worker(workers)
        jobs = [
            asyncio.create_task(told(workers, source)) for source in (ENDLESS, INTEGER, GrammarSource("json_object"))
        ]
        jobs.append(asyncio.create_task(told(workers, ENDLESS)))
        await is_working(worker)
        process_ids = workers.process_ids
        await workers.close()
        results = await asyncio.gather(*jobs)
        assert results[0] == results[3] == NotReady.code
        assert [id_ for id_ in process_ids if is_alive(id_)] == [] and workers.process_ids == []
        with pytest.raises(NotReady):
            await workers.compile(GrammarSource("regex", "late"))


PARENT = """
import asyncio, sys
from jilju.serve.workers import Workers
from jilju.text.grammar import GrammarSource

async def main():
    workers = Workers(sys.argv[2:])
    await workers.compile(GrammarSource("json_object"))
    print(*workers.process_ids, flush=True)
    await workers.compile(GrammarSource("json_schema", sys.argv[1]))

asyncio.run(main())
"""


async def test_f8_a_worker_ends_with_its_server(model: str):
    """In the middle of a job: it reads nothing then."""
    command = worker_command(WorkerOptions(model, len(make_metadata()["tokenizer.ggml.tokens"])))
    schema = json.dumps({"type": "object", "properties": {f"p{n}": {} for n in range(4000)}})
    server = subprocess.Popen([sys.executable, "-c", PARENT, schema, *command], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    worker = int(await asyncio.to_thread(server.stdout.readline))
    await is_working(worker)
    server.kill()
    server.wait()
    server.stdout.close()
    while is_running(worker):  # or the test does not end
        await asyncio.sleep(0.01)


def is_running(process_id: int) -> bool:
    """Alive, and not only waiting to be buried by an init that may not do so."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def started_worker(workers: Workers) -> int:
    """A worker that has loaded all it needs for grammars."""
    assert await told(workers, GrammarSource("regex", "first")) == "ok"
    return workers.process_ids[0]


async def is_working(process_id: int) -> None:
    """Until the process has computed for a tenth of a second from now on."""
    begin = cpu_s(process_id)
    while cpu_s(process_id) < begin + 0.1:
        await asyncio.sleep(0.01)


def cpu_s(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- templates -------------------------------------------------------------------------------------------------------


def model_template(model: str) -> ChatTemplate:
    metadata = GgufFile.open(model).metadata
    template = load_template(metadata, lambda id_: metadata["tokenizer.ggml.tokens"][id_].encode(), file=model)
    assert template is not None
    return template


async def test_a_worker_renders_as_the_server_does(start: Start, model: str, tiny_tokenizer):
    template = model_template(model)
    messages = [{"role": "user", "content": "<|im_end|> 안녕 \n"}, {"role": "assistant", "content": "so"}]
    async with start() as workers:
        for options in (
            {},
            {"add_generation_prompt": False},
            {"continue_final_message": True},
            {"tools": [{"type": "function"}]},
        ):
            assert await workers.render(messages, options) == template.render(messages, **options)
        chat = guard_chat(template, tiny_tokenizer, messages)
        assert chat.pieces(await workers.render(chat.messages, chat.options)) == chat.pieces(
            template.render(chat.messages, **chat.options)
        )


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Any:
    from jilju.text.gguf_tokenizer import load_tokenizer

    return load_tokenizer(make_metadata(), file="tiny.gguf")


def test_a_rendering_beyond_its_budget_is_an_overrun(model: str):
    template = model_template(model)
    with pytest.raises(TemplateOverrun):
        template.render(HELLO, budget_ns=-1)
    assert "hello" in template.render(HELLO)


async def test_templates_of_requests_are_bounded_and_refused_with_their_reason(start: Start):
    async with start(num_processes=1, template_s=60.0) as workers:
        assert (
            await workers.render(HELLO, {"variables": {"x": 3}}, template="{{ messages[0].content * x }}")
            == "hello" * 3
        )
        for template, expected in [
            ("{% if %}", "chat_template is no template"),
            ("{{ raise_exception('not so') }}", "not so"),
            (LOOP, "fails on these messages"),  # by its units or its time, whichever ends first
            ("{{ messages[9].content.x }}", "fails on these messages"),
            (
                "{% set n = namespace(t='ab') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
                "more work",
            ),
        ]:
            with pytest.raises(TemplateFailed) as caught:
                await workers.render(HELLO, {}, template=template)
            assert expected in caught.value.message and ".gguf" not in caught.value.message
        with pytest.raises(JiljuError) as refused:
            await workers.render([], {"continue_final_message": True})
        assert (refused.value.code, refused.value.param) == (InvalidValue.code, "messages")
        assert len(workers.process_ids) == 1


async def test_a_template_that_takes_too_long_is_killed_and_the_pool_goes_on(start: Start):
    """Before its own deadline comes, as where it holds on in a single step."""
    async with start(num_processes=1, template_s=0.0) as workers:
        await workers.render(HELLO, {}, template="short")
        first = workers.process_ids[0]
        deep = "{{ " + "(" * 40 + "1" + ")" * 40 + " }}"
        with pytest.raises(TemplateFailed, match="takes longer"):
            await workers.render(HELLO, {}, template=deep * 2900)
        assert not is_alive(first)
        assert "hello" in await workers.render(HELLO, {})


async def test_many_jobs_of_both_kinds_go_through_together(start: Start):
    async with start() as workers:
        results = await asyncio.gather(
            *(workers.compile(GrammarSource(SCHEMA, json.dumps({"const": n}))) for n in range(20)),
            *(workers.render([{"role": "user", "content": str(n)}], {}) for n in range(20)),
        )
        assert all(f'"const":{n}' in results[n] for n in range(20))
        assert all(f"user\n{n}<" in results[20 + n] for n in range(20))
