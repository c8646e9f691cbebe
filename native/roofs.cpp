#include "roofs.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "pack.h"

namespace jilju {
namespace {

using Clock = std::chrono::steady_clock;

// The compiler's vectors: one body for every width, compiled for each in the functions named by instruction set below.
using F4 = float __attribute__((vector_size(16)));
using F8 = float __attribute__((vector_size(32)));
using F16 = float __attribute__((vector_size(64)));

constexpr int64_t kChunk = 256 << 10;  // bytes between two looks at the clock: ~5 us of reading, a look costs 25 ns
constexpr size_t kHugePage = 2 << 20;
constexpr int kChains = 12;            // FMAs under way: latency 4 times 2 a cycle is 8, with room; 14 registers of 16
constexpr int64_t kRounds = 10000;     // of all chains between two looks at the clock: ~20 us

#define JILJU_ALWAYS_INLINE inline __attribute__((always_inline))

// Makes the compiler believe that `value` is used, or changed by somebody.
template <class V>
JILJU_ALWAYS_INLINE void keep(V& value) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(value));
#else
    asm volatile("" : "+w"(value));
#endif
}

// One chunk, 8 loads at a time into sums of their own.
template <class V>
JILJU_ALWAYS_INLINE void read_chunk(const char* data, int64_t num_bytes) {
    V sums[8] = {};
    for (int64_t at = 0; at < num_bytes; at += static_cast<int64_t>(sizeof sums))
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] += *reinterpret_cast<const V*>(data + at + i * sizeof(V));
#pragma GCC unroll 8
    for (V& sum : sums) keep(sum);
}

template <class V>
JILJU_ALWAYS_INLINE int64_t fma_round() {
    V chains[kChains] = {}, factor = V{} + 0.999f, addend = V{} + 0.001f;
    keep(factor);
    keep(addend);
    for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 12
        for (V& chain : chains) {
            chain = chain * factor + addend;
            keep(chain);
        }
    return kRounds * kChains * 2 * static_cast<int64_t>(sizeof(V) / sizeof(float));
}

struct Probes {
    void (*read)(const char* data, int64_t num_bytes);
    int64_t (*fma)();  // FLOPs done
};

void read_generic(const char* data, int64_t num_bytes) { read_chunk<F4>(data, num_bytes); }
int64_t fma_generic() { return fma_round<F4>(); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void read_avx2(const char* data, int64_t num_bytes) { read_chunk<F8>(data, num_bytes); }
__attribute__((target("avx2,fma"))) int64_t fma_avx2() { return fma_round<F8>(); }
__attribute__((target("avx512f"))) void read_avx512(const char* data, int64_t num_bytes) { read_chunk<F16>(data, num_bytes); }
__attribute__((target("avx512f"))) int64_t fma_avx512() { return fma_round<F16>(); }
#endif

Probes widest() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return {&read_avx512, &fma_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {&read_avx2, &fma_avx2};
#endif
    return {&read_generic, &fma_generic};
}

// Sum over threads of amount / time, each calling `piece(thread)` until `seconds` have passed since all of them began.
template <class Prepare, class Piece>
Status rate_of_all(int num_threads, double seconds, double* out, const Prepare& prepare, const Piece& piece) {
    std::vector<double> rates(num_threads, 0.0);
    std::vector<std::thread> threads;
    std::atomic<int> num_ready{0};
    std::atomic<bool> is_cancelled{false};
    const auto run = [&](int thread) {
        prepare(thread);
        num_ready.fetch_add(1);
        while (num_ready.load() < num_threads)
            if (is_cancelled.load()) return;
        const Clock::time_point begin = Clock::now();
        double passed = 0;
        int64_t amount = 0;
        while (passed < seconds) {
            amount += piece(thread);
            passed = std::chrono::duration<double>(Clock::now() - begin).count();
        }
        rates[thread] = static_cast<double>(amount) / passed;
    };
    Status status;
    try {
        for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(run, thread);
    } catch (const std::system_error& error) {
        is_cancelled = true;
        status = Status::no_memory("cannot start " + std::to_string(num_threads) + " threads: " + error.what());
    }
    for (std::thread& thread : threads) thread.join();
    *out = 0;
    for (const double rate : rates) *out += rate / 1e9;
    return status;
}

Status check(int num_threads, double seconds) {
    if (num_threads < 1 || num_threads > 1024) return Status::invalid(std::to_string(num_threads) + " threads; allowed: 1..1024");
    if (!(seconds > 0 && seconds <= 60)) return Status::invalid(std::to_string(seconds) + " seconds; allowed: more than 0, up to 60");
    return {};
}

struct Freed {
    char* data;
    ~Freed() { ::operator delete[](data, std::align_val_t(kHugePage)); }
};

}  // namespace

Status read_bandwidth(int64_t num_bytes, int num_threads, double seconds, double* out) {
    const Status status = check(num_threads, seconds);
    if (!status.ok()) return status;
    const int64_t part = num_bytes / num_threads / 4096 * 4096;  // of one thread, whole pages
    if (part < kChunk) return Status::invalid(std::to_string(num_bytes) + " bytes for " + std::to_string(num_threads) + " threads; at least " + std::to_string(kChunk) + " bytes a thread are needed");
    const Freed buffer{static_cast<char*>(::operator new[](part * num_threads, std::align_val_t(kHugePage), std::nothrow))};
    if (buffer.data) madvise(buffer.data, part * num_threads, MADV_HUGEPAGE);  // as weights are held; a system without them refuses, which is fine
    if (!buffer.data) return Status::no_memory("cannot have " + std::to_string(num_bytes) + " bytes to read");
    const Probes probes = widest();
    std::vector<int64_t> at(num_threads * 8, 0);  // every 8th: one to a cache line
    return rate_of_all(
        num_threads, seconds, out, [&](int thread) { std::fill_n(buffer.data + thread * part, part, char{1}); },
        [&](int thread) {
            int64_t& next = at[thread * 8];
            const int64_t count = std::min(kChunk, part - next);
            probes.read(buffer.data + thread * part + next, count);
            next = next + count == part ? 0 : next + count;
            return count;
        });
}

Status fma_peak(int num_threads, double seconds, double* out) {
    const Status status = check(num_threads, seconds);
    if (!status.ok()) return status;
    const Probes probes = widest();
    return rate_of_all(num_threads, seconds, out, [](int) {}, [&](int) { return probes.fma(); });
}

Status kernel_peak(const KernelSet& kernels, Family family, int num_threads, double seconds, double* out) {
    const Status status = check(num_threads, seconds);
    if (!status.ok()) return status;
    constexpr int64_t kNumInputs = 768, kNumColumns = 8, kCalls = 100;  // 22 KiB in all at most: it stays in L1
    constexpr int64_t kNumBlocks = kNumInputs / kBlockColumns;
    const int64_t strip_bytes = strip_bytes_of(family, kNumInputs);
    struct Block {
        std::vector<uint8_t> strip;
        std::vector<int8_t> columns;
        std::vector<float> out;
    };
    std::vector<Block> blocks(num_threads);
    return rate_of_all(
        num_threads, seconds, out,
        [&](int thread) {  // zeros: the kernels take the same time for any numbers
            blocks[thread] = {std::vector<uint8_t>(strip_bytes), std::vector<int8_t>(kNumBlocks * kQuantizedBytes * kNumColumns),
                              std::vector<float>(kNumColumns * kStripRows)};
        },
        [&](int thread) {
            Block& b = blocks[thread];
            for (int64_t i = 0; i < kCalls; ++i)
                kernels.multiply_strip(family, kNumColumns, b.strip.data(), kNumBlocks, b.columns.data(), b.out.data());
            return 2 * kCalls * kNumInputs * kNumColumns * kStripRows;
        });
}

}  // namespace jilju
