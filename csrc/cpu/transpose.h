// Transposition of a square block of lanes in registers (kernels only).
#pragma once

#include <utility>

#include "cpu/vec.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

#if defined(__clang__) || __GNUC__ >= 12
#define BTI_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BTI_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// One step of the butterfly: lanes without bit K of a and b, then lanes with it; b's stand where bit K is set.
template <int K, int... L>
BTI_FAST_INLINE void exchange(VecF& a, VecF& b, std::integer_sequence<int, L...>) {
  constexpr int n = sizeof...(L);
  const VecF low = BTI_FAST_SHUFFLE(a, b, ((L & K) ? n + L - K : L)...);
  const VecF high = BTI_FAST_SHUFFLE(a, b, ((L & K) ? n + L : L + K)...);
  a = low;
  b = high;
}

template <int K>
BTI_FAST_INLINE void transpose_step(VecF (&row)[VecOf<float>::lanes]) {
  constexpr int n = VecOf<float>::lanes;
  if constexpr (K < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & K)) exchange<K>(row[i], row[i + K], std::make_integer_sequence<int, n>{});
    transpose_step<2 * K>(row);
  }
}

// row[i][j] becomes row[j][i].
BTI_FAST_INLINE void transpose(VecF (&row)[VecOf<float>::lanes]) { transpose_step<1>(row); }

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
