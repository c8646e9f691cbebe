// The lanes of the packed kernels where a vector holds half of a strip's rows: a strip takes two passes. Included by the
// instruction sets whose vectors have eight lanes; avx512.h has its own for whole strips. The second half of what lies at `p`
// is `distance` bytes behind it.
#pragma once

namespace jilju::JILJU_ISA {

inline constexpr int kHalvesTogether = 1;
using StripF32 = F32;
using StripI32 = I32;
using StripB32 = B32;

JILJU_INLINE StripF32 load_strip_f32(const uint8_t* p, int64_t) { return load(reinterpret_cast<const float*>(p)); }
JILJU_INLINE StripF32 load_strip_f16(const uint8_t* p, int64_t) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
JILJU_INLINE StripI32 load_strip_i8(const uint8_t* p, int64_t) { return load_i32_from_i8(p); }
JILJU_INLINE StripI32 load_strip_u8(const uint8_t* p, int64_t) { return load_i32_from_u8(p); }
JILJU_INLINE StripB32 load_strip_b32(const uint8_t* p, int64_t) { return load_b32(p); }
JILJU_INLINE StripF32 zero_strip() { return zero(); }
JILJU_INLINE StripI32 set1_strip(int32_t x) { return set1_i32(x); }
JILJU_INLINE StripF32 mul(StripF32 a, float b) { return mul(a, set1(b)); }
JILJU_INLINE StripF32 fma(StripF32 a, float b, StripF32 c) { return fma(a, set1(b), c); }
JILJU_INLINE StripB32 or_field_b32(StripB32 rest, StripB32 a, int shift, int mask, int to) { return or_b32(rest, field_b32(a, shift, mask, to)); }

}  // namespace jilju::JILJU_ISA
