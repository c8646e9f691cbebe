#include "pool.h"

#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jilju {
namespace {

// A pause is ~40 cycles on Zen: 1000 of them are ~15 us, more than a phase's tail and less than a scheduler's slice.
constexpr int kSpinsBeforeYield = 1000;
constexpr int kSpinsBeforePark = 2500;  // ~30 us after a step: a decode loop comes back within that, an idle server does not

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace

Status Pool::create(int num_threads, std::unique_ptr<Pool>* out) {
    std::unique_ptr<Pool> pool(new Pool(num_threads));
    try {
        for (int i = 1; i < num_threads; ++i) pool->threads_.emplace_back([p = pool.get(), i] { p->work(i); });
    } catch (const std::system_error& error) {
        return Status::no_memory("cannot start thread " + std::to_string(pool->threads_.size() + 1) + " of " +
                                 std::to_string(num_threads) + ": " + error.what() + "; ask for fewer threads");
    }
    *out = std::move(pool);
    return {};
}

Pool::~Pool() {
    stop_ = true;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::run(Function function, void* context) {
    function_ = function;
    context_ = context;
    if (num_threads_ > 1) {
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }
    run_with_default_rounding(0);
    barrier();
}

void Pool::work(int thread_index) {
    int seen = 0;
    for (;;) {
        for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen;) {
            if (++spins < kSpinsBeforePark) {
                pause();
            } else {
                epoch_.wait(seen, std::memory_order_acquire);
            }
        }
        ++seen;  // one at a time: run() returns only when every worker has finished the epoch before
        if (stop_) return;
        run_with_default_rounding(thread_index);
        barrier();
    }
}

// Every thread computes under the same MXCSR (round to nearest, subnormals kept); the caller's own comes back afterwards.
void Pool::run_with_default_rounding(int thread_index) {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80);
    function_(context_, thread_index);
    _mm_setcsr(before);
#else
    function_(context_, thread_index);
#endif
}

void Pool::barrier() {
    if (num_threads_ == 1) {
        next_tile_.store(0, std::memory_order_relaxed);
        return;
    }
    const int phase = phase_.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
        num_arrived_.store(0, std::memory_order_relaxed);
        next_tile_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
        if (++spins < kSpinsBeforeYield) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace jilju
