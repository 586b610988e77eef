// Element types by name, and what a pass over elements of one calculates in. Plain data.
#pragma once

namespace sib_fast {

enum class Element : int { float32, float64, bfloat16, float16 };

template <class E>
struct ComputeOf {
  using T = float;
};
template <>
struct ComputeOf<double> {
  using T = double;
};
template <class E>
using Compute = typename ComputeOf<E>::T;

}  // namespace sib_fast
