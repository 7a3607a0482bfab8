// The implementations, one source file per operator and backend.
#pragma once

#include "calls/append_visual_kv.h"
#include "calls/control_cross_attention.h"
#include "stable.h"

namespace vpt::cpu {
#include "signatures.inc"
}

namespace vpt::cuda {
#include "signatures.inc"
}
