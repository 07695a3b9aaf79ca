#pragma once
// One thread's order to the TMA (tensor memory accelerator): a run of bytes from global to shared memory, a bulk copy; sm_90
// and later. One wrapper per instruction; the names in quotes are sections of the PTX ISA.

#include <cstdint>

namespace ptx {

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// "Parallel Synchronization and Communication Instructions: mbarrier.arrive", with .expect_tx: the phase ends only when so many
// bytes have come, too.
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// "Data Movement and Conversion Instructions: cp.async.bulk": all multiples of 16; the barrier counts the bytes as they come.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
#else
__device__ void mbarrier_arrive_expect_bytes(uint32_t, uint32_t) {}
__device__ void bulk_copy(uint32_t, const void*, uint32_t, uint32_t) {}
#endif

}  // namespace ptx
