#pragma once
// In which type to compute, and a minimum that propagates NaN as torch.min does.

#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <type_traits>

#include "arguments.h"
#include "ptx/min.cuh"

namespace fused_kernels {

// 16-bit types are scaled and reduced in float32 and rounded once.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

__device__ __forceinline__ float min_nan(float a, float b) { return ptx::min_nan(a, b); }

// There is no min.NaN for double.
__device__ __forceinline__ double min_nan(double a, double b) { return (a < b || a != a) ? a : b; }

__device__ __forceinline__ bool same_bits(float a, float b) { return __float_as_int(a) == __float_as_int(b); }
__device__ __forceinline__ bool same_bits(double a, double b) { return __double_as_longlong(a) == __double_as_longlong(b); }

// A running minimum and, for training, the channel that it is from, which is a new one where the minimum's bits changed.
// min_nan gives all NaN one pattern (of doubles: keeps the first one's), so that of several NaN the first channel stays.
template <typename A>
__device__ __forceinline__ void take_smaller(A& smallest, A value, [[maybe_unused]] int& winner, [[maybe_unused]] int channel) {
  const A before = smallest;
  smallest = min_nan(smallest, value);
  if constexpr (kWinners) {
    if (!same_bits(smallest, before)) winner = channel;
  }
}

template <typename A>
__device__ __forceinline__ void take_smaller_of_lanes(A& smallest, int& winner, int distance) {
  const A other = __shfl_xor_sync(0xffffffffu, smallest, distance);
  take_smaller(smallest, other, winner, kWinners ? __shfl_xor_sync(0xffffffffu, winner, distance) : 0);
}

}  // namespace fused_kernels
