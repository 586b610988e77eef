// The double backward of softmax along a row, one text for the CPU's kernels and CUDA's.
//
//   grad_x = y·(gy - c),  c = Σ y·gy;   given u, the cotangent of grad_x, with b = Σ y·u:
//     to gy  y·(u - b)      to y  u·(gy - c) - b·gy
#pragma once

#include "common/host_device.h"

namespace sib_fast {
namespace {

template <class T>
SIB_HOST_DEVICE T softmax_to_grad_y(T u, T y, T b) {
  return y * (u - b);
}
template <class T>
SIB_HOST_DEVICE T softmax_to_y(T u, T gy, T b, T c) {
  return u * (gy - c) - b * gy;
}

}  // namespace
}  // namespace sib_fast
