// The highest number of each row and its first index: greedy sampling.
#pragma once

#include "elementwise.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Numbers that are compared with the highest so far as one; what a block holds stays in the first-level cache.
constexpr int64_t kPeakBlock = 1024;

static void row_peaks(Rows x, int64_t rows, int64_t columns, float* peaks, int32_t* ids) {
    share_tasks(rows * columns >= kParallelElements, rows, [&](int64_t row, int64_t) {
        const float* const from = x.data + row * x.stride;
        float peak = -INFINITY;
        int64_t at = 0;
        for (int64_t begin = 0; begin < columns; begin += kPeakBlock) {
            const int64_t end = min_of(begin + kPeakBlock, columns);
            Vec high = broadcast(-INFINITY);
            IntVec unordered{};
            int64_t i = begin;
            for (; i + kLanes <= end; i += kLanes) {
                const Vec v = load(from + i);
                high = maximum(high, v);
                unordered |= v != v;
            }
            bool faulty = false;
            for (int lane = 0; lane < kLanes; ++lane) faulty = faulty || unordered[lane];
            float block_peak = largest(high);
            for (; i < end; ++i) {
                faulty = faulty || from[i] != from[i];
                block_peak = from[i] > block_peak ? from[i] : block_peak;
            }
            if (!faulty && !(block_peak > peak)) continue;
            for (at = begin; faulty ? from[at] == from[at] : from[at] != block_peak;) ++at;
            peak = from[at];
            if (faulty) break;
        }
        peaks[row] = columns ? from[at] : peak;
        ids[row] = int32_t(at);
    });
}

}  // namespace quire::QUIRE_ISA
