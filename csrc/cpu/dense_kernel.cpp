// Products of weight matrices with a few vectors (one per sample): each weight is read once for all samples.
#include "cpu/rows.h"
#include "cpu/task_interaction_algebra.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;

// Dot products of R matrix rows with S samples.
template <int R, int S>
BTI_FAST_INLINE void dots(const DenseProduct& product, int64_t row, int64_t b) {
  const float* m = product.matrix + row * product.cols;
  const float* v = product.v + b * product.v_stride;
  VecF acc[R][S]{};
  const auto block = [&](int64_t i, int left) {
    VecF a[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r] = load_first(m + r * product.cols + i, left);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const VecF x = load_first(v + s * product.v_stride + i, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][s] += a[r] * x;
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= product.cols; i += kLanes) block(i, kLanes);
  if (i < product.cols) block(i, lanes_left(product.cols - i));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
      product.out[(b + s) * product.rows + row + r] =
          lane_sum(acc[r][s]) + (product.bias ? product.bias[row + r] : 0.0f);
}

// out[b, columns c ..] of S samples: sum over rows of v[b, row] matrix[row, c ..].
template <int S>
BTI_FAST_INLINE void weighted_rows(const DenseProduct& product, int64_t c, int left, int64_t b) {
  const float* m = product.matrix + c;
  const float* v = product.v + b * product.v_stride;
  VecF acc[S]{};
  for (int64_t row = 0; row < product.rows; ++row) {
    const VecF a = load_first(m + row * product.cols, left);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) acc[s] += a * v[s * product.v_stride + row];
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) store_first(acc[s], product.out + (b + s) * product.cols + c, left);
}

// Calls run(product, unit) for the units [begin, end) of consecutive products.
template <bool Columns, typename Product, typename Run>
void for_units(const Product* product, int64_t begin, int64_t end, const Run& run) {
  int64_t first = 0;
  for (int64_t unit = begin; unit < end;) {
    const int64_t units = dense_units(Columns ? product->cols : product->rows);
    if (unit - first >= units) {
      first += units;
      ++product;
      continue;
    }
    run(*product, (unit - first) * kDenseUnit);
    ++unit;
  }
}

}  // namespace

void dense_rows(const DenseProduct* products, int64_t batch, int64_t begin, int64_t end) {
  for_units<false>(products, begin, end, [&](const DenseProduct& product, int64_t row) {
    const int64_t stop = row + kDenseUnit < product.rows ? row + kDenseUnit : product.rows;
    for (; row + 2 <= stop; row += 2) {
      int64_t b = 0;
      for (; b + 4 <= batch; b += 4) dots<2, 4>(product, row, b);
      for (; b < batch; ++b) dots<2, 1>(product, row, b);
    }
    for (; row < stop; ++row)
      for (int64_t b = 0; b < batch; ++b) dots<1, 1>(product, row, b);
  });
}

void dense_columns(const DenseProduct* products, int64_t batch, int64_t begin, int64_t end) {
  for_units<true>(products, begin, end, [&](const DenseProduct& product, int64_t first) {
    const int64_t stop = first + kDenseUnit < product.cols ? first + kDenseUnit : product.cols;
    for (int64_t c = first; c < stop; c += kLanes) {
      const int left = lanes_left(stop - c);
      int64_t b = 0;
      for (; b + 8 <= batch; b += 8) weighted_rows<8>(product, c, left, b);
      for (; b + 2 <= batch; b += 2) weighted_rows<2>(product, c, left, b);
      for (; b < batch; ++b) weighted_rows<1>(product, c, left, b);
    }
  });
}

void dense_outer(const DenseOuter* outers, int64_t batch, int64_t begin, int64_t end) {
  for_units<false>(outers, begin, end, [&](const DenseOuter& outer, int64_t row) {
    const int64_t stop = row + kDenseUnit < outer.rows ? row + kDenseUnit : outer.rows;
    for (; row < stop; ++row) {
      for (int64_t c = 0; c < outer.cols; c += kLanes) {
        const int left = lanes_left(outer.cols - c);
        VecF acc{};
        for (int64_t b = 0; b < batch; ++b)
          acc += load_first(outer.v + b * outer.v_stride + c, left) * outer.grad[b * outer.rows + row];
        store_first(acc, outer.grad_matrix + row * outer.cols + c, left);
      }
      if (outer.grad_bias == nullptr) continue;
      float total = 0;
      for (int64_t b = 0; b < batch; ++b) total += outer.grad[b * outer.rows + row];
      outer.grad_bias[row] = total;
    }
  });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
