"""Numbers that sampling is made of: order keys, masses as integers, bins of logits, a row's record of parameters.

A key holds a logit and its id in the sampling order, larger first. Masses are integers, so that their sums are exact: the
order of summation, and with it the shape of a launch, means nothing. Shared by the sampling kernels.
"""

import triton
import triton.language as tl

from jilju.backends.cuda import sampling_memory

MAX_VOCAB = 1 << 18  # ids that a key holds, and masses that add up to less than 2^63
ID_BITS = tl.constexpr(18)
LAST_ID = tl.constexpr((1 << 18) - 1)
LOWEST = tl.constexpr(-(1 << 60))  # below every key
HIGHEST = tl.constexpr((1 << 60) - 1)
MASS_ONE = tl.constexpr(float(1 << 44))  # the mass of the largest logit; 2^18 of them are 2^62
SUM_ONE = tl.constexpr(float(1 << 40))  # of sums of float32 exponentials, which say 24 bits each
REACH = tl.constexpr(31.5)  # a logit that is so many temperatures below the largest has mass 0: e^-31.2 = 2^-45
VOCAB_REACH = tl.constexpr(
    12.5
)  # so many below, the largest vocabulary has less mass than the largest logit: e^12.5 > 2^18

# A row's record: 32-bit words in the batch's upload. The words of lists are places in the upload.
RECORD_WORDS = 28
RECORD = tl.constexpr(RECORD_WORDS)
KIND = tl.constexpr(0)  # how the row gets its id
TARGET = tl.constexpr(1)
NUM_TOP = tl.constexpr(2)
TEMPERATURE = tl.constexpr(3)
TOP_K = tl.constexpr(4)  # 0: off
TOP_P = tl.constexpr(5)
MIN_P = tl.constexpr(6)
SEED = tl.constexpr(7)  # two words
POSITION = tl.constexpr(9)  # two words
REPETITION = tl.constexpr(11)
PRESENCE = tl.constexpr(12)
FREQUENCY = tl.constexpr(13)
MASK_ROW = tl.constexpr(14)
PENALTIES = tl.constexpr(15)  # begin and end of ids, and how far behind each id its count is
BIASES = tl.constexpr(18)  # begin and end of ids, and how far behind each id its bias is
BANNED = tl.constexpr(21)  # begin and end of ids
WANTED = tl.constexpr(23)  # begin and end of ids, and the place of the first result
SCORED, GREEDY = tl.constexpr(0), tl.constexpr(1)  # the target; the largest logit
DRAWN, FILTERED = tl.constexpr(2), tl.constexpr(3)  # by chance; from those that top-k or top-p keep

# A row's numbers between kernels, float64
STATS = tl.constexpr(sampling_memory.STATS_WORDS)
LARGEST = tl.constexpr(0)  # of the raw logits
LOG_SUM = tl.constexpr(1)  # log of the sum of exp(l - LARGEST)
PEAK = tl.constexpr(2)  # the largest of the changed logits
INVERSE = tl.constexpr(3)  # 1 / temperature
BIN_SCALE = tl.constexpr(
    4
)  # bins a unit of logits, but for the last bin, which takes the rest; this and the next are float32 numbers
BIN_REACH = tl.constexpr(5)  # below PEAK; what is further down has no mass


@triton.jit
def key_of(x, ids):
    """int64: larger is earlier in the order of descending logits, ties to the lowest id"""
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0
    bits = x.to(tl.int32, bitcast=True)
    image = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (image.to(tl.int64) << ID_BITS) | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def value_of(key):
    image = (key >> ID_BITS).to(tl.int32)
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def id_of(key):
    return (key & LAST_ID).to(tl.int32) ^ LAST_ID


@triton.jit
def number(record, FIELD: tl.constexpr):
    """A field of a row's record that is float32"""
    return tl.load(record + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def share_of(x, row_stats):
    """exp((l - largest) / temperature) in float64: 1 of the largest"""
    return tl.exp((x.to(tl.float64) - tl.load(row_stats + PEAK)) * tl.load(row_stats + INVERSE))


@triton.jit
def mass_of(share):
    """The share as an integer, to nearest"""
    return (share * MASS_ONE + 0.5).to(tl.int64)


@triton.jit
def bin_of(x, row_stats, NUM_BINS: tl.constexpr):
    """Which bin a logit is in: 0 holds the largest; larger logits are never in a later bin. -1: too small to have mass"""
    depth = tl.load(row_stats + PEAK).to(tl.float32) - x
    index = tl.minimum(depth * tl.load(row_stats + BIN_SCALE).to(tl.float32), NUM_BINS - 1.0).to(tl.int32)
    return tl.where(depth <= tl.load(row_stats + BIN_REACH).to(tl.float32), index, -1)
