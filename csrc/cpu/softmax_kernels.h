// The gradient of softmax's gradient, row by row. One table per element type and instruction set.
#pragma once

#include <cstdint>

#include "cpu/kernel_tables.h"

namespace sib_fast::cpu {

template <class E>
struct SoftmaxKernels {
  // `rows` rows of `length`; to_grad_y and to_y, each unless null.
  void (*double_backward)(const E* u, const E* gy, const E* y, int64_t rows, int64_t length, E* to_grad_y, E* to_y);
};

SIB_FAST_DECLARE_TABLES(SoftmaxKernels, softmax_kernels)

}  // namespace sib_fast::cpu
