// Layers of experts.

#include <algorithm>
#include <memory>
#include <new>

#include "input_op.h"
#include "packed_weights.h"

namespace quire::bindings {
namespace {

const char* const kExpertFormats[] = {"float32", "float16", "bfloat16", "int8", "int4"};  // as ExpertFormat

const float* bias_of_experts(const std::optional<Tensor>& bias, int64_t num_experts, int64_t n) {
    return bias ? Argument("bias", *bias).of(kFloat32).shaped({num_experts, n}).contiguous().pointer<float>() : nullptr;
}

// The dense layer [n, k] of every expert, packed as `format` says.
ExpertLinear expert_linear(const char* name, ExpertFormat format, int64_t num_experts, int64_t n, int64_t k,
                           const Tensor& packed, const std::optional<Tensor>& scales, int64_t group, bool rotates,
                           const std::optional<Tensor>& bias) {
    const Argument weight(name, packed);
    const int64_t panels = (n + kPanel - 1) / kPanel, pairs = (k + kPairOfSteps - 1) / kPairOfSteps;
    ExpertLinear layer{};
    layer.weight = weight.pointer<char>();
    layer.group = std::min(group, pairs * kPairOfSteps);
    layer.rotates = rotates;
    layer.n = n;
    layer.k = k;
    layer.bias = bias_of_experts(bias, num_experts, n);
    if (format <= ExpertFormat::bfloat16) {
        const Element element = element_of(weight);
        if (int(element) != int(format)) weight.fail(kExpertFormats[int(format)], dtype_text(weight.dtype()));
        weight.shaped({num_experts, panels, packed_depth(element, k), kPanel}).contiguous();
        layer.weight_bytes = panels * packed_depth(element, k) * kPanel * weight.dtype().bits / 8;
        return layer;
    }
    const int bits = format == ExpertFormat::bits8 ? 8 : 4;
    if (k > kMostInputs) weight.fail("at most " + std::to_string(kMostInputs) + " inputs", std::to_string(k));
    if (group < 1 || (group < k && group % 32))
        weight.fail("groups of a multiple of 32 inputs, or one of all",
                    std::to_string(k) + " inputs in groups of " + std::to_string(group));
    weight.of(kUint8).shaped({num_experts, panels, pairs, bits / 4, kPanel, 4}).contiguous();
    if (!scales) weight.fail("scales", "none");
    const Argument scale("scales", *scales);
    check_scales(scale, bits, {num_experts, panels, groups_of(k, group), kPanel});
    layer.weight_bytes = panels * pairs * bits / 4 * kPanel * 4;
    layer.scales = scale.pointer<char>();
    layer.scale_bytes = panels * kPanel * (2 * groups_of(k, group) + (bits == 4 ? 4 : 0));
    return layer;
}

// The same of codes.
ExpertLinear coded_experts(const Coded& weight, int64_t num_experts, int64_t n, int64_t k, const std::optional<Tensor>& bias) {
    ExpertLinear layer{};
    layer.coded = coded_weight(weight, n, k, num_experts);
    const int64_t panels = (n + kPanel - 1) / kPanel;
    const bool bytes = layer.coded.kind == CodeKind::integers8 || layer.coded.kind == CodeKind::float8;
    layer.weight_bytes = panels * ((k + 7) / 8) * (bytes ? 8 : 4) * kPanel;
    layer.scale_bytes = panels * groups_of(k, std::get<6>(weight)) * kPanel * Argument("scales", std::get<3>(weight)).dtype().bits / 8;
    if (const auto& order = std::get<7>(weight)) {
        layer.order = Argument("order", *order).of(kInt32).shaped({num_experts, k}).contiguous().pointer<int32_t>();
        check_order(layer.order, num_experts * k, k);
    }
    layer.n = n;
    layer.k = k;
    layer.bias = bias_of_experts(bias, num_experts, n);
    return layer;
}

// The same of blocks. `parts` keeps what the layer points to.
ExpertLinear block_experts(const Blocks& weight, int64_t num_experts, int64_t n, int64_t k, const std::optional<Tensor>& bias,
                           std::vector<BlockPart>& parts) {
    const auto& [rows, types, both_digits, interleaved] = weight;
    if (rows.empty() || rows.size() != types.size()) throw std::invalid_argument("rows: expected one for each type");
    int64_t num_rows = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
        parts.push_back(block_part(rows[i], types[i], interleaved, k, num_experts));
        num_rows += parts.back().num_rows;
    }
    if (num_rows != n) Argument("rows", rows[0]).fail(std::to_string(n) + " rows in all", std::to_string(num_rows));
    ExpertLinear layer{};
    layer.parts = parts.data();
    layer.num_parts = int64_t(parts.size());
    layer.both_digits = both_digits;
    layer.n = n;
    layer.k = k;
    layer.bias = bias_of_experts(bias, num_experts, n);
    return layer;
}

// x, chosen, weights, gate, alpha, limit and the inner size.
using ExpertArguments = std::tuple<Tensor, Tensor, Tensor, std::string, float, float, int64_t>;

// Everything but the weights.
Experts experts_of(const ExpertArguments& arguments, int64_t num_experts, const Tensor& out) {
    const auto& [x, chosen, weights, gate, alpha, limit, inner] = arguments;
    Experts a{};
    const Argument input("x", x), ids("chosen", chosen), weight("weights", weights), output("out", out);
    a.x = input.of(kFloat32).shaped({kAny, kAny}).contiguous(1).rows();
    a.tokens = input.size(0);
    a.num_active = ids.of(kInt32).shaped({a.tokens, kAny}).contiguous().size(1);
    a.chosen = ids.pointer<int32_t>();
    a.weights = weight.of(kFloat32).shaped({a.tokens, a.num_active}).contiguous().pointer<float>();
    a.out = output.of(kFloat32).shaped({a.tokens, input.size(1)}).contiguous(1).rows();
    a.gate = input_op(gate);
    if (!is_gate(a.gate)) throw std::invalid_argument("gate: '" + gate + "' is none");
    a.alpha = alpha;
    a.limit = limit;
    if (inner < 1) throw std::invalid_argument("inner: expected at least 1, found " + std::to_string(inner));
    a.num_experts = num_experts;
    for (int64_t i = 0; i < a.tokens * a.num_active; ++i)
        if (a.chosen[i] < 0 || a.chosen[i] >= a.num_experts)
            ids.fail("experts 0 to " + std::to_string(a.num_experts - 1), std::to_string(a.chosen[i]));
    return a;
}

void run_experts(Experts& a) {
    nb::gil_scoped_release release;
    constexpr std::align_val_t cache_line{64};
    struct Release {
        void operator()(void* p) const { ::operator delete(p, cache_line); }
    };
    const std::unique_ptr<void, Release> scratch(::operator new(kernels->experts_scratch(a), cache_line));
    a.scratch = static_cast<char*>(scratch.get());
    kernels->experts(a);
}

void experts(const ExpertArguments& arguments, const std::string& format, bool rotates, const Tensor& gate_up,
             std::optional<Tensor> gate_up_scales, int64_t gate_up_group, std::optional<Tensor> gate_up_bias,
             const Tensor& down, std::optional<Tensor> down_scales, int64_t down_group, std::optional<Tensor> down_bias,
             const Tensor& out) {
    const auto known = std::find(std::begin(kExpertFormats), std::end(kExpertFormats), format);
    if (known == std::end(kExpertFormats)) throw std::invalid_argument("format: no experts are stored as '" + format + "'");
    Experts a = experts_of(arguments, Argument("gate_up", gate_up).size(0), out);
    const int64_t inner = std::get<6>(arguments), hidden = Argument("out", out).size(1);
    a.format = ExpertFormat(known - std::begin(kExpertFormats));
    a.gate_up = expert_linear("gate_up", a.format, a.num_experts, 2 * inner, hidden, gate_up, gate_up_scales, gate_up_group,
                              rotates, gate_up_bias);
    a.down = expert_linear("down", a.format, a.num_experts, hidden, inner, down, down_scales, down_group, rotates, down_bias);
    run_experts(a);
}

void experts_coded(const ExpertArguments& arguments, const Coded& gate_up, std::optional<Tensor> gate_up_bias,
                   const Coded& down, std::optional<Tensor> down_bias, const Tensor& out) {
    Experts a = experts_of(arguments, Argument("gate_up", std::get<0>(gate_up)).size(0), out);
    const int64_t inner = std::get<6>(arguments), hidden = Argument("out", out).size(1);
    a.format = ExpertFormat::coded;
    a.gate_up = coded_experts(gate_up, a.num_experts, 2 * inner, hidden, gate_up_bias);
    a.down = coded_experts(down, a.num_experts, hidden, inner, down_bias);
    run_experts(a);
}

void experts_blocks(const ExpertArguments& arguments, const Blocks& gate_up, std::optional<Tensor> gate_up_bias,
                    const Blocks& down, std::optional<Tensor> down_bias, const Tensor& out) {
    const std::vector<Tensor>& rows = std::get<0>(gate_up);
    if (rows.empty()) throw std::invalid_argument("rows: expected one for each type");
    Experts a = experts_of(arguments, Argument("rows", rows[0]).size(0), out);
    const int64_t inner = std::get<6>(arguments), hidden = Argument("out", out).size(1);
    std::vector<BlockPart> gate_up_parts, down_parts;
    a.format = ExpertFormat::blocks;
    a.gate_up = block_experts(gate_up, a.num_experts, 2 * inner, hidden, gate_up_bias, gate_up_parts);
    a.down = block_experts(down, a.num_experts, hidden, inner, down_bias, down_parts);
    run_experts(a);
}

}  // namespace

void bind_experts(nb::module_& m) {
    m.def("experts", &experts, nb::arg("tokens"), nb::arg("format"), nb::arg("rotates"), nb::arg("gate_up"),
          nb::arg("gate_up_scales").none(), nb::arg("gate_up_group"), nb::arg("gate_up_bias").none(), nb::arg("down"),
          nb::arg("down_scales").none(), nb::arg("down_group"), nb::arg("down_bias").none(), nb::arg("out"));
    m.def("experts_coded", &experts_coded, nb::arg("tokens"), nb::arg("gate_up"), nb::arg("gate_up_bias").none(),
          nb::arg("down"), nb::arg("down_bias").none(), nb::arg("out"));
    m.def("experts_blocks", &experts_blocks, nb::arg("tokens"), nb::arg("gate_up"), nb::arg("gate_up_bias").none(),
          nb::arg("down"), nb::arg("down_bias").none(), nb::arg("out"));
}

}  // namespace quire::bindings
