// The passes of batch norm over activations, one kernel for each layout, and the merge between them. `Op` is one of
// batch_norm_formulas.cuh.
//
//   channels_first_kernel   [N, C, S]: a block takes a part of one channel, runs of S elements S·C apart
//   channels_last_kernel    [rows, C]: a block takes a part of the rows of a tile of neighbouring channels
//   merge_kernel            [C, sums, parts] -> coefficients [C]: a warp a channel
//
// Launches  sums | merge | writes; where a channel (a tile) is one part, one launch that sums, then writes.
// Traffic   sums read every input once (an addend not); writes read every input once and write the outputs: forward 2
//           reads and 1 write of an activation, gradient 4 and 1 (5 and 1 with an addend), its gradient 6 and 2. A
//           write goes through the blocks in the opposite order, so that it meets first what the sums read last and
//           L2 still holds.
// Order     a thread's elements in memory order; lanes by butterfly, warps or rows of threads, then parts, in fixed
//           order; the cut depends on the shape, the type and the number of multiprocessors: equal inputs give equal
//           bits on one kind of GPU.
// Offsets   int64 throughout.
#pragma once

#include "cuda/batch_norm_formulas.cuh"

namespace sib_fast::cuda::batch_norm {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Cuts and tiles depend on what is summed alone, so that an input that is only added changes no bit of a sum.
template <class Op>
constexpr int kSummed = Op::kInputs - Op::kUnsummed;

// Threads of a block lie side by side, 2^width_bits of them, in a run (channels first) or in a row (channels last).
struct Geometry {
  int64_t images, channels, spatial;  // channels last: rows, channels, 1
  int64_t packs;                      // channels first: the most packs that a run touches
  int64_t image_step, pack_step;      // what a part has of the images (rows) and of the packs of a run
  int parts, spatial_parts;           // parts = parts of the images · spatial_parts
  int width_bits;
  int misaligned;   // elements between x's start and the pack boundary before it
  unsigned packed;  // bit t: tensor t (inputs, then outputs) may be moved in packs
};

template <class Op>
struct Arguments {
  using E = typename Op::Element;
  using T = typename Op::T;
  const E* in[Op::kInputs];
  E* out[Op::kOutputs];  // null: not asked for
  typename Op::Channels of{};
  Geometry at{};
  double* partial = nullptr;          // [C, kSums, parts]
  T* coefficients = nullptr;          // [kCoefficients, C]
  bool sums = false, writes = false;  // both: the block's part is the whole channel

  SIB_HOST_DEVICE bool any_output() const {
    bool any = false;
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) any = any || out[o] != nullptr;
    return any;
  }

  __device__ __forceinline__ T centre(int64_t c) const {
    return Op::centre(of, c, in[Op::kInputs - 1] + c * at.spatial);
  }
};

template <class T, int kCoefficients>
__device__ __forceinline__ void read_coefficients(const T* from, int64_t c, int64_t stride, T (&k)[kCoefficients]) {
#pragma unroll
  for (int j = 0; j < kCoefficients; ++j) k[j] = from[j * stride + c];
}

// The outputs of a pack; k_of(i): the coefficients of its i-th place.
template <class Op, int V, class CoefficientsOf>
__device__ __forceinline__ void write_pack(const Arguments<Op>& a,
                                           const Pack<typename Op::Element, V> (&raw)[Op::kInputs], int64_t first,
                                           int lo, int hi, CoefficientsOf k_of) {
  using E = typename Op::Element;
  using T = typename Op::T;
  Pack<E, V> to[Op::kOutputs];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    T v[Op::kInputs], w[Op::kOutputs];
#pragma unroll
    for (int t = 0; t < Op::kInputs; ++t) v[t] = static_cast<T>(raw[t].value[i]);
    Op::write(v, k_of(i), w);
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) to[o].value[i] = static_cast<E>(w[o]);
  }
#pragma unroll
  for (int o = 0; o < Op::kOutputs; ++o) {
    if (a.out[o] == nullptr) continue;
    store(a.out[o], first, lo, hi, a.at.packed >> (Op::kInputs + o) & 1, to[o]);
  }
}

// ---- channels first -------------------------------------------------------------------------------------------------

// The packs of 16 bytes, cut on x's 16-byte boundaries, that this thread takes of a part of a channel. A run need not
// begin on a boundary: of its first and last pack some places are the neighbouring channels'.
template <int V>
struct Walk {
  int64_t spatial, run_step, run, last_run;  // where runs begin
  int64_t j, j_begin, j_end;
  int j_step, misaligned;

  __device__ __forceinline__ Walk(const Geometry& at, int64_t c, int part) {
    const int width = 1 << at.width_bits, x = threadIdx.x & (width - 1), y = threadIdx.x >> at.width_bits;
    const int64_t n = part / at.spatial_parts * at.image_step, n_end = min(n + at.image_step, at.images);
    const int64_t first = part % at.spatial_parts * at.pack_step;
    spatial = at.spatial;
    run = ((n + y) * at.channels + c) * spatial;
    last_run = ((n_end - 1) * at.channels + c) * spatial;
    run_step = static_cast<int64_t>(kThreads >> at.width_bits) * at.channels * spatial;
    j = j_begin = first + x;
    j_end = min(first + at.pack_step, at.packs);
    j_step = width;
    misaligned = at.misaligned;
    if (j_begin >= j_end) last_run = -1;
  }
  __device__ __forceinline__ bool more() const { return run <= last_run; }
  // The first element of the next pack, and which places of it are the channel's: none where hi <= lo.
  __device__ __forceinline__ int64_t next(int& lo, int& hi) {
    const int64_t inside = j * V - ((run + misaligned) & (V - 1)), first = run + inside;
    lo = inside < 0 ? static_cast<int>(-inside) : 0;
    hi = static_cast<int>(min(spatial - inside, static_cast<int64_t>(V)));
    j += j_step;
    if (j >= j_end) {
      j = j_begin;
      run += run_step;
    }
    return first;
  }
};

// The sums over the block, in every thread. shared [K·warps], free again on return.
template <int K>
__device__ __forceinline__ void block_sums(double (&sums)[K], double* shared) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const double sum = warp_sum(sums[k]);
    if (lane_of_thread() == 0) shared[k * kWarps + warp_of_thread()] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] = 0.0;
    for (int w = 0; w < kWarps; ++w) sums[k] += shared[k * kWarps + w];
  }
  __syncthreads();
}

// Launch: 128 threads, blocks (channels, parts); shared: the sums of 4 warps.
template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kInputs == 3 ? 4 : 5)
    channels_first_kernel(const __grid_constant__ Arguments<Op> a) {
  using E = typename Op::Element;
  using T = typename Op::T;
  constexpr int V = 16 / sizeof(E);
  // Packs of an input under way at once.
  constexpr int kUnroll = Op::kInputs == 1 ? 4 : 2;
  const bool backwards = !a.sums;
  const int64_t c = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int part = static_cast<int>(backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y);
  const int64_t total = a.at.images * a.at.channels * a.at.spatial;
  Pack<E, V> raw[kUnroll][Op::kInputs];
  int64_t first[kUnroll];
  int lo[kUnroll], hi[kUnroll];
  // The next packs of the walk, all loads before the first is waited for; of the inputs `from` and the later ones.
  const auto load_next = [&](Walk<V>& walk, int from) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      hi[u] = lo[u] = 0;
      if (!walk.more()) continue;
      first[u] = walk.next(lo[u], hi[u]);
      if (hi[u] <= lo[u]) continue;
      const bool whole = first[u] >= 0 && first[u] + V <= total;
#pragma unroll
      for (int t = 0; t < Op::kInputs; ++t) {
        if (t < from) continue;
        raw[u][t] = load<E, V>(a.in[t], first[u], lo[u], hi[u], whole && (a.at.packed >> t & 1));
      }
    }
  };

  T k[Op::kCoefficients];
  if (a.sums) {
    const T centre = a.centre(c);
    double sums[Op::kSums] = {};
    for (Walk<V> walk(a.at, c, part); walk.more();) {
      load_next(walk, Op::kUnsummed);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (hi[u] <= lo[u]) continue;
        T v[kSummed<Op>][V];
#pragma unroll
        for (int t = 0; t < kSummed<Op>; ++t) {
#pragma unroll
          for (int i = 0; i < V; ++i) v[t][i] = static_cast<T>(raw[u][Op::kUnsummed + t].value[i]);
        }
        blank(v, lo[u], hi[u]);
        Op::add(v, hi[u] - lo[u], centre, sums);
      }
    }
    double* shared = dynamic_shared<double>();
    block_sums(sums, shared);
    if (!a.writes) {
      if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < Op::kSums; ++s) a.partial[(c * Op::kSums + s) * a.at.parts + part] = sums[s];
      }
      return;
    }
    T* of_channel = reinterpret_cast<T*>(shared);
    if (threadIdx.x == 0) {
      Op::coefficients(a.of, c, centre, sums, k);
#pragma unroll
      for (int j = 0; j < Op::kCoefficients; ++j) of_channel[j] = k[j];
    }
    __syncthreads();
    read_coefficients(of_channel, 0, 1, k);
  } else {
    read_coefficients(a.coefficients, c, a.at.channels, k);
  }

  if (!a.any_output()) return;
  for (Walk<V> walk(a.at, c, part); walk.more();) {
    load_next(walk, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (hi[u] <= lo[u]) continue;
      write_pack<Op, V>(a, raw[u], first[u], lo[u], hi[u], [&](int) -> const auto& { return k; });
    }
  }
}

// ---- channels last --------------------------------------------------------------------------------------------------

// Launch: 128 threads, blocks (tiles of channels, parts of the rows); a thread walks down kColumns channels, few enough
// that their sums and coefficients stay in registers. Shared: every thread's sums.
template <class Op>
struct Columns {
  static constexpr int kBytes = sizeof(typename Op::Element);
  static constexpr int kColumns = kBytes == 8 ? 1 : kBytes == 4 || kSummed<Op> == 3 ? 2 : 4;
  static constexpr int kRows = Op::kInputs == 1 ? 8 : 4;  // of a thread under way at once
  // Of a multiprocessor, as many as the registers of a thread allow without a stack.
  static constexpr int kBlocks = kSummed<Op> == 3 ? 5 : Op::kInputs == 3 ? 3 : 4;
  static constexpr int64_t kShared = int64_t{kThreads} * kColumns * Op::kSums * static_cast<int64_t>(sizeof(double));
};

template <class Op>
__global__ void __launch_bounds__(kThreads, Columns<Op>::kBlocks)
    channels_last_kernel(const __grid_constant__ Arguments<Op> a) {
  using E = typename Op::Element;
  using T = typename Op::T;
  constexpr int V = Columns<Op>::kColumns, kRows = Columns<Op>::kRows;
  const bool backwards = !a.sums;
  const int64_t tile = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int part = static_cast<int>(backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), width = 1 << a.at.width_bits;
  const int x = thread & (width - 1), y = thread >> a.at.width_bits;
  const int64_t row_step = kThreads >> a.at.width_bits, channels = a.at.channels;
  const int64_t column = (tile * width + x) * V;
  const int columns = static_cast<int>(min(channels - column, static_cast<int64_t>(V)));  // of this thread
  const int64_t begin = part * a.at.image_step + y;
  const int64_t end = columns > 0 ? min((part + int64_t{1}) * a.at.image_step, a.at.images) : 0;
  Pack<E, V> raw[kRows][Op::kInputs];
  // Rows past the end are the last one once more. Of the inputs `from` and the later ones.
  const auto load_rows = [&](int64_t row, int from) {
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int64_t first = min(row + u * row_step, end - 1) * channels + column;
#pragma unroll
      for (int t = 0; t < Op::kInputs; ++t) {
        if (t < from) continue;
        raw[u][t] = load<E, V>(a.in[t], first, 0, columns, a.at.packed >> t & 1);
      }
    }
  };

  T k[V][Op::kCoefficients];
  if (a.sums) {
    T centre[V];
    double sums[V][Op::kSums] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) centre[i] = i < columns ? a.centre(column + i) : T(0);
    for (int64_t row = begin; row < end; row += kRows * row_step) {
      load_rows(row, Op::kUnsummed);
      const int rows = static_cast<int>(min((end - row + row_step - 1) / row_step, static_cast<int64_t>(kRows)));
#pragma unroll
      for (int i = 0; i < V; ++i) {
        T v[kSummed<Op>][kRows];
#pragma unroll
        for (int t = 0; t < kSummed<Op>; ++t) {
#pragma unroll
          for (int u = 0; u < kRows; ++u) v[t][u] = static_cast<T>(raw[u][Op::kUnsummed + t].value[i]);
        }
        blank(v, 0, rows);
        Op::add(v, rows, centre[i], sums[i]);
      }
    }
    double* shared = dynamic_shared<double>();
    sum_rows_of_threads<kThreads>(sums, width, shared);
    if (y == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i >= columns) continue;
        if (a.writes) {
          Op::coefficients(a.of, column + i, centre[i], sums[i], k[i]);
        } else {
#pragma unroll
          for (int s = 0; s < Op::kSums; ++s)
            a.partial[((column + i) * Op::kSums + s) * a.at.parts + part] = sums[i][s];
        }
      }
    }
    if (!a.writes) return;
    T* of_tile = reinterpret_cast<T*>(shared);
    __syncthreads();  // the sums have been read
    if (y == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
#pragma unroll
        for (int j = 0; j < Op::kCoefficients; ++j) of_tile[j * width * V + x * V + i] = k[i][j];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) read_coefficients(of_tile, x * V + i, width * V, k[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < columns) read_coefficients(a.coefficients, column + i, channels, k[i]);
    }
  }

  if (!a.any_output()) return;
  for (int64_t row = begin; row < end; row += kRows * row_step) {
    load_rows(row, 0);
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (row + u * row_step >= end) continue;
      write_pack<Op, V>(a, raw[u], (row + u * row_step) * channels + column, 0, columns,
                        [&](int i) -> const auto& { return k[i]; });
    }
  }
}

// ---- merge ----------------------------------------------------------------------------------------------------------

// Launch: 4 warps, a warp a channel. Traffic: parts · kSums doubles a channel, which L2 holds.
template <class Op>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Arguments<Op> a) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (c >= a.at.channels) return;
  double sums[Op::kSums] = {};
  const double* partial = a.partial + c * Op::kSums * a.at.parts;
#pragma unroll 2
  for (int p = lane_of_thread(); p < a.at.parts; p += 32) {
#pragma unroll
    for (int s = 0; s < Op::kSums; ++s) sums[s] += partial[s * a.at.parts + p];
  }
#pragma unroll
  for (int s = 0; s < Op::kSums; ++s) sums[s] = warp_sum(sums[s]);
  if (lane_of_thread() != 0) return;
  typename Op::T k[Op::kCoefficients];
  Op::coefficients(a.of, c, a.centre(c), sums, k);
#pragma unroll
  for (int j = 0; j < Op::kCoefficients; ++j) a.coefficients[j * a.at.channels + c] = k[j];
}

}  // namespace sib_fast::cuda::batch_norm
