// Peak and sum of every column that an ordinary exponential does not reach, found again before the backward sweep: a
// log-sum-exp in float32 is too coarse to give such weights back (see kPlainColumn).
#include "cpu/cross_attention_tile.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

// Peak and sum of every column over one split, into the first 2 m floats of its part.
template <typename T>
void columns_split(const CrossBackward& job, int64_t task, float* scratch) {
  const CrossShape& shape = job.shape;
  const int64_t d = shape.d, m = shape.m, index = task / shape.splits;
  const int64_t head = index % shape.heads, batch = index / shape.heads;
  const int64_t first = task % shape.splits * shape.split_tokens;
  const int64_t end = first + shape.split_tokens < shape.n ? first + shape.split_tokens : shape.n;
  const Columns columns = columns_of(shape, batch);
  if (plain_columns(columns, job.column_lse + index * m)) return;
  const int64_t vectors = (columns.count + kLanes - 1) / kLanes, width = padded(m) + kPadding, q_row = d + kPadding;
  Arena arena{scratch};
  float* scores = arena.take(kTileTokens * width);
  float* q = arena.take(kTileTokens * q_row);
  float* panels = arena.take(padded(m) * d);
  float* rows = arena.take(columns.count * d);
  float* peaks = arena.take(width);
  float* sums = arena.take(width);
  gather(at<const T>(job.k, batch, head), job.k, columns, d, 1.0f, rows);
  pack_transposed(rows, columns.count, d, panels);
  for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
    store_dense(splat<VecF>(kNothing), peaks + v);
    store_dense(VecF{}, sums + v);
  }
  for (int64_t begin = first; begin < end; begin += kTileTokens) {
    const TileTokens tokens = tile_tokens(shape.q_mask, batch, begin, end);
    load_tile(at<const T>(job.q, batch, head), job.q, tokens, d, q, q_row);
    product(q, q_row, packed(panels, d), d, shape.scale, scores, width, tokens.rows(), vectors);
    for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
      const VecF old = load_dense(peaks + v);
      VecF peak = old, sum{};
      for (int i = 0; i < tokens.count; ++i) {
        const VecF t = load_dense(scores + i * width + v);
        peak = t > peak ? t : peak;
      }
      const VecF shift = peak == kNothing ? VecF{} : peak;
      for (int i = 0; i < tokens.count; ++i) sum += exp_exact(load_dense(scores + i * width + v) - shift);
      const VecF weight = old == kNothing ? VecF{} : exp_exact(old - shift);
      store_dense(load_dense(sums + v) * weight + sum, sums + v);
      store_dense(peak, peaks + v);
    }
  }
  float* part = job.partial + task * backward_partial(shape);
  for (int64_t j = 0; j < columns.count; ++j) {
    part[j] = peaks[j];
    part[m + j] = sums[j];
  }
}

void columns_combine(const CrossBackward& job, int64_t index) {
  const CrossShape& shape = job.shape;
  const int64_t m = shape.m, stride = backward_partial(shape);
  const Columns columns = columns_of(shape, index / shape.heads);
  if (plain_columns(columns, job.column_lse + index * m)) return;
  const float* parts = job.partial + index * shape.splits * stride;
  float* exact = job.column_exact + index * 2 * m;
  for (int64_t j = 0; j < columns.count; ++j) {
    float total = kNothing, sum = 0.0f;
    for (int64_t s = 0; s < shape.splits; ++s) total = softmax_peak(parts[s * stride + j], total);
    for (int64_t s = 0; s < shape.splits; ++s)
      sum += parts[s * stride + m + j] *
             softmax_weight(parts[s * stride + j], total, [](float x) { return exp_exact(x); });
    exact[j] = total;
    exact[m + j] = sum;
  }
}

}  // namespace

void cross_backward_columns(const CrossBackward& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    switch (job.shape.dtype) {
      case Dtype::float16: columns_split<Half>(job, task, scratch); break;
      case Dtype::bfloat16: columns_split<BFloat16>(job, task, scratch); break;
      default: columns_split<float>(job, task, scratch);
    }
  }
}

void cross_backward_columns_combine(const CrossBackward& job, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) columns_combine(job, index);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
