// Layer norm and group norm, their gradient and the gradient of that: passes over rows, one row after the other while
// it is in cache.
#pragma once

#include <cstdint>

#include "common/layer_norm.h"
#include "cpu/kernel_tables.h"

namespace sib_fast::cpu {

// Rows begin … end of an activation [rows, length]. A row is `length / spatial` channels of `spatial` elements; row r
// has the channels of group r % groups. Layer norm: one group, every element a channel.
struct NormRows {
  int64_t length, spatial, groups, begin, end;
  int64_t channels() const { return length / spatial; }  // of a row
};

// gamma, beta, u_gamma, u_beta: [groups·channels of a row]. mean, invstd: [rows]. Sums over rows, in double, have the
// shape of gamma and are added to.
template <class E>
struct LayerNormKernels {
  using T = Compute<E>;
  // y = x̂·gamma + beta
  void (*forward)(const NormRows&, const E* x, const T* gamma, const T* beta, double eps, E* y, double* mean,
                  double* invstd);
  // grad_x unless null; Σ gy·x̂ and Σ gy unless null
  void (*backward)(const NormRows&, const E* gy, const E* x, const T* gamma, const double* mean, const double* invstd,
                   E* grad_x, double* sum_gamma, double* sum_beta);
  // to_grad_y, to_x, the sum over rows of the gradient of gamma: each unless null. u_gamma and u_beta: both or neither.
  void (*double_backward)(const NormRows&, const E* u, const T* u_gamma, const T* u_beta, const E* gy, const E* x,
                          const T* gamma, const double* mean, const double* invstd, E* to_grad_y, E* to_x,
                          double* sum_gamma);
};

SIB_FAST_DECLARE_TABLES(LayerNormKernels, layer_norm_kernels)

}  // namespace sib_fast::cpu
