// What layer norm and group norm, their gradient and the gradient of that sum over a row, over a run of one channel and
// over the rows of a column, and what they write with the sums: the formulas of common/layer_norm.h, one class each.
// The passes are in row_passes.cuh and layer_norm_columns.cuh.
//
// Precision halves and float32 are calculated in float32. Sums of M <= 8 elements are in T, all others in double. x
//           loses its mean in two parts of T, so that a mean far above the spread costs no digits.
#pragma once

#include "common/layer_norm.h"
#include "cuda/norm.cuh"
#include "cuda/row_passes.cuh"

namespace sib_fast::cuda::layer_norm {

// k[0] … k[2] of every class: what makes x̂ of x.
template <class T, int K>
__device__ __forceinline__ void keep_hat(const Centre<T>& centre, double invstd, T (&k)[K]) {
  k[0] = centre.high;
  k[1] = centre.low;
  k[2] = static_cast<T>(invstd);
}
template <class T, int K>
__device__ __forceinline__ T hat_of(T x, const T (&k)[K]) {
  return relative_to(Centre<T>{k[0], k[1]}, x) * k[2];
}

// y. Parameters gamma, beta. The sums are about the row's first element, which (mean - it)² <= n·variance bounds: what
// cancels in the variance is at most n roundings of a double.
template <class E>
struct Forward {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kInputs = 1, kOutputs = 1, kSums = 2, kCoefficients = 3, kParameters = 2, kSumParameters = 0;
  struct Rows {
    double *mean, *invstd;
    double eps, by_count;
  };

  static __device__ __forceinline__ double absent(int parameter) { return parameter == 0 ? 1.0 : 0.0; }

  static __device__ __forceinline__ Centre<T> centre(const Rows&, int64_t, const E* first) {
    return {static_cast<T>(*first), T(0)};
  }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], const T (&)[kParameters + 1][M], int count, int,
                                             const Centre<T>& pivot, double (&sums)[kSums]) {
    add_about_pivot(v[0], count, pivot.high, sums);
  }

  static __device__ __forceinline__ void join(const double* run, const double*, int, double (&sums)[kSums]) {
    sums[0] += run[0];
    sums[1] += run[1];
  }

  static __device__ __forceinline__ void coefficients(const Rows& of, int64_t row, const Centre<T>& pivot,
                                                      const double (&sums)[kSums], bool owner, T (&k)[kCoefficients]) {
    const Product mean_of{of.by_count};
    const NormStatistics found =
        norm_statistics(static_cast<double>(pivot.high), mean_of(sums[0]), mean_of(sums[1]), of.eps);
    if (owner) {
      of.mean[row] = found.mean;
      of.invstd[row] = found.invstd;
    }
    keep_hat(in_two_parts<T>(found.mean), found.invstd, k);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&p)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = layer_norm_y(hat_of(v[0], k), p[0], p[1]);
  }
};

// Of those that have the statistics.
template <class E>
struct AboutMean {
  using Element = E;
  using T = Compute<E>;
  template <class Rows>
  static __device__ __forceinline__ Centre<T> centre(const Rows& of, int64_t row, const E*) {
    return in_two_parts<T>(of.mean[row]);
  }
};

// grad_x from gy, x. Parameter gamma. Over columns: Σ gy·x̂, Σ gy.
template <class E>
struct Backward : AboutMean<E> {
  using T = Compute<E>;
  static constexpr int kInputs = 2, kOutputs = 1, kSums = 2, kCoefficients = 5, kParameters = 1, kSumParameters = 1;
  static constexpr int kColumnSums = 2, kColumnData = 3;
  struct Rows {
    const double *mean, *invstd;
    double by_count;
  };

  static __device__ __forceinline__ double absent(int) { return 1.0; }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], const T (&p)[kParameters + 1][M], int, int,
                                             const Centre<T>& centre, double (&sums)[kSums]) {
    T h_sum = T(0), hx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const T h = p[0][i] * v[0][i];
      h_sum += h;
      hx += h * relative_to(centre, v[1][i]);
    }
    sums[0] += static_cast<double>(h_sum);
    sums[1] += static_cast<double>(hx);
  }

  static __device__ __forceinline__ void join(const double* run, const double* p, int, double (&sums)[kSums]) {
    sums[0] += p[0] * run[0];
    sums[1] += p[0] * run[1];
  }

  static __device__ __forceinline__ void coefficients(const Rows& of, int64_t row, const Centre<T>& centre,
                                                      const double (&sums)[kSums], bool, T (&k)[kCoefficients]) {
    const Product mean_of{of.by_count};
    const double invstd = of.invstd[row];
    keep_hat(centre, invstd, k);
    k[3] = static_cast<T>(mean_of(sums[0]));
    k[4] = static_cast<T>(mean_of(sums[1] * invstd));
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&p)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = layer_norm_grad_x(v[0], hat_of(v[1], k), p[0], k[2], k[3], k[4]);
  }

  static __device__ __forceinline__ void column_data(const Rows& of, int64_t row, T (&k)[kColumnData]) {
    keep_hat(in_two_parts<T>(of.mean[row]), of.invstd[row], k);
  }
  static __device__ __forceinline__ void add_to_column(const T (&v)[kInputs], const T (&k)[kColumnData],
                                                       T (&sums)[kColumnSums]) {
    sums[0] += v[0] * hat_of(v[1], k);
    sums[1] += v[0];
  }
  static __device__ __forceinline__ void run_to_column(const Rows& of, int64_t row, const double* run,
                                                       double (&sums)[kColumnSums]) {
    sums[0] += of.invstd[row] * run[1];
    sums[1] += run[0];
  }
};

// Gradients of grad_y and x from u, gy, x. Parameters gamma, u_gamma, u_beta. Sums of u, u·d, u·h, h, h·d, where d is
// x - mean, and with u_gamma those of u_gamma·gy, u_gamma·gy·d. Over columns: Σ gy·w.
template <class E>
struct Second : AboutMean<E> {
  using T = Compute<E>;
  static constexpr int kInputs = 3, kOutputs = 2, kSums = 7, kCoefficients = 9, kParameters = 3, kSumParameters = 2;
  static constexpr int kColumnSums = 1, kColumnData = 5;
  static constexpr int kPlainSums = 5;  // without u_gamma
  struct Rows {
    const double *mean, *invstd;
    double* means;  // [2, rows]: U and T, null where no column wants them
    int64_t rows;
    double by_count;
  };

  static __device__ __forceinline__ double absent(int parameter) { return parameter == 0 ? 1.0 : 0.0; }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], const T (&p)[kParameters + 1][M], int, int used,
                                             const Centre<T>& centre, double (&sums)[kSums]) {
    T u = T(0), ux = T(0), uh = T(0), h_sum = T(0), hx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const T d = relative_to(centre, v[2][i]), h = p[0][i] * v[1][i];
      u += v[0][i];
      ux += v[0][i] * d;
      uh += v[0][i] * h;
      h_sum += h;
      hx += h * d;
    }
    sums[0] += static_cast<double>(u);
    sums[1] += static_cast<double>(ux);
    sums[2] += static_cast<double>(uh);
    sums[3] += static_cast<double>(h_sum);
    sums[4] += static_cast<double>(hx);
    if (used == kPlainSums) return;
    T q_sum = T(0), qx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const T q = p[1][i] * v[1][i];
      q_sum += q;
      qx += q * relative_to(centre, v[2][i]);
    }
    sums[5] += static_cast<double>(q_sum);
    sums[6] += static_cast<double>(qx);
  }

  static __device__ __forceinline__ void join(const double* run, const double* p, int used, double (&sums)[kSums]) {
    sums[0] += run[0];
    sums[1] += run[1];
    sums[2] += p[0] * run[2];
    sums[3] += p[0] * run[3];
    sums[4] += p[0] * run[4];
    if (used == kPlainSums) return;
    sums[5] += p[1] * run[3];
    sums[6] += p[1] * run[4];
  }

  static __device__ __forceinline__ void coefficients(const Rows& of, int64_t row, const Centre<T>& centre,
                                                      const double (&sums)[kSums], bool owner, T (&k)[kCoefficients]) {
    const Product mean_of{of.by_count};
    const double s = of.invstd[row], U = mean_of(sums[0]), Tx = mean_of(sums[1] * s);
    if (owner && of.means != nullptr) {
      of.means[row] = U;
      of.means[of.rows + row] = Tx;
    }
    const auto to = layer_norm_to_x<T>(s, U, Tx, mean_of(sums[2]), mean_of(sums[3]), mean_of(sums[4] * s), true,
                                       mean_of(sums[5]), mean_of(sums[6] * s));
    keep_hat(centre, s, k);
    k[3] = static_cast<T>(U);
    k[4] = static_cast<T>(Tx);
    k[5] = to.by_u;
    k[6] = to.by_h;
    k[7] = to.by_hat;
    k[8] = to.shift;
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&p)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    const T hat = hat_of(v[2], k);
    const LayerNormToX<T> to_x{k[5], k[6], k[7], k[8]};
    to[0] = layer_norm_to_grad_y(layer_norm_w(v[0], hat, k[2], k[3], k[4]), hat, p[0], p[1], p[2]);
    to[1] = to_x(v[0], v[1], to_x.of_gy(p[0], k[2], p[1]), hat);
  }

  static __device__ __forceinline__ void column_data(const Rows& of, int64_t row, T (&k)[kColumnData]) {
    keep_hat(in_two_parts<T>(of.mean[row]), of.invstd[row], k);
    k[3] = static_cast<T>(of.means[row]);
    k[4] = static_cast<T>(of.means[of.rows + row]);
  }
  static __device__ __forceinline__ void add_to_column(const T (&v)[kInputs], const T (&k)[kColumnData],
                                                       T (&sums)[kColumnSums]) {
    sums[0] += v[1] * layer_norm_w(v[0], hat_of(v[2], k), k[2], k[3], k[4]);
  }
  static __device__ __forceinline__ void run_to_column(const Rows& of, int64_t row, const double* run,
                                                       double (&sums)[kColumnSums]) {
    const double s = of.invstd[row];
    sums[0] += s * (run[2] - of.means[row] * run[3] - s * of.means[of.rows + row] * run[4]);
  }
};

}  // namespace sib_fast::cuda::layer_norm
