// batch_norm for CPU tensors: memory, threads (one channel a task) and registration.

#include <optional>
#include <tuple>

#include "common/check.h"
#include "cpu/batch_norm_kernels.h"
#include "cpu/capability.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "batch_norm";

template <class T>
const BatchNormKernels<T>& kernels() {
  static const BatchNormKernels<T>& table = SIB_FAST_PICK(batch_norm_kernels, T);
  return table;
}

BatchNormShape shape_of(const Tensor& x) {
  SIB_CHECK(kOp, x.dim() == 3, "x must have shape [N, C, S], got ", x.dim(), " dimensions");
  SIB_CHECK(kOp, x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
            "x must be float32 or float64");
  check_plain(kOp, "x", x, x.scalar_type(), x.numel());
  return {x.size(0), x.size(1), x.size(2)};
}

// A per-channel argument: value(c) in double, or the default where it is absent.
class PerChannel {
 public:
  PerChannel(const char* name, const std::optional<Tensor>& t, ScalarType type, int64_t channels, double absent)
      : absent_(absent), is_double_(type == ScalarType::Double) {
    if (!t) return;
    check_plain(kOp, name, *t, type, channels);
    data_ = t->const_data_ptr();
  }
  double operator()(int64_t c) const {
    if (!data_) return absent_;
    return is_double_ ? static_cast<const double*>(data_)[c] : static_cast<double>(static_cast<const float*>(data_)[c]);
  }

 private:
  const void* data_ = nullptr;
  double absent_;
  bool is_double_;
};

template <class T, class Task>
void for_channels(int64_t channels, const Task& task) {
  torch::stable::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) task(kernels<T>(), c);
  });
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps) {
  const BatchNormShape shape = shape_of(x);
  const PerChannel gamma("weight", weight, x.scalar_type(), shape.channels, 1.0);
  const PerChannel beta("bias", bias, x.scalar_type(), shape.channels, 0.0);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {shape.channels}, ScalarType::Double);
  Tensor variance = torch::stable::new_empty(x, {shape.channels}, ScalarType::Double);
  Tensor invstd = torch::stable::new_empty(x, {shape.channels}, ScalarType::Double);
  double *m = out<double>(mean), *v = out<double>(variance), *s = out<double>(invstd);
  for_channels<T>(shape.channels, [&](const BatchNormKernels<T>& k, int64_t c) {
    const ChannelStatistics of = k.statistics(shape, in<T>(x), c, eps);
    m[c] = of.mean;
    v[c] = of.variance;
    s[c] = of.invstd;
    k.normalise(shape, in<T>(x), c, of.mean, of.invstd, gamma(c), beta(c), out<T>(y));
  });
  return {y, mean, variance, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias, double eps) {
  return x.scalar_type() == ScalarType::Double ? forward<double>(x, weight, bias, eps)
                                               : forward<float>(x, weight, bias, eps);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& weight,
                                            const Tensor& mean, const Tensor& invstd, bool need_x) {
  const BatchNormShape shape = shape_of(x);
  check_plain(kOp, "grad_y", grad_y, x.scalar_type(), x.numel());
  const PerChannel gamma("weight", weight, x.scalar_type(), shape.channels, 1.0);
  const PerChannel m("mean", mean, ScalarType::Double, shape.channels, 0.0);
  const PerChannel s("invstd", invstd, ScalarType::Double, shape.channels, 0.0);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {shape.channels}),
         grad_bias = torch::stable::new_empty(x, {shape.channels});
  T *gw = out<T>(grad_weight), *gb = out<T>(grad_bias);
  for_channels<T>(shape.channels, [&](const BatchNormKernels<T>& k, int64_t c) {
    double sums[2];
    k.backward(shape, in<T>(grad_y), in<T>(x), c, m(c), s(c), gamma(c), out<T>(grad_x), sums);
    gb[c] = static_cast<T>(sums[0]);
    gw[c] = static_cast<T>(sums[1]);
  });
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor invstd, bool need_x) {
  return x.scalar_type() == ScalarType::Double ? backward<double>(grad_y, x, weight, mean, invstd, need_x)
                                               : backward<float>(grad_y, x, weight, mean, invstd, need_x);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& u, const std::optional<Tensor>& u_weight,
                                                   const std::optional<Tensor>& u_bias, const Tensor& grad_y,
                                                   const Tensor& x, const std::optional<Tensor>& weight,
                                                   const Tensor& mean, const Tensor& invstd, bool need_grad_y,
                                                   bool need_x) {
  const BatchNormShape shape = shape_of(x);
  const ScalarType type = x.scalar_type();
  check_plain(kOp, "u", u, type, x.numel());
  check_plain(kOp, "grad_y", grad_y, type, x.numel());
  const PerChannel gamma("weight", weight, type, shape.channels, 1.0);
  const PerChannel u_gamma("u_weight", u_weight, type, shape.channels, 0.0);
  const PerChannel u_beta("u_bias", u_bias, type, shape.channels, 0.0);
  const PerChannel m("mean", mean, ScalarType::Double, shape.channels, 0.0);
  const PerChannel s("invstd", invstd, ScalarType::Double, shape.channels, 0.0);
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor to_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor to_weight = torch::stable::new_empty(x, {shape.channels});
  T* tw = out<T>(to_weight);
  for_channels<T>(shape.channels, [&](const BatchNormKernels<T>& k, int64_t c) {
    double to_gamma;
    k.double_backward(shape, in<T>(u), u_gamma(c), u_beta(c), in<T>(grad_y), in<T>(x), c, m(c), s(c), gamma(c),
                      out<T>(to_grad_y), out<T>(to_x), &to_gamma);
    tw[c] = static_cast<T>(to_gamma);
  });
  return {to_grad_y, to_x, to_weight};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(Tensor u, std::optional<Tensor> u_weight,
                                                              std::optional<Tensor> u_bias, Tensor grad_y, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              bool need_grad_y, bool need_x) {
  const auto run = x.scalar_type() == ScalarType::Double ? double_backward<double> : double_backward<float>;
  return run(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, need_grad_y, need_x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_batch_norm", TORCH_BOX(&batch_norm));
  m.impl("_batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("_batch_norm_double_backward", TORCH_BOX(&batch_norm_double_backward));
}

}  // namespace sib_fast::cpu
