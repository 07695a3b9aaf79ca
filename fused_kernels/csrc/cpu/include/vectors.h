// What both CPU kernels share: a vector type as wide as the machine's registers, loads that convert 16-bit types to float,
// the minimum that torch.min means, and the choice of a kernel by dtype.
// The compiler's vector types (GCC's and clang's vector_size) give +, *, <, ?: on whole registers, on any instruction set.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "arguments.h"

namespace fused_kernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

constexpr int FLOATS = VECTOR_BYTES / 4;
typedef float FloatVector __attribute__((vector_size(VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t BitsVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(VECTOR_BYTES / 2)));

// What a dtype is computed in: 16-bit types in float, rounded once at the end.
template <class T> struct Compute { using Scalar = float; using Vector = FloatVector; };
template <> struct Compute<double> { using Scalar = double; using Vector = DoubleVector; };

template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(typename Compute<T>::Scalar);

// Loads from any address: memcpy becomes one unaligned load.
template <class Vector> inline Vector load_as(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline FloatVector load(const float* from) { return load_as<FloatVector>(from); }
inline DoubleVector load(const double* from) { return load_as<DoubleVector>(from); }
inline BitsVector load(const uint32_t* from) { return load_as<BitsVector>(from); }

// A bfloat16 is the upper half of a float.
inline FloatVector load(const BFloat16* from) {
  return (FloatVector)(__builtin_convertvector(load_as<HalfBitsVector>(from), BitsVector) << 16);
}

// Put exponent and mantissa where a float has them, then correct the exponent's bias by a multiplication, exact for
// subnormals too. Infinity and NaN keep the largest exponent.
inline FloatVector load(const Half* from) {
  const BitsVector half = __builtin_convertvector(load_as<HalfBitsVector>(from), BitsVector);
  const BitsVector magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
  const BitsVector finite = (BitsVector)((FloatVector)magnitude * 0x1p112f);
  return (FloatVector)(((magnitude >= (0x7c00u << 13)) ? (magnitude | 0x7f800000u) : finite) | sign);
}

template <class Scalar, class Vector> inline void store(Scalar* to, const Vector& v) { std::memcpy(to, &v, sizeof v); }

// torch.min's minimum: a NaN on either side wins, where the processor's own minimum would drop one of them.
template <class V> inline V nan_min(V minimum, V v) { return ((v < minimum) | (v != v)) ? v : minimum; }

// Elements FIRST, FIRST + 2, FIRST + 4, ... of two vectors laid end to end; compilers make one shuffle of it.
template <int FIRST, class V, size_t... I> inline V every_second(const V& a, const V& b, std::index_sequence<I...>) {
  constexpr size_t N = sizeof...(I);
  return V{(FIRST + 2 * I < N ? a[(FIRST + 2 * I) % N] : b[(FIRST + 2 * I) % N])...};
}

// Lane i becomes the minimum over all lanes of vectors[i]: each step halves the vectors and the numbers left of each.
template <int N, class V> inline V min_of_each(V (&vectors)[N]) {
  for (int left = N / 2; left > 0; left /= 2)
    for (int i = 0; i < left; i++) {
      const V a = vectors[2 * i], b = vectors[2 * i + 1];
      constexpr auto lanes = std::make_index_sequence<N>();
      vectors[i] = nan_min(every_second<0>(a, b, lanes), every_second<1>(a, b, lanes));
    }
  return vectors[0];
}

// Turn a square of numbers: sorting vectors laid end to end into even and odd elements, log2(N) times, is a transposition.
template <int N, class V> inline void transpose(V (&vectors)[N]) {
  constexpr auto lanes = std::make_index_sequence<N>();
  for (int steps = N; steps > 1; steps /= 2) {
    V sorted[N];
    for (int i = 0; i < N / 2; i++) {
      sorted[i] = every_second<0>(vectors[2 * i], vectors[2 * i + 1], lanes);
      sorted[i + N / 2] = every_second<1>(vectors[2 * i], vectors[2 * i + 1], lanes);
    }
    std::copy(sorted, sorted + N, vectors);
  }
}

constexpr double NOTHING = std::numeric_limits<double>::infinity();  // the minimum of no channels

// Where threads share the channels of a pixel, each part's minima are kept apart until all are there. The minimum is exact, so
// the result does not depend on the number of parts.
template <class T> struct PartialMinima {
  using Scalar = typename Compute<T>::Scalar;
  T* output;
  const int64_t count, parts;
  std::vector<Scalar> minima;

  PartialMinima(const torch::stable::Tensor& output, int64_t parts)
      : output((T*)output.data_ptr()), count(output.numel()), parts(parts), minima(parts > 1 ? parts * count : 0) {}

  void put(int64_t part, int64_t pixel, const Scalar* from, int64_t pixels) {
    if (parts == 1) std::copy(from, from + pixels, output + pixel);
    else std::copy(from, from + pixels, minima.data() + part * count + pixel);
  }
  void finish() {
    for (int64_t i = 0; parts > 1 && i < count; i++) {
      Scalar minimum = minima[i];
      for (int64_t part = 1; part < parts; part++) minimum = nan_min(minimum, minima[part * count + i]);
      output[i] = T(minimum);
    }
  }
};

// Call f with a null pointer of the dtype's C++ type.
template <class F> void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f((const float*)nullptr);
    case ScalarType::Double: return f((const double*)nullptr);
    case ScalarType::Half: return f((const Half*)nullptr);
    case ScalarType::BFloat16: return f((const BFloat16*)nullptr);
    default: STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace fused_kernels
