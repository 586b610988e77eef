// Row kernels of hsic_objective, one table per instruction set. T is double: the type of the Grams.
#pragma once

#include <cstdint>

#include "cpu/kernel_tables.h"

namespace sib_fast::cpu {

// What a row needs of all columns: 1/norm of R and of x, and row means of K_R and of K_x, each [N].
template <class T>
struct HsicColumns {
  const T *inverse_vjp, *inverse_x, *mean_vjp, *mean_x;
};

template <class T>
struct HsicRowSums {
  T product, vjp, x;  // Σ_j K_R·K_x, Σ_j K_R, Σ_j K_x
};

// Σ_j grad_K_ij·K_ij of a row: what its norm's gradient is made of.
template <class T>
struct HsicAlong {
  T vjp, x;
};

template <class T>
struct HsicKernels {
  // Sums of row i of the normalised Grams; the means of `columns` are not read.
  HsicRowSums<T> (*row_sums)(const T* gram_vjp, const T* gram_x, const HsicColumns<T>& columns, int64_t i, int64_t N);
  // Row i of both gradients but for what goes through the row's norm; either may be null. grand: means of all of K_R
  // and of all of K_x; scale: ḟ/(N-1)².
  HsicAlong<T> (*row_gradient)(const T* gram_vjp, const T* gram_x, const HsicColumns<T>& columns, const T* grand,
                               T scale, int64_t i, int64_t N, T* grad_vjp, T* grad_x);
};

SIB_FAST_DECLARE_TABLES(HsicKernels, hsic_kernels)

}  // namespace sib_fast::cpu
