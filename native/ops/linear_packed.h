// Integer kernels: one strip of sixteen packed rows (pack.h) times 1 to 8 columns of quantized activations.
//
// Per block of 32 columns of K the products are summed as exact integers, the zero point of a format without offsets being
// taken off them; a result is one chain of float32 operations over the blocks, in ascending order. One body for every number
// of columns: they share the unpacked weights and nothing else, so a result's bits depend on its own row of the strip and
// its own column alone.
#pragma once

#include "../pack.h"
#include "simd.h"

#include <type_traits>

namespace jilju::JILJU_ISA {

// Quantized rows, in groups of up to kColumns that a kernel takes at once; `n` is the number in this group. Per block:
//   int8 [n][32] quants | float32 [n] scale | float32 [n] scale * sum of the quants | int16 [n][2] sums of the first and last 16
//   | int32 [n] -8 * sum: what a zero point of 8 takes off a row's products
inline constexpr int64_t kColumns = 8;
inline constexpr int64_t kColumnBytes = kQuantizedBytes;
template <class Byte>
struct ColumnBlock {
    Byte* bytes;
    int64_t n;
    auto quants() const { return bytes; }
    auto scales() const { return reinterpret_cast<Like<float>*>(bytes + 32 * n); }
    auto scaled_sums() const { return reinterpret_cast<Like<float>*>(bytes + 36 * n); }
    auto sums() const { return reinterpret_cast<Like<int16_t>*>(bytes + 40 * n); }
    auto zero_points() const { return reinterpret_cast<Like<int32_t>*>(bytes + 44 * n); }

private:
    template <class T>
    using Like = std::conditional_t<std::is_const_v<Byte>, const T, T>;
};

// `p` lies in the first half of a strip's block; the second half is `distance` bytes behind it.
JILJU_INLINE void unpack_nibbles(const uint8_t* p, int64_t distance, StripB32 (&w)[8]) {
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
        const StripB32 both = load_strip_b32(p + 32 * l, distance);
        w[l] = field_b32(both, 0, 15, 0);
        w[4 + l] = field_b32(both, 4, 15, 0);
    }
}
JILJU_INLINE void unpack_five_bits(const uint8_t* p, int64_t distance, StripB32 (&w)[8]) {
    unpack_nibbles(p, distance, w);
    const StripB32 plane = load_strip_b32(p + 128, distance);
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) w[l] = or_field_b32(w[l], plane, l, 1, 4);
}
JILJU_INLINE void unpack_six_bits(const uint8_t* p, int64_t distance, StripB32 (&w)[8]) {
    unpack_nibbles(p, distance, w);
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) w[l] = or_field_b32(w[l], load_strip_b32(p + 128 + l / 4 * 32, distance), 2 * (l % 4), 3, 4);
}

// A block of a strip, or the half of it at `p`, after the head at `head`, times the block `x` of kN columns, added to their results.
template <Family kFamily, int kN>
JILJU_INLINE void add_block(const uint8_t* p, [[maybe_unused]] const uint8_t* head, ColumnBlock<const int8_t> x, StripF32 (&results)[kN]) {
    constexpr FamilyLayout kLayout = family_layout(kFamily);
    constexpr int64_t kDistance = kLayout.block_bytes;
    constexpr bool kFiveBits = kFamily == Family::kW5 || kFamily == Family::kW5Offset || kFamily == Family::kW5K;
    constexpr bool kOffsets = kFamily == Family::kW4Offset || kFamily == Family::kW5Offset || kLayout.head_bytes == 64;
    const uint8_t* quants = p + kLayout.scale_bytes;
    StripF32 d;
    StripI32 dots[kN];
    if constexpr (kFamily == Family::kW8) {
        const SignedBytes w(quants, kDistance);
        signed_dots<kN>(dots, w, x.quants(), x.zero_points());
        d = load_strip_f16(p, kDistance);
    } else if constexpr (kFamily == Family::kW6) {  // two integer scales: the block's sum is an integer still
        const StripI32 s[2] = {load_strip_i8(p, kDistance), load_strip_i8(p + 8, kDistance)};
        const Scale scales[2] = {scale_of(s[0]), scale_of(s[1])};
        const Pairs offset = pairs(negative(times_power(s[0], 5)), negative(times_power(s[1], 5)));
        StripB32 w[8];
        unpack_six_bits(quants, kDistance, w);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) dots[c] = add_pairs(set1_strip(0), offset, x.sums() + 2 * c);
        add_scaled_dots<4, 2, kN>(dots, w, x.quants(), scales[0]);
        add_scaled_dots<4, 2, kN>(dots, w + 4, x.quants() + 16, scales[1]);
        d = load_strip_f32(head, kLayout.head_bytes);
    } else {
        StripB32 w[8];
        if constexpr (kFiveBits) {
            unpack_five_bits(quants, kDistance, w);
        } else {
            unpack_nibbles(quants, kDistance, w);
        }
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) dots[c] = kOffsets ? set1_strip(0) : times_power(set1_strip(x.zero_points()[c]), kFiveBits ? 1 : 0);
        add_dots<8, kFiveBits ? 4 : 8, kN>(dots, w, x.quants());
        d = kLayout.head_bytes ? mul(load_strip_f32(head, kLayout.head_bytes), to_f32(load_strip_u8(p, kDistance))) : load_strip_f16(p, kDistance);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) results[c] = fma(mul(d, x.scales()[c]), to_f32(dots[c]), results[c]);
    if constexpr (kOffsets) {
        const StripF32 m = kLayout.head_bytes ? mul(load_strip_f32(head + 32, kLayout.head_bytes), to_f32(load_strip_u8(p + 8, kDistance))) : load_strip_f16(p + 16, kDistance);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) results[c] = fma(m, x.scaled_sums()[c], results[c]);
    }
}

// Memory that is fetched while a strip is multiplied, from the next one: `step` bytes a block. Where the strip is multiplied
// several times, every time fetches its share, so that memory never rests. Up to four columns take less time than memory does: there
// the processor's own fetching is faster.
struct Ahead {
    const uint8_t* at;
    int64_t step;
};

// out [kN][16] = the strip's outputs of each column, of its halves [kFirst, kFirst + kCount) only
template <Family kFamily, int kN, int kFirst, int kCount>
JILJU_INLINE void multiply_halves(const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out, Ahead ahead) {
    constexpr FamilyLayout kLayout = family_layout(kFamily);
    constexpr int kPasses = kCount / kHalvesTogether;  // over a block
    StripF32 results[kPasses][kN];
#pragma GCC unroll 2
    for (int pass = 0; pass < kPasses; ++pass)
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) results[pass][c] = zero_strip();
    for (int64_t first = 0; first < num_blocks; first += kHeadBlocks) {
        const uint8_t* head = strip + kFirst * kLayout.head_bytes;
        strip += 2 * kLayout.head_bytes;
        const int64_t end = min_int(first + kHeadBlocks, num_blocks);
        for (int64_t b = first; b < end; ++b, strip += 2 * kLayout.block_bytes, columns += kN * kColumnBytes) {
            if constexpr (kN > 4) {
                for (int64_t line = 0; line < ahead.step; line += 64) prefetch(ahead.at + line);
                ahead.at += ahead.step;
            }
#pragma GCC unroll 2
            for (int pass = 0; pass < kPasses; ++pass)
                add_block<kFamily, kN>(strip + (kFirst + pass) * kLayout.block_bytes, head + pass * kLayout.head_bytes, {columns, kN}, results[pass]);
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c)
#pragma GCC unroll 2
        for (int pass = 0; pass < kPasses; ++pass) store(out + kStripRows * c + kHalfRows * (kFirst + pass), results[pass][c]);
}

// out [kN][16] = the strip's outputs of each column
template <Family kFamily, int kN>
void multiply_strip(const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out, Ahead ahead) {
    if constexpr (kHalvesTogether == 2 || kN <= 2) {
        multiply_halves<kFamily, kN, 0, 2>(strip, num_blocks, columns, out, ahead);
    } else {  // sums of both halves would not fit the registers
        const int64_t step = (ahead.step + 1) / 2;
        multiply_halves<kFamily, kN, 0, 1>(strip, num_blocks, columns, out, {ahead.at, step});
        multiply_halves<kFamily, kN, 1, 1>(strip, num_blocks, columns, out, {ahead.at + num_blocks * step, step});
    }
}

using MultiplyStrip = void (*)(const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out, Ahead ahead);

template <Family kFamily>
constexpr MultiplyStrip kMultiplyStrip[kColumns] = {
    multiply_strip<kFamily, 1>, multiply_strip<kFamily, 2>, multiply_strip<kFamily, 3>, multiply_strip<kFamily, 4>,
    multiply_strip<kFamily, 5>, multiply_strip<kFamily, 6>, multiply_strip<kFamily, 7>, multiply_strip<kFamily, 8>,
};
inline MultiplyStrip multiply_strip_of(Family family, int64_t num_columns) {
    switch (family) {
        case Family::kFloat: break;
        case Family::kW4: return kMultiplyStrip<Family::kW4>[num_columns - 1];
        case Family::kW4Offset: return kMultiplyStrip<Family::kW4Offset>[num_columns - 1];
        case Family::kW4K: return kMultiplyStrip<Family::kW4K>[num_columns - 1];
        case Family::kW5: return kMultiplyStrip<Family::kW5>[num_columns - 1];
        case Family::kW5Offset: return kMultiplyStrip<Family::kW5Offset>[num_columns - 1];
        case Family::kW5K: return kMultiplyStrip<Family::kW5K>[num_columns - 1];
        case Family::kW6: return kMultiplyStrip<Family::kW6>[num_columns - 1];
        case Family::kW8: return kMultiplyStrip<Family::kW8>[num_columns - 1];
    }
    return nullptr;
}

// One row of K floats into its place `column` of a group of `n`. A row with a NaN or an infinity gets scales that are NaN, so
// that this reaches every output.
JILJU_INLINE void quantize_row(const float* x, int64_t num_inputs, int64_t n, int64_t column, int8_t* columns) {
    constexpr float kLeast = 1e-30f;  // 127 over less may be infinite
    F32 zeros = zero();
    for (int64_t i = 0; i < num_inputs; i += 8) zeros = fma(load(x + i), zero(), zeros);
    const float bad = sum(zeros);  // 0, or NaN
    for (int64_t k = 0; k < num_inputs; k += kBlockColumns, columns += n * kColumnBytes) {
        F32 largest = zero();
#pragma GCC unroll 4
        for (int64_t i = 0; i < kBlockColumns; i += 8) {
            const F32 v = load(x + k + i);
            largest = max(largest, max(v, sub(zero(), v)));
        }
        const float most = max_lane(largest), scale = most > kLeast ? most / 127.0f : 0.0f;
        const ColumnBlock<int8_t> block{columns, n};
        int16_t* sums = block.sums() + 2 * column;
        quantize_32(x + k, set1(most > kLeast ? 127.0f / most : 0.0f), block.quants() + 32 * column, sums);
        block.scales()[column] = scale + bad;
        block.scaled_sums()[column] = scale * static_cast<float>(sums[0] + sums[1]) + bad;
        block.zero_points()[column] = -8 * (sums[0] + sums[1]);
    }
}

}  // namespace jilju::JILJU_ISA
