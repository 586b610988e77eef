// activation with bits for CPU tensors: fixed blocks of whole units on threads.

#include "common/activation_ops.h"
#include "cpu/activation_bits_kernels.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

static_assert(kElementsOfTask % kBitsUnit == 0, "a unit belongs to one task");

struct Kernels : OnCpu {
  template <class E>
  static void forward(const Tensor& x, Tensor& y, Tensor& bits, TwoSlopes kind, double a, double b) {
    const auto& kernels = SIB_FAST_PICK(activation_bits_kernels, E);
    auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
    for_blocks(x.numel(), kElementsOfTask, [&](int64_t first, int64_t last) {
      kernels.forward(kind, a, b, in<E>(x) + first, last - first, out<E>(y) + first, to + first / kBitsUnit * kBitsRow);
    });
  }

  template <class E>
  static void backward(const Tensor& grad_y, const Tensor& bits, Tensor& grad_x, TwoSlopes kind, double slope) {
    const auto& kernels = SIB_FAST_PICK(activation_bits_kernels, E);
    for_blocks(grad_y.numel(), kElementsOfTask, [&](int64_t first, int64_t last) {
      kernels.backward(kind, slope, in<E>(grad_y) + first, in<uint8_t>(bits) + first / kBitsUnit * kBitsRow,
                       last - first, out<E>(grad_x) + first);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { ActivationBitsOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
