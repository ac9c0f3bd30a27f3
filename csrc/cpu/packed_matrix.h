// The matrix of a separable product, as its kernel reads it.
#pragma once

#include "cpu/dense_floats.h"
#include "cpu/separable_product.h"

namespace bti_fast {

inline const float* packed_matrix(const torch::stable::Tensor& matrix, const char* name, int64_t columns,
                                  int64_t depth) {
  const int64_t panels = (columns + kPackedColumns - 1) / kPackedColumns;
  STD_TORCH_CHECK(columns > 0 && matrix.dim() == 3 && matrix.size(0) == panels && matrix.size(1) == depth &&
                      matrix.size(2) == kPackedColumns && lies(matrix, {0, 1, 2}),
                  name, " must be (", panels, ", ", depth, ", ", kPackedColumns, "), contiguous");
  return floats(matrix, name);
}

}  // namespace bti_fast
