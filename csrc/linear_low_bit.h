// y = x . weight^T + bias with the weight in 8 or 4 bits, and each row of x brought to 8 bits on the way.
//
// A row of x becomes whole numbers from -127 to 127 and one scale. A weight is whole numbers and one float32 scale for
// each output and each group of inputs. Products are summed as integers inside a group, which is exact, and the
// groups' sums are added as float32 in the order of k: a row's result does not depend on the batch, the threads or, but
// for the last bit of those additions, the instruction set.
//
// A packed weight is a row of panels of kPanel outputs, as in linear.h. Inputs go in pairs of steps, a step being four
// inputs, since the processor adds four products of bytes to a lane at once. Bytes hold the weight plus a zero point:
//   8 bits  [k / 8][2][kPanel][4]   weight + 128
//   4 bits  [k / 8][kPanel][4]      weight + 8, the first step in the low half of each byte, the second in the high
//   MXFP4   the same, of codes that a table turns into twice the weight plus 12 (mxfp4.h); groups of 32
#pragma once

#include "kernels.h"
#include "linear.h"
#include "mxfp4.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Bytes of one step of a panel.
constexpr int64_t kStepBytes = kPanel * 4;
// Rows below this magnitude are zero: their scale could not be inverted.
constexpr float kSmallestMagnitude = 0x1p-100f;

// One row takes so many vectors: four of AVX2 are a panel, and a second one beside it is slower.
constexpr int kVectorsOfBytes = kLanes == 8 ? 4 : 8;

// A vector of weights ready to be multiplied. Where the processor can only add products of bytes in 16 bits, with
// saturation, weights of 8 bits are split into magnitude and sign: 2 * 127 * 127 still fits.
struct Unsigned {
    IntVec bytes;
};
// Sums of two products each. With 4-bit weights there is room for more, and they are widened to 32 bits together.
typedef int16_t WordVec __attribute__((vector_size(kLanes * 4)));
#if defined(__AVX512VNNI__)
constexpr int kRowsOfBytes = 8;
constexpr bool kSignedWeights = false, kSumsInWords = false;
QUIRE_INLINE IntVec add_products(IntVec sum, Unsigned weight, IntVec x) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight.bytes, (__m512i)x);
}
#elif defined(__AVX512BW__)
constexpr int kRowsOfBytes = 12;
constexpr bool kSignedWeights = true, kSumsInWords = true;
struct Signed {
    IntVec magnitude;
    __mmask64 negative;
    explicit Signed(IntVec v) : magnitude((IntVec)_mm512_abs_epi8((__m512i)v)), negative(_mm512_movepi8_mask((__m512i)v)) {}
};
QUIRE_INLINE WordVec products(Unsigned weight, IntVec x) {
    return (WordVec)_mm512_maddubs_epi16((__m512i)weight.bytes, (__m512i)x);
}
QUIRE_INLINE IntVec add_pairs(IntVec sum, WordVec words) {
    return sum + (IntVec)_mm512_madd_epi16((__m512i)words, _mm512_set1_epi16(1));
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    const __m512i signed_x = _mm512_mask_sub_epi8((__m512i)x, weight.negative, _mm512_setzero_si512(), (__m512i)x);
    return add_pairs(sum, products(Unsigned{weight.magnitude}, (IntVec)signed_x));
}
#elif defined(__AVX2__)
constexpr int kRowsOfBytes = 6;
constexpr bool kSignedWeights = true, kSumsInWords = true;
struct Signed {
    IntVec magnitude, value;
    explicit Signed(IntVec v) : magnitude((IntVec)_mm256_abs_epi8((__m256i)v)), value(v) {}
};
QUIRE_INLINE WordVec products(Unsigned weight, IntVec x) {
    return (WordVec)_mm256_maddubs_epi16((__m256i)weight.bytes, (__m256i)x);
}
QUIRE_INLINE IntVec add_pairs(IntVec sum, WordVec words) {
    return sum + (IntVec)_mm256_madd_epi16((__m256i)words, _mm256_set1_epi16(1));
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    return add_pairs(sum, products(Unsigned{weight.magnitude}, (IntVec)_mm256_sign_epi8((__m256i)x, (__m256i)weight.value)));
}
#elif defined(__SSSE3__)
constexpr int kRowsOfBytes = 4;
constexpr bool kSignedWeights = true, kSumsInWords = true;
struct Signed {
    IntVec magnitude, value;
    explicit Signed(IntVec v) : magnitude((IntVec)_mm_abs_epi8((__m128i)v)), value(v) {}
};
QUIRE_INLINE WordVec products(Unsigned weight, IntVec x) {
    return (WordVec)_mm_maddubs_epi16((__m128i)weight.bytes, (__m128i)x);
}
QUIRE_INLINE IntVec add_pairs(IntVec sum, WordVec words) {
    return sum + (IntVec)_mm_madd_epi16((__m128i)words, _mm_set1_epi16(1));
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    return add_pairs(sum, products(Unsigned{weight.magnitude}, (IntVec)_mm_sign_epi8((__m128i)x, (__m128i)weight.value)));
}
#else
constexpr int kRowsOfBytes = 4;
constexpr bool kSignedWeights = true, kSumsInWords = false;
struct Signed {
    IntVec bytes;
    explicit Signed(IntVec v) : bytes(v) {}
};
// Byte i of every lane, with its sign. The shift left is one of unsigned lanes, which may drop bits.
QUIRE_INLINE IntVec byte_of(IntVec v, int i) {
    typedef uint32_t Lanes __attribute__((vector_size(kLanes * 4)));
    return (IntVec)((Lanes)v << (24 - 8 * i)) >> 24;
}
QUIRE_INLINE IntVec add_products(IntVec sum, Signed weight, IntVec x) {
    for (int i = 0; i < 4; ++i) sum += byte_of(weight.bytes, i) * byte_of(x, i);
    return sum;
}
// Below 128, hence the same bytes with a sign.
QUIRE_INLINE IntVec add_products(IntVec sum, Unsigned weight, IntVec x) { return add_products(sum, Signed(weight.bytes), x); }
#endif

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

QUIRE_INLINE IntVec load_bytes(const uint8_t* p) {
    IntVec v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The ways weights are stored. `factor<half>` is one vector of step `half` of a pair.
struct Bits8 {
    using Scale = float;
    static constexpr int64_t kPairBytes = 2 * kStepBytes;
    static constexpr int32_t kZeroPoint = kSignedWeights ? 0 : 128;
    static constexpr int64_t kPairsInWords = 0;
    template <int half>
    static QUIRE_INLINE auto factor(const uint8_t* pair) {
        const IntVec bytes = load_bytes(pair + half * kStepBytes);
#if defined(__AVX512VNNI__)
        return Unsigned{bytes};
#else
        return Signed(bytes ^ int32_t(0x80808080));
#endif
    }
};
struct Bits4 {
    using Scale = float;
    static constexpr int64_t kPairBytes = kStepBytes;
    static constexpr int32_t kZeroPoint = 8;
    // So many pairs of steps add up within 16 bits: 16 products of at most 15 * 127.
    static constexpr int64_t kPairsInWords = kSumsInWords ? 4 : 0;
    template <int half>
    static QUIRE_INLINE Unsigned factor(const uint8_t* pair) {
        return {(load_bytes(pair) >> (4 * half)) & 0x0f0f0f0f};
    }
};
struct BitsMxfp4 {
    using Scale = uint8_t;
    static constexpr int64_t kPairBytes = kStepBytes;
    static constexpr int32_t kZeroPoint = 12;
    // 8 products of at most 24 * 127.
    static constexpr int64_t kPairsInWords = kSumsInWords ? 2 : 0;
    template <int half>
    static QUIRE_INLINE Unsigned factor(const uint8_t* pair) {
        return {doubled_e2m1((load_bytes(pair) >> (4 * half)) & 0x0f0f0f0f)};
    }
};
QUIRE_INLINE Vec load_scales(const float* from) { return load(from); }
QUIRE_INLINE Vec load_scales(const uint8_t* exponents) { return powers_of_two(exponents) * 0.5f; }

// Rows of x in 8 bits: tiles of rows, in each [k / 4][rows of the tile] words of four inputs, zeros past the last.
struct RowsOfBytes {
    int32_t* words;
    float* scales;      // one a row
    int32_t* starts;    // [row][group]: what the zero point of the weights adds to a group's sum, negated
    int64_t num_words;  // a row

    RowsOfBytes from(int64_t row, int64_t num_groups) const {
        return {words + row * num_words, scales + row, starts + row * num_groups, num_words};
    }
};

// One row of k numbers to `depth` bytes. With an infinity or a NaN it gets a NaN for its scale, and so for its results.
static void quantize_row(const float* x, int64_t k, int64_t depth, int64_t group, int32_t zero_point, int8_t* bytes,
                         float* scale, int32_t* starts) {
    // Compared as integers, magnitudes keep their order, and NaN is larger than all.
    IntVec magnitudes{};
    for (int64_t i = 0; i < k; i += kLanes) {
        const IntVec bits = (IntVec)(k - i >= kLanes ? load(x + i) : load_first(x + i, k - i)) & 0x7fffffff;
        magnitudes = bits > magnitudes ? bits : magnitudes;
    }
    int32_t largest_bits = 0;
    for (int i = 0; i < kLanes; ++i) largest_bits = magnitudes[i] > largest_bits ? magnitudes[i] : largest_bits;
    const bool finite = largest_bits < 0x7f800000;
    const float magnitude = as_float(uint32_t(largest_bits));
    const float inverse = finite && magnitude >= kSmallestMagnitude ? 127.0f / magnitude : 0.0f;
    *scale = finite ? magnitude / 127.0f : as_float(0x7fc00000);

    for (int64_t begin = 0; begin < k; begin += group) {
        const int64_t end = min_of(k, begin + group);
        IntVec sums{};
        for (int64_t i = begin; i < end; i += kLanes) {
            const Vec values = k - i >= kLanes ? load(x + i) : load_first(x + i, k - i);
            const IntVec rounded = finite ? nearest(values * inverse) : IntVec{};
            sums += rounded;
            typedef int8_t Bytes __attribute__((vector_size(kLanes)));
            const Bytes narrow = __builtin_convertvector(rounded, Bytes);
            if (depth - i >= kLanes) memcpy(bytes + i, &narrow, kLanes);
            else memcpy(bytes + i, &narrow, depth - i);
        }
        if (starts) {
            int32_t sum = 0;
            for (int i = 0; i < kLanes; ++i) sum += sums[i];
            *starts++ = -zero_point * sum;
        }
    }
    const int64_t written = round_up(k, kLanes);
    if (written < depth) memset(bytes + written, 0, depth - written);
}

static void quantize_rows(Rows x, int64_t rows, int64_t k, void* bytes, float* scales) {
    const int64_t depth = round_up(k, kPairOfSteps);
    share_tasks(rows * k >= kParallelProducts, rows, [&](int64_t row, int64_t) {
        quantize_row(x.data + row * x.stride, k, depth, k, 0, static_cast<int8_t*>(bytes) + row * depth, scales + row,
                     nullptr);
    });
}

// kRows x kWidth vectors of outputs, over all of k.
template <class Stored, int kRows, int kWidth>
static void multiply_low_bit(const LowBitLinear& a, const RowsOfBytes& x, float* out, int64_t vector, int64_t tile,
                             int64_t num_tiles) {
    const int64_t depth = x.num_words * 4, num_groups = (a.k + a.group - 1) / a.group;
    const int64_t panel_bytes = depth / 8 * Stored::kPairBytes;
    const uint8_t* weights[kWidth];
    const typename Stored::Scale* scales[kWidth];
    for (int j = 0; j < kWidth; ++j) {
        const int64_t panel = (vector + j) / kVectorsPerPanel, lane = (vector + j) % kVectorsPerPanel * kLanes;
        weights[j] = a.weight + panel * panel_bytes + lane * 4;
        scales[j] = static_cast<const typename Stored::Scale*>(a.scales) + panel * num_groups * kPanel + lane;
    }
    // While a panel is multiplied by many rows, the next one is fetched; each tile of rows fetches its share.
    const int64_t share = Stored::kPairBytes / num_tiles;
    const uint8_t* ahead = a.weight + (vector / kVectorsPerPanel + 1) * panel_bytes + tile * (depth / 8) * share;

    // Other threads may have the lines that the results go to.
    if constexpr (kRows > 4)
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < kWidth; ++j) __builtin_prefetch(out + r * a.n + (vector + j) * kLanes, 1, 2);

    Vec sums[kRows][kWidth] = {};
    const int32_t* words = x.words;
    for (int64_t group = 0; group < num_groups; ++group) {
        IntVec acc[kRows][kWidth];
#pragma GCC unroll 14
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) acc[r][j] = IntVec{} + (Stored::kZeroPoint ? x.starts[r * num_groups + group] : 0);

        const int64_t pairs = (min_of(depth, (group + 1) * a.group) - group * a.group) / 8;
        const int64_t run = Stored::kPairsInWords ? Stored::kPairsInWords : pairs;
        for (int64_t begin = 0; begin < pairs; begin += run) {
            WordVec partial[kRows][kWidth] = {};
            for (int64_t pair = begin; pair < min_of(pairs, begin + run); ++pair) {
                if constexpr (kRows > 4) {
                    for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
                    ahead += share;
                }
                const auto step = [&]<int half>() {
                    using Factor = decltype(Stored::template factor<half>(weights[0]));
                    const auto factor = [&](int j) { return Stored::template factor<half>(weights[j]); };
                    const auto add = [&](int r, int j, Factor weight, IntVec four) {
                        if constexpr (Stored::kPairsInWords) partial[r][j] += products(weight, four);
                        else acc[r][j] = add_products(acc[r][j], weight, four);
                    };
                    if constexpr (kWidth == 2) {
                        const Factor first = factor(0), second = factor(1);
#pragma GCC unroll 14
                        for (int r = 0; r < kRows; ++r) {
                            const IntVec four = IntVec{} + words[half * kRows + r];
                            add(r, 0, first, four);
                            add(r, 1, second, four);
                        }
                    } else {
#pragma GCC unroll 8
                        for (int j = 0; j < kWidth; ++j) {
                            const Factor weight = factor(j);
#pragma GCC unroll 14
                            for (int r = 0; r < kRows; ++r) add(r, j, weight, IntVec{} + words[half * kRows + r]);
                        }
                    }
                };
                step.template operator()<0>();
                step.template operator()<1>();
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) weights[j] += Stored::kPairBytes;
                words += 2 * kRows;
            }
            if constexpr (Stored::kPairsInWords) {
#pragma GCC unroll 14
                for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
                    for (int j = 0; j < kWidth; ++j) acc[r][j] = add_pairs(acc[r][j], partial[r][j]);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) {
            const Vec scale = load_scales(scales[j] + group * kPanel);
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) sums[r][j] += __builtin_convertvector(acc[r][j], Vec) * scale;
        }
    }

#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) {
            const int64_t column = (vector + j) * kLanes, lanes = min_of(a.n - column, kLanes);
            if (lanes <= 0) continue;  // the last panel may have vectors without an output
            float* to = out + r * a.n + column;
            const Vec start = !a.bias ? Vec{} : lanes == kLanes ? load(a.bias + column) : load_first(a.bias + column, lanes);
            const Vec result = start + sums[r][j] * x.scales[r];
            if (lanes == kLanes) store(to, result);
            else store_first(to, result, lanes);
        }
}

template <class Stored, int kRows = kRowsOfBytes>
static void multiply_low_bit_tile(int64_t rows, const LowBitLinear& a, const RowsOfBytes& x, float* out, int64_t vector,
                                  int64_t vector_end, int64_t tile, int64_t num_tiles) {
    if constexpr (kRows > 1)
        if (rows < kRows)
            return multiply_low_bit_tile<Stored, kRows - 1>(rows, a, x, out, vector, vector_end, tile, num_tiles);
    const auto run = [&]<int kWidth>() {
        if constexpr (kRows * kWidth <= 2 * kRowsOfBytes && kWidth <= kVectorsOfBytes)
            for (; vector + kWidth <= vector_end; vector += kWidth)
                multiply_low_bit<Stored, kRows, kWidth>(a, x, out, vector, tile, num_tiles);
    };
    run.template operator()<8>();
    run.template operator()<4>();
    run.template operator()<2>();
}

// The tiles `first` to `last` of a product against a run of vectors, as `multiply_tiles` does with floats.
template <class Stored>
static void multiply_low_bit_tiles(const LowBitLinear& a, const RowsOfBytes& x, int64_t num_tiles, int64_t first,
                                   int64_t last, int64_t vector, int64_t vector_end) {
    const int64_t num_groups = (a.k + a.group - 1) / a.group;
    for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = tile * a.m / num_tiles, rows = (tile + 1) * a.m / num_tiles - begin;
        multiply_low_bit_tile<Stored>(rows, a, x.from(begin, num_groups), a.out + begin * a.n, vector, vector_end,
                                      tile - first, last - first);
    }
}

// Row r of a tile of `rows`, which begins at `tile`. `words` has room for the row.
template <class Stored>
static void quantize_row_of_tile(const float* from, int64_t k, int64_t group, const RowsOfBytes& tile, int64_t r,
                                 int64_t rows, int32_t* words) {
    const RowsOfBytes row = tile.from(r, (k + group - 1) / group);
    quantize_row(from, k, tile.num_words * 4, group, Stored::kZeroPoint, reinterpret_cast<int8_t*>(words), row.scales,
                 row.starts);
    for (int64_t w = 0; w < tile.num_words; ++w) tile.words[w * rows + r] = words[w];
}

template <class Stored>
static void multiply_quantized(const LowBitLinear& a) {
    const int64_t num_tiles = (a.m + kRowsOfBytes - 1) / kRowsOfBytes;
    const auto tile_begin = [&](int64_t tile) { return tile * a.m / num_tiles; };
    const int64_t num_words = round_up(a.k, kPairOfSteps) / 4, num_groups = (a.k + a.group - 1) / a.group;
    // Whole panels, so an even number.
    const int64_t num_vectors = (a.n + kPanel - 1) / kPanel * kVectorsPerPanel;
    const bool parallel = a.m * a.n * a.k >= kParallelProducts;
    const int64_t threads = parallel ? num_threads() : 1;
    // In the scratch: tiles, scales and starts; and for each thread a row as it is made, and as it is quantised.
    int32_t* const tiles = static_cast<int32_t*>(a.scratch);
    float* const scales = reinterpret_cast<float*>(tiles + a.m * num_words);
    int32_t* const starts = reinterpret_cast<int32_t*>(scales + a.m);
    int32_t* const rows_of_threads = starts + a.m * num_groups;
    const RowsOfBytes x{tiles, scales, starts, num_words};

    // Items as in linear.h.
    int64_t group = kVectorsPerPanel;
    while (num_tiles == 1 && group < 8 && num_vectors >= 4 * threads * group) group *= 2;
    const int64_t num_items = (num_vectors + group - 1) / group;
    const int64_t num_blocks = max_of(1, min_of(num_tiles, 2 * threads / num_items));

    // A tile is one thread's from norm to words: what threads exchange costs more than what few rows leave idle.
    share_tasks(parallel, num_tiles, [&](int64_t tile, int64_t thread) {
        const int64_t begin = tile_begin(tile), rows = tile_begin(tile + 1) - begin;
        int32_t* const words = rows_of_threads + thread * (num_words + a.k);
        float* const made = reinterpret_cast<float*>(words + num_words);
        for (int64_t r = 0; r < rows; ++r)
            quantize_row_of_tile<Stored>(input_row(a.x, begin + r, a.k, made), a.k, a.group, x.from(begin, num_groups), r,
                                         rows, words);
    });
    share_tasks(parallel, num_items * num_blocks, [&](int64_t i, int64_t) {
        const int64_t item = i / num_blocks, block = i % num_blocks;
        const int64_t first = block * num_tiles / num_blocks, last = (block + 1) * num_tiles / num_blocks;
        multiply_low_bit_tiles<Stored>(a, x, num_tiles, first, last, item * group,
                                       min_of((item + 1) * group, num_vectors));
    });
}

static void linear_quantized(const LowBitLinear& a) {
    if (a.bits == 8) multiply_quantized<Bits8>(a);
    else multiply_quantized<Bits4>(a);
}

// One group of one output: returns its scale and writes its values plus the zero point as bytes. May write up to one
// vector of bytes too many.
template <class From>
QUIRE_INLINE float quantize_group(const From* weight, int64_t k, int bits, uint8_t* values) {
    constexpr int64_t kBlock = kLanes;
    const auto lanes_at = [&](int64_t i) {
        if (k - i >= kBlock) return load(weight + i);
        float rest[kLanes] = {};
        for (int64_t j = i; j < k; ++j) rest[j - i] = widen(weight[j]);
        return load(rest);
    };
    Vec high{}, low{};
    for (int64_t i = 0; i < k; i += kBlock) {
        const Vec v = lanes_at(i);
        high = maximum(high, v);
        low = minimum(low, v);
    }
    const float most = largest(high), least = -largest(-low);
    // Eight bits are symmetric, so that magnitudes fit seven. With four, the end that is further from zero becomes -8:
    // there are only 16 values, and all are used.
    const float extreme = most > -least ? most : least, magnitude = extreme < 0 ? -extreme : extreme;
    const float end = bits == 8 ? 127.0f : extreme < 0 ? 8.0f : -8.0f;
    const float inverse = magnitude >= kSmallestMagnitude ? end / magnitude : 0.0f;
    const int32_t zero_point = bits == 8 ? 128 : 8, highest = bits == 8 ? 255 : 15;
    for (int64_t i = 0; i < k; i += kBlock) {
        IntVec rounded = nearest(lanes_at(i) * inverse) + zero_point;
        rounded = rounded > highest ? IntVec{} + highest : rounded;
        typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
        const Bytes bytes = __builtin_convertvector(rounded, Bytes);
        memcpy(values + i, &bytes, sizeof bytes);
    }
    return magnitude >= kSmallestMagnitude ? magnitude / end : 0.0f;
}

template <class From>
static void quantize_from(const From* weight, int64_t rows, int64_t k, const LowBitWeight& to, int64_t first_row) {
    const int64_t depth = round_up(k, kPairOfSteps), num_groups = (k + to.group - 1) / to.group, end_row = first_row + rows;
    const int64_t pair_bytes = to.bits == 8 ? 2 * kStepBytes : kStepBytes;
    // Panels are written by one thread each.
    const int64_t first_panel = first_row / kPanel, num_panels = (end_row + kPanel - 1) / kPanel - first_panel;
    share_tasks(true, num_panels, [&](int64_t index, int64_t thread) {
        const int64_t panel = first_panel + index;
        uint8_t* const packed = to.weight + panel * depth / 8 * pair_bytes;
        uint8_t* const values = to.scratch + thread * to.scratch_bytes;
        for (int64_t row = max_of(first_row, panel * kPanel); row < min_of(end_row, (panel + 1) * kPanel); ++row) {
            const int64_t lane = row - panel * kPanel;
            const From* from = weight + (row - first_row) * k;
            for (int64_t group = 0; group < num_groups; ++group) {
                const int64_t begin = group * to.group;
                to.scales[(panel * num_groups + group) * kPanel + lane] =
                    quantize_group(from + begin, min_of(to.group, k - begin), to.bits, values + begin);
            }
            for (int64_t i = k; i < depth; ++i) values[i] = to.bits == 8 ? 128 : 8;
            for (int64_t pair = 0; pair < depth / 8; ++pair) {
                uint32_t first, second;
                memcpy(&first, values + pair * 8, 4);
                memcpy(&second, values + pair * 8 + 4, 4);
                uint8_t* at = packed + pair * pair_bytes + lane * 4;
                if (to.bits == 8) {
                    memcpy(at, &first, 4);
                    memcpy(at + kStepBytes, &second, 4);
                } else {
                    first |= second << 4;
                    memcpy(at, &first, 4);
                }
            }
        }
    });
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
