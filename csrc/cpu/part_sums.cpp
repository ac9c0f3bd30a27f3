#include "cpu/part_sums.h"

#include <algorithm>

#include "cpu/in_parallel.h"

namespace bti_fast {

void sum_parts(const PartSums& job, int64_t groups) {
  constexpr int64_t kAdditionsPerTask = 1 << 14;  // fewer are not worth handing out
  in_parallel(BTI_FAST_SELECT(part_sums), job, groups * job.size,
              std::max<int64_t>(64, kAdditionsPerTask / job.part_count));
}

}  // namespace bti_fast
