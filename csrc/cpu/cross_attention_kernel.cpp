// Forward sweep of cross_attention over one split of the dense tokens, tile by tile of S (tokens x class tokens).
//
// Ordinary logits ("plain" tiles): E = e^s, as 2^(s log2 e), serves both softmaxes, relative to a peak of 0. A tile is plain when the sum
// of each of its rows and columns lies in 2^-58..2^58: then no term that matters was lost to the ends of the exponent.
// Other tiles ("wide"): each row has its own peak, each column a running one. Once a split has met a wide tile it
// expects more, so the plain attempt is dropped. The choice depends on the numbers alone, never on threads.
#include "cpu/cross_attention_tile.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr float kPlainSumLow = 0x1p-58f, kPlainSumHigh = 0x1p58f;

// Of every column: sum of weights and weighted values [e, columns]; wide ones also the running peak.
struct ColumnSums {
  float* peak;
  float* sum;
  float* values;
  bool used;
};

struct Sweep {
  int64_t e, width, vectors;
  Columns columns;
  VecF inside;  // of the last vector of columns: 1 where there is one, 0 beyond
  float *scores, *other, *q, *v, *out, *k_panels, *v_panels, *tile_sum;
  float row_sum[kTileTokens], row_shift[kTileTokens], row_inverse[kTileTokens];
  ColumnSums plain, wide;
};

template <int Rows>
BTI_FAST_INLINE void exponentials(float* x, int64_t width, int64_t vectors, VecF inside, float* tile_sum,
                                  float* row_sum) {
  VecF sum[Rows]{};
  const auto column = [&](int64_t v, auto keep) {
    VecF total = load_dense(tile_sum + v);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      float* p = x + r * width + v;
      const VecF y = keep(exp2_bounded(load_dense(p)));
      store_dense(y, p);
      sum[r] += y;
      total += y;
    }
    store_dense(total, tile_sum + v);
  };
  const int64_t last = (vectors - 1) * kLanes;
  for (int64_t v = 0; v < last; v += kLanes) column(v, [](VecF y) { return y; });
  column(last, [&](VecF y) { return y * inside; });
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) row_sum[r] = lane_sum(sum[r]);
}

// Scores to exponentials in place; false where the tile is wide, and the scores are then lost.
bool plain_tile(Sweep& s, int count) {
  for (int64_t v = 0; v < s.vectors; ++v) store_dense(VecF{}, s.tile_sum + v * kLanes);
  int i = 0;
  for (; i + 2 <= count; i += 2)
    exponentials<2>(s.scores + i * s.width, s.width, s.vectors, s.inside, s.tile_sum, s.row_sum + i);
  for (; i < count; ++i)
    exponentials<1>(s.scores + i * s.width, s.width, s.vectors, s.inside, s.tile_sum, s.row_sum + i);
  bool fits = true;
  for (i = 0; i < count; ++i) fits &= s.row_sum[i] >= kPlainSumLow && s.row_sum[i] <= kPlainSumHigh;
  for (int64_t j = 0; j < s.columns.count; ++j) fits &= s.tile_sum[j] >= kPlainSumLow && s.tile_sum[j] <= kPlainSumHigh;
  if (!fits) return false;
  for (int64_t v = 0; v < s.vectors * kLanes; v += kLanes)
    store_dense(load_dense(s.plain.sum + v) + load_dense(s.tile_sum + v), s.plain.sum + v);
  for (i = 0; i < count; ++i) s.row_shift[i] = 0.0f;
  return true;
}

BTI_FAST_INLINE VecF peak_of(VecF one, VecF two) { return one > two ? one : two; }
BTI_FAST_INLINE VecF shift_of(VecF peak) { return peak == kNothing ? VecF{} : peak; }

// Row weights into `other`, column weights in place of the scores.
void wide_tile(Sweep& s, int count) {
  const int64_t last = (s.vectors - 1) * kLanes;
  for (int i = 0; i < count; ++i) {
    float* x = s.scores + i * s.width;
    store_dense(s.inside > 0 ? load_dense(x + last) : splat<VecF>(kNothing), x + last);
    float peak = kNothing;
    for (int64_t j = 0; j < s.columns.count; ++j) peak = softmax_peak(x[j], peak);
    const float shift = softmax_shift(peak);
    VecF sum{};
    for (int64_t v = 0; v <= last; v += kLanes) {
      const VecF y = exp_exact(load_dense(x + v) - shift);
      store_dense(y, s.other + i * s.width + v);
      sum += y;
    }
    s.row_sum[i] = lane_sum(sum);
    s.row_shift[i] = shift;
  }
  for (int64_t v = 0; v <= last; v += kLanes) {
    const VecF old = load_dense(s.wide.peak + v);
    VecF peak = old;
    for (int i = 0; i < count; ++i) peak = peak_of(load_dense(s.scores + i * s.width + v), peak);
    const VecF shift = shift_of(peak);
    const VecF weight = old == kNothing ? VecF{} : exp_exact(old - shift);
    store_dense(peak, s.wide.peak + v);
    for (int64_t c = 0; c < s.e; ++c) {
      float* p = s.wide.values + c * s.width + v;
      store_dense(load_dense(p) * weight, p);
    }
    VecF sum = load_dense(s.wide.sum + v) * weight;
    for (int i = 0; i < count; ++i) {
      float* p = s.scores + i * s.width + v;
      const VecF y = exp_exact(load_dense(p) - shift);
      store_dense(y, p);
      sum += y;
    }
    store_dense(sum, s.wide.sum + v);
  }
}

void finish_rows(Sweep& s, const TileTokens& tokens, float* lse) {
  for (int i = 0; i < tokens.count; i += kLanes) {
    float line[kLanes];
    const VecF sum = load_dense(s.row_sum + i);
    store_dense(log_positive(sum) + load_dense(s.row_shift + i), line);
    store_dense(sum == 0 ? VecF{} : 1 / sum, s.row_inverse + i);
    for (int k = 0; k < kLanes && i + k < tokens.count; ++k) lse[tokens.first + tokens.index[i + k]] = line[k];
  }
}

BTI_FAST_INLINE ColumnSums column_sums(Arena& arena, int64_t e, int64_t width) {
  ColumnSums out{arena.take(width), arena.take(width), arena.take(e * width), false};
  for (int64_t j = 0; j < width; ++j) out.peak[j] = kNothing;
  for (int64_t j = 0; j < width; ++j) out.sum[j] = 0.0f;
  for (int64_t j = 0; j < e * width; ++j) out.values[j] = 0.0f;
  return out;
}

// The two kinds of sums of this split, as one part (peak, sum, values [e, m]) of every column.
void store_part(const Sweep& s, int64_t m, float* part) {
  float* peak = part;
  float* sum = part + m;
  float* values = part + 2 * m;
  for (int64_t j = 0; j < s.columns.count; ++j) {
    const float one = s.plain.used ? 0.0f : kNothing, two = s.wide.peak[j];
    const float total = softmax_peak(one, two);
    const float w1 = softmax_weight(one, total, [](float x) { return exp_exact(x); });
    const float w2 = softmax_weight(two, total, [](float x) { return exp_exact(x); });
    peak[j] = total;
    sum[j] = s.wide.used ? w1 * s.plain.sum[j] + w2 * s.wide.sum[j] : s.plain.sum[j];
    for (int64_t c = 0; c < s.e; ++c) {
      const float plain = s.plain.values[c * s.width + j], wide = s.wide.values[c * s.width + j];
      values[c * m + j] = s.wide.used ? w1 * plain + w2 * wide : plain;
    }
  }
}

template <typename T>
void forward_split(const CrossForward& job, int64_t task, float* scratch) {
  const CrossShape& shape = job.shape;
  const int64_t d = shape.d, e = shape.e;
  const int64_t split = task % shape.splits, head = task / shape.splits % shape.heads;
  const int64_t batch = task / shape.splits / shape.heads;
  const int64_t first = split * shape.split_tokens;
  const int64_t end = first + shape.split_tokens < shape.n ? first + shape.split_tokens : shape.n;
  const T* q = at<const T>(job.q, batch, head);
  const T* v_q = at<const T>(job.v_q, batch, head);
  T* out_q = at<T>(job.out_q, batch, head);
  float* lse = job.row_lse + (batch * shape.heads + head) * shape.n;

  Sweep s;
  s.e = e;
  s.columns = columns_of(shape, batch);
  const int64_t count = s.columns.count;
  s.vectors = (count + kLanes - 1) / kLanes;
  s.width = padded(shape.m) + kPadding;
  s.inside = lanes_before(count, (s.vectors - 1) * kLanes);
  Arena arena{scratch};
  const int64_t q_row = d + kPadding, v_row = e + kPadding;
  s.scores = arena.take(kTileTokens * s.width);
  s.other = arena.take(kTileTokens * s.width);
  s.tile_sum = arena.take(s.width);
  s.q = arena.take(kTileTokens * q_row);
  s.v = arena.take(kTileTokens * v_row);
  s.out = arena.take(kTileTokens * v_row);
  s.k_panels = arena.take(padded(shape.m) * d);
  s.v_panels = arena.take(padded(shape.m) * padded(e));
  s.plain = column_sums(arena, e, s.width);
  s.wide = column_sums(arena, e, s.width);

  float* rows = arena.take(count * (d > e ? d : e));
  gather(at<const T>(job.k, batch, head), job.k, s.columns, d, 1.0f, rows);
  pack_transposed(rows, count, d, s.k_panels);
  gather(at<const T>(job.v_k, batch, head), job.v_k, s.columns, e, 1.0f, rows);
  pack(rows, count, e, s.v_panels);

  for (int64_t begin = first; begin < end; begin += kTileTokens) {
    const TileTokens tokens = tile_tokens(shape.q_mask, batch, begin, end);
    if (tokens.count == 0) continue;
    load_tile(q, job.q, tokens, d, s.q, q_row);
    load_tile(v_q, job.v_q, tokens, e, s.v, v_row);
    prefetch_tile(q, job.q, begin + kTileTokens, end, d);
    prefetch_tile(v_q, job.v_q, begin + kTileTokens, end, e);
    const auto scores = [&](float factor) {
      product(s.q, q_row, packed(s.k_panels, d), d, factor, s.scores, s.width, tokens.rows(), s.vectors);
    };
    bool wide = s.wide.used;
    if (!wide) {
      scores(shape.scale * kLog2E);
      wide = !plain_tile(s, tokens.count);
    }
    if (wide) {
      scores(shape.scale);
      wide_tile(s, tokens.count);
    }
    s.wide.used |= wide;
    s.plain.used |= !wide;
    add_transposed_product(s.v, v_row, plain(s.scores, s.width), tokens.count, (wide ? s.wide : s.plain).values,
                           s.width, e, s.vectors);
    product(wide ? s.other : s.scores, s.width, packed(s.v_panels, count), count, 1.0f, s.out, v_row, tokens.rows(),
            e / kLanes);
    finish_rows(s, tokens, lse);
    store_tile(s.out, v_row, tokens, s.row_inverse, e, out_q, job.out_q);
  }
  store_part(s, shape.m, job.partial + task * forward_partial(shape));
}

// A task with no class token to attend to, and the tokens that take no part.
template <typename T>
void forward_zeros(const CrossForward& job, int64_t task) {
  const CrossShape& shape = job.shape;
  const int64_t head = task / shape.splits % shape.heads, batch = task / shape.splits / shape.heads;
  const int64_t first = task % shape.splits * shape.split_tokens;
  const int64_t end = first + shape.split_tokens < shape.n ? first + shape.split_tokens : shape.n;
  const bool none = columns_of(shape, batch).count == 0;
  if (!none && shape.q_mask.data == nullptr) return;
  T* out = at<T>(job.out_q, batch, head);
  float* lse = job.row_lse + (batch * shape.heads + head) * shape.n;
  for (int64_t i = first; i < end; ++i) {
    if (!none && shape.q_mask.data[batch * shape.q_mask.batch + i * shape.q_mask.token]) continue;
    lse[i] = kNothing;
    for (int64_t c = 0; c < shape.e; ++c) narrow(0.0f, out + i * job.out_q.token + c * job.out_q.channel);
  }
}

template <typename T>
void forward_tasks(const CrossForward& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    forward_zeros<T>(job, task);
    if (columns_of(job.shape, task / job.shape.splits / job.shape.heads).count > 0)
      forward_split<T>(job, task, scratch);
  }
}

// out_k and its log-sum-exps of one head from the parts of its splits, in their order.
template <typename T>
void combine_head(const CrossForward& job, int64_t index) {
  const CrossShape& shape = job.shape;
  const int64_t batch = index / shape.heads, head = index % shape.heads, m = shape.m, part = forward_partial(shape);
  T* out = at<T>(job.out_k, batch, head);
  float* lse = job.column_lse + index * m;
  for (int64_t j = 0; j < m; ++j) {
    lse[j] = kNothing;
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
    lse[columns.index[j]] = log_positive(sum[j]) + softmax_shift(total[j]);
    T* to = out + columns.index[j] * job.out_k.token;
    for (int64_t c = 0; c < shape.e; ++c) narrow(parts[(2 + c) * m + j] * inverse, to + c * job.out_k.channel);
  }
}

template <typename T>
void combine_heads(const CrossForward& job, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) combine_head<T>(job, index);
}

}  // namespace

void cross_forward(const CrossForward& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.shape.dtype) {
    case Dtype::float16: return forward_tasks<Half>(job, begin, end, scratch);
    case Dtype::bfloat16: return forward_tasks<BFloat16>(job, begin, end, scratch);
    default: return forward_tasks<float>(job, begin, end, scratch);
  }
}

void cross_forward_combine(const CrossForward& job, int64_t begin, int64_t end) {
  switch (job.shape.dtype) {
    case Dtype::float16: return combine_heads<Half>(job, begin, end);
    case Dtype::bfloat16: return combine_heads<BFloat16>(job, begin, end);
    default: return combine_heads<float>(job, begin, end);
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
