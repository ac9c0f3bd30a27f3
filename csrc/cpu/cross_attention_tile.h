// What the forward and the backward sweep of cross_attention share (kernels only): tiles of tokens in and out of
// scratch memory, packing of the class side, exponential and logarithm.
#pragma once

#include "common/online_softmax.h"
#include "cpu/cross_attention.h"
#include "cpu/exp2.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/transpose.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// e^x for x <= 0, with exact zeros at the lower end and every NaN kept. The difference of two large scores is exact
// where it matters; their logarithms to base 2 would not be.
BTI_FAST_INLINE VecF exp_exact(VecF x) {
  const VecF t = x * kLog2E;
  const VecF y = t < -126.0f ? VecF{} : exp2_bounded(t);
  return x != x ? x : y;
}
BTI_FAST_INLINE float exp_exact(float x) { return exp_exact(splat<VecF>(x))[0]; }

// log(x) for x >= 0; -inf for 0, NaN for NaN.
BTI_FAST_INLINE VecF log_positive(VecF x) {
  VecI exponent = (bits_as<VecI>(x) >> 23) - 127;
  VecF m = bits_as<VecF>((bits_as<VecI>(x) & 0x007fffff) | 0x3f800000);
  const VecI high = m > 1.41421356f;
  m = high ? m * 0.5f : m;
  exponent = exponent - high;
  const VecF n = __builtin_convertvector(exponent, VecF);
  const VecF f = m - 1.0f, f2 = f * f;
  VecF p = splat<VecF>(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VecF log = p * f * f2 + n * -2.12194440e-4f - 0.5f * f2 + f + n * 0.693359375f;
  const VecF finite = x == 0 ? splat<VecF>(kNothing) : log;
  return x < __builtin_inff() ? finite : x;  // NaN and infinity
}
BTI_FAST_INLINE float log_positive(float x) { return log_positive(splat<VecF>(x))[0]; }

// Lanes before `count` (counted from column `first`) hold 1, the others 0.
BTI_FAST_INLINE VecF lanes_before(int64_t count, int64_t first) {
  VecF v{};
  for (int i = 0; i < kLanes; ++i) v[i] = first + i < count ? 1.0f : 0.0f;
  return v;
}

// Hands out pieces of one thread's scratch, each on a cache line.
struct Arena {
  float* next;
  BTI_FAST_INLINE float* take(int64_t count) {
    float* p = next;
    next += (count + 15) / 16 * 16;
    return p;
  }
};

template <typename T>
BTI_FAST_INLINE T* at(const TokenView& view, int64_t batch, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.batch + head * view.head;
}

// The tokens of one tile that take part.
struct TileTokens {
  int64_t first;               // token number of the tile's start
  int count;                   // how many take part
  bool whole;                  // they are consecutive, from `first` on
  int32_t index[kTileTokens];  // their numbers, relative to first

  // Rows of a tile in scratch, zeroed beyond count: products run over whole groups of four.
  BTI_FAST_INLINE int rows() const { return (count + 3) / 4 * 4; }
};

BTI_FAST_INLINE TileTokens tile_tokens(const MaskView& mask, int64_t batch, int64_t first, int64_t end) {
  TileTokens out;
  out.first = first;
  out.count = 0;
  const int span = static_cast<int>(end - first < kTileTokens ? end - first : kTileTokens);
  if (mask.data == nullptr) {
    for (int i = 0; i < kTileTokens; ++i) out.index[i] = i;
    out.count = span;
  }
  for (int i = 0; i < span && mask.data != nullptr; ++i)
    if (mask.data[batch * mask.batch + (first + i) * mask.token]) out.index[out.count++] = i;
  out.whole = out.count == span;
  return out;
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

BTI_FAST_INLINE void transpose_4x4(Four (&x)[4]) {
  const Four a = __builtin_shuffle(x[0], x[1], FourInts{0, 4, 1, 5}), b = __builtin_shuffle(x[0], x[1], FourInts{2, 6, 3, 7});
  const Four c = __builtin_shuffle(x[2], x[3], FourInts{0, 4, 1, 5}), d = __builtin_shuffle(x[2], x[3], FourInts{2, 6, 3, 7});
  x[0] = __builtin_shuffle(a, c, FourInts{0, 1, 4, 5});
  x[1] = __builtin_shuffle(a, c, FourInts{2, 3, 6, 7});
  x[2] = __builtin_shuffle(b, d, FourInts{0, 1, 4, 5});
  x[3] = __builtin_shuffle(b, d, FourInts{2, 3, 6, 7});
}
template <typename T>
BTI_FAST_INLINE Four load_four(const T* p) { return Four{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
template <>
BTI_FAST_INLINE Four load_four(const float* p) {
  Four v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
BTI_FAST_INLINE void store_four(Four v, T* p) {
  for (int i = 0; i < 4; ++i) narrow(v[i], p + i);
}
template <>
BTI_FAST_INLINE void store_four(Four v, float* p) { std::memcpy(p, &v, sizeof(v)); }

// tile [rows, channels] from one head of a dense operand; channels is a multiple of 16.
template <typename T>
void load_tile(const T* from, const TokenView& view, const TileTokens& tokens, int64_t channels, float* tile,
               int64_t row) {
  from += tokens.first * view.token;
  if (view.channel == 1) {
    for (int i = 0; i < tokens.count; ++i) {
      const T* p = from + tokens.index[i] * view.token;
      for (int64_t c = 0; c < channels; c += kLanes) store_dense(load_dense(p + c), tile + i * row + c);
    }
  } else if (view.token == 1 && tokens.whole) {
    int i = 0;
    for (; i + 4 <= tokens.count; i += 4) {
      for (int64_t c = 0; c < channels; c += 4) {
        Four x[4];
        for (int k = 0; k < 4; ++k) x[k] = load_four(from + i + (c + k) * view.channel);
        transpose_4x4(x);
        for (int k = 0; k < 4; ++k) store_four(x[k], tile + (i + k) * row + c);
      }
    }
    for (; i < tokens.count; ++i)
      for (int64_t c = 0; c < channels; ++c) tile[i * row + c] = widen(from[i + c * view.channel]);
  } else {
    for (int i = 0; i < tokens.count; ++i)
      for (int64_t c = 0; c < channels; ++c)
        tile[i * row + c] = widen(from[tokens.index[i] * view.token + c * view.channel]);
  }
  for (int i = tokens.count; i < tokens.rows(); ++i)
    for (int64_t c = 0; c < channels; ++c) tile[i * row + c] = 0.0f;
}

// A tile and the distance of its rows: the operand's own memory where that has the form of a tile, else `copy`.
struct Tile {
  const float* data;
  int64_t row;
};
template <typename T>
BTI_FAST_INLINE Tile tile_of(const T* from, const TokenView& view, const TileTokens& tokens, int64_t channels,
                             float* copy) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (view.channel == 1 && view.token == channels && tokens.whole && tokens.count == tokens.rows())
      return {from + tokens.first * view.token, channels};
  }
  load_tile(from, view, tokens, channels, copy, channels + kPadding);
  return {copy, channels + kPadding};
}

// The other way.
template <typename T>
void store_tile(const float* tile, int64_t row, const TileTokens& tokens, int64_t channels, T* to,
                const TokenView& view) {
  to += tokens.first * view.token;
  if (view.channel == 1) {
    for (int i = 0; i < tokens.count; ++i) {
      T* p = to + tokens.index[i] * view.token;
      for (int64_t c = 0; c < channels; c += kLanes) store_dense(load_dense(tile + i * row + c), p + c);
    }
  } else if (view.token == 1 && tokens.whole) {
    int i = 0;
    for (; i + 4 <= tokens.count; i += 4) {
      for (int64_t c = 0; c < channels; c += 4) {
        Four x[4];
        for (int k = 0; k < 4; ++k) x[k] = load_four(tile + (i + k) * row + c);
        transpose_4x4(x);
        for (int k = 0; k < 4; ++k) store_four(x[k], to + i + (c + k) * view.channel);
      }
    }
    for (; i < tokens.count; ++i)
      for (int64_t c = 0; c < channels; ++c) narrow(tile[i * row + c], to + i + c * view.channel);
  } else {
    for (int i = 0; i < tokens.count; ++i)
      for (int64_t c = 0; c < channels; ++c)
        narrow(tile[i * row + c], to + tokens.index[i] * view.token + c * view.channel);
  }
}

// Asks for the part of the operand that the tile from token `first` on will load or store.
template <typename T>
BTI_FAST_INLINE void prefetch_tile(const T* from, const TokenView& view, int64_t first, int64_t end, int64_t channels) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t last = first + kTileTokens < end ? first + kTileTokens : end;
  if (view.channel == 1) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(from + i * view.token + c);
  } else if (view.token == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = first; i < last; i += line) __builtin_prefetch(from + i + c * view.channel);
  }
}

// Zeros for every token of [first, end) that does not take part.
template <typename T>
void store_masked(const MaskView& mask, int64_t batch, int64_t first, int64_t end, int64_t channels, T* to,
                  const TokenView& view) {
  for (int64_t i = first; i < end; ++i)
    if (!mask.data[batch * mask.batch + i * mask.token])
      for (int64_t c = 0; c < channels; ++c) narrow(0.0f, to + i * view.token + c * view.channel);
}

// Which class tokens take part; M is at most 256.
struct Columns {
  int64_t count;
  int32_t index[256];
};
BTI_FAST_INLINE Columns columns_of(const CrossShape& s, int64_t batch) {
  Columns out;
  out.count = 0;
  for (int64_t j = 0; j < s.m; ++j)
    if (s.k_mask.data == nullptr || s.k_mask.data[batch * s.k_mask.batch + j * s.k_mask.token])
      out.index[out.count++] = static_cast<int32_t>(j);
  return out;
}

// Class-side tokens that take part, as rows [columns.count, channels].
template <typename T>
void gather(const T* from, const TokenView& view, const Columns& columns, int64_t channels, float* out) {
  for (int64_t j = 0; j < columns.count; ++j, out += channels) {
    const T* token = from + columns.index[j] * view.token;
    if (view.channel == 1) {
      for (int64_t c = 0; c < channels; c += kLanes) store_dense(load_dense(token + c), out + c);
    } else {
      for (int64_t c = 0; c < channels; ++c) out[c] = widen(token[c * view.channel]);
    }
  }
}

// Panels of x [count, channels] itself.
BTI_FAST_INLINE void pack(const float* x, int64_t count, int64_t channels, float* out) {
  for (int64_t c0 = 0; c0 < channels; c0 += kPanel)
    for (int64_t j = 0; j < count; ++j, out += kPanel)
      for (int64_t c = 0; c < kPanel; c += kLanes)
        store_dense(c0 + c < channels ? load_dense(x + j * channels + c0 + c) : VecF{}, out + c);
}
// Panels of its transpose [channels, count], zero beyond count.
BTI_FAST_INLINE void pack_transposed(const float* x, int64_t count, int64_t channels, float* out) {
  for (int64_t j0 = 0; j0 < count; j0 += kPanel, out += channels * kPanel)
    for (int64_t j = 0; j < kPanel; j += kLanes)
      for (int64_t c = 0; c < channels; c += kLanes) {
        VecF block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          block[i] = j0 + j + i < count ? load_dense(x + (j0 + j + i) * channels + c) : VecF{};
        transpose(block);
        for (int64_t i = 0; i < kLanes; ++i) store_dense(block[i], out + (c + i) * kPanel + j);
      }
}

// Results of a tile, factor A B with A [rows, depth], straight into an operand; through `copy` where that has not the
// form of a tile.
template <typename T>
BTI_FAST_INLINE void product_into(const float* a, int64_t a_row, Panels b, int64_t depth, Factors factor,
                                  int64_t channels, const TileTokens& tokens, T* to, const TokenView& view,
                                  float* copy) {
  const int64_t vectors = channels / kLanes;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (view.channel == 1 && tokens.whole && tokens.count == tokens.rows())
      return product(a, a_row, b, depth, factor, to + tokens.first * view.token, view.token, tokens.rows(), vectors);
  }
  product(a, a_row, b, depth, factor, copy, channels + kPadding, tokens.rows(), vectors);
  store_tile(copy, channels + kPadding, tokens, channels, to, view);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
