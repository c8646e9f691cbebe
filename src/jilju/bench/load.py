"""Load: many streamed completions against a running OpenAI-compatible server, and what its clients saw.

Owns the arrivals (Poisson at a rate, or so many at a time), the prompts (random ids, a shared prefix before them), and the figures, named
as `vllm bench serve` names them. Greedy, end of text ignored. A warm-up wave is sent first and left out: the figures begin when it has
ended. Knows nothing of what serves; the client speaks HTTP/1.1 itself, so as not to take the cores that it measures.
"""

import asyncio
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec

from jilju.errors import ConfigError, StartupError

FIRST_ID = 1000  # random prompts begin above what vocabularies keep for bytes and marks
MAX_LINE = 1 << 20  # bytes of a line of a stream
METRICS = ("ttft", "tpot", "itl", "e2el")


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    num_prompts: int = 128
    warmup: int = 0  # requests before them that do not count
    request_rate: float = math.inf  # a second; inf: all at once, as far as max_concurrency lets them
    max_concurrency: int | None = None
    random_input_len: int = 200
    random_output_len: int = 64
    random_prefix_len: int = 0  # ids that all prompts share, before their own
    random_vocab: int = 20_000  # ids are drawn from FIRST_ID up to here
    goodput: dict[str, float] = {}  # bounds in ms, by metric
    seed: int = 0
    model: str | None = None  # None: the first that the server names
    api_key: str | None = None
    timeout_s: float = 600.0


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """Times in ms. ttft: to the first token; tpot: per later token of a request; itl: between two tokens; e2el: to the last."""

    model: str
    duration: float  # s, from the end of the warm-up to the last token
    completed: int
    failed: int
    first_error: str | None
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float  # a second
    request_goodput: float | None
    output_throughput: float  # tokens a second, of all requests that were under way
    total_token_throughput: float
    max_concurrent_requests: int
    client_cpu_share: float  # of one core
    mean_ttft_ms: float
    median_ttft_ms: float
    p95_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    p95_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    p95_itl_ms: float
    p99_itl_ms: float
    mean_e2el_ms: float
    median_e2el_ms: float
    p95_e2el_ms: float
    p99_e2el_ms: float


@dataclass(slots=True)
class Seen:
    """What the client of one request saw."""

    start: float
    num_input: int
    token_times: list[float] = field(default_factory=list)
    num_output: int = 0  # by the server's own count
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        return (self.token_times[0] - self.start) * 1e3

    @property
    def e2el_ms(self) -> float:
        return (self.token_times[-1] - self.start) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """None for a single token."""
        return (self.e2el_ms - self.ttft_ms) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def itls_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in pairwise(self.token_times)]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


def run_load(
    options: LoadOptions, progress: Callable[[int, int, str], None] = lambda done, total, what: None
) -> LoadResult:
    """Raises ConfigError for a url that is none, StartupError if the server does not answer or every request fails."""
    return asyncio.run(_Load(options, progress).run())


def prompts_of(options: LoadOptions) -> list[list[int]]:
    """Warm-up first. All begin with the same prefix; nothing else is shared."""
    rng = random.Random(options.seed)
    ids = range(FIRST_ID, max(options.random_vocab, FIRST_ID + 1))
    prefix = rng.choices(ids, k=options.random_prefix_len)
    count = options.warmup + options.num_prompts
    return [prefix + rng.choices(ids, k=options.random_input_len) for _ in range(count)]


def arrivals_of(options: LoadOptions) -> list[float]:
    """Seconds after the begin at which each counted request is sent: exponential gaps."""
    if math.isinf(options.request_rate):
        return [0.0] * options.num_prompts
    rng, at, times = random.Random(options.seed + 1), 0.0, []
    for _ in range(options.num_prompts):
        times.append(at)
        at += rng.expovariate(options.request_rate)
    return times


class _Load:
    def __init__(self, options: LoadOptions, progress: Callable[[int, int, str], None]):
        self._options, self._progress = options, progress
        self._http = _Http(options.url, options.api_key)
        self._slots = asyncio.Semaphore(options.max_concurrency or options.num_prompts + options.warmup)
        self._num_running = self._most_running = self._num_done = 0

    async def run(self) -> LoadResult:
        options, prompts = self._options, prompts_of(self._options)
        model = options.model or await self._model()
        warm_up = [asyncio.create_task(self._one(model, prompt, 0.0)) for prompt in prompts[: options.warmup]]
        # in a closed loop the counted requests take the places that the warm-up leaves, one by one; else they wait for its end
        if options.max_concurrency is None or not math.isinf(options.request_rate):
            await asyncio.gather(*warm_up)
        begin = time.perf_counter()
        counted = [
            asyncio.create_task(self._one(model, prompt, begin + delay))
            for prompt, delay in zip(prompts[options.warmup :], arrivals_of(options), strict=True)
        ]
        warm = await asyncio.gather(*warm_up)
        begin, cpu = time.perf_counter(), time.process_time()
        seen = await asyncio.gather(*counted)
        cpu_share = (time.process_time() - cpu) / (time.perf_counter() - begin)
        return summarise(options, model, list(seen), list(warm), begin, self._most_running, cpu_share)

    async def _model(self) -> str:
        answer = await self._http.get("/v1/models")
        try:
            return msgspec.json.decode(answer, type=_Models).data[0].id
        except (msgspec.DecodeError, IndexError) as error:
            raise StartupError(f"{self._options.url}/v1/models names no model ({error}); give --model") from error

    async def _one(self, model: str, prompt: list[int], at: float) -> Seen:
        await asyncio.sleep(at - time.perf_counter())
        async with self._slots:
            self._num_running += 1
            self._most_running = max(self._most_running, self._num_running)
            seen = Seen(time.perf_counter(), len(prompt))
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    await self._stream(model, prompt, seen)
            except (
                OSError,
                StartupError,
                asyncio.IncompleteReadError,
                asyncio.LimitOverrunError,
                msgspec.DecodeError,
                TimeoutError,
            ) as error:
                seen.error = f"{type(error).__name__}: {error}"
            self._num_running -= 1
            self._num_done += 1
            self._progress(self._num_done, self._options.num_prompts + self._options.warmup, "requests")
            return seen

    async def _stream(self, model: str, prompt: list[int], seen: Seen) -> None:
        body = {
            "model": model, "prompt": prompt, "max_tokens": self._options.random_output_len, "temperature": 0.0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        decoder = msgspec.json.Decoder(_Chunk)
        async for line in self._http.post_lines("/v1/completions", msgspec.json.encode(body)):
            if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
                continue
            chunk = decoder.decode(data)
            if chunk.error is not None:
                raise StartupError(f"the stream ended with {chunk.error}")
            if chunk.choices and len(seen.token_times) < self._options.random_output_len:
                seen.token_times.append(
                    time.perf_counter()
                )  # a token is a chunk, whether its bytes are text yet or not
            if chunk.usage is not None:
                seen.num_output = chunk.usage.completion_tokens
        if not seen.token_times or not seen.num_output:
            raise StartupError("the stream ended without a token, or without usage")


def summarise(
    options: LoadOptions,
    model: str,
    counted: Sequence[Seen],
    warm: Sequence[Seen],
    begin: float,
    most_running: int,
    cpu_share: float,
) -> LoadResult:
    """Latencies are those of counted requests; throughput counts every token that came after `begin`, whoever's it was."""
    good = [seen for seen in counted if seen.error is None]
    errors = [seen.error for seen in (*warm, *counted) if seen.error is not None]
    if not good:
        raise StartupError(f"all {len(counted)} requests to {options.url} failed, the first with {errors[0]}")
    end = max(seen.token_times[-1] for seen in good)
    duration = end - begin
    num_output = sum(time_ >= begin for seen in (*warm, *good) for time_ in seen.token_times)
    num_input = sum(seen.num_input for seen in good)
    within = [seen for seen in good if all(_of(seen, name) <= bound for name, bound in options.goodput.items())]
    times = {
        "ttft": [seen.ttft_ms for seen in good],
        "tpot": [t for seen in good if (t := seen.tpot_ms) is not None],
        "itl": [t for seen in good for t in seen.itls_ms],
        "e2el": [seen.e2el_ms for seen in good],
    }
    return LoadResult(
        model=model,
        duration=duration,
        completed=len(good),
        failed=len(counted) - len(good),
        first_error=errors[0] if errors else None,
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        request_throughput=len(good) / duration,
        request_goodput=len(within) / duration if options.goodput else None,
        output_throughput=num_output / duration,
        total_token_throughput=(num_input + num_output) / duration,
        max_concurrent_requests=most_running,
        client_cpu_share=cpu_share,
        **{f"{stat}_{name}_ms": value for name in METRICS for stat, value in _statistics(times[name]).items()},
    )


def _of(seen: Seen, name: str) -> float:
    """The figure of one request that a bound of goodput is for."""
    value: float | None = getattr(seen, f"{name}_ms")
    return value if value is not None else 0.0


def _statistics(values: list[float]) -> dict[str, float]:
    """Zeros where nothing was seen, as for the gaps of single tokens."""
    ordered = sorted(values) or [0.0]
    at = {p: ordered[min(len(ordered) - 1, math.ceil(p / 100 * len(ordered)) - 1)] for p in (95, 99)}
    return {"mean": statistics.fmean(ordered), "median": statistics.median(ordered), "p95": at[95], "p99": at[99]}


class _Http:
    """One request a connection, over HTTP/1.1 without TLS."""

    def __init__(self, url: str, api_key: str | None):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"--url is {url!r}; allowed: http://HOST:PORT of a server that needs no TLS")
        self._host, self._port, self._path = (
            parts.hostname,
            parts.port or 80,
            parts.path.rstrip("/").removesuffix("/v1"),
        )
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def get(self, path: str) -> bytes:
        try:
            return b"".join([line async for line in self._lines("GET", path, b"")])
        except OSError as error:
            raise StartupError(f"no server answers at {self._host}:{self._port}: {error}") from error

    def post_lines(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        return self._lines("POST", path, body)

    async def _lines(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=MAX_LINE)
        try:
            head = (
                f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n{self._key}"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
            status, is_chunked = int(answer.split(b" ", 2)[1]), b"transfer-encoding: chunked" in answer.lower()
            if status != 200:
                rest = await (self._joined(reader) if is_chunked else reader.read(2000))
                raise StartupError(f"{path} answers {status}: {rest.decode(errors='replace')[:500]}")
            pieces = self._chunks(reader) if is_chunked else self._rest(reader)
            held = b""
            async for piece in pieces:
                *lines, held = (held + piece).split(b"\n")
                for line in lines:
                    yield line
            if held:
                yield held
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _joined(self, reader: asyncio.StreamReader) -> bytes:
        return b"".join([piece async for piece in self._chunks(reader)])

    @staticmethod
    async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while size := int((await reader.readline()).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)

    @staticmethod
    async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while piece := await reader.read(MAX_LINE):
            yield piece
