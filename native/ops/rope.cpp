// rope: rotate pairs of each head by position * theta^(-2i/head_dim), in place        x [tokens, heads * head_dim]
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

void rope(const RopeOp& op, Step& step, Pool& pool) {
    const int64_t half = op.head_dim / 2;
    pool.for_tiles(step.num_tokens, [&](int64_t t, float*) {
        const float* cosines = step.rope[op.table] + t * 2 * half;
        const float* sines = cosines + half;
        float* row = step.at(op.x, t);
        const int64_t second = op.halves ? half : 1, stride = op.halves ? 1 : 2;
        for (float* head = row; head < row + op.x.width; head += op.head_dim) {
            for (int64_t j = 0; j < half; ++j) {
                float& a = head[j * stride];
                float& b = head[second + j * stride];
                const float x = a, y = b;
                a = x * cosines[j] - y * sines[j];
                b = x * sines[j] + y * cosines[j];
            }
        }
    });
}

}  // namespace jilju::JILJU_ISA
