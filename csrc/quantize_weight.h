// Dense weights to the 8 or 4 bits of linear_low_bit.h, from the weights alone.
//
// A group of 4-bit numbers has a scale and an offset. They are searched: a shorter range than that of the group loses a
// little at its ends and gains precision everywhere else. kernels/low_bit.py says what is minimised.
#pragma once

#include "kernels.h"
#include "linear.h"
#include "linear_low_bit.h"
#include "parallel.h"
#include "row_groups.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Ranges that are tried: 15 steps of 4 bits become 14.1, 14.4 and so on up to 15.9.
constexpr int kNumRanges = 7;
constexpr float kFirstRange = 14.1f, kRangeStep = 0.3f;

QUIRE_INLINE float as_bfloat(float x) {
    BFloat rounded;
    narrow(&rounded, x);
    return widen(rounded);
}

QUIRE_INLINE IntVec between(IntVec v, int32_t low, int32_t high) {
    v = v < low ? IntVec{} + low : v;
    return v > high ? IntVec{} + high : v;
}

QUIRE_INLINE void store_bytes(uint8_t* to, IntVec v) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes narrowed = __builtin_convertvector(v, Bytes);
    memcpy(to, &narrowed, sizeof narrowed);
}

// A group of weights of one output as floats, with zeros up to whole vectors.
struct WeightGroup {
    float* x;
    float* importance;
    int64_t size, padded;
    float low = 0, high = 0;  // its range, with zero

    template <class From>
    WeightGroup(const From* from, int64_t count, bool rotates, float* scratch)
        : x(scratch), importance(scratch + round_up(count, kLanes)), size(count), padded(round_up(count, kLanes)) {
        for (int64_t i = 0; i < padded; i += kLanes) {
            Vec v{};
            if (size - i >= kLanes) v = load(from + i);
            else
                for (int64_t j = i; j < size; ++j) v[j - i] = widen(from[j]);
            store(x + i, v);
        }
        if (rotates && size == kRotated) rotate(x, x);
        Vec most{}, least{};
        for (int64_t i = 0; i < padded; i += kLanes) {
            most = maximum(most, load(x + i));
            least = minimum(least, load(x + i));
        }
        high = largest(most);
        low = -largest(-least);
    }

    // A weight is as important as it is large; none is without importance.
    void weigh() {
        Vec squares{};
        for (int64_t i = 0; i < padded; i += kLanes) squares += load(x + i) * load(x + i);
        const float typical = sqrtf(sum(squares) / float(size));
        for (int64_t i = 0; i < padded; i += kLanes) {
            const Vec v = load(x + i);
            store(importance + i, maximum(v, -v) + typical);
        }
        for (int64_t i = size; i < padded; ++i) importance[i] = 0;
    }
};

QUIRE_INLINE IntVec four_bits(Vec x, float offset, float inverse) { return between(nearest((x - offset) * inverse), 0, 15); }

struct Fit {
    float scale = 0, offset = 0;
};

// Scale and offset with the least error among the candidates.
static Fit fit_four_bits(WeightGroup& group) {
    const float range = group.high - group.low;
    if (!(range >= kSmallestMagnitude)) return {};
    group.weigh();
    Fit best;
    float best_error = HUGE_VALF;
    const auto try_fit = [&](const Fit& fit) {
        const float inverse = 1.0f / fit.scale;
        Vec errors{};
        for (int64_t i = 0; i < group.padded; i += kLanes) {
            const Vec x = load(group.x + i);
            const Vec q = __builtin_convertvector(four_bits(x, fit.offset, inverse), Vec);
            const Vec difference = q * fit.scale + fit.offset - x;
            errors += load(group.importance + i) * difference * difference;
        }
        const float error = sum(errors);
        if (!(error < best_error)) return;
        best_error = error;
        best = fit;
    };
    try_fit({range / 15.0f, group.low});
    for (int i = 0; i < kNumRanges; ++i) {
        // The numbers that this range gives, and the scale and offset with which they come nearest to the weights.
        const float inverse = (kFirstRange + kRangeStep * float(i)) / range;
        Vec sums_w{}, sums_q{}, sums_qq{}, sums_x{}, sums_qx{};
        for (int64_t at = 0; at < group.padded; at += kLanes) {
            const Vec x = load(group.x + at), w = load(group.importance + at);
            const Vec q = __builtin_convertvector(four_bits(x, group.low, inverse), Vec);
            sums_w += w;
            sums_q += w * q;
            sums_qq += w * q * q;
            sums_x += w * x;
            sums_qx += w * q * x;
        }
        const float w = sum(sums_w), q = sum(sums_q), qq = sum(sums_qq), x = sum(sums_x), qx = sum(sums_qx);
        const float determinant = w * qq - q * q;
        if (!(determinant > 0)) continue;
        const Fit fit{(w * qx - x * q) / determinant, (qq * x - q * qx) / determinant};
        if (fit.scale >= kSmallestMagnitude && fit.offset <= 0) try_fit(fit);
    }
    return best;
}

// The least power of two that is `most` / 255 or more, with its sign: a power, so that no number becomes less exact.
static float unit_for(float most) {
    int exponent;
    const float fraction = frexpf(most / 255.0f, &exponent);
    return fraction == 0 ? 0.0f : ldexpf(fraction < 0 ? -1.0f : 1.0f, fraction == 0.5f || fraction == -0.5f ? exponent - 1 : exponent);
}

// So many of `unit` are nearest to `x`, which has its sign.
QUIRE_INLINE uint8_t units_in(float x, float unit) {
    const float count = unit != 0 ? x / unit : 0.0f;
    return count < 255 ? uint8_t(lrintf(count)) : 255;
}

// A row of one output: its numbers as bytes, and its scales at lane `lane` of a panel.
template <class From>
static void quantize_row_of_weight(Bits8, const From* from, int64_t k, const LowBitWeight& to, int64_t panel, int64_t lane,
                                   float* scratch, uint8_t* bytes) {
    const int64_t num_groups = (k + to.group - 1) / to.group;
    BFloat* const scales = static_cast<BFloat*>(to.scales) + panel * num_groups * kPanel + lane;
    for (int64_t index = 0; index < num_groups; ++index) {
        const int64_t begin = index * to.group;
        const WeightGroup group(from + begin, min_of(to.group, k - begin), to.rotates, scratch);
        const float magnitude = group.high > -group.low ? group.high : -group.low;
        const float scale = magnitude >= kSmallestMagnitude ? as_bfloat(magnitude / 127.0f) : 0.0f;
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        narrow(scales + index * kPanel, scale);
        for (int64_t i = 0; i < group.padded; i += kLanes)
            store_bytes(bytes + begin + i, between(nearest(load(group.x + i) * inverse), -127, 127) + 128);
    }
    for (int64_t i = k; i < round_up(k, kPairOfSteps); ++i) bytes[i] = 128;
}

template <class From>
static void quantize_row_of_weight(Bits4, const From* from, int64_t k, const LowBitWeight& to, int64_t panel, int64_t lane,
                                   float* scratch, uint8_t* bytes) {
    const int64_t num_groups = (k + to.group - 1) / to.group;
    const FourBitScales scales(to.scales, panel, num_groups);
    Fit* const fits = reinterpret_cast<Fit*>(scratch + 2 * round_up(min_of(k, to.group), kLanes));
    const auto group_at = [&](int64_t index) {
        return WeightGroup(from + index * to.group, min_of(to.group, k - index * to.group), to.rotates, scratch);
    };
    Fit most;
    for (int64_t index = 0; index < num_groups; ++index) {
        WeightGroup group = group_at(index);
        const Fit fit = fits[index] = fit_four_bits(group);
        most.scale = fit.scale > most.scale ? fit.scale : most.scale;
        most.offset = fit.offset < most.offset ? fit.offset : most.offset;
    }
    const float scale_unit = unit_for(most.scale), offset_unit = unit_for(most.offset);
    scales.units(lane) = {uint16_t(as_bits(offset_unit) >> 16), uint16_t(as_bits(scale_unit) >> 16)};
    for (int64_t index = 0; index < num_groups; ++index) {
        const Fit& fit = fits[index];
        const uint8_t count = units_in(fit.scale, scale_unit);
        scales.of_group(index, lane) = {units_in(fit.offset, offset_unit), uint8_t(count == 0 && fit.scale > 0 ? 1 : count)};
        const float scale = scales.scale(index, lane), offset = scales.offset(index, lane);
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        const WeightGroup group = group_at(index);
        for (int64_t i = 0; i < group.padded; i += kLanes)
            store_bytes(bytes + index * to.group + i, four_bits(load(group.x + i), offset, inverse));
    }
    for (int64_t i = k; i < round_up(k, kPairOfSteps); ++i) bytes[i] = 0;
}

template <class Stored, class From>
static void quantize_rows_of(const From* weight, int64_t rows, int64_t k, const LowBitWeight& to, int64_t first_row) {
    const int64_t depth = round_up(k, kPairOfSteps), end_row = first_row + rows;
    // Panels are written by one thread each.
    const int64_t first_panel = first_row / kPanel, num_panels = (end_row + kPanel - 1) / kPanel - first_panel;
    share_tasks(true, num_panels, [&](int64_t task, int64_t thread) {
        const int64_t panel = first_panel + task;
        uint8_t* const packed = to.weight + panel * (depth / kPairOfSteps) * Stored::kPairBytes;
        uint8_t* const bytes = to.scratch + thread * to.scratch_bytes;
        float* const floats = reinterpret_cast<float*>(bytes + round_up(depth + kLanes, 64));
        for (int64_t row = max_of(first_row, panel * kPanel); row < min_of(end_row, (panel + 1) * kPanel); ++row) {
            const int64_t lane = row - panel * kPanel;
            quantize_row_of_weight(Stored{}, weight + (row - first_row) * k, k, to, panel, lane, floats, bytes);
            for (int64_t pair = 0; pair < depth / kPairOfSteps; ++pair) {
                uint32_t first, second;
                memcpy(&first, bytes + pair * 8, 4);
                memcpy(&second, bytes + pair * 8 + 4, 4);
                uint8_t* const at = packed + pair * Stored::kPairBytes + lane * 4;
                if constexpr (std::is_same_v<Stored, Bits8>) memcpy(at + kStepBytes, &second, 4);
                else first |= second << 4;
                memcpy(at, &first, 4);
            }
        }
    });
}

template <class From>
static void quantize_from(const From* weight, int64_t rows, int64_t k, const LowBitWeight& to, int64_t first_row) {
    if (to.bits == 8) quantize_rows_of<Bits8>(weight, rows, k, to, first_row);
    else quantize_rows_of<Bits4>(weight, rows, k, to, first_row);
}

static void quantize_linear(const void* weight, Element from, int64_t rows, int64_t k, const LowBitWeight& to,
                            int64_t first_row) {
    switch (from) {
        case Element::float32: return quantize_from(static_cast<const float*>(weight), rows, k, to, first_row);
        case Element::float16: return quantize_from(static_cast<const Half*>(weight), rows, k, to, first_row);
        case Element::bfloat16: return quantize_from(static_cast<const BFloat*>(weight), rows, k, to, first_row);
    }
}

}  // namespace quire::QUIRE_ISA
