// The arithmetic of foreground_mask's CUDA kernels that needs no thread: keys, bins, fixed point.
// Plain functions for host and device, so that tests reach them through _blocks.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace sib_fast::cuda {

// Entries that the gradient of t adds apart from the running sums, a bit each: more than any sharp quantile has (a
// temperature of 0.8 ranks in float32).
constexpr int kLongestWindow = 32;

// ---- keys: integers that order like the values ----------------------------------------------------------------------

// The bits of a non-negative float order like the float; NaN comes last, where a sort puts it too.
SIB_HOST_DEVICE uint32_t magnitude_key(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffffu;
}
SIB_HOST_DEVICE uint64_t magnitude_key(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffffffffffffull;
}

// (key, pixel) in one integer: no two pixels are equal, and ties go to the lower pixel.
template <class Key>
struct CompoundOf;
template <>
struct CompoundOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct CompoundOf<uint64_t> {
  using type = unsigned __int128;
};
template <class Key>
using Compound = typename CompoundOf<Key>::type;

template <class Key>
SIB_HOST_DEVICE Compound<Key> compound(Key key, uint32_t pixel) {
  return (static_cast<Compound<Key>>(key) << 32) | pixel;
}
template <class C>
SIB_HOST_DEVICE int32_t pixel_of(C compound) {
  return static_cast<int32_t>(static_cast<uint32_t>(compound));
}

// Index of the highest set bit plus one; 0 for 0.
SIB_HOST_DEVICE int bit_length(uint64_t value) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(value));
#else
  return value == 0 ? 0 : 64 - __builtin_clzll(value);
#endif
}
SIB_HOST_DEVICE int bit_length(uint32_t value) { return bit_length(static_cast<uint64_t>(value)); }
SIB_HOST_DEVICE int bit_length(unsigned __int128 value) {
  const uint64_t high = static_cast<uint64_t>(value >> 64);
  return high != 0 ? 64 + bit_length(high) : bit_length(static_cast<uint64_t>(value));
}

// The smallest shift that puts 0 … span into 2^log2_bins bins.
template <class Key>
SIB_HOST_DEVICE int bin_shift(Key span, int log2_bins) {
  const int bits = bit_length(span);
  return bits > log2_bins ? bits - log2_bins : 0;
}

// A few dozen pixels a bin: more bins cost clearing, adding up and scanning, fewer leave more candidates to rank.
inline int log2_bins_of(int64_t pixels) {
  int log2_bins = 6;
  while (log2_bins < 13 && (int64_t{32} << log2_bins) < pixels) ++log2_bins;
  return log2_bins;
}
// Candidates that a window may collect. More than that are ties or a crowded bin, which take further passes.
inline int64_t capacity_of(int64_t pixels) {
  const int64_t bins = int64_t{1} << log2_bins_of(pixels);
  return bins < 4096 ? bins : 4096;
}

// ---- chunks ---------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr uint32_t kBatch = 4 * kThreads;       // pixels that a block reads at once
constexpr int64_t kMostPixels = 32 * kThreads;  // of a block of the passes over a plane

// How an image's pixels are shared out: a block a chunk.
struct Cut {
  int64_t pixels;   // a chunk
  uint32_t chunks;  // an image
};
// Equal chunks of whole batches, the last one shorter: 7 of 7,168 for 224².
inline Cut cut_of(int64_t pixels) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t chunk = divide_up(pixels, divide_up(pixels, kMostPixels) * kBatch) * kBatch;
  return {chunk, static_cast<uint32_t>(divide_up(pixels, chunk))};
}

// ---- fixed point: sums of h in (0, 1) over a window, exact and in any order -----------------------------------------

// Fraction bits such that `count` values of at most 1 cannot overflow an unsigned sum of `sum_bits` bits, nor reach its
// largest value. More than `most` bits would say nothing about a value of that precision.
inline int fraction_bits(int64_t count, int sum_bits, int most) {
  const int bits = sum_bits - bit_length(static_cast<uint64_t>(count));
  return bits < most ? bits : most;
}

// Pixels of an image that a window can cover.
inline int64_t window_pixels(int64_t height, int64_t width, int64_t window_size) {
  const int64_t rows = window_size < height ? window_size : height;
  const int64_t columns = window_size < width ? window_size : width;
  return rows * columns;
}

}  // namespace sib_fast::cuda
