// Integer kernels: one strip of eight packed rows (pack.h) times 1 to 8 columns of quantized activations.
//
// One body for every number of columns: the columns share the unpacked weights and nothing else. Inside a super-block all
// sums are exact integers; a result is then one chain of float32 operations over the super-blocks, in ascending order. So its
// bits depend on the strip and its own column alone.
#pragma once

#include "../pack.h"
#include "simd.h"

namespace jilju::JILJU_ISA {

// Quantized rows, in groups of up to kColumns that a kernel takes at once; `n` is the number in this group:
//   bytes    per block of 32 columns of K: [n][32] signed bytes, then [n][2] int16, the sums of the first and last 16
//   scales   per super-block: float32 [n]
inline constexpr int64_t kColumns = 8;
inline constexpr int64_t kColumnBytes = 32 + 4;
struct Columns {
    const int8_t* bytes;
    const float* scales;
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

// Per family: the layout, how many products of pairs fit an int16, and one block's part of the sums.
// acc [column] sums scale * quant * x, and the offsets' part too unless these have a scale of their own: then `offsets`.
template <Family kFamily>
struct IntegerKernel {
    static constexpr FamilyLayout kLayout = family_layout(kFamily);
    static constexpr bool kFiveBits = kFamily == Family::kW5 || kFamily == Family::kW5Offset || kFamily == Family::kW5K;
    static constexpr bool kOwnOffset = kFamily == Family::kW4K || kFamily == Family::kW5K;
    static constexpr int kPerSum = kFiveBits ? 4 : 8;

    template <int kN>
    JILJU_INLINE static void add_block(const uint8_t* p, const int8_t* x, I32 (&acc)[kN], [[maybe_unused]] I32 (&offsets)[kN]) {
        const int16_t* sums = reinterpret_cast<const int16_t*>(x + 32 * kN);
        I32 s, m;
        if constexpr (kOwnOffset) {
            s = load_i32_from_u8(p);
            m = load_i32_from_u8(p + 8);
        } else {
            s = load_i32_from_i16(p);
            m = kLayout.scale_bytes == 32 ? load_i32_from_i16(p + 16) : negative(times_power(s, kFiveBits ? 4 : 3));
        }
        const Scale scale = scale_of(s);
        const Pairs offset = pairs(m, m);
        B32 w[8];
        if constexpr (kFiveBits) {
            unpack_five_bits(p + kLayout.scale_bytes, w);
        } else {
            unpack_nibbles(p + kLayout.scale_bytes, w);
        }
        add_scaled_dots<8, kPerSum, kN>(acc, w, x, scale);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) {
            if constexpr (kOwnOffset) {
                offsets[c] = add_pairs(offsets[c], offset, sums + 2 * c);
            } else {
                acc[c] = add_pairs(acc[c], offset, sums + 2 * c);
            }
        }
    }
};
template <>
struct IntegerKernel<Family::kW6> {  // two scales a block
    static constexpr FamilyLayout kLayout = family_layout(Family::kW6);
    static constexpr bool kOwnOffset = false;

    template <int kN>
    JILJU_INLINE static void add_block(const uint8_t* p, const int8_t* x, I32 (&acc)[kN], I32 (&)[kN]) {
        const int16_t* sums = reinterpret_cast<const int16_t*>(x + 32 * kN);
        const I32 s[2] = {load_i32_from_i8(p), load_i32_from_i8(p + 8)};
        const Pairs offset = pairs(negative(times_power(s[0], 5)), negative(times_power(s[1], 5)));
        const Scale scales[2] = {scale_of(s[0]), scale_of(s[1])};
        B32 w[8];
        unpack_six_bits(p + kLayout.scale_bytes, w);
        add_scaled_dots<4, 2, kN>(acc, w, x, scales[0]);
        add_scaled_dots<4, 2, kN>(acc, w + 4, x + 16, scales[1]);
#pragma GCC unroll 8
        for (int c = 0; c < kN; ++c) acc[c] = add_pairs(acc[c], offset, sums + 2 * c);
    }
};

// out [kN][8] = the strip's eight outputs of each column
template <Family kFamily, int kN>
void multiply_strip(const uint8_t* strip, int64_t num_supers, int blocks_per_super, Columns x, float* out) {
    F32 results[kN];
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) results[c] = zero();
    for (int64_t super = 0; super < num_supers; ++super, x.scales += kN) {
        if constexpr (kFamily == Family::kW8) {  // float scales: a chain over the blocks
            F32 sums[kN];
#pragma GCC unroll 8
            for (int c = 0; c < kN; ++c) sums[c] = zero();
            for (int b = 0; b < blocks_per_super; ++b, strip += 16 + 256, x.bytes += kN * kColumnBytes) {
                const F32 d = load_f16(reinterpret_cast<const uint16_t*>(strip));
                const SignedBytes w(strip + 16);
                const int16_t* x_sums = reinterpret_cast<const int16_t*>(x.bytes + 32 * kN);
                I32 dots[kN];
                signed_dots<kN>(dots, w, x.bytes, x_sums);
#pragma GCC unroll 8
                for (int c = 0; c < kN; ++c) sums[c] = fma(d, to_f32(dots[c]), sums[c]);
            }
#pragma GCC unroll 8
            for (int c = 0; c < kN; ++c) results[c] = fma(sums[c], set1(x.scales[c]), results[c]);
        } else {
            using Kernel = IntegerKernel<kFamily>;
            const float* head = reinterpret_cast<const float*>(strip);
            strip += Kernel::kLayout.head_bytes;
            I32 acc[kN], offsets[kN];
#pragma GCC unroll 8
            for (int c = 0; c < kN; ++c) acc[c] = offsets[c] = zero_i32();
            for (int b = 0; b < blocks_per_super; ++b, strip += Kernel::kLayout.block_bytes, x.bytes += kN * kColumnBytes)
                Kernel::template add_block<kN>(strip, x.bytes, acc, offsets);
            const F32 d = load(head);
#pragma GCC unroll 8
            for (int c = 0; c < kN; ++c) {
                const F32 dx = set1(x.scales[c]);
                results[c] = fma(mul(d, dx), to_f32(acc[c]), results[c]);
                if constexpr (Kernel::kOwnOffset) results[c] = fma(mul(load(head + 8), dx), to_f32(offsets[c]), results[c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) store(out + 8 * c, results[c]);
}

using MultiplyStrip = void (*)(const uint8_t* strip, int64_t num_supers, int blocks_per_super, Columns x, float* out);

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

// One row of K floats into its place `column` of a group of `n`. A NaN or an infinity makes its super-block's scale NaN, so
// that it reaches every output.
JILJU_INLINE void quantize_row(const float* x, int64_t num_inputs, int64_t super_block, int64_t n, int64_t column, int8_t* bytes, float* scales) {
    constexpr float kLeast = 1e-30f;  // 127 over less may be infinite
    const int64_t blocks = super_block / kBlockColumns;
    for (int64_t super = 0; super * super_block < num_inputs; ++super) {
        const float* from = x + super * super_block;
        F32 largest = zero(), not_finite = zero();
        for (int64_t i = 0; i < super_block; i += 8) {
            const F32 v = load(from + i);
            largest = max(largest, max(v, sub(zero(), v)));
            not_finite = fma(v, zero(), not_finite);
        }
        const float most = max_lane(largest), bad = sum(not_finite);
        const bool finite = bad == 0.0f;
        scales[super * n + column] = finite ? most / 127.0f : bad;
        const F32 factor = set1(finite && most > kLeast ? 127.0f / most : 0.0f);
        for (int64_t b = 0; b < blocks; ++b) {
            int8_t* group = bytes + (super * blocks + b) * n * kColumnBytes;
            quantize_32(from + b * kBlockColumns, factor, group + 32 * column, reinterpret_cast<int16_t*>(group + 32 * n) + 2 * column);
        }
    }
}

}  // namespace jilju::JILJU_ISA
