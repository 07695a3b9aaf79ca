#pragma once
// Vectors of neighbouring elements, moved by one load or store instruction of up to 16 bytes.

#include <cstdint>
#include <type_traits>

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

}  // namespace fused_kernels
