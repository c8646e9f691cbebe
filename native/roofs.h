// Roofs: what this machine can do at most, whatever program runs on it.
//
// Probes for `jilju bench machine`: threads of their own read a buffer, or multiply and add in registers, for a given time.
// Knows nothing of models; uses the widest vectors that the CPU has, or the kernels that it is given.
#pragma once

#include <cstdint>

#include "status.h"
#include "step.h"

namespace jilju {

// Gigabytes (1e9) per second that `num_threads` threads read of a buffer of `num_bytes`, each its own contiguous part, over and
// over for `seconds`. What lies in a cache after the first round is read from there.
Status read_bandwidth(int64_t num_bytes, int num_threads, double seconds, double* out);

// Float32 GFLOP/s of chains of fused multiply-adds in registers, two to an element.
Status fma_peak(int num_threads, double seconds, double* out);

// Integer GOP/s of a family's kernel on a block that lies in L1, eight columns at a time: two to a multiply-add.
Status kernel_peak(const KernelSet& kernels, Family family, int num_threads, double seconds, double* out);

}  // namespace jilju
