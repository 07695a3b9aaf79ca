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

  __device__ __forceinline__ int taps() const { return order.kernel[0] * order.kernel[1]; }
};

// An output pixel's place.
struct OutputPixel {
  int image, row, column;

  __device__ __forceinline__ bool inside(int images, const int (&size)[2]) const {
    return image < images && row < size[0] && column < size[1];
  }
};

// Where a tile with results to make again is noted: a bit. Tiles may share one: then more are made again.
constexpr int kDoubts = 256;
struct Doubt {
  int word;
  uint32_t bit;

  __device__ __forceinline__ explicit Doubt(uint32_t place) : word(place % kDoubts / 32), bit(1u << place % 32) {}
  __device__ __forceinline__ void note(uint32_t* doubts) const { atomicOr(&doubts[word], bit); }
  __device__ __forceinline__ bool noted(const uint32_t* doubts) const { return (doubts[word] & bit) != 0; }
};

// A minimum, before the scale's size multiplies it, and the column of operand B that it is from (only kWinners).
struct Smallest {
  float value;
  int column;
};

constexpr int kLaneResults = 2;  // of a warp's 16, in four lanes each

// Where the pixels under a filter tap are in memory, for a lane's results: their group's first channels. In the padding, those of
// a pixel that exists.
struct WindowPixels {
  const float* first[kLaneResults];
  bool inside[kLaneResults];

  __device__ __forceinline__ WindowPixels(const WindowPlan& plan, const OutputPixel (&at)[kLaneResults], int tap_y, int tap_x,
                                          int group) {
#pragma unroll
    for (int r = 0; r < kLaneResults; ++r) {
      const int y = at[r].row * plan.stride[0] - plan.padding[0] + tap_y * plan.dilation[0];
      const int x = at[r].column * plan.stride[1] - plan.padding[1] + tap_x * plan.dilation[1];
      // NOTE: no && and no branches: each load would wait for the one before it.
      inside[r] = (at[r].image < plan.images) & (static_cast<unsigned>(y) < static_cast<unsigned>(plan.size[0])) &
                  (static_cast<unsigned>(x) < static_cast<unsigned>(plan.size[1]));
      const int64_t offset = at[r].image * plan.strides[0] + y * plan.strides[2] + x * plan.strides[3];
      first[r] = plan.input + static_cast<int64_t>(group) * plan.order.in_channels * plan.strides[1] + (inside[r] ? offset : 0);
    }
  }
};

// A warp's 16 results. Four lanes have two of them: the same as in an accumulator of mma.sync. UNITS: of 16 columns, as many at
// once as the kernel's registers hold.
template <class Order, int BLOCK_N, int UNITS>
struct Again {
  static constexpr int kParts = Order::kParts;

  const WindowPlan& plan;
  const OutputPixel (&at)[kLaneResults];
  const int lane;
  const bool infinite;  // some weight or scale may be: then a number that is not zero stays so in float16

  __device__ __forceinline__ static bool any_infinite(const WindowPlan& plan, int first_n, int end_n, int lane) {
    bool any = false;
    for (int column = first_n * BLOCK_N + lane; column < end_n * BLOCK_N; column += kWarpSize) {
      const float* const block = plan.constants + static_cast<int64_t>(column / BLOCK_N) * BLOCK_N * kConstants;
      any |= block[Order::places(BLOCK_N, column % BLOCK_N).size] == kInfinity<float>;
    }
    return __any_sync(0xffffffffu, any);
  }

  // The largest finite magnitudes in the results' windows.
  __device__ __forceinline__ void largest(int group, float (&most)[kLaneResults]) const {
    most[0] = most[1] = 0.0f;
    const int channels = plan.order.in_channels;
    const int64_t stride = plan.strides[1];
#pragma unroll 1
    for (int y = 0, x = 0; y < plan.order.kernel[0];) {
      const WindowPixels pixels(plan, at, y, x, group);
      if (++x == plan.order.kernel[1]) x = 0, ++y;
#pragma unroll 2 * UNITS
      for (int c = lane % 4; c < channels; c += 4) {
#pragma unroll
        for (int r = 0; r < kLaneResults; ++r) {
          const float magnitude = fabsf(__ldg(pixels.first[r] + c * stride));
          if (pixels.inside[r] && magnitude < kInfinity<float>) most[r] = fmaxf(most[r], magnitude);
        }
      }
    }
#pragma unroll
    for (float& of_row : most) {
      of_row = fmaxf(of_row, __shfl_xor_sync(0xffffffffu, of_row, 1));
      of_row = fmaxf(of_row, __shfl_xor_sync(0xffffffffu, of_row, 2));
    }
  }

  // Sixteen channels of a tap, and the weights of sixteen columns for them.
  __device__ __forceinline__ void load(const WindowPixels& pixels, int first_channel, int channels, int64_t stride,
                                       float (&values)[4][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = first_channel + i / 2 * 8 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = __ldg(pixels.first[i % 2] + min(c + j, channels - 1) * stride);
        values[i][j] = pixels.inside[i % 2] && c + j < channels ? value : 0.0f;
      }
    }
  }
  __device__ __forceinline__ void load(const uint32_t* weights, uint32_t (&b)[kParts][4]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[part][i] = weights[part * (BLOCK_N / kPackColumns * kUnitWords) + Order::word(lane, i)];
    }
  }

  __device__ __forceinline__ float scaled(float x, float power) const {
    constexpr float kSmallest = 0x1p-24f;
    const float product = x * power;
    return infinite && x != 0.0f && fabsf(product) < kSmallest ? copysignf(kSmallest, x) : product;
  }

  // The sums of some columns of operand B.
  __device__ __forceinline__ void multiply(int block_n, int first_unit, float power, float (&sums)[2 * UNITS][4]) const {
    const auto clear = [](float(&of)[2 * UNITS][4]) {
#pragma unroll
      for (auto& four : of) four[0] = four[1] = four[2] = four[3] = 0.0f;
    };
    clear(sums);
    // NOTE: split sums stay in the tensor cores for 32 channels alone: these truncate where a processor rounds.
    constexpr int kStepsTogether = 2;
    float together[2 * UNITS][4];
    if (kParts == 2) clear(together);
    auto& target = kParts == 2 ? together : sums;

    const int group = block_n / plan.order.blocks_n, steps_per_tap = plan.order.chunk / kStepDepth;
    const int block_cs = plan.order.chunks * steps_per_tap, steps = plan.taps() * block_cs;
    constexpr int kStepWords = BLOCK_N / kPackColumns * kParts * kUnitWords;
    const int channels = plan.order.in_channels;
    const int64_t stride = plan.strides[1];
    // Counted, not divided: a division takes tens of instructions, which nothing here hides.
    int y = 0, x = 0, block_c = 0, step_of_chunk = 0;
    WindowPixels pixels(plan, at, y, x, group);
    const uint32_t* weights = plan.weights + plan.order.step(block_n, y, x, 0) * kStepWords + first_unit * kUnitWords;
    const auto advance = [&] {
      weights += kStepWords;
      if (++step_of_chunk == steps_per_tap) step_of_chunk = 0, weights += (plan.order.steps - steps_per_tap) * kStepWords;
      if (++block_c < block_cs) return;
      block_c = step_of_chunk = 0;
      if (++x == plan.order.kernel[1]) x = 0, ++y;
      pixels = WindowPixels(plan, at, y, x, group);
      weights = plan.weights + plan.order.step(block_n, y, x, 0) * kStepWords + first_unit * kUnitWords;
    };
    // Each operand is loaded for the next step as soon as this one has used it.
    float values[4][2];
    uint32_t a[kParts][4], b[UNITS][kParts][4];
    load(pixels, 0, channels, stride, values);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) load(weights + u * kUnitWords, b[u]);
#pragma unroll 1
    for (int step = 1; step <= steps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float two[2] = {scaled(values[i][0], power), scaled(values[i][1], power)};
        if constexpr (kParts == 2) {
          split_f16(two[0], two[1], a[0][i], a[1][i]);
        } else {
          a[0][i] = ptx::pack_f16(two[0], two[1]);
        }
      }
      if (step < steps) advance();  // the last step loads its own operands again
      load(pixels, block_c * kStepDepth, channels, stride, values);
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float(&four)[4] = target[2 * u + half];
          if constexpr (kParts == 2) {
            ptx::mma_m16n8k16(four, a[0], b[u][1][2 * half], b[u][1][2 * half + 1], ptx::F16());
            ptx::mma_m16n8k16(four, a[1], b[u][0][2 * half], b[u][0][2 * half + 1], ptx::F16());
          }
          ptx::mma_m16n8k16(four, a[0], b[u][0][2 * half], b[u][0][2 * half + 1], ptx::F16());
        }
        load(weights + u * kUnitWords, b[u]);
      }
      if constexpr (kParts == 2) {
        if (step % kStepsTogether != 0 && step < steps) continue;
#pragma unroll
        for (int j = 0; j < 2 * UNITS; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[j][k] += together[j][k];
        }
        clear(together);
      }
    }
  }

  // The minima over some blocks of output channels, with one power of two.
  __device__ __forceinline__ void minima(int first_n, int end_n, int exponent, Smallest (&found)[kLaneResults]) const {
    const float root = power_of_two(-exponent / 2);
#pragma unroll 1
    for (int block_n = first_n; block_n < end_n; ++block_n) {
#pragma unroll 1
      for (int first_unit = 0; first_unit < BLOCK_N / kPackColumns; first_unit += UNITS) {
        float sums[2 * UNITS][4];
        multiply(block_n, first_unit, power_of_two(exponent), sums);
        const float* const block = plan.constants + static_cast<int64_t>(block_n) * BLOCK_N * kConstants;
#pragma unroll
        for (int j = 0; j < 2 * UNITS; ++j) {
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
  __device__ __forceinline__ bool run(int first_n, int end_n, Smallest (&result)[kLaneResults]) const {
    if (plan.size[0] == 0 || plan.size[1] == 0) return false;  // padding alone
    // What a window's largest value must be, as an element is off by up to 2^-24 (`scaled`): for half of what the promise
    // grants to largest values.
    const float needed = fminf(plan.taps() * (kParts == 2 ? 128.0f : 0.125f), 0x1p12f);
    for (Smallest& one : result) one = {kInfinity<float>, 0};
#pragma unroll 1
    for (int first = first_n, end; first < end_n; first = end) {
      const int group = first / plan.order.blocks_n;
      end = min((group + 1) * plan.order.blocks_n, end_n);
      float windows[kLaneResults];
      largest(group, windows);
      const bool alone = first == first_n && end == end_n;
      if (alone && !__any_sync(0xffffffffu, windows[0] > 0.0f || windows[1] > 0.0f)) return false;
      Smallest of_group[kLaneResults];
      bool waits[kLaneResults] = {true, true};
      while (__any_sync(0xffffffffu, waits[0] || waits[1])) {
        const float mine = fmaxf(waits[0] ? windows[0] : 0.0f, waits[1] ? windows[1] : 0.0f);
        const float most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(mine)));
        const int exponent = even_exponent_for(most);
        Smallest found[kLaneResults] = {{kInfinity<float>, 0}, {kInfinity<float>, 0}};
        minima(first, end, exponent, found);
#pragma unroll
        for (int r = 0; r < kLaneResults; ++r) {
          const bool served = waits[r] && (windows[r] == 0.0f || windows[r] == most || exponent == kLargestExponent ||
                                           windows[r] * power_of_two(exponent) >= needed);
          if (served) of_group[r] = found[r];
          waits[r] &= !served;
        }
      }
#pragma unroll
      for (int r = 0; r < kLaneResults; ++r) {
        take_smaller(result[r].value, of_group[r].value, result[r].column, of_group[r].column);
      }
    }
    return true;
  }

  // The same, into the output.
  template <class Results>
  __device__ __forceinline__ void put(const Results& results, int first_n, int end_n) const {
    Smallest result[kLaneResults];
    if (!run(first_n, end_n, result)) return;
#pragma unroll
    for (int r = 0; r < kLaneResults; ++r) {
      if (lane % 4 == 0 && results.exists(at[r])) results.put(at[r], result[r].value, result[r].column);
    }
  }
};

}  // namespace fused_kernels
