"""Sampling memory: what a Sampler allocates at load, to the byte.

Owns the sizes that its kernels work by, and how the words of its results lie. Knows nothing of torch; the Sampler allocates
what `workspaces` names.
"""

from itertools import accumulate
from math import prod
from typing import Literal

from jilju.plan.batch import MAX_TOP, MAX_WANTED

Dtype = Literal["int32", "int64", "float32", "float64"]
ELEMENT_BYTES: dict[Dtype, int] = {"int32": 4, "int64": 8, "float32": 4, "float64": 8}

CHUNK = 4096  # ids that a program reads: sixteen for each of 256 threads
NUM_BINS = 128  # of a row's histogram of logits
LIST_CAPACITY = 8192  # ids of the bins in which filters end; where there are more, the whole row is gone over
TOP = 32  # alternatives of a chunk: batch.MAX_TOP to a power of two
STATS_WORDS, SPOT_WORDS = 6, 6  # of a row, between kernels


NUM_BUFFERS = 4  # of results, at load: of two steps under way, one that is prepared, one that is read

RESULT_WORDS = (
    1,
    1,
    1,
    MAX_TOP,
    MAX_TOP,
    MAX_WANTED,
)  # a row: id, logprob, finite, the ids and logprobs of alternatives, wanted


def result_places(max_logits: int) -> tuple[int, ...]:
    """Where each part of the results begins, each at a multiple of 16 bytes, and where the last ends"""
    return tuple(accumulate((-(-max_logits * words // 4) * 4 for words in RESULT_WORDS), initial=0))


def workspaces(
    vocab_size: int, max_logits: int, chunk: int = CHUNK, list_capacity: int = LIST_CAPACITY
) -> dict[str, tuple[tuple[int, ...], Dtype]]:
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
        "bin_counts": ((*chunks, NUM_BINS), "int32"),
        "spots": ((max_logits, SPOT_WORDS), "int32"),
        "places": ((max_logits, chunks[1] + 1), "int32"),
        "lists": ((max_logits, list_capacity), "int64"),
        "above": ((*chunks, 2), "int64"),
        "top_keys": ((*chunks, TOP), "int64"),
        "results": ((NUM_BUFFERS, result_places(max_logits)[-1]), "int32"),
    }


def workspace_bytes(vocab_size: int, max_logits: int) -> int:
    return sum(prod(shape) * ELEMENT_BYTES[dtype] for shape, dtype in workspaces(vocab_size, max_logits).values())
