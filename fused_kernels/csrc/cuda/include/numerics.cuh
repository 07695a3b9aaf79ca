#pragma once
// In which type to compute, and a minimum that propagates NaN as torch.min does.

#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <type_traits>

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

}  // namespace fused_kernels
