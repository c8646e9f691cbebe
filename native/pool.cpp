#include "pool.h"

#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jilju {
namespace {

// A pause is ~40 cycles on Zen: 1000 of them are ~15 us, more than a phase's tail and less than a scheduler's slice.
constexpr int kSpinsBeforeYield = 1000;
constexpr int kSpinsBeforePark = 3000;  // ~40 us after a step
constexpr uint64_t kClosed = 0xffffffff;  // the tile number that no phase has
// Round to nearest, subnormals kept, no traps.
#if defined(__x86_64__)
constexpr uint64_t kFloatControl = 0x1f80;  // MXCSR
#else
constexpr uint64_t kFloatControl = 0;  // FPCR
#endif

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // waits for the pipeline; most cores take `yield` for nothing
#else
    std::this_thread::yield();
#endif
}

inline uint64_t swap_float_control([[maybe_unused]] uint64_t value) {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(static_cast<unsigned>(value));
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(value));
    return before;
#else
    return 0;
#endif
}

}  // namespace

Status Pool::create(int num_threads, float* scratch, int64_t scratch_floats, std::unique_ptr<Pool>* out) {
    std::unique_ptr<Pool> pool(new Pool(num_threads, scratch, scratch_floats));
    try {
        for (int i = 1; i < num_threads; ++i) pool->threads_.emplace_back([p = pool.get(), i] { p->work(i); });
    } catch (const std::system_error& error) {
        return Status::no_memory("cannot start thread " + std::to_string(pool->threads_.size() + 1) + " of " + std::to_string(num_threads) + ": " +
                                 error.what());
    }
    *out = std::move(pool);
    return {};
}

Pool::~Pool() {
    stop_.store(true);
    epoch_.fetch_add(2);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::begin_step() {
    saved_float_control_ = swap_float_control(kFloatControl);
    if (num_threads_ == 1) return;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
}

void Pool::end_step() {
    if (num_threads_ > 1) epoch_.fetch_add(1, std::memory_order_release);
    swap_float_control(saved_float_control_);
}

void Pool::run(Function function, void* context, int64_t num_tiles) {
    if (num_threads_ == 1 || num_tiles <= 1) {
        for (int64_t tile = 0; tile < num_tiles; ++tile) function(context, tile, scratch_);
        return;
    }
    // Close the last phase before its work changes: who reads any part of the new work then cannot take a tile of the old.
    const uint64_t last = ranges_[0].next.load(std::memory_order_relaxed);
    const uint32_t phase = static_cast<uint32_t>(last >> 32) + 1;
    for (int range = 0; range < num_ranges_; ++range) ranges_[range].next.store(last | kClosed, std::memory_order_relaxed);
    function_.store(function, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    num_tiles_.store(num_tiles, std::memory_order_release);
    num_done_.store(0, std::memory_order_relaxed);
    for (int range = 0; range < num_ranges_; ++range)
        ranges_[range].next.store(uint64_t{phase} << 32 | static_cast<uint64_t>(range ? range_end(num_tiles, range - 1) : 0), std::memory_order_release);
    take_tiles(phase, 0);
    for (int spins = 0; num_done_.load(std::memory_order_acquire) != num_tiles;) {
        if (++spins < kSpinsBeforeYield) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

void Pool::take_tiles(uint32_t phase, int thread_index) {
    const Function function = function_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    const int64_t num_tiles = num_tiles_.load(std::memory_order_acquire);
    float* const scratch = scratch_ + thread_index * scratch_floats_;
    int64_t num_taken = 0;
    for (int i = 0; i < num_ranges_; ++i) {
        const int range = (thread_index + i) % num_ranges_;
        const int64_t end = range_end(num_tiles, range);
        std::atomic<uint64_t>& counter = ranges_[range].next;
        uint64_t next = counter.load(std::memory_order_acquire);
        while (next >> 32 == phase && static_cast<int64_t>(next & kClosed) < end) {
            // Success means that the phase is not over, hence that what was read above is this phase's work.
            if (!counter.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            function(context, static_cast<int64_t>(next & kClosed), scratch);
            ++num_taken;
            next = counter.load(std::memory_order_acquire);
        }
    }
    if (num_taken) num_done_.fetch_add(num_taken, std::memory_order_acq_rel);
}

void Pool::work(int thread_index) {
    swap_float_control(kFloatControl);
    uint32_t seen = 0;
    int spins = 0;
    while (!stop_.load(std::memory_order_relaxed)) {
        const uint32_t phase = static_cast<uint32_t>(ranges_[thread_index % num_ranges_].next.load(std::memory_order_acquire) >> 32);
        if (phase != seen) {
            take_tiles(phase, thread_index);
            seen = phase;
            spins = 0;
            continue;
        }
        if (++spins < kSpinsBeforeYield) {
            pause();
            continue;
        }
        const int epoch = epoch_.load(std::memory_order_acquire);
        if (epoch % 2) {
            std::this_thread::yield();
        } else if (spins < kSpinsBeforePark) {
            pause();
        } else if (!stop_.load(std::memory_order_relaxed)) {
            epoch_.wait(epoch, std::memory_order_acquire);
            spins = 0;
        }
    }
}

}  // namespace jilju
