// Mean, two small matrices by a vector, sigmoid: too little for a library's products.
#include "cpu/squeeze_excitation.h"

#include "cpu/rows.h"
#include "cpu/silu.h"

namespace bti_fast {
namespace BTI_FAST_ISA {

namespace {

// f(sample, first, count) for the parts of `whole` values that tasks begin .. end are.
template <typename F>
void each_part(int64_t whole, int64_t part, int64_t begin, int64_t end, const F& f) {
  const int64_t parts = (whole + part - 1) / part;
  for (int64_t number = begin; number < end; ++number) {
    const int64_t first = number % parts * part;
    f(number / parts, first, whole - first < part ? whole - first : part);
  }
}

}  // namespace

void squeeze_mean(const SqueezeExcitation& job, int64_t begin, int64_t end) {
  const float share = 1.0f / static_cast<float>(job.positions);
  each_part(job.channels, job.channels_per_task, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
    each_vector(count, [&](int64_t c, int lanes) {
      const float* from = job.sums + sample * job.rows * job.channels + first + c;
      VecF sum{};
      for (int64_t row = 0; row < job.rows; ++row) sum += load_first(from + row * job.channels, lanes);
      store_first(sum * share, job.mean + sample * job.channels + first + c, lanes);
    });
  });
}

void squeeze_hidden(const SqueezeExcitation& job, int64_t begin, int64_t end) {
  each_part(job.hidden_channels, job.hidden_per_task, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
    const float* mean = job.mean + sample * job.channels;
    float* out = job.hidden + sample * job.hidden_channels + first;
    for (int64_t h = 0; h < count; ++h) {
      const float* row = job.reduce + (first + h) * job.channels;
      VecF sum{};
      each_vector(job.channels, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        sum += load_first(row + c, lanes) * load_first(mean + c, lanes);
      });
      out[h] = lane_sum(sum) + job.reduce_bias[first + h];
    }
    each_vector(count, [&](int64_t h, int lanes) { store_first(silu(load_first(out + h, lanes)), out + h, lanes); });
  });
}

void squeeze_gate(const SqueezeExcitation& job, int64_t begin, int64_t end) {
  each_part(job.channels, job.channels_per_task, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
    const float* hidden = job.hidden + sample * job.hidden_channels;
    each_vector(count, [&](int64_t c, int lanes) {
      VecF sum = load_first(job.expand_bias + first + c, lanes);
      for (int64_t h = 0; h < job.hidden_channels; ++h)
        sum += splat<VecF>(hidden[h]) * load_first(job.expand + h * job.channels + first + c, lanes);
      store_first(sigmoid(sum), job.gate + sample * job.channels + first + c, lanes);
    });
  });
}

}  // namespace BTI_FAST_ISA
}  // namespace bti_fast
