// Unpack: one block of each number format to float32, in the order of the row, eight values at a time.
//
// A format's `unpack(block, sink)` calls sink(i, values) for the i-th eight. Both users, the GEMV (values go straight into
// an FMA) and the GEMM (values go to a buffer), run these same operations, so that a weight has one value everywhere.
// Layouts: the public GGUF documentation of ggml's types; the values equal formats/quants.py bit for bit (every product of
// a scale and an integer here is exact in float32, and a min is added with one rounding).
#pragma once

#include "simd.h"

namespace jilju::JILJU_ISA {

// d * q for 16 signed bytes: two sinks.
template <class Sink>
JILJU_INLINE void scaled(int i, B16 q, F32 d, Sink&& sink) {
    sink(i, mul(low_i8(q), d));
    sink(i + 1, mul(high_i8(q), d));
}
// d * q + m for 16 bytes below 128.
template <class Sink>
JILJU_INLINE void scaled_and_moved(int i, B16 q, F32 d, F32 m, Sink&& sink) {
    sink(i, fma(low_i8(q), d, m));
    sink(i + 1, fma(high_i8(q), d, m));
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
        const F32 d = set1(half(p));
        const B16 q = load_b16(p + 2);
        scaled(0, sub_b16(and_b16(q, 15), 8), d, sink);
        scaled(2, sub_b16(field_b16(q, 4, 15, 0), 8), d, sink);
    }
};
struct FormatQ4_1 {  // d, m, nibbles; d * q + m
    static constexpr int kElements = 32, kBytes = 20;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1(half(p)), m = set1(half(p + 2));
        const B16 q = load_b16(p + 4);
        scaled_and_moved(0, and_b16(q, 15), d, m, sink);
        scaled_and_moved(2, field_b16(q, 4, 15, 0), d, m, sink);
    }
};
struct FormatQ5_0 {  // d, 32 fifth bits, nibbles; d * (q - 16)
    static constexpr int kElements = 32, kBytes = 22;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1(half(p));
        const B16 q = load_b16(p + 6);
        scaled(0, sub_b16(or_b16(and_b16(q, 15), bits_b16(p + 2, 16)), 16), d, sink);
        scaled(2, sub_b16(or_b16(field_b16(q, 4, 15, 0), bits_b16(p + 4, 16)), 16), d, sink);
    }
};
struct FormatQ5_1 {  // d, m, 32 fifth bits, nibbles; d * q + m
    static constexpr int kElements = 32, kBytes = 24;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1(half(p)), m = set1(half(p + 2));
        const B16 q = load_b16(p + 8);
        scaled_and_moved(0, or_b16(and_b16(q, 15), bits_b16(p + 4, 16)), d, m, sink);
        scaled_and_moved(2, or_b16(field_b16(q, 4, 15, 0), bits_b16(p + 6, 16)), d, m, sink);
    }
};
struct FormatQ8_0 {  // d, signed bytes; d * q
    static constexpr int kElements = 32, kBytes = 34;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const F32 d = set1(half(p));
        scaled(0, load_b16(p + 2), d, sink);
        scaled(2, load_b16(p + 18), d, sink);
    }
};

// The eight 6-bit scales and mins of Q4_K and Q5_K: 12 bytes, four plain pairs and four whose top bits lie in the first.
struct ScalesK {
    uint8_t scale[8], min[8];
    JILJU_INLINE explicit ScalesK(const uint8_t* p) {
        for (int j = 0; j < 4; ++j) {
            scale[j] = p[j] & 63;
            min[j] = p[j + 4] & 63;
            scale[j + 4] = static_cast<uint8_t>((p[j + 8] & 15) | (p[j] >> 6) << 4);
            min[j + 4] = static_cast<uint8_t>(p[j + 8] >> 4 | (p[j + 4] >> 6) << 4);
        }
    }
};

struct FormatQ4_K {  // d, dmin, scales, nibbles; per 64 columns 32 bytes, low nibbles first; d*s*q - dmin*m
    static constexpr int kElements = 256, kBytes = 144;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const float d = half(p), dmin = half(p + 2);
        const ScalesK s(p + 4);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const B16 a = load_b16(p + 16 + 32 * j), b = load_b16(p + 32 + 32 * j);
            const F32 d0 = set1(d * s.scale[2 * j]), m0 = set1(-(dmin * s.min[2 * j]));
            const F32 d1 = set1(d * s.scale[2 * j + 1]), m1 = set1(-(dmin * s.min[2 * j + 1]));
            scaled_and_moved(8 * j, and_b16(a, 15), d0, m0, sink);
            scaled_and_moved(8 * j + 2, and_b16(b, 15), d0, m0, sink);
            scaled_and_moved(8 * j + 4, field_b16(a, 4, 15, 0), d1, m1, sink);
            scaled_and_moved(8 * j + 6, field_b16(b, 4, 15, 0), d1, m1, sink);
        }
    }
};
template <int kShift>
JILJU_INLINE B16 fifth_bit(B16 high) {  // bit kShift of each byte, moved to bit 4
    return field_b16(high, kShift, 1, 4);
}
struct FormatQ5_K {  // as Q4_K, with 32 bytes whose bit i is the fifth bit of the i-th 32 columns
    static constexpr int kElements = 256, kBytes = 176;
    template <class Sink>
    JILJU_INLINE static void unpack(const uint8_t* p, Sink&& sink) {
        const float d = half(p), dmin = half(p + 2);
        const ScalesK s(p + 4);
        const B16 h0 = load_b16(p + 16), h1 = load_b16(p + 32);
        const auto part = [&]<int j>() {
            const B16 a = load_b16(p + 48 + 32 * j), b = load_b16(p + 64 + 32 * j);
            const F32 d0 = set1(d * s.scale[2 * j]), m0 = set1(-(dmin * s.min[2 * j]));
            const F32 d1 = set1(d * s.scale[2 * j + 1]), m1 = set1(-(dmin * s.min[2 * j + 1]));
            scaled_and_moved(8 * j, or_b16(and_b16(a, 15), fifth_bit<2 * j>(h0)), d0, m0, sink);
            scaled_and_moved(8 * j + 2, or_b16(and_b16(b, 15), fifth_bit<2 * j>(h1)), d0, m0, sink);
            scaled_and_moved(8 * j + 4, or_b16(field_b16(a, 4, 15, 0), fifth_bit<2 * j + 1>(h0)), d1, m1, sink);
            scaled_and_moved(8 * j + 6, or_b16(field_b16(b, 4, 15, 0), fifth_bit<2 * j + 1>(h1)), d1, m1, sink);
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
        const float d = half(p + 208);
        const int8_t* s = reinterpret_cast<const int8_t*>(p + 192);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {  // 128 columns: four runs of 32, each from 32 nibbles and one pair of bits
            const uint8_t* low = p + 64 * n;
            const uint8_t* high = p + 128 + 32 * n;
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {  // the first or second 16 columns of each run
                const B16 a = load_b16(low + 16 * h), b = load_b16(low + 32 + 16 * h), top = load_b16(high + 16 * h);
                const auto scale = [&](int run) { return set1(d * s[8 * n + 2 * run + h]); };
                const int i = 16 * n + 2 * h;
                scaled(i, sub_b16(or_b16(and_b16(a, 15), field_b16(top, 0, 3, 4)), 32), scale(0), sink);
                scaled(i + 4, sub_b16(or_b16(and_b16(b, 15), field_b16(top, 2, 3, 4)), 32), scale(1), sink);
                scaled(i + 8, sub_b16(or_b16(field_b16(a, 4, 15, 0), field_b16(top, 4, 3, 4)), 32), scale(2), sink);
                scaled(i + 12, sub_b16(or_b16(field_b16(b, 4, 15, 0), field_b16(top, 6, 3, 4)), 32), scale(3), sink);
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
