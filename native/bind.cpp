// The Python module jilju.backends.native._kernels: flat arrays in, flat arrays out, no GIL while a step runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <new>

#include "checksum.h"
#include "model.h"
#include "pack.h"
#include "philox.h"
#include "roofs.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using In2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A status becomes one of three Python exceptions; the executor says what they mean to the user.
struct Failure : std::exception {
    explicit Failure(std::string text) : text(std::move(text)) {}
    const char* what() const noexcept override { return text.c_str(); }
    std::string text;
};
struct Invalid : Failure { using Failure::Failure; };
struct NoMemory : Failure { using Failure::Failure; };
struct Unsupported : Failure { using Failure::Failure; };

void require(const jilju::Status& status) {
    switch (status.code) {
        case jilju::Status::kOk: return;
        case jilju::Status::kInvalid: throw Invalid(status.message);
        case jilju::Status::kNoMemory: throw NoMemory(status.message);
        case jilju::Status::kUnsupported: throw Unsupported(status.message);
    }
}
void require(bool good, const char* text) {
    if (!good) throw Invalid(text);
}

const jilju::KernelSet& kernels_named(const std::string& isa) {
    const jilju::KernelSet* kernels = nullptr;
    require(jilju::select_kernels(isa, &kernels));
    return *kernels;
}

jilju::ModelLimits limits_of(const In<int64_t>& l) {
    require(l.size() == 7, "limits must be seven numbers");
    const int64_t* p = l.data();
    require(p[6] == 0 || p[6] == 1, "the type of keys and values is 0 (f16) or 1 (int8)");
    return {p[0], p[1], p[2], p[3], p[4], static_cast<int>(p[5]), static_cast<jilju::KvType>(p[6])};
}

class PyModel {
public:
    PyModel(In<int64_t> ints, In<double> reals, std::vector<In<uint8_t>> weights, In<uint8_t> packed, In<int64_t> limits, const std::string& isa)
        : weights_(std::move(weights)), packed_(std::move(packed)) {
        const jilju::KernelSet& kernels = kernels_named(isa);
        std::vector<jilju::Bytes> bytes;
        for (const auto& w : weights_) bytes.push_back({w.data(), w.size()});
        jilju::Program program;
        require(jilju::decode_program({ints.data(), ints.size()}, {reals.data(), reals.size()}, bytes, &program));
        require(jilju::use_packed(&program, {packed_.data(), packed_.size()}));
        require(jilju::Model::create(std::move(program), limits_of(limits), kernels, &model_));
    }

    void run(In<int32_t> token_ids, In<int32_t> starts, In<int32_t> counts, In2<int32_t> block_tables, In<int32_t> logit_tokens, In<int32_t> targets,
             In<int64_t> positions, In<uint64_t> seeds, In<float> temperatures, In<int32_t> top_ks, In<float> top_ps, In<float> min_ps,
             In<int32_t> num_top, In<float> repetition_penalties, In<float> presence_penalties, In<float> frequency_penalties, In<int32_t> penalty_starts,
             In<int32_t> penalty_ids, In<int32_t> penalty_counts, In<int32_t> bias_starts, In<int32_t> bias_ids, In<float> biases, In<int32_t> banned_starts,
             In<int32_t> banned_ids, In<int32_t> wanted_starts, In<int32_t> wanted_ids, In<int32_t> mask_rows, In2<uint32_t> masks, In<int32_t> masks_ready, Out<int32_t> out_ids,
             Out<float> out_logprobs, Out2<int32_t> out_top_ids, Out2<float> out_top_logprobs, Out<float> out_wanted_logprobs, Out<bool> out_finite) {
        const size_t rows = starts.size(), logits = logit_tokens.size();
        require(counts.size() == rows && block_tables.shape(0) == rows, "starts, counts and block_tables differ in length");
        for (const size_t size : {targets.size(), positions.size(), seeds.size(), temperatures.size(), top_ks.size(), top_ps.size(), min_ps.size(),
                                  num_top.size(), repetition_penalties.size(), presence_penalties.size(), frequency_penalties.size(), penalty_starts.size() - 1,
                                  bias_starts.size() - 1, banned_starts.size() - 1, wanted_starts.size() - 1, mask_rows.size(), out_ids.size(), out_logprobs.size(),
                                  out_top_ids.shape(0), out_top_logprobs.shape(0), out_finite.size()})
            require(size == logits, "the arrays of the logit rows differ in length");
        require(penalty_counts.size() == penalty_ids.size() && biases.size() == bias_ids.size(), "penalty_counts or biases and their ids differ in length");
        require(masks_ready.size() == 1, "masks_ready is one number");
        require(out_wanted_logprobs.size() == wanted_ids.size(), "the wanted logprobs and their ids differ in length");
        require(out_top_ids.shape(1) == jilju::kMaxTop && out_top_logprobs.shape(1) == jilju::kMaxTop, "top arrays have another width");
        const jilju::BatchView batch{
            static_cast<int64_t>(token_ids.size()), static_cast<int64_t>(rows), static_cast<int64_t>(block_tables.shape(1)), static_cast<int64_t>(logits),
            token_ids.data(), starts.data(), counts.data(), block_tables.data(), logit_tokens.data(), targets.data(), positions.data(), seeds.data(),
            temperatures.data(), top_ks.data(), top_ps.data(), min_ps.data(), num_top.data(), repetition_penalties.data(), presence_penalties.data(),
            frequency_penalties.data(), penalty_starts.data(), penalty_ids.data(), penalty_counts.data(), bias_starts.data(), bias_ids.data(), biases.data(),
            banned_starts.data(), banned_ids.data(), wanted_starts.data(), wanted_ids.data(), mask_rows.data(), masks.data(), masks_ready.data(),
            static_cast<int64_t>(penalty_ids.size()), static_cast<int64_t>(bias_ids.size()), static_cast<int64_t>(banned_ids.size()),
            static_cast<int64_t>(wanted_ids.size()), static_cast<int64_t>(masks.shape(0)), static_cast<int64_t>(masks.shape(1))};
        const jilju::ResultView result{out_ids.data(), out_logprobs.data(), out_top_ids.data(), out_top_logprobs.data(), out_wanted_logprobs.data(), out_finite.data()};
        jilju::Status status;
        {
            nb::gil_scoped_release release;
            status = model_->run(batch, result);
        }
        require(status);
    }

    void set_profiling(bool enabled) { model_->profile = {.enabled = enabled}; }
    std::pair<int64_t, std::vector<int64_t>> profile() const {
        return {model_->profile.num_steps, {model_->profile.ns.begin(), model_->profile.ns.end()}};
    }

private:
    std::vector<In<uint8_t>> weights_;  // keeps the mapped file alive
    In<uint8_t> packed_;
    std::unique_ptr<jilju::Model> model_;
};

// Bytes of the KV cache a token, bytes of the workspace: what a model of these shapes will allocate.
std::pair<int64_t, int64_t> memory_needs(In<int64_t> ints, In<double> reals, In<int64_t> limits, const std::string& isa) {
    jilju::Program program;
    require(jilju::decode_program({ints.data(), ints.size()}, {reals.data(), reals.size()}, {}, &program));
    const jilju::ModelLimits l = limits_of(limits);
    return {jilju::kv_bytes_per_token(program, l.kv_type), jilju::workspace_bytes(program, l, kernels_named(isa))};
}

// What of an encoded plan's weights is packed: (version, [(weight id, offset, bytes)]).
std::pair<std::string, std::vector<std::tuple<int, int64_t, int64_t>>> packed_layout(In<int64_t> ints, In<double> reals) {
    jilju::Program program;
    require(jilju::decode_program({ints.data(), ints.size()}, {reals.data(), reals.size()}, {}, &program));
    std::vector<std::tuple<int, int64_t, int64_t>> entries;
    for (const jilju::PackedEntry& e : jilju::packed_layout(program)) entries.emplace_back(e.weight, e.offset, e.num_bytes);
    return {jilju::kPackedVersion, entries};
}
void pack(In<int64_t> ints, In<double> reals, int weight_id, In<uint8_t> data, Out<uint8_t> out) {
    jilju::Program program;
    require(jilju::decode_program({ints.data(), ints.size()}, {reals.data(), reals.size()}, {}, &program));
    require(weight_id >= 0 && weight_id < static_cast<int>(program.weights.size()), "no such weight");
    const jilju::Weight& w = program.weights[weight_id];
    require(w.family != jilju::Family::kFloat, "this weight is not packed");
    require(static_cast<int64_t>(data.size()) == w.num_outputs * w.row_bytes && static_cast<int64_t>(out.size()) == w.packed_bytes(), "data or output has another size than the weight");
    nb::gil_scoped_release release;
    jilju::pack(w, data.data(), out.data());
}

uint64_t checksum(In<uint8_t> data, uint64_t seed) {
    nb::gil_scoped_release release;
    return jilju::checksum(data.data(), data.size(), seed);
}

// Probes: single kernels, for tests.
void unpack(const std::string& isa, int format, In<uint8_t> data, Out2<float> out) {
    const jilju::Layout* layout = jilju::layout_of(format);
    require(layout && out.shape(1) % layout->block_elements == 0, "unknown format, or columns that are no whole blocks");
    const int64_t columns = static_cast<int64_t>(out.shape(1)), row_bytes = columns / layout->block_elements * layout->block_bytes;
    require(data.size() == out.shape(0) * row_bytes, "data and output differ in size");
    const jilju::Weight weight{static_cast<jilju::Format>(format), static_cast<int64_t>(out.shape(0)), columns, row_bytes, data.data()};
    for (size_t row = 0; row < out.shape(0); ++row) kernels_named(isa).unpack(weight, row, out.data() + row * columns);
}
void exp_all(const std::string& isa, In<float> x, Out<float> out) {
    require(x.size() == out.size(), "input and output differ in size");
    kernels_named(isa).exp(x.data(), out.data(), x.size());
}
// out = x @ weight.T, the weight being as in the file: a linear op by itself.
void linear(const std::string& isa, int format, In<uint8_t> data, In2<float> x, Out2<float> out, int num_threads) {
    const jilju::KernelSet& kernels = kernels_named(isa);
    const jilju::Layout* layout = jilju::layout_of(format);
    const int64_t rows = static_cast<int64_t>(x.shape(0)), inputs = static_cast<int64_t>(x.shape(1)), outputs = static_cast<int64_t>(out.shape(1));
    require(layout && inputs % layout->block_elements == 0, "unknown format, or columns that are no whole blocks");
    const int64_t row_bytes = inputs / layout->block_elements * layout->block_bytes;
    require(static_cast<int64_t>(data.size()) == outputs * row_bytes && static_cast<int64_t>(out.shape(0)) == rows, "data, x and output differ in size");
    jilju::Weight weight{static_cast<jilju::Format>(format), outputs, inputs, row_bytes, data.data()};
    jilju::choose_family(&weight);
    std::vector<uint8_t> packed(weight.packed_bytes());
    const bool is_packed = weight.family != jilju::Family::kFloat;
    if (is_packed) jilju::pack(weight, data.data(), packed.data());
    weight.packed = packed.data();

    jilju::Program program{};
    program.weights = {weight};
    program.buffers = {{false, inputs, inputs, const_cast<float*>(x.data())}, {false, outputs, outputs, out.data()}};
    const jilju::LinearOp op{{0, 0, inputs, false}, {1, 0, outputs, false}, {0}, {}, false, is_packed};
    std::vector<int8_t> quantized(rows * inputs / jilju::kBlockColumns * jilju::kQuantizedBytes);
    std::vector<float> scratch(kernels.scratch_floats(program) * num_threads);
    jilju::Step step{};
    step.program = &program;
    step.num_tokens = rows;
    step.quantized = quantized.data();
    step.own_rows_at = kernels.own_rows_at(program);
    std::unique_ptr<jilju::Pool> pool;
    require(jilju::Pool::create(num_threads, scratch.data(), kernels.scratch_floats(program), &pool));
    nb::gil_scoped_release release;
    pool->begin_step();
    kernels.linear(op, step, *pool);
    pool->end_step();
}
std::vector<uint32_t> philox(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
    require(counter.size() == 4 && key.size() == 2, "a counter of four words and a key of two");
    const jilju::Words words = jilju::philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return {words.begin(), words.end()};
}


// Probes: what the machine can do, for the benchmarks.
double read_bandwidth(int64_t num_bytes, int num_threads, double seconds) {
    nb::gil_scoped_release release;
    double rate = 0;
    require(jilju::read_bandwidth(num_bytes, num_threads, seconds, &rate));
    return rate;
}
// In the order of jilju::Family.
const std::vector<std::string> kFamilyNames{"F", "W4", "W4 offset", "W4 K", "W5", "W5 offset", "W5 K", "W6", "W8"};

double kernel_peak(const std::string& isa, const std::string& family, int num_threads, double seconds) {
    const auto found = std::find(kFamilyNames.begin() + 1, kFamilyNames.end(), family);
    require(found != kFamilyNames.end(), "no such kernel family");
    nb::gil_scoped_release release;
    double rate = 0;
    require(jilju::kernel_peak(kernels_named(isa), static_cast<jilju::Family>(found - kFamilyNames.begin()), num_threads, seconds, &rate));
    return rate;
}
double fma_peak(int num_threads, double seconds) {
    nb::gil_scoped_release release;
    double rate = 0;
    require(jilju::fma_peak(num_threads, seconds, &rate));
    return rate;
}

}  // namespace

NB_MODULE(_kernels, m) {
    nb::exception<Invalid>(m, "Invalid", PyExc_ValueError);
    nb::exception<NoMemory>(m, "NoMemory", PyExc_MemoryError);
    nb::exception<Unsupported>(m, "Unsupported", PyExc_ValueError);

    m.def("kernel_set", [](const std::string& isa) { return std::string(kernels_named(isa).name); }, "isa"_a);
    m.def("memory_needs", &memory_needs, "ints"_a.noconvert(), "reals"_a.noconvert(), "limits"_a.noconvert(), "isa"_a);
    m.def("packed_layout", &packed_layout, "ints"_a.noconvert(), "reals"_a.noconvert());
    m.def("pack", &pack, "ints"_a.noconvert(), "reals"_a.noconvert(), "weight_id"_a, "data"_a.noconvert(), "out"_a.noconvert());
    m.def("checksum", &checksum, "data"_a.noconvert(), "seed"_a);
    m.def("unpack", &unpack, "isa"_a, "format"_a, "data"_a.noconvert(), "out"_a.noconvert());
    m.def("exp", &exp_all, "isa"_a, "x"_a.noconvert(), "out"_a.noconvert());
    m.def("linear", &linear, "isa"_a, "format"_a, "data"_a.noconvert(), "x"_a.noconvert(), "out"_a.noconvert(), "num_threads"_a);
    m.def("philox4x32_10", &philox, "counter"_a, "key"_a);
    m.def("read_bandwidth", &read_bandwidth, "num_bytes"_a, "num_threads"_a, "seconds"_a);
    m.def("kernel_peak", &kernel_peak, "isa"_a, "family"_a, "num_threads"_a, "seconds"_a);
    m.attr("FAMILIES") = nb::tuple(nb::cast(kFamilyNames));
    m.def("family_of", [](int format) { return kFamilyNames[static_cast<size_t>(jilju::family_of(static_cast<jilju::Format>(format)))]; }, "format"_a);
    m.def("fma_peak", &fma_peak, "num_threads"_a, "seconds"_a);
    m.attr("OP_KINDS") = nb::make_tuple("embed", "rms_norm", "linear", "rope", "attention", "glu", "take_rows", "sample", "other");

    nb::class_<PyModel>(m, "Model")
        .def(nb::init<In<int64_t>, In<double>, std::vector<In<uint8_t>>, In<uint8_t>, In<int64_t>, const std::string&>(), "ints"_a.noconvert(), "reals"_a.noconvert(),
             "weights"_a, "packed"_a.noconvert(), "limits"_a.noconvert(), "isa"_a)
        .def("run", &PyModel::run)
        .def("set_profiling", &PyModel::set_profiling, "enabled"_a)
        .def("profile", &PyModel::profile);
}
