// Where a tensor's elements lie: what kernels that read contiguous and channels-last activations as they are ask first.
#pragma once

#include "common/check.h"

namespace sib_fast {

// Whether t's elements lie without gaps in the order of dimensions 0, 1, 2 … (or 0, 2 …, 1). A size of 1 has no order.
inline bool lies(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const auto holds = [&](int64_t d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
    return true;
  };
  if (t.numel() == 0) return true;
  if (channels_last && !holds(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (!(channels_last && d == 1) && !holds(d)) return false;
  }
  return true;
}

// Whether t's elements lie in one run of memory, without gaps: its dimensions in any order.
inline bool lies_dense(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t run = 1;
  for (bool grown = true; grown;) {
    grown = false;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) == 1 || t.stride(d) != run) continue;
      run *= t.size(d);
      grown = true;
    }
  }
  return run == t.numel();
}

// That t and x, which is in the layout that channels_last says, can be read side by side.
inline void check_alike(const char* op, const char* name, const Tensor& t, const Tensor& x, bool channels_last) {
  SIB_CHECK(op, t.dim() == x.dim() && t.numel() == x.numel(), name, " must have the shape of x");
  SIB_CHECK(op, t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  SIB_CHECK(op, lies(t, channels_last), name, " must have the layout of x, contiguous or channels last");
}

}  // namespace sib_fast
