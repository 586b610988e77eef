// The double backward of smooth activations on the CPU: both parts in one pass; formulas in common/activation.h.
//
// Traffic   reads u, gy, x once; writes two activations. PyTorch composes it of about ten passes.
// Precision halves are widened to float where they are read and rounded once where they are written.
// Order     every element by itself: equal inputs give equal bits at any thread count.
// Twins     cuda/activation_cuda.cu; ops/activation/__init__.py composes the same from PyTorch's ops; truth:
// reference.py.

#include "cpu/activation_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// In the unnamed namespace, so that what is made with it belongs to this instruction set alone.
struct LaneMath {
  static constexpr bool has_erf = false;
  template <class T>
  static T exp(T x) {
    return exp_lane(x);
  }
  template <class T>
  static T reciprocal(T y) {
    return T(1) / y;
  }
};

template <class E, Activation kind>
void write(Compute<E> a, Compute<E> b, const E* u, const E* gy, const E* saved, int64_t count, E* to_grad_y,
           E* to_saved) {
  using T = Compute<E>;
  const auto at = [=](int64_t i, T& first, T& second) {
    const T v = get(u[i]);
    activation_double_backward<kind, LaneMath>(get(saved[i]), v, v * get(gy[i]), a, b, first, second);
  };
  if (to_grad_y && to_saved) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      T first = 0, second;
      at(i, first, second);
      put(to_grad_y + i, first);
      put(to_saved + i, second);
    }
  } else if (to_grad_y) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      T first = 0, second;
      at(i, first, second);
      put(to_grad_y + i, first);
    }
  } else if (to_saved) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      T first = 0, second;
      at(i, first, second);
      put(to_saved + i, second);
    }
  }
}

template <class E>
void double_backward(Activation kind, double a, double b, const E* u, const E* gy, const E* saved, int64_t count,
                     E* to_grad_y, E* to_saved) {
  using T = Compute<E>;
  with_activation(kind, [&](auto k) {
    write<E, decltype(k)::value>(static_cast<T>(a), static_cast<T>(b), u, gy, saved, count, to_grad_y, to_saved);
  });
}

template <class E>
constexpr ActivationKernels<E> kTable = {double_backward<E>};

}  // namespace

#define SIB_FAST_TABLE_OF(E)                                             \
  template <>                                                            \
  const ActivationKernels<E>& SIB_FAST_TABLE(activation_kernels_)<E>() { \
    return kTable<E>;                                                    \
  }
SIB_FAST_TABLE_OF(double)
SIB_FAST_TABLE_OF(float)
SIB_FAST_TABLE_OF(BFloat16Bits)
SIB_FAST_TABLE_OF(Float16Bits)

}  // namespace sib_fast::cpu
