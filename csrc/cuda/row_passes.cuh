// Passes along the rows of an activation [rows, length]: sums over each row, then what every element makes of them.
// `Op` says which sums and what is written: layer_norm_formulas.cuh, softmax_cuda.cu.
//
//   held_rows_kernel   rows of at most 768 packs of 16 bytes: read once, kept in registers. Up to 32 lanes a row, or
//                      up to 8 warps and then a block a row
//   unit_sums_kernel   longer rows, and rows that consist of runs (a channel's pixels) whose sums are wanted apart: up
//                      to 32 lanes sum a unit, which is a run, or a piece of a run or of a row
//   merge_kernel       the units of a row, [units, sums] -> coefficients [rows]: a block a row
//   unit_writes_kernel the same units once more, in the opposite order, so that it meets first what L2 still holds
//
// Traffic   held: reads every input once, writes every output. Units: reads every input twice.
// Order     a lane's packs in memory order; lanes by butterfly, warps in order; units in fixed order. The cut depends
//           on the shape, the type and where x starts: equal inputs give equal bits.
// Offsets   int64 throughout.
//
// An Op has: Element; kInputs (x last), kOutputs, kSums, kParameters numbers of a column (a channel where rows consist
// of runs), of which add needs the first kSumParameters; kCoefficients; Rows, what there is of each row; and
//   centre        what a row's x is taken relative to, in two parts of T
//   add           the sums of M elements, joined to the row's in double; `used` of them are wanted
//   join          the sums of a run, joined to its row's
//   coefficients  from a row's sums to the numbers that write needs; `owner` writes what there is one number a row of
//   write         the outputs of one element
#pragma once

#include "common/norm.h"
#include "cuda/block.cuh"
#include "cuda/on_cuda.cuh"
#include "cuda/pack.cuh"

namespace sib_fast::cuda::rows {

using packs::blank, packs::load, packs::store;

constexpr int kThreads = 128, kMostThreads = 256;

// A line is a row, or a run of one. Lanes of a row or a unit lie side by side in it.
struct Geometry {
  int64_t rows, length, groups;
  int64_t line, lines_of_row;          // elements of a line; lines of a row
  int64_t packs;                       // the most that a line touches
  int64_t units, pieces, piece_packs;  // pieces of a line; a unit is a piece
  int lanes;
  int unit_sums, row_sums;  // sums that a unit has, and a row
  int misaligned;           // elements between x's start and the pack boundary before it
  unsigned packed;          // bit t: tensor t (inputs, outputs, parameters) may be moved in packs
};

template <class Op>
struct Arguments {
  using E = typename Op::Element;
  using T = typename Op::T;
  const E* in[Op::kInputs];  // null: zeros
  E* out[Op::kOutputs];      // null: not asked for
  const T* parameters[Op::kParameters + 1];
  typename Op::Rows of{};
  Geometry at{};
  double* partial = nullptr;  // [units, unit_sums]
  T* coefficients = nullptr;  // [kCoefficients, rows]
};

// Three inputs in packs of eight: more registers a thread, fewer threads.
template <class Op>
constexpr bool kIsWide = Op::kInputs == 3 && sizeof(typename Op::Element) == 2;

// ---- packs of a line ------------------------------------------------------------------------------------------------

// A pack of 16 bytes, cut on x's 16-byte boundaries: where it begins, in all and in its line, and which places of it
// are the line's, none where hi <= lo. Other places are the neighbouring lines'.
struct Place {
  int64_t first, inside;
  int lo, hi;
  bool whole;  // inside the tensor: otherwise no pack is moved, for memory checkers' sake alone
};
template <int V>
__device__ __forceinline__ Place place_of(const Geometry& at, int64_t start, int64_t j) {
  Place place;
  place.inside = j * V - ((start + at.misaligned) & (V - 1));
  place.first = start + place.inside;
  place.lo = place.inside < 0 ? static_cast<int>(-place.inside) : 0;
  place.hi = static_cast<int>(min(at.line - place.inside, static_cast<int64_t>(V)));
  place.whole = place.first >= 0 && place.first + V <= at.rows * at.length;
  return place;
}

template <class Op, int V>
__device__ __forceinline__ void load_inputs(const Arguments<Op>& a, const Place& place,
                                            Pack<typename Op::Element, V> (&raw)[Op::kInputs]) {
#pragma unroll
  for (int t = 0; t < Op::kInputs; ++t) {
    if (a.in[t] == nullptr) {
#pragma unroll
      for (int i = 0; i < V; ++i) raw[t].value[i] = static_cast<typename Op::Element>(0.0f);
    } else {
      raw[t] = load<typename Op::Element, V>(a.in[t], place.first, place.lo, place.hi,
                                             place.whole && (a.at.packed >> t & 1));
    }
  }
}

// The first K parameters at a pack's places. from: of the row's first column, or of the run.
template <int K, bool kRuns, class Op, int V>
__device__ __forceinline__ void load_parameters(const Arguments<Op>& a, int64_t from, const Place& place,
                                                typename Op::T (&p)[Op::kParameters + 1][V]) {
  using T = typename Op::T;
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int t = 0; t < K; ++t) {
    const T* of = a.parameters[t];
    if (of == nullptr || kRuns) {
      const T value = of == nullptr ? static_cast<T>(Op::absent(t)) : of[from];
#pragma unroll
      for (int i = 0; i < V; ++i) p[t][i] = value;
      continue;
    }
    of += from + place.inside;
    if (a.at.packed >> (Op::kInputs + Op::kOutputs + t) & 1) {
#pragma unroll
      for (int part = 0; part < V / kPart; ++part) {
        const Pack<T, kPart> pack = load<T, kPart>(of, part * kPart, 0, kPart, true);
#pragma unroll
        for (int i = 0; i < kPart; ++i) p[t][part * kPart + i] = pack.value[i];
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) p[t][i] = of[i < place.lo ? place.lo : i < place.hi ? i : place.hi - 1];
  }
}

template <class Op, int V>
__device__ __forceinline__ void add_pack(const Pack<typename Op::Element, V> (&raw)[Op::kInputs], const Place& place,
                                         const typename Op::T (&p)[Op::kParameters + 1][V], int used,
                                         const Centre<typename Op::T>& centre, double (&sums)[Op::kSums]) {
  typename Op::T v[Op::kInputs][V];
#pragma unroll
  for (int t = 0; t < Op::kInputs; ++t) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[t][i] = static_cast<typename Op::T>(raw[t].value[i]);
  }
  blank(v, place.lo, place.hi);
  Op::add(v, p, place.hi - place.lo, used, centre, sums);
}

template <class Op, int V>
__device__ __forceinline__ void write_pack(const Arguments<Op>& a,
                                           const Pack<typename Op::Element, V> (&raw)[Op::kInputs], const Place& place,
                                           const typename Op::T (&p)[Op::kParameters + 1][V],
                                           const typename Op::T (&k)[Op::kCoefficients]) {
  using E = typename Op::Element;
  using T = typename Op::T;
  Pack<E, V> to[Op::kOutputs];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    T v[Op::kInputs], of[Op::kParameters + 1], w[Op::kOutputs];
#pragma unroll
    for (int t = 0; t < Op::kInputs; ++t) v[t] = static_cast<T>(raw[t].value[i]);
#pragma unroll
    for (int t = 0; t < Op::kParameters; ++t) of[t] = p[t][i];
    Op::write(v, of, k, w);
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) to[o].value[i] = static_cast<E>(w[o]);
  }
#pragma unroll
  for (int o = 0; o < Op::kOutputs; ++o) {
    if (a.out[o] == nullptr) continue;
    store(a.out[o], place.first, place.lo, place.hi, a.at.packed >> (Op::kInputs + o) & 1, to[o]);
  }
}

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// The sums over the 2^n <= 32 lanes of a row or unit, or over the block where lanes > 32, in every thread. shared
// [K·warps].
template <int K>
__device__ __forceinline__ void sum_over_lanes(double (&sums)[K], int used, int lanes, double* shared) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    if (bit >= lanes) continue;
#pragma unroll
    for (int s = 0; s < K; ++s) {
      if (s < used) sums[s] += __shfl_xor_sync(kWholeWarp, sums[s], bit);
    }
  }
  if (lanes <= 32) return;
  const int warps = lanes / 32;
  if (lane_of_thread() == 0) {
#pragma unroll
    for (int s = 0; s < K; ++s) shared[s * warps + warp_of_thread()] = sums[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < K; ++s) {
    if (s >= used) continue;
    sums[s] = 0.0;
    for (int w = 0; w < warps; ++w) sums[s] += shared[s * warps + w];
  }
}

template <class Op>
SIB_HOST_DEVICE bool any_output(const Arguments<Op>& a) {
  bool any = false;
#pragma unroll
  for (int o = 0; o < Op::kOutputs; ++o) any = any || a.out[o] != nullptr;
  return any;
}

template <class Op>
__device__ __forceinline__ int64_t first_parameter(const Arguments<Op>& a, int64_t row) {
  return Op::kParameters == 0 || a.at.groups == 1 ? 0 : row % a.at.groups * a.at.length;
}

// ---- rows in registers ----------------------------------------------------------------------------------------------

template <int P>
constexpr int kHeldThreads = P == 2 ? kThreads : kMostThreads;
template <class Op, int P>
constexpr int kHeldBlocks = P == 2 ? 4 : 2 - kIsWide<Op>;

// Launch: blocks of kThreads, several rows each, or blocks of `lanes` threads, a row each. P packs a lane.
template <class Op, int P>
__global__ void __launch_bounds__(kHeldThreads<P>, kHeldBlocks<Op, P>)
    held_rows_kernel(const __grid_constant__ Arguments<Op> a) {
  using E = typename Op::Element;
  using T = typename Op::T;
  constexpr int V = 16 / sizeof(E);
  const int lanes = a.at.lanes, x = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const bool valid = row < a.at.rows;  // all threads take part in the sums
  const int64_t start = row * a.at.length, from = first_parameter(a, row);
  const auto place = [&](int p) {
    Place at = place_of<V>(a.at, start, x + p * lanes);
    if (!valid) at.hi = at.lo;
    return at;
  };

  Pack<E, V> raw[P][Op::kInputs];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const Place at = place(p);
    if (at.hi > at.lo) load_inputs<Op, V>(a, at, raw[p]);
  }
  Centre<T> centre{};
  if (valid) centre = Op::centre(a.of, row, a.in[Op::kInputs - 1] + start);
  double sums[Op::kSums] = {};
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const Place at = place(p);
    if (at.hi <= at.lo) continue;
    T parameters[Op::kParameters + 1][V];
    load_parameters<Op::kSumParameters, false, Op, V>(a, from, at, parameters);
    add_pack<Op, V>(raw[p], at, parameters, a.at.row_sums, centre, sums);
  }
  sum_over_lanes(sums, a.at.row_sums, lanes, dynamic_shared<double>());
  if (!valid) return;
  T k[Op::kCoefficients];
  Op::coefficients(a.of, row, centre, sums, x == 0, k);
  if (!any_output(a)) return;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const Place at = place(p);
    if (at.hi <= at.lo) continue;
    T parameters[Op::kParameters + 1][V];
    load_parameters<Op::kParameters, false, Op, V>(a, from, at, parameters);
    write_pack<Op, V>(a, raw[p], at, parameters, k);
  }
}

// ---- units ----------------------------------------------------------------------------------------------------------

// The packs that a lane takes of a unit.
template <class Op, bool kRuns>
struct Unit {
  int64_t unit, row, start, from;  // from: as of load_parameters
  int64_t j, j_end;
  bool valid;

  __device__ __forceinline__ Unit(const Arguments<Op>& a, int64_t block) {
    const Geometry& at = a.at;
    unit = block * (kThreads / at.lanes) + threadIdx.x / at.lanes;
    valid = unit < at.units;
    const int64_t line = unit / at.pieces, first = unit % at.pieces * at.piece_packs;
    row = kRuns ? line / at.lines_of_row : line;
    from = kRuns ? line % (at.lines_of_row * at.groups) : first_parameter(a, row);
    start = line * at.line;
    j = first + threadIdx.x % at.lanes;
    j_end = valid ? min(first + at.piece_packs, at.packs) : 0;
  }
};

constexpr int kUnroll = 2;  // packs of an input under way at once

// Calls visit(raw, place) for every pack of the unit, the loads of kUnroll of them before the first is waited for.
template <class Op, bool kRuns, class Visit>
__device__ __forceinline__ void for_packs(const Arguments<Op>& a, Unit<Op, kRuns>& at, Visit visit) {
  constexpr int V = 16 / sizeof(typename Op::Element);
  for (; at.j < at.j_end; at.j += kUnroll * a.at.lanes) {
    Pack<typename Op::Element, V> raw[kUnroll][Op::kInputs];
    Place place[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = at.j + u * a.at.lanes;
      place[u] = place_of<V>(a.at, at.start, j);
      if (j >= at.j_end) place[u].hi = place[u].lo;
      if (place[u].hi > place[u].lo) load_inputs<Op, V>(a, place[u], raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (place[u].hi > place[u].lo) visit(raw[u], place[u]);
    }
  }
}

// Launch: 128 threads, several units a block. A run's sums are those of its elements as they are; its parameters come
// in where runs are joined.
template <class Op, bool kRuns>
__global__ void __launch_bounds__(kThreads, kIsWide<Op> ? 3 : 4)
    unit_sums_kernel(const __grid_constant__ Arguments<Op> a) {
  using T = typename Op::T;
  constexpr int V = 16 / sizeof(typename Op::Element);
  Unit<Op, kRuns> at(a, blockIdx.x);
  Centre<T> centre{};
  if (at.valid) centre = Op::centre(a.of, at.row, a.in[Op::kInputs - 1] + at.row * a.at.length);
  double sums[Op::kSums] = {};
  for_packs(a, at, [&](const Pack<typename Op::Element, V>(&raw)[Op::kInputs], const Place& place) {
    T p[Op::kParameters + 1][V];
    if constexpr (kRuns) {
#pragma unroll
      for (int t = 0; t < Op::kSumParameters; ++t) {
#pragma unroll
        for (int i = 0; i < V; ++i) p[t][i] = static_cast<T>(Op::absent(t));
      }
    } else {
      load_parameters<Op::kSumParameters, false, Op, V>(a, at.from, place, p);
    }
    add_pack<Op, V>(raw, place, p, a.at.unit_sums, centre, sums);
  });
  sum_over_lanes(sums, a.at.unit_sums, a.at.lanes, nullptr);
  if (!at.valid || threadIdx.x % a.at.lanes != 0) return;
#pragma unroll
  for (int s = 0; s < Op::kSums; ++s) {
    if (s < a.at.unit_sums) a.partial[at.unit * a.at.unit_sums + s] = sums[s];
  }
}

// Launch: whole warps, a block a row.
template <class Op, bool kRuns>
__global__ void __launch_bounds__(kMostThreads) merge_kernel(const __grid_constant__ Arguments<Op> a) {
  using T = typename Op::T;
  const int64_t row = blockIdx.x, units = a.at.lines_of_row * a.at.pieces;
  double sums[Op::kSums] = {};
  for (int64_t q = threadIdx.x; q < units; q += blockDim.x) {
    const double* of_unit = a.partial + (row * units + q) * a.at.unit_sums;
    if constexpr (kRuns) {
      double p[Op::kParameters + 1];
#pragma unroll
      for (int t = 0; t < Op::kSumParameters; ++t) {
        const T* of = a.parameters[t];
        p[t] = of == nullptr ? Op::absent(t) : of[row % a.at.groups * a.at.lines_of_row + q / a.at.pieces];
      }
      Op::join(of_unit, p, a.at.row_sums, sums);
    } else {
#pragma unroll
      for (int s = 0; s < Op::kSums; ++s) {
        if (s < a.at.row_sums) sums[s] += of_unit[s];
      }
    }
  }
  sum_over_lanes(sums, a.at.row_sums, static_cast<int>(blockDim.x), dynamic_shared<double>());
  if (threadIdx.x != 0) return;
  T k[Op::kCoefficients];
  Op::coefficients(a.of, row, Op::centre(a.of, row, a.in[Op::kInputs - 1] + row * a.at.length), sums, true, k);
#pragma unroll
  for (int c = 0; c < Op::kCoefficients; ++c) a.coefficients[c * a.at.rows + row] = k[c];
}

// Launch: as of unit_sums_kernel.
template <class Op, bool kRuns>
__global__ void __launch_bounds__(kThreads, 4) unit_writes_kernel(const __grid_constant__ Arguments<Op> a) {
  using T = typename Op::T;
  constexpr int V = 16 / sizeof(typename Op::Element);
  Unit<Op, kRuns> at(a, gridDim.x - 1 - blockIdx.x);
  if (!at.valid) return;
  T k[Op::kCoefficients];
#pragma unroll
  for (int c = 0; c < Op::kCoefficients; ++c) k[c] = a.coefficients[c * a.at.rows + at.row];
  for_packs(a, at, [&](const Pack<typename Op::Element, V>(&raw)[Op::kInputs], const Place& place) {
    T p[Op::kParameters + 1][V];
    load_parameters<Op::kParameters, kRuns, Op, V>(a, at.from, place, p);
    write_pack<Op, V>(a, raw, place, p, k);
  });
}

// ---- cuts and launches ----------------------------------------------------------------------------------------------

// Constants, so that every cut, and with it every bit, depends on the shape, the type and where x starts alone. What
// the best are, no device has said yet. A lane has at least kUnroll packs of a unit, and at most 8.
constexpr int64_t kShortPacks = 64, kHeldPacks = 768, kPiecePacks = 256;

inline int lanes_for(int64_t packs, int64_t each) {
  int lanes = 1;
  while (lanes < 32 && lanes * each < packs) lanes *= 2;
  return lanes;
}

// Rows of `length` elements that consist of runs of `line` elements; line = length where they do not.
template <class Op>
void cut(Arguments<Op>& a, int64_t rows, int64_t length, int64_t groups, int64_t line, int unit_sums, int row_sums) {
  using E = typename Op::Element;
  constexpr int64_t V = 16 / sizeof(E);
  Geometry& at = a.at;
  at.rows = rows;
  at.length = length;
  at.groups = groups;
  at.line = line;
  at.lines_of_row = length / line;
  at.unit_sums = unit_sums;
  at.row_sums = row_sums;
  at.misaligned = static_cast<int>(packs::misalignment(a.in[Op::kInputs - 1], V));
  const bool on_boundaries = at.misaligned == 0 && line % V == 0;
  at.packs = on_boundaries ? line / V : (line + 2 * V - 2) / V;
  at.pieces = divide_up(at.packs, kPiecePacks);
  at.piece_packs = divide_up(at.packs, at.pieces);
  at.units = rows * at.lines_of_row * at.pieces;
  at.packed = 0;
  for (int t = 0; t < Op::kInputs; ++t) at.packed |= (packs::misalignment(a.in[t], V) == at.misaligned) << t;
  for (int t = 0; t < Op::kOutputs; ++t) {
    at.packed |= (packs::misalignment(a.out[t], V) == at.misaligned) << (Op::kInputs + t);
  }
  for (int t = 0; t < Op::kParameters && on_boundaries; ++t) {
    const bool aligned = reinterpret_cast<uintptr_t>(a.parameters[t]) % 16 == 0;
    at.packed |= aligned << (Op::kInputs + Op::kOutputs + t);
  }
}

// Rows that are no runs and fit into registers: read once, one launch.
inline bool held(const Geometry& at) { return at.line == at.length && at.packs <= kHeldPacks; }

template <class Op>
void run_held(const char* op, Stream stream, Arguments<Op>& a) {
  const bool is_short = a.at.packs <= kShortPacks;
  a.at.lanes = is_short ? lanes_for(a.at.packs, 2) : static_cast<int>(32 * divide_up(a.at.packs, 3 * 32));
  const dim3 block(a.at.lanes > 32 ? a.at.lanes : kThreads);
  const dim3 grid(static_cast<unsigned>(divide_up(a.at.rows, block.x / a.at.lanes)));
  const int64_t shared = Op::kSums * (kMostThreads / 32) * static_cast<int64_t>(sizeof(double));
  launch(op, is_short ? held_rows_kernel<Op, 2> : held_rows_kernel<Op, 3>, grid, block, shared, stream, a);
}

// Sums of the units, [units, unit_sums]; the caller keeps them. Then, if `results`, the rows' and what is written.
template <class Op, bool kRuns>
void run_units(const char* op, Stream stream, const Tensor& x, Arguments<Op>& a, Tensor& partial, bool results) {
  a.at.lanes = lanes_for(a.at.piece_packs, kUnroll);
  partial = new_double(x, {a.at.units * a.at.unit_sums});
  a.partial = out<double>(partial);
  const dim3 grid(static_cast<unsigned>(divide_up(a.at.units, kThreads / a.at.lanes))), block(kThreads);
  launch(op, unit_sums_kernel<Op, kRuns>, grid, block, 0, stream, a);
  if (!results) return;
  Tensor coefficients = new_accumulated(x, Op::kCoefficients * a.at.rows);
  a.coefficients = out<typename Op::T>(coefficients);
  const int64_t units = a.at.lines_of_row * a.at.pieces;
  const dim3 threads(units <= 64 ? 32 : units <= 512 ? kThreads : kMostThreads);
  const int64_t shared = Op::kSums * (kMostThreads / 32) * static_cast<int64_t>(sizeof(double));
  launch(op, merge_kernel<Op, kRuns>, dim3(static_cast<unsigned>(a.at.rows)), threads, shared, stream, a);
  if (any_output(a)) launch(op, unit_writes_kernel<Op, kRuns>, grid, block, 0, stream, a);
}

}  // namespace sib_fast::cuda::rows
