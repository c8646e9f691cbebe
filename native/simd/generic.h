// simd in the compilers' vector types: the same operations on 8 floats and 16 bytes, for any CPU and as a check of the others.
// fma here rounds twice (a CPU without FMA would emulate it), so sums differ from AVX2's within rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define JILJU_ISA generic

namespace jilju::generic {

inline constexpr const char* kName = "native-generic";
inline constexpr bool kUnpacksInRegisters = false;  // a block and its chains do not fit the registers of every CPU

using Floats = float __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));
using HalfBytes = uint8_t __attribute__((vector_size(8)));
using Words = uint32_t __attribute__((vector_size(32)));
using HalfSignedBytes = int8_t __attribute__((vector_size(8)));

using Ints = int32_t __attribute__((vector_size(32)));

struct F32 { Floats v; };
struct I32 { Ints v; };
struct B16 { Bytes v; };
struct B32 { uint8_t v[32]; };  // of 8 rows, 4 columns each
struct Pairs { int32_t low[8], high[8]; };

#define JILJU_INLINE inline

template <class Body>
JILJU_INLINE F32 lanes(Body&& body) {
    F32 out;
    for (int i = 0; i < 8; ++i) out.v[i] = body(i);
    return out;
}
template <class Body>
JILJU_INLINE B16 bytes(Body&& body) {
    B16 out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<uint8_t>(body(i));
    return out;
}

JILJU_INLINE F32 zero() { return {Floats{}}; }
JILJU_INLINE F32 set1(float x) { return {Floats{x, x, x, x, x, x, x, x}}; }
JILJU_INLINE F32 load(const float* p) {
    F32 out;
    std::memcpy(&out.v, p, sizeof out.v);
    return out;
}
JILJU_INLINE F32 load_n(const float* p, int n) { return lanes([=](int i) { return i < n ? p[i] : 0.0f; }); }
JILJU_INLINE void store(float* p, F32 a) { std::memcpy(p, &a.v, sizeof a.v); }
JILJU_INLINE void store_n(float* p, F32 a, int n) { std::memcpy(p, &a.v, (n < 8 ? n : 8) * sizeof(float)); }
JILJU_INLINE F32 add(F32 a, F32 b) { return {a.v + b.v}; }
JILJU_INLINE F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
JILJU_INLINE F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
JILJU_INLINE F32 div(F32 a, F32 b) { return {a.v / b.v}; }
JILJU_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
JILJU_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
JILJU_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
JILJU_INLINE F32 round(F32 a) { return lanes([&](int i) { return std::nearbyint(a.v[i]); }); }
JILJU_INLINE F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return {a.v < b.v ? yes.v : no.v}; }
JILJU_INLINE bool any_less(F32 a, F32 b) {
    bool any = false;
    for (int i = 0; i < 8; ++i) any |= a.v[i] < b.v[i];
    return any;
}
JILJU_INLINE uint32_t less_bits(F32 a, F32 b) {
    uint32_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
    return bits;
}
JILJU_INLINE F32 select_bits(F32 a, uint32_t bits, F32 rest) { return lanes([&](int i) { return bits >> i & 1 ? a.v[i] : rest.v[i]; }); }
JILJU_INLINE F32 first_n(F32 a, int n, F32 rest) { return lanes([&](int i) { return i < n ? a.v[i] : rest.v[i]; }); }
JILJU_INLINE F32 rotate_pairs(F32 a, const float* cosines, const float* sines) {  // lanes 2i, 2i + 1 by the i-th of 4 angles
    return lanes([&](int i) {
        const float along = a.v[i] * cosines[i / 2], across = a.v[i ^ 1] * sines[i / 2];
        return i % 2 ? along + across : along - across;
    });
}
JILJU_INLINE F32 add_exponents(F32 a, F32 n) {  // a * 2^k, k being the low bits of n: n - 1.5 * 2^23 for n near that
    Words bits, exponents;
    std::memcpy(&bits, &a.v, sizeof bits);
    std::memcpy(&exponents, &n.v, sizeof exponents);
    bits += exponents << 23;
    std::memcpy(&a.v, &bits, sizeof bits);
    return a;
}
JILJU_INLINE F32 pow2(F32 n) {
    return lanes([&](int i) {
        if (!(n.v[i] >= -126.0f && n.v[i] <= 127.0f)) return n.v[i];  // NaN stays NaN
        const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    });
}

JILJU_INLINE float sum(F32 a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
JILJU_INLINE void sum4(F32 a, F32 b, F32 c, F32 d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
}
JILJU_INLINE float max_lane(F32 a) {
    float out = a.v[0];
    for (int i = 1; i < 8; ++i) out = out > a.v[i] ? out : a.v[i];
    return out;
}

[[gnu::noinline]] inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h >> 15) << 31, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact in float32
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
JILJU_INLINE uint16_t float_to_half(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {  // below 2^-14: a whole number of 2^-24; adding 0.5 makes the FPU round there
        float scaled;
        std::memcpy(&scaled, &magnitude, 4);
        scaled += 0.5f;
        std::memcpy(&bits, &scaled, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
JILJU_INLINE F32 load_f16(const uint16_t* p) {
    return lanes([=](int i) {
        uint16_t h;
        std::memcpy(&h, reinterpret_cast<const uint8_t*>(p) + 2 * i, 2);
        return half_to_float(h);
    });
}
JILJU_INLINE void store_f16(uint16_t* p, F32 a) {
    for (int i = 0; i < 8; ++i) p[i] = float_to_half(a.v[i]);
}
JILJU_INLINE void store_i8(int8_t* p, F32 a) {  // rounded to nearest, ties to even; lanes within [-127, 127] or NaN
    for (int i = 0; i < 8; ++i) p[i] = a.v[i] == a.v[i] ? static_cast<int8_t>(std::nearbyint(a.v[i])) : int8_t{0};
}
JILJU_INLINE F32 load_bf16(const uint16_t* p) {
    return lanes([=](int i) {
        uint16_t h;
        std::memcpy(&h, reinterpret_cast<const uint8_t*>(p) + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(h) << 16;
        float out;
        std::memcpy(&out, &bits, 4);
        return out;
    });
}
JILJU_INLINE float half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return half_to_float(h);
}
JILJU_INLINE F32 set1_half(const uint8_t* p) { return set1(half(p)); }
JILJU_INLINE void set1_halves(const uint8_t* p, F32* a, F32* b) {
    *a = set1_half(p);
    *b = set1_half(p + 2);
}

JILJU_INLINE B16 load_b16(const uint8_t* p) {
    B16 out;
    std::memcpy(&out.v, p, sizeof out.v);
    return out;
}
JILJU_INLINE B16 and_b16(B16 a, int mask) { return {a.v & static_cast<uint8_t>(mask)}; }
JILJU_INLINE B16 or_b16(B16 a, B16 b) { return {a.v | b.v}; }
JILJU_INLINE B16 field_b16(B16 a, int shift, int mask, int to) {
    return {((a.v >> static_cast<uint8_t>(shift)) & static_cast<uint8_t>(mask)) << static_cast<uint8_t>(to)};
}
[[gnu::noinline]] inline void five_bits_b16(const uint8_t* high, const uint8_t* nibbles, B16* first, B16* second) {
    *first = bytes([=](int i) { return (nibbles[i] & 15) | (high[i / 8] >> (i % 8) & 1) << 4; });
    *second = bytes([=](int i) { return nibbles[i] >> 4 | (high[2 + i / 8] >> (i % 8) & 1) << 4; });
}
JILJU_INLINE F32 load_u8(const uint8_t* p) {
    HalfBytes half;
    std::memcpy(&half, p, sizeof half);
    return {__builtin_convertvector(half, Floats)};
}
JILJU_INLINE F32 load_i8(const uint8_t* p) {
    HalfSignedBytes half;
    std::memcpy(&half, p, sizeof half);
    return {__builtin_convertvector(half, Floats)};
}
JILJU_INLINE F32 low_u8(B16 a) { return load_u8(reinterpret_cast<const uint8_t*>(&a.v)); }
JILJU_INLINE F32 high_u8(B16 a) { return load_u8(reinterpret_cast<const uint8_t*>(&a.v) + 8); }

JILJU_INLINE void prefetch(const void*) {}

template <class Body>
JILJU_INLINE I32 int_lanes(Body&& body) {
    I32 out;
    for (int i = 0; i < 8; ++i) out.v[i] = body(i);
    return out;
}
JILJU_INLINE I32 zero_i32() { return {Ints{}}; }
JILJU_INLINE I32 add(I32 a, I32 b) { return {a.v + b.v}; }
JILJU_INLINE I32 negative(I32 a) { return {-a.v}; }
JILJU_INLINE I32 times_power(I32 a, int power) { return {a.v * (1 << power)}; }
JILJU_INLINE I32 load_i32_from_i16(const void* p) {
    int16_t words[8];
    std::memcpy(words, p, sizeof words);
    return int_lanes([&](int i) { return words[i]; });
}
JILJU_INLINE I32 load_i32_from_i8(const void* p) { return int_lanes([=](int i) { return static_cast<const int8_t*>(p)[i]; }); }
JILJU_INLINE I32 load_i32_from_u8(const void* p) { return int_lanes([=](int i) { return static_cast<const uint8_t*>(p)[i]; }); }
JILJU_INLINE F32 to_f32(I32 a) { return {__builtin_convertvector(a.v, Floats)}; }
JILJU_INLINE Pairs pairs(I32 low, I32 high) {
    Pairs out;
    for (int i = 0; i < 8; ++i) out.low[i] = low.v[i], out.high[i] = high.v[i];
    return out;
}
JILJU_INLINE B32 load_b32(const uint8_t* p) {
    B32 out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
JILJU_INLINE B32 or_b32(B32 a, const B32& b) {
    for (int i = 0; i < 32; ++i) a.v[i] |= b.v[i];
    return a;
}
JILJU_INLINE B32 field_b32(B32 a, int shift, int mask, int to) {
    for (int i = 0; i < 32; ++i) a.v[i] = static_cast<uint8_t>((a.v[i] >> shift & mask) << to);
    return a;
}
JILJU_INLINE void quantize_32(const float* x, F32 factor, int8_t* out, int16_t* sums) {
    sums[0] = sums[1] = 0;
    for (int i = 0; i < 32; ++i) {
        const float y = std::nearbyint(x[i] * factor.v[0]);
        out[i] = y >= -127.0f && y <= 127.0f ? static_cast<int8_t>(y) : int8_t{0};  // NaN: the scale carries it on
        sums[i / 16] = static_cast<int16_t>(sums[i / 16] + out[i]);
    }
}

// The sums of w * x over four columns each, for eight rows.
template <class Weight>
JILJU_INLINE void add_products(const Weight* w, const int8_t* x, Ints& sum) {
    for (int row = 0; row < 8; ++row)
        sum[row] += w[4 * row] * x[0] + w[4 * row + 1] * x[1] + w[4 * row + 2] * x[2] + w[4 * row + 3] * x[3];
}

using Scale = I32;
JILJU_INLINE Scale scale_of(I32 s) { return s; }

// acc[c] += scale * sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned.
template <int kNumBytes, int, int kN>
JILJU_INLINE void add_scaled_dots(I32* acc, const B32* w, const int8_t* x, Scale scale) {
    for (int c = 0; c < kN; ++c, x += 32) {
        Ints sum{};
        for (int l = 0; l < kNumBytes; ++l) add_products(w[l].v, x + 4 * l, sum);
        acc[c].v += sum * scale.v;
    }
}
// dots[c] = the same sum without a scale.
template <int kNumBytes, int kPerSum, int kN>
JILJU_INLINE void dots_of(I32* dots, const B32* w, const int8_t* x) {
    for (int c = 0; c < kN; ++c) dots[c] = zero_i32();
    add_scaled_dots<kNumBytes, kPerSum, kN>(dots, w, x, Scale{int_lanes([](int) { return 1; })});
}
// acc + low * x[0] + high * x[1]
JILJU_INLINE I32 add_pairs(I32 acc, const Pairs& m, const int16_t* x) {
    return int_lanes([&](int i) { return acc.v[i] + m.low[i] * x[0] + m.high[i] * x[1]; });
}

// Eight times 32 signed bytes.
struct SignedBytes {
    const int8_t* bytes;
    JILJU_INLINE explicit SignedBytes(const uint8_t* p) : bytes(reinterpret_cast<const int8_t*>(p)) {}
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes.
template <int kN>
JILJU_INLINE void signed_dots(I32* dots, const SignedBytes& w, const int8_t* x, const int16_t*) {
    for (int c = 0; c < kN; ++c, x += 32) {
        dots[c] = zero_i32();
        for (int l = 0; l < 8; ++l) add_products(w.bytes + 32 * l, x + 4 * l, dots[c].v);
    }
}

}  // namespace jilju::generic
