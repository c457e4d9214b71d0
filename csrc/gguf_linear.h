// y = x . weight^T + bias with the weight in blocks of GGUF.
//
// A thread unpacks a panel of outputs (gguf_blocks.h) into its caches and multiplies it with all rows of x, in passes
// (gguf_passes.h); for one row of x it unpacks block after block. Products are summed as integers inside a pass, which is
// exact; the passes' sums are added as float32 in the order of k. A pass that other rows of the tile need adds 0 to a row,
// so a row's result has the same bits in every batch and with any number of threads.
#pragma once

#include "area.h"
#include "byte_products.h"
#include "gguf_blocks.h"
#include "gguf_passes.h"
#include "linear_input.h"
#include "linear.h"
#include "parallel.h"
#include "row_groups.h"

namespace quire::QUIRE_ISA {

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

// A thread's room for a panel: kRowsTogether outputs after another.
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
        const int64_t lanes = lane / kRowsTogether, rest = lane % kRowsTogether, groups = k / 16 * kRowsTogether;
        return {codes + lanes * k * kRowsTogether + rest * 4, scales + lanes * groups + rest, offsets + lanes * groups + rest};
    }
};

// The passes of a tile that are still to be multiplied.
struct PassesLeft {
    const int32_t* words;
    const RowPass* of_rows;
    const int32_t *groups, *end;
    explicit PassesLeft(const BlockRows& x)
        : words(x.words), of_rows(x.of_rows), groups(x.groups), end(x.groups + *x.num_passes) {}
};

// Adds the passes of the groups of inputs `first` to `end` to the sums of kRows rows of a tile times kWidth vectors of
// outputs. `w`: where the outputs are unpacked from group `first` on; `taken`: from every code. `kWide`: passes have both
// digits.
template <class Form, bool kWide, int kRows, int kWidth>
static QUIRE_INLINE void add_passes(PassesLeft& left, int64_t first, int64_t end, const UnpackedBlocks (&w)[kWidth],
                                    int32_t taken_from_codes, Vec (&sums)[kRows][kWidth]) {
    constexpr int kHalves = kPassInputs / Form::kGroup, kSteps = Form::kGroup / 4;
    constexpr bool kInWords = Form::kStepsInWords > 0 && !kWide;
    constexpr int kRun = kInWords ? Form::kStepsInWords : kSteps;
    const int32_t* words = left.words;
    const RowPass* of_rows = left.of_rows;
    const int32_t* groups = left.groups;
    for (; groups < left.end && *groups < end; ++groups, of_rows += kRows) {
        const int64_t pass_group = *groups - first;
        int64_t at = pass_group * kPassSteps * kRowsTogether * 4;
        for (int half = 0; half < kHalves; ++half) {
            IntVec acc[kRows][kWidth] = {};
            for (int run = 0; run < kSteps; run += kRun) {
                WordVec partial[kRows][kWidth] = {};
#pragma GCC unroll 2
                for (int step = 0; step < kRun; ++step, at += kRowsTogether * 4, words += kRows) {
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
            const int64_t group = (pass_group * kHalves + half) * kRowsTogether;
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const RowPass& of_row = of_rows[r];
                const int32_t sum = kHalves == 1 ? of_row.sum : of_row.sums[half];
                const IntVec taken = IntVec{} + sum * taken_from_codes;
#pragma GCC unroll 4
                for (int j = 0; j < kWidth; ++j) {
                    sums[r][j] += __builtin_convertvector(acc[r][j] - taken, Vec) * (load(w[j].scales + group) * of_row.scale);
                    if constexpr (Form::kOffsets) sums[r][j] += load(w[j].offsets + group) * (of_row.scale * float(sum));
                }
            }
        }
    }
    left.words = words;
    left.of_rows = of_rows;
    left.groups = groups;
}

// `left` of the outputs are there.
template <int kRows, int kWidth>
static QUIRE_INLINE void store_sums(const Vec (&sums)[kRows][kWidth], float* out, int64_t stride, const float* bias,
                                    int64_t left) {
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

// The same of one row, whose sums have registers to spare: all steps of a pass at once, in two chains.
template <class Form, bool kWide, int kWidth>
static QUIRE_INLINE void add_passes(PassesLeft& left, int64_t first, int64_t end, const UnpackedBlocks (&w)[kWidth],
                                    int32_t taken_from_codes, Vec (&sums)[1][kWidth]) {
    constexpr int kHalves = kPassInputs / Form::kGroup, kSteps = Form::kGroup / 4;
    constexpr bool kInWords = Form::kStepsInWords > 0 && !kWide;
    constexpr int kRun = kInWords ? Form::kStepsInWords : kSteps;
    constexpr int kChains = kRun > 1 ? 2 : 1;
    constexpr int64_t kStepBytes = kRowsTogether * 4, kPassWords = kWide ? 2 * kPassSteps : kPassSteps;
    for (; left.groups < left.end && *left.groups < end; ++left.groups, ++left.of_rows, left.words += kPassWords) {
        const int64_t group = (*left.groups - first) * kHalves;
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
            const int32_t* const words = left.words + half * kSteps;
            const int32_t sum = kHalves == 1 ? left.of_rows->sum : left.of_rows->sums[half];
            const IntVec taken = IntVec{} + sum * taken_from_codes;
#pragma GCC unroll 4
            for (int j = 0; j < kWidth; ++j) {
                const uint8_t* const codes = w[j].codes + (group + half) * kSteps * kStepBytes;
                IntVec acc[kChains] = {};
#pragma GCC unroll 8
                for (int run = 0; run < kSteps; run += kRun) {
                    WordVec partial[kChains] = {};
#pragma GCC unroll 8
                    for (int step = run; step < run + kRun; ++step) {
                        const uint8_t* const at = codes + step * kStepBytes;
                        if constexpr (kWide) {
                            acc[0] = add_wide_products(acc[0], Form::template wide_codes_at<0>(at), IntVec{} + words[step]);
                            acc[1] = add_wide_products(acc[1], Form::template wide_codes_at<1>(at), IntVec{} + words[kPassSteps + step]);
                        } else if constexpr (kInWords) {
                            partial[step % 2] += products(Form::codes_at(at), IntVec{} + words[step]);
                        } else {
                            acc[step % 2] = add_products(acc[step % 2], Form::codes_at(at), IntVec{} + words[step]);
                        }
                    }
                    if constexpr (kInWords) acc[0] = add_pairs(acc[0], partial[0] + partial[1]);
                }
                const int64_t scale = (group + half) * kRowsTogether;
                sums[0][j] += __builtin_convertvector(acc[0] + acc[1] - taken, Vec) * (load(w[j].scales + scale) * left.of_rows->scale);
                if constexpr (Form::kOffsets) sums[0][j] += load(w[j].offsets + scale) * (left.of_rows->scale * float(sum));
            }
        }
    }
}

// kRows rows of a tile times kWidth vectors of a panel's outputs.
template <class Form, bool kWide, int kRows, int kWidth>
static void multiply_passes(const Panel& panel, int64_t lane, const BlockRows& x, float* out, int64_t stride,
                            const float* bias, int64_t left) {
    Vec sums[kRows][kWidth] = {};
    UnpackedBlocks w[kWidth];
    for (int j = 0; j < kWidth; ++j) w[j] = panel.at(lane + j * kLanes);
    PassesLeft passes(x);
    add_passes<Form, kWide, kRows>(passes, 0, x.num_groups, w, panel.taken, sums);
    store_sums(sums, out, stride, bias, left);
}

template <class Form, bool kWide, int kRows = kRowsOfBytes>
static void multiply_panel(int64_t rows, const Panel& w, const BlockRows& x, float* out, int64_t stride,
                           const float* bias, int64_t left) {
    if constexpr (kRows > 1)
        if (rows < kRows) return multiply_panel<Form, kWide, kRows - 1>(rows, w, x, out, stride, bias, left);
    constexpr int kWidth = kLanes == 16 ? 1 : 2;
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
        BlocksOfRows b(part, row, end);
        Vec sums{};
        for (int64_t g = 0; g < x.num_groups; ++g, b.advance(Q8_0::kBytes)) {
            const int32_t* const words = x.words + g * 2 * kPassSteps;
            const IntVec first = load_words(words), second = load_words(words + kPassSteps);
            IntVec acc[kRowsTogether];
#pragma GCC unroll 8
            for (int r = 0; r < kRowsTogether; ++r) {
                const uint8_t* const codes = b.rows[r] + 2;
                acc[r] = add_wide_products(IntVec{}, FormOf<Q8_0>::wide_codes_at<0>(codes), first);
                acc[r] = add_wide_products(acc[r], FormOf<Q8_0>::wide_codes_at<1>(codes), second);
            }
            sums += __builtin_convertvector(sums_of_lanes(acc), Vec) * (b.halves(0) * x.of_rows[g].scale);
        }
        const int64_t lanes = min_of(end - row, kLanes), column = row - begin;
        const Vec start = to.bias ? load_first(to.bias + column, lanes) : Vec{};
        store_first(to.out + column, start + sums, lanes);
    }
}
#endif

// One row of x reads a weight once, so it is unpacked block after block and multiplied in the first cache.
template <class Block, bool kWide, class Blocks>
static void multiply_row(const BlockPart& part, int64_t begin, int64_t end, const BlockRows& x, const BlockOutputs& to) {
    constexpr int64_t kScales = Block::kValues / Block::kGroup * kRowsTogether, kPasses = Block::kValues / kPassInputs;
    constexpr int kWidth = int(kRowsTogether / kLanes);
    constexpr bool kInPlace = kRowsTogether == kInterleavedRows && std::is_same_v<Block, Q8_0> && std::is_same_v<Blocks, InterleavedBlocks>;
    alignas(64) uint8_t codes[Block::kValues * kRowsTogether];
    alignas(64) float scales[kScales], offsets[Block::kOffsets ? kScales : 1];
    const UnpackedBlocks unpacked{codes, scales, offsets};
    for (int64_t row = begin; row < end; row += kRowsTogether) {
        Blocks blocks(part, row, end);
        UnpackedBlocks w[kWidth];
        for (int j = 0; j < kWidth; ++j) w[j] = unpacked.from_lane(j * kLanes);
        Vec sums[1][kWidth] = {};
        PassesLeft passes(x);
        for (int64_t pass = 0; pass < x.num_groups; pass += kPasses) {
            if constexpr (kInPlace) {
                for (int j = 0; j < kWidth; ++j) w[j].codes = const_cast<uint8_t*>(blocks.place(2)) + j * kLanes * 4;
                unpacked.put_scale(0, blocks.halves(0));
            } else {
                Block::unpack(blocks, unpacked);
            }
            blocks.advance(Block::kBytes);
            add_passes<FormOf<Block>, kWide>(passes, pass, pass + kPasses, w,
                                             kWide ? kTakenFromWideCodes<Block> : kTakenFromCodes<Block>, sums);
        }
        const int64_t column = row - begin;
        store_sums(sums, to.out + column, to.stride, to.bias ? to.bias + column : nullptr, end - row);
    }
}

template <class Block, bool kWide, class Blocks>
static void multiply_blocks_of(const BlockPart& part, int64_t begin, int64_t end, int64_t k, const BlockRows& x, int64_t m,
                               const BlockOutputs& to, Panel panel) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (kWide && std::is_same_v<Block, Q8_0> && std::is_same_v<Blocks, BlocksOfRows>)
        if (m == 1) return multiply_row_of_bytes(part, begin, end, x, to);
#endif
    if (m == 1) return multiply_row<Block, kWide, Blocks>(part, begin, end, x, to);
    panel.taken = kWide ? kTakenFromWideCodes<Block> : kTakenFromCodes<Block>;
    const int64_t num_tiles = (m + kRowsOfBytes - 1) / kRowsOfBytes;
    for (int64_t row = begin; row < end; row += kPanel) {
        const int64_t left = min_of(end - row, kPanel);
        for (int64_t lane = 0; lane < left; lane += kRowsTogether)
            unpack_rows<Block>(Blocks(part, row + lane, end), k, panel.at(lane));
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
        with_blocks_of(part, [&]<class Blocks>() {
            if (to.both_digits) multiply_blocks_of<Block, true, Blocks>(part, begin, end, k, x, m, to, panel);
            else multiply_blocks_of<Block, false, Blocks>(part, begin, end, k, x, m, to, panel);
        });
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
        with_block(from.type, [&]<class Block>() {
            const UnpackedBlocks unpacked = panel.at(0);
            const auto put_row = [&](int64_t i, int64_t lane) {
                for (int64_t j = 0; j < k; ++j) {
                    const int64_t group = j / Block::kGroup * kRowsTogether + lane;
                    const uint8_t code = unpacked.codes[(j / 4 * kRowsTogether + lane) * 4 + j % 4];
                    const int number = Block::kLargest > 0 ? int(code) - Block::kZeroPoint : int8_t(code);
                    const float scaled = float(number) * unpacked.scales[group];
                    out[i * k + j] = Block::kOffsets ? scaled + unpacked.offsets[group] : scaled;
                }
            };
            if (!from.interleaved) {
                unpack_rows<Block>(BlocksOfRows(from, ids + begin, end - begin), k, unpacked);
                for (int64_t i = begin; i < end; ++i) put_row(i, i - begin);
                return;
            }
            for (int64_t i = begin; i < end; ++i) {
                const int64_t lane = ids[i] % kInterleavedRows;
                unpack_rows<Block>(InterleavedBlocks(from, ids[i] - lane, from.num_rows), k, unpacked);
                put_row(i, lane);
            }
        });
    });
}

}  // namespace quire::QUIRE_ISA
