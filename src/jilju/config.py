"""Configuration: what a user may set, resolved once into a frozen object that remembers where each value came from.

Order: a flag beats an environment variable (JILJU_<NAME>), which beats the default. "auto" values that need the model or
the machine are resolved by who knows them and put into a new object. Knows nothing of models, engines or HTTP.
"""

import ipaddress
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from jilju.errors import ConfigError

DEFAULT_MODEL = "qwen2.5-coder-0.5b"
FALLBACK_MODEL = "smollm2-135m"
AUTO = "auto"
OFF = "off"
ENV = "env"


KeyScope = Literal["generate", "tokenize", "metrics", "view"]  # what a key may be good for
ALL_SCOPES: frozenset[KeyScope] = frozenset(get_args(KeyScope))


class ApiKey(msgspec.Struct, frozen=True):
    name: str  # what logs call it
    secret: str
    scopes: frozenset[KeyScope] = ALL_SCOPES
    tokens_per_minute: int | None = None  # of prompts and answers together
    tokens_per_day: int | None = None
    min_priority: int | None = None  # a call may not ask for a lower one, which would run earlier

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"  # wherever it is printed: the secret never is


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of `jilju serve`. None stands for "auto" until it is resolved."""

    model: str = DEFAULT_MODEL
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[ApiKey, ...] = ()
    api_key_file: str | None = None
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"  # what computes
    fast: bool = False  # on a GPU: the bits of an answer may depend on what else is in the batch
    weight_dtype: Literal["auto", "bf16", "f16", "fp8"] = "auto"  # on a GPU; auto: the file's own half type, else bf16
    load_format: Literal["auto", "dummy"] = (
        "auto"  # dummy: random weights, for a folder whose config.json is enough then
    )
    context: int | None = None  # tokens of one sequence; auto: the model's own maximum, or what the KV memory holds
    kv_memory: int | None = (
        None  # bytes; auto: a quarter of the available memory, at most 64 contexts; on a GPU what is left
    )
    kv_dtype: Literal["auto", "f16", "int8", "bf16", "fp8"] = (
        "auto"  # of cached keys and values; auto: f16, or a GPU's half
    )
    max_rows: int | None = None  # sequences computed in one step; auto: by the device
    step_tokens: int | None = None  # tokens computed in one step; auto: by the device
    token_gap_ms: int = 100  # of a step beside a stream: bounds how long it waits for others' prompts; 0: no bound
    threads: int | None = None  # auto: the cores this process may use
    packed_cache: str | None = None  # folder, or "off"; auto: one in the cache folder
    huge_pages: Literal["auto", "on", "off"] = "auto"  # weights in memory of the process's own, in huge pages
    keep_generated_ids: Literal["on", "off"] = "on"  # of chat answers that clients send back as text
    event_log: str | None = None  # file that keeps the log of steps and calls
    event_log_max: int = 1 << 30  # bytes of it
    run_store: int = 64 << 20  # bytes of texts and tokens of the newest runs, for the pages; 0: none
    shared_prefix_cache: bool = False  # among keys
    lenient: bool = False  # unknown fields of a call are dropped and named
    allow_request_template: bool = False
    served_model_name: str | None = None  # auto: the model's name
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    metrics_compat: Literal["off", "vllm"] = "off"  # a second set of metrics under another server's names
    otel: str = OFF  # where traces and metrics go by OTLP: a URL, "env" for what OTEL_* variables say, or "off"
    trace_content: bool = False  # traces hold prompts and answers
    usage_log: str | None = None  # file that gets a line a call
    price: float | None = None  # USD an hour of this machine; None: nobody has set one
    watts: float | None = None  # that this machine draws, where there are no counters; None: nobody has said
    insecure: bool = False  # allow a bind beyond loopback without a key

    origins: dict[str, str] = {}  # setting -> "default", "--flag", "JILJU_NAME", "auto: how it was found"

    def with_auto(self, name: str, value: Any, reason: str) -> "ServeConfig":
        """A new config in which an open value is filled in, its origin saying how."""
        return msgspec.structs.replace(self, **{name: value}, origins={**self.origins, name: f"auto: {reason}"})


class Option(msgspec.Struct, frozen=True):
    """One setting as users meet it: a flag, an environment variable, a help text."""

    name: str
    kind: Literal[
        "text",
        "list",
        "origins",
        "int",
        "tokens",
        "bytes",
        "choice",
        "bool",
        "keys",
        "file",
        "folder",
        "endpoint",
        "size",
        "number",
    ]
    help: str
    low: int = 0
    high: int = 0
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "JILJU_" + self.name.upper()


SERVE_OPTIONS: tuple[Option, ...] = (
    Option("host", "text", "Address to bind. Beyond loopback an --api-key is needed, or --insecure."),
    Option("port", "int", "Port to bind; 0 takes a free one.", low=0, high=65535),
    Option("api_key", "keys", "Key that clients must send, SECRET or NAME=SECRET; may be given several times."),
    Option("api_key_file", "file", "TOML file of keys with names, scopes, quotas; closed to other users (mode 600), read again on SIGHUP."),
    Option("allow_host", "list", "Host header to accept besides loopback names and the bind address; may be repeated."),
    Option("allow_origin", "origins", "Origin of pages elsewhere that may call, such as https://chat.example.org, or * for every page; may be repeated."),
    Option("device", "choice", "What computes: cpu, or cuda for an NVIDIA GPU, which needs the extra jilju[cuda].", choices=("cpu", "cuda")),
    Option("fast", "bool", "On a GPU: the fastest kernels for each size of step. The bits of an answer may then depend on what else is computed beside it."),
    Option("weight_dtype", "choice", "Weights on a GPU: bf16, f16, or fp8 with a scale per output, half the memory. auto: the half type of the model file, bf16 for one that is quantized.", choices=("auto", "bf16", "f16", "fp8")),
    Option("load_format", "choice", "auto: the weights of the model; dummy: random ones in their place, for a folder with a config.json, to measure speed.", choices=("auto", "dummy")),
    Option("context", "tokens", "Longest sequence in tokens, or auto.", low=16, high=1 << 20),
    Option("kv_memory", "bytes", "Memory of the KV cache, such as 2GiB, or auto: a quarter of what is available, at most 64 contexts; on a GPU what is left of it."),
    Option("kv_dtype", "choice", "Keys and values in the KV cache: f16, or int8 with a scale per token and head, about half the memory; on a GPU bf16 (f16 beside f16 weights), or fp8 with such scales. auto: the first of them.", choices=("auto", "f16", "int8", "bf16", "fp8")),
    Option("max_rows", "tokens", "Sequences computed in one step, or auto: 32, on a GPU 256.", low=1, high=256),
    Option("step_tokens", "tokens", "Tokens computed in one step, or auto: 256, on a GPU 2048.", low=16, high=8192),
    Option("token_gap_ms", "int", "Time that a step beside a stream is to take at most: prompts of others are cut to it, 16 tokens a step are always allowed. 0: no bound.", low=0, high=60000),
    Option("threads", "tokens", "Threads that compute, or auto: the cores this process may use.", low=1, high=256),
    Option("packed_cache", "folder", "Folder of packed weights, off to pack at every start, or auto: one in the cache folder."),
    Option("huge_pages", "choice", "Weights in huge pages of the engine's own memory (on: faster answers), or mapped from the packed file (off: shared by processes, given back under pressure). auto: on where the system offers them and half of the memory suffices.", choices=("auto", "on", "off")),
    Option("keep_generated_ids", "choice", "Whether an earlier answer that a chat sends back as text keeps the ids that were generated, so that the prefix cache holds it: on, or off to cut its text anew.", choices=("on", "off")),
    Option("event_log", "file", "File to which the log of steps and calls is written, for jilju view and jilju trace; one that is there is kept as FILE.1."),
    Option("event_log_max", "size", "Size at which that file becomes FILE.1 and another is begun, such as 1GiB."),
    Option("run_store", "size", "Memory for the texts and tokens of the newest runs, which the pages show; 0 keeps none."),
    Option("shared_prefix_cache", "bool", "Share cached prompts among keys: faster, but one caller can tell by timing what another has sent."),
    Option("lenient", "bool", "Drop unknown fields of a call and name them in the header x-jilju-ignored, instead of refusing the call."),
    Option("allow_request_template", "bool", "Let a call bring a chat template of its own (chat_template)."),
    Option("served_model_name", "text", "Name of the model in the API."),
    Option("log_level", "choice", "How much to log.", choices=("debug", "info", "warning", "error")),
    Option("log_format", "choice", "How to log.", choices=("text", "json")),
    Option("metrics_compat", "choice", "Names that /metrics tells besides its own: vllm for the vllm:* set, for boards that were made for it.", choices=("off", "vllm")),
    Option("otel", "endpoint", "Where OpenTelemetry traces and metrics go: base URL of an OTLP/HTTP collector, env for what OTEL_EXPORTER_OTLP_* variables say, or off. Needs the extra jilju[otel]."),
    Option("trace_content", "bool", "Put prompts and answers into traces. Needs --otel."),
    Option("usage_log", "file", "File to which each call that ends adds a line of JSON: key, tokens, times, machine time, cost, energy."),
    Option("price", "number", "What an hour of this machine costs, in USD. Without it costs are told in time of the machine alone.", high=1_000_000),
    Option("watts", "number", "What this machine draws, where its energy counters are missing or may not be read.", high=1_000_000),
    Option("insecure", "bool", "Allow a bind beyond loopback without a key."),
)  # fmt: skip

MAX_BYTES = 1 << 50  # of memory that a setting may name: more than machines have, and its arithmetic fits 64 bits
HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,253}")
KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9_.-]{1,253}|\[[0-9a-f:.]+\])(?::(?P<port>\d{1,5}))?"
)
NUMBER = re.compile(r"\d{1,18}(?:\.\d{1,18})?")
ENDPOINT = re.compile(r"https?://[^\s/?#@]{1,260}(?:/[^\s?#]{0,512})?")
_UNITS = {"": 1, "B": 1, "K": 1000, "KB": 1000, "KIB": 1 << 10, "M": 10**6, "MB": 10**6, "MIB": 1 << 20, "G": 10**9, "GB": 10**9, "GIB": 1 << 30}  # fmt: skip


def parse_bytes(text: str, where: str, allowed: str = "auto, or ") -> int:
    """Bytes from "2GiB", "512 MB", "1073741824". Raises ConfigError naming `where`, and what else is allowed."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{where} is {text!r}; allowed: {allowed}a size such as 512MiB, 2GiB or 1500000000")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size > MAX_BYTES:
        raise ConfigError(f"{where} is {text:.80}; allowed: {allowed}a size of at most {MAX_BYTES >> 40} TiB")
    return int(size)


def _parse(option: Option, given: Any, where: str) -> Any:
    """The typed value of one setting as a flag (already a tuple where it repeats) or an environment variable gives it."""
    if option.kind in ("list", "keys", "origins"):
        items = tuple(i for i in (given if isinstance(given, tuple) else str(given).split(",")) if i != "")
        if option.kind == "keys":
            return tuple(_parse_key(item, index, where) for index, item in enumerate(items))
        if option.kind == "origins":
            return tuple(_parse_origin(item, where) for item in items)
        for item in items:
            _check_host_name(item, where)
        return items
    text = str(given)
    if option.kind == "bool":
        if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
            raise ConfigError(f"{where} is {text!r}; allowed: true or false")
        return text.lower() in ("1", "true", "yes")
    if option.kind == "choice":
        if text not in option.choices:
            raise ConfigError(f"{where} is {text!r}; allowed: {', '.join(option.choices)}")
        return text
    if option.kind in ("text", "file"):
        if not text:
            raise ConfigError(f"{where} is empty; give a value or leave it out")
        return text if option.kind == "text" else _absolute(text, where, "a file")
    if option.kind == "endpoint":
        return _parse_endpoint(text, where)
    if text == AUTO and option.kind in ("tokens", "bytes", "folder"):
        return None
    if option.kind == "folder":
        if not text:
            raise ConfigError(f"{where} is empty; allowed: auto, off, or a folder")
        return text if text == OFF else _absolute(text, where, "auto, off, or a folder")
    if option.kind == "bytes":
        return parse_bytes(text, where)
    if option.kind == "size":
        return parse_bytes(text, where, allowed="")
    if option.kind == "number":
        return _parse_number(option, text, where)
    if not re.fullmatch(r"-?\d{1,18}", text) or not option.low <= int(text) <= option.high:
        auto = "auto or " if option.kind == "tokens" else ""
        raise ConfigError(f"{where} is {text!r}; allowed: {auto}a whole number from {option.low} to {option.high}")
    return int(text)


def _parse_number(option: Option, text: str, where: str) -> float:
    if not NUMBER.fullmatch(text) or not option.low <= float(text) <= option.high:
        raise ConfigError(
            f"{where} is {text!r:.200}; allowed: a number from {option.low} to {option.high}, such as 2.5"
        )
    return float(text)


def _parse_endpoint(text: str, where: str) -> str:
    if text in (OFF, ENV):
        return text
    if not ENDPOINT.fullmatch(text):
        raise ConfigError(f"{where} is {text!r:.200}; allowed: off, env, or a URL such as http://127.0.0.1:4318")
    return text.rstrip("/")


def _absolute(text: str, where: str, allowed: str) -> str:
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError as error:  # of a ~ that is nobody's
        raise ConfigError(f"{where} is {text!r}: {error}; allowed: {allowed}") from None


def _parse_origin(text: str, where: str) -> str:
    """As browsers send it: lower case, no port where it is the scheme's own. "null", which is anybody, is not one."""
    match = ORIGIN.fullmatch(text.lower())
    if text != "*" and match is None:
        raise ConfigError(f"{where} is {text!r}; allowed: *, or scheme://host or scheme://host:port, without a path")
    usual = {"http": "80", "https": "443"}
    if match is not None and match["port"] is not None and usual.get(match["scheme"]) == match["port"]:
        return f"{match['scheme']}://{match['host']}"
    return text.lower()


def _check_host_name(name: str, where: str) -> None:
    """A name, or an IPv6 address, which is the only one that may hold colons."""
    if not HOST_NAME.fullmatch(name):
        try:
            ipaddress.IPv6Address(name.strip("[]"))
        except ValueError:
            raise ConfigError(
                f"{where} is {name!r}; allowed: a host name or address as browsers send it, without scheme, port or *"
            ) from None


def _parse_key(item: str, index: int, where: str) -> ApiKey:
    name, separator, secret = item.partition("=")
    key = ApiKey(name, secret) if separator and KEY_NAME.fullmatch(name) and secret else ApiKey(f"key{index + 1}", item)
    check_secret(key, where)
    return key


def check_secret(key: ApiKey, where: str) -> None:
    if len(key.secret) < 8 or not key.secret.isascii() or not key.secret.isprintable() or " " in key.secret:
        raise ConfigError(
            f"{where}: key {key.name} is not usable; a secret has at least 8 printable ASCII characters and no space"
        )


def check_distinct(keys: Sequence[ApiKey], where: str) -> None:
    names = [key.name for key in keys]
    if len(set(names)) != len(names):
        raise ConfigError(f"{where}: the names {names} are not distinct; give each key a name of its own")
    by_secret: dict[str, str] = {}
    for key in keys:
        other = by_secret.setdefault(key.secret, key.name)
        if other != key.name:
            raise ConfigError(f"{where}: {other} and {key.name} have the same secret; give each key one of its own")


def resolve_serve_config(
    model: str | None, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> ServeConfig:
    """The config of flags (None or () where not given), environment and defaults. Raises ConfigError."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if model is not None:
        values["model"], origins["model"] = model, "argument"
    elif environ.get("JILJU_MODEL"):
        values["model"], origins["model"] = environ["JILJU_MODEL"], "JILJU_MODEL"
    else:
        origins["model"] = "default"
    for option in SERVE_OPTIONS:
        given = flags.get(option.name)
        if given is not None and given != () and given is not False:
            values[option.name], origins[option.name] = _parse(option, given, option.flag), option.flag
        elif environ.get(option.variable):  # set to nothing is not set
            values[option.name], origins[option.name] = (
                _parse(option, environ[option.variable], option.variable),
                option.variable,
            )
        else:
            origins[option.name] = "default"
    check_distinct(values.get("api_key", ()), "--api-key")
    if "event_log_max" in values and "event_log" not in values:
        raise ConfigError(
            f"{origins['event_log_max']} is given and no file that it holds for; give --event-log FILE too"
        )
    return ServeConfig(**values, origins=origins)


def check_device(config: ServeConfig) -> None:
    """That the settings of the device, the weights and the KV cache go together. Raises ConfigError naming the one that does not."""

    def named(name: str) -> str:
        """As it was given: flag, variable or argument."""
        return config.origins.get(name, name)

    if config.device == "cpu":
        for name in ("fast", "weight_dtype"):
            if (value := getattr(config, name)) not in (False, AUTO):
                given = named(name) if value is True else f"{named(name)} {value}"
                raise ConfigError(f"{given} is for a GPU; give --device cuda too, or leave it out")
    else:
        for name in ("threads", "packed_cache", "huge_pages"):
            if (value := getattr(config, name)) not in (None, AUTO):
                raise ConfigError(f"{named(name)} {value} means nothing on a GPU; leave it out, or give --device cpu")
    allowed = kv_dtypes(config.device, config.weight_dtype)
    if config.kv_dtype not in (AUTO, *allowed):
        beside = f" with {config.weight_dtype} weights" if config.weight_dtype != AUTO else ""
        raise ConfigError(
            f"{named('kv_dtype')} is {config.kv_dtype}; allowed on {config.device}{beside}: auto, {', '.join(allowed)}"
        )


def kv_dtypes(device: Literal["cpu", "cuda"], weight_dtype: str) -> tuple[str, ...]:
    """What the KV cache may be in, the first by default. On a GPU the half type of the weights, which fp8 ones compute in, or
    fp8; either half while the weights' type is not known."""
    if device == "cpu":
        return "f16", "int8"
    return {AUTO: ("bf16", "f16", "fp8"), "f16": ("f16", "fp8")}.get(weight_dtype, ("bf16", "fp8"))


def engine_config(model: str, **given: Any) -> ServeConfig:
    """The config of an engine that is asked for in Python: values of their own types, within the bounds of the flags.

    No stream is waited for unless `token_gap_ms` says so.

    Raises ConfigError naming the argument.
    """
    values: dict[str, Any] = {"token_gap_ms": 0}
    for option in SERVE_OPTIONS:
        if option.name not in given:
            continue
        value = given.pop(option.name)
        if option.kind == "folder":
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{option.name} is {value!r}; allowed: None, 'off', or a folder")
            values[option.name] = None if value is None else _parse(option, value, option.name)
            continue
        if option.kind == "bytes" and isinstance(value, str):
            value = parse_bytes(value, option.name)
        if option.kind in ("choice", "bool"):
            choices: tuple[Any, ...] = option.choices if option.kind == "choice" else (True, False)
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
                raise ConfigError(f"{option.name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
            values[option.name] = value
            continue
        low, high = (1, MAX_BYTES) if option.kind == "bytes" else (option.low, option.high)
        is_open = value is None and option.kind in ("tokens", "bytes")
        if not (is_open or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high)):
            also = {"tokens": "None or ", "bytes": "None, a size such as '1GiB', or "}.get(option.kind, "")
            raise ConfigError(f"{option.name} is {value!r}; allowed: {also}a whole number from {low} to {high}")
        values[option.name] = value
    assert not given, f"no settings of an engine: {list(given)}"
    config = ServeConfig(model=model, **values)
    check_device(config)
    return config


def available_memory_bytes() -> int:
    """Memory this process may still take: MemAvailable, or what the cgroup leaves if that is less."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _cgroup_int("memory.max"), _cgroup_int("memory.current")
    return min(available, limit - used) if limit is not None and used is not None else available


def huge_pages_offered() -> bool:
    """Whether this system gives huge pages to a process that asks for them."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[always]" in text or "[madvise]" in text


def usable_cores() -> tuple[int, str]:
    """Cores this process may use and how that was found: CPU affinity, then the cgroup's CPU quota, rounded up."""
    cores, quota = len(os.sched_getaffinity(0)), _quota_cores()
    if quota is not None and max(1, math.ceil(quota)) < cores:
        return max(1, math.ceil(quota)), f"cgroup quota of {quota:g} cores"
    return cores, "cores of the CPU affinity"


def cpu_quota_cores() -> float:
    """Cores' worth of time that this process may use: of its CPU affinity, or of the cgroup's quota if that is less."""
    cores, quota = len(os.sched_getaffinity(0)), _quota_cores()
    return cores if quota is None else min(cores, quota)


def _quota_cores() -> float | None:
    limit, _, period = (_cgroup_text("cpu.max") or "").partition(" ")
    return int(limit) / int(period) if limit.isdigit() and period.strip().isdigit() else None


def _cgroup_text(name: str) -> str | None:
    """A control file of this process's cgroup (v2), from its own group or the mount's root; None where there is none."""
    try:
        group = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    for folder in (Path("/sys/fs/cgroup") / group.lstrip("/"), Path("/sys/fs/cgroup")):
        try:
            return (folder / name).read_text().strip()
        except OSError:
            continue
    return None


def _cgroup_int(name: str) -> int | None:
    text = _cgroup_text(name)
    return int(text) if text is not None and text.isdigit() else None
