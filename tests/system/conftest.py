"""A real `jilju serve` for the tests of the whole: real model, real processes, real sockets."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from jilju.model import sources

START_TIMEOUT_S = 120  # generous: only a server that never starts fails here


def cached(name: str) -> bool:
    return any(m.entry.name == name and m.cached for m in sources.list_models())


needs_smollm2 = pytest.mark.skipif(
    not cached("smollm2-135m"), reason="smollm2-135m is not in the cache: jilju pull smollm2-135m"
)
needs_qwen = pytest.mark.skipif(
    not cached("qwen2.5-coder-0.5b"), reason="qwen2.5-coder-0.5b is not in the cache: jilju pull qwen2.5-coder-0.5b"
)


class Server:
    """A running `jilju serve`; `url` is its address, `log` what it has printed so far."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "jilju", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log: list[str] = []
        self._ready = threading.Event()
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(START_TIMEOUT_S) or not self.url:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.log))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            match = re.search(r"http://127\.0\.0\.1:\d+", line)
            if match and not self.url:
                self.url = match[0]
                self._ready.set()
        self._ready.set()

    def engine_pid(self) -> int | None:
        """Pid of the engine's process: the server's child that runs engine_process."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if "engine_process" in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        return None

    def kill_engine(self) -> None:
        pid = self.engine_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def metric(self, name: str) -> float:
        """Sum over labels of a metric of /metrics."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{|\s)", line)]
        assert values, f"{name} is not in /metrics"
        return sum(values)

    def wait_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while self.metric("jilju_num_requests_running") + self.metric("jilju_num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are left over"
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


@pytest.fixture(scope="session")
def smollm2_server():
    server = Server("smollm2-135m", "--context", "2048", "--kv-memory", "1GiB")
    yield server
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture(scope="session")
def qwen_server():
    server = Server("qwen2.5-coder-0.5b", "--context", "2048", "--kv-memory", "512MiB")
    yield server
    assert server.stop() == 0, "".join(server.log)
