// Batch norm with batch statistics, its gradient and the gradient of that: sums over a channel, and the passes that
// write, which are affine with coefficients of the channel. One table per element type and instruction set. What the
// coefficients are, and who does which part, is in batch_norm_cpu.cpp.
#pragma once

#include <cstdint>

#include "cpu/element_bits.h"

namespace sib_fast::cpu {

// A part of the activations. Channels first, [images, channels, spatial]: channel `begin`, which is `images` runs of
// `spatial` elements, and `end` is begin + 1. Channels last, [images·spatial, channels]: rows begin … end with all
// channels.
struct BatchNormPart {
  bool channels_last;
  int64_t images, channels, spatial, begin, end;
};

// Sums and coefficients of channel c are at [k·stride + c] with c counted from the part's first channel; stride is the
// number of channels in the part: 1 channels first, `channels` channels last. Sums are in double.
template <class E>
struct BatchNormKernels {
  using T = Compute<E>;
  // Σ (x - pivot), Σ (x - pivot)²
  void (*sums_x)(const BatchNormPart&, const E* x, const double* pivot, double* sums);
  // Σ gy, Σ gy·(x - mean)
  void (*sums_gy)(const BatchNormPart&, const E* gy, const E* x, const double* mean, double* sums);
  // Σ u, Σ u·(x - mean), Σ u·gy, Σ gy, Σ gy·(x - mean)
  void (*sums_u)(const BatchNormPart&, const E* u, const E* gy, const E* x, const double* mean, double* sums);
  // y = (x - k0)·k1 + k2
  void (*write_y)(const BatchNormPart&, const E* x, const T* k, E* y);
  // grad_x = k1·((gy - k2) - (x - k0)·k3) + addend, which may be null
  void (*write_grad_x)(const BatchNormPart&, const E* gy, const E* x, const E* addend, const T* k, E* grad_x);
  // to_grad_y = k1·u + k2·(x - k0) + k3;   to_x = k4·u + k5·gy + k6·(x - k0) + k7;   either may be null
  void (*write_second)(const BatchNormPart&, const E* u, const E* gy, const E* x, const T* k, E* to_grad_y, E* to_x);
};
constexpr int kForwardCoefficients = 3, kBackwardCoefficients = 4, kSecondCoefficients = 8;

template <class E>
const BatchNormKernels<E>& batch_norm_kernels_baseline();
template <class E>
const BatchNormKernels<E>& batch_norm_kernels_avx2();
template <class E>
const BatchNormKernels<E>& batch_norm_kernels_avx512();

}  // namespace sib_fast::cpu
