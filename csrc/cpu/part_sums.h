// Sums of what tasks have added up, each a part of its own: what passes to their kernel.
#pragma once

#include <cstdint>

#include "cpu/isa_dispatch.h"

namespace bti_fast {

struct PartSums {
  const float* parts;  // [groups, parts of each, size]
  float* out;          // [groups, size]: factor times the sums over the parts, in their order
  int64_t part_count, size;
  double factor;
};

// Elements [begin, end) of the result.
BTI_FAST_KERNEL(void, part_sums, (const PartSums& job, int64_t begin, int64_t end))

// All of them, for so many groups.
void sum_parts(const PartSums& job, int64_t groups);

}  // namespace bti_fast
