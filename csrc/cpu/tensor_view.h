// From torch's stable tensors to the kernels' plain views, and scratch memory per task.
#pragma once

#include <cstdlib>
#include <memory>

#include "common/check.h"
#include "common/layout.h"
#include "cpu/map_view.h"

namespace sib_fast::cpu {

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      return Element::float32;
  }
}

inline MapView view_of(const Tensor& map) {
  return {map.const_data_ptr(), element_of(map.scalar_type()), map.stride(0), map.stride(1), map.stride(2),
          map.stride(3)};
}

// 64-byte aligned, uninitialised. Null only where memory has run out, which the callers check before they start
// threads.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64), std::free) {
    STD_TORCH_CHECK(data_ != nullptr, "sib_fast: out of memory for ", bytes, " bytes of scratch");
  }
  char* get() const { return static_cast<char*>(data_.get()); }

 private:
  std::unique_ptr<void, void (*)(void*)> data_;
};

}  // namespace sib_fast::cpu
