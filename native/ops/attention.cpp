// attention: write k, v to the row's slots, then out = softmax(scale * q K^T) V over positions [0, own position], causal
//
// q, out [tokens, num_heads * head_dim]; k, v [tokens, num_kv_heads * head_dim]. Ropes of q and k that the plan has right
// before are done in the same pass as the write. The cache holds, per block and KV head, K as [head_dim][slot] and V as [slot]
// [padded head_dim], in float16; or in int8, with a float32 scale of each slot's K and of its V behind them. Everything is read back from it, the step's own keys too. Keys come in tiles of 32 and splits
// of 256 from position 0; the softmax restarts at each split and the partial results join in ascending order, in one unit
// (prefill) or in several (decode): a query's bits depend on its position alone. The query heads of one KV head are rows of
// the same tile of queries. Scores and maxima are in units of log2: weights are powers of two.
#include "simd.h"

#include <atomic>
#include <cmath>
#include <cstring>

namespace jilju::JILJU_ISA {
namespace {

constexpr int64_t kRowsPerUnit = 96;    // query rows that share an unpacked key tile: its unpacking costs < 3 % of the work
constexpr int64_t kRowsToUnpackFor = 13;  // fewer rows than these read the cache's numbers in place: each is used twice or less
// Rows of a register tile, whose sums and one row of vectors must fit the registers: 6 x 16 keys and 3 x 32, or 7 x 32.
constexpr int64_t kMaxRows = kRegisters == 32 ? 7 : 6;
constexpr bool fits(int rows, int vectors) { return rows * vectors + vectors <= kRegisters; }
constexpr int64_t kRowsTogether = 24;  // their scores stay in L1
constexpr int64_t kRun = 16;            // keys that never cross a block; a tile has two runs
constexpr int64_t kTokensPerTile = 16;  // of a prompt: tokens of one block are mostly written by one thread, for they share cache lines
constexpr float kLog2e = 1.44269504f;
constexpr float kSlack = 8.0f;          // a split's maximum is raised only if weights would exceed 2^8: most tiles rescale nothing

// What a thread keeps in its scratch for `rows` query rows.
struct Scratch {
    float* keys;     // [2][head_dim][16]
    float* values;   // [32][padded]
    float* queries;  // [rows][head_dim], scaled
    float* scores;   // [kRowsTogether][32], then weights
    float* sums;     // [rows][8]: lanes of the softmax's denominator, of this split
    float* maxima;   // [rows], of this split
    float* outputs;  // [rows][padded], of this split
    float* joined;   // [rows][padded + 2], of the splits so far: outputs, denominator, maximum

    Scratch(float* p, int64_t rows, int64_t head_dim, int64_t padded) {
        const auto take = [&](int64_t n) { float* at = p; p += ceil_div(n, 16) * 16; return at; };
        keys = take(head_dim * kKeyTile);
        values = take(kKeyTile * padded);
        queries = take(rows * head_dim);
        scores = take(kRowsTogether * kKeyTile);
        sums = take(rows * 8);
        maxima = take(rows);
        outputs = take(rows * padded);
        joined = take(rows * (padded + 2));
        end = p;
    }
    float* end;
};

// --- cache ------------------------------------------------------------------------------------------------------------

JILJU_INLINE F32 load_element(const uint16_t* p) { return load_f16(p); }
JILJU_INLINE F32 load_element(const int8_t* p) { return load_i8(reinterpret_cast<const uint8_t*>(p)); }
JILJU_INLINE F32 load_element(const float* p) { return load(p); }

// Where the two runs of a key tile lie. A run that the queries do not see is that of the other, so that it may be read.
template <class Element>
struct Tile {
    const Element* keys[2];    // [head_dim][key_stride]
    const Element* values[2];  // [16][padded]
    int64_t key_stride;
    const float* key_scales[2];  // [16], or null: keys and values are what they are
    const float* value_scales[2];
    int64_t ahead_keys[2] = {0, 0}, ahead_values[2] = {0, 0};  // from these to the next tile's, which are fetched meanwhile

    void fetch(const Tile& next) {
        for (int run = 0; run < 2; ++run) {
            ahead_keys[run] = next.keys[run] - keys[run];
            ahead_values[run] = next.values[run] - values[run];
        }
    }
};

// A KV head's part of a block.
template <class Element>
struct BlockHead {
    Element* keys;    // [head_dim][block_size]
    Element* values;  // [block_size][padded]
    float* key_scales;  // [block_size], of int8
    float* value_scales;

    BlockHead(const KvCache& kv, int64_t layer, int64_t block, int64_t head) {
        keys = reinterpret_cast<Element*>(kv.data + layer * kv.layer_bytes + block * kv.block_bytes + head * kv.head_bytes);
        values = keys + kv.head_dim * kv.block_size;
        key_scales = reinterpret_cast<float*>(values + kv.block_size * kv.padded_head_dim);
        value_scales = key_scales + kv.block_size;
    }
};

template <class Element>
Tile<Element> tile_of(const KvCache& kv, const int32_t* blocks, int64_t layer, int64_t head, int64_t position, int64_t end) {
    Tile<Element> tile{{}, {}, kv.block_size, {}, {}, {}, {}};
    for (int64_t run = 0; run < 2; ++run) {
        const int64_t at = position + kRun * run < end ? position + kRun * run : position, slot = at % kv.block_size;
        const BlockHead<Element> from(kv, layer, blocks[at / kv.block_size], head);
        tile.keys[run] = from.keys + slot;
        tile.values[run] = from.values + slot * kv.padded_head_dim;
        if constexpr (sizeof(Element) == 1) {
            tile.key_scales[run] = from.key_scales + slot;
            tile.value_scales[run] = from.value_scales + slot;
        }
    }
    return tile;
}

// The numbers alone: scales are applied to scores and weights, to the same bits whether a tile is unpacked or not.
template <class Element>
Tile<float> unpack(const KvCache& kv, const Tile<Element>& tile, const Scratch& s) {
    for (int64_t run = 0; run < 2; ++run) {
        float* keys = s.keys + run * kv.head_dim * kRun;
        for (int64_t d = 0; d < kv.head_dim; ++d)
            for (int64_t i = 0; i < kRun; i += 8) store(keys + d * kRun + i, load_element(tile.keys[run] + d * tile.key_stride + i));
        float* values = s.values + run * kRun * kv.padded_head_dim;
        for (int64_t i = 0; i < kRun * kv.padded_head_dim; i += 8) store(values + i, load_element(tile.values[run] + i));
    }
    return {{s.keys, s.keys + kv.head_dim * kRun}, {s.values, s.values + kRun * kv.padded_head_dim}, kRun,
            {tile.key_scales[0], tile.key_scales[1]}, {tile.value_scales[0], tile.value_scales[1]}, {}, {}};
}

// Eight numbers at p, of which n count; the others are 0.
JILJU_INLINE F32 load_some(const float* p, int64_t n) { return n >= 8 ? load(p) : load_n(p, static_cast<int>(n)); }

// The scale of one head's int8: its largest magnitude becomes 127. NaN if a number is not finite, so that what is read is NaN.
float int8_scale(const float* x, int64_t n) {
    F32 largest = zero(), finite = zero();
    for (int64_t d = 0; d < n; d += 8) {
        const F32 a = load_some(x + d, n - d);
        largest = max(largest, max(a, sub(zero(), a)));
        finite = fma(a, zero(), finite);  // 0, or NaN
    }
    return max_lane(largest) / 127.0f + sum(finite);
}

// Numbers below the smallest normal scale are 0.
float int8_factor(float scale) { return scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f; }

void write_head(const KvCache& kv, const BlockHead<uint16_t>& to, int64_t slot, const float* k, const float* v) {
    for (int64_t d = 0; d < kv.head_dim; d += 8) {
        const int64_t n = min_int(8, kv.head_dim - d);
        uint16_t key[8];
        store_f16(key, load_some(k + d, n));
        for (int64_t i = 0; i < n; ++i) to.keys[(d + i) * kv.block_size + slot] = key[i];
        store_f16(to.values + slot * kv.padded_head_dim + d, load_some(v + d, n));
    }
}

void write_head(const KvCache& kv, const BlockHead<int8_t>& to, int64_t slot, const float* k, const float* v) {
    to.key_scales[slot] = int8_scale(k, kv.head_dim);
    to.value_scales[slot] = int8_scale(v, kv.head_dim);
    const F32 key_factor = set1(int8_factor(to.key_scales[slot])), value_factor = set1(int8_factor(to.value_scales[slot]));
    for (int64_t d = 0; d < kv.head_dim; d += 8) {
        const int64_t n = min_int(8, kv.head_dim - d);
        int8_t key[8];
        store_i8(key, mul(load_some(k + d, n), key_factor));
        for (int64_t i = 0; i < n; ++i) to.keys[(d + i) * kv.block_size + slot] = key[i];
        store_i8(to.values + slot * kv.padded_head_dim + d, mul(load_some(v + d, n), value_factor));
    }
}

// Rotate q and k of one token where the op says so, and write k and v to its slot.
template <class Element>
void write_token(const AttentionOp& op, const Step& step, int64_t t) {
    if (op.rope_q) rotate(*op.rope_q, step, t);
    if (op.rope_k) rotate(*op.rope_k, step, t);
    const KvCache& kv = step.kv;
    for (int64_t h = 0; h < step.program->num_kv_heads; ++h)
        write_head(kv, BlockHead<Element>(kv, op.layer, step.token_blocks[t], h), step.token_slots[t], step.at(op.k, t) + h * kv.head_dim,
                   step.at(op.v, t) + h * kv.head_dim);
}

// --- one key tile, a few rows -----------------------------------------------------------------------------------------

// acc[r][i] += x(r) * y(i), holding the fewer of both in registers.
template <int kRows, int kVectors, class X, class Y>
JILJU_INLINE void accumulate(F32 (&acc)[kRows][kVectors], X&& x, Y&& y) {
    if constexpr (kRows < kVectors) {
        F32 held[kRows];
#pragma GCC unroll 7
        for (int r = 0; r < kRows; ++r) held[r] = x(r);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            const F32 vector = y(i);
#pragma GCC unroll 7
            for (int r = 0; r < kRows; ++r) acc[r][i] = fma(held[r], vector, acc[r][i]);
        }
    } else {
        F32 held[kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) held[i] = y(i);
#pragma GCC unroll 7
        for (int r = 0; r < kRows; ++r) {
            const F32 scalar = x(r);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) acc[r][i] = fma(scalar, held[i], acc[r][i]);
        }
    }
}

// scores[r][16 run + i] = queries[r] . keys[run][i] for the runs [first_run, first_run + kRuns), one chain over d a score.
template <int kRows, int kRuns, class Element>
JILJU_INLINE void score_runs(const Tile<Element>& tile, const float* queries, int64_t head_dim, float* scores, int first_run) {
    F32 acc[kRows][2 * kRuns];
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kRuns; ++i) acc[r][i] = zero();
    const Element* keys[kRuns];
#pragma GCC unroll 2
    for (int run = 0; run < kRuns; ++run) keys[run] = tile.keys[first_run + run];
    for (int64_t d = 0; d < head_dim; ++d) {
        if constexpr (sizeof(Element) < sizeof(float))
#pragma GCC unroll 2
            for (int run = 0; run < kRuns; ++run) prefetch(keys[run] + d * tile.key_stride + tile.ahead_keys[first_run + run]);
        accumulate<kRows, 2 * kRuns>(acc, [&](int r) { return set1(queries[r * head_dim + d]); },
                                     [&](int i) { return load_element(keys[i / 2] + d * tile.key_stride + i % 2 * 8); });
    }
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kRuns; ++i) {
            const float* scales = tile.key_scales[first_run + i / 2];
            store(scores + r * kKeyTile + first_run * kRun + 8 * i, scales ? mul(acc[r][i], load(scales + i % 2 * 8)) : acc[r][i]);
        }
}

// Of the keys [begin, end) of the tile, by whole runs.
template <int kRows, class Element>
void score(const Tile<Element>& tile, const float* queries, int64_t head_dim, float* scores, int64_t begin, int64_t end) {
    const bool first = begin < kRun, second = end > kRun;
    if constexpr (fits(kRows, 4)) {
        if (first && second) return score_runs<kRows, 2>(tile, queries, head_dim, scores, 0);
    }
    if (first) score_runs<kRows, 1>(tile, queries, head_dim, scores, 0);
    if (second) score_runs<kRows, 1>(tile, queries, head_dim, scores, 1);
}

// Scores of the keys [begin, end) -> weights, times the values' scales if they have any; the others weigh exactly 0, or NaN
// if nobody ever wrote them. Rescales what the split has so far if it must.
JILJU_INLINE void soften(float* scores, const float* const* scales, int64_t begin, int64_t end, float* sums, float* maximum, float* outputs, int64_t padded) {
    const F32 lowest = set1(-INFINITY);
    F32 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = load(scores + 8 * i);
    if (begin > 0 || end < kKeyTile) {
        for (int i = 0; i < 4; ++i) {
            x[i] = first_n(x[i], static_cast<int>(max_int(0, end - 8 * i)), lowest);
            x[i] = first_n(lowest, static_cast<int>(max_int(0, begin - 8 * i)), x[i]);
        }
    }
    const F32 top = max(max(x[0], x[1]), max(x[2], x[3]));
    const float before = *maximum;
    float now = before;
    if (any_less(set1(before + kSlack), top)) now = *maximum = max_lane(top);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        x[i] = exp2(sub(x[i], set1(now)));
        store(scores + 8 * i, scales[0] ? mul(x[i], load(scales[i / 2] + i % 2 * 8)) : x[i]);
    }
    const F32 weights = add(add(x[0], x[1]), add(x[2], x[3]));
    if (now == before) {
        store(sums, add(load(sums), weights));
    } else if (before == -INFINITY) {  // nothing so far: outputs are zeros
        store(sums, weights);
    } else {
        const F32 shrink = exp2(set1(before - now));
        store(sums, fma(load(sums), shrink, weights));
        for (int64_t d = 0; d < padded; d += 8) store(outputs + d, mul(load(outputs + d), shrink));
    }
}

// outputs[r][d..) += weights[r] . values of the keys [begin, end), one chain over the keys an output.
template <int kRows, int kVectors, class Element>
JILJU_INLINE void gather_columns(const Tile<Element>& tile, const float* weights, float* out, int64_t d, int64_t begin, int64_t end, int64_t padded) {
    F32 acc[kRows][kVectors];
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) acc[r][i] = load(out + r * padded + d + 8 * i);
    constexpr int64_t kLine = 64 / sizeof(Element);  // elements of a cache line
    for (int64_t run = 0; run < 2; ++run) {
        const Element* values = tile.values[run] - run * kRun * padded + d;
        const int64_t run_end = min_int(end, kRun * (run + 1));
        for (int64_t key = max_int(begin, kRun * run); key < run_end; ++key) {
            if constexpr (sizeof(Element) < sizeof(float))
#pragma GCC unroll 4
                for (int i = 0; i < kVectors; i += kLine / 8) prefetch(values + key * padded + 8 * i + tile.ahead_values[run]);
            accumulate<kRows, kVectors>(acc, [&](int r) { return set1(weights[r * kKeyTile + key]); },
                                        [&](int i) { return load_element(values + key * padded + 8 * i); });
        }
    }
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) store(out + r * padded + d + 8 * i, acc[r][i]);
}

template <int kRows, class Element>
void gather(const Tile<Element>& tile, const float* weights, float* out, int64_t begin, int64_t end, int64_t padded) {
    if (begin >= end) return;
    constexpr int kVectors = fits(kRows, 8) ? 8 : fits(kRows, 4) ? 4 : 2;
    int64_t d = 0;
    for (; d + 8 * kVectors <= padded; d += 8 * kVectors) gather_columns<kRows, kVectors>(tile, weights, out, d, begin, end, padded);
    for (; d < padded; d += 8) gather_columns<kRows, 1>(tile, weights, out, d, begin, end, padded);
}

// Keys [begin, end) of a tile.
struct Range {
    int64_t begin, end;
};

// outputs of rows [row, row + kRows) += their weights . values, `seen(r)` being what each sees of the tile. A value that a
// row does not see may be infinite or NaN, and times a weight of 0 that would still be NaN: the rows share what all of them
// see, the rest is each row's own, in the order of the keys.
template <int kRows, class Element, class Seen>
void gather_rows(const Tile<Element>& tile, const float* weights, float* outputs, int64_t row, int64_t padded, Seen&& seen) {
    Range all = seen(row);
    bool alike = true;
    for (int r = 1; r < kRows; ++r) {
        const Range range = seen(row + r);
        alike &= range.begin == all.begin && range.end == all.end;
        all = {max_int(all.begin, range.begin), min_int(all.end, range.end)};
    }
    if (alike) return gather<kRows>(tile, weights, outputs, all.begin, all.end, padded);
    if (all.begin >= all.end) all = {kKeyTile, kKeyTile};
    for (int r = 0; r < kRows; ++r) {
        const Range range = seen(row + r);
        gather<1>(tile, weights + r * kKeyTile, outputs + r * padded, range.begin, min_int(all.begin, range.end), padded);
    }
    gather<kRows>(tile, weights, outputs, all.begin, all.end, padded);
    for (int r = 0; r < kRows; ++r) gather<1>(tile, weights + r * kKeyTile, outputs + r * padded, all.end, seen(row + r).end, padded);
}

// body.operator()<kRows>(row) for the rows [begin, end), in register tiles as equal as can be.
template <class Body>
JILJU_INLINE void for_rows(int64_t begin, int64_t end, Body&& body) {
    while (begin < end) {
        const int64_t rows = ceil_div(end - begin, ceil_div(end - begin, kMaxRows));
        switch (rows) {
            case 1: body.template operator()<1>(begin); break;
            case 2: body.template operator()<2>(begin); break;
            case 3: body.template operator()<3>(begin); break;
            case 4: body.template operator()<4>(begin); break;
            case 5: body.template operator()<5>(begin); break;
            case 6: body.template operator()<6>(begin); break;
            default: body.template operator()<kMaxRows>(begin); break;
        }
        begin += rows;
    }
}

// One key tile for rows [begin, end), some at a time, so that the work of one on its exponentials hides behind another's.
template <class Element, class Seen>
void attend(const Tile<Element>& tile, const Scratch& s, int64_t begin, int64_t end, int64_t head_dim, int64_t padded, Seen&& seen) {
    for (int64_t first = begin; first < end; first += kRowsTogether) {
        const int64_t last = min_int(first + kRowsTogether, end);
        for_rows(first, last, [&]<int kRows>(int64_t row) {
            const Range low = seen(row), high = seen(row + kRows - 1);  // later rows see later keys
            score<kRows>(tile, s.queries + row * head_dim, head_dim, s.scores + (row - first) * kKeyTile, low.begin, high.end);
        });
        for (int64_t row = first; row < last; ++row) {
            const Range range = seen(row);
            soften(s.scores + (row - first) * kKeyTile, tile.value_scales, range.begin, range.end, s.sums + row * 8, s.maxima + row, s.outputs + row * padded, padded);
        }
        for_rows(first, last, [&]<int kRows>(int64_t row) {
            gather_rows<kRows>(tile, s.scores + (row - first) * kKeyTile, s.outputs + row * padded, row, padded, seen);
        });
    }
}

// --- splits -----------------------------------------------------------------------------------------------------------

// Join a split's partial result (outputs, denominator, maximum) to those before it.
void join(float* joined, const float* outputs, float denominator, float maximum, int64_t padded, bool first) {
    if (first) {
        std::memcpy(joined, outputs, static_cast<size_t>(padded) * sizeof(float));
        joined[padded] = denominator;
        joined[padded + 1] = maximum;
        return;
    }
    const float before = joined[padded + 1], now = before > maximum ? before : maximum;
    const F32 a = exp2(set1(before - now)), b = exp2(set1(maximum - now));
    for (int64_t d = 0; d < padded; d += 8) store(joined + d, fma(load(outputs + d), b, mul(load(joined + d), a)));
    float scaled[8];
    store(scaled, fma(set1(denominator), b, mul(set1(joined[padded]), a)));
    joined[padded] = scaled[0];
    joined[padded + 1] = now;
}

void write_output(const float* joined, float* out, int64_t head_dim, int64_t padded) {
    const F32 denominator = set1(joined[padded]);
    const int64_t whole = head_dim / 8 * 8;
    for (int64_t d = 0; d < whole; d += 8) store(out + d, div(load(joined + d), denominator));
    if (whole < head_dim) store_n(out + whole, div(load(joined + whole), denominator), static_cast<int>(head_dim - whole));
}

// --- one unit ---------------------------------------------------------------------------------------------------------

// The first key that the query at `position` sees.
int64_t first_key(const AttentionOp& op, int64_t position) { return op.window ? max_int(0, position + 1 - op.window) : 0; }

float* partial_of(const Step& step, int64_t partial, int64_t kv_head, int64_t row) {
    const int64_t group = step.program->group;
    return step.partials + ((partial * step.program->num_kv_heads + kv_head) * group + row) * (step.kv.padded_head_dim + 2);
}

// The key tile that the unit begins with.
template <class Element>
Tile<Element> first_tile(const AttentionOp& op, const Step& step, const AttentionUnit& unit, int64_t kv_head) {
    const Segment& segment = step.segments[unit.segment];
    const int64_t first_position = segment.start + unit.first_query;
    const int64_t position = max_int(unit.split_begin * kKeySplit, first_key(op, first_position) / kKeyTile * kKeyTile);
    return tile_of<Element>(step.kv, segment.blocks, op.layer, kv_head, position, first_position + unit.num_queries);
}

// `next`: the tile that this thread will most likely read after the unit's last.
template <class Element>
void run_unit(const AttentionOp& op, const Step& step, const AttentionUnit& unit, int64_t kv_head, const Tile<Element>& next, float* scratch) {
    const KvCache& kv = step.kv;
    const int64_t head_dim = kv.head_dim, padded = kv.padded_head_dim, group = op.num_heads / step.program->num_kv_heads;
    const Segment& segment = step.segments[unit.segment];
    const int64_t rows = unit.num_queries * group;  // row = query * group + head in the group
    const int64_t first_position = segment.start + unit.first_query, end = first_position + unit.num_queries;
    const int64_t first_token = segment.first_token + unit.first_query;
    const Scratch s(scratch, rows, head_dim, padded);
    const auto head_of = [&](int64_t row) { return kv_head * group + row % group; };
    const auto position_of = [&](int64_t row) { return first_position + row / group; };
    // Rows [.., ..) that see one of the keys [from, to): of both, a row's first and last key, the later rows' are later.
    const auto rows_seeing = [&](int64_t from, int64_t to) -> Range {
        const int64_t last = op.window ? min_int(unit.num_queries, to - 1 + op.window - first_position) : unit.num_queries;
        return {max_int(0, from - first_position) * group, max_int(0, last) * group};
    };

    const F32 scale = set1(op.scale * kLog2e);
    const int64_t whole = head_dim / 8 * 8;
    for (int64_t row = 0; row < rows; ++row) {
        const float* q = step.at(op.q, first_token + row / group) + head_of(row) * head_dim;
        float* query = s.queries + row * head_dim;
        for (int64_t d = 0; d < whole; d += 8) store(query + d, mul(load(q + d), scale));
        if (whole < head_dim) store_n(query + whole, mul(load_n(q + whole, static_cast<int>(head_dim - whole)), scale), static_cast<int>(head_dim - whole));
    }
    const int64_t visible = first_key(op, first_position);  // keys before this one are seen by no query of the unit
    for (int64_t split = max_int(unit.split_begin, visible / kKeySplit); split < unit.split_end; ++split) {
        const int64_t begin = split * kKeySplit, split_end = min_int(begin + kKeySplit, end);
        const Range in_split = rows_seeing(begin, split_end);
        for (int64_t row = in_split.begin; row < in_split.end; ++row) s.maxima[row] = -INFINITY;
        std::memset(s.sums + in_split.begin * 8, 0, static_cast<size_t>(in_split.end - in_split.begin) * 8 * sizeof(float));
        std::memset(s.outputs + in_split.begin * padded, 0, static_cast<size_t>((in_split.end - in_split.begin) * padded) * sizeof(float));
        for (int64_t position = max_int(begin, visible / kKeyTile * kKeyTile); position < split_end; position += kKeyTile) {
            const auto seen = [&](int64_t row) -> Range {
                return {max_int(0, first_key(op, position_of(row)) - position), min_int(kKeyTile, position_of(row) + 1 - position)};
            };
            const Range seeing = rows_seeing(position, min_int(position + kKeyTile, end));
            Tile<Element> tile = tile_of<Element>(kv, segment.blocks, op.layer, kv_head, position, end);
            if (rows < kRowsToUnpackFor) {
                const bool last = split + 1 == unit.split_end && position + kKeyTile >= split_end;
                tile.fetch(last ? next : tile_of<Element>(kv, segment.blocks, op.layer, kv_head, position + kKeyTile, end));
                attend(tile, s, seeing.begin, seeing.end, head_dim, padded, seen);
            } else {
                attend(unpack(kv, tile, s), s, seeing.begin, seeing.end, head_dim, padded, seen);
            }
        }
        for (int64_t row = in_split.begin; row < in_split.end; ++row) {
            const bool first = unit.partial >= 0 || split == first_key(op, position_of(row)) / kKeySplit;
            float* to = unit.partial >= 0 ? partial_of(step, unit.partial, kv_head, row) : s.joined + row * (padded + 2);
            join(to, s.outputs + row * padded, sum(load(s.sums + row * 8)), s.maxima[row], padded, first);
        }
    }
    if (unit.partial < 0)
        for (int64_t row = 0; row < rows; ++row)
            write_output(s.joined + row * (padded + 2), step.at(op.out, first_token + row / group) + head_of(row) * head_dim, head_dim, padded);
}

// A query whose splits are units of their own: join their partial results, ascending, and write the output.
void join_splits(const AttentionOp& op, const Step& step, const AttentionUnit& unit, int64_t kv_head, float* joined) {
    const KvCache& kv = step.kv;
    const int64_t padded = kv.padded_head_dim, group = op.num_heads / step.program->num_kv_heads;
    const Segment& segment = step.segments[unit.segment];
    const int64_t first_split = first_key(op, segment.start) / kKeySplit;
    for (int64_t row = 0; row < group; ++row) {
        for (int64_t split = first_split; split < unit.num_splits; ++split) {
            const float* partial = partial_of(step, unit.first_partial + split, kv_head, row);
            join(joined, partial, partial[padded], partial[padded + 1], padded, split == first_split);
        }
        write_output(joined, step.at(op.out, segment.first_token) + (kv_head * group + row) * kv.head_dim, kv.head_dim, padded);
    }
}

}  // namespace

int64_t attention_queries_per_unit(int group) { return max_int(1, kRowsPerUnit / group); }

int64_t attention_scratch_floats(int group, int64_t head_dim, int64_t padded) {
    const int64_t rows = attention_queries_per_unit(group) * group;
    return Scratch(nullptr, rows, head_dim, padded).end - static_cast<float*>(nullptr);
}

namespace {

template <class Element>
void attention_on(const AttentionOp& op, Step& step, Pool& pool) {
    const int64_t heads = step.program->num_kv_heads, num_units = static_cast<int64_t>(step.units.size());
    const int64_t tokens = min_int(kTokensPerTile, ceil_div(step.num_tokens, 2 * pool.num_threads()));
    pool.for_tiles(ceil_div(step.num_tokens, tokens), [&](int64_t i, float*) {
        const int64_t end = min_int((i + 1) * tokens, step.num_tokens);
        for (int64_t t = i * tokens; t < end; ++t) write_token<Element>(op, step, t);
    });
    // last units first: they see the most keys, and what is left at the end should be small
    const auto unit_at = [&](int64_t i) -> const AttentionUnit& { return step.units[num_units - 1 - i / heads]; };
    pool.for_tiles(num_units * heads, [&](int64_t i, float* scratch) {
        const AttentionUnit& unit = unit_at(i);
        const int64_t head = i % heads, following = min_int(i + 1, num_units * heads - 1);
        run_unit<Element>(op, step, unit, head, first_tile<Element>(op, step, unit_at(following), following % heads), scratch);
        if (unit.partial < 0) return;
        // whoever finishes the last split of a query joins all of them
        std::atomic<int32_t>& num_done = step.splits_done[unit.first_partial * heads + head];
        if (num_done.fetch_add(1, std::memory_order_acq_rel) + 1 < unit.num_splits) return;
        num_done.store(0, std::memory_order_relaxed);
        join_splits(op, step, unit, head, scratch);
    });
}

}  // namespace

void attention(const AttentionOp& op, Step& step, Pool& pool) {
    switch (step.kv.type) {
        case KvType::kF16: return attention_on<uint16_t>(op, step, pool);
        case KvType::kI8: return attention_on<int8_t>(op, step, pool);
    }
}

}  // namespace jilju::JILJU_ISA
