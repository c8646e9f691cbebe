"""The hash chain: what a slot of the simulated cache holds, and which token follows from it.

Owns the formulas, all modulo 2^64, once for Python's integers and once for numpy's columns of them:

    slot(p)  = mixed(sum over j < p of RATIO^j * slot(j) + token(p) * TOKEN + p * POSITION + START)
    draw     = folded(slot(last) + noise(seed, position) + changes)       of a greedy row the noise is 0
    token    = allowed[draw mod len(allowed)]                             in ascending order of ids

The weight of a slot follows from its position alone, so blocks, chunks and batches cannot show; it is odd, so no bit of a
slot is lost. Knows nothing of blocks, batches or requests.
"""

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

MASK = 2**64 - 1
# Odd numbers without structure (the first bits of irrational numbers, multipliers of well-known generators).
RATIO = 0xD1342543DE82EF95  # 5 mod 8, so its powers repeat after 2^62 only
TOKEN = 0x9E3779B97F4A7C15
POSITION = 0xC2B2AE3D27D4EB4F
START = 0x27D4EB2F165667C5
SEED = 0xA0761D6478BD642F
INDEX = 0xE7037ED1A0B428DB
COUNT = 0x8EBC6AF09C88C6E3
BIAS = 0x589965CC75374CC3
PENALTIES = (0x1D8E4E27C47D124F, 0xEB44ACCAB455D165, 0x9FB21C651E98DF25)  # repetition, presence, frequency
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # multipliers of the mixers
LOGPROB_BITS = 10
MAX_GREEDY = np.float32(1e-4)  # a lower temperature is greedy


# ---- of one word ----------------------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    """A bijection in which every bit of x changes every bit."""
    x = (x ^ x >> 32) * FIRST & MASK
    x = (x ^ x >> 29) * SECOND & MASK
    return x ^ x >> 32


def slot_value(before: int, position: int, token_id: int) -> int:
    """`before` is the weighted sum of the slots before it."""
    x = before + token_id * TOKEN + position * POSITION + START & MASK
    x = (x ^ x >> 32) * FIRST & MASK  # mixed(x), in line
    x = (x ^ x >> 29) * SECOND & MASK
    return x ^ x >> 32


def noise_of(seed: int, position: int) -> int:
    return seed * SEED + position * INDEX & MASK


def draw_of(slot: int, noise: int, changes: int) -> int:
    x = slot + noise + changes & MASK
    return ((x ^ x >> 32) * FIRST & MASK) >> 32


def logprob_of(slot: int, token_id: int) -> float:
    """One of -1/64 .. -16, exact in float32."""
    return (((slot + token_id * TOKEN) * SECOND & MASK) >> 64 - LOGPROB_BITS) / -64 - 1 / 64


def penalty_key(penalties: Sequence[float]) -> int:
    """Of the penalties' float32 bits: repetition, presence, frequency."""
    return mixed(sum(float32_bits(p) * word for p, word in zip(penalties, PENALTIES, strict=True)) & MASK)


def penalty_term(key: int, token_id: int, count: int) -> int:
    """What an id that is `count` times in the output adds to `changes`."""
    return mixed(token_id * TOKEN + count * COUNT + key & MASK)


def bias_sum(biases: Mapping[int, float]) -> int:
    return sum(mixed(token_id * TOKEN + float32_bits(bias) * BIAS & MASK) for token_id, bias in biases.items()) & MASK


def float32_bits(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


# ---- of columns; an argument called `x` is overwritten -------------------------------------------------------------

_TOKEN, _POSITION, _START, _SEED, _INDEX, _COUNT, _BIAS, _FIRST, _SECOND = map(
    np.uint64, (TOKEN, POSITION, START, SEED, INDEX, COUNT, BIAS, FIRST, SECOND)
)
_29, _32, _TO_LOGPROB = np.uint64(29), np.uint64(32), np.uint64(64 - LOGPROB_BITS)
_64TH = np.float32(-1 / 64)


def powers(ratio: int, num: int) -> Words:
    """ratio^0, ratio^1, ..."""
    out = np.full(num, ratio & MASK, np.uint64)
    out[:1] = 1
    return np.multiply.accumulate(out)


def position_keys(num: int) -> Words:
    """What positions 0, 1, ... enter their slots with."""
    return np.arange(num, dtype=np.uint64) * _POSITION + _START


def token_keys(token_ids: npt.NDArray[np.int32]) -> Words:
    return token_ids.astype(np.uint64) * _TOKEN


def mixed_words(x: Words) -> Words:
    x ^= x >> _32
    x *= _FIRST
    x ^= x >> _29
    x *= _SECOND
    x ^= x >> _32
    return x


def noise_words(seeds: Words, positions: npt.NDArray[np.int64], temperatures: npt.NDArray[np.float32]) -> Words:
    noise = seeds * _SEED
    noise += positions.view(np.uint64) * _INDEX
    noise *= temperatures >= MAX_GREEDY
    return noise


def draw_words(x: Words) -> Words:
    """x: the sum of slots, noise and changes."""
    x ^= x >> _32
    x *= _FIRST
    x >>= _32
    return x


def logprob_words(slots: Words, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    x = token_keys(token_ids)
    x += slots
    x *= _SECOND
    x >>= _TO_LOGPROB
    logprobs = x.astype(np.float32)
    logprobs *= _64TH
    logprobs += _64TH
    return logprobs


def penalty_keys(*columns: npt.NDArray[np.float32]) -> Words:
    x = np.zeros(len(columns[0]), np.uint64)
    for column, word in zip(columns, PENALTIES, strict=True):
        x += _bits(column) * np.uint64(word)
    return mixed_words(x)


def penalty_terms(keys: Words, token_ids: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> Words:
    return mixed_words(token_keys(token_ids) + counts.astype(np.uint64) * _COUNT + keys)


def bias_terms(token_ids: npt.NDArray[np.int32], biases: npt.NDArray[np.float32]) -> Words:
    return mixed_words(token_keys(token_ids) + _bits(biases) * _BIAS)


def _bits(column: npt.NDArray[np.float32]) -> Words:
    return column.view(np.uint32).astype(np.uint64)
