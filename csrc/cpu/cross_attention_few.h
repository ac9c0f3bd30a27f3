// Products of cross_attention for so few class tokens that they would leave most lanes of a vector empty: there the
// lanes are dense tokens where the result is a score, and channels elsewhere (kernels only).
#pragma once

#include "cpu/cross_attention_tile.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// out[i] = sum over channels of a[i] b[i]; b may have rows 0 apart. Writes whole vectors of tokens: those past `rows`
// repeat the last.
inline void dots(Tile a, Tile b, int64_t channels, int rows, float* out) {
  for (int first = 0; first < rows; first += kLanes) {
    VecF part[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int at = first + i < rows ? first + i : rows - 1;
      const float *x = a.data + at * a.row, *y = b.data + at * b.row;
      part[i] = load_dense(x) * load_dense(y);
      for (int64_t c = kLanes; c < channels; c += kLanes) part[i] += load_dense(x + c) * load_dense(y + c);
    }
    transpose(part);
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < step; ++i) part[i] += part[i + step];
    store_dense(part[0], out + first);
  }
}

template <int V>
BTI_FAST_INLINE void add_weighted_rows(const float* weight, const float* a, int64_t row, int rows, float* sum) {
  VecF even[V]{}, odd[V]{};  // two, or every addition would wait for the one before
  for (int i = 0; i < rows; i += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      even[v] += weight[i] * load_dense(a + i * row + v * kLanes);
      odd[v] += weight[i + 1] * load_dense(a + (i + 1) * row + v * kLanes);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    float* p = sum + v * kLanes;
    store_dense(load_dense(p) + (even[v] + odd[v]), p);
  }
}

// sum[c] += sum over rows of weight[i] a[i][c]; rows is even, channels a multiple of 16.
inline void add_weighted(const float* weight, Tile a, int64_t channels, int rows, float* sum) {
  for (int64_t c = 0; c < channels;) {
    const int64_t left = (channels - c) / kLanes;
    if (left >= 4) {
      add_weighted_rows<4>(weight, a.data + c, a.row, rows, sum + c);
      c += 4 * kLanes;
    } else if (left >= 2) {
      add_weighted_rows<2>(weight, a.data + c, a.row, rows, sum + c);
      c += 2 * kLanes;
    } else {
      add_weighted_rows<1>(weight, a.data + c, a.row, rows, sum + c);
      c += kLanes;
    }
  }
}

// out[i][c] = sum over count of weight[j][i] b[j][c]; weight is [count, kTileTokens], b is [count, channels].
inline void mix(const float* weight, const float* b, int64_t count, int64_t channels, int rows, float* out,
                int64_t out_row) {
  for (int i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      VecF sum = weight[i] * load_dense(b + c);
      for (int64_t j = 1; j < count; ++j) sum += weight[j * kTileTokens + i] * load_dense(b + j * channels + c);
      store_dense(sum, out + i * out_row + c);
    }
  }
}

// The same into an operand, through `copy` where that has not the form of a tile.
template <typename T>
void mix_into(const float* weight, const float* b, int64_t count, int64_t channels, const TileTokens& tokens, T* to,
              const TokenView& view, float* copy) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (view.channel == 1 && tokens.whole)
      return mix(weight, b, count, channels, tokens.count, to + tokens.first * view.token, view.token);
  }
  mix(weight, b, count, channels, tokens.count, copy, channels + kPadding);
  store_tile(copy, channels + kPadding, tokens, channels, to, view);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
