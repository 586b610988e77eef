// Batch norm with batch statistics, its gradient and the gradient of that: per-channel kernels, one table per
// instruction set. T is float or double, the type of the activations and of what is written; sums are kept in double.
#pragma once

#include <cstdint>

namespace sib_fast::cpu {

// Activations [images, channels, spatial], contiguous: channel c of image n is one run of `spatial` elements.
struct BatchNormShape {
  int64_t images, channels, spatial;
};

// Statistics of one channel over its images·spatial elements.
struct ChannelStatistics {
  double mean, variance, invstd;  // variance biased; invstd = 1/sqrt(variance + eps)
};

template <class T>
struct BatchNormKernels {
  ChannelStatistics (*statistics)(const BatchNormShape&, const T* x, int64_t channel, double eps);
  // y = gamma·x̂ + beta
  void (*normalise)(const BatchNormShape&, const T* x, int64_t channel, double mean, double invstd, double gamma,
                    double beta, T* y);
  // grad_x = gamma·invstd·(gy - A - x̂·B); sums[2] = Σ gy, Σ gy·x̂. grad_x may be null.
  void (*backward)(const BatchNormShape&, const T* grad_y, const T* x, int64_t channel, double mean, double invstd,
                   double gamma, T* grad_x, double* sums);
  // u, u_gamma, u_beta: cotangents of grad_x, grad_gamma, grad_beta. to_grad_y and to_x may be null; to_gamma is
  // written.
  void (*double_backward)(const BatchNormShape&, const T* u, double u_gamma, double u_beta, const T* grad_y, const T* x,
                          int64_t channel, double mean, double invstd, double gamma, T* to_grad_y, T* to_x,
                          double* to_gamma);
};

template <class T>
const BatchNormKernels<T>& batch_norm_kernels_baseline();
template <class T>
const BatchNormKernels<T>& batch_norm_kernels_avx2();
template <class T>
const BatchNormKernels<T>& batch_norm_kernels_avx512();

}  // namespace sib_fast::cpu
