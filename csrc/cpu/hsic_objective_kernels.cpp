// hsic_objective on the CPU, one row of the Grams at a time (SPEC 5 and 6).
//
//   K_ij = G_ij/(n_i n_j)      (ZKZ)_ij = K_ij - mean_i - mean_j + grand mean      (symmetric: row = column means)
//   grad_K_R = scale·Z K_x Z   grad_G_R,ij = grad_K_R,ij/(n_i n_j) - [i = j]·Σ_j grad_K_R,ij K_R,ij/n_i²
//   and the same for x; a row whose norm is at the floor has no gradient through it.
//
// Traffic   forward and backward each read both Grams once; backward writes two more. Z and ZKZ exist nowhere.
// Order     a row by one thread: equal inputs give equal bits at any thread count.
// Twins     cuda/hsic_objective_cuda.cu, ops/hsic_objective/triton.py; truth: ops/hsic_objective/reference.py.

#include "cpu/hsic_objective_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

template <class T>
HsicRowSums<T> row_sums(const T* gram_vjp, const T* gram_x, const HsicColumns<T>& columns, int64_t i, int64_t N) {
  const T *row_vjp = gram_vjp + i * N, *row_x = gram_x + i * N;
  const T own_vjp = columns.inverse_vjp[i], own_x = columns.inverse_x[i];
  T product = 0, sum_vjp = 0, sum_x = 0;
#pragma omp simd reduction(+ : product, sum_vjp, sum_x)
  for (int64_t j = 0; j < N; ++j) {
    const T k = row_vjp[j] * own_vjp * columns.inverse_vjp[j], l = row_x[j] * own_x * columns.inverse_x[j];
    product += k * l;
    sum_vjp += k;
    sum_x += l;
  }
  return {product, sum_vjp, sum_x};
}

template <class T>
HsicAlong<T> row_gradient(const T* gram_vjp, const T* gram_x, const HsicColumns<T>& columns, const T* grand, T scale,
                          int64_t i, int64_t N, T* grad_vjp, T* grad_x) {
  const T *row_vjp = gram_vjp + i * N, *row_x = gram_x + i * N;
  const T own_vjp = columns.inverse_vjp[i], own_x = columns.inverse_x[i];
  const T shift_vjp = grand[0] - columns.mean_vjp[i], shift_x = grand[1] - columns.mean_x[i];
  T along_vjp = 0, along_x = 0;
  if (grad_vjp) {
#pragma omp simd reduction(+ : along_vjp)
    for (int64_t j = 0; j < N; ++j) {
      const T inverse = own_vjp * columns.inverse_vjp[j];
      const T g = scale * (row_x[j] * own_x * columns.inverse_x[j] + (shift_x - columns.mean_x[j]));
      along_vjp += g * (row_vjp[j] * inverse);
      grad_vjp[i * N + j] = g * inverse;
    }
  }
  if (grad_x) {
#pragma omp simd reduction(+ : along_x)
    for (int64_t j = 0; j < N; ++j) {
      const T inverse = own_x * columns.inverse_x[j];
      const T g = scale * (row_vjp[j] * own_vjp * columns.inverse_vjp[j] + (shift_vjp - columns.mean_vjp[j]));
      along_x += g * (row_x[j] * inverse);
      grad_x[i * N + j] = g * inverse;
    }
  }
  return {along_vjp, along_x};
}

template <class T>
constexpr HsicKernels<T> kTable = {row_sums<T>, row_gradient<T>};

}  // namespace

SIB_FAST_DEFINE_TABLE(HsicKernels, hsic_kernels, double)

}  // namespace sib_fast::cpu
