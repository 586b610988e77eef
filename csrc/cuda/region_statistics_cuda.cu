// region_statistics for CUDA tensors: tilings, scratch, launches and registration. The kernels are in
// region_statistics_forward.cuh and region_statistics_backward.cuh.

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>

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

// Cuts aim at this many blocks: two rounds of the 132 multiprocessors of an H200. Constants, so that every cut, and
// with it every bit, depends on the shape only.
constexpr int64_t kMultiprocessors = 132, kBlocksWanted = 2 * kMultiprocessors;

// Parts of D for `groups` blocks a part: about kBlocksWanted blocks, at most `most` parts, the last round of
// `resident` blocks a multiprocessor as full as possible (0.97 is good enough, then the fewest parts).
int64_t parts_of(int64_t groups, int64_t most, int64_t resident) {
  const int64_t round = kMultiprocessors * resident, aim = divide_up(kBlocksWanted, groups);
  most = std::clamp<int64_t>(most, 1, 65535);  // what a grid may have along y
  int64_t best = std::min(aim, most);
  double best_fill = 0;
  for (int64_t parts = std::max<int64_t>(1, aim / 2); parts <= std::min(3 * aim, most) && best_fill < 0.97; ++parts) {
    const double rounds = static_cast<double>(groups * parts) / static_cast<double>(round);
    const double fill = rounds / std::max(1.0, std::ceil(rounds));
    if (groups * parts >= kMultiprocessors && fill > best_fill) best = parts, best_fill = fill;
  }
  return best;
}

// ---- maps -----------------------------------------------------------------------------------------------------------

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      return Element::float32;
  }
}

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

void check_inputs(const Tensor& vjp, const Tensor& x, const Tensor& mask, const std::string& precision) {
  check_map(kStatistics, "vjp", vjp);
  check_map(kStatistics, "x", x);
  for (int64_t d = 0; d < 4; ++d) {
    SIB_CHECK(kStatistics, vjp.size(d) == x.size(d), "x must have the shape of vjp");
  }
  SIB_CHECK(kStatistics, accumulation_type(vjp.scalar_type()) == accumulation_type(x.scalar_type()),
            "vjp and x must both be float64 or neither");
  check_plain(kStatistics, "mask", mask, accumulation_type(vjp.scalar_type()), vjp.size(0) * vjp.size(2) * vjp.size(3));
  SIB_CHECK(kStatistics, precision == "ieee" || precision == "tf32x3" || precision == "tf32",
            "precision must be ieee, tf32x3 or tf32, got ", precision);
}

Tensor new_float64(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Double);
}
double* float64_of(const Tensor& t) { return t.defined() ? static_cast<double*>(t.mutable_data_ptr()) : nullptr; }

// ---- forward --------------------------------------------------------------------------------------------------------

struct Statistics {
  std::array<Tensor, 4> grams;
  std::array<Tensor, 2> variance, mean;
  bool background_grams;
};

template <class Tiles>
int64_t gram_stage_bytes(int64_t images) {
  const int64_t rows = images <= Tiles::kTile ? Tiles::kTile : 2 * Tiles::kTile;
  return 2 * rows * Tiles::kDepth * static_cast<int64_t>(sizeof(typename Tiles::T));
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
void run_forward(const Tensor& vjp, const Tensor& x, const Tensor& mask, bool split, const Statistics& out) {
  using T = typename Tiles::T;
  const Stream stream = current_stream(vjp);
  GramArguments<T> args;
  args.pixels = pixels_of<T>(vjp, mask);
  args.maps[0] = map_of(vjp, mask);
  args.maps[1] = map_of(x, mask);
  const Shape& shape = args.pixels.shape;
  const int64_t N = shape.images, which = out.background_grams ? 4 : 2;
  const int64_t tiles = divide_up(N, Tiles::kTile), pairs = tiles * (tiles + 1) / 2;
  const int64_t chunks = divide_up(shape.elements, Tiles::kDepth);
  const int64_t plane_chunks = divide_up(shape.pixels, Tiles::kDepth) * shape.channels;
  SIB_CHECK(kStatistics, plane_chunks < (int64_t{1} << 31), "C·H·W is too large for a GPU's kernels");
  // At least 1,024 elements of D a block, so that the parts' sums stay smaller than the maps; 65,535 is the grid's
  // limit.
  const int64_t most = std::max<int64_t>(1, chunks * Tiles::kDepth / kPartial);
  args.parts = static_cast<int>(parts_of(2 * pairs, most, Tiles::kBlocks));
  args.tiles = static_cast<int>(tiles);
  args.rows = tiles == 1 ? Tiles::kTile : 2 * Tiles::kTile;
  args.chunks = static_cast<uint32_t>(chunks);
  args.plane_chunks = static_cast<uint32_t>(plane_chunks);
  args.split = split;
  const int64_t stage = gram_stage_bytes<Tiles>(N);
  args.stages = stages_of<Tiles>(stage, Tiles::kMomentBytes, device_of(vjp).block_shared);
  const Tensor sums = new_float64(vjp, which * pairs * args.parts * Tiles::kGroups * Tiles::kSumSize);
  const Tensor moments = new_float64(vjp, args.parts * N * 4);
  args.sums = float64_of(sums);
  args.moments = float64_of(moments);
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
  for (int i = 0; i < 4; ++i) sum.grams[i] = float64_of(out.grams[i]);
  for (int i = 0; i < 2; ++i) {
    sum.variance[i] = float64_of(out.variance[i]);
    sum.mean[i] = float64_of(out.mean[i]);
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

// On 8.0 the 128-image tile of the tensor cores spills.
template <class G16, class G32, class G64, class G128>
void pick_forward(const Tensor& vjp, const Tensor& x, const Tensor& mask, bool split, const Statistics& out) {
  const int64_t N = vjp.size(0), shared = device_of(vjp).block_shared;
  if (N <= 16) return run_forward<G16>(vjp, x, mask, split, out);
  if (N <= 32) return run_forward<G32>(vjp, x, mask, split, out);
  if (N > 64 && device_of(vjp).capability != 80 &&
      takes_large<G128, G64>(N, shared, G128::kMomentBytes + 2 * gram_stage_bytes<G128>(N)))
    return run_forward<G128>(vjp, x, mask, split, out);
  return run_forward<G64>(vjp, x, mask, split, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> region_statistics(Tensor vjp, Tensor x,
                                                                                             Tensor mask,
                                                                                             bool background_grams,
                                                                                             std::string precision) {
  check_inputs(vjp, x, mask, precision);
  const DeviceGuard guard(vjp.get_device_index());
  const int64_t N = vjp.size(0);
  const auto gram = [&](bool wanted) {
    return wanted ? torch::stable::new_empty(vjp, {N, N}, ScalarType::Double) : Tensor();
  };
  const Statistics out{{gram(true), gram(true), gram(background_grams), gram(background_grams)},
                       {new_float64(vjp, N), new_float64(vjp, N)},
                       {new_float64(vjp, N), new_float64(vjp, N)},
                       background_grams};
  if (vjp.scalar_type() == ScalarType::Double) {
    if (N <= 16)
      run_forward<WideGram16>(vjp, x, mask, false, out);
    else
      run_forward<WideGram32>(vjp, x, mask, false, out);
  } else if (precision == "ieee") {
    pick_forward<IeeeGram16, IeeeGram32, IeeeGram64, IeeeGram64>(vjp, x, mask, false, out);
  } else {
    pick_forward<Tf32Gram16, Tf32Gram32, Tf32Gram64, Tf32Gram128>(vjp, x, mask, precision == "tf32x3", out);
  }
  return {out.grams[0], out.grams[1], out.variance[0], out.variance[1],
          out.mean[0],  out.mean[1],  out.grams[2],    out.grams[3]};
}

// ---- backward -------------------------------------------------------------------------------------------------------

// A tensor of the map's layout in another type: a half map's gradients may exceed a half's range.
Tensor empty_like(const Tensor& map, ScalarType type) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(map),          from(std::optional(type)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),        from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Gradients {
  std::array<const Tensor*, 4> grad_gram;  // vjp, x, background vjp, background x; the last two null without cotangents
  std::array<const Tensor*, 2> grad_variance, mean;
  const Tensor *grad_vjp, *grad_x, *grad_mask;  // null where not needed
};

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
void run_backward(const Tensor& vjp, const Tensor& x, const Tensor& mask, bool split, const Gradients& grads) {
  using T = typename Tiles::T;
  const Stream stream = current_stream(vjp);
  GradientArguments<T> args;
  args.pixels = pixels_of<T>(vjp, mask);
  const Shape& shape = args.pixels.shape;
  const int64_t N = shape.images;
  const int64_t row_tiles = divide_up(N, Tiles::kRows), padded = row_tiles * Tiles::kRows;
  const bool background = grads.grad_gram[2] != nullptr;
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

  const int64_t grams = background ? 4 : 2;
  const Tensor sym = torch::stable::new_empty(mask, {grams * padded * padded}, type);
  const Tensor variance =
      torch::stable::new_empty(mask, {N * static_cast<int64_t>(sizeof(VarianceGrad<T>) / sizeof(T))}, type);
  PrepareArguments<T> prepare{};
  for (int64_t i = 0; i < grams; ++i)
    prepare.grad_gram[i] = static_cast<const double*>(grads.grad_gram[i]->const_data_ptr());
  for (int i = 0; i < 2; ++i) {
    prepare.grad_variance[i] = static_cast<const double*>(grads.grad_variance[i]->const_data_ptr());
    prepare.mean[i] = static_cast<const double*>(grads.mean[i]->const_data_ptr());
  }
  prepare.sym = static_cast<T*>(sym.mutable_data_ptr());
  prepare.variance = reinterpret_cast<VarianceGrad<T>*>(variance.mutable_data_ptr());
  prepare.images = N;
  prepare.padded = padded;
  prepare.elements = shape.elements;
  launch(kStatistics, prepare_gradients_kernel<T>,
         dim3(static_cast<unsigned>(divide_up(padded * padded, 256)), static_cast<unsigned>(grams)), dim3(256), 0,
         stream, prepare);

  const int64_t column_tiles = divide_up(shape.pixels, Tiles::kColumns);
  args.column_blocks = static_cast<int>(std::min(column_tiles, divide_up(kBlocksWanted, row_tiles)));
  // Few pixels: the channels are shared out too, and their parts of grad_M are added by a kernel of their own.
  const int64_t idle = kBlocksWanted / (2 * row_tiles * args.column_blocks);
  args.channel_parts = static_cast<int>(std::max<int64_t>(1, std::min(shape.channels / 4, idle)));
  const int64_t plane = N * shape.pixels;
  const Tensor parts = torch::stable::new_empty(mask, {args.channel_parts > 1 ? args.channel_parts * plane : 0}, type);
  args.steps = N <= Tiles::kRows ? 1 : static_cast<int>(divide_up(N, Tiles::kChunk));
  args.step_rows = N <= Tiles::kRows ? Tiles::kRows : Tiles::kChunk;
  args.padded = padded;
  args.split = split;
  const int64_t stage = gradient_stage_bytes<Tiles>(N), fixed = gradient_fixed_bytes<Tiles>(N);
  args.stages = stages_of<Tiles>(stage, fixed, device_of(vjp).block_shared);
  T* const grad_mask = grads.grad_mask != nullptr ? static_cast<T*>(grads.grad_mask->mutable_data_ptr()) : nullptr;
  bool mask_written = false;

  // The x-parts write grad_M, the vjp-parts add to it.
  for (const int which : {1, 3, 0, 2}) {
    const Tensor* grad = which % 2 == 0 ? grads.grad_vjp : grads.grad_x;
    if ((which >= 2 && !background) || (grad == nullptr && grad_mask == nullptr)) continue;
    args.map = map_of(which % 2 == 0 ? vjp : x, mask);
    args.grad = grad != nullptr ? map_of(*grad, mask) : Map{};
    args.sym = static_cast<const T*>(sym.const_data_ptr()) + which * padded * padded;
    args.variance = which == 0 ? prepare.variance : nullptr;
    args.foreground = which < 2;
    args.add_grad = which >= 2;
    const bool in_parts = args.channel_parts > 1 && grad_mask != nullptr;
    args.grad_mask = in_parts ? static_cast<T*>(parts.mutable_data_ptr()) : grad_mask;
    args.add_mask = mask_written && !in_parts;
    launch(kStatistics, region_gradients_kernel<Tiles>,
           dim3(static_cast<unsigned>(args.column_blocks), static_cast<unsigned>(row_tiles),
                static_cast<unsigned>(args.channel_parts)),
           dim3(Tiles::kThreads), fixed + args.stages * stage, stream, args);
    if (in_parts) {
      launch(kStatistics, sum_channel_parts_kernel<T>, dim3(static_cast<unsigned>(divide_up(plane, 256))), dim3(256), 0,
             stream, static_cast<const T*>(parts.const_data_ptr()), grad_mask, plane, args.channel_parts, mask_written);
    }
    mask_written = true;
  }
}

template <class G16, class G32, class G64, class G128>
void pick_backward(const Tensor& vjp, const Tensor& x, const Tensor& mask, bool split, const Gradients& grads) {
  const int64_t N = vjp.size(0), shared = device_of(vjp).block_shared;
  if (N <= 16) return run_backward<G16>(vjp, x, mask, split, grads);
  if (N <= 32) return run_backward<G32>(vjp, x, mask, split, grads);
  const int64_t large_bytes = gradient_fixed_bytes<G128>(N) + 2 * gradient_stage_bytes<G128>(N);
  if (N > 64 && large_bytes <= shared && divide_up(N, 128) * 128 <= divide_up(N, 64) * 64 * 9 / 8)
    return run_backward<G128>(vjp, x, mask, split, grads);
  return run_backward<G64>(vjp, x, mask, split, grads);
}

std::tuple<Tensor, Tensor, Tensor> region_statistics_backward(Tensor grad_gram_vjp, Tensor grad_gram_x,
                                                              Tensor grad_background_variance, Tensor grad_vjp_variance,
                                                              std::optional<Tensor> grad_background_gram_vjp,
                                                              std::optional<Tensor> grad_background_gram_x, Tensor vjp,
                                                              Tensor x, Tensor mask, Tensor background_mean,
                                                              Tensor vjp_mean, bool need_vjp, bool need_x,
                                                              bool need_mask, std::string precision) {
  check_inputs(vjp, x, mask, precision);
  SIB_CHECK(kStatistics, grad_background_gram_vjp.has_value() == grad_background_gram_x.has_value(),
            "the gradients of both background Grams must be given, or neither");
  const DeviceGuard guard(vjp.get_device_index());
  const int64_t N = vjp.size(0);
  Gradients grads{{&grad_gram_vjp, &grad_gram_x, nullptr, nullptr},
                  {&grad_background_variance, &grad_vjp_variance},
                  {&background_mean, &vjp_mean},
                  nullptr,
                  nullptr,
                  nullptr};
  if (grad_background_gram_vjp.has_value()) {
    grads.grad_gram[2] = &*grad_background_gram_vjp;
    grads.grad_gram[3] = &*grad_background_gram_x;
  }
  for (const Tensor* g : grads.grad_gram) {
    if (g != nullptr) check_plain(kStatistics, "grad_gram", *g, ScalarType::Double, N * N);
  }
  for (const Tensor* v : {&grad_background_variance, &grad_vjp_variance, &background_mean, &vjp_mean}) {
    check_plain(kStatistics, "grad_variance or mean", *v, ScalarType::Double, N);
  }

  const ScalarType acc = accumulation_type(vjp.scalar_type());
  const auto grad_like = [&](const Tensor& map, bool need) {
    return need ? empty_like(map, acc) : Tensor();
  };
  Tensor grad_vjp = grad_like(vjp, need_vjp), grad_x = grad_like(x, need_x);
  Tensor grad_mask = need_mask ? torch::stable::new_empty(mask, {N, 1, vjp.size(2), vjp.size(3)}) : Tensor();
  grads.grad_vjp = need_vjp ? &grad_vjp : nullptr;
  grads.grad_x = need_x ? &grad_x : nullptr;
  grads.grad_mask = need_mask ? &grad_mask : nullptr;
  if (acc == ScalarType::Double) {
    if (N <= 16)
      run_backward<WideGrad16>(vjp, x, mask, false, grads);
    else
      run_backward<WideGrad32>(vjp, x, mask, false, grads);
  } else if (precision == "ieee") {
    pick_backward<IeeeGrad16, IeeeGrad32, IeeeGrad64, IeeeGrad128>(vjp, x, mask, false, grads);
  } else {
    pick_backward<Tf32Grad16, Tf32Grad32, Tf32Grad64, Tf32Grad128>(vjp, x, mask, precision == "tf32x3", grads);
  }
  return {grad_vjp, grad_x, grad_mask};
}

}  // namespace

SIB_CUDA_LIBRARY(m) {
  m.impl("_region_statistics", TORCH_BOX(&region_statistics));
  m.impl("_region_statistics_backward", TORCH_BOX(&region_statistics_backward));
}

}  // namespace sib_fast::cuda
