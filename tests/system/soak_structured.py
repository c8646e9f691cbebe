"""Every schema on the real engine: greedy and sampled, streamed and whole, alone and among others, and across deaths of the engine.

`python -m tests.system.soak_structured`, which is `make soak-structured`. Ends with status 1 if an answer that stopped breaks its
schema, or if two answers to the same call differ in a token, a bit of a logprob or a character.
"""

import argparse
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from tests.serve.schemas import SCHEMAS, Schema, violation
from tests.system.answers import Answer, ask
from tests.system.conftest import Server
from tests.system.prompts import CHAT_PROMPTS

MAX_TOKENS = 160
AT_ONCE = 8
ALONE_EVERY = 4  # calls of which one is also made alone


class Soaked(msgspec.Struct, kw_only=True):
    """What was found; the last four must be empty."""

    model: str
    num_schemas: int
    num_calls: int
    num_stopped: int = 0
    num_cut: int = 0  # by max_tokens: the beginning of a valid answer
    num_tokens: int = 0
    num_alone: int = 0
    num_kills: int = 0
    num_restarts: int = 0
    took_s: float = 0.0
    invalid: list[str] = []
    streamed_differently: list[str] = []
    different_alone: list[str] = []
    different_after_kills: list[str] = []

    @property
    def is_well(self) -> bool:
        return not (self.invalid or self.streamed_differently or self.different_alone or self.different_after_kills)


class Case(msgspec.Struct):
    name: str
    schema: Schema
    body: dict


def cases(num_seeds: int) -> list[Case]:
    """Each schema greedy once, and sampled with other seeds, questions and temperatures."""
    made = []
    for number, (name, schema) in enumerate(SCHEMAS):
        for seed in range(num_seeds + 1):
            how = (
                {"temperature": 0} if seed == 0 else {"temperature": (0.7, 1.0, 1.5)[(number + seed) % 3], "seed": seed}
            )
            body = {
                "messages": [{"role": "user", "content": CHAT_PROMPTS[(number + seed) % len(CHAT_PROMPTS)]}],
                "max_tokens": MAX_TOKENS,
                "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
                **how,
            }
            made.append(Case(f"{name}, seed {seed}", schema, body))
    return made


class Killer(threading.Thread):
    """Ends the engine's process by signal 9 at random moments in which it makes tokens, until told to stop."""

    def __init__(self, server: Server, between_s: float):
        super().__init__(daemon=True)
        self._server, self._between_s, self._rng = server, between_s, random.Random(1)
        self.num_kills = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(self._rng.uniform(0.5, 1.5) * self._between_s):
            before = self._server.metric("jilju_generation_tokens_total")
            while (
                self._server.metric("jilju_generation_tokens_total") < before + 20
            ):  # a death that hits nobody shows nothing
                if self._is_over.wait(0.05):
                    return
            self._server.kill_engine()
            self.num_kills += 1

    def stop(self) -> None:
        self._is_over.set()
        self.join()


def ask_all(server: Server, chosen: list[Case], what: str, *, stream: bool, at_once: int = AT_ONCE) -> list[Answer]:
    begin, answers = time.monotonic(), list[Answer]()
    with ThreadPoolExecutor(at_once) as pool:
        for answer in pool.map(lambda case: ask(server.url, case.body, stream=stream), chosen):
            answers.append(answer)
            if len(answers) % 100 == 0 or len(answers) == len(chosen):
                print(f"{what}: {len(answers)} of {len(chosen)}, {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return answers


def differing(chosen: list[Case], one: list[Answer], other: list[Answer]) -> list[str]:
    return [case.name for case, a, b in zip(chosen, one, other, strict=True) if a != b]


def soak(server: Server, model: str, num_seeds: int, num_schemas: int, kill_every_s: float) -> Soaked:
    begin = time.monotonic()
    made = cases(num_seeds)[: num_schemas * (num_seeds + 1)]
    found = Soaked(model=model, num_schemas=min(num_schemas, len(SCHEMAS)), num_calls=len(made))
    whole = ask_all(server, made, "whole", stream=False)
    for case, answer in zip(made, whole, strict=True):
        found.num_tokens += len(answer.token_ids)
        if answer.finish_reason != "stop":
            found.num_cut += 1
            continue
        found.num_stopped += 1
        try:
            broken = violation(case.schema, answer.content)
        except ValueError as error:
            broken = str(error)
        if broken is not None:
            found.invalid.append(f"{case.name}: {broken[:200]}: {answer.content[:200]}")
    found.streamed_differently = differing(made, whole, ask_all(server, made, "streamed", stream=True))
    chosen = slice(None, None, ALONE_EVERY)
    found.num_alone = len(made[chosen])
    alone = ask_all(server, made[chosen], "alone", stream=False, at_once=1)
    found.different_alone = differing(made[chosen], whole[chosen], alone)
    if kill_every_s:
        killer = Killer(server, kill_every_s)
        killer.start()
        survived = ask_all(server, made, "streamed, with kills", stream=True)
        killer.stop()
        found.num_kills, found.num_restarts = killer.num_kills, int(server.metric("jilju_engine_restarts_total"))
        found.different_after_kills = differing(made, whole, survived)
    found.took_s = time.monotonic() - begin
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, default=2, help="sampled answers a schema, besides a greedy one")
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS))
    parser.add_argument("--kill-every", type=float, default=6.0, help="seconds between kills of the engine; 0: none")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    server = Server(arguments.model, "--context", "2048", "--kv-memory", "1GiB")
    try:
        found = soak(server, arguments.model, arguments.seeds, arguments.schemas, arguments.kill_every)
    finally:
        server.stop()
    print(
        f"{found.num_calls} calls with {found.num_schemas} schemas: {found.num_stopped} stopped, {found.num_cut} cut, {found.num_tokens} tokens, {found.took_s:.0f} s\n"
        f"invalid {len(found.invalid)}; streamed differently {len(found.streamed_differently)}; different alone {len(found.different_alone)} of {found.num_alone}; "
        f"different after {found.num_kills} kills {len(found.different_after_kills)}"
    )
    for name in (*found.invalid, *found.streamed_differently, *found.different_alone, *found.different_after_kills):
        print(name)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
    sys.exit(not found.is_well)


if __name__ == "__main__":
    main()
