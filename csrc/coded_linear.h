// y = x . weight^T + bias with the weight as checkpoints of few bits store it: codes of 4 or 8 bits that stand for
// numbers, a scale for each output and group of inputs, and what is added to a group's numbers.
//
// A packed weight is a row of panels of kPanel outputs, as in linear.h:
//   4 bits   [k / 8][kPanel][4]     inputs 0 to 3 of eight in the low halves of four bytes, 4 to 7 in the high halves
//   8 bits   [k / 8][2][kPanel][4]
//   scales   [k / group][kPanel], and offsets of the same type
//
// A few vectors' codes become floats in a core's first-level cache, for a slice of inputs; then the micro-kernel of
// linear.h multiplies all rows with them. So memory is read in few bits, and many rows share the work of a code.
//
// Integers in groups that are not small are multiplied before they are scaled: an output is the sum over spans of
// scale * (sum of code * x - zero point * sum of x). A code stays at its bits of the word, where it stands for 2^bit times
// itself, and x is divided by 2^bit instead. A single row is multiplied with codes in registers.
//
// Either way an output is made in one order of k, the same bits in every batch.
#pragma once

#include <utility>

#include "kernels.h"
#include "linear.h"
#include "linear_input.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Vectors whose codes are unpacked together: as many as one row is multiplied with at once.
constexpr int64_t kCodedVectors = 8;
constexpr int64_t kCodedPanels = kCodedVectors > kVectorsPerPanel ? kCodedVectors / kVectorsPerPanel : 1;
// Inputs of a slice: 16 KB of floats.
constexpr int64_t kCodedDepth = 16384 / (kCodedPanels * kPanel * int64_t(sizeof(float)));
constexpr int64_t kCodesTogether = 8;

constexpr int64_t coded_run_bytes(CodeKind kind) {
    return kind == CodeKind::table || kind == CodeKind::integers4 ? kPanel * 4 : kPanel * 8;
}

// The numbers that the lowest four bits of each lane stand for.
QUIRE_INLINE Vec look_up(const float* levels, IntVec codes) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(levels));
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), (__m256i)codes);
    return _mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
    Vec numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = levels[codes[i] & 15];
    return numbers;
#endif
}

// Floats of 8 bits (e4m3) in the lowest byte of each lane. Exponent and mantissa go to float32's places; the product
// moves the exponent's bias from 7 to 127.
QUIRE_INLINE Vec e4m3(IntVec codes) {
    const IntVec sign = (codes << 24) & int32_t(0x80000000);
    return (Vec)((IntVec)((Vec)((codes & 127) << 20) * 0x1p120f) | sign);
}

// The number of step `step` of eight, of a vector of outputs.
template <CodeKind kind>
QUIRE_INLINE Vec coded_number(const CodedWeight& w, const uint8_t* run, int64_t step) {
    if constexpr (kind == CodeKind::table)
        return look_up(w.levels, load_words(run) >> int(step % 4 * 8 + step / 4 * 4));
    if constexpr (kind == CodeKind::integers4) {
        const IntVec codes = load_words(run) >> int(step % 4 * 8 + step / 4 * 4) & 15;
        return __builtin_convertvector(codes, Vec) - w.zero;
    }
    const IntVec codes = load_words(run + step / 4 * kPanel * 4) >> int(step % 4 * 8) & 255;
    if constexpr (kind == CodeKind::float8) return e4m3(codes);
    return __builtin_convertvector(codes, Vec) - w.zero;
}

// Inputs `begin` to `end` of the vector at `lane` of a panel -> `to` [end - begin in eights][kPanel].
template <CodeKind kind, class Scale>
static void unpack_codes(const CodedWeight& w, int64_t k, int64_t panel, int64_t lane, int64_t begin, int64_t end, float* to) {
    const int64_t num_runs = (k + kCodesTogether - 1) / kCodesTogether, num_groups = (k + w.group - 1) / w.group;
    const uint8_t* run = w.codes + (panel * num_runs + begin / kCodesTogether) * coded_run_bytes(kind) + lane * 4;
    const Scale *const scales = static_cast<const Scale*>(w.scales), *const offsets = static_cast<const Scale*>(w.offsets);
    while (begin < end) {
        const int64_t group = begin / w.group, group_end = min_of(end, (group + 1) * w.group);
        const int64_t at = (panel * num_groups + group) * kPanel + lane;
        const Vec scale = load(scales + at);
        Vec shift{};
        if (offsets) shift = w.zero_points ? load(offsets + at) * -scale : load(offsets + at);
        for (; begin < group_end; begin += kCodesTogether, run += coded_run_bytes(kind), to += kCodesTogether * kPanel) {
#pragma GCC unroll 8
            for (int64_t step = 0; step < kCodesTogether; ++step)
                store(to + step * kPanel, coded_number<kind>(w, run, step) * scale + shift);
        }
    }
}

// Inputs of a group whose products are summed before they are scaled, or of a span of it.
constexpr int64_t kLeastSummed = 32, kSpan = 128;
// With so many tiles a tile fetches no weights: those of the next panel are not there yet.
constexpr int64_t kNothingAhead = 1 << 20;

QUIRE_INLINE bool sums_spans(const CodedWeight& w) {
    return w.group >= kLeastSummed && (w.kind == CodeKind::integers4 || w.kind == CodeKind::integers8);
}
QUIRE_INLINE int64_t spans_of_group(const CodedWeight& w) { return (w.group + kSpan - 1) / kSpan; }
// Sums of x that a row needs.
QUIRE_INLINE int64_t num_spans(const CodedWeight& w, int64_t k) {
    return sums_spans(w) ? (k + w.group - 1) / w.group * spans_of_group(w) : 0;
}

// Calls `each(span, group, begin, end)` for all spans of k inputs.
template <class Each>
QUIRE_INLINE void for_spans(const CodedWeight& w, int64_t k, const Each& each) {
    for (int64_t group = 0, span = 0; group * w.group < k; ++group) {
        const int64_t group_end = min_of(k, (group + 1) * w.group);
        for (int64_t i = 0, begin = group * w.group; i < spans_of_group(w); ++i, ++span, begin += kSpan)
            if (begin < group_end) each(span, group, begin, min_of(group_end, begin + kSpan));
    }
}

// The place of a code in its word; the highest is shifted down to the lowest bits, since words have signs.
template <CodeKind kind, int step>
constexpr int kCodeBit = kind == CodeKind::integers4 ? step % 4 * 8 + step / 4 * 4 : step % 4 * 8;
template <CodeKind kind, int step>
constexpr bool kHighestCode = kCodeBit<kind, step> == (kind == CodeKind::integers4 ? 28 : 24);

// 2^bit times the code of step `step` of eight.
template <CodeKind kind, int step>
QUIRE_INLINE Vec code_in_place(const uint8_t* run) {
    constexpr int bit = kCodeBit<kind, step>, mask = kind == CodeKind::integers4 ? 15 : 255;
    const IntVec words = load_words(kind == CodeKind::integers4 ? run : run + step / 4 * kPanel * 4);
    if constexpr (kHighestCode<kind, step>) return __builtin_convertvector((IntVec)((WordsVec)words >> bit), Vec);
    else return __builtin_convertvector(words & (mask << bit), Vec);
}

// What inputs are multiplied by: 2^-bit of the codes of their steps.
template <CodeKind kind, size_t... step>
constexpr void place_factors(float* to, std::index_sequence<step...>) {
    ((to[step] = kHighestCode<kind, step> ? 1.0f : 1.0f / float(1 << kCodeBit<kind, step>)), ...);
}
constexpr auto kEachStep = std::make_index_sequence<kCodesTogether>();

// Row r of a tile as products read it, `to` [k][rows]; and the sums of its spans, `sums` [span][rows].
static void prepare_codes_row(const CodedWeight& w, const float* row, const int32_t* order, int64_t k, int64_t r, int64_t rows,
                              float* to, float* sums) {
    const auto input = [&](int64_t i) { return row[order ? order[i] : i]; };
    if (!sums_spans(w)) {
        for (int64_t i = 0; i < k; ++i) to[i * rows + r] = input(i);
        return;
    }
    float factors[kCodesTogether];
    if (w.kind == CodeKind::integers4) place_factors<CodeKind::integers4>(factors, kEachStep);
    else place_factors<CodeKind::integers8>(factors, kEachStep);
    for_spans(w, k, [&](int64_t span, int64_t, int64_t begin, int64_t end) {
        float parts[kCodesTogether] = {};
        for (int64_t i = begin; i < end; i += kCodesTogether)
            for (int64_t step = 0; step < min_of(kCodesTogether, end - i); ++step) {
                const float x = input(i + step);
                parts[step] += x;
                to[(i + step) * rows + r] = x * factors[step];
            }
        float sum = 0;
        for (const float part : parts) sum += part;
        sums[span * rows + r] = sum;
    });
}

// How the sum of a span becomes a part of an output, for a vector of outputs.
struct SpanScale {
    Vec scale, zero, shift;
    bool shifts;

    // `at`: the place of the vector's scales.
    QUIRE_INLINE SpanScale(const CodedWeight& w, int64_t at) : shift{}, shifts(w.offsets && !w.zero_points) {
        const auto load_at = [&](const void* from) {
            switch (w.scale_element) {
                case Element::float32: return load(static_cast<const float*>(from) + at);
                case Element::float16: return load(static_cast<const Half*>(from) + at);
                case Element::bfloat16: break;
            }
            return load(static_cast<const BFloat*>(from) + at);
        };
        scale = load_at(w.scales);
        zero = broadcast(w.zero);
        if (shifts) shift = load_at(w.offsets);
        else if (w.offsets) zero += load_at(w.offsets);
    }

    QUIRE_INLINE Vec added(Vec total, Vec sum, float inputs) const {
        total += (sum - zero * inputs) * scale;
        return shifts ? total + shift * inputs : total;
    }
};

// One row times kWidth vectors of codes.
template <CodeKind kind, int kWidth>
static void multiply_row_of_codes(const Linear& a, const CodedWeight& w, const float* x, const float* sums_of_x, int64_t vector) {
    constexpr int kTogether = kWidth < 4 ? kWidth : 4;  // vectors whose words are in registers at once
    const int64_t num_runs = (a.k + kCodesTogether - 1) / kCodesTogether, num_groups = (a.k + w.group - 1) / w.group;
    const uint8_t* codes[kWidth];
    int64_t scales[kWidth];
    Vec totals[kWidth];
    for (int j = 0; j < kWidth; ++j) {
        const int64_t panel = (vector + j) / kVectorsPerPanel, lane = (vector + j) % kVectorsPerPanel * kLanes;
        const int64_t column = (vector + j) * kLanes;
        codes[j] = w.codes + panel * num_runs * coded_run_bytes(kind) + lane * 4;
        scales[j] = panel * num_groups * kPanel + lane;
        totals[j] = a.bias ? load_first(a.bias + column, min_of(kLanes, a.n - column)) : Vec{};
    }
    for_spans(w, a.k, [&](int64_t span, int64_t group, int64_t begin, int64_t end) {
        Vec sums[kWidth] = {};
        for (int64_t i = begin; i < end; i += kCodesTogether) {
            float rest[kCodesTogether] = {};
            const float* inputs = x + i;
            if (end - i < kCodesTogether) inputs = static_cast<const float*>(memcpy(rest, inputs, (end - i) * sizeof(float)));
            const int64_t run = i / kCodesTogether * coded_run_bytes(kind);
            for (int j = 0; j < kWidth; j += kVectorsPerPanel) fetch_page_ahead(codes[j] + run, coded_run_bytes(kind));
#pragma GCC unroll 2
            for (int first = 0; first < kWidth; first += kTogether) {
                const auto step = [&]<size_t index>() {
#pragma GCC unroll 4
                    for (int j = first; j < first + kTogether; ++j)
                        sums[j] += code_in_place<kind, index>(codes[j] + run) * inputs[index];
                };
                [&]<size_t... index>(std::index_sequence<index...>) { (step.template operator()<index>(), ...); }(kEachStep);
            }
        }
        for (int j = 0; j < kWidth; ++j)
            totals[j] = SpanScale(w, scales[j] + group * kPanel).added(totals[j], sums[j], sums_of_x[span]);
    });
    for (int j = 0; j < kWidth; ++j) {
        const int64_t column = (vector + j) * kLanes;
        store_first(a.out + column, totals[j], min_of(kLanes, a.n - column));
    }
}

// Codes of the panel's vectors, as they are in their words -> `to` [end - begin][kPanel].
template <CodeKind kind>
static void unpack_in_place(const CodedWeight& w, int64_t k, int64_t panel, int64_t num_vectors, int64_t begin, int64_t end,
                            float* to) {
    const int64_t num_runs = (k + kCodesTogether - 1) / kCodesTogether;
    const uint8_t* run = w.codes + (panel * num_runs + begin / kCodesTogether) * coded_run_bytes(kind);
    for (; begin < end; begin += kCodesTogether, run += coded_run_bytes(kind), to += kCodesTogether * kPanel)
        for (int64_t v = 0; v < num_vectors; ++v)
            [&]<size_t... step>(std::index_sequence<step...>) {
                (store(to + step * kPanel + v * kLanes, code_in_place<kind, step>(run + v * kLanes * 4)), ...);
            }(kEachStep);
}

// The tiles `first` to `last` of num_tiles against vectors, of which the first begins a panel, in spans. Inputs and sums of
// spans are those of `prepare_codes_row`, tile after tile.
template <CodeKind kind>
static void multiply_spans(const Linear& a, const CodedWeight& w, const float* inputs, const float* sums_of_x, int64_t num_tiles,
                           int64_t first, int64_t last, int64_t vector, int64_t vector_end) {
    if (a.m == 1) {
        while (vector < vector_end) {
            const int64_t left = vector_end - vector;
            if (left >= 8) multiply_row_of_codes<kind, 8>(a, w, inputs, sums_of_x, vector);
            else if (left >= 2) multiply_row_of_codes<kind, 2>(a, w, inputs, sums_of_x, vector);
            else multiply_row_of_codes<kind, 1>(a, w, inputs, sums_of_x, vector);
            vector += left >= 8 ? 8 : left >= 2 ? 2 : 1;
        }
        return;
    }
    alignas(64) float numbers[(kSpan + kCodesTogether) * kPanel], sums[kMaxRows * kPanel];
    const int64_t num_groups = (a.k + w.group - 1) / w.group, spans = num_spans(w, a.k);
    for (; vector < vector_end; vector += kVectorsPerPanel) {
        const int64_t panel = vector / kVectorsPerPanel, num_vectors = min_of(kVectorsPerPanel, vector_end - vector);
        for_spans(w, a.k, [&](int64_t span, int64_t group, int64_t begin, int64_t end) {
            unpack_in_place<kind>(w, a.k, panel, num_vectors, begin, end, numbers);
            Linear slice{};
            slice.weight = numbers;
            slice.out = sums;
            slice.n = kPanel;
            slice.k = end - begin;
            for (int64_t tile = first; tile < last; ++tile) {
                const int64_t row = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - row;
                const Place place{0, slice.k, true, 0, kNothingAhead};
                multiply_tile<float>(rows, slice, inputs + row * a.k + begin * rows, sums, 0, num_vectors, place);
                for (int64_t v = 0; v < num_vectors; ++v) {
                    const SpanScale scale(w, (panel * num_groups + group) * kPanel + v * kLanes);
                    const int64_t column = (vector + v) * kLanes, lanes = min_of(kLanes, a.n - column);
                    for (int64_t r = 0; r < rows; ++r) {
                        float* const out = a.out + (row + r) * a.n + column;
                        const float* const start = begin > 0 ? out : a.bias ? a.bias + column : nullptr;
                        const Vec total = start ? load_first(start, lanes) : Vec{};
                        const Vec sum = load(sums + r * kPanel + v * kLanes);
                        store_first(out, scale.added(total, sum, sums_of_x[row * spans + span * rows + r]), lanes);
                    }
                }
            }
        });
    }
}

using UnpackCodes = void (*)(const CodedWeight&, int64_t, int64_t, int64_t, int64_t, int64_t, float*);

template <CodeKind kind>
static UnpackCodes unpack_of_kind(Element scale) {
    switch (scale) {
        case Element::float32: return unpack_codes<kind, float>;
        case Element::float16: return unpack_codes<kind, Half>;
        case Element::bfloat16: break;
    }
    return unpack_codes<kind, BFloat>;
}

static UnpackCodes unpack_of(const CodedWeight& w) {
    switch (w.kind) {
        case CodeKind::table: return unpack_of_kind<CodeKind::table>(w.scale_element);
        case CodeKind::integers4: return unpack_of_kind<CodeKind::integers4>(w.scale_element);
        case CodeKind::integers8: return unpack_of_kind<CodeKind::integers8>(w.scale_element);
        case CodeKind::float8: break;
    }
    return unpack_of_kind<CodeKind::float8>(w.scale_element);
}

// The tiles `first` to `last` of num_tiles against at most kCodedVectors vectors, which begin a panel. `a` has the
// sizes, the bias and `out` of the product; inputs and sums are those of `prepare_codes_row`, tile after tile.
static void multiply_coded_tiles(const Linear& a, const CodedWeight& w, const float* inputs, const float* sums,
                                 int64_t num_tiles, int64_t first, int64_t last, int64_t vector, int64_t vector_end) {
    if (sums_spans(w)) {
        const auto multiply = w.kind == CodeKind::integers4 ? multiply_spans<CodeKind::integers4> : multiply_spans<CodeKind::integers8>;
        return multiply(a, w, inputs, sums, num_tiles, first, last, vector, vector_end);
    }
    alignas(64) float numbers[kCodedPanels * kCodedDepth * kPanel];
    const UnpackCodes unpack = unpack_of(w);
    const int64_t first_panel = vector / kVectorsPerPanel;
    for (int64_t k = 0; k < a.k; k += kCodedDepth) {
        Linear slice = a;
        slice.k = min_of(kCodedDepth, a.k - k);
        // Where panels of one slice would begin if there were those before too.
        const int64_t panel_size = slice.k * kPanel;
        slice.weight = reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(numbers) - first_panel * panel_size * sizeof(float));
        for (int64_t v = vector; v < vector_end; ++v) {
            const int64_t panel = v / kVectorsPerPanel, lane = v % kVectorsPerPanel * kLanes;
            const int64_t whole = slice.k / kCodesTogether * kCodesTogether;
            float* const to = numbers + (panel - first_panel) * panel_size + lane;
            unpack(w, a.k, panel, lane, k, k + whole, to);
            if (whole < slice.k) {  // the end of k, which is no multiple of eight
                float rest[kCodesTogether * kPanel];
                unpack(w, a.k, panel, lane, k + whole, k + whole + kCodesTogether, rest);
                for (int64_t step = whole; step < slice.k; ++step)
                    store(to + step * kPanel, load(rest + (step - whole) * kPanel));
            }
        }
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t begin = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - begin;
            const Place place{0, slice.k, k == 0, tile - first, last - first};
            multiply_tile<float>(rows, slice, inputs + begin * a.k + k * rows, a.out + begin * a.n, vector, vector_end, place);
        }
    }
}

static void linear_coded(const CodedLinear& c) {
    Linear a{};
    a.x = c.x;
    a.bias = c.bias;
    a.out = c.out;
    a.m = c.m;
    a.n = c.n;
    a.k = c.k;
    const bool parallel = a.m * a.n * a.k >= kParallelProducts;
    const int64_t threads = parallel ? num_threads() : 1;
    const int64_t num_tiles = (a.m + kMaxRows - 1) / kMaxRows;
    const int64_t num_vectors = (a.n + kLanes - 1) / kLanes;
    const int64_t num_groups = (num_vectors + kCodedVectors - 1) / kCodedVectors;
    const int64_t num_blocks = max_of(1, min_of(num_tiles, 2 * threads / num_groups));
    float *const made = c.scratch + a.m * a.k, *const sums = made + a.m * a.k;
    const int64_t spans = num_spans(c.weight, a.k);

    share_tasks(parallel, num_tiles, [&](int64_t tile, int64_t) {
        const int64_t begin = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - begin;
        for (int64_t r = 0; r < rows; ++r) {
            const float* const row = input_row(a.x, begin + r, a.k, made + (begin + r) * a.k);
            prepare_codes_row(c.weight, row, c.order, a.k, r, rows, c.scratch + begin * a.k, sums + begin * spans);
        }
    });
    share_tasks(parallel, num_blocks * num_groups, [&](int64_t i, int64_t) {
        const int64_t block = i / num_groups, g = i % num_groups;
        multiply_coded_tiles(a, c.weight, c.scratch, sums, num_tiles, block * num_tiles / num_blocks,
                             (block + 1) * num_tiles / num_blocks, g * kCodedVectors,
                             min_of((g + 1) * kCodedVectors, num_vectors));
    });
}

}  // namespace quire::QUIRE_ISA
