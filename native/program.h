// Program: a plan as the core runs it, decoded once from flat arrays and checked again.
//
// Owns the ops' fields and the weights' addresses. The ops mean what plan/ops.py says. Knows nothing of threads or kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "status.h"

namespace jilju {

enum class Format : int32_t {
    kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kBF16 = 30,
};

struct Layout {
    int block_elements;
    int block_bytes;
};
const Layout* layout_of(int64_t format);  // null: not a format that we read
float half_to_float(uint16_t bits);

// How a linear op holds a weight: as in the file, or packed for integer kernels (pack.h).
enum class Family : int32_t { kFloat, kW4, kW4Offset, kW4K, kW5, kW5Offset, kW5K, kW6, kW8 };
inline constexpr int kNumFamilies = 9;

Family family_of(Format format);  // of a matrix that a linear op uses

inline constexpr int kStripRows = 16;     // rows that lie side by side, in two halves
inline constexpr int kHalfRows = 8;       // rows that are interleaved
inline constexpr int kBlockColumns = 32;  // columns that share a scale, of weights (but for kW6) and of activations
inline constexpr int kHeadBlocks = 8;     // blocks after a head

struct FamilyLayout {  // of each half of a strip
    int head_bytes;   // before every eighth block
    int scale_bytes;  // of a block: scales and offsets
    int block_bytes;
};
constexpr FamilyLayout family_layout(Family family) {
    switch (family) {
        case Family::kFloat: break;
        case Family::kW4: return {0, 16, 16 + 128};
        case Family::kW4Offset: return {0, 32, 32 + 128};
        case Family::kW4K: return {64, 16, 16 + 128};
        case Family::kW5: return {0, 16, 16 + 128 + 32};
        case Family::kW5Offset: return {0, 32, 32 + 128 + 32};
        case Family::kW5K: return {64, 16, 16 + 128 + 32};
        case Family::kW6: return {32, 16, 16 + 128 + 64};
        case Family::kW8: return {0, 16, 16 + 256};
    }
    return {0, 0, 0};
}

// A quantized row of activations has this many bytes a block: 32 quants, a scale and four sums (ops/linear_packed.h).
inline constexpr int64_t kQuantizedBytes = kBlockColumns + 4 + 4 + 4 + 4;

int64_t strip_bytes_of(Family family, int64_t num_inputs);

struct Weight {
    Format format;
    int64_t num_outputs;
    int64_t num_inputs;
    int64_t row_bytes;
    const uint8_t* data;  // in the mapped file: any alignment; null if only the packed form is needed
    Family family = Family::kFloat;  // packed, if a linear op uses it
    int64_t strip_bytes = 0;
    const uint8_t* packed = nullptr;

    int64_t packed_bytes() const { return (num_outputs + kStripRows - 1) / kStripRows * strip_bytes; }
};
void choose_family(Weight* weight);  // as linear ops hold it

struct Buffer {
    bool logits;      // rows are logit rows, else tokens
    int64_t width;
    int64_t stride;   // floats from row to row
    float* data = nullptr;
};

struct Value {
    int buffer;
    int64_t offset;
    int64_t width;
    bool logits;
};

enum class KvType : int32_t { kF16 = 0, kI8 = 1 };

enum class Activation : int32_t { kSilu = 0, kGeluTanh = 1 };

struct EmbedOp { int table; Value out; float scale; };
struct RmsNormOp { Value x; int weight; Value out; float eps; bool add_to; };
struct LinearOp {
    Value x, out;
    std::vector<int> parts, biases;
    bool add_to;
    size_t num_packed = 0;  // of the parts
    // fused into it (lower.h):
    int norm = -1;  // weight of an RMS norm of x, or -1
    float norm_eps = 0;
    std::optional<Activation> gate = {};  // parts are gate and up: out = activation(gate) * up

    bool all_packed() const { return num_packed == parts.size(); }
};
struct RopeOp { Value x; int64_t head_dim; bool halves; int table; };
struct AttentionOp {
    Value q, k, v, out;
    int layer;
    int num_heads;
    int64_t window;  // 0: none
    float scale;
    std::optional<RopeOp> rope_q, rope_k;  // that the plan has right before, done in the op's first pass
};
struct GluOp { Value x; Value out; Activation activation; };
struct TakeRowsOp { Value x; Value out; };
struct SampleOp { Value logits; };
using Op = std::variant<EmbedOp, RmsNormOp, LinearOp, RopeOp, AttentionOp, GluOp, TakeRowsOp, SampleOp>;
inline constexpr int kNumOpKinds = std::variant_size_v<Op>;

struct RopeTable {
    int64_t head_dim;
    double theta;
    int factors;                      // weight by which the frequencies are divided, or -1
    std::vector<double> frequencies;  // [head_dim / 2]
};

struct Program {
    int64_t vocab_size;
    int num_layers, num_kv_heads;
    int64_t head_dim;
    int group = 1;  // most query heads that share a KV head
    std::vector<Buffer> buffers;
    std::vector<Weight> weights;
    std::vector<std::vector<float>> vectors;  // by weight id: norm weights, biases and rope factors as float32; empty for matrices
    std::vector<Op> ops;
    size_t first_logit_op;  // the take_rows: ops from here on run on logit rows
    std::vector<RopeTable> rope_tables;
};

struct Bytes {
    const uint8_t* data;
    size_t size;
};

bool overlap(const Value& a, const Value& b);
bool same(const Value& a, const Value& b);  // the same columns

// Without weights only shapes are decoded, which is enough to count memory.
Status decode_program(std::span<const int64_t> ints, std::span<const double> reals, std::span<const Bytes> weights, Program* out);

// Where the packed weights lie: one buffer as packed_layout() says.
Status use_packed(Program* program, Bytes packed);

}  // namespace jilju
