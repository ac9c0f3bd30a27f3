// silu in vectors (kernels only).
#pragma once

#include "cpu/exp2.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// x / (1 + e^-x). Error 1e-6, relative, above -16; below, where the result vanishes, 1e-9 absolute. NaN for NaN.
BTI_FAST_INLINE VecF silu(VecF x) {
  const VecF low = splat<VecF>(-88.0f);
  const VecF z = x < low ? low : x;
  return z / (1.0f + exp2_bounded(z * -1.44269504f));
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
