// simd for AVX-512 with VNNI, in vectors of 256 bits: 32 registers and products of bytes that sum to 32 bits at once.
#pragma once

#define JILJU_ISA avx512

#include "x86.h"

namespace jilju::avx512 {

inline constexpr const char* kName = "native-avx512";

using Scale = I32;
JILJU_INLINE Scale scale_of(I32 s) { return s; }

// acc[c] += scale * sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned. The rows take turns,
// so that the chain of one row's products does not hold up the others.
template <int kNumBytes, int, int kN>
JILJU_INLINE void add_scaled_dots(I32* acc, const B32* w, const int8_t* x, Scale scale) {
    constexpr int kTurns = kN % 4 == 0 ? 4 : kN % 3 == 0 ? 3 : kN % 2 == 0 ? 2 : 1;
#pragma GCC unroll 8
    for (int first = 0; first < kN; first += kTurns) {
        __m256i sums[kTurns];
#pragma GCC unroll 8
        for (int l = 0; l < kNumBytes; ++l) {
#pragma GCC unroll 4
            for (int c = 0; c < kTurns; ++c)
                sums[c] = _mm256_dpbusd_epi32(l ? sums[c] : _mm256_setzero_si256(), w[l].v, set1_dword(x + 32 * (first + c) + 4 * l));
        }
#pragma GCC unroll 4
        for (int c = 0; c < kTurns; ++c) acc[first + c].v = _mm256_add_epi32(acc[first + c].v, _mm256_mullo_epi32(sums[c], scale.v));
    }
}
// acc + low * x[0] + high * x[1]
JILJU_INLINE I32 add_pairs(I32 acc, Pairs m, const int16_t* x) { return {_mm256_dpwssd_epi32(acc.v, m.v, set1_dword(x))}; }

// Eight times 32 signed bytes, ready for signed_dot: moved up by 128, which the sums of x take back.
struct SignedBytes {
    __m256i raised[8];
    JILJU_INLINE explicit SignedBytes(const uint8_t* p) {
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) raised[l] = _mm256_xor_si256(load_b32(p + 32 * l).v, _mm256_set1_epi8(-128));
    }
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes; sums: two of each row, of 16 bytes.
template <int kN>
JILJU_INLINE void signed_dots(I32* dots, const SignedBytes& w, const int8_t* x, const int16_t* sums) {
    constexpr int kTurns = kN % 4 == 0 ? 4 : kN % 3 == 0 ? 3 : kN % 2 == 0 ? 2 : 1;
#pragma GCC unroll 8
    for (int first = 0; first < kN; first += kTurns) {
#pragma GCC unroll 4
        for (int c = first; c < first + kTurns; ++c) dots[c].v = _mm256_dpwssd_epi32(_mm256_setzero_si256(), _mm256_set1_epi16(-128), set1_dword(sums + 2 * c));
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) {
#pragma GCC unroll 4
            for (int c = first; c < first + kTurns; ++c) dots[c].v = _mm256_dpbusd_epi32(dots[c].v, w.raised[l], set1_dword(x + 32 * c + 4 * l));
        }
    }
}

}  // namespace jilju::avx512
