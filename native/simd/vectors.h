// simd in the compilers' vector types: 8 floats or integers are two vectors of 16 bytes, which nearly every CPU has. What
// generic.h and neon.h share; they add what is declared first, and products
// of signed bytes.
#pragma once

#include <cstdint>
#include <cstring>

namespace jilju::JILJU_ISA {

using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Shorts = int16_t __attribute__((vector_size(16)));
using Bytes = uint8_t __attribute__((vector_size(16)));
using Longs = uint64_t __attribute__((vector_size(16)));
using FourHalves = uint16_t __attribute__((vector_size(8)));
using FourBytes = uint8_t __attribute__((vector_size(4)));
using FourSignedBytes = int8_t __attribute__((vector_size(4)));

struct F32 { Floats low, high; };
struct I32 { Ints low, high; };
struct B16 { Bytes v; };
struct B32 { Bytes low, high; };   // of rows 0..3 and 4..7, 4 columns each
struct Pairs { I32 first, second; };  // of numbers that fit int16

#define JILJU_INLINE [[gnu::always_inline]] inline

JILJU_INLINE F32 fma(F32 a, F32 b, F32 c);  // a * b + c
JILJU_INLINE F32 round(F32 a);              // to nearest, ties to even
JILJU_INLINE F32 load_f16(const uint16_t* p);
JILJU_INLINE void store_f16(uint16_t* p, F32 a);

template <int kNumBytes, int kPerSum, int kN>
JILJU_INLINE void add_dots(I32* dots, const B32* w, const int8_t* x);  // dots[c] += sum of w * x[c], for kN rows x of 32 bytes

template <class V>
JILJU_INLINE V load_vector(const void* p, int64_t offset = 0) {
    V out;
    std::memcpy(&out, static_cast<const char*>(p) + offset, sizeof out);
    return out;
}
JILJU_INLINE Floats repeat(float x) { return Floats{x, x, x, x}; }
JILJU_INLINE Ints first_lanes(int n) { return Ints{0, 1, 2, 3} < n; }

JILJU_INLINE F32 zero() { return {Floats{}, Floats{}}; }
JILJU_INLINE F32 set1(float x) { return {repeat(x), repeat(x)}; }
JILJU_INLINE F32 load(const float* p) { return {load_vector<Floats>(p), load_vector<Floats>(p + 4)}; }
JILJU_INLINE F32 load_n(const float* p, int n) {  // lanes >= n are 0
    float lanes[8] = {};
    for (int i = 0; i < 8 && i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
JILJU_INLINE void store(float* p, F32 a) { std::memcpy(p, &a, sizeof a); }
JILJU_INLINE void store_n(float* p, F32 a, int n) {
    float lanes[8];
    store(lanes, a);
    for (int i = 0; i < 8 && i < n; ++i) p[i] = lanes[i];
}
JILJU_INLINE F32 add(F32 a, F32 b) { return {a.low + b.low, a.high + b.high}; }
JILJU_INLINE F32 sub(F32 a, F32 b) { return {a.low - b.low, a.high - b.high}; }
JILJU_INLINE F32 mul(F32 a, F32 b) { return {a.low * b.low, a.high * b.high}; }
JILJU_INLINE F32 div(F32 a, F32 b) { return {a.low / b.low, a.high / b.high}; }
JILJU_INLINE F32 max(F32 a, F32 b) { return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high}; }  // b where a or b is NaN
JILJU_INLINE F32 min(F32 a, F32 b) { return {a.low < b.low ? a.low : b.low, a.high < b.high ? a.high : b.high}; }  // b where a or b is NaN
JILJU_INLINE F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return {a.low < b.low ? yes.low : no.low, a.high < b.high ? yes.high : no.high}; }
JILJU_INLINE bool any_less(F32 a, F32 b) {
    const Longs any = reinterpret_cast<Longs>((a.low < b.low) | (a.high < b.high));
    return (any[0] | any[1]) != 0;
}
JILJU_INLINE uint32_t less_bits(F32 a, F32 b) {  // a bit a lane
    const Ints bits = ((a.low < b.low) & Ints{1, 2, 4, 8}) | ((a.high < b.high) & Ints{16, 32, 64, 128});
    return static_cast<uint32_t>(bits[0] | bits[1] | bits[2] | bits[3]);
}
JILJU_INLINE F32 select_bits(F32 a, uint32_t bits, F32 rest) {  // lanes of a whose bit is set, else of rest
    const int b = static_cast<int>(bits);
    return {(Ints{1, 2, 4, 8} & b) != 0 ? a.low : rest.low, (Ints{16, 32, 64, 128} & b) != 0 ? a.high : rest.high};
}
JILJU_INLINE F32 first_n(F32 a, int n, F32 rest) {  // lanes < n of a, then of rest
    return {first_lanes(n) ? a.low : rest.low, first_lanes(n - 4) ? a.high : rest.high};
}
JILJU_INLINE F32 rotate_pairs(F32 a, const float* cosines, const float* sines) {  // lanes 2i, 2i + 1 by the i-th of 4 angles
    const auto rotate = [&](Floats v, int i) -> Floats {
        const Floats cosine{cosines[i], cosines[i], cosines[i + 1], cosines[i + 1]};
        const Floats sine{-sines[i], sines[i], -sines[i + 1], sines[i + 1]};
        return v * cosine + Floats{v[1], v[0], v[3], v[2]} * sine;
    };
    return {rotate(a.low, 0), rotate(a.high, 2)};
}
JILJU_INLINE F32 add_exponents(F32 a, F32 n) {  // a * 2^k, k being the low bits of n: n - 1.5 * 2^23 for n near that
    const auto scale = [](Floats v, Floats by) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(v) + (reinterpret_cast<Words>(by) << 23)); };
    return {scale(a.low, n.low), scale(a.high, n.high)};
}
JILJU_INLINE F32 pow2(F32 n) {  // 2^n for whole n in [-126, 127]
    const auto power = [](Floats v) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(__builtin_convertvector(v, Ints) + 127) << 23); };
    return {power(n.low), power(n.high)};
}

// The one tree: lanes 4 apart, then neighbours, then pairs.
JILJU_INLINE float sum(F32 a) {
    const Floats fours = a.low + a.high;
    return (fours[0] + fours[1]) + (fours[2] + fours[3]);
}
JILJU_INLINE void sum4(F32 a, F32 b, F32 c, F32 d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
}
JILJU_INLINE float max_lane(F32 a) {
    const Floats fours = a.low > a.high ? a.low : a.high;
    const float even = fours[0] > fours[2] ? fours[0] : fours[2], odd = fours[1] > fours[3] ? fours[1] : fours[3];
    return even > odd ? even : odd;
}
JILJU_INLINE F32 load_bf16(const uint16_t* p) {
    const auto widen = [](FourHalves h) { return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16); };
    return {widen(load_vector<FourHalves>(p)), widen(load_vector<FourHalves>(p, 8))};
}
JILJU_INLINE Ints to_ints(Floats whole) { return __builtin_convertvector(whole == whole ? whole : Floats{}, Ints); }  // NaN to 0
JILJU_INLINE void store_i8(int8_t* p, F32 a) {  // rounded to nearest, ties to even; lanes within [-127, 127] or NaN
    const F32 whole = round(a);
    const Ints low = to_ints(whole.low), high = to_ints(whole.high);
    for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(low[i]), p[4 + i] = static_cast<int8_t>(high[i]);
}
JILJU_INLINE F32 set1_half(const uint8_t* p) {
    uint16_t halves[8];
    for (uint16_t& half : halves) std::memcpy(&half, p, 2);
    return load_f16(halves);
}
JILJU_INLINE void set1_halves(const uint8_t* p, F32* a, F32* b) {  // two neighbours
    *a = set1_half(p);
    *b = set1_half(p + 2);
}

JILJU_INLINE I32 set1_i32(int32_t x) { return {Ints{x, x, x, x}, Ints{x, x, x, x}}; }
JILJU_INLINE I32 add(I32 a, I32 b) { return {a.low + b.low, a.high + b.high}; }
JILJU_INLINE I32 negative(I32 a) { return {-a.low, -a.high}; }
JILJU_INLINE I32 times_power(I32 a, int power) { return {a.low * (1 << power), a.high * (1 << power)}; }
template <class Four>
JILJU_INLINE I32 widen(const void* p) {
    return {__builtin_convertvector(load_vector<Four>(p), Ints), __builtin_convertvector(load_vector<Four>(p, sizeof(Four)), Ints)};
}
JILJU_INLINE I32 load_i32_from_i8(const void* p) { return widen<FourSignedBytes>(p); }
JILJU_INLINE I32 load_i32_from_u8(const void* p) { return widen<FourBytes>(p); }
JILJU_INLINE F32 to_f32(I32 a) { return {__builtin_convertvector(a.low, Floats), __builtin_convertvector(a.high, Floats)}; }
JILJU_INLINE Pairs pairs(I32 first, I32 second) { return {first, second}; }
// acc + first * x[0] + second * x[1]
JILJU_INLINE I32 add_pairs(I32 acc, const Pairs& m, const int16_t* x) {
    return {acc.low + m.first.low * x[0] + m.second.low * x[1], acc.high + m.first.high * x[0] + m.second.high * x[1]};
}
using Scale = I32;
JILJU_INLINE Scale scale_of(I32 s) { return s; }
// acc[c] += scale * what add_dots adds
template <int kNumBytes, int kPerSum, int kN>
JILJU_INLINE void add_scaled_dots(I32* acc, const B32* w, const int8_t* x, Scale scale) {
    I32 dots[kN];
    for (I32& sum : dots) sum = set1_i32(0);
    add_dots<kNumBytes, kPerSum, kN>(dots, w, x);
#pragma GCC unroll 8
    for (int c = 0; c < kN; ++c) acc[c] = {acc[c].low + dots[c].low * scale.low, acc[c].high + dots[c].high * scale.high};
}

// Some bits of each byte, moved to bit `to`: (byte >> shift & mask) << to.
JILJU_INLINE Bytes field(Bytes a, int shift, int mask, int to) {
    // one shift, then a mask; of 16-bit lanes, as not every CPU shifts bytes: what crossed from the next byte is masked away
    using Lanes = uint16_t __attribute__((vector_size(16)));
    const Lanes lanes = reinterpret_cast<Lanes>(a);
    const auto bits = static_cast<uint8_t>(mask << to);
    const Bytes kept = Bytes{} + bits;
    return reinterpret_cast<Bytes>(shift >= to ? lanes >> (shift - to) : lanes << (to - shift)) & kept;
}
JILJU_INLINE B16 load_b16(const uint8_t* p) { return {load_vector<Bytes>(p)}; }
JILJU_INLINE B16 and_b16(B16 a, int mask) { return {field(a.v, 0, mask, 0)}; }
JILJU_INLINE B16 or_b16(B16 a, B16 b) { return {a.v | b.v}; }
JILJU_INLINE B16 field_b16(B16 a, int shift, int mask, int to) { return {field(a.v, shift, mask, to)}; }
// 32 numbers of five bits: nibbles (low ones first, then high ones) and a word of fifth bits.
JILJU_INLINE void five_bits_b16(const uint8_t* high, const uint8_t* nibbles, B16* first, B16* second) {
    const B16 both = load_b16(nibbles);
    *first = field_b16(both, 0, 15, 0);
    *second = field_b16(both, 4, 15, 0);
    for (int i = 0; i < 16; ++i) {
        first->v[i] |= static_cast<uint8_t>((high[i / 8] >> (i % 8) & 1) << 4);
        second->v[i] |= static_cast<uint8_t>((high[2 + i / 8] >> (i % 8) & 1) << 4);
    }
}
JILJU_INLINE F32 load_u8(const uint8_t* p) { return to_f32(load_i32_from_u8(p)); }
JILJU_INLINE F32 load_i8(const uint8_t* p) { return to_f32(load_i32_from_i8(p)); }
JILJU_INLINE F32 low_u8(B16 a) { return load_u8(reinterpret_cast<const uint8_t*>(&a.v)); }       // bytes 0..7 as floats
JILJU_INLINE F32 high_u8(B16 a) { return load_u8(reinterpret_cast<const uint8_t*>(&a.v) + 8); }  // bytes 8..15 as floats
JILJU_INLINE B32 load_b32(const uint8_t* p) { return {load_vector<Bytes>(p), load_vector<Bytes>(p, 16)}; }
JILJU_INLINE B32 or_b32(B32 a, B32 b) { return {a.low | b.low, a.high | b.high}; }
JILJU_INLINE B32 field_b32(B32 a, int shift, int mask, int to) { return {field(a.low, shift, mask, to), field(a.high, shift, mask, to)}; }

// 32 floats times `factor`, rounded to nearest (ties to even), as signed bytes; their sums of 16. NaN is 0: the scale carries it.
JILJU_INLINE void quantize_32(const float* x, F32 factor, int8_t* out, int16_t* sums) {
    int32_t q[32];
    for (int i = 0; i < 32; i += 8) {
        const F32 y = round(mul(load(x + i), factor));
        const Ints low = to_ints(y.low), high = to_ints(y.high);
        std::memcpy(q + i, &low, sizeof low);
        std::memcpy(q + i + 4, &high, sizeof high);
    }
    int32_t sum[2] = {0, 0};
    for (int i = 0; i < 16; ++i) sum[0] += q[i], sum[1] += q[16 + i];
    for (int i = 0; i < 32; ++i) out[i] = static_cast<int8_t>(q[i]);
    for (int half = 0; half < 2; ++half) sums[half] = static_cast<int16_t>(sum[half]);
}

JILJU_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace jilju::JILJU_ISA
