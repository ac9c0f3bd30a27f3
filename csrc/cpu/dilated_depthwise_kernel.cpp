// Depthwise convolution of channels_last maps, with what may follow it: scale and bias by channel, silu.
#include "cpu/dilated_depthwise.h"

#include "cpu/depthwise_row.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

template <int K>
void convolve_rows(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  const int64_t length = job.width * job.channels;
  const auto finish = [&](auto& sums, int64_t c, int lanes) __attribute__((always_inline)) {
    if (job.scale != nullptr) {
      const VecF scale = load_first(job.scale + c, lanes);
      for (VecF& sum : sums) sum *= scale;
    }
    if (job.bias != nullptr) {
      const VecF bias = load_first(job.bias + c, lanes);
      for (VecF& sum : sums) sum += bias;
    }
    if (job.silu)
      for (VecF& sum : sums) sum = silu(sum);
  };
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / job.height, top = number % job.height - K / 2 * job.dilation;
    const Taps rows = taps_within(top, K, job.dilation, job.height);
    const DepthwiseRow row{job.x + (sample * job.height + top) * length,
                           job.channels,
                           job.dilation * length,
                           job.weight,
                           job.channels,
                           job.out + number * length,
                           job.channels,
                           job.channels,
                           job.width,
                           job.dilation,
                           rows.begin,
                           rows.end};
    depthwise_row<K>(row, 0, job.width, finish);
  }
}

}  // namespace

void dilated_depthwise(const DilatedDepthwise& job, int64_t begin, int64_t end) {
  job.kernel == 3 ? convolve_rows<3>(job, begin, end) : convolve_rows<5>(job, begin, end);
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
