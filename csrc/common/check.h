// Argument checks of the registered ops: only what protects memory. The full contract, with the messages that a user
// sees, is checked in Python (sib_fast/_checks.py), since these ops are private.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "common/element.h"

namespace sib_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Accumulation type: what planes, sums and gradients are held in for an input of this type.
inline ScalarType accumulation_type(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      return Element::float32;
  }
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

#define SIB_CHECK(op, condition, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

inline void check_map(const char* op, const char* name, const Tensor& map) {
  SIB_CHECK(op, map.dim() == 4, name, " must have shape [N, C, H, W], got ", map.dim(), " dimensions");
  SIB_CHECK(op, is_supported(map.scalar_type()), name, " must be float64, float32, bfloat16 or float16");
  // Pixel indices are int32.
  SIB_CHECK(op, map.size(2) * map.size(3) < (int64_t{1} << 31), name, " must have H·W < 2^31");
}

inline void check_plain(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t numel) {
  SIB_CHECK(op, t.is_contiguous(), name, " must be contiguous");
  SIB_CHECK(op, t.scalar_type() == type, name, " has an unexpected dtype");
  SIB_CHECK(op, t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
}

}  // namespace sib_fast
