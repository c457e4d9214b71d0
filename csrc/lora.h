// out += (x . A^T) . B for the rows of a step that use adapters: a low-rank update of a dense layer, with A and B of the
// row's own adapter.
//
// Rows of one adapter form tiles, so that what is read of A and B serves all rows of a tile. A tile's sums x . A^T are
// made first, of all tiles, in `scratch`; then each tile adds its outputs. Every number is one sum in a fixed order,
// whatever the other rows of the step: a row's result does not depend on the batch it is computed in.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Rows of A that a task multiplies, and of them as many at once as the registers hold for a whole tile.
constexpr int64_t kRanksPerTask = 16;
constexpr int kRanksAtOnce = kAccumulators >= 4 * kLoraTile ? 4 : 2;
// Columns of B that a task adds.
constexpr int64_t kLoraColumns = 512;
// Fewer multiplications than this are done sooner by one thread.
constexpr int64_t kParallelLora = 1 << 16;

// kRows rows of x against kRanks rows of A.
template <int kRows, int kRanks>
static void shrink(const float* const* x, const float* a, int64_t k, float* const* out) {
    Vec acc[kRows][kRanks] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        Vec weight[kRanks];
#pragma GCC unroll 4
        for (int j = 0; j < kRanks; ++j) weight[j] = load(a + j * k + i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec input = load(x[r] + i);
#pragma GCC unroll 4
            for (int j = 0; j < kRanks; ++j) acc[r][j] += input * weight[j];
        }
    }
    if (i < k)
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < kRanks; ++j) acc[r][j] += load_first(x[r] + i, k - i) * load_first(a + j * k + i, k - i);
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kRanks; ++j) out[r][j] = sum(acc[r][j]);
}

template <int kRanks, int kRows = kLoraTile>
static void shrink_tile(int64_t rows, const float* const* x, const float* a, int64_t k, float* const* out) {
    if constexpr (kRows > 1)
        if (rows < kRows) return shrink_tile<kRanks, kRows - 1>(rows, x, a, k, out);
    shrink<kRows, kRanks>(x, a, k, out);
}

// kRows sums of `rank` numbers, each against kWidth vectors of B, whose rows are n apart.
template <int kRows, int kWidth>
static void expand(const float* const* sums, const float* b, int64_t rank, int64_t n, float* const* out, int64_t lanes) {
    Vec acc[kRows][kWidth];
    const auto read = [&](const float* p) { return lanes == kLanes ? load(p) : load_first(p, lanes); };
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kWidth; ++j) acc[r][j] = read(out[r] + j * kLanes);
    for (int64_t i = 0; i < rank; ++i) {
        Vec weight[kWidth];
#pragma GCC unroll 4
        for (int j = 0; j < kWidth; ++j) weight[j] = read(b + i * n + j * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const float factor = sums[r][i];
#pragma GCC unroll 4
            for (int j = 0; j < kWidth; ++j) acc[r][j] += weight[j] * factor;
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kWidth; ++j) {
            if (lanes == kLanes) store(out[r] + j * kLanes, acc[r][j]);
            else store_first(out[r] + j * kLanes, acc[r][j], lanes);
        }
}

template <int kRows = kLoraTile>
static void expand_tile(int64_t rows, const float* const* sums, const float* b, int64_t rank, int64_t n,
                        float* const* out, int64_t columns) {
    if constexpr (kRows > 1)
        if (rows < kRows) return expand_tile<kRows - 1>(rows, sums, b, rank, n, out, columns);
    constexpr int kWidth = kAccumulators / kRows >= 4 ? 4 : 2;
    float* to[kRows];
    for (int r = 0; r < kRows; ++r) to[r] = out[r];
    const auto advance = [&](int64_t count) {
        for (int r = 0; r < kRows; ++r) to[r] += count;
        b += count, columns -= count;
    };
    for (; columns >= kWidth * kLanes; advance(kWidth * kLanes)) expand<kRows, kWidth>(sums, b, rank, n, to, kLanes);
    for (; columns >= kLanes; advance(kLanes)) expand<kRows, 1>(sums, b, rank, n, to, kLanes);
    if (columns) expand<kRows, 1>(sums, b, rank, n, to, columns);
}

static void add_lora(const Lora& a) {
    const int64_t ranks_together = a.num_parts * a.max_rank;
    const bool parallel = a.num_rows * a.max_rank * (a.k * a.num_parts + a.n) >= kParallelLora;
    const auto rank_of = [&](int32_t slot, int64_t part) { return int64_t(a.ranks[slot * a.num_parts + part]); };
    const auto sums_of = [&](int64_t row) { return a.scratch + row * ranks_together; };

    const int64_t pieces = (a.max_rank + kRanksPerTask - 1) / kRanksPerTask;
    share_tasks(parallel, a.num_tiles * a.num_parts * pieces, [&](int64_t task, int64_t) {
        const LoraTile tile = a.tiles[task / (a.num_parts * pieces)];
        const int64_t part = task / pieces % a.num_parts, begin = task % pieces * kRanksPerTask;
        const int64_t end = min_of(begin + kRanksPerTask, rank_of(tile.slot, part)), rows = tile.end - tile.begin;
        const float* x[kLoraTile];
        for (int64_t r = 0; r < rows; ++r) x[r] = a.x.data + (tile.begin + r) * a.x.stride;
        const int64_t first = part * a.max_rank;
        const float* weight = a.a + (tile.slot * ranks_together + first) * a.k;
        for (int64_t rank = begin; rank < end;) {
            float* out[kLoraTile];
            for (int64_t r = 0; r < rows; ++r) out[r] = sums_of(tile.begin + r) + first + rank;
            const bool whole = rank + kRanksAtOnce <= end;
            if (whole) shrink_tile<kRanksAtOnce>(rows, x, weight + rank * a.k, a.k, out);
            else shrink_tile<1>(rows, x, weight + rank * a.k, a.k, out);
            rank += whole ? kRanksAtOnce : 1;
        }
    });

    const int64_t pieces_of_columns = (a.n + kLoraColumns - 1) / kLoraColumns;
    share_tasks(parallel, a.num_tiles * pieces_of_columns, [&](int64_t task, int64_t) {
        const LoraTile tile = a.tiles[task / pieces_of_columns];
        const int64_t first = task % pieces_of_columns * kLoraColumns, last = min_of(first + kLoraColumns, a.n);
        const int64_t rows = tile.end - tile.begin;
        for (int64_t part = 0, begin = 0; part < a.num_parts; begin = a.part_ends[part++]) {
            const int64_t from = max_of(begin, first), to = min_of(a.part_ends[part], last);
            const int64_t rank = rank_of(tile.slot, part);
            if (from >= to || !rank) continue;
            const float* sums[kLoraTile];
            float* out[kLoraTile];
            for (int64_t r = 0; r < rows; ++r) {
                sums[r] = sums_of(tile.begin + r) + part * a.max_rank;
                out[r] = a.out + a.rows[tile.begin + r] * a.n + from;
            }
            expand_tile(rows, sums, a.b + tile.slot * a.max_rank * a.n + from, rank, a.n, out, to - from);
        }
    });
}

}  // namespace quire::QUIRE_ISA
