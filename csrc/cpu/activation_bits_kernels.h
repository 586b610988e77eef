// Activations of two slopes, forward with one bit an element and backward from it, one table per element type and
// instruction set.
#pragma once

#include <cstdint>

#include "common/activation_bits.h"
#include "cpu/kernel_tables.h"

namespace sib_fast::cpu {

template <class E>
struct ActivationBitsKernels {
  // y = f(x) and the bits of count elements, whole units of them; y may be x. a, b: the kind's parameters.
  void (*forward)(TwoSlopes kind, double a, double b, const E* x, int64_t count, E* y, uint8_t* bits);
  // grad_x = grad_y·f', from the bits. slope: leaky_relu's.
  void (*backward)(TwoSlopes kind, double slope, const E* grad_y, const uint8_t* bits, int64_t count, E* grad_x);
};

SIB_FAST_DECLARE_TABLES(ActivationBitsKernels, activation_bits_kernels)

}  // namespace sib_fast::cpu
