// A [N, C, H, W] tensor as the kernels see it: any strides, any of the four element types. Plain data.
#pragma once

#include <cstdint>

namespace sib_fast::cpu {

enum class Element { float64, float32, bfloat16, float16 };

struct MapView {
  const void* data;
  Element element;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
};

inline int64_t element_size(Element e) { return e == Element::float64 ? 8 : e == Element::float32 ? 4 : 2; }

}  // namespace sib_fast::cpu
