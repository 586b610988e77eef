// Layer norm and group norm on the CPU, up to the second derivative: SPEC 10 with the means taken over a row.
//
//   x̂ = (x - mean)·invstd      y = gamma·x̂ + beta      h = gamma·gy
//   grad_x = invstd·(h - A - x̂·B),   A = ⟨h⟩, B = ⟨h·x̂⟩;   grad_gamma = Σ_rows gy·x̂,   grad_beta = Σ_rows gy
//   given u, u_gamma, u_beta, with U = ⟨u⟩, T = ⟨u·x̂⟩, V = ⟨u·h⟩, kappa = V - A·U - B·T, w = invstd·(u - U - x̂·T):
//     to gy     gamma·w + u_gamma·x̂ + u_beta
//     to gamma  Σ_rows gy·w
//     to x      invstd·(o - ⟨o⟩ - x̂·⟨o·x̂⟩) - invstd²·kappa·x̂,   o = -invstd·(h·T + u·B) + u_gamma·gy
//
// Passes    a row is read once for its sums and then, from cache, for every result: 5 traversals of memory for the
// second
//           derivative.
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

// x̂ of a row's elements. The mean in two parts of T: x - high is exact where it cancels.
template <class E>
struct Normalised {
  using T = Compute<E>;
  const E* x;
  T high, low, invstd;
  Normalised(const E* row, double mean, double scale)
      : x(row),
        high(static_cast<T>(mean)),
        low(static_cast<T>(mean - static_cast<double>(high))),
        invstd(static_cast<T>(scale)) {}
  T operator()(int64_t i) const { return ((get(x[i]) - high) - low) * invstd; }
};

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
    const double shift = about.a / count;
    mean[r] = m + shift;
    invstd[r] = 1.0 / __builtin_sqrt(about.b / count - shift * shift + eps);
    const Normalised<E> hat(row, mean[r], invstd[r]);
    for_elements(rows, [=](int64_t i, int64_t c) { put(out + i, hat(i) * g[c] + b[c]); });
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
      const Two sums = sum_two(rows, [=](int64_t i, int64_t c) {
        const double h = static_cast<double>(get(grad[i])) * static_cast<double>(g[c]);
        return Two{h, h * (static_cast<double>(get(row[i])) - m)};
      });
      const T A = static_cast<T>(sums.a / count), B = static_cast<T>(sums.b * s / count), scale = static_cast<T>(s);
      E* out = grad_x + r * rows.length;
      for_elements(rows, [=](int64_t i, int64_t c) { put(out + i, scale * ((get(grad[i]) * g[c] - A) - hat(i) * B)); });
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
    const auto w = [=](int64_t i) { return scale * ((get(v[i]) - U) - hat(i) * Tx); };
    if (to_grad_y) {
      E* out = to_grad_y + r * rows.length;
      if (u_gamma) {
        const T *a = u_gamma + first, *b = u_beta + first;
        for_elements(rows, [=](int64_t i, int64_t c) { put(out + i, g[c] * w(i) + a[c] * hat(i) + b[c]); });
      } else {
        for_elements(rows, [=](int64_t i, int64_t c) { put(out + i, g[c] * w(i)); });
      }
    }
    if (sum_gamma) {
      add_to_channels(rows, sum_gamma + first,
                      [=](int64_t i, int64_t) { return static_cast<double>(get(grad[i]) * w(i)); });
    }
    if (!to_x) continue;
    const Two of_h = sum_two(rows, [=](int64_t i, int64_t c) {
      const double h = static_cast<double>(get(grad[i])) * static_cast<double>(g[c]);
      return Two{h, h * (static_cast<double>(get(row[i])) - m)};
    });
    const double A = of_h.a / count, B = of_h.b * s / count;
    const double kappa = of_u.d / count - A * mean_u - B * dot_u;
    double o_mean = -s * (A * dot_u + mean_u * B), o_dot = -2 * s * B * dot_u;
    E* out = to_x + r * rows.length;
    const T by_u = static_cast<T>(-s * s * B), by_h = static_cast<T>(-s * s * dot_u);
    if (u_gamma) {
      const T* a = u_gamma + first;
      const Two of_a = sum_two(rows, [=](int64_t i, int64_t c) {
        const double p = static_cast<double>(get(grad[i])) * static_cast<double>(a[c]);
        return Two{p, p * (static_cast<double>(get(row[i])) - m)};
      });
      o_mean += of_a.a / count;
      o_dot += of_a.b * s / count;
      const T shift = static_cast<T>(-s * o_mean), by_hat = static_cast<T>(-s * o_dot - s * s * kappa);
      for_elements(rows, [=](int64_t i, int64_t c) {
        put(out + i, by_u * get(v[i]) + (by_h * g[c] + scale * a[c]) * get(grad[i]) + by_hat * hat(i) + shift);
      });
    } else {
      const T shift = static_cast<T>(-s * o_mean), by_hat = static_cast<T>(-s * o_dot - s * s * kappa);
      for_elements(rows, [=](int64_t i, int64_t c) {
        put(out + i, by_u * get(v[i]) + by_h * g[c] * get(grad[i]) + by_hat * hat(i) + shift);
      });
    }
  }
}

template <class E>
constexpr LayerNormKernels<E> kTable = {forward<E>, backward<E>, double_backward<E>};

}  // namespace

#define SIB_FAST_TABLE_OF(E)                                            \
  template <>                                                           \
  const LayerNormKernels<E>& SIB_FAST_TABLE(layer_norm_kernels_)<E>() { \
    return kTable<E>;                                                   \
  }
SIB_FAST_TABLE_OF(double)
SIB_FAST_TABLE_OF(float)
SIB_FAST_TABLE_OF(BFloat16Bits)
SIB_FAST_TABLE_OF(Float16Bits)

}  // namespace sib_fast::cpu
