// simd for AArch64 with dot products of bytes (ASIMDDP: Armv8.2 and later): 32 registers of 16 bytes. Its fma rounds once, so
// floats have the bits that x86.h gives them.
#pragma once

#include <arm_neon.h>

#include <utility>

#define JILJU_ISA neon

#include "vectors.h"

namespace jilju::neon {

inline constexpr const char* kName = "native-neon";
inline constexpr int kRegisters = 16;  // of two times 16 bytes
inline constexpr bool kUnpacksInRegisters = true;  // a block and its chains fit the registers

JILJU_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
JILJU_INLINE F32 round(F32 a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }

JILJU_INLINE F32 load_f16(const uint16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4)))};
}
JILJU_INLINE void store_f16(uint16_t* p, F32 a) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.low)));
    vst1_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(a.high)));
}

// dots + the sum over w and four columns each of w * x. w signed.
template <int kNumBytes>
JILJU_INLINE I32 add_products(I32 dots, const B32* w, const int8_t* x) {
    for (int first = 0; first < kNumBytes; first += 4) {
        const int8x16_t columns = vld1q_s8(x + 4 * first);
        [&]<int... l>(std::integer_sequence<int, l...>) {
            ((dots.low = vdotq_laneq_s32(dots.low, vreinterpretq_s8_u8(w[first + l].low), columns, l)), ...);
            ((dots.high = vdotq_laneq_s32(dots.high, vreinterpretq_s8_u8(w[first + l].high), columns, l)), ...);
        }(std::make_integer_sequence<int, 4>());
    }
    return dots;
}

// dots[c] += sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned, below 128.
template <int kNumBytes, int, int kN>
JILJU_INLINE void add_dots(I32* dots, const B32* w, const int8_t* x) {
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) dots[c] = add_products<kNumBytes>(dots[c], w, x + 32 * c);
}

// Eight times 32 signed bytes.
struct SignedBytes {
    B32 w[8];
    JILJU_INLINE SignedBytes(const uint8_t* p, int64_t) {
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) w[l] = load_b32(p + 32 * l);
    }
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes.
template <int kN>
JILJU_INLINE void signed_dots(I32* dots, const SignedBytes& w, const int8_t* x, const int32_t*) {
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) dots[c] = add_products<8>(set1_i32(0), w.w, x + 32 * c);
}

}  // namespace jilju::neon

#include "half_strip.h"
