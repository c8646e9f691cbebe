// rope: rotate pairs of each head by position * theta^(-2i/head_dim) / factors[i], in place        x [tokens, heads * head_dim]
//
// The angles of a tile's positions are computed once, in double, for all layers; the rotation is elementwise, so that the
// order of work changes nothing.
#include "simd.h"

#include <cmath>

namespace jilju::JILJU_ISA {

// step.rope[table] [token][cos[half], sin[half]]
void rope_tables(Step& step, Pool& pool) {
    const auto& tables = step.program->rope_tables;
    pool.for_tiles(step.num_tokens, [&](int64_t t, float*) {
        for (size_t i = 0; i < tables.size(); ++i) {
            const int64_t half = tables[i].head_dim / 2;
            float* cosines = step.rope[i] + t * 2 * half;
            for (int64_t j = 0; j < half; ++j) {
                const double angle = static_cast<double>(step.token_positions[t]) * tables[i].frequencies[j];
                cosines[j] = static_cast<float>(std::cos(angle));
                cosines[half + j] = static_cast<float>(std::sin(angle));
            }
        }
    });
}

// (a, b) -> (a cos - b sin, a sin + b cos) for all pairs of one token's heads
void rotate(const RopeOp& op, const Step& step, int64_t t) {
    const int64_t half = op.head_dim / 2;
    const float* cosines = step.rope[op.table] + t * 2 * half;
    const float* sines = cosines + half;
    float* row = step.at(op.x, t);
    for (float* head = row; head < row + op.x.width; head += op.head_dim) {
        float* second = op.halves ? head + half : head + 1;
        const int64_t stride = op.halves ? 1 : 2;
        int64_t j = 0;
        if (op.halves) {
            for (; j + 8 <= half; j += 8) {
                const F32 a = load(head + j), b = load(second + j), cosine = load(cosines + j), sine = load(sines + j);
                store(head + j, sub(mul(a, cosine), mul(b, sine)));
                store(second + j, add(mul(a, sine), mul(b, cosine)));
            }
        } else {
            for (; j + 4 <= half; j += 4) store(head + 2 * j, rotate_pairs(load(head + 2 * j), cosines + j, sines + j));
        }
        for (; j < half; ++j) {
            float& a = head[j * stride];
            float& b = second[j * stride];
            const float x = a, y = b;
            a = x * cosines[j] - y * sines[j];
            b = x * sines[j] + y * cosines[j];
        }
    }
}

void rope(const RopeOp& op, Step& step, Pool& pool) {
    pool.for_tiles(step.num_tokens, [&](int64_t t, float*) { rotate(op, step, t); });
}

}  // namespace jilju::JILJU_ISA
