// simd for AVX-512 with VNNI, in vectors of 256 bits: 32 registers and products of bytes that sum to 32 bits at once.
#pragma once

#define JILJU_ISA avx512

#include "x86.h"

namespace jilju::avx512 {

inline constexpr const char* kName = "native-avx512";

using Scale = I32;
JILJU_INLINE Scale scale_of(I32 s) { return s; }

// Rows that take turns, so that the chain of one row's products does not hold up the others.
template <int kN>
inline constexpr int kTurns = kN % 4 == 0 ? 4 : kN % 3 == 0 ? 3 : kN % 2 == 0 ? 2 : 1;

// dots[c] += sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned.
template <int kNumBytes, int kN>
JILJU_INLINE void add_dots(I32* dots, const B32* w, const int8_t* x) {
#pragma GCC unroll 8
    for (int first = 0; first < kN; first += kTurns<kN>) {
#pragma GCC unroll 8
        for (int l = 0; l < kNumBytes; ++l) {
#pragma GCC unroll 4
            for (int c = first; c < first + kTurns<kN>; ++c) dots[c].v = _mm256_dpbusd_epi32(dots[c].v, w[l].v, set1_dword(x + 32 * c + 4 * l));
        }
    }
}
// dots[c] = the same sum.
template <int kNumBytes, int, int kN>
JILJU_INLINE void dots_of(I32* dots, const B32* w, const int8_t* x) {
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) dots[c] = zero_i32();
    add_dots<kNumBytes, kN>(dots, w, x);
}
// acc[c] += scale * the same sum.
template <int kNumBytes, int, int kN>
JILJU_INLINE void add_scaled_dots(I32* acc, const B32* w, const int8_t* x, Scale scale) {
    I32 dots[kN];
    dots_of<kNumBytes, 0, kN>(dots, w, x);
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) acc[c].v = _mm256_add_epi32(acc[c].v, _mm256_mullo_epi32(dots[c].v, scale.v));
}
// acc + low * x[0] + high * x[1]
JILJU_INLINE I32 add_pairs(I32 acc, Pairs m, const int16_t* x) { return {_mm256_dpwssd_epi32(acc.v, m.v, set1_dword(x))}; }

// Eight times 32 signed bytes, ready for signed_dot: moved up by 128, which the sums of x take back.
struct SignedBytes {
    B32 raised[8];
    JILJU_INLINE explicit SignedBytes(const uint8_t* p) {
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) raised[l] = {_mm256_xor_si256(load_b32(p + 32 * l).v, _mm256_set1_epi8(-128))};
    }
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes; sums: two of each row, of 16 bytes.
template <int kN>
JILJU_INLINE void signed_dots(I32* dots, const SignedBytes& w, const int8_t* x, const int16_t* sums) {
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) dots[c].v = _mm256_dpwssd_epi32(_mm256_setzero_si256(), _mm256_set1_epi16(-128), set1_dword(sums + 2 * c));
    add_dots<8, kN>(dots, w.raised, x);
}

}  // namespace jilju::avx512
