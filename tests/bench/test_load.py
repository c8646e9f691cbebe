"""The load generator: what it sends, what it counts, against a server of known answers and against the real one."""

import asyncio
import itertools
import json
import math
import threading
from collections import Counter

import pytest

from jilju.bench.load import FIRST_ID, LoadOptions, Seen, arrivals_of, prompts_of, run_load, summarise
from jilju.bench.report import load_groups, load_tables
from jilju.errors import ConfigError, StartupError
from tests.system.conftest import needs_smollm2, smollm2_server  # noqa: F401


class KnownServer:
    """Answers in a thread: every token a chunk, then one without a choice that has the usage. Request `fails_at` gets a 503."""

    def __init__(self, chunked: bool = True, fails_at: int = -1):
        self.bodies: list[dict] = []
        self.running = self.most_running = 0
        self._chunked, self._fails_at = chunked, fails_at
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._answer, "127.0.0.1", 0), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        body = await reader.readexactly(length)
        if head.startswith("GET /v1/models "):
            await self._send(writer, 200, [json.dumps({"data": [{"id": "known"}]}).encode()])
        elif len(self.bodies) == self._fails_at:
            self.bodies.append(json.loads(body))
            await self._send(writer, 503, [b"no room"])
        else:
            self.bodies.append(json.loads(body))
            self.running += 1
            self.most_running = max(self.running, self.most_running)
            events = [{"choices": [{"text": "a"}]}] * self.bodies[-1]["max_tokens"]
            events.append({"choices": [], "usage": {"completion_tokens": self.bodies[-1]["max_tokens"]}})
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            cut = len(lines) // 3  # in the middle of a line
            await asyncio.sleep(0.01)  # so that others come meanwhile
            self.running -= 1
            await self._send(writer, 200, [lines[:cut].encode(), lines[cut:].encode()])
        writer.close()

    async def _send(self, writer, status, pieces):
        writer.write(b"HTTP/1.1 %d X\r\n" % status)
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        for piece in pieces:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if self._chunked else piece)
        writer.write(b"0\r\n\r\n" if self._chunked else b"")
        await writer.drain()


@pytest.fixture(params=[True, False], ids=["chunked", "to the end of the connection"])
def server(request):
    made = KnownServer(request.param)
    yield made
    made.close()


def test_a_closed_loop_keeps_its_bound_and_leaves_the_warm_up_out(server):
    options = LoadOptions(
        url=server.url, num_prompts=10, warmup=3, max_concurrency=3, random_input_len=5, random_output_len=4
    )
    told = []
    result = run_load(options, lambda *done: told.append(done))
    assert (result.model, result.completed, result.failed, result.first_error) == ("known", 10, 0, None)
    assert server.most_running <= 3 and result.max_concurrent_requests == 3
    assert len(server.bodies) == 13 and told[-1] == (13, 13, "requests")
    assert result.total_input_tokens == 50 and 7 * 4 <= result.total_output_tokens <= 10 * 4
    assert 0 < result.median_ttft_ms <= result.median_e2el_ms <= result.p99_e2el_ms
    assert result.client_cpu_share >= 0


def test_requests_are_greedy_streams_that_ignore_the_end(server):
    run_load(LoadOptions(url=server.url + "/v1", num_prompts=1, random_input_len=5, random_output_len=4, model="other"))
    body = server.bodies[0]
    assert body.pop("prompt") == prompts_of(LoadOptions(url="", num_prompts=1, random_input_len=5))[0]
    assert body == {
        "model": "other", "max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_failed_request_is_counted_and_told():
    server = KnownServer(fails_at=1)
    result = run_load(LoadOptions(url=server.url, num_prompts=4, max_concurrency=1, random_output_len=2))
    server.close()
    assert (result.completed, result.failed) == (3, 1)
    assert "503" in result.first_error and "no room" in result.first_error
    assert "503" in " ".join(load_tables(result)[0].columns[1].cells)


def test_a_load_of_which_nothing_succeeds_is_an_error():
    server = KnownServer(fails_at=0)
    with pytest.raises(StartupError, match=r"all 1 requests .* 503"):
        run_load(LoadOptions(url=server.url, num_prompts=1))
    server.close()


@pytest.mark.parametrize("url", ["https://example.org", "127.0.0.1:8000", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="--url"):
        run_load(LoadOptions(url=url))


def test_no_server_is_told_with_its_address():
    with pytest.raises(StartupError, match=r"127\.0\.0\.1:1"):
        run_load(LoadOptions(url="http://127.0.0.1:1"))


def test_prompts_share_the_prefix_and_nothing_else():
    options = LoadOptions(
        url="", num_prompts=20, warmup=4, random_prefix_len=30, random_input_len=10, random_vocab=5000
    )
    prompts = prompts_of(options)
    assert len(prompts) == 24 and {len(p) for p in prompts} == {40}
    assert len({tuple(p[:30]) for p in prompts}) == 1 and len({tuple(p[30:]) for p in prompts}) == 24
    assert all(FIRST_ID <= id_ < 5000 for p in prompts for id_ in p)
    assert prompts == prompts_of(options) != prompts_of(LoadOptions(url="", seed=1, num_prompts=20, warmup=4))


def test_arrivals_are_a_poisson_process():
    """Exponential gaps: mean 1/rate, standard deviation the same; five standard errors of 4000 samples is 8 %."""
    times = arrivals_of(LoadOptions(url="", num_prompts=4001, request_rate=5.0))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = math.fsum(gaps) / len(gaps)
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.2, rel=0.08) and deviation == pytest.approx(0.2, rel=0.16)
    assert Counter(arrivals_of(LoadOptions(url="", num_prompts=7))) == {0.0: 7}


def seen(start: float, *times: float, error: str | None = None) -> Seen:
    return Seen(start, 10, list(times), len(times), error)


def test_figures_follow_from_what_clients_saw():
    options = LoadOptions(url="", goodput={"ttft": 600.0, "tpot": 150.0})
    counted = [seen(0.0, 0.5, 0.6, 0.7), seen(0.0, 1.0, 1.1, 1.3), seen(1.0, 1.5, 1.8, 2.0), seen(1.0, error="gone")]
    warm = [seen(0.0, 0.1, 0.45)]
    result = summarise(options, "m", counted, warm, 0.4, 3, 0.05)
    assert (result.completed, result.failed, result.first_error) == (3, 1, "gone")
    assert result.duration == pytest.approx(1.6)
    assert result.total_output_tokens == 10, "nine, and one of the warm-up that came after the begin"
    assert result.output_throughput == pytest.approx(10 / 1.6) and result.total_token_throughput == pytest.approx(
        40 / 1.6
    )
    assert result.median_ttft_ms == pytest.approx(500) and result.p99_ttft_ms == pytest.approx(1000)
    assert result.mean_tpot_ms == pytest.approx((100 + 150 + 250) / 3)
    assert result.median_itl_ms == pytest.approx(150) and result.p95_itl_ms == pytest.approx(300)
    assert result.median_e2el_ms == pytest.approx(1000)
    assert result.request_goodput == pytest.approx(1 / 1.6), "the first keeps both bounds"
    assert len(load_groups(result)) == 4


@needs_smollm2
def test_the_real_server_takes_the_load(smollm2_server):  # noqa: F811
    options = LoadOptions(
        url=smollm2_server.url, num_prompts=4, max_concurrency=2, random_input_len=20, random_output_len=5
    )
    result = run_load(options)
    assert (result.completed, result.failed, result.total_input_tokens, result.total_output_tokens) == (4, 0, 80, 20)
    assert result.model == "smollm2-135m"
