// Tiles of tokens between global and shared memory. A tile is [tokens, channels] with rows of D + kPitch elements, or
// [channels, tokens] with rows of Tokens + kPitch where the operand is channel-major: either way it keeps its order.
#pragma once

#include "cuda/cross_attention.h"
#include "cuda/fragments.cuh"

namespace bti_fast {

template <typename T, bool ChannelMajor, int D, int Tokens>
struct Tile {
  static constexpr int pitch = (ChannelMajor ? Tokens : D) + kPitch;
  static constexpr int elements = (ChannelMajor ? D : Tokens) * pitch;
  static constexpr int bytes = elements * static_cast<int>(sizeof(T));

  // As the matrix (token, channel).
  static BTI_FAST_DEVICE Matrix<T, !ChannelMajor> matrix(T* data) { return {data, pitch}; }
};

// One head of an operand.
template <typename T>
struct Head {
  T* data;
  int64_t token, channel;
  int channels, vector;
};
template <typename T>
BTI_FAST_DEVICE Head<T> head_of(const Operand& view, int64_t batch, int64_t head) {
  return {static_cast<T*>(view.data) + batch * view.batch + head * view.head, view.token, view.channel, view.channels,
          view.vector};
}

// Which tokens take part.
struct TokenMask {
  const bool* data;
  int64_t stride;

  BTI_FAST_DEVICE bool operator()(int token) const { return data == nullptr || data[token * stride]; }
};
BTI_FAST_DEVICE TokenMask mask_of(const MaskView& mask, int64_t batch) {
  return {mask.data == nullptr ? nullptr : mask.data + batch * mask.batch, mask.token};
}
BTI_FAST_DEVICE int taking_part(const TokenMask& mask, int tokens) {
  int count = 0;
#pragma unroll 1
  for (int i = 0; i < tokens; ++i) count += mask(i) ? 1 : 0;
  return count;
}

template <int Bytes, typename T, bool RowMajor>
BTI_FAST_DEVICE void load_vectors(const Matrix<T, RowMajor>& tile, const Head<const T>& from, int rows, int columns,
                                  int first, int count, const TokenMask& mask, int thread, int threads) {
  constexpr int width = Bytes / static_cast<int>(sizeof(T));
  const int pieces = columns / width;
#pragma unroll 1
  for (int i = thread; i < rows * pieces; i += threads) {
    const int row = i / pieces, column = i % pieces * width;
    const int token = RowMajor ? row : column, channel = RowMajor ? column : row;
    bool ok = token < count && channel < from.channels;
    if (RowMajor) ok = ok && mask(first + token);
    const int tokens = RowMajor ? width : (count - token < width ? count - token : width);
    copy_async<Bytes>(tile.at(token, channel),
                      ok ? from.data + int64_t{first + token} * from.token + channel * from.channel : from.data,
                      ok ? tokens * static_cast<int>(sizeof(T)) : 0);
  }
}

template <typename T>
BTI_FAST_DEVICE T zero() {
  T x;
  narrow(0.0f, x);
  return x;
}

// Tokens [first, first + count) of a head into a tile of `tokens` by D; zeros for what is masked or beyond the operand.
// Done after copy_wait and a barrier.
template <int D, typename T, bool RowMajor>
BTI_FAST_DEVICE void load_tile(const Matrix<T, RowMajor>& tile, const Head<const T>& from, int tokens, int first,
                               int count, const TokenMask& mask, int thread, int threads) {
  const int rows = RowMajor ? tokens : D, columns = RowMajor ? D : tokens;
  if (from.vector == 16 && (RowMajor || mask.data == nullptr)) {
    load_vectors<16>(tile, from, rows, columns, first, count, mask, thread, threads);
  } else if (from.vector == 4 && (RowMajor || mask.data == nullptr)) {
    load_vectors<4>(tile, from, rows, columns, first, count, mask, thread, threads);
  } else {
    const bool along_tokens = from.token < from.channel;  // neighbours in memory to neighbouring threads
    const int inner = along_tokens ? tokens : D;
#pragma unroll 1
    for (int i = thread; i < tokens * D; i += threads) {
      const int token = along_tokens ? i % inner : i / inner, channel = along_tokens ? i / inner : i % inner;
      const bool ok = token < count && channel < from.channels && mask(first + token);
      *tile.at(token, channel) = ok ? from.data[int64_t{first + token} * from.token + channel * from.channel] : zero<T>();
    }
  }
}

// A warp's own 16 tokens, from row `own` of the tile on, to tokens [first, first + count) of a head.
template <int D, typename T, bool RowMajor>
BTI_FAST_DEVICE void store_rows(const Matrix<T, RowMajor>& tile, int own, const Head<T>& to, int first, int count) {
  const int lane = thread_index() & 31;
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  if (to.vector == 16 && (RowMajor || count == 16)) {
    const int pieces = (RowMajor ? D : 16) / width;
#pragma unroll 1
    for (int i = lane; i < (RowMajor ? 16 : D) * pieces; i += 32) {
      const int row = i / pieces, column = i % pieces * width;
      const int token = RowMajor ? row : column, channel = RowMajor ? column : row;
      if (token < count && channel < to.channels)
        *reinterpret_cast<Pack<T, width>*>(to.data + int64_t{first + token} * to.token + channel * to.channel) =
            *reinterpret_cast<const Pack<T, width>*>(tile.at(own + token, channel));
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < 16 * D; i += 32) {
      const int token = to.token < to.channel ? i % 16 : i / D, channel = to.token < to.channel ? i / 16 : i % D;
      if (token < count && channel < to.channels)
        to.data[int64_t{first + token} * to.token + channel * to.channel] = *tile.at(own + token, channel);
    }
  }
}

// Element i of an accumulator tile of 16 x 8: its row is g + 8 (i / 2), its column 2t + i % 2.
BTI_FAST_DEVICE int accumulator_row(int i) { return ((thread_index() & 31) >> 2) + (i >> 1) * 8; }
BTI_FAST_DEVICE int accumulator_column(int i) { return (thread_index() & 3) * 2 + (i & 1); }

// Writes accumulated values, each times its row's factor, to the warp's 16 rows of a tile.
template <typename T, bool RowMajor, int Tiles>
BTI_FAST_DEVICE void put_rows(const Matrix<T, RowMajor>& tile, int own, const float (&c)[Tiles][4],
                              const float (&factor)[2]) {
#pragma unroll
  for (int p = 0; p < Tiles; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      narrow(c[p][i] * factor[i >> 1], *tile.at(own + accumulator_row(i), 8 * p + accumulator_column(i)));
  }
}

// Accumulators that wait in global memory for the next class tokens: every lane finds its own again.
template <int Tiles>
BTI_FAST_DEVICE void keep(float* memory, const float (&c)[Tiles][4]) {
#pragma unroll
  for (int p = 0; p < Tiles; ++p)
    *reinterpret_cast<Pack<float, 4>*>(memory + 4 * (32 * p + (thread_index() & 31))) =
        {{c[p][0], c[p][1], c[p][2], c[p][3]}};
}
template <int Tiles>
BTI_FAST_DEVICE void recall(const float* memory, float (&c)[Tiles][4]) {
#pragma unroll
  for (int p = 0; p < Tiles; ++p) {
    const auto pack = *reinterpret_cast<const Pack<float, 4>*>(memory + 4 * (32 * p + (thread_index() & 31)));
#pragma unroll
    for (int i = 0; i < 4; ++i) c[p][i] = pack.at[i];
  }
}

// Sum over the four lanes that share a row of an accumulator.
BTI_FAST_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace bti_fast
