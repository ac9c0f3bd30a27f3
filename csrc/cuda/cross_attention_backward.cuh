// Backward sweep of cross_attention over one split of the dense tokens, from the saved statistics. With
// P = e^(s - peak - log_sum) of either direction and mean = sum over channels of dO * O:
//   dS = P_row (dO_q v_k' - mean_row) + P_col (v_q dO_k' - mean_col)
//   dv_q = P_col dO_k    dq = scale dS k    dv_k += P_row' dO_q    dk += scale dS' q
// A warp takes 16 tokens for the first line and its two products, then hands P_row and dS over through shared memory for
// the two sums over tokens, which the warps hold in registers, each its share of class tokens and channels.
#pragma once

#include "cuda/cross_attention_means.cuh"

namespace bti_fast {

// ClassTokens: the class block that stays in shared memory. The rest as in ForwardShape.
template <typename T_, int D_, bool ChannelMajor_, int ClassTokens, int Warps, int Stages, int Blocks>
struct BackwardShape {
  using T = T_;
  static constexpr int D = D_, warps = Warps, stages = Stages, class_tokens = ClassTokens, blocks = Blocks;
  static constexpr bool channel_major = ChannelMajor_;
  static constexpr int threads = 32 * warps, tokens = 16 * warps;
  static constexpr int class_pitch = D + kPitch, weight_pitch = class_tokens + kPitch;
  static constexpr int kept = 2 * 16 * D;  // floats of 16 tokens that wait for more class tokens: dq and dv_q
  using Dense = Tile<T, channel_major, D, tokens>;
  // How the sums over tokens, class_tokens x D each, are shared: warps along the class tokens and along the channels, and
  // what one has of 16-row groups and of 16-channel groups.
  static constexpr int row_warps = class_tokens / 16 < warps ? class_tokens / 16 : warps;
  static constexpr int channel_warps = warps / row_warps;
  static constexpr int rows = class_tokens / 16 / row_warps;
  static constexpr int channels = (D / 16 + channel_warps - 1) / channel_warps;
  // Bytes of shared memory: k, v_k and dO_k; the tiles of q, v_q and dO_q; P_row and dS; terms of every token.
  static constexpr int shared = 3 * class_tokens * class_pitch * static_cast<int>(sizeof(T)) +
                                3 * stages * Dense::bytes + 2 * tokens * weight_pitch * static_cast<int>(sizeof(T)) +
                                (class_tokens + tokens) * static_cast<int>(sizeof(SoftmaxTerms));
};

template <typename Shape>
BTI_FAST_DEVICE void backward_sweep(const CrossBackward& job, unsigned char* shared) {
  using T = typename Shape::T;
  using Dense = typename Shape::Dense;
  constexpr int D = Shape::D, stages = Shape::stages, tokens = Shape::tokens, threads = Shape::threads;
  constexpr int class_elements = Shape::class_tokens * Shape::class_pitch;
  const CrossShape& s = job.shape;
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31;
  // Places and addresses are computed where they are used: sums over channels fill the registers.
  const auto group = [&] { return block_index() / s.splits; };
  const auto into = [&](const Operand& view) {
    const int at = group();
    return head_of<T>(view, at / s.heads, at % s.heads);
  };
  const auto of = [&](const Operand& view) {
    const int at = group();
    return head_of<const T>(view, at / s.heads, at % s.heads);
  };
  const auto mask = [&](const MaskView& view) { return mask_of(view, group() / s.heads); };
  const auto statistics = [&](int at, bool there) {
    return there ? job.statistics[int64_t{group()} * (s.n + s.m) + at] : SoftmaxStatistics{0.0f, kNothing};
  };
  const int begin = block_index() % s.splits * s.split_tokens;
  const int end = s.n - begin < s.split_tokens ? s.n : begin + s.split_tokens;

  T* next = reinterpret_cast<T*>(shared);
  const auto take = [&next](int elements) {
    T* const taken = next;
    next += elements;
    return taken;
  };
  const Matrix<T, true> k{take(class_elements), Shape::class_pitch}, v_k{take(class_elements), Shape::class_pitch};
  const Matrix<T, true> grad_k{take(class_elements), Shape::class_pitch};
  T* const q_tiles = take(stages * Dense::elements);
  T* const v_tiles = take(stages * Dense::elements);
  T* const grad_tiles = take(stages * Dense::elements);
  const Matrix<T, true> weights{take(tokens * Shape::weight_pitch), Shape::weight_pitch};    // P_row
  const Matrix<T, true> gradients{take(tokens * Shape::weight_pitch), Shape::weight_pitch};  // dS
  SoftmaxTerms* const class_terms = reinterpret_cast<SoftmaxTerms*>(next);
  SoftmaxTerms* const token_terms = class_terms + Shape::class_tokens;

  const auto fetch = [&](int first, int stage) {
    const int count = end - first < tokens ? end - first : tokens;
    const auto fetch_tile = [&](T* tiles, const Operand& view) {
      const auto tile = Dense::matrix(tiles + stage * Dense::elements);
      load_tile<D>(tile, of(view), tokens, first, count, mask(s.q_mask), thread, threads);
    };
    fetch_tile(q_tiles, job.q);
    fetch_tile(v_tiles, job.v_q);
    fetch_tile(grad_tiles, job.grad_out_q);
  };

  // A softmax over one class token is constant: its gradient is exactly zero, and what rounding leaves of it must not
  // stand beside the gradients of the other direction, which are as small as 1 / N.
  const bool single = taking_part(mask(s.k_mask), s.m) == 1;

  const auto gradient_factor = [&] { return single ? s.scale * job.column_gain_inverse : s.scale; };

  int block = 0;
  do {
    const int count = s.m - block < Shape::class_tokens ? s.m - block : Shape::class_tokens;
    const auto fetch_class = [&](const Matrix<T, true>& to, const Operand& view) {
      load_tile<D>(to, of(view), Shape::class_tokens, block, count, mask(s.k_mask), thread, threads);
    };
    fetch_class(k, job.k);
    fetch_class(v_k, job.v_k);
    fetch_class(grad_k, job.grad_out_k);
    for (int i = thread; i < Shape::class_tokens; i += threads)
      class_terms[i].set(statistics(s.n + block + i, i < count));
    copy_wait();
    sync_block();
    column_means<D, Shape::class_tokens, Shape::warps>(grad_k, of(job.out_k), block, count, class_terms);

    float sum_k[Shape::rows][2 * Shape::channels][4] = {}, sum_v[Shape::rows][2 * Shape::channels][4] = {};
    if (begin < end) fetch(begin, 0);
    for (int first = begin; first < end; first += tokens) {
      const int stage = stages == 1 ? 0 : (first - begin) / tokens & 1;
      copy_wait();
      sync_block();  // the tile is there, and nobody reads the one before any more
      if (stages > 1 && first + tokens < end) fetch(first + tokens, 1 - stage);
      const auto q_tile = Dense::matrix(q_tiles + stage * Dense::elements);
      const auto v_tile = Dense::matrix(v_tiles + stage * Dense::elements);
      const auto grad_tile = Dense::matrix(grad_tiles + stage * Dense::elements);

      const int own = 16 * warp;
      const int here = end - first - own < 16 ? end - first - own : 16;
      if (here > 0) {
        float mean[2];
        row_means<D>(grad_tile, own, of(job.out_q), first + own, here, mean);
        if ((lane & 3) == 0) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = accumulator_row(2 * r);
            SoftmaxTerms& terms = token_terms[own + row];
            terms.set(statistics(first + own + row, row < here));
            terms.mean = mean[r];
          }
        }
        sync_warp();
        float sum_q[D / 8][4] = {}, sum_vq[D / 8][4] = {};
        const auto kept = [&] { return job.kept + kept_offset(s, group(), first + own, Shape::kept); };
        if (block > 0) {
          recall(kept(), sum_q);
          recall(kept() + 16 * D, sum_vq);
        }
#pragma unroll 1
        for (int j = 0; j < count; j += 16) {
          Score<T> score[2];
          float row_grad[2][4] = {}, column_grad[2][4] = {};
#pragma unroll(Shape::blocks == 2 ? 2 : 1)
          for (int c = 0; c < D; c += 16) {
            FragmentB<T> b[2];
            FragmentA<T> a = load_a(q_tile, own, c);
            load_b(k.transposed(), c, j, b);
            score[0].add(a, b[0]);
            score[1].add(a, b[1]);
            a = load_a(grad_tile, own, c);
            load_b(v_k.transposed(), c, j, b);
            multiply(row_grad[0], a, b[0]);
            multiply(row_grad[1], a, b[1]);
            a = load_a(v_tile, own, c);
            load_b(grad_k.transposed(), c, j, b);
            multiply(column_grad[0], a, b[0]);
            multiply(column_grad[1], a, b[1]);
          }
          float row_weight[2][4], column_weight[2][4];
#pragma unroll
          for (int p = 0; p < 2; ++p) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const SoftmaxTerms row = token_terms[own + accumulator_row(i)];
              const SoftmaxTerms column = class_terms[j + 8 * p + accumulator_column(i)];
              const float x = row.takes_part() && column.takes_part() ? score[p].value(i) * s.scale : kNothing;
              row_weight[p][i] = row.weight(x);
              column_weight[p][i] = column.weight(x);
              const float of_row = softmax_gradient(row_weight[p][i], row_grad[p][i], row.mean);
              const float of_column = softmax_gradient(column_weight[p][i], column_grad[p][i], column.mean);
              row_grad[p][i] = single ? job.column_gain * of_column : of_row + of_column;
              column_weight[p][i] *= job.column_gain;
            }
          }
          const FragmentA<T> weight = as_operand<T>(row_weight[0], row_weight[1]);
          const FragmentA<T> gradient = as_operand<T>(row_grad[0], row_grad[1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = own + (lane >> 2) + (i & 1) * 8, column = j + (lane & 3) * 2 + (i >> 1) * 8;
            *reinterpret_cast<Pair<T>*>(weights.at(row, column)) = weight.at[i];
            *reinterpret_cast<Pair<T>*>(gradients.at(row, column)) = gradient.at[i];
          }
          multiply_row(sum_vq, as_operand<T>(column_weight[0], column_weight[1]), grad_k, j);
          multiply_row(sum_q, gradient, k, j);
        }

        if (block + Shape::class_tokens < s.m) {
          keep(kept(), sum_q);
          keep(kept() + 16 * D, sum_vq);
        } else {  // the warp's rows of v_q have served: its results pass through them
          const auto put = [&](const float(&sum)[D / 8][4], float factor, const Operand& view) {
            const float factors[2] = {factor, factor};
            sync_warp();
            put_rows(v_tile, own, sum, factors);
            sync_warp();
            store_rows<D>(v_tile, own, into(view), first + own, here);
          };
          put(sum_vq, job.column_gain_inverse, job.grad_v_q);
          put(sum_q, gradient_factor(), job.grad_q);
        }
      }
      sync_block();  // P_row and dS of all tokens are there

#pragma unroll
      for (int r = 0; r < Shape::rows; ++r) {
        const int row = 16 * (warp % Shape::row_warps + r * Shape::row_warps);
        if (row < count) {
#pragma unroll 1
          for (int token = 0; token < tokens && first + token < end; token += 16) {
            const FragmentA<T> gradient = load_a(gradients.transposed(), row, token);
            const FragmentA<T> weight = load_a(weights.transposed(), row, token);
#pragma unroll
            for (int c = 0; c < Shape::channels; ++c) {
              const int channel = 16 * (warp / Shape::row_warps + c * Shape::channel_warps);
              if (channel < D) {
                FragmentB<T> b[2];
                load_b(q_tile, token, channel, b);
                multiply(sum_k[r][2 * c], gradient, b[0]);
                multiply(sum_k[r][2 * c + 1], gradient, b[1]);
                load_b(grad_tile, token, channel, b);
                multiply(sum_v[r][2 * c], weight, b[0]);
                multiply(sum_v[r][2 * c + 1], weight, b[1]);
              }
            }
          }
        }
      }
      if (stages == 1 && first + tokens < end) {
        sync_block();
        fetch(first + tokens, 0);
      }
    }

    float* const out = job.partial + int64_t{block_index()} * backward_partial(s);
#pragma unroll
    for (int r = 0; r < Shape::rows; ++r) {
#pragma unroll
      for (int c = 0; c < 2 * Shape::channels; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 16 * (warp % Shape::row_warps + r * Shape::row_warps) + accumulator_row(i);
          const int channel = 16 * (warp / Shape::row_warps + c / 2 * Shape::channel_warps) + c % 2 * 8 +
                              accumulator_column(i);
          if (j >= count) continue;
          if (channel < s.d) out[(block + j) * s.d + channel] = sum_k[r][c][i] * gradient_factor();
          if (channel < s.e) out[s.m * s.d + (block + j) * s.e + channel] = sum_v[r][c][i];
        }
      }
    }
    sync_block();  // the next class tokens take the place of these
    block += Shape::class_tokens;
  } while (block < s.m);
}

// grad_k and grad_v_k out of the sums of the splits, in order. One thread for each (head, class token, channel of k,
// then of v_k), of `index` out of groups * m * (d + e).
template <typename T>
BTI_FAST_DEVICE void backward_combine(const CrossBackward& job, int64_t index) {
  const CrossShape& s = job.shape;
  const int64_t group = index / backward_partial(s);
  const int at = static_cast<int>(index % backward_partial(s));
  const float* const parts = job.partial + group * s.splits * backward_partial(s);
  float sum = 0.0f;
  for (int64_t p = 0; p < s.splits; ++p) sum += parts[p * backward_partial(s) + at];
  const bool of_k = at < s.m * s.d;
  const int in = of_k ? at : at - s.m * s.d, channels = of_k ? s.d : s.e;
  const auto out = head_of<T>(of_k ? job.grad_k : job.grad_v_k, group / s.heads, group % s.heads);
  narrow(sum, out.data[in / channels * out.token + in % channels * out.channel]);
}

}  // namespace bti_fast
