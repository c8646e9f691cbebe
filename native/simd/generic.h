// simd for any CPU, and as a check of the others. fma rounds twice here (a CPU without FMA would emulate it), so sums differ
// from the others' within rounding.
#pragma once

#define JILJU_ISA generic

#include "vectors.h"

namespace jilju::generic {

inline constexpr const char* kName = "native-generic";
inline constexpr int kRegisters = 16;
inline constexpr bool kUnpacksInRegisters = false;  // a block and its chains do not fit the registers of every CPU

JILJU_INLINE F32 fma(F32 a, F32 b, F32 c) { return add(mul(a, b), c); }
JILJU_INLINE F32 round(F32 a) {  // a float32 has no place after the point from 2^23 on: added to that, others lose theirs
    const auto nearest = [](Floats v) -> Floats {
        const Words sign = reinterpret_cast<Words>(v) & 0x80000000u;
        const Floats large = reinterpret_cast<Floats>(reinterpret_cast<Words>(repeat(0x1p23f)) | sign);
        const Floats magnitude = reinterpret_cast<Floats>(reinterpret_cast<Words>(v) ^ sign);
        return magnitude < 0x1p23f ? (v + large) - large : v;
    };
    return {nearest(a.low), nearest(a.high)};
}

JILJU_INLINE F32 load_f16(const uint16_t* p) {
    const auto widen = [](FourHalves half) -> Floats {
        const Words bits = __builtin_convertvector(half, Words);
        const Floats magnitude = reinterpret_cast<Floats>((bits & 0x7fffu) << 13) * 0x1p112f;  // exact, of subnormals too
        const Words not_finite = reinterpret_cast<Words>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        return reinterpret_cast<Floats>(reinterpret_cast<Words>(magnitude) | not_finite | (bits & 0x8000u) << 16);
    };
    return {widen(load_vector<FourHalves>(p)), widen(load_vector<FourHalves>(p, 8))};
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
JILJU_INLINE void store_f16(uint16_t* p, F32 a) {
    float lanes[8];
    store(lanes, a);
    for (int i = 0; i < 8; ++i) p[i] = float_to_half(lanes[i]);
}

// 32 bytes, four columns of eight rows, as 16-bit numbers: those of even and of odd columns. Two lanes are one row's. The
// lanes are unsigned, so that a wrap is defined; numbers with a sign are as they would be.
using Lanes = uint16_t __attribute__((vector_size(16)));
struct S32 {
    Lanes even[2], odd[2];
};
JILJU_INLINE S32 widen_unsigned(B32 w) {
    const Lanes low = reinterpret_cast<Lanes>(w.low), high = reinterpret_cast<Lanes>(w.high);
    return {{low & 255, high & 255}, {low >> 8, high >> 8}};
}
JILJU_INLINE Lanes signed_even(Lanes v) { return reinterpret_cast<Lanes>(reinterpret_cast<Shorts>(v << 8) >> 8); }
JILJU_INLINE Lanes signed_odd(Lanes v) { return reinterpret_cast<Lanes>(reinterpret_cast<Shorts>(v) >> 8); }
JILJU_INLINE S32 widen_signed(B32 w) {
    const Lanes low = reinterpret_cast<Lanes>(w.low), high = reinterpret_cast<Lanes>(w.high);
    return {{signed_even(low), signed_even(high)}, {signed_odd(low), signed_odd(high)}};
}

// sums + the products with four columns of x; two lanes are one row's
JILJU_INLINE void add_products(Lanes (&sums)[2], const S32& w, const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    const Lanes columns = reinterpret_cast<Lanes>(Ints{word, word, word, word});
    const Lanes even = signed_even(columns), odd = signed_odd(columns);
    for (int half = 0; half < 2; ++half) sums[half] += w.even[half] * even + w.odd[half] * odd;
}
// Each row's two lanes, added in 32 bits.
JILJU_INLINE I32 add_lanes(const Lanes (&sums)[2]) {
    const auto join = [](Lanes v) { return (reinterpret_cast<Ints>(reinterpret_cast<Words>(v) << 16) >> 16) + (reinterpret_cast<Ints>(v) >> 16); };
    return {join(sums[0]), join(sums[1])};
}

// dots[c] += sum over w and four columns each of w * x[c], for kN rows x of 32 bytes. w unsigned, and so small that kPerSum
// products of pairs fit int16.
template <int kNumBytes, int kPerSum, int kN>
JILJU_INLINE void add_dots(I32* dots, const B32* w, const int8_t* x) {
    S32 wide[kNumBytes];
    for (int l = 0; l < kNumBytes; ++l) wide[l] = widen_unsigned(w[l]);
    for (int c = 0; c < kN; ++c, x += 32) {
        for (int first = 0; first < kNumBytes; first += kPerSum) {
            Lanes sums[2] = {};
#pragma GCC unroll 8
            for (int l = first; l < first + kPerSum; ++l) add_products(sums, wide[l], x + 4 * l);
            dots[c] = add(dots[c], add_lanes(sums));
        }
    }
}

// Eight times 32 signed bytes.
struct SignedBytes {
    S32 wide[8];
    JILJU_INLINE SignedBytes(const uint8_t* p, int64_t) {
        for (int l = 0; l < 8; ++l) wide[l] = widen_signed(load_b32(p + 32 * l));
    }
};
// dots[c] = sum of w * x[c], for kN rows x of 32 bytes.
template <int kN>
JILJU_INLINE void signed_dots(I32* dots, const SignedBytes& w, const int8_t* x, const int32_t*) {
    for (int c = 0; c < kN; ++c, x += 32) {
        dots[c] = set1_i32(0);
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) {
            Lanes sums[2] = {};  // a pair of products with -128 and 127 just fits
            add_products(sums, w.wide[l], x + 4 * l);
            dots[c] = add(dots[c], add_lanes(sums));
        }
    }
}

}  // namespace jilju::generic

#include "half_strip.h"
