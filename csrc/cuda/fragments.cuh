// Matrix products of one warp out of shared memory, in one form for every storage dtype: fragments hold the elements of
// mma.m16n8k16 (see warp.cuh), and for float32 two TF32 products of depth 8 consume the same elements in another order.
#pragma once

#include "cuda/warp.cuh"

namespace bti_fast {

// Two neighbouring elements.
template <typename T> struct PairOf { using type = uint32_t; };
template <> struct PairOf<float> { struct type { float x, y; }; };
template <typename T> using Pair = typename PairOf<T>::type;

template <typename T> struct FragmentA { Pair<T> at[4]; };
template <typename T> struct FragmentB { Pair<T> at[2]; };

template <typename T>
BTI_FAST_DEVICE Pair<T> pair(float x, float y) {
  if constexpr (sizeof(T) == 4) {
    return {x, y};
  } else {
    return pack(T{}, x, y);
  }
}

// Element (row, column) lies at row * pitch + column, or at column * pitch + row.
template <typename T, bool RowMajor>
struct Matrix {
  T* data;
  int pitch;

  BTI_FAST_DEVICE T* at(int row, int column) const {
    return data + (RowMajor ? row * pitch + column : column * pitch + row);
  }
  BTI_FAST_DEVICE Matrix<T, !RowMajor> transposed() const { return {data, pitch}; }
};

// Keeps eight neighbouring rows of a tile in different banks, and their starts on 16 bytes.
constexpr int kPitch = 8;

// x[row .. row + 15, column .. column + 15]
template <typename T, bool RowMajor>
BTI_FAST_DEVICE FragmentA<T> load_a(const Matrix<T, RowMajor>& x, int row, int column) {
  FragmentA<T> out;
  const int lane = thread_index() & 31;
  if constexpr (sizeof(T) == 4) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + g + (i & 1) * 8, c = column + 2 * t + (i >> 1) * 8;
      out.at[i] = {*x.at(r, c), *x.at(r, c + 1)};
    }
  } else {
    const int i = lane >> 3, j = lane & 7;
    const int r = row + (i & 1) * 8, c = column + (i >> 1) * 8;
    load_matrices<!RowMajor>(RowMajor ? x.at(r + j, c) : x.at(r, c + j), out.at);
  }
  return out;
}

// x[row .. row + 15, column .. column + 15] as two operands of eight columns each
template <typename T, bool RowMajor>
BTI_FAST_DEVICE void load_b(const Matrix<T, RowMajor>& x, int row, int column, FragmentB<T> (&out)[2]) {
  const int lane = thread_index() & 31;
  if constexpr (sizeof(T) == 4) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + 2 * t + (i & 1) * 8, c = column + g + (i >> 1) * 8;
      out[i >> 1].at[i & 1] = {*x.at(r, c), *x.at(r + 1, c)};
    }
  } else {
    const int i = lane >> 3, j = lane & 7;
    const int r = row + (i & 1) * 8, c = column + (i >> 1) * 8;
    uint32_t loaded[4];
    load_matrices<RowMajor>(RowMajor ? x.at(r + j, c) : x.at(r, c + j), loaded);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k >> 1].at[k & 1] = loaded[k];
  }
}

// TF32 parts of a float32 operand: x = big + small to 2^-22.
template <int N>
BTI_FAST_DEVICE void split_tf32(const float (&x)[N], float (&big)[N], float (&small)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    big[i] = round_tf32(x[i]);
    small[i] = round_tf32(x[i] - big[i]);
  }
}

// main += big parts, rest += everything else but the product of the small parts.
BTI_FAST_DEVICE void multiply_float(float (&main)[4], float (&rest)[4], const FragmentA<float>& a,
                                    const FragmentB<float>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto &low = a.at[2 * half], &high = a.at[2 * half + 1], &column = b.at[half];
    const float whole_a[4] = {low.x, high.x, low.y, high.y}, whole_b[2] = {column.x, column.y};
    float big_a[4], small_a[4], big_b[2], small_b[2];
    split_tf32(whole_a, big_a, small_a);
    split_tf32(whole_b, big_b, small_b);
    multiply_add_tf32(rest, small_a, big_b);
    multiply_add_tf32(rest, big_a, small_b);
    multiply_add_tf32(main, big_a, big_b);
  }
}

// c += a b
template <typename T>
BTI_FAST_DEVICE void multiply(float (&c)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 4) {
    multiply_float(c, c, a, b);
  } else {
    multiply_add(T{}, c, a.at, b.at);
  }
}

// A sum of products in which infinity times a finite number stays infinity: for float32 the corrections, which make
// NaN of infinities, are summed apart.
template <typename T>
struct Score {
  float main[4] = {}, rest[4] = {};

  BTI_FAST_DEVICE void add(const FragmentA<T>& a, const FragmentB<T>& b) {
    if constexpr (sizeof(T) == 4) {
      multiply_float(main, rest, a, b);
    } else {
      multiply_add(T{}, main, a.at, b.at);
    }
  }
  BTI_FAST_DEVICE float value(int i) const {
    if constexpr (sizeof(T) == 4) {
      return main[i] - main[i] == 0.0f ? main[i] + rest[i] : main[i];
    } else {
      return main[i];
    }
  }
};

// Two neighbouring products (16 x 8 each, as accumulated) as the left operand of the next product.
template <typename T>
BTI_FAST_DEVICE FragmentA<T> as_operand(const float (&left)[4], const float (&right)[4]) {
  return {{pair<T>(left[0], left[1]), pair<T>(left[2], left[3]), pair<T>(right[0], right[1]),
           pair<T>(right[2], right[3])}};
}

// c[2 p], c[2 p + 1] (of 16 x D) += a (16 x 16) x[row .. row + 15, 0 .. D - 1]
template <typename T, bool RowMajor, int Tiles>
BTI_FAST_DEVICE void multiply_row(float (&c)[Tiles][4], const FragmentA<T>& a, const Matrix<T, RowMajor>& x, int row) {
#pragma unroll
  for (int p = 0; p < Tiles / 2; ++p) {
    FragmentB<T> b[2];
    load_b(x, row, 16 * p, b);
    multiply(c[2 * p], a, b[0]);
    multiply(c[2 * p + 1], a, b[1]);
  }
}

}  // namespace bti_fast
