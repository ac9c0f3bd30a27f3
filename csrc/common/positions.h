// The set of all index tuples but the class axis, walked in step through several strided tensors.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BTI_FAST_HD __host__ __device__ __forceinline__
#else
#define BTI_FAST_HD inline __attribute__((always_inline))
#endif

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

  // Offsets, in elements, of position `index` in each tensor.
  BTI_FAST_HD void offsets(int64_t index, int64_t (&out)[Tensors]) const {
    for (int t = 0; t < Tensors; ++t) out[t] = 0;
    for (int d = dims - 1; d > 0; --d) {
      const int64_t next = index / size[d];
      const int64_t at = index - next * size[d];
      for (int t = 0; t < Tensors; ++t) out[t] += at * stride[t][d];
      index = next;
    }
    for (int t = 0; t < Tensors; ++t) out[t] += index * stride[t][0];
  }
};

}  // namespace bti_fast
