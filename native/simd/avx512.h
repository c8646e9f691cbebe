// simd for AVX-512 with VNNI: 32 registers, and products of bytes that sum to 32 bits at once. Packed weights are computed in
// vectors of 512 bits, a whole strip at a time, all else in vectors of 256 bits.
#pragma once

#define JILJU_ISA avx512

#include "x86.h"

namespace jilju::avx512 {

inline constexpr const char* kName = "native-avx512";
inline constexpr int kRegisters = 32;

inline constexpr int kHalvesTogether = 2;
struct StripF32 { __m512 v; };   // 8 lanes of the first half, 8 of the second
struct StripI32 { __m512i v; };
struct StripB32 { __m512i v; };   // 4 columns of each row
struct Pairs { __m512i v; };      // 16 pairs of int16

JILJU_INLINE __m512i load_halves(const uint8_t* p, int64_t distance) { return _mm512_inserti64x4(_mm512_castsi256_si512(load_b32(p).v), load_b32(p + distance).v, 1); }
JILJU_INLINE __m256i load_quarters(const uint8_t* p, int64_t distance) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + distance)), 1);
}
JILJU_INLINE __m128i load_eighths(const uint8_t* p, int64_t distance) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + distance)));
}
JILJU_INLINE StripF32 load_strip_f32(const uint8_t* p, int64_t distance) { return {_mm512_castsi512_ps(load_halves(p, distance))}; }
JILJU_INLINE StripF32 load_strip_f16(const uint8_t* p, int64_t distance) { return {_mm512_cvtph_ps(load_quarters(p, distance))}; }
JILJU_INLINE StripI32 load_strip_i8(const uint8_t* p, int64_t distance) { return {_mm512_cvtepi8_epi32(load_eighths(p, distance))}; }
JILJU_INLINE StripI32 load_strip_u8(const uint8_t* p, int64_t distance) { return {_mm512_cvtepu8_epi32(load_eighths(p, distance))}; }
JILJU_INLINE StripB32 load_strip_b32(const uint8_t* p, int64_t distance) { return {load_halves(p, distance)}; }
JILJU_INLINE StripF32 zero_strip() { return {_mm512_setzero_ps()}; }
JILJU_INLINE StripI32 set1_strip(int32_t x) { return {_mm512_set1_epi32(x)}; }
JILJU_INLINE void store(float* p, StripF32 a) { _mm512_storeu_ps(p, a.v); }
JILJU_INLINE StripF32 mul(StripF32 a, StripF32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
JILJU_INLINE StripF32 mul(StripF32 a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
JILJU_INLINE StripF32 fma(StripF32 a, StripF32 b, StripF32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
JILJU_INLINE StripF32 fma(StripF32 a, float b, StripF32 c) { return {_mm512_fmadd_ps(a.v, _mm512_set1_ps(b), c.v)}; }
JILJU_INLINE StripF32 to_f32(StripI32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
JILJU_INLINE StripI32 negative(StripI32 a) { return {_mm512_sub_epi32(_mm512_setzero_si512(), a.v)}; }
JILJU_INLINE StripI32 times_power(StripI32 a, int power) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(power))}; }
JILJU_INLINE Pairs pairs(StripI32 low, StripI32 high) {  // of numbers that fit int16
    return {_mm512_or_si512(_mm512_and_si512(low.v, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high.v, 16))};
}

// Some bits of each byte, moved to bit `to`: (byte >> shift & mask) << to.
JILJU_INLINE __m512i moved(__m512i a, int shift, int to) {  // of 16-bit lanes: what crosses from the next byte is masked away
    return shift > to ? _mm512_srli_epi16(a, static_cast<unsigned>(shift - to)) : shift < to ? _mm512_slli_epi16(a, static_cast<unsigned>(to - shift)) : a;
}
JILJU_INLINE StripB32 field_b32(StripB32 a, int shift, int mask, int to) {
    return {_mm512_and_si512(moved(a.v, shift, to), _mm512_set1_epi8(static_cast<char>(mask << to)))};
}
JILJU_INLINE StripB32 or_field_b32(StripB32 rest, StripB32 a, int shift, int mask, int to) {
    constexpr int kOrOfAnd = 0xea;  // (first & second) | third
    return {_mm512_ternarylogic_epi32(moved(a.v, shift, to), _mm512_set1_epi8(static_cast<char>(mask << to)), rest.v, kOrOfAnd)};
}

JILJU_INLINE __m512i set1_dword(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

using Scale = StripI32;
JILJU_INLINE Scale scale_of(StripI32 s) { return s; }

// Rows that take turns, so that the chain of one row's products does not hold up the others.
template <int kN>
inline constexpr int kTurns = kN % 4 == 0 ? 4 : kN % 3 == 0 ? 3 : kN % 2 == 0 ? 2 : 1;

// dots[c] += sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned.
template <int kNumBytes, int, int kN>
JILJU_INLINE void add_dots(StripI32* dots, const StripB32* w, const int8_t* x) {
#pragma GCC unroll 8
    for (int first = 0; first < kN; first += kTurns<kN>) {
#pragma GCC unroll 8
        for (int l = 0; l < kNumBytes; ++l) {
#pragma GCC unroll 4
            for (int c = first; c < first + kTurns<kN>; ++c) dots[c].v = _mm512_dpbusd_epi32(dots[c].v, w[l].v, set1_dword(x + 32 * c + 4 * l));
        }
    }
}
// acc[c] += scale * what add_dots adds
template <int kNumBytes, int, int kN>
JILJU_INLINE void add_scaled_dots(StripI32* acc, const StripB32* w, const int8_t* x, Scale scale) {
    StripI32 dots[kN];
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) dots[c] = set1_strip(0);
    add_dots<kNumBytes, 0, kN>(dots, w, x);
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) acc[c].v = _mm512_add_epi32(acc[c].v, _mm512_mullo_epi32(dots[c].v, scale.v));
}
// acc + low * x[0] + high * x[1]
JILJU_INLINE StripI32 add_pairs(StripI32 acc, Pairs m, const int16_t* x) { return {_mm512_dpwssd_epi32(acc.v, m.v, set1_dword(x))}; }

// Eight times four columns of signed bytes, ready for signed_dots: moved up by 128, which a zero point takes back.
struct SignedBytes {
    StripB32 raised[8];
    JILJU_INLINE SignedBytes(const uint8_t* p, int64_t distance) {
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) raised[l] = {_mm512_xor_si512(load_halves(p + 32 * l, distance), _mm512_set1_epi8(-128))};
    }
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes; zero_points: -8 times the sum of each row.
template <int kN>
JILJU_INLINE void signed_dots(StripI32* dots, const SignedBytes& w, const int8_t* x, const int32_t* zero_points) {
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) dots[c] = times_power(set1_strip(zero_points[c]), 4);
    add_dots<8, 0, kN>(dots, w.raised, x);
}

}  // namespace jilju::avx512
