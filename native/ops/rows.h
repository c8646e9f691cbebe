// What is done to one row of activations: shared by the ops of rows.cpp and by linear, into which they are fused.
#pragma once

#include <cmath>

#include "simd.h"

namespace jilju::JILJU_ISA {

// out = x / sqrt(mean(x^2) + eps) * weight (+ out)
JILJU_INLINE void rms_norm_row(const float* x, const std::vector<float>& weight, float eps, bool add_to, float* out) {
    const int64_t width = static_cast<int64_t>(weight.size()), whole = width / 8 * 8;
    const int tail = static_cast<int>(width % 8);
    F32 squares = zero();
    for (int64_t i = 0; i < whole; i += 8) squares = fma(load(x + i), load(x + i), squares);
    if (tail) squares = fma(load_n(x + whole, tail), load_n(x + whole, tail), squares);
    const F32 scale = set1(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < whole; i += 8) {
        const F32 normed = mul(mul(load(x + i), scale), load(weight.data() + i));
        store(out + i, add_to ? add(load(out + i), normed) : normed);
    }
    if (tail) {
        const F32 normed = mul(mul(load_n(x + whole, tail), scale), load_n(weight.data() + whole, tail));
        store_n(out + whole, add_to ? add(load_n(out + whole, tail), normed) : normed, tail);
    }
}

// g / (1 + exp(-g))
JILJU_INLINE F32 silu(F32 g) { return div(g, add(set1(1.0f), exp(sub(zero(), g)))); }

// g / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (g + 0.044715 g^3), as g / (1 + exp(-2u)): no difference of near numbers
JILJU_INLINE F32 gelu_tanh(F32 g) {
    const F32 minus_2u = mul(mul(g, set1(-1.5957691216f)), fma(mul(g, g), set1(0.044715f), set1(1.0f)));
    return div(g, add(set1(1.0f), exp(minus_2u)));
}

JILJU_INLINE F32 activate(Activation activation, F32 g) { return activation == Activation::kSilu ? silu(g) : gelu_tanh(g); }

}  // namespace jilju::JILJU_ISA
