#include "program.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "lower.h"
#include "pack.h"

namespace jilju {
namespace {

constexpr int64_t kVersion = 3;

class Reader {
public:
    Reader(std::span<const int64_t> ints, std::span<const double> reals) : ints_(ints), reals_(reals) {}
    int64_t next() { return int_index_ < ints_.size() ? ints_[int_index_++] : (failed_ = true, 0); }
    double real() { return real_index_ < reals_.size() ? reals_[real_index_++] : (failed_ = true, 0.0); }
    bool failed() const { return failed_; }
    bool finished() const { return int_index_ == ints_.size() && real_index_ == reals_.size(); }
    Value value() {
        const int64_t buffer = next(), offset = next(), width = next(), logits = next();
        return {static_cast<int>(buffer), offset, width, logits != 0};
    }

private:
    std::span<const int64_t> ints_;
    std::span<const double> reals_;
    size_t int_index_ = 0, real_index_ = 0;
    bool failed_ = false;
};

// Rows start on cache lines, and a stride that is a multiple of 1 KiB gets one line more: rows must not share cache sets.
int64_t stride_of(int64_t width) {
    const int64_t stride = (width + 15) / 16 * 16;
    return stride % 256 == 0 ? stride + 16 : stride;
}

// The ropes of q and k right before an attention become part of it.
void take_ropes(Program& p, AttentionOp* op) {
    while (!p.ops.empty() && std::holds_alternative<RopeOp>(p.ops.back())) {
        const RopeOp& rope = std::get<RopeOp>(p.ops.back());
        if (!op->rope_q && same(rope.x, op->q)) {
            op->rope_q = rope;
        } else if (!op->rope_k && same(rope.x, op->k)) {
            op->rope_k = rope;
        } else {
            return;
        }
        p.ops.pop_back();
    }
}

bool unpack_vector(const Weight& w, std::vector<float>* out) {
    out->resize(w.num_inputs);
    for (int64_t i = 0; i < w.num_inputs; ++i) {
        uint32_t bits = 0;
        switch (w.format) {
            case Format::kF32: __builtin_memcpy(&bits, w.data + 4 * i, 4); break;
            case Format::kBF16: __builtin_memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, w.data + 2 * i, 2); break;
            case Format::kF16: {
                uint16_t half;
                __builtin_memcpy(&half, w.data + 2 * i, 2);
                (*out)[i] = half_to_float(half);
                continue;
            }
            default: return false;
        }
        __builtin_memcpy(&(*out)[i], &bits, 4);
    }
    return true;
}

}  // namespace

bool overlap(const Value& a, const Value& b) {
    return a.buffer == b.buffer && a.offset < b.offset + b.width && b.offset < a.offset + a.width;
}

bool same(const Value& a, const Value& b) { return a.buffer == b.buffer && a.offset == b.offset && a.width == b.width; }

float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24)
                             : exponent < 31 ? std::ldexp(1024 + mantissa, exponent - 25)
                             : mantissa ? std::nan("") : INFINITY;
    return static_cast<float>(h >> 15 ? -magnitude : magnitude);
}

const Layout* layout_of(int64_t format) {
    static constexpr Layout f32{1, 4}, f16{1, 2}, q4_0{32, 18}, q4_1{32, 20}, q5_0{32, 22}, q5_1{32, 24}, q8_0{32, 34},
        q4_k{256, 144}, q5_k{256, 176}, q6_k{256, 210};
    switch (static_cast<Format>(format)) {
        case Format::kF32: return &f32;
        case Format::kF16: return &f16;
        case Format::kBF16: return &f16;
        case Format::kQ4_0: return &q4_0;
        case Format::kQ4_1: return &q4_1;
        case Format::kQ5_0: return &q5_0;
        case Format::kQ5_1: return &q5_1;
        case Format::kQ8_0: return &q8_0;
        case Format::kQ4_K: return &q4_k;
        case Format::kQ5_K: return &q5_k;
        case Format::kQ6_K: return &q6_k;
    }
    return nullptr;
}

int64_t strip_bytes_of(Family family, int64_t num_inputs) {
    const FamilyLayout layout = family_layout(family);
    const int64_t num_blocks = num_inputs / kBlockColumns;
    return 2 * (num_blocks / kHeadBlocks * layout.head_bytes + num_blocks * layout.block_bytes);  // a head only where K is a multiple of 256
}

Family family_of(Format format) {
    switch (format) {
        case Format::kF32:
        case Format::kF16:
        case Format::kBF16: return Family::kFloat;
        case Format::kQ4_0: return Family::kW4;
        case Format::kQ4_1: return Family::kW4Offset;
        case Format::kQ5_0: return Family::kW5;
        case Format::kQ5_1: return Family::kW5Offset;
        case Format::kQ8_0: return Family::kW8;
        case Format::kQ4_K: return Family::kW4K;
        case Format::kQ5_K: return Family::kW5K;
        case Format::kQ6_K: return Family::kW6;
    }
    return Family::kFloat;
}

void choose_family(Weight* w) {
    w->family = family_of(w->format);
    if (w->family == Family::kFloat) return;
    w->strip_bytes = strip_bytes_of(w->family, w->num_inputs);
}

Status use_packed(Program* program, Bytes packed) {
    const std::vector<PackedEntry> entries = packed_layout(*program);
    const int64_t wanted = entries.empty() ? 0 : entries.back().offset + entries.back().num_bytes;
    if (static_cast<int64_t>(packed.size) != wanted)
        return Status::invalid("the packed weights have " + std::to_string(packed.size) + " bytes, this plan needs " + std::to_string(wanted));
    for (const PackedEntry& entry : entries) program->weights[entry.weight].packed = packed.data + entry.offset;
    return {};
}

Status decode_program(std::span<const int64_t> ints, std::span<const double> reals, std::span<const Bytes> weights, Program* out) {
    Reader in(ints, reals);
    Program& p = *out;
    if (in.next() != kVersion) return Status::invalid("the encoded plan has another version than this build of the extension");
    p.vocab_size = in.next();
    p.num_layers = static_cast<int>(in.next());
    p.num_kv_heads = static_cast<int>(in.next());
    p.head_dim = in.next();
    const int64_t num_buffers = in.next(), num_weights = in.next(), num_ops = in.next();
    const auto bounded = [&](int64_t n) { return n >= 0 && n <= static_cast<int64_t>(ints.size()); };
    if (in.failed() || !bounded(num_buffers) || !bounded(num_weights) || !bounded(num_ops))
        return Status::invalid("the encoded plan is cut short");
    const bool shapes_only = weights.empty();
    if (!shapes_only && num_weights != static_cast<int64_t>(weights.size())) return Status::invalid("the encoded plan and its weights differ in number");

    for (int64_t i = 0; i < num_buffers; ++i) {
        const bool logits = in.next() != 0;
        const int64_t width = in.next();
        p.buffers.push_back({logits, width, stride_of(width)});
    }
    for (int64_t i = 0; i < num_weights; ++i) {
        const int64_t format = in.next(), outputs = in.next(), inputs = in.next();
        const Layout* layout = layout_of(format);
        const std::string where = "weight " + std::to_string(i);
        if (!layout) return Status::unsupported(where + " has number format " + std::to_string(format) + ", which has no kernel");
        if (outputs < 1 || inputs < 1 || inputs % layout->block_elements) return Status::invalid(where + " has a bad shape");
        const int64_t row_bytes = inputs / layout->block_elements * layout->block_bytes;
        if (!shapes_only && static_cast<int64_t>(weights[i].size) != outputs * row_bytes)
            return Status::invalid(where + " has " + std::to_string(weights[i].size) + " bytes, its shape needs " + std::to_string(outputs * row_bytes));
        p.weights.push_back({static_cast<Format>(format), outputs, inputs, row_bytes, shapes_only ? nullptr : weights[i].data});
    }
    p.vectors.resize(num_weights);

    Status status;
    const auto check_value = [&](const Value& v) {
        const bool good = v.buffer >= 0 && v.buffer < num_buffers && v.offset >= 0 && v.width >= 1 &&
                          v.offset + v.width <= p.buffers[v.buffer].width && p.buffers[v.buffer].logits == v.logits;
        if (!good && status.ok()) status = Status::invalid("a value leaves its buffer");
    };
    const auto matrix = [&](int64_t id, int64_t inputs) {
        if ((id < 0 || id >= num_weights || p.weights[id].num_inputs != inputs) && status.ok()) status = Status::invalid("a weight does not fit its op");
        return static_cast<int>(id);
    };
    const auto vector = [&](int64_t id) {
        if (id < 0 || id >= num_weights || p.weights[id].num_outputs != 1) {
            if (status.ok()) status = Status::invalid("a vector of weights does not fit its op");
        } else if (!shapes_only && p.vectors[id].empty() && !unpack_vector(p.weights[id], &p.vectors[id]) && status.ok()) {
            status = Status::unsupported("a vector of weights is quantized; F32, F16 and BF16 are supported");
        }
        return static_cast<int>(id);
    };

    constexpr size_t kNone = SIZE_MAX;
    p.first_logit_op = kNone;
    for (int64_t i = 0; i < num_ops && status.ok(); ++i) {
        switch (in.next()) {
            case 0: {
                const int64_t table = in.next();
                const Value v = in.value();
                check_value(v);
                p.ops.push_back(EmbedOp{matrix(table, v.width), v, static_cast<float>(in.real())});
                if (status.ok() && p.weights[table].num_outputs != p.vocab_size) status = Status::invalid("the embedding does not match the vocabulary");
                break;
            }
            case 1: {
                RmsNormOp op{in.value(), 0, in.value(), static_cast<float>(in.real()), false};
                check_value(op.x);
                check_value(op.out);
                op.weight = vector(in.next());
                op.add_to = in.next() != 0;
                if (status.ok() && (op.x.width != op.out.width || op.x.width % p.weights[op.weight].num_inputs || op.x.logits != op.out.logits))
                    status = Status::invalid("rms_norm: widths differ");
                p.ops.push_back(op);
                break;
            }
            case 2: {
                LinearOp op{in.value(), in.value(), {}, {}, in.next() != 0};
                check_value(op.x);
                check_value(op.out);
                const int64_t num_parts = in.next(), num_biases = in.next();
                if (!bounded(num_parts) || (num_biases != 0 && num_biases != num_parts)) return Status::invalid("linear: bad number of parts");
                for (int64_t j = 0; j < num_parts; ++j) op.parts.push_back(matrix(in.next(), op.x.width));
                for (int64_t j = 0; j < num_biases; ++j) op.biases.push_back(vector(in.next()));
                for (size_t j = 0; j < op.parts.size() && status.ok(); ++j) {
                    choose_family(&p.weights[op.parts[j]]);
                    op.num_packed += p.weights[op.parts[j]].family != Family::kFloat;
                }
                int64_t outputs = 0;
                for (size_t j = 0; j < op.parts.size() && status.ok(); ++j) {
                    outputs += p.weights[op.parts[j]].num_outputs;
                    if (!op.biases.empty() && p.weights[op.biases[j]].num_inputs != p.weights[op.parts[j]].num_outputs)
                        status = Status::invalid("linear: a bias does not match its part");
                }
                if (status.ok() && (outputs != op.out.width || op.x.logits != op.out.logits || overlap(op.x, op.out)))
                    status = Status::invalid("linear: the output does not match the parts, or overlaps the input");
                p.ops.push_back(op);
                break;
            }
            case 3: {
                RopeOp op{in.value(), in.next(), in.next() != 0, 0};
                const double theta = in.real();
                const int64_t factors = in.next();
                check_value(op.x);
                if (op.head_dim < 2 || op.head_dim % 2 || op.x.width % op.head_dim || op.x.logits || !(theta > 0)) return Status::invalid("rope: bad head size or theta");
                if (factors >= 0) {
                    vector(factors);
                    if (status.ok() && p.weights[factors].num_inputs != op.head_dim / 2) status = Status::invalid("rope: the factors do not match the head size");
                    if (!status.ok()) break;
                }
                // by theta and weight, not by value: sizes are asked for before weights are there, and must be the same then
                const auto same = std::find_if(p.rope_tables.begin(), p.rope_tables.end(), [&](const RopeTable& t) {
                    return t.head_dim == op.head_dim && t.theta == theta && t.factors == factors;
                });
                op.table = static_cast<int>(same - p.rope_tables.begin());
                if (same == p.rope_tables.end()) {
                    RopeTable table{op.head_dim, theta, static_cast<int>(factors), {}};
                    for (int64_t j = 0; j < op.head_dim / 2; ++j) {
                        const double factor = factors >= 0 && !shapes_only ? p.vectors[factors][j] : 1.0;
                        if (!(factor > 0)) return Status::invalid("rope: a factor that is not positive");
                        table.frequencies.push_back(std::pow(theta, -2.0 * static_cast<double>(j) / static_cast<double>(op.head_dim)) / factor);
                    }
                    p.rope_tables.push_back(table);
                }
                p.ops.push_back(op);
                break;
            }
            case 4: {
                AttentionOp op{in.value(), in.value(), in.value(), in.value(), static_cast<int>(in.next()), static_cast<int>(in.next()), in.next(),
                               static_cast<float>(in.real()), {}, {}};
                for (const Value* v : {&op.q, &op.k, &op.v, &op.out}) check_value(*v);
                const int64_t kv_width = p.num_kv_heads * p.head_dim;
                if (p.num_kv_heads < 1 || p.head_dim < 1 || op.num_heads < 1 || op.num_heads % p.num_kv_heads || op.layer < 0 || op.layer >= p.num_layers ||
                    op.q.width != op.num_heads * p.head_dim || op.out.width != op.q.width || op.k.width != kv_width || op.v.width != kv_width || op.q.logits ||
                    op.k.logits || op.v.logits || op.out.logits)
                    return Status::invalid("attention: heads and widths differ");
                if (op.window < 0) return Status::invalid("attention: a negative window");
                p.group = std::max(p.group, op.num_heads / p.num_kv_heads);
                take_ropes(p, &op);
                p.ops.push_back(op);
                break;
            }
            case 5: {
                const Value x = in.value(), out = in.value();
                const int64_t activation = in.next();
                if (activation != static_cast<int64_t>(Activation::kSilu) && activation != static_cast<int64_t>(Activation::kGeluTanh))
                    return Status::unsupported("glu: activation " + std::to_string(activation) + " has no kernel");
                const GluOp op{x, out, static_cast<Activation>(activation)};
                check_value(op.x);
                check_value(op.out);
                if (op.x.width != 2 * op.out.width || op.x.logits != op.out.logits || overlap(op.x, op.out)) return Status::invalid("glu: widths differ or values overlap");
                p.ops.push_back(op);
                break;
            }
            case 6: {
                const TakeRowsOp op{in.value(), in.value()};
                check_value(op.x);
                check_value(op.out);
                if (op.x.width != op.out.width || op.x.logits || !op.out.logits) return Status::invalid("take_rows: widths or rows differ");
                p.first_logit_op = std::min(p.first_logit_op, p.ops.size());
                p.ops.push_back(op);
                break;
            }
            case 7: {
                const SampleOp op{in.value()};
                check_value(op.logits);
                if (op.logits.width != p.vocab_size || !op.logits.logits) return Status::unsupported("sample: logits must be logit rows of the vocabulary's width");
                if (i + 1 != num_ops) return Status::unsupported("sample must be the last op");
                p.ops.push_back(op);
                break;
            }
            default: return Status::unsupported("op " + std::to_string(i) + " is unknown to this backend");
        }
    }
    if (!status.ok()) return status;
    if (in.failed() || !in.finished()) return Status::invalid("the encoded plan is cut short or too long");
    p.first_logit_op = std::min(p.first_logit_op, p.ops.size());
    for (size_t i = p.first_logit_op; i < p.ops.size(); ++i) {
        const bool on_logits = std::holds_alternative<RmsNormOp>(p.ops[i])  ? std::get<RmsNormOp>(p.ops[i]).out.logits
                               : std::holds_alternative<LinearOp>(p.ops[i]) ? std::get<LinearOp>(p.ops[i]).out.logits
                               : std::holds_alternative<GluOp>(p.ops[i])    ? std::get<GluOp>(p.ops[i]).out.logits
                                                                            : p.ops[i].index() >= 6;
        if (!on_logits) return Status::unsupported("an op on tokens after take_rows; all ops after it must run on logit rows");
    }
    if (p.ops.empty() || !std::holds_alternative<SampleOp>(p.ops.back())) return Status::unsupported("the last op must be sample");
    fuse(&p);
    return {};
}

}  // namespace jilju
