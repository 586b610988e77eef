// activation for CPU tensors: fixed blocks of elements on threads.

#include "common/activation_ops.h"
#include "cpu/activation_kernels.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

struct Kernels : OnCpu {
  static constexpr bool kHasErf = false;

  template <class E>
  static void double_backward(const Tensor& u, const Tensor& grad_y, const Tensor& saved, Activation kind, double a,
                              double b, Tensor& to_grad_y, Tensor& to_saved) {
    const auto& kernels = SIB_FAST_PICK(activation_kernels, E);
    E *y = out<E>(to_grad_y), *x = out<E>(to_saved);
    for_blocks(saved.numel(), kElementsOfTask, [&](int64_t from, int64_t to) {
      kernels.double_backward(kind, a, b, in<E>(u) + from, in<E>(grad_y) + from, in<E>(saved) + from, to - from,
                              y ? y + from : nullptr, x ? x + from : nullptr);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { ActivationOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
