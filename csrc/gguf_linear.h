// y = x . weight^T + bias with the weight in blocks of GGUF as the file has them, and every 32 inputs of a row of x brought
// to 16 bits with a scale of their own: 8 bits would change tokens of models whose inputs have outliers, and 16 cost as
// many instructions where bytes with a sign have to be widened anyway.
//
// A thread unpacks a few rows of the weight to bytes, which stay in its first cache, and multiplies them with all rows of
// x. Products are summed as integers inside a group, which is exact; the groups' sums are added as float32 in the order
// of k in eight lanes, whatever the batch, the threads and the instruction set.
#pragma once

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

// Products of 16 weights with 16 inputs; each lane has those of two neighbours.
QUIRE_INLINE Ints8 products(const int8_t* w, const int16_t* x) {
#if defined(__AVX2__)
    const __m256i weight = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    return (Ints8)_mm256_madd_epi16(weight, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#else
    Ints8 sums{};
    for (int lane = 0; lane < 8; ++lane) sums[lane] = w[2 * lane] * x[2 * lane] + w[2 * lane + 1] * x[2 * lane + 1];
    return sums;
#endif
}

QUIRE_INLINE float sum_of(const Floats8& v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// Rows of x in 16 bits.
struct RunsOfWords {
    int16_t* words;  // [m, k]
    float* scales;   // [m, k / 32]
    float* halves;   // [m, k / 16]: the sum of every 16 words times their scale
    int64_t k;

    RunsOfWords from(int64_t row) const { return {words + row * k, scales + row * (k / kRun), halves + row * (k / 16), k}; }
};

// One row of x. A run with an infinity or a NaN gets a NaN for its scale, and so the row for its results.
static void quantize_runs(const float* x, const RunsOfWords& to) {
    for (int64_t run = 0; run < to.k / kRun; ++run) {
        const float* from = x + run * kRun;
        int16_t* words = to.words + run * kRun;
        int32_t largest = 0;
        for (int i = 0; i < kRun; ++i) {
            const int32_t bits = int32_t(as_bits(from[i]) & 0x7fffffff);  // NaN is larger than all
            largest = bits > largest ? bits : largest;
        }
        const bool finite = largest < 0x7f800000;
        const float magnitude = as_float(uint32_t(largest));
        const float inverse = finite && magnitude >= 0x1p-100f ? 32767.0f / magnitude : 0.0f;
        const float scale = finite ? magnitude / 32767.0f : as_float(0x7fc00000);
        to.scales[run] = scale;
        for (int i = 0; i < kRun; i += kLanes) {
            typedef int16_t Words __attribute__((vector_size(kLanes * 2)));
            const IntVec rounded = finite ? nearest(load(from + i) * inverse) : IntVec{};
            const Words narrow = __builtin_convertvector(rounded, Words);
            memcpy(words + i, &narrow, sizeof narrow);
        }
        int32_t sums[2] = {0, 0};
        for (int i = 0; i < kRun; ++i) sums[i / 16] += words[i];
        to.halves[2 * run] = float(sums[0]) * scale;
        to.halves[2 * run + 1] = float(sums[1]) * scale;
    }
}

// Unpacked rows of the weight.
struct UnpackedRows {
    int8_t* bytes;   // [rows, k]
    float* scales;   // [rows, k / 16]; a type with groups of 32 uses the first half
    float* offsets;  // the same
};

template <class Block, int kRows, int kTokens>
QUIRE_INLINE void multiply_block(const UnpackedRows& w, const RunsOfWords& x, float (&out)[kRows][kTokens]) {
    const int64_t k = x.k;
    Floats8 sums[kRows][kTokens] = {};
    for (int64_t run = 0; run < k / kRun; ++run)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const float* scale = w.scales + r * (k / 16) + run * (kRun / Block::kGroup);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                const int8_t* bytes = w.bytes + r * k + run * kRun;
                const int16_t* words = x.words + t * k + run * kRun;
                const float of_run = x.scales[t * (k / kRun) + run];
                const Ints8 first = products(bytes, words), second = products(bytes + 16, words + 16);
                if constexpr (Block::kGroup == 32) {
                    sums[r][t] += __builtin_convertvector(first + second, Floats8) * (scale[0] * of_run);
                } else {
                    sums[r][t] += __builtin_convertvector(first, Floats8) * (scale[0] * of_run);
                    sums[r][t] += __builtin_convertvector(second, Floats8) * (scale[1] * of_run);
                }
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
static void multiply_rows(const BlockLinear& a, const BlockPart& part, int64_t row, int64_t column, const RunsOfWords& x,
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

// Floats of scratch: rows of x in 16 bits; and for each thread a row as it is made, and unpacked rows of the weight.
static int64_t blocks_scratch(int64_t m, int64_t k, int64_t threads) {
    return m * (k / 2 + k / kRun + k / 16) + threads * (k + kBlockRows * (k / 4 + 2 * (k / 16)));
}

QUIRE_INLINE int64_t blocks_of(const BlockPart& part) { return (part.num_rows + kBlockRows - 1) / kBlockRows; }

static void linear_blocks(const BlockLinear& a) {
    const int64_t k = a.k;
    const RunsOfWords x{reinterpret_cast<int16_t*>(a.scratch), a.scratch + a.m * (k / 2),
                        a.scratch + a.m * (k / 2 + k / kRun), k};
    float* const of_threads = x.halves + a.m * (k / 16);
    const int64_t words_of_thread = k + kBlockRows * (k / 4 + 2 * (k / 16));
    const bool parallel = a.m * a.n * k >= kParallelProducts;
    share_tasks(parallel, a.m, [&](int64_t row, int64_t thread) {
        quantize_runs(input_row(a.x, row, k, of_threads + thread * words_of_thread), x.from(row));
    });
    int64_t num_blocks = 0;
    for (int64_t p = 0; p < a.num_parts; ++p) num_blocks += blocks_of(a.parts[p]);
    share_tasks(parallel, num_blocks, [&](int64_t block, int64_t thread) {
        const BlockPart* part = a.parts;
        int64_t column = 0;
        for (; block >= blocks_of(*part); ++part) {
            block -= blocks_of(*part);
            column += part->num_rows;
        }
        float* const unpacked = of_threads + thread * words_of_thread + k;
        const UnpackedRows w{reinterpret_cast<int8_t*>(unpacked), unpacked + kBlockRows * (k / 4),
                             unpacked + kBlockRows * (k / 4 + k / 16)};
        const int64_t row = block * kBlockRows, end = min_of(row + kBlockRows, part->num_rows);
        with_block(part->type, [&]<class Block>() {
            if (end - row == kBlockRows) return multiply_rows<Block, kBlockRows>(a, *part, row, column, x, w);
            for (int64_t one = row; one < end; ++one) multiply_rows<Block, 1>(a, *part, one, column, x, w);
        });
    });
}

}  // namespace quire::QUIRE_ISA
