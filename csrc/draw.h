// Random sampling: one token per row of logits, by its probability among the tokens that the row's filters keep.
//
// The score of a token is (peak - logit) / temperature, 0 for the likeliest; its weight is exp(-score). Tokens with a
// weight below min_p are dropped first. Then top_k and top_p keep the head of the ranking, by score and then by id.
// Without top_k and top_p, sampling walks the row in the order of ids. With them it walks the ranking without sorting the
// row: tokens are put into buckets of score, and only the buckets that hold a limit or the sample are sorted.
//
// Sums over the vocabulary are float64 over short float32 blocks: a running float32 sum loses the tail of a large
// vocabulary. A row's result depends on its own values alone, summed in a fixed order.
#pragma once

#include "elementwise.h"
#include "old_systems.h"
#include "parallel.h"
#include "row_peaks.h"
#include "simd.h"

QUIRE_OLDEST_VERSION(exp);

namespace quire::QUIRE_ISA {

constexpr int64_t kDrawBlock = 256;
constexpr int64_t kBuckets = 2048;
constexpr float kBucketsPerUnit = 64;  // of score; the last bucket takes all that is beyond 32

class DrawnRow {
   public:
    // `scratch` has scratch_bytes(columns), aligned for a double.
    DrawnRow(int64_t columns, char* scratch) : columns_(columns), num_blocks_((columns + kDrawBlock - 1) / kDrawBlock) {
        blocks_ = reinterpret_cast<double*>(scratch);
        peaks_ = blocks_ + num_blocks_;
        opened_ = reinterpret_cast<uint64_t*>(peaks_ + num_blocks_);
        weights_ = reinterpret_cast<float*>(opened_ + columns);
        ids_ = reinterpret_cast<int32_t*>(weights_ + round_up(columns, kLanes));
        buckets_ = reinterpret_cast<uint16_t*>(ids_ + columns);
    }

    static int64_t scratch_bytes(int64_t columns) {
        const int64_t num_blocks = (columns + kDrawBlock - 1) / kDrawBlock;
        const int64_t bytes = 2 * num_blocks * sizeof(double) + round_up(columns, kLanes) * sizeof(float) +
                              columns * (sizeof(uint64_t) + sizeof(int32_t) + sizeof(uint16_t));
        return round_up(bytes, 64);
    }

    // For a row whose peak is known, and finite.
    int32_t draw(const Draws& draws, int64_t row) {
        const double top_p = draws.top_p[row], uniform = draws.uniforms[row];
        const int32_t top_k = draws.top_k[row];
        logits_ = draws.logits.data + row * draws.logits.stride;
        peak_ = draws.peaks[row];
        inverse_ = 1.0f / draws.temperatures[row];
        weigh(draws.min_p[row]);
        double mass = 0;
        for (int64_t block = 0; block < num_blocks_; ++block) mass += blocks_[block];
        if (!top_k && top_p >= 1) return walk_ids(target(uniform, mass));
        const int64_t most = top_k ? top_k : columns_;
        deal(reach(most, top_k ? INFINITY : top_p * mass));
        if (top_k) mass = walk(most, INFINITY, false).mass;
        mass = walk(most, top_p * mass, false).mass;
        return walk(most, target(uniform, mass), true).id;
    }

   private:
    struct Place {
        int32_t id;
        double mass;  // of all tokens up to it, itself included
    };
    // Scores up to which so many tokens have been seen, of so much weight.
    struct Head {
        float score;
        double mass;
        int64_t count;
    };

    // A point in [0, mass): the product alone may round up to the mass itself.
    static double target(double uniform, double mass) {
        const double point = uniform * mass, last = nextafter(mass, 0.0);
        return point < last ? point : last;
    }

    Vec scores(int64_t i) const {
        if (i + kLanes <= columns_) return (peak_ - load(logits_ + i)) * inverse_;
        Vec logits = broadcast(-INFINITY);  // what is behind the end has no weight
        memcpy(&logits, logits_ + i, (columns_ - i) * sizeof(float));
        return (peak_ - logits) * inverse_;
    }

    void weigh(float min_p) {
        Vec near[kHeads] = {};
        IntVec counts[kHeads] = {};
        for (int64_t block = 0; block < num_blocks_; ++block) {
            const int64_t begin = block * kDrawBlock, end = min_of(begin + kDrawBlock, columns_);
            Vec total{}, high{};
            for (int64_t i = begin; i < end; i += kLanes) {
                const Vec score = scores(i);
                Vec weight = exp2(score * -kLog2E);
                weight = weight >= min_p ? weight : Vec{};
                store(weights_ + i, weight);
                total += weight;
                high = maximum(high, weight);
                for (int head = 0; head < kHeads; ++head) {
                    const IntVec inside = score <= kHeadScores[head];
                    near[head] += (Vec)((IntVec)weight & inside);
                    counts[head] -= inside & (weight > 0.0f);
                }
            }
            blocks_[block] = sum(total);
            peaks_[block] = largest(high);
        }
        for (int head = 0; head < kHeads; ++head) {
            heads_[head] = {kHeadScores[head], double(sum(near[head])), 0};
            for (int lane = 0; lane < kLanes; ++lane) heads_[head].count += counts[head][lane];
        }
    }

    // A score behind which no token is kept if at most `most` are, which hold `enough`.
    float reach(int64_t most, double enough) const {
        for (const Head& head : heads_)
            if (head.count >= most || head.mass * (1 - 1e-3) > enough) return head.score;
        return INFINITY;
    }

    // Note the bucket of every token of some weight whose score is at most `reach`.
    void deal(float reach) {
        memset(masses_, 0, sizeof masses_);
        memset(counts_, 0, sizeof counts_);
        num_dealt_ = 0;
        // No block is left out that holds a score within reach, however its weight is rounded.
        const double least = exp(-double(reach)) * (1 - 1e-3);
        for (int64_t block = 0; block < num_blocks_; ++block) {
            if (!(peaks_[block] > least)) continue;
            const int64_t begin = block * kDrawBlock, end = min_of(begin + kDrawBlock, columns_);
            for (int64_t i = begin; i < end; i += kLanes) {
                const Vec score = scores(i), weight = load(weights_ + i);
                const Vec dealt = score <= reach ? weight : Vec{};
                const Vec places = minimum(score * kBucketsPerUnit, broadcast(kBuckets - 1));
                const IntVec buckets = __builtin_convertvector(places, IntVec);
                for (int lane = 0; lane < kLanes; ++lane) {
                    if (!(dealt[lane] > 0.0f)) continue;
                    const int32_t bucket = buckets[lane];
                    masses_[bucket] += dealt[lane];
                    ++counts_[bucket];
                    ids_[num_dealt_] = int32_t(i + lane);
                    buckets_[num_dealt_++] = uint16_t(bucket);
                }
            }
        }
    }

    // Through the tokens dealt, in their order, up to the one that is the `most`th or with which their weight comes to
    // `enough`, or `beyond` it.
    Place walk(int64_t most, double enough, bool beyond) {
        const auto arrives = [=](double mass) { return beyond ? mass > enough : mass >= enough; };
        int64_t count = 0, last = 0;
        double mass = 0;
        for (int64_t bucket = 0; bucket < kBuckets; ++bucket) {
            if (!counts_[bucket]) continue;
            last = bucket;
            if (count + counts_[bucket] >= most || arrives(mass + masses_[bucket])) break;
            if (count + counts_[bucket] == num_dealt_) break;
            count += counts_[bucket];
            mass += masses_[bucket];
        }
        const int64_t num_opened = open(last);
        int32_t id = 0;
        for (int64_t i = 0; i < num_opened; ++i) {
            id = int32_t(opened_[i]);
            mass += weights_[id];
            if (++count == most || arrives(mass)) break;  // or rounding has moved the end of the bucket
        }
        return {id, mass};
    }

    // The tokens of a bucket in their order: score and id side by side in a number, since no score is negative.
    int64_t open(int64_t bucket) {
        int64_t count = 0;
        for (int64_t i = 0; i < num_dealt_; ++i)
            if (buckets_[i] == bucket) {
                const float score = (peak_ - logits_[ids_[i]]) * inverse_;
                opened_[count++] = uint64_t(as_bits(score)) << 32 | uint32_t(ids_[i]);
            }
        bool sorted = true;  // as where all are equally likely
        for (int64_t i = 1; i < count; ++i) sorted = sorted && opened_[i - 1] < opened_[i];
        if (!sorted) sort(opened_, count);
        return count;
    }

    // By a heap. The library's would be compiled once for all instruction sets, whichever comes first.
    static void sort(uint64_t* numbers, int64_t count) {
        const auto sift = [&](int64_t at, int64_t end) {
            const uint64_t number = numbers[at];
            for (int64_t child; (child = 2 * at + 1) < end; at = child) {
                child += child + 1 < end && numbers[child] < numbers[child + 1];
                if (numbers[child] <= number) break;
                numbers[at] = numbers[child];
            }
            numbers[at] = number;
        };
        for (int64_t at = count / 2; at-- > 0;) sift(at, count);
        for (int64_t end = count; end-- > 1;) {
            const uint64_t largest_number = numbers[0];
            numbers[0] = numbers[end];
            numbers[end] = largest_number;
            sift(0, end);
        }
    }

    // Through all tokens in the order of their ids, up to the one with which their weight exceeds `target`.
    int32_t walk_ids(double target) const {
        int64_t block = 0;
        double mass = 0;
        while (block + 1 < num_blocks_ && mass + blocks_[block] <= target) mass += blocks_[block++];
        const int64_t begin = block * kDrawBlock, end = min_of(begin + kDrawBlock, columns_);
        int64_t last = -1;
        for (int64_t i = begin; i < end; ++i) {
            if (!(weights_[i] > 0.0f)) continue;
            last = i;
            mass += weights_[i];
            if (mass > target) break;
        }
        if (last < 0)  // only where rounding has led into a last block without weight
            for (last = begin; last > 0 && !(weights_[last] > 0.0f);) --last;
        return int32_t(last);
    }

    static constexpr int kHeads = 3;
    static constexpr float kHeadScores[kHeads] = {2, 5, 10};

    const int64_t columns_, num_blocks_;
    const float* logits_ = nullptr;
    float peak_ = 0, inverse_ = 1;
    double* blocks_;      // of each block the sum of weights,
    double* peaks_;       // and the largest
    uint64_t* opened_;    // the bucket that was opened last
    float* weights_;
    int32_t* ids_;        // of the tokens dealt, rising
    uint16_t* buckets_;   // of the same
    Head heads_[kHeads];
    int64_t num_dealt_ = 0;
    double masses_[kBuckets];
    int32_t counts_[kBuckets];
};

static int64_t draw_scratch(int64_t columns) { return DrawnRow::scratch_bytes(columns); }

static void draw_tokens(const Draws& draws) {
    const int64_t rows = draws.rows, columns = draws.columns;
    row_peaks(draws.logits, rows, columns, draws.peaks, draws.ids);
    share_tasks(true, rows, [&](int64_t row, int64_t thread) {
        if (!(fabsf(draws.peaks[row]) < INFINITY)) return;
        DrawnRow drawn(columns, draws.scratch + thread * DrawnRow::scratch_bytes(columns));
        draws.ids[row] = drawn.draw(draws, row);
    });
}

}  // namespace quire::QUIRE_ISA
