#include "cpu/cross_attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>

#include "common/cross_attention_checks.h"
#include "common/token_view_of.h"
#include "cpu/operators.h"

namespace bti_fast {

namespace {

constexpr int64_t kSplitTokens = 24 * kTileTokens;  // at least, so that packing the class side stays small beside it
constexpr int64_t kMaxSplits = 64;
constexpr int64_t kProductsPerTask = 1 << 18;  // work below this many multiplications is not worth handing out

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

CrossShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v_q, const Tensor& v_k,
                    const std::optional<Tensor>& q_mask, const std::optional<Tensor>& k_mask, double scale) {
  CrossShape s{};
  s.dtype = check_cross_attention(q, k, v_q, v_k);
  check_mask(q_mask, "q_mask", q);
  check_mask(k_mask, "k_mask", k);
  s.batch = q.size(0);
  s.heads = q.size(1);
  s.n = q.size(2);
  s.d = q.size(3);
  s.m = k.size(2);
  s.e = v_k.size(3);
  s.scale = static_cast<float>(scale);
  s.q_mask = mask_view_of(q_mask);
  s.k_mask = mask_view_of(k_mask);
  const auto tiles_in = [](int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens * kTileTokens; };
  const int64_t least = std::max(kSplitTokens, (s.n + kMaxSplits - 1) / kMaxSplits);
  const int64_t splits = std::max<int64_t>(1, s.n / least);
  s.split_tokens = std::max<int64_t>(kTileTokens, tiles_in((s.n + splits - 1) / splits));
  s.splits = std::max<int64_t>(1, (s.n + s.split_tokens - 1) / s.split_tokens);
  return s;
}

// Runs kernel(job, begin, end, scratch) over every (batch, head, split), each thread with scratch of its own.
template <typename Job, typename Kernel>
void sweep(const Job& job, const Kernel& kernel) {
  const CrossShape& s = job.shape;
  const int64_t columns = s.m <= kFewColumns ? 2 * s.m : padded(s.m);  // few: as much loading as multiplying
  const int64_t products = std::max<int64_t>(1, s.split_tokens * columns * (s.d + 2 * s.e));
  const std::size_t bytes = static_cast<std::size_t>(cross_scratch(s)) * sizeof(float);
  torch::stable::parallel_for(0, s.batch * s.heads * s.splits, std::max<int64_t>(1, kProductsPerTask / products),
                              [&](int64_t begin, int64_t end) {
                                const std::unique_ptr<void, decltype(&std::free)> scratch(
                                    std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free);
                                STD_TORCH_CHECK(scratch != nullptr, "cross_attention: out of memory, ", bytes, " bytes");
                                kernel(job, begin, end, static_cast<float*>(scratch.get()));
                              });
}

template <typename Job, typename Kernel>
void combine(const Job& job, const Kernel& kernel) {
  const CrossShape& s = job.shape;
  const int64_t work = std::max<int64_t>(1, s.splits * s.m * (s.d + s.e));
  torch::stable::parallel_for(0, s.batch * s.heads, std::max<int64_t>(1, kProductsPerTask / work),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k, const Tensor& v_q,
                                                   const Tensor& v_k, const std::optional<Tensor>& q_mask,
                                                   const std::optional<Tensor>& k_mask, double scale) {
  using torch::stable::new_empty;
  const CrossShape s = shape_of(q, k, v_q, v_k, q_mask, k_mask, scale);
  const Tensor out_q = torch::stable::empty_like(v_q), out_k = torch::stable::empty_like(v_k);
  const Tensor statistics = new_empty(q, {s.batch, s.heads, s.n + s.m, 2}, kFloat);
  const Tensor partial = new_empty(q, {s.batch * s.heads * s.splits * forward_partial(s)}, kFloat);
  const CrossForward job{s,
                         token_view_of(q),
                         token_view_of(k),
                         token_view_of(v_q),
                         token_view_of(v_k),
                         token_view_of(out_q),
                         token_view_of(out_k),
                         static_cast<SoftmaxStatistics*>(statistics.mutable_data_ptr()),
                         static_cast<float*>(partial.mutable_data_ptr())};
  sweep(job, BTI_FAST_SELECT(cross_forward));
  combine(job, BTI_FAST_SELECT(cross_forward_combine));
  return {out_q, out_k, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out_q, const Tensor& grad_out_k, const Tensor& q, const Tensor& k, const Tensor& v_q,
    const Tensor& v_k, const Tensor& out_q, const Tensor& out_k, const Tensor& statistics,
    const std::optional<Tensor>& q_mask, const std::optional<Tensor>& k_mask, double scale) {
  using torch::stable::empty_like;
  using torch::stable::new_empty;
  const CrossShape s = shape_of(q, k, v_q, v_k, q_mask, k_mask, scale);
  check_cross_attention_backward(grad_out_q, grad_out_k, out_q, out_k, statistics, v_q, v_k);
  const Tensor grad_q = empty_like(q), grad_k = empty_like(k), grad_v_q = empty_like(v_q), grad_v_k = empty_like(v_k);
  const Tensor partial = new_empty(q, {s.batch * s.heads * s.splits * backward_partial(s)}, kFloat);
  const CrossBackward job{s,
                          token_view_of(grad_out_q),
                          token_view_of(grad_out_k),
                          token_view_of(q),
                          token_view_of(k),
                          token_view_of(v_q),
                          token_view_of(v_k),
                          token_view_of(out_q),
                          token_view_of(out_k),
                          static_cast<const SoftmaxStatistics*>(statistics.const_data_ptr()),
                          token_view_of(grad_q),
                          token_view_of(grad_k),
                          token_view_of(grad_v_q),
                          token_view_of(grad_v_k),
                          static_cast<float*>(partial.mutable_data_ptr())};
  sweep(job, BTI_FAST_SELECT(cross_backward));
  combine(job, BTI_FAST_SELECT(cross_backward_combine));
  return {grad_q, grad_k, grad_v_q, grad_v_k};
}

}  // namespace bti_fast
