#pragma once
// Stands in for thrust's header of the same name: PyTorch's headers include it for complex numbers, which no kernel here uses,
// and each build would parse it three times. These declarations are all that PyTorch's headers need of it.

namespace thrust {
template <typename T>
struct complex;
template <typename T>
complex<T> polar(const T& radius, const T& angle);
}  // namespace thrust
