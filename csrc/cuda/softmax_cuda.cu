// The double backward of softmax along rows on the GPU: both parts while a row is in registers; the passes are those of
// row_passes.cuh.
//
//   grad_x = y·(gy - c),  c = Σ y·gy;   given u, the cotangent of grad_x, with b = Σ y·u:
//     to gy  y·(u - b)      to y  u·(gy - c) - b·gy
//
// Launches  one; rows of more than 768 packs of 16 bytes three.
// Traffic   reads u, gy (only for to_y), y; writes what is asked: 5 activations, and 3 more for long rows.
// Precision halves are widened to float where they are read and rounded once where they are written; sums of at most 8
//           products in float, all others in double.
// Order     as row_passes.cuh says: equal inputs give equal bits.
// Twins     cpu/softmax_kernels.cpp; ops/softmax/__init__.py composes the same; truth: reference.py.

#include <tuple>

#include "cuda/row_passes.cuh"

namespace sib_fast::cuda::softmax {
namespace {

constexpr const char* kOp = "softmax";

using packs::Compute;
using rows::Centre;

// Inputs u, gy, y.
template <class E>
struct Second {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kInputs = 3, kOutputs = 2, kSums = 2, kCoefficients = 2, kParameters = 0, kSumParameters = 0;
  struct Rows {};

  static __device__ __forceinline__ double absent(int) { return 0.0; }
  static __device__ __forceinline__ Centre<T> centre(const Rows&, int64_t, const E*) { return {T(0), T(0)}; }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], const T (&)[kParameters + 1][M], int, int,
                                             const Centre<T>&, double (&sums)[kSums]) {
    T b = T(0), c = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      b += v[2][i] * v[0][i];
      c += v[2][i] * v[1][i];
    }
    sums[0] += static_cast<double>(b);
    sums[1] += static_cast<double>(c);
  }

  static __device__ __forceinline__ void coefficients(const Rows&, int64_t, const Centre<T>&,
                                                      const double (&sums)[kSums], bool, T (&k)[kCoefficients]) {
    k[0] = static_cast<T>(sums[0]);
    k[1] = static_cast<T>(sums[1]);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = v[2] * (v[0] - k[0]);
    to[1] = v[0] * (v[1] - k[1]) - k[0] * v[1];
  }
};

template <class E>
std::tuple<Tensor, Tensor> run(const Tensor& u, const Tensor& grad_y, const Tensor& y, bool need_grad_y, bool need_y) {
  const DeviceGuard guard(y.get_device_index());
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  Tensor to_y = need_y ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0 || !(need_grad_y || need_y)) return {to_grad_y, to_y};
  const int64_t length = y.size(y.dim() - 1);
  rows::Arguments<Second<E>> a{};
  a.in[0] = static_cast<const E*>(u.const_data_ptr());
  a.in[1] = need_y ? static_cast<const E*>(grad_y.const_data_ptr()) : nullptr;
  a.in[2] = static_cast<const E*>(y.const_data_ptr());
  a.out[0] = need_grad_y ? static_cast<E*>(to_grad_y.mutable_data_ptr()) : nullptr;
  a.out[1] = need_y ? static_cast<E*>(to_y.mutable_data_ptr()) : nullptr;
  rows::cut(a, y.numel() / length, length, 1, length, 2, 2);
  if (rows::held(a.at)) {
    rows::run_held(kOp, current_stream(y), a);
  } else {
    Tensor partial = torch::stable::new_empty(y, {0}, ScalarType::Double);
    rows::run_units<Second<E>, false>(kOp, current_stream(y), y, a, partial, true);
  }
  return {to_grad_y, to_y};
}

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor u, Tensor grad_y, Tensor y, bool need_grad_y, bool need_y) {
  SIB_CHECK(kOp, is_supported(y.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  SIB_CHECK(kOp, y.dim() >= 1, "x must have a last dimension");
  for (const auto& [name, tensor] : {std::tuple<const char*, const Tensor&>{"u", u}, {"grad_y", grad_y}, {"x", y}}) {
    SIB_CHECK(kOp, tensor.numel() == y.numel() && tensor.is_contiguous(), name,
              " must be contiguous, in the shape of x");
    SIB_CHECK(kOp, tensor.scalar_type() == y.scalar_type(), name, " must have the dtype of x");
  }
  switch (y.scalar_type()) {
    case ScalarType::Double:
      return run<double>(u, grad_y, y, need_grad_y, need_y);
    case ScalarType::BFloat16:
      return run<torch::headeronly::BFloat16>(u, grad_y, y, need_grad_y, need_y);
    case ScalarType::Half:
      return run<torch::headeronly::Half>(u, grad_y, y, need_grad_y, need_y);
    default:
      return run<float>(u, grad_y, y, need_grad_y, need_y);
  }
}

}  // namespace
}  // namespace sib_fast::cuda::softmax

namespace sib_fast::cuda {

SIB_CUDA_LIBRARY(m) { m.impl("_softmax_double_backward", TORCH_BOX(&softmax::softmax_double_backward)); }

}  // namespace sib_fast::cuda
