// y = x . weight^T + bias with the weight in blocks of GGUF as the file has them.
//
// A thread unpacks a panel of outputs (gguf_blocks.h) into its caches and multiplies it with all rows of x, which are
// integers of 8 bits with a scale for every 32 inputs. Where a group of a row stands out from the row, its rounding would
// be felt in all outputs: it gets a second digit, which says what the first left, and is multiplied twice. A weight may
// ask for both digits of every group: inputs of 15 bits, which are multiplied at once as integers of 16 bits.
//
// A pass is one digit of one group of inputs, of all rows of a tile, or both. Products are summed as integers inside a pass, which
// is exact; the passes' sums are added as float32 in the order of k. A pass that other rows of the tile need adds 0 to a
// row, so a row's result has the same bits in every batch and with any number of threads.
#pragma once

#include "area.h"
#include "byte_products.h"
#include "gguf_blocks.h"
#include "linear_input.h"
#include "linear.h"
#include "parallel.h"
#include "row_groups.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kPassInputs = 32, kPassSteps = kPassInputs / 4;
// A group stands out if its largest magnitude is more than so many times the root mean square of its row.
constexpr float kStandsOut = 4.0f;
// What a digit leaves is at most half of its unit: 127 of the next one's.
constexpr int32_t kSecondUnits = 254;
constexpr float kSecondDigit = 1.0f / kSecondUnits;

// One row's part of a pass.
struct RowPass {
    float scale;
    int32_t sums[2];  // of each 16 of its integers
    int32_t sum;
};

// Rows of x in passes. A tile of rows has the room of its rows, in which [pass][row of the tile] follow each other.
struct BlockRows {
    int32_t* words;     // [pass][kPassSteps][row]: four inputs; both digits: [pass][2][kPassSteps][row], inputs 0 and 2
                        // of a step, then 1 and 3
    RowPass* of_rows;   // [pass][row]
    int32_t* groups;    // [pass]: its group of inputs
    int32_t* num_passes;
    int64_t num_groups;

    // Every group may need both digits.
    BlockRows(int64_t rows, int64_t k, Area& area) : num_groups(k / kPassInputs) {
        words = area.take<int32_t>(rows * 2 * num_groups * kPassSteps);
        of_rows = area.take<RowPass>(rows * 2 * num_groups);
        groups = area.take<int32_t>(rows * 2 * num_groups);
        num_passes = area.take<int32_t>(rows);
    }
    BlockRows(const BlockRows& from, int64_t row) : BlockRows(from) {
        words += row * 2 * num_groups * kPassSteps;
        of_rows += row * 2 * num_groups;
        groups += row * 2 * num_groups;
        num_passes += row;
    }
};

// The digits of the rows of one tile, as they are made.
struct Digits {
    struct Group {
        RowPass first, second;
        bool stands_out;
    };
    int8_t *first, *second;  // [row][k]
    Group* groups;           // [row][group]

    Digits(int64_t k, Area& area)
        : first(area.take<int8_t>(kRowsOfBytes * k)),
          second(area.take<int8_t>(kRowsOfBytes * k)),
          groups(area.take<Group>(kRowsOfBytes * (k / kPassInputs))) {}
};

QUIRE_INLINE void put_bytes(int8_t* to, IntVec integers) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes bytes = __builtin_convertvector(integers, Bytes);
    memcpy(to, &bytes, sizeof bytes);
}

// One digit of `numbers`, which are made smaller by what it says.
QUIRE_INLINE RowPass take_digit(Vec* numbers, float scale, int8_t* to) {
    constexpr int kVectors = kPassInputs / kLanes;
    RowPass pass{scale, {0, 0}, 0};
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
        const IntVec integers = nearest(numbers[i]);
        numbers[i] -= __builtin_convertvector(integers, Vec);
        put_bytes(to + i * kLanes, integers);
        int32_t sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += integers[lane];
        pass.sums[i * kLanes / 16] += sum;
    }
    pass.sum = pass.sums[0] + pass.sums[1];
    return pass;
}

// A group with an infinity or a NaN gets a NaN for its scale, and so the row for its results.
static void make_digits(const float* x, int64_t k, bool both, int8_t* first, int8_t* second, Digits::Group* groups) {
    constexpr int kVectors = kPassInputs / kLanes;
    Vec squares{};
    for (int64_t i = 0; i < k; i += kLanes) squares += load(x + i) * load(x + i);
    const float usual = kStandsOut * sqrtf(sum(squares) / float(k));
    for (int64_t g = 0; g < k / kPassInputs; ++g, x += kPassInputs, first += kPassInputs, second += kPassInputs) {
        // Compared as integers, magnitudes keep their order, and NaN is larger than all.
        IntVec magnitudes{};
        for (int i = 0; i < kVectors; ++i) {
            const IntVec bits = (IntVec)load(x + i * kLanes) & 0x7fffffff;
            magnitudes = bits > magnitudes ? bits : magnitudes;
        }
        int32_t largest = 0;
        for (int i = 0; i < kLanes; ++i) largest = magnitudes[i] > largest ? magnitudes[i] : largest;
        const bool finite = largest < 0x7f800000;
        const float magnitude = as_float(uint32_t(largest));
        const float inverse = finite && magnitude >= kSmallestMagnitude ? 127.0f / magnitude : 0.0f;
        const float scale = finite ? magnitude / 127.0f : as_float(0x7fc00000);
        Vec numbers[kVectors];
        for (int i = 0; i < kVectors; ++i) numbers[i] = finite ? load(x + i * kLanes) * inverse : Vec{};
        Digits::Group& group = groups[g];
        group.first = take_digit(numbers, scale, first);
        group.stands_out = both || magnitude > usual;
        if (group.stands_out) {
            for (int i = 0; i < kVectors; ++i) numbers[i] *= 254.0f;
            group.second = take_digit(numbers, scale * kSecondDigit, second);
        } else {
            group.second = {};
            memset(second, 0, kPassInputs);
        }
    }
}

// A pass with both digits of every row.
static void join_digits(int64_t rows, int64_t k, const Digits& digits, int64_t g, const BlockRows& to) {
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t *const first = digits.first + r * k + g * kPassInputs, *const second = digits.second + r * k + g * kPassInputs;
        int32_t* const words = to.words + g * 2 * kPassSteps * rows + r;
        const auto both = [&](int64_t i) { return kSecondUnits * first[i] + second[i]; };
        for (int64_t step = 0; step < kPassSteps; ++step)
            for (int64_t part = 0; part < 2; ++part)
                words[(part * kPassSteps + step) * rows] =
                    int32_t(uint32_t(both(4 * step + part + 2)) << 16 | (uint32_t(both(4 * step + part)) & 0xffff));
        const Digits::Group& of = digits.groups[r * to.num_groups + g];
        const auto sum = [&](int half) { return kSecondUnits * of.first.sums[half] + of.second.sums[half]; };
        to.of_rows[g * rows + r] = {of.second.scale, {sum(0), sum(1)}, sum(0) + sum(1)};
    }
    to.groups[g] = int32_t(g);
}

// The passes of a tile, made of the digits of its rows. `row(r)` is where row r lies.
template <class Row>
static void make_passes(int64_t rows, int64_t k, bool both, const Digits& digits, const BlockRows& to, const Row& row) {
    for (int64_t r = 0; r < rows; ++r)
        make_digits(row(r), k, both, digits.first + r * k, digits.second + r * k, digits.groups + r * to.num_groups);
    int32_t num = 0;
    for (int64_t g = 0; g < to.num_groups; ++g) {
        if (both) {
            join_digits(rows, k, digits, num++, to);
            continue;
        }
        const auto add = [&](const int8_t* bytes, auto pass_of) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t step = 0; step < kPassSteps; ++step)
                    memcpy(to.words + (num * kPassSteps + step) * rows + r, bytes + r * k + g * kPassInputs + 4 * step, 4);
                to.of_rows[num * rows + r] = pass_of(digits.groups[r * to.num_groups + g]);
            }
            to.groups[num++] = int32_t(g);
        };
        add(digits.first, [](const Digits::Group& group) { return group.first; });
        bool stands_out = false;
        for (int64_t r = 0; r < rows; ++r) stands_out |= digits.groups[r * to.num_groups + g].stands_out;
        if (stands_out) add(digits.second, [](const Digits::Group& group) { return group.second; });
    }
    *to.num_passes = num;
}

// What a product needs to know of a type of blocks; many types share one. `steps` add up within 16 bits, two products each;
// 0: codes have a sign, and sums have 32 bits at once.
template <int group, int steps, bool has_offsets>
struct ProductForm {
    static constexpr bool kSigned = steps == 0, kOffsets = has_offsets;
    static constexpr int kGroup = group, kStepsInWords = kSumsInWords ? steps : 0;

    // Codes as the processor multiplies them.
    static QUIRE_INLINE auto codes_at(const uint8_t* p) {
        const IntVec four = load_words(p);
        if constexpr (!kSigned) return Unsigned{four};
#if defined(__AVX512VNNI__)
        else return Unsigned{four ^ int32_t(0x80808080)};
#else
        else return Signed(four);
#endif
    }
    // Codes 0 and 2 of a step, or 1 and 3, as integers of 16 bits.
    template <int part>
    static QUIRE_INLINE WordVec wide_codes_at(const uint8_t* p) {
        typedef uint16_t Unsigned16 __attribute__((vector_size(kLanes * 4)));
        const IntVec four = load_words(p);
        if constexpr (kSigned) return part ? (WordVec)four >> 8 : (WordVec)((Unsigned16)four << 8) >> 8;
        else return part ? (WordVec)((Unsigned16)four >> 8) : (WordVec)(four & 0x00ff00ff);
    }
};
template <class Block>
constexpr int kStepsOf = Block::kLargest == 0 ? 0 : Block::kGroup == 16 ? 2 : Block::kLargest <= 15 ? 8 : 4;
static_assert(8 * 2 * 15 * 127 < 32768 && 4 * 2 * 31 * 127 < 32768 && 2 * 2 * 63 * 127 < 32768);
template <class Block>
using FormOf = ProductForm<Block::kGroup, kStepsOf<Block>, Block::kOffsets>;
// What is taken from every code, in products of bytes and of 16 bits.
template <class Block>
constexpr int32_t kTakenFromCodes = Block::kLargest > 0 ? Block::kZeroPoint : kSignedWeights ? 0 : 128;
template <class Block>
constexpr int32_t kTakenFromWideCodes = Block::kLargest > 0 ? Block::kZeroPoint : 0;

// A thread's room for a panel: kUnpackedLanes outputs after another.
struct Panel {
    uint8_t* codes;
    float *scales, *offsets;
    int64_t k;
    int32_t taken = 0;  // from every code

    Panel(int64_t k, Area& area)
        : codes(area.take<uint8_t>(k * kPanel)),
          scales(area.take<float>(k / 16 * kPanel)),
          offsets(area.take<float>(k / 16 * kPanel)),
          k(k) {}
    QUIRE_INLINE UnpackedBlocks at(int64_t lane) const {
        const int64_t lanes = lane / kUnpackedLanes, rest = lane % kUnpackedLanes, groups = k / 16 * kUnpackedLanes;
        return {codes + lanes * k * kUnpackedLanes + rest * 4, scales + lanes * groups + rest, offsets + lanes * groups + rest};
    }
};

// kRows rows of a tile times kWidth vectors of a panel's outputs; `left` of those outputs are there. `kWide`: passes
// have both digits.
template <class Form, bool kWide, int kRows, int kWidth>
static void multiply_passes(const Panel& panel, int64_t lane, const BlockRows& x, float* out, int64_t stride,
                            const float* bias, int64_t left) {
    constexpr int kHalves = kPassInputs / Form::kGroup, kSteps = Form::kGroup / 4;
    constexpr bool kInWords = Form::kStepsInWords > 0 && !kWide;
    constexpr int kRun = kInWords ? Form::kStepsInWords : kSteps;
    Vec sums[kRows][kWidth] = {};
    UnpackedBlocks w[kWidth];
    for (int j = 0; j < kWidth; ++j) w[j] = panel.at(lane + j * kLanes);
    const int32_t* words = x.words;
    const RowPass* of_rows = x.of_rows;
    for (int32_t pass = 0; pass < *x.num_passes; ++pass, of_rows += kRows) {
        int64_t at = x.groups[pass] * kPassSteps * kUnpackedLanes * 4;
        for (int half = 0; half < kHalves; ++half) {
            IntVec acc[kRows][kWidth] = {};
            for (int run = 0; run < kSteps; run += kRun) {
                WordVec partial[kRows][kWidth] = {};
#pragma GCC unroll 2
                for (int step = 0; step < kRun; ++step, at += kUnpackedLanes * 4, words += kRows) {
                    const auto add_part = [&]<int part>() {
                        WordVec codes[kWidth];
                        for (int j = 0; j < kWidth; ++j) codes[j] = Form::template wide_codes_at<part>(w[j].codes + at);
#pragma GCC unroll 14
                        for (int r = 0; r < kRows; ++r) {
                            const IntVec two = IntVec{} + words[part * kPassSteps * kRows + r];
#pragma GCC unroll 4
                            for (int j = 0; j < kWidth; ++j) acc[r][j] = add_wide_products(acc[r][j], codes[j], two);
                        }
                    };
                    using Factor = decltype(Form::codes_at(w[0].codes));
                    const auto add = [&](int r, int j, auto weight, IntVec four) {
                        if constexpr (kInWords) partial[r][j] += products(weight, four);
                        else acc[r][j] = add_products(acc[r][j], weight, four);
                    };
                    if constexpr (kWide) {
                        add_part.template operator()<0>();
                        add_part.template operator()<1>();
                    } else if constexpr (kWidth == 2) {
                        const Factor first = Form::codes_at(w[0].codes + at), second = Form::codes_at(w[1].codes + at);
#pragma GCC unroll 14
                        for (int r = 0; r < kRows; ++r) {
                            const IntVec four = IntVec{} + words[r];
                            add(r, 0, first, four);
                            add(r, 1, second, four);
                        }
                    } else {
#pragma GCC unroll 4
                        for (int j = 0; j < kWidth; ++j) {
                            const Factor weight = Form::codes_at(w[j].codes + at);
#pragma GCC unroll 14
                            for (int r = 0; r < kRows; ++r) add(r, j, weight, IntVec{} + words[r]);
                        }
                    }
                }
                if constexpr (kInWords) {
#pragma GCC unroll 14
                    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                        for (int j = 0; j < kWidth; ++j) acc[r][j] = add_pairs(acc[r][j], partial[r][j]);
                }
            }
            if (kWide && half == kHalves - 1) words += kPassSteps * kRows;
            const int64_t group = (x.groups[pass] * kHalves + half) * kUnpackedLanes;
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const RowPass& of_row = of_rows[r];
                const int32_t sum = kHalves == 1 ? of_row.sum : of_row.sums[half];
                const IntVec taken = IntVec{} + sum * panel.taken;
#pragma GCC unroll 4
                for (int j = 0; j < kWidth; ++j) {
                    sums[r][j] += __builtin_convertvector(acc[r][j] - taken, Vec) * (load(w[j].scales + group) * of_row.scale);
                    if constexpr (Form::kOffsets) sums[r][j] += load(w[j].offsets + group) * (of_row.scale * float(sum));
                }
            }
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kWidth; ++j) {
            const int64_t lanes = min_of(left - j * kLanes, kLanes);
            if (lanes <= 0) continue;
            float* const to = out + r * stride + j * kLanes;
            const Vec start = !bias ? Vec{} : lanes == kLanes ? load(bias + j * kLanes) : load_first(bias + j * kLanes, lanes);
            const Vec result = start + sums[r][j];
            if (lanes == kLanes) store(to, result);
            else store_first(to, result, lanes);
        }
}

template <class Form, bool kWide, int kRows = kRowsOfBytes>
static void multiply_panel(int64_t rows, const Panel& w, const BlockRows& x, float* out, int64_t stride,
                           const float* bias, int64_t left) {
    if constexpr (kRows > 1)
        if (rows < kRows) return multiply_panel<Form, kWide, kRows - 1>(rows, w, x, out, stride, bias, left);
    constexpr int kWidth = kLanes == 16 || (kLanes == 8 && kRows == 1) ? 1 : 2;
    for (int64_t lane = 0; lane < left; lane += kWidth * kLanes)
        multiply_passes<Form, kWide, kRows, kWidth>(w, lane, x, out + lane, stride, bias ? bias + lane : nullptr, left - lane);
}

// Where a product's results go: column 0 of its first row, the distance of rows, and the bias of column 0.
struct BlockOutputs {
    float* out;
    int64_t stride;
    const float* bias;
    bool both_digits;  // of the rows
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Lane r: the sum of the lanes of v[r].
QUIRE_INLINE IntVec sums_of_lanes(const IntVec* v) {
    const auto pairs = [](IntVec a, IntVec b) { return (IntVec)_mm256_hadd_epi32((__m256i)a, (__m256i)b); };
    const IntVec low = pairs(pairs(v[0], v[1]), pairs(v[2], v[3])), high = pairs(pairs(v[4], v[5]), pairs(v[6], v[7]));
    return (IntVec)_mm256_permute2x128_si256((__m256i)low, (__m256i)high, 0x20) +
           (IntVec)_mm256_permute2x128_si256((__m256i)low, (__m256i)high, 0x31);
}

// One row of x with both digits times blocks whose codes are bytes: nothing has to be unpacked. The same sums as those of
// `multiply_passes`.
static void multiply_row_of_bytes(const BlockPart& part, int64_t begin, int64_t end, const BlockRows& x, const BlockOutputs& to) {
    for (int64_t row = begin; row < end; row += kRowsTogether) {
        BlocksOfRows b;
        for (int r = 0; r < kRowsTogether; ++r) b.rows[r] = part.rows + min_of(row + r, end - 1) * part.row_bytes;
        const uint8_t* ahead = b.rows[kRowsTogether - 1] + part.row_bytes;
        Vec sums{};
        for (int64_t g = 0, at = 0; g < x.num_groups; ++g, at += Q8_0::kBytes) {
            for (int64_t byte = 0; byte < kRowsTogether * Q8_0::kBytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 3);
            ahead += kRowsTogether * Q8_0::kBytes;
            const int32_t* const words = x.words + g * 2 * kPassSteps;
            const IntVec first = load_words(words), second = load_words(words + kPassSteps);
            IntVec acc[kRowsTogether];
#pragma GCC unroll 8
            for (int r = 0; r < kRowsTogether; ++r) {
                const uint8_t* const codes = b.rows[r] + at + 2;
                acc[r] = add_wide_products(IntVec{}, FormOf<Q8_0>::wide_codes_at<0>(codes), first);
                acc[r] = add_wide_products(acc[r], FormOf<Q8_0>::wide_codes_at<1>(codes), second);
            }
            sums += __builtin_convertvector(sums_of_lanes(acc), Vec) * (b.halves(at) * x.of_rows[g].scale);
        }
        const int64_t lanes = min_of(end - row, kLanes), column = row - begin;
        const Vec start = to.bias ? load_first(to.bias + column, lanes) : Vec{};
        store_first(to.out + column, start + sums, lanes);
    }
}
#endif

template <class Block, bool kWide>
static void multiply_blocks_of(const BlockPart& part, int64_t begin, int64_t end, int64_t k, const BlockRows& x, int64_t m,
                               const BlockOutputs& to, Panel panel) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (kWide && std::is_same_v<Block, Q8_0>)
        if (m == 1) return multiply_row_of_bytes(part, begin, end, x, to);
#endif
    panel.taken = kWide ? kTakenFromWideCodes<Block> : kTakenFromCodes<Block>;
    // One row of x reads a panel once, so that a part of it in the first cache is enough; more rows take wider vectors.
    const int64_t step = m == 1 ? kUnpackedLanes : kPanel, num_tiles = (m + kRowsOfBytes - 1) / kRowsOfBytes;
    for (int64_t row = begin; row < end; row += step) {
        const int64_t left = min_of(end - row, step);
        for (int64_t lane = 0; lane < left; lane += kRowsTogether) {
            const uint8_t* rows[kRowsTogether];
            for (int r = 0; r < kRowsTogether; ++r)
                rows[r] = part.rows + min_of(row + lane + r, end - 1) * part.row_bytes;
            unpack_rows<Block>(rows, k, panel.at(lane));
        }
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t first = tile * m / num_tiles, count = (tile + 1) * m / num_tiles - first;
            multiply_panel<FormOf<Block>, kWide>(count, panel, BlockRows(x, first), to.out + first * to.stride + row - begin,
                                                 to.stride, to.bias ? to.bias + row - begin : nullptr, left);
        }
    }
}

// Rows `begin` to `end` of a weight, whose results go to the columns of `to`, times m rows of x in tiles.
static void multiply_blocks(const BlockPart& part, int64_t begin, int64_t end, int64_t k, const BlockRows& x, int64_t m,
                            const BlockOutputs& to, const Panel& panel) {
    with_block(part.type, [&]<class Block>() {
        if (to.both_digits) multiply_blocks_of<Block, true>(part, begin, end, k, x, m, to, panel);
        else multiply_blocks_of<Block, false>(part, begin, end, k, x, m, to, panel);
    });
}

// Scratch of a product: rows of x; and for each thread a row as it is made, digits of a tile, and a panel.
struct BlockAreas {
    BlockRows rows;
    struct OfThread {
        float* made;
        Digits digits;
        Panel panel;
        OfThread(int64_t k, Area& area) : made(area.take<float>(k)), digits(k, area), panel(k, area) {}
    };
    int64_t thread_bytes;
    char* of_threads;

    // With room for layers of up to k inputs.
    BlockAreas(int64_t m, int64_t k, Area& area) : rows(m, k, area) {
        Area counted{nullptr};
        OfThread one(k, counted);
        thread_bytes = counted.used;
        of_threads = area.take<char>(thread_bytes * num_threads());
    }
    BlockRows rows_from(int64_t row, int64_t k) const {
        BlockRows of_layer = rows;
        of_layer.num_groups = k / kPassInputs;
        return BlockRows(of_layer, row);
    }
    OfThread of(int64_t thread, int64_t k) const {
        Area area{of_threads + thread * thread_bytes};
        return OfThread(k, area);
    }
};

// Bytes.
static int64_t blocks_scratch(int64_t m, int64_t k) {
    Area counted{nullptr};
    BlockAreas areas(m, k, counted);
    return counted.used;
}

static void linear_blocks(const BlockLinear& a) {
    Area area{a.scratch};
    const BlockAreas areas(a.m, a.k, area);
    const int64_t num_tiles = (a.m + kRowsOfBytes - 1) / kRowsOfBytes;
    const bool parallel = a.m * a.n * a.k >= kParallelProducts;
    share_tasks(parallel, num_tiles, [&](int64_t tile, int64_t thread) {
        const int64_t first = tile * a.m / num_tiles, count = (tile + 1) * a.m / num_tiles - first;
        const BlockAreas::OfThread own = areas.of(thread, a.k);
        make_passes(count, a.k, a.both_digits, own.digits, areas.rows_from(first, a.k),
                    [&](int64_t r) { return input_row(a.x, first + r, a.k, own.made); });
    });
    const auto panels_of = [](const BlockPart& part) { return (part.num_rows + kPanel - 1) / kPanel; };
    int64_t num_panels = 0;
    for (int64_t p = 0; p < a.num_parts; ++p) num_panels += panels_of(a.parts[p]);
    share_tasks(parallel, num_panels, [&](int64_t panel, int64_t thread) {
        const BlockPart* part = a.parts;
        int64_t column = 0;
        for (; panel >= panels_of(*part); ++part) {
            panel -= panels_of(*part);
            column += part->num_rows;
        }
        const int64_t row = panel * kPanel;
        column += row;
        const BlockOutputs to{a.out + column, a.n, a.bias ? a.bias + column : nullptr, a.both_digits};
        multiply_blocks(*part, row, min_of(row + kPanel, part->num_rows), a.k, areas.rows, a.m, to, areas.of(thread, a.k).panel);
    });
}

// Rows of the weight as floats. `scratch`: what `gather_scratch` says.
static int64_t gather_scratch(int64_t k) {
    Area counted{nullptr};
    Panel panel(k, counted);
    return num_threads() * counted.used;
}

static void gather_rows_blocks(const BlockPart& from, int64_t k, const int32_t* ids, int64_t count, float* out,
                               char* scratch) {
    const int64_t num_runs = (count + kRowsTogether - 1) / kRowsTogether;
    share_tasks(count * k >= kParallelElements, num_runs, [&](int64_t run, int64_t thread) {
        Area area{scratch + thread * (gather_scratch(k) / num_threads())};
        const Panel panel(k, area);
        const int64_t begin = run * kRowsTogether, end = min_of(count, begin + kRowsTogether);
        const uint8_t* rows[kRowsTogether];
        for (int r = 0; r < kRowsTogether; ++r)
            rows[r] = from.rows + ids[min_of(begin + r, end - 1)] * from.row_bytes;
        with_block(from.type, [&]<class Block>() {
            const UnpackedBlocks unpacked = panel.at(0);
            unpack_rows<Block>(rows, k, unpacked);
            for (int64_t i = begin; i < end; ++i)
                for (int64_t j = 0; j < k; ++j) {
                    const int64_t lane = i - begin, group = j / Block::kGroup * kUnpackedLanes + lane;
                    const uint8_t code = unpacked.codes[(j / 4 * kUnpackedLanes + lane) * 4 + j % 4];
                    const int number = Block::kLargest > 0 ? int(code) - Block::kZeroPoint : int8_t(code);
                    const float scaled = float(number) * unpacked.scales[group];
                    out[i * k + j] = Block::kOffsets ? scaled + unpacked.offsets[group] : scaled;
                }
        });
    });
}

}  // namespace quire::QUIRE_ISA
