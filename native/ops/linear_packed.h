// Integer kernels: one strip of eight packed rows (pack.h) times 1 to 8 columns of quantized activations.
//
// Per block of 32 columns of K the products are summed as exact integers; a result is one chain of float32 operations over
// the blocks, in ascending order. One body for every number of columns: they share the unpacked weights and nothing else,
// so a result's bits depend on the strip and its own column alone.
#pragma once

#include "../pack.h"
#include "simd.h"

#include <type_traits>

namespace jilju::JILJU_ISA {

// Quantized rows, in groups of up to kColumns that a kernel takes at once; `n` is the number in this group. Per block:
//   int8 [n][32] quants | float32 [n] scale | float32 [n] scale * sum of the quants | int16 [n][2] sums of the first and last 16
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

private:
    template <class T>
    using Like = std::conditional_t<std::is_const_v<Byte>, const T, T>;
};

JILJU_INLINE void unpack_nibbles(const uint8_t* p, B32 (&w)[8]) {
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
        const B32 both = load_b32(p + 32 * l);
        w[l] = field_b32(both, 0, 15, 0);
        w[4 + l] = field_b32(both, 4, 15, 0);
    }
}
JILJU_INLINE void unpack_five_bits(const uint8_t* p, B32 (&w)[8]) {
    unpack_nibbles(p, w);
    const B32 plane = load_b32(p + 128);
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) w[l] = or_b32(w[l], field_b32(plane, l, 1, 4));
}
JILJU_INLINE void unpack_six_bits(const uint8_t* p, B32 (&w)[8]) {
    unpack_nibbles(p, w);
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) w[l] = or_b32(w[l], field_b32(load_b32(p + 128 + l / 4 * 32), 2 * (l % 4), 3, 4));
}

// One block of a strip at `p`, after the head at `head`, times the block `x` of kN columns, added to their results.
template <Family kFamily, int kN>
JILJU_INLINE void add_block(const uint8_t* p, [[maybe_unused]] const float* head, ColumnBlock<const int8_t> x, F32 (&results)[kN]) {
    constexpr FamilyLayout kLayout = family_layout(kFamily);
    constexpr bool kFiveBits = kFamily == Family::kW5 || kFamily == Family::kW5Offset || kFamily == Family::kW5K;
    const uint8_t* quants = p + kLayout.scale_bytes;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
    I32 dots[kN];
    if constexpr (kFamily == Family::kW8) {
        const SignedBytes w(quants);
        signed_dots<kN>(dots, w, x.quants(), x.sums());
        const F32 d = load_f16(halves);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) results[c] = fma(mul(d, set1(x.scales()[c])), to_f32(dots[c]), results[c]);
    } else if constexpr (kFamily == Family::kW6) {  // two integer scales: the block's sum is an integer still
        const I32 s[2] = {load_i32_from_i8(p), load_i32_from_i8(p + 8)};
        const Scale scales[2] = {scale_of(s[0]), scale_of(s[1])};
        const Pairs offset = pairs(negative(times_power(s[0], 5)), negative(times_power(s[1], 5)));
        B32 w[8];
        unpack_six_bits(quants, w);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) dots[c] = add_pairs(zero_i32(), offset, x.sums() + 2 * c);
        add_scaled_dots<4, 2, kN>(dots, w, x.quants(), scales[0]);
        add_scaled_dots<4, 2, kN>(dots, w + 4, x.quants() + 16, scales[1]);
        const F32 d = load(head);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) results[c] = fma(mul(d, set1(x.scales()[c])), to_f32(dots[c]), results[c]);
    } else {
        B32 w[8];
        if constexpr (kFiveBits) {
            unpack_five_bits(quants, w);
        } else {
            unpack_nibbles(quants, w);
        }
        F32 d, m;
        if constexpr (kLayout.head_bytes) {
            d = mul(load(head), to_f32(load_i32_from_u8(p)));
            m = mul(load(head + 8), to_f32(load_i32_from_u8(p + 8)));
        } else {
            d = load_f16(halves);
            m = kLayout.scale_bytes == 32 ? load_f16(halves + 8) : mul(d, set1(kFiveBits ? -16.0f : -8.0f));
        }
        dots_of<8, kFiveBits ? 4 : 8, kN>(dots, w, x.quants());
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) {
            results[c] = fma(mul(d, set1(x.scales()[c])), to_f32(dots[c]), results[c]);
            results[c] = fma(m, set1(x.scaled_sums()[c]), results[c]);
        }
    }
}

// out [kN][8] = the strip's eight outputs of each column
template <Family kFamily, int kN>
void multiply_strip(const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out) {
    constexpr FamilyLayout kLayout = family_layout(kFamily);
    F32 results[kN];
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) results[c] = zero();
    for (int64_t first = 0; first < num_blocks; first += kHeadBlocks) {
        const float* head = reinterpret_cast<const float*>(strip);
        strip += kLayout.head_bytes;
        const int64_t end = min_int(first + kHeadBlocks, num_blocks);
        for (int64_t b = first; b < end; ++b, strip += kLayout.block_bytes, columns += kN * kColumnBytes)
            add_block<kFamily, kN>(strip, head, {columns, kN}, results);
    }
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) store(out + 8 * c, results[c]);
}

using MultiplyStrip = void (*)(const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out);

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
    }
}

}  // namespace jilju::JILJU_ISA
