// Model: a program with its memory, its threads and its kernels; runs one batch a call.
//
// Owns the KV cache, the activations and the pool. Weights stay where the caller has them (a mapped file) and must outlive
// the model. One thread calls; nothing here throws or aborts.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pool.h"
#include "program.h"
#include "step.h"

namespace jilju {

struct ModelLimits {
    int64_t num_blocks, block_size, max_rows, max_tokens, max_context;
    int num_threads;
    KvType kv_type;
};

// The kernel set called `name` ("generic", "avx2", ...), or the best that this CPU runs if it is empty.
Status select_kernels(const std::string& name, const KernelSet** out);

int64_t kv_bytes_per_token(const Program& program, KvType type);
int64_t workspace_bytes(const Program& program, const ModelLimits& limits, const KernelSet& kernels);

// Anonymous memory, zeroed by the system when first touched.
class Memory {
public:
    Memory() = default;
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    bool allocate(size_t num_bytes);
    void* data() const { return data_; }

private:
    void* data_ = nullptr;
    size_t num_bytes_ = 0;
};

struct Profile {
    bool enabled = false;
    int64_t num_steps = 0;
    std::array<int64_t, kNumOpKinds + 1> ns{};  // by kind of op; the last is all else of the steps
};

class Model {
public:
    static Status create(Program program, const ModelLimits& limits, const KernelSet& kernels, std::unique_ptr<Model>* out);

    // Nothing is computed unless the whole batch is sound.
    Status run(const BatchView& batch, const ResultView& result);

    Profile profile;

private:
    Model(Program program, const ModelLimits& limits, const KernelSet& kernels) : program_(std::move(program)), limits_(limits), kernels_(kernels) {}
    Status check(const BatchView& batch) const;
    void begin_tile(int64_t first_token, int64_t num_tokens);
    Status run_tiles();
    bool wait_for_masks() const;
    void run_op(const Op& op);

    Program program_;
    const ModelLimits limits_;
    const KernelSet& kernels_;
    Memory kv_memory_, workspace_memory_;
    std::unique_ptr<Pool> pool_;
    Step step_{};
    std::vector<std::atomic<int32_t>> splits_done_;
    int64_t row_ = 0, row_offset_ = 0;  // where the next tile begins: row, and tokens of it that are done
};

}  // namespace jilju
