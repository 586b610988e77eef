// Batch norm with batch statistics, its gradient and the gradient of that: sums over a channel, and the passes that
// write, which are affine with coefficients of the channel. Who does which part is in batch_norm_cpu.cpp.
#pragma once

#include <cstdint>

#include "common/batch_norm.h"
#include "cpu/kernel_tables.h"

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
  // y of common/batch_norm.h
  void (*write_y)(const BatchNormPart&, const E* x, const T* k, E* y);
  // grad_x + addend, which may be null
  void (*write_grad_x)(const BatchNormPart&, const E* gy, const E* x, const E* addend, const T* k, E* grad_x);
  // to_grad_y, to_x; either may be null
  void (*write_second)(const BatchNormPart&, const E* u, const E* gy, const E* x, const T* k, E* to_grad_y, E* to_x);
};

SIB_FAST_DECLARE_TABLES(BatchNormKernels, batch_norm_kernels)

}  // namespace sib_fast::cpu
