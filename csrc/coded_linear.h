// y = x . weight^T + bias with the weight as checkpoints of few bits store it: codes of 4 or 8 bits that stand for
// numbers, a scale for each output and group of inputs, and what is added to a group's numbers.
//
// A packed weight is a row of panels of kPanel outputs, as in linear.h:
//   4 bits   [k / 8][kPanel][4]     inputs 0 to 3 of eight in the low halves of four bytes, 4 to 7 in the high halves
//   8 bits   [k / 8][2][kPanel][4]
//   scales   [k / group][kPanel], and offsets of the same type
//
// A few vectors' codes become floats in a core's first-level cache, for a slice of inputs; then the micro-kernel of
// linear.h multiplies all rows with them. So memory is read in few bits, and many rows share the work of a code. The
// sum is that of linear.h with float32 weights: one in the order of k, the same bits in every batch.
#pragma once

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
// sizes, the bias and `out` of the product; `inputs` are arranged, tile after tile.
static void multiply_coded_tiles(const Linear& a, const CodedWeight& w, const float* inputs, int64_t num_tiles,
                                 int64_t first, int64_t last, int64_t vector, int64_t vector_end) {
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
    float* const made = c.scratch + a.m * a.k;

    share_tasks(parallel, num_tiles, [&](int64_t tile, int64_t) {
        const int64_t begin = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - begin;
        float* const to = c.scratch + begin * a.k;
        for (int64_t r = 0; r < rows; ++r) {
            const float* const row = input_row(a.x, begin + r, a.k, made + (begin + r) * a.k);
            if (c.order)
                for (int64_t k = 0; k < a.k; ++k) to[k * rows + r] = row[c.order[k]];
            else
                for (int64_t k = 0; k < a.k; ++k) to[k * rows + r] = row[k];
        }
    });
    share_tasks(parallel, num_blocks * num_groups, [&](int64_t i, int64_t) {
        const int64_t block = i / num_groups, g = i % num_groups;
        multiply_coded_tiles(a, c.weight, c.scratch, num_tiles, block * num_tiles / num_blocks,
                             (block + 1) * num_tiles / num_blocks, g * kCodedVectors,
                             min_of((g + 1) * kCodedVectors, num_vectors));
    });
}

}  // namespace quire::QUIRE_ISA
