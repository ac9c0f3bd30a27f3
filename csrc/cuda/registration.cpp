// Every operator of the CUDA library, namespace bti_fast_cuda. The public schemas, autograd and fakes are in Python
// (bti_fast.ops); these are the implementations that it calls.
#include <torch/csrc/stable/library.h>

#include "cuda/operators.h"

STABLE_TORCH_LIBRARY(bti_fast_cuda, m) {
  m.def("entropy_uncertainty(Tensor logits) -> Tensor");
  m.def("entropy_uncertainty_backward(Tensor grad_u, Tensor logits) -> Tensor");
  m.def(
      "cross_attention(Tensor q, Tensor k, Tensor v_q, Tensor v_k, Tensor? q_mask, Tensor? k_mask, float scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_attention_backward(Tensor grad_out_q, Tensor grad_out_k, Tensor q, Tensor k, Tensor v_q, Tensor v_k,"
      " Tensor out_q, Tensor out_k, Tensor statistics, Tensor? q_mask, Tensor? k_mask, float scale)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bti_fast_cuda, CUDA, m) {
  m.impl("entropy_uncertainty", TORCH_BOX(&bti_fast::entropy_uncertainty_cuda));
  m.impl("entropy_uncertainty_backward", TORCH_BOX(&bti_fast::entropy_uncertainty_backward_cuda));
  m.impl("cross_attention", TORCH_BOX(&bti_fast::cross_attention_cuda));
  m.impl("cross_attention_backward", TORCH_BOX(&bti_fast::cross_attention_backward_cuda));
}
