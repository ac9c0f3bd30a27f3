#include "cpu/part_sums.h"

#include "cpu/rows.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

void part_sums(const PartSums& job, int64_t begin, int64_t end) {
  typedef double Wide __attribute__((vector_size(2 * kBytes)));
  for (int64_t at = begin; at < end;) {
    const int64_t group = at / job.size, i = at % job.size;
    const int count = lanes_left(end - at < job.size - i ? end - at : job.size - i);
    const float* part = job.parts + group * job.part_count * job.size + i;
    Wide sum{};
    for (int64_t k = 0; k < job.part_count; ++k)
      sum += __builtin_convertvector(load_first(part + k * job.size, count), Wide);
    store_first(__builtin_convertvector(sum * job.factor, VecF), job.out + at, count);
    at += count;
  }
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
