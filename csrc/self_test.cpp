// Whether a build of the kernels computes here what it should: products in every format, and attention over every type
// of cache, in a fraction of a millisecond.
//
// A hypervisor may promise instructions that the processor below it lacks, and a compiler may be wrong. All numbers are
// whole and small: every type holds them, and every order of adding them gives the same, so results must be equal.

#include <omp.h>
#include <setjmp.h>
#include <signal.h>

#include <thread>
#include <vector>

#include "kernels.h"

namespace quire {
namespace {

constexpr int64_t kRows = 9, kOutputs = 40, kInputs = 72, kPanels = (kOutputs + kPanel - 1) / kPanel;

// From -most to most; every 32nd is `end`, so that a scale for 32 of them or more is 1.
float number(int64_t row, int64_t i, int most, int end) { return float(i % 32 ? (row * 31 + i * 17) % (2 * most + 1) - most : end); }

struct Product {
    std::vector<float> x, weight, expected, out, scratch;

    Product(int most, int end) : out(kRows * kOutputs), scratch(4 * kRows * kInputs) {
        for (int64_t i = 0; i < kRows * kInputs; ++i) x.push_back(number(i / kInputs, i % kInputs, 127, 127));
        // The second of every 32 is `most`: with both ends of its range a group has the scale 1 in 4 bits too.
        for (int64_t i = 0; i < kOutputs * kInputs; ++i)
            weight.push_back(i % kInputs % 32 == 1 ? most : number(i / kInputs, i % kInputs, most, end));
        for (int64_t i = 0; i < kRows * kOutputs; ++i) {
            float sum = 0;
            for (int64_t k = 0; k < kInputs; ++k) sum += x[i / kOutputs * kInputs + k] * weight[i % kOutputs * kInputs + k];
            expected.push_back(sum);
        }
    }

    // Nothing of an earlier product may pass for this one.
    LinearInput input() {
        out.assign(kRows * kOutputs, -1.0f);
        return {{x.data(), kInputs}, InputOp::none, nullptr, nullptr, 0};
    }

    bool of_floats(const Kernels& kernels, Element element) {
        std::vector<float> packed(kPanels * kPanel * kInputs);  // what the largest type takes
        kernels.pack_linear(weight.data(), Element::float32, kOutputs, kInputs, packed.data(), element, 0);
        kernels.linear({input(), packed.data(), element, nullptr, out.data(), scratch.data(), kRows, kOutputs, kInputs});
        return out == expected;
    }

    bool of_bits(const Kernels& kernels, int bits, int64_t group) {
        std::vector<uint8_t> packed(kPanels * kPanel * kInputs), values(17 * kInputs + 256);
        std::vector<float> scales(kPanels * kPanel * (1 + (kInputs + group - 1) / group));
        const LowBitWeight to{packed.data(), scales.data(), bits, group, false, values.data(), int64_t(values.size())};
        kernels.quantize_linear(weight.data(), Element::float32, kOutputs, kInputs, to, 0);
        kernels.linear_quantized({input(), packed.data(), scales.data(), bits, group, false, nullptr, out.data(),
                                  scratch.data(), kRows, kOutputs, kInputs});
        return out == expected;
    }
};

// Experts in blocks of MXFP4. The gate lets every input pass as it is, so that what down multiplies are whole numbers again.
bool multiplies_blocks(const Kernels& kernels) {
    constexpr int64_t kWidth = 64, kBlockBytes = 17, kRowBytes = kWidth / 32 * kBlockBytes;
    const float numbers[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    std::vector<uint8_t> gate_up(2 * kWidth * kRowBytes), down(kWidth * kRowBytes);
    for (auto* blocks : {&gate_up, &down})
        for (size_t i = 0; i < blocks->size(); i += kBlockBytes) (*blocks)[i] = 127;  // 2^0
    const auto put = [&](std::vector<uint8_t>& rows, int64_t row, int64_t k, int code) {
        rows[row * kRowBytes + k / 32 * kBlockBytes + 1 + k % 16] |= code << (k / 16 % 2 * 4);
    };
    std::vector<float> x, expected(kRows * kWidth), out(kRows * kWidth);
    // The first lets gates pass; the second of every 32 makes a group's scale 1.
    for (int64_t i = 0; i < kRows * kWidth; ++i) {
        const int64_t k = i % kWidth;
        x.push_back(k == 0 ? 1 : k % 32 == 1 ? 127 : number(i / kWidth, k, 127, 127));
    }
    for (int64_t row = 0; row < kWidth; ++row) {
        put(gate_up, row, 0, 2);
        put(gate_up, kWidth + row, row, 2);
        for (int64_t k = 0; k < kWidth; ++k) {
            const int code = int((row * 31 + k * 17) % 16);
            put(down, row, k, code);
            for (int64_t r = 0; r < kRows; ++r)
                expected[r * kWidth + row] += x[r * kWidth + k] * (code < 8 ? numbers[code] : -numbers[code - 8]);
        }
    }
    const std::vector<int32_t> chosen(kRows);
    const std::vector<float> weights(kRows, 1.0f);
    const auto part = [&](const std::vector<uint8_t>& rows) {
        return BlockPart{rows.data(), kRowBytes, int64_t(rows.size()) / kRowBytes, BlockType::mxfp4, false};
    };
    const BlockPart parts[] = {part(gate_up), part(down)};
    const auto linear = [&](const BlockPart& of_layer) {
        ExpertLinear layer{};
        layer.parts = &of_layer;
        layer.num_parts = 1;
        layer.n = of_layer.num_rows;
        layer.k = kWidth;
        return layer;
    };
    Experts a{};
    a.x = {x.data(), kWidth};
    a.tokens = kRows;
    a.num_experts = a.num_active = 1;
    a.chosen = chosen.data();
    a.weights = weights.data();
    a.format = ExpertFormat::blocks;
    a.gate = InputOp::relu;
    a.gate_up = linear(parts[0]);
    a.down = linear(parts[1]);
    a.out = {out.data(), kWidth};
    std::vector<char> scratch(kernels.experts_scratch(a));
    a.scratch = scratch.data();
    kernels.experts(a);
    return out == expected;
}

// The last tokens of a sequence. Each head sees one key that outweighs all others by more than floats can hold.
bool attends(const Kernels& kernels, KVElement element) {
    constexpr int64_t kTokens = 3, kContext = 20, kHeads = 2, kHeadDim = 32, kBlockSize = 16, kBlocks = 2;
    std::vector<float> keys(kContext * kHeadDim), values, q(kTokens * kHeads * kHeadDim), out(q.size()), expected;
    for (int64_t i = 0; i < kContext; ++i) keys[i * kHeadDim + i] = 16;
    for (int64_t i = 0; i < kContext * kHeadDim; ++i) values.push_back(number(i / kHeadDim, i % kHeadDim, 127, 127));
    for (int64_t i = 0; i < kTokens * kHeads; ++i) {
        const int64_t seen = kContext - kTokens + i / kHeads - 11 * (i % kHeads);
        q[i * kHeadDim + seen] = 16;
        expected.insert(expected.end(), &values[seen * kHeadDim], &values[seen * kHeadDim] + kHeadDim);
    }
    std::vector<float> key_blocks(kBlocks * kBlockSize * (kHeadDim + kScaleRows)), value_blocks(key_blocks.size());
    std::vector<int32_t> slots;
    const int32_t table[kBlocks] = {1, 0}, query_start_loc[] = {0, kTokens}, seq_lens[] = {kContext};
    for (int32_t i = 0; i < kContext; ++i) slots.push_back(table[i / kBlockSize] * kBlockSize + i % kBlockSize);
    const WorkItem work{0, 0, kTokens, 0, 1, 0, kContext, -1, 0};

    Attention a{};
    a.cache = {key_blocks.data(), value_blocks.data(), element, 1, kHeadDim, kHeadDim, kBlockSize};
    kernels.write_kv({keys.data(), kHeadDim}, {values.data(), kHeadDim}, a.cache, slots.data(), kContext);
    a.q = {q.data(), kHeads * kHeadDim};
    a.out = out.data();
    a.num_heads = kHeads;
    a.query_start_loc = query_start_loc;
    a.seq_lens = seq_lens;
    a.block_tables = table;
    a.block_table_stride = kBlocks;
    a.work = &work;
    a.num_work = a.num_threads = 1;
    a.scale = 1;
    std::vector<float> scratch(kernels.attention_scratch(a));
    a.scratch = scratch.data();
    kernels.attention(a);
    return out == expected;
}

const char* wrong_result(const Kernels& kernels) {
    Product product(127, 127);
    if (!product.of_floats(kernels, Element::float32)) return "a product with float32 weights";
    if (!product.of_floats(kernels, Element::float16)) return "a product with float16 weights";
    if (!product.of_floats(kernels, Element::bfloat16)) return "a product with bfloat16 weights";
    if (!product.of_bits(kernels, 8, 64)) return "a product with int8 weights";
    if (!Product(7, -8).of_bits(kernels, 4, 32)) return "a product with int4 weights";
    if (!multiplies_blocks(kernels)) return "experts in blocks of GGUF";
    if (!attends(kernels, KVElement::float32)) return "attention over float32";
    if (!attends(kernels, KVElement::float16)) return "attention over float16";
    if (!attends(kernels, KVElement::bfloat16)) return "attention over bfloat16";
    if (!attends(kernels, KVElement::int8)) return "attention over int8";
    return nullptr;
}

thread_local sigjmp_buf* way_out = nullptr;

void leave(int signal_number) {
    if (way_out) siglongjmp(*way_out, 1);
    signal(signal_number, SIG_DFL);  // another thread's, who meets it again when this returns
}

}  // namespace

const char* fault_of(const Kernels& kernels) {
    const char* fault = nullptr;
    struct sigaction guard {}, before;
    guard.sa_handler = leave;
    sigaction(SIGILL, &guard, &before);
    // A thread of its own: what it leaves half done, OpenMP's state for it included, ends with it.
    std::thread([&] {
        omp_set_num_threads(1);  // of loops that this thread begins: no other would find the way out
        sigjmp_buf here;
        if (sigsetjmp(here, 1)) {
            fault = "an instruction that this CPU does not have";
            return;
        }
        way_out = &here;
        fault = wrong_result(kernels);
    }).join();
    sigaction(SIGILL, &before, nullptr);
    return fault;
}

}  // namespace quire
