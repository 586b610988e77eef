// batch_norm on every device: arguments checked, results allocated, the device's passes called, registration.
#pragma once

#include "common/arguments.h"
#include "common/batch_norm.h"

namespace sib_fast {

// Channels first [images, channels, spatial], or rows of channels.
struct BatchNormShape {
  bool channels_last;
  int64_t images, channels, spatial;
  int64_t count() const { return images * spatial; }
};

template <class Kernels>
struct BatchNormOps {
  static constexpr const char* kOp = "batch_norm";

  static BatchNormShape shape_of(const Tensor& x) {
    SIB_CHECK(kOp, x.dim() >= 2 && x.numel() > 0, "x must have shape [N, C, *] and elements");
    check_element(kOp, x);
    const int64_t spatial = x.numel() / (x.size(0) * x.size(1));
    const bool first = lies(x, false);
    SIB_CHECK(kOp, first || lies(x, true), "x must be contiguous or channels last");
    // A channel of one-element runs is read row by row.
    return {!first || spatial == 1, x.size(0), x.size(1), spatial};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                            double eps) {
    const BatchNormShape shape = shape_of(x);
    check_channels(kOp, x, shape.channels, {{"weight", weight}, {"bias", bias}});
    const typename Kernels::Guard guard(x);
    Tensor y = like(x), mean = new_double(x, {shape.channels}), variance = new_double(x, {shape.channels});
    Tensor invstd = new_double(x, {shape.channels});
    by_element<Kernels>(x.scalar_type(), [&](auto e) {
      Kernels::template forward<decltype(e)>(shape, x, weight, bias, eps, y, mean, variance, invstd);
    });
    return {y, mean, variance, invstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor x, MaybeTensor weight, Tensor mean,
                                                     Tensor invstd, MaybeTensor addend, bool need_x) {
    const BatchNormShape shape = shape_of(x);
    check_alike(kOp, "grad_y", grad_y, x, shape.channels_last);
    if (addend) check_alike(kOp, "addend", *addend, x, shape.channels_last);
    return norm_backward<Kernels>(kOp, shape, shape.channels,
                                  {grad_y, x, weight, mean, invstd, like(x, need_x), new_accumulated(x, shape.channels),
                                   new_accumulated(x, shape.channels)},
                                  addend);
  }

  // Eval mode.
  static std::tuple<Tensor, Tensor, Tensor> running_backward(Tensor grad_y, Tensor x, MaybeTensor weight,
                                                             MaybeTensor mean, Tensor variance, double eps,
                                                             bool need_x) {
    const BatchNormShape shape = shape_of(x);
    check_alike(kOp, "grad_y", grad_y, x, shape.channels_last);
    check_channels(kOp, x, shape.channels, {{"weight", weight}, {"mean", mean}, {"variance", variance}});
    const typename Kernels::Guard guard(x);
    Tensor grad_x = like(x, need_x), grad_weight = new_accumulated(x, shape.channels);
    Tensor grad_bias = new_accumulated(x, shape.channels);
    by_element<Kernels>(x.scalar_type(), [&](auto e) {
      Kernels::template running_backward<decltype(e)>(shape, grad_y, x, weight, mean, variance, eps, grad_x,
                                                      grad_weight, grad_bias);
    });
    return {grad_x, grad_weight, grad_bias};
  }

  static std::tuple<Tensor, Tensor, Tensor> double_backward(Tensor u, MaybeTensor u_weight, MaybeTensor u_bias,
                                                            Tensor grad_y, Tensor x, MaybeTensor weight, Tensor mean,
                                                            Tensor invstd, bool need_grad_y, bool need_x) {
    const BatchNormShape shape = shape_of(x);
    check_alike(kOp, "u", u, x, shape.channels_last);
    check_alike(kOp, "grad_y", grad_y, x, shape.channels_last);
    return norm_double_backward<Kernels>(kOp, shape, shape.channels,
                                         {u, u_weight, u_bias, grad_y, x, weight, mean, invstd, like(x, need_grad_y),
                                          like(x, need_x), new_accumulated(x, shape.channels)});
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_batch_norm", TORCH_BOX(&BatchNormOps::forward));
    m.impl("_batch_norm_backward", TORCH_BOX(&BatchNormOps::backward));
    m.impl("_batch_norm_double_backward", TORCH_BOX(&BatchNormOps::double_backward));
  }
};

}  // namespace sib_fast
