// From torch's stable tensors to the kernels' plain views, scratch memory, and tasks on torch's threads.
#pragma once

#include <cstdlib>
#include <memory>

#include "common/check.h"
#include "cpu/element_bits.h"
#include "cpu/map_view.h"

namespace sib_fast::cpu {

// What common/arguments.h asks of a device.
struct OnCpu {
  using BFloat16 = BFloat16Bits;
  using Half = Float16Bits;
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
};

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

template <class Task>
void parallel(int64_t tasks, const Task& task) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Elements a task: of float32, three inputs and two outputs stay in a 1 MiB L2.
constexpr int64_t kElementsOfTask = 16384;
// task(first, last) for fixed blocks of what there are `count` of.
template <class Task>
void for_blocks(int64_t count, int64_t block, const Task& task) {
  torch::stable::parallel_for(0, (count + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    task(begin * block, end * block < count ? end * block : count);
  });
}

}  // namespace sib_fast::cpu
