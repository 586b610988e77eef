// RankWindow: the order statistics that a soft quantile needs, and their weights (SPEC 3).
//
//   w_k = softmax_k( -|k - q(P-1)| / tau )      Q = v* + sum_k w_k (v_(k) - v*)
//
// The weights fall by e^-1 every tau ranks, so all but 2·half + 1 of them vanish next to the rounding of the values:
// e^-17 for float32, e^-40 for float64. They depend on (P, q, tau) only and are computed here in float64.
// Plain data, so that kernels compiled for several instruction sets and device code can share it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace sib_fast {

struct RankWindow {
  int64_t first;          // rank of entry 0; entries below rank 0 or above P-1 have weight 0 and no pixel
  int64_t length;         // 2·half + 1
  int64_t nearest;        // entry of the rank nearest to q(P-1), whose value is v*
  const double* weights;  // [length], sum 1
};

// Never more than the image has ranks: a temperature of a million is the plain mean, not a gigabyte of weights.
inline int64_t rank_window_half(double temperature, int64_t pixels, bool is_double) {
  const double half = std::ceil((is_double ? 40.0 : 17.0) * temperature) + 1;
  return half < static_cast<double>(pixels) ? static_cast<int64_t>(half) : pixels;
}

// Owns the weights that its RankWindows point to.
class RankWindows {
 public:
  RankWindows(const std::vector<double>& levels, double temperature, int64_t pixels, bool is_double) {
    const int64_t half = rank_window_half(temperature, pixels, is_double);
    length_ = 2 * half + 1;
    weights_.assign(levels.size() * length_, 0.0);
    for (size_t i = 0; i < levels.size(); ++i) {
      const double position = levels[i] * static_cast<double>(pixels - 1);
      const int64_t first = static_cast<int64_t>(std::floor(position)) - half;
      double* w = weights_.data() + i * length_;
      const int64_t nearest = static_cast<int64_t>(std::floor(position + 0.5)) - first;
      // Relative to the nearest rank's exponent, so that a tiny temperature cannot make every weight underflow.
      const double best = std::abs(static_cast<double>(first + nearest) - position);
      double total = 0.0;
      for (int64_t j = 0; j < length_; ++j) {
        const int64_t rank = first + j;
        if (rank < 0 || rank >= pixels) continue;
        w[j] = std::exp((best - std::abs(static_cast<double>(rank) - position)) / temperature);
        total += w[j];
      }
      for (int64_t j = 0; j < length_; ++j) w[j] /= total;
      windows_.push_back(RankWindow{first, length_, nearest, w});
    }
  }
  RankWindows(const RankWindows&) = delete;
  RankWindows& operator=(const RankWindows&) = delete;

  const RankWindow* data() const { return windows_.data(); }
  int64_t length() const { return length_; }

 private:
  int64_t length_ = 0;
  std::vector<double> weights_;
  std::vector<RankWindow> windows_;
};

}  // namespace sib_fast
