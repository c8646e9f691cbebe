// linear: out = x @ concat(parts).T (+ biases) (+ out)        x [rows, K], part i [N_i, K], out [rows, sum N_i]
//
// Parts in a quantized format run on integer kernels: the rows are quantized once (after the norm that was fused into the
// op), then strips of sixteen outputs are multiplied with up to eight rows at a time. Parts in a float format run on float32
// kernels. The two parts of a gate may come with their activation: out = activation(x @ gate.T) * (x @ up.T). Every output's
// bits depend on its own row and weights alone: units only partition the outputs, K is never split.
#include <cstring>

#include "linear_float.h"
#include "linear_packed.h"
#include "rows.h"

namespace jilju::JILJU_ISA {
namespace {

constexpr int64_t kTileBytes = 160 << 10;  // of quantized rows that a unit walks through: they stay in L2
constexpr int64_t kMinTileRows = 32;
constexpr int64_t kUnitWork = 2 << 20;     // multiply-adds of a unit: about 20 microseconds
constexpr int64_t kMaxUnitBytes = 64 << 10, kMinUnitBytes = 8 << 10;  // of weights
constexpr int64_t kUnitsPerThread = 8;
constexpr int64_t kRowsPerQuantizing = 4;
constexpr int64_t kOwnRows = 2;  // that every thread quantizes for itself
constexpr int64_t kSoon = 2048;  // bytes of weights between fetching and use: some hundred nanoseconds

// --- packed parts ---------------------------------------------------------------------------------------------------

int64_t bytes_of_rows(int64_t num_inputs, int64_t rows) { return num_inputs / kBlockColumns * kColumnBytes * rows; }

// Quantized rows lie in groups of kColumns, counted from the tile's first row, as the integer kernels take them.
template <class Byte>
Byte* columns_of(Byte* quantized, int64_t num_inputs, int64_t row) {
    return quantized + bytes_of_rows(num_inputs, row);
}

void quantize(const LinearOp& op, const Step& step, int64_t begin, int64_t end, int8_t* quantized, float* scratch) {
    const int64_t num_rows = step.rows(op.x), num_inputs = op.x.width;
    for (int64_t row = begin; row < end; ++row) {
        const float* x = step.at(op.x, row);
        if (op.norm >= 0) {
            rms_norm_row(x, step.program->vectors[op.norm], op.norm_eps, false, scratch);
            x = scratch;
        }
        const int64_t first = row / kColumns * kColumns;
        quantize_row(x, num_inputs, min_int(kColumns, num_rows - first), row - first, columns_of(quantized, num_inputs, first));
    }
}

void quantize_rows(const LinearOp& op, Step& step, Pool& pool) {
    const int64_t num_rows = step.rows(op.x);
    pool.for_tiles(ceil_div(num_rows, kRowsPerQuantizing), [&](int64_t unit, float* scratch) {
        quantize(op, step, unit * kRowsPerQuantizing, min_int(num_rows, (unit + 1) * kRowsPerQuantizing), step.quantized, scratch);
    });
}

// Few rows every thread quantizes for itself, with its first unit: that takes less time than to wait for one that does it.
// Before them stands the number of the linear that they belong to.
constexpr int64_t kNumberFloats = 16;
const int8_t* own_rows(const LinearOp& op, const Step& step, float* scratch) {
    float* const own = scratch + step.own_rows_at;
    int8_t* const quantized = reinterpret_cast<int8_t*>(own + kNumberFloats);
    uint64_t number;
    std::memcpy(&number, own, sizeof number);
    if (number != step.num_linears) {
        quantize(op, step, 0, step.rows(op.x), quantized, scratch);
        std::memcpy(own, &step.num_linears, sizeof number);
    }
    return quantized;
}

struct PackedUnits {
    int64_t rows, strips;  // of a unit
};
PackedUnits packed_units(const LinearOp& op, const Step& step, const Weight& w, int num_threads) {
    const int64_t num_rows = step.rows(op.x);
    const int64_t fit = max_int(kMinTileRows, kTileBytes / bytes_of_rows(w.num_inputs, 1));
    const int64_t rows = ceil_div(ceil_div(num_rows, ceil_div(num_rows, fit)), kColumns) * kColumns;
    int64_t all_bytes = 0;
    for (const int part : op.parts) all_bytes += step.program->weights[part].packed_bytes();
    const int64_t bytes = min_int(kMaxUnitBytes, max_int(kMinUnitBytes, all_bytes / (kUnitsPerThread * num_threads)));
    const int64_t strips = min_int(bytes / w.strip_bytes, kUnitWork / (min_int(rows, num_rows) * w.num_inputs * kStripRows));
    return {rows, max_int(1, strips)};
}

struct Out {
    float* data;  // of row 0 and the unit's first output
    int64_t stride;
    const float* bias;  // of the unit's first output, or null
    bool add_to;
};

// The outputs of a strip (a last one has fewer) for each row of a group, joined with bias and residual, in this order.
JILJU_INLINE void finish_strip(const float* results, int64_t num_rows, int64_t num_outputs, const Out& out) {
    for (int64_t row = 0; row < num_rows; ++row, results += kStripRows) {
        for (int64_t i = 0; i < num_outputs; i += kHalfRows) {
            float* to = out.data + row * out.stride + i;
            F32 y = load(results + i);
            if (num_outputs - i >= kHalfRows) {
                if (out.bias) y = add(y, load(out.bias + i));
                if (out.add_to) y = add(y, load(to));
                store(to, y);
            } else {
                const int n = static_cast<int>(num_outputs - i);
                if (out.bias) y = add(y, load_n(out.bias + i, n));
                if (out.add_to) y = add(y, load_n(to, n));
                store_n(to, y, n);
            }
        }
    }
}

// results [group.count][16] = outputs of a strip for a group of the rows; fetches the group's share of the next strip.
struct Group {
    int64_t index, of;  // in order, of so many
    int64_t count;      // of rows
    const int8_t* columns;
};
JILJU_INLINE void multiply(const Weight& w, int64_t strip, const Group& group, float* results) {
    const int64_t num_blocks = w.num_inputs / kBlockColumns, step = ceil_div(w.strip_bytes, num_blocks * group.of);
    const uint8_t* p = w.packed + strip * w.strip_bytes;
    const bool once = group.of == 1 && kHalvesTogether == 2;  // then what is fetched now is soon used
    const uint8_t* ahead = p + (once ? min_int(kSoon, w.strip_bytes) : w.strip_bytes) + group.index * num_blocks * step;
    multiply_strip_of(w.family, group.count)(p, num_blocks, group.columns, results, {ahead, step});
}

// body(group, its first row) for the rows [row, row + num_rows) of the step's `all_rows`.
template <class Body>
JILJU_INLINE void for_groups(const int8_t* quantized, int64_t num_inputs, int64_t row, int64_t num_rows, int64_t all_rows, Body&& body) {
    const int64_t num_groups = ceil_div(num_rows, kColumns);
    for (int64_t i = 0; i < num_groups; ++i) {
        const int64_t r = row + i * kColumns;
        body(Group{i, num_groups, min_int(kColumns, all_rows - r), columns_of(quantized, num_inputs, r)}, r);
    }
}

// Strips [first, first + count) of `w` for rows [row, row + num_rows) of the step's `all_rows`.
void run_packed(const int8_t* quantized, const Weight& w, int64_t first, int64_t count, int64_t row, int64_t num_rows, int64_t all_rows, Out out) {
    alignas(64) float results[kColumns * kStripRows];
    for (int64_t strip = first; strip < first + count; ++strip, out.data += kStripRows) {
        const int64_t outputs = min_int(kStripRows, w.num_outputs - strip * kStripRows);
        for_groups(quantized, w.num_inputs, row, num_rows, all_rows, [&](const Group& group, int64_t r) {
            multiply(w, strip, group, results);
            finish_strip(results, group.count, outputs, {out.data + r * out.stride, out.stride, out.bias, out.add_to});
        });
        if (out.bias) out.bias += kStripRows;
    }
}

// The same for a gate and its up projection, joined by the activation.
void run_gate(const int8_t* quantized, const Weight& gate, const Weight& up, Activation activation, int64_t first, int64_t count, int64_t row, int64_t num_rows,
              int64_t all_rows, Out out) {
    alignas(64) float gates[kColumns * kStripRows], ups[kColumns * kStripRows];
    for (int64_t strip = first; strip < first + count; ++strip, out.data += kStripRows) {
        const int64_t outputs = min_int(kStripRows, gate.num_outputs - strip * kStripRows);
        for_groups(quantized, gate.num_inputs, row, num_rows, all_rows, [&](const Group& group, int64_t r) {
            multiply(gate, strip, group, gates);
            multiply(up, strip, group, ups);
            for (int64_t i = 0; i < group.count * kStripRows; i += 8) store(gates + i, mul(activate(activation, load(gates + i)), load(ups + i)));
            finish_strip(gates, group.count, outputs, {out.data + r * out.stride, out.stride, nullptr, false});
        });
    }
}

// --- units of all parts -----------------------------------------------------------------------------------------------

// A part's outputs and rows, cut into units: row tiles outside, groups of outputs inside.
struct PartUnits {
    int64_t rows, outputs;  // of a unit
    int64_t num_groups, num_tiles;
    int64_t count() const { return num_groups * num_tiles; }
};
PartUnits units_of_part(const LinearOp& op, const Step& step, const Weight& w, int num_threads) {
    const int64_t num_rows = step.rows(op.x);
    int64_t rows, outputs;
    if (w.family == Family::kFloat) {
        const float_linear::Units units = float_linear::units_of(w, num_rows);
        rows = units.rows, outputs = units.outputs;
    } else {
        const PackedUnits units = packed_units(op, step, w, num_threads);
        rows = units.rows, outputs = units.strips * kStripRows;
    }
    return {rows, outputs, ceil_div(w.num_outputs, outputs), ceil_div(num_rows, rows)};
}

}  // namespace

int64_t own_rows_floats(int64_t max_inputs) { return kNumberFloats + ceil_div(bytes_of_rows(max_inputs, kOwnRows), sizeof(float)); }

int64_t linear_scratch_floats(int64_t max_inputs) { return max_int(float_linear::scratch_floats(), max_inputs); }

void linear(const LinearOp& op, Step& step, Pool& pool) {
    const Program& program = *step.program;
    const int64_t num_rows = step.rows(op.x);
    ++step.num_linears;
    const bool own = op.num_packed > 0 && num_rows <= kOwnRows;
    if (op.num_packed > 0 && !own) quantize_rows(op, step, pool);

    const size_t num_parts = op.gate ? 1 : op.parts.size();  // a gate's two parts run together
    int64_t num_units = 0;
    for (size_t part = 0; part < num_parts; ++part) num_units += units_of_part(op, step, program.weights[op.parts[part]], pool.num_threads()).count();

    pool.for_tiles(num_units, [&](int64_t unit, float* scratch) {
        int64_t offset = 0;
        size_t part = 0;
        PartUnits units = units_of_part(op, step, program.weights[op.parts[0]], pool.num_threads());
        while (unit >= units.count()) {
            unit -= units.count();
            offset += program.weights[op.parts[part]].num_outputs;
            units = units_of_part(op, step, program.weights[op.parts[++part]], pool.num_threads());
        }
        const Weight& w = program.weights[op.parts[part]];
        const int64_t row = unit / units.num_groups * units.rows, first = unit % units.num_groups * units.outputs;
        const int64_t rows = min_int(units.rows, num_rows - row), outputs = min_int(units.outputs, w.num_outputs - first);
        const float* bias = op.biases.empty() ? nullptr : program.vectors[op.biases[part]].data();
        const int64_t stride = step.stride(op.out);
        if (w.family == Family::kFloat) {
            float_linear::run(w, first, outputs, step.at(op.x, row), step.stride(op.x), rows, num_rows, {step.at(op.out, row) + offset, stride, bias, op.add_to}, scratch);
            return;
        }
        const Out out{step.at(op.out, 0) + offset + first, stride, bias ? bias + first : nullptr, op.add_to};
        const int64_t strip = first / kStripRows, num_strips = ceil_div(outputs, kStripRows);
        const int8_t* quantized = own ? own_rows(op, step, scratch) : step.quantized;
        if (op.gate) {
            run_gate(quantized, w, program.weights[op.parts[1]], *op.gate, strip, num_strips, row, rows, num_rows, out);
        } else {
            run_packed(quantized, w, strip, num_strips, row, rows, num_rows, out);
        }
    });
}

void multiply_one(Family family, int64_t num_columns, const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out) {
    multiply_strip_of(family, num_columns)(strip, num_blocks, columns, out, {strip, 0});
}

void unpack_row(const Weight& w, int64_t row, float* out) {
    const uint8_t* from = w.data + row * w.row_bytes;
    with_format(w.format, [&]<class F>() {
        const int64_t num_blocks = w.num_inputs / F::kElements;
        for (int64_t b = 0; b < num_blocks; ++b)
            unpack_block<F>(from + b * F::kBytes, [&](int i, F32 v) { store(out + b * F::kElements + 8 * i, v); });
        if constexpr (F::kElements == 8) {
            const int tail = static_cast<int>(w.num_inputs % 8);
            if (tail) unpack_block<F>(TailBlock<F>(from, w.num_inputs).bytes, [&](int, F32 v) { store_n(out + num_blocks * 8, v, tail); });
        }
    });
}

}  // namespace jilju::JILJU_ISA
