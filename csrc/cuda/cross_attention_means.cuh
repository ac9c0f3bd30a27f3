// What the backward sweep of cross_attention knows of every token's softmax before it meets the other side: peak, logarithm
// of the sum, and mean gradient of the weights, which is the sum over channels of dO * O.
#pragma once

#include "common/online_softmax.h"
#include "cuda/tiles.cuh"

namespace bti_fast {

// What the gradient of a score needs of one softmax, and its weight from the score. Kept in shared memory: registers are
// for the sums over channels.
struct alignas(16) SoftmaxTerms {
  float peak, log2_sum, mean, unused;

  BTI_FAST_DEVICE void set(const SoftmaxStatistics& of) {
    peak = of.peak;
    log2_sum = softmax_log(of.log_sum) * kLog2E;
  }
  BTI_FAST_DEVICE bool takes_part() const { return log2_sum != -kNothing; }
  BTI_FAST_DEVICE float weight(float score) const { return exp2_fast((score - peak) * kLog2E - log2_sum); }
};

// Sum over channels of dO_q * out_q for the warp's tokens: those of rows g and g + 8 of an accumulator. For 16-bit dtypes:
// lanes 2 i and 2 i + 1 take half of the channels of token i.
template <int D, typename T, bool RowMajor>
BTI_FAST_DEVICE void row_means(const Matrix<T, RowMajor>& grad, int own, const Head<const T>& out, int first,
                               int count, float (&mean)[2]) {
  const int lane = thread_index() & 31, token = lane >> 1, begin = (lane & 1) * (D / 2);
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  float sum = 0.0f;
  if (token < count) {
    const T* const from = out.data + int64_t{first + token} * out.token;
    if (RowMajor && out.vector == 16 && D / 2 >= width) {
#pragma unroll
      for (int c = 0; c < D / 2; c += width) {
        if (begin + c < out.channels) {
          const Pack<T, width> pack = *reinterpret_cast<const Pack<T, width>*>(from + begin + c);
#pragma unroll
          for (int i = 0; i < width; ++i) sum += widen(pack.at[i]) * widen(*grad.at(own + token, begin + c + i));
        }
      }
    } else {
#pragma unroll 8
      for (int c = begin; c < begin + D / 2; ++c)
        if (c < out.channels) sum += widen(from[c * out.channel]) * widen(*grad.at(own + token, c));
    }
  }
  sum += shuffle_xor(sum, 1);
  mean[0] = shuffle_from(sum, 2 * (lane >> 2));
  mean[1] = shuffle_from(sum, 2 * (lane >> 2) + 16);
}

// The same sums for float32, as the diagonal of dO (rows of one operand) times O (columns of the other): mma rounds them
// just as the product dO v', of which they are subtracted. Where a softmax has chosen one token, O is that token's v, and
// the difference an exact zero; rounded otherwise, it would stay, times tokens as large as such a choice takes.
struct Diagonal {
  float sum[2][4] = {};

  BTI_FAST_DEVICE void add(const FragmentA<float>& a, const FragmentB<float> (&b)[2]) {
    multiply(sum[0], a, b[0]);
    multiply(sum[1], a, b[1]);
  }
  // Those of rows g and g + 8, which lane 4 g + g / 2 has.
  BTI_FAST_DEVICE void read(float (&mean)[2]) const {
    const int g = (thread_index() & 31) >> 2, lane = 4 * g + g / 2;
    mean[0] = shuffle_from(g & 1 ? sum[0][1] : sum[0][0], lane);
    mean[1] = shuffle_from(g & 1 ? sum[1][3] : sum[1][2], lane);
  }
};

// Channels c and c + 1 of a token in global memory, for c = channel + 2 t: what fragments are made of.
BTI_FAST_DEVICE Pair<float> pair_of(const Head<const float>& from, int token, bool there, int channel) {
  const int c = channel + 2 * (thread_index() & 3);
  const float* const at = from.data + int64_t{token} * from.token + c * from.channel;
  return {there && c < from.channels ? at[0] : 0.0f, there && c + 1 < from.channels ? at[from.channel] : 0.0f};
}

template <int D, bool RowMajor>
BTI_FAST_DEVICE void row_means(const Matrix<float, RowMajor>& grad, int own, const Head<const float>& out, int first,
                               int count, float (&mean)[2]) {
  const int g = (thread_index() & 31) >> 2;
  Diagonal products;
#pragma unroll 1
  for (int c = 0; c < D; c += 16) {
    FragmentB<float> b[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = g + 8 * r;
      b[r] = {{pair_of(out, first + token, token < count, c), pair_of(out, first + token, token < count, c + 8)}};
    }
    products.add(load_a(grad, own, c), b);
  }
  products.read(mean);
}

// Sum over channels of dO_k * out_k for class tokens [first, first + count), by all warps.
template <int D, int ClassTokens, int Warps, typename T>
BTI_FAST_DEVICE void column_means(const Matrix<T, true>& grad, const Head<const T>& out, int first, int count,
                                  SoftmaxTerms* terms) {
  const int warp = thread_index() >> 5, lane = thread_index() & 31;
  if constexpr (sizeof(T) == 4) {
    for (int j = 16 * warp; j < ClassTokens; j += 16 * Warps) {
      Diagonal products;
#pragma unroll 1
      for (int c = 0; c < D; c += 16) {
        FragmentA<float> a;
        FragmentB<float> b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = j + (lane >> 2) + 8 * (i & 1);
          a.at[i] = pair_of(out, first + token, token < count, c + 8 * (i >> 1));
        }
        load_b(grad.transposed(), c, j, b);
        products.add(a, b);
      }
      float own[2];
      products.read(own);
      if ((lane & 3) == 0) {
        terms[j + (lane >> 2)].mean = own[0];
        terms[j + (lane >> 2) + 8].mean = own[1];
      }
    }
  } else {
    for (int j = warp; j < ClassTokens; j += Warps) {
      float sum = 0.0f;
#pragma unroll 1
      for (int c = lane; c < out.channels && j < count; c += 32)
        sum += widen(*grad.at(j, c)) * widen(out.data[int64_t{first + j} * out.token + c * out.channel]);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
      if (lane == 0) terms[j].mean = sum;
    }
  }
}

}  // namespace bti_fast
