// The gradient of the region statistics on the GPU (SPEC 6): region_gradients_kernel, one launch per map and region.
#pragma once

#include "cuda/region_statistics_maps.cuh"

namespace sib_fast::cuda {

template <class Math_, int ROWS, int COLUMNS, int WARPS, int BLOCKS>
struct GradientTiles {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kRows = ROWS;          // images whose gradient a block computes
  static constexpr int kColumns = COLUMNS;    // pixels of one channel
  static constexpr int kPitch = COLUMNS + 4;  // 4 mod 16: rows 2t and columns g of a fragment lie in 32 banks
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kBlocks = BLOCKS;
  static constexpr int kAcross = COLUMNS / Math::kCols;  // warps along the pixels
  static constexpr int kChunk = ROWS < 32 ? ROWS : 32;   // images of a step where N > kRows
  static_assert(ROWS / Math::kRows * kAcross == WARPS && COLUMNS % 16 == 0, "a warp has one sub-tile");
};

// grad = scale·(value - mean) of the two variances, the mean in two parts: (v - high) - low keeps the digits of v -
// mean.
template <class T>
struct VarianceGrad {
  T background_scale, background_high, background_low, whole_scale, whole_high, whole_low;
};

template <class T>
struct GradientArguments {
  Pixels<T> pixels;
  Map map, grad;  // grad.data null where the map's gradient is not needed
  const T* sym;   // [padded, padded]: the Gram's cotangent plus its transpose, zeros beyond N
  int64_t padded;
  const VarianceGrad<T>* variance;  // [N], or null
  T* grad_mask;                     // [N, P], or the channel parts' [parts][N, P], or null
  int steps, step_rows;             // of the contraction over images: 1 of kRows, or several of kChunk
  int stages, column_blocks, channel_parts;
  bool foreground, add_grad, add_mask, split;
};

// Adds to what is there, or writes.
template <class T, int V>
__device__ __forceinline__ void put(T* to, Pack<T, V> pack, bool add) {
  if (add) {
    const auto there = load_pack<V>(to);
#pragma unroll
    for (int i = 0; i < V; ++i) pack.value[i] = there.value[i] + pack.value[i];
  }
  store_pack(to, pack);
}

// region_gradients_kernel: Y = S·(map ⊙ w) for kRows images at a time, turned into gradients where it stands.
//
//   w = M (foreground) or 1 - M;   grad_map (+)= w ⊙ Y,   grad_M (+)= ± Σ_c map ⊙ Y   (minus in the background)
//   with `variance`:  g = v̇·(v - mean v);  grad_map += (1-M)·g + ṙ·(map - mean map),  grad_M -= Σ_c map·g
//
// Shapes    map, grad [N, C, H, W] any strides; sym [padded, padded]; mask, grad_mask [N, P].
// Launch    grid (runs of column tiles, tiles of kRows images, parts of the channels); ring of `stages` steps in shared
//           memory, and the kRows × kRows of S where N <= kRows.
// Passes    per column tile and channel: for each step of images, copies land, halves are widened, barrier, later
// copies
//           start, products; then the epilogue. grad_M is summed over the channels in registers.
// Traffic   reads map and mask N/kRows times (twice where N > kRows: the epilogue), writes grad and grad_mask once.
// Order     products of kChain, then float32 sums over images, then channels in order: fixed by the shape.
// Twins     cpu/region_statistics_kernels.cpp, ops/region_statistics/triton/; truth: reference.py.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    region_gradients_kernel(const __grid_constant__ GradientArguments<typename Tiles::T> args) {
  using Math = typename Tiles::Math;
  using T = typename Tiles::T;
  constexpr int kRun = Math::kRun;
  using Run = Pack<T, kRun>;
  constexpr int kRows = Tiles::kRows, kColumns = Tiles::kColumns, kPitch = Tiles::kPitch;
  constexpr int kQuads = kColumns / 4, kOwnQuads = kRows * kQuads / Tiles::kThreads,
                kRowStep = Tiles::kThreads / kQuads;
  static_assert(kRowStep * kOwnQuads == kRows && kRowStep * kQuads == Tiles::kThreads,
                "every thread has the same number of quads");
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const Shape& shape = args.pixels.shape;
  const Map& map = args.map;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRows;
  const int step_rows = args.step_rows;
  const bool resident = args.steps == 1;
  const int warp_row = warp / Tiles::kAcross * Math::kRows, warp_col = warp % Tiles::kAcross * Math::kCols;

  T* const resident_sym = dynamic_shared<T>();
  T* const ring = resident_sym + (resident ? kRows * kRows : 0);
  const int plane = step_rows * kPitch;
  const int stage_size = 2 * plane + (resident ? 0 : kRows * step_rows);

  // This thread's quads of a step: the same columns of every kRowStep-th image.
  const int own_row = tid / kQuads, own_col = tid % kQuads * 4, own_at = own_row * kPitch + own_col;
  const int own_quads = step_rows / kRowStep;

  // S[first …, from …] in panels.
  const auto copy_sym = [&](int64_t from, T* to) {
    for (int i = tid; i < kRows * step_rows / 4; i += Tiles::kThreads) {
      const int row = i / (step_rows / 4), k = i % (step_rows / 4) * 4;
      const T* source = args.sym + (first + row) * args.padded + from + k;
      T* target = to + k / kPanel * (kRows * kPanel) + in_panel(row, k % kPanel);
      copy_async<16>(target, source);
      if (sizeof(T) == 8) copy_async<16>(target + 2, source + 2);
    }
  };
  if (resident) copy_sym(0, resident_sym);

  const int64_t tiles = (shape.pixels + kColumns - 1) / kColumns;
  const int64_t tile_begin = tiles * blockIdx.x / args.column_blocks,
                tile_end = tiles * (blockIdx.x + 1) / args.column_blocks;
  const int64_t channel_begin = shape.channels * blockIdx.z / args.channel_parts;
  const int64_t channel_end = shape.channels * (blockIdx.z + 1) / args.channel_parts;

  // The next copies to start: a counter for each loop, one step of images after the other.
  int64_t next_tile = tile_begin, next_channel = channel_begin;
  int next_step = 0;
  const auto start_copies = [&](int slot) {
    if (next_tile < tile_end) {
      T* const values = ring + static_cast<int64_t>(slot) * stage_size;
      const int64_t p = next_tile * kColumns + own_col;
      const int64_t first_image = static_cast<int64_t>(next_step) * step_rows + own_row;
      if (map.pixel_quads) {
        const bool valid = p < shape.pixels;
        const int64_t offset = next_channel * map.stride_c + (valid ? p : 0);
        const T* mask_from = args.pixels.mask + (valid ? p : 0);
#pragma unroll 4
        for (int i = 0; i < own_quads; ++i) {
          const int64_t n = first_image + i * kRowStep;
          T* const value = values + own_at + i * kRowStep * kPitch;
          if (n < shape.images) {
            copy_quad(map, n * map.stride_n + offset, valid, value);
            copy_mask_quad(mask_from + n * shape.pixels, valid, value + plane);
          } else {
            share_pack(value, Pack<T, 4>{});
            share_pack(value + plane, Pack<T, 4>{});
          }
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          const bool valid = p + j < shape.pixels;
          const int64_t at = valid ? p + j : 0;
          const int64_t offset = next_channel * map.stride_c + pixel_offset(map, shape.width, at);
#pragma unroll 1
          for (int i = 0; i < own_quads; ++i) {
            const int64_t n = first_image + i * kRowStep;
            const bool real = valid && n < shape.images;
            T* const value = values + own_at + i * kRowStep * kPitch;
            copy_one(map, real ? n * map.stride_n + offset : 0, real, value, j);
            copy_mask_one(args.pixels.mask + (real ? n * shape.pixels + at : 0), real, value + plane + j);
          }
        }
      }
      if (!resident) copy_sym(static_cast<int64_t>(next_step) * step_rows, values + 2 * plane);
      if (++next_step == args.steps) {
        next_step = 0;
        if (++next_channel == channel_end) {
          next_channel = channel_begin;
          ++next_tile;
        }
      }
    }
    copy_async_commit();
  };

  for (int s = 0; s + 1 < args.stages; ++s) start_copies(s);
  const bool narrow = sizeof(T) == 4 && map.element != Element::float32;
  int slot = 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    T mask_sum[Math::kAcc] = {};
    for (int64_t channel = channel_begin; channel < channel_end; ++channel) {
      T sum[Math::kAcc] = {};
      const T* values = nullptr;
      for (int step = 0; step < args.steps; ++step) {
        copy_async_wait(args.stages - 2);
        T* const stage = ring + static_cast<int64_t>(slot) * stage_size;
        if (narrow) {
#pragma unroll 1
          for (int i = 0; i < own_quads; ++i) {
            T* const value = stage + own_at + i * kRowStep * kPitch;
            share_pack(value, widen_quad(value, map.element));
          }
        }
        __syncthreads();
        // Everyone is past the step before, whose slot the next copies may now take.
        start_copies(slot == 0 ? args.stages - 1 : slot - 1);
        values = stage;
        const T* s = (resident ? resident_sym : stage + 2 * plane) + warp_row * kPanel;
        const T* operand = stage + warp_col;
        for (int k = 0; k < step_rows; k += kChain) {
          T chain[Math::kAcc] = {};
#pragma unroll Math::kUnroll
          for (int panel = 0; panel < kChain / kPanel; ++panel) {
            if (kRows < kChain && panel * kPanel >= kRows) break;
            Math::product_step(chain, s, operand, operand + plane, kPitch, lane, args.foreground, args.split);
            s += kRows * kPanel;
            operand += kPanel * kPitch;
          }
#pragma unroll
          for (int e = 0; e < Math::kAcc; ++e) sum[e] += chain[e];
        }
        slot = slot + 1 == args.stages ? 0 : slot + 1;
      }

      // This thread's products are gradients of elements whose map and mask are still in shared memory, if one step had
      // all images.
#pragma unroll
      for (int r_index = 0; r_index < Math::kLaneRows; ++r_index) {
        const int row = warp_row + Math::row(r_index, lane);
        const int64_t n = first + row;
        if (n >= shape.images) continue;
        const VarianceGrad<T> variance = args.variance != nullptr ? args.variance[n] : VarianceGrad<T>{};
        T* const grad_row =
            static_cast<T*>(const_cast<void*>(args.grad.data)) + n * args.grad.stride_n + channel * args.grad.stride_c;
#pragma unroll
        for (int c = 0; c < Math::kLaneCols; c += kRun) {
          const int col = warp_col + Math::col(c, lane);
          const int64_t p = tile * kColumns + col;
          Run value{}, mask{}, grad;
          if (resident) {
            value = load_pack<kRun>(values + row * kPitch + col);
            mask = load_pack<kRun>(values + plane + row * kPitch + col);
          } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              if (p + i >= shape.pixels) break;
              value.value[i] =
                  value_at<T>(map, n * map.stride_n + channel * map.stride_c + pixel_offset(map, shape.width, p + i));
              mask.value[i] = args.pixels.mask[n * shape.pixels + p + i];
            }
          }
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const T r = value.value[i], m = mask.value[i], product = sum[Math::index(r_index, c + i)];
            grad.value[i] = weight_of(m, args.foreground) * product;
            T to_mask = args.foreground ? r * product : -r * product;
            if (args.variance != nullptr) {
              const T background =
                  variance.background_scale * ((r * (T(1) - m) - variance.background_high) - variance.background_low);
              grad.value[i] +=
                  (T(1) - m) * background + variance.whole_scale * ((r - variance.whole_high) - variance.whole_low);
              to_mask -= r * background;
            }
            mask_sum[Math::index(r_index, c + i)] += to_mask;
          }
          if (args.grad.data == nullptr || p >= shape.pixels) continue;
          if (args.grad.pixel_quads) {
            put(grad_row + p, grad, args.add_grad);
          } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              if (p + i >= shape.pixels) break;
              T* const to = grad_row + pixel_offset(args.grad, shape.width, p + i);
              *to = args.add_grad ? *to + grad.value[i] : grad.value[i];
            }
          }
        }
      }
    }
    if (args.grad_mask == nullptr) continue;
    T* const grad_mask = args.grad_mask + static_cast<int64_t>(blockIdx.z) * shape.images * shape.pixels;
#pragma unroll
    for (int r = 0; r < Math::kLaneRows; ++r) {
#pragma unroll
      for (int c = 0; c < Math::kLaneCols; c += kRun) {
        const int64_t n = first + warp_row + Math::row(r, lane), p = tile * kColumns + warp_col + Math::col(c, lane);
        if (n >= shape.images || p >= shape.pixels) continue;
        T* const to = grad_mask + n * shape.pixels + p;
        Run value;
#pragma unroll
        for (int i = 0; i < kRun; ++i) value.value[i] = mask_sum[Math::index(r, c + i)];
        if (shape.pixels % 4 == 0) {
          put(to, value, args.add_mask);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (p + i < shape.pixels) to[i] = args.add_mask ? to[i] + value.value[i] : value.value[i];
        }
      }
    }
  }
}

// grad_mask (+)= the channel parts' sums, in order. A thread an element.
template <class T>
__global__ void __launch_bounds__(256)
    sum_channel_parts_kernel(const T* parts, T* grad_mask, int64_t count, int part_count, bool add) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  T sum = add ? grad_mask[i] : T(0);
  for (int part = 0; part < part_count; ++part) sum += parts[part * count + i];
  grad_mask[i] = sum;
}

// prepare_gradients_kernel: what region_gradients_kernel reads, in its type.
//
//   sym[g] = grad_gram[g] + its transpose, padded with zeros;   scale = 2·cotangent/(D-1), means in two parts
//
// Launch    a thread per element of a padded matrix, grid.y which Gram; the first N threads of Gram 0 the variances
// too.
template <class T>
struct PrepareArguments {
  const double* grad_gram[4];
  const double* grad_variance[2];
  const double* mean[2];
  T* sym;  // [grams][padded, padded]
  VarianceGrad<T>* variance;
  int64_t images, padded, elements;
};
template <class T>
__global__ void __launch_bounds__(256) prepare_gradients_kernel(const __grid_constant__ PrepareArguments<T> args) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, size = args.padded * args.padded;
  if (at < size) {
    const int64_t i = at / args.padded, j = at % args.padded, N = args.images;
    const double* grad = args.grad_gram[blockIdx.y];
    args.sym[blockIdx.y * size + at] = i < N && j < N ? static_cast<T>(grad[i * N + j] + grad[j * N + i]) : T(0);
  }
  if (blockIdx.y == 0 && at < args.images) {
    const double scale = 2.0 / (static_cast<double>(args.elements) - 1);
    const double mean_v = args.mean[0][at], mean_r = args.mean[1][at];
    const T high_v = static_cast<T>(mean_v), high_r = static_cast<T>(mean_r);
    args.variance[at] = {static_cast<T>(args.grad_variance[0][at] * scale),
                         high_v,
                         static_cast<T>(mean_v - static_cast<double>(high_v)),
                         static_cast<T>(args.grad_variance[1][at] * scale),
                         high_r,
                         static_cast<T>(mean_r - static_cast<double>(high_r))};
  }
}

}  // namespace sib_fast::cuda
