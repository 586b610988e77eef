// What batch norm, its gradient and the gradient of that sum over a channel, and what they write with the sums: SPEC
// 10, one class each. The passes themselves are in batch_norm_passes.cuh.
//
//   x̂ = (x - mean)·invstd      y = gamma·x̂ + beta      grad_x = gamma·invstd·(gy - A - x̂·B),  A = ⟨gy⟩, B = ⟨gy·x̂⟩
//   given u, u_gamma, u_beta:   to gy and to x are affine in (u, gy, x - mean)
//
// A class says: inputs (x last; the first kUnsummed are read by `write` alone), outputs, sums, coefficients, and
//   centre        what a channel's x is taken relative to, in T: its first element, or the mean rounded to T
//   add           the sums of M elements of one channel, joined to the channel's in double
//   coefficients  from the sums to the T numbers that `write` needs; writes what there is one number of a channel of
//   write         the outputs of one element
// Precision  halves and float32 are calculated in float32. Sums of M ≤ 8 elements are in T, all others in double. The
//            mean that T holds is not the mean: what it lacks, `gap`, is put right in double, in the sums and in the
//            constant terms, so that a mean far above the spread costs no digits.
#pragma once

#include "cuda/packs.cuh"

namespace sib_fast::cuda::batch_norm {

using packs::blank, packs::Compute, packs::load, packs::Pack, packs::store;

// One number a channel; `absent` where there is none.
template <class T>
__device__ __forceinline__ double value_of(const T* of_channel, int64_t c, double absent) {
  return of_channel == nullptr ? absent : static_cast<double>(of_channel[c]);
}

// y. The sums are about the channel's first element, which (mean - it)² <= n·variance bounds: what cancels in the
// variance is at most n roundings of a double. Those of a few elements are about one of these, so that their float32
// roundings are parts of what they spread, wherever the channel lies.
template <class E>
struct Forward {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kUnsummed = 0, kInputs = 1, kOutputs = 1, kSums = 2, kCoefficients = 3;
  struct Channels {
    const T *weight, *bias;
    double *mean, *variance, *invstd;
    double eps, count;
  };

  static __device__ __forceinline__ T centre(const Channels&, int64_t, const E* first) {
    return static_cast<T>(*first);
  }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], int count, T pivot, double (&sums)[kSums]) {
    const T local = v[0][0];
    T sum = T(0), square = T(0);
#pragma unroll
    for (int i = 1; i < M; ++i) {
      const T d = v[0][i] - local;
      sum += d;
      square += d * d;
    }
    const double step = static_cast<double>(local) - static_cast<double>(pivot), shift = count * step, s = sum;
    sums[0] += s + shift;
    sums[1] += static_cast<double>(square) + (2.0 * s + shift) * step;
  }

  static __device__ __forceinline__ void coefficients(const Channels& of, int64_t c, T pivot,
                                                      const double (&sums)[kSums], T (&k)[kCoefficients]) {
    const double shift = sums[0] / of.count, square = sums[1] / of.count - shift * shift;
    const double mean = static_cast<double>(pivot) + shift;
    const double variance = square > 0.0 || square != square ? square : 0.0;
    const double invstd = 1.0 / sqrt(variance + of.eps);
    of.mean[c] = mean;
    of.variance[c] = variance;
    of.invstd[c] = invstd;
    const T centre = static_cast<T>(mean);
    const double scale = value_of(of.weight, c, 1.0) * invstd, gap = static_cast<double>(centre) - mean;
    k[0] = centre;
    k[1] = static_cast<T>(scale);
    k[2] = static_cast<T>(value_of(of.bias, c, 0.0) + gap * scale);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = (v[0] - k[0]) * k[1] + k[2];
  }
};

// grad_x, grad_weight, grad_bias from gy, x; to grad_x what another pass has for x already is added, the first input.
template <class E, bool added>
struct Backward {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kUnsummed = added ? 1 : 0, kInputs = 2 + kUnsummed;
  static constexpr int kOutputs = 1, kSums = 2, kCoefficients = 4;
  struct Channels {
    const T* weight;
    const double *mean, *invstd;
    T *grad_weight, *grad_bias;
    double count;
  };

  static __device__ __forceinline__ T centre(const Channels& of, int64_t c, const E*) {
    return static_cast<T>(of.mean[c]);
  }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[2][M], int, T centre, double (&sums)[kSums]) {
    T g = T(0), gx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      g += v[0][i];
      gx += v[0][i] * (v[1][i] - centre);
    }
    sums[0] += static_cast<double>(g);
    sums[1] += static_cast<double>(gx);
  }

  static __device__ __forceinline__ void coefficients(const Channels& of, int64_t c, T centre,
                                                      const double (&sums)[kSums], T (&k)[kCoefficients]) {
    const double invstd = of.invstd[c], gap = static_cast<double>(centre) - of.mean[c];
    const double sum_gx = sums[1] + gap * sums[0], A = sums[0] / of.count;
    const double slope = sum_gx / of.count * invstd * invstd;  // B·invstd, so that x̂ need not be formed
    of.grad_bias[c] = static_cast<T>(sums[0]);
    of.grad_weight[c] = static_cast<T>(sum_gx * invstd);
    k[0] = centre;
    k[1] = static_cast<T>(value_of(of.weight, c, 1.0) * invstd);
    k[2] = static_cast<T>(A + gap * slope);
    k[3] = static_cast<T>(slope);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    constexpr int gy = kUnsummed, x = gy + 1;
    const T grad_x = k[1] * ((v[gy] - k[2]) - (v[x] - k[0]) * k[3]);
    to[0] = added ? grad_x + v[0] : grad_x;
  }
};

// Gradients of grad_y, x and weight from u, gy, x.
template <class E>
struct Second {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kUnsummed = 0, kInputs = 3, kOutputs = 2, kSums = 5, kCoefficients = 8;
  struct Channels {
    const T *weight, *u_weight, *u_bias;
    const double *mean, *invstd;
    T* to_weight;
    double count;
  };

  static __device__ __forceinline__ T centre(const Channels& of, int64_t c, const E*) {
    return static_cast<T>(of.mean[c]);
  }

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], int, T centre, double (&sums)[kSums]) {
    T u = T(0), ux = T(0), ug = T(0), g = T(0), gx = T(0);
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const T d = v[2][i] - centre;
      u += v[0][i];
      ux += v[0][i] * d;
      ug += v[0][i] * v[1][i];
      g += v[1][i];
      gx += v[1][i] * d;
    }
    sums[0] += static_cast<double>(u);
    sums[1] += static_cast<double>(ux);
    sums[2] += static_cast<double>(ug);
    sums[3] += static_cast<double>(g);
    sums[4] += static_cast<double>(gx);
  }

  static __device__ __forceinline__ void coefficients(const Channels& of, int64_t c, T centre,
                                                      const double (&sums)[kSums], T (&k)[kCoefficients]) {
    const double invstd = of.invstd[c], scale = value_of(of.weight, c, 1.0) * invstd;
    const double u_gamma = value_of(of.u_weight, c, 0.0), u_beta = value_of(of.u_bias, c, 0.0);
    const double gap = static_cast<double>(centre) - of.mean[c], by_count = 1.0 / of.count;
    const double U = sums[0] * by_count, A = sums[3] * by_count, V = sums[2] * by_count;
    const double Tx = (sums[1] + gap * sums[0]) * invstd * by_count, B = (sums[4] + gap * sums[3]) * invstd * by_count;
    const double kappa = V - A * U - B * Tx;
    of.to_weight[c] = static_cast<T>(invstd * of.count * kappa);
    // ω = omega_u·u + omega_g·gy
    const double omega_u = -scale * B, omega_g = u_gamma - scale * Tx;
    const double omega_mean = omega_u * U + omega_g * A, omega_dot = omega_u * Tx + omega_g * B;
    const double y_by_x = omega_g * invstd, x_by_x = -(omega_dot + scale * kappa) * invstd * invstd;
    k[0] = centre;
    k[1] = static_cast<T>(scale);
    k[2] = static_cast<T>(y_by_x);
    k[3] = static_cast<T>(u_beta - scale * U + gap * y_by_x);
    k[4] = static_cast<T>(invstd * omega_u);
    k[5] = static_cast<T>(invstd * omega_g);
    k[6] = static_cast<T>(x_by_x);
    k[7] = static_cast<T>(gap * x_by_x - invstd * omega_mean);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    const T d = v[2] - k[0];
    to[0] = k[1] * v[0] + k[2] * d + k[3];
    to[1] = k[4] * v[0] + k[5] * v[1] + k[6] * d + k[7];
  }
};

}  // namespace sib_fast::cuda::batch_norm
