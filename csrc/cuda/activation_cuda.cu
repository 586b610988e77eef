// The double backward of smooth activations on the GPU: both parts in one pass; formulas in common/activation.h.
//
// Shapes    u, gy, saved: one shape and one dense layout, contiguous or channels last, so one run of `count` elements;
//           to_grad_y, to_saved the same, null where not asked for.
// Launch    256 threads a block, tiles of 256 packs of 16 bytes, grid-stride. A tile that is not whole, and every tile
//           where a tensor does not start at 16 bytes (a view: x[1:]), goes element by element, neighbours by
//           neighbouring threads.
// Traffic   reads u, gy (only for to_saved), saved; writes what is asked: 5 activations. PyTorch composes 26 to 52.
//           [E] on an H200 at 4.3 TB/s: 64×96×56×56 (ConvNeXt-T, stage 1) 0.045 ms in bfloat16, 0.09 ms in float32.
// Precision halves are widened to float where they are read and rounded once where they are written.
// Order     every element by itself: equal inputs give equal bits.
// Twins     cpu/activation_kernels.cpp; ops/activation/__init__.py composes the same; truth: reference.py.

#include "common/activation_ops.h"
#include "cuda/on_cuda.cuh"
#include "cuda/pack.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kActivation = "activation";
constexpr int kActivationThreads = 256;
constexpr int kActivationBlocks = 16;  // a multiprocessor: twice what fits, so that an uneven end is short

struct DeviceMath {
  static constexpr bool has_erf = true;
  // Clamped by comparison, not fminf, which would swallow NaN; at 87 so that 1/(1 + exp) is a normal number.
  static __device__ __forceinline__ float exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    return ::expf(x > 87.0f ? 87.0f : x);
  }
  static __device__ __forceinline__ double exp(double x) {
    x = x < -708.0 ? -708.0 : x;
    return ::exp(x > 708.0 ? 708.0 : x);
  }
  // One step of Newton's on the hardware's: within an ulp, without the call that a division makes.
  static __device__ __forceinline__ float reciprocal(float y) {
    const float r = approximate_reciprocal(y);
    return ::fmaf(r, ::fmaf(-y, r, 1.0f), r);
  }
  static __device__ __forceinline__ double reciprocal(double y) { return 1.0 / y; }
  static __device__ __forceinline__ float erf(float x) { return ::erff(x); }
  static __device__ __forceinline__ double erf(double x) { return ::erf(x); }
};

template <class T>
struct ActivationParameters {
  T a, b;
};

template <class E, class T, Activation kind>
__global__ void __launch_bounds__(kActivationThreads)
    activation_double_backward_kernel(const E* __restrict__ u, const E* __restrict__ gy, const E* __restrict__ saved,
                                      int64_t count, bool aligned, ActivationParameters<T> parameters,
                                      E* __restrict__ to_grad_y, E* __restrict__ to_saved) {
  using Pack = Pack16<E>;
  constexpr int64_t kTile = int64_t{kActivationThreads} * Pack::kCount;
  for (int64_t tile = blockIdx.x * kTile; tile < count; tile += gridDim.x * kTile) {
    const bool packed = aligned && tile + kTile <= count;
    // Packed: a thread's elements lie side by side. Otherwise neighbouring threads have neighbouring elements.
    const int64_t begin = tile + static_cast<int64_t>(threadIdx.x) * (packed ? Pack::kCount : 1);
    const int64_t end = tile + kTile < count ? tile + kTile : count;
    Pack v, g, s, first, second;
    if (packed) {
      v = *reinterpret_cast<const Pack*>(u + begin);
      s = *reinterpret_cast<const Pack*>(saved + begin);
      if (to_saved != nullptr) g = *reinterpret_cast<const Pack*>(gy + begin);
    } else {
#pragma unroll
      for (int k = 0; k < Pack::kCount; ++k) {
        const int64_t i = begin + k * kActivationThreads;
        if (i >= end) break;
        v.value[k] = u[i];
        s.value[k] = saved[i];
        if (to_saved != nullptr) g.value[k] = gy[i];
      }
    }
#pragma unroll
    for (int k = 0; k < Pack::kCount; ++k) {
      T y = T(0), x;
      const T wide = static_cast<T>(v.value[k]);
      activation_double_backward<kind, DeviceMath>(static_cast<T>(s.value[k]), wide, wide * static_cast<T>(g.value[k]),
                                                   parameters.a, parameters.b, y, x);
      first.value[k] = static_cast<E>(y);
      second.value[k] = static_cast<E>(x);
    }
    if (packed) {
      if (to_grad_y != nullptr) store_pack(to_grad_y + begin, first);
      if (to_saved != nullptr) store_pack(to_saved + begin, second);
      continue;
    }
#pragma unroll
    for (int k = 0; k < Pack::kCount; ++k) {
      const int64_t i = begin + k * kActivationThreads;
      if (i >= end) break;
      if (to_grad_y != nullptr) to_grad_y[i] = first.value[k];
      if (to_saved != nullptr) to_saved[i] = second.value[k];
    }
  }
}

struct ActivationKernels : OnCuda {
  static constexpr bool kHasErf = DeviceMath::has_erf;

  template <class E>
  static void double_backward(const Tensor& u, const Tensor& gy, const Tensor& saved, Activation kind, double a,
                              double b, Tensor& to_grad_y, Tensor& to_saved) {
    using T = Compute<E>;
    const ActivationParameters<T> parameters{static_cast<T>(a), static_cast<T>(b)};
    const int64_t count = saved.numel();
    E *first = out<E>(to_grad_y), *second = out<E>(to_saved);
    const bool aligned = start_at_packs({in<E>(u), in<E>(gy), in<E>(saved), first, second});
    const int64_t tiles = divide_up(count, int64_t{kActivationThreads} * Pack16<E>::kCount);
    const int64_t most = blocks_for(saved, kActivationBlocks);
    const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
    with_activation(kind, [&](auto k) {
      launch(kActivation, activation_double_backward_kernel<E, T, decltype(k)::value>, grid, dim3(kActivationThreads),
             0, current_stream(saved), in<E>(u), in<E>(gy), in<E>(saved), count, aligned, parameters, first, second);
    });
  }
};

}  // namespace

SIB_CUDA_LIBRARY(m) { ActivationOps<ActivationKernels>::implement(m); }

}  // namespace sib_fast::cuda
