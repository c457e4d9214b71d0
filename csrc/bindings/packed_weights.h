// Checks of packed weights, and the structs that the kernels know them by.
#pragma once

#include "argument.h"

namespace quire::bindings {

// Codes, their kind and levels, scales, offsets, whether those are zero points, the size of a group, and the order of inputs.
using Coded = std::tuple<Tensor, std::string, std::vector<float>, Tensor, std::optional<Tensor>, bool, int64_t, std::optional<Tensor>>;

// Rows of blocks [experts, rows, bytes] of every part, the types of the parts, whether all inputs get both digits, and
// whether rows are interleaved.
using Blocks = std::tuple<std::vector<Tensor>, std::vector<std::string>, bool, bool>;

// Steps along k that a panel has room for.
int64_t packed_depth(Element element, int64_t k);
int64_t groups_of(int64_t k, int64_t group);
void check_group(int64_t group, int64_t k, bool rotates);
// Checks the scales of groups [..., panels, groups, kPanel]: bfloat16, or with 4 bits pairs of bytes, with two more
// groups before each panel's that hold the units.
void check_scales(const Argument& scales, int bits, std::vector<int64_t> shape);
// Checks a packed low-bit weight of k inputs against its scales, and returns it.
LowBitWeight low_bit_weight(const Tensor& packed, const Tensor& scales, int bits, int64_t group, bool rotates, int64_t k);
// Checks a coded weight of k inputs for n outputs; of experts, whose number is the first dimension, if `num_experts` is set.
CodedWeight coded_weight(const Coded& parts, int64_t n, int64_t k, std::optional<int64_t> num_experts = {});
void check_order(const int32_t* order, int64_t count, int64_t k);
BlockSizes sizes_of_block(BlockType type);
BlockType block_type(const std::string& type_name);
// Checks rows of blocks of k numbers, and returns them; of experts, whose number is the first dimension, if `num_experts`
// is set, those of the first one.
BlockPart block_part(const Tensor& rows, const std::string& type_name, bool interleaved, int64_t k,
                     std::optional<int64_t> num_experts = {});

}  // namespace quire::bindings
