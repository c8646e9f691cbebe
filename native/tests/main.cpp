// native_tests: the core without Python, for sanitizers and for other CPUs in an emulator (see CMakeLists.txt).
//
// A small model of every op in several number formats runs the same batches on one and on several threads, whole and in
// chunks, and must give the same bits; instruction sets must agree. Weights of any bytes at all must be packed and multiplied
// without harm; damaged plans and batches must come back as errors. Prints what failed and exits 1; else a digest of each
// instruction set's results: those that fuse multiply and add have one, also across CPUs.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../model.h"
#include "../pack.h"
#include "../philox.h"
#include "../pool.h"

namespace {

using namespace jilju;

int num_failures = 0;
void expect(bool good, const char* what) {
    if (good) return;
    ++num_failures;
    std::printf("FAILED: %s\n", what);
}

constexpr const char* kIsas[] = {"generic", "avx2", "avx512", "neon"};  // all but the first fuse multiply and add
constexpr Format kFormats[] = {Format::kF32,  Format::kF16,  Format::kBF16, Format::kQ4_0, Format::kQ4_1, Format::kQ5_0,
                               Format::kQ5_1, Format::kQ8_0, Format::kQ4_K, Format::kQ5_K, Format::kQ6_K};
constexpr Format kPackedFormats[] = {Format::kQ4_0, Format::kQ4_1, Format::kQ4_K, Format::kQ5_0, Format::kQ5_1, Format::kQ5_K, Format::kQ6_K, Format::kQ8_0};

constexpr int kVocab = 50, kHidden = 256, kHeads = 4, kKvHeads = 2, kHeadDim = 20;

struct Encoded {
    std::vector<int64_t> ints;
    std::vector<double> reals;
    std::vector<std::vector<uint8_t>> data;
    std::vector<uint8_t> packed;
    std::vector<Bytes> bytes() const {
        std::vector<Bytes> out;
        for (const auto& d : data) out.push_back({d.data(), d.size()});
        return out;
    }
};

// One layer with attention and a gate, `format` being that of its matrices.
Encoded encode(Format format) {
    std::mt19937 random(7);
    Encoded e;
    std::vector<int64_t> weights;
    const auto weight = [&](Format f, int64_t outputs, int64_t inputs) {
        const Layout* layout = layout_of(static_cast<int64_t>(f));
        std::vector<uint8_t> raw(outputs * inputs / layout->block_elements * layout->block_bytes);
        if (f == Format::kF16 || f == Format::kBF16) {
            for (int64_t i = 0; i < outputs * inputs; ++i) {  // float16 in [2^-6, 2^-2), bfloat16 in [2^-7, 2^-3), of both signs
                const uint32_t bits = f == Format::kF16 ? 0x2400 + random() % 0x1000 : 0x3c00 + random() % 0x200;
                const uint16_t half = static_cast<uint16_t>(bits | (random() & 1) << 15);
                std::memcpy(&raw[2 * i], &half, 2);
            }
        } else if (f == Format::kF32) {
            for (int64_t i = 0; i < outputs * inputs; ++i) {
                const float x = std::uniform_real_distribution<float>(-0.3f, 0.3f)(random);
                std::memcpy(&raw[4 * i], &x, 4);
            }
        } else {
            for (auto& b : raw) b = static_cast<uint8_t>(random());
            const bool is_k = layout->block_elements == 256, is_five = f == Format::kQ5_1 || f == Format::kQ5_K;
            for (size_t at = 0; at < raw.size(); at += layout->block_bytes) {  // scales that make weights of at most 1/4, around 0
                const size_t d = f == Format::kQ6_K ? at + 208 : at;
                raw[d] = 0, raw[d + 1] = is_k ? 0x08 : f == Format::kQ8_0 ? 0x18 : 0x20;  // 2^-13 times integers, 2^-9, 2^-7
                if (f == Format::kQ4_1 || f == Format::kQ5_1) raw[d + 2] = 0, raw[d + 3] = is_five ? 0xb0 : 0xac;  // -16 or -8 times 2^-7
                if (f == Format::kQ4_K || f == Format::kQ5_K) raw[d + 2] = 0, raw[d + 3] = is_five ? 0x18 : 0x14;  // 16 or 8 times 2^-13
            }
        }
        e.data.push_back(raw);
        weights.insert(weights.end(), {static_cast<int64_t>(f), outputs, inputs});
        return static_cast<int64_t>(e.data.size() - 1);
    };
    const int64_t q = kHeads * kHeadDim, kv = kKvHeads * kHeadDim, ffn = 256;
    const int64_t table = weight(Format::kF32, kVocab, kHidden), norm = weight(Format::kF32, 1, kHidden), bias = weight(Format::kF32, 1, q + 2 * kv);
    const int64_t qkv = weight(format, q + 2 * kv, kHidden), out = weight(Format::kF32, kHidden, q), gate = weight(format, 2 * ffn, kHidden);
    const int64_t down = weight(format, kHidden, ffn), head = weight(format, kVocab, kHidden), factors = weight(Format::kF32, 1, kHeadDim / 2);
    for (int64_t i = 0; i < kHeadDim / 2; ++i) {  // from 1 to 9, as of models that were made for short texts first
        const float factor = 1.0f + 8.0f * static_cast<float>(i) / (kHeadDim / 2);
        std::memcpy(&e.data.back()[4 * i], &factor, 4);
    }
    const std::vector<int64_t> widths{kHidden, kHidden, q + 2 * kv, q, 2 * ffn, ffn};  // buffers of tokens: x h qkv attended gated f
    e.ints = {3, kVocab, 1, kKvHeads, kHeadDim, 8, static_cast<int64_t>(e.data.size()), 14};
    for (const int64_t width : widths) e.ints.insert(e.ints.end(), {0, width});
    e.ints.insert(e.ints.end(), {1, kHidden, 1, kVocab});
    e.ints.insert(e.ints.end(), weights.begin(), weights.end());
    const auto op = [&](std::initializer_list<int64_t> ints, std::initializer_list<double> reals = {}) {
        e.ints.insert(e.ints.end(), ints);
        e.reals.insert(e.reals.end(), reals);
    };
    op({0, table, 0, 0, kHidden, 0}, {1.0});
    op({1, 0, 0, kHidden, 0, 1, 0, kHidden, 0, norm, 0}, {1e-5});
    op({2, 1, 0, kHidden, 0, 2, 0, q + 2 * kv, 0, 0, 1, 1, qkv, bias});
    op({3, 2, 0, q, 0, kHeadDim, 1, -1}, {10000.0});
    op({3, 2, q, kv, 0, kHeadDim, 0, factors}, {10000.0});
    op({4, 2, 0, q, 0, 2, q, kv, 0, 2, q + kv, kv, 0, 3, 0, q, 0, 0, kHeads, 0}, {0.25});
    op({2, 3, 0, q, 0, 0, 0, kHidden, 0, 1, 1, 0, out});
    op({2, 0, 0, kHidden, 0, 4, 0, 2 * ffn, 0, 0, 1, 0, gate});
    op({5, 4, 0, 2 * ffn, 0, 5, 0, ffn, 0, 1});
    op({2, 5, 0, ffn, 0, 0, 0, kHidden, 0, 1, 1, 0, down});
    op({1, 1, 0, kHidden, 0, 0, 0, kHidden, 0, norm, 1}, {1e-5});
    op({6, 0, 0, kHidden, 0, 6, 0, kHidden, 1});
    op({2, 6, 0, kHidden, 1, 7, 0, kVocab, 1, 0, 1, 0, head});
    op({7, 7, 0, kVocab, 1});
    return e;
}

void pack_all(const Program& program, Encoded* e) {
    for (const PackedEntry& entry : packed_layout(program)) {
        e->packed.resize(entry.offset + entry.num_bytes);
        pack(program.weights[entry.weight], e->data[entry.weight].data(), e->packed.data() + entry.offset);
    }
}

constexpr ModelLimits kLimits{64, 16, 16, 700, 800, 1, KvType::kF16};

// `e` must outlive the model.
std::unique_ptr<Model> make(Encoded& e, const char* isa, int num_threads, KvType kv_type = KvType::kF16) {
    const KernelSet* kernels = nullptr;
    if (!select_kernels(isa, &kernels).ok()) return nullptr;
    Program program;
    const Status decoded = decode_program(e.ints, e.reals, e.bytes(), &program);
    expect(decoded.ok(), decoded.message.c_str());
    if (decoded.ok() && e.packed.empty()) pack_all(program, &e);
    expect(use_packed(&program, {e.packed.data(), e.packed.size()}).ok(), "packed weights");
    ModelLimits limits = kLimits;
    limits.num_threads = num_threads;
    limits.kv_type = kv_type;
    std::unique_ptr<Model> model;
    expect(decoded.ok() && Model::create(std::move(program), limits, *kernels, &model).ok(), "create");
    return model;
}

struct Row {
    int start, count, first_block;
};
struct Result {
    std::vector<int32_t> ids, top_ids;
    std::vector<float> logprobs, top_logprobs, wanted_logprobs;
    bool operator==(const Result&) const = default;
};

// Token t of every sequence is (7 t + 3) % vocab; the last token of each row is sampled from.
Result run(Model& model, const std::vector<Row>& rows, Status* status = nullptr, int32_t wrong_token = -1) {
    std::vector<int32_t> ids, starts, counts, tables, logit_tokens, targets(rows.size(), -1), top(rows.size(), 5), top_ks(rows.size(), 30);
    for (const Row& row : rows) {
        starts.push_back(row.start);
        counts.push_back(row.count);
        for (int t = row.start; t < row.start + row.count; ++t) ids.push_back((7 * t + 3) % kVocab);
        for (int b = 0; b < 40; ++b) tables.push_back(row.first_block + b < 64 ? row.first_block + b : -1);
        logit_tokens.push_back(static_cast<int32_t>(ids.size()) - 1);
    }
    if (wrong_token >= 0) ids[0] = wrong_token;
    const size_t n = rows.size();
    std::vector<int64_t> positions;
    for (const Row& row : rows) positions.push_back(row.start + row.count);
    std::vector<uint64_t> seeds(n, 99);
    const std::vector<float> temperatures(n, 0.9f), top_ps(n, 0.95f), min_ps(n, 0.01f), penalties(n, 1.1f), presences(n, 0.2f), frequencies(n, 0.1f);
    const std::vector<float> biases(2 * n, 0.5f);
    const std::vector<int32_t> mask_rows(n, 0), penalty_counts(3 * n, 2);
    const std::vector<uint32_t> mask{0xfffffffe, 0x3ffff};
    const int32_t ready = 1;
    std::vector<int32_t> threes, penalty_ids, twos, bias_ids, banned_ids, wanted_ids;
    for (size_t i = 0; i <= n; ++i) threes.push_back(3 * i), twos.push_back(2 * i);
    for (size_t i = 0; i < n; ++i) {
        for (const int id : {0, 7, kVocab - 1}) penalty_ids.push_back(id);
        for (const int id : {7, 3}) bias_ids.push_back(id);
        for (const int id : {1, kVocab - 2}) banned_ids.push_back(id);
        for (const int id : {kVocab - 1, 0}) wanted_ids.push_back(id);
    }
    Result r{std::vector<int32_t>(n), std::vector<int32_t>(n * kMaxTop), std::vector<float>(n), std::vector<float>(n * kMaxTop), std::vector<float>(2 * n)};
    const std::unique_ptr<bool[]> finite(new bool[n]);
    const BatchView batch{static_cast<int64_t>(ids.size()), static_cast<int64_t>(n), 40, static_cast<int64_t>(n), ids.data(), starts.data(), counts.data(),
                          tables.data(), logit_tokens.data(), targets.data(), positions.data(), seeds.data(), temperatures.data(), top_ks.data(), top_ps.data(),
                          min_ps.data(), top.data(), penalties.data(), presences.data(), frequencies.data(), threes.data(), penalty_ids.data(), penalty_counts.data(), twos.data(),
                          bias_ids.data(), biases.data(), twos.data(), banned_ids.data(), twos.data(), wanted_ids.data(), mask_rows.data(), mask.data(), &ready, static_cast<int64_t>(penalty_ids.size()),
                          static_cast<int64_t>(bias_ids.size()), static_cast<int64_t>(banned_ids.size()), static_cast<int64_t>(wanted_ids.size()), 1, static_cast<int64_t>(mask.size())};
    const Status done = model.run(batch, {r.ids.data(), r.logprobs.data(), r.top_ids.data(), r.top_logprobs.data(), r.wanted_logprobs.data(), finite.get()});
    if (status) {
        *status = done;
        return r;
    }
    expect(done.ok(), done.message.c_str());
    for (size_t i = 0; i < n; ++i) expect(finite[i], "finite logits");
    return r;
}

bool is_supported(const char* isa) {
    const KernelSet* kernels = nullptr;
    return select_kernels(isa, &kernels).ok();
}

void test_same_bits(const char* isa, Format format, KvType kv_type) {
    Encoded e = encode(format);
    const auto one = make(e, isa, 1, kv_type), many = make(e, isa, 3, kv_type);
    if (!one) return;
    for (const auto& rows : std::vector<std::vector<Row>>{{{0, 1, 0}}, {{0, 300, 0}}, {{0, 20, 0}, {0, 270, 2}, {0, 1, 20}, {0, 33, 22}}, {{0, 3, 0}, {0, 2, 1}}})
        expect(run(*one, rows) == run(*many, rows), "threads change nothing");
    const Result whole = run(*many, {{0, 300, 0}});
    for (int start = 0; start < 300;) {
        const int count = std::min(37 + start / 3, 300 - start);
        const Result chunk = run(*many, {{start, count, 30}});
        start += count;
        if (start == 300) expect(chunk == whole, "chunks change nothing");
    }
    for (int i = 0; i < 50; ++i) run(*many, {{300 + i, 1, 30}});  // decode, split over the keys
    expect(run(*many, {{0, 350, 0}}) == run(*many, {{349, 1, 30}}), "decode gives the bits of prefill");
}

std::vector<uint8_t> random_bytes(std::mt19937& random, size_t count) {
    std::vector<uint8_t> out(count);
    for (uint8_t& byte : out) byte = static_cast<uint8_t>(random());
    return out;
}

// Weights of random bytes, with NaN and infinite scales, norms and embeddings: a step ends, whatever comes out.
void test_any_weights(const char* isa, Format format) {
    std::mt19937 random(3);
    Encoded e = encode(format);
    for (size_t i = 0; i + 1 < e.data.size(); ++i) e.data[i] = random_bytes(random, e.data[i].size());  // the last, rope's factors, is checked
    const auto model = make(e, isa, 2);
    if (!model) return;
    Status status;
    run(*model, {{0, 20, 0}, {0, 3, 2}}, &status);
    expect(status.ok(), "any bytes are weights");
}

// Packing and the kernels touch the bytes that are theirs and no other: each lies in memory of just its size.
void test_strips(const char* isa, Format format) {
    const KernelSet* kernels = nullptr;
    if (!select_kernels(isa, &kernels).ok()) return;
    std::mt19937 random(4);
    const Layout* layout = layout_of(static_cast<int64_t>(format));
    for (const int64_t num_inputs : {32, 160, 256, 576, 768}) {
        if (num_inputs % layout->block_elements) continue;
        Weight w{format, 19, num_inputs, num_inputs / layout->block_elements * layout->block_bytes, nullptr};
        choose_family(&w);
        const auto data = random_bytes(random, w.num_outputs * w.row_bytes);
        std::vector<uint8_t> packed(w.packed_bytes());
        pack(w, data.data(), packed.data());
        for (int64_t n = 1; n <= 8; ++n) {
            auto columns = random_bytes(random, n * num_inputs / kBlockColumns * kQuantizedBytes);
            for (size_t block = n * kQuantizedBytes; block <= columns.size(); block += n * kQuantizedBytes)  // zero points that a sum of 32 bytes can have
                for (int64_t c = 1; c <= n; ++c) {
                    const int32_t zero_point = static_cast<int32_t>(random() % 65536) - 32768;
                    std::memcpy(&columns[block - 4 * c], &zero_point, 4);
                }
            std::vector<float> out(n * kStripRows);
            for (int64_t strip = 0; strip < 2; ++strip)
                kernels->multiply_strip(w.family, n, packed.data() + strip * w.strip_bytes, num_inputs / kBlockColumns, reinterpret_cast<const int8_t*>(columns.data()), out.data());
        }
    }
}

uint64_t digest_of(uint64_t digest, const Result& r) {
    const auto add = [&](const auto& values) {
        for (const auto& value : values) {
            uint32_t bits;
            static_assert(sizeof value == sizeof bits);
            std::memcpy(&bits, &value, sizeof bits);
            digest = (digest ^ bits) * 0x100000001b3;  // FNV-1a, by words
        }
    };
    add(r.ids);
    add(r.logprobs);
    add(r.top_ids);
    add(r.top_logprobs);
    return digest;
}

// Sets that fuse give the same bits. Generic's other rounding moves a logit by some 1e-5, and where it tips an activation to
// the next of its 8-bit steps, by up to 1/127 of the activation times a weight: two such steps are allowed.
void test_instruction_sets_agree() {
    constexpr float kTolerance = 0.01f;
    std::vector<std::pair<const char*, uint64_t>> digests;
    float worst = 0;
    for (const char* isa : kIsas)
        if (is_supported(isa)) digests.push_back({isa, 0xcbf29ce484222325});
    for (const Format format : kFormats) {
        Encoded e = encode(format);
        Result generic, fusing;
        for (auto& [isa, digest] : digests) {
            const auto model = make(e, isa, 2);
            const Result result = run(*model, {{0, 20, 0}, {0, 270, 2}, {0, 1, 20}, {0, 33, 22}});
            digest = digest_of(digest, result);
            if (isa == kIsas[0]) {
                generic = result;
                continue;
            }
            if (fusing.ids.empty()) fusing = result;
            expect(result == fusing, "instruction sets that fuse give the same bits");
            for (size_t i = 0; i < result.top_logprobs.size(); ++i) worst = std::max(worst, std::fabs(result.top_logprobs[i] - generic.top_logprobs[i]));
        }
    }
    expect(worst <= kTolerance, "generic agrees with the others");
    std::printf("largest difference between generic and the others: %.2g of %.2g\n", worst, kTolerance);
    for (const auto& [isa, digest] : digests) std::printf("%-8s %016llx\n", isa, static_cast<unsigned long long>(digest));
}

void test_errors() {
    Encoded e = encode(Format::kQ4_1);
    const auto model = make(e, "", 2);
    Status status;
    run(*model, {{0, 4, 0}}, &status, kVocab);
    expect(status.code == Status::kInvalid, "a token beyond the vocabulary is an error");
    run(*model, {{0, 400, 50}}, &status);
    expect(status.code == Status::kInvalid, "a block beyond the cache is an error");
    run(*model, {{0, 701, 0}}, &status);
    expect(status.code == Status::kInvalid, "too many tokens are an error");
    const KernelSet* kernels = nullptr;
    expect(!select_kernels("mmx", &kernels).ok(), "an unknown instruction set is an error");

    const auto bytes = e.bytes();
    for (size_t cut = 0; cut < e.ints.size(); ++cut) {
        Program program;
        expect(!decode_program({e.ints.data(), cut}, e.reals, bytes, &program).ok(), "a plan cut short is an error");
    }
    std::mt19937 random(1);
    for (int i = 0; i < 3000; ++i) {  // damaged numbers: an error or a plan, never a crash
        Encoded damaged = e;
        damaged.ints[random() % damaged.ints.size()] = static_cast<int64_t>(random()) - (1u << 31);
        Program program;
        (void)decode_program(damaged.ints, damaged.reals, bytes, &program);
    }
}

// Every tile of every phase runs once, on scratch that its thread has for itself; more threads than there are ranges of tiles
// or processors. Nothing here is atomic: the thread sanitizer sees whether phases are kept apart.
void test_pool() {
    constexpr int64_t kScratch = 16;
    std::mt19937 random(5);
    for (const int num_threads : {1, 2, 3, 11}) {
        std::vector<float> scratch(num_threads * kScratch);
        std::unique_ptr<Pool> pool;
        expect(Pool::create(num_threads, scratch.data(), kScratch, &pool).ok(), "a pool");
        int64_t num_tiles = 0;
        for (int step = 0; step < 20; ++step) {
            pool->begin_step();
            for (int phase = 0; phase < 30; ++phase) {
                std::vector<int> runs(random() % 40);
                pool->for_tiles(static_cast<int64_t>(runs.size()), [&](int64_t tile, float* own) {
                    ++runs[tile];
                    ++own[0];
                });
                for (const int count : runs) expect(count == 1, "a tile runs once");
                num_tiles += static_cast<int64_t>(runs.size());
            }
            pool->end_step();
            if (step % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // workers park
        }
        float total = 0;
        for (int i = 0; i < num_threads; ++i) total += scratch[i * kScratch];
        expect(total == static_cast<float>(num_tiles), "scratch of one thread is no other's");
    }
}

void test_philox() {
    expect(philox4x32_10({0, 0, 0, 0}, 0, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, "philox of zeros");
    expect(philox4x32_10({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}, "philox of ones");
}

}  // namespace

// [ISA]: the tests of one instruction set are of this one alone
int main(int argc, char** argv) {
    const char* const only = argc > 1 ? argv[1] : nullptr;
    if (only && !is_supported(only)) {
        std::printf("FAILED: %s is no instruction set of this CPU\n", only);
        return 1;
    }
    for (const char* isa : kIsas) {
        if (!is_supported(isa) || (only && std::strcmp(only, isa) != 0)) continue;
        for (const Format format : {Format::kF32, Format::kQ4_1, Format::kQ6_K, Format::kQ8_0})
            test_same_bits(isa, format, format == Format::kQ4_1 ? KvType::kI8 : KvType::kF16);
        for (const Format format : kPackedFormats) {
            test_strips(isa, format);
            test_any_weights(isa, format);
        }
    }
    test_instruction_sets_agree();
    test_errors();
    test_pool();
    test_philox();
    std::printf(num_failures ? "%d failures\n" : "all passed\n", num_failures);
    return num_failures != 0;
}
