"""The GPU that an engine is planned for: which one, and in which number formats.

Owns the settings that only a GPU has. Imports no torch: whoever plans asks the driver, the engine's process alone computes.
"""

from typing import cast

from jilju.backends.cuda.device import Gpu, check_fp8, check_libraries, find_gpu
from jilju.backends.cuda.memory import own_dtype
from jilju.config import AUTO, OFF, ServeConfig, check_device, kv_dtypes
from jilju.errors import ConfigError
from jilju.plan import KvDtype, Plan, WeightDtype

UNUSED = "not used on a GPU"


def find_device(config: ServeConfig) -> Gpu | None:
    """The GPU that the config asks for, None for the CPU; to be called before a model is fetched for nothing.

    Raises ConfigError for settings that contradict each other and for libraries that are lacking, PlatformError where there
    is no such GPU.
    """
    check_device(config)
    if config.device == "cpu":
        return None
    gpu = find_gpu()
    check_libraries()
    for name, value in (("--weight-dtype", config.weight_dtype), ("--kv-dtype", config.kv_dtype)):
        if value == "fp8":
            check_fp8(gpu, name)
    return gpu


def gpu_config(plan: Plan, config: ServeConfig) -> tuple[ServeConfig, WeightDtype, KvDtype]:
    """Fill in what a GPU decides, and say that it has no use for a CPU's settings. Raises ConfigError for a KV cache that
    does not go with the weights."""
    if config.weight_dtype == AUTO:
        config = config.with_auto(
            "weight_dtype", own_dtype(plan), "the half type of the model file, or the nearest to it"
        )
    allowed = kv_dtypes("cuda", config.weight_dtype)
    if config.kv_dtype == AUTO:
        config = config.with_auto("kv_dtype", allowed[0], "what the weights compute in")
    if config.kv_dtype not in allowed:
        raise ConfigError(
            f"--kv-dtype is {config.kv_dtype} and the weights are {config.weight_dtype}; allowed beside them: auto, "
            f"{', '.join(allowed)}"
        )
    for name, value in (("threads", None), ("packed_cache", OFF), ("huge_pages", "off")):
        config = config.with_auto(name, value, UNUSED)
    return config, cast(WeightDtype, config.weight_dtype), cast(KvDtype, config.kv_dtype)
