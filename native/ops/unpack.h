// Unpack: one block of each number format to float32, in the order of the row, eight values at a time.
//
// A block is cut in parts of at most 32 columns: `prepare(block)` reads what its parts share, `part<j>(block, shared, sink)`
// calls sink(i, values) for each eight of part j, i counting within the block, ascending. Both users, the GEMV (values go
// straight into an FMA, the same part of several rows after one another) and the GEMM (values go to a buffer), run these
// same operations, so that a weight has one value everywhere.
// Layouts: the public GGUF documentation of ggml's types; the values equal formats/quants.py bit for bit (every product of
// a scale and an integer here is exact in float32 or rounded once, and a min is added with one rounding).
#pragma once

#include "simd.h"

#include <utility>

namespace jilju::JILJU_ISA {

// d * q + m for 16 unsigned bytes: two sinks. A symmetric format's d * (q - z) is d * q + (-z * d): z is a power of two, so
// that -z * d is exact and the result is rounded once, as the product would be.
template <class Sink>
JILJU_INLINE void affine(int i, B16 q, F32 d, F32 m, Sink&& sink) {
    sink(i, fma(low_u8(q), d, m));
    sink(i + 1, fma(high_u8(q), d, m));
}

struct FormatF32 {
    static constexpr int kElements = 8, kBytes = 32, kParts = 1;
    struct Shared {};
    JILJU_INLINE static Shared prepare(const uint8_t*) { return {}; }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared&, Sink&& sink) { sink(0, load(reinterpret_cast<const float*>(p))); }
};
struct FormatF16 {
    static constexpr int kElements = 8, kBytes = 16, kParts = 1;
    struct Shared {};
    JILJU_INLINE static Shared prepare(const uint8_t*) { return {}; }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared&, Sink&& sink) { sink(0, load_f16(reinterpret_cast<const uint16_t*>(p))); }
};
struct FormatBF16 {
    static constexpr int kElements = 8, kBytes = 16, kParts = 1;
    struct Shared {};
    JILJU_INLINE static Shared prepare(const uint8_t*) { return {}; }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared&, Sink&& sink) { sink(0, load_bf16(reinterpret_cast<const uint16_t*>(p))); }
};

struct ScaleAndOffset {
    F32 d, m;
};
JILJU_INLINE ScaleAndOffset symmetric(const uint8_t* p, float zero_point) {
    const F32 d = set1_half(p);
    return {d, mul(d, set1(-zero_point))};
}
JILJU_INLINE ScaleAndOffset asymmetric(const uint8_t* p) {
    ScaleAndOffset s;
    set1_halves(p, &s.d, &s.m);
    return s;
}

// Of 32-column blocks, in whose 16 bytes the low nibbles are columns 0..15 and the high ones 16..31.
template <class Sink>
JILJU_INLINE void four_bits(const uint8_t* nibbles, const ScaleAndOffset& s, Sink&& sink) {
    const B16 q = load_b16(nibbles);
    affine(0, and_b16(q, 15), s.d, s.m, sink);
    affine(2, field_b16(q, 4, 15, 0), s.d, s.m, sink);
}
template <class Sink>
JILJU_INLINE void five_bits(const uint8_t* high, const uint8_t* nibbles, const ScaleAndOffset& s, Sink&& sink) {
    B16 low_half, high_half;
    five_bits_b16(high, nibbles, &low_half, &high_half);
    affine(0, low_half, s.d, s.m, sink);
    affine(2, high_half, s.d, s.m, sink);
}

struct FormatQ4_0 {  // d, nibbles; d * (q - 8)
    static constexpr int kElements = 32, kBytes = 18, kParts = 1;
    using Shared = ScaleAndOffset;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return symmetric(p, 8.0f); }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) { four_bits(p + 2, s, sink); }
};
struct FormatQ4_1 {  // d, m, nibbles; d * q + m
    static constexpr int kElements = 32, kBytes = 20, kParts = 1;
    using Shared = ScaleAndOffset;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return asymmetric(p); }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) { four_bits(p + 4, s, sink); }
};
struct FormatQ5_0 {  // d, 32 fifth bits, nibbles; d * (q - 16)
    static constexpr int kElements = 32, kBytes = 22, kParts = 1;
    using Shared = ScaleAndOffset;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return symmetric(p, 16.0f); }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) { five_bits(p + 2, p + 6, s, sink); }
};
struct FormatQ5_1 {  // d, m, 32 fifth bits, nibbles; d * q + m
    static constexpr int kElements = 32, kBytes = 24, kParts = 1;
    using Shared = ScaleAndOffset;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return asymmetric(p); }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) { five_bits(p + 4, p + 8, s, sink); }
};
struct FormatQ8_0 {  // d, signed bytes; d * q
    static constexpr int kElements = 32, kBytes = 34, kParts = 1;
    using Shared = F32;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return set1_half(p); }
    template <int, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& d, Sink&& sink) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sink(i, mul(load_i8(p + 2 + 8 * i), d));
    }
};

// Of Q4_K and Q5_K, per 32 columns: d * scale, and -dmin * min. Twelve bytes hold eight 6-bit pairs: four plain ones, and
// four whose low four bits lie in the last four bytes and whose top bits lie above the first eight.
struct ScalesK {
    alignas(32) float d[8], m[8];
    JILJU_INLINE ScalesK() {}
    JILJU_INLINE explicit ScalesK(const uint8_t* p) {
        uint32_t a, b, c;
        std::memcpy(&a, p + 4, 4);
        std::memcpy(&b, p + 8, 4);
        std::memcpy(&c, p + 12, 4);
        constexpr uint32_t k6 = 0x3f3f3f3f, k4 = 0x0f0f0f0f, k2 = 0x03030303;
        const uint32_t scales[2] = {a & k6, (c & k4) | (a >> 6 & k2) << 4};
        const uint32_t mins[2] = {b & k6, (c >> 4 & k4) | (b >> 6 & k2) << 4};
        F32 scale, min;
        set1_halves(p, &scale, &min);
        store(d, mul(load_u8(reinterpret_cast<const uint8_t*>(scales)), scale));
        store(m, mul(load_u8(reinterpret_cast<const uint8_t*>(mins)), mul(min, set1(-1.0f))));
    }
};

struct FormatQ4_K {  // d, dmin, scales, nibbles; per 64 columns 32 bytes, low nibbles first; d*s*q - dmin*m
    static constexpr int kElements = 256, kBytes = 144, kParts = 8;
    using Shared = ScalesK;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return ScalesK(p); }
    template <int j, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) {
        const uint8_t* nibbles = p + 16 + j / 2 * 32;
        const F32 d = set1(s.d[j]), m = set1(s.m[j]);
        affine(4 * j, field_b16(load_b16(nibbles), j % 2 * 4, 15, 0), d, m, sink);
        affine(4 * j + 2, field_b16(load_b16(nibbles + 16), j % 2 * 4, 15, 0), d, m, sink);
    }
};
struct FormatQ5_K {  // as Q4_K, with 32 bytes whose bit j is the fifth bit of the j-th 32 columns
    static constexpr int kElements = 256, kBytes = 176, kParts = 8;
    using Shared = ScalesK;
    JILJU_INLINE static Shared prepare(const uint8_t* p) { return ScalesK(p); }
    template <int j, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) {
        const uint8_t* nibbles = p + 48 + j / 2 * 32;
        const F32 d = set1(s.d[j]), m = set1(s.m[j]);
        const B16 high[2] = {field_b16(load_b16(p + 16), j, 1, 4), field_b16(load_b16(p + 32), j, 1, 4)};
        affine(4 * j, or_b16(field_b16(load_b16(nibbles), j % 2 * 4, 15, 0), high[0]), d, m, sink);
        affine(4 * j + 2, or_b16(field_b16(load_b16(nibbles + 16), j % 2 * 4, 15, 0), high[1]), d, m, sink);
    }
};
struct FormatQ6_K {  // 128 bytes of nibbles, 64 of bit pairs, 16 signed scales, d; d*s*(q - 32), a scale per 16 columns
    static constexpr int kElements = 256, kBytes = 210, kParts = 8;
    struct Shared {
        alignas(32) float d[16];
    };
    JILJU_INLINE static Shared prepare(const uint8_t* p) {
        Shared s;
        const F32 d = set1_half(p + 208);
        store(s.d, mul(load_i8(p + 192), d));
        store(s.d + 8, mul(load_i8(p + 200), d));
        return s;
    }
    // Per 128 columns four parts, from 64 bytes of nibbles (parts 0 and 2, 1 and 3 share theirs) and 32 bytes of bit pairs.
    template <int j, class Sink>
    JILJU_INLINE static void part(const uint8_t* p, const Shared& s, Sink&& sink) {
        constexpr int run = j % 4;
        const uint8_t* nibbles = p + j / 4 * 64 + run % 2 * 32;
        const uint8_t* pairs = p + 128 + j / 4 * 32;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const B16 q = or_b16(field_b16(load_b16(nibbles + 16 * h), run / 2 * 4, 15, 0), field_b16(load_b16(pairs + 16 * h), 2 * run, 3, 4));
            const F32 d = set1(s.d[2 * j + h]);
            affine(4 * j + 2 * h, q, d, mul(d, set1(-32.0f)), sink);
        }
    }
};

// body.operator()<j>() for every part of a block, ascending.
template <class F, class Body>
JILJU_INLINE void for_parts(Body&& body) {
    [&]<int... j>(std::integer_sequence<int, j...>) { (body.template operator()<j>(), ...); }(std::make_integer_sequence<int, F::kParts>());
}
template <class F, class Sink>
JILJU_INLINE void unpack_block(const uint8_t* p, Sink&& sink) {
    const typename F::Shared shared = F::prepare(p);
    for_parts<F>([&]<int j>() { F::template part<j>(p, shared, sink); });
}

template <class Body>
JILJU_INLINE void with_format(Format format, Body&& body) {
    switch (format) {
        case Format::kF32: return body.template operator()<FormatF32>();
        case Format::kF16: return body.template operator()<FormatF16>();
        case Format::kBF16: return body.template operator()<FormatBF16>();
        case Format::kQ4_0: return body.template operator()<FormatQ4_0>();
        case Format::kQ4_1: return body.template operator()<FormatQ4_1>();
        case Format::kQ5_0: return body.template operator()<FormatQ5_0>();
        case Format::kQ5_1: return body.template operator()<FormatQ5_1>();
        case Format::kQ8_0: return body.template operator()<FormatQ8_0>();
        case Format::kQ4_K: return body.template operator()<FormatQ4_K>();
        case Format::kQ5_K: return body.template operator()<FormatQ5_K>();
        case Format::kQ6_K: return body.template operator()<FormatQ6_K>();
    }
}

// The last K % 8 columns of a row in a float format: its bytes, padded with zeros to one block of eight.
template <class F>
struct TailBlock {
    alignas(32) uint8_t bytes[32] = {};
    JILJU_INLINE TailBlock(const uint8_t* row, int64_t num_columns) {
        static_assert(F::kElements == 8);
        const int64_t whole = num_columns / 8;
        std::memcpy(bytes, row + whole * F::kBytes, static_cast<size_t>(num_columns % 8) * (F::kBytes / 8));
    }
};

}  // namespace jilju::JILJU_ISA
