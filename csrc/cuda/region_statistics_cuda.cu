// region_statistics for CUDA tensors: tilings, scratch and launches. The kernels are in
// region_statistics_forward.cuh and region_statistics_backward.cuh.

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/head_ops.h"
#include "cuda/on_cuda.cuh"
#include "cuda/region_statistics_backward.cuh"
#include "cuda/region_statistics_forward.cuh"

namespace sib_fast::cuda {
namespace {

constexpr const char* kStatistics = "region_statistics";

// ---- tilings --------------------------------------------------------------------------------------------------------
// 32 accumulators a thread: a warp's sub-tile is 32×32, or 16×16 for the smallest batches.

template <int MT, int NT>
using Tf32 = TensorCores<MT, NT>;
template <int RI, int RJ>
using Ieee = Arithmetic<float, RI, RJ>;
template <int RI, int RJ>
using Wide = Arithmetic<double, RI, RJ>;

// Gram tiles: images a side, elements a chunk, warps, blocks a multiprocessor.
using Tf32Gram16 = GramTiles<Tf32<1, 2>, 16, 128, 8, 2>;
using Tf32Gram32 = GramTiles<Tf32<2, 4>, 32, 128, 8, 2>;
using Tf32Gram64 = GramTiles<Tf32<2, 4>, 64, 32, 8, 2>;
using Tf32Gram128 = GramTiles<Tf32<2, 4>, 128, 32, 16, 1>;
using IeeeGram16 = GramTiles<Ieee<4, 2>, 16, 128, 8, 2>;
using IeeeGram32 = GramTiles<Ieee<8, 4>, 32, 128, 8, 1>;
// One block: bounded for two, ptxas spills on every architecture; so do 16 warps of the 128-image tile, hence none.
using IeeeGram64 = GramTiles<Ieee<8, 4>, 64, 32, 8, 1>;
using WideGram16 = GramTiles<Wide<4, 2>, 16, 32, 4, 1>;
using WideGram32 = GramTiles<Wide<4, 2>, 32, 32, 4, 1>;

// Gradient tiles: images, pixels, warps, blocks a multiprocessor.
using Tf32Grad16 = GradientTiles<Tf32<1, 4>, 16, 128, 4, 2>;
using Tf32Grad32 = GradientTiles<Tf32<2, 4>, 32, 128, 4, 2>;
using Tf32Grad64 = GradientTiles<Tf32<2, 4>, 64, 64, 4, 2>;
using Tf32Grad128 = GradientTiles<Tf32<2, 4>, 128, 64, 8, 1>;
using IeeeGrad16 = GradientTiles<Ieee<4, 4>, 16, 128, 4, 2>;
using IeeeGrad32 = GradientTiles<Ieee<8, 4>, 32, 128, 4, 2>;
using IeeeGrad64 = GradientTiles<Ieee<8, 4>, 64, 64, 4, 2>;
using IeeeGrad128 = GradientTiles<Ieee<8, 4>, 128, 64, 8, 1>;
using WideGrad16 = GradientTiles<Wide<4, 2>, 16, 64, 4, 1>;
using WideGrad32 = GradientTiles<Wide<4, 2>, 32, 32, 4, 1>;

constexpr int64_t kRounds = 2;  // of blocks, that cuts aim at

// Parts of D for `groups` blocks a part: about kRounds of blocks, at most `most` parts, the last round of `resident`
// blocks a multiprocessor as full as possible (0.97 is good enough, then the fewest parts).
int64_t parts_of(const Tensor& map, int64_t groups, int64_t most, int64_t resident) {
  const int64_t round = blocks_for(map, resident), aim = divide_up(blocks_for(map, kRounds), groups);
  most = std::clamp<int64_t>(most, 1, 65535);  // what a grid may have along y
  int64_t best = std::min(aim, most);
  double best_fill = 0;
  for (int64_t parts = std::max<int64_t>(1, aim / 2); parts <= std::min(3 * aim, most) && best_fill < 0.97; ++parts) {
    const double rounds = static_cast<double>(groups * parts) / static_cast<double>(round);
    const double fill = rounds / std::max(1.0, std::ceil(rounds));
    if (groups * parts >= blocks_for(map, 1) && fill > best_fill) best = parts, best_fill = fill;
  }
  return best;
}

// ---- maps -----------------------------------------------------------------------------------------------------------

// Planes shorter than this waste too much of their last chunk.
constexpr int64_t kShortestPlane = 256;

Map map_of(const Tensor& t, const Tensor& mask) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3), P = H * W;
  Map map{t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), element_of(t.scalar_type()),
          Order::scattered,   false,       false,       false,       false};
  map.planar = H == 1 || map.stride_h == W * map.stride_w;
  if (W == 1 && H > 1) map.stride_w = map.stride_h, map.planar = true;
  const int64_t size = t.element_size();
  const bool aligned =
      reinterpret_cast<uintptr_t>(map.data) % (4 * size) == 0 && (map.stride_n % 4 == 0 || t.size(0) == 1);
  const bool mask_aligned = reinterpret_cast<uintptr_t>(mask.const_data_ptr()) % 16 == 0;
  const bool lines = map.planar && (map.stride_w == 1 || P == 1);
  map.pixel_quads = lines && aligned && mask_aligned && P % 4 == 0 && (map.stride_c % 4 == 0 || C == 1);
  const bool planes_adjacent = lines && (map.stride_c == P || C == 1);
  const bool channels_adjacent = map.planar && (map.stride_c == 1 || C == 1) && (map.stride_w == C || P == 1);
  if (map.pixel_quads && P >= kShortestPlane) {
    map.order = Order::planes;
    map.vector = true;
  } else if (planes_adjacent || channels_adjacent) {
    map.order = Order::flat;
    map.channels_fastest = !planes_adjacent;
    map.vector = aligned && C * P % 4 == 0;
  } else {
    map.channels_fastest = map.stride_c == 1 && C > 1;
  }
  return map;
}

template <class T>
Pixels<T> pixels_of(const Tensor& vjp, const Tensor& mask) {
  const int64_t P = vjp.size(2) * vjp.size(3);
  return {{vjp.size(0), vjp.size(1), vjp.size(3), P, vjp.size(1) * P}, static_cast<const T*>(mask.const_data_ptr())};
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Tiles>
int64_t gram_stage_bytes(int64_t images) {
  const int64_t panel = panel_pitch(rows_of_stage<Tiles>(images));
  return 2 * (Tiles::kDepth / kPanel) * panel * static_cast<int64_t>(sizeof(typename Tiles::T));
}
// Stages that fit kBlocks blocks where the device has room for that, and at least two: with one, a block would wait for
// the copies of a stage that it has not started.
template <class Tiles>
int stages_of(int64_t stage_bytes, int64_t fixed_bytes, int64_t block_shared) {
  const int64_t share = (block_shared - 1024 * (Tiles::kBlocks - 1)) / Tiles::kBlocks;
  const int64_t fit =
      std::max((share - fixed_bytes) / stage_bytes, std::min<int64_t>(2, (block_shared - fixed_bytes) / stage_bytes));
  SIB_CHECK(kStatistics, fit >= 2, "a block needs ", 2 * stage_bytes + fixed_bytes,
            " bytes of shared memory, and may have ", block_shared, " here");
  return static_cast<int>(std::min<int64_t>(fit, kMaxStages));
}

template <class Tiles>
void run_forward(const StatisticsInputs& inputs, const Statistics& outputs) {
  using T = typename Tiles::T;
  const auto& [vjp, x, mask, precision] = inputs;
  const Stream stream = current_stream(vjp);
  GramArguments<T> args;
  args.pixels = pixels_of<T>(vjp, mask);
  args.maps[0] = map_of(vjp, mask);
  args.maps[1] = map_of(x, mask);
  const Shape& shape = args.pixels.shape;
  const int64_t N = shape.images, which = outputs.background_grams ? 4 : 2;
  const int64_t tiles = divide_up(N, Tiles::kTile), pairs = tiles * (tiles + 1) / 2;
  const int64_t chunks = divide_up(shape.elements, Tiles::kDepth);
  const int64_t plane_chunks = divide_up(shape.pixels, Tiles::kDepth) * shape.channels;
  SIB_CHECK(kStatistics, plane_chunks < (int64_t{1} << 31), "C·H·W is too large for a GPU's kernels");
  // At least 1,024 elements of D a block, so that the parts' sums stay smaller than the maps; 65,535 is the grid's
  // limit.
  const int64_t most = std::max<int64_t>(1, chunks * Tiles::kDepth / kPartial);
  args.parts = static_cast<int>(parts_of(vjp, 2 * pairs, most, Tiles::kBlocks));
  args.tiles = static_cast<int>(tiles);
  args.rows = rows_of_stage<Tiles>(N);
  args.chunks = static_cast<uint32_t>(chunks);
  args.plane_chunks = static_cast<uint32_t>(plane_chunks);
  args.split = precision == Precision::tf32x3;
  const int64_t stage = gram_stage_bytes<Tiles>(N);
  args.stages = stages_of<Tiles>(stage, Tiles::kMomentBytes, device_of(vjp).block_shared);
  const Tensor sums = new_double(vjp, {which * pairs * args.parts * Tiles::kGroups * Tiles::kSumSize});
  const Tensor moments = new_double(vjp, {args.parts * N * 4});
  args.sums = out<double>(sums);
  args.moments = out<double>(moments);
  launch(kStatistics, region_grams_kernel<Tiles>,
         dim3(static_cast<unsigned>(pairs), static_cast<unsigned>(args.parts), static_cast<unsigned>(which)),
         dim3(Tiles::kThreads), Tiles::kMomentBytes + args.stages * stage, stream, args);

  SumArguments<T> sum;
  sum.pixels = args.pixels;
  sum.vjp = args.maps[0];
  sum.tiles = args.tiles;
  sum.parts = args.parts;
  sum.gram_blocks = static_cast<int>(which * pairs * (Tiles::kSumSize / 32));
  sum.sums = args.sums;
  sum.moments = args.moments;
  for (int i = 0; i < 4; ++i) sum.grams[i] = out<double>(outputs.grams[i]);
  for (int i = 0; i < 2; ++i) {
    sum.variance[i] = out<double>(outputs.variance[i]);
    sum.mean[i] = out<double>(outputs.mean[i]);
  }
  const unsigned slices = static_cast<unsigned>(std::clamp<int64_t>(args.parts * Tiles::kGroups / 8, 1, kMaxSlices));
  launch(kStatistics, sum_partials_kernel<Tiles>, dim3(static_cast<unsigned>(sum.gram_blocks + divide_up(N, 32))),
         dim3(32, slices), 32 * slices * sizeof(double), stream, sum);
}

// The largest tile that pads N by at most an eighth more than the smaller one does, and of which two stages fit.
template <class Large, class Small>
bool takes_large(int64_t images, int64_t block_shared, int64_t large_bytes) {
  constexpr int64_t large = Large::kTile, small = Small::kTile;
  return large_bytes <= block_shared && divide_up(images, large) * large <= divide_up(images, small) * small * 9 / 8;
}

// On 8.0, whose code 8.6 and 8.9 run too, the 128-image tile of the tensor cores spills.
template <class G16, class G32, class G64, class G128>
void pick_forward(const StatisticsInputs& inputs, const Statistics& outputs) {
  const Device& device = device_of(inputs.vjp);
  const int64_t N = inputs.vjp.size(0), shared = device.block_shared;
  if (N <= 16) return run_forward<G16>(inputs, outputs);
  if (N <= 32) return run_forward<G32>(inputs, outputs);
  if (N > 64 && device.capability >= 90 &&
      takes_large<G128, G64>(N, shared, G128::kMomentBytes + 2 * gram_stage_bytes<G128>(N)))
    return run_forward<G128>(inputs, outputs);
  return run_forward<G64>(inputs, outputs);
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class Tiles>
int64_t gradient_fixed_bytes(int64_t images) {
  return images <= Tiles::kRows ? int64_t{Tiles::kRows} * Tiles::kRows * sizeof(typename Tiles::T) : 0;
}
template <class Tiles>
int64_t gradient_stage_bytes(int64_t images) {
  const int64_t rows = images <= Tiles::kRows ? Tiles::kRows : Tiles::kChunk;
  const int64_t sym = images <= Tiles::kRows ? 0 : int64_t{Tiles::kRows} * rows;
  return (2 * rows * Tiles::kPitch + sym) * static_cast<int64_t>(sizeof(typename Tiles::T));
}

template <class Tiles>
void run_backward(const StatisticsInputs& inputs, const StatisticsGradients& grads) {
  using T = typename Tiles::T;
  const auto& [vjp, x, mask, precision] = inputs;
  const Stream stream = current_stream(vjp);
  GradientArguments<T> args;
  args.pixels = pixels_of<T>(vjp, mask);
  const Shape& shape = args.pixels.shape;
  const int64_t N = shape.images;
  const int64_t row_tiles = divide_up(N, Tiles::kRows), padded = row_tiles * Tiles::kRows;
  const bool background = grads.background_grams();
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

  const int64_t grams = background ? 4 : 2;
  const Tensor sym = torch::stable::new_empty(mask, {grams * padded * padded}, type);
  const Tensor variance =
      torch::stable::new_empty(mask, {N * static_cast<int64_t>(sizeof(VarianceGrad<T>) / sizeof(T))}, type);
  PrepareArguments<T> prepare{};
  for (int64_t i = 0; i < grams; ++i) prepare.grad_gram[i] = in<double>(*grads.grad_gram[i]);
  for (int i = 0; i < 2; ++i) {
    prepare.grad_variance[i] = in<double>(*grads.grad_variance[i]);
    prepare.mean[i] = in<double>(*grads.mean[i]);
  }
  prepare.sym = out<T>(sym);
  prepare.variance = reinterpret_cast<VarianceGrad<T>*>(variance.mutable_data_ptr());
  prepare.images = N;
  prepare.padded = padded;
  prepare.elements = shape.elements;
  launch(kStatistics, prepare_gradients_kernel<T>,
         dim3(static_cast<unsigned>(divide_up(padded * padded, 256)), static_cast<unsigned>(grams)), dim3(256), 0,
         stream, prepare);

  const int64_t column_tiles = divide_up(shape.pixels, Tiles::kColumns), wanted = blocks_for(vjp, kRounds);
  args.column_blocks = static_cast<int>(std::min(column_tiles, divide_up(wanted, row_tiles)));
  // Few pixels: the channels are shared out too, and their parts of grad_M are added by a kernel of their own.
  const int64_t idle = wanted / (2 * row_tiles * args.column_blocks);
  args.channel_parts = static_cast<int>(std::max<int64_t>(1, std::min(shape.channels / 4, idle)));
  const int64_t plane = N * shape.pixels;
  const bool in_parts = args.channel_parts > 1 && grads.grad_mask != nullptr;
  std::optional<Tensor> parts;
  if (in_parts) parts = torch::stable::new_empty(mask, {args.channel_parts * plane}, type);
  args.steps = N <= Tiles::kRows ? 1 : static_cast<int>(divide_up(N, Tiles::kChunk));
  args.step_rows = N <= Tiles::kRows ? Tiles::kRows : Tiles::kChunk;
  args.padded = padded;
  args.split = precision == Precision::tf32x3;
  const int64_t stage = gradient_stage_bytes<Tiles>(N), fixed = gradient_fixed_bytes<Tiles>(N);
  args.stages = stages_of<Tiles>(stage, fixed, device_of(vjp).block_shared);
  T* const grad_mask = grads.grad_mask != nullptr ? out<T>(*grads.grad_mask) : nullptr;
  bool mask_written = false;

  // The x-parts write grad_M, the vjp-parts add to it.
  for (const int which : {1, 3, 0, 2}) {
    const Tensor* grad = which % 2 == 0 ? grads.grad_vjp : grads.grad_x;
    if ((which >= 2 && !background) || (grad == nullptr && grad_mask == nullptr)) continue;
    args.map = map_of(which % 2 == 0 ? vjp : x, mask);
    args.grad = grad != nullptr ? map_of(*grad, mask) : Map{};
    args.sym = in<T>(sym) + which * padded * padded;
    args.variance = which == 0 ? prepare.variance : nullptr;
    args.foreground = which < 2;
    args.add_grad = which >= 2;
    args.grad_mask = in_parts ? out<T>(*parts) : grad_mask;
    args.add_mask = mask_written && !in_parts;
    launch(kStatistics, region_gradients_kernel<Tiles>,
           dim3(static_cast<unsigned>(args.column_blocks), static_cast<unsigned>(row_tiles),
                static_cast<unsigned>(args.channel_parts)),
           dim3(Tiles::kThreads), fixed + args.stages * stage, stream, args);
    if (in_parts) {
      launch(kStatistics, sum_channel_parts_kernel<T>, dim3(static_cast<unsigned>(divide_up(plane, 256))), dim3(256), 0,
             stream, in<T>(*parts), grad_mask, plane, args.channel_parts, mask_written);
    }
    mask_written = true;
  }
}

template <class G16, class G32, class G64, class G128>
void pick_backward(const StatisticsInputs& inputs, const StatisticsGradients& grads) {
  const int64_t N = inputs.vjp.size(0), shared = device_of(inputs.vjp).block_shared;
  if (N <= 16) return run_backward<G16>(inputs, grads);
  if (N <= 32) return run_backward<G32>(inputs, grads);
  const int64_t large_bytes = gradient_fixed_bytes<G128>(N) + 2 * gradient_stage_bytes<G128>(N);
  if (N > 64 && large_bytes <= shared && divide_up(N, 128) * 128 <= divide_up(N, 64) * 64 * 9 / 8)
    return run_backward<G128>(inputs, grads);
  return run_backward<G64>(inputs, grads);
}

struct StatisticsKernels : OnCuda {
  template <class T>
  static void forward(const StatisticsInputs& inputs, const Statistics& outputs) {
    if constexpr (sizeof(T) == 8)
      inputs.vjp.size(0) <= 16 ? run_forward<WideGram16>(inputs, outputs) : run_forward<WideGram32>(inputs, outputs);
    else if (inputs.precision == Precision::ieee)
      pick_forward<IeeeGram16, IeeeGram32, IeeeGram64, IeeeGram64>(inputs, outputs);
    else
      pick_forward<Tf32Gram16, Tf32Gram32, Tf32Gram64, Tf32Gram128>(inputs, outputs);
  }

  template <class T>
  static void backward(const StatisticsInputs& inputs, const StatisticsGradients& grads) {
    if constexpr (sizeof(T) == 8)
      inputs.vjp.size(0) <= 16 ? run_backward<WideGrad16>(inputs, grads) : run_backward<WideGrad32>(inputs, grads);
    else if (inputs.precision == Precision::ieee)
      pick_backward<IeeeGrad16, IeeeGrad32, IeeeGrad64, IeeeGrad128>(inputs, grads);
    else
      pick_backward<Tf32Grad16, Tf32Grad32, Tf32Grad64, Tf32Grad128>(inputs, grads);
  }
};

}  // namespace

SIB_CUDA_LIBRARY(m) { StatisticsOps<StatisticsKernels>::implement(m); }

}  // namespace sib_fast::cuda
