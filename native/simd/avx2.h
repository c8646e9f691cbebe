// simd for AVX2 + FMA + F16C: products of bytes by way of 16-bit sums, which must not saturate.
#pragma once

#define JILJU_ISA avx2

#include "x86.h"

namespace jilju::avx2 {

inline constexpr const char* kName = "native-avx2";
inline constexpr int kRegisters = 16;

struct Pairs { __m256i v; };  // 8 pairs of int16
JILJU_INLINE Pairs pairs(I32 low, I32 high) {  // of numbers that fit int16
    return {_mm256_or_si256(_mm256_and_si256(low.v, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(high.v, 16))};
}
JILJU_INLINE __m256i set1_dword(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}

struct Scale { __m256i v; };  // each int16 twice, for the two 16-bit sums of a row
JILJU_INLINE Scale scale_of(I32 s) { return {pairs(s, s).v}; }

// acc[c] += scale * sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned, and so small that
// kPerSum products of pairs fit int16.
template <int kNumBytes, int kPerSum, int kN>
JILJU_INLINE void add_scaled_dots(I32* acc, const B32* w, const int8_t* x, Scale scale) {
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c, x += 32) {
#pragma GCC unroll 8
        for (int first = 0; first < kNumBytes; first += kPerSum) {
            __m256i sum = _mm256_maddubs_epi16(w[first].v, set1_dword(x + 4 * first));
#pragma GCC unroll 8
            for (int l = first + 1; l < first + kPerSum; ++l) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[l].v, set1_dword(x + 4 * l)));
            acc[c].v = _mm256_add_epi32(acc[c].v, _mm256_madd_epi16(sum, scale.v));
        }
    }
}
// dots[c] += sum over w and four columns each of w * x[c]; the same bounds.
template <int kNumBytes, int kPerSum, int kN>
JILJU_INLINE void add_dots(I32* dots, const B32* w, const int8_t* x) {
    add_scaled_dots<kNumBytes, kPerSum, kN>(dots, w, x, Scale{_mm256_set1_epi16(1)});
}
// acc + low * x[0] + high * x[1]
JILJU_INLINE I32 add_pairs(I32 acc, Pairs m, const int16_t* x) { return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(m.v, set1_dword(x)))}; }

// Eight times 32 signed bytes, ready for signed_dot: the sign goes to x, as the other factor must be unsigned.
struct SignedBytes {
    __m256i magnitudes[8];
    const uint8_t* bytes;
    JILJU_INLINE SignedBytes(const uint8_t* p, int64_t) : bytes(p) {
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) magnitudes[l] = _mm256_abs_epi8(load_b32(p + 32 * l).v);
    }
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes.
template <int kN>
JILJU_INLINE void signed_dots(I32* dots, const SignedBytes& w, const int8_t* x, const int32_t*) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c, x += 32) {
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) {
            const __m256i signed_x = _mm256_sign_epi8(set1_dword(x + 4 * l), load_b32(w.bytes + 32 * l).v);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w.magnitudes[l], signed_x), ones));
        }
        dots[c].v = sum;
    }
}

}  // namespace jilju::avx2

#include "half_strip.h"
