// Where a token is stored: slot → element offset in a contiguous or paged cache.
#pragma once

#include "host_device.h"

namespace vpt {

struct CacheLayout {
  int64_t pages, page_size;                      // a contiguous cache is one page
  int64_t page_stride, row_stride, head_stride;  // in elements

  VPT_HD int64_t capacity() const { return pages * page_size; }
  VPT_HD bool holds(int64_t slot) const { return slot >= 0 && slot < capacity(); }
  VPT_HD int64_t offset(int64_t slot, int64_t head) const {
    return (slot / page_size) * page_stride + (slot % page_size) * row_stride + head * head_stride;
  }
};

}  // namespace vpt
