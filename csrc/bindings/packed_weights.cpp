// Checks of packed weights.

#include "packed_weights.h"

#include <algorithm>
#include <utility>

namespace quire::bindings {

int64_t packed_depth(Element element, int64_t k) { return element == Element::bfloat16 ? (k + 1) / 2 * 2 : k; }

int64_t groups_of(int64_t k, int64_t group) { return (k + group - 1) / group; }

void check_group(int64_t group, int64_t k, bool rotates) {
    if (rotates && group != kRotated)
        throw std::invalid_argument("group_size: expected " + std::to_string(kRotated) +
                                    ", what a rotation mixes, found " + std::to_string(group));
    if (group < 1 || (group < k && group % 32))
        throw std::invalid_argument("group_size: expected a multiple of 32, or at least the " + std::to_string(k) +
                                    " inputs, found " + std::to_string(group));
}

void check_scales(const Argument& scales, int bits, std::vector<int64_t> shape) {
    if (bits == 4) {
        shape[shape.size() - 2] += 2;
        shape.push_back(2);
    }
    scales.of(bits == 4 ? kUint8 : kBfloat16).shaped(shape).contiguous();
}

LowBitWeight low_bit_weight(const Tensor& packed, const Tensor& scales, int bits, int64_t group, bool rotates, int64_t k) {
    const Argument weight("packed", packed), scale("scales", scales);
    if (bits != 8 && bits != 4) throw std::invalid_argument("bits: expected 8 or 4, found " + std::to_string(bits));
    if (k > kMostInputs)
        throw std::invalid_argument("weight: expected at most " + std::to_string(kMostInputs) + " inputs, found " +
                                    std::to_string(k));
    check_group(group, k, rotates);
    const int64_t pairs = (k + kPairOfSteps - 1) / kPairOfSteps;
    weight.of(kUint8).shaped({kAny, pairs, bits / 4, kPanel, 4}).contiguous();
    check_scales(scale, bits, {weight.size(0), groups_of(k, group), kPanel});
    const int64_t depth = pairs * kPairOfSteps;
    return {weight.pointer<uint8_t>(), scale.pointer<void>(), bits, std::min(group, depth), rotates, nullptr, 17 * depth + 256};
}

static const char* const kCodeKinds[] = {"table", "integers4", "integers8", "float8"};  // as CodeKind

CodedWeight coded_weight(const Coded& parts, int64_t n, int64_t k, std::optional<int64_t> num_experts) {
    const auto& [codes, kind, levels, scales, offsets, zero_points, group, order] = parts;
    const auto shape = [&](std::vector<int64_t> of_one) {
        if (num_experts) of_one.insert(of_one.begin(), *num_experts);
        return of_one;
    };
    CodedWeight w{};
    const auto known = std::find(std::begin(kCodeKinds), std::end(kCodeKinds), kind);
    if (known == std::end(kCodeKinds)) throw std::invalid_argument("kind: no codes are called '" + kind + "'");
    w.kind = CodeKind(known - std::begin(kCodeKinds));
    const size_t num_levels = w.kind == CodeKind::table ? 16 : w.kind == CodeKind::float8 ? 0 : 1;
    if (levels.size() != num_levels)
        throw std::invalid_argument("levels: expected " + std::to_string(num_levels) + ", found " + std::to_string(levels.size()));
    if (w.kind == CodeKind::table) std::copy(levels.begin(), levels.end(), w.levels);
    else if (num_levels) w.zero = levels[0];
    if (group < 1 || (group < k && group % 8))
        throw std::invalid_argument("group_size: expected a multiple of 8, or at least the " + std::to_string(k) +
                                    " inputs, found " + std::to_string(group));
    const int64_t panels = (n + kPanel - 1) / kPanel;
    const int64_t words = w.kind == CodeKind::integers8 || w.kind == CodeKind::float8 ? 2 : 1;
    const Argument code("codes", codes), scale("scales", scales);
    w.codes = code.of(kUint8).shaped(shape({panels, (k + 7) / 8, words, kPanel, 4})).contiguous().pointer<uint8_t>();
    w.scale_element = element_of(scale);
    w.scales = scale.shaped(shape({panels, groups_of(k, group), kPanel})).contiguous().pointer<void>();
    if (offsets)
        w.offsets = Argument("offsets", *offsets).of(scale.dtype()).shaped(shape({panels, groups_of(k, group), kPanel})).contiguous().pointer<void>();
    w.zero_points = zero_points;
    w.group = std::min<int64_t>(group, (k + 7) / 8 * 8);
    return w;
}

void check_order(const int32_t* order, int64_t count, int64_t k) {
    for (int64_t i = 0; i < count; ++i)
        if (order[i] < 0 || order[i] >= k)
            throw std::invalid_argument("order: expected inputs below " + std::to_string(k) + ", found " + std::to_string(order[i]));
}

static const std::pair<const char*, BlockType> kBlockTypes[] = {
    {"Q4_0", BlockType::q4_0}, {"Q4_1", BlockType::q4_1}, {"Q5_0", BlockType::q5_0},     {"Q5_1", BlockType::q5_1},
    {"Q8_0", BlockType::q8_0}, {"Q2_K", BlockType::q2_k}, {"Q3_K", BlockType::q3_k},     {"Q4_K", BlockType::q4_k},
    {"Q5_K", BlockType::q5_k}, {"Q6_K", BlockType::q6_k}, {"IQ4_NL", BlockType::iq4_nl}, {"IQ4_XS", BlockType::iq4_xs},
    {"MXFP4", BlockType::mxfp4}};

BlockSizes sizes_of_block(BlockType type) {
    switch (type) {
        case BlockType::q4_0: case BlockType::iq4_nl: return {32, 18};
        case BlockType::q4_1: return {32, 20};
        case BlockType::q5_0: return {32, 22};
        case BlockType::q5_1: return {32, 24};
        case BlockType::q8_0: return {32, 34};
        case BlockType::q2_k: return {256, 84};
        case BlockType::q3_k: return {256, 110};
        case BlockType::q4_k: return {256, 144};
        case BlockType::q5_k: return {256, 176};
        case BlockType::q6_k: return {256, 210};
        case BlockType::iq4_xs: return {256, 136};
        case BlockType::mxfp4: break;
    }
    return {32, 17};
}

BlockType block_type(const std::string& type_name) {
    const auto* known = std::find_if(std::begin(kBlockTypes), std::end(kBlockTypes),
                                     [&](const auto& each) { return each.first == type_name; });
    if (known == std::end(kBlockTypes)) throw std::invalid_argument("type: expected one of GGUF's, found " + type_name);
    return known->second;
}

BlockPart block_part(const Tensor& rows, const std::string& type_name, bool interleaved, int64_t k,
                     std::optional<int64_t> num_experts) {
    const Argument blocks("rows", rows);
    const BlockType type = block_type(type_name);
    const auto [numbers, bytes] = sizes_of_block(type);
    if (k % numbers) throw std::invalid_argument("x: expected a multiple of " + std::to_string(numbers) +
                                                 " columns for " + type_name + ", found " + std::to_string(k));
    const int64_t row_bytes = k / numbers * bytes;
    blocks.of(kUint8);
    if (num_experts) blocks.shaped({*num_experts, kAny, row_bytes}).contiguous();
    else blocks.shaped({kAny, row_bytes}).contiguous();
    const int64_t num_rows = blocks.size(num_experts ? 1 : 0);
    if (interleaved && num_rows % kInterleavedRows)
        blocks.fail("a multiple of " + std::to_string(kInterleavedRows) + " interleaved rows", std::to_string(num_rows));
    return {blocks.pointer<uint8_t>(), row_bytes, num_rows, type, interleaved};
}

}  // namespace quire::bindings
