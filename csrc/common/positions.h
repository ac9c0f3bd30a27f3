// The set of all index tuples but the class axis, walked in step through several strided tensors.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace bti_fast {

// Plain data, so that it goes to a GPU kernel by value and into code compiled for any instruction set.
// Dimensions are merged wherever every tensor's strides allow it; the last one is the fastest.
template <int Tensors, int MaxDims = 8>
struct Positions {
  int dims;
  int64_t count;  // product of sizes
  int64_t size[MaxDims];
  int64_t stride[Tensors][MaxDims];  // in elements

  BTI_FAST_HD int64_t inner() const { return size[dims - 1]; }

  // Offsets, in elements, of position `index` in each tensor; Index is wide enough for them all.
  template <typename Index>
  BTI_FAST_HD void offsets(Index index, Index (&out)[Tensors]) const {
    for (int t = 0; t < Tensors; ++t) out[t] = 0;
    for (int d = dims - 1; d > 0; --d) {
      const Index next = index / static_cast<Index>(size[d]);
      const Index at = index - next * static_cast<Index>(size[d]);
      for (int t = 0; t < Tensors; ++t) out[t] += at * static_cast<Index>(stride[t][d]);
      index = next;
    }
    for (int t = 0; t < Tensors; ++t) out[t] += index * static_cast<Index>(stride[t][0]);
  }
};

}  // namespace bti_fast
