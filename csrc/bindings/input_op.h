// Names of what is done to the input of a layer.
#pragma once

#include "argument.h"

namespace quire::bindings {

InputOp input_op(const std::string& name);

}  // namespace quire::bindings
