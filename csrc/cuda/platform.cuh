// What every kernel file includes: CUDA itself under nvcc, or the emulation (cuda/emulation.h) under a host compiler.
//
// The kernels are compiled twice from the same text. The emulation runs every thread of a block as a fibre on the CPU,
// so that tests, `make test` and CI check kernels, launchers and orders of launches on machines without a GPU. Rules
// for code that must compile both ways:
//   shared memory   `T* s = sib_fast::cuda::dynamic_shared<T>()`, sized by launch(); no __shared__ declarations
//   launches        launch(op, kernel, grid, block, shared_bytes, stream, arguments…); no <<<>>>
//   half types      torch::headeronly::Half and BFloat16, which convert on both sides
//   collectives     __syncthreads, __syncwarp, __shfl_xor_sync, __shfl_up_sync, __ballot_sync, the copy_async_* and
//                   *_mma functions below; anything else gets a twin in emulation.h first
#pragma once

#include <cstdint>

#include "common/check.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <set>
#include <utility>

#define SIB_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sib_fast, CUDA, m)

namespace sib_fast::cuda {

using Stream = cudaStream_t;
using torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

struct Device {
  int multiprocessors;
  int capability;        // 10·major + minor
  int64_t block_shared;  // bytes of shared memory that one block may ask for
};

// Asked of the driver once a process and device: the attributes never change.
inline const Device& device_at(int index) {
  static std::mutex one_at_a_time;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, what, index);
    SIB_CHECK("cuda", error == cudaSuccess, "device ", index, " does not answer: ", cudaGetErrorString(error));
    return value;
  };
  const int capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  const Device device{ask(cudaDevAttrMultiProcessorCount), capability, ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  return known.emplace(index, device).first->second;
}
inline const Device& device_of(const Tensor& tensor) { return device_at(tensor.get_device_index()); }

// Lets the blocks of `kernel` have as much shared memory as the device offers, once a kernel and device. Not as much as
// a launch asks for: another host thread could lower that between the setting and the launch.
inline void allow_shared(const char* op, const void* kernel, int64_t bytes) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  SIB_CHECK(op, error == cudaSuccess, "no current device: ", cudaGetErrorString(error));
  const int64_t limit = device_at(index).block_shared;
  SIB_CHECK(op, bytes <= limit, "a block may not have ", bytes, " bytes of shared memory here, at most ", limit);
  static std::mutex one_at_a_time;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (allowed.count({kernel, index}) != 0) return;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
  SIB_CHECK(op, error == cudaSuccess, "a block may not have ", limit,
            " bytes of shared memory here: ", cudaGetErrorString(error));
  allowed.insert({kernel, index});
}

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char sib_fast_dynamic_shared[];
  return reinterpret_cast<T*>(sib_fast_dynamic_shared);
}

// Launches and checks. An empty grid is no launch: CUDA refuses it, and there is nothing to do.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, Stream stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  SIB_CHECK(op, error == cudaSuccess, "launch failed: ", cudaGetErrorString(error));
}

// Bytes (4, 8 or 16) from global to shared memory past the registers; `valid` false writes zeros. Seen after
// copy_async_wait and a barrier. In L1 too: what a block reads again, and all that is shorter than 16 bytes.
template <int Bytes, bool InL1 = Bytes != 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 16 || ((Bytes == 4 || Bytes == 8) && InL1), "cp.async has no such copy");
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? Bytes : 0;
  if constexpr (InL1)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(bytes), "n"(Bytes)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` committed groups are under way.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 16 bytes in one store. As PTX, since nvcc 13.0 takes a store of a struct apart where another branch writes its parts.
__device__ __forceinline__ void store_16(void* global, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// What the emulation looks at: that a pack lies on its boundary, and in which banks of shared memory a warp meets.
enum class Access { copy, read, write };
__device__ __forceinline__ void expect_access(Access, const void*, int) {}

// 1/y within one ulp for normal y and 1/y.
__device__ __forceinline__ float approximate_reciprocal(float y) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  return r;
}

// d += a·b for one warp: a 16×8 row-major, b 8×8 column-major, d 16×8 float32. Lane l holds, with g = l/4, t = l%4:
// a = (g, t), (g+8, t), (g, t+4), (g+8, t+4); b = (t, g), (t+4, g); d = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a to tf32's 11 bits, to nearest, in two instructions where cvt.rna.tf32 takes five (it sets NaN and Inf apart; here
// NaN stays NaN, and beyond 4e34, where no Gram is finite, Inf may become NaN). 8193·a rounded is a multiple of 2^13
// units of a, and so is 8192·a: their difference is a, rounded.
__device__ __forceinline__ float nearest_tf32(float a) { return __fmaf_rn(a, -8192.0f, __fmul_rn(a, 8193.0f)); }

// acc (MT×NT fragments of 4) += a·b over 8 products, for one warp; fragments as mma_m16n8k8_tf32 has them. The tensor
// cores read the upper 19 bits of an operand: small parts are cut there, which is 2^-22 of a, of either sign.
template <int MT, int NT>
__device__ __forceinline__ void warp_mma(float (&acc)[4 * MT * NT], const float (&a)[4 * MT], const float (&b)[2 * NT],
                                         bool split) {
  float a_big[4 * MT], b_big[2 * NT];
#pragma unroll
  for (int i = 0; i < 4 * MT; ++i) a_big[i] = nearest_tf32(a[i]);
#pragma unroll
  for (int i = 0; i < 2 * NT; ++i) b_big[i] = nearest_tf32(b[i]);
  const auto product = [&](const float (&left)[4 * MT], const float (&right)[2 * NT]) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const uint32_t rows[4] = {__float_as_uint(left[4 * m]), __float_as_uint(left[4 * m + 1]),
                                __float_as_uint(left[4 * m + 2]), __float_as_uint(left[4 * m + 3])};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint32_t columns[2] = {__float_as_uint(right[2 * n]), __float_as_uint(right[2 * n + 1])};
        float* d = acc + 4 * (m * NT + n);
        float sum[4] = {d[0], d[1], d[2], d[3]};
        mma_m16n8k8_tf32(sum, rows, columns);
        d[0] = sum[0], d[1] = sum[1], d[2] = sum[2], d[3] = sum[3];
      }
    }
  };
  if (split) {
    float a_small[4 * MT], b_small[2 * NT];
#pragma unroll
    for (int i = 0; i < 4 * MT; ++i) a_small[i] = a[i] - a_big[i];
#pragma unroll
    for (int i = 0; i < 2 * NT; ++i) b_small[i] = b[i] - b_big[i];
    product(a_small, b_big);
    product(a_big, b_small);
  }
  product(a_big, b_big);
}

}  // namespace sib_fast::cuda

#else

#include "cuda/emulation.h"

#define SIB_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sib_fast_emulated, CPU, m)

#endif

namespace sib_fast::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that make `rounds` of the device's multiprocessors: what cuts of the work aim at. Every cut, and with it every
// bit, then depends on the shape and on the number of multiprocessors, and on nothing else.
inline int64_t blocks_for(const Tensor& tensor, int64_t rounds) { return rounds * device_of(tensor).multiprocessors; }

constexpr int kMaxStages = 5;
// Waits until at most `pending` of this thread's committed groups are under way, 0 … kMaxStages - 2.
__device__ __forceinline__ void copy_async_wait(int pending) {
  switch (pending) {
    case 1:
      return copy_async_wait<1>();
    case 2:
      return copy_async_wait<2>();
    case 3:
      return copy_async_wait<3>();
    default:
      return copy_async_wait<0>();
  }
}

}  // namespace sib_fast::cuda
