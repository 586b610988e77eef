// foreground_mask on the CPU: selection instead of sorting, a running-sum box, one image per task (SPEC 3 and 6).
//
// Passes over an image's plane (P = H·W values, in L2 for P up to a few hundred thousand)
//   forward   mean | key range | histogram | collect | sigmoid | box | key range | histogram | collect | sigmoid
//   backward  grad_d | box | grad_g and its two sums; then a handful of single pixels
// Traffic     forward reads vjp once and writes mean_map and mask; backward reads mean_map, mask, grad_mask, writes one
// plane. Order       everything about an image is done by one thread in one order: equal inputs give equal bits, at any
// thread count. Twins       ops/foreground_mask/reference.py is the truth.

#include "cpu/foreground_mask_kernels.h"

#include <algorithm>

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

template <class T>
T* take(char*& scratch, int64_t count) {
  T* p = reinterpret_cast<T*>(scratch);
  scratch += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return p;
}
template <class T>
int64_t room(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

// ---- mean over channels ---------------------------------------------------------------------------------------------

template <class S, class T>
void mean_map_of(const MaskGeometry& geo, const MapView& vjp, int64_t n, T* out) {
  const int64_t C = geo.channels, H = geo.height, W = geo.width;
  const S* image = static_cast<const S*>(vjp.data) + n * vjp.stride_n;
  const T scale = T(1) / static_cast<T>(C);
  const bool flat = vjp.stride_h == W * vjp.stride_w;  // a plane is one strided run
  const int64_t runs = flat ? 1 : H, length = flat ? H * W : W;
  for (int64_t y = 0; y < runs; ++y) {
    const S* row = image + y * vjp.stride_h;
    T* to = out + y * length;
    if (vjp.stride_c == 1 && vjp.stride_w != 1) {  // channels_last: a pixel's channels are neighbours
      for (int64_t p = 0; p < length; ++p) {
        const S* pixel = row + p * vjp.stride_w;
        T sum = 0;
        for (int64_t c = 0; c < C; ++c) sum += static_cast<T>(widen(pixel[c]));
        to[p] = sum * scale;
      }
      continue;
    }
    // In blocks that stay in L1 while the channels are added up.
    constexpr int64_t kBlock = 2048;
    for (int64_t p0 = 0; p0 < length; p0 += kBlock) {
      const int64_t count = length - p0 < kBlock ? length - p0 : kBlock;
      T* block = to + p0;
      for (int64_t c = 0; c < C; ++c) {
        const S* from = row + c * vjp.stride_c + p0 * vjp.stride_w;
        const T factor = c + 1 == C ? scale : T(1);
        if (vjp.stride_w == 1) {
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) {
            const T before = c == 0 ? T(0) : block[i];
            block[i] = (before + static_cast<T>(widen(from[i]))) * factor;
          }
        } else {
          for (int64_t i = 0; i < count; ++i) {
            const T before = c == 0 ? T(0) : block[i];
            block[i] = (before + static_cast<T>(widen(from[i * vjp.stride_w]))) * factor;
          }
        }
      }
    }
  }
}

template <class T>
void mean_map(const MaskGeometry& geo, const MapView& vjp, int64_t n, T* out) {
  switch (vjp.element) {
    case Element::float64:
      return mean_map_of<double, T>(geo, vjp, n, out);
    case Element::float32:
      return mean_map_of<float, T>(geo, vjp, n, out);
    case Element::bfloat16:
      return mean_map_of<BFloat16, T>(geo, vjp, n, out);
    case Element::float16:
      return mean_map_of<Float16, T>(geo, vjp, n, out);
  }
}

// ---- rank selection -------------------------------------------------------------------------------------------------

// The bits of a non-negative float order like the float; NaN comes last, where a sort puts it too.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Key = uint32_t;
  using Candidate = uint64_t;  // (key, pixel) in one word
  static Key key(float v) { return bits_to<uint32_t>(v) & 0x7fffffffu; }
  static Candidate make(Key key, uint32_t pixel) { return (static_cast<uint64_t>(key) << 32) | pixel; }
  static int32_t pixel(Candidate c) { return static_cast<int32_t>(static_cast<uint32_t>(c)); }
  static bool less(Candidate a, Candidate b) { return a < b; }
};
template <>
struct KeyOf<double> {
  using Key = uint64_t;
  struct Candidate {
    uint64_t key;
    uint64_t pixel;
  };
  static Key key(double v) { return bits_to<uint64_t>(v) & 0x7fffffffffffffffull; }
  static Candidate make(Key key, uint32_t pixel) { return {key, pixel}; }
  static int32_t pixel(Candidate c) { return static_cast<int32_t>(c.pixel); }
  static bool less(Candidate a, Candidate b) { return a.key != b.key ? a.key < b.key : a.pixel < b.pixel; }
};

// A few pixels a bin: more bins cost clearing and scanning, fewer leave more candidates to rank.
constexpr int kMaxBins = 1 << 12;
inline int64_t bin_count(int64_t pixels) {
  int64_t bins = 64;
  while (bins < kMaxBins && 4 * bins < pixels) bins *= 2;
  return bins;
}
constexpr int kMaxWindows = 3;

template <class T>
int64_t select_scratch_bytes(int64_t pixels, int windows) {
  return room<uint32_t>(2 * kMaxBins) + windows * room<typename KeyOf<T>::Candidate>(pixels);
}

// Pixels of the ranks of up to three windows of |values|, ties by lower pixel index, in one histogram and one
// collection. rank_pixels [count, length]; -1 where a window reaches beyond the ranks 0 … pixels-1.
template <class T>
void select_ranks(const T* values, int64_t pixels, const RankWindow* windows, int count, int32_t* rank_pixels,
                  void* scratch_bytes) {
  using K = KeyOf<T>;
  using Key = typename K::Key;
  using Candidate = typename K::Candidate;
  char* scratch = static_cast<char*>(scratch_bytes);

  Key low = ~Key(0), high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < pixels; ++i) {
    const Key key = K::key(values[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  int shift = 0;
  const int64_t bins_used = bin_count(pixels);
  while (((high - low) >> shift) >= static_cast<Key>(bins_used)) ++shift;

  // Two tables, so that equal neighbours do not wait for each other's increment.
  uint32_t* bins = take<uint32_t>(scratch, 2 * bins_used);
  uint32_t* odd_bins = bins + bins_used;
  std::memset(bins, 0, 2 * bins_used * sizeof(uint32_t));
  int64_t i = 0;
  for (; i + 1 < pixels; i += 2) {
    ++bins[(K::key(values[i]) - low) >> shift];
    ++odd_bins[(K::key(values[i + 1]) - low) >> shift];
  }
  if (i < pixels) ++bins[(K::key(values[i]) - low) >> shift];

  struct Interval {
    Key from, span;       // keys in [from, from + span]
    int64_t start, stop;  // ranks wanted, both included
    int64_t base, size;   // rank of the first candidate, number of candidates
    Candidate* out;
    int64_t filled;
  } intervals[kMaxWindows];
  for (int w = 0; w < count; ++w) {
    const RankWindow& window = windows[w];
    Interval& in = intervals[w];
    const int64_t last = window.first + window.length - 1;
    in.start = window.first < 0 ? 0 : window.first;
    in.stop = last < pixels ? last : pixels - 1;
    in.out = take<Candidate>(scratch, pixels);
    in.base = in.size = in.filled = 0;
    in.from = in.span = 0;
  }
  int64_t seen = 0;
  for (int64_t b = 0; b < bins_used; ++b) {
    const int64_t here = static_cast<int64_t>(bins[b]) + odd_bins[b];
    if (here == 0) continue;
    for (int w = 0; w < count; ++w) {
      Interval& in = intervals[w];
      if (seen <= in.start && in.start < seen + here) {
        in.base = seen;
        in.from = low + (static_cast<Key>(b) << shift);
      }
      if (seen <= in.stop && in.stop < seen + here) {
        in.size = seen + here - in.base;
        in.span = low + (static_cast<Key>(b) << shift) + ((Key(1) << shift) - 1) - in.from;
      }
    }
    seen += here;
  }

  // Unused slots repeat the first interval, so that the vector test below has one shape.
  Key from[kMaxWindows], span[kMaxWindows];
  for (int w = 0; w < kMaxWindows; ++w) {
    from[w] = intervals[w < count ? w : 0].from;
    span[w] = intervals[w < count ? w : 0].span;
  }
  constexpr int64_t kGroup = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t p0 = 0; p0 < pixels; p0 += kGroup) {
    const int64_t stop = p0 + kGroup < pixels ? p0 + kGroup : pixels;
    if (stop - p0 == kGroup) {
      Key any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t j = 0; j < kGroup; ++j) {
        const Key key = K::key(values[p0 + j]);
        any |= static_cast<Key>(key - from[0] <= span[0]) | static_cast<Key>(key - from[1] <= span[1]) |
               static_cast<Key>(key - from[2] <= span[2]);
      }
      if (any == 0) continue;
    }
    for (int64_t p = p0; p < stop; ++p) {
      const Key key = K::key(values[p]);
      for (int w = 0; w < count; ++w) {
        if (key - from[w] <= span[w]) intervals[w].out[intervals[w].filled++] = K::make(key, static_cast<uint32_t>(p));
      }
    }
  }

  const auto less = [](const Candidate& a, const Candidate& b) { return K::less(a, b); };
  for (int w = 0; w < count; ++w) {
    const RankWindow& window = windows[w];
    Interval& in = intervals[w];
    Candidate* begin = in.out;
    Candidate* end = in.out + in.size;
    Candidate* first = begin + (in.start - in.base);
    Candidate* last = begin + (in.stop - in.base);
    // Candidates of one key were collected in the order of their ranks already.
    if (in.span != 0) {
      if (first != begin) std::nth_element(begin, first, end, less);
      if (last + 1 != end) std::nth_element(first, last, end, less);
      std::sort(first, last + 1, less);
    }
    int32_t* out = rank_pixels + w * window.length;
    for (int64_t j = 0; j < window.length; ++j) {
      const int64_t rank = window.first + j;
      out[j] = rank < 0 || rank >= pixels ? -1 : K::pixel(begin[rank - in.base]);
    }
  }
}

// Q = v* + sum_k w_k (|v_(k)| - v*): exact on ties, which r = 1e-8 below would otherwise blow up.
template <class T>
T soft_quantile(const T* values, const RankWindow& window, const double* weights, const int32_t* pixels) {
  const auto value = [&](int64_t j) {
    return static_cast<double>(values[pixels[j]] < 0 ? -values[pixels[j]] : values[pixels[j]]);
  };
  const double nearest = value(window.nearest);
  double shift = 0;
  for (int64_t j = 0; j < window.length; ++j) {
    if (pixels[j] >= 0) shift += weights[j] * (value(j) - nearest);
  }
  return static_cast<T>(nearest + shift);
}

// ---- box mean -------------------------------------------------------------------------------------------------------

constexpr int kStrip = 8;  // rows whose prefix sums advance together: eight independent chains hide the adder's latency

inline int64_t reach(int64_t window_size, int64_t extent) {
  const int64_t half = window_size / 2;
  return half < extent ? half : extent;
}

int64_t box_scratch_bytes(int64_t height, int64_t width, int64_t window_size) {
  (void)height;
  return room<double>(width) + room<double>(kStrip * (width + 2 * reach(window_size, width) + 1));
}

template <class T, int ROWS>
void box_strip(const double* strip, int64_t pitch, T* out, int64_t width, int64_t reach_x, double scale) {
  for (int r = 0; r < ROWS; ++r) {
    const double* prefix = strip + r * pitch;
    T* row = out + r * width;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) row[x] = static_cast<T>((prefix[x + 2 * reach_x + 1] - prefix[x]) * scale);
  }
}

// out = w×w mean of in, stride 1, zero padding that counts (÷ w² everywhere). Running sums in double: a sum of float32
// values in (0, 1) over any practical window is exact in them, so nothing drifts. out must not be in.
template <class T>
void box_mean(const T* in, T* out, int64_t height, int64_t width, int64_t window_size, void* scratch_bytes) {
  char* scratch = static_cast<char*>(scratch_bytes);
  const int64_t reach_y = reach(window_size, height), reach_x = reach(window_size, width);
  const double scale = 1.0 / (static_cast<double>(window_size) * static_cast<double>(window_size));
  const int64_t pitch = width + 2 * reach_x + 1;
  double* column = take<double>(scratch, width);
  double* strip = take<double>(scratch, kStrip * pitch);

  for (int64_t x = 0; x < width; ++x) column[x] = 0;
  for (int64_t y = 0; y < reach_y && y < height; ++y) {
    const T* row = in + y * width;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) column[x] += static_cast<double>(row[x]);
  }
  for (int64_t y0 = 0; y0 < height; y0 += kStrip) {
    const int rows = static_cast<int>(height - y0 < kStrip ? height - y0 : kStrip);
    for (int r = 0; r < rows; ++r) {
      const int64_t entering = y0 + r + reach_y, leaving = y0 + r - reach_y - 1;
      double* to = strip + r * pitch + reach_x + 1;
      const T* in_row = in + entering * width;
      const T* out_row = in + leaving * width;
      if (entering < height && leaving >= 0) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x)
          to[x] = column[x] += static_cast<double>(in_row[x]) - static_cast<double>(out_row[x]);
      } else if (entering < height) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) to[x] = column[x] += static_cast<double>(in_row[x]);
      } else if (leaving >= 0) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) to[x] = column[x] -= static_cast<double>(out_row[x]);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = column[x];
      }
      for (int64_t x = 0; x <= reach_x; ++x) strip[r * pitch + x] = 0;
    }
    if (rows == kStrip) {
      double sum[kStrip] = {};
      for (int64_t x = reach_x + 1; x <= reach_x + width; ++x) {
        for (int r = 0; r < kStrip; ++r) strip[r * pitch + x] = sum[r] += strip[r * pitch + x];
      }
      for (int r = 0; r < kStrip; ++r) {
        for (int64_t x = reach_x + width + 1; x < pitch; ++x) strip[r * pitch + x] = sum[r];
      }
      box_strip<T, kStrip>(strip, pitch, out + y0 * width, width, reach_x, scale);
    } else {
      for (int r = 0; r < rows; ++r) {
        double sum = 0;
        for (int64_t x = reach_x + 1; x <= reach_x + width; ++x) strip[r * pitch + x] = sum += strip[r * pitch + x];
        for (int64_t x = reach_x + width + 1; x < pitch; ++x) strip[r * pitch + x] = sum;
        box_strip<T, 1>(strip + r * pitch, pitch, out + (y0 + r) * width, width, reach_x, scale);
      }
    }
  }
}

template <class T>
void sigmoid(const T* in, T* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = sigmoid_lane(in[i]);
}

// ---- one image ------------------------------------------------------------------------------------------------------

template <class T>
T value_range(const T* levels, double eps) {
  const T range = levels[kHi] - levels[kLo];
  return (range < T(0) ? T(0) : range) + static_cast<T>(eps);  // not max(): a NaN must stay one
}

template <class T>
int64_t scratch_bytes(const MaskGeometry& geo) {
  const int64_t pixels = geo.height * geo.width;
  const int64_t select = select_scratch_bytes<T>(pixels, kMaxWindows);
  const int64_t box = box_scratch_bytes(geo.height, geo.width, geo.window_size);
  return room<T>(pixels) + (select > box ? select : box);
}

template <class T>
void forward(const MaskGeometry& geo, const T* mean_map, const int32_t* given_ranks, T* mask, T* levels,
             int32_t* rank_pixels, void* scratch_bytes) {
  char* scratch = static_cast<char*>(scratch_bytes);
  const int64_t pixels = geo.height * geo.width, length = geo.windows[0].length;
  T* h = take<T>(scratch, pixels);

  if (given_ranks) {
    std::memcpy(rank_pixels, given_ranks, kLevels * length * sizeof(int32_t));
  } else {
    select_ranks(mean_map, pixels, geo.windows, 3, rank_pixels, scratch);
  }
  for (int level = kLo; level <= kGate; ++level) {
    levels[level] =
        soft_quantile(mean_map, geo.windows[level], geo.weights + level * length, rank_pixels + level * length);
  }

  const T gate = levels[kGate];
  const T steepness = static_cast<T>(geo.slope / static_cast<double>(value_range(levels, geo.eps)));
#pragma omp simd
  for (int64_t i = 0; i < pixels; ++i) {
    const T g = mean_map[i] < T(0) ? -mean_map[i] : mean_map[i];
    h[i] = sigmoid_lane((g - gate) * steepness);
  }
  box_mean(h, mask, geo.height, geo.width, geo.window_size, scratch);  // `mask` holds d until the last pass

  if (!given_ranks) select_ranks(mask, pixels, geo.windows + kArea, 1, rank_pixels + kArea * length, scratch);
  const T area = levels[kArea] =
      soft_quantile(mask, geo.windows[kArea], geo.weights + kArea * length, rank_pixels + kArea * length);
  const T slope = static_cast<T>(geo.slope);
#pragma omp simd
  for (int64_t i = 0; i < pixels; ++i) mask[i] = sigmoid_lane(slope * (mask[i] - area));
}

// SPEC 6, from grad_mask to the gradient plane. No selection: the forward's rank pixels are given.
template <class T>
void backward(const MaskGeometry& geo, const T* grad_mask, const T* mask, const T* mean_map, const T* levels,
              const int32_t* rank_pixels, T* grad_plane, void* scratch_bytes) {
  char* scratch = static_cast<char*>(scratch_bytes);
  const int64_t pixels = geo.height * geo.width, length = geo.windows[0].length;
  T* grad_d = take<T>(scratch, pixels);

  const T slope = static_cast<T>(geo.slope);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < pixels; ++i) {
    const T z = slope * mask[i] * (T(1) - mask[i]) * grad_mask[i];
    grad_d[i] = z;
    total += static_cast<double>(z);
  }
  const int32_t* at = rank_pixels + kArea * length;
  for (int64_t j = 0; j < length; ++j) {
    if (at[j] >= 0) grad_d[at[j]] -= static_cast<T>(geo.weights[kArea * length + j] * total);
  }

  box_mean(grad_d, grad_plane, geo.height, geo.width, geo.window_size, scratch);  // its own adjoint: grad_h

  const T gate = levels[kGate], range = value_range(levels, geo.eps);
  const T steepness = static_cast<T>(geo.slope / static_cast<double>(range));
  const T inverse_channels = T(1) / static_cast<T>(geo.channels);
  double alpha = 0, rho = 0;
#pragma omp simd reduction(+ : alpha, rho)
  for (int64_t i = 0; i < pixels; ++i) {
    const T m = mean_map[i];
    const T g = m < T(0) ? -m : m;
    const T u = (g - gate) * steepness;  // slope · e
    const T h = sigmoid_lane(u);
    const T grad_g = steepness * h * (T(1) - h) * grad_plane[i];  // grad_e / r
    alpha += static_cast<double>(grad_g);
    rho -= static_cast<double>(grad_g) * static_cast<double>(u);
    const T sign = m > T(0) ? inverse_channels : m < T(0) ? -inverse_channels : T(0);
    grad_plane[i] = sign * grad_g;
  }
  rho = levels[kHi] <= levels[kLo] ? 0.0 : rho / geo.slope;
  const double weight_of[3] = {-rho, rho, -alpha};
  for (int level = kLo; level <= kGate; ++level) {
    const int32_t* pixel = rank_pixels + level * length;
    for (int64_t j = 0; j < length; ++j) {
      if (pixel[j] < 0) continue;
      const T m = mean_map[pixel[j]];
      const T sign = m > T(0) ? inverse_channels : m < T(0) ? -inverse_channels : T(0);
      grad_plane[pixel[j]] += sign * static_cast<T>(geo.weights[level * length + j] * weight_of[level]);
    }
  }
}

template <class T>
constexpr MaskKernels<T> kTable = {
    scratch_bytes<T>, mean_map<T>,       forward<T>,  backward<T>, select_scratch_bytes<T>,
    select_ranks<T>,  box_scratch_bytes, box_mean<T>, sigmoid<T>,
};

}  // namespace

SIB_FAST_DEFINE_TABLE(MaskKernels, mask_kernels, float)
SIB_FAST_DEFINE_TABLE(MaskKernels, mask_kernels, double)

}  // namespace sib_fast::cpu
