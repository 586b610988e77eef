// softmax for CPU tensors: fixed blocks of rows on threads.

#include "common/softmax_ops.h"
#include "cpu/capability.h"
#include "cpu/softmax_kernels.h"
#include "cpu/tensor_view.h"

namespace sib_fast::cpu {
namespace {

struct Kernels : OnCpu {
  template <class E>
  static void double_backward(int64_t rows, int64_t length, const Tensor& u, const Tensor& grad_y, const Tensor& y,
                              Tensor& to_grad_y, Tensor& to_y) {
    const auto& kernels = SIB_FAST_PICK(softmax_kernels, E);
    E *out_g = out<E>(to_grad_y), *out_y = out<E>(to_y);
    const int64_t block = kElementsOfTask > length ? kElementsOfTask / length : 1;  // or one row
    for_blocks(rows, block, [&](int64_t from, int64_t to) {
      const int64_t at = from * length;
      kernels.double_backward(in<E>(u) + at, in<E>(grad_y) + at, in<E>(y) + at, to - from, length,
                              out_g ? out_g + at : nullptr, out_y ? out_y + at : nullptr);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_fast, CPU, m) { SoftmaxOps<Kernels>::implement(m); }

}  // namespace sib_fast::cpu
