// The table of this ISA's kernels.
#include "simd.h"

namespace jilju {
namespace JILJU_ISA {
namespace {

int64_t max_inputs_of(const Program& program) {
    int64_t max_inputs = 0;
    for (const Weight& weight : program.weights) max_inputs = max_int(max_inputs, weight.num_inputs);
    return max_inputs;
}

// Of a thread's scratch, all ops use the first part in turn; what lies behind it is linear's alone.
int64_t own_rows_at(const Program& program) {
    const int64_t padded = ceil_div(program.head_dim, 8) * 8;
    int64_t floats = linear_scratch_floats(max_inputs_of(program));
    floats = max_int(floats, attention_scratch_floats(program.group, program.head_dim, padded));
    floats = max_int(floats, sample_scratch_floats(program.vocab_size));
    return ceil_div(floats, 16) * 16;
}

int64_t scratch_floats(const Program& program) { return own_rows_at(program) + ceil_div(own_rows_floats(max_inputs_of(program)), 16) * 16; }

void exp_all(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        const int count = static_cast<int>(min_int(8, n - i));
        store_n(out + i, exp(load_n(x + i, count)), count);
    }
}

}  // namespace

const KernelSet& table() {
    static const KernelSet kernels{kName, scratch_floats, own_rows_at, attention_queries_per_unit, rope_tables, embed, rms_norm, linear, rope,
                                   attention, glu, take_rows, sample, multiply_one, unpack_row, exp_all};
    return kernels;
}

}  // namespace JILJU_ISA

#if defined(JILJU_COMPILE_AVX512)
const KernelSet& avx512_kernels() { return avx512::table(); }
#elif defined(JILJU_COMPILE_AVX2)
const KernelSet& avx2_kernels() { return avx2::table(); }
#elif defined(JILJU_COMPILE_NEON)
const KernelSet& neon_kernels() { return neon::table(); }
#else
const KernelSet& generic_kernels() { return generic::table(); }
#endif

}  // namespace jilju
