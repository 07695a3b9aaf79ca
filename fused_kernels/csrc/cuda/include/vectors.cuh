#pragma once
// Vectors of neighbouring elements, moved by one load or store instruction of up to 16 bytes.

#include <cstdint>
#include <type_traits>

#include "conv_shape.h"

namespace fused_kernels {

constexpr int kVectorBytes = 16;

template <typename T, int VEC>
struct alignas(VEC * sizeof(T)) Vector {
  T values[VEC];
};

// The widest vector that starts at an aligned address in every run of `length` elements.
template <typename T>
int vector_width(const void* pointer, int64_t length) {
  int width = kVectorBytes / sizeof(T);
  while (length % width != 0 || reinterpret_cast<uintptr_t>(pointer) % (width * sizeof(T)) != 0) width /= 2;
  return width;
}

// Calls f with the run-time width as a compile-time one.
template <typename T, int VEC = kVectorBytes / sizeof(T), typename F>
void with_width(int width, const F& f) {
  if (width == VEC) {
    f(std::integral_constant<int, VEC>());
  } else if constexpr (VEC > 1) {
    with_width<T, VEC / 2>(width, f);
  }
}

// One load instruction of VEC * sizeof(T) bytes.
// NOTE: the hint evict_first (__ldcs) gains after a kernel that read and loses after one that wrote, such as the convolution
// (H200; notebook 03, exercise 3).
template <typename T, int VEC>
__device__ __forceinline__ Vector<T, VEC> load_vector(const T* address) {
  using Bits = std::conditional_t<
      VEC * sizeof(T) == 16, uint4,
      std::conditional_t<VEC * sizeof(T) == 8, uint2,
                         std::conditional_t<VEC * sizeof(T) == 4, uint32_t, uint16_t>>>;
  const Bits bits = *reinterpret_cast<const Bits*>(address);
  return reinterpret_cast<const Vector<T, VEC>&>(bits);
}

// Several pixels' winners: one store, or where they are ints, a few.
template <int VEC>
__device__ __forceinline__ void put_winners(Winners winners, int64_t pixel, const int (&winner)[VEC]) {
  const auto put = [&](auto* data) {
    using I = std::remove_pointer_t<decltype(data)>;
    Vector<I, VEC> vector;
#pragma unroll
    for (int i = 0; i < VEC; ++i) vector.values[i] = static_cast<I>(winner[i]);
    *reinterpret_cast<Vector<I, VEC>*>(data + pixel) = vector;
  };
  winners.wide ? put(static_cast<int32_t*>(winners.data)) : put(static_cast<uint8_t*>(winners.data));
}

}  // namespace fused_kernels
