// activation with bits for CPU tensors: checks, threads (fixed blocks of whole units) and registration.

#include "common/activation_bits_checks.h"
#include "cpu/activation_bits_kernels.h"
#include "cpu/capability.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "activation";
constexpr int64_t kBlock = 16384;  // elements a task, as in activation_cpu.cpp; a multiple of a unit

template <class Function>
void for_blocks(int64_t count, Function function) {
  torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    function(begin * kBlock, end * kBlock < count ? end * kBlock : count);
  });
}

template <class E>
void run(const Tensor& x, Tensor& y, Tensor& bits, TwoSlopes kind, double a, double b) {
  static const ActivationBitsKernels<E>& kernels = SIB_FAST_PICK(activation_bits_kernels, E);
  const auto* in = static_cast<const E*>(x.const_data_ptr());
  auto* out = static_cast<E*>(y.mutable_data_ptr());
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  for_blocks(x.numel(), [&](int64_t first, int64_t last) {
    kernels.forward(kind, a, b, in + first, last - first, out + first, to + first / kBitsUnit * kBitsRow);
  });
}

template <class E>
void run_backward(const Tensor& grad_y, const Tensor& bits, Tensor& grad_x, TwoSlopes kind, double slope) {
  static const ActivationBitsKernels<E>& kernels = SIB_FAST_PICK(activation_bits_kernels, E);
  const auto* in = static_cast<const E*>(grad_y.const_data_ptr());
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* out = static_cast<E*>(grad_x.mutable_data_ptr());
  for_blocks(grad_y.numel(), [&](int64_t first, int64_t last) {
    kernels.backward(kind, slope, in + first, from + first / kBitsUnit * kBitsRow, last - first, out + first);
  });
}

Tensor activation_bits(Tensor x, Tensor y, int64_t kind, double a, double b) {
  check_bits_forward(kOp, x, y, kind);
  Tensor bits = torch::stable::new_empty(x, {bits_bytes(x.numel())}, ScalarType::Byte);
  const auto which = static_cast<TwoSlopes>(kind);
  switch (x.scalar_type()) {
    case ScalarType::Double:
      run<double>(x, y, bits, which, a, b);
      break;
    case ScalarType::BFloat16:
      run<BFloat16Bits>(x, y, bits, which, a, b);
      break;
    case ScalarType::Half:
      run<Float16Bits>(x, y, bits, which, a, b);
      break;
    default:
      run<float>(x, y, bits, which, a, b);
  }
  return bits;
}

Tensor activation_bits_backward(Tensor grad_y, Tensor bits, int64_t kind, double slope) {
  check_bits_backward(kOp, grad_y, bits, kind);
  Tensor grad_x = torch::stable::empty_like(grad_y);
  const auto which = static_cast<TwoSlopes>(kind);
  switch (grad_y.scalar_type()) {
    case ScalarType::Double:
      run_backward<double>(grad_y, bits, grad_x, which, slope);
      break;
    case ScalarType::BFloat16:
      run_backward<BFloat16Bits>(grad_y, bits, grad_x, which, slope);
      break;
    case ScalarType::Half:
      run_backward<Float16Bits>(grad_y, bits, grad_x, which, slope);
      break;
    default:
      run_backward<float>(grad_y, bits, grad_x, which, slope);
  }
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) {
  m.impl("_activation_bits", TORCH_BOX(&activation_bits));
  m.impl("_activation_bits_backward", TORCH_BOX(&activation_bits_backward));
}

}  // namespace sib_fast::cpu
