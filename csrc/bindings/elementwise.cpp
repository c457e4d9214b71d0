// Operations on rows: norms, rotation, and gates.

#include "operations.h"

namespace quire::bindings {
namespace {

void rms_norm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, float eps, const Tensor& out) {
    const Argument input("x", x), output("out", out);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), columns = input.size(1);
    output.of(kFloat32).shaped({rows, columns}).contiguous();
    const float* scale = vector_of_floats("weight", weight, columns);
    float* total = nullptr;
    if (residual) {
        const Argument sum("residual", *residual);
        total = sum.of(kFloat32).shaped({rows, columns}).contiguous().pointer<float>();
    }
    nb::gil_scoped_release release;
    kernels->rms_norm(input.rows(), total, scale, eps, output.pointer<float>(), rows, columns);
}

}  // namespace

void layer_norm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, std::optional<Tensor> bias, float eps,
                const Tensor& out) {
    const Argument input("x", x), output("out", out);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), columns = input.size(1);
    output.of(kFloat32).shaped({rows, columns}).contiguous();
    const float* scale = vector_of_floats("weight", weight, columns);
    const float* shift = bias ? vector_of_floats("bias", *bias, columns) : nullptr;
    float* total = nullptr;
    if (residual)
        total = Argument("residual", *residual).of(kFloat32).shaped({rows, columns}).contiguous().pointer<float>();
    nb::gil_scoped_release release;
    kernels->layer_norm(input.rows(), total, scale, shift, eps, output.pointer<float>(), rows, columns);
}

namespace {

void rms_norm_heads(const Tensor& x, const Tensor& weight, float eps) {
    const Argument input("x", x);
    input.of(kFloat32).shaped({kAny, kAny, kAny}).contiguous(1);
    const float* scale = vector_of_floats("weight", weight, input.size(2));
    nb::gil_scoped_release release;
    kernels->rms_norm_heads(input.rows(), scale, eps, input.size(0), input.size(1), input.size(2));
}

void rotary(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
    const Argument query("q", q), key("k", k), table("cos_sin", cos_sin);
    query.of(kFloat32).shaped({kAny, kAny, kAny}).contiguous(1);
    const int64_t tokens = query.size(0), head_dim = query.size(2);
    key.of(kFloat32).shaped({tokens, kAny, head_dim}).contiguous(1);
    table.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const int64_t rotary_dim = table.size(1);
    if (rotary_dim > head_dim || rotary_dim % 2)
        table.fail("an even number of columns, at most " + std::to_string(head_dim), std::to_string(rotary_dim));
    const int32_t* position = vector_of_indices("positions", positions, tokens);
    nb::gil_scoped_release release;
    for (const Argument& x : {query, key})
        kernels->rotary(x.rows(), position, table.pointer<float>(), rotary_dim, tokens, x.size(1), head_dim);
}

using Activation = void (*Kernels::*)(Rows, float*, int64_t, int64_t);

template <Activation activation>
void activate_and_mul(const Tensor& x, const Tensor& out) {
    const Argument output("out", out);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const Argument input("x", x);
    input.of(kFloat32).shaped({output.size(0), 2 * output.size(1)}).contiguous(1);
    nb::gil_scoped_release release;
    (kernels->*activation)(input.rows(), output.pointer<float>(), output.size(0), output.size(1));
}

}  // namespace

void bind_elementwise(nb::module_& m) {
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("weight"), nb::arg("eps"),
          nb::arg("out"));
    m.def("layer_norm", &layer_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("weight"), nb::arg("bias").none(),
          nb::arg("eps"), nb::arg("out"));
    m.def("rms_norm_heads", &rms_norm_heads, nb::arg("x"), nb::arg("weight"), nb::arg("eps"));
    m.def("rotary", &rotary, nb::arg("q"), nb::arg("k"), nb::arg("positions"), nb::arg("cos_sin"));
    m.def("silu_and_mul", &activate_and_mul<&Kernels::silu_and_mul>, nb::arg("x"), nb::arg("out"));
    m.def("gelu_and_mul", &activate_and_mul<&Kernels::gelu_and_mul>, nb::arg("x"), nb::arg("out"));
    m.def("gelu_tanh_and_mul", &activate_and_mul<&Kernels::gelu_tanh_and_mul>, nb::arg("x"), nb::arg("out"));
}

}  // namespace quire::bindings
