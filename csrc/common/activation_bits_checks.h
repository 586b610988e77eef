// What the kernels of activation with bits ask of their arguments, on every device.
#pragma once

#include "common/activation_bits.h"
#include "common/check.h"
#include "common/layout.h"

namespace sib_fast {

inline void check_bits(const char* op, const char* name, const Tensor& t, int64_t kind) {
  SIB_CHECK(op, kind >= 0 && kind < kTwoSlopes, "kind must be a number of common/activation_bits.h, got ", kind);
  SIB_CHECK(op, is_supported(t.scalar_type()), name, " must be float64, float32, bfloat16 or float16");
  SIB_CHECK(op, lies_dense(t), name, " must lie in memory without gaps");
}

inline void check_bits_forward(const char* op, const Tensor& x, const Tensor& y, int64_t kind) {
  check_bits(op, "x", x, kind);
  SIB_CHECK(op, y.scalar_type() == x.scalar_type(), "y must have the dtype of x");
  bool same = y.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = y.size(d) == x.size(d) && y.stride(d) == x.stride(d);
  SIB_CHECK(op, same, "y must have the shape and layout of x");
}

inline void check_bits_backward(const char* op, const Tensor& grad_y, const Tensor& bits, int64_t kind) {
  check_bits(op, "grad_y", grad_y, kind);
  check_plain(op, "bits", bits, ScalarType::Byte, bits_bytes(grad_y.numel()));
}

}  // namespace sib_fast
