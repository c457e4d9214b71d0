// Names of what is done to the input of a layer.

#include "input_op.h"

#include <algorithm>

namespace quire::bindings {

static const char* const kInputOps[] = {
    "none", "rms_norm", "silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu",
    "plain_silu", "plain_gelu", "plain_gelu_tanh", "plain_relu", "plain_relu2"};  // as InputOp

InputOp input_op(const std::string& name) {
    const auto known = std::find(std::begin(kInputOps), std::end(kInputOps), name);
    if (known == std::end(kInputOps)) throw std::invalid_argument("op: no input is made by '" + name + "'");
    return InputOp(known - std::begin(kInputOps));
}

}  // namespace quire::bindings
