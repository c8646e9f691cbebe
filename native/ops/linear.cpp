// linear: out = x @ concat(parts).T (+ biases) (+ out)        x [rows, K], part i [N_i, K], out [rows, sum N_i]
//
// K lies in the lanes. Every output is eight chains, lane j over k = j, j + 8, j + 16, ... ascending, joined by one fixed
// tree: the same bits for one row (GEMV, weights unpacked in registers) and for many (GEMM, weights unpacked to a strip and
// multiplied in tiles of 4 outputs x 3 rows), whatever the number of rows, the tiling or the threads.
#include "unpack.h"

namespace jilju::JILJU_ISA {
namespace {

constexpr int kStrip = 4;            // outputs unpacked together
constexpr int64_t kGroup = 32;       // outputs of a GEMM work unit: its strips share the rows' tile while that is in L2
constexpr int64_t kMaxBlockK = 1024; // a longer K runs in blocks of kBlockK, the chains being kept in memory between them
constexpr int64_t kBlockK = 512;     // a multiple of every format's block; a strip of it is 8 KiB, a quarter of L1
constexpr int64_t kMaxTileRows = 144;
constexpr int64_t kTileBytes = 288 << 10;    // of activations: with the chains (1 KiB a row) they fit an L2 of 512 KiB
constexpr int64_t kMaxGemvRows = kUnpacksInRegisters ? 4 : 0;  // more rows than this are cheaper through a strip
constexpr int64_t kMaxGemvRowsInParts = 2;  // of formats in parts, whose unpacking needs more registers

constexpr int64_t kGemvBytes = 32 << 10;     // of weights in a GEMV work unit: some microseconds

// The results of 4 outputs for one row, joined with bias and residual, in this order.
JILJU_INLINE void finish(const float* sums, int count, const float* bias, bool add_to, float* out) {
    for (int r = 0; r < count; ++r) {
        float y = sums[r];
        if (bias) y += bias[r];
        if (add_to) y += out[r];
        out[r] = y;
    }
}

struct Output {
    float* data;  // of the first row of the tile and the part's first output
    int64_t stride;
    const float* bias;  // of the part, or null
    bool add_to;
};

// --- few rows: unpack in registers --------------------------------------------------------------------------------

// kOutputs * kRows chains at a time: at least four, to hide the FMA's latency, and at most eight, to leave registers to
// the unpacking. A weight is unpacked once for all rows.
template <class F, int kOutputs, int kRows>
void gemv(const Weight& w, int64_t first, int64_t count, const float* x, int64_t x_stride, const Output& out) {
    const int64_t num_blocks = w.num_inputs / F::kElements;
    const int tail = static_cast<int>(w.num_inputs % F::kElements);
    for (int64_t n = 0; n < count; n += kOutputs) {
        const int outputs = static_cast<int>(min_int(kOutputs, count - n));
        const uint8_t* weights[kOutputs];
        for (int r = 0; r < kOutputs; ++r) weights[r] = w.data + (first + n + min_int(r, outputs - 1)) * w.row_bytes;
        const uint8_t* next = weights[0] + kOutputs * w.row_bytes;
        F32 acc[kStrip][kRows];
        for (auto& chains : acc)
            for (F32& chain : chains) chain = zero();
        for (int64_t b = 0; b < num_blocks; ++b) {
            const float* xb = x + b * F::kElements;
#pragma GCC unroll 16
            for (int64_t line = 0; line < kOutputs * F::kBytes; line += 64) prefetch(next + b * kOutputs * F::kBytes + line);
            const auto sink_of = [&](int r) {
                return [&, r](int i, F32 v) {
#pragma GCC unroll 4
                    for (int c = 0; c < kRows; ++c) acc[r][c] = fma(v, load(xb + c * x_stride + 8 * i), acc[r][c]);
                };
            };
            if constexpr (F::kParts == 1) {
#pragma GCC unroll 4
                for (int r = 0; r < kOutputs; ++r) unpack_block<F>(weights[r] + b * F::kBytes, sink_of(r));
            } else {  // the same part of every output after one another, so that their chains take turns
                typename F::Shared shared[kOutputs];
                for (int r = 0; r < kOutputs; ++r) shared[r] = F::prepare(weights[r] + b * F::kBytes);
                for_parts<F>([&]<int j>() {
#pragma GCC unroll 4
                    for (int r = 0; r < kOutputs; ++r) F::template part<j>(weights[r] + b * F::kBytes, shared[r], sink_of(r));
                });
            }
        }
        if constexpr (F::kElements == 8) {
            for (int r = 0; r < kOutputs && tail; ++r) {
                unpack_block<F>(TailBlock<F>(weights[r], w.num_inputs).bytes, [&](int, F32 v) {
                    for (int c = 0; c < kRows; ++c) acc[r][c] = fma(v, load_n(x + c * x_stride + num_blocks * 8, tail), acc[r][c]);
                });
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < kRows; ++c) {
            float sums[kStrip];
            sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c], sums);
            finish(sums, outputs, out.bias ? out.bias + first + n : nullptr, out.add_to, out.data + c * out.stride + first + n);
        }
    }
}

template <class F>
void gemv_rows(const Weight& w, int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t num_rows, const Output& out) {
    switch (num_rows) {
        case 1: return gemv<F, 4, 1>(w, first, count, x, x_stride, out);
        case 2: return gemv<F, 4, 2>(w, first, count, x, x_stride, out);
        case 3: return gemv<F, 2, 3>(w, first, count, x, x_stride, out);
        case 4: return gemv<F, 2, 4>(w, first, count, x, x_stride, out);
    }
}

// --- many rows: unpack a strip, multiply in tiles -------------------------------------------------------------------

// strip [k / 8][4 outputs][8], k from `begin` to `end`; rows beyond `count` repeat the last.
template <class F>
void unpack_strip(const Weight& w, int64_t first, int64_t count, int64_t begin, int64_t end, float* strip) {
    for (int r = 0; r < kStrip; ++r) {
        const uint8_t* row = w.data + (first + min_int(r, count - 1)) * w.row_bytes;
        float* to = strip + 8 * r;
        int64_t k = begin;
        for (; k + F::kElements <= end; k += F::kElements) {
#pragma GCC unroll 4
            for (int line = 0; line < F::kBytes; line += 64) prefetch(row + kStrip * w.row_bytes + k / F::kElements * F::kBytes + line);
            unpack_block<F>(row + k / F::kElements * F::kBytes, [&](int i, F32 v) { store(to + 8 * kStrip * i, v); });
            to += kStrip * F::kElements;
        }
        if constexpr (F::kElements == 8) {
            if (k < end) unpack_block<F>(TailBlock<F>(row, w.num_inputs).bytes, [&](int, F32 v) { store(to, v); });
        }
    }
}

// chains[r][column] += strip times rows x[0..kRows), over num_eights whole eights and a tail.
template <int kRows>
JILJU_INLINE void multiply(const float* strip, const float* const* x, int64_t num_eights, int tail, F32 (&acc)[kRows][kStrip]) {
    for (int64_t i = 0; i < num_eights; ++i) {
        F32 xv[kRows];
#pragma GCC unroll 3
        for (int c = 0; c < kRows; ++c) xv[c] = load(x[c] + 8 * i);
#pragma GCC unroll 4
        for (int r = 0; r < kStrip; ++r) {
            const F32 w = load(strip + (i * kStrip + r) * 8);
#pragma GCC unroll 3
            for (int c = 0; c < kRows; ++c) acc[c][r] = fma(w, xv[c], acc[c][r]);
        }
    }
    if (tail) {
        for (int r = 0; r < kStrip; ++r) {
            const F32 w = load(strip + (num_eights * kStrip + r) * 8);
            for (int c = 0; c < kRows; ++c) acc[c][r] = fma(w, load_n(x[c] + 8 * num_eights, tail), acc[c][r]);
        }
    }
}

struct Block {  // of K
    int64_t begin, end;
    bool first, last;
};

template <int kRows>
void tile(const float* strip, const float* x, int64_t x_stride, Block k, float* chains, int64_t first, int count, int64_t row, const Output& out) {
    F32 acc[kRows][kStrip];
    const float* rows[kRows];
#pragma GCC unroll 3
    for (int c = 0; c < kRows; ++c) {
        rows[c] = x + c * x_stride + k.begin;
#pragma GCC unroll 4
        for (int r = 0; r < kStrip; ++r) acc[c][r] = k.first ? zero() : load(chains + (c * kStrip + r) * 8);
    }
    const int64_t length = k.end - k.begin;
    multiply<kRows>(strip, rows, length / 8, static_cast<int>(length % 8), acc);
#pragma GCC unroll 3
    for (int c = 0; c < kRows; ++c) {
        if (k.last) {
            float sums[kStrip];
            sum4(acc[c][0], acc[c][1], acc[c][2], acc[c][3], sums);
            finish(sums, count, out.bias ? out.bias + first : nullptr, out.add_to, out.data + (row + c) * out.stride + first);
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < kStrip; ++r) store(chains + (c * kStrip + r) * 8, acc[c][r]);
        }
    }
}

// `count` outputs from `first` for `num_rows` rows.
template <class F>
void gemm(const Weight& w, int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t num_rows, const Output& out, float* scratch) {
    float* strip = scratch;
    float* chains = scratch + kStrip * (kMaxBlockK + 8);
    const int64_t block = w.num_inputs <= kMaxBlockK ? w.num_inputs : kBlockK;
    for (int64_t k = 0; k < w.num_inputs; k += block) {
        const Block part{k, min_int(k + block, w.num_inputs), k == 0, k + block >= w.num_inputs};
        for (int64_t n = 0; n < count; n += kStrip) {
            const int outputs = static_cast<int>(min_int(kStrip, count - n));
            unpack_strip<F>(w, first + n, outputs, part.begin, part.end, strip);
            for (int64_t row = 0; row < num_rows;) {
                float* kept = chains + (n / kStrip * num_rows + row) * kStrip * 8;
                const float* from = x + row * x_stride;
                const int64_t left = num_rows - row;
                if (left >= 5 || left == 3) {  // 4 = 2 + 2: eight chains hide the FMA's latency, four do not
                    tile<3>(strip, from, x_stride, part, kept, first + n, outputs, row, out);
                    row += 3;
                } else if (left >= 2) {
                    tile<2>(strip, from, x_stride, part, kept, first + n, outputs, row, out);
                    row += 2;
                } else {
                    tile<1>(strip, from, x_stride, part, kept, first + n, outputs, row, out);
                    row += 1;
                }
            }
        }
    }
}

}  // namespace

int64_t linear_scratch_floats() { return kStrip * (kMaxBlockK + 8) + kGroup * kMaxTileRows * 8; }

void linear(const LinearOp& op, Step& step, Pool& pool) {
    const Program& program = *step.program;
    const int64_t num_rows = step.rows(op.x);
    const bool few = num_rows <= kMaxGemvRows;

    int64_t rows_per_tile = num_rows;
    if (!few) {
        const int64_t block = op.x.width <= kMaxBlockK ? op.x.width : kBlockK;
        const int64_t fit = max_int(12, min_int(kMaxTileRows, kTileBytes / (4 * block)));
        rows_per_tile = ceil_div(ceil_div(num_rows, ceil_div(num_rows, fit)), 3) * 3;
    }
    const int64_t num_tiles = ceil_div(num_rows, rows_per_tile);
    const auto group_of = [&](const Weight& w) { return few ? max_int(1, kGemvBytes / (w.row_bytes * kStrip)) * kStrip : kGroup; };
    int64_t num_groups = 0;
    for (const int part : op.parts) num_groups += ceil_div(program.weights[part].num_outputs, group_of(program.weights[part]));

    pool.for_tiles(num_groups * num_tiles, [&](int64_t unit, float* scratch) {
        const int64_t row = unit / num_groups * rows_per_tile;
        int64_t group = unit % num_groups, offset = 0;
        size_t part = 0;
        for (;; ++part) {
            const Weight& w = program.weights[op.parts[part]];
            const int64_t groups = ceil_div(w.num_outputs, group_of(w));
            if (group < groups) break;
            group -= groups;
            offset += w.num_outputs;
        }
        const Weight& w = program.weights[op.parts[part]];
        const int64_t size = group_of(w), first = group * size, count = min_int(size, w.num_outputs - first);
        const float* bias = op.biases.empty() ? nullptr : program.vectors[op.biases[part]].data();
        const Output out{step.at(op.out, row) + offset, step.stride(op.out), bias, op.add_to};
        const int64_t rows_here = min_int(rows_per_tile, num_rows - row);
        with_format(w.format, [&]<class F>() {
            if constexpr (kUnpacksInRegisters) {
                if (num_rows <= (F::kParts == 1 ? kMaxGemvRows : kMaxGemvRowsInParts))
                    return gemv_rows<F>(w, first, count, step.at(op.x, 0), step.stride(op.x), num_rows, out);
            }
            gemm<F>(w, first, count, step.at(op.x, row), step.stride(op.x), rows_here, out, scratch);
        });
    });
}

void unpack_row(const Weight& w, int64_t row, float* out) {
    const uint8_t* from = w.data + row * w.row_bytes;
    with_format(w.format, [&]<class F>() {
        const int64_t num_blocks = w.num_inputs / F::kElements;
        for (int64_t b = 0; b < num_blocks; ++b)
            unpack_block<F>(from + b * F::kBytes, [&](int i, F32 v) { store(out + b * F::kElements + 8 * i, v); });
        if constexpr (F::kElements == 8) {
            const int tail = static_cast<int>(w.num_inputs % 8);
            if (tail) unpack_block<F>(TailBlock<F>(from, w.num_inputs).bytes, [&](int, F32 v) { store_n(out + num_blocks * 8, v, tail); });
        }
    });
}

}  // namespace jilju::JILJU_ISA
