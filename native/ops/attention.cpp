// attention: write k, v to the row's slots, then out = softmax(scale * q K^T) V over positions [0, own position], causal
//
// q, out [tokens, num_heads * head_dim]; k, v [tokens, num_kv_heads * head_dim]. The cache holds float16, per block and KV
// head K as [head_dim][slot] and V as [slot][padded head_dim]. Everything is read back from it, the step's own keys too.
// Keys come in tiles of 32 and splits of 256 from position 0; the softmax restarts at each split and the partial results
// join in ascending order, in one unit (prefill) or in several (decode): a query's bits depend on its position alone. The
// query heads of one KV head are rows of the same tile of queries.
#include "simd.h"

#include <cmath>
#include <cstring>

namespace jilju::JILJU_ISA {
namespace {

constexpr int64_t kRowsPerUnit = 48;  // query rows that share an unpacked key tile: its unpacking costs < 10 % of the work

// What a thread keeps in its scratch for `rows` query rows.
struct Scratch {
    float* keys;     // [head_dim][32]
    float* values;   // [32][padded]
    float* queries;  // [rows][padded], scaled
    float* scores;   // [rows][32], then weights
    float* sums;     // [rows][8]: lanes of the softmax's denominator, of this split
    float* maxima;   // [rows], of this split
    float* outputs;  // [rows][padded], of this split
    float* joined;   // [rows][padded + 2], of the splits so far: outputs, denominator, maximum

    Scratch(float* p, int64_t rows, int64_t head_dim, int64_t padded) {
        const auto take = [&](int64_t n) { float* at = p; p += (n + 15) / 16 * 16; return at; };
        keys = take(head_dim * kKeyTile);
        values = take(kKeyTile * padded);
        queries = take(rows * padded);
        scores = take(rows * kKeyTile);
        sums = take(rows * 8);
        maxima = take(rows);
        outputs = take(rows * padded);
        joined = take(rows * (padded + 2));
        end = p;
    }
    float* end;
};

// --- cache ------------------------------------------------------------------------------------------------------------

void write_token(const AttentionOp& op, const Step& step, int64_t t) {
    const KvCache& kv = step.kv;
    const float* k = step.at(op.k, t);
    const float* v = step.at(op.v, t);
    const int64_t slot = step.token_slots[t];
    for (int64_t h = 0; h < step.program->num_kv_heads; ++h, k += kv.head_dim, v += kv.head_dim) {
        uint16_t* keys = kv.data + op.layer * kv.layer_stride + step.token_blocks[t] * kv.block_stride + h * kv.head_stride;
        uint16_t* values = keys + kv.head_dim * kv.block_size + slot * kv.padded_head_dim;
        for (int64_t d = 0; d < kv.head_dim; d += 8) {
            const int n = static_cast<int>(min_int(8, kv.head_dim - d));
            uint16_t half[8];
            store_f16(half, load_n(k + d, n));
            for (int i = 0; i < n; ++i) keys[(d + i) * kv.block_size + slot] = half[i];
            store_f16(values + d, load_n(v + d, n));
        }
    }
}

// Unpack the 32 keys from `position`; values of keys from `end` on are zeros, whatever an earlier owner left there.
void read_tile(const KvCache& kv, const int32_t* blocks, int64_t layer, int64_t head, int64_t position, int64_t end, const Scratch& s) {
    for (int64_t run = 0; run < kKeyTile; run += 16) {  // 16 keys never cross a block
        const int64_t at = position + run;
        float* keys = s.keys + run;
        float* values = s.values + run * kv.padded_head_dim;
        const int64_t num_valid = max_int(0, min_int(16, end - at));
        if (num_valid) {
            const uint16_t* from = kv.data + layer * kv.layer_stride + blocks[at / kv.block_size] * kv.block_stride + head * kv.head_stride;
            const int64_t slot = at % kv.block_size;
            for (int64_t d = 0; d < kv.head_dim; ++d) {
                store(keys + d * kKeyTile, load_f16(from + d * kv.block_size + slot));
                store(keys + d * kKeyTile + 8, load_f16(from + d * kv.block_size + slot + 8));
            }
            const uint16_t* v = from + kv.head_dim * kv.block_size + slot * kv.padded_head_dim;
            for (int64_t i = 0; i < num_valid * kv.padded_head_dim; i += 8) store(values + i, load_f16(v + i));
        } else {
            for (int64_t d = 0; d < kv.head_dim; ++d) {
                store(keys + d * kKeyTile, zero());
                store(keys + d * kKeyTile + 8, zero());
            }
        }
        for (int64_t i = num_valid * kv.padded_head_dim; i < 16 * kv.padded_head_dim; i += 8) store(values + i, zero());
    }
}

// --- one key tile -----------------------------------------------------------------------------------------------------

// scores[r][0..32) = queries[r] . keys, one chain over d a score.
template <int kRows>
void score(const Scratch& s, int64_t row, int64_t head_dim, int64_t padded) {
    const float* q = s.queries + row * padded;
    F32 acc[kRows][4];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = zero();
    for (int64_t d = 0; d < head_dim; ++d) {
        F32 key[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) key[i] = load(s.keys + d * kKeyTile + 8 * i);
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) {
            const F32 x = set1(q[r * padded + d]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) acc[r][i] = fma(x, key[i], acc[r][i]);
        }
    }
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(s.scores + (row + r) * kKeyTile + 8 * i, acc[r][i]);
}

// Scores of the first num_visible keys -> weights; the others weigh exactly 0. Rescales what the split has so far.
void soften(const Scratch& s, int64_t row, int64_t num_visible, int64_t padded) {
    float* scores = s.scores + row * kKeyTile;
    const F32 lowest = set1(-INFINITY);
    F32 x[4], top = lowest;
    for (int i = 0; i < 4; ++i) {
        x[i] = load(scores + 8 * i);
        if (num_visible < 8 * i + 8) x[i] = first_n(x[i], static_cast<int>(max_int(0, num_visible - 8 * i)), lowest);
        top = max(top, x[i]);
    }
    const float before = s.maxima[row], tile_max = max_lane(top), now = before > tile_max ? before : tile_max;
    for (int i = 0; i < 4; ++i) {
        x[i] = exp(sub(x[i], set1(now)));
        store(scores + 8 * i, x[i]);
    }
    const F32 weights = add(add(x[0], x[1]), add(x[2], x[3]));
    float* sums = s.sums + row * 8;
    if (now == before) {
        store(sums, add(load(sums), weights));
    } else {
        const F32 shrink = set1(exp_one(before - now));
        store(sums, fma(load(sums), shrink, weights));
        for (int64_t d = 0; d < padded; d += 8) store(s.outputs + row * padded + d, mul(load(s.outputs + row * padded + d), shrink));
        s.maxima[row] = now;
    }
}

// outputs[r][d..) += weights[r] . values of the keys [begin, end), one chain over the keys an output.
template <int kRows, int kVectors>
void gather(const Scratch& s, int64_t row, int64_t d, int64_t begin, int64_t end, int64_t padded) {
    F32 acc[kRows][kVectors];
    float* out = s.outputs + row * padded + d;
    const float* weights = s.scores + row * kKeyTile;
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) acc[r][i] = load(out + r * padded + 8 * i);
    for (int64_t key = begin; key < end; ++key) {
        F32 value[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) value[i] = load(s.values + key * padded + d + 8 * i);
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) {
            const F32 w = set1(weights[r * kKeyTile + key]);
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) acc[r][i] = fma(w, value[i], acc[r][i]);
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) store(out + r * padded + 8 * i, acc[r][i]);
}

template <int kRows>
void gather_row(const Scratch& s, int64_t row, int64_t begin, int64_t end, int64_t padded) {
    int64_t d = 0;
    for (; d + 32 <= padded; d += 32) gather<kRows, 4>(s, row, d, begin, end, padded);
    for (; d < padded; d += 8) gather<kRows, 1>(s, row, d, begin, end, padded);
}

// All rows from `row` on, each over the keys that it sees: a value that it does not see may be infinite or NaN, and times a
// weight of 0 that would still be NaN. Three rows share what the first of them sees, which is the least.
template <class NumVisible>
void gather_rows(const Scratch& s, int64_t row, int64_t rows, int64_t padded, NumVisible&& num_visible) {
    for (; row + 3 <= rows; row += 3) {
        const int64_t shared = num_visible(row);
        gather_row<3>(s, row, 0, shared, padded);
        for (int64_t r = row + 1; r < row + 3; ++r)
            if (num_visible(r) > shared) gather_row<1>(s, r, shared, num_visible(r), padded);
    }
    for (; row < rows; ++row) gather_row<1>(s, row, 0, num_visible(row), padded);
}

// Join a split's partial result (outputs, denominator, maximum) to those before it.
void join(float* joined, const float* outputs, float denominator, float maximum, int64_t padded, bool first) {
    if (first) {
        std::memcpy(joined, outputs, static_cast<size_t>(padded) * sizeof(float));
        joined[padded] = denominator;
        joined[padded + 1] = maximum;
        return;
    }
    const float before = joined[padded + 1], now = before > maximum ? before : maximum;
    const F32 a = set1(exp_one(before - now)), b = set1(exp_one(maximum - now));
    for (int64_t d = 0; d < padded; d += 8) store(joined + d, fma(load(outputs + d), b, mul(load(joined + d), a)));
    float scaled[8];
    store(scaled, fma(set1(denominator), b, mul(set1(joined[padded]), a)));
    joined[padded] = scaled[0];
    joined[padded + 1] = now;
}

void write_output(const float* joined, float* out, int64_t head_dim, int64_t padded) {
    const F32 denominator = set1(joined[padded]);
    for (int64_t d = 0; d < head_dim; d += 8)
        store_n(out + d, div(load(joined + d), denominator), static_cast<int>(min_int(8, head_dim - d)));
}

// --- one unit ---------------------------------------------------------------------------------------------------------

void run_unit(const AttentionOp& op, const Step& step, const AttentionUnit& unit, int64_t kv_head, float* scratch) {
    const KvCache& kv = step.kv;
    const int64_t head_dim = kv.head_dim, padded = kv.padded_head_dim, group = op.num_heads / step.program->num_kv_heads;
    const Segment& segment = step.segments[unit.segment];
    const int64_t rows = unit.num_queries * group;  // row = query * group + head in the group
    const int64_t first_position = segment.start + unit.first_query, end = first_position + unit.num_queries;
    const int64_t first_token = segment.first_token + unit.first_query;
    const Scratch s(scratch, rows, head_dim, padded);
    const auto head_of = [&](int64_t row) { return kv_head * group + row % group; };

    for (int64_t row = 0; row < rows; ++row) {
        const float* q = step.at(op.q, first_token + row / group) + head_of(row) * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) s.queries[row * padded + d] = q[d] * op.scale;
    }
    for (int64_t split = unit.split_begin; split < unit.split_end; ++split) {
        const int64_t begin = split * kKeySplit, split_end = min_int(begin + kKeySplit, end);
        const int64_t first_row = max_int(0, begin - first_position) * group;  // queries before the split see none of it
        for (int64_t row = first_row; row < rows; ++row) s.maxima[row] = -INFINITY;
        std::memset(s.sums + first_row * 8, 0, static_cast<size_t>(rows - first_row) * 8 * sizeof(float));
        std::memset(s.outputs + first_row * padded, 0, static_cast<size_t>((rows - first_row) * padded) * sizeof(float));
        for (int64_t position = begin; position < split_end; position += kKeyTile) {
            read_tile(kv, segment.blocks, op.layer, kv_head, position, end, s);
            const int64_t seeing = max_int(0, position - first_position) * group;  // the first row that sees a key of the tile
            int64_t row = seeing;
            for (; row + 3 <= rows; row += 3) score<3>(s, row, head_dim, padded);
            for (; row < rows; ++row) score<1>(s, row, head_dim, padded);
            const auto num_visible = [&](int64_t r) { return min_int(kKeyTile, first_position + r / group + 1 - position); };
            for (row = seeing; row < rows; ++row) soften(s, row, num_visible(row), padded);
            gather_rows(s, seeing, rows, padded, num_visible);
        }
        for (int64_t row = first_row; row < rows; ++row) {
            const float denominator = sum(load(s.sums + row * 8));
            float* to = s.joined + row * (padded + 2);
            if (unit.partial >= 0) to = step.partials + ((unit.partial * step.program->num_kv_heads + kv_head) * group + row) * (padded + 2);
            join(to, s.outputs + row * padded, denominator, s.maxima[row], padded, unit.partial >= 0 || split == 0);
        }
    }
    if (unit.partial < 0)
        for (int64_t row = 0; row < rows; ++row)
            write_output(s.joined + row * (padded + 2), step.at(op.out, first_token + row / group) + head_of(row) * head_dim, head_dim, padded);
}

// Units of one query that stand one after another, a split each: join their partial results and write the output.
void join_unit(const AttentionOp& op, const Step& step, size_t first_unit, int64_t kv_head, float* scratch) {
    const KvCache& kv = step.kv;
    const int64_t padded = kv.padded_head_dim, group = op.num_heads / step.program->num_kv_heads;
    const Segment& segment = step.segments[step.units[first_unit].segment];
    for (int64_t row = 0; row < group; ++row) {
        for (size_t u = first_unit; u < step.units.size() && step.units[u].segment == step.units[first_unit].segment; ++u) {
            const float* partial = step.partials + ((step.units[u].partial * step.program->num_kv_heads + kv_head) * group + row) * (padded + 2);
            join(scratch, partial, partial[padded], partial[padded + 1], padded, u == first_unit);
        }
        write_output(scratch, step.at(op.out, segment.first_token) + (kv_head * group + row) * kv.head_dim, kv.head_dim, padded);
    }
}

}  // namespace

int64_t attention_queries_per_unit(int group) { return max_int(1, kRowsPerUnit / group); }

int64_t attention_scratch_floats(int group, int64_t head_dim, int64_t padded) {
    const int64_t rows = attention_queries_per_unit(group) * group;
    return Scratch(nullptr, rows, head_dim, padded).end - static_cast<float*>(nullptr);
}

void attention(const AttentionOp& op, Step& step, Pool& pool) {
    const int64_t heads = step.program->num_kv_heads, num_units = static_cast<int64_t>(step.units.size());
    pool.for_tiles(step.num_tokens, [&](int64_t t, float*) { write_token(op, step, t); });
    // last units first: they see the most keys, and what is left at the end should be small
    pool.for_tiles(num_units * heads, [&](int64_t i, float* scratch) {
        const int64_t unit = num_units - 1 - i / heads;
        run_unit(op, step, step.units[unit], i % heads, scratch);
    });
    if (step.num_partials == 0) return;
    pool.for_tiles(num_units * heads, [&](int64_t i, float* scratch) {
        const AttentionUnit& unit = step.units[i / heads];
        if (unit.partial >= 0 && unit.split_begin == 0) join_unit(op, step, i / heads, i % heads, scratch);
    });
}

}  // namespace jilju::JILJU_ISA
