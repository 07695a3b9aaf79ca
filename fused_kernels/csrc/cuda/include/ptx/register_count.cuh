#pragma once
// PTX ISA, "Miscellaneous Instructions: setmaxnreg"; sm_90a alone. One wrapper per instruction.

namespace ptx {

// By all warps of a warpgroup: give registers back, or take (and wait for) what others gave.
// NOTE: what all take together may not exceed what the block was launched with: one too many and it waits for ever.
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace ptx
