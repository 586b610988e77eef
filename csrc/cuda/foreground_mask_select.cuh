// Selection of the pixels of a few ranks, and the soft quantile over them (SPEC 3): what a sort would say, without one.
//
// A plane's pixels order by (key, pixel), which no two of them share: a stable ascending sort, and the same bits
// whatever the order of threads. One histogram of (key - low) >> shift serves all windows of a plane; the last block of
// an image finds each window's bins, and one more pass collects their pixels, of which the last block ranks a few
// hundred by counting. Where the bins hold more (ties, a crowded bin), that block narrows the range of the window's two
// ends by further passes over the candidates, or over the plane where even those are too many.
#pragma once

#include "common/rank_window.h"
#include "cuda/block.cuh"
#include "cuda/foreground_mask_arithmetic.cuh"

namespace sib_fast::cuda {

constexpr int kMaxWindows = 3;
// Candidates that are ranked by counting, n² comparisons: 512² are 1,024 a thread.
constexpr int kRankable = 512;
// A window's end is narrowed until its bin holds this many.
constexpr int kCrowd = 128;
static_assert(2 * kCrowd + kLongestWindow <= kRankable, "a window between two ends can be ranked");
constexpr int kLog2NarrowBins = 9;
constexpr int kNarrowBins = 1 << kLog2NarrowBins;
static_assert(kNarrowBins == 2 * kThreads, "the scan gives each thread two bins");

// g: its keys are the bits of |m|.
template <class T>
struct MagnitudePlane {
  using Key = decltype(magnitude_key(T()));
  using Value = T;
  const T* data;  // m, [N, P]
  __device__ __forceinline__ MagnitudePlane from(int64_t offset) const { return {data + offset}; }
  static __device__ __forceinline__ Key key_of(T m) { return magnitude_key(m); }
  __device__ __forceinline__ Key key(int64_t i) const { return magnitude_key(data[i]); }
  __device__ __forceinline__ double value(int64_t i) const { return fabs(static_cast<double>(data[i])); }
};

// d: its keys are the window sums themselves.
template <class Sum, class T>
struct SumPlane {
  using Key = Sum;
  using Value = T;
  const Sum* data;  // [N, P]
  double scale;
  __device__ __forceinline__ SumPlane from(int64_t offset) const { return {data + offset, scale}; }
  static __device__ __forceinline__ Key key_of(Sum sum) { return sum; }
  __device__ __forceinline__ Key key(int64_t i) const { return data[i]; }
  __device__ __forceinline__ double value(int64_t i) const { return static_cast<double>(data[i]) * scale; }
};

// What the blocks of one image tell each other about one plane. Zeroed by the first kernel.
template <class Key>
struct SelectionState {
  struct Interval {
    Key from, to;        // keys of the bins that hold the window's ranks, both included
    uint32_t base, end;  // rank of the first pixel in them, and of the first one behind them
  } interval[kMaxWindows];
  bool tied[kMaxWindows];  // all the window's ranks hold the plane's least key
  uint32_t filled[kMaxWindows];
  uint32_t ties;                // pixels of the least key
  uint32_t counted, collected;  // blocks that are done
  uint32_t not_finite;          // set where a value cannot be ordered: the image's quantile is then NaN
};

template <class Plane>
struct Selection {
  using Key = typename Plane::Key;
  Plane plane;
  int64_t pixels;
  Cut cut;
  int windows;
  int first_level;
  RankWindow window[kMaxWindows];
  int log2_bins;
  uint32_t* tie_bits;          // [N, ⌈P/32⌉]: bit p % 32 of word p / 32 says that p has the least key; or null
  uint32_t* histogram;         // [N, bins], zeroed by the first kernel
  SelectionState<Key>* state;  // [N]
  Compound<Key>* candidates;   // [N, windows, capacity]
  int64_t capacity;
  int32_t* rank_pixels;           // [N, kLevels, length]
  typename Plane::Value* levels;  // [N, kLevels]
};

// ---- passes over a plane --------------------------------------------------------------------------------------------

// Calls visit(image[i], i, inside) for i from begin to end - 1, four loads a thread under way at once. All threads of
// the block make the same number of calls; beyond the end, `inside` is false. Indices within an image are 32-bit and
// whole batches need no test: these passes are bound by instructions.
template <class Value, class Visit>
__device__ __forceinline__ void visit_chunk(const Value* image, uint32_t begin, uint32_t end, const Visit& visit) {
  uint32_t base = begin;
  for (; base + kBatch <= end; base += kBatch) {
    const Value* mine = image + base + threadIdx.x;
    Value value[4];
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) value[k] = mine[k * kThreads];
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) visit(value[k], base + threadIdx.x + k * kThreads, true);
  }
  for (; base < end; base += kThreads) {
    const uint32_t i = base + threadIdx.x;
    visit(i < end ? image[i] : Value(0), i, i < end);
  }
}

struct Chunk {
  int64_t n;
  uint32_t begin, end;  // pixels begin … end - 1 of image n
};
__device__ __forceinline__ Chunk chunk_of_block(const Cut& cut, int64_t pixels) {
  const int64_t begin = blockIdx.x % cut.chunks * cut.pixels, end = begin + cut.pixels;
  return {blockIdx.x / cut.chunks, static_cast<uint32_t>(begin), static_cast<uint32_t>(end < pixels ? end : pixels)};
}

// ---- histogram ------------------------------------------------------------------------------------------------------

// Adds the block's histogram to the image's; in the image's last block also finds the intervals. shared [bins], counted
// and seen by all threads; spare [32].
template <class Plane>
__device__ __forceinline__ void finish_histogram(const Selection<Plane>& s, int64_t n, typename Plane::Key low,
                                                 int shift, uint32_t blocks, const uint32_t* shared, uint32_t* spare) {
  using Key = typename Plane::Key;
  const int bins = 1 << s.log2_bins;
  uint32_t* histogram = s.histogram + n * bins;
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    if (shared[b] != 0) atomicAdd(&histogram[b], shared[b]);
  }
  SelectionState<Key>& state = s.state[n];
  if (!is_last_block(&state.counted, blocks, spare)) return;

  const int each = bins < kThreads ? 1 : bins / kThreads;
  const int first_bin = static_cast<int>(threadIdx.x) * each;
  const bool has_bins = first_bin < bins;
  uint32_t mine = 0, all = 0;
  if (has_bins) {
    for (int b = first_bin; b < first_bin + each; ++b) mine += histogram[b];
  }
  const uint32_t before = block_inclusive_scan(mine, spare, all) - mine;
  for (int w = 0; w < s.windows; ++w) {
    const int64_t last = s.window[w].first + s.window[w].length - 1;
    const uint32_t start = static_cast<uint32_t>(s.window[w].first < 0 ? 0 : s.window[w].first);
    const uint32_t stop = static_cast<uint32_t>(last < s.pixels ? last : s.pixels - 1);
    if (threadIdx.x == 0) state.tied[w] = s.tie_bits != nullptr && stop < state.ties;
    const bool holds_start = has_bins && before <= start && start - before < mine;
    const bool holds_stop = has_bins && before <= stop && stop - before < mine;
    if (!holds_start && !holds_stop) continue;
    uint32_t seen = before;
    for (int b = first_bin; b < first_bin + each; ++b) {
      const uint32_t here = histogram[b];
      const Key from = low + (static_cast<Key>(b) << shift);
      if (holds_start && seen <= start && start - seen < here) {
        state.interval[w].from = from;
        state.interval[w].base = seen;
      }
      if (holds_stop && seen <= stop && stop - seen < here) {
        state.interval[w].to = from + ((Key(1) << shift) - 1);
        state.interval[w].end = seen + here;
      }
      seen += here;
    }
  }
}

// histogram_kernel: counts of (key - low) >> shift over each image, then the bins that hold each window's ranks.
//
// Shapes    plane [N, P]; ranges [N, chunks, 2], the least and greatest key of each chunk; out histogram, intervals.
// Launch    256 threads, one block a chunk of an image; shared memory: the bins.
// Traffic   reads the plane once, writes one bit a pixel.
// Order     integers only: any order gives the same counts.
// Twins     cpu/foreground_mask_kernels.cpp select_ranks.
template <class Plane>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const __grid_constant__ Selection<Plane> s, const typename Plane::Key* __restrict__ ranges) {
  using Key = typename Plane::Key;
  const int bins = 1 << s.log2_bins;
  Key* extremes = dynamic_shared<Key>();  // [2·kThreads], then the bins
  uint32_t* shared = reinterpret_cast<uint32_t*>(extremes + 2 * kThreads);
  uint32_t* spare = shared + bins;

  const Chunk chunk = chunk_of_block(s.cut, s.pixels);
  const int64_t n = chunk.n;
  Key low = ~Key(0), high = 0;
  for (uint32_t c = threadIdx.x; c < s.cut.chunks; c += kThreads) {
    const Key* range = ranges + 2 * (n * s.cut.chunks + c);
    low = range[0] < low ? range[0] : low;
    high = range[1] > high ? range[1] : high;
  }
  for (int b = threadIdx.x; b < bins; b += kThreads) shared[b] = 0;
  block_extremes(low, high, extremes);  // its barriers also publish the zeros
  const int shift = bin_shift(static_cast<Key>(high - low), s.log2_bins);

  const Plane plane = s.plane.from(n * s.pixels);
  uint32_t* tie_bits = s.tie_bits + n * ((s.pixels + 31) / 32);
  const bool first_lane = lane_of_thread() == 0;
  uint32_t ties = 0;
  visit_chunk(plane.data, chunk.begin, chunk.end, [&](auto value, uint32_t i, bool inside) {
    const Key key = Plane::key_of(value);
    // Exact zeros by the thousand are normal: counted by ballot, or their bin's additions would queue up.
    const bool tie = inside && key == low;
    const uint32_t bits = __ballot_sync(kWholeWarp, tie);
    ties += static_cast<uint32_t>(__popc(bits));
    if (first_lane && inside) tie_bits[i / 32] = bits;
    if (inside && !tie) atomicAdd(&shared[static_cast<uint32_t>((key - low) >> shift)], 1u);
  });
  if (first_lane && ties != 0) {
    atomicAdd(&shared[0], ties);
    atomicAdd(&s.state[n].ties, ties);
  }
  __syncthreads();
  finish_histogram(s, n, low, shift, s.cut.chunks, shared, spare);
}

// ---- narrowing and ranking, by one block ----------------------------------------------------------------------------

// The block's shared memory while it selects.
template <class Key>
struct SelectWorkspace {
  Compound<Key> chosen[kRankable];  // also the extremes' 2·kThreads
  uint32_t bins[kNarrowBins];
  double sums[32];
  uint32_t spare[32];
  uint32_t found[2];  // a bin and the count of pixels below it
  uint32_t filled;
};
static_assert(kRankable >= 2 * kThreads, "extremes and candidates share memory");

template <class C>
struct PixelRange {
  C low, high;          // both included
  uint32_t base, size;  // rank of the first pixel in it, number of pixels
};

// The items that selection reads: an image's plane, or the candidates collected from it. Those from `low` to `high` lie
// among the indices begin … end - 1: a range within one key is a run of pixels.
template <class Plane>
struct PlaneItems {
  using C = Compound<typename Plane::Key>;
  const Plane& plane;  // of the image
  int64_t count;
  __device__ __forceinline__ C at(int64_t i) const { return compound(plane.key(i), static_cast<uint32_t>(i)); }
  __device__ __forceinline__ void bounds(C low, C high, int64_t& begin, int64_t& end) const {
    const bool one_key = (low >> 32) == (high >> 32);
    begin = one_key ? pixel_of(low) : 0;
    end = one_key && static_cast<uint32_t>(high) < static_cast<uint64_t>(count) ? pixel_of(high) + int64_t{1} : count;
  }
};
template <class CompoundKey>
struct ListItems {
  using C = CompoundKey;
  const C* list;
  int64_t count;
  __device__ __forceinline__ C at(int64_t i) const { return list[i]; }
  __device__ __forceinline__ void bounds(C, C, int64_t& begin, int64_t& end) const {
    begin = 0;
    end = count;
  }
};

// Calls visit(item) for the items from `low` to `high`, both included; several loads of a thread are under way at once.
template <class Items, class Visit>
__device__ __forceinline__ void visit_items(const Items& items, typename Items::C low, typename Items::C high,
                                            const Visit& visit) {
  using C = typename Items::C;
  constexpr int kLoads = 64 / static_cast<int>(sizeof(C));
  int64_t begin, end;
  items.bounds(low, high, begin, end);
  for (int64_t base = begin + threadIdx.x; base < end; base += kLoads * kThreads) {
    C item[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) item[k] = base + k * kThreads < end ? items.at(base + k * kThreads) : ~C(0);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (base + k * kThreads < end && item[k] >= low && item[k] <= high) visit(item[k]);
    }
  }
}

// The part of `range` around `rank`, at most kCrowd pixels: bin by bin, the range shrunk to the pixels' own between.
template <class Key, class Items>
__device__ __forceinline__ PixelRange<Compound<Key>> narrow(const Items& items, PixelRange<Compound<Key>> range,
                                                            uint32_t rank, SelectWorkspace<Key>* shared) {
  using C = Compound<Key>;
  while (range.size > kCrowd) {
    C low = ~C(0), high = 0;
    visit_items(items, range.low, range.high, [&](C item) {
      low = item < low ? item : low;
      high = item > high ? item : high;
    });
    for (int b = threadIdx.x; b < kNarrowBins; b += kThreads) shared->bins[b] = 0;
    block_extremes(low, high, shared->chosen);
    const int shift = bin_shift(static_cast<C>(high - low), kLog2NarrowBins);
    visit_items(items, low, high,
                [&](C item) { atomicAdd(&shared->bins[static_cast<uint32_t>((item - low) >> shift)], 1u); });
    __syncthreads();
    const uint32_t left = shared->bins[2 * threadIdx.x], right = shared->bins[2 * threadIdx.x + 1];
    uint32_t all = 0;
    const uint32_t before = block_inclusive_scan(left + right, shared->spare, all) - (left + right);
    const uint32_t wanted = rank - range.base;
    if (before <= wanted && wanted - before < left + right) {
      const bool in_right = wanted - before >= left;
      shared->found[0] = 2 * threadIdx.x + in_right;
      shared->found[1] = before + (in_right ? left : 0);
    }
    __syncthreads();
    const uint32_t bin = shared->found[0];
    range.low = low + (static_cast<C>(bin) << shift);
    // As a distance from low: the bin of the largest keys may end beyond the largest integer.
    const C rest = high - range.low, reach = (C(1) << shift) - 1;
    range.high = range.low + (rest < reach ? rest : reach);
    range.base += shared->found[1];
    range.size = shared->bins[bin];
    __syncthreads();
  }
  return range;
}

// Writes rank_pixels [length] of one window from the items of `range`, which holds all its ranks.
template <class Key, class Items>
__device__ __forceinline__ void rank_window_pixels(const Items& items, PixelRange<Compound<Key>> range,
                                                   const RankWindow& window, int64_t pixels, int32_t* rank_pixels,
                                                   SelectWorkspace<Key>* shared) {
  using C = Compound<Key>;
  if (range.size > kRankable) {
    const int64_t last = window.first + window.length - 1;
    const uint32_t start = static_cast<uint32_t>(window.first < 0 ? 0 : window.first);
    const uint32_t stop = static_cast<uint32_t>(last < pixels ? last : pixels - 1);
    const PixelRange<C> head = narrow(items, range, start, shared);
    const bool holds_both = stop - head.base < head.size;
    const PixelRange<C> tail = holds_both ? head : narrow(items, range, stop, shared);
    range = {head.low, tail.high, head.base, tail.base + tail.size - head.base};
  }
  if (threadIdx.x == 0) shared->filled = 0;
  __syncthreads();
  visit_items(items, range.low, range.high, [&](C item) { shared->chosen[atomicAdd(&shared->filled, 1u)] = item; });
  for (int64_t j = threadIdx.x; j < window.length; j += kThreads) {
    const int64_t rank = window.first + j;
    if (rank < 0 || rank >= pixels) rank_pixels[j] = -1;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < range.size; i += kThreads) {
    const C mine = shared->chosen[i];
    uint32_t below = 0;
    for (uint32_t j = 0; j < range.size; ++j) below += shared->chosen[j] < mine;
    const int64_t entry = static_cast<int64_t>(range.base) + below - window.first;
    if (entry >= 0 && entry < window.length) rank_pixels[entry] = pixel_of(mine);
  }
  __syncthreads();
}

// The same where all ranks lie among the pixels of the least key: rank k is the k-th set bit.
__device__ __forceinline__ void tied_window_pixels(const uint32_t* __restrict__ bits, const RankWindow& window,
                                                   int64_t pixels, int32_t* rank_pixels, uint32_t* spare) {
  const int64_t words = (pixels + 31) / 32, run = (words + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * run, end = begin + run < words ? begin + run : words;
  uint32_t mine = 0, all = 0;
  for (int64_t i = begin; i < end; ++i) mine += static_cast<uint32_t>(__popc(bits[i]));
  int64_t entry = static_cast<int64_t>(block_inclusive_scan(mine, spare, all) - mine) - window.first;
  if (entry < window.length && entry + mine > 0) {
    for (int64_t i = begin; i < end; ++i) {
      for (uint32_t left = bits[i]; left != 0; left &= left - 1, ++entry) {
        if (entry < 0 || entry >= window.length) continue;
        rank_pixels[entry] = static_cast<int32_t>(32 * i + __ffs(static_cast<int>(left)) - 1);
      }
    }
  }
  for (int64_t j = threadIdx.x; j < window.length; j += kThreads) {
    if (window.first + j < 0 || window.first + j >= pixels) rank_pixels[j] = -1;
  }
  __syncthreads();
}

// Q = v* + sum_k w_k (v_(k) - v*): exact on ties, which r = 1e-8 would otherwise blow up. In every thread.
template <class Plane>
__device__ __forceinline__ double soft_quantile(const Plane& plane, int64_t image, const RankWindow& window,
                                                const int32_t* rank_pixels, double* shared) {
  const double nearest = plane.value(image + rank_pixels[window.nearest]);
  double shift = 0;
  for (int64_t j = threadIdx.x; j < window.length; j += kThreads) {
    const int32_t pixel = rank_pixels[j];
    if (pixel >= 0) shift += window.weight(j) * (plane.value(image + pixel) - nearest);
  }
  return nearest + block_sum(shift, shared);
}

// The levels of one image from its rank pixels.
template <class Plane>
__device__ __forceinline__ void write_levels(const Selection<Plane>& s, int64_t n, double* shared) {
  for (int w = 0; w < s.windows; ++w) {
    const int level = s.first_level + w;
    const int32_t* rank_pixels = s.rank_pixels + (n * kLevels + level) * s.window[w].length;
    double quantile = soft_quantile(s.plane, n * s.pixels, s.window[w], rank_pixels, shared);
    if (s.state[n].not_finite != 0) quantile = NAN;
    if (threadIdx.x == 0) s.levels[n * kLevels + level] = static_cast<typename Plane::Value>(quantile);
  }
}

// collect_kernel: the pixels of each window's bins, ranked by (key, pixel), and the soft quantiles.
//
// Shapes    plane [N, P], intervals of histogram_kernel or column_sums_kernel; out rank_pixels [N, windows of 4, L],
//           levels [N, windows of 4].
// Launch    256 threads, one block a chunk of an image; the image's last block ranks.
// Traffic   reads the plane once, and again for each further pass where bins overflow.
// Order     candidates arrive in any order and are ranked by (key, pixel): equal inputs give equal bits.
// Twins     cpu/foreground_mask_kernels.cpp select_ranks, soft_quantile.
template <class Plane>
__global__ void __launch_bounds__(kThreads, 3) collect_kernel(const __grid_constant__ Selection<Plane> s) {
  using Key = typename Plane::Key;
  using C = Compound<Key>;
  auto* shared = dynamic_shared<SelectWorkspace<Key>>();
  const Chunk chunk = chunk_of_block(s.cut, s.pixels);
  const int64_t n = chunk.n, image = n * s.pixels;
  SelectionState<Key>& state = s.state[n];

  // A window that collects nothing gets the largest key of all, which no pixel has.
  Key from[kMaxWindows], span[kMaxWindows];
#pragma unroll
  for (int w = 0; w < kMaxWindows; ++w) {
    const bool used = w < s.windows;
    const bool wanted = used && !state.tied[w] && state.interval[w].end - state.interval[w].base <= s.capacity;
    from[w] = wanted ? state.interval[w].from : ~Key(0);
    span[w] = wanted ? state.interval[w].to - from[w] : 0;
  }
  const Plane plane = s.plane.from(image);
  visit_chunk(plane.data, chunk.begin, chunk.end, [&](auto value, uint32_t i, bool inside) {
    const Key key = Plane::key_of(value);
    bool hit = false;
#pragma unroll
    for (int w = 0; w < kMaxWindows; ++w) hit |= static_cast<Key>(key - from[w]) <= span[w];
    if (!hit || !inside) return;
#pragma unroll
    for (int w = 0; w < kMaxWindows; ++w) {
      if (static_cast<Key>(key - from[w]) > span[w]) continue;
      const uint32_t at = atomicAdd(&state.filled[w], 1u);
      s.candidates[(n * s.windows + w) * s.capacity + at] = compound(key, i);
    }
  });
  if (!is_last_block(&state.collected, s.cut.chunks, shared->spare)) return;

  for (int w = 0; w < s.windows; ++w) {
    const auto& interval = state.interval[w];
    const PixelRange<C> range{compound(interval.from, 0u), compound(interval.to, 0xffffffffu), interval.base,
                              interval.end - interval.base};
    int32_t* out = s.rank_pixels + (n * kLevels + s.first_level + w) * s.window[w].length;
    if (state.tied[w]) {
      const uint32_t* bits = s.tie_bits + n * ((s.pixels + 31) / 32);
      tied_window_pixels(bits, s.window[w], s.pixels, out, shared->spare);
    } else if (range.size <= s.capacity) {
      const ListItems<C> list{s.candidates + (n * s.windows + w) * s.capacity, range.size};
      rank_window_pixels<Key>(list, range, s.window[w], s.pixels, out, shared);
    } else {
      const PlaneItems<Plane> items{plane, s.pixels};
      rank_window_pixels<Key>(items, range, s.window[w], s.pixels, out, shared);
    }
  }
  write_levels(s, n, shared->sums);
}

// ---- ranks that are given
// --------------------------------------------------------------------------------------------

// given_ranks_kernel: levels from ranks that the caller chose (tests: SPEC 7). One block an image.
template <class Plane>
__global__ void __launch_bounds__(kThreads)
    given_ranks_kernel(const __grid_constant__ Selection<Plane> s, const int32_t* __restrict__ given) {
  double* sums = dynamic_shared<double>();
  const int64_t n = blockIdx.x;
  for (int w = 0; w < s.windows; ++w) {
    const int64_t at = (n * kLevels + s.first_level + w) * s.window[w].length;
    for (int64_t j = threadIdx.x; j < s.window[w].length; j += kThreads) s.rank_pixels[at + j] = given[at + j];
  }
  __syncthreads();
  write_levels(s, n, sums);
}

}  // namespace sib_fast::cuda
