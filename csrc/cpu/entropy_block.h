// One vector of pixels' entropy and its gradient, shared by entropy_uncertainty and gated_fusion (kernels only).
//
// With m = max a, d_k = a_k - m, r = sum over all but one maximum of e^d, s = 1 + r, t = -sum e^d d / s:
//   H = log1p(r) + t, two sums of terms that are never negative: nothing cancels, and saturated logits give exact 0.
//   dH/da_k = -p_k (d_k + t), as log p_k + H = d_k + t.
#pragma once

#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

constexpr double kLog2 = 0.69314718055994530942;

// 1 / (largest entropy) of that many classes.
template <typename S>
inline S entropy_norm(int64_t classes) {
  return static_cast<S>(1 / (classes == 1 ? kLog2 : ::log(static_cast<double>(classes))));
}

template <typename V>
struct Softmax {
  V max, rest, t;
};

template <bool Dense, typename T>
BTI_FAST_INLINE Softmax<typename ComputeVec<T>::type> softmax(const T* a, int64_t classes, int64_t class_stride,
                                                             int64_t stride, int n) {
  using C = ComputeVec<T>;
  using V = typename C::type;
  using M = typename C::mask;
  V max = load<Dense>(a, stride, n);
  M which{};
  for (int64_t k = 1; k < classes; ++k) {
    const V x = load<Dense>(a + k * class_stride, stride, n);
    const M greater = x > max;
    max = greater ? x : max;
    which = greater ? M{} + static_cast<decltype(which[0] + 0)>(k) : which;
  }
  V rest{}, sum{};
  for (int64_t k = 0; k < classes; ++k) {
    const V d = load<Dense>(a + k * class_stride, stride, n) - max;
    const V e = exp_nonpositive(d);
    sum -= e * d;
    const M is_max = which == M{} + static_cast<decltype(which[0] + 0)>(k);
    rest += is_max ? V{} : e;
  }
  return {max, rest, sum / (1 + rest)};
}

// u of one vector of pixels `stride` apart, in [0, 1].
template <bool Dense, typename T, typename S>
BTI_FAST_INLINE typename ComputeVec<T>::type entropy_block(const T* a, int64_t classes, int64_t class_stride,
                                                           int64_t stride, S norm, int n) {
  using V = typename ComputeVec<T>::type;
  V h;
  if (classes == 1) {
    const V z = abs(load<Dense>(a, stride, n));
    const V e = exp_nonpositive(-z);
    h = log1p_nonnegative(e) + z * e / (1 + e);
  } else {
    const auto s = softmax<Dense>(a, classes, class_stride, stride, n);
    h = log1p_nonnegative(s.rest) + s.t;
  }
  h = h * norm;
  return h > 1 ? splat<V>(S(1)) : h;
}

// Writes d(sum g u)/d logits of one vector of pixels.
template <bool Dense, typename T, typename S>
BTI_FAST_INLINE void entropy_gradient_block(typename ComputeVec<T>::type g, const T* a, int64_t classes,
                                            int64_t class_stride, int64_t stride, T* grad, int64_t grad_class_stride,
                                            int64_t grad_stride, S norm, int n) {
  using V = typename ComputeVec<T>::type;
  g = g * -norm;
  if (classes == 1) {
    const V x = load<Dense>(a, stride, n);
    const V e = exp_nonpositive(-abs(x));
    const V s = 1 + e;
    store<Dense>(g * (x * e / (s * s)), grad, grad_stride, n);
    return;
  }
  const auto s = softmax<Dense>(a, classes, class_stride, stride, n);
  const V scale = 1 / (1 + s.rest);
  for (int64_t k = 0; k < classes; ++k) {
    const V d = load<Dense>(a + k * class_stride, stride, n) - s.max;
    const V p = exp_nonpositive(d) * scale;
    store<Dense>(g * (p * (d + s.t)), grad + k * grad_class_stride, grad_stride, n);
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
