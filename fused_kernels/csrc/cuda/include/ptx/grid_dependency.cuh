#pragma once
// A kernel that begins while the one before it in the stream ends; since sm_90, before that it never happens.
// PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol". One wrapper per instruction.

namespace ptx {

// "griddepcontrol.wait": all that the kernels before this one wrote can be read, and what they read can be written.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// "griddepcontrol.launch_dependents": when all blocks have said so, or ended, the next kernel may begin.
__device__ __forceinline__ void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
