// y = x . weight^T + bias, with the weight packed once and stored as float32, float16 or bfloat16.
//
// A packed weight is a row of panels of kPanel outputs. A panel holds [k][kPanel] weights, or [k / 2][kPanel][2] of
// bfloat16, so that a step along k reads whole cache lines and nothing is summed across lanes. The micro-kernel broadcasts kRows inputs against kWidth vectors
// of weights and keeps kAccumulators sums in registers: many rows take few vectors; one row takes eight, and streams the
// weights as fast as memory gives them. While a panel is multiplied, the next one is fetched.
//
// Every output is one sum in the order of k, whatever the number of rows, threads and panels: a row's result does not
// depend on the batch it is computed in.
//
// Where the processor multiplies pairs of bfloat16, weights stored so are multiplied with inputs rounded to it.
#pragma once

#include "kernels.h"
#include "linear_input.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

constexpr int kVectorsPerPanel = kPanel / kLanes;
// With many tiles of rows, the inputs of a block of rows and a slice along k stay in a core's second-level cache while
// all panels of a task use them: each weight is read from farther away once a block. Few tiles read a panel in one go.
constexpr int64_t kSliceDepth = 512, kBlockRows = 96, kFewTiles = 3, kDepthOfFew = 2048;
constexpr int64_t kVectorsPerTask = 8 * kVectorsPerPanel;
constexpr int kFetchedTogether = 8;
// Waking the other threads costs a few microseconds; fewer multiplications than this are done sooner by one.
constexpr int64_t kParallelProducts = 1 << 16;
// With so many tiles of rows for each thread, threads share out rows: what one makes of a row, the same one reads in
// the next layer. With fewer, all reading all weights costs more than what passes between them.
constexpr int64_t kTilesPerThread = 4;
// With so many blocks of rows for each thread, a block is one task: no thread waits long for another's last.
constexpr int64_t kBlocksPerThread = 4;
// Inputs are rearranged in runs of this many steps, so that few rows keep all threads busy too.
constexpr int64_t kInputRun = 256;

// Steps along k whose weights lie side by side.
template <class T> constexpr int64_t kStepsTogether = std::is_same_v<T, BFloat> ? 2 : 1;

// Where a panel holds the weight of a step along k for its first output; also its size, for k in whole steps together.
template <class T>
QUIRE_INLINE int64_t in_panel(int64_t k) {
    return k / kStepsTogether<T> * kStepsTogether<T> * kPanel + k % kStepsTogether<T>;
}

// A vector of weights for one step along k.
template <class T>
QUIRE_INLINE Vec load_weights(const T* from, int64_t k) { return load(from + k * kPanel); }
QUIRE_INLINE Vec load_weights(const BFloat* from, int64_t k) {
    const IntVec pairs = load_words(from + k / 2 * 2 * kPanel);
    return (Vec)(k % 2 ? pairs & int32_t(0xffff0000) : pairs << 16);
}

// What a micro-kernel needs of its place in the product.
struct Place {
    int64_t k_begin, k_end;
    bool first;          // of the slices of k: sums start at the bias, else at what `out` holds
    int64_t tile, num_tiles;  // each row tile fetches its share of the next panel
};

// kRows x kWidth vectors of outputs over one slice: inputs [k][kRows], or several rows' pairs of bfloat16
// [k / 2][kRows], times vectors of weights kPanel apart.
template <class T, int kRows, int kWidth>
static void multiply_vectors(const Linear& a, const float* inputs, float* out, int64_t vector, const Place& place) {
    const int64_t column = vector * kLanes, left = a.n - column;
    float* const result = out + column;
    // Sums start at the bias or at what the slices before have stored; only a product's last vector may be a part of one.
    const float* start = place.first ? (a.bias ? a.bias + column : nullptr) : result;
    const int64_t start_stride = place.first ? 0 : a.n;
    Vec acc[kRows][kWidth] = {};
    if (start) {
#pragma GCC unroll 14
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) {
                const float* from = start + r * start_stride + j * kLanes;
                const int64_t lanes = min_of(left - j * kLanes, kLanes);
                acc[r][j] = lanes == kLanes ? load(from) : load_first(from, lanes);
            }
    }

    const int64_t panel_size = in_panel<T>(round_up(a.k, kStepsTogether<T>));
    const T* weights[kWidth];
    for (int j = 0; j < kWidth; ++j) {
        const int64_t panel = (vector + j) / kVectorsPerPanel, lane = (vector + j) % kVectorsPerPanel * kLanes;
        weights[j] = static_cast<const T*>(a.weight) + panel * panel_size + in_panel<T>(place.k_begin) + lane * kStepsTogether<T>;
    }
    const int64_t depth = place.k_end - place.k_begin, share = kPanel * sizeof(T) / place.num_tiles;
    const char* ahead = reinterpret_cast<const char*>(weights[0] + panel_size) + place.tile * depth * share;
    if constexpr (kInPairs<T>) {
        const float* pairs = inputs + place.k_begin / 2 * kRows;
        const float *const row = inputs + place.k_begin, last[2] = {row[depth - 1], 0.0f};  // used of a single row
        for (int64_t k = 0; k < depth; k += 2, pairs += kRows) {
            if constexpr (kRows > 4)
                for (int64_t byte = 0; byte < 2 * share; byte += 64) __builtin_prefetch(ahead + k * share + byte, 0, 2);
            IntVec weight[kWidth];
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) weight[j] = load_words(weights[j] + k * kPanel);
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const IntVec x = kRows > 1 ? broadcast_word(pairs + r) : broadcast_pair(k + 1 < depth ? row + k : last);
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) acc[r][j] = add_products(acc[r][j], weight[j], x);
            }
        }
    } else {
        inputs += place.k_begin * kRows;
        const auto multiply_step = [&](int64_t k) {
            Vec weight[kWidth];
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) weight[j] = load_weights(weights[j], k);
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const float x = inputs[k * kRows + r];
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) acc[r][j] += weight[j] * x;
            }
        };
        const auto fetch = [&](int64_t k, int64_t steps) {
            for (int64_t byte = 0; byte < steps * share; byte += 64) __builtin_prefetch(ahead + k * share + byte, 0, 2);
        };
        int64_t k = 0;
        if (kRows > 4 && share < 64)  // a cache line is fetched once for several steps
            for (; k + kFetchedTogether <= depth; k += kFetchedTogether) {
                fetch(k, kFetchedTogether);
                for (int i = 0; i < kFetchedTogether; ++i) multiply_step(k + i);
            }
        for (; k < depth; ++k) {
            if (kRows > 4) fetch(k, 1);
            multiply_step(k);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) {
            float* to = result + r * a.n + j * kLanes;
            const int64_t lanes = min_of(left - j * kLanes, kLanes);
            if (lanes == kLanes) store(to, acc[r][j]);
            else store_first(to, acc[r][j], lanes);
        }
}

// One tile of rows against a run of vectors.
template <class T, int kRows = kMaxRows>
static void multiply_tile(int64_t rows, const Linear& a, const float* inputs, float* out, int64_t vector,
                          int64_t vector_end, const Place& place) {
    if constexpr (kRows > 1)
        if (rows < kRows) return multiply_tile<T, kRows - 1>(rows, a, inputs, out, vector, vector_end, place);
    const auto run = [&]<int kWidth>() {
        if constexpr (kRows * kWidth <= kAccumulators || kWidth == 1)
            for (; vector + kWidth <= vector_end; vector += kWidth)
                multiply_vectors<T, kRows, kWidth>(a, inputs, out, vector, place);
    };
    run.template operator()<8>();
    run.template operator()<4>();
    run.template operator()<2>();
    run.template operator()<1>();
}

typedef float Four __attribute__((vector_size(16)));
#ifdef __clang__
#define QUIRE_JOIN_FOUR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourIndices __attribute__((vector_size(16)));
#define QUIRE_JOIN_FOUR(a, b, ...) __builtin_shuffle(a, b, FourIndices{__VA_ARGS__})
#endif

// Four numbers of four rows -> for each of four steps these rows' numbers, `stride` apart.
QUIRE_INLINE void put_transposed(const float* const* from, int64_t k, float* to, int64_t stride) {
    Four row[4];
    for (int r = 0; r < 4; ++r) memcpy(&row[r], from[r] + k, sizeof(Four));
    const Four low02 = QUIRE_JOIN_FOUR(row[0], row[2], 0, 4, 1, 5), high02 = QUIRE_JOIN_FOUR(row[0], row[2], 2, 6, 3, 7);
    const Four low13 = QUIRE_JOIN_FOUR(row[1], row[3], 0, 4, 1, 5), high13 = QUIRE_JOIN_FOUR(row[1], row[3], 2, 6, 3, 7);
    const Four steps[4] = {QUIRE_JOIN_FOUR(low02, low13, 0, 4, 1, 5), QUIRE_JOIN_FOUR(low02, low13, 2, 6, 3, 7),
                           QUIRE_JOIN_FOUR(high02, high13, 0, 4, 1, 5), QUIRE_JOIN_FOUR(high02, high13, 2, 6, 3, 7)};
    for (int i = 0; i < 4; ++i) memcpy(to + i * stride, &steps[i], sizeof(Four));
}

// Rows as the micro-kernel reads them: a run of steps along k, of the rows of one tile.
template <class T>
static void arrange(const float* const* from, int64_t rows, int64_t begin, int64_t end, float* to) {
    if constexpr (kInPairs<T>) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = begin; k < end; k += kLanes) {
                const int64_t lanes = min_of(end - k, kLanes);
                const float* x = from[r] + k;
                BFloat pairs[kLanes];
                store(pairs, lanes == kLanes ? load(x) : load_first(x, lanes));
                for (int64_t i = 0; i < lanes; i += 2) memcpy(to + (k + i) / 2 * rows + r, pairs + i, 2 * sizeof(BFloat));
            }
    } else {
        int64_t k = begin;
        for (; rows >= 4 && k + 4 <= end; k += 4)
            for (int64_t r = 0; r < rows; r += 4) {
                const int64_t first = min_of(r, rows - 4);  // the last four rows may be some of the four before
                put_transposed(from + first, k, to + k * rows + first, rows);
            }
        for (; k < end; ++k)
            for (int64_t r = 0; r < rows; ++r) to[k * rows + r] = from[r][k];
    }
}

// The tiles `first` to `last` of a product against a run of vectors; `inputs` are those of the first. Of num_tiles tiles,
// tile i begins at row i * m / num_tiles.
template <class T>
static void multiply_tiles(const Linear& a, const float* inputs, int64_t num_tiles, int64_t first, int64_t last,
                           int64_t vector, int64_t vector_end) {
    const int64_t first_row = first * a.m / num_tiles;
    const bool few = last - first <= kFewTiles;
    const int64_t depth = few ? kDepthOfFew : kSliceDepth, step = last - first > 1 ? kVectorsPerPanel : vector_end - vector;
    for (int64_t k = 0; k < a.k; k += depth)
        for (int64_t v = vector; v < vector_end; v += step)
            for (int64_t tile = first; tile < last; ++tile) {
                const int64_t begin = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - begin;
                const Place place{k, min_of(k + depth, a.k), k == 0, tile - first, last - first};
                multiply_tile<T>(rows, a, inputs + (begin - first_row) * a.k, a.out + begin * a.n, v, min_of(vector_end, v + step), place);
            }
}

// Many rows: a task makes a block of them, rearranges it in a core's cache, and multiplies it with all weights.
template <class T>
static void multiply_blocks_of_rows(const Linear& a, int64_t num_tiles, int64_t num_blocks, int64_t threads) {
    const int64_t num_vectors = (a.n + kLanes - 1) / kLanes;
    const int64_t most_rows = ((num_tiles + num_blocks - 1) / num_blocks + 1) * kMaxRows;  // one tile is for rows as they are made
    share_tasks(threads > 1, num_blocks, [&](int64_t block, int64_t thread) {
        const int64_t first = block * num_tiles / num_blocks, last = (block + 1) * num_tiles / num_blocks;
        float *const inputs = a.scratch + thread * most_rows * a.k, *const made = inputs + (most_rows - kMaxRows) * a.k;
        float* to = inputs;
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t begin = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - begin;
            const float* from[kMaxRows];
            for (int64_t r = 0; r < rows; ++r) from[r] = input_row(a.x, begin + r, a.k, made + r * a.k);
            arrange<T>(from, rows, 0, a.k, to);
            to += rows * a.k;
        }
        for (int64_t vector = 0; vector < num_vectors; vector += kVectorsPerTask)
            multiply_tiles<T>(a, inputs, num_tiles, first, last, vector, min_of(vector + kVectorsPerTask, num_vectors));
    });
}

template <class T>
static void multiply(const Linear& a) {
    const bool parallel = a.m * a.n * a.k >= kParallelProducts;
    const int64_t threads = parallel ? num_threads() : 1;
    int64_t num_tiles = (a.m + kMaxRows - 1) / kMaxRows;
    const bool by_rows = num_tiles >= kTilesPerThread * threads;
    if (by_rows) num_tiles = round_up(num_tiles, threads);
    const int64_t blocks_of_rows = round_up((a.m + kBlockRows - 1) / kBlockRows, threads);
    if (by_rows && (threads == 1 || blocks_of_rows >= kBlocksPerThread * threads))
        return multiply_blocks_of_rows<T>(a, num_tiles, blocks_of_rows, threads);
    const auto tile_begin = [&](int64_t tile) { return tile * a.m / num_tiles; };
    const int64_t num_vectors = (a.n + kLanes - 1) / kLanes, num_runs = (a.k + kInputRun - 1) / kInputRun;

    // Items are groups of vectors; with many rows one panel, with few as many as the micro-kernel takes at once. Where
    // that leaves threads idle, rows are cut too.
    int64_t group = kVectorsPerPanel;
    while (num_tiles == 1 && group < 8 && num_vectors >= 4 * threads * group) group *= 2;
    if (by_rows) group = kVectorsPerTask;
    const int64_t num_groups = (num_vectors + group - 1) / group;
    const int64_t num_blocks = by_rows ? blocks_of_rows : max_of(1, min_of(num_tiles, 2 * threads / num_groups));

    // A single row lies as the micro-kernel reads it; others are rearranged to [tile][k][rows of the tile].
    const bool arranged = a.m > 1;
    float* const made = a.x.op == InputOp::none ? nullptr : a.scratch + (arranged ? a.m * a.k : 0);
    const Rows given = made ? Rows{made, a.k} : a.x.x;

    if (made)
        share_tasks(parallel, a.m, [&](int64_t row, int64_t) { input_row(a.x, row, a.k, made + row * a.k); });
    if (arranged)
        share_tasks(parallel, num_tiles * num_runs, [&](int64_t i, int64_t) {
            const int64_t tile = i / num_runs, run = i % num_runs;
            const int64_t begin = tile_begin(tile), rows = tile_begin(tile + 1) - begin;
            const float* from[kMaxRows];
            for (int64_t r = 0; r < rows; ++r) from[r] = given.data + (begin + r) * given.stride;
            arrange<T>(from, rows, run * kInputRun, min_of(a.k, (run + 1) * kInputRun), a.scratch + begin * a.k);
        });
    const float* inputs = arranged ? a.scratch : given.data;
    share_tasks(parallel, num_blocks * num_groups, [&](int64_t i, int64_t) {
        const int64_t block = i / num_groups, g = i % num_groups;
        const int64_t first = block * num_tiles / num_blocks, last = (block + 1) * num_tiles / num_blocks;
        multiply_tiles<T>(a, inputs + tile_begin(first) * a.k, num_tiles, first, last, g * group,
                          min_of((g + 1) * group, num_vectors));
    });
}

static void linear(const Linear& a) {
    switch (a.element) {
        case Element::float32: return multiply<float>(a);
        case Element::float16: return multiply<Half>(a);
        case Element::bfloat16: return multiply<BFloat>(a);
    }
}

template <class From, class To>
static void pack_rows(const From* weight, int64_t rows, int64_t k, To* packed, int64_t first_row) {
    // Panels are written by one thread each; a cache line of a row is read before the next row's.
    const int64_t end_row = first_row + rows;
    const int64_t first_panel = first_row / kPanel, num_panels = (end_row + kPanel - 1) / kPanel - first_panel;
    share_tasks(true, num_panels, [&](int64_t index, int64_t) {
        const int64_t panel = first_panel + index;
        To* to = packed + panel * round_up(k, kStepsTogether<To>) * kPanel;
        const int64_t begin = max_of(first_row, panel * kPanel), end = min_of(end_row, (panel + 1) * kPanel);
        constexpr int64_t kLine = 64 / sizeof(From);
        for (int64_t line = 0; line < k; line += kLine)
            for (int64_t row = begin; row < end; ++row) {
                const From* from = weight + (row - first_row) * k;
                for (int64_t i = line; i < min_of(k, line + kLine); ++i)
                    narrow(to + in_panel<To>(i) + (row - panel * kPanel) * kStepsTogether<To>, widen(from[i]));
            }
    });
}

template <class From>
static void pack_from(const From* weight, int64_t rows, int64_t k, void* packed, Element element, int64_t first_row) {
    switch (element) {
        case Element::float32: return pack_rows(weight, rows, k, static_cast<float*>(packed), first_row);
        case Element::float16: return pack_rows(weight, rows, k, static_cast<Half*>(packed), first_row);
        case Element::bfloat16: return pack_rows(weight, rows, k, static_cast<BFloat*>(packed), first_row);
    }
}

static void pack_linear(const void* weight, Element from, int64_t rows, int64_t k, void* packed, Element to,
                        int64_t first_row) {
    switch (from) {
        case Element::float32: return pack_from(static_cast<const float*>(weight), rows, k, packed, to, first_row);
        case Element::float16: return pack_from(static_cast<const Half*>(weight), rows, k, packed, to, first_row);
        case Element::bfloat16: return pack_from(static_cast<const BFloat*>(weight), rows, k, packed, to, first_row);
    }
}

}  // namespace quire::QUIRE_ISA
