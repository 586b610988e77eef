// What batch norm and layer norm share, one text for the CPU's kernels and CUDA's.
//
// All in unnamed namespaces here, in batch_norm.h, layer_norm.h and softmax.h, so that each instruction set of the CPU
// has copies of its own (cpu/simd.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace sib_fast {

// What x is taken relative to, in two parts of T: x - high is exact where it cancels, so that a mean far above the
// spread costs no more digits than x has lost.
template <class T>
struct Centre {
  T high, low;
};

namespace {

// One number a channel; `absent` where there is none.
template <class T>
SIB_HOST_DEVICE double value_of(const T* of_channel, int64_t c, double absent) {
  return of_channel == nullptr ? absent : static_cast<double>(of_channel[c]);
}

// From a sum over `count` to its mean: by a division, or by the product with 1/count.
struct Quotient {
  double count;
  SIB_HOST_DEVICE double operator()(double sum) const { return sum / count; }
};
struct Product {
  double by_count;
  SIB_HOST_DEVICE double operator()(double sum) const { return sum * by_count; }
};

struct NormStatistics {
  double mean, variance, invstd;
};
// From ⟨x - pivot⟩ and ⟨(x - pivot)²⟩. A NaN stays one.
SIB_HOST_DEVICE NormStatistics norm_statistics(double pivot, double shift, double mean_square, double eps) {
  const double square = mean_square - shift * shift;
  const double variance = square > 0.0 || square != square ? square : 0.0;
  return {pivot + shift, variance, 1.0 / sqrt(variance + eps)};
}

template <class T>
SIB_HOST_DEVICE T relative_to(const Centre<T>& centre, T x) {
  return (x - centre.high) - centre.low;
}
template <class T>
SIB_HOST_DEVICE Centre<T> in_two_parts(double mean) {
  const T high = static_cast<T>(mean);
  return {high, static_cast<T>(mean - static_cast<double>(high))};
}

}  // namespace
}  // namespace sib_fast
