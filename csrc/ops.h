// The implementations, one source file per operator and backend.
#pragma once

#include "stable.h"

namespace vpt::cpu {
#include "signatures.inc"
}

namespace vpt::cuda {
#include "signatures.inc"
}
