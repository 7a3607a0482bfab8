// Which position row turns which channel: chunked M-RoPE (Qwen2-VL), sections in half-dimensions.
#pragma once

#include "host_device.h"

namespace vpt {

struct Sections {
  int64_t t, h, w;

  VPT_HD int64_t half() const { return t + h + w; }
  // First half-dimension of block `axis`, and the end of the last.
  VPT_HD int64_t begin(int axis) const { return axis == 0 ? 0 : axis == 1 ? t : axis == 2 ? t + h : t + h + w; }
};

}  // namespace vpt
