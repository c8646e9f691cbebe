"""What every peer program does: say who it is, then answer runs until its input ends.

Owns the JSON lines that `jilju.bench.peers` speaks. An engine is an object with `note` and some of the methods below; what it
lacks it is not asked for. A file that the engine cannot read is told as a note, not as a failure.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

RUNS = ("prefill", "decode", "logprobs")


def repeated(work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call, the mean of as many as `seconds` take, one at least."""
    begin = time.perf_counter()
    count = 0
    while True:
        work()
        count += 1
        passed = time.perf_counter() - begin
        if passed >= seconds:
            return passed / count


def serve(open_engine: Callable[[str, int, int, int], Any]) -> None:
    """`open_engine(model, num_threads, max_rows, max_context)` makes the engine, or raises ValueError if it cannot read the file.

    prefill(tokens, seconds) -> s of a pass; decode(rows, context, seconds) -> s of a step; logprobs(token_ids, targets) -> list.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print what they like; only answers go to the real standard output

    def say(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    model, *sizes = sys.argv[1:]
    try:
        engine = open_engine(model, *map(int, sizes))
    except ValueError as error:
        say({"runs": [], "note": str(error)})
        sys.stdin.read()
        return
    say({"runs": [name for name in RUNS if hasattr(engine, name)], "note": engine.note})
    for line in sys.stdin:
        question = json.loads(line)
        run = question.pop("run")
        result = getattr(engine, run)(**question)
        say({"logprobs": result} if run == "logprobs" else {"pass_s": result})
