"""A matrix times tokens by tensor cores, operands swapped: the weights' rows are the product's rows, tokens its columns.

Owns the tiled kernels, for any number of tokens. Knows nothing of who sums the parts.
K is cut into NUM_SPLITS fixed runs of blocks. Each is summed apart, from zero; then the sums are added in ascending order,
here (INLINE) or by whoever reads the parts: the bits are the same. Tiles come by the copy engine (TMA) or by pointers: the same
bits too. Rows and tokens beyond the end are not stored; pointers repeat the last one, so that only a K that is no multiple of
BLOCK_K needs masks.
"""

import triton
import triton.language as tl

from jilju.backends.cuda.kernels.glu import activate

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no assembly
GROUP = 8  # blocks of rows that take turns over the same tokens: both stay in the L2 cache


@triton.jit
def place(num_rows, num_tokens, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """Which block of rows and which block of tokens this program takes."""
    num_n, num_t = tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_tokens, BLOCK_T)
    group = tl.program_id(0) // (GROUP * num_t)
    size = tl.minimum(num_n - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_t)
    return group * GROUP + within % size, within // size


@triton.jit
def load_block(tiles, first, pointers, start, num_columns, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """[rows, BLOCK_K] from column `start` on: from row `first` by the copy engine if there are tiles, else by pointers."""
    if tiles is not None:
        return tiles.load([first, start])  # zeros beyond the end
    if EVEN_K:
        return tl.load(pointers + start)
    return tl.load(pointers + start, mask=(start + tl.arange(0, BLOCK_K) < num_columns)[None, :], other=0.0)


@triton.jit
def fetch(rows, first, num_columns, BYTES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Asks the L2 cache for four blocks of weights from column `first` on, a sector of 32 bytes at a time, and does not wait."""
    SECTOR: tl.constexpr = 32 // BYTES
    columns = tl.minimum(first + tl.arange(0, 4 * BLOCK_K // SECTOR) * SECTOR, num_columns - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [rows[:, None] + columns[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def widened(weights, dtype: tl.constexpr):
    """Weights of e4m3 as halves, exactly. NaN, which no weight is, becomes 480 as bfloat16.

    The GPU has no instruction from e4m3 to bfloat16: by float16 it would be one slow conversion a weight. Here four instructions
    do two: each byte becomes 16 bits, the upper ones copies of its sign; shifted by 4, its exponent and fraction lie where
    bfloat16 has them; of the five signs the first is kept; the product with 2^120 makes up for what the exponents count from.
    """
    if INTERPRET or dtype == tl.float16:
        halves = weights.to(dtype)
    else:
        halves = tl.inline_asm_elementwise(
            """{
            .reg .b32 pair, factors;
            cvt.u32.u16 pair, $1;
            prmt.b32 pair, pair, 0, 0x9180;
            shl.b32 pair, pair, 4;
            and.b32 pair, pair, 0x87f087f0;
            mov.b32 factors, 0x7b807b80;
            mul.rn.bf16x2 $0, pair, factors;
            }""",
            "=r,h",
            [weights],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return halves


@triton.jit
def add_products(total, weights, values):
    """total [BLOCK_N, BLOCK_T] + weights [BLOCK_N, BLOCK_K] times values [BLOCK_T, BLOCK_K]."""
    if weights.dtype == values.dtype:
        total = tl.dot(weights, tl.trans(values), total)
    else:
        total = tl.dot(widened(weights, values.dtype), tl.trans(values), total)
        # Converted weights go into the product from registers, and the assembler (ptxas 12.8, of Triton 3.6) gives those to
        # others while the product still reads them. Used right here, the sum is waited for; other programs fill the gap.
        if not INTERPRET:
            total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def sum_run(
    w_tiles, w_first, w_block, x_tiles, x_first, x_block, split, length, num_columns,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_T]: the products over one split's columns."""
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in tl.range(split * length, tl.minimum((split + 1) * length, num_columns), BLOCK_K):
        weights = load_block(w_tiles, w_first, w_block, start, num_columns, BLOCK_K, EVEN_K)
        values = load_block(x_tiles, x_first, x_block, start, num_columns, BLOCK_K, EVEN_K)
        total = add_products(total, weights, values)
    return total


@triton.jit
def sum_runs(
    w_tiles, gate_first, gate_block, up_first, up_block, x_tiles, x_first, x_block, split, length, num_columns,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`sum_run` of gates and of ups over the same values."""
    gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in tl.range(split * length, tl.minimum((split + 1) * length, num_columns), BLOCK_K):
        gate_weights = load_block(w_tiles, gate_first, gate_block, start, num_columns, BLOCK_K, EVEN_K)
        up_weights = load_block(w_tiles, up_first, up_block, start, num_columns, BLOCK_K, EVEN_K)
        values = load_block(x_tiles, x_first, x_block, start, num_columns, BLOCK_K, EVEN_K)
        gate = add_products(gate, gate_weights, values)
        up = add_products(up, up_weights, values)
    return gate, up


@triton.jit(do_not_specialize=["num_tokens"])  # or 1 and multiples of 16 would be compiled apart
def tiles_kernel(
    x,  # [num_tokens, num_columns]
    w,  # [num_rows, num_columns]
    x_tiles,  # descriptors of both for the copy engine, or None
    w_tiles,
    scale,  # [num_rows] if HAS_SCALE
    out,  # [1 if INLINE else NUM_SPLITS, num_tokens, num_rows] float32
    num_tokens,
    num_rows,
    num_columns,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    INLINE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    block_n, block_t = place(num_rows, num_tokens, BLOCK_N, BLOCK_T, GROUP)
    first_row, first_token = block_n * BLOCK_N, block_t * BLOCK_T
    rows = first_row + tl.arange(0, BLOCK_N)
    tokens = first_token + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_K)[None, :]
    taken = tl.minimum(rows, num_rows - 1)
    w_rows = w + taken.to(tl.int64) * num_columns
    w_block = w_rows[:, None] + columns
    x_block = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * num_columns + columns
    length = tl.cdiv(tl.cdiv(num_columns, BLOCK_K), NUM_SPLITS) * BLOCK_K
    factor = tl.full((BLOCK_N, 1), 1.0, tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale + taken)[:, None]
    split = tl.program_id(1)  # 0 if INLINE
    if PDL:
        fetch(w_rows, split * length, num_columns, w.dtype.element_ty.primitive_bitwidth // 8, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    total = sum_run(
        w_tiles, first_row, w_block, x_tiles, first_token, x_block, split, length, num_columns,
        BLOCK_N, BLOCK_K, BLOCK_T, EVEN_K,
    ) * factor  # fmt: skip
    if INLINE:
        for later in tl.range(1, NUM_SPLITS):
            part = sum_run(
                w_tiles, first_row, w_block, x_tiles, first_token, x_block, later, length, num_columns,
                BLOCK_N, BLOCK_K, BLOCK_T, EVEN_K,
            )  # fmt: skip
            total += part * factor
    if PDL:  # not sooner, or programs that only wait would take room from those that still read
        tl.extra.cuda.gdc_launch_dependents()
    out += split.to(tl.int64) * num_tokens * num_rows
    places = out + tokens.to(tl.int64)[None, :] * num_rows + rows[:, None]
    tl.store(places, total, mask=(rows < num_rows)[:, None] & (tokens < num_tokens)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])  # or 1 and multiples of 16 would be compiled apart
def tiles_glu_kernel(
    x,  # [num_tokens, num_columns]
    w,  # [2 * width, num_columns]: gate, then up
    x_tiles,  # descriptors of both for the copy engine, or None
    w_tiles,
    scale,  # [2 * width] if HAS_SCALE
    out,  # [num_tokens, width]
    num_tokens,
    width,
    num_columns,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program multiplies BLOCK_N gates and their ups."""
    block_n, block_t = place(width, num_tokens, BLOCK_N, BLOCK_T, GROUP)
    first_row, first_token = block_n * BLOCK_N, block_t * BLOCK_T
    rows = first_row + tl.arange(0, BLOCK_N)
    tokens = first_token + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_K)[None, :]
    taken = tl.minimum(rows, width - 1)
    gate_rows = w + taken.to(tl.int64) * num_columns
    up_rows = gate_rows + width.to(tl.int64) * num_columns
    gate_block, up_block = gate_rows[:, None] + columns, up_rows[:, None] + columns
    x_block = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * num_columns + columns
    length = tl.cdiv(tl.cdiv(num_columns, BLOCK_K), NUM_SPLITS) * BLOCK_K
    gate_factor = tl.full((BLOCK_N, 1), 1.0, tl.float32)
    up_factor = gate_factor
    if HAS_SCALE:
        gate_factor, up_factor = tl.load(scale + taken)[:, None], tl.load(scale + width + taken)[:, None]
    if PDL:
        fetch(gate_rows, 0, num_columns, w.dtype.element_ty.primitive_bitwidth // 8, BLOCK_K)
        fetch(up_rows, 0, num_columns, w.dtype.element_ty.primitive_bitwidth // 8, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    gate, up = sum_runs(
        w_tiles, first_row, gate_block, width + first_row, up_block, x_tiles, first_token, x_block, 0, length, num_columns,
        BLOCK_N, BLOCK_K, BLOCK_T, EVEN_K,
    )  # fmt: skip
    gate, up = gate * gate_factor, up * up_factor
    for split in tl.range(1, NUM_SPLITS):
        gate_part, up_part = sum_runs(
            w_tiles, first_row, gate_block, width + first_row, up_block, x_tiles, first_token, x_block, split, length,
            num_columns, BLOCK_N, BLOCK_K, BLOCK_T, EVEN_K,
        )  # fmt: skip
        gate += gate_part * gate_factor
        up += up_part * up_factor
    if PDL:  # not sooner, or programs that only wait would take room from those that still read
        tl.extra.cuda.gdc_launch_dependents()
    product = activate(gate, up, ACTIVATION).to(out.dtype.element_ty)
    places = out + tokens.to(tl.int64)[None, :] * width + rows[:, None]
    tl.store(places, product, mask=(rows < width)[:, None] & (tokens < num_tokens)[None, :])
