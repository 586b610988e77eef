// The double backward of softmax along rows on the CPU: both parts while a row is in cache.
//
// Formulas  common/softmax.h.
// Traffic   reads u, gy, y once; writes two. PyTorch composes it of some seven passes.
// Precision halves are widened to float where they are read and rounded once where they are written; sums in double.
// Order     a row is summed in memory order by one thread: equal inputs give equal bits at any thread count.
// Twins     ops/softmax/__init__.py composes the same from PyTorch's ops; reference.py is the truth.

#include "cpu/softmax_kernels.h"

#include "common/softmax.h"
#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

template <class E>
void double_backward(const E* u, const E* gy, const E* y, int64_t rows, int64_t length, E* to_grad_y, E* to_y) {
  using T = Compute<E>;
  for (int64_t r = 0; r < rows; ++r) {
    const E *v = u + r * length, *g = gy + r * length, *p = y + r * length;
    double sum_g = 0, sum_u = 0;
#pragma omp simd reduction(+ : sum_g, sum_u)
    for (int64_t i = 0; i < length; ++i) {
      const double weight = static_cast<double>(get(p[i]));
      sum_g += weight * static_cast<double>(get(g[i]));
      sum_u += weight * static_cast<double>(get(v[i]));
    }
    const T c = static_cast<T>(sum_g), b = static_cast<T>(sum_u);
    if (to_grad_y) {
      E* out = to_grad_y + r * length;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) put(out + i, softmax_to_grad_y(get(v[i]), get(p[i]), b));
    }
    if (to_y) {
      E* out = to_y + r * length;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) put(out + i, softmax_to_y(get(v[i]), get(g[i]), b, c));
    }
  }
}

template <class E>
constexpr SoftmaxKernels<E> kTable = {double_backward<E>};

}  // namespace

SIB_FAST_DEFINE_TABLES(SoftmaxKernels, softmax_kernels)

}  // namespace sib_fast::cpu
