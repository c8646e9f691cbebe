"""What HTTP costs: tokens a second that the server can stream with one core and an engine that costs nothing, and the time to
the first token of a call over HTTP beside that of the same prompt in this process.

The server has one core, the client the other. Prompts of the second part are random ids, each used once, so that no cache helps; runs of
both ways take turns, and medians are compared.
"""

import argparse
import contextlib
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from server import serving

from jilju import LLM, SamplingParams

SERVER_CORE = 0
NUM_PROMPT_TOKENS = 32


@contextlib.contextmanager
def stub_server() -> Iterator[int]:
    command = [sys.executable, str(Path(__file__).with_name("stub_server.py")), "--core", str(SERVER_CORE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(next(m[1] for line in process.stdout if (m := re.search(r"ready: http://127\.0\.0\.1:(\d+)", line))))
    finally:
        process.terminate()
        process.wait()


def streamed_per_second(port: int, num_streams: int, num_tokens: int) -> float:
    """All streams at once. The client only counts bytes that end an event, so as to take as little as it can."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": num_tokens, "ignore_eos": True}
    )
    connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(num_streams)]
    begin = time.monotonic()
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    num_events = 0
    for connection in connections:
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        text = answer.read()
        num_events += text.count(b"data: {") - 1  # the first of a stream has the role
        connection.close()
    took_s = time.monotonic() - begin
    assert num_events == num_streams * num_tokens, (num_events, num_streams, num_tokens)
    return num_events / took_s


def first_token_ms_over_http(connection: http.client.HTTPConnection, ids: list[int]) -> float:
    body = json.dumps({"prompt": ids, "max_tokens": 1, "stream": True, "temperature": 0})
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    took = time.perf_counter() - begin
    assert line.startswith(b"data: {"), line
    answer.read()
    return took * 1000


def first_token_ms_in_process(llm: LLM, ids: list[int]) -> float:
    begin = time.perf_counter()
    next(iter(llm.stream([ids], SamplingParams(max_tokens=1, temperature=0))))
    return (time.perf_counter() - begin) * 1000


def overhead_ms(num_rounds: int) -> tuple[float, float]:
    """Medians: over HTTP, in process."""
    random_ids = random.Random(5)
    over_http, in_process = [], []
    with serving("smollm2-135m", "--kv-memory", "512MiB") as server, LLM("smollm2-135m", kv_memory=512 << 20) as llm:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for _ in range(num_rounds):
            ids = [random_ids.randrange(1000, 40_000) for _ in range(NUM_PROMPT_TOKENS)]
            over_http.append(first_token_ms_over_http(connection, ids))
            in_process.append(first_token_ms_in_process(llm, ids))
    return statistics.median(over_http[3:]), statistics.median(in_process[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with stub_server() as port:
        streamed_per_second(port, 4, 64)
        figures = {
            f"streams_{count}": [streamed_per_second(port, count, 2048 // count) for _ in range(5)] for count in (1, 16)
        }
    over_http, in_process = overhead_ms(flags.rounds)
    for name, rates in figures.items():
        print(f"{name}: {statistics.median(rates):,.0f} tokens/s on one core (bar 1,500)")
    print(
        f"first token: {over_http:.1f} ms over HTTP, {in_process:.1f} ms in process: {over_http - in_process:+.1f} ms (bar 5)"
    )
    if flags.json:
        medians = {name: statistics.median(rates) for name, rates in figures.items()}
        flags.json.write_text(json.dumps(medians | {"http_ms": over_http, "in_process_ms": in_process}))


if __name__ == "__main__":
    main()
