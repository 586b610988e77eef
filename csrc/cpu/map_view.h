// A [N, C, H, W] tensor as the kernels see it: any strides, any of the four element types. Plain data.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace sib_fast::cpu {

struct MapView {
  const void* data;
  Element element;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
};

}  // namespace sib_fast::cpu
