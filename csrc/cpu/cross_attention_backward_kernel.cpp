// Backward sweep of cross_attention over one split of the dense tokens. With P = e^(s - lse) of either direction:
//   dS = P_row (dO_q v_k' - mean_row) + P_col (v_q dO_k' - mean_col),   mean = sum over channels of dO * O
//   dv_k += P_row' dO_q    dv_q = P_col dO_k    dq = scale dS k    dk += scale dS' q
// Ordinary log-sum-exps ("plain" splits): with E = e^s, a = e^-lse_row and b = e^-lse_col, P_row = a E and P_col = b E;
// a goes into dO_q and mean_row, b into dO_k and mean_col, so that one exponential and one chain of products give
//   dS = E ((a dO_q) v_k' + v_q (b dO_k)' - a mean_row - b mean_col).
// Other splits ("wide") form both P.
#include "cpu/cross_attention_tile.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

struct Sweep {
  int64_t d, e, width, vectors;
  Columns columns;
  VecF inside;  // of the last vector of columns: 1 where there is one, 0 beyond
  bool plain;
  float *scores, *other, *gradient;        // E or P_col, P_row, dS [tokens, width]
  float *q, *v, *grad, *out;               // copies of tiles [tokens, d or e + kPadding]
  Tile q_tile, v_tile, out_tile;
  float *k_transposed, *k, *v_transposed;  // panels
  float *grad_transposed, *grad_panels;    // panels of dO_k, times b in plain splits
  float *column_mean;                      // mean_col, times b in plain splits
  float *column_shift, *column_inverse;    // wide splits: P_col = e^(s - shift) inverse
  float *sum_k, *sum_v;                    // dk / scale [d, width] and dv_k [e, width]
  float row_mean[kTileTokens];
};

struct PlainGradient {
  const Sweep& s;

  template <int R, int V>
  BTI_FAST_INLINE void run(int64_t r0, int64_t v0) const {
    VecF acc[R][V];
    VecF mean[V];
    const int64_t row = s.e + kPadding, at = r0 * s.width + v0 * kLanes;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) mean[v] = load_dense(s.column_mean + (v0 + v) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = -(s.row_mean[r0 + r] + mean[v]);
    const int64_t panel = v0 / kPanelVectors * s.e * kPanel;
    accumulate<false>(acc, s.grad + r0 * row, row, s.v_transposed + panel, kPanel, s.e);
    accumulate<false>(acc, s.v_tile.data + r0 * s.v_tile.row, s.v_tile.row, s.grad_transposed + panel, kPanel, s.e);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t p = at + r * s.width + v * kLanes;
        store_dense(acc[r][v] * load_dense(s.scores + p), s.gradient + p);
      }
  }
};

template <bool Rows>
struct WideGradient {
  const Sweep& s;

  template <int R, int V>
  BTI_FAST_INLINE void run(int64_t r0, int64_t v0) const {
    VecF acc[R][V]{};
    const int64_t row = s.e + kPadding, at = r0 * s.width + v0 * kLanes;
    const int64_t panel = v0 / kPanelVectors * s.e * kPanel;
    const Tile a = Rows ? Tile{s.grad, row} : s.v_tile;
    accumulate<false>(acc, a.data + r0 * a.row, a.row, (Rows ? s.v_transposed : s.grad_transposed) + panel, kPanel,
                      s.e);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t p = at + r * s.width + v * kLanes;
        if (Rows) {
          const VecF mean = splat<VecF>(s.row_mean[r0 + r]);
          store_dense(softmax_gradient(load_dense(s.other + p), acc[r][v], mean), s.gradient + p);
        } else {
          const VecF mean = load_dense(s.column_mean + (v0 + v) * kLanes);
          const VecF both = load_dense(s.gradient + p) + softmax_gradient(load_dense(s.scores + p), acc[r][v], mean);
          store_dense(both, s.gradient + p);
        }
      }
  }
};

struct PlainScores {
  const Sweep& s;
  float factor;

  template <int R, int V>
  BTI_FAST_INLINE void run(int64_t r0, int64_t v0) const {
    VecF acc[R][V]{};
    accumulate<false>(acc, s.q_tile.data + r0 * s.q_tile.row, s.q_tile.row,
                      s.k_transposed + v0 / kPanelVectors * s.d * kPanel, kPanel, s.d);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store_dense(exp2_bounded(acc[r][v] * factor), s.scores + (r0 + r) * s.width + (v0 + v) * kLanes);
  }
};

__attribute__((noinline)) void plain_gradient(const Sweep& s, float scale, int rows) {
  for_blocks(rows, s.vectors, PlainScores{s, scale * kLog2E});
  for_blocks(rows, s.vectors, PlainGradient{s});
}

__attribute__((noinline)) void wide_gradient(const Sweep& s, float scale, int rows) {
  product(s.q_tile.data, s.q_tile.row, packed(s.k_transposed, s.d), s.d, scale, s.scores, s.width, rows, s.vectors);
  const int64_t last = (s.vectors - 1) * kLanes;
  for (int i = 0; i < rows; ++i) {
    float* x = s.scores + i * s.width;
    float* p = s.other + i * s.width;
    store_dense(s.inside > 0 ? load_dense(x + last) : splat<VecF>(kNothing), x + last);
    float peak = kNothing;
    for (int64_t j = 0; j < s.columns.count; ++j) peak = softmax_peak(x[j], peak);
    const float shift = softmax_shift(peak);
    VecF sum{};
    for (int64_t v = 0; v <= last; v += kLanes) {
      const VecF y = exp_exact(load_dense(x + v) - shift);
      store_dense(y, p + v);
      sum += y;
    }
    const float inverse = softmax_inverse(lane_sum(sum));
    for (int64_t v = 0; v <= last; v += kLanes) {
      store_dense(load_dense(p + v) * inverse, p + v);
      const VecF y = exp_exact(load_dense(x + v) - load_dense(s.column_shift + v));
      store_dense(y * load_dense(s.column_inverse + v), x + v);
    }
  }
  for_blocks(rows, s.vectors, WideGradient<true>{s});
  for_blocks(rows, s.vectors, WideGradient<false>{s});
}

// mean_row of a tile, and in plain splits a = e^-lse into it and into dO_q.
BTI_FAST_INLINE void row_factors(Sweep& s, const TileTokens& tokens, const float* lse) {
  const int64_t row = s.e + kPadding;
  for (int i = 0; i < tokens.rows(); ++i) {
    float* g = s.grad + i * row;
    VecF dot{};
    if (i < tokens.count)
      for (int64_t c = 0; c < s.e; c += kLanes) dot += load_dense(g + c) * load_dense(s.out_tile.data + i * s.out_tile.row + c);
    s.row_mean[i] = s.columns.count == 1 ? 0.0f : lane_sum(dot);
    if (!s.plain || i >= tokens.count) continue;
    const VecF a = exp2_bounded(splat<VecF>(lse[tokens.first + tokens.index[i]] * -kLog2E));
    s.row_mean[i] *= a[0];
    for (int64_t c = 0; c < s.e; c += kLanes) store_dense(load_dense(g + c) * a, g + c);
  }
}

bool plain_columns(const Columns& columns, const float* lse) {
  bool plain = true;
  for (int64_t j = 0; j < columns.count; ++j) plain &= plain_lse(lse[columns.index[j]], kPlainColumn);
  return plain;
}

bool plain_rows(const MaskView& mask, int64_t batch, int64_t first, int64_t end, const float* lse) {
  bool plain = true;
  for (int64_t i = first; i < end; ++i)
    plain &= plain_lse(lse[i], kPlainRow) || (mask.data != nullptr && !mask.data[batch * mask.batch + i * mask.token]);
  return plain;
}

template <typename T>
void pack_class_side(const CrossBackward& job, Sweep& s, int64_t batch, int64_t head, const float* lse, float* rows,
                     float* outs) {
  const int64_t count = s.columns.count, d = s.d, e = s.e;
  gather(at<const T>(job.k, batch, head), job.k, s.columns, d, 1.0f, rows);
  pack_transposed(rows, count, d, s.k_transposed);
  pack(rows, count, d, s.k);
  gather(at<const T>(job.v_k, batch, head), job.v_k, s.columns, e, 1.0f, rows);
  pack_transposed(rows, count, e, s.v_transposed);
  if (count == 1)  // a softmax over one token is constant: its gradient is exactly zero
    for (int64_t c = 0; c < e * kPanel; ++c) s.v_transposed[c] = 0.0f;
  gather(at<const T>(job.grad_out_k, batch, head), job.grad_out_k, s.columns, e, 1.0f, rows);
  gather(at<const T>(job.out_k, batch, head), job.out_k, s.columns, e, 1.0f, outs);
  for (int64_t j = 0; j < s.vectors * kLanes; ++j) s.column_mean[j] = s.column_shift[j] = s.column_inverse[j] = 0.0f;
  const bool exact = job.column_exact != nullptr && !plain_columns(s.columns, lse);
  const float* peak = exact ? job.column_exact + (batch * job.shape.heads + head) * 2 * job.shape.m : nullptr;
  for (int64_t j = 0; j < count; ++j) {
    const float whole = lse[s.columns.index[j]];
    const float b = s.plain ? exp_exact(-whole) : 1.0f;
    s.column_shift[j] = softmax_shift(exact ? peak[j] : whole);
    s.column_inverse[j] = exact ? softmax_inverse(peak[job.shape.m + j]) : 1.0f;
    float mean = 0.0f;
    for (int64_t c = 0; c < e; ++c) {
      rows[j * e + c] *= b;
      mean += rows[j * e + c] * outs[j * e + c];
    }
    s.column_mean[j] = mean;
  }
  pack_transposed(rows, count, e, s.grad_transposed);
  pack(rows, count, e, s.grad_panels);
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
  s.inside = lanes_before(count, (s.vectors - 1) * kLanes);
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
  s.column_shift = arena.take(s.width);
  s.column_inverse = arena.take(s.width);
  s.sum_k = arena.take(d * s.width);
  s.sum_v = arena.take(e * s.width);
  for (int64_t j = 0; j < d * s.width; ++j) s.sum_k[j] = 0.0f;
  for (int64_t j = 0; j < e * s.width; ++j) s.sum_v[j] = 0.0f;

  const float* row_lse = job.row_lse + index * shape.n;
  const float* column_lse = job.column_lse + index * m;
  s.plain = plain_columns(s.columns, column_lse) && plain_rows(shape.q_mask, batch, first, end, row_lse);
  float* rows = arena.take(count * (d > e ? d : e));
  pack_class_side<T>(job, s, batch, head, column_lse, rows, arena.take(count * e));

  float ones[kTileTokens];
  for (float& one : ones) one = 1.0f;
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
    row_factors(s, tokens, row_lse);
    if (s.plain) {
      plain_gradient(s, shape.scale, tokens.rows());
    } else {
      wide_gradient(s, shape.scale, tokens.rows());
    }
    add_transposed_product(s.grad, v_row, plain(s.plain ? s.scores : s.other, s.width), tokens.count, s.sum_v, s.width,
                           e, s.vectors);
    add_transposed_product(s.q_tile.data, s.q_tile.row, plain(s.gradient, s.width), tokens.count, s.sum_k, s.width, d,
                           s.vectors);
    product(s.scores, s.width, packed(s.grad_panels, count), count, 1.0f, s.out, v_row, tokens.rows(), e / kLanes);
    store_tile(s.out, v_row, tokens, ones, e, grad_v_q, job.grad_v_q);
    product(s.gradient, s.width, packed(s.k, count), count, shape.scale, s.out, q_row, tokens.rows(), d / kLanes);
    store_tile(s.out, q_row, tokens, ones, d, grad_q, job.grad_q);
  }
  float* part = job.partial + task * backward_partial(shape);
  for (int64_t c = 0; c < d; ++c)
    for (int64_t j = 0; j < count; ++j) part[c * m + j] = s.sum_k[c * s.width + j];
  for (int64_t c = 0; c < e; ++c)
    for (int64_t j = 0; j < count; ++j) part[(d + c) * m + j] = s.sum_v[c * s.width + j];
}

template <typename T>
void backward_tasks(const CrossBackward& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) backward_split<T>(job, task, scratch);
}

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

template <typename T>
void combine_heads(const CrossBackward& job, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) combine_head<T>(job, index);
}

}  // namespace

void cross_backward(const CrossBackward& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.shape.dtype) {
    case Dtype::float16: return backward_tasks<Half>(job, begin, end, scratch);
    case Dtype::bfloat16: return backward_tasks<BFloat16>(job, begin, end, scratch);
    default: return backward_tasks<float>(job, begin, end, scratch);
  }
}

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

void cross_backward_combine(const CrossBackward& job, int64_t begin, int64_t end) {
  switch (job.shape.dtype) {
    case Dtype::float16: return combine_heads<Half>(job, begin, end);
    case Dtype::bfloat16: return combine_heads<BFloat16>(job, begin, end);
    default: return combine_heads<float>(job, begin, end);
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
