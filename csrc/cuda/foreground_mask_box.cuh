// The w×w box of foreground_mask, forward and adjoint: sums along rows, then along columns.
//
// Rows first, columns second, through one plane of row sums: each pixel's sigmoid is evaluated once, and any window
// serves. 64×64 tiles with a halo of 15 would evaluate 2.2 sigmoids a pixel, in kernels that are bound by instructions,
// not by memory.
//   forward   fixed point, in unsigned integers: exact in any order, so equal windows tie to the bit (SPEC 3)
//   adjoint   double sums of float planes: one rounding a pass; the rank terms -w_k·Σz apart from them
#pragma once

#include "cuda/block.cuh"
#include "cuda/foreground_mask_select.cuh"

namespace sib_fast::cuda {

// Within 2 ulp. 1/y by the hardware's approximation and a Newton step: the division's own test for extreme y is a
// branch, which would keep a thread's pixels from overlapping. The clamp keeps y in range (below e^-87 is 0 to any
// mask) and, as a comparison, lets a NaN through.
__device__ __forceinline__ float sigmoid(float x) {
  const float y = 1.0f + expf(x < -87.0f ? 87.0f : -x);
  const float r = approximate_reciprocal(y);
  return fmaf(r, fmaf(-y, r, 1.0f), r);
}
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

__device__ __forceinline__ uint32_t to_fixed(float h, float one, uint32_t) { return __float2uint_rn(h * one); }
__device__ __forceinline__ uint64_t to_fixed(float h, float one, uint64_t) { return __float2ull_rn(h * one); }
__device__ __forceinline__ uint64_t to_fixed(double h, double one, uint64_t) { return __double2ull_rn(h * one); }

template <class T>
__device__ __forceinline__ T value_range(const T* levels, double eps) {
  const T range = levels[kHi] - levels[kLo];
  return (range < T(0) ? T(0) : range) + static_cast<T>(eps);  // not max(): a NaN must stay one
}
template <class T>
__device__ __forceinline__ T steepness_of(const T* levels, double slope, double eps) {
  return static_cast<T>(slope / static_cast<double>(value_range(levels, eps)));
}
template <class T>
__device__ __forceinline__ T magnitude(T m) {
  return m < T(0) ? -m : m;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

constexpr int64_t kRowShared = 48 * 1024;  // bytes of rows a block, or one row
constexpr int64_t kWidest = 12288;         // pixels: a row in double is then 96 KiB, which every device gives

// What is summed along a row. `row` is n·H + y; prepare() once a row, at() once a pixel, finish() by one lane.

// h = σ(slope·(g - gate)/r) in fixed point.
template <class T, class SumType>
struct GateSource {
  using Sum = SumType;
  const T* mean_map;  // [N, P]
  const T* levels;    // [N, kLevels]
  double slope, eps;
  double one;                  // 2^fraction bits
  SelectionState<Sum>* state;  // [N], of d

  struct Row {
    const T* mean_map;
    T gate, steepness, one;
    uint32_t* not_finite;
  };
  static constexpr bool kNeedsTotal = false;
  __device__ __forceinline__ Row prepare(int64_t row, int64_t height, int64_t width) const {
    const int64_t n = row / height;
    const T* level = levels + n * kLevels;
    return {mean_map + row * width, level[kGate], steepness_of(level, slope, eps), static_cast<T>(one),
            &state[n].not_finite};
  }
  __device__ __forceinline__ Sum at(const Row& row, uint32_t x) const {
    const T h = sigmoid((magnitude(row.mean_map[x]) - row.gate) * row.steepness);
    if (!(h >= T(0))) {  // NaN has no fixed point: the image's mask becomes NaN
      atomicOr(row.not_finite, 1u);
      return 0;
    }
    return to_fixed(h, row.one, Sum());
  }
  __device__ __forceinline__ void finish(int64_t, int64_t, Sum) const {}
};

// z = slope·M(1-M)·grad_M, and its sum over each row.
template <class T>
struct GradSource {
  using Sum = double;
  const T* grad_mask;
  const T* mask;  // [N, P]
  T slope;
  double* row_totals;  // [N, H]
  uint32_t* arrived;   // [N], zeroed here for column_grads_kernel

  struct Row {
    const T* grad_mask;
    const T* mask;
  };
  static constexpr bool kNeedsTotal = true;
  __device__ __forceinline__ Row prepare(int64_t row, int64_t, int64_t width) const {
    return {grad_mask + row * width, mask + row * width};
  }
  __device__ __forceinline__ Sum at(const Row& row, uint32_t x) const {
    const T m = row.mask[x];
    return static_cast<double>(slope * m * (T(1) - m) * row.grad_mask[x]);
  }
  __device__ __forceinline__ void finish(int64_t row, int64_t height, Sum total) const {
    row_totals[row] = total;
    if (row % height == 0) arrived[row / height] = 0;
  }
};

// row_sums_kernel: sums over 2·reach + 1 columns.
//
//   out(y, x) = Σ_{|x' - x| <= reach} source(y, x')        zero beyond the image
//
// Shapes    out [N·H, W].
// Launch    a warp a row, 8 warps a block or as many as fit; shared memory: the rows.
// Passes    source into shared memory, prefix sums in place (a run of an odd number of pixels a lane: no two lanes of a
//           pass meet in a bank), differences of two prefixes.
// Traffic   reads the source once, writes out once.
// Order     fixed by W; modular integers are exact in any order.
template <class Source, class Out>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const __grid_constant__ Source source, Out* __restrict__ out, int64_t rows, int64_t height,
                    int64_t width, int64_t reach) {
  using Sum = typename Source::Sum;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp_of_thread();
  if (row >= rows) return;  // a whole warp: nothing below waits for it
  const uint32_t columns = static_cast<uint32_t>(width), far = static_cast<uint32_t>(reach);
  Sum* prefix = dynamic_shared<Sum>() + warp_of_thread() * columns;
  const uint32_t lane = static_cast<uint32_t>(lane_of_thread());
  const typename Source::Row context = source.prepare(row, height, width);
#pragma unroll 4
  for (uint32_t x = lane; x < columns; x += 32) prefix[x] = source.at(context, x);
  __syncwarp();

  const uint32_t run = ((columns + 31) / 32) | 1;
  const uint32_t begin = lane * run < columns ? lane * run : columns;
  const uint32_t end = begin + run < columns ? begin + run : columns;
  Sum mine = 0;
  for (uint32_t x = begin; x < end; ++x) mine += prefix[x];
  const Sum upto = warp_inclusive_scan(mine);
  Sum sum = upto - mine;
  for (uint32_t x = begin; x < end; ++x) prefix[x] = sum += prefix[x];
  __syncwarp();

  Out* to = out + row * width;
#pragma unroll 4
  for (uint32_t x = lane; x < columns; x += 32) {
    const uint32_t right = x + far < columns ? x + far : columns - 1;
    const Sum left = x > far ? prefix[x - far - 1] : Sum(0);
    to[x] = static_cast<Out>(prefix[right] - left);
  }
  if (Source::kNeedsTotal && lane == 0) source.finish(row, height, prefix[columns - 1]);
}

// ---- columns --------------------------------------------------------------------------------------------------------

// How an image's columns are shared out: a warp takes 32 columns of a band of rows, a block 8 bands of the same
// columns. By shape only, since the adjoint's sums depend on it.
struct Columns {
  int32_t height, width, reach;
  int32_t band, strips, groups;  // rows a band; strips of 32 columns and groups of 8 bands an image
};
inline Columns columns_of(int64_t height, int64_t width, int64_t reach) {
  // Eight bands keep a block's warps busy; a band much shorter than the window would read its rows over and over.
  int64_t band = (height + 7) / 8;
  const int64_t most = 2 * reach > 64 ? 2 * reach : 64;
  band = band < 4 ? 4 : band > most ? most : band;
  const int64_t bands = (height + band - 1) / band;
  const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
  return {narrow(height),         narrow(width), narrow(reach), narrow(band), narrow((width + 31) / 32),
          narrow((bands + 7) / 8)};
}

// A thread's column and rows. Indices within an image are 32-bit: H·W < 2^31.
struct Walk {
  int64_t n;
  int32_t x, begin, end;
  bool inside;
};
__device__ __forceinline__ Walk walk_of(const Columns& c) {
  const uint32_t per_image = static_cast<uint32_t>(c.strips) * static_cast<uint32_t>(c.groups);
  const int64_t n = blockIdx.x / per_image;
  const int32_t rest = static_cast<int32_t>(blockIdx.x % per_image);
  const int32_t x = rest % c.strips * 32 + lane_of_thread();
  const int64_t begin = (int64_t{rest / c.strips} * 8 + warp_of_thread()) * c.band;
  if (begin >= c.height || x >= c.width) return {n, 0, 0, 0, false};
  const int32_t first = static_cast<int32_t>(begin);
  return {n, x, first, c.height - first > c.band ? first + c.band : c.height, true};
}

// Calls visit(y, pixel, sum over the window of row y) down a thread's rows. Sums of T are taken in Sum.
template <class Sum, class T, class Visit>
__device__ __forceinline__ void slide(const Columns& c, const Walk& walk, const T* __restrict__ rows,
                                      const Visit& visit) {
  const T* column = rows + walk.n * c.height * c.width + walk.x;
  Sum sum = 0;
  const int32_t from = walk.begin > c.reach ? walk.begin - c.reach - 1 : 0;
  const int32_t to = c.height - walk.begin > c.reach ? walk.begin + c.reach : c.height;
#pragma unroll 8
  for (int32_t y = from; y < to; ++y) sum += static_cast<Sum>(column[y * c.width]);
  // Rows that enter at y lie before this one's end; those that leave, from this one's start.
  const int32_t last_entering = c.height - c.reach, first_leaving = c.reach + 1;
  const int32_t ahead = c.reach * c.width, behind = c.reach < c.height ? (c.reach + 1) * c.width : 0;
  int32_t pixel = walk.begin * c.width;
#pragma unroll 4
  for (int32_t y = walk.begin; y < walk.end; ++y, pixel += c.width) {
    if (y < last_entering) sum += static_cast<Sum>(column[pixel + ahead]);
    if (y >= first_leaving) sum -= static_cast<Sum>(column[pixel - behind]);
    visit(y, static_cast<uint32_t>(pixel + walk.x), sum);
  }
}

// column_sums_kernel: row sums to window sums, exact, and their histogram (its range is known: 0 … the whole window).
//
// Shapes    rows, out [N, P] unsigned.
// Launch    256 threads, 32 columns × 8 bands of rows a block; shared memory: the bins.
// Traffic   reads each row sum twice, and those of the first window of a band; writes out once.
// Order     integers: exact in any order.
template <class Plane>
__global__ void __launch_bounds__(kThreads, 4)
    column_sums_kernel(const __grid_constant__ Columns c, const __grid_constant__ Selection<Plane> s,
                       const typename Plane::Key* __restrict__ rows, typename Plane::Key* __restrict__ out, int shift,
                       bool select) {
  using Sum = typename Plane::Key;
  const int bins = 1 << s.log2_bins;
  uint32_t* shared = dynamic_shared<uint32_t>();
  uint32_t* spare = shared + bins;
  for (int b = threadIdx.x; b < bins; b += kThreads) shared[b] = 0;
  __syncthreads();
  const Walk walk = walk_of(c);
  if (walk.inside) {
    Sum* image = out + walk.n * s.pixels;
    slide<Sum>(c, walk, rows, [&](int32_t, uint32_t pixel, Sum sum) {
      image[pixel] = sum;
      if (select) atomicAdd(&shared[static_cast<uint32_t>(sum >> shift)], 1u);
    });
  }
  if (!select) return;
  __syncthreads();
  finish_histogram(s, walk.n, Sum(0), shift, static_cast<uint32_t>(c.strips) * static_cast<uint32_t>(c.groups), shared,
                   spare);
}

// ---- columns of the adjoint -----------------------------------------------------------------------------------------

template <class T>
struct MaskGrad {
  const T* mean_map;           // [N, P]
  const T* levels;             // [N, kLevels]
  const int32_t* rank_pixels;  // [N, kLevels, L]
  const double* row_totals;    // [N, H]: sums of z
  RankWindow window[kLevels];
  int64_t reach_x;
  double slope, eps, box_scale;
  T inverse_channels;
  double* sums;       // [N, blocks, 2]: α and ρ of each block
  uint32_t* arrived;  // [N]
  T* grad_plane;      // [N, P]
};

template <class T>
__device__ __forceinline__ T signed_by(T m, T value) {
  return m > T(0) ? value : m < T(0) ? -value : T(0);
}

// column_grads_kernel: from row sums of grad_d to the gradient plane (SPEC 6).
//
//   grad_h = (Σ rows - Σz·Σ_k w_k [rank pixel k in the window]) / w²      grad_g = slope·h(1-h)·grad_h / r
//   plane = sgn(m)·grad_g / C;  at the pixels of gate's ranks -= w_k α, of hi's += w_k ρ, of lo's -= w_k ρ
//
// Shapes    rows, mean_map, out grad_plane [N, P].
// Launch    256 threads, 32 columns × 8 bands of rows a block; the image's last block adds the rank terms.
// Traffic   reads each row sum twice (and a band's first window), mean_map once; writes the plane once.
// Order     running sums in double from the band's first row; α and ρ by lane, warp, block, image: fixed by the shape.
// Twins     cpu/foreground_mask_kernels.cpp backward.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    column_grads_kernel(const __grid_constant__ Columns c, const __grid_constant__ MaskGrad<T> g,
                        const T* __restrict__ rows) {
  double* shared = dynamic_shared<double>();  // [32]
  double* spike_weight = shared + 32;         // [kLongestWindow]: t's ranks, whose terms no running sum takes
  int32_t* spike_x = reinterpret_cast<int32_t*>(spike_weight + kLongestWindow);
  int32_t* spike_y = spike_x + kLongestWindow;
  uint32_t* spare = reinterpret_cast<uint32_t*>(spike_y + kLongestWindow);
  const Walk walk = walk_of(c);
  const int64_t n = walk.n, image = n * c.height * c.width;
  const T* means = g.mean_map + image;
  T* plane = g.grad_plane + image;

  const int spikes = static_cast<int>(g.window[kArea].length);
  double total = 0;  // Σz of the image
  for (int y = static_cast<int>(threadIdx.x); y < c.height; y += kThreads) {
    total += g.row_totals[n * c.height + y];
  }
  total = block_sum(total, shared);
  if (static_cast<int>(threadIdx.x) < spikes) {
    const int32_t pixel = g.rank_pixels[(n * kLevels + kArea) * spikes + threadIdx.x];
    spike_weight[threadIdx.x] = pixel < 0 ? 0.0 : g.window[kArea].weight(threadIdx.x) * total;
    spike_x[threadIdx.x] = pixel < 0 ? 0 : pixel % c.width;
    spike_y[threadIdx.x] = pixel < 0 ? 0 : pixel / c.width;
  }
  __syncthreads();

  const T* level = g.levels + n * kLevels;
  const T gate = level[kGate], steepness = steepness_of(level, g.slope, g.eps);
  double alpha = 0, rho = 0;
  if (walk.inside) {
    uint32_t near_column = 0;  // the spikes within reach of this thread's column
    for (int k = 0; k < spikes; ++k) {
      const int32_t across = walk.x - spike_x[k];
      if (across <= g.reach_x && -across <= g.reach_x) near_column |= 1u << k;
    }
    slide<double>(c, walk, rows, [&](int32_t y, uint32_t i, double sum) {
      for (uint32_t left = near_column; left != 0; left &= left - 1) {
        const int k = __ffs(static_cast<int>(left)) - 1;
        const int32_t down = y - spike_y[k];
        if (down <= c.reach && -down <= c.reach) sum -= spike_weight[k];
      }
      const T m = means[i];
      const T u = (magnitude(m) - gate) * steepness;  // slope · e
      const T h = sigmoid(u);
      const T grad_g = steepness * h * (T(1) - h) * static_cast<T>(sum * g.box_scale);  // grad_e / r
      alpha += static_cast<double>(grad_g);
      rho -= static_cast<double>(grad_g) * static_cast<double>(u);
      plane[i] = signed_by(m, g.inverse_channels) * grad_g;
    });
  }
  alpha = block_sum(alpha, shared);
  rho = block_sum(rho, shared);
  const int64_t blocks = int64_t{c.strips} * c.groups;
  if (threadIdx.x == 0) {
    g.sums[2 * blockIdx.x] = alpha;
    g.sums[2 * blockIdx.x + 1] = rho;
  }
  if (!is_last_block(&g.arrived[n], static_cast<uint32_t>(blocks), spare)) return;

  alpha = rho = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) {
    alpha += g.sums[2 * (n * blocks + b)];
    rho += g.sums[2 * (n * blocks + b) + 1];
  }
  alpha = block_sum(alpha, shared);
  rho = block_sum(rho, shared);
  rho = level[kHi] <= level[kLo] ? 0.0 : rho / g.slope;
  for (int l = kLo; l <= kGate; ++l) {
    const double sum = l == kLo ? -rho : l == kHi ? rho : -alpha;
    const RankWindow& window = g.window[l];
    const int32_t* pixel = g.rank_pixels + (n * kLevels + l) * window.length;
    for (int64_t j = threadIdx.x; j < window.length; j += kThreads) {
      if (pixel[j] < 0) continue;
      const int64_t i = image + pixel[j];
      g.grad_plane[i] += signed_by(g.mean_map[i], g.inverse_channels) * static_cast<T>(window.weight(j) * sum);
    }
    __syncthreads();  // two windows may share a pixel
  }
}

}  // namespace sib_fast::cuda
