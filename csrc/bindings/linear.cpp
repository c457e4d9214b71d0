// Dense layers, the packing of their weights, and rows of packed weights.

#include <algorithm>

#include <omp.h>

#include "input_op.h"
#include "operations.h"
#include "packed_weights.h"

namespace quire::bindings {
namespace {

void pack_linear(const Tensor& weight, const Tensor& packed, int64_t first_row) {
    const Argument source("weight", weight), target("packed", packed);
    source.shaped({kAny, kAny}).contiguous();
    target.shaped({kAny, packed_depth(element_of(target), source.size(1)), kPanel}).contiguous();
    if (first_row < 0 || first_row + source.size(0) > target.size(0) * kPanel)
        source.fail("rows " + std::to_string(first_row) + " to at most " + std::to_string(target.size(0) * kPanel),
                    std::to_string(source.size(0)) + " rows");
    const Element from = element_of(source), to = element_of(target);
    nb::gil_scoped_release release;
    kernels->pack_linear(source.pointer<void>(), from, source.size(0), source.size(1), target.pointer<void>(), to, first_row);
}

// The input [m, k] of a dense layer, made of x as `op` says; m and k are what x has.
LinearInput linear_input(const Tensor& x, const std::string& op, const std::optional<Tensor>& residual,
                         const std::optional<Tensor>& norm_weight, float eps, int64_t& m, int64_t& k) {
    LinearInput made{{}, input_op(op), nullptr, nullptr, eps};
    if (made.op == InputOp::clamped_swiglu) throw std::invalid_argument("op: clamped_swiglu gates experts only");
    const Argument input("x", x);
    made.x = input.of(kFloat32).shaped({kAny, kAny}).contiguous(1).rows();
    m = input.size(0);
    k = input.size(1);
    if (made.op == InputOp::rms_norm) {
        if (!norm_weight) throw std::invalid_argument("norm_weight: expected one for rms_norm, found none");
        made.norm_weight = vector_of_floats("norm_weight", *norm_weight, k);
        if (residual)
            made.residual = Argument("residual", *residual).of(kFloat32).shaped({m, k}).contiguous().pointer<float>();
    } else if (is_gate(made.op)) {
        if (k % 2) input.fail("two halves of columns", std::to_string(k));
        k /= 2;
    }
    return made;
}

}  // namespace

void linear(const Tensor& x, const std::string& op, std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
            float eps, const Tensor& packed, std::optional<Tensor> bias, const Tensor& out) {
    Linear a{};
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    const Argument weight("packed", packed), output("out", out);
    output.of(kFloat32).shaped({a.m, kAny}).contiguous();
    a.n = output.size(1);
    a.element = element_of(weight);
    weight.shaped({(a.n + kPanel - 1) / kPanel, packed_depth(a.element, a.k), kPanel}).contiguous();
    a.weight = weight.pointer<void>();
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    a.out = output.pointer<float>();
    if (a.m == 0) return;
    a.scratch = scratch_of(2 * a.m * a.k);
    nb::gil_scoped_release release;
    kernels->linear(a);
}

namespace {

void quantize_groups(const Tensor& x, int64_t group, bool rotates, const Tensor& bytes, const Tensor& scales) {
    const Argument input("x", x), output("bytes", bytes), scale("scales", scales);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), k = input.size(1);
    output.of(kInt8).shaped({rows, (k + kPairOfSteps - 1) / kPairOfSteps * kPairOfSteps}).contiguous();
    check_group(group, k, rotates);
    scale.of(kFloat32).shaped({rows, groups_of(k, group)}).contiguous();
    nb::gil_scoped_release release;
    kernels->quantize_groups(input.rows(), rows, k, std::min(group, k), rotates, output.pointer<void>(), scale.pointer<float>());
}

void quantize_linear(const Tensor& weight, const Tensor& packed, const Tensor& scales, int bits, int64_t group,
                     bool rotates, int64_t first_row) {
    const Argument source("weight", weight), target("packed", packed);
    source.shaped({kAny, kAny}).contiguous();
    LowBitWeight to = low_bit_weight(packed, scales, bits, group, rotates, source.size(1));
    if (first_row < 0 || first_row + source.size(0) > target.size(0) * kPanel)
        source.fail("rows " + std::to_string(first_row) + " to at most " + std::to_string(target.size(0) * kPanel),
                    std::to_string(source.size(0)) + " rows");
    const Element from = element_of(source);
    to.scratch = reinterpret_cast<uint8_t*>(scratch_of(omp_get_max_threads() * to.scratch_bytes / sizeof(float)));
    nb::gil_scoped_release release;
    kernels->quantize_linear(source.pointer<void>(), from, source.size(0), source.size(1), to, first_row);
}

}  // namespace

void linear_quantized(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                      std::optional<Tensor> norm_weight, float eps, const Tensor& packed, const Tensor& scales,
                      int bits, int64_t group, bool rotates, std::optional<Tensor> bias, const Tensor& out) {
    LowBitLinear a{};
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    const Argument output("out", out);
    output.of(kFloat32).shaped({a.m, kAny}).contiguous();
    a.n = output.size(1);
    const LowBitWeight checked = low_bit_weight(packed, scales, bits, group, rotates, a.k);
    Argument("packed", packed).shaped({(a.n + kPanel - 1) / kPanel, kAny, kAny, kAny, kAny});
    a.weight = checked.weight;
    a.scales = checked.scales;
    a.bits = bits;
    a.group = checked.group;
    a.rotates = rotates;
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    a.out = output.pointer<float>();
    if (a.m == 0) return;
    const int64_t row = (a.k + kPairOfSteps - 1) / kPairOfSteps * kPairOfSteps / 4;
    a.scratch = scratch_of(a.m * (row + 2 * groups_of(a.k, a.group)) + omp_get_max_threads() * (row + a.k));
    nb::gil_scoped_release release;
    kernels->linear_quantized(a);
}

namespace {

void linear_coded(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                  std::optional<Tensor> norm_weight, float eps, const Coded& weight, std::optional<Tensor> bias,
                  const Tensor& out) {
    CodedLinear a{};
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    const Argument output("out", out);
    output.of(kFloat32).shaped({a.m, kAny}).contiguous();
    a.n = output.size(1);
    a.weight = coded_weight(weight, a.n, a.k);
    if (const auto& order = std::get<7>(weight)) {
        a.order = vector_of_indices("order", *order, a.k);
        check_order(a.order, a.k, a.k);
    }
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    a.out = output.pointer<float>();
    if (a.m == 0) return;
    a.scratch = scratch_of(a.m * (2 * a.k + a.k / 8 + 1));
    nb::gil_scoped_release release;
    kernels->linear_coded(a);
}

// Indices of rows of a packed weight; checks that all of them exist.
const int32_t* row_ids(const Tensor& ids, const Argument& packed, int64_t count) {
    const int32_t* id = vector_of_indices("ids", ids, count);
    for (int64_t i = 0; i < count; ++i)
        if (id[i] < 0 || id[i] >= packed.size(0) * kPanel)
            throw std::invalid_argument("ids: expected rows 0 to " + std::to_string(packed.size(0) * kPanel - 1) +
                                        ", found " + std::to_string(id[i]));
    return id;
}

void gather_rows(const Tensor& packed, const Tensor& ids, const Tensor& out) {
    const Argument weight("packed", packed), output("out", out);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const Element element = element_of(weight);
    weight.shaped({kAny, packed_depth(element, output.size(1)), kPanel}).contiguous();
    const int32_t* id = row_ids(ids, weight, output.size(0));
    nb::gil_scoped_release release;
    kernels->gather_rows(weight.pointer<void>(), element, output.size(1), id, output.size(0), output.pointer<float>());
}

void gather_rows_quantized(const Tensor& packed, const Tensor& scales, int bits, int64_t group, bool rotates, const Tensor& ids,
                           const Tensor& out) {
    const Argument weight("packed", packed), output("out", out);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const LowBitWeight from = low_bit_weight(packed, scales, bits, group, rotates, output.size(1));
    const int32_t* id = row_ids(ids, weight, output.size(0));
    nb::gil_scoped_release release;
    kernels->gather_rows_quantized(from, output.size(1), id, output.size(0), output.pointer<float>());
}

void interleave_rows(const Tensor& rows, const std::string& type_name, const Tensor& out) {
    const Argument blocks("rows", rows), output("out", out);
    const BlockSizes sizes = sizes_of_block(block_type(type_name));
    const int64_t num_rows = blocks.of(kUint8).shaped({kAny, kAny}).contiguous().size(0), row_bytes = blocks.size(1);
    if (num_rows % kInterleavedRows || row_bytes % sizes.bytes)
        blocks.fail("a multiple of " + std::to_string(kInterleavedRows) + " rows of whole blocks of " + type_name,
                    std::to_string(num_rows) + " of " + std::to_string(row_bytes) + " bytes");
    uint8_t* const to = output.of(kUint8).shaped({num_rows, row_bytes}).contiguous().pointer<uint8_t>();
    nb::gil_scoped_release release;
    interleave_blocks(blocks.pointer<uint8_t>(), num_rows, row_bytes, sizes, to);
}

void linear_blocks(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                   std::optional<Tensor> norm_weight, float eps, const std::vector<Tensor>& rows,
                   const std::vector<std::string>& types, bool both_digits, bool interleaved, std::optional<Tensor> bias,
                   const Tensor& out) {
    BlockLinear a{};
    a.both_digits = both_digits;
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    if (rows.empty() || rows.size() != types.size()) throw std::invalid_argument("rows: expected one for each type");
    std::vector<BlockPart> parts;
    for (size_t i = 0; i < rows.size(); ++i) {
        parts.push_back(block_part(rows[i], types[i], interleaved, a.k));
        a.n += parts.back().num_rows;
    }
    a.parts = parts.data();
    a.num_parts = int64_t(parts.size());
    a.out = Argument("out", out).of(kFloat32).shaped({a.m, a.n}).contiguous().pointer<float>();
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    if (a.m == 0) return;
    a.scratch = bytes_of_scratch(kernels->blocks_scratch(a.m, a.k));
    nb::gil_scoped_release release;
    kernels->linear_blocks(a);
}

void gather_rows_blocks(const Tensor& rows, const std::string& type_name, bool interleaved, const Tensor& ids,
                        const Tensor& out) {
    const Argument output("out", out), blocks("rows", rows), wanted("ids", ids);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const int64_t k = output.size(1), count = output.size(0);
    const BlockPart from = block_part(rows, type_name, interleaved, k);
    const int32_t* id = wanted.of(kInt32).shaped({count}).contiguous().pointer<int32_t>();
    for (int64_t i = 0; i < count; ++i)
        if (id[i] < 0 || id[i] >= from.num_rows)
            wanted.fail("ids of 0 to " + std::to_string(from.num_rows - 1), std::to_string(id[i]));
    char* const scratch = bytes_of_scratch(kernels->gather_scratch(k));
    nb::gil_scoped_release release;
    kernels->gather_rows_blocks(from, k, id, count, output.pointer<float>(), scratch);
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("pack_linear", &pack_linear, nb::arg("weight"), nb::arg("packed"), nb::arg("first_row"));
    m.def("linear", &linear, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(), nb::arg("norm_weight").none(),
          nb::arg("eps"), nb::arg("packed"), nb::arg("bias").none(), nb::arg("out"));
    m.def("quantize_groups", &quantize_groups, nb::arg("x"), nb::arg("group_size"), nb::arg("rotates"), nb::arg("bytes"),
          nb::arg("scales"));
    m.def("quantize_linear", &quantize_linear, nb::arg("weight"), nb::arg("packed"), nb::arg("scales"),
          nb::arg("bits"), nb::arg("group_size"), nb::arg("rotates"), nb::arg("first_row"));
    m.def("linear_quantized", &linear_quantized, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(),
          nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("packed"), nb::arg("scales"), nb::arg("bits"),
          nb::arg("group_size"), nb::arg("rotates"), nb::arg("bias").none(), nb::arg("out"));
    m.def("linear_coded", &linear_coded, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(),
          nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"));
    m.def("linear_blocks", &linear_blocks, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(),
          nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("rows"), nb::arg("types"),
          nb::arg("both_digits"), nb::arg("interleaved"), nb::arg("bias").none(), nb::arg("out"));
    m.def("gather_rows", &gather_rows, nb::arg("packed"), nb::arg("ids"), nb::arg("out"));
    m.def("gather_rows_quantized", &gather_rows_quantized, nb::arg("packed"), nb::arg("scales"), nb::arg("bits"),
          nb::arg("group_size"), nb::arg("rotates"), nb::arg("ids"), nb::arg("out"));
    m.def("gather_rows_blocks", &gather_rows_blocks, nb::arg("rows"), nb::arg("type"), nb::arg("interleaved"),
          nb::arg("ids"), nb::arg("out"));
    m.def("interleave_blocks", &interleave_rows, nb::arg("rows"), nb::arg("type"), nb::arg("out"));
    m.attr("panel") = kPanel;
    m.attr("pair_of_steps") = kPairOfSteps;
}

}  // namespace quire::bindings
