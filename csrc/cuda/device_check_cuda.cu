// device_check: the smallest kernel that proves the CUDA path: built, loaded, launched on the current stream, checked.
//
//   y = 2·x + 1
//
// Shapes    x, y float32, contiguous, any number of elements.
// Launch    256 threads a block, one element a thread; current stream of x's device.

#include "cuda/platform.cuh"

namespace sib_fast::cuda {
namespace {

__global__ void device_check_kernel(const float* __restrict__ x, float* __restrict__ y, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = 2.0f * x[i] + 1.0f;
}

Tensor device_check(Tensor x) {
  SIB_CHECK("device_check", x.scalar_type() == ScalarType::Float && x.is_contiguous(),
            "x must be float32 and contiguous");
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  const int64_t count = x.numel();
  constexpr int kThreads = 256;
  launch("device_check", device_check_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)),
         dim3(kThreads), 0, current_stream(x), static_cast<const float*>(x.const_data_ptr()),
         static_cast<float*>(y.mutable_data_ptr()), count);
  return y;
}

}  // namespace

SIB_CUDA_LIBRARY(m) { m.impl("_device_check", TORCH_BOX(&device_check)); }

}  // namespace sib_fast::cuda
