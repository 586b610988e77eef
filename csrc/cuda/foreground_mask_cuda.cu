// foreground_mask for CUDA tensors: memory, launches, and the kernels that touch each pixel once.
//
//   forward    mean_map | histogram | collect | rows | columns + histogram | collect | mask          (SPEC 3)
//   backward   rows | columns + rank terms                                                            (SPEC 6)
//
// Each arrow of SPEC 3 that needs a whole image ends a launch or is done by the image's last block, so that the number
// of blocks an image follows from its shape and a batch of many small images fills the device as one large image does.
// Nothing is read back by the host and nothing is copied to the device: capturable in a CUDA graph.
// Twins: cpu/foreground_mask_cpu.cpp and its kernels; truth: ops/foreground_mask/reference.py.

#include <algorithm>

#include "common/head_ops.h"
#include "cuda/foreground_mask_box.cuh"
#include "cuda/on_cuda.cuh"
#include "cuda/pack.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kOp = "foreground_mask";

// ---- kernels --------------------------------------------------------------------------------------------------------

// [N, C, H, W] in any strides, in elements.
struct MapView {
  const void* data;
  int64_t channels, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  bool flat;  // rows follow each other: pixel p lies at p·stride_w
};

// mean_map_kernel: m = mean over channels, and the least and greatest |m| of each chunk.
//
// Shapes    vjp [N, C, H, W], any strides; out mean_map [N, P], ranges [N, chunks, 2]; zeroes what later kernels of the
//           forward count in.
// Launch    256 threads, one block a chunk of an image. A load is 16 bytes of V pixels where planes are contiguous, of
// A
//           channels where a pixel's channels are (channels_last), else V = A = 1; a store 16 bytes of V pixels.
// Traffic   reads vjp once, writes mean_map.
// Order     channels in ascending order, in T, whatever the layout: the same bits.
template <class S, class T, int V, int A>
__global__ void __launch_bounds__(kThreads, 4)
    mean_map_kernel(const __grid_constant__ MapView vjp, T* __restrict__ mean_map,
                    decltype(magnitude_key(T()))* __restrict__ ranges, uint32_t* __restrict__ counters,
                    int64_t counter_words, int64_t pixels, const Cut cut) {
  using Key = decltype(magnitude_key(T()));
  for (int64_t w = int64_t{blockIdx.x} * kThreads + threadIdx.x; w < counter_words; w += int64_t{gridDim.x} * kThreads)
    counters[w] = 0;

  const Chunk chunk = chunk_of_block(cut, pixels);
  const int64_t n = chunk.n;
  const S* image = static_cast<const S*>(vjp.data) + n * vjp.stride_n;
  const T scale = T(1) / static_cast<T>(vjp.channels);
  Key low = ~Key(0), high = 0;
  for (int64_t p = chunk.begin + int64_t{threadIdx.x} * V; p < chunk.end; p += kThreads * V) {
    int64_t offset = p * vjp.stride_w;
    if (V == 1 && !vjp.flat) {
      const uint32_t y = static_cast<uint32_t>(p) / static_cast<uint32_t>(vjp.width);
      const uint32_t x = static_cast<uint32_t>(p) - y * static_cast<uint32_t>(vjp.width);
      offset = y * vjp.stride_h + x * vjp.stride_w;
    }
    T sum[V] = {};
    const auto add_channels_from = [&](int64_t c) {
      const auto pack = load_pack<V * A>(image + c * vjp.stride_c + offset);
#pragma unroll
      for (int v = 0; v < V * A; ++v) sum[v % V] += static_cast<T>(pack.value[v]);
    };
    if (A == 1 && vjp.channels == 3) {  // an image's: the loads of all three are under way at once
#pragma unroll
      for (int c = 0; c < 3; ++c) add_channels_from(c);
    } else {
#pragma unroll 4
      for (int64_t c = 0; c < vjp.channels; c += A) add_channels_from(c);
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.value[v] = sum[v] * scale;
      const Key key = magnitude_key(out.value[v]);
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    store_pack(mean_map + n * pixels + p, out);
  }
  block_extremes(low, high, dynamic_shared<Key>());
  if (threadIdx.x == 0) {
    ranges[2 * static_cast<int64_t>(blockIdx.x)] = low;
    ranges[2 * static_cast<int64_t>(blockIdx.x) + 1] = high;
  }
}

// mask_kernel: M = σ(slope·(d - t)), d = sums·scale. `sums` may lie in `mask`: each thread reads a pixel, then writes
// it. Launch: 256 threads, one block a chunk of an image. Traffic: reads a plane, writes a plane.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) mask_kernel(const Sum* sums, T* mask, const T* __restrict__ levels, T slope,
                                                        double scale, int64_t pixels, const Cut cut) {
  const Chunk chunk = chunk_of_block(cut, pixels);
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

int64_t reach_of(const MaskOptions& o, int64_t extent) { return std::min(o.window_size / 2, extent); }
double box_scale_of(const MaskOptions& o) {
  return 1.0 / (static_cast<double>(o.window_size) * static_cast<double>(o.window_size));
}

MapView view_of(const Tensor& map) {
  const int64_t width = map.size(3);
  const bool flat = map.size(2) == 1 || map.stride(2) == width * map.stride(3);
  return {map.const_data_ptr(), map.size(1), width, map.stride(0), map.stride(1), map.stride(2), map.stride(3), flat};
}

template <class S, class T, class Key>
void launch_mean_map(const MapView& vjp, T* mean_map, Key* ranges, uint32_t* counters, int64_t counter_words,
                     const MaskOptions& o, int64_t images, const Cut& cut, Stream stream) {
  constexpr int kPack = 16 / static_cast<int>(sizeof(S));
  const auto whole = [](int64_t elements) { return elements % kPack == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(vjp.data) % 16 == 0 && whole(vjp.stride_n);
  auto kernel = mean_map_kernel<S, T, 1, 1>;
  if (aligned && vjp.flat && vjp.stride_w == 1 && whole(vjp.stride_c) && whole(o.pixels())) {
    kernel = mean_map_kernel<S, T, kPack, 1>;
  } else if (aligned && vjp.stride_c == 1 && whole(vjp.channels) && whole(vjp.stride_h) && whole(vjp.stride_w)) {
    kernel = mean_map_kernel<S, T, 1, kPack>;
  }
  launch(kOp, kernel, grid_of(images * cut.chunks), dim3(kThreads), 2 * kThreads * sizeof(Key), stream, vjp, mean_map,
         ranges, counters, counter_words, o.pixels(), cut);
}

template <class Source, class Out>
void launch_row_sums(const Source& source, Out* out, const MaskOptions& o, int64_t images, Stream stream) {
  using Sum = typename Source::Sum;
  const int64_t rows = images * o.height, row_bytes = o.width * static_cast<int64_t>(sizeof(Sum));
  const int64_t warps = std::clamp<int64_t>(kRowShared / row_bytes, 1, kThreads / 32);
  launch(kOp, row_sums_kernel<Source, Out>, grid_of(divide_up(rows, warps)), dim3(static_cast<unsigned>(32 * warps)),
         warps * row_bytes, stream, source, out, rows, o.height, o.width, reach_of(o, o.width));
}

// Ranks and levels of one plane, whose histogram and intervals are there unless ranks are given.
template <class Plane>
void launch_selection(const Selection<Plane>& s, const int32_t* given, int64_t images, Stream stream) {
  using Key = typename Plane::Key;
  if (given != nullptr) {
    launch(kOp, given_ranks_kernel<Plane>, grid_of(images), dim3(kThreads), 32 * sizeof(double), stream, s, given);
    return;
  }
  launch(kOp, collect_kernel<Plane>, grid_of(images * s.cut.chunks), dim3(kThreads), sizeof(SelectWorkspace<Key>),
         stream, s);
}

// T: of the planes. Sum: of the fixed-point window sums.
template <class T, class Sum>
void run_forward(const MaskOptions& o, const Tensor& vjp, const int32_t* given, const MaskOutputs& outputs) {
  using KeyG = decltype(magnitude_key(T()));
  using PlaneG = MagnitudePlane<T>;
  using PlaneD = SumPlane<Sum, T>;
  constexpr bool kIsDouble = sizeof(T) == 8;
  const Stream stream = current_stream(vjp);
  const int64_t N = vjp.size(0), P = o.pixels();
  const Cut cut = cut_of(P);
  const int64_t chunks = N * cut.chunks, capacity = capacity_of(P);
  const int log2_bins = log2_bins_of(P);
  RankWindow window[kLevels];
  for (int l = 0; l < kLevels; ++l) window[l] = rank_window(o.quantiles[l], o.temperature, P, kIsDouble);
  const bool sums_in_mask = sizeof(Sum) == sizeof(T);

  ScratchPlan plan;
  const int64_t ranges_at = plan.take(chunks * 2 * sizeof(KeyG));
  // Counted in, and zeroed by the first kernel: from here to counters_end.
  const int64_t histograms_at = plan.take(2 * N * sizeof(uint32_t) << log2_bins);
  const int64_t state_g_at = plan.take(N * sizeof(SelectionState<KeyG>));
  const int64_t state_d_at = plan.take(N * sizeof(SelectionState<Sum>));
  const int64_t counters_end = plan.bytes();
  const int64_t candidates_g = (kLevels - 1) * sizeof(Compound<KeyG>), candidates_d = sizeof(Compound<Sum>);
  const int64_t candidates_at =
      plan.take(given ? 0 : N * capacity * (candidates_g > candidates_d ? candidates_g : candidates_d));
  const int64_t tie_bits_at = plan.take(given ? 0 : N * divide_up(P, 32) * sizeof(uint32_t));
  const int64_t rows_at = plan.take(N * P * sizeof(Sum));
  const int64_t sums_at = plan.take(sums_in_mask ? 0 : N * P * sizeof(Sum));
  Tensor scratch = torch::stable::new_empty(vjp, {plan.bytes()}, ScalarType::Byte);
  char* const base = out<char>(scratch);

  T *mask = out<T>(outputs.mask), *mean_map = out<T>(outputs.mean_map), *levels = out<T>(outputs.levels);
  int32_t* rank_pixels = out<int32_t>(outputs.rank_pixels);
  KeyG* ranges = reinterpret_cast<KeyG*>(base + ranges_at);
  uint32_t* histogram_g = reinterpret_cast<uint32_t*>(base + histograms_at);
  auto* state_g = reinterpret_cast<SelectionState<KeyG>*>(base + state_g_at);
  auto* state_d = reinterpret_cast<SelectionState<Sum>*>(base + state_d_at);
  Sum* rows = reinterpret_cast<Sum*>(base + rows_at);
  Sum* sums = sums_in_mask ? reinterpret_cast<Sum*>(mask) : reinterpret_cast<Sum*>(base + sums_at);
  const int64_t counter_words = (counters_end - histograms_at) / static_cast<int64_t>(sizeof(uint32_t));
  const auto run_mean_map = [&](auto element) {
    launch_mean_map<decltype(element)>(view_of(vjp), mean_map, ranges, histogram_g, counter_words, o, N, cut, stream);
  };

  const ScalarType type = vjp.scalar_type();
  if constexpr (!kIsDouble) {
    if (type == ScalarType::BFloat16) run_mean_map(torch::headeronly::BFloat16());
    if (type == ScalarType::Half) run_mean_map(torch::headeronly::Half());
  }
  if (accumulation_type(type) == type) run_mean_map(T());

  Selection<PlaneG> of_g{{mean_map},
                         P,
                         cut,
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
  const bool selects = given == nullptr;
  if (selects) {
    const int64_t shared = 2 * kThreads * sizeof(KeyG) + ((int64_t{1} << log2_bins) + 32) * sizeof(uint32_t);
    launch(kOp, histogram_kernel<PlaneG>, grid_of(chunks), dim3(kThreads), shared, stream, of_g,
           static_cast<const KeyG*>(ranges));
  }
  launch_selection(of_g, given, N, stream);

  const int64_t count = window_pixels(o.height, o.width, o.window_size);
  const int bits = fraction_bits(count, 8 * sizeof(Sum), kIsDouble ? 52 : sizeof(Sum) == 4 ? 24 : 30);
  const double one = std::ldexp(1.0, bits), scale = box_scale_of(o) / one;
  launch_row_sums(GateSource<T, Sum>{mean_map, levels, o.slope, o.eps, one, state_d}, rows, o, N, stream);

  Selection<PlaneD> of_d{{sums, scale},
                         P,
                         cut,
                         1,
                         kArea,
                         {window[kArea]},
                         log2_bins,
                         nullptr,
                         histogram_g + (N << log2_bins),
                         state_d,
                         reinterpret_cast<Compound<Sum>*>(base + candidates_at),
                         capacity,
                         rank_pixels,
                         levels};
  const Columns columns = columns_of(o.height, o.width, reach_of(o, o.height));
  const int shift = bin_shift(static_cast<Sum>(static_cast<Sum>(count) << bits), log2_bins);
  launch(kOp, column_sums_kernel<PlaneD>, grid_of(N * columns.strips * columns.groups), dim3(kThreads),
         ((int64_t{1} << log2_bins) + 32) * sizeof(uint32_t), stream, columns, of_d, static_cast<const Sum*>(rows),
         sums, shift, selects);
  launch_selection(of_d, given, N, stream);

  launch(kOp, mask_kernel<T, Sum>, grid_of(chunks), dim3(kThreads), 0, stream, static_cast<const Sum*>(sums), mask,
         static_cast<const T*>(levels), static_cast<T>(o.slope), scale, P, cut);
}

template <class T>
void run_backward(const MaskOptions& o, int64_t channels, const Tensor& grad_mask, const MaskOutputs& of,
                  const Tensor& grad_plane) {
  const Stream stream = current_stream(grad_mask);
  const int64_t N = grad_plane.size(0), P = o.pixels();
  const Columns columns = columns_of(o.height, o.width, reach_of(o, o.height));
  const int64_t blocks = N * columns.strips * columns.groups;
  MaskGrad<T> grad{};
  for (int l = 0; l < kLevels; ++l) grad.window[l] = rank_window(o.quantiles[l], o.temperature, P, sizeof(T) == 8);

  ScratchPlan plan;
  const int64_t totals_at = plan.take(N * o.height * sizeof(double));
  const int64_t sums_at = plan.take(2 * blocks * sizeof(double));
  const int64_t arrived_at = plan.take(N * sizeof(uint32_t));
  const int64_t rows_at = plan.take(N * P * sizeof(T));
  Tensor scratch = torch::stable::new_empty(grad_mask, {plan.bytes()}, ScalarType::Byte);
  char* const base = out<char>(scratch);
  double* totals = reinterpret_cast<double*>(base + totals_at);
  uint32_t* arrived = reinterpret_cast<uint32_t*>(base + arrived_at);
  T* rows = reinterpret_cast<T*>(base + rows_at);

  grad.mean_map = in<T>(of.mean_map);
  grad.levels = in<T>(of.levels);
  grad.rank_pixels = in<int32_t>(of.rank_pixels);
  grad.row_totals = totals;
  grad.reach_x = reach_of(o, o.width);
  grad.slope = o.slope;
  grad.eps = o.eps;
  grad.box_scale = box_scale_of(o);
  grad.inverse_channels = T(1) / static_cast<T>(channels);
  grad.sums = reinterpret_cast<double*>(base + sums_at);
  grad.arrived = arrived;
  grad.grad_plane = out<T>(grad_plane);

  const GradSource<T> source{in<T>(grad_mask), in<T>(of.mask), static_cast<T>(o.slope), totals, arrived};
  launch_row_sums(source, rows, o, N, stream);
  const int64_t shared =
      32 * sizeof(double) + kLongestWindow * (sizeof(double) + 2 * sizeof(int32_t)) + sizeof(uint32_t);
  launch(kOp, column_grads_kernel<T>, grid_of(blocks), dim3(kThreads), shared, stream, columns, grad,
         static_cast<const T*>(rows));
}

struct MaskKernels : OnCuda {
  static void check(const MaskOptions& o) {
    SIB_CHECK(kOp, o.width <= kWidest, "vjp must be at most ", kWidest, " pixels wide for the CUDA kernels, got ",
              o.width);
    SIB_CHECK(kOp, o.length <= kLongestWindow, "temperature must leave a rank window of at most ", kLongestWindow,
              " entries for the CUDA kernels, got ", o.temperature, ", which takes ", o.length);
  }

  template <class T>
  static void forward(const MaskOptions& o, const Tensor& vjp, const int32_t* given, const MaskOutputs& outputs) {
    if constexpr (sizeof(T) == 8) {
      run_forward<T, uint64_t>(o, vjp, given, outputs);
    } else {
      // 22 bits keep a window of equal values within half a float32 rounding of 1; a larger window takes 64-bit sums.
      const bool narrow_sums = fraction_bits(window_pixels(o.height, o.width, o.window_size), 32, 24) >= 22;
      narrow_sums ? run_forward<T, uint32_t>(o, vjp, given, outputs) : run_forward<T, uint64_t>(o, vjp, given, outputs);
    }
  }

  template <class T>
  static void backward(const MaskOptions& o, int64_t channels, const Tensor& grad_mask, const MaskOutputs& of,
                       const Tensor& grad_plane) {
    run_backward<T>(o, channels, grad_mask, of, grad_plane);
  }
};

}  // namespace

SIB_CUDA_LIBRARY(m) { MaskOps<MaskKernels>::implement(m); }

}  // namespace sib_fast::cuda
