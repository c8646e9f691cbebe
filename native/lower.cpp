#include "lower.h"

namespace jilju {
namespace {

std::vector<Value> reads_of(const Op& op) {
    struct Reads {
        std::vector<Value> operator()(const EmbedOp&) const { return {}; }
        std::vector<Value> operator()(const RmsNormOp& o) const { return o.add_to ? std::vector{o.x, o.out} : std::vector{o.x}; }
        std::vector<Value> operator()(const LinearOp& o) const { return o.add_to ? std::vector{o.x, o.out} : std::vector{o.x}; }
        std::vector<Value> operator()(const RopeOp& o) const { return {o.x}; }
        std::vector<Value> operator()(const AttentionOp& o) const { return {o.q, o.k, o.v}; }
        std::vector<Value> operator()(const GluOp& o) const { return {o.x}; }
        std::vector<Value> operator()(const TakeRowsOp& o) const { return {o.x}; }
        std::vector<Value> operator()(const SampleOp& o) const { return {o.logits}; }
    };
    return std::visit(Reads{}, op);
}

const Value* written_by(const Op& op) {
    struct Written {
        const Value* operator()(const EmbedOp& o) const { return &o.out; }
        const Value* operator()(const RmsNormOp& o) const { return &o.out; }
        const Value* operator()(const LinearOp& o) const { return &o.out; }
        const Value* operator()(const RopeOp& o) const { return &o.x; }
        const Value* operator()(const AttentionOp& o) const { return &o.out; }
        const Value* operator()(const GluOp& o) const { return &o.out; }
        const Value* operator()(const TakeRowsOp& o) const { return &o.out; }
        const Value* operator()(const SampleOp&) const { return nullptr; }
    };
    return std::visit(Written{}, op);
}

bool is_read_from(const Program& program, size_t first_op, const Value& value) {
    for (size_t i = first_op; i < program.ops.size(); ++i) {
        for (const Value& read : reads_of(program.ops[i]))
            if (overlap(read, value)) return true;
        const Value* written = written_by(program.ops[i]);
        if (written && written->buffer == value.buffer && written->offset <= value.offset && written->offset + written->width >= value.offset + value.width) return false;
    }
    return false;
}

// ops[i] and ops[i + 1] if they are of these kinds, the second reads just what the first writes, and nobody else does.
template <class First, class Second>
bool are_fusable(Program& program, size_t i, First** first, Second** second) {
    if (i + 1 >= program.ops.size()) return false;
    *first = std::get_if<First>(&program.ops[i]);
    *second = std::get_if<Second>(&program.ops[i + 1]);
    return *first && *second && same((*first)->out, (*second)->x) && !(*first)->add_to && !is_read_from(program, i + 2, (*first)->out);
}

}  // namespace

void fuse(Program* program) {
    for (size_t i = 0; i < program->ops.size(); ++i) {
        RmsNormOp* norm;
        LinearOp* linear;
        GluOp* glu;
        if (are_fusable(*program, i, &norm, &linear) && linear->all_packed() && program->weights[norm->weight].num_inputs == norm->x.width) {
            linear->x = norm->x;
            linear->norm = norm->weight;
            linear->norm_eps = norm->eps;
            if (program->first_logit_op > i) --program->first_logit_op;
            program->ops.erase(program->ops.begin() + static_cast<std::ptrdiff_t>(i));
        }
        if (are_fusable(*program, i, &linear, &glu) && linear->all_packed() && linear->biases.empty() && linear->parts.size() == 2 &&
            program->weights[linear->parts[0]].num_outputs == program->weights[linear->parts[1]].num_outputs) {
            linear->gate = glu->activation;
            linear->out = glu->out;
            if (program->first_logit_op > i) --program->first_logit_op;
            program->ops.erase(program->ops.begin() + static_cast<std::ptrdiff_t>(i + 1));
        }
    }
}

}  // namespace jilju
