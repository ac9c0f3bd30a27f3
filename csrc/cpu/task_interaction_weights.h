// The learned tensors of task_interaction in the order of bti_fast.ops.TaskInteractionWeights (host side only).
#pragma once

#include <vector>

#include "cpu/feature_map_of.h"

namespace bti_fast {

enum Weight : int {
  conv_weight, conv_bias, fc_weight, fc_bias, bn_weight, bn_bias, bn_mean, bn_var, cls_gate_weight, cls_gate_bias,
  prior_weight, prior_bias, seg_gate_weight, seg_gate_bias, seg_proj, cls_proj, gate1_weight, gate1_bias,
  gate2_weight, gate2_bias, weight_count
};

// All of them as float32, contiguous; checked against x (B, C, *spatial) and y (B, F).
class Weights {
 public:
  Weights(const std::vector<Tensor>& given, const Tensor& x, const Tensor& y) {
    STD_TORCH_CHECK(given.size() == weight_count, "weights must be ", int{weight_count}, " tensors, got ",
                    given.size());
    STD_TORCH_CHECK(x.dim() >= 3 && y.dim() == 2 && y.size(0) == x.size(0), "x must be (B, C, *spatial), y (B, F)");
    STD_TORCH_CHECK(given[conv_weight].dim() == 2 && given[seg_proj].dim() == 2 && given[gate1_weight].dim() == 2,
                    "conv_weight, seg_proj and gate1_weight must be matrices");
    channels = x.size(1);
    features = y.size(1);
    hidden = given[conv_weight].size(0);
    aligned = given[seg_proj].size(0);
    network = given[gate1_weight].size(0);
    const int64_t c = channels, f = features, h = hidden;
    const std::vector<std::vector<int64_t>> shapes = {
        {h, c}, {h}, {f, h}, {f}, {f}, {f}, {f}, {f}, {f, f}, {f},
        {c, f}, {c}, {c, c}, {c}, {aligned, c}, {aligned, f}, {network, 3}, {network}, {2, network}, {2}};
    for (int i = 0; i < weight_count; ++i) {
      bool same = given[i].dim() == static_cast<int64_t>(shapes[i].size());
      for (int64_t d = 0; same && d < given[i].dim(); ++d) same = given[i].size(d) == shapes[i][d];
      STD_TORCH_CHECK(same, "weight ", i, " has the wrong shape");
      tensors.push_back(as_float(given[i]));
    }
  }
  const float* operator[](Weight weight) const { return tensors[weight].const_data_ptr<float>(); }

  int64_t channels, features, hidden, aligned, network;

 private:
  std::vector<Tensor> tensors;
};

}  // namespace bti_fast
