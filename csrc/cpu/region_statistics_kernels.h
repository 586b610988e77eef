// Kernels of region_statistics over a range of pixels of the whole batch, one table per instruction set.
// T is float or double: the type of the mask, of the products and of the gradients. Sums are kept in double.
#pragma once

#include <cstdint>

#include "cpu/kernel_tables.h"
#include "cpu/map_view.h"

namespace sib_fast::cpu {

struct StatisticsGeometry {
  int64_t images, channels, height, width;
  bool background_grams;
};

// How the kernels cut the work; depends on the shape only, so that results do not depend on the number of threads.
struct StatisticsBlocks {
  int64_t block_pixels;    // pixels of one cache block
  int64_t block_channels;  // channels of one cache block
  int64_t row;             // elements a packed row of a block takes, padding included
  int64_t padded_images;   // rows of the packed blocks and of the Grams: images rounded up to the register tile
};

// Count, mean and sum of squared deviations of one image over some of its elements, merged in a fixed order.
struct Moments {
  double count, mean, m2;
};

// Chan's rule. static: a weak symbol here would be emitted once per instruction set (csrc/cpu/simd.h).
static inline void merge(Moments& into, const Moments& part) {
  if (part.count == 0) return;
  const double total = into.count + part.count, delta = part.mean - into.mean;
  into.m2 += part.m2 + delta * delta * into.count * part.count / total;
  into.mean += delta * part.count / total;
  into.count = total;
}

// Coefficients of the gradient of the two variances of one image: grad += scale · (value - mean).
struct VarianceGrad {
  double background_scale, background_mean, vjp_scale, vjp_mean;
};

template <class T>
struct StatisticsInputs {
  MapView vjp, x;
  const T* mask;  // [N, P]
};

template <class T>
struct StatisticsGrads {
  const T* sym_vjp;             // [rows, N]: grad_gram_vjp + its transpose; rows = padded_images
  const T* sym_x;               // the same of gram_x
  const T* sym_background_vjp;  // null unless background Grams were asked for
  const T* sym_background_x;
  const VarianceGrad* variance;  // [N]
  MapView grad_vjp, grad_x;      // data null where not needed; element type T
  T* grad_mask;                  // [N, P] or null
};

template <class T>
struct StatisticsKernels {
  StatisticsBlocks (*blocks)(const StatisticsGeometry&);
  int64_t (*forward_scratch_bytes)(const StatisticsGeometry&);
  int64_t (*backward_scratch_bytes)(const StatisticsGeometry&);
  // Adds the pixels [from, to) to grams [2 or 4][rows, rows] (upper tiles; order vjp, x, background vjp, background x)
  // and to moments [N][2] (background, whole map).
  void (*forward)(const StatisticsGeometry&, const StatisticsInputs<T>&, int64_t from, int64_t to, double* grams,
                  Moments* moments, void* scratch);
  void (*backward)(const StatisticsGeometry&, const StatisticsInputs<T>&, const StatisticsGrads<T>&, int64_t from,
                   int64_t to, void* scratch);
};

SIB_FAST_DECLARE_TABLES(StatisticsKernels, statistics_kernels)

}  // namespace sib_fast::cpu
