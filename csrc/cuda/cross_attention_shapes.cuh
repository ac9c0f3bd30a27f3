// Which variant of the sweeps runs a call: warps, tiles and class blocks that fit into registers and shared memory.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/cross_attention_backward.cuh"
#include "cuda/cross_attention_forward.cuh"

namespace bti_fast {

// The kernels' channels for head dimensions d and e: the next of 16, 32, 64, 128; the rest is zeros.
inline int kernel_channels(int d, int e) {
  int channels = 16;
  while (channels < d || channels < e) channels *= 2;
  return channels;
}

// Shared memory that a block may have on the chips that all variants but one are made for (sm_80; sm_90 and sm_100 have
// 227 KiB).
constexpr int kLeastShared = 163 * 1024;

// Calls f with an object of the ForwardShape for head dimension D and m class tokens.
template <typename T, bool ChannelMajor, int D, typename F>
auto with_forward_shape(int m, F f) {
  constexpr int bytes = static_cast<int>(sizeof(T)) * D;
  if constexpr (bytes <= 128) {
    using Large = ForwardShape<T, D, ChannelMajor, 8, 2, 2, 1>;
    static_assert(Large::shared(256) <= kLeastShared, "fits");
    if (m <= 64) return f(ForwardShape<T, D, ChannelMajor, 4, 1, 2, 3>{});
    return f(Large{});
  } else {
    using Only = ForwardShape<T, D, ChannelMajor, bytes == 256 ? 8 : 4, 1, 1, 1>;
    static_assert(Only::shared(256) <= kLeastShared, "fits");
    return f(Only{});
  }
}

// The same for the backward; `limit`: bytes of shared memory that a block may have.
template <typename T, bool ChannelMajor, int D, typename F>
auto with_backward_shape(int m, int limit, F f) {
  constexpr int bytes = static_cast<int>(sizeof(T)) * D;
  if constexpr (bytes <= 128) {
    using Small = BackwardShape<T, D, ChannelMajor, 16, 4, 2, 3>;
    using Middle = BackwardShape<T, D, ChannelMajor, 64, 4, 2, 2>;
    static_assert(Small::shared <= kLeastShared && Middle::shared <= kLeastShared, "fits");
    if (m <= 16) return f(Small{});
    if constexpr (sizeof(T) == 2) {
      using Large = BackwardShape<T, D, ChannelMajor, 128, 8, 1, 1>;
      static_assert(Large::shared <= 227 * 1024, "fits sm_90 and sm_100");
      if (m > 64 && Large::shared <= limit) return f(Large{});
    }
    return f(Middle{});
  } else {
    using Only = BackwardShape<T, D, ChannelMajor, bytes == 256 ? 32 : 16, sizeof(T) == 2 ? 8 : 4, 1, 1>;
    static_assert(Only::shared <= kLeastShared, "fits");
    return f(Only{});
  }
}

// The numbers of channels that are compiled; tests compile a few.
#ifndef BTI_FAST_CHANNELS
#define BTI_FAST_CHANNELS 16, 32, 64, 128
#endif
using Channels = std::integer_sequence<int, BTI_FAST_CHANNELS>;

template <typename F, int D, int... Rest>
auto with_channels(std::integer_sequence<int, D, Rest...>, int channels, F f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (channels != D) return with_channels(std::integer_sequence<int, Rest...>{}, channels, f);
  }
  return f(std::integral_constant<int, D>{});
}

// Calls f(shape) for a call's dtype, channels, order of the dense side, and number of class tokens.
template <typename T, typename F>
auto with_shape(const CrossForward& job, int, F f) {
  return with_channels(Channels{}, kernel_channels(job.shape.d, job.shape.e), [&](auto channels) {
    constexpr int D = decltype(channels)::value;
    const int m = job.shape.m;
    return is_channel_major(job.q) ? with_forward_shape<T, true, D>(m, f) : with_forward_shape<T, false, D>(m, f);
  });
}
template <typename T, typename F>
auto with_shape(const CrossBackward& job, int limit, F f) {
  return with_channels(Channels{}, kernel_channels(job.shape.d, job.shape.e), [&](auto channels) {
    constexpr int D = decltype(channels)::value;
    const int m = job.shape.m;
    return is_channel_major(job.q) ? with_backward_shape<T, true, D>(m, limit, f)
                                   : with_backward_shape<T, false, D>(m, limit, f);
  });
}

}  // namespace bti_fast
