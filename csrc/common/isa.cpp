#include "common/isa.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace bti_fast {

namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512};

Isa best() {
  static const Isa found = [] {
    Isa best = Isa::portable;
    for (Isa isa : kAll)
      if (isa_supported(isa)) best = isa;
    return best;
  }();
  return found;
}

std::atomic<int> forced{-1};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

bool isa_supported(Isa isa) {
  if (isa == Isa::portable) return true;
#ifdef BTI_FAST_X86
  __builtin_cpu_init();
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

Isa isa_in_use() {
  const int isa = forced.load(std::memory_order_relaxed);
  return isa < 0 ? best() : static_cast<Isa>(isa);
}

void isa_force(const char* name) {
  if (name == nullptr || std::strcmp(name, "auto") == 0) {
    forced.store(-1);
    return;
  }
  for (Isa isa : kAll) {
    if (std::strcmp(name, isa_name(isa)) != 0) continue;
    if (!isa_supported(isa)) {
      throw std::runtime_error(std::string("instruction set ") + name +
                               " is not available: this processor or build has at most " + isa_name(best()));
    }
    forced.store(static_cast<int>(isa));
    return;
  }
  throw std::invalid_argument(std::string("unknown instruction set '") + name +
                              "': use auto, portable, avx2 or avx512");
}

}  // namespace bti_fast
