// A block of CUDA threads on the CPU: every thread is a fiber, run in turn on one core, and what csrc/cuda/warp.cuh asks
// of the machine is defined here after the PTX manual, element by element. Meant to find mistakes:
//  - an asynchronous copy happens at its copy_wait and no sooner, or at once, as `late_copies` says;
//  - threads run in ascending or descending order, as `descending` says: results that differ show a race;
//  - shared memory starts as NaN, and its accesses beyond the block's end hit a guard that is checked.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#define BTI_FAST_DEVICE inline

namespace bti_fast {

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return same_bits<float>(uint32_t{x.bits} << 16); }
inline float widen(Half x) { return static_cast<float>(same_bits<_Float16>(x.bits)); }
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, Half& out) { out.bits = same_bits<uint16_t>(static_cast<_Float16>(x)); }
inline void narrow(float x, BFloat16& out) {
  const uint32_t b = same_bits<uint32_t>(x);
  out.bits = x != x ? 0x7fc0u : static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

template <typename T, int N>
struct Pack { T at[N]; };

// One block: its threads and what they meet at.
class Block {
 public:
  static constexpr int kSlot = 64;  // bytes that a lane shows to its warp
  static constexpr std::size_t kStack = 256 * 1024;

  struct Copy { void* to; const void* from; int bytes, valid; };
  struct Meeting { int arrived = 0; int64_t generation = 0; };

  bool late_copies = true, descending = false;
  int index = 0;

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  // Runs body() once for each of `threads` threads.
  void run(int threads, const std::function<void()>& body) {
    current() = this;
    body_ = &body;
    fibers_.assign(threads, {});
    warps_.assign(threads / 32, {});
    slots_.assign(static_cast<std::size_t>(threads) * 2 * kSlot, 0);
    if (stacks_.size() < threads * kStack) stacks_.resize(threads * kStack);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_.data() + t * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, &Block::start, 0);
    }
    int left = threads;
    for (int64_t idle = 0; left > 0; ++idle) {
      for (int i = 0; i < threads; ++i) {
        running_ = descending ? threads - 1 - i : i;
        Fiber& fiber = fibers_[running_];
        if (fiber.done || (fiber.at != nullptr && fiber.at->generation == fiber.generation)) continue;
        fiber.at = nullptr;
        idle = 0;
        resume(fiber);
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
        if (fiber.done) --left;
      }
      if (idle > 2) throw std::runtime_error("threads wait for each other for ever");
    }
    for (const Fiber& fiber : fibers_)
      if (!fiber.copies.empty()) throw std::runtime_error("a copy was never waited for");
  }

  int thread() const { return running_; }
  void meet_block() { meet(block_, static_cast<int>(fibers_.size())); }

  // Shows `mine` to the lanes of this warp and returns what each of them shows, kSlot bytes apart.
  const unsigned char* meet_warp(const void* mine, std::size_t bytes) {
    Fiber& fiber = fibers_[running_];
    unsigned char* const slots = slots_.data() + static_cast<std::size_t>(running_ / 32) * 2 * 32 * kSlot;
    unsigned char* const side = slots + (fiber.collectives++ & 1) * 32 * kSlot;
    if (bytes > 0) std::memcpy(side + running_ % 32 * kSlot, mine, bytes);
    meet(warps_[running_ / 32], 32);
    return side;
  }

  void copy(const Copy& copy) {
    if (late_copies) fibers_[running_].copies.push_back(copy);
    else perform(copy);
  }
  void wait() {
    for (const Copy& copy : fibers_[running_].copies) perform(copy);
    fibers_[running_].copies.clear();
  }

 private:
  // A context begins a fiber; later changes go by jumps, as changing contexts is two calls of the kernel each.
  struct Fiber {
    ucontext_t context;
    jmp_buf here;
    bool begun = false;
    Meeting* at = nullptr;
    int64_t generation = 0;
    int collectives = 0;
    bool done = false;
    std::vector<Copy> copies;
  };

  static void start() {
    Block* const block = current();
    try {
      (*block->body_)();
    } catch (...) {
      block->failure_ = std::current_exception();
    }
    block->fibers_[block->running_].done = true;
    _longjmp(block->main_, 1);
  }
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(main_) != 0) return;
    if (std::exchange(fiber.begun, true)) _longjmp(fiber.here, 1);
    setcontext(&fiber.context);
  }
  __attribute__((noinline)) void leave(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(main_, 1);
  }
  static void perform(const Copy& copy) {
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
  }
  void meet(Meeting& meeting, int all) {
    Fiber& fiber = fibers_[running_];
    if (++meeting.arrived == all) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    fiber.at = &meeting;
    fiber.generation = meeting.generation;
    leave(fiber);
  }

  const std::function<void()>* body_ = nullptr;
  jmp_buf main_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  Meeting block_;
  std::vector<unsigned char> slots_, stacks_;
  int running_ = 0;
  std::exception_ptr failure_;
};

inline int thread_index() { return Block::current()->thread(); }
inline int block_index() { return Block::current()->index; }
inline void sync_block() { Block::current()->meet_block(); }
inline void sync_warp() { Block::current()->meet_warp(nullptr, 0); }

// What every lane of the warp shows.
template <typename V>
struct Shown {
  const unsigned char* slots;
  explicit Shown(const V& mine) : slots(Block::current()->meet_warp(&mine, sizeof(V))) {
    static_assert(sizeof(V) <= Block::kSlot, "fits a slot");
  }
  V operator[](int lane) const {
    V value;
    std::memcpy(&value, slots + lane * Block::kSlot, sizeof(V));
    return value;
  }
};

inline float shuffle_xor(float x, int mask) { return Shown<float>(x)[(thread_index() & 31) ^ mask]; }
inline float shuffle_from(float x, int lane) { return Shown<float>(x)[lane]; }
inline bool any_lane(bool x) {
  const Shown<bool> all(x);
  for (int lane = 0; lane < 32; ++lane)
    if (all[lane]) return true;
  return false;
}
inline float exp2_fast(float x) { return std::exp2(x); }

template <bool Transpose>
inline void load_matrices(const void* row, uint32_t (&out)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
  const Shown<const void*> rows(row);
  const int g = (thread_index() & 31) / 4, t = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int n = 0; n < 2; ++n) {
      const int r = Transpose ? 2 * t + n : g, c = Transpose ? g : 2 * t + n;
      pair[n] = static_cast<const uint16_t*>(rows[8 * i + r])[c];
    }
    std::memcpy(&out[i], pair, 4);
  }
}

struct Operands { uint32_t a[4], b[2]; };

// mma with K columns of a: A(operands, row, k) and B(operands, k, column) pick an element out of the lane that has it.
template <int K, typename A, typename B>
inline void product(float (&c)[4], const Operands& mine, A element_a, B element_b) {
  const Shown<Operands> all(mine);
  const int g = (thread_index() & 31) / 4, t = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float sum = c[i];
    for (int k = 0; k < K; ++k) sum += element_a(all, row, k) * element_b(all, k, column);
    c[i] = sum;
  }
}

template <typename T>
inline T half_of(uint32_t pair, int i) { return T{static_cast<uint16_t>(pair >> (16 * i))}; }

template <typename T>
inline void multiply_add(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  // m16n8k16: a register's index is row / 8 + 2 (k / 8); b's is k / 8. The lane is 4 (row or column % 8) + k % 8 / 2.
  product<16>(
      c, mine,
      [](const Shown<Operands>& all, int row, int k) {
        return widen(half_of<T>(all[4 * (row % 8) + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2));
      },
      [](const Shown<Operands>& all, int k, int column) {
        return widen(half_of<T>(all[4 * column + k % 8 / 2].b[k / 8], k % 2));
      });
}

inline void multiply_add_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  Operands mine{};
  // The hardware reads the upper 19 bits of an operand.
  const auto upper = [](float x) { return same_bits<uint32_t>(x) & 0xffffe000u; };
  for (int i = 0; i < 4; ++i) mine.a[i] = upper(a[i]);
  for (int i = 0; i < 2; ++i) mine.b[i] = upper(b[i]);
  // m16n8k8: a register's index is row / 8 + 2 (k / 4); b's is k / 4. The lane is 4 (row or column % 8) + k % 4.
  product<8>(
      c, mine,
      [](const Shown<Operands>& all, int row, int k) {
        return same_bits<float>(all[4 * (row % 8) + k % 4].a[row / 8 + 2 * (k / 4)]);
      },
      [](const Shown<Operands>& all, int k, int column) { return same_bits<float>(all[4 * column + k % 4].b[k / 4]); });
}

// To nearest, halves away from zero.
inline float round_tf32(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  return std::isfinite(x) ? same_bits<float>((bits + 0x1000u) & 0xffffe000u) : x;
}

template <int Bytes>
inline void copy_async(void* to, const void* from, int valid) {
  static_assert(Bytes == 4 || Bytes == 16, "sizes in use");
  const uintptr_t both = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (both % Bytes != 0 || valid < 0 || valid > Bytes) throw std::runtime_error("cp.async: misaligned or a wrong size");
  Block::current()->copy({to, from, Bytes, valid});
}
inline void copy_wait() { Block::current()->wait(); }

template <typename T>
inline uint32_t pack(T, float low, float high) {
  T pair[2];
  narrow(low, pair[0]);
  narrow(high, pair[1]);
  return uint32_t{pair[0].bits} | uint32_t{pair[1].bits} << 16;
}

}  // namespace bti_fast
