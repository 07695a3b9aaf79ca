#pragma once
// Copies from global to shared memory that no register waits for; sm_80 and later. One wrapper per instruction; the names in
// quotes are sections of the PTX ISA.

#include <cstdint>

namespace ptx {

// "Data Movement and Conversion Instructions: cvta". The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// "Data Movement and Conversion Instructions: cp.async". 4 bytes through the L1 cache; where not valid, nothing is read and
// shared memory gets zeros.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0) : "memory");
}

// "Data Movement and Conversion Instructions: cp.async". 16 bytes past the L1 cache, both addresses multiples of 16; not valid
// as above.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// "Data Movement and Conversion Instructions: cp.async.commit_group". This thread's copies since the last one are a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// "Data Movement and Conversion Instructions: cp.async.wait_group". Until no more than the N latest groups are on their way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// "Data Movement and Conversion Instructions: cp.async.wait_all".
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace ptx
