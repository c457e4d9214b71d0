// The rows that a dense layer multiplies: as they are given, or made on the way from what came before the layer, so that
// a norm or a gated activation is never written to memory and read again.
#pragma once

#include "elementwise.h"
#include "kernels.h"

namespace quire::QUIRE_ISA {

// Row `row` of an input of k columns: where it lies, or in `made`, which has room for it.
QUIRE_INLINE const float* input_row(const LinearInput& input, int64_t row, int64_t k, float* made) {
    const float* x = input.x.data + row * input.x.stride;
    switch (input.op) {
        case InputOp::none: return x;
        case InputOp::rms_norm:
            rms_norm_row(x, input.residual ? input.residual + row * k : nullptr, input.norm_weight, input.eps, made, k);
            break;
        case InputOp::silu: activate_and_mul_row<Silu>(x, made, k); break;
        case InputOp::gelu: activate_and_mul_row<Gelu>(x, made, k); break;
        case InputOp::gelu_tanh: activate_and_mul_row<GeluTanh>(x, made, k); break;
    }
    return made;
}

}  // namespace quire::QUIRE_ISA
