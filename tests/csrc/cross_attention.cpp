// The CUDA kernels of cross_attention run block by block on the CPU (emulator.h), for tests/csrc/test_cross_attention.py.
// Compiled once per storage dtype, -DSTORAGE=float | Half | BFloat16, for some channels, -DBTI_FAST_CHANNELS=16,64.
#include "emulator.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/cross_attention_shapes.cuh"

namespace {

using namespace bti_fast;
using T = STORAGE;

constexpr unsigned char kGuard = 0xa5;

// Runs sweep(job, shared memory) for every block of the grid; throws where it went wrong.
template <typename Job, typename Sweep>
void run_blocks(const Job& job, int threads, int bytes, bool late, bool descending, Sweep sweep) {
  Block block;
  block.late_copies = late;
  block.descending = descending;
  std::vector<unsigned char> memory(bytes + 64);
  unsigned char* const shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  for (int64_t i = 0; i < job.shape.groups * job.shape.splits; ++i) {
    std::fill(memory.begin(), memory.end(), static_cast<unsigned char>(0xff));  // NaN in every dtype
    std::fill(shared + bytes, shared + bytes + 16, kGuard);
    block.index = static_cast<int>(i);
    block.run(threads, [&] { sweep(job, shared); });
    for (int k = 0; k < 16; ++k)
      if (shared[bytes + k] != kGuard) throw std::runtime_error("shared memory was written beyond its end");
  }
}

template <int D>
void check_channels(const CrossShape& s) {
  if (kernel_channels(s.d, s.e) != D) throw std::runtime_error("not compiled for this number of channels");
}

template <typename Run>
int reported(char* message, int length, Run run) {
  try {
    return run();
  } catch (const std::exception& failure) {
    std::string(failure.what()).copy(message, length - 1);
    return -1;
  }
}

}  // namespace

// Bytes of shared memory that the call would use, or -1 and a message.
extern "C" int cross_forward(const CrossForward* call, int limit, int late, int descending, char* message,
                             int length) {
  return reported(message, length, [&] {
    CrossForward job = *call;
    set_vectors(job, is_channel_major(job.q), sizeof(T));
    return with_shape<T>(job, limit, [&](auto shape) {
      using Shape = decltype(shape);
      check_channels<Shape::D>(job.shape);
      job.parts = job.shape.splits * Shape::parts(job.shape.m);
      std::vector<float> partial(job.shape.groups * job.parts * forward_partial(job.shape) + 1, NAN);
      job.partial = partial.data();
      std::vector<float> kept(kept_size(job.shape, Shape::class_tokens, Shape::kept), NAN);
      job.kept = kept.data();
      const int bytes = Shape::shared(job.shape.m);
      if (bytes > limit) throw std::runtime_error("needs more shared memory than there is");
      run_blocks(job, Shape::threads, bytes, late, descending, forward_sweep<Shape>);
      for (int64_t i = 0; i < job.shape.groups * job.shape.m * job.shape.e; ++i) forward_combine<T>(job, i);
      return bytes;
    });
  });
}

extern "C" int cross_backward(const CrossBackward* call, int limit, int late, int descending, char* message,
                              int length) {
  return reported(message, length, [&] {
    CrossBackward job = *call;
    set_vectors(job, is_channel_major(job.q), sizeof(T));
    set_column_gain(job, std::is_same_v<T, Half>);
    return with_shape<T>(job, limit, [&](auto shape) {
      using Shape = decltype(shape);
      check_channels<Shape::D>(job.shape);
      std::vector<float> partial(job.shape.groups * job.shape.splits * backward_partial(job.shape) + 1, NAN);
      job.partial = partial.data();
      std::vector<float> kept(kept_size(job.shape, Shape::class_tokens, Shape::kept), NAN);
      job.kept = kept.data();
      run_blocks(job, Shape::threads, Shape::shared, late, descending, backward_sweep<Shape>);
      for (int64_t i = 0; i < job.shape.groups * backward_partial(job.shape); ++i) backward_combine<T>(job, i);
      return Shape::shared;
    });
  });
}
