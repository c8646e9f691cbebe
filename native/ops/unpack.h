// Unpack: one block of each number format to float32, in the order of the row, eight values at a time.
//
// A format's `unpack(block, sink)` calls sink(i, values) for the i-th eight. Both users, the GEMV (values go straight into
// an FMA) and the GEMM (values go to a buffer), run these same operations, so that a weight has one value everywhere.
// Layouts: the public GGUF documentation of ggml's types; the values equal formats/quants.py bit for bit (every product of
// a scale and an integer here is exact in float32, and a min is added with one rounding).
#pragma once

#include "simd.h"

namespace jilju::JILJU_ISA {

// d * q + m for 16 unsigned bytes: two sinks. A symmetric format's d * (q - z) is d * q + (-z * d): z is a power of two, so
// that -z * d is exact and the result is rounded once, as the product would be.
template <class Sink>
JILJU_INLINE void affine(int i, B16 q, F32 d, F32 m, Sink&& sink) {
    sink(i, fma(low_u8(q), d, m));
    sink(i + 1, fma(high_u8(q), d, m));
}

struct FormatF32 {
    static constexpr int kElements = 8, kBytes = 32;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) { sink(0, load(reinterpret_cast<const float*>(p))); }
};
struct FormatF16 {
    static constexpr int kElements = 8, kBytes = 16;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) { sink(0, load_f16(reinterpret_cast<const uint16_t*>(p))); }
};
struct FormatBF16 {
    static constexpr int kElements = 8, kBytes = 16;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) { sink(0, load_bf16(reinterpret_cast<const uint16_t*>(p))); }
};
struct FormatQ4_0 {  // d, nibbles; columns 0..15 in the low ones, 16..31 in the high ones; d * (q - 8)
    static constexpr int kElements = 32, kBytes = 18;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1_half(p), m = mul(d, set1(-8.0f));
        const B16 q = load_b16(p + 2);
        affine(0, and_b16(q, 15), d, m, sink);
        affine(2, field_b16(q, 4, 15, 0), d, m, sink);
    }
};
struct FormatQ4_1 {  // d, m, nibbles; d * q + m
    static constexpr int kElements = 32, kBytes = 20;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        F32 d, m;
        set1_halves(p, &d, &m);
        const B16 q = load_b16(p + 4);
        affine(0, and_b16(q, 15), d, m, sink);
        affine(2, field_b16(q, 4, 15, 0), d, m, sink);
    }
};
struct FormatQ5_0 {  // d, 32 fifth bits, nibbles; d * (q - 16)
    static constexpr int kElements = 32, kBytes = 22;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1_half(p), m = mul(d, set1(-16.0f));
        const B16 q = load_b16(p + 6);
        affine(0, or_b16(and_b16(q, 15), bits_b16(p + 2, 16)), d, m, sink);
        affine(2, or_b16(field_b16(q, 4, 15, 0), bits_b16(p + 4, 16)), d, m, sink);
    }
};
struct FormatQ5_1 {  // d, m, 32 fifth bits, nibbles; d * q + m
    static constexpr int kElements = 32, kBytes = 24;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        F32 d, m;
        set1_halves(p, &d, &m);
        const B16 q = load_b16(p + 8);
        affine(0, or_b16(and_b16(q, 15), bits_b16(p + 4, 16)), d, m, sink);
        affine(2, or_b16(field_b16(q, 4, 15, 0), bits_b16(p + 6, 16)), d, m, sink);
    }
};
struct FormatQ8_0 {  // d, signed bytes; d * q
    static constexpr int kElements = 32, kBytes = 34;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1_half(p);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sink(i, mul(load_i8(p + 2 + 8 * i), d));
    }
};

// Of Q4_K and Q5_K, per 32 columns: d * scale, and -dmin * min. Twelve bytes hold eight 6-bit pairs: four plain ones, and
// four whose low four bits lie in the last four bytes and whose top bits lie above the first eight.
struct ScalesK {
    alignas(32) float d[8], m[8];
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
    static constexpr int kElements = 256, kBytes = 144;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const ScalesK s(p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const B16 a = load_b16(p + 16 + 32 * j), b = load_b16(p + 32 + 32 * j);
            const F32 d0 = set1(s.d[2 * j]), m0 = set1(s.m[2 * j]), d1 = set1(s.d[2 * j + 1]), m1 = set1(s.m[2 * j + 1]);
            affine(8 * j, and_b16(a, 15), d0, m0, sink);
            affine(8 * j + 2, and_b16(b, 15), d0, m0, sink);
            affine(8 * j + 4, field_b16(a, 4, 15, 0), d1, m1, sink);
            affine(8 * j + 6, field_b16(b, 4, 15, 0), d1, m1, sink);
        }
    }
};
struct FormatQ5_K {  // as Q4_K, with 32 bytes whose bit i is the fifth bit of the i-th 32 columns
    static constexpr int kElements = 256, kBytes = 176;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const ScalesK s(p);
        const B16 h0 = load_b16(p + 16), h1 = load_b16(p + 32);
        const auto part = [&]<int j>() {
            const B16 a = load_b16(p + 48 + 32 * j), b = load_b16(p + 64 + 32 * j);
            const F32 d0 = set1(s.d[2 * j]), m0 = set1(s.m[2 * j]), d1 = set1(s.d[2 * j + 1]), m1 = set1(s.m[2 * j + 1]);
            affine(8 * j, or_b16(and_b16(a, 15), field_b16(h0, 2 * j, 1, 4)), d0, m0, sink);
            affine(8 * j + 2, or_b16(and_b16(b, 15), field_b16(h1, 2 * j, 1, 4)), d0, m0, sink);
            affine(8 * j + 4, or_b16(field_b16(a, 4, 15, 0), field_b16(h0, 2 * j + 1, 1, 4)), d1, m1, sink);
            affine(8 * j + 6, or_b16(field_b16(b, 4, 15, 0), field_b16(h1, 2 * j + 1, 1, 4)), d1, m1, sink);
        };
        part.template operator()<0>();
        part.template operator()<1>();
        part.template operator()<2>();
        part.template operator()<3>();
    }
};
struct FormatQ6_K {  // 128 bytes of nibbles, 64 of bit pairs, 16 signed scales, d; d*s*(q - 32), a scale per 16 columns
    static constexpr int kElements = 256, kBytes = 210;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        alignas(32) float scales[16];
        const F32 d = set1_half(p + 208);
        store(scales, mul(load_i8(p + 192), d));
        store(scales + 8, mul(load_i8(p + 200), d));
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {  // 128 columns: four runs of 32, each from 32 nibbles and one pair of bits
            const uint8_t* low = p + 64 * n;
            const uint8_t* high = p + 128 + 32 * n;
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {  // the first or second 16 columns of each run
                const B16 a = load_b16(low + 16 * h), b = load_b16(low + 32 + 16 * h), top = load_b16(high + 16 * h);
                const auto run = [&](int i, B16 q) {
                    const F32 scale = set1(scales[8 * n + 2 * i + h]);
                    affine(16 * n + 4 * i + 2 * h, q, scale, mul(scale, set1(-32.0f)), sink);
                };
                run(0, or_b16(and_b16(a, 15), field_b16(top, 0, 3, 4)));
                run(1, or_b16(and_b16(b, 15), field_b16(top, 2, 3, 4)));
                run(2, or_b16(field_b16(a, 4, 15, 0), field_b16(top, 4, 3, 4)));
                run(3, or_b16(field_b16(b, 4, 15, 0), field_b16(top, 6, 3, 4)));
            }
        }
    }
};

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
