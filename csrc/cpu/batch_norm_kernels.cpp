// Batch norm in training mode on the CPU, up to its second derivative (SPEC 10): the passes over activations.
//
//   x̂ = (x - mean)·invstd      y = gamma·x̂ + beta      grad_x = gamma·invstd·(gy - A - x̂·B),  A = ⟨gy⟩, B = ⟨gy·x̂⟩
//   given u, u_gamma, u_beta:   to gy and to x are affine in (u, gy, x - mean); the coefficients are
//   batch_norm_cpu.cpp's
//
// Passes    one that sums, one that writes: 8 traversals of an activation for the second derivative.
// Layouts   channels first: a channel is `images` runs of `spatial`; channels last: a row holds every channel.
// Precision halves are widened to float where they are read and rounded once where they are written; sums in double.
// Order     a part is done by one thread in memory order: equal inputs give equal bits at any thread count.
// Twins     ops/batch_norm/reference.py is the truth.

#include "cpu/batch_norm_kernels.h"

#include "cpu/simd.h"

namespace sib_fast::cpu {
namespace {

// Calls visit(i, c) for every element i of the part, c its channel counted from the part's first.
template <class Visit>
inline void for_elements(const BatchNormPart& part, Visit visit) {
  if (part.channels_last) {
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t at = row * part.channels;
#pragma omp simd
      for (int64_t c = 0; c < part.channels; ++c) visit(at + c, c);
    }
  } else {
    for (int64_t n = 0; n < part.images; ++n) {
      const int64_t at = (n * part.channels + part.begin) * part.spatial;
#pragma omp simd
      for (int64_t i = 0; i < part.spatial; ++i) visit(at + i, 0);
    }
  }
}

// Adds term(i, c)[k] into sums[k·stride + c]. Channels first, a run has sums of its own before it joins the channel's.
template <int count, class Terms>
inline void add_terms(const BatchNormPart& part, double* sums, Terms terms) {
  static_assert(count == 2 || count == 5, "the kernels' sums");
  const int64_t stride = part.channels_last ? part.channels : 1;
  for (int64_t k = 0; k < count * stride; ++k) sums[k] = 0;
  if (part.channels_last) {
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t at = row * part.channels;
#pragma omp simd
      for (int64_t c = 0; c < part.channels; ++c) {
        double t[5];
        terms(at + c, c, t);
        for (int k = 0; k < count; ++k) sums[k * stride + c] += t[k];
      }
    }
    return;
  }
  for (int64_t n = 0; n < part.images; ++n) {
    const int64_t at = (n * part.channels + part.begin) * part.spatial;
    double a = 0, b = 0, d = 0, e = 0, f = 0;
    if constexpr (count == 2) {
#pragma omp simd reduction(+ : a, b)
      for (int64_t i = 0; i < part.spatial; ++i) {
        double t[5];
        terms(at + i, 0, t);
        a += t[0];
        b += t[1];
      }
    } else {
#pragma omp simd reduction(+ : a, b, d, e, f)
      for (int64_t i = 0; i < part.spatial; ++i) {
        double t[5];
        terms(at + i, 0, t);
        a += t[0];
        b += t[1];
        d += t[2];
        e += t[3];
        f += t[4];
      }
    }
    const double run[5] = {a, b, d, e, f};
    for (int k = 0; k < count; ++k) sums[k] += run[k];
  }
}

template <class E>
void sums_x(const BatchNormPart& part, const E* x, const double* pivot, double* sums) {
  add_terms<2>(part, sums, [=](int64_t i, int64_t c, double* t) {
    const double d = static_cast<double>(get(x[i])) - pivot[c];
    t[0] = d;
    t[1] = d * d;
  });
}

template <class E>
void sums_gy(const BatchNormPart& part, const E* gy, const E* x, const double* mean, double* sums) {
  add_terms<2>(part, sums, [=](int64_t i, int64_t c, double* t) {
    const double g = static_cast<double>(get(gy[i]));
    t[0] = g;
    t[1] = g * (static_cast<double>(get(x[i])) - mean[c]);
  });
}

template <class E>
void sums_u(const BatchNormPart& part, const E* u, const E* gy, const E* x, const double* mean, double* sums) {
  add_terms<5>(part, sums, [=](int64_t i, int64_t c, double* t) {
    const double v = static_cast<double>(get(u[i])), g = static_cast<double>(get(gy[i]));
    const double d = static_cast<double>(get(x[i])) - mean[c];
    t[0] = v;
    t[1] = v * d;
    t[2] = v * g;
    t[3] = g;
    t[4] = g * d;
  });
}

template <class T>
struct Coefficients {
  const T* k;
  int64_t stride;
  T operator()(int which, int64_t c) const { return k[which * stride + c]; }
};
template <class T>
inline Coefficients<T> coefficients(const BatchNormPart& part, const T* k) {
  return {k, part.channels_last ? part.channels : 1};
}

template <class E>
void write_y(const BatchNormPart& part, const E* x, const Compute<E>* k, E* y) {
  const auto of = coefficients(part, k);
  for_elements(part, [=](int64_t i, int64_t c) { put(y + i, (get(x[i]) - of(0, c)) * of(1, c) + of(2, c)); });
}

template <class E>
void write_grad_x(const BatchNormPart& part, const E* gy, const E* x, const Compute<E>* k, E* grad_x) {
  const auto of = coefficients(part, k);
  for_elements(part, [=](int64_t i, int64_t c) {
    put(grad_x + i, of(1, c) * ((get(gy[i]) - of(2, c)) - (get(x[i]) - of(0, c)) * of(3, c)));
  });
}

template <class E>
void write_second(const BatchNormPart& part, const E* u, const E* gy, const E* x, const Compute<E>* k, E* to_grad_y,
                  E* to_x) {
  const auto of = coefficients(part, k);
  const auto y_at = [=](int64_t i, int64_t c) {
    return of(1, c) * get(u[i]) + of(2, c) * (get(x[i]) - of(0, c)) + of(3, c);
  };
  const auto x_at = [=](int64_t i, int64_t c) {
    return of(4, c) * get(u[i]) + of(5, c) * get(gy[i]) + of(6, c) * (get(x[i]) - of(0, c)) + of(7, c);
  };
  if (to_grad_y && to_x) {
    for_elements(part, [=](int64_t i, int64_t c) {
      put(to_grad_y + i, y_at(i, c));
      put(to_x + i, x_at(i, c));
    });
  } else if (to_grad_y) {
    for_elements(part, [=](int64_t i, int64_t c) { put(to_grad_y + i, y_at(i, c)); });
  } else if (to_x) {
    for_elements(part, [=](int64_t i, int64_t c) { put(to_x + i, x_at(i, c)); });
  }
}

template <class E>
constexpr BatchNormKernels<E> kTable = {sums_x<E>, sums_gy<E>, sums_u<E>, write_y<E>, write_grad_x<E>, write_second<E>};

}  // namespace

#define SIB_FAST_TABLE_OF(E)                                            \
  template <>                                                           \
  const BatchNormKernels<E>& SIB_FAST_TABLE(batch_norm_kernels_)<E>() { \
    return kTable<E>;                                                   \
  }
SIB_FAST_TABLE_OF(double)
SIB_FAST_TABLE_OF(float)
SIB_FAST_TABLE_OF(BFloat16Bits)
SIB_FAST_TABLE_OF(Float16Bits)

}  // namespace sib_fast::cpu
