// Layer norm and group norm, up to the second derivative: SPEC 10 with the means taken over a row. What a row's sums
// become, and what every element makes of that. One text for the CPU's kernels and CUDA's.
//
//   x̂ = (x - mean)·invstd      y = gamma·x̂ + beta      h = gamma·gy
//   grad_x = invstd·(h - A - x̂·B),   A = ⟨h⟩, B = ⟨h·x̂⟩;   grad_gamma = Σ_rows gy·x̂,   grad_beta = Σ_rows gy
//   given u, u_gamma, u_beta, with U = ⟨u⟩, T = ⟨u·x̂⟩, V = ⟨u·h⟩, kappa = V - A·U - B·T, w = invstd·(u - U - x̂·T):
//     to gy     gamma·w + u_gamma·x̂ + u_beta
//     to gamma  Σ_rows gy·w
//     to x      invstd·(o - ⟨o⟩ - x̂·⟨o·x̂⟩) - invstd²·kappa·x̂,   o = -invstd·(h·T + u·B) + u_gamma·gy
#pragma once

#include "common/norm.h"

namespace sib_fast {
namespace {

template <class T>
SIB_HOST_DEVICE T layer_norm_y(T hat, T gamma, T beta) {
  return hat * gamma + beta;
}
template <class T>
SIB_HOST_DEVICE T layer_norm_grad_x(T gy, T hat, T gamma, T invstd, T A, T B) {
  return invstd * ((gy * gamma - A) - hat * B);
}
template <class T>
SIB_HOST_DEVICE T layer_norm_w(T u, T hat, T invstd, T U, T Tx) {
  return invstd * ((u - U) - hat * Tx);
}
template <class T>
SIB_HOST_DEVICE T layer_norm_to_grad_y(T w, T hat, T gamma, T u_gamma, T u_beta) {
  return gamma * w + u_gamma * hat + u_beta;
}

// to_x = by_u·u + (by_h·gamma + invstd·u_gamma)·gy + by_hat·x̂ + shift
template <class T>
struct LayerNormToX {
  T by_u, by_h, by_hat, shift;
  SIB_HOST_DEVICE T operator()(T u, T gy, T by_gy, T hat) const { return by_u * u + by_gy * gy + by_hat * hat + shift; }
  // by_gy
  SIB_HOST_DEVICE T of_gy(T gamma, T invstd, T u_gamma) const { return by_h * gamma + invstd * u_gamma; }
};
// q_mean, q_dot: ⟨u_gamma·gy⟩ and ⟨u_gamma·gy·x̂⟩, where there is a u_gamma.
template <class T>
SIB_HOST_DEVICE LayerNormToX<T> layer_norm_to_x(double invstd, double U, double Tx, double V, double A, double B,
                                                bool has_q, double q_mean, double q_dot) {
  const double s = invstd, kappa = V - A * U - B * Tx;
  double o_mean = -s * (A * Tx + U * B), o_dot = -2 * s * B * Tx;
  if (has_q) {
    o_mean += q_mean;
    o_dot += q_dot;
  }
  return {static_cast<T>(-s * s * B), static_cast<T>(-s * s * Tx), static_cast<T>(-s * o_dot - s * s * kappa),
          static_cast<T>(-s * o_mean)};
}

}  // namespace
}  // namespace sib_fast
