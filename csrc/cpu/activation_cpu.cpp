// activation for CPU tensors: checks, threads (fixed blocks of elements) and registration.

#include <tuple>

#include "common/layout.h"
#include "cpu/activation_kernels.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "activation";
constexpr int64_t kBlock = 16384;  // elements a task: three inputs and two outputs of float32 stay in a 1 MiB L2

template <class E>
std::tuple<Tensor, Tensor> run(const Tensor& u, const Tensor& grad_y, const Tensor& saved, Activation kind, double a,
                               double b, bool need_grad_y, bool need_saved) {
  static const ActivationKernels<E>& kernels = SIB_FAST_PICK(activation_kernels, E);
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(saved) : torch::stable::new_empty(u, {0});
  Tensor to_saved = need_saved ? torch::stable::empty_like(saved) : torch::stable::new_empty(u, {0});
  const int64_t count = saved.numel();
  if (count == 0) return {to_grad_y, to_saved};
  const auto* v = static_cast<const E*>(u.const_data_ptr());
  const auto* g = static_cast<const E*>(grad_y.const_data_ptr());
  const auto* s = static_cast<const E*>(saved.const_data_ptr());
  E* y = need_grad_y ? static_cast<E*>(to_grad_y.mutable_data_ptr()) : nullptr;
  E* x = need_saved ? static_cast<E*>(to_saved.mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kBlock, to = end * kBlock < count ? end * kBlock : count;
    kernels.double_backward(kind, a, b, v + from, g + from, s + from, to - from, y ? y + from : nullptr,
                            x ? x + from : nullptr);
  });
  return {to_grad_y, to_saved};
}

std::tuple<Tensor, Tensor> activation_double_backward(Tensor u, Tensor grad_y, Tensor saved, int64_t kind, double a,
                                                      double b, bool need_grad_y, bool need_saved) {
  SIB_CHECK(kOp, kind >= 0 && kind < kActivations, "kind must be a number of common/activation.h, got ", kind);
  SIB_CHECK(kOp, is_supported(saved.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  const auto which = static_cast<Activation>(kind);
  SIB_CHECK(kOp, which != Activation::gelu || !need_grad_y, "gelu has no kernel for its first derivative");
  const bool channels_last = saved.dim() > 2 && !lies(saved, false);
  check_alike(kOp, "x", saved, saved, channels_last);
  check_alike(kOp, "u", u, saved, channels_last);
  check_alike(kOp, "grad_y", grad_y, saved, channels_last);
  switch (saved.scalar_type()) {
    case ScalarType::Double:
      return run<double>(u, grad_y, saved, which, a, b, need_grad_y, need_saved);
    case ScalarType::BFloat16:
      return run<BFloat16Bits>(u, grad_y, saved, which, a, b, need_grad_y, need_saved);
    case ScalarType::Half:
      return run<Float16Bits>(u, grad_y, saved, which, a, b, need_grad_y, need_saved);
    default:
      return run<float>(u, grad_y, saved, which, a, b, need_grad_y, need_saved);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_activation_double_backward", TORCH_BOX(&activation_double_backward));
}

}  // namespace sib_fast::cpu
