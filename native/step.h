// Step: what the kernels see of a batch while it runs, and the table of kernels of one ISA.
//
// A step runs in tiles of at most kTileTokens tokens, each through all ops, so that activations stay in the caches; the
// rows' K and V lie in the cache by then, hence a tile is nothing but a chunk. Logit rows run in tiles of kTileLogits.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "pool.h"
#include "program.h"

namespace jilju {

inline constexpr int64_t kTileTokens = 256;
inline constexpr int64_t kTileLogits = 32;
inline constexpr int64_t kKeyTile = 32;    // keys of one softmax update
inline constexpr int64_t kKeySplit = 256;  // keys after which the softmax restarts, from position 0
inline constexpr int64_t kGroupIds = 256;  // ids of which sample keeps the largest logit
inline constexpr int64_t kStripIds = 4096;  // ids that sample sums up together: 16 KiB of logits, half of L1
inline constexpr int kMaxTop = 20;
inline constexpr int64_t kMaxBiases = 1024;
inline constexpr int64_t kMaxWanted = 128;
inline constexpr int64_t kMasksWaitS = 10;  // plan/batch.py

struct BatchView {
    int64_t num_tokens, num_rows, max_blocks, num_logits;
    const int32_t* token_ids;
    const int32_t* starts;
    const int32_t* counts;
    const int32_t* block_tables;  // [num_rows, max_blocks]
    const int32_t* logit_tokens;
    const int32_t* targets;
    const int64_t* positions;
    const uint64_t* seeds;
    const float* temperatures;
    const int32_t* top_ks;
    const float* top_ps;
    const float* min_ps;
    const int32_t* num_top;
    const float* repetition_penalties;
    const float* presence_penalties;
    const float* frequency_penalties;
    const int32_t* penalty_starts;
    const int32_t* penalty_ids;
    const int32_t* penalty_counts;
    const int32_t* bias_starts;
    const int32_t* bias_ids;
    const float* biases;
    const int32_t* banned_starts;
    const int32_t* banned_ids;
    const int32_t* wanted_starts;
    const int32_t* wanted_ids;
    const int32_t* mask_rows;
    const uint32_t* masks;  // [num_masks, mask_words]
    const int32_t* masks_ready;  // becomes 1 when others have filled them
    int64_t num_penalty_ids, num_bias_ids, num_banned_ids, num_wanted_ids, num_masks, mask_words;
};

struct ResultView {
    int32_t* token_ids;
    float* logprobs;
    int32_t* top_ids;       // [num_logits, kMaxTop]
    float* top_logprobs;    // [num_logits, kMaxTop]
    float* wanted_logprobs; // of the batch's wanted_ids
    bool* finite;
};

// The part of a row that lies in this tile.
struct Segment {
    const int32_t* blocks;
    int64_t start;        // position of its first token
    int64_t count;
    int64_t first_token;  // index in the tile
};

// A piece of attention for one KV head: some queries of a segment over some splits of the keys.
struct AttentionUnit {
    int segment;
    int64_t first_query, num_queries;  // within the segment
    int64_t split_begin, split_end;
    int64_t partial = -1;  // index of its partial result; -1: the unit covers all splits and writes the output
    int64_t first_partial = 0, num_splits = 0;  // of the query, if its splits are units of their own
};

struct KvCache {
    uint8_t* data;
    KvType type;
    int64_t block_size, num_blocks;
    int64_t head_dim, padded_head_dim;  // values are padded to whole vectors
    int64_t head_bytes, block_bytes, layer_bytes;  // from one head, block and layer to the next
};

// What sample knows of a strip of a logit row.
struct StripSummary {
    float largest;
    float sum;         // of exp(logit - largest)
    float scaled_sum;  // of exp((logit - largest) / temperature), where a draw needs it
    bool finite;
};

struct Step {
    const Program* program;
    KvCache kv;
    BatchView batch;
    ResultView result;
    // the tile of tokens
    const int32_t* token_ids;
    int64_t num_tokens;
    std::vector<Segment> segments;
    std::vector<int64_t> token_positions;
    std::vector<int64_t> token_blocks, token_slots;  // where each token's K and V go
    std::vector<AttentionUnit> units;
    int64_t num_partials;          // per KV head
    float* partials;               // [num_partials, num_kv_heads, group, padded_head_dim + 2]
    std::atomic<int32_t>* splits_done;  // [num_partials, num_kv_heads], at a query's first partial; zeros between ops
    std::vector<float*> rope;      // per table: [token][cos[half], sin[half]]
    int8_t* quantized;             // the rows of a linear's input (ops/linear_packed.h)
    int64_t own_rows_at;           // floats from a thread's scratch to the few rows that it quantizes for itself
    uint64_t num_linears = 0;      // that have begun, of all steps: by it a thread knows those rows
    // the tile of logit rows
    int64_t first_logit, num_logits;
    int64_t first_token;           // of the token tile, in the batch
    float* group_largest;          // [num_logits, vocab / kGroupIds rounded up]
    StripSummary* strips;          // [num_logits, vocab / kStripIds rounded up]

    float* at(const Value& v, int64_t row) const {
        const Buffer& b = program->buffers[v.buffer];
        return b.data + row * b.stride + v.offset;
    }
    int64_t stride(const Value& v) const { return program->buffers[v.buffer].stride; }
    int64_t rows(const Value& v) const { return v.logits ? num_logits : num_tokens; }
};

// What one ISA offers. An op gives its tiles to the pool and returns when they are done.
struct KernelSet {
    const char* name;
    int64_t (*scratch_floats)(const Program&);  // of one thread
    int64_t (*own_rows_at)(const Program&);     // where in it linear keeps what must outlive other ops
    int64_t (*queries_per_unit)(int group);
    void (*rope_tables)(Step&, Pool&);
    void (*embed)(const EmbedOp&, Step&, Pool&);
    void (*rms_norm)(const RmsNormOp&, Step&, Pool&);
    void (*linear)(const LinearOp&, Step&, Pool&);
    void (*rope)(const RopeOp&, Step&, Pool&);
    void (*attention)(const AttentionOp&, Step&, Pool&);
    void (*glu)(const GluOp&, Step&, Pool&);
    void (*take_rows)(const TakeRowsOp&, Step&, Pool&);
    void (*sample)(const SampleOp&, Step&, Pool&);
    // probes, for tests and micro-benchmarks
    void (*multiply_strip)(Family, int64_t num_columns, const uint8_t* strip, int64_t num_blocks, const int8_t* columns, float* out);
    void (*unpack)(const Weight&, int64_t row, float* out);
    void (*exp)(const float* x, float* out, int64_t n);
};

const KernelSet& generic_kernels();
#if defined(JILJU_HAVE_AVX2)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#elif defined(JILJU_HAVE_NEON)
const KernelSet& neon_kernels();
#endif

}  // namespace jilju
