// silu in vectors (kernels only).
#pragma once

#include "cpu/exp2.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// Where e^-x is still within the range.
BTI_FAST_INLINE VecF in_range(VecF x) {
  const VecF low = splat<VecF>(-88.0f);
  return x < low ? low : x;
}

// x / (1 + e^-x). Error 1e-6, relative, above -16; below, where the result vanishes, 1e-9 absolute. NaN for NaN.
BTI_FAST_INLINE VecF silu(VecF x) {
  const VecF z = in_range(x);
  return z / (1.0f + exp2_bounded(z * -1.44269504f));
}

// Its derivative, to 1e-6; NaN for NaN and infinity.
BTI_FAST_INLINE VecF silu_slope(VecF x) {
  const VecF z = in_range(x), s = 1.0f / (1.0f + exp2_bounded(z * -1.44269504f));
  return s * (1.0f + z * (1.0f - s));
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
