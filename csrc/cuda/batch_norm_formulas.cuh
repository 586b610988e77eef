// What batch norm, its gradient and the gradient of that sum over a channel, and what they write with the sums: the
// formulas of common/batch_norm.h, one class each. The passes themselves are in batch_norm_passes.cuh.
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

#include "common/batch_norm.h"
#include "cuda/norm.cuh"

namespace sib_fast::cuda::batch_norm {

using packs::blank, packs::load, packs::store;

template <class T, int K>
__device__ __forceinline__ void round_to(const double (&exact)[K], T centre, T (&k)[K]) {
  k[0] = centre;
#pragma unroll
  for (int j = 1; j < K; ++j) k[j] = static_cast<T>(exact[j]);
}

// y. The sums are about the channel's first element, which (mean - it)² <= n·variance bounds: what cancels in the
// variance is at most n roundings of a double.
template <class E>
struct Forward {
  using Element = E;
  using T = Compute<E>;
  static constexpr int kUnsummed = 0, kInputs = 1, kOutputs = 1, kSums = kForwardSums;
  static constexpr int kCoefficients = kForwardCoefficients;
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
    add_about_pivot(v[0], count, pivot, sums);
  }

  static __device__ __forceinline__ void coefficients(const Channels& of, int64_t c, T pivot,
                                                      const double (&sums)[kSums], T (&k)[kCoefficients]) {
    const Quotient mean_of{of.count};
    const NormStatistics found =
        norm_statistics(static_cast<double>(pivot), mean_of(sums[0]), mean_of(sums[1]), of.eps);
    of.mean[c] = found.mean;
    of.variance[c] = found.variance;
    of.invstd[c] = found.invstd;
    double exact[kCoefficients];
    batch_norm_coefficients(found, value_of(of.weight, c, 1.0), value_of(of.bias, c, 0.0), exact);
    const T centre = static_cast<T>(found.mean);
    exact[2] += (static_cast<double>(centre) - found.mean) * exact[1];
    round_to(exact, centre, k);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = batch_norm_y(v[0], k);
  }
};

// Of those that have the statistics.
template <class E>
struct AboutMean {
  using Element = E;
  using T = Compute<E>;
  template <class Channels>
  static __device__ __forceinline__ T centre(const Channels& of, int64_t c, const E*) {
    return static_cast<T>(of.mean[c]);
  }
};

// grad_x, grad_weight, grad_bias from gy, x; to grad_x what another pass has for x already is added, the first input.
template <class E, bool added>
struct Backward : AboutMean<E> {
  using T = Compute<E>;
  static constexpr int kUnsummed = added ? 1 : 0, kInputs = 2 + kUnsummed;
  static constexpr int kOutputs = 1, kSums = kBackwardSums, kCoefficients = kBackwardCoefficients;
  struct Channels {
    const T* weight;
    const double *mean, *invstd;
    T *grad_weight, *grad_bias;
    double count;
  };

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
    const double gap = static_cast<double>(centre) - of.mean[c];
    const double about_mean[kSums] = {sums[0], sums[1] + gap * sums[0]};
    double exact[kCoefficients], grad_gamma, grad_beta;
    batch_norm_backward_coefficients(about_mean, Quotient{of.count}, of.mean[c], of.invstd[c],
                                     value_of(of.weight, c, 1.0), grad_gamma, grad_beta, exact);
    of.grad_weight[c] = static_cast<T>(grad_gamma);
    of.grad_bias[c] = static_cast<T>(grad_beta);
    exact[2] += gap * exact[3];
    round_to(exact, centre, k);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    const T grad_x = batch_norm_grad_x(v[kUnsummed], v[kUnsummed + 1], k);
    to[0] = added ? grad_x + v[0] : grad_x;
  }
};

// Gradients of grad_y, x and weight from u, gy, x.
template <class E>
struct Second : AboutMean<E> {
  using T = Compute<E>;
  static constexpr int kUnsummed = 0, kInputs = 3, kOutputs = 2, kSums = kSecondSums;
  static constexpr int kCoefficients = kSecondCoefficients;
  struct Channels {
    const T *weight, *u_weight, *u_bias;
    const double *mean, *invstd;
    T* to_weight;
    double count;
  };

  template <int M>
  static __device__ __forceinline__ void add(const T (&v)[kInputs][M], int, T centre, double (&sums)[kSums]) {
    BatchNormSecondTerms<T> few{};
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const auto one = batch_norm_second_terms(v[0][i], v[1][i], v[2][i] - centre);
      few.u += one.u;
      few.ud += one.ud;
      few.ug += one.ug;
      few.g += one.g;
      few.gd += one.gd;
    }
    sums[0] += static_cast<double>(few.u);
    sums[1] += static_cast<double>(few.ud);
    sums[2] += static_cast<double>(few.ug);
    sums[3] += static_cast<double>(few.g);
    sums[4] += static_cast<double>(few.gd);
  }

  static __device__ __forceinline__ void coefficients(const Channels& of, int64_t c, T centre,
                                                      const double (&sums)[kSums], T (&k)[kCoefficients]) {
    const double gap = static_cast<double>(centre) - of.mean[c];
    const double about_mean[kSums] = {sums[0], sums[1] + gap * sums[0], sums[2], sums[3], sums[4] + gap * sums[3]};
    double exact[kCoefficients], to_gamma;
    batch_norm_second_coefficients(about_mean, Product{1.0 / of.count}, of.count, of.mean[c], of.invstd[c],
                                   value_of(of.weight, c, 1.0), value_of(of.u_weight, c, 0.0),
                                   value_of(of.u_bias, c, 0.0), to_gamma, exact);
    of.to_weight[c] = static_cast<T>(to_gamma);
    exact[3] += gap * exact[2];
    exact[7] += gap * exact[6];
    round_to(exact, centre, k);
  }

  static __device__ __forceinline__ void write(const T (&v)[kInputs], const T (&k)[kCoefficients], T (&to)[kOutputs]) {
    to[0] = batch_norm_to_grad_y(v[0], v[2], k);
    to[1] = batch_norm_to_x(v[0], v[1], v[2], k);
  }
};

}  // namespace sib_fast::cuda::batch_norm
