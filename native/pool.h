// Pool: num_threads - 1 workers that help the calling thread through the phases of a step.
//
// The caller walks through a step; `for_tiles` hands the tiles of one phase to whoever is awake and returns when all are done.
// The tiles are cut into one range a thread, each with an atomic counter: a thread begins with its own range, so that it
// reads memory in order, and then helps with the others'. Nobody waits for a thread that holds no tile: if the system takes
// a worker away between phases, the others go on. Workers spin inside a step (yielding after a while, for the machine is shared) and park on an
// atomic wait between steps, so that an idle pool uses no CPU. Knows nothing of models.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "status.h"

namespace jilju {

class Pool {
public:
    // Every thread has `scratch_floats` floats of `scratch` for itself.
    static Status create(int num_threads, float* scratch, int64_t scratch_floats, std::unique_ptr<Pool>* out);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Around a step: wakes the workers; all threads compute under the same MXCSR, the caller's own comes back at the end.
    void begin_step();
    void end_step();

    // body(tile, scratch) for every tile in [0, num_tiles), in any order, on any thread.
    template <class Body>
    void for_tiles(int64_t num_tiles, Body&& body) {
        using Plain = std::remove_reference_t<Body>;
        run([](void* context, int64_t tile, float* scratch) { (*static_cast<Plain*>(context))(tile, scratch); }, const_cast<std::remove_const_t<Plain>*>(&body), num_tiles);
    }

private:
    using Function = void (*)(void* context, int64_t tile, float* scratch);

    Pool(int num_threads, float* scratch, int64_t scratch_floats) : num_threads_(num_threads), num_ranges_(num_threads < kMaxRanges ? num_threads : kMaxRanges), scratch_(scratch), scratch_floats_(scratch_floats) {}
    void run(Function function, void* context, int64_t num_tiles);
    void take_tiles(uint32_t phase, int thread_index);
    int64_t range_end(int64_t num_tiles, int range) const { return num_tiles * (range + 1) / num_ranges_; }
    void work(int thread_index);

    const int num_threads_, num_ranges_;
    float* const scratch_;
    const int64_t scratch_floats_;
    std::vector<std::thread> threads_;
    uint64_t saved_float_control_ = 0;
    std::atomic<bool> stop_{false};
    // The phase's work. A thread that read it has a right to it only once it has taken a tile of that phase from a range.
    std::atomic<Function> function_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int64_t> num_tiles_{0};
    static constexpr int kMaxRanges = 8;
    struct alignas(64) Range {
        std::atomic<uint64_t> next{0};  // phase << 32 | next tile
    };
    Range ranges_[kMaxRanges];
    alignas(64) std::atomic<int64_t> num_done_{0};
    alignas(64) std::atomic<int> epoch_{0};       // odd inside a step; what parked workers wait for
};

}  // namespace jilju
