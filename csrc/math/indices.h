// An int32 or int64 index vector with a stride.
#pragma once

#include "host_device.h"

namespace vpt {

struct Indices {
  const void* base;
  int64_t stride, offset;  // in elements
  bool wide;               // int64

  VPT_HD int64_t operator[](int64_t i) const {
    const int64_t at = offset + i * stride;
    return wide ? static_cast<const int64_t*>(base)[at] : static_cast<const int32_t*>(base)[at];
  }
};

}  // namespace vpt
