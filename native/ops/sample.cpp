// sample: one id a logit row, by the six steps of plan/ops.py; the logits stay here.
//
// The vocabulary is never sorted whole. Top-k and top-p keep prefixes of one order (logit descending, id ascending), so
// the logits are counted in buckets of that order, and only the bucket in which a prefix ends is sorted.
#include "../philox.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace jilju::JILJU_ISA {
namespace {

constexpr int kNumBuckets = 2048;
constexpr float kBucketsPerUnit = 64.0f;  // buckets of 1/64 nat reach 32 nats below the largest logit, then one for the rest
constexpr int64_t kMassChunk = 64;
constexpr float kMaxGreedyTemperature = 1e-4f;

struct Candidate {
    float logit;
    int32_t id;
};
inline bool before(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

struct Scratch {
    float* logits;             // [vocab] a row's own copy: penalised, banned, divided by the temperature
    float* masses;             // [vocab] exp(logit / temperature - largest)
    Candidate* candidates;     // [vocab]
    double* bucket_masses;     // [kNumBuckets]
    int32_t* bucket_counts;    // [kNumBuckets]
    uint32_t* seen;            // [vocab / 32 + 1] a bit an id

    Scratch(float* p, int64_t vocab) {
        bucket_masses = reinterpret_cast<double*>(p);
        candidates = reinterpret_cast<Candidate*>(p + 2 * kNumBuckets);
        logits = p + 2 * kNumBuckets + 2 * vocab;
        masses = logits + vocab;
        bucket_counts = reinterpret_cast<int32_t*>(masses + vocab);
        seen = reinterpret_cast<uint32_t*>(bucket_counts + kNumBuckets);
    }
};

struct Summary {
    bool finite;
    float largest;
    float log_sum;  // log of the sum of exp(logit - largest)
};

Summary summarize(const float* logits, int64_t vocab) {
    const int64_t whole = vocab / 8 * 8;
    const int tail = static_cast<int>(vocab % 8);
    F32 top = set1(-INFINITY), poison = zero();  // x * 0 is 0 for finite x, else NaN
    for (int64_t i = 0; i < whole; i += 8) {
        const F32 x = load(logits + i);
        top = max(top, x);
        poison = fma(x, zero(), poison);
    }
    if (tail) {
        const F32 x = load_n(logits + whole, tail);
        top = max(top, first_n(x, tail, top));
        poison = fma(x, zero(), poison);
    }
    const float largest = max_lane(top);
    if (!(sum(poison) == 0.0f)) return {false, 0.0f, 0.0f};
    F32 total = zero();
    const F32 shift = set1(largest);
    for (int64_t i = 0; i < whole; i += 8) total = add(total, exp(sub(load(logits + i), shift)));
    if (tail) total = add(total, first_n(exp(sub(load_n(logits + whole, tail), shift)), tail, zero()));
    return {true, largest, std::log(sum(total))};
}

// The num_top largest, in order.
void find_top(const float* logits, int64_t vocab, int num_top, Candidate* top) {
    int count = 0;
    const auto offer = [&](int64_t i) {
        const Candidate c{logits[i], static_cast<int32_t>(i)};
        if (count == num_top && !before(c, top[count - 1])) return;
        int at = count < num_top ? count++ : num_top - 1;
        for (; at > 0 && before(c, top[at - 1]); --at) top[at] = top[at - 1];
        top[at] = c;
    };
    int64_t i = 0;
    for (; i < vocab && count < num_top; ++i) offer(i);
    for (; i + 8 <= vocab; i += 8)
        if (any_less(set1(top[count - 1].logit), load(logits + i)))
            for (int64_t j = i; j < i + 8; ++j) offer(j);
    for (; i < vocab; ++i) offer(i);
}

int32_t largest_id(const float* logits, int64_t vocab) {
    F32 top = set1(-INFINITY);
    const int64_t whole = vocab / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) top = max(top, load(logits + i));
    float largest = max_lane(top);
    for (int64_t i = whole; i < vocab; ++i) largest = logits[i] > largest ? logits[i] : largest;
    for (int64_t i = 0; i < vocab; ++i)
        if (logits[i] == largest) return static_cast<int32_t>(i);
    return 0;
}

inline int bucket_of(float logit, float largest) {
    const float depth = (largest - logit) * kBucketsPerUnit;  // monotonic in the logit
    return depth < static_cast<float>(kNumBuckets - 1) ? static_cast<int>(depth) : kNumBuckets - 1;
}

// The last candidate, in order, that a prefix keeps.
struct Cut {
    Candidate last;
    bool keeps(const Candidate& c) const { return !before(last, c); }
};

class Sampler {
public:
    Sampler(const float* logits, int64_t vocab, float largest, const Scratch& s) : logits_(logits), vocab_(vocab), largest_(largest), s_(s) {
        std::memset(s.bucket_masses, 0, kNumBuckets * sizeof(double));
        std::memset(s.bucket_counts, 0, kNumBuckets * sizeof(int32_t));
        for (int64_t i = 0; i < vocab; ++i) {
            if (s.masses[i] == 0.0f) continue;  // banned, or below 2^-126 of the largest: never drawn
            const int b = bucket_of(logits[i], largest);
            s.bucket_counts[b] += 1;
            s.bucket_masses[b] += s.masses[i];
        }
        for (int b = 0; b < kNumBuckets; ++b) mass_ += s.bucket_masses[b];
    }

    // Keep the k largest.
    void keep_count(int64_t k) {
        double mass = 0;
        for (int b = 0; b < kNumBuckets; ++b) {
            if (s_.bucket_counts[b] < k) {
                k -= s_.bucket_counts[b];
                mass += s_.bucket_masses[b];
                continue;
            }
            sort_bucket(b);
            for (int64_t i = 0; i < k; ++i) mass += s_.masses[s_.candidates[i].id];
            cut_ = {s_.candidates[k - 1]};
            has_cut_ = true;
            mass_ = mass;
            return;
        }
    }

    // Keep the shortest prefix of what is kept whose share of its mass is >= p.
    void keep_mass(double p) {
        const double wanted = p * mass_;
        double mass = 0;
        for (int b = 0; b < kNumBuckets; ++b) {
            if (mass + s_.bucket_masses[b] < wanted) {
                mass += s_.bucket_masses[b];
                continue;
            }
            const int64_t count = sort_bucket(b);
            for (int64_t i = 0; i < count; ++i) {
                mass += s_.masses[s_.candidates[i].id];
                if (mass < wanted && i + 1 < count) continue;
                cut_ = {s_.candidates[i]};
                has_cut_ = true;
                return;
            }
        }
    }

    // Drop the rest's mass, then the first id whose cumulative mass exceeds u * total.
    int32_t draw(float min_p, double u) {
        for (int64_t i = 0; i < vocab_; ++i)
            if (s_.masses[i] < min_p || (has_cut_ && !cut_.keeps({logits_[i], static_cast<int32_t>(i)}))) s_.masses[i] = 0.0f;
        const auto chunk_mass = [&](int64_t begin) {  // a chain each, so that they overlap
            double mass = 0;
            for (int64_t i = begin; i < min_int(begin + kMassChunk, vocab_); ++i) mass += s_.masses[i];
            return mass;
        };
        double total = 0;
        for (int64_t i = 0; i < vocab_; i += kMassChunk) total += chunk_mass(i);
        const double wanted = u * total;
        double mass = 0;
        int32_t last = 0;
        for (int64_t i = 0; i < vocab_; i += kMassChunk) {
            const double here = chunk_mass(i);
            if (here > 0 && mass + here > wanted) {
                for (int64_t j = i; j < min_int(i + kMassChunk, vocab_); ++j) {
                    if (s_.masses[j] == 0.0f) continue;
                    last = static_cast<int32_t>(j);
                    mass += s_.masses[j];
                    if (mass > wanted) return last;
                }
                return last;  // the chunk's own sum and this one may differ in the last bit
            }
            mass += here;
        }
        for (int64_t j = vocab_ - 1; j >= 0; --j)
            if (s_.masses[j] > 0.0f) return static_cast<int32_t>(j);
        return largest_id(logits_, vocab_);
    }

private:
    // The kept candidates of one bucket, in order.
    int64_t sort_bucket(int bucket) {
        int64_t count = 0;
        for (int64_t i = 0; i < vocab_; ++i) {
            if (s_.masses[i] == 0.0f || bucket_of(logits_[i], largest_) != bucket) continue;
            const Candidate c{logits_[i], static_cast<int32_t>(i)};
            if (!has_cut_ || cut_.keeps(c)) s_.candidates[count++] = c;
        }
        std::sort(s_.candidates, s_.candidates + count, [](const Candidate& a, const Candidate& b) { return before(a, b); });
        return count;
    }

    const float* logits_;
    int64_t vocab_;
    float largest_;
    Scratch s_;
    double mass_ = 0;
    bool has_cut_ = false;
    Cut cut_{};
};

void penalize(float* logits, int64_t vocab, const int32_t* ids, int64_t count, float penalty, uint32_t* seen) {
    std::memset(seen, 0, static_cast<size_t>(vocab / 32 + 1) * sizeof(uint32_t));  // other ops have the same scratch
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bit = 1u << (ids[i] & 31);
        if (seen[ids[i] >> 5] & bit) continue;
        seen[ids[i] >> 5] |= bit;
        float& l = logits[ids[i]];
        l = l > 0 ? l / penalty : l * penalty;
    }
}

int32_t choose(float* logits, int64_t vocab, const BatchView& batch, int64_t i, const Scratch& s) {
    if (batch.repetition_penalties[i] != 1.0f)
        penalize(logits, vocab, batch.penalty_ids + batch.penalty_starts[i], batch.penalty_starts[i + 1] - batch.penalty_starts[i], batch.repetition_penalties[i], s.seen);
    for (int32_t j = batch.banned_starts[i]; j < batch.banned_starts[i + 1]; ++j) logits[batch.banned_ids[j]] = -INFINITY;

    const float temperature = batch.temperatures[i];
    const int32_t best = largest_id(logits, vocab);
    if (temperature < kMaxGreedyTemperature || logits[best] == -INFINITY) return best;

    const F32 divisor = set1(temperature), largest = set1(logits[best] / temperature);
    for (int64_t j = 0; j < vocab; j += 8) {
        const int n = static_cast<int>(min_int(8, vocab - j));
        const F32 x = div(load_n(logits + j, n), divisor);
        store_n(logits + j, x, n);
        store_n(s.masses + j, exp(sub(x, largest)), n);
    }
    Sampler sampler(logits, vocab, logits[best], s);
    if (batch.top_ks[i] > 0) sampler.keep_count(batch.top_ks[i]);
    if (batch.top_ps[i] < 1.0f) sampler.keep_mass(batch.top_ps[i]);
    return sampler.draw(batch.min_ps[i], uniform(batch.seeds[i], batch.positions[i]));
}

void sample_row(const float* logits, int64_t vocab, const BatchView& batch, int64_t i, ResultView& result, const Scratch& s) {
    int32_t* top_ids = result.top_ids + i * kMaxTop;
    float* top_logprobs = result.top_logprobs + i * kMaxTop;
    for (int j = 0; j < kMaxTop; ++j) {
        top_ids[j] = -1;
        top_logprobs[j] = 0.0f;
    }
    const Summary summary = summarize(logits, vocab);
    result.finite[i] = summary.finite;
    result.token_ids[i] = batch.targets[i] >= 0 ? batch.targets[i] : 0;
    result.logprobs[i] = 0.0f;
    if (!summary.finite) return;
    const auto logprob = [&](float logit) { return (logit - summary.largest) - summary.log_sum; };

    const int num_top = static_cast<int>(min_int(batch.num_top[i], vocab));
    if (num_top > 0) {
        Candidate top[kMaxTop];
        find_top(logits, vocab, num_top, top);
        for (int j = 0; j < num_top; ++j) {
            top_ids[j] = top[j].id;
            top_logprobs[j] = logprob(top[j].logit);
        }
    }
    if (batch.targets[i] >= 0) {
        result.logprobs[i] = logprob(logits[batch.targets[i]]);
        return;
    }
    std::memcpy(s.logits, logits, static_cast<size_t>(vocab) * sizeof(float));
    const int32_t id = choose(s.logits, vocab, batch, i, s);
    result.token_ids[i] = id;
    result.logprobs[i] = logprob(logits[id]);
}

}  // namespace

int64_t sample_scratch_floats(int64_t vocab) { return 2 * kNumBuckets + 4 * vocab + kNumBuckets + vocab / 32 + 1; }

void sample(const SampleOp& op, Step& step, Pool& pool) {
    const int64_t vocab = step.program->vocab_size;
    pool.for_tiles(step.num_logits, [&](int64_t i, float* scratch) {
        sample_row(step.at(op.logits, i), vocab, step.batch, step.first_logit + i, step.result, Scratch(scratch, vocab));
    });
}

}  // namespace jilju::JILJU_ISA
