// y = x . weight^T + bias with the weight in 8 or 4 bits, and each row of x brought to 8 bits on the way.
//
// Each group of inputs of a row of x becomes whole numbers from -127 to 127 and one scale (row_groups.h). The same group
// of inputs of an output's weights becomes whole numbers, one scale and, with 4 bits, an offset. Products are summed as
// integers inside a group, which is exact, and the groups' sums are added as float32 in the order of k: a row's result
// does not depend on the batch, the threads or, but for the last bits of those additions, the instruction set.
//
// A packed weight is a row of panels of kPanel outputs, as in linear.h. Inputs go in pairs of steps, a step being four
// inputs, since the processor adds four products of bytes to a lane at once. For number q and scale s:
//   8 bits  [k / 8][2][kPanel][4]   bytes q + 128, for s q
//   4 bits  [k / 8][kPanel][4]      q from 0 to 15, for s q + offset; the first step in the low half of each byte, the
//                                   second in the high half; s and the offset are multiples of the output's units
#pragma once

#include "byte_products.h"
#include "kernels.h"
#include "linear.h"
#include "parallel.h"
#include "row_groups.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Bytes of one step of a panel.
constexpr int64_t kStepBytes = kPanel * 4;

// One row takes so many vectors: four of AVX2 are a panel, and a second one beside it is slower.
constexpr int kVectorsOfBytes = kLanes == 8 ? 4 : 8;

QUIRE_INLINE IntVec load_bytes(const uint8_t* p) {
    IntVec v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The scales of a panel of 4-bit weights.
struct FourBitScales {
    char* panel;
    FourBitScales(void* scales, int64_t index, int64_t num_groups)
        : panel(static_cast<char*>(scales) + index * panel_bytes(num_groups)) {}
    static constexpr int64_t panel_bytes(int64_t num_groups) {
        return kPanel * int64_t(sizeof(Units) + num_groups * sizeof(UnitsOfGroup));
    }
    Units& units(int64_t lane) const { return reinterpret_cast<Units*>(panel)[lane]; }
    UnitsOfGroup& of_group(int64_t group, int64_t lane) const {
        return reinterpret_cast<UnitsOfGroup*>(panel + kPanel * sizeof(Units))[group * kPanel + lane];
    }
    float scale(int64_t group, int64_t lane) const {
        return float(of_group(group, lane).scale) * widen(BFloat{units(lane).scale});
    }
    float offset(int64_t group, int64_t lane) const {
        return float(of_group(group, lane).offset) * widen(BFloat{units(lane).offset});
    }
};

// What a vector of outputs multiplies the sums of a group with.
struct GroupScales {
    Vec scale, offset;
};

// The ways weights are stored. `factor<half>` is one vector of step `half` of a pair.
struct Bits8 {
    struct Scales {
        const BFloat* of_groups;
        Scales(const void* scales, int64_t panel, int64_t lane, int64_t num_groups)
            : of_groups(static_cast<const BFloat*>(scales) + panel * num_groups * kPanel + lane) {}
        QUIRE_INLINE GroupScales at(int64_t group) const { return {load(of_groups + group * kPanel), Vec{}}; }
    };
    static constexpr bool kHasOffset = false;
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
    struct Scales {
        const char* panel;
        int64_t lane;
        Scales(const void* scales, int64_t index, int64_t lane, int64_t num_groups)
            : panel(static_cast<const char*>(scales) + index * FourBitScales::panel_bytes(num_groups)), lane(lane) {}
        QUIRE_INLINE GroupScales at(int64_t group) const {
            typedef uint16_t Pairs __attribute__((vector_size(kLanes * 2)));
            Pairs pairs;
            memcpy(&pairs, panel + kPanel * sizeof(Units) + (group * kPanel + lane) * sizeof(UnitsOfGroup), sizeof pairs);
            const IntVec counts = __builtin_convertvector(pairs, IntVec), units = load_words(panel + lane * sizeof(Units));
            return {__builtin_convertvector(counts >> 8, Vec) * (Vec)(units & int32_t(0xffff0000)),
                    __builtin_convertvector(counts & 0xff, Vec) * (Vec)(units << 16)};
        }
    };
    static constexpr bool kHasOffset = true;
    static constexpr int64_t kPairBytes = kStepBytes;
    static constexpr int32_t kZeroPoint = 0;
    // So many pairs of steps add up within 16 bits: 16 products of at most 15 * 127.
    static constexpr int64_t kPairsInWords = kSumsInWords ? 4 : 0;
    template <int half>
    static QUIRE_INLINE Unsigned factor(const uint8_t* pair) {
        return {(load_bytes(pair) >> (4 * half)) & 0x0f0f0f0f};
    }
};
// Rows of x in 8 bits: tiles of rows, in each [k / 4][rows of the tile] words of four inputs, zeros past the last.
struct RowsOfBytes {
    int32_t* words;
    RowGroup* groups;   // [row][group]
    int64_t num_words;  // a row

    RowsOfBytes from(int64_t row, int64_t num_groups) const {
        return {words + row * num_words, groups + row * num_groups, num_words};
    }
};

// kRows x kWidth vectors of outputs, over all of k.
template <class Stored, int kRows, int kWidth>
static void multiply_low_bit(const LowBitLinear& a, const RowsOfBytes& x, float* out, int64_t vector, int64_t tile,
                             int64_t num_tiles) {
    const int64_t depth = x.num_words * 4, num_groups = (a.k + a.group - 1) / a.group;
    const int64_t panel_bytes = depth / 8 * Stored::kPairBytes;
    const auto panel_of = [&](int j) { return (vector + j) / kVectorsPerPanel; };
    const auto lane_of = [&](int j) { return (vector + j) % kVectorsPerPanel * kLanes; };
    const uint8_t* weights[kWidth];
    for (int j = 0; j < kWidth; ++j) weights[j] = a.weight + panel_of(j) * panel_bytes + lane_of(j) * 4;
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
            for (int j = 0; j < kWidth; ++j) acc[r][j] = IntVec{} + (Stored::kZeroPoint ? x.groups[r * num_groups + group].start : 0);

        const int64_t pairs = (min_of(depth, (group + 1) * a.group) - group * a.group) / 8;
        const int64_t run = Stored::kPairsInWords ? Stored::kPairsInWords : pairs;
        for (int64_t begin = 0; begin < pairs; begin += run) {
            WordVec partial[kRows][kWidth] = {};
            for (int64_t pair = begin; pair < min_of(pairs, begin + run); ++pair) {
                if constexpr (kRows > 4) {
                    for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
                    ahead += share;
                }
                if constexpr (kRows == 1)
                    for (int j = 0; j < kWidth; j += kVectorsPerPanel) fetch_page_ahead(weights[j], Stored::kPairBytes);
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
            const GroupScales of_weight = typename Stored::Scales(a.scales, panel_of(j), lane_of(j), num_groups).at(group);
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const RowGroup& of_row = x.groups[r * num_groups + group];
                sums[r][j] += __builtin_convertvector(acc[r][j], Vec) * (of_weight.scale * of_row.scale);
                if constexpr (Stored::kHasOffset) sums[r][j] += of_weight.offset * of_row.sum;
            }
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
            const Vec result = start + sums[r][j];
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
static void quantize_row_of_tile(const float* from, int64_t k, int64_t group, bool rotates, const RowsOfBytes& tile,
                                 int64_t r, int64_t rows, int32_t* words) {
    const RowsOfBytes row = tile.from(r, (k + group - 1) / group);
    quantize_row(from, k, tile.num_words * 4, group, rotates, reinterpret_cast<int8_t*>(words),
                 [&](int64_t index, float scale, int32_t sum) {
                     row.groups[index].scale = scale;
                     if constexpr (Stored::kHasOffset) row.groups[index].sum = scale * float(sum);
                     else row.groups[index].start = -Stored::kZeroPoint * sum;
                 });
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
    // In the scratch: tiles and groups; and for each thread a row as it is made, and as it is quantised.
    RowGroup* const groups = static_cast<RowGroup*>(a.scratch);
    int32_t* const tiles = reinterpret_cast<int32_t*>(groups + a.m * num_groups);
    int32_t* const rows_of_threads = tiles + a.m * num_words;
    const RowsOfBytes x{tiles, groups, num_words};

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
            quantize_row_of_tile<Stored>(input_row(a.x, begin + r, a.k, made), a.k, a.group, a.rotates,
                                         x.from(begin, num_groups), r, rows, words);
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

}  // namespace quire::QUIRE_ISA
