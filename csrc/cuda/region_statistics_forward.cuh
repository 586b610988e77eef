// Grams and variances on the GPU (SPEC 4): region_grams_kernel over parts of D, then sum_partials_kernel.
#pragma once

#include "common/host_device.h"
#include "cuda/region_statistics_maps.cuh"

namespace sib_fast::cuda {

// One launch's tiling. Sub-tiles of a warp, sides a tile has of them, warps that share a sub-tile's contraction.
template <class Math_, int TILE, int DEPTH, int WARPS, int BLOCKS>
struct GramTiles {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kTile = TILE;    // images along each side of a Gram tile
  static constexpr int kDepth = DEPTH;  // elements of D in a chunk
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kBlocks = BLOCKS;  // blocks a multiprocessor shall hold
  static constexpr int kSides = TILE / Math::kRows;
  static constexpr int kSubTiles = kSides * kSides;
  static constexpr int kGroups = WARPS / kSubTiles;
  static constexpr int kSumSize = kSubTiles * Math::kAcc * 32;  // elements of a tile in the order of the warps' sums
  static constexpr int kQuads = DEPTH / 4;                      // of a row
  static constexpr int kOwnQuads = 2 * TILE * kQuads / kThreads;
  static constexpr int kRowStep = kThreads / kQuads;  // rows between the quads of a thread
  // On G_R's diagonal: one set of sums a quad, and what each image's are relative to.
  static constexpr int kMomentBytes = TILE * (kQuads * 4 * 8 + 2 * static_cast<int>(sizeof(T)));
  static_assert(Math::kRows == Math::kCols && kSubTiles * kGroups == WARPS, "a warp has one square sub-tile");
  static_assert(DEPTH / kPanel % kGroups == 0 && DEPTH / kGroups <= kChain, "a chunk is one chain of every warp");
  static_assert(kQuads <= 32 && kRowStep % 8 == 0,
                "the quads of a row belong to one warp, and lie alike in its panels");
  static_assert(kOwnQuads % 2 == 0 && kOwnQuads * kThreads == 2 * TILE * kQuads,
                "every thread has the same number of quads");
  static_assert(kPartial % DEPTH == 0, "float32 sums end with a chunk");
};

template <class T>
struct GramArguments {
  Pixels<T> pixels;
  Map maps[2];
  int tiles;  // along a side of a Gram
  int rows;   // that a stage has room for: rows_of_stage
  int stages;
  int parts;  // of D, one a block
  uint32_t chunks, plane_chunks;
  bool split;       // tf32x3
  double* sums;     // [which][tile pair][part][group][kSumSize]
  double* moments;  // [part][N][4]: sums of d and d² of v, of R
};

// kTile images where there is one tile, else those of two.
template <class Tiles>
SIB_HOST_DEVICE int rows_of_stage(int64_t images) {
  return images <= Tiles::kTile ? Tiles::kTile : 2 * Tiles::kTile;
}
// Elements from a panel of a stage to the next: 8 more than it holds, or the quads that a row has in four panels, which
// neighbouring threads read and write, would lie in the same eight banks.
SIB_HOST_DEVICE int panel_pitch(int rows) { return (rows + 1) * kPanel; }

struct TilePair {
  int i, j;
};
// The upper triangle row by row.
__device__ __forceinline__ TilePair tile_pair(int index, int tiles) {
  int i = 0;
  while (index >= tiles - i) index -= tiles - i++;
  return {i, i + index};
}

// What is subtracted before moments are summed: the map's own first element, so that a constant map's variance is 0 and
// a mean much larger than the deviations costs no digits. Any element will do: sums are float64.
template <class T>
__device__ __forceinline__ Pack<T, 2> moment_shifts(const Pixels<T>& pixels, const Map& vjp, int64_t n) {
  const T whole = value_at<T>(vjp, n * vjp.stride_n);
  return {{whole * (T(1) - pixels.mask[n * pixels.shape.pixels]), whole}};  // of v, of R
}

// Where a thread's quads of a chunk are: the same elements k … k+3 of the rows row + i·kRowStep.
template <class Tiles>
struct OwnQuads {
  int row, k, at;  // at: of the first quad in a stage
  __device__ __forceinline__ explicit OwnQuads(int panel) {
    row = static_cast<int>(threadIdx.x) / Tiles::kQuads;
    k = static_cast<int>(threadIdx.x) % Tiles::kQuads * 4;
    at = k / kPanel * panel + in_panel(row, k % kPanel);
  }
  static __device__ __forceinline__ constexpr int step(int i) { return i * Tiles::kRowStep * kPanel; }
  // The image of quad i: rows of tile i first, of tile j after them.
  __device__ __forceinline__ int image(int i, int first_i, int first_j) const {
    constexpr int kHalf = Tiles::kOwnQuads / 2;
    return i < kHalf ? first_i + row + i * Tiles::kRowStep : first_j + row + (i - kHalf) * Tiles::kRowStep;
  }
};

template <class Tiles>
__device__ __forceinline__ void copy_chunk(const GramArguments<typename Tiles::T>& args, const Map& map, uint32_t chunk,
                                           int own_quads, const OwnQuads<Tiles>& own, int first_i, int first_j,
                                           typename Tiles::T* values, typename Tiles::T* masks) {
  const Shape& shape = args.pixels.shape;
  if (map.order == Order::planes) {
    const uint32_t channels = static_cast<uint32_t>(shape.channels), block = chunk / channels;
    int64_t p = static_cast<int64_t>(block) * Tiles::kDepth + own.k;
    const bool valid = p < shape.pixels;
    p = valid ? p : 0;
    const int64_t offset = (chunk - block * channels) * map.stride_c + p;
#pragma unroll
    for (int i = 0; i < Tiles::kOwnQuads; ++i) {
      const int n = own.image(i, first_i, first_j);
      if (i < own_quads && n < shape.images) {
        copy_quad(map, n * map.stride_n + offset, valid, values + own.at + own.step(i));
        copy_mask_quad(args.pixels.mask + n * shape.pixels + p, valid, masks + own.at + own.step(i));
      }
    }
    return;
  }
  const int64_t e = static_cast<int64_t>(chunk) * Tiles::kDepth + own.k;
  const int64_t fast = map.channels_fastest ? shape.channels : shape.pixels;
  int64_t slow_at;
  if (shape.elements < (int64_t{1} << 31))
    slow_at = static_cast<uint32_t>(e) / static_cast<uint32_t>(fast);
  else
    slow_at = e / fast;
  int64_t fast_at = e - slow_at * fast;
  const bool whole = map.order == Order::flat && map.vector;
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    const bool valid = e + j < shape.elements;
    const int64_t p = !valid ? 0 : map.channels_fastest ? slow_at : fast_at;
    const int64_t c = !valid ? 0 : map.channels_fastest ? fast_at : slow_at;
    int64_t offset = valid ? e + j : 0;
    if (map.order == Order::scattered) offset = c * map.stride_c + pixel_offset(map, shape.width, p);
#pragma unroll 1
    for (int i = 0; i < own_quads; ++i) {
      const int n = own.image(i, first_i, first_j);
      if (n >= shape.images) continue;
      const int at = own.at + own.step(i);
      copy_mask_one(args.pixels.mask + n * shape.pixels + p, valid, masks + at + j);
      if (!whole)
        copy_one(map, n * map.stride_n + offset, valid, values + at, j);
      else if (j == 0)
        copy_quad(map, n * map.stride_n + offset, valid, values + at);
    }
    if (++fast_at == fast) {
      fast_at = 0;
      ++slow_at;
    }
  }
}

// region_grams_kernel: one tile of one Gram over one part of D; on G_R's diagonal the variances of its images too.
//
//   a = R·M (or R·(1-M), x·M, x·(1-M)), G[i, j] = sum_k a_ik a_jk;   sums of v - v_0 and R - R_0 and of their squares
//
// Shapes    maps [N, C, H, W] any strides; mask [N, P]; sums and moments as GramArguments has them, all written.
// Launch    grid (tile pairs i <= j, parts of D, which Gram); kThreads; ring of `stages` chunks in shared memory.
// Passes    per chunk: asynchronous copies of map and mask land; each thread multiplies the quads that it copied, in
//           place; barrier; the copies of a later chunk start; every warp adds its sub-tile's products.
// Traffic   every tile reads its 2·kTile (diagonal: kTile) images once: N/kTile reads of a map in all, from L2 where
//           the tiles of one part run together. Packs of shared memory meet in no bank (tests/cuda/test_banks.py).
// Order     products of a chain, of a part: fixed by the shape; float64 sums of kPartial products belong to one thread.
// Twins     cpu/region_statistics_kernels.cpp, ops/region_statistics/triton/; truth: reference.py.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    region_grams_kernel(const __grid_constant__ GramArguments<typename Tiles::T> args) {
  using Math = typename Tiles::Math;
  using T = typename Tiles::T;
  constexpr int kTile = Tiles::kTile, kDepth = Tiles::kDepth;
  constexpr bool kWide = sizeof(T) == 8;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const Shape& shape = args.pixels.shape;
  const int which = static_cast<int>(blockIdx.z), part = static_cast<int>(blockIdx.y);
  const Map& map = args.maps[which % 2];
  const bool foreground = which < 2;
  const TilePair tile = tile_pair(static_cast<int>(blockIdx.x), args.tiles);
  const bool diagonal = tile.i == tile.j;
  const int first_i = tile.i * kTile, first_j = tile.j * kTile;
  const int own_quads = diagonal ? Tiles::kOwnQuads / 2 : Tiles::kOwnQuads;
  const int panel = panel_pitch(args.rows), stage_size = kDepth / kPanel * panel;
  const OwnQuads<Tiles> own(panel);
  // Sums of d and d² of v, then of R: a pair of doubles a quad each, in memory because registers are short. Then what
  // is subtracted of v and of R, a pair an image.
  double2* const moments = dynamic_shared<double2>();
  T* const ring = reinterpret_cast<T*>(reinterpret_cast<char*>(moments) + Tiles::kMomentBytes);

  // On the diagonal the upper sub-tiles go to the first warps, which spreads them over the multiprocessor's quarters.
  const int group = warp / Tiles::kSubTiles;
  TilePair sub{warp % Tiles::kSubTiles / Tiles::kSides, warp % Tiles::kSides};
  bool active = true;
  if (diagonal) {
    active = warp % Tiles::kSubTiles < Tiles::kSides * (Tiles::kSides + 1) / 2;
    if (active) sub = tile_pair(warp % Tiles::kSubTiles, Tiles::kSides);
  }
  active = active && first_i + sub.i * Math::kRows < shape.images && first_j + sub.j * Math::kCols < shape.images;

  constexpr int kMomentQuads = Tiles::kOwnQuads / 2, kMoments = kTile * Tiles::kQuads;
  const bool has_moments = which == 0 && diagonal;
  auto* const shifts = reinterpret_cast<Pack<T, 2>*>(moments + 2 * kMoments);
  if (has_moments) {
    for (int i = 0; i < kMomentQuads; ++i)
      moments[tid + i * Tiles::kThreads] = moments[kMoments + tid + i * Tiles::kThreads] = make_double2(0, 0);
    if (tid < kTile && first_i + tid < shape.images) shifts[tid] = moment_shifts(args.pixels, map, first_i + tid);
    __syncthreads();
  }

  // Map and mask quads of a stage lie one after the other; both belong to the thread that copied them.
  const auto values_of = [&](int slot) { return ring + static_cast<int64_t>(slot) * 2 * stage_size; };
  const bool planes = map.order == Order::planes;
  const uint32_t channels = static_cast<uint32_t>(shape.channels), chunks = planes ? args.plane_chunks : args.chunks;
  const uint32_t begin = static_cast<uint32_t>(static_cast<uint64_t>(chunks) * part / args.parts);
  const uint32_t end = static_cast<uint32_t>(static_cast<uint64_t>(chunks) * (part + 1) / args.parts);
  const auto start_copies = [&](uint32_t chunk, int slot) {
    if (chunk < end)
      copy_chunk<Tiles>(args, map, chunk, own_quads, own, first_i, first_j, values_of(slot),
                        values_of(slot) + stage_size);
    copy_async_commit();
  };

  T sum[Math::kAcc] = {};
  bool first = true;
  const auto flush = [&] {
    if (active) {
      double* const sums =
          args.sums +
          (((static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * args.parts + part) * Tiles::kGroups + group) *
              Tiles::kSumSize +
          (sub.i * Tiles::kSides + sub.j) * Math::kAcc * 32 + lane;
      // In groups: all loads of one are under way before its first store. With 8, ptxas spills the 64-image tile's.
      constexpr int kGroup = kTile == 64 ? 4 : 8;
#pragma unroll
      for (int begin = 0; begin < Math::kAcc; begin += kGroup) {
        double total[kGroup] = {};
        if (!first) {
#pragma unroll
          for (int e = 0; e < kGroup; ++e) total[e] = sums[(begin + e) * 32];
        }
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          sums[(begin + e) * 32] = total[e] + static_cast<double>(sum[begin + e]);
          sum[begin + e] = T(0);
        }
      }
    }
    first = false;
  };

  for (int s = 0; s + 1 < args.stages; ++s) start_copies(begin + s, s);
  int slot = 0;
  for (uint32_t chunk = begin; chunk < end; ++chunk) {
    copy_async_wait(args.stages - 2);
    T* const values = values_of(slot);
    T* const masks = values + stage_size;
    // Of this thread's quads: how many of their elements there are.
    const int64_t behind =
        planes ? shape.pixels - int64_t{chunk / channels} * kDepth : shape.elements - int64_t{chunk} * kDepth;
    const int left = static_cast<int>(min(behind - own.k, int64_t{4}));
#pragma unroll 1
    for (int i = 0; i < own_quads; ++i) {
      const int n = own.image(i, first_i, first_j);
      const int at = own.at + own.step(i);
      Pack<T, 4> value{}, mask{}, operand;
      if (n < shape.images) {
        value = widen_quad(values + at, map.element);
        mask = load_pack<4>(masks + at);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) operand.value[j] = value.value[j] * weight_of(mask.value[j], foreground);
      share_pack(values + at, operand);
      if (has_moments && n < shape.images) {
        const auto shift = shifts[n - first_i];
        double2& of_v = moments[tid + i * Tiles::kThreads];
        double2& of_r = moments[kMoments + tid + i * Tiles::kThreads];
        double2 sum_v = of_v, sum_r = of_r;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j >= left) break;
          const double v = static_cast<double>(value.value[j] * (T(1) - mask.value[j]) - shift.value[0]);
          const double r = static_cast<double>(value.value[j] - shift.value[1]);
          sum_v.x += v;
          sum_v.y += v * v;
          sum_r.x += r;
          sum_r.y += r * r;
        }
        of_v = sum_v;
        of_r = sum_r;
      }
    }
    __syncthreads();
    // Everyone is past the products of the chunk before, whose slot the next copies may now take.
    start_copies(chunk + args.stages - 1, slot == 0 ? args.stages - 1 : slot - 1);
    if (active) {
      const T* a = values + sub.i * Math::kRows * kPanel + group * panel;
      const T* b = values + (sub.j * Math::kCols + (diagonal ? 0 : kTile)) * kPanel + group * panel;
      if (kWide) {
        for (int p = group; p < kDepth / kPanel;
             p += Tiles::kGroups, a += Tiles::kGroups * panel, b += Tiles::kGroups * panel)
          Math::gram_step(sum, a, b, lane, args.split);
      } else {
        T chain[Math::kAcc] = {};
#pragma unroll Math::kUnroll
        for (int p = 0; p < kDepth / kPanel / Tiles::kGroups;
             ++p, a += Tiles::kGroups * panel, b += Tiles::kGroups * panel)
          Math::gram_step(chain, a, b, lane, args.split);
#pragma unroll
        for (int e = 0; e < Math::kAcc; ++e) sum[e] += chain[e];
      }
    }
    if ((chunk + 1 - begin) % (kPartial / kDepth) == 0 && chunk + 1 < end) flush();
    slot = slot + 1 == args.stages ? 0 : slot + 1;
  }
  flush();

  if (has_moments) {
    for (int i = 0; i < kMomentQuads; ++i) {
      const double2 of_v = moments[tid + i * Tiles::kThreads], of_r = moments[kMoments + tid + i * Tiles::kThreads];
      double sums_of[4] = {of_v.x, of_v.y, of_r.x, of_r.y};
      const int n = own.image(i, first_i, first_j);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int bits = Tiles::kQuads / 2; bits > 0; bits /= 2)
          sums_of[m] += __shfl_xor_sync(0xffffffffu, sums_of[m], bits);
        if (own.k == 0 && n < shape.images) args.moments[(part * shape.images + n) * 4 + m] = sums_of[m];
      }
    }
  }
}

template <class T>
struct SumArguments {
  Pixels<T> pixels;
  Map vjp;
  int tiles, parts, gram_blocks;
  const double* sums;
  const double* moments;
  double* grams[4];
  double* variance[2];  // of v, of R
  double* mean[2];
};

constexpr int kMaxSlices = 16;  // of the parts, summed side by side: blockDim.y of them, by the number of parts

// sum_partials_kernel: Grams, variances and means from the parts, in float64.
//
// Shapes    sums, moments of region_grams_kernel -> grams [N, N], mirrored; variance, mean [N].
// Launch    (32, slices) threads; a block per 32 sums of a tile (gram_blocks of them), then one per 32 images.
// Order     each slice adds its parts in order, then the slices are added in order.
template <class Tiles>
__global__ void __launch_bounds__(32 * kMaxSlices)
    sum_partials_kernel(const __grid_constant__ SumArguments<typename Tiles::T> args) {
  using Math = typename Tiles::Math;
  const int lane = static_cast<int>(threadIdx.x), slice = static_cast<int>(threadIdx.y),
            slices = static_cast<int>(blockDim.y);
  const Shape& shape = args.pixels.shape;
  double* const shared = dynamic_shared<double>();
  const auto total = [&](double mine) {
    shared[slice * 32 + lane] = mine;
    __syncthreads();
    double all = 0;
    if (slice == 0) {
      for (int s = 0; s < slices; ++s) all += shared[s * 32 + lane];
    }
    __syncthreads();
    return all;
  };
  const auto slice_begin = [&](int64_t count, int s) { return count * s / slices; };

  if (static_cast<int>(blockIdx.x) < args.gram_blocks) {
    constexpr int kRuns = Tiles::kSumSize / 32;
    const int pairs = args.tiles * (args.tiles + 1) / 2;
    const int run = static_cast<int>(blockIdx.x) % kRuns, tile_index = static_cast<int>(blockIdx.x) / kRuns;
    const TilePair tile = tile_pair(tile_index % pairs, args.tiles);
    const int sub = run / Math::kAcc, r = run % Math::kAcc / Math::kLaneCols, c = run % Math::kLaneCols;
    const int64_t i =
        static_cast<int64_t>(tile.i) * Tiles::kTile + sub / Tiles::kSides * Math::kRows + Math::row(r, lane);
    const int64_t j =
        static_cast<int64_t>(tile.j) * Tiles::kTile + sub % Tiles::kSides * Math::kCols + Math::col(c, lane);
    const bool wanted = i <= j && j < shape.images;
    const int64_t count = static_cast<int64_t>(args.parts) * Tiles::kGroups;
    const double* from =
        args.sums + tile_index * count * Tiles::kSumSize + (sub * Math::kAcc + Math::index(r, c)) * 32 + lane;
    double mine = 0;
    if (wanted) {
      const int64_t stop = slice_begin(count, slice + 1);
#pragma unroll 4
      for (int64_t part = slice_begin(count, slice); part < stop; ++part) mine += from[part * Tiles::kSumSize];
    }
    const double value = total(mine);
    if (slice == 0 && wanted) {
      double* gram = args.grams[tile_index / pairs];
      gram[i * shape.images + j] = value;
      gram[j * shape.images + i] = value;
    }
    return;
  }

  const int64_t n = (static_cast<int64_t>(blockIdx.x) - args.gram_blocks) * 32 + lane;
  double mine[4] = {};
  if (n < shape.images) {
    const int64_t stop = slice_begin(args.parts, slice + 1);
    for (int64_t part = slice_begin(args.parts, slice); part < stop; ++part) {
      for (int m = 0; m < 4; ++m) mine[m] += args.moments[(part * shape.images + n) * 4 + m];
    }
  }
  double sums[4];
  for (int m = 0; m < 4; ++m) sums[m] = total(mine[m]);
  if (slice != 0 || n >= shape.images) return;
  const auto shift = moment_shifts(args.pixels, args.vjp, n);
  const double count = static_cast<double>(shape.elements);
  for (int m = 0; m < 2; ++m) {
    const double squares = sums[2 * m + 1] - sums[2 * m] * sums[2 * m] / count;
    args.variance[m][n] = (squares < 0 ? 0 : squares) / (count - 1);
    args.mean[m][n] = static_cast<double>(shift.value[m]) + sums[2 * m] / count;
  }
}

}  // namespace sib_fast::cuda
