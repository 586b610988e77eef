// The gradients of layer norm's and group norm's parameters: sums over rows, of the columns of an activation that is a
// matrix (layer norm), or of the channels' runs (group norm), which have been summed already.
//
//   columns_kernel        [images, groups, columns of a group]: a block takes a part of the rows of a tile of columns
//   merge_columns_kernel  [parts, sums, channels] -> [channels]: neighbouring threads have neighbouring channels
//   merge_runs_kernel     the runs' sums of row_passes.cuh, [units, sums] -> [channels]: a warp a channel
//
// Traffic   columns read the inputs once more, in the opposite order of the rows' pass: L2 holds what that read last.
// Order     a thread's rows in memory order, in T at most kRows of them; rows of threads halved onto each other; parts
//           by warp, then warps. The cut depends on the shape, the type and the number of multiprocessors: equal inputs
//           give equal bits on one kind of GPU.
#pragma once

#include "cuda/layer_norm_formulas.cuh"

namespace sib_fast::cuda::layer_norm {

using packs::blank, packs::load;

constexpr int kThreads = 128, kMergeThreads = 256;

struct ColumnGeometry {
  int64_t images, groups, columns, channels;  // channels = groups · columns
  int64_t tiles, image_step;                  // tiles of a group; images of a part
  int parts, width_bits;                      // 2^width_bits threads lie side by side in a row
  int64_t pieces;                             // of a run
  unsigned packed;                            // bit t: input t may be moved in packs
};

template <class Op>
struct ColumnArguments {
  using E = typename Op::Element;
  using T = typename Op::T;
  const E* in[Op::kInputs];
  T* out[Op::kColumnSums];  // [channels]; null: not asked for
  typename Op::Rows of;
  ColumnGeometry at;
  double* partial;  // [parts, kColumnSums, channels]; runs: [units, unit_sums]
  int unit_sums;
};

template <class Op>
struct Columns {
  static constexpr int kColumns = 8 / sizeof(typename Op::Element);  // of a thread: 8 bytes
  static constexpr int kRows = 4;                                    // of a thread under way at once
  static constexpr int64_t kShared = int64_t{kThreads} * kColumns * Op::kColumnSums * int64_t{sizeof(double)};
};

// Launch: 128 threads, blocks (tiles of columns, parts of the images). Shared: every thread's sums.
template <class Op>
__global__ void __launch_bounds__(kThreads, 4) columns_kernel(const __grid_constant__ ColumnArguments<Op> a) {
  using E = typename Op::Element;
  using T = typename Op::T;
  constexpr int V = Columns<Op>::kColumns, kRows = Columns<Op>::kRows;
  const int64_t tile = gridDim.x - 1 - blockIdx.x, group = tile / a.at.tiles;
  const int part = static_cast<int>(gridDim.y - 1 - blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), width = 1 << a.at.width_bits;
  const int x = thread & (width - 1), y = thread >> a.at.width_bits;
  const int64_t row_step = kThreads >> a.at.width_bits;
  const int64_t column = (tile % a.at.tiles * width + x) * V, channel = group * a.at.columns + column;
  const int columns = static_cast<int>(min(a.at.columns - column, static_cast<int64_t>(V)));  // of this thread
  const int64_t begin = part * a.at.image_step + y;
  const int64_t end = columns > 0 ? min((part + int64_t{1}) * a.at.image_step, a.at.images) : 0;

  double sums[V][Op::kColumnSums] = {};
  for (int64_t image = begin; image < end; image += kRows * row_step) {
    Pack<E, V> raw[kRows][Op::kInputs];
    T k[kRows][Op::kColumnData];
    // Images past the end are the last one once more.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = min(image + r * row_step, end - 1);
#pragma unroll
      for (int t = 0; t < Op::kInputs; ++t)
        raw[r][t] = load<E, V>(a.in[t], n * a.at.channels + channel, 0, columns, a.at.packed >> t & 1);
      Op::column_data(a.of, n * a.at.groups + group, k[r]);
    }
    const int rows = static_cast<int>(min((end - image + row_step - 1) / row_step, static_cast<int64_t>(kRows)));
#pragma unroll
    for (int i = 0; i < V; ++i) {
      T few[Op::kColumnSums] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        T v[Op::kInputs];
#pragma unroll
        for (int t = 0; t < Op::kInputs; ++t) v[t] = static_cast<T>(raw[r][t].value[i]);
        Op::add_to_column(v, k[r], few);
      }
#pragma unroll
      for (int s = 0; s < Op::kColumnSums; ++s) sums[i][s] += static_cast<double>(few[s]);
    }
  }

  sum_rows_of_threads<kThreads>(sums, width, dynamic_shared<double>());
  if (y != 0) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i >= columns) continue;
#pragma unroll
    for (int s = 0; s < Op::kColumnSums; ++s) {
      if (a.at.parts > 1) {
        a.partial[(int64_t{part} * Op::kColumnSums + s) * a.at.channels + channel + i] = sums[i][s];
      } else if (a.out[s] != nullptr) {
        a.out[s][channel + i] = static_cast<T>(sums[i][s]);
      }
    }
  }
}

// Launch: 8 warps, a block 32 channels; a warp takes every 8th part.
template <class Op>
__global__ void __launch_bounds__(kMergeThreads) merge_columns_kernel(const __grid_constant__ ColumnArguments<Op> a) {
  constexpr int kWarps = kMergeThreads / 32;
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t channel = blockIdx.x * int64_t{32} + lane;
  double* shared = dynamic_shared<double>();  // [kColumnSums, warps, 32]
#pragma unroll
  for (int s = 0; s < Op::kColumnSums; ++s) {
    double sum = 0.0;
#pragma unroll 4
    for (int part = warp; part < a.at.parts; part += kWarps) {
      if (channel < a.at.channels) sum += a.partial[(int64_t{part} * Op::kColumnSums + s) * a.at.channels + channel];
    }
    shared[(s * kWarps + warp) * 32 + lane] = sum;
  }
  __syncthreads();
  if (warp != 0 || channel >= a.at.channels) return;
#pragma unroll
  for (int s = 0; s < Op::kColumnSums; ++s) {
    if (a.out[s] == nullptr) continue;
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += shared[(s * kWarps + w) * 32 + lane];
    a.out[s][channel] = static_cast<typename Op::T>(total);
  }
}

// Launch: 4 warps, a warp a channel.
template <class Op>
__global__ void __launch_bounds__(kThreads) merge_runs_kernel(const __grid_constant__ ColumnArguments<Op> a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_of_thread();
  if (channel >= a.at.channels) return;
  const int64_t group = channel / a.at.columns;
  double sums[Op::kColumnSums] = {};
  for (int64_t q = lane_of_thread(); q < a.at.images * a.at.pieces; q += 32) {
    const int64_t n = q / a.at.pieces, unit = (n * a.at.channels + channel) * a.at.pieces + q % a.at.pieces;
    Op::run_to_column(a.of, n * a.at.groups + group, a.partial + unit * a.unit_sums, sums);
  }
#pragma unroll
  for (int s = 0; s < Op::kColumnSums; ++s) {
    sums[s] = warp_sum(sums[s]);
    if (lane_of_thread() == 0 && a.out[s] != nullptr) a.out[s][channel] = static_cast<typename Op::T>(sums[s]);
  }
}

// ---- cuts and launches ----------------------------------------------------------------------------------------------

// a.at.images, groups, columns, channels are given.
template <class Op>
void run_columns(const char* op, Stream stream, const Tensor& x, ColumnArguments<Op>& a) {
  constexpr int64_t V = Columns<Op>::kColumns;
  ColumnGeometry& at = a.at;
  at.width_bits = width_bits_of(divide_up(at.columns, V));
  at.tiles = divide_up(at.columns, V << at.width_bits);
  const RowParts cut =
      cut_rows(x, at.images, at.tiles * at.groups, 4 * Columns<Op>::kRows * (kThreads >> at.width_bits));
  at.image_step = cut.step;
  at.parts = cut.parts;
  for (int t = 0; t < Op::kInputs; ++t) at.packed |= (packs::misalignment(a.in[t], V) == 0 && at.columns % V == 0) << t;
  Tensor partial = new_double(x, {at.parts > 1 ? at.parts * Op::kColumnSums * at.channels : 0});
  a.partial = out<double>(partial);
  const dim3 grid(static_cast<unsigned>(at.tiles * at.groups), static_cast<unsigned>(at.parts));
  launch(op, columns_kernel<Op>, grid, dim3(kThreads), Columns<Op>::kShared, stream, a);
  if (at.parts == 1) return;
  const int64_t shared = Op::kColumnSums * kMergeThreads * int64_t{sizeof(double)};
  launch(op, merge_columns_kernel<Op>, dim3(static_cast<unsigned>(divide_up(at.channels, 32))), dim3(kMergeThreads),
         shared, stream, a);
}

// The same from the sums of runs, a.partial. a.at.pieces is given too.
template <class Op>
void run_channels(const char* op, Stream stream, ColumnArguments<Op>& a) {
  const dim3 grid(static_cast<unsigned>(divide_up(a.at.channels, kThreads / 32)));
  launch(op, merge_runs_kernel<Op>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace sib_fast::cuda::layer_norm
