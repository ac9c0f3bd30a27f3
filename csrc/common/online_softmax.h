// The algebra of a softmax whose terms arrive in parts, shared by the CPU and CUDA kernels: a part holds its peak, its
// sum of e^(score - peak), and whatever was accumulated with the same weights.
#pragma once

#include "common/host_device.h"

namespace bti_fast {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNothing = -__builtin_inff();  // peak, and logarithm of the sum, of no terms at all

// What a softmax leaves to its gradient, for which a weight is e^((score - peak) - log_sum). Added up they would be one
// log-sum-exp, which in float32 is 5e-4 coarse at 1e4, and so would be every weight.
struct alignas(8) SoftmaxStatistics {
  float peak, log_sum;  // of no terms: 0 and kNothing
};

// A peak that can be subtracted: where there are no terms, or only terms of weight zero, any finite one will do.
template <typename S>
BTI_FAST_HD S softmax_shift(S peak) {
  return peak == -__builtin_inff() ? S(0) : peak;
}

// A logarithm that can be subtracted: where there was nothing to sum, one that makes every weight zero.
template <typename S>
BTI_FAST_HD S softmax_log(S log_sum) {
  return log_sum == -__builtin_inff() ? -log_sum : log_sum;
}

// The peak of two parts together. A NaN among the terms shows in the sums, so a peak may ignore it.
template <typename S>
BTI_FAST_HD S softmax_peak(S one, S two) {
  return one > two ? one : two;
}

// Weight of a part with this peak within a whole whose peak is `total`; Exp is the caller's e^x for x <= 0.
template <typename S, typename Exp>
BTI_FAST_HD S softmax_weight(S peak, S total, Exp exp) {
  return peak == -__builtin_inff() ? S(0) : exp(peak - softmax_shift(total));
}

// 1 / sum, and 0 where there was nothing to sum: such a row attends to nothing and gives zeros.
template <typename S>
BTI_FAST_HD S softmax_inverse(S sum) {
  return sum == S(0) ? S(0) : S(1) / sum;
}

// Gradient of one score from one direction: p (dp - mean), mean = sum of p dp over the direction's softmax.
template <typename V>
BTI_FAST_HD V softmax_gradient(V p, V dp, V mean) {
  return p * (dp - mean);
}

}  // namespace bti_fast
