"""A `jilju serve` as the checks of what is installed see it: a process that is started, asked and stopped.

Owns the process and what is said to it. Knows nothing of where it is installed, and needs nothing but Python.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

MODEL = "smollm2-135m"
START_S = 300  # a first start fetches the model
STOP_S = 45


class CheckFailed(Exception):
    """What was looked for is not so."""


class Client:
    """A server as its callers meet it."""

    def __init__(self, url: str, key: str | None = None):
        self.url, self._key = url, key

    def call(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json"} | ({"x-api-key": self._key} if self._key else {})
        with build_opener(ProxyHandler({})).open(Request(self.url + path, body, headers), timeout=60) as answer:
            content = answer.read()
            assert isinstance(content, bytes)
            return content

    def is_ready(self) -> bool:
        try:
            self.call("/readyz")
        except OSError:  # refused, or an answer that says not yet
            return False
        return True

    def ask(self, text: str, max_tokens: int = 12) -> str:
        """The answer to a message, at temperature 0."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
        answer = json.loads(self.call("/v1/chat/completions", json.dumps(body).encode()))
        content = answer["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content


class Serving:
    """A server's process; `url` is set when it is ready."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log: list[str] = []
        self.url = ""
        self._told = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if match := re.search(r"ready: http://[\w.]+:(\d+)", line):
                self.url = f"http://127.0.0.1:{match[1]}"
                self._told.set()
        self._told.set()

    def wait_ready(self, key: str | None = None) -> Client:
        if not self._told.wait(START_S) or not self.url:
            raise CheckFailed("the server did not get ready:\n" + "".join(self.log))
        return Client(self.url, key)

    def stop(self, pid: int) -> None:
        """SIGTERM to the server, which is to end with status 0."""
        os.kill(pid, signal.SIGTERM)
        status = self.process.wait(STOP_S)
        if status != 0:
            raise CheckFailed(f"after SIGTERM the server ended with status {status}:\n" + "".join(self.log))


@contextlib.contextmanager
def serving(
    command: list[str], environment: dict[str, str], server_pid: Callable[[int], int] = lambda pid: pid
) -> Iterator[Serving]:
    """A server from its start to its end; `server_pid` finds its pid by that of the command, where they differ."""
    server = Serving(command, environment)
    try:
        yield server
        server.stop(server_pid(server.process.pid))
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def model_file() -> Path | None:
    """The model, where this machine has it."""
    cache = Path(os.environ.get("JILJU_CACHE") or Path.home() / ".cache" / "jilju")
    path = cache / "models" / f"{MODEL}.gguf"
    return path if path.is_file() else None
