// Register-blocked products of small matrices held in scratch memory (kernels only): rows of A are broadcast, rows of
// B are vectors, and what becomes of a finished block is the caller's business.
#pragma once

#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

constexpr int kLanes = VecOf<float>::lanes;
constexpr int kPanelVectors = 2;                     // B is cut into panels of this many vectors
constexpr int kPanel = kPanelVectors * kLanes;       // in columns
constexpr int kBlockRows = kBytes == 64 ? 12 : 6;    // 2 x 12 of 32 registers, or 2 x 6 of 16, accumulate

// B [depth, columns]: panel p starts at data + p * panel, its rows are `row` apart.
struct Panels {
  const float* data;
  int64_t panel, row;
};

// Packed panels of a matrix with this many rows.
BTI_FAST_INLINE Panels packed(const float* data, int64_t depth) { return {data, depth * kPanel, kPanel}; }
// A plain row-major matrix.
BTI_FAST_INLINE Panels plain(const float* data, int64_t row) { return {data, kPanel, row}; }

// Of every row of a result; 0 apart, they are one.
struct Factors {
  const float* data;
  int64_t step;
};

// acc += A B for R rows and V vectors of columns. Transposed: A is held as [depth, rows].
template <bool Transposed, int R, int V>
BTI_FAST_INLINE void accumulate(VecF (&acc)[R][V], const float* a, int64_t a_row, const float* b, int64_t b_row,
                                int64_t depth) {
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) row[r] = a + r * (Transposed ? 1 : a_row);
  for (int64_t l = 0; l < depth; ++l) {
    VecF bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load_dense(b + l * b_row + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VecF x = splat<VecF>(Transposed ? a[l * a_row + r] : row[r][l]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * bv[v];
    }
  }
}

// Calls block(rows, vectors, first_row, first_column) with compile-time sizes until every row and column is covered.
// `rows` is a multiple of 4; `vectors` counts the columns in vectors.
template <typename Block>
BTI_FAST_INLINE void for_blocks(int64_t rows, int64_t vectors, const Block& block) {
  for (int64_t v = 0; v < vectors; v += kPanelVectors) {
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;
      const bool large = left >= kBlockRows && left - kBlockRows != 2;  // 8 rows are 4 + 4, not 6 + 2
      if (large && v + 1 < vectors) {
        block.template run<kBlockRows, 2>(r, v);
      } else if (large) {
        block.template run<kBlockRows, 1>(r, v);
      } else if (v + 1 < vectors) {
        block.template run<4, 2>(r, v);
      } else {
        block.template run<4, 1>(r, v);
      }
      r += large ? kBlockRows : 4;
    }
  }
}

template <bool Transposed, bool Add>
struct ProductInto {
  const float* a;
  int64_t a_row;
  Panels b;
  int64_t depth;
  Factors factor;  // not where it adds
  float* c;
  int64_t c_row;

  template <int R, int V>
  BTI_FAST_INLINE void run(int64_t r0, int64_t v0) const {
    VecF acc[R][V];
    float* out = c + r0 * c_row + v0 * kLanes;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Add ? load_dense(out + r * c_row + v * kLanes) : VecF{};
    accumulate<Transposed>(acc, a + r0 * (Transposed ? 1 : a_row), a_row, b.data + v0 / kPanelVectors * b.panel, b.row,
                           depth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const VecF y = Add ? acc[r][v] : acc[r][v] * factor.data[(r0 + r) * factor.step];
        store_dense(y, out + r * c_row + v * kLanes);
      }
  }
};

// C [rows, vectors] = factor A B, A [rows, depth].
inline __attribute__((noinline)) void product(const float* a, int64_t a_row, Panels b, int64_t depth, Factors factor,
                                              float* c, int64_t c_row, int64_t rows, int64_t vectors) {
  for_blocks(rows, vectors, ProductInto<false, false>{a, a_row, b, depth, factor, c, c_row});
}

// C [rows, vectors] += A' B, A [depth, rows].
inline __attribute__((noinline)) void add_transposed_product(const float* a, int64_t a_row, Panels b, int64_t depth, float* c,
                                                      int64_t c_row, int64_t rows, int64_t vectors) {
  for_blocks(rows, vectors, ProductInto<true, true>{a, a_row, b, depth, {}, c, c_row});
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
