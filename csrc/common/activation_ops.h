// activation on every device: arguments checked, results allocated, the device's passes called, registration.
#pragma once

#include "common/activation.h"
#include "common/activation_bits.h"
#include "common/arguments.h"

namespace sib_fast {

template <class Kernels>
struct ActivationOps {
  static constexpr const char* kOp = "activation";

  static std::tuple<Tensor, Tensor> double_backward(Tensor u, Tensor grad_y, Tensor saved, int64_t kind, double a,
                                                    double b, bool need_grad_y, bool need_saved) {
    SIB_CHECK(kOp, kind >= 0 && kind < kActivations, "kind must be a number of common/activation.h, got ", kind);
    check_element(kOp, saved);
    const auto which = static_cast<Activation>(kind);
    SIB_CHECK(kOp, Kernels::kHasErf || which != Activation::gelu || !need_grad_y,
              "gelu has no kernel for its first derivative");
    const bool channels_last = saved.dim() > 2 && !lies(saved, false);
    check_alike(kOp, "x", saved, saved, channels_last);
    check_alike(kOp, "u", u, saved, channels_last);
    check_alike(kOp, "grad_y", grad_y, saved, channels_last);
    const typename Kernels::Guard guard(saved);
    Tensor to_grad_y = like(saved, need_grad_y), to_saved = like(saved, need_saved);
    if (saved.numel() > 0 && (need_grad_y || need_saved)) {
      by_element<Kernels>(saved.scalar_type(), [&](auto e) {
        Kernels::template double_backward<decltype(e)>(u, grad_y, saved, which, a, b, to_grad_y, to_saved);
      });
    }
    return {to_grad_y, to_saved};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_activation_double_backward", TORCH_BOX(&ActivationOps::double_backward));
  }
};

template <class Kernels>
struct ActivationBitsOps {
  static constexpr const char* kOp = "activation";

  static void check(const char* name, const Tensor& t, int64_t kind) {
    SIB_CHECK(kOp, kind >= 0 && kind < kTwoSlopes, "kind must be a number of common/activation_bits.h, got ", kind);
    SIB_CHECK(kOp, is_supported(t.scalar_type()), name, " must be float64, float32, bfloat16 or float16");
    SIB_CHECK(kOp, lies_dense(t), name, " must lie in memory without gaps");
  }

  static Tensor forward(Tensor x, Tensor y, int64_t kind, double a, double b) {
    check("x", x, kind);
    SIB_CHECK(kOp, y.scalar_type() == x.scalar_type(), "y must have the dtype of x");
    bool same = y.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = y.size(d) == x.size(d) && y.stride(d) == x.stride(d);
    SIB_CHECK(kOp, same, "y must have the shape and layout of x");
    const typename Kernels::Guard guard(x);
    Tensor bits = torch::stable::new_empty(x, {bits_bytes(x.numel())}, ScalarType::Byte);
    by_element<Kernels>(x.scalar_type(), [&](auto e) {
      Kernels::template forward<decltype(e)>(x, y, bits, static_cast<TwoSlopes>(kind), a, b);
    });
    return bits;
  }

  static Tensor backward(Tensor grad_y, Tensor bits, int64_t kind, double slope) {
    check("grad_y", grad_y, kind);
    check_plain(kOp, "bits", bits, ScalarType::Byte, bits_bytes(grad_y.numel()));
    const typename Kernels::Guard guard(grad_y);
    Tensor grad_x = like(grad_y);
    by_element<Kernels>(grad_y.scalar_type(), [&](auto e) {
      Kernels::template backward<decltype(e)>(grad_y, bits, grad_x, static_cast<TwoSlopes>(kind), slope);
    });
    return grad_x;
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_activation_bits", TORCH_BOX(&ActivationBitsOps::forward));
    m.impl("_activation_bits_backward", TORCH_BOX(&ActivationBitsOps::backward));
  }
};

}  // namespace sib_fast
