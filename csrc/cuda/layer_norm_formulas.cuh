// What layer norm and group norm, their gradient and the gradient of that sum over a row, over a run of one channel and
// over the rows of a column, and what they write with the sums: one class each. The passes are in row_passes.cuh and
// layer_norm_columns.cuh.
//
//   x̂ = (x - mean)·invstd      y = gamma·x̂ + beta      h = gamma·gy
//   grad_x = invstd·(h - A - x̂·B),   A = ⟨h⟩, B = ⟨h·x̂⟩;   grad_gamma = Σ_rows gy·x̂,   grad_beta = Σ_rows gy
//   given u, u_gamma, u_beta, with U = ⟨u⟩, T = ⟨u·x̂⟩, V = ⟨u·h⟩, kappa = V - A·U - B·T, w = invstd·(u - U - x̂·T):
//     to gy     gamma·w + u_gamma·x̂ + u_beta
//     to gamma  Σ_rows gy·w
//     to x      invstd·(o - ⟨o⟩ - x̂·⟨o·x̂⟩) - invstd²·kappa·x̂,   o = -invstd·(h·T + u·B) + u_gamma·gy
//
// Precision halves and float32 are calculated in float32. Sums of M <= 8 elements are in T, all others in double. x
//           loses its mean in two parts of T, so that a mean far above the spread costs no digits.
#pragma once

#include "cuda/row_passes.cuh"

namespace sib_fast::cuda::layer_norm {

using packs::Compute;
using rows::Centre;

// y. Parameters gamma, beta. The sums are about the row's first element, which (mean - it)² <= n·variance bounds: what
// cancels in the variance is at most n roundings of a double. Those of a few elements are about one of these.
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
    const T local = v[0][0];
    T sum = T(0), square = T(0);
#pragma unroll
    for (int i = 1; i < M; ++i) {
      const T d = v[0][i] - local;
      sum += d;
      square += d * d;
    }
    const double step = static_cast<double>(local) - static_cast<double>(pivot.high), shift = count * step, s = sum;
    sums[0] += s + shift;
    sums[1] += static_cast<double>(square) + (2.0 * s + shift) * step;
  }

  static __device__ __forceinline__ void join(const double* run, const double*, int, double (&sums)[kSums]) {
    sums[0] += run[0];
    sums[1] += run[1];
  }

  static __device__ __forceinline__ void coefficients(const Rows& of, int64_t row, const Centre<T>& pivot,
                                                      const double (&sums)[kSums], bool owner, T (&k)[kCoefficients]) {
    const double shift = sums[0] * of.by_count, square = sums[1] * of.by_count - shift * shift;
    const double mean = static_cast<double>(pivot.high) + shift;
    const double variance = square > 0.0 || square != square ? square : 0.0;
    const double invstd = 1.0 / sqrt(variance + of.eps);
    if (owner) {
      of.mean[row] = mean;
      of.invstd[row] = invstd;
    }
    const Centre<T> centre = rows::in_two_parts<T>(mean);
    k[0] = centre.high;
    k[1] = centre.low;
    k[2] = static_cast<T>(invstd);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&p)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = ((v[0] - k[0]) - k[1]) * k[2] * p[0] + p[1];
  }
};

// grad_x from gy, x. Parameter gamma. Over columns: Σ gy·x̂, Σ gy.
template <class E>
struct Backward {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kInputs = 2, kOutputs = 1, kSums = 2, kCoefficients = 5, kParameters = 1, kSumParameters = 1;
  static constexpr int kColumnSums = 2, kColumnData = 3;
  struct Rows {
    const double *mean, *invstd;
    double by_count;
  };

  static __device__ __forceinline__ double absent(int) { return 1.0; }

  static __device__ __forceinline__ Centre<T> centre(const Rows& of, int64_t row, const E*) {
    return rows::in_two_parts<T>(of.mean[row]);
  }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], const T (&p)[kParameters + 1][M], int, int,
                                             const Centre<T>& centre, double (&sums)[kSums]) {
    T h_sum = T(0), hx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const T h = p[0][i] * v[0][i];
      h_sum += h;
      hx += h * centre(v[1][i]);
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
    const double invstd = of.invstd[row];
    k[0] = centre.high;
    k[1] = centre.low;
    k[2] = static_cast<T>(invstd);
    k[3] = static_cast<T>(sums[0] * of.by_count);
    k[4] = static_cast<T>(sums[1] * invstd * of.by_count);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&p)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    const T hat = ((v[1] - k[0]) - k[1]) * k[2];
    to[0] = k[2] * ((v[0] * p[0] - k[3]) - hat * k[4]);
  }

  static __device__ __forceinline__ void column_data(const Rows& of, int64_t row, T (&k)[kColumnData]) {
    const Centre<T> centre = rows::in_two_parts<T>(of.mean[row]);
    k[0] = centre.high;
    k[1] = centre.low;
    k[2] = static_cast<T>(of.invstd[row]);
  }
  static __device__ __forceinline__ void add_to_column(const T (&v)[kInputs], const T (&k)[kColumnData],
                                                       T (&sums)[kColumnSums]) {
    sums[0] += v[0] * (((v[1] - k[0]) - k[1]) * k[2]);
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
struct Second {
  using Element = E;
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

  static __device__ __forceinline__ Centre<T> centre(const Rows& of, int64_t row, const E*) {
    return rows::in_two_parts<T>(of.mean[row]);
  }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], const T (&p)[kParameters + 1][M], int, int used,
                                             const Centre<T>& centre, double (&sums)[kSums]) {
    T u = T(0), ux = T(0), uh = T(0), h_sum = T(0), hx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const T d = centre(v[2][i]), h = p[0][i] * v[1][i];
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
      qx += q * centre(v[2][i]);
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
    const double s = of.invstd[row], by_count = of.by_count;
    const double U = sums[0] * by_count, Tx = sums[1] * s * by_count, V = sums[2] * by_count;
    const double A = sums[3] * by_count, B = sums[4] * s * by_count;
    if (owner && of.means != nullptr) {
      of.means[row] = U;
      of.means[of.rows + row] = Tx;
    }
    const double kappa = V - A * U - B * Tx;
    const double o_mean = sums[5] * by_count - s * (A * Tx + U * B);
    const double o_dot = (sums[6] * by_count - 2.0 * B * Tx) * s;
    k[0] = centre.high;
    k[1] = centre.low;
    k[2] = static_cast<T>(s);
    k[3] = static_cast<T>(U);
    k[4] = static_cast<T>(Tx);
    k[5] = static_cast<T>(-s * s * B);
    k[6] = static_cast<T>(-s * s * Tx);
    k[7] = static_cast<T>(-s * o_dot - s * s * kappa);
    k[8] = static_cast<T>(-s * o_mean);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&p)[kParameters + 1],
                                               const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    const T hat = ((v[2] - k[0]) - k[1]) * k[2], w = k[2] * ((v[0] - k[3]) - hat * k[4]);
    to[0] = p[0] * w + p[1] * hat + p[2];
    to[1] = k[5] * v[0] + (k[6] * p[0] + k[2] * p[1]) * v[1] + k[7] * hat + k[8];
  }

  static __device__ __forceinline__ void column_data(const Rows& of, int64_t row, T (&k)[kColumnData]) {
    const Centre<T> centre = rows::in_two_parts<T>(of.mean[row]);
    k[0] = centre.high;
    k[1] = centre.low;
    k[2] = static_cast<T>(of.invstd[row]);
    k[3] = static_cast<T>(of.means[row]);
    k[4] = static_cast<T>(of.means[of.rows + row]);
  }
  static __device__ __forceinline__ void add_to_column(const T (&v)[kInputs], const T (&k)[kColumnData],
                                                       T (&sums)[kColumnSums]) {
    const T hat = ((v[2] - k[0]) - k[1]) * k[2];
    sums[0] += v[1] * (k[2] * ((v[0] - k[3]) - hat * k[4]));
  }
  static __device__ __forceinline__ void run_to_column(const Rows& of, int64_t row, const double* run,
                                                       double (&sums)[kColumnSums]) {
    const double s = of.invstd[row];
    sums[0] += s * (run[2] - of.means[row] * run[3] - s * of.means[of.rows + row] * run[4]);
  }
};

}  // namespace sib_fast::cuda::layer_norm
