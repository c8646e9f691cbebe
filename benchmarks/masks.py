"""Masks of grammars: what they add to a decode step, filled beside the model and by the step loop itself.

Owns the method: rows of a JSON schema and rows without one take turns on one engine, and medians of their decode steps are
compared; a mask's own time is that of the thread that fills it. Usage: masks.py [--model smollm2-135m] [--rows 8] [--rounds 4]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count

import msgspec
import numpy as np
from llguidance import LLMatcher

from jilju.assemble.engine import build_engine, open_model, resolve_engine
from jilju.config import engine_config
from jilju.engine.grammars import Grammars
from jilju.engine.loop import Engine
from jilju.engine.matcher import Grammar
from jilju.engine.request import Request, SamplingParams

NUM_TOKENS = 120  # of an answer
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMA = {"type": "array", "items": ITEM, "minItems": 50}


class TimedGrammars(Grammars):
    """Notes what each batch's masks took."""

    def __init__(self, make: Callable[[Request], Future[Grammar]], *, fills_beside: bool):
        super().__init__(self._no_source, fills_beside=fills_beside)
        self.make = make  # type: ignore[method-assign]
        self.took_ms: list[float] = []

    @staticmethod
    def _no_source() -> None:  # type: ignore[override]
        raise AssertionError("another one makes them")

    def _fill(self, fills: list, ready: np.ndarray) -> None:
        begin = time.perf_counter()
        super()._fill(fills, ready)
        self.took_ms.append((time.perf_counter() - begin) * 1e3)


def run(engine: Engine, num_rows: int, grammar: str, ids: "count[int]") -> float:
    """Milliseconds of the median step in which all rows decode."""
    num_before = len(engine.log.steps)
    for i in range(num_rows):
        params = SamplingParams(seed=i, max_tokens=NUM_TOKENS, temperature=0.8, ignore_eos=True)
        prompt = [(7 * i + k) % 1000 for k in range(32)]
        engine.submit(Request(id=f"r{next(ids)}", prompt_ids=prompt, params=params, grammar=grammar))
    while engine.has_work():
        engine.step()
    steps = [step for step in list(engine.log.steps)[num_before:] if step.num_decode_tokens == num_rows]
    return statistics.median((step.end_ns - step.begin_ns) / 1e6 for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    model = open_model(args.model)
    _, options, _ = resolve_engine(model, engine_config(model.name, context=512, kv_memory="512MiB"))
    engine, ids = build_engine(options), count()
    assert engine.grammars is not None, "every engine of a model file has them"
    make = engine.grammars.make
    kinds = {
        "no grammar": None,
        "beside": TimedGrammars(make, fills_beside=True),
        "in the loop": TimedGrammars(make, fills_beside=False),
    }
    grammar = LLMatcher.grammar_from_json_schema(msgspec.json.encode(SCHEMA).decode())
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(args.rounds + 1):
        for kind, grammars in kinds.items():
            engine.grammars = grammars or engine.grammars
            step_ms = run(engine, args.rows, grammar if grammars is not None else "", ids)
            if round_ == 0 and grammars is not None:
                grammars.took_ms.clear()  # the first round warms up
            elif round_:
                took[kind].append(step_ms)
    base = min(took["no grammar"])
    for kind, grammars in kinds.items():
        line = f"{kind:12} step {min(took[kind]):6.2f} ms ({min(took[kind]) / base - 1:+.1%})"
        if grammars is not None:
            masks = statistics.median(grammars.took_ms)
            line += f", masks of a step {masks:.3f} ms ({masks / base:.1%}), at worst {max(grammars.took_ms):.2f} ms"
        print(line)


if __name__ == "__main__":
    main()
