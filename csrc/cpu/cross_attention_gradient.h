// Gradient of a tile's scores in the backward sweep of cross_attention (kernels only). With P = e^(s - peak - log_sum) of
// either direction, dS = P_row (dO_q v_k' - mean_row) + P_col (v_q dO_k' - mean_col), mean = sum over channels of dO * O.
// Ordinary log-sum-exps ("plain" splits): with E = e^s, a = e^-lse_row and b = e^-lse_col, P_row = a E and P_col = b E;
// a goes into dO_q and mean_row, b into dO_k and mean_col, so that one exponential and one chain of products give
//   dS = E ((a dO_q) v_k' + v_q (b dO_k)' - a mean_row - b mean_col).
// Other splits ("wide") form both P.
#pragma once

#include "cpu/cross_attention_few.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

struct Sweep {
  int64_t d, e, width, vectors;
  Columns columns;
  bool plain, few;                         // few: plain, and of few columns
  float *scores, *other, *gradient;        // E or P_col, P_row, dS [tokens, width], or [columns, tokens] where few
  float *q, *v, *grad, *out;               // copies of tiles [tokens, d or e + kPadding]
  Tile q_tile, v_tile, out_tile;
  float *k_rows, *v_rows, *grad_rows;      // of the class side; dO_k times b in plain splits
  float *k_transposed, *k, *v_transposed;  // panels of them
  float *grad_transposed, *grad_panels;
  float *column_mean;                      // mean_col, times b in plain splits
  float *column_peak, *column_log;         // wide splits: P_col = e^(s - peak - log)
  float *sum_k, *sum_v;                    // dk / scale [d, width] and dv_k [e, width], or their transposes where few
  float row_mean[kTileTokens], row_peak[kTileTokens], row_log[kTileTokens];
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

__attribute__((noinline)) inline void plain_gradient(const Sweep& s, float scale, int rows) {
  for_blocks(rows, s.vectors, PlainScores{s, scale * kLog2E});
  for_blocks(rows, s.vectors, PlainGradient{s});
}

__attribute__((noinline)) inline void wide_gradient(const Sweep& s, float scale, int rows) {
  product(s.q_tile.data, s.q_tile.row, packed(s.k_transposed, s.d), s.d, {&scale, 0}, s.scores, s.width, rows,
          s.vectors);
  for (int i = 0; i < rows; ++i) {
    float* x = s.scores + i * s.width;
    float* p = s.other + i * s.width;
    for (int64_t v = 0; v < s.vectors * kLanes; v += kLanes) {
      const VecF score = load_dense(x + v);
      store_dense(exp_exact((score - s.row_peak[i]) - s.row_log[i]), p + v);
      store_dense(exp_exact((score - load_dense(s.column_peak + v)) - load_dense(s.column_log + v)), x + v);
    }
  }
  for_blocks(rows, s.vectors, WideGradient<true>{s});
  for_blocks(rows, s.vectors, WideGradient<false>{s});
}

// mean_row of a tile and the peaks and logarithms of its rows; in plain splits a = e^-lse goes into mean_row and dO_q. In
// others it is added up as accumulate() adds up dO_q v_k', of which it is subtracted: where a softmax has chosen one
// token, the difference is an exact zero, and no rounding stays to be multiplied by large tokens.
BTI_FAST_INLINE void row_factors(Sweep& s, const TileTokens& tokens, const SoftmaxStatistics* statistics) {
  const int64_t row = s.e + kPadding;
  for (int i = 0; i < tokens.rows(); ++i) {
    float* g = s.grad + i * row;
    const float* out = s.out_tile.data + i * s.out_tile.row;
    float mean = 0.0f;
    if (i < tokens.count && s.plain) {
      VecF dot{};
      for (int64_t c = 0; c < s.e; c += kLanes) dot += load_dense(g + c) * load_dense(out + c);
      mean = lane_sum(dot);
    } else if (i < tokens.count) {
      for (int64_t c = 0; c < s.e; ++c) mean += g[c] * out[c];
    }
    s.row_mean[i] = s.columns.count == 1 ? 0.0f : mean;
    const SoftmaxStatistics own = i < tokens.count ? statistics[tokens.first + tokens.index[i]] : SoftmaxStatistics{};
    s.row_peak[i] = own.peak;
    s.row_log[i] = softmax_log(own.log_sum);
    if (!s.plain || i >= tokens.count) continue;
    const VecF a = exp2_bounded(splat<VecF>(log_sum_exp(own) * -kLog2E));
    s.row_mean[i] *= a[0];
    for (int64_t c = 0; c < s.e; c += kLanes) store_dense(load_dense(g + c) * a, g + c);
  }
}

// Where columns are few: dS [columns, tokens], times scale too in `scores`, and the sums that it and P_row belong to.
// P_col / b is left in `other`.
__attribute__((noinline)) inline void few_gradient(Sweep& s, float scale, const TileTokens& tokens,
                                                   const SoftmaxStatistics* statistics) {
  const int64_t count = s.columns.count, d = s.d, e = s.e;
  const int rows = tokens.rows();
  const Tile grad{s.grad, e + kPadding};
  const bool alone = count == 1;  // a softmax over one token is constant: its gradient is exactly zero
  float by_row[kTileTokens], by_column[kTileTokens];
  for (int i = 0; i < tokens.count; ++i) s.row_log[i] = log_sum_exp(statistics[tokens.first + tokens.index[i]]);
  if (!alone) dots(grad, s.out_tile, e, rows, s.row_mean);
  for (int64_t j = 0; j < count; ++j) {
    float *score = s.scores + j * kTileTokens, *weight = s.other + j * kTileTokens, *ds = s.gradient + j * kTileTokens;
    dots(s.q_tile, {s.k_rows + j * d, 0}, d, rows, score);
    dots(s.v_tile, {s.grad_rows + j * e, 0}, e, rows, by_column);
    if (!alone) dots(grad, {s.v_rows + j * e, 0}, e, rows, by_row);
    for (int i = 0; i < rows; i += kLanes) {
      const VecI inside = lanes_before(tokens.count, i) > 0;
      const VecF y = inside ? exp2_bounded(load_dense(score + i) * (scale * kLog2E)) : VecF{};
      const VecF a = exp2_bounded(load_dense(s.row_log + i) * -kLog2E);
      VecF sum = load_dense(by_column + i) - s.column_mean[j];
      if (!alone) sum += a * (load_dense(by_row + i) - load_dense(s.row_mean + i));
      const VecF gradient = inside ? y * sum : VecF{};
      store_dense(inside ? y * a : VecF{}, by_column + i);
      store_dense(y, weight + i);
      store_dense(gradient, ds + i);
      store_dense(gradient * scale, score + i);
    }
    add_weighted(by_column, grad, e, rows, s.sum_v + j * e);
    add_weighted(ds, s.q_tile, d, rows, s.sum_k + j * d);
  }
}

template <typename T>
void pack_class_side(const CrossBackward& job, Sweep& s, int64_t batch, int64_t head,
                     const SoftmaxStatistics* statistics, float* outs) {
  const int64_t count = s.columns.count, d = s.d, e = s.e;
  gather(at<const T>(job.k, batch, head), job.k, s.columns, d, s.k_rows);
  gather(at<const T>(job.v_k, batch, head), job.v_k, s.columns, e, s.v_rows);
  gather(at<const T>(job.grad_out_k, batch, head), job.grad_out_k, s.columns, e, s.grad_rows);
  gather(at<const T>(job.out_k, batch, head), job.out_k, s.columns, e, outs);
  for (int64_t j = 0; j < s.vectors * kLanes; ++j) s.column_mean[j] = s.column_peak[j] = s.column_log[j] = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    const SoftmaxStatistics& own = statistics[s.columns.index[j]];
    s.column_peak[j] = own.peak;
    s.column_log[j] = softmax_log(own.log_sum);
    const float b = s.plain ? exp_exact(-log_sum_exp(own)) : 1.0f;
    float mean = 0.0f;
    for (int64_t c = 0; c < e; ++c) {
      s.grad_rows[j * e + c] *= b;
      mean += s.grad_rows[j * e + c] * outs[j * e + c];
    }
    s.column_mean[j] = mean;
  }
  if (s.few) return;
  pack_transposed(s.k_rows, count, d, s.k_transposed);
  pack(s.k_rows, count, d, s.k);
  pack_transposed(s.v_rows, count, e, s.v_transposed);
  if (count == 1)  // a softmax over one token is constant: its gradient is exactly zero
    for (int64_t c = 0; c < e * kPanel; ++c) s.v_transposed[c] = 0.0f;
  pack_transposed(s.grad_rows, count, e, s.grad_transposed);
  pack(s.grad_rows, count, e, s.grad_panels);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
