// layer_norm and group_norm for CUDA tensors: memory, which passes run, registration. The passes along rows and
// their traffic are in row_passes.cuh, sums over rows in layer_norm_columns.cuh, equations in layer_norm_formulas.cuh.
//
// Launches  layer norm: one, and two more for gradients of parameters; rows of more than 768 packs of 16 bytes three
//           in the place of one. Group norm: sums of every channel's pixels, merged to rows, writes; one more for
//           gradients of parameters, which needs no activation. Nothing is read back by the host and nothing is copied
//           to the device: capturable in a CUDA graph.
// Memory    columns: at most 512 sums in double a channel; group norm: those of every channel of every image.
// Twins     cpu/layer_norm_cpu.cpp; truth: ops/layer_norm/reference.py.

#include "common/layer_norm_ops.h"
#include "cuda/layer_norm_columns.cuh"
#include "cuda/on_cuda.cuh"

namespace sib_fast::cuda::layer_norm {
namespace {

constexpr const char* kOp = "layer_norm";

using Shape = LayerNormShape;

// Of an Op whose sums over columns someone wants: the arguments that the rows' pass has already.
template <class Op>
ColumnArguments<Op> columns_of(const rows::Arguments<Op>& a, const Shape& shape) {
  ColumnArguments<Op> c{};
  for (int t = 0; t < Op::kInputs; ++t) c.in[t] = a.in[t];
  c.of = a.of;
  c.at.images = shape.rows / shape.groups;
  c.at.groups = shape.groups;
  c.at.columns = shape.channels / shape.groups;
  c.at.channels = shape.channels;
  c.at.pieces = a.at.pieces;
  c.partial = a.partial;
  c.unit_sums = a.at.unit_sums;
  return c;
}

// Cuts, and runs: along rows if `results`; group norm's runs are summed in any case. Then `columns`, unless null, gets
// what is left to say of the sums over columns.
template <class Op>
void run(const Tensor& x, const Shape& shape, rows::Arguments<Op>& a, int sums_of_run, int sums, bool results,
         typename Op::T* const* columns) {
  const Stream stream = current_stream(x);
  const bool runs = shape.spatial > 1;
  rows::cut(a, shape.rows, shape.length, shape.groups, runs ? shape.spatial : shape.length, runs ? sums_of_run : sums,
            sums);
  Tensor partial = new_double(x, {0});
  if (runs) {
    rows::run_units<Op, true>(kOp, stream, x, a, partial, results);
  } else if (results && rows::held(a.at)) {
    rows::run_held(kOp, stream, a);
  } else if (results) {
    rows::run_units<Op, false>(kOp, stream, x, a, partial, true);
  }
  if constexpr (!std::is_same<Op, Forward<typename Op::Element>>::value) {
    if (columns == nullptr) return;
    ColumnArguments<Op> c = columns_of(a, shape);
    for (int s = 0; s < Op::kColumnSums; ++s) c.out[s] = columns[s];
    if (runs) {
      run_channels(kOp, stream, c);
    } else {
      run_columns(kOp, stream, x, c);
    }
  }
}

// ---- the ops --------------------------------------------------------------------------------------------------------

struct Kernels : OnCuda {
  template <class E>
  static void forward(const Shape& shape, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                      double eps, Tensor& y, Tensor& mean, Tensor& invstd) {
    using T = Compute<E>;
    rows::Arguments<Forward<E>> a{{in<E>(x)}, {out<E>(y)}, {in<T>(weight), in<T>(bias)}};
    a.of = {out<double>(mean), out<double>(invstd), eps, 1.0 / static_cast<double>(shape.length)};
    run(x, shape, a, 2, 2, true, nullptr);
  }

  template <class E>
  static void backward(const Shape& shape, const NormBackward& of) {
    using T = Compute<E>;
    rows::Arguments<Backward<E>> a{{in<E>(of.grad_y), in<E>(of.x)}, {out<E>(of.grad_x)}, {in<T>(of.weight)}};
    a.of = {in<double>(of.mean), in<double>(of.invstd), 1.0 / static_cast<double>(shape.length)};
    T* const columns[2] = {out<T>(of.grad_weight), out<T>(of.grad_bias)};
    const bool any = columns[0] != nullptr || columns[1] != nullptr;
    if (any || a.out[0] != nullptr) run(of.x, shape, a, 2, 2, a.out[0] != nullptr, any ? columns : nullptr);
  }

  template <class E>
  static void double_backward(const Shape& shape, const NormSecond& of) {
    using Op = Second<E>;
    using T = Compute<E>;
    rows::Arguments<Op> a{{in<E>(of.u), in<E>(of.grad_y), in<E>(of.x)},
                          {out<E>(of.to_grad_y), out<E>(of.to_x)},
                          {in<T>(of.weight), in<T>(of.u_weight), in<T>(of.u_bias)}};
    T* const columns[1] = {out<T>(of.to_weight)};
    const bool any = columns[0] != nullptr;
    Tensor means = new_double(of.x, {any ? 2 * shape.rows : 0});
    a.of = {in<double>(of.mean), in<double>(of.invstd), out<double>(means), shape.rows,
            1.0 / static_cast<double>(shape.length)};
    if (any || rows::any_output(a)) {
      run(of.x, shape, a, Op::kPlainSums, of.u_weight ? Op::kSums : Op::kPlainSums, true, any ? columns : nullptr);
    }
  }
};

}  // namespace
}  // namespace sib_fast::cuda::layer_norm

namespace sib_fast::cuda {

SIB_CUDA_LIBRARY(m) { LayerNormOps<layer_norm::Kernels>::implement(m); }

}  // namespace sib_fast::cuda
