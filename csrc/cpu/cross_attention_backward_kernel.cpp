// Backward sweep of cross_attention over one split of the dense tokens: dS as in cross_attention_gradient.h, and from it
//   dv_k += P_row' dO_q    dv_q = P_col dO_k    dq = scale dS k    dk += scale dS' q
#include "cpu/cross_attention_gradient.h"
#include "cpu/with_dtype.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

bool plain_rows(const MaskView& mask, int64_t batch, int64_t first, int64_t end, const SoftmaxStatistics* rows) {
  bool plain = true;
  for (int64_t i = first; i < end; ++i)
    plain &= is_plain(rows[i], kPlainRow) || (mask.data != nullptr && !mask.data[batch * mask.batch + i * mask.token]);
  return plain;
}

bool plain_columns(const Columns& columns, const SoftmaxStatistics* statistics) {
  bool plain = true;
  for (int64_t j = 0; j < columns.count; ++j) plain &= is_plain(statistics[columns.index[j]], kPlainColumn);
  return plain;
}

template <typename T>
void backward_split(const CrossBackward& job, int64_t task, float* scratch) {
  const CrossShape& shape = job.shape;
  const int64_t d = shape.d, e = shape.e, m = shape.m;
  const int64_t split = task % shape.splits, head = task / shape.splits % shape.heads;
  const int64_t batch = task / shape.splits / shape.heads, index = task / shape.splits;
  const int64_t first = split * shape.split_tokens;
  const int64_t end = first + shape.split_tokens < shape.n ? first + shape.split_tokens : shape.n;
  const T* q = at<const T>(job.q, batch, head);
  const T* v_q = at<const T>(job.v_q, batch, head);
  const T* out_q = at<const T>(job.out_q, batch, head);
  const T* grad_out_q = at<const T>(job.grad_out_q, batch, head);
  T* grad_q = at<T>(job.grad_q, batch, head);
  T* grad_v_q = at<T>(job.grad_v_q, batch, head);
  if (shape.q_mask.data != nullptr) {
    store_masked(shape.q_mask, batch, first, end, d, grad_q, job.grad_q);
    store_masked(shape.q_mask, batch, first, end, e, grad_v_q, job.grad_v_q);
  }

  Sweep s;
  s.d = d;
  s.e = e;
  s.columns = columns_of(shape, batch);
  const int64_t count = s.columns.count;
  if (count == 0) {  // what attends to nothing has no gradient
    for (int64_t i = first; i < end; ++i) {
      for (int64_t c = 0; c < d; ++c) narrow(0.0f, grad_q + i * job.grad_q.token + c * job.grad_q.channel);
      for (int64_t c = 0; c < e; ++c) narrow(0.0f, grad_v_q + i * job.grad_v_q.token + c * job.grad_v_q.channel);
    }
    return;
  }
  s.vectors = (count + kLanes - 1) / kLanes;
  s.width = padded(m) + kPadding;
  Arena arena{scratch};
  const int64_t q_row = d + kPadding, v_row = e + kPadding;
  s.scores = arena.take(kTileTokens * s.width);
  s.other = arena.take(kTileTokens * s.width);
  s.gradient = arena.take(kTileTokens * s.width);
  s.q = arena.take(kTileTokens * q_row);
  s.v = arena.take(kTileTokens * v_row);
  s.grad = arena.take(kTileTokens * v_row);
  s.out = arena.take(kTileTokens * (q_row > v_row ? q_row : v_row));
  s.k_transposed = arena.take(padded(m) * d);
  s.k = arena.take(padded(m) * padded(d));
  s.v_transposed = arena.take(padded(m) * e);
  s.grad_transposed = arena.take(padded(m) * e);
  s.grad_panels = arena.take(padded(m) * padded(e));
  s.column_mean = arena.take(s.width);
  s.column_peak = arena.take(s.width);
  s.column_log = arena.take(s.width);
  s.sum_k = arena.take(d * s.width);
  s.sum_v = arena.take(e * s.width);
  const SoftmaxStatistics* row_statistics = job.statistics + index * (shape.n + m);
  const SoftmaxStatistics* column_statistics = row_statistics + shape.n;
  s.plain = plain_columns(s.columns, column_statistics) &&
            plain_rows(shape.q_mask, batch, first, end, row_statistics);
  s.few = s.plain && count <= kFewColumns;
  const int64_t width = s.few ? count : s.width, channel = s.few ? 1 : width, column_k = s.few ? d : 1,
                column_v = s.few ? e : 1;  // of the sums, and their distances
  for (int64_t j = 0; j < d * width; ++j) s.sum_k[j] = 0.0f;
  for (int64_t j = 0; j < e * width; ++j) s.sum_v[j] = 0.0f;
  s.k_rows = arena.take(count * d);
  s.v_rows = arena.take(count * e);
  s.grad_rows = arena.take(count * e);
  pack_class_side<T>(job, s, batch, head, column_statistics, arena.take(count * e));

  const float one = 1.0f;
  for (int64_t begin = first; begin < end; begin += kTileTokens) {
    const TileTokens tokens = tile_tokens(shape.q_mask, batch, begin, end);
    if (tokens.count == 0) continue;
    s.q_tile = tile_of(q, job.q, tokens, d, s.q);
    s.v_tile = tile_of(v_q, job.v_q, tokens, e, s.v);
    s.out_tile = tile_of(out_q, job.out_q, tokens, e, s.out);
    load_tile(grad_out_q, job.grad_out_q, tokens, e, s.grad, v_row);
    prefetch_tile(q, job.q, begin + kTileTokens, end, d);
    prefetch_tile(v_q, job.v_q, begin + kTileTokens, end, e);
    prefetch_tile(out_q, job.out_q, begin + kTileTokens, end, e);
    prefetch_tile(grad_out_q, job.grad_out_q, begin + kTileTokens, end, e);
    if (s.few) {
      few_gradient(s, shape.scale, tokens, row_statistics);
      mix_into(s.other, s.grad_rows, count, e, tokens, grad_v_q, job.grad_v_q, s.out);
      mix_into(s.scores, s.k_rows, count, d, tokens, grad_q, job.grad_q, s.out);
      continue;
    }
    row_factors(s, tokens, row_statistics);
    if (s.plain) {
      plain_gradient(s, shape.scale, tokens.rows());
    } else {
      wide_gradient(s, shape.scale, tokens.rows());
    }
    add_transposed_product(s.grad, v_row, plain(s.plain ? s.scores : s.other, s.width), tokens.count, s.sum_v, s.width,
                           e, s.vectors);
    add_transposed_product(s.q_tile.data, s.q_tile.row, plain(s.gradient, s.width), tokens.count, s.sum_k, s.width, d,
                           s.vectors);
    product_into(s.scores, s.width, packed(s.grad_panels, count), count, {&one, 0}, e, tokens, grad_v_q, job.grad_v_q,
                 s.out);
    product_into(s.gradient, s.width, packed(s.k, count), count, {&shape.scale, 0}, d, tokens, grad_q, job.grad_q,
                 s.out);
  }
  float* part = job.partial + task * backward_partial(shape);
  for (int64_t c = 0; c < d; ++c)
    for (int64_t j = 0; j < count; ++j) part[c * m + j] = s.sum_k[c * channel + j * column_k];
  for (int64_t c = 0; c < e; ++c)
    for (int64_t j = 0; j < count; ++j) part[(d + c) * m + j] = s.sum_v[c * channel + j * column_v];
}

template <typename T>
void backward_tasks(const CrossBackward& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) backward_split<T>(job, task, scratch);
}

}  // namespace

void cross_backward(const CrossBackward& job, int64_t begin, int64_t end, float* scratch) {
  with_dtype(job.shape.dtype, [&](auto x) { backward_tasks<decltype(x)>(job, begin, end, scratch); });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
