"""`jilju serve`, and at its end the records of its steps in a file: `python recorded.py FILE serve MODEL ...`.

The command itself, with an ear at the log of each engine's client. Records hold numbers alone, no text and no token.
"""

import atexit
import sys
from pathlib import Path

import msgspec

from jilju import cli
from jilju.engine.events import EventLog, StepRecord


def main(file: Path, arguments: list[str]) -> None:
    records: list[StepRecord] = []
    make = EventLog.__init__

    def make_heard(log: EventLog, *args: int, **kwargs: int) -> None:
        make(log, *args, **kwargs)
        log.listen(records.append)

    EventLog.__init__ = make_heard
    atexit.register(lambda: file.write_bytes(msgspec.msgpack.encode(records)))
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
