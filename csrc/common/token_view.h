// The operands of cross_attention as its kernels see them, for any strides. Knows neither torch nor CUDA.
#pragma once

#include <cstdint>

namespace bti_fast {

// (batch, head, token, channel), strides in elements.
struct TokenView {
  void* data;
  int64_t batch, head, token, channel;
};

struct MaskView {
  const bool* data;  // nullptr: every token takes part
  int64_t batch, token;
};

}  // namespace bti_fast
