// Gradient of a tile's scores in the backward sweep of cross_attention (kernels only). With P = e^(s - lse) of either
// direction,   dS = P_row (dO_q v_k' - mean_row) + P_col (v_q dO_k' - mean_col),   mean = sum over channels of dO * O.
// Ordinary log-sum-exps ("plain" splits): with E = e^s, a = e^-lse_row and b = e^-lse_col, P_row = a E and P_col = b E;
// a goes into dO_q and mean_row, b into dO_k and mean_col, so that one exponential and one chain of products give
//   dS = E ((a dO_q) v_k' + v_q (b dO_k)' - a mean_row - b mean_col).
// Other splits ("wide") form both P.
#pragma once

#include "cpu/cross_attention_tile.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

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

__attribute__((noinline)) inline void plain_gradient(const Sweep& s, float scale, int rows) {
  for_blocks(rows, s.vectors, PlainScores{s, scale * kLog2E});
  for_blocks(rows, s.vectors, PlainGradient{s});
}

__attribute__((noinline)) inline void wide_gradient(const Sweep& s, float scale, int rows) {
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

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
