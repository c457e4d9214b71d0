// Names of what is done to the input of a layer.
#pragma once

#include "argument.h"

namespace quire::bindings {

InputOp input_op(const std::string& name);

// Whether the input has two halves, which become one.
inline bool is_gate(InputOp op) { return op >= InputOp::silu && op <= InputOp::clamped_swiglu; }

}  // namespace quire::bindings
