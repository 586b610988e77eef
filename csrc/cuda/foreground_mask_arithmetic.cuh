// The arithmetic of foreground_mask's CUDA kernels that needs no thread: ranks and weights, keys, bins, fixed point.
// Plain functions for host and device, so that tests reach them through _blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/rank_window.h"

#include "common/host_device.h"

namespace sib_fast::cuda {

// ---- ranks and weights ----------------------------------------------------------------------------------------------

// A RankWindow (common/rank_window.h) whose weights are computed where they are used: passed to kernels by value, so
// that nothing is copied to the device.
struct SoftRanks {
  int64_t first;    // rank of entry 0
  int64_t length;   // entries
  int64_t nearest;  // entry of the rank nearest to the level
  double position;  // q(P-1)
  double best;      // |nearest rank - position|: weights are relative to the largest one, so that none underflows
  double temperature;
  double scale;  // 1 / sum of the unscaled weights

  SIB_HOST_DEVICE double weight(int64_t entry) const {
    const double distance = fabs(static_cast<double>(first + entry) - position);
    return exp((best - distance) / temperature) * scale;
  }
};

inline SoftRanks soft_ranks(double level, double temperature, int64_t pixels, bool is_double) {
  SoftRanks ranks{};
  const int64_t half = rank_window_half(temperature, pixels, is_double);
  ranks.length = 2 * half + 1;
  ranks.position = level * static_cast<double>(pixels - 1);
  ranks.first = static_cast<int64_t>(std::floor(ranks.position)) - half;
  const double nearest = std::floor(ranks.position + 0.5);
  ranks.nearest = static_cast<int64_t>(nearest) - ranks.first;
  ranks.best = std::abs(nearest - ranks.position);
  ranks.temperature = temperature;
  ranks.scale = 1.0;
  double total = 0.0;
  for (int64_t j = 0; j < ranks.length; ++j) {
    const int64_t rank = ranks.first + j;
    if (rank >= 0 && rank < pixels) total += ranks.weight(j);
  }
  ranks.scale = 1.0 / total;
  return ranks;
}

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
