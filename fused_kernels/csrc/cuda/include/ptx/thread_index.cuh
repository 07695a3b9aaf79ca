#pragma once
// PTX ISA, "Special Registers: %tid". One wrapper per instruction.

namespace ptx {

// threadIdx.x read anew: what follows from it is computed where it is needed and takes no register before.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

}  // namespace ptx
