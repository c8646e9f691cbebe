// The ISA that this object library is compiled for, and what is built from its operations alone.
//
// ops/ is compiled once per ISA, in a namespace of its name. Anything defined in a header here must be in that namespace
// or always inlined: the linker keeps one copy of an inline function and must not keep one for another CPU.
#pragma once

#include "../step.h"

#if defined(JILJU_COMPILE_AVX512)
#include "../simd/avx512.h"
#elif defined(JILJU_COMPILE_AVX2)
#include "../simd/avx2.h"
#elif defined(JILJU_COMPILE_NEON)
#include "../simd/neon.h"
#else
#include "../simd/generic.h"
#endif

namespace jilju::JILJU_ISA {

// exp in float32, error below 2 ulp: x = n ln2 + r with |r| <= ln2/2, then Taylor to r^7 (remainder 0.35^8/8! = 5e-9).
// Below -87.33 (2^-126) it is exactly 0, so exp(-inf) == 0; it saturates near 2^127.5; NaN stays NaN.
JILJU_INLINE F32 exp(F32 x) {
    const F32 lowest = set1(-87.33f);
    const F32 y = max(lowest, min(set1(88.37f), x));
    const F32 n = round(mul(y, set1(1.44269504f)));
    F32 r = fma(n, set1(-0.693359375f), y);  // ln2 in two parts; the first has 10 bits, so n times it is exact
    r = fma(n, set1(2.12194440e-4f), r);
    F32 p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return select_less(x, lowest, zero(), mul(p, pow2(n)));
}

// 2^x in float32 for x <= 127, error below 2 ulp: x = n + r with |r| <= 1/2, then 1 + r p(r), p the polynomial of degree 5 whose
// largest relative error is least (2e-9). Below -126 it is exactly 0, so exp2(-inf) == 0; NaN stays NaN.
JILJU_INLINE F32 exp2(F32 x) {
    const F32 lowest = set1(-126.0f);
    const F32 y = max(lowest, x);
    const F32 n = round(y), r = sub(y, n);
    F32 p = set1(1.53533343e-4f);
    p = fma(p, r, set1(1.33988704e-3f));
    p = fma(p, r, set1(9.61843785e-3f));
    p = fma(p, r, set1(5.55033237e-2f));
    p = fma(p, r, set1(0.240226477f));
    p = fma(p, r, set1(0.693147182f));
    p = fma(p, r, set1(1.0f));
    return select_less(x, lowest, zero(), mul(p, pow2(n)));
}

JILJU_INLINE float exp_one(float x) {
    float lanes[8];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

JILJU_INLINE int64_t min_int(int64_t a, int64_t b) { return a < b ? a : b; }
JILJU_INLINE int64_t max_int(int64_t a, int64_t b) { return a > b ? a : b; }
JILJU_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void rope_tables(Step&, Pool&);
void embed(const EmbedOp&, Step&, Pool&);
void rms_norm(const RmsNormOp&, Step&, Pool&);
void linear(const LinearOp&, Step&, Pool&);
void rope(const RopeOp&, Step&, Pool&);
void rotate(const RopeOp&, const Step&, int64_t token);
void attention(const AttentionOp&, Step&, Pool&);
void glu(const GluOp&, Step&, Pool&);
void take_rows(const TakeRowsOp&, Step&, Pool&);
void sample(const SampleOp&, Step&, Pool&);

void multiply_one(Family, int64_t num_columns, const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out);
void unpack_row(const Weight&, int64_t row, float* out);
int64_t linear_scratch_floats(int64_t max_inputs);
int64_t own_rows_floats(int64_t max_inputs);  // of linear too, behind the scratch that ops share
int64_t attention_scratch_floats(int group, int64_t head_dim, int64_t padded_head_dim);
int64_t attention_queries_per_unit(int group);
int64_t sample_scratch_floats(int64_t vocab_size);

}  // namespace jilju::JILJU_ISA
