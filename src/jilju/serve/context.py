"""What a server is handed: the model's text side, the engine's client, and the settings of the door.

Owns the frozen types that `create_app` takes. Knows nothing of routes, and reads no flag and no file: `assemble` fills it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import Literal

import msgspec

from jilju.account.energy import Meter
from jilju.clock import Clock, WallClock
from jilju.config import ApiKey
from jilju.engine.client import EngineClient
from jilju.plan import Plan
from jilju.serve.otel.providers import Providers
from jilju.serve.usage_log import UsageLog
from jilju.serve.workers import Workers
from jilju.text.history import History
from jilju.text.template import ChatTemplate
from jilju.text.tokenizer import Tokenizer


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What holds where a request says nothing; `source` says where the figures come from."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    source: str = "the API's own defaults"


class ServeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the server; each has a typed refusal."""

    head_bytes: int = 32 << 10  # request line and headers
    head_s: float = 10.0  # a head must have arrived by then
    connections: int = 4096
    body_bytes: int = 8 << 20
    body_s: float = 30.0  # a body must have arrived by then
    json_depth: int = 64
    queue_requests: int = 1024  # sequences without a first token; above: 429
    queue_pools: float = 4.0  # tokens of their prompts, in times of what the KV pool holds; above: 429
    queue_s: float = 60.0  # from acceptance to the first step, where a call says nothing
    total_s: float = 600.0  # from acceptance to the last byte, at most
    silence_s: float = 15.0  # an open stream says ": wait" after that
    stall_s: float = 30.0  # a reader that takes nothing for so long has left
    drain_s: float = 30.0  # live requests may end within that after SIGTERM
    stuck_s: float = 5.0  # work pending and no step for so long: not healthy


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Of the GPU that the engine computes on."""

    total_bytes: int
    used_bytes: Callable[[], int | None]  # by anybody, as its driver says now; None: it does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerContext:
    model_name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: the model has none, chat is refused
    client: EngineClient
    max_context: int  # tokens of prompt and output together
    fingerprint: str  # system_fingerprint: hash of weights, tokenizer, template, kernel set
    version: str
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    workers: Workers | None = None  # None: answers cannot be held to a form
    history: History | None = None  # None: a chat's earlier answers are tokenized anew
    quantization: str | None = None  # as /v1/models shows it: "Q4_K_M"
    keys: tuple[ApiKey, ...] = ()
    read_keys: Callable[[], tuple[ApiKey, ...]] | None = None  # all keys anew, for SIGHUP; raises ConfigError
    allowed_hosts: frozenset[str] = frozenset()  # besides the loopback names; bind address and --allow-host
    allowed_origins: frozenset[str] = frozenset()  # of pages elsewhere that may call; "*": every one
    lenient: bool = False  # unknown fields are dropped and named in a header, instead of refused
    shared_prefix_cache: bool = False  # callers of different keys share cached prompts
    allow_request_template: bool = False  # calls may bring a chat template of their own
    view_dir: Traversable | None = None  # static files of the pages, read once
    kv_dtype: str = "f16"  # of cached keys and values
    gpu: GpuMemory | None = None  # None: the engine computes on the CPU
    metrics_compat: Literal["off", "vllm"] = "off"  # a second set of metrics under another server's names
    telemetry: Providers | None = None  # None: nothing is told to OpenTelemetry
    trace_content: bool = False  # what it is told holds prompts and answers
    num_dropped_log_lines: Callable[[], int] = lambda: 0
    limits: ServeLimits = field(default_factory=ServeLimits)
    run_store_bytes: int = 64 << 20  # texts and tokens of the newest runs, for the pages; 0: none
    event_log: str | None = None  # file that keeps the log of steps and calls
    event_log_bytes: int = 1 << 30  # of that file; the one before it is kept besides
    price_per_hour: float | None = None  # USD of this machine; None: nobody has set one
    meter: Meter | None = None  # of this machine's energy
    usage_log: UsageLog | None = None  # gets a line a call
    plan: Plan | None = None  # of the model: ledgers share steps out by its costs. None: by tokens
    clock: Clock = field(default_factory=WallClock)
    random_bytes: Callable[[int], bytes] = os.urandom  # ids, seeds, jitter
    unix_time: Callable[[], float] = time.time  # `created` of answers; never for intervals
    started: int = field(default_factory=lambda: int(time.time()))  # `created` of the model

    def mint_id(self) -> str:
        return self.random_bytes(12).hex()

    def draw_seed(self) -> int:
        """53 bits: a seed that also a JavaScript client reads back exactly."""
        return int.from_bytes(self.random_bytes(8), "big") >> 11

    def context_tokens(self) -> int:
        """The smaller of what was promised and what the engine says it holds."""
        info = self.client.info
        return self.max_context if info is None else min(self.max_context, info.max_context)
