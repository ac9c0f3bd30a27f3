// Powers of two for softmax weights and sigmoids, where the lowest bit does not matter (kernels only).
#pragma once

#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

// t within -126..127, NaN as it is.
BTI_FAST_INLINE VecF bounded(VecF t) {
  const VecF low = splat<VecF>(-126.0f), high = splat<VecF>(127.0f);
#if defined(__AVX512F__)
  return bits_as<VecF>(_mm512_min_ps(bits_as<__m512>(high), _mm512_max_ps(bits_as<__m512>(low), bits_as<__m512>(t))));
#elif defined(__AVX2__)
  return bits_as<VecF>(_mm256_min_ps(bits_as<__m256>(high), _mm256_max_ps(bits_as<__m256>(low), bits_as<__m256>(t))));
#else
  t = t < low ? low : t;
  return t > high ? high : t;
#endif
}

// 2^t for t within -126..127. Error 1e-7, relative.
BTI_FAST_INLINE VecF exp2_within(VecF t) {
  const VecF shifted = t + 12582912.0f;  // rounds to a whole number, left in the low bits
  const VecF f = t - (shifted - 12582912.0f);
  VecF p = splat<VecF>(1.326472728e-3f);
  p = p * f + 9.671512657e-3f;
  p = p * f + 5.550733743e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return bits_as<VecF>(bits_as<VecI>(p) + (bits_as<VecI>(shifted) << 23));
}
// t below -126 counts as -126 and above 127 as 127; NaN stays NaN (but for odd payloads).
BTI_FAST_INLINE VecF exp2_bounded(VecF t) { return exp2_within(bounded(t)); }

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
