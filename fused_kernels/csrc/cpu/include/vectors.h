// What the CPU kernels share: a vector type as wide as the machine's registers, loads and stores that convert 16-bit types from
// and to float, the minimum that torch.min means, and the choice of a kernel by dtype.
// The compiler's vector types (GCC's and clang's vector_size) give +, *, <, ?: on whole registers, on any instruction set.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
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

// Numbers in memory, not set to any, from the beginning of a cache line on: what lies in multiples of it is cheapest to load.
template <class Scalar> class Lines {
  static constexpr size_t LINE = 64;
  std::unique_ptr<Scalar[]> memory;

 public:
  explicit Lines(int64_t count) : memory(new Scalar[count + LINE / sizeof(Scalar)]) {}
  Scalar* data() const { return (Scalar*)(((uintptr_t)memory.get() + LINE - 1) / LINE * LINE); }
};

// The numbers of a tensor of one dimension, side by side.
template <class Scalar> inline std::vector<Scalar> numbers_of(const Tensor& tensor) {
  std::vector<Scalar> numbers(tensor.size(0));
  for (size_t i = 0; i < numbers.size(); i++) numbers[i] = ((const Scalar*)tensor.data_ptr())[(int64_t)i * tensor.stride(0)];
  return numbers;
}

template <class Scalar, class Vector> inline void store(Scalar* to, const Vector& v) { std::memcpy(to, &v, sizeof v); }

// Round to the nearest, of two equally near to the even one; a NaN stays one.
inline void store(BFloat16* to, const FloatVector& v) {
  const BitsVector bits = (BitsVector)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store((uint16_t*)to, __builtin_convertvector((v != v) ? BitsVector{} + 0x7fc0 : rounded, HalfBitsVector));
}

// Add a power of two so large that the sum keeps as many digits as a half does: the processor rounds. The products before it
// multiply by four, and make infinity of what is too large for a half.
inline void store(Half* to, const FloatVector& v) {
  const BitsVector bits = (BitsVector)v, exponent = bits & 0x7f800000, least = BitsVector{} + (113u << 23);
  const FloatVector magnitude = (FloatVector)(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f;
  const BitsVector sum = (BitsVector)(magnitude + (FloatVector)((exponent > least ? exponent : least) + (15u << 23)));
  const BitsVector rounded = (sum >> 13 & 0x7c00) + (sum & 0xfff), sign = bits >> 16 & 0x8000;
  store((uint16_t*)to, __builtin_convertvector(((v != v) ? BitsVector{} + 0x7e00 : rounded) | sign, HalfBitsVector));
}

// torch.min's minimum: a NaN on either side wins, where the processor's own minimum would drop one of them.
template <class V> inline V nan_min(V minimum, V v) { return ((v < minimum) | (v != v)) ? v : minimum; }

constexpr double NOTHING = std::numeric_limits<double>::infinity();  // the minimum of no channels

// Integers as wide as the numbers: what a comparison of vectors gives, and what channels are counted in.
template <class V> struct IndexOf { using Type = decltype(V{} < V{}); };
template <> struct IndexOf<float> { using Type = int32_t; };
template <> struct IndexOf<double> { using Type = int64_t; };
template <class V> using Index = typename IndexOf<V>::Type;

// A running minimum, or a vector of them, and where winners are wanted the channel that each came from: of equal ones the
// first, of several NaN the last.
template <class V> struct Running {
  V value;
  Index<V> channel;

  void take(const V& v, const Index<V>& from) {
    const auto wins = (v < value) | (v != v);
    value = wins ? v : value;
    if constexpr (kWinners) channel = wins ? from : channel;
  }
};

// The running minima of neighbouring pixels, in memory. Without winners there are no channels.
template <class Scalar> struct Minima {
  using Vector = typename Compute<Scalar>::Vector;
  Scalar* values;
  Index<Scalar>* channels;

  Minima operator+(int64_t pixels) const { return {values + pixels, kWinners ? channels + pixels : nullptr}; }
  void clear(int64_t pixels, int64_t channel) const {
    std::fill(values, values + pixels, Scalar(NOTHING));
    if constexpr (kWinners) std::fill(channels, channels + pixels, Index<Scalar>(channel));
  }
  void take(int64_t pixel, Scalar v, int64_t channel) const {
    Running<Scalar> minimum{values[pixel], kWinners ? channels[pixel] : 0};
    minimum.take(v, Index<Scalar>(channel));
    values[pixel] = minimum.value;
    if constexpr (kWinners) channels[pixel] = minimum.channel;
  }
  Running<Vector> load_vector(int64_t pixel) const {
    Running<Vector> minimum{load(values + pixel), {}};
    if constexpr (kWinners) minimum.channel = load_as<Index<Vector>>(channels + pixel);
    return minimum;
  }
  void store_vector(int64_t pixel, const Running<Vector>& minimum) const {
    store(values + pixel, minimum.value);
    if constexpr (kWinners) store(channels + pixel, minimum.channel);
  }
};

// Elements FIRST, FIRST + 2, FIRST + 4, ... of two vectors laid end to end; compilers make one shuffle of it.
template <int FIRST, class V, size_t... I> inline V every_second(const V& a, const V& b, std::index_sequence<I...>) {
  constexpr size_t N = sizeof...(I);
  return V{(FIRST + 2 * I < N ? a[(FIRST + 2 * I) % N] : b[(FIRST + 2 * I) % N])...};
}

// Lane i of the first vector becomes the minimum over all lanes of vector i: each step halves the vectors and the numbers left of
// each. Two channels are compared in their order, as everywhere else, so that the same ones win.
template <int N, class V> inline void min_of_each(V (&values)[N], Index<V> (&channels)[N]) {
  constexpr auto lanes = std::make_index_sequence<N>();
  for (int left = N / 2; left > 0; left /= 2)
    for (int i = 0; i < left; i++) {
      const V a = every_second<0>(values[2 * i], values[2 * i + 1], lanes);
      const V b = every_second<1>(values[2 * i], values[2 * i + 1], lanes);
      values[i] = nan_min(a, b);
      if constexpr (kWinners) {
        const Index<V> from_a = every_second<0>(channels[2 * i], channels[2 * i + 1], lanes);
        const Index<V> from_b = every_second<1>(channels[2 * i], channels[2 * i + 1], lanes);
        const auto in_order = from_a < from_b;
        Running<V> minimum{in_order ? a : b, in_order ? from_a : from_b};
        minimum.take(in_order ? b : a, in_order ? from_b : from_a);
        channels[i] = minimum.channel;
      }
    }
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

// Where threads share the channels of a pixel, each part's minima are kept apart until all are there. The minimum is exact, so
// the result does not depend on the number of parts.
template <class T> struct PartialMinima {
  using Scalar = typename Compute<T>::Scalar;
  T* output;
  const Winners winners;
  const int64_t count, parts;
  std::vector<Scalar> minima;
  std::vector<Index<Scalar>> channels;

  PartialMinima(const Tensor& output, const std::optional<Tensor>& winners, int64_t parts)
      : output((T*)output.data_ptr()), winners(winners_in(winners)), count(output.numel()), parts(parts),
        minima(parts > 1 ? parts * count : 0), channels(kWinners && parts > 1 ? parts * count : 0) {}

  void put(int64_t part, int64_t pixel, const Minima<Scalar>& from, int64_t pixels) {
    if (parts == 1) return finish(pixel, from, pixels);
    std::copy(from.values, from.values + pixels, minima.data() + part * count + pixel);
    if constexpr (kWinners) std::copy(from.channels, from.channels + pixels, channels.data() + part * count + pixel);
  }
  void finish() {
    if (parts == 1) return;
    const Minima<Scalar> all{minima.data(), channels.data()};
    for (int64_t part = 1; part < parts; part++)
      for (int64_t i = 0; i < count; i++) all.take(i, minima[part * count + i], kWinners ? channels[part * count + i] : 0);
    finish(0, all, count);
  }

 private:
  void finish(int64_t pixel, const Minima<Scalar>& from, int64_t pixels) {
    std::copy(from.values, from.values + pixels, output + pixel);
    if constexpr (kWinners)
      for (int64_t i = 0; i < pixels; i++) winners.put(pixel + i, int(from.channels[i]));
  }
};

// Call f with a null pointer of the dtype's C++ type. Only what this library is compiled for is instantiated.
template <class F> void dispatch(ScalarType dtype, const F& f) {
  if constexpr (is_compiled(ScalarType::Float))
    if (dtype == ScalarType::Float) return f((const float*)nullptr);
  if constexpr (is_compiled(ScalarType::Double))
    if (dtype == ScalarType::Double) return f((const double*)nullptr);
  if constexpr (is_compiled(ScalarType::Half))
    if (dtype == ScalarType::Half) return f((const Half*)nullptr);
  if constexpr (is_compiled(ScalarType::BFloat16))
    if (dtype == ScalarType::BFloat16) return f((const BFloat16*)nullptr);
  STD_TORCH_CHECK(false, "expected ", kDtypes, ", got ", torch::headeronly::toString(dtype));
}

}  // namespace fused_kernels
