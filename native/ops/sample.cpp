// sample: one id a logit row, by the six steps of plan/ops.py; the logits stay here, and are changed where the row says so.
//
// A row is read once from memory: strips of the vocabulary, each twice while it lies in L1, give the largest logit of every
// group of 256 ids and the sums of exponentials. Then the row is decided by the few groups that matter: what lies below a
// cut is skipped by groups, the rest is a list of candidates in ascending order of ids. The vocabulary is never sorted.
// Strips are the same whatever the threads, and are joined in ascending order. A group whose largest logit is -inf is not
// read again, so a mask need not be written into it.
#include "../philox.h"
#include "simd.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace jilju::JILJU_ISA {
namespace {

constexpr int64_t kStripsPerTile = 4;  // 16384 logits: some 5 us of work
constexpr int64_t kGroupsPerStrip = kStripIds / kGroupIds;
constexpr int64_t kNumBuckets = 2048;
constexpr float kMaxGreedyTemperature = 1e-4f;
constexpr float kLog2e = 1.44269504f;
constexpr double kLikelyDepth = 8;  // nats below the largest: where top-p mostly ends

struct Candidate {
    float logit;
    int32_t id;
};
inline bool before(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

// 2^y for y <= 0, relative error below 2e-7: 2^n times a polynomial of degree 5 on [-1/2, 1/2]. 2^0 is exactly 1. Below -126
// it stays at 2^-126: beside a mass of 1 that is nothing. To add 1.5 * 2^23 rounds to whole numbers.
JILJU_INLINE F32 exp2_below(F32 y) {
    y = max(y, set1(-126.0f));
    const F32 shift = set1(0x1.8p23f), n = add(y, shift);
    const F32 f = sub(y, sub(n, shift));
    F32 p = set1(0x1.5bba14p-10f);
    p = fma(p, f, set1(0x1.3cea88p-7f));
    p = fma(p, f, set1(0x1.c6b752p-5f));
    p = fma(p, f, set1(0x1.ebf9bcp-3f));
    p = fma(p, f, set1(0x1.62e42ap-1f));
    p = fma(p, f, set1(1.0f));
    return add_exponents(p, n);
}

JILJU_INLINE F32 load_some(const float* p, int n) { return n == 8 ? load(p) : load_n(p, n); }

// Mass of logits of which the largest is `largest`: 2^((x - largest) * scale), scale = log2(e) / temperature.
JILJU_INLINE F32 mass_of(F32 x, F32 largest, F32 scale) { return exp2_below(mul(sub(x, largest), scale)); }

float sum_masses(const float* x, int64_t n, float largest, float scale) {
    const F32 top = set1(largest), factor = set1(scale);
    F32 sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int chain = 0; chain < 4; ++chain) sums[chain] = add(sums[chain], mass_of(load(x + i + 8 * chain), top, factor));
    for (; i < n; i += 8) {
        const int count = static_cast<int>(min_int(8, n - i));
        sums[0] = add(sums[0], first_n(mass_of(load_n(x + i, count), top, factor), count, zero()));
    }
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// The largest of n logits. `poison` becomes NaN if one is NaN or infinite: x * 0 is 0 for all others.
JILJU_INLINE float largest_of(const float* x, int64_t n, F32* poison) {
    F32 tops[4] = {set1(-INFINITY), set1(-INFINITY), set1(-INFINITY), set1(-INFINITY)};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int chain = 0; chain < 4; ++chain) {
            const F32 v = load(x + i + 8 * chain);
            tops[chain] = max(tops[chain], v);
            poison[chain] = fma(v, zero(), poison[chain]);
        }
    for (; i < n; i += 8) {
        const int count = static_cast<int>(min_int(8, n - i));
        const F32 v = load_n(x + i, count);
        tops[0] = max(tops[0], first_n(v, count, tops[0]));
        poison[0] = fma(v, zero(), poison[0]);
    }
    return max_lane(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
}

// What a logit row asks for.
struct Wish {
    const BatchView& batch;
    int64_t i;  // logit row of the batch

    bool is_sampled() const { return batch.targets[i] < 0; }
    bool is_greedy() const { return batch.temperatures[i] < kMaxGreedyTemperature; }
    bool is_penalized() const { return batch.repetition_penalties[i] != 1.0f || batch.presence_penalties[i] != 0.0f || batch.frequency_penalties[i] != 0.0f; }
    bool is_changed() const {
        return (is_penalized() && batch.penalty_starts[i] < batch.penalty_starts[i + 1]) || batch.bias_starts[i] < batch.bias_starts[i + 1] ||
               batch.banned_starts[i] < batch.banned_starts[i + 1] || batch.mask_rows[i] >= 0;
    }
    // Whether the draw depends on the mass of the whole vocabulary.
    bool needs_total() const { return is_sampled() && !is_greedy() && batch.top_ks[i] == 0 && (batch.top_ps[i] < 1.0f || batch.min_ps[i] == 0.0f); }
    float scale() const { return kLog2e / batch.temperatures[i]; }
};

struct Scratch {
    int32_t* ids;           // [vocab] candidates, ascending
    int32_t* order;         // [vocab] some of them, in the order of a prefix
    float* masses;          // [vocab + 8] theirs
    float* raw_penalized;   // [vocab] logits of penalty_ids before the penalties
    float* raw_biased;      // [kMaxBiases] logits of bias_ids before the biases
    double* bucket_masses;  // [kNumBuckets]
    int32_t* bucket_counts; // [kNumBuckets]

    Scratch(float* p, int64_t vocab) {
        bucket_masses = reinterpret_cast<double*>(p);
        bucket_counts = reinterpret_cast<int32_t*>(p + 2 * kNumBuckets);
        raw_biased = p + 3 * kNumBuckets;
        masses = raw_biased + kMaxBiases;
        raw_penalized = masses + vocab + 8;
        ids = reinterpret_cast<int32_t*>(raw_penalized + vocab);
        order = ids + vocab;
    }
};

// A logit row: its logits and what is known of them.
class Row {
public:
    Row(const SampleOp& op, const Step& step, int64_t i)
        : logits_(step.at(op.logits, i)),
          vocab_(step.program->vocab_size),
          num_groups_(ceil_div(vocab_, kGroupIds)),
          num_strips_(ceil_div(vocab_, kStripIds)),
          groups_(step.group_largest + i * num_groups_),
          strips_(step.strips + i * num_strips_),
          wish_{step.batch, step.first_logit + i},
          result_(step.result) {}

    static int64_t num_tiles(int64_t vocab) { return ceil_div(ceil_div(vocab, kStripIds), kStripsPerTile); }

    void summarize(int64_t tile) {
        for (int64_t s = tile * kStripsPerTile; s < min_int(num_strips_, (tile + 1) * kStripsPerTile); ++s) {
            const int64_t begin = s * kStripIds, count = min_int(kStripIds, vocab_ - begin);
            F32 poison[4] = {zero(), zero(), zero(), zero()};
            StripSummary& strip = strips_[s];
            strip.largest = -INFINITY;
            for (int64_t g = begin / kGroupIds; g * kGroupIds < begin + count; ++g) {
                groups_[g] = largest_of(logits_ + g * kGroupIds, group_size(g), poison);
                strip.largest = groups_[g] > strip.largest ? groups_[g] : strip.largest;
            }
            strip.finite = sum(add(add(poison[0], poison[1]), add(poison[2], poison[3]))) == 0.0f;
            strip.sum = strip.scaled_sum = sum_masses(logits_ + begin, count, strip.largest, kLog2e);
            if (wish_.needs_total() && !wish_.is_changed() && wish_.scale() != kLog2e)
                strip.scaled_sum = sum_masses(logits_ + begin, count, strip.largest, wish_.scale());
        }
    }

    void decide(const Scratch& s) {
        const BatchView& batch = wish_.batch;
        const int64_t i = wish_.i;
        int32_t* top_ids = result_.top_ids + i * kMaxTop;
        float* top_logprobs = result_.top_logprobs + i * kMaxTop;
        for (int j = 0; j < kMaxTop; ++j) {
            top_ids[j] = -1;
            top_logprobs[j] = 0.0f;
        }
        const int32_t *wanted_ids = batch.wanted_ids + batch.wanted_starts[i], num_wanted = batch.wanted_starts[i + 1] - batch.wanted_starts[i];
        float* wanted_logprobs = result_.wanted_logprobs + batch.wanted_starts[i];
        std::fill(wanted_logprobs, wanted_logprobs + num_wanted, 0.0f);
        const int32_t target = batch.targets[i];
        result_.token_ids[i] = target >= 0 ? target : 0;
        result_.logprobs[i] = 0.0f;
        result_.finite[i] = true;
        for (int64_t k = 0; k < num_strips_; ++k) result_.finite[i] &= strips_[k].finite;
        if (!result_.finite[i]) return;

        largest_ = -INFINITY;
        for (int64_t k = 0; k < num_strips_; ++k) largest_ = strips_[k].largest > largest_ ? strips_[k].largest : largest_;
        double total = 0;
        for (int64_t k = 0; k < num_strips_; ++k) total += strips_[k].sum * std::exp(static_cast<double>(strips_[k].largest) - largest_);
        const double raw_largest = largest_, log_total = std::log(total);
        const auto logprob = [&](float logit) { return static_cast<float>((logit - raw_largest) - log_total); };

        const int num_top = static_cast<int>(min_int(batch.num_top[i], vocab_));
        if (num_top > 0) {
            Candidate top[kMaxTop];
            find_top(num_top, top, s);
            for (int j = 0; j < num_top; ++j) {
                top_ids[j] = top[j].id;
                top_logprobs[j] = logprob(top[j].logit);
            }
        }
        for (int32_t j = 0; j < num_wanted; ++j) wanted_logprobs[j] = logprob(logits_[wanted_ids[j]]);
        if (target >= 0) {
            result_.logprobs[i] = logprob(logits_[target]);
            return;
        }
        if (wish_.is_changed()) change(s);
        if (largest_ == -INFINITY) {
            result_.finite[i] = false;
            return;
        }
        const int32_t id = wish_.is_greedy() ? largest_id() : draw(s);
        result_.token_ids[i] = id;
        result_.logprobs[i] = logprob(raw_logit(id, s));
    }

private:
    int64_t group_size(int64_t g) const { return min_int(kGroupIds, vocab_ - g * kGroupIds); }

    // --- what the row's own lists change ------------------------------------------------------------------------------

    void change(const Scratch& s) {
        const BatchView& b = wish_.batch;
        const int64_t i = wish_.i;
        const auto touch = [&](int32_t id, float logit) {
            logits_[id] = logit;
            groups_[id / kGroupIds] = NAN;  // to be found again
        };
        const auto hold = [](float x) { return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x; };
        const int32_t *bias_ids = b.bias_ids + b.bias_starts[i], *penalty_ids = b.penalty_ids + b.penalty_starts[i];
        const int32_t num_biases = b.bias_starts[i + 1] - b.bias_starts[i];
        num_penalized_ = wish_.is_penalized() ? b.penalty_starts[i + 1] - b.penalty_starts[i] : 0;
        for (int32_t j = 0; j < num_biases; ++j) {
            s.raw_biased[j] = logits_[bias_ids[j]];
            touch(bias_ids[j], hold(s.raw_biased[j] + b.biases[b.bias_starts[i] + j]));
        }
        const float repetition = b.repetition_penalties[i], presence = b.presence_penalties[i], frequency = b.frequency_penalties[i];
        const int32_t* counts = b.penalty_counts + b.penalty_starts[i];
        for (int32_t j = 0; j < num_penalized_; ++j) {
            float l = logits_[penalty_ids[j]];
            s.raw_penalized[j] = l;
            l = l > 0 ? l / repetition : l * repetition;
            l = l - frequency * static_cast<float>(counts[j]);
            if (counts[j] > 0) l = l - presence;
            touch(penalty_ids[j], hold(l));
        }
        for (int32_t j = b.banned_starts[i]; j < b.banned_starts[i + 1]; ++j) touch(b.banned_ids[j], -INFINITY);

        F32 unused[4] = {zero(), zero(), zero(), zero()};
        for (int64_t g = 0; g < num_groups_; ++g)
            if (std::isnan(groups_[g])) groups_[g] = largest_of(logits_ + g * kGroupIds, group_size(g), unused);
        if (b.mask_rows[i] >= 0) mask(b.masks + b.mask_rows[i] * b.mask_words);
        largest_ = -INFINITY;
        for (int64_t g = 0; g < num_groups_; ++g) largest_ = groups_[g] > largest_ ? groups_[g] : largest_;
        if (wish_.needs_total() && largest_ > -INFINITY) sum_again();
    }

    // Bit id % 32 of word id / 32 is set: id may be sampled.
    void mask(const uint32_t* words) {
        for (int64_t g = 0; g < num_groups_; ++g) {
            const int64_t count = group_size(g), first_word = g * (kGroupIds / 32), num_words = ceil_div(count, 32);
            uint32_t any = 0, all = ~0u;
            for (int64_t w = first_word; w < first_word + num_words; ++w) {
                any |= words[w];
                all &= words[w];
            }
            if (all == ~0u) continue;
            F32 top = set1(-INFINITY);
            for (int64_t j = 0; j < count && any; j += 8) {
                const int lanes = static_cast<int>(min_int(8, count - j));
                float* const x = logits_ + g * kGroupIds + j;
                const F32 v = select_bits(load_some(x, lanes), words[first_word + j / 32] >> (j % 32), set1(-INFINITY));
                if (lanes == 8) store(x, v);
                else store_n(x, v, lanes);
                top = max(top, first_n(v, lanes, top));
            }
            groups_[g] = max_lane(top);
        }
    }

    void sum_again() {
        for (int64_t k = 0; k < num_strips_; ++k) {
            StripSummary& strip = strips_[k];
            const int64_t begin = k * kGroupsPerStrip, end = min_int(num_groups_, begin + kGroupsPerStrip);
            strip.largest = -INFINITY;
            for (int64_t g = begin; g < end; ++g) strip.largest = groups_[g] > strip.largest ? groups_[g] : strip.largest;
            strip.scaled_sum = 0.0f;
            for (int64_t g = begin; g < end; ++g)
                if (groups_[g] > -INFINITY) strip.scaled_sum += sum_masses(logits_ + g * kGroupIds, group_size(g), strip.largest, wish_.scale());
        }
    }

    // The model's own logit of an id: biases came first, then penalties.
    float raw_logit(int32_t id, const Scratch& s) const {
        const BatchView& b = wish_.batch;
        const int64_t i = wish_.i;
        for (int32_t j = b.bias_starts[i]; j < b.bias_starts[i + 1]; ++j)
            if (b.bias_ids[j] == id) return s.raw_biased[j - b.bias_starts[i]];
        for (int32_t j = 0; j < num_penalized_; ++j)
            if (b.penalty_ids[b.penalty_starts[i] + j] == id) return s.raw_penalized[j];
        return logits_[id];
    }

    // --- the largest --------------------------------------------------------------------------------------------------

    int32_t largest_id() const {
        for (int64_t g = 0; g < num_groups_; ++g) {
            if (groups_[g] != largest_) continue;
            for (int64_t j = g * kGroupIds;; ++j)
                if (logits_[j] == largest_) return static_cast<int32_t>(j);
        }
        return 0;
    }

    // At least k logits are as large as this: the k-th largest group has one, and so has every larger one.
    float lower_bound_of(int64_t k, const Scratch& s) const {
        if (k > num_groups_) return -FLT_MAX;
        float* const copy = s.masses;
        std::memcpy(copy, groups_, static_cast<size_t>(num_groups_) * sizeof(float));
        std::nth_element(copy, copy + k - 1, copy + num_groups_, [](float a, float b) { return a > b; });
        return copy[k - 1] > -FLT_MAX ? copy[k - 1] : -FLT_MAX;
    }

    // The num_top largest, in order.
    void find_top(int num_top, Candidate* top, const Scratch& s) {
        collect(lower_bound_of(num_top, s), s);
        int count = 0;
        for (int64_t j = 0; j < count_; ++j) {
            const Candidate c{logits_[s.ids[j]], s.ids[j]};
            if (count == num_top && !before(c, top[count - 1])) continue;
            int at = count < num_top ? count++ : num_top - 1;
            for (; at > 0 && before(c, top[at - 1]); --at) top[at] = top[at - 1];
            top[at] = c;
        }
    }

    // --- the draw -----------------------------------------------------------------------------------------------------

    // An id of those that are kept: all whose logit is at least above_, and the candidates, whose logits are below it.
    int32_t draw(const Scratch& s) {
        const BatchView& b = wish_.batch;
        const int64_t i = wish_.i, top_k = b.top_ks[i];
        const double top_p = b.top_ps[i], u = uniform(b.seeds[i], b.positions[i]);
        const float min_p = b.min_ps[i];
        // Below this nothing passes min-p, whose own test comes last; the slack covers the rounding of a mass.
        const double min_p_depth = min_p > 0 ? -std::log(static_cast<double>(min_p)) * 1.00001 + 1e-5 : INFINITY;
        if (top_k > 0) {
            const float bound = lower_bound_of(top_k, s);
            const float min_p_bound = top_p < 1 ? bound : below_largest(min_p_depth);
            collect(min_p_bound > bound ? min_p_bound : bound, s);
            weigh(s);
            if (count_ > top_k) keep_prefix(s, [&](int64_t count, double) { return count >= top_k; });
            if (top_p < 1) {
                const double wanted = top_p * mass(s);
                keep_prefix(s, [&](int64_t, double mass) { return mass >= wanted; });
            }
        } else if (min_p > 0) {
            collect(below_largest(min_p_depth), s);
            weigh(s);
            if (top_p < 1) {
                const double wanted = top_p * total_mass();
                keep_prefix(s, [&](int64_t, double mass) { return mass >= wanted; });
            }
        } else if (top_p < 1) {
            keep_share(top_p, s);
        } else {
            above_ = -FLT_MAX;
            count_ = 0;
        }
        if (min_p > 0) keep(s, [&](int64_t j) { return s.masses[j] >= min_p; });
        return above_ == INFINITY ? draw_candidate(u, s) : draw_kept(u, s);
    }

    // --- top-p of the whole vocabulary --------------------------------------------------------------------------------

    // Logits between which a prefix ends: all from `high` on are in it, none below `low`.
    struct Band {
        float low, high;
    };

    // The prefix ends in a band that is guessed, and checked by summing up what lies above it and in it.
    void keep_share(double top_p, const Scratch& s) {
        const double total = total_mass(), wanted = top_p * total, rest = total - wanted;
        // All ids deeper than this have together at most the mass `rest`: vocab * exp(-depth) <= rest.
        const double deepest = std::log(static_cast<double>(vocab_) / rest) + 1e-3;
        const Band likely{below_largest(deepest < kLikelyDepth ? deepest : kLikelyDepth), INFINITY};
        int64_t num_reaching = 0;
        for (int64_t g = 0; g < num_groups_; ++g) num_reaching += groups_[g] >= likely.low;
        double above = 0;
        for (int attempt = num_reaching > num_groups_ / 4 ? 1 : 0;; ++attempt) {  // else looking is cheaper than sampling
            above = split(attempt == 0 ? likely : attempt == 1 ? sampled_band(rest, deepest, s) : Band{below_largest(deepest), INFINITY}, s);
            if (attempt == 2 || (above < wanted && above + mass(s) >= wanted)) break;
        }
        keep_prefix(s, [&](int64_t, double mass) { return above + mass >= wanted; });
    }

    // Where the mass below a logit passes `rest`, judged by the first ids of every group: between what is three standard
    // deviations of the sample below and above it. One id right there is added for those that the sample may have missed.
    Band sampled_band(double rest, double deepest, const Scratch& s) const {
        constexpr int64_t kSampled = 16, kLast = 255;
        double* const masses = s.bucket_masses;  // by depth
        double* const squares = masses + kLast + 1;
        std::memset(masses, 0, 2 * (kLast + 1) * sizeof(double));
        const F32 top = set1(largest_), scale = set1(wish_.scale());
        const F32 per_unit = set1(static_cast<float>(kLast / (deepest * wish_.batch.temperatures[wish_.i])));
        for (int64_t g = 0; g < num_groups_; ++g) {
            if (groups_[g] == -INFINITY || group_size(g) < kSampled) continue;
            for (int64_t j = g * kGroupIds; j < g * kGroupIds + kSampled; j += 8) {
                float at[8], m[8];
                const F32 x = load(logits_ + j);
                store(at, min(mul(sub(top, x), per_unit), set1(kLast)));
                store(m, mass_of(x, top, scale));
                for (int lane = 0; lane < 8; ++lane) {
                    const int64_t b = static_cast<int64_t>(at[lane]);
                    masses[b] += m[lane];
                    squares[b] += static_cast<double>(m[lane]) * m[lane];
                }
            }
        }
        Band band{below_largest(deepest), INFINITY};
        double below = 0, square = 0;
        for (int64_t b = kLast; b > 0; --b) {
            below += masses[b];
            square += squares[b];
            const double depth = deepest * b / kLast, here = std::exp(-depth), weight = kGroupIds / kSampled;
            const double error = 3 * weight * std::sqrt(square + here * here);
            if (weight * below + error <= rest) band.low = below_largest(depth);
            if (weight * below - error > rest) {
                band.high = below_largest(depth);
                break;
            }
        }
        return band;
    }

    // Candidates are the ids of the band; the strips sum up what lies above it. Returns that mass.
    double split(const Band& band, const Scratch& s) {
        above_ = band.high;
        if (above_ == INFINITY) {
            collect(band.low, s);
            weigh(s);
            return 0;
        }
        const F32 low = set1(band.low), high = set1(band.high), top = set1(largest_), scale = set1(wish_.scale());
        count_ = 0;
        double above = 0;
        for (int64_t k = 0; k < num_strips_; ++k) {
            F32 kept = zero();
            for (int64_t g = k * kGroupsPerStrip; g < min_int(num_groups_, (k + 1) * kGroupsPerStrip); ++g) {
                if (groups_[g] < band.low) continue;
                const int64_t begin = g * kGroupIds, end = begin + group_size(g);
                for (int64_t j = begin; j < end; j += 8) {
                    const int lanes = static_cast<int>(min_int(8, end - j));
                    const F32 x = load_some(logits_ + j, lanes), m = mass_of(x, top, scale);
                    const F32 kept_m = select_less(x, high, zero(), m);
                    kept = add(kept, lanes == 8 ? kept_m : first_n(kept_m, lanes, zero()));
                    uint32_t bits = ~less_bits(x, low) & less_bits(x, high) & ((1u << lanes) - 1);
                    if (!bits) continue;
                    float each[8];
                    store(each, m);
                    for (; bits; bits &= bits - 1) {
                        const int lane = __builtin_ctz(bits);
                        s.ids[count_] = static_cast<int32_t>(j + lane);
                        s.masses[count_++] = each[lane];
                    }
                }
            }
            strips_[k].largest = largest_;
            strips_[k].scaled_sum = sum(kept);
            above += strips_[k].scaled_sum;
        }
        return above;
    }

    // --- candidates ---------------------------------------------------------------------------------------------------

    // A logit so many nats, after division by the temperature, below the largest.
    float below_largest(double depth) const {
        const double logit = largest_ - depth * static_cast<double>(wish_.batch.temperatures[wish_.i]);
        return logit > -FLT_MAX ? static_cast<float>(logit) : -FLT_MAX;
    }

    // Candidates: the ids whose logit is at least `bound`, which is finite.
    void collect(float bound, const Scratch& s) {
        const F32 least = set1(bound);
        count_ = 0;
        for (int64_t g = 0; g < num_groups_; ++g) {
            if (groups_[g] < bound) continue;
            const int64_t begin = g * kGroupIds, end = begin + group_size(g);
            for (int64_t j = begin; j < end; j += 8) {
                const int lanes = static_cast<int>(min_int(8, end - j));
                uint32_t bits = ~less_bits(load_some(logits_ + j, lanes), least) & ((1u << lanes) - 1);
                for (; bits; bits &= bits - 1) s.ids[count_++] = static_cast<int32_t>(j + __builtin_ctz(bits));
            }
        }
    }

    void weigh(const Scratch& s) {
        const F32 top = set1(largest_), scale = set1(wish_.scale());
        for (int64_t j = 0; j < count_; j += 8) {
            float x[8];
            for (int64_t lane = 0; lane < 8; ++lane) x[lane] = logits_[s.ids[min_int(j + lane, count_ - 1)]];
            store(s.masses + j, mass_of(load(x), top, scale));
        }
    }

    double mass(const Scratch& s) const {
        double mass = 0;
        for (int64_t j = 0; j < count_; ++j) mass += s.masses[j];
        return mass;
    }

    template <class Keeps>
    void keep(const Scratch& s, Keeps&& keeps) {
        int64_t count = 0;
        for (int64_t j = 0; j < count_; ++j) {
            if (!keeps(j)) continue;
            s.ids[count] = s.ids[j];
            s.masses[count++] = s.masses[j];
        }
        count_ = count;
    }

    // Keep the shortest prefix of the order for whose count and mass `enough` holds, or all. Candidates are counted in
    // buckets of that order, and only the bucket in which the prefix ends is sorted.
    template <class Enough>
    void keep_prefix(const Scratch& s, Enough&& enough) {
        float lowest = INFINITY, highest = -INFINITY;
        for (int64_t j = 0; j < count_; ++j) {
            const float x = logits_[s.ids[j]];
            lowest = x < lowest ? x : lowest;
            highest = x > highest ? x : highest;
        }
        const float range = highest - lowest, per_unit = range > 0 && range <= FLT_MAX ? static_cast<float>(kNumBuckets - 1) / range : 0.0f;
        const auto bucket_of = [&](float logit) {  // monotonic in the logit
            const float at = (highest - logit) * per_unit;
            return at < static_cast<float>(kNumBuckets - 1) ? static_cast<int64_t>(at) : kNumBuckets - 1;
        };
        std::memset(s.bucket_masses, 0, kNumBuckets * sizeof(double));
        std::memset(s.bucket_counts, 0, kNumBuckets * sizeof(int32_t));
        for (int64_t j = 0; j < count_; ++j) {
            const int64_t b = bucket_of(logits_[s.ids[j]]);
            s.bucket_counts[b] += 1;
            s.bucket_masses[b] += s.masses[j];
        }
        int64_t count = 0, bucket = 0;
        double mass = 0;
        for (; bucket < kNumBuckets && !enough(count + s.bucket_counts[bucket], mass + s.bucket_masses[bucket]); ++bucket) {
            count += s.bucket_counts[bucket];
            mass += s.bucket_masses[bucket];
        }
        if (bucket == kNumBuckets) return;

        int64_t num_sorted = 0;
        for (int64_t j = 0; j < count_; ++j)
            if (bucket_of(logits_[s.ids[j]]) == bucket) s.order[num_sorted++] = static_cast<int32_t>(j);
        const auto candidate = [&](int64_t j) { return Candidate{logits_[s.ids[j]], s.ids[j]}; };
        std::sort(s.order, s.order + num_sorted, [&](int32_t a, int32_t b) { return before(candidate(a), candidate(b)); });
        int64_t last = 0;
        for (;; ++last) {
            mass += s.masses[s.order[last]];
            if (enough(++count, mass) || last + 1 == num_sorted) break;
        }
        const Candidate cut = candidate(s.order[last]);
        keep(s, [&](int64_t j) { return !before(cut, candidate(j)); });
    }

    // The first of n weights at which their sum exceeds `wanted`, and the sum before it; the last with any weight if
    // rounding lets none exceed it.
    struct Crossing {
        int64_t index = 0;
        double before = 0;
    };
    template <class Weight>
    static Crossing crossing(int64_t n, double wanted, Weight&& weight) {
        Crossing last;
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) {
            const double w = weight(j);
            if (w > 0) last = {j, sum};
            sum += w;
            if (sum > wanted) break;
        }
        return last;
    }

    // Mass of a strip, that of the row's largest logit being 1.
    double strip_mass(int64_t k) const {
        if (strips_[k].largest == -INFINITY) return 0;
        return strips_[k].scaled_sum * strip_factor(k);
    }
    double strip_factor(int64_t k) const { return std::exp((static_cast<double>(strips_[k].largest) - largest_) / wish_.batch.temperatures[wish_.i]); }
    double total_mass() const {
        double total = 0;
        for (int64_t k = 0; k < num_strips_; ++k) total += strip_mass(k);
        return total;
    }

    int32_t draw_candidate(double u, const Scratch& s) const {
        return s.ids[crossing(count_, u * mass(s), [&](int64_t j) -> double { return s.masses[j]; }).index];
    }

    // The strip, the group, the id at which the cumulative mass of all that is kept exceeds u * total.
    int32_t draw_kept(double u, const Scratch& s) const {
        const double wanted = u * (total_mass() + mass(s));
        int64_t at = 0;  // of the candidates: those before it are counted
        const auto listed_before = [&](int64_t id) {
            double mass = 0;
            for (; at < count_ && s.ids[at] < id; ++at) mass += s.masses[at];
            return mass;
        };
        const auto listed_from = [&](int64_t id) {
            for (at = 0; at < count_ && s.ids[at] < id;) ++at;
        };
        const Crossing strip = crossing(num_strips_, wanted, [&](int64_t k) { return strip_mass(k) + listed_before((k + 1) * kStripIds); });
        const float largest = strips_[strip.index].largest;
        const double factor = strip_factor(strip.index);

        float masses[kGroupIds];
        const int64_t first_group = strip.index * kGroupsPerStrip;
        listed_from(first_group * kGroupIds);
        const Crossing group = crossing(min_int(kGroupsPerStrip, num_groups_ - first_group), wanted - strip.before, [&](int64_t j) {
            const int64_t g = first_group + j;
            double mass = 0;
            if (groups_[g] >= above_) {
                weigh_group(g, largest, masses);
                for (int64_t i = 0; i < group_size(g); ++i) mass += masses[i];
            }
            return mass * factor + listed_before((g + 1) * kGroupIds);
        });

        const int64_t g = first_group + group.index, first_id = g * kGroupIds;
        listed_from(first_id);
        weigh_group(g, largest, masses);
        const Crossing id = crossing(group_size(g), wanted - strip.before - group.before,
                                     [&](int64_t j) { return masses[j] * factor + listed_before(first_id + j + 1); });
        return static_cast<int32_t>(first_id + id.index);
    }

    // Masses of a group's ids, 0 below above_.
    void weigh_group(int64_t g, float largest, float* masses) const {
        for (int64_t j = 0; j < group_size(g); j += 8) {
            const F32 x = load_some(logits_ + g * kGroupIds + j, static_cast<int>(min_int(8, group_size(g) - j)));
            store(masses + j, select_less(x, set1(above_), zero(), mass_of(x, set1(largest), set1(wish_.scale()))));
        }
    }

    float* const logits_;
    const int64_t vocab_, num_groups_, num_strips_;
    float* const groups_;          // [num_groups] largest logit of each
    StripSummary* const strips_;   // [num_strips]
    const Wish wish_;
    const ResultView& result_;
    float largest_ = 0;
    float above_ = INFINITY;
    int64_t count_ = 0;            // of candidates
    int32_t num_penalized_ = 0;
};

}  // namespace

int64_t sample_scratch_floats(int64_t vocab) { return 3 * kNumBuckets + kMaxBiases + 4 * vocab + 8; }

void sample(const SampleOp& op, Step& step, Pool& pool) {
    const int64_t vocab = step.program->vocab_size, tiles_per_row = Row::num_tiles(vocab);
    pool.for_tiles(step.num_logits * tiles_per_row, [&](int64_t tile, float*) { Row(op, step, tile / tiles_per_row).summarize(tile % tiles_per_row); });
    pool.for_tiles(step.num_logits, [&](int64_t i, float* scratch) { Row(op, step, i).decide(Scratch(scratch, vocab)); });
}

}  // namespace jilju::JILJU_ISA
