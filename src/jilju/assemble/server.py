"""The server, put together: text, the HTTP app, logging, around an engine that was launched.

Owns what a server's start does while the engine loads. Knows nothing of flags; it is handed the resolved config.
"""

import gc
import hashlib
import logging
import sys
from collections.abc import Callable
from functools import partial

from jilju import __version__
from jilju.account.energy import find_meter
from jilju.assemble.engine import EngineOptions, ModelFile, held_plan_of, kernel_set_of
from jilju.assemble.launch import Launched
from jilju.assemble.text import ModelText, load_text
from jilju.assemble.worker_process import WorkerOptions, worker_command
from jilju.backends.cuda.device import Readings
from jilju.config import OFF, ServeConfig
from jilju.serve.context import GpuMemory, SamplingDefaults, ServerContext
from jilju.serve.door.key_file import keys_of
from jilju.serve.otel.providers import make_providers
from jilju.serve.request_log import CountingHandler, make_formatter
from jilju.serve.runner import run_server
from jilju.serve.usage_log import UsageLog
from jilju.serve.workers import Workers
from jilju.text.history import History
from jilju.view import DIRECTORY as VIEW_DIRECTORY


def serve_model(launched: Launched, *, on_ready: Callable[[str], None]) -> int:
    """Make the server while the engine loads, serve until a signal; returns the exit status. Raises StartupError."""
    handler = set_up_logging(launched.config)
    config = launched.config
    context = make_context(launched, load_text(launched.model), handler)
    gc.collect()
    gc.freeze()  # what was loaded stays: a full collection would walk over all of it while streams and callers wait
    return run_server(context, host=config.host, port=config.port, on_ready=on_ready)


def make_context(launched: Launched, text: ModelText, handler: CountingHandler) -> ServerContext:
    model, config, options = launched.model, launched.config, launched.options
    d = text.defaults
    defaults = SamplingDefaults()
    if d is not None:
        defaults = SamplingDefaults(
            temperature=d.temperature,
            top_p=d.top_p,
            top_k=d.top_k,
            min_p=d.min_p,
            repetition_penalty=d.repetition_penalty,
            source=d.source,
        )
    usage_log = None if config.usage_log is None else UsageLog(config.usage_log)
    gpu = options.device
    readings = None if gpu is None else Readings(gpu.uuid)
    return ServerContext(
        model_name=config.served_model_name or model.name, tokenizer=text.tokenizer, template=text.template, client=launched.client,
        max_context=options.max_context, fingerprint=fingerprint(model, options), version=__version__, defaults=defaults,
        quantization=quantization(model), keys=keys_of(config), allowed_hosts=frozenset((config.host, *config.allow_host)),
        read_keys=None if config.api_key_file is None else partial(keys_of, config), allowed_origins=frozenset(config.allow_origin),
        plan=held_plan_of(model.plan, options), run_store_bytes=config.run_store, event_log=config.event_log, event_log_bytes=config.event_log_max, lenient=config.lenient, shared_prefix_cache=config.shared_prefix_cache, allow_request_template=config.allow_request_template,
        workers=Workers(worker_command(worker_options(model))),
        view_dir=VIEW_DIRECTORY, history=History() if config.keep_generated_ids == "on" else None,
        kv_dtype=config.kv_dtype, metrics_compat=config.metrics_compat, trace_content=config.trace_content,
        telemetry=None if config.otel == OFF else make_providers(config.otel, __version__), num_dropped_log_lines=lambda: handler.num_dropped + (0 if usage_log is None else usage_log.num_dropped),
        price_per_hour=config.price, usage_log=usage_log,
        meter=find_meter(config.watts, ask_gpu_uj=None if readings is None else readings.energy_uj),
        gpu=None if gpu is None or readings is None else GpuMemory(total_bytes=gpu.total_bytes, used_bytes=readings.used_bytes),
    )  # fmt: skip


def fingerprint(model: ModelFile, options: EngineOptions) -> str:
    """Names weights, tokenizer, template and kernel set: two servers with the same one give the same bits.

    A file of the model table is named by its SHA-256; any other, and each of a folder, by its head (metadata, tokenizer, template,
    tensor list), its size and 64 samples of 4 KiB of its weights, since hashing a whole file would cost seconds at every start.
    """
    digest = hashlib.sha256()
    if model.entry is not None:
        digest.update(model.entry.sha256.encode())
    else:
        for path, head_bytes in model.checkpoint.parts():
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                digest.update(size.to_bytes(8, "little") + file.read(head_bytes))
                for index in range(64):
                    file.seek(head_bytes + (size - head_bytes) * index // 64)
                    digest.update(file.read(4096))
    digest.update(kernel_set_of(options).encode())
    return "fp_" + digest.hexdigest()[:16]


def worker_options(model: ModelFile) -> WorkerOptions:
    return WorkerOptions(model.path, model.plan.vocab_size, stands_in=model.load_format == "dummy")


def quantization(model: ModelFile) -> str:
    """The number formats of the weights, by bytes, most first: "Q4_1 66 MB, Q8_0 30 MB"."""
    by_type: dict[str, int] = {}
    for weight in model.plan.weights.values():
        by_type[weight.type.name] = by_type.get(weight.type.name, 0) + weight.num_bytes
    large = [(name, count) for name, count in by_type.items() if count >= 0.01 * model.plan.weight_bytes]
    return ", ".join(f"{name} {count / 1e6:.0f} MB" for name, count in sorted(large, key=lambda item: -item[1]))


def set_up_logging(config: ServeConfig) -> CountingHandler:
    handler = CountingHandler(sys.stderr)
    handler.setFormatter(make_formatter(config.log_format))
    root = logging.getLogger("jilju")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(config.log_level.upper())
    return handler
