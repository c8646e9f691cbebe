"""Script: all that happens in one run of the simulation, as data.

Owns the types and their JSON form, so that a run can be replayed, made smaller and kept as a test. Knows nothing of how a
script is drawn or played. Times are whole microseconds of the virtual clock.
"""

from typing import Literal

import msgspec

RequestFault = Literal["", "raise", "nan", "bad_id", "crash", "oom"]
FaultKind = Literal[
    "raise_before", "raise_after", "stuck",  # of the backend's call number `at`
    "kill_begun", "kill_told", "kill_ran",  # in the engine's turn number `at`: after it began, told, ran
    "kill_at", "stall_at", "doomed_at",  # at that time: the engine dies, stops for 2 s, or dies and so does every later one
    "drop", "double", "late", "corrupt", "foreign",  # what becomes of frame number `at` from the engine
    "forged",  # from frame `at` on the first with events tells of something that cannot be
]  # fmt: skip
DeathCause = Literal["work", "pressure", "other"]

# Above the vocabulary: ids of a prompt that make the backend do as their name says when it computes them.
SPECIAL_IDS: dict[str, int] = {"raise": 0, "nan": 1, "bad_id": 2, "crash": 3, "oom": 4}


class SimRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call of a client, with n sequences of one prompt."""

    id: str
    at_us: int
    prompt_ids: list[int]
    max_tokens: int
    seed: int
    n: int = 1
    tenant: str = ""
    salt: str = ""
    priority: int = 0
    temperature: float = 1.0
    top_k: int = 0  # this and the next two are for a backend that computes a model: the hash chain has no distribution
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    repetition: tuple[int, int, int] | None = None  # sizes of the pattern, least and most, and how often it comes
    prompt_logprobs: int | None = None
    grammar: str = ""  # an automaton; "": none
    deadline_us: int = 0  # from the call on; 0: none
    max_queue_us: int = 0
    cancel_us: int = -1  # from the call on the client stays so long
    cancel_after: int = -1  # it leaves with that token, counted over its sequences
    stall_after: int = -1  # it reads no more after so many
    fault: RequestFault = ""


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    kind: FaultKind
    at: int
    cause: DeathCause = "other"  # of a kill


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    num_blocks: int
    block_size: int
    max_rows: int
    max_tokens: int
    max_context: int
    vocab_size: int
    gap_us: int = 0
    is_wired: bool = False  # messages cross as frames, as they do between processes
    noise: float = 0.0  # of step times, to either side
    load_us: int = 50_000
    latency_us: int = 20  # of the link
    max_waiting: int = 1024  # requests
    max_pools: float = 1000.0  # times the pool's tokens that may wait
    drain_us: int = -1  # when the server begins to drain; -1: never
    deep_every: int = 16  # turns between two deep audits


class Script(msgspec.Struct, frozen=True, kw_only=True):
    seed: int  # it was drawn from; keys the noise of step times
    settings: Settings
    requests: list[SimRequest]
    faults: list[Fault] = []

    @property
    def num_events(self) -> int:
        """What a reader has to follow: calls, faults, and clients that do not simply wait."""
        restless = sum((r.cancel_us >= 0) + (r.cancel_after >= 0) + (r.stall_after >= 0) for r in self.requests)
        return len(self.requests) + len(self.faults) + restless + (self.settings.drain_us >= 0)

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()


def from_json(text: str | bytes) -> Script:
    """Raises msgspec.ValidationError or msgspec.DecodeError for what is no script."""
    return msgspec.json.decode(text, type=Script)
