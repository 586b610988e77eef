// Small kernels with a known answer or a planted mistake: tests/cuda/test_emulation.py checks the emulation with them.
// torch.ops.sib_fast_emulated._probe(float32 [32·k], number) -> float32 of the same shape.
// torch.ops.sib_fast_emulated._record(any tensor, on) -> int64 [launches, 5].
#pragma once

#include "cuda/platform.cuh"

namespace sib_fast::cuda {
namespace probes {

constexpr const char* kOp = "probe";

// Through shared memory to the mirrored place. Without its barrier a thread may read before the other has written.
template <bool kBarrier>
__global__ void mirror_kernel(const float* x, float* y) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Every block writes the same place: which one is last is nobody's promise.
__global__ void last_writer_kernel(float* y) { y[threadIdx.x] = static_cast<float>(blockIdx.x); }

__global__ void unwritten_shared_kernel(float* y) { y[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }

__global__ void divergent_kernel(float* y) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  y[threadIdx.x] = 1;
}

__global__ void outside_mask_kernel(float* y) { y[threadIdx.x] = __shfl_sync(0x1u, y[threadIdx.x], 0); }

// Two groups of copies, of which `Pending` may still be under way.
template <int Pending>
__global__ void copy_kernel(const float* x, float* y) {
  float* shared = dynamic_shared<float>();
  const bool first_half = threadIdx.x < blockDim.x / 2;
  if (first_half) copy_async_4(shared + threadIdx.x, x + threadIdx.x);
  copy_async_commit();
  if (!first_half) copy_async_4(shared + threadIdx.x, x + threadIdx.x, threadIdx.x + 1 < blockDim.x);
  copy_async_commit();
  copy_async_wait<Pending>();
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

// In turn by lane: each collective of the platform on the lane's own value.
__global__ void collectives_kernel(const float* x, float* y) {
  constexpr unsigned kAll = 0xffffffffu;
  const float v = x[threadIdx.x];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned whole = static_cast<unsigned>(lane);
  const float answers[] = {__shfl_sync(kAll, v, 5),
                           __shfl_xor_sync(kAll, v, 3),
                           __shfl_up_sync(kAll, v, 2),
                           __shfl_down_sync(kAll, v, 2),
                           static_cast<float>(__popc(__ballot_sync(kAll, lane < 7))),
                           static_cast<float>(__reduce_add_sync(kAll, whole)),
                           static_cast<float>(__reduce_max_sync(kAll, whole)),
                           static_cast<float>(__popc(__match_any_sync(kAll, whole / 4)))};
  y[threadIdx.x] = answers[lane % 8];
}

// Half a warp meets while the other half has left.
__global__ void half_warp_kernel(const float* x, float* y) {
  if (threadIdx.x % 32 >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1);
}

// One element before or behind its shared memory.
__global__ void outside_shared_kernel(const float* x, float* y, int64_t at) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) shared[at] = x[0];
  y[threadIdx.x] = shared[threadIdx.x];
}

// a·b - 1 whose product needs more digits than a float has: -2^-46 where one rounding is made, 0 where two are.
__global__ void contraction_kernel(float* y) {
  const float a = 1.0f + y[threadIdx.x] * 0.0f + 0x1p-23f, b = 2.0f - a;
  y[threadIdx.x] = a * b - 1.0f;
}

inline Tensor probe(Tensor x, int64_t number) {
  SIB_CHECK(kOp, x.scalar_type() == ScalarType::Float && x.is_contiguous(), "x must be float32 and contiguous");
  Tensor result = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* out = static_cast<float*>(result.mutable_data_ptr());
  const dim3 threads(static_cast<unsigned>(x.numel()));
  const int64_t bytes = x.numel() * 4;
  for (int64_t i = 0; i < x.numel(); ++i) out[i] = -1;
  switch (number) {
    case 0:
      launch(kOp, mirror_kernel<true>, dim3(1), threads, bytes, Stream(), in, out);
      break;
    case 1:
      launch(kOp, mirror_kernel<false>, dim3(1), threads, bytes, Stream(), in, out);
      break;
    case 2:
      launch(kOp, last_writer_kernel, dim3(64), threads, 0, Stream(), out);
      break;
    case 3:
      launch(kOp, unwritten_shared_kernel, dim3(1), threads, bytes, Stream(), out);
      break;
    case 4:
      launch(kOp, divergent_kernel, dim3(1), threads, 0, Stream(), out);
      break;
    case 5:
      launch(kOp, outside_mask_kernel, dim3(1), threads, 0, Stream(), out);
      break;
    case 6:
      launch(kOp, copy_kernel<0>, dim3(1), threads, bytes, Stream(), in, out);
      break;
    case 7:
      launch(kOp, copy_kernel<1>, dim3(1), threads, bytes, Stream(), in, out);
      break;
    case 8:
      launch(kOp, copy_kernel<2>, dim3(1), threads, bytes, Stream(), in, out);
      break;
    case 9:
      launch(kOp, collectives_kernel, dim3(1), threads, 0, Stream(), in, out);
      break;
    case 10:
      launch(kOp, half_warp_kernel, dim3(1), threads, 0, Stream(), in, out);
      break;
    case 11:
      launch(kOp, mirror_kernel<true>, dim3(1), threads, 100 * 1024, Stream(), in, out);
      break;
    case 12:
      launch(kOp, outside_shared_kernel, dim3(1), threads, bytes, Stream(), in, out, int64_t{-1});
      break;
    case 13:
      launch(kOp, outside_shared_kernel, dim3(1), threads, bytes, Stream(), in, out, x.numel());
      break;
    case 14:
      launch(kOp, contraction_kernel, dim3(1), threads, 0, Stream(), out);
      break;
    default:
      SIB_CHECK(kOp, false, "number must be 0 … 14, got ", number);
  }
  return result;
}

// What was recorded until now, int64 [launches, 5]; from now on launches are recorded and not run, or run again.
inline Tensor record(Tensor x, bool on) {
  emulation::Recorder& recorder = emulation::recorder;
  const int64_t count = static_cast<int64_t>(recorder.launches.size());
  const Tensor result = torch::stable::new_empty(x, {count / recorder.kFields, recorder.kFields}, ScalarType::Long);
  std::copy(recorder.launches.begin(), recorder.launches.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  recorder.launches.clear();
  recorder.on = on;
  return result;
}

}  // namespace probes
}  // namespace sib_fast::cuda
