// Batch norm in training mode, up to its second derivative (SPEC 10): what a channel's sums become, and what every
// element makes of that. One text for the CPU's kernels and CUDA's.
//
//   d = x - mean, x̂ = d·invstd     y = gamma·x̂ + beta     grad_x = gamma·invstd·(gy - A - x̂·B),  A = ⟨gy⟩, B = ⟨gy·x̂⟩
//   (and what another pass has for x already, the addend)
//   given u, u_gamma, u_beta:   to gy and to x are affine in (u, gy, d)
//
// Coefficients are made in double, k[0] the mean. A kernel that takes x relative to another centre has the same slopes
// of x, and a constant that is (centre - mean)·slope larger. Mean: the sum of a channel -> its mean.
#pragma once

#include "common/norm.h"

namespace sib_fast {
constexpr int kForwardSums = 2, kBackwardSums = 2, kSecondSums = 5;
constexpr int kForwardCoefficients = 3, kBackwardCoefficients = 4, kSecondCoefficients = 8;

namespace {

// y from x
template <class T, class K>
SIB_HOST_DEVICE T batch_norm_y(T x, const K& k) {
  return (x - k[0]) * k[1] + k[2];
}
SIB_HOST_DEVICE void batch_norm_coefficients(const NormStatistics& of, double gamma, double beta,
                                             double (&k)[kForwardCoefficients]) {
  k[0] = of.mean;
  k[1] = gamma * of.invstd;
  k[2] = beta;
}

// grad_x from gy, x
template <class T, class K>
SIB_HOST_DEVICE T batch_norm_grad_x(T gy, T x, const K& k) {
  return k[1] * ((gy - k[2]) - (x - k[0]) * k[3]);
}
// sums: Σ gy, Σ gy·d
template <class Mean>
SIB_HOST_DEVICE void batch_norm_backward_coefficients(const double (&sums)[kBackwardSums], const Mean& mean_of,
                                                      double mean, double invstd, double gamma, double& grad_gamma,
                                                      double& grad_beta, double (&k)[kBackwardCoefficients]) {
  grad_beta = sums[0];
  grad_gamma = sums[1] * invstd;
  k[0] = mean;
  k[1] = gamma * invstd;
  k[2] = mean_of(sums[0]);
  k[3] = mean_of(sums[1]) * invstd * invstd;  // B·invstd, so that x̂ need not be formed
}

// to_grad_y from u, x; to_x from u, gy, x
template <class T, class K>
SIB_HOST_DEVICE T batch_norm_to_grad_y(T u, T x, const K& k) {
  return k[1] * u + k[2] * (x - k[0]) + k[3];
}
template <class T, class K>
SIB_HOST_DEVICE T batch_norm_to_x(T u, T gy, T x, const K& k) {
  return k[4] * u + k[5] * gy + k[6] * (x - k[0]) + k[7];
}
template <class T>
struct BatchNormSecondTerms {
  T u, ud, ug, g, gd;
};
template <class T>
SIB_HOST_DEVICE BatchNormSecondTerms<T> batch_norm_second_terms(T u, T gy, T d) {
  return {u, u * d, u * gy, gy, gy * d};
}
// sums: of these terms
template <class Mean>
SIB_HOST_DEVICE void batch_norm_second_coefficients(const double (&sums)[kSecondSums], const Mean& mean_of,
                                                    double count, double mean, double invstd, double gamma,
                                                    double u_gamma, double u_beta, double& to_gamma,
                                                    double (&k)[kSecondCoefficients]) {
  const double scale = gamma * invstd;
  const double U = mean_of(sums[0]), Tx = mean_of(sums[1] * invstd), V = mean_of(sums[2]);
  const double A = mean_of(sums[3]), B = mean_of(sums[4] * invstd);
  const double kappa = V - A * U - B * Tx;
  to_gamma = invstd * count * kappa;
  // ω = omega_u·u + omega_g·gy
  const double omega_u = -scale * B, omega_g = u_gamma - scale * Tx;
  const double omega_mean = omega_u * U + omega_g * A, omega_dot = omega_u * Tx + omega_g * B;
  k[0] = mean;
  k[1] = scale;
  k[2] = omega_g * invstd;
  k[3] = u_beta - scale * U;
  k[4] = invstd * omega_u;
  k[5] = invstd * omega_g;
  k[6] = -(invstd * omega_dot + scale * invstd * kappa) * invstd;
  k[7] = -invstd * omega_mean;
}

}  // namespace
}  // namespace sib_fast
