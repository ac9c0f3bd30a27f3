// Binding of cross_attention: checks, memory, and the launcher of the call's dtype.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/cross_attention_checks.h"
#include "common/token_view_of.h"
#include "cuda/cross_attention_launcher.h"
#include "cuda/launch.h"
#include "cuda/operators.h"

namespace bti_fast {

namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

Operand operand_of(const Tensor& x) { return {token_view_of(x), static_cast<int>(x.size(3)), 0}; }

CrossShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v_k, const std::optional<Tensor>& q_mask,
                    const std::optional<Tensor>& k_mask, double scale) {
  check_mask(q_mask, "q_mask", q);
  check_mask(k_mask, "k_mask", k);
  STD_TORCH_CHECK(q.size(2) < (int64_t{1} << 30), "q must have fewer than 2^30 tokens, got ", q.size(2));
  CrossShape s{};
  s.groups = q.size(0) * q.size(1);
  s.heads = static_cast<int>(q.size(1));
  s.n = static_cast<int>(q.size(2));
  s.m = static_cast<int>(k.size(2));
  s.d = static_cast<int>(q.size(3));
  s.e = static_cast<int>(v_k.size(3));
  s.scale = static_cast<float>(scale);
  s.q_mask = mask_view_of(q_mask);
  s.k_mask = mask_view_of(k_mask);
  return s;
}

template <Dtype dtype, typename Job>
void plan_and_run(Job& job, const Tensor& like, cudaStream_t stream) {
  const CrossPlan plan = CrossLauncher<dtype>::plan(job);
  const Tensor partial = torch::stable::new_empty(like, {plan.partial}, kFloat);
  const Tensor kept = torch::stable::new_empty(like, {plan.kept}, kFloat);
  job.partial = static_cast<float*>(partial.mutable_data_ptr());
  job.kept = static_cast<float*>(kept.mutable_data_ptr());
  CrossLauncher<dtype>::run(job, stream);
}

template <typename Job>
void launch(Job& job, Dtype dtype, const Tensor& like, cudaStream_t stream) {
  if (job.shape.groups == 0) return;
  switch (dtype) {
    case Dtype::float16: return plan_and_run<Dtype::float16>(job, like, stream);
    case Dtype::bfloat16: return plan_and_run<Dtype::bfloat16>(job, like, stream);
    default: return plan_and_run<Dtype::float32>(job, like, stream);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v_q,
                                                        const Tensor& v_k, const std::optional<Tensor>& q_mask,
                                                        const std::optional<Tensor>& k_mask, double scale) {
  const Dtype dtype = check_cross_attention(q, k, v_q, v_k);
  const LaunchScope scope(q);
  const Tensor out_q = torch::stable::empty_like(v_q), out_k = torch::stable::empty_like(v_k);
  const Tensor statistics =
      torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2) + k.size(2), 2}, kFloat);
  CrossForward job{};
  job.shape = shape_of(q, k, v_k, q_mask, k_mask, scale);
  job.q = operand_of(q);
  job.k = operand_of(k);
  job.v_q = operand_of(v_q);
  job.v_k = operand_of(v_k);
  job.out_q = operand_of(out_q);
  job.out_k = operand_of(out_k);
  job.statistics = static_cast<SoftmaxStatistics*>(statistics.mutable_data_ptr());
  launch(job, dtype, q, scope.stream());
  return {out_q, out_k, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_attention_backward_cuda(
    const Tensor& grad_out_q, const Tensor& grad_out_k, const Tensor& q, const Tensor& k, const Tensor& v_q,
    const Tensor& v_k, const Tensor& out_q, const Tensor& out_k, const Tensor& statistics,
    const std::optional<Tensor>& q_mask, const std::optional<Tensor>& k_mask, double scale) {
  using torch::stable::empty_like;
  const Dtype dtype = check_cross_attention(q, k, v_q, v_k);
  check_cross_attention_backward(grad_out_q, grad_out_k, out_q, out_k, statistics, v_q, v_k);
  const LaunchScope scope(q);
  const Tensor grad_q = empty_like(q), grad_k = empty_like(k), grad_v_q = empty_like(v_q), grad_v_k = empty_like(v_k);
  CrossBackward job{};
  job.shape = shape_of(q, k, v_k, q_mask, k_mask, scale);
  job.grad_out_q = operand_of(grad_out_q);
  job.grad_out_k = operand_of(grad_out_k);
  job.q = operand_of(q);
  job.k = operand_of(k);
  job.v_q = operand_of(v_q);
  job.v_k = operand_of(v_k);
  job.out_q = operand_of(out_q);
  job.out_k = operand_of(out_k);
  job.statistics = static_cast<const SoftmaxStatistics*>(statistics.const_data_ptr());
  job.grad_q = operand_of(grad_q);
  job.grad_k = operand_of(grad_k);
  job.grad_v_q = operand_of(grad_v_q);
  job.grad_v_k = operand_of(grad_v_k);
  launch(job, dtype, q, scope.stream());
  return {grad_q, grad_k, grad_v_q, grad_v_k};
}

}  // namespace bti_fast
