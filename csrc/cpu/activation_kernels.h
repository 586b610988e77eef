// The double backward of a smooth activation y = f(x), element by element, one table per element type and instruction
// set.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/kernel_tables.h"

namespace sib_fast::cpu {

template <class E>
struct ActivationKernels {
  // to_grad_y = u·f',  to_saved = u·gy·∂f'/∂saved over count elements; one may be null. a, b: the kind's parameters.
  // gelu's f' is not to be had here (it needs erf): to_grad_y must be null.
  void (*double_backward)(Activation kind, double a, double b, const E* u, const E* gy, const E* saved, int64_t count,
                          E* to_grad_y, E* to_saved);
};

SIB_FAST_DECLARE_TABLES(ActivationKernels, activation_kernels)

}  // namespace sib_fast::cpu
