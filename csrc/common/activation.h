// The double backward of smooth activations y = f(x), one element: one text for the CPU's kernels and CUDA's.
//
//   grad_x = gy·f'(x);  given u, the cotangent of grad_x:   to gy  u·f'(x)      to x  u·gy·f''(x)
//
// `saved` is x, or y where f' is known from it (sigmoid, tanh). At a kink, and where a value is not finite, as PyTorch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace sib_fast {

// Numbers as in sib_fast/ops/activation/__init__.py, KINDS.
enum class Activation : int64_t { hardswish, silu, gelu, gelu_tanh, mish, elu, softplus, sigmoid, tanh };
constexpr int64_t kActivations = 9;
template <Activation kind>
using KindOf = std::integral_constant<Activation, kind>;

// σ(z) and 1 - σ(z), both to full relative accuracy: 1 - s cancels where s is near 1.
template <class Math, class T>
SIB_HOST_DEVICE void sigmoids(T z, T& s, T& rest) {
  const T e = Math::exp(-z);
  s = Math::reciprocal(T(1) + e);
  rest = e * s;
}

// to_grad_y = u·f', to_saved = u_gy·∂f'/∂saved, u_gy = u·gy. a, b: the kind's parameters.
// Math: exp(T), which clamps where the result would leave the normal range (Inf·0 otherwise) and passes NaN on;
// has_erf, and erf(T) if so: without, gelu writes no to_grad_y. A parameter, and not a call, since each instruction set
// of the CPU must have copies of its own (internal linkage by an unnamed argument; cpu/simd.h).
template <Activation kind, class Math, class T>
SIB_HOST_DEVICE void activation_double_backward(T saved, T u, T u_gy, T a, T b, T& to_grad_y, T& to_saved) {
  const T x = saved;
  (void)a, (void)b;
  if constexpr (kind == Activation::hardswish) {
    to_grad_y = x <= T(-3) ? T(0) : x < T(3) ? u * (x * (T(1) / T(3)) + T(0.5)) : u;
    to_saved = ((x > T(-3)) & (x < T(3))) ? u_gy * (T(1) / T(3)) : T(0);
  } else if constexpr (kind == Activation::silu) {
    T s, rest;
    sigmoids<Math>(x, s, rest);
    const T slope = s * rest;
    to_grad_y = u * (s + x * slope);
    to_saved = u_gy * (slope * (T(2) + x * (rest - s)));
  } else if constexpr (kind == Activation::gelu) {
    const T density = Math::exp(T(-0.5) * x * x) * T(0.39894228040143267794);  // 1/sqrt(2π)
    if constexpr (Math::has_erf) {
      to_grad_y = u * (T(0.5) * (T(1) + Math::erf(x * T(0.70710678118654752440))) + x * density);
    }
    to_saved = u_gy * (density * (T(2) - x * x));
  } else if constexpr (kind == Activation::gelu_tanh) {  // x·σ(z), z = sqrt(8/π)·(x + 0.044715·x³)
    const T k = T(1.59576912160573071176), cubic = T(0.044715);
    T s, rest;
    sigmoids<Math>(k * (x + cubic * x * x * x), s, rest);
    const T slope = s * rest;
    const T z1 = k * (T(1) + T(3) * cubic * x * x), z2 = k * T(6) * cubic * x;
    to_grad_y = u * (s + x * slope * z1);
    to_saved = u_gy * (slope * (T(2) * z1 + x * ((rest - s) * z1 * z1 + z2)));
  } else if constexpr (kind == Activation::mish) {  // t = tanh(softplus(x)) = n/(n + 2), n = e^x(e^x + 2)
    const T e = Math::exp(x > T(20) ? T(20) : x), n = e * (e + T(2)), s = e * Math::reciprocal(T(1) + e);
    const T rest = Math::reciprocal(n + T(2)), t = n * rest, slope = T(2) * rest * (T(1) + t);
    to_grad_y = u * (t + x * slope * s);
    to_saved = u_gy * (slope * s * (T(2) + x * (T(1) - s - T(2) * t * s)));
  } else if constexpr (kind == Activation::elu) {
    const T e = a * Math::exp(x > T(0) ? T(0) : x);
    to_grad_y = u * (x <= T(0) ? e : T(1));
    to_saved = u_gy * (x < T(0) ? e : T(0));
  } else if constexpr (kind == Activation::softplus) {  // a: beta, b: threshold
    const T z = x * a;
    T s, rest;
    sigmoids<Math>(z, s, rest);
    to_grad_y = u * (z > b ? T(1) : s);
    to_saved = u_gy * (z >= b ? T(0) : a * s * rest);
  } else if constexpr (kind == Activation::sigmoid) {
    to_grad_y = u * (saved * (T(1) - saved));
    to_saved = u_gy * (T(1) - T(2) * saved);
  } else {
    static_assert(kind == Activation::tanh, "a kind without a formula");
    to_grad_y = u * (T(1) - saved * saved);
    to_saved = u_gy * (T(-2) * saved);
  }
}

// Calls function with `kind` as a std::integral_constant, so that it can be a template argument.
template <class Function>
void with_activation(Activation kind, Function function) {
  const auto call = [&](auto... kinds) { ((kind == decltype(kinds)::value ? function(kinds) : void()), ...); };
  call(KindOf<Activation::hardswish>{}, KindOf<Activation::silu>{}, KindOf<Activation::gelu>{},
       KindOf<Activation::gelu_tanh>{}, KindOf<Activation::mish>{}, KindOf<Activation::elu>{},
       KindOf<Activation::softplus>{}, KindOf<Activation::sigmoid>{}, KindOf<Activation::tanh>{});
}

}  // namespace sib_fast
