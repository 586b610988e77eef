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

#include <tuple>

#include "common/activation.h"
#include "common/layout.h"
#include "cuda/pack.cuh"
#include "cuda/platform.cuh"

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

template <class E, class T>
std::tuple<Tensor, Tensor> run_activation(const Tensor& u, const Tensor& gy, const Tensor& saved, Activation kind,
                                          ActivationParameters<T> parameters, bool need_grad_y, bool need_saved) {
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(saved) : torch::stable::new_empty(u, {0});
  Tensor to_saved = need_saved ? torch::stable::empty_like(saved) : torch::stable::new_empty(u, {0});
  const int64_t count = saved.numel();
  if (count == 0 || !(need_grad_y || need_saved)) return {to_grad_y, to_saved};
  const auto in = [](const Tensor& t) { return static_cast<const E*>(t.const_data_ptr()); };
  const auto out = [](const Tensor& t, bool need) { return need ? static_cast<E*>(t.mutable_data_ptr()) : nullptr; };
  E *first = out(to_grad_y, need_grad_y), *second = out(to_saved, need_saved);
  const bool aligned = start_at_packs({in(u), in(gy), in(saved), first, second});
  const int64_t tiles = divide_up(count, int64_t{kActivationThreads} * Pack16<E>::kCount);
  const int64_t most = int64_t{kActivationBlocks} * device_of(saved).multiprocessors;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
  with_activation(kind, [&](auto k) {
    launch(kActivation, activation_double_backward_kernel<E, T, decltype(k)::value>, grid, dim3(kActivationThreads), 0,
           current_stream(saved), in(u), in(gy), in(saved), count, aligned, parameters, first, second);
  });
  return {to_grad_y, to_saved};
}

std::tuple<Tensor, Tensor> cuda_activation_double_backward(Tensor u, Tensor grad_y, Tensor saved, int64_t kind,
                                                           double a, double b, bool need_grad_y, bool need_saved) {
  SIB_CHECK(kActivation, kind >= 0 && kind < kActivations, "kind must be a number of common/activation.h, got ", kind);
  SIB_CHECK(kActivation, is_supported(saved.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  const bool channels_last = saved.dim() > 2 && !lies(saved, false);
  check_alike(kActivation, "x", saved, saved, channels_last);
  check_alike(kActivation, "u", u, saved, channels_last);
  check_alike(kActivation, "grad_y", grad_y, saved, channels_last);
  const DeviceGuard guard(saved.get_device_index());
  const auto which = static_cast<Activation>(kind);
  const ActivationParameters<float> single{static_cast<float>(a), static_cast<float>(b)};
  switch (saved.scalar_type()) {
    case ScalarType::Double:
      return run_activation<double, double>(u, grad_y, saved, which, {a, b}, need_grad_y, need_saved);
    case ScalarType::BFloat16:
      return run_activation<torch::headeronly::BFloat16>(u, grad_y, saved, which, single, need_grad_y, need_saved);
    case ScalarType::Half:
      return run_activation<torch::headeronly::Half>(u, grad_y, saved, which, single, need_grad_y, need_saved);
    default:
      return run_activation<float>(u, grad_y, saved, which, single, need_grad_y, need_saved);
  }
}

}  // namespace

SIB_CUDA_LIBRARY(m) { m.impl("_activation_double_backward", TORCH_BOX(&cuda_activation_double_backward)); }

}  // namespace sib_fast::cuda
