// Element types as kernels and hosts both name them: double, float, and the two halves as their bits.
#pragma once

#include <cstdint>

namespace sib_fast::cpu {

struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

// What a pass over elements of type E calculates in.
template <class E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class E>
using Compute = typename ComputeOf<E>::type;

}  // namespace sib_fast::cpu
