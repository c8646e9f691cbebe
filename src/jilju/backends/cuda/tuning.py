"""Tuning: which configuration a linear's kernel takes, for any matrix and any number of tokens.

Owns the configurations, the tables of measured ones that ship with the package (tuned/*.json, made by
benchmarks/gpu/tune_linear.py), and the rule of thumb for all else. Knows nothing of torch or of the kernels.
Invariant mode: all that decides the order of a sum (kind, block_k, num_splits) follows from the matrix alone, and every tile
runs on the same instructions (block_n >= 64, 4 or 8 warps: wgmma), so that a row's bits do not depend on the step around it.
"""

from importlib import resources
from typing import Literal

import msgspec

Mode = Literal["invariant", "fast"]
Dtype = Literal["bf16", "f16", "fp8"]  # of the weights

HOPPERS = ("nvidia-h200", "nvidia-h100")
NUM_SMS = 132  # of an H100 or H200: as many programs run at once, times those that share an SM
MAX_GEMV_TOKENS = 4
MAX_FP8_GEMV_TOKENS = 2  # beyond, unpacking and multiplying takes longer than reading
MAX_TILES_TOKENS = 64  # fast mode: from there on the weights are read slower than cuBLAS multiplies
LONG_STEP_TOKENS = 128  # from here on a longer step takes the same tiles
SHARED_BYTES = 200 << 10  # for a program's stages: an SM has 227 KiB
SHARED_BYTES_OF_TWO = (
    100 << 10
)  # when two programs are to share an SM, so that one reads while the other begins or ends


class LinearConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """How linear() multiplies: by which kernel, in which tiles, K in how many parts that are summed apart."""

    kind: Literal["gemv", "tiles", "matmul"]
    block_n: int = 0  # rows of the weights a program
    block_k: int = 0
    block_t: int = 0  # tokens a program, of tiles
    num_splits: int = 1  # of tiles
    num_warps: int = 0
    num_stages: int = 0
    tma: bool = False  # tiles by the copy engine


class Measured(msgspec.Struct, frozen=True):
    num_tokens: int
    us: float
    config: LinearConfig


class TunedLinear(msgspec.Struct, frozen=True):
    mode: Mode
    dtype: Dtype
    num_rows: int  # of the weights: gates and ups of a glu
    num_columns: int
    glu: bool
    best: tuple[Measured, ...]  # by num_tokens, ascending


class Tuning(msgspec.Struct, frozen=True):
    """A GPU's table; empty of a GPU that nobody measured."""

    gpu_name: str
    linears: tuple[TunedLinear, ...] = ()
    read_gb_per_s: float = 0.0  # reached by a kernel that only sums

    def linear(self, mode: Mode, dtype: Dtype, n: int, k: int, t: int, glu: bool) -> LinearConfig:
        """The configuration of [t, k] times [n, k]^T. `matmul` with glu: multiply first, then glu() what comes out.

        Of the measured numbers of tokens the next above t counts, for its tiles hold t too; beyond all of them the last if it
        was of a long step, or else the rule of thumb, in invariant mode with the table's reduction.
        """
        reduction = reduction_of(dtype, n, k, glu)
        key = mode, "bf16" if dtype == "f16" else dtype, n, k, glu  # f16 is as fast as bf16
        for entry in self.linears:
            if (entry.mode, entry.dtype, entry.num_rows, entry.num_columns, entry.glu) == key:
                for measured in entry.best:
                    if measured.num_tokens >= t:
                        return measured.config
                last = entry.best[-1]
                if last.num_tokens >= LONG_STEP_TOKENS:
                    return last.config
                reduction = last.config.block_k, last.config.num_splits
        if mode == "invariant":
            return tiles_config(dtype, n, t, glu, reduction)
        return fast_config(dtype, n, k, t, glu)


def load_tuning(gpu_name: str) -> Tuning:
    """The shipped table of the GPU, or of the other of the two Hoppers, which have the same SMs; else an empty one."""
    slug = gpu_name.lower().replace(" ", "-")  # such as nvidia-h100-80gb-hbm3
    if slug.startswith(HOPPERS):
        for name in sorted(HOPPERS, key=lambda name: not slug.startswith(name)):
            file = resources.files("jilju.backends.cuda") / "tuned" / f"{name}.json"
            if file.is_file():
                return msgspec.json.decode(file.read_bytes(), type=Tuning)
    return Tuning(gpu_name)


def config_for(gpu_name: str, mode: Mode, dtype: Dtype, n: int, k: int, t: int, glu: bool) -> LinearConfig:
    """`Tuning.linear` of the GPU's table; who asks often keeps the table."""
    return load_tuning(gpu_name).linear(mode, dtype, n, k, t, glu)


def num_parts(config: LinearConfig, num_tokens: int, num_rows: int) -> int:
    """S of linear()'s out: parts where one part's tiles would leave SMs idle, else the sum, made by the kernel itself."""
    if config.kind != "tiles" or config.num_splits == 1:
        return 1
    num_tiles = -(-num_rows // config.block_n) * -(-num_tokens // config.block_t)
    return config.num_splits if 4 * num_tiles < 3 * NUM_SMS else 1


def max_parts_values(tuning: Tuning, mode: Mode, dtype: Dtype, n: int, k: int, max_tokens: int) -> int:
    """The most float32 values that linear()'s out [S, T, n] has, for any T up to max_tokens: what a workspace must hold."""
    configs = ((t, tuning.linear(mode, dtype, n, k, t, False)) for t in range(1, max_tokens + 1))
    return max(num_parts(config, t, n) * t * n for t, config in configs)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def reduction_of(dtype: Dtype, n: int, k: int, glu: bool) -> tuple[int, int]:
    """block_k and num_splits, from the matrix alone.

    block_k: 128 bytes of a row. num_splits: enough that blocks of 64 rows occupy most SMs in a step of few tokens, each split at
    least four blocks of K. A glu's gates and ups are done by one program, so that splitting would not spread them.
    """
    block_k = min(128 if dtype == "fp8" else 64, max(32, next_power_of_two(k)))
    num_splits = 1
    while not glu and -(-n // 64) * num_splits < 0.9 * NUM_SMS and k >= 8 * num_splits * block_k:
        num_splits *= 2
    return block_k, min(num_splits, 8)


def tiles_config(dtype: Dtype, n: int, t: int, glu: bool, reduction: tuple[int, int]) -> LinearConfig:
    block_k, num_splits = reduction
    block_t = min(max(16, next_power_of_two(t)), 128)
    # Large tiles when there are enough of them to fill the SMs; a glu's program has two such tiles
    num_large = -(-n // (256 if glu else 128)) * -(-t // 128)
    block_n = 128 if t > 128 and not glu and num_large >= NUM_SMS else 64
    stage_bytes = block_k * (block_n * (2 if glu else 1) * (1 if dtype == "fp8" else 2) + block_t * 2)
    room = SHARED_BYTES_OF_TWO if block_t <= 64 else SHARED_BYTES
    num_stages = max(2, min(4 if block_t > 64 else 6, room // stage_bytes))
    return LinearConfig("tiles", block_n, block_k, block_t, num_splits, 8 if block_t > 64 else 4, num_stages)


def fast_config(dtype: Dtype, n: int, k: int, t: int, glu: bool) -> LinearConfig:
    if t <= (MAX_FP8_GEMV_TOKENS if dtype == "fp8" else MAX_GEMV_TOKENS):
        # 16 bytes a thread of each row, so that 4 warps take 1024 or 2048 columns: 16 KiB a program and round, loaded at once
        block_k = 2048 if dtype == "fp8" else 1024
        return LinearConfig("gemv", block_n=8, block_k=block_k, num_warps=4, num_stages=1)
    if t <= MAX_TILES_TOKENS:
        return tiles_config(dtype, n, t, glu, reduction_of(dtype, n, k, glu))
    return LinearConfig("matmul")
