#pragma once
// What the rungs on tensor cores share, all of them implicit GEMMs: the weights packed in the order in which tensor cores read
// operand B, and a minimum over blocks. How float32 lies in float16 operands: powers.cuh.

#include "launch.cuh"
#include "numerics.cuh"
#include "plan.h"
#include "powers.cuh"
#include "ptx/grid_dependency.cuh"

#include <cmath>
#include <string>

namespace fused_kernels {

// ---- elements, and what multiplies them ----

// How an element lies in memory, and the type that the tensor cores take it as.
template <typename T>
using Raw = std::conditional_t<sizeof(T) == 2, uint16_t, float>;
template <typename T>
using Operand = std::conditional_t<std::is_same_v<T, torch::headeronly::BFloat16>, ptx::BF16, ptx::F16>;

// What a scale does to the minimum. If it is negative, the smallest product is the largest sum's: turn all signs. Zero and
// infinity turn single sums into NaN, and must multiply before the minimum is taken; so must each channel's own factor.
struct Scale {
  float factor, sign;
  bool first;
  const float* each;  // channels' own factors, or null
  int64_t each_stride;

  Scale(double scale, const std::optional<Tensor>& scales)
      : factor(static_cast<float>(scale)),
        each(scales ? static_cast<const float*>(scales->data_ptr()) : nullptr),
        each_stride(scales ? scales->stride(0) : 0) {
    first = each || factor == 0.0f || !std::isfinite(factor);
    sign = !first && factor < 0.0f ? -1.0f : 1.0f;
    factor *= sign;
  }
};

struct Strides4 {
  int64_t of[4];

  explicit Strides4(const int64_t (&strides)[4]) : of{strides[0], strides[1], strides[2], strides[3]} {}
};

// ---- packed weights: operand B ----

// Operand B is a row of items for each block of output channels: a piece of the filter (mostly all of it) for a chunk of the
// input channels. An item is a row of steps, taps outside, channels inside.
struct WeightOrder {
  int in_channels, kernel[2];            // of a group
  int piece[2], pieces_across, pieces;   // of the filter
  int chunk, chunks;                     // of the channels, multiples of kStepDepth
  int steps;                             // of an item
  int blocks_n;                          // of a group

  // Which step has sixteen channels of a filter tap.
  __device__ __forceinline__ int64_t step(int block_n, int y, int x, int block_c) const {
    int piece_y = 0, piece_x = 0;
    if (pieces > 1) piece_y = y / piece[0], piece_x = x / piece[1], y %= piece[0], x %= piece[1];
    const int in_piece = y * piece[1] + x, steps_per_tap = chunk / kStepDepth;
    const int item = (block_n * pieces + piece_y * pieces_across + piece_x) * chunks + block_c / steps_per_tap;
    return static_cast<int64_t>(item) * steps + in_piece * steps_per_tap + block_c % steps_per_tap;
  }
};

// Whether an output channel's weights lie side by side, in whichever of the two usual orders.
inline bool rows_are_dense(const ConvShape& shape) {
  const int64_t* const strides = shape.weight_strides;
  const int64_t columns = shape.kernel[1], channels = shape.in_channels;
  return (strides[1] == shape.taps() && strides[2] == columns && strides[3] == 1) ||
         (strides[1] == 1 && strides[2] == columns * channels && strides[3] == channels);
}

constexpr int kConstants = 4;  // room for so many of each column
constexpr int kPackColumns = 16, kPackThreads = kPackColumns * kWarpSize;
constexpr int kUnitWords = kStepDepth * kPackColumns / 2;  // 16 columns of a step, two numbers a word

// Packs the weights. A block takes 16 output channels of some input channels and filter rows; its threads write side by side,
// and read what their neighbours' cache lines hold. Past the last output channel the last one is repeated: the minimum stays
// the same. Order says which column and which k the words of a unit hold, and where in a block a column's constants go: the
// power of two that undoes its weights', its bias, the factor that multiplies each of its values, and (of float32) the sum of its
// weights' magnitudes, times that factor's.
template <typename T, class Order>
__global__ void __launch_bounds__(kPackThreads)
    pack_weights_kernel(const T* weight, Strides4 strides, bool rows_are_dense, const void* bias, bool bias_is_wider,
                        int64_t bias_stride, int out_channels, int units_in_block_n, const __grid_constant__ Scale scale,
                        uint32_t* packed, float* constants, const __grid_constant__ WeightOrder order) {
  // The next kernel may begin to read the input, which is complete by now.
  ptx::wait_for_previous_grid();
  ptx::let_next_grid_begin();
  const int block_columns = units_in_block_n * kPackColumns;
  const int block_n = blockIdx.x / units_in_block_n, first_column = blockIdx.x % units_in_block_n * kPackColumns;
  const auto channel = [&](int column) {
    const int in_group = block_n % order.blocks_n * block_columns + first_column + column;
    return static_cast<int64_t>(block_n / order.blocks_n) * out_channels + min(in_group, out_channels - 1);
  };

  // Each warp looks for one output channel's largest weight, and so for its power of two.
  __shared__ int exponents[kPackColumns];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int exponent = 0;
  float magnitudes = 0.0f;
  if constexpr (sizeof(T) == 4) {
    const T* const row = weight + channel(warp) * strides.of[0];
    float most = 0.0f;
    const auto look = [&](const T* at) {
      const float magnitude = fabsf(*at);
      most = fmaxf(most, magnitude < kInfinity<float> ? magnitude : 0.0f);
      magnitudes += magnitude;
    };
    if (rows_are_dense) {
#pragma unroll 16
      for (int i = lane; i < order.in_channels * order.kernel[0] * order.kernel[1]; i += kWarpSize) look(row + i);
    } else {
      for (int c = lane; c < order.in_channels; c += kWarpSize) {
        for (int y = 0; y < order.kernel[0]; ++y) {
          for (int x = 0; x < order.kernel[1]; ++x) look(row + c * strides.of[1] + y * strides.of[2] + x * strides.of[3]);
        }
      }
    }
    most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most)));
    if (most > 0.0f) exponent = exponent_for(most);
    // In steps of eight, so that most channels have the same one: the largest weight is still at least kSmallMaximum.
    if (Order::kParts == 1 && exponent < kLargestExponent / 8 * 8) exponent &= ~7;
    if (lane == 0) exponents[warp] = exponent;
    __syncthreads();
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) magnitudes += __shfl_xor_sync(0xffffffffu, magnitudes, distance);
  }
  if (lane == 0 && blockIdx.y == 0) {
    const int64_t at = channel(warp) * bias_stride;
    float value = 0.0f;
    if (bias) value = bias_is_wider ? static_cast<const float*>(bias)[at] : static_cast<float>(static_cast<const T*>(bias)[at]);
    const float own = scale.each ? scale.each[channel(warp) * scale.each_stride] : scale.first ? scale.factor : 1.0f;
    const typename Order::Places places = Order::places(block_columns, first_column + warp);
    float* const block = constants + block_n * block_columns * kConstants;
    block[places.bias] = scale.sign * value;
    block[places.factor] = scale.sign * power_of_two(-exponent);
    block[places.own] = own;
    // Not zero where neither is.
    const float size = magnitudes * fabsf(own);
    block[places.size] = magnitudes == 0.0f || own == 0.0f ? 0.0f : fmaxf(size, kSmallestNormal);
  }

  const int word = threadIdx.x % kUnitWords, column = Order::column(word), k = Order::k(word);
  const T* const row = weight + channel(column) * strides.of[0];
  const float factor = sizeof(T) == 4 ? power_of_two(exponents[column]) : 1.0f;
  const int steps_per_tap = order.chunk / kStepDepth, units_at_once = kPackThreads / kUnitWords;
  for (int unit = blockIdx.y * units_at_once + threadIdx.x / kUnitWords; unit < order.chunks * steps_per_tap * order.kernel[0];
       unit += gridDim.y * units_at_once) {
    const int block_c = unit / order.kernel[0], y = unit % order.kernel[0], c = block_c * kStepDepth + k;
    const T* const source = row + c * strides.of[1] + y * strides.of[2];
#pragma unroll 3
    for (int x = 0; x < order.kernel[1]; ++x) {
      uint32_t bits[2] = {0, 0}, low_bits[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const T value = c + j < order.in_channels ? source[j * strides.of[1] + x * strides.of[3]] : T(0);
        if constexpr (sizeof(T) == 4) {
          if constexpr (Order::kParts == 2) {
            split_f16(value * factor, 0.0f, bits[j], low_bits[j]);
          } else {
            bits[j] = ptx::pack_f16(value * factor, 0.0f);
          }
          // Never round a weight to zero: its product with an infinity must be infinite.
          if (bits[j] << 17 == 0 && value != 0.0f) bits[j] |= 1;
          bits[j] &= 0xffff, low_bits[j] &= 0xffff;
        } else {
          bits[j] = reinterpret_cast<const uint16_t&>(value) ^ (scale.sign < 0.0f ? 0x8000u : 0u);
        }
      }
      const int64_t first_unit = order.step(block_n, y, x, block_c) * units_in_block_n * Order::kParts + first_column / kPackColumns;
      packed[first_unit * kUnitWords + word] = bits[0] | bits[1] << 16;
      if constexpr (Order::kParts == 2) packed[(first_unit + units_in_block_n) * kUnitWords + word] = low_bits[0] | low_bits[1] << 16;
    }
  }
}

// ---- a minimum over blocks ----

// Combines the minima of blocks that shared the output channels. A minimum has no rounding: the order does not matter.
template <typename T>
__global__ void combine_kernel(const float* partial, T* output, int64_t pixels, int splits) {
  ptx::wait_for_previous_grid();
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixels) return;
  float smallest = partial[pixel];
  for (int s = 1; s < splits; ++s) smallest = min_nan(smallest, partial[s * pixels + pixel]);
  output[pixel] = static_cast<T>(smallest);
}

// The same, with winners.
template <typename T>
__global__ void combine_winners_kernel(const float* partial, const int32_t* partial_winners, T* output, Winners winners,
                                       int64_t pixels, int splits) {
  ptx::wait_for_previous_grid();
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= pixels) return;
  float smallest = partial[pixel];
  int share = 0;
  for (int s = 1; s < splits; ++s) take_smaller(smallest, partial[s * pixels + pixel], share, s);
  output[pixel] = static_cast<T>(smallest);
  winners.put(pixel, partial_winners[share * pixels + pixel]);
}

// ---- host ----

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

inline bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; }

// Memory for the packed weights, the constants, and where blocks share the output channels each share's minima; and behind all
// of them, where they are wanted, the winners.
struct Workspace {
  Tensor memory;
  uint32_t* packed;
  float* constants;
  float* partial;            // [share][pixel]
  int32_t* partial_winners;  // likewise
  int32_t* more_winners;     // for the kernel's own use

  Workspace(const Tensor& like, int64_t packed_bytes, int64_t constants_count, int64_t partials, int64_t more = 0)
      : memory(torch::stable::new_empty(
            like, {packed_bytes + (constants_count + partials + (kWinners ? partials + more : 0)) * 4},
            torch::headeronly::ScalarType::Byte)) {
    char* const start = static_cast<char*>(memory.data_ptr());
    packed = reinterpret_cast<uint32_t*>(start);
    constants = reinterpret_cast<float*>(start + packed_bytes);
    partial = constants + constants_count;
    partial_winners = reinterpret_cast<int32_t*>(partial + partials);
    more_winners = partial_winners + partials;
  }
};

// Launches the packing kernel; the next kernel may begin before it ends.
template <typename T, class Order>
void pack_weights(const WeightOrder& order, const ConvShape& shape, int block_n, const Tensor& weight,
                  const std::optional<Tensor>& bias, const Scale& scale, const Workspace& workspace, const Device& device,
                  cudaStream_t stream) {
  const int64_t columns = shape.groups * order.blocks_n * block_n, packers = columns / kPackColumns;
  const int64_t units = order.chunks * order.chunk / kStepDepth * shape.kernel[0];
  const int64_t most_cuts = ceil_div(units, kPackThreads / kUnitWords);
  const int64_t cuts = std::clamp<int64_t>(device.multiprocessors / packers, 1, most_cuts);
  launch_early(pack_weights_kernel<T, Order>, dim3(grid_size(packers), cuts), kPackThreads, 0, stream,
               static_cast<const T*>(weight.data_ptr()), Strides4(shape.weight_strides), rows_are_dense(shape),
               bias ? bias->data_ptr() : nullptr, bias && sizeof(T) == 2 && is_wider(*bias, weight), bias ? bias->stride(0) : 0,
               shape.out_channels, block_n / kPackColumns, scale, workspace.packed, workspace.constants, order);
}

// Launches the kernel that makes one minimum, and one winner, of all shares'.
template <typename T>
void combine(const Workspace& workspace, int splits, int64_t pixels, Tensor& output, [[maybe_unused]] Winners winners,
             cudaStream_t stream) {
  constexpr int kThreads = 256;
  T* const target = static_cast<T*>(output.data_ptr());
  const unsigned int blocks = grid_size(ceil_div(pixels, kThreads));
  if constexpr (kWinners) {
    launch_early(combine_winners_kernel<T>, blocks, kThreads, 0, stream, workspace.partial, workspace.partial_winners, target,
                 winners, pixels, splits);
  } else {
    launch_early(combine_kernel<T>, blocks, kThreads, 0, stream, workspace.partial, target, pixels, splits);
  }
}

// What the rungs' operators do around their kernels: checks, memory for the results, the device, and run(T(), output, winners).
template <typename Run>
Forward convolve(const char* rung, const char* float32_precision, const Tensor& input, const ConvShape& shape,
                 const std::string& precision, const Run& run) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = input.scalar_type();
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(shape.reach(axis) < kMostReach, "input: ", rung, " expected a padded height and width below 2^30, got ",
                    shape.reach(axis));
  }
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "input: ", rung,
                  " expected float32, float16 or bfloat16");
  STD_TORCH_CHECK(dtype != ScalarType::Float || precision == float32_precision, "precision: ", rung, " expected ",
                  float32_precision, " for float32, got ", precision);
  Tensor output = torch::stable::new_empty(input, {shape.images, 1, shape.output[0], shape.output[1]});
  const std::optional<Tensor> winners = new_winners(output, shape.groups * shape.out_channels);
  if (output.numel() == 0) return forward_result(output, winners);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  dispatch(dtype, [&](auto type) {
    if constexpr (sizeof(type) <= 4) run(type, output, winners_in(winners));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return forward_result(output, winners);
}

}  // namespace fused_kernels
