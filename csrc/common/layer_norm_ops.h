// layer_norm and group_norm on every device: arguments checked, results allocated, the device's passes called,
// registration.
#pragma once

#include "common/arguments.h"
#include "common/layer_norm.h"

namespace sib_fast {

// Rows of `length` elements; row r has the channels of group r % groups, `spatial` elements each.
struct LayerNormShape {
  int64_t length, groups, spatial, rows, channels;  // channels: of all groups
};

template <class Kernels>
struct LayerNormOps {
  static constexpr const char* kOp = "layer_norm";

  static LayerNormShape shape_of(const Tensor& x, int64_t length, int64_t groups, int64_t spatial) {
    check_element(kOp, x);
    SIB_CHECK(kOp, x.is_contiguous(), "x must be contiguous");
    SIB_CHECK(kOp,
              length > 0 && groups > 0 && spatial > 0 && length % spatial == 0 && x.numel() % (length * groups) == 0,
              "x must consist of rows of ", length, " elements");
    return {length, groups, spatial, x.numel() / length, groups * (length / spatial)};
  }

  static std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, MaybeTensor weight, MaybeTensor bias, int64_t length,
                                                    int64_t groups, int64_t spatial, double eps) {
    const LayerNormShape shape = shape_of(x, length, groups, spatial);
    check_channels(kOp, x, shape.channels, {{"weight", weight}, {"bias", bias}});
    const typename Kernels::Guard guard(x);
    Tensor y = like(x), mean = new_double(x, {shape.rows}), invstd = new_double(x, {shape.rows});
    by_element<Kernels>(x.scalar_type(), [&](auto e) {
      Kernels::template forward<decltype(e)>(shape, x, weight, bias, eps, y, mean, invstd);
    });
    return {y, mean, invstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor x, MaybeTensor weight, Tensor mean,
                                                     Tensor invstd, int64_t length, int64_t groups, int64_t spatial,
                                                     bool need_x, bool need_weight, bool need_bias) {
    const LayerNormShape shape = shape_of(x, length, groups, spatial);
    check_contiguous(kOp, x, {{"grad_y", grad_y}});
    return norm_backward<Kernels>(
        kOp, shape, shape.rows,
        {grad_y, x, weight, mean, invstd, like(x, need_x), new_accumulated(x, need_weight ? shape.channels : 0),
         new_accumulated(x, need_bias ? shape.channels : 0)});
  }

  static std::tuple<Tensor, Tensor, Tensor> double_backward(Tensor u, MaybeTensor u_weight, MaybeTensor u_bias,
                                                            Tensor grad_y, Tensor x, MaybeTensor weight, Tensor mean,
                                                            Tensor invstd, int64_t length, int64_t groups,
                                                            int64_t spatial, bool need_grad_y, bool need_x,
                                                            bool need_weight) {
    const LayerNormShape shape = shape_of(x, length, groups, spatial);
    check_contiguous(kOp, x, {{"u", u}, {"grad_y", grad_y}});
    return norm_double_backward<Kernels>(kOp, shape, shape.rows,
                                         {u, u_weight, u_bias, grad_y, x, weight, mean, invstd, like(x, need_grad_y),
                                          like(x, need_x), new_accumulated(x, need_weight ? shape.channels : 0)});
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("_layer_norm", TORCH_BOX(&LayerNormOps::forward));
    m.impl("_layer_norm_backward", TORCH_BOX(&LayerNormOps::backward));
    m.impl("_layer_norm_double_backward", TORCH_BOX(&LayerNormOps::double_backward));
  }
};

}  // namespace sib_fast
