#include "model.h"

#include <sys/auxv.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <thread>

#include "pack.h"

namespace jilju {
namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded_head_dim(const Program& p) { return round_up(p.head_dim, 8); }
int64_t tile_tokens(const ModelLimits& l) { return std::min(l.max_tokens, kTileTokens); }

// Units of attention are made smaller while they are fewer than this many a thread: prefill's by queries, decode's by keys.
constexpr int64_t kUnitsPerThread = 4;

// The most partial results that attention keeps: few rows are split, each in as many splits as a context has.
int64_t max_partials(const Program& p, const ModelLimits& l) {
    if (l.num_threads == 1 || p.num_kv_heads == 0) return 0;
    return ceil_div(kUnitsPerThread * l.num_threads, p.num_kv_heads) * ceil_div(l.max_context, kKeySplit);
}

// Floats of each part of the workspace, in the order in which they lie there.
struct Workspace {
    std::vector<int64_t> buffers, rope;
    int64_t partials = 0, groups = 0, strips = 0, quantized = 0, scratch = 0, total = 0;

    Workspace(const Program& p, const ModelLimits& l, const KernelSet& kernels) {
        const auto part = [&](int64_t floats) {
            total += round_up(floats, 16);
            return round_up(floats, 16);
        };
        for (const Buffer& b : p.buffers) buffers.push_back(part(b.stride * (b.logits ? kTileLogits : tile_tokens(l)) + 16));
        for (const RopeTable& t : p.rope_tables) rope.push_back(part(t.head_dim * tile_tokens(l)));
        partials = part(max_partials(p, l) * p.num_kv_heads * p.group * (padded_head_dim(p) + 2));
        groups = part(kTileLogits * ceil_div(p.vocab_size, kGroupIds));
        strips = part(kTileLogits * ceil_div(p.vocab_size, kStripIds) * static_cast<int64_t>(sizeof(StripSummary) / sizeof(float)));
        int64_t bytes = 0;  // of the largest input of integer kernels
        for (const Op& op : p.ops) {
            const LinearOp* linear = std::get_if<LinearOp>(&op);
            if (!linear || linear->num_packed == 0) continue;
            const int64_t rows = linear->x.logits ? kTileLogits : tile_tokens(l);
            bytes = std::max(bytes, rows * (linear->x.width / kBlockColumns) * kQuantizedBytes);
        }
        quantized = part(ceil_div(bytes, sizeof(float)));
        scratch = part(kernels.scratch_floats(p) * l.num_threads);
    }
};

template <class... Bodies>
struct Overloaded : Bodies... {
    using Bodies::operator()...;
};

int64_t now_ns() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Memory::~Memory() {
    if (data_) munmap(data_, num_bytes_);
}

bool Memory::allocate(size_t num_bytes) {
    num_bytes_ = std::max<size_t>(num_bytes, 1);
    void* data = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return false;
    madvise(data, num_bytes_, MADV_HUGEPAGE);  // fewer TLB misses; a system without them refuses, which is fine
    data_ = data;
    return true;
}

namespace {

struct Isa {
    const char* name;
    bool (*is_supported)();
    const KernelSet& (*kernels)();
    const char* needs;
};
constexpr Isa kIsas[] = {  // best first
#if defined(JILJU_HAVE_AVX2)
    {"avx512", [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"); }, avx512_kernels, "AVX512 F, BW, VL, DQ and VNNI"},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }, avx2_kernels, "AVX2, FMA and F16C"},
#elif defined(JILJU_HAVE_NEON)
    {"neon", [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }, neon_kernels, "dot products of bytes, ASIMDDP"},
#endif
    {"generic", [] { return true; }, generic_kernels, ""},
};

}  // namespace

Status select_kernels(const std::string& name, const KernelSet** out) {
    std::string names;
    for (const Isa& isa : kIsas) {
        names += (names.empty() ? "" : ", ") + std::string(isa.name);
        if (!name.empty() && name != isa.name) continue;
        if (isa.is_supported()) {
            *out = &isa.kernels();
            return {};
        }
        if (!name.empty()) return Status::unsupported("the instruction set " + name + " was asked for, but this CPU lacks it (" + isa.needs + ")");
    }
    return Status::unsupported("the instruction set '" + name + "' is unknown here; allowed: " + names);
}

int64_t kv_bytes_per_token(const Program& p, KvType type) {
    const int64_t elements = p.head_dim + padded_head_dim(p), scales = 2 * sizeof(float);
    return static_cast<int64_t>(p.num_layers) * p.num_kv_heads * (type == KvType::kI8 ? elements + scales : elements * 2);
}

int64_t workspace_bytes(const Program& program, const ModelLimits& limits, const KernelSet& kernels) {
    return Workspace(program, limits, kernels).total * static_cast<int64_t>(sizeof(float));
}

Status Model::create(Program program, const ModelLimits& limits, const KernelSet& kernels, std::unique_ptr<Model>* out) {
    std::unique_ptr<Model> model(new Model(std::move(program), limits, kernels));
    Program& p = model->program_;
    for (const Weight& w : p.weights)
        if (w.family != Family::kFloat && !w.packed) return Status::invalid("the packed weights are missing");

    const int64_t kv_bytes = kv_bytes_per_token(p, limits.kv_type) * limits.block_size * limits.num_blocks;
    if (!model->kv_memory_.allocate(kv_bytes))
        return Status::no_memory("cannot have " + std::to_string(kv_bytes) + " bytes for the KV cache (" + std::to_string(limits.num_blocks) + " blocks of " +
                                 std::to_string(limits.block_size) + " tokens)");
    const Workspace workspace(p, limits, kernels);
    if (!model->workspace_memory_.allocate(workspace.total * sizeof(float)))
        return Status::no_memory("cannot have " + std::to_string(workspace.total * sizeof(float)) + " bytes for activations");

    KvCache& kv = model->step_.kv;
    kv.data = static_cast<uint8_t*>(model->kv_memory_.data());
    kv.type = limits.kv_type;
    kv.block_size = limits.block_size;
    kv.num_blocks = limits.num_blocks;
    kv.head_dim = p.head_dim;
    kv.padded_head_dim = padded_head_dim(p);
    kv.layer_bytes = p.num_layers ? kv_bytes / p.num_layers : 0;
    kv.block_bytes = kv.layer_bytes / limits.num_blocks;
    kv.head_bytes = p.num_kv_heads ? kv.block_bytes / p.num_kv_heads : 0;

    float* at = static_cast<float*>(model->workspace_memory_.data());
    for (size_t i = 0; i < p.buffers.size(); at += workspace.buffers[i++]) p.buffers[i].data = at;
    for (size_t i = 0; i < p.rope_tables.size(); at += workspace.rope[i++]) model->step_.rope.push_back(at);
    model->step_.partials = at;
    model->splits_done_ = std::vector<std::atomic<int32_t>>(max_partials(p, limits) * p.num_kv_heads);
    model->step_.splits_done = model->splits_done_.data();
    model->step_.group_largest = at += workspace.partials;
    model->step_.strips = reinterpret_cast<StripSummary*>(at += workspace.groups);
    model->step_.quantized = reinterpret_cast<int8_t*>(at += workspace.strips);
    model->step_.own_rows_at = kernels.own_rows_at(p);
    float* const scratch = at + workspace.quantized;

    const int64_t tokens = tile_tokens(limits);
    model->step_.segments.reserve(tokens);
    model->step_.token_positions.reserve(tokens);
    model->step_.token_blocks.reserve(tokens);
    model->step_.token_slots.reserve(tokens);
    model->step_.units.reserve(tokens + max_partials(p, limits));
    model->step_.program = &p;

    const Status status = Pool::create(limits.num_threads, scratch, kernels.scratch_floats(p), &model->pool_);
    if (!status.ok()) return status;
    *out = std::move(model);
    return {};
}

Status Model::check(const BatchView& b) const {
    const auto text = [](int64_t n) { return std::to_string(n); };
    if (b.num_tokens < 1 || b.num_tokens > limits_.max_tokens)
        return Status::invalid("a batch of " + text(b.num_tokens) + " tokens; allowed: 1.." + text(limits_.max_tokens));
    if (b.num_rows < 1 || b.num_rows > limits_.max_rows) return Status::invalid("a batch of " + text(b.num_rows) + " rows; allowed: 1.." + text(limits_.max_rows));
    for (int64_t t = 0; t < b.num_tokens; ++t)
        if (b.token_ids[t] < 0 || b.token_ids[t] >= program_.vocab_size)
            return Status::invalid("token id " + text(b.token_ids[t]) + " at index " + text(t) + "; allowed: 0.." + text(program_.vocab_size - 1));
    int64_t num_tokens = 0;
    for (int64_t r = 0; r < b.num_rows; ++r) {
        const int64_t start = b.starts[r], count = b.counts[r];
        if (start < 0 || count < 1 || start + count > limits_.max_context)
            return Status::invalid("row " + text(r) + " covers positions " + text(start) + " to " + text(start + count) + "; allowed: at least one, within 0.." + text(limits_.max_context));
        const int64_t needed = ceil_div(start + count, limits_.block_size);
        if (needed > b.max_blocks) return Status::invalid("row " + text(r) + " needs " + text(needed) + " blocks, its table has " + text(b.max_blocks));
        for (int64_t i = 0; i < needed; ++i) {
            const int64_t id = b.block_tables[r * b.max_blocks + i];
            if (id < 0 || id >= limits_.num_blocks) return Status::invalid("block id " + text(id) + " in row " + text(r) + "; allowed: 0.." + text(limits_.num_blocks - 1));
        }
        num_tokens += count;
    }
    if (num_tokens != b.num_tokens) return Status::invalid("the rows have " + text(num_tokens) + " tokens, the batch " + text(b.num_tokens));

    const auto check_list = [&](const char* what, const int32_t* starts, const int32_t* ids, int64_t num_ids, int64_t most, int64_t i) -> Status {
        if (starts[i] < 0 || starts[i] > starts[i + 1] || starts[i + 1] > num_ids) return Status::invalid(std::string(what) + "_starts do not ascend within the " + text(num_ids) + " ids");
        if (starts[i + 1] - starts[i] > most) return Status::invalid("logit row " + text(i) + " has " + text(starts[i + 1] - starts[i]) + " " + what + " ids; allowed: " + text(most));
        for (int64_t j = starts[i]; j < starts[i + 1]; ++j)
            if (ids[j] < 0 || ids[j] >= program_.vocab_size) return Status::invalid(std::string(what) + " id " + text(ids[j]) + "; allowed: 0.." + text(program_.vocab_size - 1));
        return {};
    };
    if (b.num_masks > 0 && b.mask_words != ceil_div(program_.vocab_size, 32))
        return Status::invalid("masks have " + text(b.mask_words) + " words; the vocabulary needs " + text(ceil_div(program_.vocab_size, 32)));
    for (int64_t i = 0; i < b.num_logits; ++i) {
        const std::string where = "logit row " + text(i);
        if (b.logit_tokens[i] < 0 || b.logit_tokens[i] >= b.num_tokens || (i > 0 && b.logit_tokens[i] < b.logit_tokens[i - 1]))
            return Status::invalid(where + " takes token " + text(b.logit_tokens[i]) + "; allowed: ascending, 0.." + text(b.num_tokens - 1));
        if (b.targets[i] >= program_.vocab_size) return Status::invalid(where + " has target " + text(b.targets[i]) + "; allowed: -1.." + text(program_.vocab_size - 1));
        if (b.num_top[i] < 0 || b.num_top[i] > kMaxTop) return Status::invalid(where + " wants " + text(b.num_top[i]) + " alternatives; allowed: 0.." + text(kMaxTop));
        if (!(b.temperatures[i] >= 0) || !(b.repetition_penalties[i] > 0) || !(b.top_ps[i] >= 0) || !(b.min_ps[i] >= 0 && b.min_ps[i] <= 1) || b.top_ks[i] < 0 ||
            !std::isfinite(b.presence_penalties[i]) || !std::isfinite(b.frequency_penalties[i]))
            return Status::invalid(where + " has sampling parameters that are negative or not numbers");
        Status status = check_list("penalty", b.penalty_starts, b.penalty_ids, b.num_penalty_ids, program_.vocab_size, i);
        if (status.ok()) status = check_list("bias", b.bias_starts, b.bias_ids, b.num_bias_ids, kMaxBiases, i);
        if (status.ok()) status = check_list("banned", b.banned_starts, b.banned_ids, b.num_banned_ids, program_.vocab_size, i);
        if (status.ok()) status = check_list("wanted", b.wanted_starts, b.wanted_ids, b.num_wanted_ids, kMaxWanted, i);
        if (!status.ok()) return status;
        for (int64_t j = b.bias_starts[i]; j < b.bias_starts[i + 1]; ++j)
            if (!std::isfinite(b.biases[j])) return Status::invalid(where + " has a bias that is not a finite number");
        if (b.mask_rows[i] >= b.num_masks) return Status::invalid(where + " has mask " + text(b.mask_rows[i]) + "; allowed: -1.." + text(b.num_masks - 1));
    }
    return {};
}

Status Model::run(const BatchView& batch, const ResultView& result) {
    const Status status = check(batch);
    if (!status.ok()) return status;
    step_.batch = batch;
    step_.result = result;
    row_ = row_offset_ = 0;
    const int64_t begin = now_ns();
    int64_t in_ops = 0;
    for (const int64_t ns : profile.ns) in_ops += ns;
    pool_->begin_step();
    const Status done = run_tiles();
    pool_->end_step();
    if (profile.enabled) {
        for (const int64_t ns : profile.ns) in_ops -= ns;
        profile.ns[kNumOpKinds] += now_ns() - begin + in_ops;
        profile.num_steps += 1;
    }
    return done;
}

// Lay out the next tile: segments of rows, where their K and V go, and the units of attention.
void Model::begin_tile(int64_t first_token, int64_t num_tokens) {
    const BatchView& b = step_.batch;
    step_.first_token = first_token;
    step_.num_tokens = num_tokens;
    step_.token_ids = b.token_ids + first_token;
    step_.segments.clear();
    step_.token_positions.clear();
    step_.token_blocks.clear();
    step_.token_slots.clear();
    step_.units.clear();
    step_.num_partials = 0;
    for (int64_t t = 0; t < num_tokens;) {
        const int64_t count = std::min<int64_t>(b.counts[row_] - row_offset_, num_tokens - t);
        const int32_t* blocks = b.block_tables + row_ * b.max_blocks;
        step_.segments.push_back({blocks, b.starts[row_] + row_offset_, count, t});
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = b.starts[row_] + row_offset_ + i;
            step_.token_positions.push_back(position);
            step_.token_blocks.push_back(blocks[position / limits_.block_size]);
            step_.token_slots.push_back(position % limits_.block_size);
        }
        t += count;
        row_offset_ += count;
        if (row_offset_ == b.counts[row_]) ++row_, row_offset_ = 0;
    }
    const int64_t num_segments = static_cast<int64_t>(step_.segments.size());
    // Units share what they read among many queries, unless that leaves threads without work.
    int64_t per_unit = kernels_.queries_per_unit(program_.group);
    while (per_unit > 8 && num_tokens * program_.num_kv_heads < kUnitsPerThread * pool_->num_threads() * per_unit) per_unit /= 2;
    const bool split = pool_->num_threads() > 1 && num_segments * program_.num_kv_heads < kUnitsPerThread * pool_->num_threads();
    for (int64_t s = 0; s < num_segments; ++s) {
        const Segment& segment = step_.segments[s];
        const int64_t splits = ceil_div(segment.start + segment.count, kKeySplit);
        if (split && segment.count == 1 && splits > 1) {
            const int64_t first = step_.num_partials;  // units run from the last to the first: whole splits before the part of one
            for (int64_t i = splits - 1; i >= 0; --i) step_.units.push_back({static_cast<int>(s), 0, 1, i, i + 1, first + i, first, splits});
            step_.num_partials += splits;
            continue;
        }
        for (int64_t q = 0; q < segment.count; q += per_unit) {
            const int64_t count = std::min(per_unit, segment.count - q);
            step_.units.push_back({static_cast<int>(s), q, count, 0, ceil_div(segment.start + q + count, kKeySplit)});
        }
    }
}

// Others fill the masks while the model runs. False: nobody does.
bool Model::wait_for_masks() const {
    const auto is_ready = [&] { return step_.batch.num_masks == 0 || __atomic_load_n(step_.batch.masks_ready, __ATOMIC_ACQUIRE) != 0; };
    const int64_t deadline = now_ns() + kMasksWaitS * 1'000'000'000;
    while (!is_ready()) {
        if (now_ns() > deadline) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return true;
}

Status Model::run_tiles() {
    const BatchView& batch = step_.batch;
    int64_t next_logit = 0;
    for (int64_t first = 0; first < batch.num_tokens; first += kTileTokens) {
        begin_tile(first, std::min(kTileTokens, batch.num_tokens - first));
        kernels_.rope_tables(step_, *pool_);
        for (size_t i = 0; i < program_.first_logit_op; ++i) run_op(program_.ops[i]);
        int64_t end = next_logit;
        while (end < batch.num_logits && batch.logit_tokens[end] < first + step_.num_tokens) ++end;
        while (next_logit < end) {
            step_.first_logit = next_logit;
            step_.num_logits = std::min(kTileLogits, end - next_logit);
            for (size_t i = program_.first_logit_op; i < program_.ops.size(); ++i) {
                if (std::holds_alternative<SampleOp>(program_.ops[i]) && !wait_for_masks())
                    return Status::invalid("the masks of a step were not filled within " + std::to_string(kMasksWaitS) + " s");
                run_op(program_.ops[i]);
            }
            next_logit += step_.num_logits;
        }
    }
    return {};
}

void Model::run_op(const Op& op) {
    const int64_t begin = profile.enabled ? now_ns() : 0;
    std::visit(Overloaded{
                   [&](const EmbedOp& o) { kernels_.embed(o, step_, *pool_); },
                   [&](const RmsNormOp& o) { kernels_.rms_norm(o, step_, *pool_); },
                   [&](const LinearOp& o) { kernels_.linear(o, step_, *pool_); },
                   [&](const RopeOp& o) { kernels_.rope(o, step_, *pool_); },
                   [&](const AttentionOp& o) { kernels_.attention(o, step_, *pool_); },
                   [&](const GluOp& o) { kernels_.glu(o, step_, *pool_); },
                   [&](const TakeRowsOp& o) { kernels_.take_rows(o, step_, *pool_); },
                   [&](const SampleOp& o) { kernels_.sample(o, step_, *pool_); },
               },
               op);
    if (profile.enabled) profile.ns[op.index()] += now_ns() - begin;
}

}  // namespace jilju
