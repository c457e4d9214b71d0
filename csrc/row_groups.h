// Rows of x in 8 bits, with a scale for each group of inputs.
//
// Real models have a few activations that are a hundred times the others. One scale for a whole row would round the
// others to nothing; one for each group confines that to the group. A rotated group shares such a number out among all
// its numbers: it is multiplied with an orthogonal matrix (Hadamard's), and the weights' groups with the same, which
// leaves their product as it is.
#pragma once

#include <utility>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Groups below this magnitude are zeros: their scale could not be inverted.
constexpr float kSmallestMagnitude = 0x1p-100f;

// To the nearest integer, ties to even.
QUIRE_INLINE IntVec nearest(Vec v) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
    return (IntVec)_mm256_cvtps_epi32(v);
#elif defined(__SSSE3__)
    return (IntVec)_mm_cvtps_epi32(v);
#else
    IntVec rounded;
    for (int i = 0; i < kLanes; ++i) rounded[i] = int32_t(lrintf(v[i]));
    return rounded;
#endif
}

template <int stride, size_t... lane>
QUIRE_INLINE Vec exchanged(Vec v, std::index_sequence<lane...>) {
#ifdef __clang__
    return __builtin_shufflevector(v, v, (int(lane) ^ stride)...);
#else
    return __builtin_shuffle(v, IntVec{(int32_t(lane) ^ stride)...});
#endif
}

// Sums and differences of lanes that are `stride` apart.
template <int stride, size_t... lane>
QUIRE_INLINE Vec butterfly(Vec v, std::index_sequence<lane...> lanes) {
    return exchanged<stride>(v, lanes) + v * Vec{(int(lane) & stride ? -1.0f : 1.0f)...};
}

// x [kRotated] times Hadamard's matrix, over the square root of its size; the matrix is its own inverse. `made` may be
// x. The sums are made in one order, of rising strides, whatever the instruction set.
static inline void rotate(const float* x, float* made) {
    static_assert(kRotated == 64, "1 / 8 is exact");
    constexpr int kVectors = kRotated / kLanes;
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    Vec v[kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
        v[i] = butterfly<2>(butterfly<1>(load(x + i * kLanes) * 0.125f, lanes), lanes);
        if constexpr (kLanes >= 8) v[i] = butterfly<4>(v[i], lanes);
        if constexpr (kLanes >= 16) v[i] = butterfly<8>(v[i], lanes);
    }
#pragma GCC unroll 4
    for (int stride = 1; stride < kVectors; stride *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
            if (i & stride) continue;
            const Vec a = v[i], b = v[i + stride];
            v[i] = a + b;
            v[i + stride] = a - b;
        }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) store(made + i * kLanes, v[i]);
}

// A group of one row, as a product with weights of few bits reads it.
struct RowGroup {
    float scale;
    union {
        int32_t start;  // where the weights' integers have a zero point: it times the sum of the inputs, negated
        float sum;      // where the weights' groups have an offset: the sum of the inputs, times the scale
    };
};

// k numbers to `depth` bytes from -127 to 127, zeros past the last, in groups of `group`: a multiple of kLanes, or k.
// Calls `each(index, scale, sum)` for every group; `sum` is of its bytes. `rotates`: groups of kRotated are rotated, and
// smaller ones at the end of a row are not. A group with an infinity or a NaN gets a NaN
// for its scale, and so for what is computed from it.
template <class Each>
QUIRE_INLINE void quantize_row(const float* x, int64_t k, int64_t depth, int64_t group, bool rotates, int8_t* bytes,
                               const Each& each) {
    for (int64_t begin = 0, index = 0; begin < k; begin += group, ++index) {
        const int64_t size = min_of(k - begin, group);
        const float* from = x + begin;
        float rotated[kRotated];
        if (rotates && size == kRotated) {
            rotate(from, rotated);
            from = rotated;
        }
        const auto values_at = [&](int64_t i) { return size - i >= kLanes ? load(from + i) : load_first(from + i, size - i); };
        // Compared as integers, magnitudes keep their order, and NaN is larger than all.
        IntVec magnitudes{};
        for (int64_t i = 0; i < size; i += kLanes) {
            const IntVec bits = (IntVec)values_at(i) & 0x7fffffff;
            magnitudes = bits > magnitudes ? bits : magnitudes;
        }
        int32_t largest_bits = 0;
        for (int i = 0; i < kLanes; ++i) largest_bits = magnitudes[i] > largest_bits ? magnitudes[i] : largest_bits;
        const bool finite = largest_bits < 0x7f800000;
        const float magnitude = as_float(uint32_t(largest_bits));
        const float inverse = finite && magnitude >= kSmallestMagnitude ? 127.0f / magnitude : 0.0f;

        IntVec sums{};
        for (int64_t i = 0; i < size; i += kLanes) {
            const IntVec rounded = finite ? nearest(values_at(i) * inverse) : IntVec{};
            sums += rounded;
            typedef int8_t Bytes __attribute__((vector_size(kLanes)));
            const Bytes narrow = __builtin_convertvector(rounded, Bytes);
            int8_t* const to = bytes + begin + i;
            const int64_t room = depth - begin - i;
            if (room >= kLanes) memcpy(to, &narrow, kLanes);
            else memcpy(to, &narrow, room);
        }
        int32_t sum = 0;
        for (int i = 0; i < kLanes; ++i) sum += sums[i];
        each(index, finite ? magnitude / 127.0f : as_float(0x7fc00000), sum);
    }
    const int64_t written = round_up(k, kLanes);
    if (written < depth) memset(bytes + written, 0, depth - written);
}

static void quantize_groups(Rows x, int64_t rows, int64_t k, int64_t group, bool rotates, void* bytes, float* scales) {
    const int64_t depth = round_up(k, kPairOfSteps), num_groups = (k + group - 1) / group;
    share_tasks(rows * k >= 1 << 16, rows, [&](int64_t row, int64_t) {
        quantize_row(x.data + row * x.stride, k, depth, group, rotates, static_cast<int8_t*>(bytes) + row * depth,
                     [&](int64_t index, float scale, int32_t) { scales[row * num_groups + index] = scale; });
    });
}

}  // namespace quire::QUIRE_ISA
