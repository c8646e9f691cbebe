"""An engine that is planned for a GPU: formats, memory and options, on a GPU that is described; and what users are told."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from jilju.assemble.engine import EngineOptions, ModelFile, kernel_set_of, limits_of, open_model, resolve_engine
from jilju.assemble.server import fingerprint
from jilju.backends.cuda.device import Gpu
from jilju.backends.cuda.memory import RESERVE_BYTES, weight_bytes, workspace_bytes
from jilju.cli import _announce
from jilju.config import ServeConfig, engine_config, resolve_serve_config
from jilju.errors import ConfigError, StartupError
from jilju.formats.ggml import GgmlType
from tests.backends.test_cuda_memory import LLAMA_8B, plan_of

GOLDEN = Path(__file__).parents[1] / "golden" / "model" / "llama-tied.gguf"
GIB = 1 << 30
H200 = Gpu(0, "GPU-aaaa", "NVIDIA H200", (9, 0), 141 * GIB, 140 * GIB, "570.86.10")
L4 = Gpu(1, "GPU-bbbb", "NVIDIA L4", (8, 9), 23 * GIB, 22 * GIB, "570.86.10")


def llama_8b(type_: GgmlType = GgmlType.BF16) -> ModelFile:
    """A head without weights: nothing of them is looked at."""
    golden = open_model(str(GOLDEN))
    return msgspec.structs.replace(golden, name="llama", spec=LLAMA_8B, plan=plan_of(LLAMA_8B, type_))


def config_of(**flags: str | bool) -> ServeConfig:
    return resolve_serve_config("m", {"device": "cuda", **flags}, {})


def test_defaults_on_a_large_gpu():
    model = llama_8b()
    config, options, memory = resolve_engine(model, config_of(), gpu=H200)
    assert (config.weight_dtype, config.kv_dtype, config.max_rows, config.step_tokens) == ("bf16", "bf16", 256, 2048)
    assert (config.threads, config.packed_cache, config.huge_pages) == (None, "off", "off")
    assert config.origins["threads"] == config.origins["huge_pages"] == "auto: not used on a GPU"
    assert memory.weight_bytes == weight_bytes(model.plan, "bf16")
    assert memory.kv_bytes_per_token == 131072
    assert memory.context == config.context == 131072
    assert memory.available_bytes == 140 * GIB - RESERVE_BYTES
    assert memory.workspace_bytes == workspace_bytes(model.plan, limits_of(options), "bf16")
    left = memory.available_bytes - memory.weight_bytes - memory.workspace_bytes
    assert 0.899 * left < memory.kv_bytes <= 0.9 * left
    assert memory.total_bytes <= memory.available_bytes
    assert (options.backend, options.device, options.fast, options.dummy_weights) == ("cuda", H200, False, False)
    assert (options.packed_cache, options.huge_pages, options.num_threads) == (None, False, 1)
    assert msgspec.json.decode(msgspec.json.encode(options), type=EngineOptions) == options
    assert limits_of(options).kv_dtype == "bf16"


def test_a_context_is_what_fits():
    model = llama_8b()
    _, options, memory = resolve_engine(model, config_of(), gpu=L4)
    assert memory.context == memory.pool_tokens == options.max_context < 131072
    assert memory.total_bytes <= memory.available_bytes
    wider, _, _ = resolve_engine(model, config_of(weight_dtype="fp8", kv_dtype="fp8"), gpu=L4)
    assert wider.context is not None and wider.context > 3 * memory.context


def test_no_more_than_all_rows_can_use():
    config, _, memory = resolve_engine(llama_8b(), config_of(context="1024", max_rows="16"), gpu=H200)
    assert memory.pool_tokens == 16 * 1024
    assert config.origins["kv_memory"] == "auto: 16 contexts"


def test_sizes_that_are_given():
    _, options, memory = resolve_engine(
        llama_8b(), config_of(kv_memory="8GiB", context="4096", step_tokens="512", load_format="dummy", fast=True), gpu=H200
    )  # fmt: skip
    assert memory.pool_tokens == 8 * GIB // 131072
    assert (options.step_tokens, options.max_rows, options.fast, options.dummy_weights) == (512, 256, True, True)


@pytest.mark.parametrize(
    ("type_", "flags", "weights", "kv"),
    [
        ("F16", {}, "f16", "f16"),
        ("F16", {"weight_dtype": "bf16"}, "bf16", "bf16"),
        ("F16", {"kv_dtype": "fp8"}, "f16", "fp8"),
        ("Q4_K", {}, "bf16", "bf16"),
        ("BF16", {"weight_dtype": "f16", "kv_dtype": "f16"}, "f16", "f16"),
        ("BF16", {"weight_dtype": "fp8"}, "fp8", "bf16"),
        ("BF16", {"weight_dtype": "fp8", "kv_dtype": "fp8"}, "fp8", "fp8"),
    ],
)
def test_formats(type_, flags, weights, kv):
    config, options, _ = resolve_engine(llama_8b(GgmlType[type_]), config_of(**flags), gpu=H200)
    assert (options.weight_dtype, options.kv_dtype) == (config.weight_dtype, config.kv_dtype) == (weights, kv)


@pytest.mark.parametrize(
    ("type_", "flags", "error", "words"),
    [
        ("BF16", {"kv_dtype": "f16"}, ConfigError, ["--kv-dtype is f16", "weights are bf16", "auto, bf16, fp8"]),
        ("F16", {"kv_dtype": "bf16"}, ConfigError, ["--kv-dtype is bf16", "weights are f16", "auto, f16, fp8"]),
        ("BF16", {"context": "200000"}, ConfigError, ["--context is 200000", "131072"]),
        ("BF16", {"kv_memory": "1MiB"}, ConfigError, ["holds no block", "2097152"]),
        ("BF16", {"kv_memory": "1GiB", "context": "131072"}, ConfigError, ["16.0 GiB", "smaller --context"]),
        ("BF16", {"kv_memory": "135GiB"}, StartupError, ["138.5 GiB are available on NVIDIA H200", "141.0 GiB in all", "fp8"]),
    ],
)  # fmt: skip
def test_refusals(type_, flags, error, words):
    with pytest.raises(error) as caught:
        resolve_engine(llama_8b(GgmlType[type_]), config_of(**flags), gpu=H200)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_gpu_that_is_too_small_says_what_is_needed():
    small = msgspec.structs.replace(L4, free_bytes=12 * GIB)
    with pytest.raises(
        StartupError, match=r"llama needs 1\d\.\d GiB \(weights 15.0 GiB.*10.5 GiB are available on NVIDIA L4"
    ):
        resolve_engine(llama_8b(), config_of(), gpu=small)
    with pytest.raises(StartupError, match=r"0 B are available"):
        resolve_engine(llama_8b(), config_of(), gpu=msgspec.structs.replace(L4, free_bytes=GIB))


def test_the_fingerprint_tells_apart_what_gives_other_bits(tmp_path):
    model = open_model(str(GOLDEN))
    _, options, _ = resolve_engine(model, config_of(), gpu=H200)
    assert kernel_set_of(options) == "cuda-sm90-invariant, bf16 weights, bf16 KV"
    changes = (
        {"fast": True}, {"weight_dtype": "fp8"}, {"kv_dtype": "fp8"}, {"device": L4},
    )  # fmt: skip
    others = [msgspec.structs.replace(options, **change) for change in changes]
    prints = {fingerprint(model, each) for each in (options, *others)}
    assert len(prints) == 1 + len(changes)
    again = msgspec.structs.replace(options, device=msgspec.structs.replace(H200, index=5, uuid="GPU-x"))
    assert fingerprint(model, again) == fingerprint(model, options)


def announced(config: ServeConfig) -> str:
    model = llama_8b()
    config, _, memory = resolve_engine(model, config, gpu=H200)
    out = io.StringIO()
    _announce(Console(file=out, width=300), model, config, memory)
    return out.getvalue()


def test_what_the_start_tells():
    told = announced(config_of(context="8192"))
    for text in (
        "NVIDIA H200, GPU 0, sm90, driver 570.86.10", "beside 1.5 GiB for CUDA itself", "15.0 GiB", "128.0 KiB (bf16)",
        "invariant: the same bits in any batch", "not used on a GPU",
    ):  # fmt: skip
        assert text in told, told
    told = announced(config_of(fast=True, load_format="dummy", weight_dtype="fp8"))
    assert "fast: bits may depend on the batch" in told and "random numbers for" in told and "as fp8" in told


def test_an_engine_in_python_is_planned_alike():
    config, options, _ = resolve_engine(llama_8b(), engine_config("m", device="cuda", max_rows=8), gpu=H200)
    assert (config.max_rows, config.step_tokens, options.token_gap_ms) == (8, 2048, 0)
    with pytest.raises(ConfigError, match="threads 4 means nothing on a GPU"):
        engine_config("m", device="cuda", threads=4)


def test_a_cpu_keeps_its_defaults():
    model = open_model(str(GOLDEN))
    config, options, memory = resolve_engine(model, resolve_serve_config("m", {"kv_memory": "1MiB"}, {}), "reference")
    assert (config.max_rows, config.step_tokens, config.kv_dtype) == (32, 256, "f16")
    assert (options.max_rows, options.step_tokens, options.kv_dtype) == (32, 256, "f16")
    assert (options.backend, options.device, memory.gpu, memory.reserve_bytes) == ("reference", None, None, 0)
    assert dataclasses.asdict(limits_of(options))["kv_dtype"] == "f16"


WITHOUT_DRIVER = """
import sys
import jilju.backends.cuda.device as device
device.LIBRARY = "libno-such-library.so.1"
from jilju.cli import main
try:
    main()
finally:
    print(sorted({"torch", "triton"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [("serve", "no-such-model", "--device", "cuda"), ("generate", "x", "-m", "no-such-model", "--device", "cuda")],
)
def test_without_a_driver_nothing_is_fetched_or_loaded(arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "[]\n"
    (line,) = done.stderr.splitlines()
    assert "NVIDIA's driver" in line and "--device cpu" in line, line
