// What common/arguments.h asks of a device.
#pragma once

#include "common/arguments.h"
#include "cuda/platform.cuh"

namespace sib_fast::cuda {

struct OnCuda {
  using BFloat16 = torch::headeronly::BFloat16;
  using Half = torch::headeronly::Half;
  struct Guard : DeviceGuard {
    explicit Guard(const Tensor& x) : DeviceGuard(x.get_device_index()) {}
  };
};

}  // namespace sib_fast::cuda
