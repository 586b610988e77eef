// RankWindow: the order statistics that a soft quantile needs, and their weights (SPEC 3).
//
//   w_k = softmax_k( -|k - q(P-1)| / tau )      Q = v* + sum_k w_k (v_(k) - v*)
//
// The weights fall by e^-1 every tau ranks, so all but 2·half + 1 of them vanish next to the rounding of the values:
// e^-17 for float32, e^-40 for float64. They depend on (P, q, tau) only, in float64. Plain data, passed by value: the
// GPU's kernels compute a weight where they use it, the CPU's read a table (RankWindows).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/host_device.h"

namespace sib_fast {

// Order of the quantile levels everywhere: lo, hi, gate (of g), area (of d).
enum Level { kLo, kHi, kGate, kArea, kLevels };

struct RankWindow {
  int64_t first;    // rank of entry 0; entries below rank 0 or above P-1 have weight 0 and no pixel
  int64_t length;   // 2·half + 1
  int64_t nearest;  // entry of the rank nearest to q(P-1), whose value is v*
  double position;  // q(P-1)
  double best;      // |nearest rank - position|: no temperature is so small that all weights relative to it underflow
  double temperature;
  double total;  // sum of the weights before they are divided by it

  SIB_HOST_DEVICE double weight(int64_t entry) const {
    return exp((best - fabs(static_cast<double>(first + entry) - position)) / temperature) / total;
  }
};

// Never more than the image has ranks: a temperature of a million is the plain mean, not a gigabyte of weights.
inline int64_t rank_window_half(double temperature, int64_t pixels, bool is_double) {
  const double half = std::ceil((is_double ? 40.0 : 17.0) * temperature) + 1;
  return half < static_cast<double>(pixels) ? static_cast<int64_t>(half) : pixels;
}

inline RankWindow rank_window(double level, double temperature, int64_t pixels, bool is_double) {
  const int64_t half = rank_window_half(temperature, pixels, is_double);
  const double position = level * static_cast<double>(pixels - 1), nearest = std::floor(position + 0.5);
  const int64_t first = static_cast<int64_t>(std::floor(position)) - half;
  RankWindow window{
      first,       2 * half + 1, static_cast<int64_t>(nearest) - first, position, std::abs(nearest - position),
      temperature, 1.0};
  double total = 0.0;
  for (int64_t j = 0; j < window.length; ++j) {
    if (first + j >= 0 && first + j < pixels) total += window.weight(j);
  }
  window.total = total;
  return window;
}

// The windows of some levels, all of one length, and their weights.
class RankWindows {
 public:
  RankWindows(const std::vector<double>& levels, double temperature, int64_t pixels, bool is_double) {
    for (double level : levels) {
      const RankWindow window = rank_window(level, temperature, pixels, is_double);
      for (int64_t j = 0; j < window.length; ++j) {
        const int64_t rank = window.first + j;
        weights_.push_back(rank < 0 || rank >= pixels ? 0.0 : window.weight(j));
      }
      windows_.push_back(window);
    }
  }

  const RankWindow* data() const { return windows_.data(); }
  const double* weights() const { return weights_.data(); }  // [levels, length]
  int64_t length() const { return windows_[0].length; }

 private:
  std::vector<RankWindow> windows_;
  std::vector<double> weights_;
};

}  // namespace sib_fast
