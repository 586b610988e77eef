// Arguments and results of the registered ops, and the choice of an element type: what the CPU's and CUDA's wrappers
// share. A template `Kernels` is a device's: BFloat16 and Half, as its kernels name these elements; Guard, which makes
// a tensor's device the current one; and an op's passes.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "common/layout.h"

namespace sib_fast {

using MaybeTensor = std::optional<Tensor>;

// Calls function with an element of the type, so that its type can be a template argument.
template <class Kernels, class Function>
void by_element(ScalarType type, Function function) {
  switch (type) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(typename Kernels::BFloat16{});
    case ScalarType::Half:
      return function(typename Kernels::Half{});
    default:
      return function(float{});
  }
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
// Null where it is absent.
template <class T>
const T* in(const MaybeTensor& t) {
  return t ? in<T>(*t) : nullptr;
}
// Null where nothing is asked for: an undefined tensor, Python's None, or one of no elements.
template <class T>
T* out(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

inline Tensor like(const Tensor& x, bool need = true) {
  return need ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
}
inline Tensor new_double(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Double);
}
inline Tensor new_accumulated(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {count}, accumulation_type(x.scalar_type()));
}

inline void check_element(const char* op, const Tensor& x) {
  SIB_CHECK(op, is_supported(x.scalar_type()), "x must be float64, float32, bfloat16 or float16");
}
using Named = std::pair<const char*, const Tensor&>;
// No pair: its constructor would bind the reference to a temporary of its own where a Tensor is given.
struct __attribute__((visibility("hidden"))) MaybeNamed {
  const char* name;
  const MaybeTensor& tensor;
};
// One number a channel in what x is accumulated in, where there is one at all.
inline void check_channels(const char* op, const Tensor& x, int64_t channels, std::initializer_list<MaybeNamed> each) {
  for (const auto& [name, t] : each) {
    if (t) check_plain(op, name, *t, accumulation_type(x.scalar_type()), channels);
  }
}
inline void check_statistics(const char* op, int64_t count, const Tensor& mean, const Tensor& invstd) {
  check_plain(op, "mean", mean, ScalarType::Double, count);
  check_plain(op, "invstd", invstd, ScalarType::Double, count);
}
// Beside a contiguous x.
inline void check_contiguous(const char* op, const Tensor& x, std::initializer_list<Named> each) {
  for (const auto& [name, t] : each) {
    SIB_CHECK(op, t.numel() == x.numel() && t.is_contiguous(), name, " must be contiguous, in the shape of x");
    SIB_CHECK(op, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  }
}

// What a norm's backward and double backward are given, and what they give. Hidden, as torch's Tensor is.
struct __attribute__((visibility("hidden"))) NormBackward {
  const Tensor &grad_y, &x;
  const MaybeTensor& weight;
  const Tensor &mean, &invstd;
  Tensor grad_x, grad_weight, grad_bias;
};
struct __attribute__((visibility("hidden"))) NormSecond {
  const Tensor& u;
  const MaybeTensor &u_weight, &u_bias;
  const Tensor &grad_y, &x;
  const MaybeTensor& weight;
  const Tensor &mean, &invstd;
  Tensor to_grad_y, to_x, to_weight;
};
// The rest of the checks, and the device's pass. statistics: how many means there are.
template <class Kernels, class Shape, class... More>
std::tuple<Tensor, Tensor, Tensor> norm_backward(const char* op, const Shape& shape, int64_t statistics,
                                                 const NormBackward& t, const More&... more) {
  check_channels(op, t.x, shape.channels, {{"weight", t.weight}});
  check_statistics(op, statistics, t.mean, t.invstd);
  const typename Kernels::Guard guard(t.x);
  by_element<Kernels>(t.x.scalar_type(), [&](auto e) { Kernels::template backward<decltype(e)>(shape, t, more...); });
  return {t.grad_x, t.grad_weight, t.grad_bias};
}
template <class Kernels, class Shape>
std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const char* op, const Shape& shape, int64_t statistics,
                                                        const NormSecond& t) {
  check_channels(op, t.x, shape.channels, {{"weight", t.weight}, {"u_weight", t.u_weight}, {"u_bias", t.u_bias}});
  check_statistics(op, statistics, t.mean, t.invstd);
  const typename Kernels::Guard guard(t.x);
  by_element<Kernels>(t.x.scalar_type(), [&](auto e) { Kernels::template double_backward<decltype(e)>(shape, t); });
  return {t.to_grad_y, t.to_x, t.to_weight};
}

}  // namespace sib_fast
