// y = x . weight^T + bias with the weight in blocks of GGUF as the file has them, and every 32 inputs of a row of x brought
// to 8 bits with a scale of their own.
//
// A thread unpacks a few rows of the weight to bytes, which stay in its first cache, and multiplies them with all rows of
// x. Products are summed as integers inside a group, which is exact; the groups' sums are added as float32 in the order
// of k in eight lanes, whatever the batch, the threads and the instruction set.
#pragma once

#include <omp.h>

#include "gguf_blocks.h"
#include "linear_input.h"
#include "linear_low_bit.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kRun = 32;  // inputs of a row of x that share a scale
constexpr int kBlockRows = 4, kBlockTokens = 2;

// Vectors of eight lanes are two registers where there is no AVX; functions on them are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

// 32 products of bytes with a sign; the lane of each is a quarter of its index. No byte of x is -128.
QUIRE_INLINE Ints8 products(const int8_t* w, const int8_t* x) {
#if defined(__AVX2__)
    const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i signed_x = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), weight);
    const __m256i magnitude = _mm256_abs_epi8(weight);
#if defined(__AVX512VNNI__)
    return (Ints8)_mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, signed_x);
#else
    return (Ints8)_mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), _mm256_set1_epi16(1));
#endif
#else
    Ints8 sums{};
    for (int lane = 0; lane < 8; ++lane)
        for (int i = 0; i < 4; ++i) sums[lane] += w[4 * lane + i] * x[4 * lane + i];
    return sums;
#endif
}

QUIRE_INLINE float sum_of(Floats8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// Rows of x in 8 bits.
struct RunsOfBytes {
    int8_t* bytes;     // [m, k]
    float* scales;     // [m, k / 32]
    float* halves;     // [m, k / 16]: the sum of every 16 bytes times their scale
    int64_t k;

    RunsOfBytes from(int64_t row) const { return {bytes + row * k, scales + row * (k / kRun), halves + row * (k / 16), k}; }
};

// One row of x. A run with an infinity or a NaN gets a NaN for its scale, and so the row for its results.
static void quantize_runs(const float* x, const RunsOfBytes& to) {
    for (int64_t run = 0; run < to.k / kRun; ++run) {
        const float* from = x + run * kRun;
        int8_t* bytes = to.bytes + run * kRun;
        int32_t largest = 0;
        for (int i = 0; i < kRun; ++i) {
            const int32_t bits = int32_t(as_bits(from[i]) & 0x7fffffff);  // NaN is larger than all
            largest = bits > largest ? bits : largest;
        }
        const bool finite = largest < 0x7f800000;
        const float magnitude = as_float(uint32_t(largest));
        const float inverse = finite && magnitude >= 0x1p-100f ? 127.0f / magnitude : 0.0f;
        const float scale = finite ? magnitude / 127.0f : as_float(0x7fc00000);
        to.scales[run] = scale;
        for (int i = 0; i < kRun; i += kLanes) {
            typedef int8_t Bytes __attribute__((vector_size(kLanes)));
            const IntVec rounded = finite ? nearest(load(from + i) * inverse) : IntVec{};
            const Bytes narrow = __builtin_convertvector(rounded, Bytes);
            memcpy(bytes + i, &narrow, kLanes);
        }
        int32_t sums[2] = {0, 0};
        for (int i = 0; i < kRun; ++i) sums[i / 16] += bytes[i];
        to.halves[2 * run] = float(sums[0]) * scale;
        to.halves[2 * run + 1] = float(sums[1]) * scale;
    }
}

// Unpacked rows of the weight.
struct UnpackedRows {
    int8_t* bytes;   // [rows, k]
    float* scales;   // [rows, k / 16], of which a type with groups of 32 uses the first half
    float* offsets;  // the same
};

template <class Block, int kRows, int kTokens>
QUIRE_INLINE void multiply_block(const UnpackedRows& w, const RunsOfBytes& x, float (&out)[kRows][kTokens]) {
    const int64_t k = x.k;
    Floats8 sums[kRows][kTokens] = {};
    for (int64_t run = 0; run < k / kRun; ++run)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const float* scale = w.scales + r * (k / 16) + run * (kRun / Block::kGroup);
            Floats8 scales;
            if constexpr (Block::kGroup == 32) scales = scale[0] - Floats8{};
            else scales = Floats8{scale[0], scale[0], scale[0], scale[0], scale[1], scale[1], scale[1], scale[1]};
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                const Ints8 product = products(w.bytes + r * k + run * kRun, x.bytes + t * k + run * kRun);
                const Floats8 factor = scales * x.scales[t * (k / kRun) + run];
                sums[r][t] += __builtin_convertvector(product, Floats8) * factor;
            }
        }
    for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) {
            float sum = sum_of(sums[r][t]);
            if constexpr (Block::kOffsets) {
                const float* offsets = w.offsets + r * (k / 16);
                const float* halves = x.halves + t * (k / 16);
                float lanes[8] = {};
                for (int64_t i = 0; i < k / Block::kGroup; ++i)
                    lanes[i % 8] += offsets[i] * (Block::kGroup == 16 ? halves[i] : halves[2 * i] + halves[2 * i + 1]);
                for (int i = 0; i < 8; ++i) sum += lanes[i];
            }
            out[r][t] = sum;
        }
}

// Rows `begin` to `end` of one part of the weight, whose first output is column `column`.
template <class Block, int kRows>
static void multiply_rows(const BlockLinear& a, const BlockPart& part, int64_t row, int64_t column, const RunsOfBytes& x,
                          const UnpackedRows& w) {
    for (int r = 0; r < kRows; ++r)
        unpack_row<Block>(part.rows + (row + r) * part.row_bytes, a.k, w.bytes + r * a.k, w.scales + r * (a.k / 16),
                          w.offsets + r * (a.k / 16));
    const auto put = [&]<int kTokens>(int64_t token) {
        float out[kRows][kTokens];
        multiply_block<Block, kRows, kTokens>(w, x.from(token), out);
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTokens; ++t)
                a.out[(token + t) * a.n + column + row + r] = out[r][t] + (a.bias ? a.bias[column + row + r] : 0.0f);
    };
    int64_t token = 0;
    for (; token + kBlockTokens <= a.m; token += kBlockTokens) put.template operator()<kBlockTokens>(token);
    for (; token < a.m; ++token) put.template operator()<1>(token);
}

// Floats of scratch: rows of x in 8 bits; and for each thread a row as it is made, and unpacked rows of the weight.
static int64_t blocks_scratch(int64_t m, int64_t k, int64_t threads) {
    return m * (k / 4 + k / kRun + k / 16) + threads * (k + kBlockRows * (k / 4 + 2 * (k / 16)));
}

static void linear_blocks(const BlockLinear& a) {
    const int64_t k = a.k;
    const RunsOfBytes x{reinterpret_cast<int8_t*>(a.scratch), a.scratch + a.m * (k / 4),
                        a.scratch + a.m * (k / 4 + k / kRun), k};
    float* const of_threads = x.halves + a.m * (k / 16);
    const bool parallel = a.m * a.n * k >= kParallelProducts;
#pragma omp parallel if (parallel)
    {
        float* const made = of_threads + omp_get_thread_num() * (k + kBlockRows * (k / 4 + 2 * (k / 16)));
        const UnpackedRows w{reinterpret_cast<int8_t*>(made + k), made + k + kBlockRows * (k / 4),
                             made + k + kBlockRows * (k / 4 + k / 16)};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.m; ++row) quantize_runs(input_row(a.x, row, k, made), x.from(row));
        int64_t column = 0;
        for (int64_t p = 0; p < a.num_parts; ++p) {
            const BlockPart& part = a.parts[p];
            const int64_t num_blocks = (part.num_rows + kBlockRows - 1) / kBlockRows;
#pragma omp for schedule(static) nowait
            for (int64_t block = 0; block < num_blocks; ++block) {
                const int64_t row = block * kBlockRows, end = min_of(row + kBlockRows, part.num_rows);
                with_block(part.type, [&]<class Block>() {
                    if (end - row == kBlockRows) return multiply_rows<Block, kBlockRows>(a, part, row, column, x, w);
                    for (int64_t one = row; one < end; ++one) multiply_rows<Block, 1>(a, part, one, column, x, w);
                });
            }
            column += part.num_rows;
        }
    }
}

}  // namespace quire::QUIRE_ISA
