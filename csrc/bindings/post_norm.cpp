// The layers of an encoder whose norms follow the additions, in one call: with short texts, calls from Python and fresh
// tensors between the operations took a tenth of a step.

#include <algorithm>

#include "operations.h"

namespace quire::bindings {
namespace {

// Packed weight and bias; scales, bits, group and rotation where it is quantised.
using Dense = std::tuple<Tensor, std::optional<Tensor>, std::optional<std::tuple<Tensor, int, int64_t, bool>>>;
// Weight, bias, epsilon.
using Norm = std::tuple<Tensor, std::optional<Tensor>, float>;
// Queries, keys and values side by side; the attention's output and its norm; the MLP's two and its norm.
using Layer = std::tuple<Dense, Dense, Norm, Dense, Dense, Norm>;
// Of the attention plan: query_start_loc, seq_lens, block_tables, work, shared, merges, partials and num_threads.
using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int>;

// Rows, or rows of heads, in memory that another one holds.
class View {
public:
    View(float* data, std::initializer_list<int64_t> shape, int64_t stride) {
        int dims = 0;
        for (const int64_t size : shape) shape_[dims++] = size;
        strides_[dims - 1] = 1;
        for (int i = dims - 1; i > 0; --i) strides_[i - 1] = strides_[i] * shape_[i];
        strides_[0] = stride;
        tensor_.data = data;
        tensor_.device = {nb::device::cpu::value, 0};
        tensor_.ndim = dims;
        tensor_.dtype = kFloat32;
        tensor_.shape = shape_;
        tensor_.strides = strides_;
        tensor_.byte_offset = 0;
    }
    View(const View&) = delete;
    operator const Tensor&() const { return tensor_; }

private:
    int64_t shape_[3], strides_[3];
    Tensor tensor_;
};

void apply(const Dense& dense, const Tensor& x, const std::string& op, const Tensor& out) {
    const auto& [packed, bias, form] = dense;
    if (!form) return linear(x, op, {}, {}, 0, packed, bias, out);
    const auto& [scales, bits, group, rotates] = *form;
    linear_quantized(x, op, {}, {}, 0, packed, scales, bits, group, rotates, bias, out);
}

// Adds `update` to `x`, in place; `out` is the norm of the sum.
void add_norm(const Norm& norm, const Tensor& update, const Tensor& x, const Tensor& out) {
    const auto& [weight, bias, eps] = norm;
    layer_norm(update, x, weight, bias, eps, out);
}

void post_norm_layers(const Tensor& x, const std::vector<Layer>& layers, int64_t num_heads, int64_t inner,
                      const std::string& activation, const Tensor& keys, const Tensor& values, const Tensor& slots,
                      const Plan& plan, float scale, int64_t window, float softcap) {
    const auto& [starts, lengths, tables, work, shared, merges, partials, num_threads] = plan;
    const Argument rows("x", x), cache("keys", keys);
    rows.of(kFloat32).shaped({kAny, kAny}).contiguous();
    cache.shaped({kAny, kAny, kAny, kAny});
    const int64_t tokens = rows.size(0), hidden = rows.size(1), kv_heads = cache.size(1), dim = cache.size(2);
    const int64_t query = num_heads * dim, projected = query + 2 * kv_heads * dim;
    // What attention reads and makes is no longer needed when the MLP begins.
    const int64_t widest = std::max(projected + query, inner);
    float* const memory = activations_of(tokens * (2 * hidden + widest));
    float *const wide = memory + 2 * tokens * hidden, *const out = wide + tokens * projected;
    const View normed(memory, {tokens, hidden}, hidden), update(memory + tokens * hidden, {tokens, hidden}, hidden);
    const View qkv(wide, {tokens, projected}, projected), mixed(out, {tokens, query}, query);
    const View q(wide, {tokens, num_heads, dim}, projected), heads(out, {tokens, num_heads, dim}, query);
    const View k(wide + query, {tokens, kv_heads, dim}, projected);
    const View v(wide + query + kv_heads * dim, {tokens, kv_heads, dim}, projected);
    const View up(wide, {tokens, inner}, inner);
    for (const auto& [qkv_weight, o_weight, attention_norm, up_weight, down_weight, mlp_norm] : layers) {
        apply(qkv_weight, x, "none", qkv);
        write_kv(k, v, keys, values, slots);
        paged_attention(q, keys, values, starts, lengths, tables, work, shared, merges, partials, scale, window, softcap,
                        {}, {}, num_threads, heads);
        apply(o_weight, mixed, "none", update);
        add_norm(attention_norm, update, x, normed);
        apply(up_weight, normed, "none", up);
        apply(down_weight, up, activation, update);
        add_norm(mlp_norm, update, normed, x);
    }
}

}  // namespace

void bind_post_norm(nb::module_& m) {
    m.def("post_norm_layers", &post_norm_layers, nb::arg("x"), nb::arg("layers"), nb::arg("num_heads"), nb::arg("inner"),
          nb::arg("activation"), nb::arg("keys"), nb::arg("values"), nb::arg("slots"), nb::arg("plan"), nb::arg("scale"),
          nb::arg("window"), nb::arg("softcap"));
}

}  // namespace quire::bindings
