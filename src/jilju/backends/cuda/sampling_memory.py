"""Sampling memory: what a Sampler allocates at load, to the byte.

Owns the sizes that its kernels work by. Knows nothing of torch; the Sampler allocates what `workspaces` names.
"""

from math import prod
from typing import Literal

Dtype = Literal["int32", "int64", "float32", "float64"]
ELEMENT_BYTES: dict[Dtype, int] = {"int32": 4, "int64": 8, "float32": 4, "float64": 8}

CHUNK = 4096  # ids that a program reads: sixteen for each of 256 threads
NUM_BINS = 1024  # of a row's histogram of logits
LIST_CAPACITY = 8192  # ids of the bins in which filters end; where there are more, the whole row is gone over
TOP = 32  # alternatives of a chunk: batch.MAX_TOP to a power of two
STATS_WORDS, SPOT_WORDS = 6, 3  # of a row, between kernels


def workspaces(vocab_size: int, max_logits: int, chunk: int = CHUNK) -> dict[str, tuple[tuple[int, ...], Dtype]]:
    """Shape and type of each workspace, by name."""
    chunks = (max_logits, -(-vocab_size // chunk))
    return {
        "work": ((max_logits, vocab_size), "float32"),
        "keys": (chunks, "int64"),
        "sums": (chunks, "int64"),
        "changed_keys": (chunks, "int64"),
        "lows": (chunks, "float32"),
        "stats": ((max_logits, STATS_WORDS), "float64"),
        "thresholds": ((max_logits,), "int64"),
        "chunk_masses": (chunks, "int64"),
        "bin_counts": ((max_logits, NUM_BINS), "int32"),
        "bin_masses": ((max_logits, NUM_BINS), "int64"),
        "spots": ((max_logits, SPOT_WORDS), "int32"),
        "lists": ((max_logits, LIST_CAPACITY), "int32"),
        "list_counts": ((max_logits,), "int32"),
        "top_keys": ((*chunks, TOP), "int64"),
    }


def workspace_bytes(vocab_size: int, max_logits: int) -> int:
    return sum(prod(shape) * ELEMENT_BYTES[dtype] for shape, dtype in workspaces(vocab_size, max_logits).values())
