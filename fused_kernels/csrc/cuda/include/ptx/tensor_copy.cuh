#pragma once
// One thread's order to the TMA (tensor memory accelerator): a box of a tensor from global to shared memory; sm_90 and later.
// What lies outside the tensor arrives as zeros. One wrapper per instruction; the names in quotes are sections of the PTX ISA.

#include <cuda.h>

#include <cstdint>

namespace ptx {

// "Data Movement and Conversion Instructions: cp.async.bulk.tensor": four coordinates, the innermost first; the barrier counts
// the whole box's bytes as they come.
__device__ __forceinline__ void tensor_copy(uint32_t shared, const CUtensorMap* map, int x0, int x1, int x2, int x3,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          shared),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}

// "Data Movement and Conversion Instructions: prefetch": the map itself, before it is needed.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// "Parallel Synchronization and Communication Instructions: fence.proxy": the tensor cores and the TMA, too, see what this
// thread wrote to shared memory.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace ptx
