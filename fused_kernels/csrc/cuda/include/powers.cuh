#pragma once
// float32 in float16 operands: a power of two for a part of the image, and how to see which results that leaves too few digits.

#include "ptx/mma.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cuda_fp16.h>

namespace fused_kernels {

// ---- powers of two ----

// A power of two brings the largest values just inside float16's range.
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

constexpr int kLargestExponent = 126;
constexpr float kSmallestNormal = 1.17549435e-38f;

// The exponent that brings x into [2^13, 2^14): a factor of four below float16's end. A power of two that float32 has.
__device__ __forceinline__ int exponent_for(float x) {
  const int exponent = x >= kSmallestNormal ? (__float_as_int(x) >> 23) - 127 : -127;
  return min(13 - exponent, kLargestExponent);
}

// An even one, whose power has a root: into [2^12, 2^14).
__device__ __forceinline__ int even_exponent_for(float x) { return exponent_for(x) & ~1; }

constexpr float kLargestF16 = 65504.0f, kSmallestNormalF16 = 0x1p-14f;  // what is smaller has fewer digits
// Stands for a power of two where all values are zeros: what undoes it is zero, and so is what a result must be (below). Their
// sums are exact.
constexpr int kExponentOfZeros = 254;

// Below this the largest value leaves too little room to float16's smallest.
constexpr float kSmallMaximum = 64.0f;
// The first guess suits largest values between 0.25 and 255.
constexpr int kFirstExponent = 8;

// A sum times the power of two that undoes the input's, which is the root's square, and the weights' factor, plus the bias: in
// steps, as the powers' product may leave float32's range.
__device__ __forceinline__ float scale_back(float sum, float root, float factor, float bias) {
  return fmaf(sum * root * factor, root, bias);
}

// The power of two of an exponent of this size, or less, may multiply a weights' factor: still one that float32 has.
constexpr int kMostJoined = 12;

// ---- split operands ----

// Two numbers as sums of two float16 each: high parts and low parts.
// NOTE: an infinity's high part is the largest finite number, and only its low part is infinite: infinity minus infinity would
// be NaN. A low part is multiplied by high parts only, and a weight's high part is zero only where the weight is.
__device__ __forceinline__ void split_f16(float first, float second, uint32_t& high, uint32_t& low) {
  high = ptx::pack_finite_f16(first, second);
  const float2 kept = __half22float2(reinterpret_cast<const __half2&>(high));
  low = ptx::pack_f16(first - kept.x, second - kept.y);
}

// Split: below this the largest value leaves too little room for small ones' low parts, and the first guess is another.
constexpr float kSmallSplitMaximum = 2048.0f;
constexpr int kFirstSplitExponent = 12;

// ---- results that must be made again ----

// Where an element, times the power of two, is small, it is off by up to 2^-25, and each product by that times its weight; a sum
// by that times the sum of its weights' magnitudes. So much of the promise of bounds.py is free for it: all products together have
// room for it where the result itself, with its bias, has this magnitude, times what undoes the input's power, times a channel's
// weights' magnitudes. For the promise is a share of the sum of all magnitudes, and the result can't be larger than that.
// Of the promise's 2 + products / 4096 the 2 are two operands' own roundings, and half of the rest is the tensor cores'
// truncations. Split, operands are off by half of the promise at most, and sums by a quarter.
inline float least_result(bool split, double products) {
  const double free = split ? 0x1p-24 * std::max(16.0, 2.0 * std::sqrt(products)) / 4.0 : 0x1p-11 * products / 8192.0;
  return static_cast<float>(1.001 * 0x1p-25 / free);
}

}  // namespace fused_kernels
