// Float kernels: rows of float32, float16 or bfloat16 weights as they lie in the file, times rows of float32.
//
// K lies in the lanes. Every output is eight chains, lane j over k = j, j + 8, j + 16, ... ascending, joined by one fixed
// tree: the same bits for few rows (weights widened in registers) and for many (weights widened to a strip and multiplied in
// tiles of 4 outputs x 3 rows), whatever the number of rows, the tiling or the threads.
#pragma once

#include "unpack.h"

namespace jilju::JILJU_ISA {

namespace float_linear {

constexpr int kStrip = 4;             // outputs widened together
constexpr int64_t kGroup = 32;        // outputs of a GEMM work unit: its strips share the rows' tile while that is in L2
constexpr int64_t kMaxBlockK = 1024;  // a longer K runs in blocks of kBlockK, the chains being kept in memory between them
constexpr int64_t kBlockK = 512;      // a strip of it is 8 KiB, a quarter of L1
constexpr int64_t kMaxTileRows = 144;
constexpr int64_t kTileBytes = 288 << 10;  // of activations: with the chains (1 KiB a row) they fit an L2 of 512 KiB
constexpr int64_t kMaxGemvRows = kUnpacksInRegisters ? 4 : 0;  // more rows than this are cheaper through a strip
constexpr int64_t kGemvBytes = 32 << 10;   // of weights in a GEMV work unit: some microseconds

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

// --- few rows: widen in registers ---------------------------------------------------------------------------------

// kOutputs * kRows chains at a time: at least four, to hide the FMA's latency, and at most eight, to fit the registers.
template <class F, int kOutputs, int kRows>
void gemv(const Weight& w, int64_t first, int64_t count, const float* x, int64_t x_stride, const Output& out) {
    const int64_t num_eights = w.num_inputs / 8;
    const int tail = static_cast<int>(w.num_inputs % 8);
    for (int64_t n = 0; n < count; n += kOutputs) {
        const int outputs = static_cast<int>(min_int(kOutputs, count - n));
        const uint8_t* weights[kOutputs];
        for (int r = 0; r < kOutputs; ++r) weights[r] = w.data + (first + n + min_int(r, outputs - 1)) * w.row_bytes;
        F32 acc[kStrip][kRows];
        for (auto& chains : acc)
            for (F32& chain : chains) chain = zero();
        const auto add_eight = [&](const uint8_t* p, int r, const float* from, int columns) {
            unpack_block<F>(p, [&](int, F32 v) {
#pragma GCC unroll 4
                for (int c = 0; c < kRows; ++c) acc[r][c] = fma(v, columns == 8 ? load(from + c * x_stride) : load_n(from + c * x_stride, columns), acc[r][c]);
            });
        };
        for (int64_t i = 0; i < num_eights; ++i) {
#pragma GCC unroll 4
            for (int r = 0; r < kOutputs; ++r) {
                prefetch(weights[r] + kOutputs * w.row_bytes + i * F::kBytes);
                add_eight(weights[r] + i * F::kBytes, r, x + 8 * i, 8);
            }
        }
        for (int r = 0; r < kOutputs && tail; ++r) add_eight(TailBlock<F>(weights[r], w.num_inputs).bytes, r, x + 8 * num_eights, tail);
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
        for (; k + 8 <= end; k += 8, to += 8 * kStrip) {
            prefetch(row + kStrip * w.row_bytes + k / 8 * F::kBytes);
            unpack_block<F>(row + k / 8 * F::kBytes, [&](int, F32 v) { store(to, v); });
        }
        if (k < end) unpack_block<F>(TailBlock<F>(row, w.num_inputs).bytes, [&](int, F32 v) { store(to, v); });
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

// How a weight's outputs are cut into work units for `num_rows` rows.
struct Units {
    int64_t rows, outputs;  // of a unit
};
inline Units units_of(const Weight& w, int64_t num_rows) {
    if (num_rows <= kMaxGemvRows) return {num_rows, max_int(1, kGemvBytes / (w.row_bytes * kStrip)) * kStrip};
    const int64_t block = w.num_inputs <= kMaxBlockK ? w.num_inputs : kBlockK;
    const int64_t fit = max_int(12, min_int(kMaxTileRows, kTileBytes / (4 * block)));
    return {ceil_div(ceil_div(num_rows, ceil_div(num_rows, fit)), 3) * 3, kGroup};
}
inline int64_t scratch_floats() { return kStrip * (kMaxBlockK + 8) + kGroup * kMaxTileRows * 8; }

// `count` outputs from `first` for `num_rows` rows of a step of `all_rows`.
inline void run(const Weight& w, int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t num_rows, int64_t all_rows, const Output& out,
                float* scratch) {
    const auto in_format = [&]<class F>() {
        if constexpr (kUnpacksInRegisters) {
            if (all_rows <= kMaxGemvRows) return gemv_rows<F>(w, first, count, x, x_stride, num_rows, out);
        }
        gemm<F>(w, first, count, x, x_stride, num_rows, out, scratch);
    };
    if (w.format == Format::kF32) return in_format.template operator()<FormatF32>();
    if (w.format == Format::kF16) return in_format.template operator()<FormatF16>();
    return in_format.template operator()<FormatBF16>();
}

}  // namespace float_linear
}  // namespace jilju::JILJU_ISA
