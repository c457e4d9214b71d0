// Rows of a packed weight as they were before packing: an embedding table that is the output head's weight too.
//
// A row is a lane of its panel, so each of its weights lies in a cache line of its own. That is many times what a plain
// table would read, and still nothing beside the products that the row goes through afterwards.
#pragma once

#include "elementwise.h"
#include "linear.h"
#include "linear_low_bit.h"

namespace quire::QUIRE_ISA {

template <class T>
static void gather_rows_of(const T* packed, int64_t k, const int32_t* ids, int64_t count, float* out) {
    share_tasks(count * k >= kParallelElements, count, [&](int64_t i, int64_t) {
        const T* from = packed + ids[i] / kPanel * round_up(k, kStepsTogether<T>) * kPanel + ids[i] % kPanel * kStepsTogether<T>;
        for (int64_t j = 0; j < k; ++j) out[i * k + j] = widen(from[in_panel<T>(j)]);
    });
}

static void gather_rows(const void* packed, Element element, int64_t k, const int32_t* ids, int64_t count, float* out) {
    switch (element) {
        case Element::float32: return gather_rows_of(static_cast<const float*>(packed), k, ids, count, out);
        case Element::float16: return gather_rows_of(static_cast<const Half*>(packed), k, ids, count, out);
        case Element::bfloat16: return gather_rows_of(static_cast<const BFloat*>(packed), k, ids, count, out);
    }
}

static void gather_rows_quantized(const LowBitWeight& from, int64_t k, const int32_t* ids, int64_t count, float* out) {
    const int64_t depth = round_up(k, kPairOfSteps), num_groups = (k + from.group - 1) / from.group;
    const int64_t pair_bytes = from.bits == 8 ? 2 * kStepBytes : kStepBytes;
    share_tasks(count * k >= kParallelElements, count, [&](int64_t i, int64_t) {
        const int64_t panel = ids[i] / kPanel, lane = ids[i] % kPanel;
        const uint8_t* packed = from.weight + panel * depth / kPairOfSteps * pair_bytes + lane * 4;
        const float* scales = from.scales + panel * num_groups * kPanel + lane;
        for (int64_t j = 0; j < k; ++j) {
            const uint8_t* pair = packed + j / kPairOfSteps * pair_bytes;
            const int64_t step = j / 4 % 2, byte = j % 4;
            const int value = from.bits == 8 ? pair[step * kStepBytes + byte] - 128 : (pair[byte] >> 4 * step & 15) - 8;
            out[i * k + j] = float(value) * scales[j / from.group * kPanel];
        }
    });
}

}  // namespace quire::QUIRE_ISA
