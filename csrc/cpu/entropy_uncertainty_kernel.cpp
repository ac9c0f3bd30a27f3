// u = H(softmax(a)) / log K over the class axis; K = 1 is the Bernoulli entropy of sigmoid(a) over log 2.
#include "cpu/entropy_uncertainty.h"

#include "cpu/entropy_block.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

template <typename T>
void forward_range(const EntropyForward& job, int64_t begin, int64_t end) {
  using S = typename ComputeOf<T>::type;
  constexpr int lanes = ComputeVec<T>::lanes;
  const S norm = entropy_norm<S>(job.classes);
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
      for (; left >= lanes; left -= lanes, a += lanes, u += lanes)
        store_dense(entropy_block<true>(a, job.classes, job.class_stride, 1, norm, lanes), u);
    }
    for (; left > 0; left -= lanes, a += lanes * stride, u += lanes * u_stride) {
      const int n = left < lanes ? static_cast<int>(left) : lanes;
      store<false>(entropy_block<false>(a, job.classes, job.class_stride, stride, norm, n), u, u_stride, n);
    }
  }
}

template <typename T>
void backward_range(const EntropyBackward& job, int64_t begin, int64_t end) {
  using S = typename ComputeOf<T>::type;
  constexpr int lanes = ComputeVec<T>::lanes;
  const S norm = entropy_norm<S>(job.classes);
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
        entropy_gradient_block<true>(load_dense(u), a, job.classes, job.class_stride, 1, g, job.grad_class_stride, 1,
                                     norm, lanes);
    }
    for (; left > 0; left -= lanes, a += lanes * stride, u += lanes * u_stride, g += lanes * g_stride) {
      const int n = left < lanes ? static_cast<int>(left) : lanes;
      entropy_gradient_block<false>(load<false>(u, u_stride, n), a, job.classes, job.class_stride, stride, g,
                                    job.grad_class_stride, g_stride, norm, n);
    }
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
