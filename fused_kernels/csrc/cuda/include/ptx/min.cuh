#pragma once
// PTX ISA, "Floating Point Instructions: min". One wrapper per instruction.

namespace ptx {

// NOTE: plain fminf drops NaN, as IEEE 754-2008 asks; torch.min must return it. min.NaN needs sm_80.
__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace ptx
