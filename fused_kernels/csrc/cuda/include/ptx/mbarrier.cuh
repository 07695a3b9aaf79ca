#pragma once
// Barriers in shared memory that count arrivals, so that a producer need not wait for its consumers; sm_80 and later.
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". One wrapper per instruction.

#include <cstdint>

namespace ptx {

// "mbarrier.init": a phase ends when `count` threads have arrived.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// "fence.mbarrier_init": the TMA, too, sees the barriers that this thread made.
__device__ __forceinline__ void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// "mbarrier.arrive": what this thread wrote before is seen by whoever waits for the phase.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// "cp.async.mbarrier.arrive": arrive when all cp.async of this thread so far have landed, without waiting for them.
__device__ __forceinline__ void mbarrier_arrive_after_cp_async(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// "mbarrier.test_wait", again and again until the phase of this parity has ended; since sm_90 "mbarrier.try_wait", which sleeps
// a while before it answers.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra wait;\n}"
               :
               : "r"(barrier), "r"(parity)
               : "memory");
#else
  asm volatile("{\n.reg .pred p;\nwait:\nmbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n@!p bra wait;\n}"
               :
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
}

// "bar.sync": a barrier of some of the block's warps; id 0 is __syncthreads'.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ptx
