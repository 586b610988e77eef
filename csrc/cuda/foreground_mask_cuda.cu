// foreground_mask for CUDA tensors: memory, launches, registration, and the kernels that touch each pixel once.
//
//   forward    mean_map | histogram | collect | rows | columns + histogram | collect | mask          (SPEC 3)
//              windows too long to rank by counting: sort in place of histogram and collect
//   backward   rows | columns + rank terms                                                            (SPEC 6)
//              windows of more than 32 entries: rows | area_ranks | rows | columns
//
// Each arrow of SPEC 3 that needs a whole image ends a launch or is done by the image's last block, so that the number
// of blocks an image follows from its shape and a batch of many small images fills the device as one large image does.
// Nothing is read back by the host and nothing is copied to the device: capturable in a CUDA graph.
// Twins: cpu/foreground_mask_cpu.cpp and its kernels; truth: ops/foreground_mask/reference.py.

#include <vector>

#include "cuda/foreground_mask_box.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kOp = "foreground_mask";
constexpr int64_t kChunk = 32 * kThreads;  // pixels a block of the passes over a plane

// ---- kernels --------------------------------------------------------------------------------------------------------

// [N, C, H, W] in any strides, in elements.
struct MapView {
  const void* data;
  int64_t channels, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  bool flat;  // rows follow each other: pixel p lies at p·stride_w
};

template <class S, int V>
struct alignas(sizeof(S) * V) Pack {
  S value[V];
};

// What later kernels of the forward count in, zeroed by the first one.
template <class KeyG, class KeyD>
struct Counters {
  uint32_t* histogram_g;  // [N, bins]
  uint32_t* histogram_d;  // [N, bins]
  SelectionState<KeyG>* state_g;
  SelectionState<KeyD>* state_d;
  int bins;
};

template <class Key>
__device__ __forceinline__ void clear(SelectionState<Key>& state) {
  for (int w = 0; w < kMaxWindows; ++w) state.filled[w] = 0;
  state.ties = state.counted = state.collected = state.not_finite = 0;
}

// mean_map_kernel: m = mean over channels, and the least and greatest |m| of each chunk.
//
// Shapes    vjp [N, C, H, W], any strides; out mean_map [N, P], ranges [N, chunks, 2]; counters zeroed.
// Launch    256 threads, one block a chunk of kChunk pixels of an image. A load is 16 bytes of V pixels where planes
// are
//           contiguous, of A channels where a pixel's channels are (channels_last), else V = A = 1.
// Traffic   reads vjp once, writes mean_map.
// Order     channels in ascending order, in T, whatever the layout: the same bits.
template <class S, class T, int V, int A, class KeyD>
__global__ void __launch_bounds__(kThreads, 4)
    mean_map_kernel(const __grid_constant__ MapView vjp, T* __restrict__ mean_map,
                    decltype(magnitude_key(T()))* __restrict__ ranges,
                    const __grid_constant__ Counters<decltype(magnitude_key(T())), KeyD> counters, int64_t pixels,
                    uint32_t chunks) {
  using Key = decltype(magnitude_key(T()));
  const int64_t n = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  for (int64_t b = chunk * kThreads + threadIdx.x; b < counters.bins; b += static_cast<int64_t>(chunks) * kThreads) {
    counters.histogram_g[n * counters.bins + b] = 0;
    counters.histogram_d[n * counters.bins + b] = 0;
  }
  if (chunk == 0 && threadIdx.x == 0) {
    clear(counters.state_g[n]);
    clear(counters.state_d[n]);
  }

  const S* image = static_cast<const S*>(vjp.data) + n * vjp.stride_n;
  const T scale = T(1) / static_cast<T>(vjp.channels);
  const int64_t begin = chunk * kChunk, end = begin + kChunk < pixels ? begin + kChunk : pixels;
  Key low = ~Key(0), high = 0;
  for (int64_t p = begin + static_cast<int64_t>(threadIdx.x) * V; p < end; p += kThreads * V) {
    int64_t offset = p * vjp.stride_w;
    if (V == 1 && !vjp.flat) {
      const uint32_t y = static_cast<uint32_t>(p) / static_cast<uint32_t>(vjp.width);
      const uint32_t x = static_cast<uint32_t>(p) - y * static_cast<uint32_t>(vjp.width);
      offset = y * vjp.stride_h + x * vjp.stride_w;
    }
    T sum[V] = {};
#pragma unroll 4
    for (int64_t c = 0; c < vjp.channels; c += A) {
      const auto pack = *reinterpret_cast<const Pack<S, V * A>*>(image + c * vjp.stride_c + offset);
#pragma unroll
      for (int v = 0; v < V * A; ++v) sum[v % V] += static_cast<T>(pack.value[v]);
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.value[v] = sum[v] * scale;
      const Key key = magnitude_key(out.value[v]);
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    *reinterpret_cast<Pack<T, V>*>(mean_map + n * pixels + p) = out;
  }
  block_extremes(low, high, dynamic_shared<Key>());
  if (threadIdx.x == 0) {
    ranges[2 * static_cast<int64_t>(blockIdx.x)] = low;
    ranges[2 * static_cast<int64_t>(blockIdx.x) + 1] = high;
  }
}

// mask_kernel: M = σ(slope·(d - t)), d = sums·scale. `sums` may lie in `mask`: each thread reads a pixel, then writes
// it. Launch: 256 threads, one block a chunk of kChunk pixels of an image. Traffic: reads a plane, writes a plane.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) mask_kernel(const Sum* sums, T* mask, const T* __restrict__ levels, T slope,
                                                        double scale, int64_t pixels, uint32_t chunks) {
  const Chunk chunk = chunk_of_block(chunks, kChunk, pixels);
  const T area = levels[chunk.n * kLevels + kArea];
  T* to = mask + chunk.n * pixels;
  visit_chunk(sums + chunk.n * pixels, chunk.begin, chunk.end, [&](Sum sum, uint32_t i, bool inside) {
    const T d = static_cast<T>(static_cast<double>(sum) * scale);
    if (inside) to[i] = sigmoid(slope * (d - area));
  });
}

// ---- host -----------------------------------------------------------------------------------------------------------

dim3 grid_of(int64_t blocks) {
  SIB_CHECK(kOp, blocks < (int64_t{1} << 31), "the batch is too large for one launch: ", blocks, " blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Parts of one allocation, by offset until it exists.
class ScratchPlan {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += divide_up(bytes, 256) * 256;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

struct Options {
  int64_t images, height, width, window_size;
  double temperature, slope, eps;
  const std::vector<double>& quantiles;
  int64_t pixels() const { return height * width; }
  int64_t reach(int64_t extent) const { return window_size / 2 < extent ? window_size / 2 : extent; }
  double box_scale() const { return 1.0 / (static_cast<double>(window_size) * static_cast<double>(window_size)); }
};

void check_options(const Options& o) {
  SIB_CHECK(kOp, o.window_size >= 1 && o.window_size % 2 == 1, "window_size must be odd, got ", o.window_size);
  SIB_CHECK(kOp, o.quantiles.size() == kLevels, "quantiles must hold 4 levels, got ", o.quantiles.size());
  for (double q : o.quantiles) SIB_CHECK(kOp, q >= 0 && q <= 1, "quantiles must lie in [0, 1], got ", q);
}

MapView view_of(const Tensor& map) {
  const int64_t width = map.size(3);
  const bool flat = map.size(2) == 1 || map.stride(2) == width * map.stride(3);
  return {map.const_data_ptr(), map.size(1), width, map.stride(0), map.stride(1), map.stride(2), map.stride(3), flat};
}

template <class S, class T, class KeyG, class KeyD>
void launch_mean_map(const MapView& vjp, T* mean_map, KeyG* ranges, const Counters<KeyG, KeyD>& counters,
                     const Options& o, int64_t chunks, Stream stream) {
  constexpr int kPack = 16 / static_cast<int>(sizeof(S));
  const auto whole = [](int64_t elements) { return elements % kPack == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(vjp.data) % 16 == 0 && whole(vjp.stride_n);
  auto kernel = mean_map_kernel<S, T, 1, 1, KeyD>;
  if (aligned && vjp.flat && vjp.stride_w == 1 && whole(vjp.stride_c) && whole(o.pixels())) {
    kernel = mean_map_kernel<S, T, kPack, 1, KeyD>;
  } else if (aligned && vjp.stride_c == 1 && whole(vjp.channels) && whole(vjp.stride_h) && whole(vjp.stride_w)) {
    kernel = mean_map_kernel<S, T, 1, kPack, KeyD>;
  }
  launch(kOp, kernel, grid_of(o.images * chunks), dim3(kThreads), 2 * kThreads * sizeof(KeyG), stream, vjp, mean_map,
         ranges, counters, o.pixels(), static_cast<uint32_t>(chunks));
}

template <class Source, class Out>
void launch_row_sums(const Source& source, Out* out, const Options& o, Stream stream) {
  using Sum = typename Source::Sum;
  const int64_t rows = o.images * o.height, row_bytes = o.width * static_cast<int64_t>(sizeof(Sum));
  const int64_t fit = kRowShared / row_bytes, warps = fit < kThreads / 32 ? fit : kThreads / 32;
  if (warps > 0) {
    launch(kOp, row_sums_kernel<Source, Out>, grid_of(divide_up(rows, warps)), dim3(static_cast<unsigned>(32 * warps)),
           warps * row_bytes, stream, source, out, rows, o.height, o.width, o.reach(o.width));
  } else {
    launch(kOp, wide_row_sums_kernel<Source, Out>, grid_of(rows * divide_up(o.width, kSegment)), dim3(kThreads),
           32 * sizeof(Sum), stream, source, out, o.height, o.width, o.reach(o.width));
  }
}

// Ranks and levels of one plane, whose histogram and intervals are there unless ranks are given or sorted.
template <class Plane>
void launch_selection(const Selection<Plane>& s, const int32_t* given, int32_t* orders, int64_t images, Stream stream) {
  using Key = typename Plane::Key;
  if (given != nullptr) {
    launch(kOp, given_ranks_kernel<Plane>, grid_of(images), dim3(kThreads), 32 * sizeof(double), stream, s, given);
    return;
  }
  if (orders != nullptr) {
    const int64_t shared = 32 * sizeof(double) + (32 + kDigits * kThreads) * sizeof(uint32_t);
    launch(kOp, sort_kernel<Plane>, grid_of(images), dim3(kThreads), shared, stream, s, orders);
    return;
  }
  launch(kOp, collect_kernel<Plane>, grid_of(images * s.chunks), dim3(kThreads), sizeof(SelectWorkspace<Key>), stream,
         s);
}

struct Outputs {
  Tensor mask, mean_map, levels, rank_pixels;
};

// T: of the planes. Sum: of the fixed-point window sums.
template <class T, class Sum>
void run_forward(const Options& o, const Tensor& vjp, const int32_t* given, Outputs& outputs) {
  using KeyG = decltype(magnitude_key(T()));
  using PlaneG = MagnitudePlane<T>;
  using PlaneD = SumPlane<Sum, T>;
  constexpr bool kIsDouble = sizeof(T) == 8;
  const Stream stream = current_stream(vjp);
  const int64_t N = o.images, P = o.pixels();
  const int64_t chunks = divide_up(P, kChunk), capacity = capacity_of(P);
  const int log2_bins = log2_bins_of(P);
  SoftRanks window[kLevels];
  for (int l = 0; l < kLevels; ++l) window[l] = soft_ranks(o.quantiles[l], o.temperature, P, kIsDouble);
  const bool sorts = given == nullptr && window[0].length > kLongestShortWindow;
  const bool sums_in_mask = sizeof(Sum) == sizeof(T);

  ScratchPlan plan;
  const int64_t ranges_at = plan.take(N * chunks * 2 * sizeof(KeyG));
  const int64_t histograms_at = plan.take(2 * N * sizeof(uint32_t) << log2_bins);
  const int64_t state_g_at = plan.take(N * sizeof(SelectionState<KeyG>));
  const int64_t state_d_at = plan.take(N * sizeof(SelectionState<Sum>));
  const int64_t candidates_g = (kLevels - 1) * sizeof(Compound<KeyG>), candidates_d = sizeof(Compound<Sum>);
  const int64_t candidates_at =
      plan.take(given || sorts ? 0 : N * capacity * (candidates_g > candidates_d ? candidates_g : candidates_d));
  const int64_t tie_bits_at = plan.take(given || sorts ? 0 : N * divide_up(P, 32) * sizeof(uint32_t));
  const int64_t rows_at = plan.take(N * P * sizeof(Sum));
  const int64_t sums_at = plan.take(sums_in_mask ? 0 : N * P * sizeof(Sum));
  const int64_t orders_at = plan.take(sorts ? 2 * N * P * sizeof(int32_t) : 0);
  Tensor scratch = torch::stable::new_empty(vjp, {plan.bytes()}, ScalarType::Byte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());

  T* mask = static_cast<T*>(outputs.mask.mutable_data_ptr());
  T* mean_map = static_cast<T*>(outputs.mean_map.mutable_data_ptr());
  T* levels = static_cast<T*>(outputs.levels.mutable_data_ptr());
  int32_t* rank_pixels = static_cast<int32_t*>(outputs.rank_pixels.mutable_data_ptr());
  KeyG* ranges = reinterpret_cast<KeyG*>(base + ranges_at);
  uint32_t* histogram_g = reinterpret_cast<uint32_t*>(base + histograms_at);
  auto* state_g = reinterpret_cast<SelectionState<KeyG>*>(base + state_g_at);
  auto* state_d = reinterpret_cast<SelectionState<Sum>*>(base + state_d_at);
  Sum* rows = reinterpret_cast<Sum*>(base + rows_at);
  Sum* sums = sums_in_mask ? reinterpret_cast<Sum*>(mask) : reinterpret_cast<Sum*>(base + sums_at);
  int32_t* orders = sorts ? reinterpret_cast<int32_t*>(base + orders_at) : nullptr;
  const Counters<KeyG, Sum> counters{histogram_g, histogram_g + (N << log2_bins), state_g, state_d, 1 << log2_bins};

  const MapView view = view_of(vjp);
  switch (vjp.scalar_type()) {
    case ScalarType::BFloat16:
      if constexpr (!kIsDouble)
        launch_mean_map<torch::headeronly::BFloat16>(view, mean_map, ranges, counters, o, chunks, stream);
      break;
    case ScalarType::Half:
      if constexpr (!kIsDouble)
        launch_mean_map<torch::headeronly::Half>(view, mean_map, ranges, counters, o, chunks, stream);
      break;
    default:
      launch_mean_map<T>(view, mean_map, ranges, counters, o, chunks, stream);
  }

  Selection<PlaneG> of_g{{mean_map},
                         P,
                         kChunk,
                         static_cast<uint32_t>(chunks),
                         3,
                         kLo,
                         {window[kLo], window[kHi], window[kGate]},
                         log2_bins,
                         reinterpret_cast<uint32_t*>(base + tie_bits_at),
                         histogram_g,
                         state_g,
                         reinterpret_cast<Compound<KeyG>*>(base + candidates_at),
                         capacity,
                         rank_pixels,
                         levels};
  const bool selects = given == nullptr && !sorts;
  if (selects) {
    const int64_t shared = 2 * kThreads * sizeof(KeyG) + ((int64_t{1} << log2_bins) + 32) * sizeof(uint32_t);
    launch(kOp, histogram_kernel<PlaneG>, grid_of(N * chunks), dim3(kThreads), shared, stream, of_g,
           static_cast<const KeyG*>(ranges));
  }
  launch_selection(of_g, given, orders, N, stream);

  const int64_t count = window_pixels(o.height, o.width, o.window_size);
  const int bits = fraction_bits(count, 8 * sizeof(Sum), kIsDouble ? 52 : sizeof(Sum) == 4 ? 24 : 30);
  const double one = std::ldexp(1.0, bits), scale = o.box_scale() / one;
  launch_row_sums(GateSource<T, Sum>{mean_map, levels, o.slope, o.eps, one, state_d}, rows, o, stream);

  Selection<PlaneD> of_d{{sums, scale},
                         P,
                         kChunk,
                         static_cast<uint32_t>(chunks),
                         1,
                         kArea,
                         {window[kArea]},
                         log2_bins,
                         nullptr,
                         counters.histogram_d,
                         state_d,
                         reinterpret_cast<Compound<Sum>*>(base + candidates_at),
                         capacity,
                         rank_pixels,
                         levels};
  const Columns columns = columns_of(o.height, o.width, o.reach(o.height));
  const int shift = bin_shift(static_cast<Sum>(static_cast<Sum>(count) << bits), log2_bins);
  launch(kOp, column_sums_kernel<PlaneD>, grid_of(N * columns.strips * columns.groups), dim3(kThreads),
         ((int64_t{1} << log2_bins) + 32) * sizeof(uint32_t), stream, columns, of_d, static_cast<const Sum*>(rows),
         sums, shift, selects);
  launch_selection(of_d, given, orders, N, stream);

  launch(kOp, mask_kernel<T, Sum>, grid_of(N * chunks), dim3(kThreads), 0, stream, static_cast<const Sum*>(sums), mask,
         static_cast<const T*>(levels), static_cast<T>(o.slope), scale, P, static_cast<uint32_t>(chunks));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> foreground_mask(Tensor vjp, std::optional<Tensor> rank_pixels,
                                                           int64_t window_size, double temperature, double slope,
                                                           std::vector<double> quantiles, double eps) {
  check_map(kOp, "vjp", vjp);
  const int64_t N = vjp.size(0), H = vjp.size(2), W = vjp.size(3);
  const Options o{N, H, W, window_size, temperature, slope, eps, quantiles};
  check_options(o);
  const ScalarType acc = accumulation_type(vjp.scalar_type());
  const bool is_double = acc == ScalarType::Double;
  const int64_t length = 2 * rank_window_half(temperature, H * W, is_double) + 1;
  if (rank_pixels) check_plain(kOp, "rank_pixels", *rank_pixels, ScalarType::Int, N * kLevels * length);

  const DeviceGuard guard(vjp.get_device_index());
  Outputs outputs{torch::stable::new_empty(vjp, {N, 1, H, W}, acc), torch::stable::new_empty(vjp, {N, H, W}, acc),
                  torch::stable::new_empty(vjp, {N, kLevels}, acc),
                  torch::stable::new_empty(vjp, {N, kLevels, length}, ScalarType::Int)};
  const int32_t* given = rank_pixels ? static_cast<const int32_t*>(rank_pixels->const_data_ptr()) : nullptr;
  // 22 bits keep a window of equal values within half a float32 rounding of 1; a larger window takes 64-bit sums.
  const bool narrow_sums = fraction_bits(window_pixels(H, W, window_size), 32, 24) >= 22;
  if (is_double) {
    run_forward<double, uint64_t>(o, vjp, given, outputs);
  } else if (narrow_sums) {
    run_forward<float, uint32_t>(o, vjp, given, outputs);
  } else {
    run_forward<float, uint64_t>(o, vjp, given, outputs);
  }
  return {outputs.mask, outputs.mean_map, outputs.levels, outputs.rank_pixels};
}

template <class T>
void run_backward(const Options& o, int64_t channels, const Tensor& grad_mask, const Tensor& mask,
                  const Tensor& mean_map, const Tensor& levels, const Tensor& rank_pixels, Tensor& grad_plane) {
  const Stream stream = current_stream(mask);
  const int64_t N = o.images, P = o.pixels();
  const Columns columns = columns_of(o.height, o.width, o.reach(o.height));
  const int64_t blocks = N * columns.strips * columns.groups;
  MaskGrad<T> grad{};
  for (int l = 0; l < kLevels; ++l) grad.window[l] = soft_ranks(o.quantiles[l], o.temperature, P, sizeof(T) == 8);
  grad.spikes = grad.window[kArea].length <= kMostSpikes;

  ScratchPlan plan;
  const int64_t totals_at = plan.take(N * o.height * sizeof(double));
  const int64_t sums_at = plan.take(2 * blocks * sizeof(double));
  const int64_t arrived_at = plan.take(N * sizeof(uint32_t));
  const int64_t rows_at = plan.take(N * P * sizeof(T));
  const int64_t plane_at = plan.take(grad.spikes ? 0 : N * P * sizeof(T));
  Tensor scratch = torch::stable::new_empty(mask, {plan.bytes()}, ScalarType::Byte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());
  double* totals = reinterpret_cast<double*>(base + totals_at);
  uint32_t* arrived = reinterpret_cast<uint32_t*>(base + arrived_at);
  T* rows = reinterpret_cast<T*>(base + rows_at);
  T* plane = grad.spikes ? nullptr : reinterpret_cast<T*>(base + plane_at);

  grad.mean_map = static_cast<const T*>(mean_map.const_data_ptr());
  grad.levels = static_cast<const T*>(levels.const_data_ptr());
  grad.rank_pixels = static_cast<const int32_t*>(rank_pixels.const_data_ptr());
  grad.row_totals = totals;
  grad.reach_x = o.reach(o.width);
  grad.slope = o.slope;
  grad.eps = o.eps;
  grad.box_scale = o.box_scale();
  grad.inverse_channels = T(1) / static_cast<T>(channels);
  grad.sums = reinterpret_cast<double*>(base + sums_at);
  grad.arrived = arrived;
  grad.grad_plane = static_cast<T*>(grad_plane.mutable_data_ptr());

  const GradSource<T> source{static_cast<const T*>(grad_mask.const_data_ptr()),
                             static_cast<const T*>(mask.const_data_ptr()),
                             static_cast<T>(o.slope),
                             totals,
                             arrived,
                             plane};
  launch_row_sums(source, rows, o, stream);
  if (!grad.spikes) {
    launch(kOp, area_ranks_kernel<T>, grid_of(N), dim3(kThreads), 32 * sizeof(double), stream, plane, grad.rank_pixels,
           static_cast<const double*>(totals), grad.window[kArea], o.height, o.width);
    launch_row_sums(PlaneSource<T>{plane}, rows, o, stream);
  }
  const int64_t shared = 32 * sizeof(double) + kMostSpikes * (sizeof(double) + 2 * sizeof(int32_t)) + sizeof(uint32_t);
  launch(kOp, column_grads_kernel<T>, grid_of(blocks), dim3(kThreads), shared, stream, columns, grad,
         static_cast<const T*>(rows));
}

Tensor foreground_mask_backward(Tensor grad_mask, Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels,
                                int64_t channels, int64_t window_size, double temperature, double slope,
                                std::vector<double> quantiles, double eps) {
  SIB_CHECK(kOp, mask.dim() == 4, "mask must have shape [N, 1, H, W]");
  const int64_t N = mask.size(0), H = mask.size(2), W = mask.size(3);
  const Options o{N, H, W, window_size, temperature, slope, eps, quantiles};
  check_options(o);
  const ScalarType acc = mask.scalar_type();
  SIB_CHECK(kOp, accumulation_type(acc) == acc, "mask must be float32 or float64");
  const int64_t length = 2 * rank_window_half(temperature, H * W, acc == ScalarType::Double) + 1;
  check_plain(kOp, "grad_mask", grad_mask, acc, N * H * W);
  check_plain(kOp, "mask", mask, acc, N * H * W);
  check_plain(kOp, "mean_map", mean_map, acc, N * H * W);
  check_plain(kOp, "levels", levels, acc, N * kLevels);
  check_plain(kOp, "rank_pixels", rank_pixels, ScalarType::Int, N * kLevels * length);

  const DeviceGuard guard(mask.get_device_index());
  Tensor grad_plane = torch::stable::new_empty(mask, {N, 1, H, W});
  if (acc == ScalarType::Double) {
    run_backward<double>(o, channels, grad_mask, mask, mean_map, levels, rank_pixels, grad_plane);
  } else {
    run_backward<float>(o, channels, grad_mask, mask, mean_map, levels, rank_pixels, grad_plane);
  }
  return grad_plane;
}

}  // namespace

SIB_CUDA_LIBRARY(m) {
  m.impl("_foreground_mask", TORCH_BOX(&foreground_mask));
  m.impl("_foreground_mask_backward", TORCH_BOX(&foreground_mask_backward));
}

}  // namespace sib_fast::cuda
