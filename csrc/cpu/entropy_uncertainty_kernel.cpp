// u = H(softmax(a)) / log K over the class axis; K = 1 is the Bernoulli entropy of sigmoid(a) over log 2.
//
// With m = max a, d_k = a_k - m, r = sum over all but one maximum of e^d, s = 1 + r, t = -sum e^d d / s:
//   H = log1p(r) + t, two sums of terms that are never negative: nothing cancels, and saturated logits give exact 0.
//   dH/da_k = -p_k (d_k + t), as log p_k + H = d_k + t.
#include "cpu/entropy_uncertainty.h"

#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr double kLog2 = 0.69314718055994530942;

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

template <bool Dense, typename T, typename S>
BTI_FAST_INLINE void forward_block(const EntropyForward& job, const T* a, S* u, int64_t stride, int64_t u_stride,
                                   S norm, int n) {
  using V = typename ComputeVec<T>::type;
  V h;
  if (job.classes == 1) {
    const V z = abs(load<Dense>(a, stride, n));
    const V e = exp_nonpositive(-z);
    h = log1p_nonnegative(e) + z * e / (1 + e);
  } else {
    const auto s = softmax<Dense>(a, job.classes, job.class_stride, stride, n);
    h = log1p_nonnegative(s.rest) + s.t;
  }
  h = h * norm;
  h = h > 1 ? splat<V>(S(1)) : h;
  store<Dense>(h, u, u_stride, n);
}

template <bool Dense, typename T, typename S>
BTI_FAST_INLINE void backward_block(const EntropyBackward& job, const T* a, const S* grad_u, T* grad, int64_t stride,
                                    int64_t u_stride, int64_t grad_stride, S norm, int n) {
  using V = typename ComputeVec<T>::type;
  const V g = load<Dense>(grad_u, u_stride, n) * -norm;
  if (job.classes == 1) {
    const V x = load<Dense>(a, stride, n);
    const V e = exp_nonpositive(-abs(x));
    const V s = 1 + e;
    store<Dense>(g * (x * e / (s * s)), grad, grad_stride, n);
    return;
  }
  const auto s = softmax<Dense>(a, job.classes, job.class_stride, stride, n);
  const V scale = 1 / (1 + s.rest);
  for (int64_t k = 0; k < job.classes; ++k) {
    const V d = load<Dense>(a + k * job.class_stride, stride, n) - s.max;
    const V p = exp_nonpositive(d) * scale;
    store<Dense>(g * (p * (d + s.t)), grad + k * job.grad_class_stride, grad_stride, n);
  }
}

template <typename T>
void forward_range(const EntropyForward& job, int64_t begin, int64_t end) {
  using S = typename ComputeOf<T>::type;
  constexpr int lanes = ComputeVec<T>::lanes;
  const S norm = static_cast<S>(1 / (job.classes == 1 ? kLog2 : ::log(static_cast<double>(job.classes))));
  const int64_t inner = job.at.inner();
  const int64_t stride = job.at.stride[0][job.at.dims - 1], u_stride = job.at.stride[1][job.at.dims - 1];
  const bool dense = stride == 1 && u_stride == 1;
  while (begin < end) {
    int64_t at[2];
    job.at.offsets(begin, at);
    const T* a = static_cast<const T*>(job.logits) + at[0];
    S* u = static_cast<S*>(job.u) + at[1];
    int64_t left = inner - begin % inner;
    if (left > end - begin) left = end - begin;
    begin += left;
    if (dense) {
      for (; left >= lanes; left -= lanes, a += lanes, u += lanes) forward_block<true>(job, a, u, 1, 1, norm, lanes);
    }
    for (; left > 0; left -= lanes, a += lanes * stride, u += lanes * u_stride)
      forward_block<false>(job, a, u, stride, u_stride, norm, left < lanes ? static_cast<int>(left) : lanes);
  }
}

template <typename T>
void backward_range(const EntropyBackward& job, int64_t begin, int64_t end) {
  using S = typename ComputeOf<T>::type;
  constexpr int lanes = ComputeVec<T>::lanes;
  const S norm = static_cast<S>(1 / (job.classes == 1 ? kLog2 : ::log(static_cast<double>(job.classes))));
  const int64_t inner = job.at.inner();
  const int last = job.at.dims - 1;
  const int64_t stride = job.at.stride[0][last], u_stride = job.at.stride[1][last], g_stride = job.at.stride[2][last];
  const bool dense = stride == 1 && u_stride == 1 && g_stride == 1;
  while (begin < end) {
    int64_t at[3];
    job.at.offsets(begin, at);
    const T* a = static_cast<const T*>(job.logits) + at[0];
    const S* u = static_cast<const S*>(job.grad_u) + at[1];
    T* g = static_cast<T*>(job.grad_logits) + at[2];
    int64_t left = inner - begin % inner;
    if (left > end - begin) left = end - begin;
    begin += left;
    if (dense) {
      for (; left >= lanes; left -= lanes, a += lanes, u += lanes, g += lanes)
        backward_block<true>(job, a, u, g, 1, 1, 1, norm, lanes);
    }
    for (; left > 0; left -= lanes, a += lanes * stride, u += lanes * u_stride, g += lanes * g_stride)
      backward_block<false>(job, a, u, g, stride, u_stride, g_stride, norm,
                            left < lanes ? static_cast<int>(left) : lanes);
  }
}

}  // namespace

void entropy_forward(const EntropyForward& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::float32: return forward_range<float>(job, begin, end);
    case Dtype::float64: return forward_range<double>(job, begin, end);
    case Dtype::float16: return forward_range<Half>(job, begin, end);
    case Dtype::bfloat16: return forward_range<BFloat16>(job, begin, end);
  }
}

void entropy_backward(const EntropyBackward& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::float32: return backward_range<float>(job, begin, end);
    case Dtype::float64: return backward_range<double>(job, begin, end);
    case Dtype::float16: return backward_range<Half>(job, begin, end);
    case Dtype::bfloat16: return backward_range<BFloat16>(job, begin, end);
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
