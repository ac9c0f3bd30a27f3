#include "cpu/part_sums.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace bti_fast {

void sum_parts(const PartSums& job, int64_t groups) {
  constexpr int64_t kAdditionsPerTask = 1 << 14;  // fewer are not worth handing out
  const auto sum = BTI_FAST_SELECT(part_sums);
  torch::stable::parallel_for(0, groups * job.size, std::max<int64_t>(64, kAdditionsPerTask / job.part_count),
                              [&](int64_t begin, int64_t end) { sum(job, begin, end); });
}

}  // namespace bti_fast
