// Layer norm and group norm on the CPU, up to the second derivative: the passes over rows.
//
// Formulas  common/layer_norm.h.
// Passes    a row is read once for its sums and then, from cache, for every result: 5 traversals of memory for the
//           second derivative.
// Precision halves are widened to float where they are read and rounded once where they are written; sums in double. x
//           loses its mean in two parts, so that a mean 1e6 times the deviation costs no more digits than x has lost.
// Order     a part is done by one thread in memory order: equal inputs give equal bits at any thread count.
// Twins     ops/layer_norm/reference.py is the truth.

#include "cpu/layer_norm_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// Calls visit(i, c) for every element i of a row and the channel c that it is in.
template <class Visit>
inline void for_elements(const NormRows& rows, Visit visit) {
  if (rows.spatial == 1) {
    const int64_t length = rows.length;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) visit(i, i);
    return;
  }
  for (int64_t c = 0; c < rows.channels(); ++c) {
    const int64_t from = c * rows.spatial, to = from + rows.spatial;
#pragma omp simd
    for (int64_t i = from; i < to; ++i) visit(i, c);
  }
}

struct Two {
  double a, b;
};
struct Three {
  double a, b, d;
};

// Sums of terms(i, c) over a row.
template <class Terms>
inline Two sum_two(const NormRows& rows, Terms terms) {
  double a = 0, b = 0;
  if (rows.spatial == 1) {
    const int64_t length = rows.length;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = 0; i < length; ++i) {
      const Two t = terms(i, i);
      a += t.a;
      b += t.b;
    }
    return {a, b};
  }
  for (int64_t c = 0; c < rows.channels(); ++c) {
    const int64_t from = c * rows.spatial, to = from + rows.spatial;
    double run_a = 0, run_b = 0;
#pragma omp simd reduction(+ : run_a, run_b)
    for (int64_t i = from; i < to; ++i) {
      const Two t = terms(i, c);
      run_a += t.a;
      run_b += t.b;
    }
    a += run_a;
    b += run_b;
  }
  return {a, b};
}
template <class Terms>
inline Three sum_three(const NormRows& rows, Terms terms) {
  double a = 0, b = 0, d = 0;
  if (rows.spatial == 1) {
    const int64_t length = rows.length;
#pragma omp simd reduction(+ : a, b, d)
    for (int64_t i = 0; i < length; ++i) {
      const Three t = terms(i, i);
      a += t.a;
      b += t.b;
      d += t.d;
    }
    return {a, b, d};
  }
  for (int64_t c = 0; c < rows.channels(); ++c) {
    const int64_t from = c * rows.spatial, to = from + rows.spatial;
    double run_a = 0, run_b = 0, run_d = 0;
#pragma omp simd reduction(+ : run_a, run_b, run_d)
    for (int64_t i = from; i < to; ++i) {
      const Three t = terms(i, c);
      run_a += t.a;
      run_b += t.b;
      run_d += t.d;
    }
    a += run_a;
    b += run_b;
    d += run_d;
  }
  return {a, b, d};
}

// sums[c] += Σ of term(i, c) over the elements of channel c.
template <class Term>
inline void add_to_channels(const NormRows& rows, double* sums, Term term) {
  if (rows.spatial == 1) {
    const int64_t length = rows.length;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) sums[i] += term(i, i);
    return;
  }
  for (int64_t c = 0; c < rows.channels(); ++c) {
    const int64_t from = c * rows.spatial, to = from + rows.spatial;
    double run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t i = from; i < to; ++i) run += term(i, c);
    sums[c] += run;
  }
}

// x̂ of a row's elements.
template <class E>
struct Normalised {
  using T = Compute<E>;
  const E* x;
  Centre<T> centre;
  T invstd;
  Normalised(const E* row, double mean, double scale)
      : x(row), centre(in_two_parts<T>(mean)), invstd(static_cast<T>(scale)) {}
  T operator()(int64_t i) const { return relative_to(centre, get(x[i])) * invstd; }
};

// Σ h and Σ h·(x - mean) over a row, h = gy·gamma; or of another parameter than gamma.
template <class E>
inline Two sums_of_h(const NormRows& rows, const E* gy, const E* x, const Compute<E>* gamma, double mean) {
  return sum_two(rows, [=](int64_t i, int64_t c) {
    const double h = static_cast<double>(get(gy[i])) * static_cast<double>(gamma[c]);
    return Two{h, h * (static_cast<double>(get(x[i])) - mean)};
  });
}

template <class E>
void forward(const NormRows& rows, const E* x, const Compute<E>* gamma, const Compute<E>* beta, double eps, E* y,
             double* mean, double* invstd) {
  const double count = static_cast<double>(rows.length);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const E* row = x + r * rows.length;
    E* out = y + r * rows.length;
    const int64_t first = r % rows.groups * rows.channels();
    const Compute<E>*g = gamma + first, *b = beta + first;
    const double m =
        sum_two(rows, [=](int64_t i, int64_t) { return Two{static_cast<double>(get(row[i])), 0}; }).a / count;
    // A second pass, in cache, and not mean²: the deviations' own sum takes back what rounding left in the mean.
    const Two about = sum_two(rows, [=](int64_t i, int64_t) {
      const double d = static_cast<double>(get(row[i])) - m;
      return Two{d, d * d};
    });
    const NormStatistics of = norm_statistics(m, about.a / count, about.b / count, eps);
    mean[r] = of.mean;
    invstd[r] = of.invstd;
    const Normalised<E> hat(row, mean[r], invstd[r]);
    for_elements(rows, [=](int64_t i, int64_t c) { put(out + i, layer_norm_y(hat(i), g[c], b[c])); });
  }
}

template <class E>
void backward(const NormRows& rows, const E* gy, const E* x, const Compute<E>* gamma, const double* mean,
              const double* invstd, E* grad_x, double* sum_gamma, double* sum_beta) {
  using T = Compute<E>;
  const double count = static_cast<double>(rows.length);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const E *row = x + r * rows.length, *grad = gy + r * rows.length;
    const int64_t first = r % rows.groups * rows.channels();
    const T* g = gamma + first;
    const double m = mean[r], s = invstd[r];
    const Normalised<E> hat(row, m, s);
    if (grad_x) {
      const Two sums = sums_of_h(rows, grad, row, g, m);
      const T A = static_cast<T>(sums.a / count), B = static_cast<T>(sums.b * s / count), scale = static_cast<T>(s);
      E* out = grad_x + r * rows.length;
      for_elements(rows, [=](int64_t i, int64_t c) {
        put(out + i, layer_norm_grad_x(get(grad[i]), hat(i), g[c], scale, A, B));
      });
    }
    if (sum_gamma) {
      add_to_channels(rows, sum_gamma + first,
                      [=](int64_t i, int64_t) { return static_cast<double>(get(grad[i]) * hat(i)); });
    }
    if (sum_beta) {
      add_to_channels(rows, sum_beta + first, [=](int64_t i, int64_t) { return static_cast<double>(get(grad[i])); });
    }
  }
}

template <class E>
void double_backward(const NormRows& rows, const E* u, const Compute<E>* u_gamma, const Compute<E>* u_beta, const E* gy,
                     const E* x, const Compute<E>* gamma, const double* mean, const double* invstd, E* to_grad_y,
                     E* to_x, double* sum_gamma) {
  using T = Compute<E>;
  const double count = static_cast<double>(rows.length);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const E *row = x + r * rows.length, *grad = gy + r * rows.length, *v = u + r * rows.length;
    const int64_t first = r % rows.groups * rows.channels();
    const T* g = gamma + first;
    const double m = mean[r], s = invstd[r];
    const Normalised<E> hat(row, m, s);
    const Three of_u = sum_three(rows, [=](int64_t i, int64_t c) {
      const double d = static_cast<double>(get(v[i]));
      const double h = static_cast<double>(get(grad[i])) * static_cast<double>(g[c]);
      return Three{d, d * (static_cast<double>(get(row[i])) - m), d * h};
    });
    const double mean_u = of_u.a / count, dot_u = of_u.b * s / count;
    const T U = static_cast<T>(mean_u), Tx = static_cast<T>(dot_u), scale = static_cast<T>(s);
    const auto w = [=](int64_t i) { return layer_norm_w(get(v[i]), hat(i), scale, U, Tx); };
    if (to_grad_y) {
      E* out = to_grad_y + r * rows.length;
      if (u_gamma) {
        const T *a = u_gamma + first, *b = u_beta + first;
        for_elements(rows,
                     [=](int64_t i, int64_t c) { put(out + i, layer_norm_to_grad_y(w(i), hat(i), g[c], a[c], b[c])); });
      } else {
        for_elements(rows, [=](int64_t i, int64_t c) { put(out + i, g[c] * w(i)); });
      }
    }
    if (sum_gamma) {
      add_to_channels(rows, sum_gamma + first,
                      [=](int64_t i, int64_t) { return static_cast<double>(get(grad[i]) * w(i)); });
    }
    if (!to_x) continue;
    const Two of_h = sums_of_h(rows, grad, row, g, m);
    const T* a = u_gamma ? u_gamma + first : nullptr;
    const Two of_q = a ? sums_of_h(rows, grad, row, a, m) : Two{0, 0};
    const auto to = layer_norm_to_x<T>(s, mean_u, dot_u, of_u.d / count, of_h.a / count, of_h.b * s / count, a,
                                       of_q.a / count, of_q.b * s / count);
    E* out = to_x + r * rows.length;
    if (a) {
      for_elements(rows, [=](int64_t i, int64_t c) {
        put(out + i, to(get(v[i]), get(grad[i]), to.of_gy(g[c], scale, a[c]), hat(i)));
      });
    } else {
      for_elements(rows,
                   [=](int64_t i, int64_t c) { put(out + i, to(get(v[i]), get(grad[i]), to.by_h * g[c], hat(i))); });
    }
  }
}

template <class E>
constexpr LayerNormKernels<E> kTable = {forward<E>, backward<E>, double_backward<E>};

}  // namespace

SIB_FAST_DEFINE_TABLES(LayerNormKernels, layer_norm_kernels)

}  // namespace sib_fast::cpu
