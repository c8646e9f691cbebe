// embed, rms_norm, glu, take_rows: the ops that treat each row by itself.
#include "rows.h"

#include <cstring>

namespace jilju::JILJU_ISA {

// out[t] = table[token_ids[t]] * scale        out [tokens, D]
void embed(const EmbedOp& op, Step& step, Pool& pool) {
    const Weight& table = step.program->weights[op.table];
    pool.for_tiles(step.num_tokens, [&](int64_t t, float*) {
        float* out = step.at(op.out, t);
        unpack_row(table, step.token_ids[t], out);
        if (op.scale != 1.0f)
            for (int64_t i = 0; i < op.out.width; ++i) out[i] *= op.scale;
    });
}

// rms_norm_row per head of the weight's width        x, out [rows, heads * width]
void rms_norm(const RmsNormOp& op, Step& step, Pool& pool) {
    const std::vector<float>& weight = step.program->vectors[op.weight];
    const int64_t width = static_cast<int64_t>(weight.size());
    pool.for_tiles(step.rows(op.x), [&](int64_t row, float*) {
        for (int64_t head = 0; head < op.x.width; head += width) rms_norm_row(step.at(op.x, row) + head, weight, op.eps, op.add_to, step.at(op.out, row) + head);
    });
}

// out = activation(gate) * up        x = [gate | up] [rows, 2F], out [rows, F]
template <F32 (*kActivation)(F32)>
void glu_rows(const GluOp& op, Step& step, Pool& pool) {
    constexpr int64_t kColumns = 2048;
    const int64_t width = op.out.width, pieces = ceil_div(width, kColumns);
    pool.for_tiles(step.rows(op.x) * pieces, [&](int64_t unit, float*) {
        const int64_t row = unit / pieces, begin = unit % pieces * kColumns, end = min_int(begin + kColumns, width);
        const float* gate = step.at(op.x, row);
        const float* up = gate + width;
        float* out = step.at(op.out, row);
        int64_t i = begin;
        for (; i + 8 <= end; i += 8) store(out + i, mul(kActivation(load(gate + i)), load(up + i)));
        const int tail = static_cast<int>(end - i);
        if (tail) store_n(out + i, mul(kActivation(load_n(gate + i, tail)), load_n(up + i, tail)), tail);
    });
}

void glu(const GluOp& op, Step& step, Pool& pool) {
    switch (op.activation) {
        case Activation::kSilu: return glu_rows<silu>(op, step, pool);
        case Activation::kGeluTanh: return glu_rows<gelu_tanh>(op, step, pool);
    }
}

// out[i] = x[logit_tokens[i]]        x [tokens, D], out [logits, D]
void take_rows(const TakeRowsOp& op, Step& step, Pool& pool) {
    pool.for_tiles(step.num_logits, [&](int64_t i, float*) {
        const int64_t token = step.batch.logit_tokens[step.first_logit + i] - step.first_token;
        std::memcpy(step.at(op.out, i), step.at(op.x, token), static_cast<size_t>(op.x.width) * sizeof(float));
    });
}

}  // namespace jilju::JILJU_ISA
