"""`jilju view` and `jilju trace` as a user types them: of a file and of a server, and what is said when something is wrong."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from jilju.config import ApiKey
from tests.account.test_log_file import busy

from .stub import StubClient
from .test_answers import CHAT, chat_body
from .test_sockets import running

VIEWS = ApiKey("viewer", "secret-of-viewer", frozenset({"view", "generate"}))


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jilju", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ or None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "events.jlog"
    busy(path)
    return path


def tracks(text: str) -> set[str]:
    return {event["id"] for event in json.loads(text)["traceEvents"] if event["ph"] == "b"}


def test_a_trace_of_a_file(file: Path, tmp_path: Path) -> None:
    assert tracks(run("trace", "--log", str(file)).stdout) == {"chatcmpl-r0", "chatcmpl-r1"}
    assert tracks(run("trace", "--log", str(file), "--run", "chatcmpl-r1").stdout) == {"chatcmpl-r1"}
    out = tmp_path / "out.json"
    done = run("trace", "--log", str(file), "--last", "1ms", "-o", str(out))
    assert (done.returncode, done.stdout) == (0, "") and len(tracks(out.read_text())) <= 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "give --log FILE or --url URL, one of them"),
        (("--log", "FILE", "--url", "http://127.0.0.1:1"), 2, "one of them"),
        (("--log", "FILE", "--run", "x", "--last", "3s"), 2, "give --run or --last, not both"),
        (("--log", "FILE", "--last", "soon"), 2, "allowed: a time such as 30s, 500ms or 5m"),
        (("--log", "FILE", "--last", "0s"), 2, "allowed: a time such as"),
        (("--log", "FILE", "--run", "chatcmpl-none"), 1, "has no run 'chatcmpl-none'"),
        (("--log", "FILE", "-o", "/no/such/folder/t.json"), 1, "-o is /no/such/folder/t.json, which cannot be written"),
        (("--log", "/no/such/file"), 1, "/no/such/file cannot be read"),
        (("--url", "127.0.0.1:8000"), 1, "allowed: an address such as http://127.0.0.1:8000"),
        (("--url", "http://127.0.0.1:1"), 1, "cannot be asked: "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(file: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = run("trace", *(str(file) if argument == "FILE" else argument for argument in arguments))
    assert (done.returncode, done.stdout) == (status, "")
    assert words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


@pytest.mark.anyio
async def test_a_trace_of_a_server() -> None:
    stub = StubClient()
    async with running(stub, keys=(VIEWS,)) as (port, _):
        url, key = f"http://127.0.0.1:{port}", ("--api-key", VIEWS.secret)
        async with httpx.AsyncClient(base_url=url, headers={"x-api-key": VIEWS.secret}) as http:
            ids = [(await http.post(CHAT, json=chat_body(text, max_tokens=2))).json()["id"] for text in ("a", "b")]
        done = await asyncio.to_thread(run, "trace", "--url", url, *key)
        assert done.returncode == 0 and tracks(done.stdout) == set(ids)
        done = await asyncio.to_thread(run, "trace", "--url", url + "/", "--run", ids[0], *key)
        assert tracks(done.stdout) == {ids[0]}
        done = await asyncio.to_thread(run, "trace", "--url", url)
        assert done.returncode == 1 and f"{url} answers 401: no API key" in done.stderr
        done = await asyncio.to_thread(run, "trace", "--url", url, "--last", "2h", *key)
        assert done.returncode == 1 and "answers 400: seconds is" in done.stderr


def test_the_page_of_a_file_until_it_is_interrupted(file: Path) -> None:
    command = [sys.executable, "-m", "jilju", "view", str(file), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            url = process.stdout.readline().split()[0]
            assert url.startswith("http://127.0.0.1:") and url.endswith("/engine")
            assert httpx.get(url).headers["content-type"] == "text/html; charset=utf-8"
            window = httpx.get(url.replace("/engine", "/v1/jilju/window")).json()
            assert window["counts"]["completed"] == 2 and not window["is_live"]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        told = process.stderr.read()
        assert "staged, " in told and " 2 calls in " in told and "Traceback" not in told


def test_a_file_that_is_none_is_not_viewed(tmp_path: Path) -> None:
    other = tmp_path / "x"
    other.write_text("hello")
    done = run("view", str(other))
    assert done.returncode == 1 and "is no event log" in done.stderr and "Traceback" not in done.stderr
