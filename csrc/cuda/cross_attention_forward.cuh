// Forward sweep of cross_attention over one split of the dense tokens. Both directions are the same step on the same
// tiles with the roles swapped: class tokens attend to the tile's tokens (their softmax goes on from tile to tile), then
// the tile's tokens to the class tokens (theirs ends with the tile). The scores are computed for each: as mma products
// they cost less than the shuffles by which one direction would reduce the other's registers.
#pragma once

#include <cmath>

#include "common/online_softmax.h"
#include "cuda/tiles.cuh"

namespace bti_fast {

// Warps: 16 tokens of a tile each. Rows: 16-row groups of class tokens that a warp's registers accumulate, so that
// 16 * Warps * Rows class tokens stay in shared memory. Stages: tiles of q and v_q on the way or in use. Blocks: how many
// a multiprocessor should hold.
template <typename T_, int D_, bool ChannelMajor_, int Warps, int Rows_, int Stages, int Blocks>
struct ForwardShape {
  using T = T_;
  static constexpr int D = D_, warps = Warps, rows = Rows_, stages = Stages, blocks = Blocks;
  static constexpr bool channel_major = ChannelMajor_;
  static constexpr int threads = 32 * warps, tokens = 16 * warps;
  static constexpr int class_tokens = 16 * warps * rows;
  static constexpr int class_pitch = D + kPitch;
  static constexpr int kept = 16 * D + 128;  // floats of 16 tokens that wait for more class tokens: values, peaks, sums
  using Dense = Tile<T, channel_major, D, tokens>;

  static constexpr BTI_FAST_HD int padded(int m) { return ((m < class_tokens ? m : class_tokens) + 31) / 32 * 32; }
  // Bytes of shared memory with m class tokens: k, v_k, the tiles, which tokens take part.
  static constexpr BTI_FAST_HD int shared(int m) {
    return 2 * padded(m) * class_pitch * static_cast<int>(sizeof(T)) + 2 * stages * Dense::bytes +
           (padded(m) + stages * tokens) * 4;
  }
  // 2^row_shift warps lie along the class tokens; the others share their rows and divide the tile's tokens.
  static constexpr BTI_FAST_HD int row_shift(int m) { return m <= 32 ? 1 : (m <= 64 || warps == 4 ? 2 : 3); }
  // Parts that the blocks of a split leave for a class token.
  static constexpr BTI_FAST_HD int parts(int m) { return warps >> row_shift(m); }
};

// Online softmax of 16 rows: of every lane's two rows the peak, its part of the sum, and the weighted values.
template <int D>
struct Attended {
  float peak[2] = {kNothing, kNothing}, sum[2] = {}, values[D / 8][4] = {};
};

BTI_FAST_DEVICE SoftmaxStatistics finished(float peak, float sum) { return {softmax_shift(peak), logf(sum)}; }

// 16 rows of a tile as left operands: held in registers, or read anew for every use where they would fill them.
template <int D, typename T, bool RowMajor>
struct Rows {
  static constexpr bool held = sizeof(T) * D <= 256;
  Matrix<T, RowMajor> tile;
  int first;
  FragmentA<T> at[held ? D / 16 : 1];

  BTI_FAST_DEVICE Rows(const Matrix<T, RowMajor>& tile, int first) : tile(tile), first(first) {
    if constexpr (held) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) at[k] = load_a(tile, first, 16 * k);
    }
  }
  BTI_FAST_DEVICE FragmentA<T> operator()(int k) const {
    if constexpr (held) {
      return at[k];
    } else {
      return load_a(tile, first, 16 * k);
    }
  }
};

// 16 rows attend to tokens [begin, end) of keys and values; on: 1 where a token takes part.
template <int D, typename T, bool RowMajor, typename Keys, typename Values>
BTI_FAST_DEVICE void attend(const Rows<D, T, RowMajor>& rows, const Keys& keys, const Values& values, const float* on,
                            int begin, int end, float scale, Attended<D>& state) {
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    float x[4][4];
    float peak[2] = {state.peak[0], state.peak[1]};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      Score<T> score[2];
#pragma unroll(rows.held ? D / 16 : 1)
      for (int k = 0; k < D / 16; ++k) {
        const FragmentA<T> a = rows(k);
        FragmentB<T> b[2];
        load_b(keys.transposed(), 16 * k, first + 16 * p, b);
        score[0].add(a, b[0]);
        score[1].add(a, b[1]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int tile = 2 * p + (i >> 2);
        const bool here = on[first + 8 * tile + accumulator_column(i & 3)] != 0.0f;
        const float value = here ? score[i >> 2].value(i & 3) * scale : kNothing;
        x[tile][i & 3] = value;
        peak[(i >> 1) & 1] = softmax_peak(value, peak[(i >> 1) & 1]);
      }
    }
    float weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = softmax_peak(shuffle_xor(peak[r], 1), peak[r]);
      peak[r] = softmax_peak(shuffle_xor(peak[r], 2), peak[r]);
      weight[r] = softmax_weight(state.peak[r], peak[r], [](float d) { return exp2_fast(d * kLog2E); });
      state.peak[r] = peak[r];
    }
    if (any_lane(!(weight[0] == 1.0f && weight[1] == 1.0f))) {
#pragma unroll
      for (int r = 0; r < 2; ++r) state.sum[r] *= weight[r];
#pragma unroll
      for (int p = 0; p < D / 8; ++p) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.values[p][i] *= weight[i >> 1];
      }
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[tile][i] = exp2_fast((x[tile][i] - softmax_shift(state.peak[i >> 1])) * kLog2E);
        state.sum[i >> 1] += x[tile][i];
      }
    }
#pragma unroll
    for (int p = 0; p < 2; ++p)
      multiply_row(state.values, as_operand<T>(x[2 * p], x[2 * p + 1]), values, first + 16 * p);
  }
}

template <typename Shape>
BTI_FAST_DEVICE void forward_sweep(const CrossForward& job, unsigned char* shared) {
  using T = typename Shape::T;
  using Dense = typename Shape::Dense;
  constexpr int D = Shape::D, stages = Shape::stages, tokens = Shape::tokens;
  const CrossShape& s = job.shape;
  const int thread = thread_index(), warp = thread >> 5, lane = thread & 31;
  const int group = block_index() / s.splits, split = block_index() - group * s.splits;
  const int batch = group / s.heads, head = group - batch * s.heads;
  const int begin = split * s.split_tokens, end = s.n - begin < s.split_tokens ? s.n : begin + s.split_tokens;
  const TokenMask q_mask = mask_of(s.q_mask, batch), k_mask = mask_of(s.k_mask, batch);
  const auto q = head_of<const T>(job.q, batch, head), v_q = head_of<const T>(job.v_q, batch, head);
  const auto out_q = head_of<T>(job.out_q, batch, head);
  SoftmaxStatistics* const statistics = job.statistics + int64_t{group} * (s.n + s.m);

  const int most = Shape::padded(s.m);
  const Matrix<T, true> k{reinterpret_cast<T*>(shared), Shape::class_pitch};
  const Matrix<T, true> v_k{k.data + most * Shape::class_pitch, Shape::class_pitch};
  T* const q_tiles = v_k.data + most * Shape::class_pitch;
  T* const v_tiles = q_tiles + stages * Dense::elements;
  float* const class_on = reinterpret_cast<float*>(v_tiles + stages * Dense::elements);
  float* const token_on = class_on + most;

  const auto fetch = [&](int first, int stage) {
    const int count = end - first < tokens ? end - first : tokens;
    load_tile<D>(Dense::matrix(q_tiles + stage * Dense::elements), q, tokens, first, count, q_mask, thread,
                 Shape::threads);
    load_tile<D>(Dense::matrix(v_tiles + stage * Dense::elements), v_q, tokens, first, count, q_mask, thread,
                 Shape::threads);
    for (int i = thread; i < tokens; i += Shape::threads)
      token_on[stage * tokens + i] = i < count && q_mask(first + i) ? 1.0f : 0.0f;
  };

  const int row_shift = Shape::row_shift(s.m), row_warps = 1 << row_shift;
  const int part = warp >> row_shift, span = 16 << row_shift;  // its share of the tile's tokens
  int block = 0;
  do {
    const int count = s.m - block < Shape::class_tokens ? s.m - block : Shape::class_tokens;
    const int padded = (count + 31) / 32 * 32;
    load_tile<D>(k, head_of<const T>(job.k, batch, head), padded, block, count, k_mask, thread, Shape::threads);
    load_tile<D>(v_k, head_of<const T>(job.v_k, batch, head), padded, block, count, k_mask, thread, Shape::threads);
    for (int i = thread; i < padded; i += Shape::threads) class_on[i] = i < count && k_mask(block + i) ? 1.0f : 0.0f;
    Attended<D> columns[Shape::rows];
    if (begin < end) {
      fetch(begin, 0);
    } else {
      copy_wait();
    }

    for (int first = begin; first < end; first += tokens) {
      const int stage = stages == 1 ? 0 : (first - begin) / tokens & 1;
      copy_wait();
      sync_block();  // the tile is there, and nobody reads the one before any more
      if (stages > 1 && first + tokens < end) fetch(first + tokens, 1 - stage);
      const auto q_tile = Dense::matrix(q_tiles + stage * Dense::elements);
      const auto v_tile = Dense::matrix(v_tiles + stage * Dense::elements);
#pragma unroll
      for (int r = 0; r < Shape::rows; ++r) {
        const int row = 16 * ((warp & (row_warps - 1)) + r * row_warps);
        if (row < count)
          attend(Rows<D, T, true>(k, row), q_tile, v_tile, token_on + stage * tokens, part * span, (part + 1) * span,
                 s.scale, columns[r]);
      }
      sync_block();  // v_q has served: from here on a warp's results pass through its own rows of it

      const int own = 16 * warp;
      const int here = end - first - own < 16 ? end - first - own : 16;
      if (here > 0) {
        Attended<D> rows;
        float* const kept = job.kept + kept_offset(s, group, first + own, Shape::kept);
        if (block > 0) {
          float ends[1][4];
          recall(kept, rows.values);
          recall(kept + 16 * D, ends);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            rows.peak[r] = ends[0][r];
            rows.sum[r] = ends[0][2 + r];
          }
        }
        attend(Rows<D, T, !Shape::channel_major>(q_tile, own), k, v_k, class_on, 0, padded, s.scale, rows);
        if (block + Shape::class_tokens < s.m) {
          const float ends[1][4] = {{rows.peak[0], rows.peak[1], rows.sum[0], rows.sum[1]}};
          keep(kept, rows.values);
          keep(kept + 16 * D, ends);
        } else {
          float inverse[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = accumulator_row(2 * r);
            const bool on = token_on[stage * tokens + own + row] != 0.0f;
            const float sum = quad_sum(rows.sum[r]);
            inverse[r] = on ? softmax_inverse(sum) : 0.0f;
            if ((lane & 3) == 0 && row < here)
              statistics[first + own + row] = on ? finished(rows.peak[r], sum) : finished(kNothing, 0.0f);
          }
          put_rows(v_tile, own, rows.values, inverse);
          sync_warp();
          store_rows<D>(v_tile, own, out_q, first + own, here);
        }
      }
      if (stages == 1 && first + tokens < end) {
        sync_block();
        fetch(first + tokens, 0);
      }
    }

    const int64_t at = int64_t{group} * job.parts + split * (Shape::warps >> row_shift) + part;
    float* const out = job.partial + at * forward_partial(s);
#pragma unroll
    for (int r = 0; r < Shape::rows; ++r) {
      const int row = 16 * ((warp & (row_warps - 1)) + r * row_warps);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = row + accumulator_row(i);
        const float sum = quad_sum(columns[r].sum[i >> 1]);
        if (j >= count) continue;
        if ((lane & 3) == 0 && (i & 1) == 0) {
          out[block + j] = columns[r].peak[i >> 1];
          out[s.m + block + j] = sum;
        }
#pragma unroll
        for (int p = 0; p < D / 8; ++p) {
          const int c = 8 * p + accumulator_column(i);
          if (c < s.e) out[2 * s.m + (block + j) * s.e + c] = columns[r].values[p][i];
        }
      }
    }
    sync_block();  // the next class tokens take the place of these
    block += Shape::class_tokens;
  } while (block < s.m);
}

// out_k and the statistics of the columns out of their parts, in order. One thread for each (head, class token,
// channel), of `index` out of groups * m * e.
template <typename T>
BTI_FAST_DEVICE void forward_combine(const CrossForward& job, int64_t index) {
  const CrossShape& s = job.shape;
  const int channel = static_cast<int>(index % s.e), j = static_cast<int>(index / s.e % s.m);
  const int64_t group = index / s.e / s.m, batch = group / s.heads;
  const float* const parts = job.partial + group * job.parts * forward_partial(s);
  float total = kNothing, sum = 0.0f, value = 0.0f;
  for (int p = 0; p < job.parts; ++p) total = softmax_peak(parts[p * forward_partial(s) + j], total);
  for (int p = 0; p < job.parts; ++p) {
    const float* const part = parts + p * forward_partial(s);
    const float weight = softmax_weight(part[j], total, [](float d) { return exp2_fast(d * kLog2E); });
    sum += weight * part[s.m + j];
    value += weight * part[2 * s.m + j * s.e + channel];
  }
  const bool on = mask_of(s.k_mask, batch)(j);
  const auto out = head_of<T>(job.out_k, batch, group % s.heads);
  narrow(on ? value * softmax_inverse(sum) : 0.0f, out.data[j * out.token + channel * out.channel]);
  if (channel == 0)
    job.statistics[group * (s.n + s.m) + s.n + j] = on ? finished(total, sum) : finished(kNothing, 0.0f);
}

}  // namespace bti_fast
