#pragma once
// Tensor cores, four warps (a warpgroup) at a time: operands in shared memory, sums in registers, complete only later; sm_90a
// alone. One wrapper per instruction; PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".

#include <cstdint>

#include "mma.cuh"

namespace ptx {

// "Matrix descriptor": where an operand begins in shared memory, and how its core matrices (8 rows of 16 bytes) follow each other.
// Rows of 128 bytes one after the other, their 16-byte pieces swizzled by the row's address.
// NOTE: the swizzle looks at the address, not at the row's number: an operand may begin at any row (measured on an H200).
constexpr uint64_t kSwizzledRows = uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32;
// Core matrices as they are, the two of the same 8 rows side by side.
constexpr uint64_t kCoreMatrices = uint64_t{256 >> 4} << 32 | uint64_t{128 >> 4} << 16;

__device__ __forceinline__ uint64_t descriptor(uint64_t layout, uint32_t address) { return layout | (address & 0x3ffff) >> 4; }

// "wgmma.fence": before the first multiplication, and after other instructions wrote the sums.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group": the multiplications since the last one are a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": until no more than the N latest groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define SUMS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SUMS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_64 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA(N, SUMS, A, B, ADD, TYPES, OPERANDS)                                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES \
               " {" SUMS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"                                                      \
               : OPERANDS                                                                                             \
               : "l"(a), "l"(b), "r"(add))

// "wgmma.mma_async": sums (64 x N) = a (64 x 16) * b (16 x N), plus what they were if `add`. Lane l of warp w holds of row
// 16 w + l / 4 the columns 8 j + l % 4 * 2 and the next in d[4 j] and d[4 j + 1], and of 8 rows on, in d[4 j + 2] and d[4 j + 3].
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add, F16) {
  WGMMA(64, SUMS_32, 32, 33, 34, "f16.f16", OPERANDS_32);
}
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add, BF16) {
  WGMMA(64, SUMS_32, 32, 33, 34, "bf16.bf16", OPERANDS_32);
}
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add, F16) {
  WGMMA(128, SUMS_64, 64, 65, 66, "f16.f16", OPERANDS_64);
}
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add, BF16) {
  WGMMA(128, SUMS_64, 64, 65, 66, "bf16.bf16", OPERANDS_64);
}

#undef WGMMA
#undef SUMS_32
#undef SUMS_64
#undef OPERANDS_32
#undef OPERANDS_64

}  // namespace ptx
