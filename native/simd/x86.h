// simd for x86 with AVX2 + FMA + F16C: 8 floats or integers, 16 or 32 bytes. The operations that ops/ is written in, and
// nothing else; avx2.h and avx512.h include it and add products of bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace jilju::JILJU_ISA {

inline constexpr bool kUnpacksInRegisters = true;  // a block and its chains fit the registers

struct F32 { __m256 v; };   // 8 lanes
struct I32 { __m256i v; };  // 8 lanes
struct B16 { __m256i v; };  // 16 bytes, in both halves: then one shuffle widens any 8 of them
struct B32 { __m256i v; };  // 32 bytes: of 8 rows, 4 columns each

#define JILJU_INLINE [[gnu::always_inline]] inline

JILJU_INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

JILJU_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
JILJU_INLINE F32 set1(float x) { return {_mm256_set1_ps(x)}; }
JILJU_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
JILJU_INLINE F32 load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }  // lanes >= n are 0
JILJU_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
JILJU_INLINE void store_n(float* p, F32 a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
JILJU_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
JILJU_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
JILJU_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
JILJU_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
JILJU_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
JILJU_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }                // b where a or b is NaN
JILJU_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }                // b where a or b is NaN
JILJU_INLINE F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
JILJU_INLINE F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))}; }
JILJU_INLINE bool any_less(F32 a, F32 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) != 0; }
JILJU_INLINE uint32_t less_bits(F32 a, F32 b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))); }  // a bit a lane
JILJU_INLINE F32 select_bits(F32 a, uint32_t bits, F32 rest) {  // lanes of a whose bit is set, else of rest
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return {_mm256_blendv_ps(rest.v, a.v, _mm256_castsi256_ps(set))};
}
JILJU_INLINE F32 first_n(F32 a, int n, F32 rest) {  // lanes < n of a, then of rest
    return {_mm256_blendv_ps(rest.v, a.v, _mm256_castsi256_ps(first_lanes(n)))};
}
JILJU_INLINE F32 rotate_pairs(F32 a, const float* cosines, const float* sines) {  // lanes 2i, 2i + 1 by the i-th of 4 angles
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const __m256 cosine = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cosines)), twice);
    const __m256 sine = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(sines)), twice);
    return {_mm256_addsub_ps(_mm256_mul_ps(a.v, cosine), _mm256_mul_ps(_mm256_permute_ps(a.v, 0xb1), sine))};
}
JILJU_INLINE F32 add_exponents(F32 a, F32 n) {  // a * 2^k, k being the low bits of n: n - 1.5 * 2^23 for n near that
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(n.v), 23)))};
}
JILJU_INLINE F32 pow2(F32 n) {  // 2^n for whole n in [-126, 127]
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}

// The one tree: lanes 4 apart, then neighbours, then pairs.
JILJU_INLINE void sum4(F32 a, F32 b, F32 c, F32 d, float* out) {
    const __m256 ab = _mm256_hadd_ps(_mm256_add_ps(_mm256_permute2f128_ps(a.v, b.v, 0x20), _mm256_permute2f128_ps(a.v, b.v, 0x31)),
                                     _mm256_add_ps(_mm256_permute2f128_ps(c.v, d.v, 0x20), _mm256_permute2f128_ps(c.v, d.v, 0x31)));
    // ab: a01 a23 c01 c23 | b01 b23 d01 d23
    const __m256 sums = _mm256_hadd_ps(ab, ab);  // a c a c | b d b d
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
JILJU_INLINE float sum(F32 a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 y = _mm_hadd_ps(x, x);
    return _mm_cvtss_f32(_mm_hadd_ps(y, y));
}
JILJU_INLINE float max_lane(F32 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

JILJU_INLINE F32 load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
JILJU_INLINE void store_f16(uint16_t* p, F32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
JILJU_INLINE void store_i8(int8_t* p, F32 a) {  // rounded to nearest, ties to even; lanes within [-127, 127] or NaN
    const __m256i words = _mm256_cvtps_epi32(a.v);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
JILJU_INLINE F32 load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
JILJU_INLINE float half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}
JILJU_INLINE F32 set1_half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return {_mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(h)))};
}
JILJU_INLINE void set1_halves(const uint8_t* p, F32* a, F32* b) {  // two neighbours
    int32_t pair;
    std::memcpy(&pair, p, 4);
    const __m256 both = _mm256_cvtph_ps(_mm_set1_epi32(pair));  // a b a b a b a b
    *a = {_mm256_moveldup_ps(both)};
    *b = {_mm256_movehdup_ps(both)};
}

JILJU_INLINE B16 load_b16(const uint8_t* p) { return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
JILJU_INLINE B16 and_b16(B16 a, int mask) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(static_cast<char>(mask)))}; }
JILJU_INLINE B16 or_b16(B16 a, B16 b) { return {_mm256_or_si256(a.v, b.v)}; }
// Some bits of each byte, moved to bit `to`: (byte >> shift & mask) << to.
JILJU_INLINE B16 field_b16(B16 a, int shift, int mask, int to) {
    // one shift of 16-bit lanes, then a mask: what crossed from the next byte is masked away
    const __m256i moved = shift >= to ? _mm256_srli_epi16(a.v, shift - to) : _mm256_slli_epi16(a.v, to - shift);
    return {_mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask << to)))};
}
// 32 numbers of five bits: nibbles (low ones first, then high ones) and a word of fifth bits.
JILJU_INLINE void five_bits_b16(const uint8_t* high, const uint8_t* nibbles, B16* first, B16* second) {
    int32_t bits;
    std::memcpy(&bits, high, 4);
    const __m256i at = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i select = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), at), select);
    const __m256i fifth = _mm256_and_si256(_mm256_cmpeq_epi8(spread, select), _mm256_set1_epi8(16));
    const __m256i both = _mm256_srlv_epi32(load_b16(nibbles).v, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m256i q = _mm256_or_si256(_mm256_and_si256(both, _mm256_set1_epi8(15)), fifth);
    *first = {_mm256_permute4x64_epi64(q, 0x44)};
    *second = {_mm256_permute4x64_epi64(q, 0xee)};
}
JILJU_INLINE F32 low_u8(B16 a) {  // bytes 0..7 as floats
    const __m256i at = _mm256_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7, -1, -1, -1);
    return {_mm256_cvtepi32_ps(_mm256_shuffle_epi8(a.v, at))};
}
JILJU_INLINE F32 high_u8(B16 a) {  // bytes 8..15 as floats
    const __m256i at = _mm256_setr_epi8(8, -1, -1, -1, 9, -1, -1, -1, 10, -1, -1, -1, 11, -1, -1, -1, 12, -1, -1, -1, 13, -1, -1, -1, 14, -1, -1, -1, 15, -1, -1, -1);
    return {_mm256_cvtepi32_ps(_mm256_shuffle_epi8(a.v, at))};
}
JILJU_INLINE F32 load_u8(const uint8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))}; }
JILJU_INLINE F32 load_i8(const uint8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))}; }

JILJU_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

JILJU_INLINE I32 set1_i32(int32_t x) { return {_mm256_set1_epi32(x)}; }
JILJU_INLINE I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
JILJU_INLINE I32 negative(I32 a) { return {_mm256_sub_epi32(_mm256_setzero_si256(), a.v)}; }
JILJU_INLINE I32 times_power(I32 a, int power) { return {_mm256_slli_epi32(a.v, power)}; }
JILJU_INLINE I32 load_i32_from_i16(const void* p) { return {_mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
JILJU_INLINE I32 load_i32_from_i8(const void* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))}; }
JILJU_INLINE I32 load_i32_from_u8(const void* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))}; }
JILJU_INLINE F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }

JILJU_INLINE B32 load_b32(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
JILJU_INLINE B32 or_b32(B32 a, B32 b) { return {_mm256_or_si256(a.v, b.v)}; }
// Some bits of each byte, moved to bit `to`: (byte >> shift & mask) << to.
JILJU_INLINE B32 field_b32(B32 a, int shift, int mask, int to) { return {field_b16({a.v}, shift, mask, to).v}; }

// 32 floats times `factor`, rounded to nearest (ties to even), as signed bytes; their sums of 16.
JILJU_INLINE void quantize_32(const float* x, F32 factor, int8_t* out, int16_t* sums) {
    __m256i words[4];
    for (int i = 0; i < 4; ++i) words[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor.v));
    const __m256i low = _mm256_packs_epi32(words[0], words[1]), high = _mm256_packs_epi32(words[2], words[3]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
    const __m256i eights = _mm256_hadd_epi32(fours, fours), sixteens = _mm256_hadd_epi32(eights, eights);
    sums[0] = static_cast<int16_t>(_mm256_extract_epi32(sixteens, 0));
    sums[1] = static_cast<int16_t>(_mm256_extract_epi32(sixteens, 4));
}

}  // namespace jilju::JILJU_ISA
