// Paged attention over ragged batches: decode, chunked prefill and mixed batches are the same code.
//
// An item is a run of query tokens of one sequence, or tokens of sequences that share the blocks it reads, a run of KV
// heads and a range of keys. Its rows are the pairs of a token and a query head that read one KV head, so that keys and
// values are read once for all query heads and sequences sharing them.
// Rows are cut into panels of at most kMaxRows, keys into tiles of kTileKeys. For each tile and panel
//
//     scores  = panel . keys        keys lie transposed in their blocks: one dimension of kLanes keys is one vector
//     weights = 2^(scores - max)    online softmax: older results decay when a larger maximum appears
//     out     = decay out + weights . values
//
// where both products broadcast one operand and keep kAccumulators vectors in registers. Nothing is summed across lanes
// but one maximum per row and tile, and one sum per row at the end.
//
// Bytes are widened as they are loaded; their scales, one a key and one a value, multiply scores and weights. Where the
// processor multiplies pairs of bfloat16, keys and values stored so are multiplied as they are, two dimensions of a key
// or the values of two keys at a time, with queries and weights that are rounded to it.
//
// Blocks whose size is no multiple of kLanes, and head sizes that are none, are first copied to a padded tile. So are
// the values of a latent cache, which are part of the keys and transposed with them.
//
// A sink is one more score of a row, without a value. It joins the sum of weights when a row's parts are complete.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

constexpr int kTileKeys = 256;
constexpr int kTileColumns = kTileKeys / kLanes;
// Rows of scores are a vector further apart than a tile is wide: a power of two would map all of them to few cache sets.
constexpr int kScoreStride = kTileKeys + 16;
// Stands for "no key seen yet" in a row's maximum: far below any score, yet finite, so that differences are numbers.
constexpr float kNoMaximum = -1e30f;
constexpr float kHidden = -INFINITY;
constexpr int64_t kLineBytes = 64;

// What stored keys and values are multiplied with.
template <class T> using Factor = std::conditional_t<kInPairs<T>, BFloat, float>;
// Stands for the values of a key that is not there, beside one that is.
alignas(kLineBytes) constexpr BFloat kNoValues[8 * kLanes] = {};

// A run of keys of the current tile that lie in one block.
struct Segment {
    int64_t offset;  // elements from the start of the values to the first key's, for KV head 0
    int32_t block;
    int32_t next_block;  // of the same segment of the next tile; this tile's own where there is none
    int32_t in_block;  // the first key's place
    int32_t first;     // the same within the tile
    int32_t count;
};

struct Tile {
    int64_t begin;                 // position of lane 0 of column 0
    int64_t end;                   // one past the last key
    int64_t columns[kTileColumns];  // elements from the start of the keys to each vector of keys, for KV head 0
    int64_t ahead[kTileColumns];    // the same of the values, to be fetched meanwhile
    int num_segments;
    Segment segments[kTileKeys];
};

// Block tables scatter, so the processor's own prefetchers start anew in every block. Reading keys therefore asks for
// the values of the same block, which have the same extent and are read next; and reading values for the keys that come
// after them, of the next head or the next tile.
template <class T>
QUIRE_INLINE void prefetch(const T* p) { __builtin_prefetch(p, 0, 2); }

// Vectors of keys: where each begins, and what to fetch while it is read.
template <class T>
struct Columns {
    const T* keys;
    const T* values;
    const int64_t* offsets;  // from `keys`
    const int64_t* ahead;    // from `values`
};

// kRows x kWidth vectors of scores: queries [head_dim][kRows], or pairs [head_dim / 2][kRows], times keys
// [head_dim][kWidth vectors].
template <class T, int kRows, int kWidth>
static void score_columns(const Factor<T>* queries, const Columns<T>& columns, int64_t first, int64_t stride,
                          int64_t head_dim, float* scores) {
    Vec acc[kRows][kWidth] = {};
    const T *column[kWidth], *ahead[kWidth];
    for (int j = 0; j < kWidth; ++j) column[j] = columns.keys + columns.offsets[first + j];
    for (int j = 0; j < kWidth; ++j) ahead[j] = columns.values + columns.ahead[first + j];
    // One fetch a cache line, if blocks are of 16.
    constexpr int64_t steps_per_line = sizeof(float) / sizeof(T);
    if constexpr (kInPairs<T>) {
        for (int64_t d = 0; d < head_dim; d += 2) {
            IntVec key[kWidth];
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) {
                key[j] = load_pairs(column[j] + d * stride, column[j] + (d + 1) * stride);
                prefetch(ahead[j] + d * stride);
            }
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const IntVec q = broadcast_word(queries + d * kRows + 2 * r);
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) acc[r][j] = add_products(acc[r][j], key[j], q);
            }
        }
    } else {
        for (int64_t d = 0; d < head_dim; ++d) {
            Vec key[kWidth];
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) {
                key[j] = load(column[j] + d * stride);
                if (d % steps_per_line == 0) prefetch(ahead[j] + d * stride);
            }
#pragma GCC unroll 14
            for (int r = 0; r < kRows; ++r) {
                const float q = queries[d * kRows + r];
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) acc[r][j] += key[j] * q;
            }
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) store(scores + r * kScoreStride + j * kLanes, acc[r][j]);
}

// With more rows a panel is bound by arithmetic, and its keys come soon enough.
constexpr int kMaxRowsAhead = 6;

// kRows x kWidth vectors of outputs: out = decay out + weights [kRows][keys] times values [keys][kWidth vectors].
// `ahead` are the keys to fetch meanwhile, one place for each segment.
template <class T, int kRows, int kWidth>
static void weigh_columns(const Factor<T>* weights, const float* decay, const T* values, const Segment* segments,
                          int num_segments, const T* const* ahead, int64_t column, int64_t num_keys, int64_t stride,
                          float* out, int64_t out_stride) {
    Vec acc[kRows][kWidth];
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) acc[r][j] = load(out + r * out_stride + j * kLanes) * decay[r];
    for (int s = 0; s < num_segments && segments[s].first < num_keys; ++s) {
        const T* value = values + segments[s].offset + column;
        const Factor<T>* weight = weights + segments[s].first;
        const Factor<T>* end = weight + min_of(segments[s].count, num_keys - segments[s].first);
        const int64_t to_ahead = kRows <= kMaxRowsAhead ? ahead[s] - (values + segments[s].offset) : 0;
        if constexpr (kInPairs<T>) {
            for (; weight < end; weight += 2, value += 2 * stride) {
                const T* second = weight + 1 < end ? value + stride : kNoValues;
                IntVec v[kWidth];
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) {
                    v[j] = load_pairs(value + j * kLanes, second + j * kLanes);
                    if constexpr (kRows <= kMaxRowsAhead)
                        if (j * kLanes * sizeof(T) % kLineBytes == 0) {
                            prefetch(value + j * kLanes + to_ahead);
                            prefetch(value + stride + j * kLanes + to_ahead);
                        }
                }
#pragma GCC unroll 14
                for (int r = 0; r < kRows; ++r) {
                    const IntVec w = broadcast_word(weight + r * kScoreStride);
#pragma GCC unroll 8
                    for (int j = 0; j < kWidth; ++j) acc[r][j] = add_products(acc[r][j], v[j], w);
                }
            }
        } else {
            for (; weight < end; ++weight, value += stride) {
                Vec v[kWidth];
#pragma GCC unroll 8
                for (int j = 0; j < kWidth; ++j) {
                    v[j] = load(value + j * kLanes);
                    if constexpr (kRows <= kMaxRowsAhead)
                        if (j * kLanes * sizeof(T) % kLineBytes == 0) prefetch(value + j * kLanes + to_ahead);
                }
#pragma GCC unroll 14
                for (int r = 0; r < kRows; ++r) {
                    const float w = weight[r * kScoreStride];
#pragma GCC unroll 8
                    for (int j = 0; j < kWidth; ++j) acc[r][j] += v[j] * w;
                }
            }
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) store(out + r * out_stride + j * kLanes, acc[r][j]);
}

// The widest micro-kernel that fits the registers and the columns left.
template <int kRows>
QUIRE_INLINE int width_for(int64_t columns) {
    if (kRows * 8 <= kAccumulators && columns >= 8) return 8;
    if (kRows * 4 <= kAccumulators && columns >= 4) return 4;
    if (kRows * 2 <= kAccumulators && columns >= 2) return 2;
    return 1;
}

template <class T, int kRows>
static void score_panel(const Factor<T>* queries, const Columns<T>& columns, int64_t num_columns, int64_t stride,
                        int64_t head_dim, float* scores) {
    for (int64_t c = 0; c < num_columns;) {
        const int width = width_for<kRows>(num_columns - c);
        const auto run = [&]<int kWidth>() {
            score_columns<T, kRows, kWidth>(queries, columns, c, stride, head_dim, scores + c * kLanes);
        };
        if constexpr (kRows * 8 <= kAccumulators)
            if (width == 8) run.template operator()<8>();
        if constexpr (kRows * 4 <= kAccumulators)
            if (width == 4) run.template operator()<4>();
        if constexpr (kRows * 2 <= kAccumulators)
            if (width == 2) run.template operator()<2>();
        if (width == 1) run.template operator()<1>();
        c += width;
    }
}

template <class T, int kRows>
static void weigh_panel(const Factor<T>* weights, const float* decay, const T* values, const Segment* segments,
                        int num_segments, const T* const* ahead, int64_t num_keys, int64_t stride, float* out,
                        int64_t out_stride) {
    for (int64_t c = 0; c < out_stride / kLanes;) {
        const int width = width_for<kRows>(out_stride / kLanes - c);
        const auto run = [&]<int kWidth>() {
            weigh_columns<T, kRows, kWidth>(weights, decay, values, segments, num_segments, ahead, c * kLanes,
                                            num_keys, stride, out + c * kLanes, out_stride);
        };
        if constexpr (kRows * 8 <= kAccumulators)
            if (width == 8) run.template operator()<8>();
        if constexpr (kRows * 4 <= kAccumulators)
            if (width == 4) run.template operator()<4>();
        if constexpr (kRows * 2 <= kAccumulators)
            if (width == 2) run.template operator()<2>();
        if (width == 1) run.template operator()<1>();
        c += width;
    }
}

// Calls body.operator()<rows>() with the number of rows as a constant.
template <int kRows = kMaxRows, class Body>
QUIRE_INLINE void with_rows(int rows, Body&& body) {
    if constexpr (kRows > 0) {
        if (rows == kRows)
            body.template operator()<kRows>();
        else
            with_rows<kRows - 1>(rows, body);
    }
}

// What is done to a score before the softmax, all in base 2.
struct ScoreBias {
    float softcap;  // 0: none; otherwise scores arrive divided by the cap
    float slope;    // ALiBi
};

// What the keys and the values of a tile are to be multiplied with, if they are bytes.
struct Scales {
    float keys[kTileKeys];
    float values[kTileKeys];
};

// Turns one row of scores into weights, which may take their place; keys outside [low, high) weigh exactly nothing.
// Returns the decay of what the row holds so far. Positions are relative to the tile.
template <bool kEdge, bool kBias, bool kScaled, class Weight>
QUIRE_INLINE float weigh_scores(float* scores, Weight* weights, int64_t columns, int64_t low, int64_t high,
                                const Scales& scales, ScoreBias bias, int64_t query_position, float* row_max,
                                float* row_sum) {
    const Vec lanes = lane_numbers();
    Vec top = broadcast(*row_max);
    for (int64_t c = 0; c < columns; ++c) {
        Vec s = load(scores + c * kLanes);
        const Vec key = lanes + float(c * kLanes);
        if constexpr (kScaled) s *= load(scales.keys + c * kLanes);
        if constexpr (kBias) {
            if (bias.softcap > 0) s = bias.softcap * tanh(s);
            s += bias.slope * (key - float(query_position));
        }
        if constexpr (kEdge) s = key >= float(low) && key < float(high) ? s : broadcast(kHidden);
        if constexpr (kEdge || kBias || kScaled) store(scores + c * kLanes, s);
        top = maximum(s, top);
    }
    const float new_max = largest(top);
    Vec total{};
    for (int64_t c = 0; c < columns; ++c) {
        const Vec w = exp2(load(scores + c * kLanes) - new_max);
        if constexpr (kScaled)
            store(weights + c * kLanes, w * load(scales.values + c * kLanes));
        else
            store(weights + c * kLanes, w);
        total += w;
    }
    const float decay = exp2(broadcast(*row_max - new_max))[0];
    store(row_sum, load(row_sum) * decay + total);
    *row_max = new_max;
    return decay;
}

// The part of a thread's scratch that one item uses. Queries, weights and copies may be bfloat16.
struct Scratch {
    float* queries;    // per panel [head_dim][rows]
    float* out;        // [rows][padded_dim]
    float* row_sum;    // [rows][kLanes]
    float* row_max;    // [rows]
    float* scores;     // [kMaxRows][kScoreStride]
    float* weights;    // the same
    float* keys;       // [head_dim][kTileKeys], if keys are copied
    float* values;     // [kTileKeys][padded_dim], if values are copied
};

struct ScratchSizes {
    int64_t rows, padded_dim, queries, out, row_sum, row_max, scores, weights, keys, values;

    int64_t total() const { return queries + out + row_sum + row_max + scores + weights + keys + values; }
};

static bool in_pairs(const Attention& a) { return kMultipliesPairs && a.cache.element == KVElement::bfloat16; }
static bool keys_are_vectors(const Attention& a) {
    return a.cache.block_size % kLanes == 0 && !(in_pairs(a) && a.cache.head_dim % 2);
}
static bool values_are_vectors(const Attention& a) { return !a.cache.latent() && a.cache.value_dim % kLanes == 0; }

static ScratchSizes scratch_sizes(const Attention& a) {
    const int64_t group = a.num_heads / a.cache.num_kv_heads;
    ScratchSizes sizes{};
    for (int64_t i = 0; i < a.num_work; ++i)
        sizes.rows = max_of(sizes.rows, a.work[i].num_tokens * a.work[i].num_heads * group);
    sizes.padded_dim = round_up(a.cache.value_dim, kLanes);
    sizes.queries = round_up(sizes.rows * round_up(a.cache.head_dim, 2), kLanes);
    sizes.out = sizes.rows * sizes.padded_dim;
    sizes.row_sum = sizes.rows * kLanes;
    sizes.row_max = round_up(sizes.rows, kLanes);
    sizes.scores = kMaxRows * kScoreStride;
    sizes.weights = in_pairs(a) ? sizes.scores : 0;
    sizes.keys = keys_are_vectors(a) ? 0 : round_up(a.cache.head_dim, 2) * kTileKeys;
    sizes.values = values_are_vectors(a) ? 0 : kTileKeys * sizes.padded_dim;
    return sizes;
}

static int64_t attention_scratch(const Attention& a) { return scratch_sizes(a).total(); }

static Scratch divide(float* area, const ScratchSizes& sizes) {
    Scratch s;
    s.queries = area;
    s.out = s.queries + sizes.queries;
    s.row_sum = s.out + sizes.out;
    s.row_max = s.row_sum + sizes.row_sum;
    s.scores = s.row_max + sizes.row_max;
    s.weights = sizes.weights > 0 ? s.scores + sizes.scores : s.scores;
    s.keys = s.scores + sizes.scores + sizes.weights;
    s.values = s.keys + sizes.keys;
    return s;
}

// The largest of a row's maximum and its head's sink, in base 2; the weight of the sink beside that largest score.
static float top_with_sink(const Attention& a, int64_t head, float row_max) {
    return a.sinks ? fmaxf(row_max, a.sinks[head] * kLog2E) : row_max;
}
static float sink_weight(const Attention& a, int64_t head, float top) {
    return a.sinks ? exp2(broadcast(a.sinks[head] * kLog2E - top))[0] : 0.0f;
}

// One item of the plan, for one storage type.
template <class KV>
class ItemRun {
    static constexpr bool kScaled = sizeof(KV) == 1;
    using Factor = QUIRE_ISA::Factor<KV>;

public:
    ItemRun(const Attention& attention, const WorkItem& work_item, const Scratch& s)
        : a(attention), item(work_item), scratch(s), group(a.num_heads / a.cache.num_kv_heads),
          head_dim(a.cache.head_dim), value_dim(a.cache.value_dim), padded_dim(round_up(value_dim, kLanes)),
          depth(kInPairs<KV> ? round_up(head_dim, 2) : head_dim), block_size(a.cache.block_size),
          key_stride(a.cache.key_stride()), value_stride(a.cache.value_stride()), head_rows(item.num_tokens * group),
          num_panels((head_rows + kMaxRows - 1) / kMaxRows),
          first_position(item.token_begin - a.query_start_loc[item.sequence + 1] + a.seq_lens[item.sequence]) {}

    void run() {
        pack_queries();
        const int64_t rows = head_rows * item.num_heads;
        memset(scratch.out, 0, rows * padded_dim * sizeof(float));
        memset(scratch.row_sum, 0, rows * kLanes * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) scratch.row_max[r] = kNoMaximum;

        // Aligning the first tile keeps vectors of keys inside their blocks; keys before key_begin are hidden.
        for (int64_t begin = item.key_begin / kLanes * kLanes; begin < item.key_end; begin += kTileKeys) {
            locate(begin);
            for (int64_t head = 0; head < item.num_heads; ++head) {
                copy_unaligned(item.head_begin + head);
                if constexpr (kScaled) copy_scales(item.head_begin + head);
                for (int64_t p = 0; p < num_panels; ++p) run_panel(head, panel_begin(p), panel_begin(p + 1));
            }
        }
        write_out();
    }

private:
    // Rows are shared out evenly: 16 rows are 8 + 8, not 14 + 2.
    int64_t panel_begin(int64_t panel) const { return head_rows * panel / num_panels; }

    // Transposes queries to [panel][head_dim][rows], or pairs to [panel][head_dim / 2][rows][2], scaled so that the
    // softmax can work in base 2.
    void pack_queries() {
        const float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
        for (int64_t head = 0; head < item.num_heads; ++head)
            for (int64_t p = 0; p < num_panels; ++p) {
                const int64_t begin = panel_begin(p), rows = panel_begin(p + 1) - begin;
                Factor* packed = queries() + (head * head_rows + begin) * depth;
                for (int64_t r = 0; r < rows; ++r) {
                    const int64_t token = (begin + r) / group;
                    const int64_t query_head = (item.head_begin + head) * group + (begin + r) % group;
                    const float* q = a.q.data + query_row(token) * a.q.stride + query_head * head_dim;
                    for (int64_t d = 0; d < head_dim; ++d) narrow(packed + query_place(d, r, rows), q[d] * scale);
                    if (depth > head_dim) narrow(packed + query_place(head_dim, r, rows), 0.0f);
                }
            }
    }

    static int64_t query_place(int64_t d, int64_t row, int64_t rows) {
        return kInPairs<KV> ? d / 2 * 2 * rows + 2 * row + d % 2 : d * rows + row;
    }

    // Finds where the keys and values of a tile lie.
    void locate(int64_t begin) {
        tile.begin = begin;
        tile.end = min_of(begin + kTileKeys, item.key_end);
        const int32_t* table = a.block_tables + item.sequence * a.block_table_stride;
        const int64_t heads = a.cache.num_kv_heads;
        if (keys_are_vectors(a))
            for (int64_t c = 0, key = begin; key < tile.end; ++c, key += kLanes) {
                const int64_t block = table[key / block_size] * heads;
                tile.columns[c] = block * key_stride + key % block_size;
                tile.ahead[c] = a.cache.latent() ? tile.columns[c] : block * value_stride + key % block_size;
            }
        tile.num_segments = 0;
        // Pairs begin at even keys; one before key_begin is hidden, and in the same block.
        const int64_t first = max_of(begin, kInPairs<KV> ? item.key_begin / 2 * 2 : item.key_begin);
        for (int64_t key = first; key < tile.end;) {
            const int64_t in_block = key % block_size;
            const int64_t count = min_of(block_size - in_block, tile.end - key);
            const int32_t block = table[key / block_size];
            const int32_t next_block = key + kTileKeys < item.key_end ? table[(key + kTileKeys) / block_size] : block;
            tile.segments[tile.num_segments++] = {block * heads * value_stride + in_block * value_dim, block, next_block,
                                                  int32_t(in_block), int32_t(key - begin), int32_t(count)};
            key += count;
        }
    }

    // Copies what is not made of whole vectors to padded tiles, for one head.
    void copy_unaligned(int64_t head) {
        if (!keys_are_vectors(a)) {
            memset(copied_keys(), 0, depth * kTileKeys * sizeof(Factor));
            for (int s = 0; s < tile.num_segments; ++s) {
                const Segment& segment = tile.segments[s];
                const KV* block = keys_of(segment.block, head) + segment.in_block;
                for (int64_t d = 0; d < head_dim; ++d)
                    for (int64_t i = 0; i < segment.count; ++i)
                        narrow(copied_keys() + d * kTileKeys + segment.first + i, widen(block[d * block_size + i]));
            }
        }
        if (values_are_vectors(a)) return;
        for (int s = 0; s < tile.num_segments; ++s) {
            const Segment& segment = tile.segments[s];
            Factor* copies = copied_values() + segment.first * padded_dim;
            if (a.cache.latent())
                transpose_values(keys_of(segment.block, head) + segment.in_block, copies, segment.count);
            else
                for (int64_t i = 0; i < segment.count; ++i)
                    for (int64_t d = 0; d < value_dim; ++d)
                        narrow(copies + i * padded_dim + d,
                               widen(values()[segment.offset + head * value_stride + i * value_dim + d]));
            for (int64_t i = 0; i < segment.count; ++i)
                for (int64_t d = value_dim; d < padded_dim; ++d) narrow(copies + i * padded_dim + d, 0.0f);
        }
    }

    // The last value_dim of the keys' dimensions, as rows. Both sides of a square of kSide fit the first-level cache.
    void transpose_values(const KV* keys, Factor* copies, int64_t count) const {
        constexpr int64_t kSide = 16;
        const KV* first = keys + (head_dim - value_dim) * block_size;
        for (int64_t begin = 0; begin < value_dim; begin += kSide)
            for (int64_t i = 0; i < count; ++i)
                for (int64_t d = begin; d < min_of(begin + kSide, value_dim); ++d)
                    narrow(copies + i * padded_dim + d, widen(first[d * block_size + i]));
    }

    // Lanes without a key get zeros: what is stored there may be NaN, which nothing would hide.
    void copy_scales(int64_t head) {
        const int64_t end = round_up(tile.end - tile.begin, kLanes);
        memset(scales.keys, 0, end * sizeof(float));
        memset(scales.values, 0, end * sizeof(float));
        for (int s = 0; s < tile.num_segments; ++s) {
            const Segment& segment = tile.segments[s];
            const auto* stored = reinterpret_cast<const char*>(keys_of(segment.block, head) + head_dim * block_size);
            const size_t count = segment.count * sizeof(float);
            memcpy(scales.keys + segment.first, stored + segment.in_block * sizeof(float), count);
            memcpy(scales.values + segment.first, stored + (block_size + segment.in_block) * sizeof(float), count);
        }
    }

    void run_panel(int64_t head, int64_t begin, int64_t end) {
        // The keys that any row of the panel sees, within the tile.
        int64_t low = kTileKeys, high = 0;
        for (int64_t token = begin / group; token <= (end - 1) / group; ++token) {
            low = min_of(low, low_key(token));
            high = max_of(high, high_key(token));
        }
        if (low >= tile.end - tile.begin || high <= 0) return;
        const int64_t columns = (high + kLanes - 1) / kLanes;
        const int64_t row = head * head_rows + begin;
        const Factor* packed = queries() + row * depth;
        float* out = scratch.out + row * padded_dim;
        const int64_t kv_head = item.head_begin + head;
        float decay[kMaxRows];
        const KV* ahead[kTileKeys];
        const bool last_head = head + 1 == item.num_heads;
        for (int s = 0; s < tile.num_segments && end - begin <= kMaxRowsAhead; ++s) {
            const Segment& segment = tile.segments[s];
            ahead[s] = keys_of(last_head ? segment.next_block : segment.block, last_head ? item.head_begin : kv_head + 1) +
                       segment.in_block * value_dim;
        }

        with_rows(int(end - begin), [&]<int kRows>() {
            if (keys_are_vectors(a)) {
                const KV* const head_keys = keys() + kv_head * key_stride;
                const KV* const next = a.cache.latent() ? head_keys : values() + kv_head * value_stride;
                const Columns<KV> stored{head_keys, next, tile.columns, tile.ahead};
                score_panel<KV, kRows>(packed, stored, columns, block_size, head_dim, scratch.scores);
            } else {
                int64_t copied[kTileColumns];
                for (int c = 0; c < kTileColumns; ++c) copied[c] = c * kLanes;
                score_panel<Factor, kRows>(packed, {copied_keys(), copied_keys(), copied, copied}, columns, kTileKeys,
                                           head_dim, scratch.scores);
            }
            for (int r = 0; r < kRows; ++r) decay[r] = weigh_row(begin + r, row + r, head, columns, r);
            if (values_are_vectors(a)) {
                weigh_panel<KV, kRows>(weights(), decay, values() + kv_head * value_stride, tile.segments,
                                       tile.num_segments, ahead, high, value_dim, out, padded_dim);
            } else {
                const int64_t first = tile.segments[0].first;
                const Segment copied{first * padded_dim, 0, 0, 0, int32_t(first), kTileKeys};
                const Factor* const nothing = copied_values();
                weigh_panel<Factor, kRows>(weights(), decay, copied_values(), &copied, 1, &nothing, high, padded_dim,
                                           out, padded_dim);
            }
        });
    }

    float weigh_row(int64_t row_in_head, int64_t row, int64_t head, int64_t columns, int panel_row) {
        const int64_t token = row_in_head / group;
        const int64_t low = low_key(token), high = high_key(token);
        float* scores = scratch.scores + panel_row * kScoreStride;
        Factor* row_weights = weights() + panel_row * kScoreStride;
        // Where a block's size is odd, a pair may begin at the last key.
        if constexpr (kInPairs<KV>) row_weights[columns * kLanes] = {};
        float* row_max = scratch.row_max + row;
        float* row_sum = scratch.row_sum + row * kLanes;
        const int64_t query_position = position(token) - tile.begin;
        const bool edge = low > 0 || high < columns * kLanes;
        if (a.softcap > 0 || a.alibi_slopes) {
            const int64_t query_head = (item.head_begin + head) * group + row_in_head % group;
            const ScoreBias bias{a.softcap * kLog2E, a.alibi_slopes ? a.alibi_slopes[query_head] * kLog2E : 0.0f};
            return weigh_scores<true, true, kScaled>(scores, row_weights, columns, low, high, scales, bias,
                                                     query_position, row_max, row_sum);
        }
        if (edge)
            return weigh_scores<true, false, kScaled>(scores, row_weights, columns, low, high, scales, {},
                                                      query_position, row_max, row_sum);
        return weigh_scores<false, false, kScaled>(scores, row_weights, columns, low, high, scales, {}, query_position,
                                                   row_max, row_sum);
    }

    // The keys a token sees are [low_key, high_key), relative to the tile.
    int64_t low_key(int64_t token) const {
        const int64_t low = a.window > 0 ? position(token) - a.window + 1 : 0;
        return max_of(low, item.key_begin) - tile.begin;
    }
    int64_t high_key(int64_t token) const { return min_of(position(token) + 1, tile.end) - tile.begin; }

    // For each token of the item: row of q and out, position in the sequence, row of the first head's partial result.
    const SharedToken& sharer(int64_t token) const { return a.shared[item.token_begin + token]; }
    int64_t query_row(int64_t token) const { return item.shared ? sharer(token).row : item.token_begin + token; }
    int64_t position(int64_t token) const { return item.shared ? sharer(token).position : first_position + token; }
    int64_t partial_row(int64_t token) const {
        return item.shared ? sharer(token).partial_row : item.partial_row + token * a.num_heads;
    }

    void write_out() const {
        for (int64_t head = 0; head < item.num_heads; ++head)
            for (int64_t r = 0; r < head_rows; ++r) {
                const int64_t row = head * head_rows + r;
                const float* source = scratch.out + row * padded_dim;
                const float total = sum(load(scratch.row_sum + row * kLanes)), row_max = scratch.row_max[row];
                const int64_t query_head = (item.head_begin + head) * group + r % group;
                if (item.shared || item.partial_row >= 0) {
                    float* partial = a.partials + (partial_row(r / group) + query_head) * (value_dim + 2);
                    memcpy(partial, source, value_dim * sizeof(float));
                    partial[value_dim] = row_max;
                    partial[value_dim + 1] = total;
                } else {
                    float* target = a.out + ((item.token_begin + r / group) * a.num_heads + query_head) * value_dim;
                    const float top = top_with_sink(a, query_head, row_max), decay = exp2(broadcast(row_max - top))[0];
                    const float inverse = 1.0f / (total * decay + sink_weight(a, query_head, top));
                    for (int64_t d = 0; d < value_dim; ++d) target[d] = source[d] * decay * inverse;
                }
            }
    }

    const KV* keys_of(int64_t block, int64_t head) const {
        return keys() + (block * a.cache.num_kv_heads + head) * key_stride;
    }
    const KV* keys() const { return static_cast<const KV*>(a.cache.keys); }
    const KV* values() const { return static_cast<const KV*>(a.cache.values); }
    Factor* queries() const { return reinterpret_cast<Factor*>(scratch.queries); }
    Factor* weights() const { return reinterpret_cast<Factor*>(scratch.weights); }
    Factor* copied_keys() const { return reinterpret_cast<Factor*>(scratch.keys); }
    Factor* copied_values() const { return reinterpret_cast<Factor*>(scratch.values); }

    const Attention& a;
    const WorkItem& item;
    const Scratch& scratch;
    const int64_t group, head_dim, value_dim;
    const int64_t padded_dim;  // of a value
    const int64_t depth;  // of a packed query
    const int64_t block_size;
    const int64_t key_stride, value_stride;  // elements of one head of a block
    const int64_t head_rows;       // rows of one KV head
    const int64_t num_panels;      // per KV head
    const int64_t first_position;  // of the item's first token in its sequence, unless tokens are shared
    Tile tile;
    Scales scales;  // of the current head, if kScaled
};

// Joins the parts of a run of tokens, for the query heads of one KV head: each part decays by what its maximum lacks to
// the largest. A row with one part that saw keys gets the bits that an item without partial results would have written.
static void merge_parts(const Attention& a, const Merge& merge, int64_t kv_head) {
    const int64_t group = a.num_heads / a.cache.num_kv_heads, value_dim = a.cache.value_dim;
    const int64_t part_stride = merge.num_tokens * a.num_heads * (value_dim + 2);
    for (int64_t row = 0; row < merge.num_tokens * group; ++row) {
        const int64_t token = row / group, head = kv_head * group + row % group;
        const float* parts = a.partials + (merge.partial_row + token * a.num_heads + head) * (value_dim + 2);
        float* out = a.out + ((merge.token_begin + token) * a.num_heads + head) * value_dim;

        float top = kNoMaximum, total = 0;
        for (int64_t s = 0; s < merge.num_parts; ++s) top = fmaxf(top, parts[s * part_stride + value_dim]);
        top = top_with_sink(a, head, top);
        for (int64_t d = 0; d < value_dim; ++d) out[d] = 0;
        for (int64_t s = 0; s < merge.num_parts; ++s) {
            const float* part = parts + s * part_stride;
            const float decay = exp2(broadcast(part[value_dim] - top))[0];
            total += part[value_dim + 1] * decay;
            for (int64_t d = 0; d < value_dim; ++d) out[d] += part[d] * decay;
        }
        total += sink_weight(a, head, top);
        // As in write_out, so that a row all of whose keys lie in one part has the same bits with and without a split.
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < value_dim; ++d) out[d] *= inverse;
    }
}

static void attention(const Attention& a) {
    const ScratchSizes sizes = scratch_sizes(a);
    share_tasks(a.num_threads > 1, a.num_work, [&](int64_t i, int64_t thread) {
        const Scratch scratch = divide(a.scratch + thread * sizes.total(), sizes);
        switch (a.cache.element) {
            case KVElement::float32: ItemRun<float>(a, a.work[i], scratch).run(); break;
            case KVElement::float16: ItemRun<Half>(a, a.work[i], scratch).run(); break;
            case KVElement::bfloat16: ItemRun<BFloat>(a, a.work[i], scratch).run(); break;
            case KVElement::int8: ItemRun<Byte>(a, a.work[i], scratch).run(); break;
        }
    });
    share_tasks(a.num_threads > 1, a.num_merges * a.cache.num_kv_heads, [&](int64_t i, int64_t) {
        merge_parts(a, a.merges[i / a.cache.num_kv_heads], i % a.cache.num_kv_heads);
    });
}

}  // namespace quire::QUIRE_ISA
