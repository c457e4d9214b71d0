// A layer of experts: gated MLPs of one shape. Each token passes the few that a router chose.
//
// A pair is a token and one of its experts. Pairs are sorted by expert, so that an expert's rows are one product on its
// packed weights, by the micro-kernels of linear.h, linear_low_bit.h, coded_linear.h and gguf_linear.h: with one row they
// stream weights, with many they are a blocked matrix product. Five loops follow each other, each over tasks of all experts together:
//   1. gather    tiles of rows, in the order or the 8 bits in which the product reads them
//   2. gate, up  a task is some outputs of one expert
//   3. gate      the activation, and tiles again
//   4. down      as 2.
//   5. sum       a token's pairs in the order of their experts
// No sum depends on other tokens: a token's result is the same bits in every batch and with any number of threads.
#pragma once

#include "area.h"
#include "coded_linear.h"
#include "gguf_linear.h"
#include "kernels.h"
#include "linear.h"
#include "linear_low_bit.h"
#include "parallel.h"

namespace quire::QUIRE_ISA {

// The pairs of one expert that has any.
struct ExpertRun {
    int64_t expert, first, count;
};
// Pairs that a micro-kernel takes at once, all of one expert.
struct PairTile {
    int64_t first, count, expert;
};

// The pairs in the order of their experts.
struct Routing {
    int64_t num_pairs, num_runs = 0, num_tiles = 0;
    int64_t* ends;        // [experts]: while pairs are sorted, where the next of an expert goes
    int32_t* token_of;    // [pairs]
    float* weight_of;     // [pairs]
    int32_t* pairs_of;    // [tokens, active]: a token's pairs, ascending
    ExpertRun* runs;
    PairTile* tiles;

    Routing(const Experts& a, Area& area) : num_pairs(a.tokens * a.num_active) {
        ends = area.take<int64_t>(a.num_experts);
        token_of = area.take<int32_t>(num_pairs);
        weight_of = area.take<float>(num_pairs);
        pairs_of = area.take<int32_t>(num_pairs);
        runs = area.take<ExpertRun>(min_of(num_pairs, a.num_experts));
        tiles = area.take<PairTile>(num_pairs);
    }

    void sort(const Experts& a, int64_t rows_of_tile) {
        for (int64_t expert = 0; expert < a.num_experts; ++expert) ends[expert] = 0;
        for (int64_t i = 0; i < num_pairs; ++i) ++ends[a.chosen[i]];
        int64_t first = 0;
        for (int64_t expert = 0; expert < a.num_experts; ++expert) {
            const int64_t count = ends[expert];
            ends[expert] = first;
            if (count == 0) continue;
            runs[num_runs++] = {expert, first, count};
            const int64_t num = (count + rows_of_tile - 1) / rows_of_tile;
            for (int64_t i = 0; i < num; ++i) {
                const int64_t begin = i * count / num;
                tiles[num_tiles++] = {first + begin, (i + 1) * count / num - begin, expert};
            }
            first += count;
        }
        for (int64_t token = 0; token < a.tokens; ++token) {
            int32_t* const pairs = pairs_of + token * a.num_active;
            for (int64_t i = 0; i < a.num_active; ++i) {
                const int64_t slot = token * a.num_active + i, pair = ends[a.chosen[slot]]++;
                token_of[pair] = int32_t(token);
                weight_of[pair] = a.weights[slot];
                int64_t at = i;
                for (; at > 0 && pairs[at - 1] > pair; --at) pairs[at] = pairs[at - 1];
                pairs[at] = int32_t(pair);
            }
        }
    }
};

// Rows of all pairs as a product of floats reads them.
struct RowsOfFloats {
    static constexpr int64_t kTileRows = kMaxRows;
    static constexpr bool kWholePanels = false;
    float* inputs;  // [pairs, the larger k]

    RowsOfFloats(const Experts& a, Area& area) : inputs(area.take<float>(a.tokens * a.num_active * max_of(a.gate_up.k, a.down.k))) {}

    static Linear product_of(const ExpertLinear& layer, const ExpertRun& run, float* out) {
        Linear a{};
        a.bias = layer.bias ? layer.bias + run.expert * layer.n : nullptr;
        a.out = out + run.first * layer.n;
        a.m = run.count;
        a.n = layer.n;
        a.k = layer.k;
        return a;
    }
    static int64_t num_tiles(const ExpertRun& run) { return (run.count + kTileRows - 1) / kTileRows; }
};

// The product of floats. T is how weights are stored.
template <class T>
struct FloatPairs : RowsOfFloats {
    using RowsOfFloats::RowsOfFloats;

    // A single row lies as the micro-kernel reads it.
    void prepare(const ExpertLinear& layer, const PairTile& tile, const float* const* rows, int64_t) const {
        float* const to = inputs + tile.first * layer.k;
        if (tile.count > 1) arrange<T>(rows, tile.count, 0, layer.k, to);
        else memcpy(to, rows[0], layer.k * sizeof(float));
    }

    void multiply(const ExpertLinear& layer, const ExpertRun& run, float* out, int64_t vector, int64_t vector_end,
                  int64_t) const {
        Linear a = product_of(layer, run, out);
        a.weight = layer.weight + run.expert * layer.weight_bytes;
        multiply_tiles<T>(a, inputs + run.first * layer.k, num_tiles(run), 0, num_tiles(run), vector, vector_end);
    }
};

// The same with rows of 8 bits.
template <class Stored>
struct BytePairs {
    static constexpr int64_t kTileRows = kRowsOfBytes;
    static constexpr bool kWholePanels = true;  // vectors are multiplied in pairs
    static int64_t num_words(const ExpertLinear& layer) { return round_up(layer.k, kPairOfSteps) / 4; }
    static int64_t num_groups(const ExpertLinear& layer) { return (layer.k + layer.group - 1) / layer.group; }

    int32_t *words, *row_of_thread;
    RowGroup* groups;
    int64_t most_words;

    BytePairs(const Experts& a, Area& area) : most_words(max_of(num_words(a.gate_up), num_words(a.down))) {
        const int64_t num_pairs = a.tokens * a.num_active;
        words = area.take<int32_t>(num_pairs * most_words);
        groups = area.take<RowGroup>(num_pairs * max_of(num_groups(a.gate_up), num_groups(a.down)));
        row_of_thread = area.take<int32_t>(num_threads() * round_up(most_words, 16));
    }

    RowsOfBytes rows_from(const ExpertLinear& layer, int64_t pair) const {
        return RowsOfBytes{words, groups, num_words(layer)}.from(pair, num_groups(layer));
    }

    void prepare(const ExpertLinear& layer, const PairTile& tile, const float* const* rows, int64_t thread) const {
        for (int64_t r = 0; r < tile.count; ++r)
            quantize_row_of_tile<Stored>(rows[r], layer.k, layer.group, layer.rotates, rows_from(layer, tile.first), r, tile.count,
                                         row_of_thread + thread * round_up(most_words, 16));
    }

    void multiply(const ExpertLinear& layer, const ExpertRun& run, float* out, int64_t vector, int64_t vector_end,
                  int64_t) const {
        LowBitLinear a{};
        a.weight = reinterpret_cast<const uint8_t*>(layer.weight + run.expert * layer.weight_bytes);
        a.scales = layer.scales + run.expert * layer.scale_bytes;
        a.group = layer.group;
        a.bias = layer.bias ? layer.bias + run.expert * layer.n : nullptr;
        a.out = out + run.first * layer.n;
        a.m = run.count;
        a.n = layer.n;
        a.k = layer.k;
        const int64_t num_tiles = (run.count + kTileRows - 1) / kTileRows;
        multiply_low_bit_tiles<Stored>(a, rows_from(layer, run.first), num_tiles, 0, num_tiles, vector, vector_end);
    }
};

// The same with codes of few bits.
struct CodedPairs : RowsOfFloats {
    float* sums;  // [pairs, the larger number of spans]

    CodedPairs(const Experts& a, Area& area) : RowsOfFloats(a, area) {
        const int64_t most = max_of(num_spans(a.gate_up.coded, a.gate_up.k), num_spans(a.down.coded, a.down.k));
        sums = area.take<float>(a.tokens * a.num_active * most);
    }

    void prepare(const ExpertLinear& layer, const PairTile& tile, const float* const* rows, int64_t) const {
        const int32_t* const order = layer.order ? layer.order + tile.expert * layer.k : nullptr;
        for (int64_t r = 0; r < tile.count; ++r)
            prepare_codes_row(layer.coded, rows[r], order, layer.k, r, tile.count, inputs + tile.first * layer.k,
                              sums + tile.first * num_spans(layer.coded, layer.k));
    }

    void multiply(const ExpertLinear& layer, const ExpertRun& run, float* out, int64_t vector, int64_t vector_end,
                  int64_t) const {
        const Linear a = product_of(layer, run, out);
        CodedWeight w = layer.coded;
        const auto of_expert = [&](const void* first) { return static_cast<const char*>(first) + run.expert * layer.scale_bytes; };
        w.codes += run.expert * layer.weight_bytes;
        w.scales = of_expert(w.scales);
        if (w.offsets) w.offsets = of_expert(w.offsets);
        multiply_coded_tiles(a, w, inputs + run.first * layer.k, sums + run.first * num_spans(w, layer.k), num_tiles(run), 0,
                             num_tiles(run), vector, vector_end);
    }
};

// The same with blocks of GGUF.
struct BlockPairs {
    static constexpr int64_t kTileRows = kRowsOfBytes;
    static constexpr bool kWholePanels = false;
    BlockAreas areas;

    static int64_t larger_k(const Experts& a) { return max_of(a.gate_up.k, a.down.k); }
    BlockPairs(const Experts& a, Area& area) : areas(a.tokens * a.num_active, larger_k(a), area) {}

    void prepare(const ExpertLinear& layer, const PairTile& tile, const float* const* rows, int64_t thread) const {
        make_passes(tile.count, layer.k, layer.both_digits, areas.of(thread, layer.k).digits, areas.rows_from(tile.first, layer.k),
                    [&](int64_t r) { return rows[r]; });
    }

    void multiply(const ExpertLinear& layer, const ExpertRun& run, float* out, int64_t vector, int64_t vector_end,
                  int64_t thread) const {
        const int64_t begin = vector * kLanes, end = min_of(vector_end * kLanes, layer.n);
        const BlockRows x = areas.rows_from(run.first, layer.k);
        int64_t column = 0;  // of the part's first row
        for (int64_t p = 0; p < layer.num_parts; ++p) {
            BlockPart part = layer.parts[p];
            part.rows += run.expert * part.num_rows * part.row_bytes;
            const int64_t first = max_of(begin, column), last = min_of(end, column + part.num_rows);
            if (first < last)
                multiply_blocks(part, first - column, last - column, layer.k, x, run.count,
                                {out + run.first * layer.n + first, layer.n,
                                 layer.bias ? layer.bias + run.expert * layer.n + first : nullptr, layer.both_digits},
                                areas.of(thread, layer.k).panel);
            column += part.num_rows;
        }
    }
};

// One dense layer of all pairs. A task is as many outputs as a micro-kernel takes of one row, or one panel where that
// leaves threads idle.
template <class Pairs>
static void multiply_pairs(const Pairs& pairs, const ExpertLinear& layer, const Routing& routing, float* out) {
    const int64_t num_vectors = round_up(layer.n, kPanel) / kLanes;
    const int64_t group = routing.num_runs * num_vectors >= 32 * num_threads() ? 8 : kVectorsPerPanel;
    const int64_t num_groups = (num_vectors + group - 1) / group;
    const bool parallel = routing.num_pairs * layer.n * layer.k >= kParallelProducts;
    const int64_t last = Pairs::kWholePanels ? num_vectors : (layer.n + kLanes - 1) / kLanes;
    share_tasks(parallel, routing.num_runs * num_groups, [&](int64_t task, int64_t thread) {
        const ExpertRun& run = routing.runs[task / num_groups];
        const int64_t begin = task % num_groups * group, end = min_of(last, begin + group);
        // A panel stays in a core's cache while several tiles use it; a single tile takes all vectors at once.
        const int64_t step = run.count > Pairs::kTileRows ? kVectorsPerPanel : group;
        for (int64_t vector = begin; vector < end; vector += step)
            pairs.multiply(layer, run, out, vector, min_of(end, vector + step), thread);
    });
}

template <class Pairs>
struct ExpertAreas {
    Routing routing;
    Pairs pairs;
    float* rows;  // [pairs, 2 * inner] of gate and up, then [pairs, hidden] of down

    ExpertAreas(const Experts& a, Area& area)
        : routing(a, area), pairs(a, area), rows(area.take<float>(routing.num_pairs * max_of(a.gate_up.n, a.down.n))) {}
};

template <class Pairs>
static void compute_experts(const Experts& a) {
    Area area{a.scratch};
    ExpertAreas<Pairs> areas(a, area);
    Routing& routing = areas.routing;
    const Pairs& pairs = areas.pairs;
    float* const made = areas.rows;
    routing.sort(a, Pairs::kTileRows);
    const int64_t hidden = a.gate_up.k, inner = a.down.k;

    share_tasks(routing.num_pairs * hidden >= kParallelElements, routing.num_tiles, [&](int64_t i, int64_t thread) {
        const PairTile& tile = routing.tiles[i];
        const float* rows[Pairs::kTileRows];
        for (int64_t r = 0; r < tile.count; ++r) rows[r] = a.x.data + routing.token_of[tile.first + r] * a.x.stride;
        pairs.prepare(a.gate_up, tile, rows, thread);
    });
    multiply_pairs(pairs, a.gate_up, routing, made);
    share_tasks(routing.num_pairs * 2 * inner >= kParallelElements, routing.num_tiles, [&](int64_t i, int64_t thread) {
        const PairTile& tile = routing.tiles[i];
        const float* rows[Pairs::kTileRows];
        for (int64_t r = 0; r < tile.count; ++r) {
            float* const row = made + (tile.first + r) * 2 * inner;
            make_activated_row(a.gate, a.alpha, a.limit, row, inner, row);
            rows[r] = row;
        }
        pairs.prepare(a.down, tile, rows, thread);
    });
    multiply_pairs(pairs, a.down, routing, made);
    share_tasks(routing.num_pairs * hidden >= kParallelElements, a.tokens, [&](int64_t token, int64_t) {
        float* const out = a.out.data + token * a.out.stride;
        for (int64_t i = 0; i < a.num_active; ++i) {
            const int64_t pair = routing.pairs_of[token * a.num_active + i];
            const float* const row = made + pair * hidden;
            const float weight = routing.weight_of[pair];
            int64_t h = 0;
            for (; h + kLanes <= hidden; h += kLanes) store(out + h, load(out + h) + load(row + h) * weight);
            for (; h < hidden; ++h) out[h] += row[h] * weight;
        }
    });
}

// Calls `with` with the type that multiplies experts of a format.
template <class With>
static auto with_pairs(ExpertFormat format, const With& with) {
    switch (format) {
        case ExpertFormat::float16: return with.template operator()<FloatPairs<Half>>();
        case ExpertFormat::bfloat16: return with.template operator()<FloatPairs<BFloat>>();
        case ExpertFormat::bits8: return with.template operator()<BytePairs<Bits8>>();
        case ExpertFormat::bits4: return with.template operator()<BytePairs<Bits4>>();
        case ExpertFormat::coded: return with.template operator()<CodedPairs>();
        case ExpertFormat::blocks: return with.template operator()<BlockPairs>();
        case ExpertFormat::float32: break;
    }
    return with.template operator()<FloatPairs<float>>();
}

static int64_t experts_scratch(const Experts& a) {
    return with_pairs(a.format, [&]<class Pairs>() {
        Area counted{nullptr};
        ExpertAreas<Pairs> areas(a, counted);
        return counted.used;
    });
}

static void experts(const Experts& a) {
    with_pairs(a.format, [&]<class Pairs>() { compute_experts<Pairs>(a); });
}

}  // namespace quire::QUIRE_ISA
