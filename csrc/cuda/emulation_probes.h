// Small kernels with a known answer or a planted mistake: tests/cuda/test_emulation.py checks the emulation with them.
// torch.ops.sib_fast_emulated._probe(float32 [32·k], number) -> float32 of the same shape.
// torch.ops.sib_fast_emulated._record(any tensor, on) -> int64 [launches, 5]; _banks likewise -> int64 [launches, 6].
#pragma once

#include "cuda/pack.cuh"

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

__global__ void outside_mask_kernel(float* y) { y[threadIdx.x] = __shfl_xor_sync(0x1u, y[threadIdx.x], 0); }

// Two groups of copies, of which `Pending` may still be under way.
template <int Pending>
__global__ void copy_kernel(const float* x, float* y) {
  float* shared = dynamic_shared<float>();
  const bool first_half = threadIdx.x < blockDim.x / 2;
  if (first_half) copy_async<4>(shared + threadIdx.x, x + threadIdx.x);
  copy_async_commit();
  if (!first_half) copy_async<4>(shared + threadIdx.x, x + threadIdx.x, threadIdx.x + 1 < blockDim.x);
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
  const float answers[] = {__shfl_xor_sync(kAll, v, 3), __shfl_up_sync(kAll, v, 2),
                           static_cast<float>(__popc(__ballot_sync(kAll, lane < 7)))};
  y[threadIdx.x] = answers[lane % 3];
}

// Packs of four floats, `pitch` floats apart, written and read.
__global__ void banks_kernel(const float* x, float* y, int pitch) {
  float* shared = dynamic_shared<float>();
  share_pack(shared + threadIdx.x * pitch, Pack<float, 4>{{x[threadIdx.x]}});
  y[threadIdx.x] = load_pack<4>(shared + threadIdx.x * pitch).value[0];
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
    case 15:
      launch(kOp, banks_kernel, dim3(1), threads, 4 * bytes, Stream(), in, out, 4);
      break;
    case 16:
      launch(kOp, banks_kernel, dim3(1), threads, 16 * bytes, Stream(), in, out, 16);
      break;
    default:
      SIB_CHECK(kOp, false, "number must be 0 … 16, got ", number);
  }
  return result;
}

// Rows of what was recorded, which is then forgotten.
inline Tensor rows_of(const Tensor& like, std::vector<int64_t>& recorded, int64_t fields) {
  const int64_t rows = static_cast<int64_t>(recorded.size()) / fields;
  const Tensor result = torch::stable::new_empty(like, {rows, fields}, ScalarType::Long);
  std::copy(recorded.begin(), recorded.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  recorded.clear();
  return result;
}
// What was recorded until now, int64 [launches, 5]; from now on launches are recorded and not run, or run again.
inline Tensor record(Tensor x, bool on) {
  emulation::recorder.on = on;
  return rows_of(x, emulation::recorder.launches, emulation::Recorder::kFields);
}
// What was counted until now, int64 [launches, 6]: of copies, reads and writes the transfers and the times they take.
inline Tensor banks(Tensor x, bool on) {
  emulation::banks.on = on;
  return rows_of(x, emulation::banks.launches, emulation::Banks::kFields);
}

}  // namespace probes
}  // namespace sib_fast::cuda
