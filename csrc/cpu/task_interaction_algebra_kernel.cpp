// SPEC 1.3 between the products, on vectors of every sample, and its gradient. Names follow task_interaction_algebra.h:
//   active = relu(W2 q + b2), normal = (active - mean) / sqrt(var + eps), ctx = normal * bn_weight + bn_bias
//   delta = sigmoid(Wcg ctx + b) * ctx (y+ = y + delta), message m = tau * sigmoid(Wsg xbar + b) * sigmoid(Wcs y + b)
//   residual = xbar * m; signal 1 = cos(Psp residual, Pcp delta), 2 = complexity, 3 = log(1 + var(y+))
//   gates w = sigmoid(V2 relu(V1 signals + b) + b); scale = w_seg m, y' = y + w_cls delta
#include "cpu/rows.h"
#include "cpu/task_interaction_algebra.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

constexpr int kLanes = VecOf<float>::lanes;
constexpr float kBatchNormEps = 1e-3f;
constexpr float kLeastSquare = 1e-12f;

float dot(const float* a, const float* b, int64_t n) {
  VecF total{};
  each_vector(n, [&](int64_t i, int left) { total += load_first(a + i, left) * load_first(b + i, left); });
  return lane_sum(total);
}

float scalar_sigmoid(float x) { return 1 / (1 + ::expf(-x)); }

struct Norm {
  float inverse;  // 1 / sqrt(max(square, least))
  bool bounded;   // the square was below the least: the inverse is a constant
};
Norm norm_of(const float* v, int64_t n) {
  const float square = dot(v, v, n);
  const bool bounded = square < kLeastSquare;
  return {1 / ::sqrtf(bounded ? kLeastSquare : square), bounded};
}

// The mean and the biased variance of y + delta over the features.
struct Moments {
  float mean, variance;
};
Moments moments_of(const float* y, const float* delta, int64_t n) {
  VecF total{};
  each_vector(n, [&](int64_t i, int left) { total += load_first(y + i, left) + load_first(delta + i, left); });
  const float mean = lane_sum(total) / static_cast<float>(n);
  VecF square{};
  each_vector(n, [&](int64_t i, int left) {
    const VecF d = keep(first_lanes(left), load_first(y + i, left) + load_first(delta + i, left) - mean);
    square += d * d;
  });
  return {mean, lane_sum(square) / static_cast<float>(n)};
}

}  // namespace

void algebra_context(const Algebra& a) {
  const int64_t batch = a.batch, features = a.features, channels = a.channels;
  each_vector(features, [&](int64_t f, int left) {
    VecF mean = load_first(a.bn_mean + f, left), variance = load_first(a.bn_var + f, left), unbiased = variance;
    VecF total{}, square{};
    for (int64_t b = 0; b < batch; ++b) {
      const VecF z = load_first(a.active + b * features + f, left);
      const VecF active = z <= 0 ? VecF{} : z;
      store_first(active, a.active + b * features + f, left);
      total += active;
    }
    if (a.training) {
      mean = total / static_cast<float>(batch);
      for (int64_t b = 0; b < batch; ++b) {
        const VecF d = load_first(a.active + b * features + f, left) - mean;
        square += d * d;
      }
      variance = square / static_cast<float>(batch);
      unbiased = square / static_cast<float>(batch - 1);
    }
    VecF inverse;
    for (int i = 0; i < kLanes; ++i) inverse[i] = 1 / ::sqrtf(variance[i] + kBatchNormEps);
    if (a.batch_mean != nullptr) {
      store_first(mean, a.batch_mean + f, left);
      store_first(unbiased, a.batch_var + f, left);
    }
    store_first(inverse, a.used_inverse + f, left);
    const VecF weight = load_first(a.bn_weight + f, left), bias = load_first(a.bn_bias + f, left);
    for (int64_t b = 0; b < batch; ++b) {
      const VecF normal = (load_first(a.active + b * features + f, left) - mean) * inverse;
      store_first(normal, a.normal + b * features + f, left);
      store_first(normal * weight + bias, a.ctx + b * features + f, left);
    }
  });
  for (int64_t b = 0; b < batch; ++b)
    each_vector(channels, [&](int64_t c, int left) {
      const int64_t i = b * channels + c;
      const VecF gate = sigmoid(load_first(a.seg_gate + i, left)), prior = sigmoid(load_first(a.prior + i, left));
      const VecF message = a.tau * gate * prior;
      store_first(gate, a.seg_gate + i, left);
      store_first(prior, a.prior + i, left);
      store_first(message, a.message + i, left);
      store_first(message * load_first(a.xbar + b * a.summary_stride + c, left), a.residual + i, left);
    });
}

void algebra_update(const Algebra& a) {
  each_vector(a.batch * a.features, [&](int64_t i, int left) {
    const VecF gate = sigmoid(load_first(a.cls_gate + i, left));
    store_first(gate, a.cls_gate + i, left);
    store_first(gate * load_first(a.ctx + i, left), a.delta + i, left);
  });
}

void algebra_gates(const Algebra& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const float *seg = a.seg_aligned + b * a.aligned, *cls = a.cls_aligned + b * a.aligned;
    const float *y = a.y + b * a.features, *delta = a.delta + b * a.features;
    float* s = a.signals + 3 * b;
    s[0] = dot(seg, cls, a.aligned) * (norm_of(seg, a.aligned).inverse * norm_of(cls, a.aligned).inverse);
    s[1] = a.complexity[b * a.summary_stride];
    s[2] = ::log1pf(moments_of(y, delta, a.features).variance);
    float* hidden = a.network_hidden + b * a.network;
    for (int64_t n = 0; n < a.network; ++n) {
      const float* w = a.gate1_weight + 3 * n;
      const float z = w[0] * s[0] + w[1] * s[1] + w[2] * s[2] + a.gate1_bias[n];
      hidden[n] = z <= 0 ? 0 : z;
    }
    float* gates = a.gates + 2 * b;
    for (int k = 0; k < 2; ++k)
      gates[k] = scalar_sigmoid(dot(a.gate2_weight + k * a.network, hidden, a.network) + a.gate2_bias[k]);
    each_vector(a.channels, [&](int64_t c, int left) {
      store_first(gates[0] * load_first(a.message + b * a.channels + c, left), a.scale + b * a.channels + c, left);
    });
    if (a.y_out == nullptr) continue;
    each_vector(a.features, [&](int64_t f, int left) {
      store_first(load_first(y + f, left) + gates[1] * load_first(delta + f, left), a.y_out + b * a.features + f, left);
    });
  }
}

void algebra_gates_backward(const Algebra& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const float *y = a.y + b * a.features, *delta = a.delta + b * a.features;
    const float *grad_scale = a.grad_scale + b * a.channels, *grad_y_out = a.grad_y_out + b * a.features;
    const float *gates = a.gates + 2 * b, *hidden = a.network_hidden + b * a.network;
    float *logits = a.grad_gate_logits + 2 * b, *network = a.grad_network + b * a.network;
    const float grad_gates[2] = {a.grad_gates[2 * b] + dot(grad_scale, a.message + b * a.channels, a.channels),
                                 a.grad_gates[2 * b + 1] + dot(grad_y_out, delta, a.features)};
    for (int k = 0; k < 2; ++k) logits[k] = grad_gates[k] * gates[k] * (1 - gates[k]);
    float signals[3] = {a.grad_signals[3 * b], a.grad_signals[3 * b + 1], a.grad_signals[3 * b + 2]};
    for (int64_t n = 0; n < a.network; ++n) {
      const float through = logits[0] * a.gate2_weight[n] + logits[1] * a.gate2_weight[a.network + n];
      network[n] = hidden[n] <= 0 ? 0 : through;
      for (int i = 0; i < 3; ++i) signals[i] += network[n] * a.gate1_weight[3 * n + i];
    }
    a.grad_complexity[b] = signals[1];

    // Signal 1: with e, f the two projections, k their inverse norms: d e = k_e s (k_f f - cos k_e e).
    const float *seg = a.seg_aligned + b * a.aligned, *cls = a.cls_aligned + b * a.aligned;
    const Norm seg_norm = norm_of(seg, a.aligned), cls_norm = norm_of(cls, a.aligned);
    const float cosine = a.signals[3 * b];
    const float seg_own = seg_norm.bounded ? 0 : cosine * seg_norm.inverse;
    const float cls_own = cls_norm.bounded ? 0 : cosine * cls_norm.inverse;
    each_vector(a.aligned, [&](int64_t i, int left) {
      const VecF e = load_first(seg + i, left), f = load_first(cls + i, left);
      store_first(seg_norm.inverse * signals[0] * (f * cls_norm.inverse - e * seg_own),
                  a.grad_seg_aligned + b * a.aligned + i, left);
      store_first(cls_norm.inverse * signals[0] * (e * seg_norm.inverse - f * cls_own),
                  a.grad_cls_aligned + b * a.aligned + i, left);
    });

    // Signal 3.
    const Moments moments = moments_of(y, delta, a.features);
    const float spread = signals[2] / (1 + moments.variance) * 2 / static_cast<float>(a.features);
    each_vector(a.features, [&](int64_t f, int left) {
      const VecF from_variance = spread * (load_first(y + f, left) + load_first(delta + f, left) - moments.mean);
      const VecF out = load_first(grad_y_out + f, left);
      store_first(out * gates[1] + from_variance, a.grad_delta + b * a.features + f, left);
      store_first(out + from_variance, a.grad_y + b * a.features + f, left);
    });
    each_vector(a.channels, [&](int64_t c, int left) {
      store_first(gates[0] * load_first(grad_scale + c, left), a.grad_message + b * a.channels + c, left);
    });
  }
}

void algebra_messages_backward(const Algebra& a) {
  for (int64_t b = 0; b < a.batch; ++b)
    each_vector(a.channels, [&](int64_t c, int left) {
      const int64_t i = b * a.channels + c;
      const VecF from = load_first(a.from_seg_proj + i, left), gate = load_first(a.seg_gate + i, left);
      const VecF prior = load_first(a.prior + i, left);
      const VecF grad = load_first(a.grad_message + i, left) +
                        from * load_first(a.xbar + b * a.summary_stride + c, left);
      store_first(from * load_first(a.message + i, left), a.grad_xbar + i, left);
      const VecF both = a.tau * grad * gate * prior;
      store_first(both * (1 - gate), a.grad_seg_gate + i, left);
      store_first(both * (1 - prior), a.grad_prior + i, left);
    });
  each_vector(a.batch * a.features, [&](int64_t i, int left) {
    const VecF grad = load_first(a.grad_delta + i, left) + load_first(a.from_cls_proj + i, left);
    const VecF gate = load_first(a.cls_gate + i, left);
    store_first(grad * load_first(a.ctx + i, left) * gate * (1 - gate), a.grad_cls_gate + i, left);
    store_first(grad * gate, a.grad_ctx + i, left);
  });
}

void algebra_context_backward(const Algebra& a) {
  const int64_t batch = a.batch, features = a.features;
  each_vector(batch * a.channels, [&](int64_t i, int left) {
    store_first(load_first(a.grad_xbar + i, left) + load_first(a.from_seg_gate + i, left), a.grad_xbar + i, left);
  });
  each_vector(features, [&](int64_t f, int left) {
    const VecF weight = load_first(a.bn_weight + f, left), inverse = load_first(a.used_inverse + f, left);
    VecF total{}, along{};
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t i = b * features + f;
      const VecF grad = load_first(a.grad_ctx + i, left) + load_first(a.from_cls_gate + i, left);
      store_first(grad, a.grad_ctx + i, left);
      total += grad;
      along += grad * load_first(a.normal + i, left);
      store_first(load_first(a.grad_y + i, left) + load_first(a.from_prior + i, left), a.grad_y + i, left);
    }
    store_first(along, a.grad_bn_weight + f, left);
    store_first(total, a.grad_bn_bias + f, left);
    store_first(a.training ? VecF{} : -(total * weight * inverse), a.grad_bn_mean + f, left);
    store_first(a.training ? VecF{} : along * weight * inverse * inverse * -0.5f, a.grad_bn_var + f, left);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t i = b * features + f;
      VecF grad = load_first(a.grad_ctx + i, left);
      // Only the batch's own statistics mix the samples: otherwise a NaN stays in its own.
      if (a.training) grad -= (total + load_first(a.normal + i, left) * along) / static_cast<float>(batch);
      grad = grad * weight * inverse;
      store_first(load_first(a.active + i, left) <= 0 ? VecF{} : grad, a.grad_fc + i, left);
    }
  });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
