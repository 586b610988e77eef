// The N×N end of the loss, as far as CPU and CUDA kernels share it (SPEC 5): norms and the objective, in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace sib_fast {

// Of a row's norm, as in torch.nn.functional.normalize.
constexpr double kNormFloor = 1e-12;

// Whether a row's norm is above the floor, and so has a gradient. Not so for a NaN, which shows in its Gram's elements.
SIB_HOST_DEVICE bool has_norm(double diagonal) { return diagonal > kNormFloor * kNormFloor; }
SIB_HOST_DEVICE double inverse_norm(double diagonal) {
  return 1.0 / (has_norm(diagonal) ? sqrt(diagonal) : kNormFloor);
}

// What depends on the batch size alone; by value to the kernels, so that no thread divides for it.
struct BatchScale {
  double images, mean, hsic;  // N, 1/N, 1/(N-1)²

  // tr(K_R Z K_x Z)/(N-1)² without Z, from Σ_ij K_R·K_x, Σ_i of the products of the row means and the two grand means.
  SIB_HOST_DEVICE double foreground(double products, double mean_products, double grand_vjp, double grand_x) const {
    return (products - 2.0 * images * mean_products + images * images * grand_vjp * grand_x) * hsic;
  }
};
inline BatchScale batch_scale(int64_t images) {
  const double n = static_cast<double>(images);
  return {n, 1.0 / n, 1.0 / ((n - 1.0) * (n - 1.0))};
}

// A 0-d tensor of float64 or float32; null counts as 0.
struct Scalar {
  const void* data;
  bool is_double;
  SIB_HOST_DEVICE double read() const {
    if (data == nullptr) return 0.0;
    return is_double ? *static_cast<const double*>(data) : static_cast<double>(*static_cast<const float*>(data));
  }
  // To another one of the same type.
  SIB_HOST_DEVICE void write(void* to, double value) const {
    if (is_double)
      *static_cast<double*>(to) = value;
    else
      *static_cast<float*>(to) = static_cast<float>(value);
  }
};

struct Objective {
  double lambda_fg, lambda_bg;
  int kind;  // 0 exp, 1 linear, 2 expm1: OBJECTIVES in sib_fast/ops/hsic_objective/__init__.py

  SIB_HOST_DEVICE double value(double base, double foreground, double background) const {
    if (kind == 0) return base + lambda_bg * exp(background) + lambda_fg * exp(-foreground);
    if (kind == 1) return base + lambda_bg * background - lambda_fg * foreground;
    return base + lambda_bg * expm1(background) + lambda_fg * expm1(-foreground);
  }
  SIB_HOST_DEVICE double slope_foreground(double foreground) const {
    return kind == 1 ? -lambda_fg : -lambda_fg * exp(-foreground);
  }
  SIB_HOST_DEVICE double slope_background(double background) const {
    return kind == 1 ? lambda_bg : lambda_bg * exp(background);
  }
};

}  // namespace sib_fast
