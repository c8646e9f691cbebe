// Lower: which ops of a program run as one. Fusing changes when a value is computed, never what it is.
#pragma once

#include "program.h"

namespace jilju {

// A norm goes into the linear that alone reads it, and a gate's activation into the linear that makes gate and up, wherever
// all parts of that linear are packed.
void fuse(Program* program);

}  // namespace jilju
