// The halves as kernels and hosts both name them: their bits.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace sib_fast::cpu {

struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

}  // namespace sib_fast::cpu
