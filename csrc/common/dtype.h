// The storage dtypes of the operators, without torch headers (kernels are compiled once per instruction set and
// must not share inline functions with code compiled for another one).
#pragma once

namespace bti_fast {

enum class Dtype : int { float32, float64, float16, bfloat16 };

}  // namespace bti_fast
