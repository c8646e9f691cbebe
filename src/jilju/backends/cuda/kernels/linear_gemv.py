"""A few vectors times a matrix: each weight is read once, multiplied and summed in float32; no tensor cores.

Owns the kernels for one to four tokens, where only the memory's speed counts. Knows nothing of larger steps.
A program takes BLOCK_N whole rows of the weights. A thread reads VECTOR neighbours, 16 bytes, of each row at a time and
sums their products itself; what the threads have is added once, at the end. Tokens lie 8 values to a thread beside them.
"""

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.glu import activate

MAX_TOKENS = 4


@triton.jit
def add_products(total, low, high, x, columns, num_columns, VECTOR: tl.constexpr, EVEN_K: tl.constexpr):
    """total [BLOCK_N, lanes] + the products of each lane's weights (low, high [BLOCK_N, lanes, 8]) and values of one token."""
    values = tl.load(x + columns) if EVEN_K else tl.load(x + columns, mask=columns < num_columns, other=0.0)
    total += tl.sum(low * values.to(tl.float32), axis=2)
    if VECTOR == 16:
        if EVEN_K:
            values = tl.load(x + columns + 8)
        else:
            values = tl.load(x + columns + 8, mask=columns + 8 < num_columns, other=0.0)
        total += tl.sum(high * values.to(tl.float32), axis=2)
    return total


@triton.jit
def add_block(
    sum0, sum1, sum2, sum3, weights, x, start, num_columns,
    NUM_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The sums of each token, each [BLOCK_N, lanes], with weights [BLOCK_N, BLOCK_K] times the values from `start` on."""
    LANES: tl.constexpr = BLOCK_K // VECTOR
    if VECTOR == 16:  # the halves of a thread's 16 are both its own, so that nothing moves here
        pairs = tl.permute(tl.reshape(weights, (BLOCK_N, LANES, 2, 8)), (0, 1, 3, 2))
        low, high = tl.split(pairs)
        low, high = low.to(tl.float32), high.to(tl.float32)
    else:
        low = tl.reshape(weights, (BLOCK_N, LANES, 8)).to(tl.float32)
        high = low
    columns = start + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, 8)[None, None, :]
    sum0 = add_products(sum0, low, high, x, columns, num_columns, VECTOR, EVEN_K)
    if NUM_TOKENS > 1:
        sum1 = add_products(sum1, low, high, x + num_columns, columns, num_columns, VECTOR, EVEN_K)
    if NUM_TOKENS > 2:
        sum2 = add_products(sum2, low, high, x + 2 * num_columns, columns, num_columns, VECTOR, EVEN_K)
    if NUM_TOKENS > 3:
        sum3 = add_products(sum3, low, high, x + 3 * num_columns, columns, num_columns, VECTOR, EVEN_K)
    return sum0, sum1, sum2, sum3


@triton.jit
def load_weights(row_starts, start, num_columns, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    columns = start + tl.arange(0, BLOCK_K)[None, :]
    if EVEN_K:
        return tl.load(row_starts + columns, eviction_policy="evict_first")
    return tl.load(row_starts + columns, mask=columns < num_columns, other=0.0, eviction_policy="evict_first")


@triton.jit
def row_products(
    x,  # [NUM_TOKENS, num_columns]
    w,
    rows,  # [BLOCK_N]
    num_columns,
    NUM_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of w times each token: four times [BLOCK_N], zero from NUM_TOKENS on."""
    zero = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    row_starts = w + rows.to(tl.int64)[:, None] * num_columns
    weights = load_weights(row_starts, 0, num_columns, BLOCK_K, EVEN_K)
    if PDL:  # the first weights are on their way while the kernel before still writes x
        tl.extra.cuda.gdc_wait()
    sum0, sum1, sum2, sum3 = add_block(
        zero, zero, zero, zero, weights, x, 0, num_columns, NUM_TOKENS, BLOCK_N, BLOCK_K, VECTOR, EVEN_K
    )
    for start in tl.range(BLOCK_K, num_columns, BLOCK_K, num_stages=NUM_STAGES):
        weights = load_weights(row_starts, start, num_columns, BLOCK_K, EVEN_K)
        sum0, sum1, sum2, sum3 = add_block(
            sum0, sum1, sum2, sum3, weights, x, start, num_columns, NUM_TOKENS, BLOCK_N, BLOCK_K, VECTOR, EVEN_K
        )
    if PDL:  # not sooner, or programs that only wait would take room from those that still read
        tl.extra.cuda.gdc_launch_dependents()
    return tl.sum(sum0, axis=1), tl.sum(sum1, axis=1), tl.sum(sum2, axis=1), tl.sum(sum3, axis=1)


@triton.jit
def gemv_kernel(
    x,  # [NUM_TOKENS, num_columns]
    w,  # [num_rows, num_columns]
    scale,  # [num_rows] if HAS_SCALE
    out,  # [NUM_TOKENS, num_rows] float32
    num_rows,
    num_columns,
    NUM_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    taken = tl.minimum(rows, num_rows - 1)  # the last row again, rather than a mask on every load
    y0, y1, y2, y3 = row_products(
        x, w, taken, num_columns, NUM_TOKENS, BLOCK_N, BLOCK_K, VECTOR, NUM_STAGES, EVEN_K, PDL
    )
    if HAS_SCALE:
        factors = tl.load(scale + taken)
        y0, y1, y2, y3 = y0 * factors, y1 * factors, y2 * factors, y3 * factors
    tl.store(out + rows, y0, mask=inside)
    if NUM_TOKENS > 1:
        tl.store(out + num_rows + rows, y1, mask=inside)
    if NUM_TOKENS > 2:
        tl.store(out + 2 * num_rows + rows, y2, mask=inside)
    if NUM_TOKENS > 3:
        tl.store(out + 3 * num_rows + rows, y3, mask=inside)


@triton.jit
def gemv_glu_kernel(
    x,  # [NUM_TOKENS, num_columns]
    w,  # [2 * width, num_columns]: gate, then up
    scale,  # [2 * width] if HAS_SCALE
    out,  # [NUM_TOKENS, width]
    width,
    num_columns,
    ACTIVATION: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Half of a program's rows are gates, the other half their ups."""
    HALF: tl.constexpr = BLOCK_N // 2
    columns = tl.program_id(0) * HALF + tl.arange(0, HALF)
    both = tl.arange(0, BLOCK_N)
    rows = tl.minimum(tl.program_id(0) * HALF + both // 2, width - 1) + (both % 2) * width
    y0, y1, y2, y3 = row_products(
        x, w, rows, num_columns, NUM_TOKENS, BLOCK_N, BLOCK_K, VECTOR, NUM_STAGES, EVEN_K, PDL
    )
    if HAS_SCALE:
        factors = tl.load(scale + rows)
        y0, y1, y2, y3 = y0 * factors, y1 * factors, y2 * factors, y3 * factors
    store_glu(out + columns, y0, columns < width, ACTIVATION, HALF)
    if NUM_TOKENS > 1:
        store_glu(out + width + columns, y1, columns < width, ACTIVATION, HALF)
    if NUM_TOKENS > 2:
        store_glu(out + 2 * width + columns, y2, columns < width, ACTIVATION, HALF)
    if NUM_TOKENS > 3:
        store_glu(out + 3 * width + columns, y3, columns < width, ACTIVATION, HALF)


@triton.jit
def store_glu(out, y, mask, ACTIVATION: tl.constexpr, HALF: tl.constexpr):
    gate, up = tl.split(tl.reshape(y, (HALF, 2)))
    tl.store(out, activate(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=mask)
