// softmax on every device: arguments checked, results allocated, the device's pass called, registration.
#pragma once

#include "common/arguments.h"

namespace sib_fast {

template <class Kernels>
struct SoftmaxOps {
  static constexpr const char* kOp = "softmax";

  static std::tuple<Tensor, Tensor> double_backward(Tensor u, Tensor grad_y, Tensor y, bool need_grad_y, bool need_y) {
    check_element(kOp, y);
    SIB_CHECK(kOp, y.dim() >= 1, "x must have a last dimension");
    check_contiguous(kOp, y, {{"u", u}, {"grad_y", grad_y}, {"x", y}});
    const typename Kernels::Guard guard(y);
    Tensor to_grad_y = like(y, need_grad_y), to_y = like(y, need_y);
    if (y.numel() > 0 && (need_grad_y || need_y)) {
      const int64_t length = y.size(y.dim() - 1);
      by_element<Kernels>(y.scalar_type(), [&](auto e) {
        Kernels::template double_backward<decltype(e)>(y.numel() / length, length, u, grad_y, y, to_grad_y, to_y);
      });
    }
    return {to_grad_y, to_y};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_softmax_double_backward", TORCH_BOX(&SoftmaxOps::double_backward));
  }
};

}  // namespace sib_fast
