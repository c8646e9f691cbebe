"""An engine process with the fake executor: what the supervisor's tests start.

    python -m tests.engine.engine_process FOLDER STEP_MS LINK_FD

The folder tells it how to fare: a file `load_error` is raised as StartupError, `crash_at_load` exits in the load, `slow_load`
sleeps there, `tell_load` tells of two halves. It notes its process id in `pid`.
"""

import os
import socket
import sys
import time
from pathlib import Path

from jilju.clock import WallClock
from jilju.engine.grammars import Grammars
from jilju.engine.link import LoadProgress, serve_engine
from jilju.engine.loop import Engine
from jilju.errors import StartupError

from .fakes import FakeExecutor, make_limits, tiny_plan
from .held import source


def main() -> None:
    folder, step_s, link_fd = Path(sys.argv[1]), float(sys.argv[2]) / 1e3, int(sys.argv[3])

    def make_engine(progress: LoadProgress) -> Engine:
        (folder / "pid").write_text(str(os.getpid()))
        if (folder / "load_error").exists():
            raise StartupError((folder / "load_error").read_text())
        if (folder / "crash_at_load").exists():
            os._exit(7)
        if (folder / "slow_load").exists():
            time.sleep(60)
        if (folder / "tell_load").exists():
            for done in (1, 2):
                progress(done, 2, "packing weights")
        limits = make_limits(num_blocks=40, block_size=4, max_rows=8, max_tokens=16)
        executor = FakeExecutor(limits, before_step=lambda: time.sleep(step_s))
        grammars = Grammars(source, makes_beside=True, fills_beside=True)
        return Engine(tiny_plan(), executor, limits, WallClock(), load_ms=1.0, grammars=grammars)

    serve_engine(make_engine, socket.socket(fileno=link_fd))


if __name__ == "__main__":
    main()
