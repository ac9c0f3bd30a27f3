// Builds Positions from torch tensors (host side only).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/positions.h"

namespace bti_fast {

// with_class[t]: tensor t has the class axis 1, which is left out of the positions; otherwise it lacks it.
template <int Tensors, int MaxDims = 8>
Positions<Tensors, MaxDims> positions_of(const torch::stable::Tensor* const (&tensors)[Tensors],
                                         const bool (&with_class)[Tensors]) {
  Positions<Tensors, MaxDims> out{};
  const auto& first = *tensors[0];
  const int rank = static_cast<int>(first.dim()) - (with_class[0] ? 1 : 0);
  STD_TORCH_CHECK(rank >= 1 && rank <= MaxDims, "at most ", MaxDims - 1, " spatial axes are supported, got ", rank - 1);
  out.count = 1;
  for (int d = 0; d < rank; ++d) {
    const int64_t size = first.size(with_class[0] && d > 0 ? d + 1 : d);
    out.count *= size;
    if (size == 1) continue;
    int64_t stride[Tensors];
    for (int t = 0; t < Tensors; ++t) stride[t] = tensors[t]->stride(with_class[t] && d > 0 ? d + 1 : d);
    bool merge = out.dims > 0;
    for (int t = 0; t < Tensors && merge; ++t) merge = out.stride[t][out.dims - 1] == size * stride[t];
    if (merge) {
      out.size[out.dims - 1] *= size;
    } else {
      out.size[out.dims++] = size;
    }
    for (int t = 0; t < Tensors; ++t) out.stride[t][out.dims - 1] = stride[t];
  }
  if (out.dims == 0) {  // a single position
    out.dims = 1;
    out.size[0] = 1;
  }
  return out;
}

}  // namespace bti_fast
