// cross_attention on the CPU: what passes between the binding and its kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/online_softmax.h"
#include "common/token_view.h"
#include "cpu/isa_dispatch.h"

namespace bti_fast {

// The dense tokens are cut into splits that depend on their number alone, so results do not depend on threads.
struct CrossShape {
  Dtype dtype;
  int64_t batch, heads, n, m, d, e;
  int64_t splits, split_tokens;  // split_tokens is a multiple of kTileTokens
  float scale;
  MaskView q_mask, k_mask;
};

constexpr int64_t kTileTokens = 48;
constexpr int64_t kPadding = 16;  // between rows of scratch matrices: keeps them out of the same cache sets

struct CrossForward {
  CrossShape shape;
  TokenView q, k, v_q, v_k, out_q, out_k;
  SoftmaxStatistics* statistics;  // (B, h, N + M), of the rows, then of the columns
  float* partial;                 // (B, h, splits, forward_partial)
};

struct CrossBackward {
  CrossShape shape;
  TokenView grad_out_q, grad_out_k, q, k, v_q, v_k, out_q, out_k;
  const SoftmaxStatistics* statistics;
  TokenView grad_q, grad_k, grad_v_q, grad_v_k;
  float* partial;  // (B, h, splits, backward_partial)
};

// Log-sum-exps for which exponentials relative to 0 lose nothing: they stay below e^60, and what drops off their lower
// end, e^-87, is nothing beside e^-40. Other weights need an exponential of each direction, relative to its own peak.
constexpr float kPlainLow = -40.0f, kPlainRow = 40.0f, kPlainColumn = 60.0f;
inline float log_sum_exp(const SoftmaxStatistics& of) { return of.peak + of.log_sum; }
inline bool is_plain(const SoftmaxStatistics& of, float high) {
  return log_sum_exp(of) >= kPlainLow && log_sum_exp(of) <= high;
}

// Up to so many class tokens, the lanes of a vector are dense tokens.
constexpr int64_t kFewColumns = 4;

inline int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

// Floats per split: peak, sum and weighted values of every column; gradients of k and v_k.
inline int64_t forward_partial(const CrossShape& s) { return s.m * (s.e + 2); }
inline int64_t backward_partial(const CrossShape& s) { return s.m * (s.d + s.e); }

// Floats of scratch that one thread needs: tiles of tokens and of scores, packed class side, sums over tokens.
inline int64_t cross_scratch(const CrossShape& s) {
  const int64_t width = padded(s.m) + kPadding, channels = padded(s.d) + padded(s.e);
  return kTileTokens * (3 * width + 3 * channels + 8 * kPadding) + padded(s.m) * 6 * channels + 2 * channels * width +
         8 * width + 8 * kTileTokens + 1024;
}

// Tasks are (batch, head, split), the last fastest; combining is done per (batch, head).
BTI_FAST_KERNEL(void, cross_forward, (const CrossForward& job, int64_t begin, int64_t end, float* scratch))
BTI_FAST_KERNEL(void, cross_forward_combine, (const CrossForward& job, int64_t begin, int64_t end))
BTI_FAST_KERNEL(void, cross_backward, (const CrossBackward& job, int64_t begin, int64_t end, float* scratch))
BTI_FAST_KERNEL(void, cross_backward_combine, (const CrossBackward& job, int64_t begin, int64_t end))

}  // namespace bti_fast
