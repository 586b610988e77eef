// softmax for CPU tensors: checks, threads (fixed blocks of rows) and registration.

#include <tuple>

#include "common/check.h"
#include "cpu/capability.h"
#include "cpu/softmax_kernels.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

constexpr const char* kOp = "softmax";
constexpr int64_t kBlock = 16384;  // elements a task, or one row: three inputs and two outputs stay in a 1 MiB L2

template <class E>
std::tuple<Tensor, Tensor> run(const Tensor& u, const Tensor& grad_y, const Tensor& y, bool need_grad_y, bool need_y) {
  static const SoftmaxKernels<E>& kernels = SIB_FAST_PICK(softmax_kernels, E);
  Tensor to_grad_y = need_grad_y ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  Tensor to_y = need_y ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  if (y.numel() == 0) return {to_grad_y, to_y};
  const int64_t length = y.size(y.dim() - 1), rows = y.numel() / length;
  const int64_t block = kBlock > length ? kBlock / length : 1;
  const auto* v = static_cast<const E*>(u.const_data_ptr());
  const auto* g = static_cast<const E*>(grad_y.const_data_ptr());
  const auto* p = static_cast<const E*>(y.const_data_ptr());
  E* out_g = need_grad_y ? static_cast<E*>(to_grad_y.mutable_data_ptr()) : nullptr;
  E* out_y = need_y ? static_cast<E*>(to_y.mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * block, to = end * block < rows ? end * block : rows, at = from * length;
    kernels.double_backward(v + at, g + at, p + at, to - from, length, out_g ? out_g + at : nullptr,
                            out_y ? out_y + at : nullptr);
  });
  return {to_grad_y, to_y};
}

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor u, Tensor grad_y, Tensor y, bool need_grad_y, bool need_y) {
  SIB_CHECK(kOp, is_supported(y.scalar_type()), "x must be float64, float32, bfloat16 or float16");
  SIB_CHECK(kOp, y.dim() >= 1, "x must have a last dimension");
  for (const auto& [name, tensor] : {std::tuple<const char*, const Tensor&>{"u", u}, {"grad_y", grad_y}, {"x", y}}) {
    SIB_CHECK(kOp, tensor.numel() == y.numel() && tensor.is_contiguous(), name,
              " must be contiguous, in the shape of x");
    SIB_CHECK(kOp, tensor.scalar_type() == y.scalar_type(), name, " must have the dtype of x");
  }
  switch (y.scalar_type()) {
    case ScalarType::Double:
      return run<double>(u, grad_y, y, need_grad_y, need_y);
    case ScalarType::BFloat16:
      return run<BFloat16Bits>(u, grad_y, y, need_grad_y, need_y);
    case ScalarType::Half:
      return run<Float16Bits>(u, grad_y, y, need_grad_y, need_y);
    default:
      return run<float>(u, grad_y, y, need_grad_y, need_y);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { m.impl("_softmax_double_backward", TORCH_BOX(&softmax_double_backward)); }

}  // namespace sib_fast::cpu
