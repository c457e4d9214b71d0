// The kernels' interface: plain pointers, sizes and strides, and a table of functions per instruction set.
//
// The layer above (bindings/) has checked all arguments; nothing below throws, allocates or knows a framework. Only plain types may appear here: this header is seen by translation units compiled for
// different instruction sets, and an inline function shared by them could be linked in the wrong version.
#pragma once

#include <stdint.h>

namespace quire {

enum class Element : uint8_t { float32, float16, bfloat16 };

// Activations: rows x columns of float32, or tokens x heads x head_dim; the innermost dimensions are contiguous and
// `stride` is the distance between rows in elements.
struct Rows {
    float* data;
    int64_t stride;
};

enum class KVElement : uint8_t { float32, float16, bfloat16, int8 };

// Bytes of two float32 scales. In an int8 cache, a key and a value have one each; both are stored behind the keys.
constexpr int64_t kScaleRows = 8;
// Largest head size of an int8 cache: a key is quantised on the stack.
constexpr int64_t kMostHeadDim = 1024;

// The two cache tensors of one layer:
//   keys    [num_blocks, num_kv_heads, head_dim + scale_rows, block_size]
//   values  [num_blocks, num_kv_heads, block_size, value_dim]
// The last kScaleRows rows of a head's keys are 2 x block_size float32: scales of the keys, then of the values.
// A latent cache stores no values: a value is the last value_dim elements of its key, and `values` is null.
struct KVCache {
    void* keys;
    void* values;
    KVElement element;
    int64_t num_kv_heads;
    int64_t head_dim;  // of a key
    int64_t value_dim;
    int64_t block_size;

    bool latent() const { return !values; }

    int64_t scale_rows() const { return element == KVElement::int8 ? kScaleRows : 0; }
    // Elements of one head of a block.
    int64_t key_stride() const { return (head_dim + scale_rows()) * block_size; }
    int64_t value_stride() const { return latent() ? 0 : block_size * value_dim; }
};

// One row of AttentionPlan.work, of AttentionPlan.shared and of AttentionPlan.merges (quire/attention/plan.py).
struct WorkItem {
    int32_t sequence, token_begin, num_tokens, head_begin, num_heads, key_begin, key_end, partial_row, shared;
};
struct SharedToken {
    int32_t row, position, partial_row;
};
struct Merge {
    int32_t token_begin, num_tokens, partial_row, num_parts;
};

struct Attention {
    Rows q;    // [T, num_heads, head_dim]
    float* out;  // [T, num_heads, value_dim], contiguous
    KVCache cache;
    int64_t num_heads;
    const int32_t* query_start_loc;
    const int32_t* seq_lens;
    const int32_t* block_tables;
    int64_t block_table_stride;
    const WorkItem* work;
    int64_t num_work;
    const SharedToken* shared;
    const Merge* merges;
    int64_t num_merges;
    float* partials;  // rows of value_dim outputs, then the row's maximum and its sum
    float scale;
    float softcap;              // 0: none
    int64_t window;             // 0: none
    const float* alibi_slopes;  // [num_heads] or null
    const float* sinks;         // [num_heads] or null: a score of every token that has no value
    float* scratch;             // num_threads areas of attention_scratch(...) floats
    int num_threads;
};

// A packed weight of n outputs is ceil(n / kPanel) panels of [k][kPanel], for bfloat16 [k / 2][kPanel][2]. Lanes past the
// last output and steps past the last input are zero.
constexpr int64_t kPanel = 32;

// The operation on x before a dense layer multiplies it.
enum class InputOp : uint8_t {
    none,      // x [m, k] is the input
    rms_norm,  // the norm of x [m, k]; with a residual, x is added to it and its norm is taken
    silu,      // x [m, 2 k]: the activation of the first half times the second
    gelu,
    gelu_tanh,
    relu,
    relu2,
    clamped_swiglu,  // of experts only
    plain_silu,  // x [m, k]: its activation
    plain_gelu,
    plain_gelu_tanh,
    plain_relu,
    plain_relu2,
};
struct LinearInput {
    Rows x;
    InputOp op;
    float* residual;           // rms_norm: [m, k] contiguous, or null
    const float* norm_weight;  // rms_norm: [k]
    float eps;
};

struct Linear {
    LinearInput x;
    const void* weight;
    Element element;
    const float* bias;  // [n] or null
    float* out;         // [m, n], contiguous
    float* scratch;     // m * k floats, twice as many if the input is made
    int64_t m, n, k;
};

// Inputs of low-bit weights are taken in pairs of steps of four; rows are padded to whole pairs.
constexpr int64_t kPairOfSteps = 8;
// The sum of this many products of 127 * 127 fits 32 bits.
constexpr int64_t kMostInputs = 1 << 17;

// Inputs of a group that may be rotated (row_groups.h).
constexpr int64_t kRotated = 64;

// 4-bit numbers q of a group stand for scale * q + offset. Each output has a unit for its groups' scales and one for their
// offsets, powers of two as the higher halves of float32, and a group so many of each.
struct Units {
    uint16_t offset, scale;
};
struct UnitsOfGroup {
    uint8_t offset, scale;
};

// A weight of 8 or 4 bits, in the layout of linear_low_bit.h.
struct LowBitWeight {
    uint8_t* weight;
    void* scales;  // 8 bits: bfloat16 [panel][group][kPanel]; 4 bits: in each panel Units [kPanel], UnitsOfGroup [group][kPanel]
    int bits;
    int64_t group;  // inputs that share a scale: a multiple of 32, or k in whole pairs
    bool rotates;   // groups of kRotated inputs are rotated
    uint8_t* scratch;       // for packing: an area per thread
    int64_t scratch_bytes;  // of one thread: 17 times k rounded up to whole pairs, and 256
};

struct LowBitLinear {
    LinearInput x;
    const uint8_t* weight;
    const void* scales;  // as in LowBitWeight
    int bits;
    int64_t group;
    bool rotates;
    const float* bias;  // [n] or null
    float* out;         // [m, n], contiguous
    // m * (k rounded up to whole pairs / 4 + 2 * number of groups) words, and for each thread that k / 4 and k
    void* scratch;
    int64_t m, n, k;
};

// How codes of few bits stand for numbers: by a table of 16, as integers less a zero point, or as floats (e4m3).
enum class CodeKind : uint8_t { table, integers4, integers8, float8 };

// A weight as a checkpoint of few bits stores it, in the layout of coded_linear.h.
struct CodedWeight {
    const uint8_t* codes;
    CodeKind kind;
    float levels[16];  // of a table
    float zero;        // of integers
    Element scale_element;
    const void* scales;
    const void* offsets;  // of the type of scales, or null
    bool zero_points;     // offsets are zero points of their groups; else what is added to a group's numbers
    int64_t group;        // inputs that share a scale: a multiple of 8, or at least k
};

struct CodedLinear {
    LinearInput x;
    CodedWeight weight;
    const int32_t* order;  // [k]: input k of the weight is input order[k] of x; null: they are the same
    const float* bias;     // [n] or null
    float* out;            // [m, n], contiguous
    float* scratch;        // m * (2 * k + k / 8 + 1) floats
    int64_t m, n, k;
};

// The types of GGUF's blocks of few bits; bindings/packed_weights.cpp has their names.
enum class BlockType : uint8_t { q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4 };

// Numbers and bytes of a block.
struct BlockSizes {
    int64_t numbers, bytes;
};

constexpr int64_t kInterleavedRows = 8;

// Rows of blocks as a GGUF file has them, or eight by eight interleaved (gguf_rows.h): a multiple of eight rows.
struct BlockPart {
    const uint8_t* rows;
    int64_t row_bytes, num_rows;
    BlockType type;
    bool interleaved;
};

struct BlockLinear {
    LinearInput x;
    const BlockPart* parts;  // whose outputs lie side by side
    int64_t num_parts;
    bool both_digits;   // of every group of x, not only of those that stand out (gguf_linear.h)
    const float* bias;  // [n] or null
    float* out;         // [m, n], contiguous
    char* scratch;      // what blocks_scratch says, on a cache line
    int64_t m, n, k;    // k is a multiple of 32
};

// How a dense layer of experts is stored: floats, few bits in the layout of linear_low_bit.h or of coded_linear.h, or
// blocks of GGUF.
enum class ExpertFormat : uint8_t { float32, float16, bfloat16, bits8, bits4, coded, blocks };

// The dense layers of one shape of all experts. Their packed weights follow each other.
struct ExpertLinear {
    const char* weight;
    int64_t weight_bytes;  // of one expert
    const char* scales;    // of few bits
    int64_t scale_bytes;   // of one expert
    int64_t group;         // inputs that share a scale, as in LowBitLinear
    bool rotates;
    const float* bias;     // [experts, n] or null
    int64_t n, k;
    CodedWeight coded;      // of the first expert; weight_bytes and scale_bytes lead to the next
    const int32_t* order;   // of codes: [experts, k], as in CodedLinear, or null
    const BlockPart* parts; // of blocks: of the first expert. The rows of the next follow each part's
    int64_t num_parts;
    bool both_digits;       // as in BlockLinear
};

// Adds to each token's row of `out` the outputs of the experts that it was sent to, each times its weight.
struct Experts {
    Rows x;  // [tokens, hidden]
    int64_t tokens, num_experts, num_active;
    const int32_t* chosen;  // [tokens, num_active]
    const float* weights;   // the same
    ExpertFormat format;
    InputOp gate;
    float alpha, limit;    // of a clamped gate
    ExpertLinear gate_up;  // k = hidden, n = 2 * inner
    ExpertLinear down;     // k = inner, n = hidden
    Rows out;              // [tokens, hidden]
    char* scratch;         // what experts_scratch says, on a cache line
};

// Samples one token per row of logits. Each row has its own filters; top_k 0, top_p 1 and min_p 0 filter nothing.
struct Draws {
    Rows logits;
    int64_t rows, columns;
    const float* temperatures;
    const float* min_p;
    const int32_t* top_k;
    const double* top_p;
    const double* uniforms;  // in [0, 1)
    char* scratch;           // draw_scratch() for each thread
    float* peaks;            // the highest logit; where it is not finite, the token means nothing
    int32_t* ids;
};

// Rows of one adapter that are computed together: rows begin to end - 1 of x.
constexpr int kLoraTile = 4;
struct LoraTile {
    int32_t slot, begin, end;
};

// The low-rank updates of a dense layer. Its n outputs are num_parts runs, and part p has adapters of its own.
struct Lora {
    Rows x;                    // [num_rows, k]
    float* out;                // rows of n, contiguous
    const float* a;            // [slots, num_parts, max_rank, k]
    const float* b;            // [slots, max_rank, n]
    const int32_t* ranks;      // [slots, num_parts]: how many of the max_rank ranks count; 0: no adapter of that part
    const int32_t* part_ends;  // [num_parts]: the column after the part's last
    const int32_t* rows;       // [num_rows]: the row of `out` that each row of x adds to, each once at most
    const LoraTile* tiles;     // at most kLoraTile rows each; together they are all rows
    float* scratch;            // num_rows * num_parts * max_rank floats
    int64_t num_rows, num_tiles, num_parts, max_rank, n, k;
};

// One implementation of every operation; quire/kernels/reference.py says what each computes.
struct Kernels {
    const char* isa;
    void (*rms_norm)(Rows x, float* residual, const float* weight, float eps, float* out, int64_t rows, int64_t columns);
    void (*layer_norm)(Rows x, float* residual, const float* weight, const float* bias, float eps, float* out, int64_t rows,
                       int64_t columns);
    void (*rms_norm_heads)(Rows x, const float* weight, float eps, int64_t tokens, int64_t heads, int64_t head_dim);
    void (*rotary)(Rows x, const int32_t* positions, const float* cos_sin, int64_t rotary_dim, int64_t tokens,
                   int64_t heads, int64_t head_dim);
    void (*silu_and_mul)(Rows x, float* out, int64_t rows, int64_t columns);
    void (*gelu_and_mul)(Rows x, float* out, int64_t rows, int64_t columns);
    void (*gelu_tanh_and_mul)(Rows x, float* out, int64_t rows, int64_t columns);
    void (*write_kv)(Rows k, Rows v, const KVCache& cache, const int32_t* slots, int64_t tokens);
    void (*pack_linear)(const void* weight, Element from, int64_t rows, int64_t k, void* packed, Element to,
                        int64_t first_row);
    void (*linear)(const Linear& linear);
    void (*quantize_groups)(Rows x, int64_t rows, int64_t k, int64_t group, bool rotates, void* bytes, float* scales);
    void (*quantize_linear)(const void* weight, Element from, int64_t rows, int64_t k, const LowBitWeight& to,
                            int64_t first_row);
    void (*linear_quantized)(const LowBitLinear& linear);
    void (*linear_coded)(const CodedLinear& linear);
    int64_t (*experts_scratch)(const Experts& experts);  // bytes
    void (*experts)(const Experts& experts);
    void (*gather_rows)(const void* packed, Element element, int64_t k, const int32_t* ids, int64_t count, float* out);
    void (*gather_rows_quantized)(const LowBitWeight& from, int64_t k, const int32_t* ids, int64_t count, float* out);
    int64_t (*blocks_scratch)(int64_t m, int64_t k);  // bytes
    void (*linear_blocks)(const BlockLinear& linear);
    int64_t (*gather_scratch)(int64_t k);  // bytes
    // `scratch` is on a cache line.
    void (*gather_rows_blocks)(const BlockPart& from, int64_t k, const int32_t* ids, int64_t count, float* out,
                               char* scratch);
    void (*add_lora)(const Lora& lora);
    int64_t (*attention_scratch)(const Attention& attention);
    void (*attention)(const Attention& attention);
    void (*row_peaks)(Rows x, int64_t rows, int64_t columns, float* peaks, int32_t* ids);
    int64_t (*draw_scratch)(int64_t columns);  // bytes for each thread
    void (*draw_tokens)(const Draws& draws);
};

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }

// copy_blocks.cpp: pairs of (source, destination), in every layer; needs no arithmetic, hence no instruction set.
void copy_cache_blocks(const KVCache* caches, int64_t num_caches, const int32_t* pairs, int64_t num_pairs);

// interleave_blocks.cpp: rows of blocks as a file has them -> interleaved, in the same number of bytes.
void interleave_blocks(const uint8_t* rows, int64_t num_rows, int64_t row_bytes, BlockSizes sizes, uint8_t* to);

// dispatch.cpp: the implementations this CPU says it can run, best first, ended by null.
const Kernels* const* supported_kernels();

// self_test.cpp: what these get wrong on this machine, or null.
const char* fault_of(const Kernels& kernels);

}  // namespace quire
