// The rows that a dense layer multiplies: as they are given, or made on the way from what came before the layer, so that
// a norm or a gated activation is never written to memory and read again.
#pragma once

#include "elementwise.h"
#include "kernels.h"

namespace quire::QUIRE_ISA {

// x [2 k], or [k] without a gate -> made [k], which may be x. Only a clamped gate has an alpha and a limit.
static void make_activated_row(InputOp op, float alpha, float limit, const float* x, int64_t k, float* made) {
    switch (op) {
        case InputOp::silu: return gate_row<Times<Silu>>(x, made, k);
        case InputOp::gelu: return gate_row<Times<Gelu>>(x, made, k);
        case InputOp::gelu_tanh: return gate_row<Times<GeluTanh>>(x, made, k);
        case InputOp::relu: return gate_row<Times<Relu>>(x, made, k);
        case InputOp::relu2: return gate_row<Times<SquaredRelu>>(x, made, k);
        case InputOp::clamped_swiglu: return gate_row(x, made, k, ClampedSwiglu{alpha, limit});
        case InputOp::plain_silu: return activate_row<Silu>(x, made, k);
        case InputOp::plain_gelu: return activate_row<Gelu>(x, made, k);
        case InputOp::plain_gelu_tanh: return activate_row<GeluTanh>(x, made, k);
        case InputOp::plain_relu: return activate_row<Relu>(x, made, k);
        case InputOp::plain_relu2: return activate_row<SquaredRelu>(x, made, k);
        case InputOp::none: case InputOp::rms_norm: return;  // no activations
    }
}

// Row `row` of an input of k columns: where it lies, or in `made`, which has room for it.
QUIRE_INLINE const float* input_row(const LinearInput& input, int64_t row, int64_t k, float* made) {
    const float* x = input.x.data + row * input.x.stride;
    if (input.op == InputOp::none) return x;
    if (input.op == InputOp::rms_norm)
        rms_norm_row(x, input.residual ? input.residual + row * k : nullptr, input.norm_weight, input.eps, made, k);
    else
        make_activated_row(input.op, 0, 0, x, k, made);
    return made;
}

}  // namespace quire::QUIRE_ISA
