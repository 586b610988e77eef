// The double backward of smooth activations on the CPU: both parts in one pass.
//
//   grad_x = gy·f'(x);  given u, the cotangent of grad_x:   to gy  u·f'(x)      to x  u·gy·f''(x)
//
// Traffic   reads u, gy, x once; writes two activations. PyTorch composes it of about ten passes.
// Precision halves are widened to float where they are read and rounded once where they are written.
// Order     every element by itself: equal inputs give equal bits at any thread count.
// Twins     ops/activation/__init__.py composes the same from PyTorch's ops; reference.py is the truth.

#include "cpu/activation_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// σ(z) and 1 - σ(z), both to full relative accuracy: 1 - s cancels where s is near 1.
template <class T>
inline void sigmoids(T z, T& s, T& rest) {
  const T e = exp_lane(-z);
  s = T(1) / (T(1) + e);
  rest = e * s;
}

// A struct a kind: operator()(s, first, second) gives f' and ∂f'/∂s of the saved value s.
template <class T>
struct Hardswish {
  void operator()(T x, T& first, T& second) const {
    first = x <= T(-3) ? T(0) : x < T(3) ? x / T(3) + T(0.5) : T(1);
    second = (x > T(-3)) & (x < T(3)) ? T(1) / T(3) : T(0);
  }
};
template <class T>
struct Silu {
  void operator()(T x, T& first, T& second) const {
    T s, rest;
    sigmoids(x, s, rest);
    const T slope = s * rest;
    first = s + x * slope;
    second = slope * (T(2) + x * (rest - s));
  }
};
template <class T>
struct Gelu {
  void operator()(T x, T& first, T& second) const {
    first = T(0);
    second = exp_lane(T(-0.5) * x * x) * T(0.39894228040143267794) * (T(2) - x * x);  // 1/sqrt(2π)
  }
};
template <class T>
struct GeluTanh {  // x·σ(z), z = sqrt(8/π)·(x + 0.044715·x³)
  void operator()(T x, T& first, T& second) const {
    const T k = T(1.59576912160573071176), cubic = T(0.044715);
    T s, rest;
    sigmoids(k * (x + cubic * x * x * x), s, rest);
    const T slope = s * rest;
    const T z1 = k * (T(1) + T(3) * cubic * x * x), z2 = k * T(6) * cubic * x;
    first = s + x * slope * z1;
    second = slope * (T(2) * z1 + x * ((rest - s) * z1 * z1 + z2));
  }
};
template <class T>
struct Mish {  // t = tanh(softplus(x)) = n/(n + 2), n = e^x(e^x + 2)
  void operator()(T x, T& first, T& second) const {
    const T e = exp_lane(x > T(20) ? T(20) : x), n = e * (e + T(2)), s = e / (T(1) + e);
    const T rest = T(1) / (n + T(2)), t = n * rest, slope = T(2) * rest * (T(1) + t);
    first = t + x * slope * s;
    second = slope * s * (T(2) + x * (T(1) - s - T(2) * t * s));
  }
};
template <class T>
struct Elu {
  T alpha;
  void operator()(T x, T& first, T& second) const {
    const T e = alpha * exp_lane(x > T(0) ? T(0) : x);
    first = x > T(0) ? T(1) : e;
    second = x > T(0) ? T(0) : e;
  }
};
template <class T>
struct Softplus {
  T beta, threshold;
  void operator()(T x, T& first, T& second) const {
    const T z = x * beta;
    T s, rest;
    sigmoids(z, s, rest);
    first = z > threshold ? T(1) : s;
    second = z > threshold ? T(0) : beta * s * rest;
  }
};
template <class T>
struct Sigmoid {
  void operator()(T y, T& first, T& second) const {
    first = y * (T(1) - y);
    second = T(1) - T(2) * y;
  }
};
template <class T>
struct Tanh {
  void operator()(T y, T& first, T& second) const {
    first = T(1) - y * y;
    second = T(-2) * y;
  }
};

template <class E, class F>
void write(F f, const E* u, const E* gy, const E* saved, int64_t count, E* to_grad_y, E* to_saved) {
  using T = Compute<E>;
  const auto first_at = [=](int64_t i) {
    T first, second;
    f(get(saved[i]), first, second);
    return get(u[i]) * first;
  };
  const auto second_at = [=](int64_t i) {
    T first, second;
    f(get(saved[i]), first, second);
    return get(u[i]) * get(gy[i]) * second;
  };
  if (to_grad_y && to_saved) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      T first, second;
      f(get(saved[i]), first, second);
      const T v = get(u[i]), g = get(gy[i]);
      put(to_grad_y + i, v * first);
      put(to_saved + i, v * g * second);
    }
  } else if (to_grad_y) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) put(to_grad_y + i, first_at(i));
  } else if (to_saved) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) put(to_saved + i, second_at(i));
  }
}

template <class E>
void double_backward(Activation kind, double a, double b, const E* u, const E* gy, const E* saved, int64_t count,
                     E* to_grad_y, E* to_saved) {
  using T = Compute<E>;
  const auto with = [&](auto f) { write<E>(f, u, gy, saved, count, to_grad_y, to_saved); };
  switch (kind) {
    case Activation::hardswish:
      return with(Hardswish<T>{});
    case Activation::silu:
      return with(Silu<T>{});
    case Activation::gelu:
      return with(Gelu<T>{});
    case Activation::gelu_tanh:
      return with(GeluTanh<T>{});
    case Activation::mish:
      return with(Mish<T>{});
    case Activation::elu:
      return with(Elu<T>{static_cast<T>(a)});
    case Activation::softplus:
      return with(Softplus<T>{static_cast<T>(a), static_cast<T>(b)});
    case Activation::sigmoid:
      return with(Sigmoid<T>{});
    case Activation::tanh:
      return with(Tanh<T>{});
  }
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
