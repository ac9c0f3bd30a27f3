// Results of cross_attention on the class side: the parts that the splits of the dense tokens left, put together in the
// order of the splits.
#include "cpu/cross_attention_tile.h"
#include "cpu/with_dtype.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

// out_k and the columns' statistics of one head from the parts of its splits, in their order.
template <typename T>
void combine_head(const CrossForward& job, int64_t index) {
  const CrossShape& shape = job.shape;
  const int64_t batch = index / shape.heads, head = index % shape.heads, m = shape.m, part = forward_partial(shape);
  T* out = at<T>(job.out_k, batch, head);
  SoftmaxStatistics* statistics = job.statistics + index * (shape.n + m) + shape.n;
  for (int64_t j = 0; j < m; ++j) {
    statistics[j] = {0.0f, kNothing};
    for (int64_t c = 0; c < shape.e; ++c) narrow(0.0f, out + j * job.out_k.token + c * job.out_k.channel);
  }
  const Columns columns = columns_of(shape, batch);
  float* parts = job.partial + index * shape.splits * part;
  float total[256], sum[256], weight[256];
  for (int64_t j = 0; j < columns.count; ++j) {
    total[j] = kNothing;
    for (int64_t s = 0; s < shape.splits; ++s) total[j] = softmax_peak(parts[s * part + j], total[j]);
    sum[j] = 0.0f;
  }
  for (int64_t s = 0; s < shape.splits; ++s) {
    const float* from = parts + s * part;
    for (int64_t j = 0; j < columns.count; ++j) {
      weight[j] = softmax_weight(from[j], total[j], [](float x) { return exp_exact(x); });
      sum[j] += weight[j] * from[m + j];
    }
    for (int64_t c = 0; c < shape.e; ++c) {
      float* into = parts + (2 + c) * m;
      for (int64_t j = 0; j < columns.count; ++j)
        into[j] = (s == 0 ? 0.0f : into[j]) + weight[j] * from[(2 + c) * m + j];
    }
  }
  for (int64_t j = 0; j < columns.count; ++j) {
    const float inverse = softmax_inverse(sum[j]);
    statistics[columns.index[j]] = {softmax_shift(total[j]), log_positive(sum[j])};
    T* to = out + columns.index[j] * job.out_k.token;
    for (int64_t c = 0; c < shape.e; ++c) narrow(parts[(2 + c) * m + j] * inverse, to + c * job.out_k.channel);
  }
}

// grad_k and grad_v_k of one head: the sums of its splits, added in their order.
template <typename T>
void combine_head(const CrossBackward& job, int64_t index) {
  const CrossShape& shape = job.shape;
  const int64_t batch = index / shape.heads, head = index % shape.heads, m = shape.m, part = backward_partial(shape);
  T* grad_k = at<T>(job.grad_k, batch, head);
  T* grad_v = at<T>(job.grad_v_k, batch, head);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t c = 0; c < shape.d; ++c) narrow(0.0f, grad_k + j * job.grad_k.token + c * job.grad_k.channel);
    for (int64_t c = 0; c < shape.e; ++c) narrow(0.0f, grad_v + j * job.grad_v_k.token + c * job.grad_v_k.channel);
  }
  const Columns columns = columns_of(shape, batch);
  float* sum = job.partial + index * shape.splits * part;
  for (int64_t s = 1; s < shape.splits; ++s) {
    const float* from = sum + s * part;
    for (int64_t c = 0; c < shape.d + shape.e; ++c)
      for (int64_t j = 0; j < columns.count; ++j) sum[c * m + j] += from[c * m + j];
  }
  for (int64_t j = 0; j < columns.count; ++j) {
    T* to_k = grad_k + columns.index[j] * job.grad_k.token;
    T* to_v = grad_v + columns.index[j] * job.grad_v_k.token;
    for (int64_t c = 0; c < shape.d; ++c) narrow(sum[c * m + j] * shape.scale, to_k + c * job.grad_k.channel);
    for (int64_t c = 0; c < shape.e; ++c) narrow(sum[(shape.d + c) * m + j], to_v + c * job.grad_v_k.channel);
  }
}

template <typename T, typename Job>
void combine_heads(const Job& job, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) combine_head<T>(job, index);
}

}  // namespace

void cross_forward_combine(const CrossForward& job, int64_t begin, int64_t end) {
  with_dtype(job.shape.dtype, [&](auto x) { combine_heads<decltype(x)>(job, begin, end); });
}

void cross_backward_combine(const CrossBackward& job, int64_t begin, int64_t end) {
  with_dtype(job.shape.dtype, [&](auto x) { combine_heads<decltype(x)>(job, begin, end); });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
