// silu of scaled and shifted maps on the CPU: what passes between the binding and its kernel.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct ScaledSilu {
  float* x;            // [rows, channels], overwritten
  const float* scale;  // [channels]; with it shift: both or none
  const float* shift;  // [channels]
  int64_t channels;
};

// Rows [begin, end); each element is computed alone.
BTI_FAST_KERNEL(void, scaled_silu, (const ScaledSilu& job, int64_t begin, int64_t end))

}  // namespace bti_fast
