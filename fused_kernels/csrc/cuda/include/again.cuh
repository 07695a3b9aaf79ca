#pragma once
// Results made again, for the rungs on tensor cores that bring float32 into float16's range by one power of two for a part of the
// image: where that leaves too few digits (powers.cuh), one warp makes 16 results of a tile anew.
//
// The same implicit GEMM by mma.sync, straight from memory: nothing is shared and nobody waits. Each result gets the power of two
// that suits the largest value in its own window; those for which one power will do are made together. A window of zeros alone
// lost nothing.
// Limit: the latency of memory. It is made for few results.

#include "implicit_gemm.cuh"

namespace fused_kernels {

// What a warp needs to know of the convolution.
struct WindowPlan {
  const float *input, *constants;
  const uint32_t* weights;
  float *output, *partial;
  WeightOrder order;
  int images, size[2], stride[2], padding[2], dilation[2];
  int64_t strides[4];
  bool scale_first;
  float least;  // least_result

  WindowPlan(const WeightOrder& order, const ConvShape& shape, bool scale_first, bool split, const Tensor& input,
             const Workspace& workspace, Tensor& output)
      : input(static_cast<const float*>(input.data_ptr())), constants(workspace.constants), weights(workspace.packed),
        output(static_cast<float*>(output.data_ptr())), partial(workspace.partial), order(order),
        images(static_cast<int>(shape.images)), scale_first(scale_first),
        least(least_result(split, static_cast<double>(shape.in_channels) * shape.taps())) {
    for (int axis = 0; axis < 2; ++axis) {
      size[axis] = static_cast<int>(shape.input[axis]);
      stride[axis] = static_cast<int>(shape.stride[axis]);
      padding[axis] = static_cast<int>(shape.padding[axis]);
      dilation[axis] = static_cast<int>(shape.dilation[axis]);
    }
    for (int d = 0; d < 4; ++d) strides[d] = shape.input_strides[d];
  }
};

// Bits for tiles with results to make again. Tiles may share one: then more are made again.
constexpr int kDoubts = 256;

// An output pixel's place.
struct OutputPixel {
  int image, row, column;
};

// A minimum, before the scale's size multiplies it, and the column of operand B that it is from (only kWinners).
struct Smallest {
  float value;
  int column;
};

// A warp's 16 results. Four lanes have two of them: the same as in an accumulator of mma.sync.
template <class Order, int BLOCK_N>
struct Again {
  static constexpr int kParts = Order::kParts, kRows = 2;
  static constexpr int kUnits = BLOCK_N == 32 ? 1 : kParts == 2 ? 2 : 4;  // of 16 columns, at once

  const WindowPlan& plan;
  const OutputPixel (&at)[kRows];
  const int lane;

  // Where a pixel under a filter tap is in memory, its group's first channel; null in the padding.
  __device__ __forceinline__ const float* pixel(int r, int tap_y, int tap_x, int group) const {
    const int y = at[r].row * plan.stride[0] - plan.padding[0] + tap_y * plan.dilation[0];
    const int x = at[r].column * plan.stride[1] - plan.padding[1] + tap_x * plan.dilation[1];
    const bool inside = at[r].image < plan.images && static_cast<unsigned>(y) < static_cast<unsigned>(plan.size[0]) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(plan.size[1]);
    if (!inside) return nullptr;
    return plan.input + at[r].image * plan.strides[0] + static_cast<int64_t>(group) * plan.order.in_channels * plan.strides[1] +
           y * plan.strides[2] + x * plan.strides[3];
  }

  // The largest finite magnitude in a result's window.
  __device__ __forceinline__ float largest(int r, int group) const {
    float most = 0.0f;
#pragma unroll 1
    for (int y = 0; y < plan.order.kernel[0]; ++y) {
#pragma unroll 1
      for (int x = 0; x < plan.order.kernel[1]; ++x) {
        const float* const source = pixel(r, y, x, group);
        if (!source) continue;
#pragma unroll 2
        for (int c = lane % 4; c < plan.order.in_channels; c += 4) {
          const float magnitude = fabsf(__ldg(source + c * plan.strides[1]));
          if (magnitude < kInfinity<float>) most = fmaxf(most, magnitude);
        }
      }
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    return fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
  }

  // A number that is not zero stays so: times an infinite weight it is infinite.
  __device__ __forceinline__ static float scaled(float x, float power) {
    constexpr float kSmallest = 0x1p-24f;
    const float product = x * power;
    return x != 0.0f && fabsf(product) < kSmallest ? copysignf(kSmallest, x) : product;
  }

  // Sixteen channels of a tap, as operand A.
  __device__ __forceinline__ void load(const float* const (&pixels)[kRows], int first, float power, uint32_t (&a)[kParts][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const source = pixels[i % 2];
      const int c = first + i / 2 * 8 + lane % 4 * 2;
      float two[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        two[j] = source && c + j < plan.order.in_channels ? scaled(__ldg(source + (c + j) * plan.strides[1]), power) : 0.0f;
      }
      if constexpr (kParts == 2) {
        split_f16(two[0], two[1], a[0][i], a[1][i]);
      } else {
        a[0][i] = ptx::pack_f16(two[0], two[1]);
      }
    }
  }

  // The sums of some columns of operand B.
  __device__ __forceinline__ void multiply(int block_n, int first_unit, float power, float (&sums)[2 * kUnits][4]) const {
    const int group = block_n / plan.order.blocks_n, block_cs = plan.order.chunks * (plan.order.chunk / kStepDepth);
    const auto clear = [](float(&of)[2 * kUnits][4]) {
#pragma unroll
      for (auto& four : of) four[0] = four[1] = four[2] = four[3] = 0.0f;
    };
    clear(sums);
#pragma unroll 1
    for (int tap = 0; tap < plan.order.kernel[0] * plan.order.kernel[1]; ++tap) {
      const int y = tap / plan.order.kernel[1], x = tap % plan.order.kernel[1];
      const float* const pixels[kRows] = {pixel(0, y, x, group), pixel(1, y, x, group)};
      // NOTE: split sums stay in the tensor cores for one tap alone: these truncate where a processor rounds.
      float of_tap[2 * kUnits][4];
      if (kParts == 2) clear(of_tap);
      auto& target = kParts == 2 ? of_tap : sums;
#pragma unroll 1
      for (int block_c = 0; block_c < block_cs; ++block_c) {
        uint32_t a[kParts][4];
        load(pixels, block_c * kStepDepth, power, a);
        const uint32_t* const step =
            plan.weights + plan.order.step(block_n, y, x, block_c) * (BLOCK_N / kPackColumns * kParts * kUnitWords);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          uint32_t b[kParts][4];
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const uint32_t* const unit = step + (part * (BLOCK_N / kPackColumns) + first_unit + u) * kUnitWords;
#pragma unroll
            for (int i = 0; i < 4; ++i) b[part][i] = unit[Order::word(lane, i)];
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float(&four)[4] = target[2 * u + half];
            if constexpr (kParts == 2) {
              ptx::mma_m16n8k16(four, a[0], b[1][2 * half], b[1][2 * half + 1], ptx::F16());
              ptx::mma_m16n8k16(four, a[1], b[0][2 * half], b[0][2 * half + 1], ptx::F16());
            }
            ptx::mma_m16n8k16(four, a[0], b[0][2 * half], b[0][2 * half + 1], ptx::F16());
          }
        }
      }
      if constexpr (kParts == 2) {
#pragma unroll
        for (int j = 0; j < 2 * kUnits; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[j][k] += of_tap[j][k];
        }
      }
    }
  }

  // The minima over some blocks of output channels, with one power of two.
  __device__ __forceinline__ void minima(int first_n, int end_n, int exponent, Smallest (&found)[kRows]) const {
    const float root = power_of_two(-exponent / 2);
#pragma unroll 1
    for (int block_n = first_n; block_n < end_n; ++block_n) {
#pragma unroll 1
      for (int first_unit = 0; first_unit < BLOCK_N / kPackColumns; first_unit += kUnits) {
        float sums[2 * kUnits][4];
        multiply(block_n, first_unit, power_of_two(exponent), sums);
        const float* const block = plan.constants + static_cast<int64_t>(block_n) * BLOCK_N * kConstants;
#pragma unroll
        for (int j = 0; j < 2 * kUnits; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int column = first_unit * kPackColumns + j * 8 + lane % 4 * 2 + k % 2;
            const typename Order::Places places = Order::places(BLOCK_N, column);
            float value = scale_back(sums[j][k], root, block[places.factor], block[places.bias]);
            if (plan.scale_first) value *= block[places.own];
            take_smaller(found[k / 2].value, value, found[k / 2].column, block_n * BLOCK_N + column);
          }
        }
      }
    }
#pragma unroll
    for (Smallest& one : found) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) take_smaller_of_lanes(one.value, one.column, distance);
    }
  }

  // The minima over all of these blocks, each from sums that its own window's power of two served. False: lost nothing before.
  __device__ __forceinline__ bool run(int first_n, int end_n, Smallest (&result)[kRows]) const {
    // What a window's largest value must be, as an element is off by up to 2^-24 (`scaled`): for half of what the promise
    // grants to largest values.
    const int taps = plan.order.kernel[0] * plan.order.kernel[1];
    const float needed = fminf(taps * (kParts == 2 ? 128.0f : 0.125f), 0x1p12f);
    for (Smallest& one : result) one = {kInfinity<float>, 0};
#pragma unroll 1
    for (int first = first_n, end; first < end_n; first = end) {
      const int group = first / plan.order.blocks_n;
      end = min((group + 1) * plan.order.blocks_n, end_n);
      const float windows[kRows] = {largest(0, group), largest(1, group)};
      const bool alone = first == first_n && end == end_n;
      if (alone && !__any_sync(0xffffffffu, windows[0] > 0.0f || windows[1] > 0.0f)) return false;
      Smallest of_group[kRows];
      bool waits[kRows] = {true, true};
      while (__any_sync(0xffffffffu, waits[0] || waits[1])) {
        const float mine = fmaxf(waits[0] ? windows[0] : 0.0f, waits[1] ? windows[1] : 0.0f);
        const float most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(mine)));
        const int exponent = even_exponent_for(most);
        Smallest found[kRows] = {{kInfinity<float>, 0}, {kInfinity<float>, 0}};
        minima(first, end, exponent, found);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool served = waits[r] && (windows[r] == 0.0f || windows[r] == most || exponent == kLargestExponent ||
                                           windows[r] * power_of_two(exponent) >= needed);
          if (served) of_group[r] = found[r];
          waits[r] &= !served;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) take_smaller(result[r].value, of_group[r].value, result[r].column, of_group[r].column);
    }
    return true;
  }
};

}  // namespace fused_kernels
