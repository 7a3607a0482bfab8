// Which position row rotates which channel of M-RoPE.
#pragma once

#include "host_device.h"

namespace vpt {

// Half-dimensions per position row. Chunked (Qwen2-VL): t, then h, then w of them in a row. Interleaved (Qwen3-VL):
// t h w t h w …, where the h and w of an exhausted section fall to t.
struct Sections {
  int64_t t, h, w;
  bool interleaved;

  VPT_HD int64_t half() const { return t + h + w; }
  VPT_HD int axis(int64_t i) const {
    if (!interleaved) return i < t ? 0 : i < t + h ? 1 : 2;
    if (i % 3 == 1 && i < 3 * h) return 1;
    if (i % 3 == 2 && i < 3 * w) return 2;
    return 0;
  }
};

}  // namespace vpt
