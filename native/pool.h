// Pool: num_threads - 1 workers and the calling thread run one function together, in phases.
//
// A step is one `run`: every thread executes the same function; inside it, `for_tiles` hands out the tiles of a phase from
// an atomic counter and ends in a barrier. Threads spin inside a step (and yield after a while, for the machine is shared);
// between steps the workers park on an atomic wait, so that an idle pool uses no CPU. Knows nothing of models.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "status.h"

namespace jilju {

class Pool {
public:
    using Function = void (*)(void* context, int thread_index);

    static Status create(int num_threads, std::unique_ptr<Pool>* out);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Run function(context, i) on every thread i, the caller being 0. Returns when all have returned.
    void run(Function function, void* context);

    // Inside run: the next tile of this phase, and the end of a phase. Every thread must reach every barrier.
    int64_t next_tile() { return next_tile_.fetch_add(1, std::memory_order_relaxed); }
    void barrier();

private:
    explicit Pool(int num_threads) : num_threads_(num_threads) {}
    void work(int thread_index);
    void run_with_default_rounding(int thread_index);

    const int num_threads_;
    std::vector<std::thread> threads_;
    Function function_ = nullptr;
    void* context_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<int> epoch_{0};         // one more each run: what parked workers wait for
    alignas(64) std::atomic<int> phase_{0};         // one more each barrier
    alignas(64) std::atomic<int> num_arrived_{0};   // threads at this barrier
    alignas(64) std::atomic<int64_t> next_tile_{0};
};

// What a thread brings along to every op of a step.
struct Worker {
    Pool* pool;
    int index;
    float* scratch;  // this thread's own floats, Model::scratch_floats of them, 64-byte aligned
};

template <class Body>
inline void for_tiles(Worker& worker, int64_t num_tiles, Body&& body) {
    for (int64_t tile; (tile = worker.pool->next_tile()) < num_tiles;) body(tile);
    worker.pool->barrier();
}

}  // namespace jilju
