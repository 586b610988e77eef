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

template <class E, Activation kind, bool kFirst, bool kSecond>
void write(Compute<E> a, Compute<E> b, const E* u, const E* gy, const E* saved, int64_t count, E* to_grad_y,
           E* to_saved) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Compute<E> first = 0, second;
    const Compute<E> v = get(u[i]);
    activation_double_backward<kind, LaneMath>(get(saved[i]), v, v * get(gy[i]), a, b, first, second);
    if constexpr (kFirst) put(to_grad_y + i, first);
    if constexpr (kSecond) put(to_saved + i, second);
  }
}

template <class E>
void double_backward(Activation kind, double a, double b, const E* u, const E* gy, const E* saved, int64_t count,
                     E* to_grad_y, E* to_saved) {
  using T = Compute<E>;
  with_activation(kind, [&](auto k) {
    constexpr Activation which = decltype(k)::value;
    constexpr bool kFirst = LaneMath::has_erf || which != Activation::gelu;  // otherwise never asked for
    const auto pass = to_grad_y && to_saved ? write<E, which, kFirst, true>
                      : to_grad_y           ? write<E, which, kFirst, !kFirst>
                                            : write<E, which, false, true>;
    pass(static_cast<T>(a), static_cast<T>(b), u, gy, saved, count, to_grad_y, to_saved);
  });
}

template <class E>
constexpr ActivationKernels<E> kTable = {double_backward<E>};

}  // namespace

SIB_FAST_DEFINE_TABLES(ActivationKernels, activation_kernels)

}  // namespace sib_fast::cpu
