// cross_attention on CUDA: what passes between the binding and its kernels. Knows neither torch nor CUDA, so that a host
// build can run the kernels.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/host_device.h"
#include "common/online_softmax.h"
#include "common/token_view.h"

namespace bti_fast {

// `vector`: bytes (16 or 4) in which neighbours along the kernel's contiguous axis may be copied, 0 where only single
// elements may.
struct Operand : TokenView {
  int channels, vector;
};

// The dense tokens are cut into splits; a block of threads takes one split of one head. M is taken in blocks of class
// tokens that fit on the chip, one sweep over the split for each.
struct CrossShape {
  int64_t groups;                      // batch * heads
  int heads, n, splits, split_tokens;  // split_tokens is a multiple of the tile
  int m, d, e;
  float scale;
  MaskView q_mask, k_mask;
};

struct CrossForward {
  CrossShape shape;
  Operand q, k, v_q, v_k, out_q, out_k;
  SoftmaxStatistics* statistics;  // (B, h, N + M), of the rows, then of the columns
  float* partial;                 // (B, h, parts, forward_partial)
  float* kept;                    // what tokens gather while their sweeps over blocks of class tokens go on
  int parts;                      // splits * warps that share a class token
};

struct CrossBackward {
  CrossShape shape;
  Operand grad_out_q, grad_out_k, q, k, v_q, v_k, out_q, out_k;
  const SoftmaxStatistics* statistics;
  Operand grad_q, grad_k, grad_v_q, grad_v_k;
  float* partial;  // (B, h, splits, backward_partial)
  float* kept;     // as in CrossForward
  float column_gain, column_gain_inverse;  // weights of a column, about 1 / N, times this keep their digits in float16
};

// The order of the dense side that the kernels keep in shared memory: channel-major where q is a view of maps.
inline bool is_channel_major(const Operand& q) { return q.token == 1 && q.channel != 1; }

// Bytes in which neighbours of a view may be copied; `size` bytes an element.
inline int vector_of(const Operand& x, bool channel_major, int size) {
  if ((channel_major ? x.token : x.channel) == 1) {
    const int64_t strides = x.batch | x.head | (channel_major ? x.channel : x.token);
    for (const int bytes : {16, 4})
      if ((reinterpret_cast<uintptr_t>(x.data) | static_cast<uintptr_t>(strides * size)) % bytes == 0) return bytes;
  }
  return size == 4 ? 4 : 0;
}
inline void set_vectors(CrossForward& job, bool channel_major, int size) {
  for (Operand* x : {&job.q, &job.v_q, &job.out_q}) x->vector = vector_of(*x, channel_major, size);
  for (Operand* x : {&job.k, &job.v_k, &job.out_k}) x->vector = vector_of(*x, false, size);
}
inline void set_vectors(CrossBackward& job, bool channel_major, int size) {
  for (Operand* x : {&job.grad_out_q, &job.q, &job.v_q, &job.out_q, &job.grad_q, &job.grad_v_q})
    x->vector = vector_of(*x, channel_major, size);
  for (Operand* x : {&job.grad_out_k, &job.k, &job.v_k, &job.out_k, &job.grad_k, &job.grad_v_k})
    x->vector = vector_of(*x, false, size);
}

// A power of two by which weights of about 1 / n stay among float16's normal numbers; nothing to do for other dtypes.
inline void set_column_gain(CrossBackward& job, bool is_float16) {
  job.column_gain = 1.0f;
  for (int64_t n = 2; is_float16 && n <= job.shape.n && n <= 1 << 14; n *= 2) job.column_gain *= 2.0f;
  job.column_gain_inverse = 1.0f / job.column_gain;
}

// Floats per part: peak, sum and weighted values of every class token; gradients of k and v_k.
BTI_FAST_HD int64_t forward_partial(const CrossShape& s) { return int64_t{s.m} * (s.e + 2); }
BTI_FAST_HD int64_t backward_partial(const CrossShape& s) { return int64_t{s.m} * (s.d + s.e); }

// Where 16 tokens, from `first` on, keep `floats` between sweeps, and how many floats all of them do.
BTI_FAST_HD int64_t kept_offset(const CrossShape& s, int group, int first, int floats) {
  return (int64_t{group} * s.splits * (s.split_tokens / 16) + first / 16) * floats;
}
inline int64_t kept_size(const CrossShape& s, int class_tokens, int floats) {
  return s.m > class_tokens ? s.groups * s.splits * (s.split_tokens / 16) * floats : 0;
}

}  // namespace bti_fast
