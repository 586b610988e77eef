// The double backward of softmax along rows on the GPU: both parts while a row is in registers; the passes are those of
// row_passes.cuh.
//
// Formulas  common/softmax.h.
// Launches  one; rows of more than 768 packs of 16 bytes three.
// Traffic   reads u, gy (only for to_y), y; writes what is asked: 5 activations, and 3 more for long rows.
// Precision halves are widened to float where they are read and rounded once where they are written; sums of at most 8
//           products in float, all others in double.
// Order     as row_passes.cuh says: equal inputs give equal bits.
// Twins     cpu/softmax_kernels.cpp; ops/softmax/__init__.py composes the same; truth: reference.py.

#include "common/softmax.h"
#include "common/softmax_ops.h"
#include "cuda/on_cuda.cuh"
#include "cuda/row_passes.cuh"

namespace sib_fast::cuda::softmax {
namespace {

constexpr const char* kOp = "softmax";

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
    to[0] = softmax_to_grad_y(v[0], v[2], k[0]);
    to[1] = softmax_to_y(v[0], v[1], k[0], k[1]);
  }
};

struct Kernels : OnCuda {
  template <class E>
  static void double_backward(int64_t count, int64_t length, const Tensor& u, const Tensor& grad_y, const Tensor& y,
                              Tensor& to_grad_y, Tensor& to_y) {
    rows::Arguments<Second<E>> a{};
    a.out[0] = out<E>(to_grad_y);
    a.out[1] = out<E>(to_y);
    a.in[0] = in<E>(u);
    a.in[1] = a.out[1] ? in<E>(grad_y) : nullptr;
    a.in[2] = in<E>(y);
    rows::cut(a, count, length, 1, length, 2, 2);
    if (rows::held(a.at)) {
      rows::run_held(kOp, current_stream(y), a);
    } else {
      Tensor partial = new_double(y, {0});
      rows::run_units<Second<E>, false>(kOp, current_stream(y), y, a, partial, true);
    }
  }
};

}  // namespace
}  // namespace sib_fast::cuda::softmax

namespace sib_fast::cuda {

SIB_CUDA_LIBRARY(m) { SoftmaxOps<softmax::Kernels>::implement(m); }

}  // namespace sib_fast::cuda
