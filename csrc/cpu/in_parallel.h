// A kernel's tasks handed out to the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace bti_fast {

// How many of that size make the whole.
inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// kernel(job, begin, end) over [0, count), in pieces of at least `grain`. A thread takes a next piece when it is done
// with its last, so that where one is held up the others go on; results must not depend on who computes what.
template <typename Job>
void in_parallel(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t count, int64_t grain) {
  constexpr int64_t kPiecesPerThread = 8;
  const int64_t most = parts(count, grain), threads = std::min<int64_t>(torch::stable::get_num_threads(), most);
  if (threads <= 1) {
    if (count > 0) kernel(job, 0, count);
    return;
  }
  const int64_t piece = std::max(grain, parts(count, kPiecesPerThread * threads));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t first; (first = next.fetch_add(piece)) < count;) kernel(job, first, std::min(first + piece, count));
  });
}

}  // namespace bti_fast
