// conv_direct: convolution, bias, scale and minimum in one kernel; the convolution's output is never in memory.
//
// Each FMA needs two operands. An SM does 128 FMAs per clock and reads 32 floats per clock from shared memory, so each float
// that is read must serve eight FMAs or more. Hence register blocking: a thread sums 8 rows x 16 output channels in registers.
// The FMAs take 8 of the channels at a time: 8 inputs and 8 weights make 64 FMAs, and the inputs of 10 rows serve all three
// rows of a 3 x 3 filter.
//   Tiling         A warp owns a strip, 8 rows x 32 columns of output pixels: one column per lane, so that all lanes read the
//                  same weight. The block's 4 warps split a strip's channels, or own a strip each where the channels are few.
//   Shared memory  The strip with its halo (the margin that the filter reaches into) and the weights come a few input channels
//                  at a time, by cp.async, into one of two buffers (pipeline stages) while the FMAs work on the other. The rows
//                  of a column lie side by side: 16 bytes per load.
//   Partial sums   Equal products, added one by one, can all be rounded to the same side, and small ones be lost beside a large
//                  sum. So partial sums are made, and added: about sqrt(K) of K products each. Beside 128 sums, registers have
//                  room for 64 partial sums: hence 8 channels at a time.
//   Epilogue       Bias, scale and minimum happen in registers. A block makes one pass for each 64 output channels and stores
//                  one value per pixel at the end.
// Limit: the FMA units. More than eight in ten of the instructions issued are FMAs (counted in the SASS).
// Previous rung: scale_min_vectorized.

#include <cmath>
#include <numeric>
#include <type_traits>

#include "conv_direct_plan.h"
#include "launch.cuh"
#include "numerics.cuh"
#include "partial_sums.h"
#include "ptx/cp_async.cuh"

namespace fused_kernels {

using namespace direct;

// ---- constants and the plan ----

constexpr int kRows = 8;          // of output pixels, per thread
constexpr int kColumnPitch = 12;  // floats per column of the input: room for 10 rows, and 8 lanes' 16 bytes hit all 32 banks
constexpr int kMaxStrips = kThreads / kMinStripWidth;  // of a block
constexpr int kMaxSharedBytes = 72 << 10;  // what is left of the SM's is L1 cache

// A thread sums 16 output channels, or 4 for depthwise convolutions and similar ones: registers for so many blocks on an SM.
template <int CHANNELS>
constexpr int kBlocksPerSM = CHANNELS == 16 ? 2 : 3;
// It makes the partial sums of half of them at a time, or of all four.
template <int CHANNELS>
constexpr int kHalf = CHANNELS > 4 ? CHANNELS / 2 : CHANNELS;
// Floats from a tap's weights to the next tap's: copies of 8 taps x 4 output channels hit all banks.
template <int CHANNELS>
constexpr int kWeightPitch = kWarps * CHANNELS + 4;

struct ConvDirectPlan {
  ConvShape shape;
  const float *input, *weight, *bias;
  float* output;
  int64_t bias_stride, strips, strips_high, strips_wide;
  float scale;
  bool scales_minimum;                    // a positive scale leaves the smallest sum the smallest: it multiplies that alone
  const float* scales;                    // each channel's own factor, or null
  int64_t scales_stride;
  int passes;                             // over a group's output channels
  int warps_per_strip, strip_width, strips_per_block;
  int channels, taps, columns;            // of a step: input channels, columns of the filter, columns of a strip with its halo
  unsigned column_step, columns_inverse;  // from one of those columns to the next, in the input; 2^32 / columns, rounded up
  int lane_step;                          // from a lane to the next, in those columns
  int tap_step, channel_step;             // in floats: to the next tap, and from behind the last one to the next channel
  int pieces;                             // steps for the whole filter
  int run;                                // columns of the filter in a partial sum, at most
  int input_lanes_log2;                   // log2 of how many lanes copy neighbouring channels
  bool weight_channels_fastest;
  Winners winners;
};

// ---- bringing input and weights ----

// A strip's image, its place in the output, its first output pixel.
struct Strip {
  const float* image;
  int64_t output;
  int row, column;
};

// A weight of a step: its place in the tensor and in the buffer, for output channel 0, and its input channel.
struct alignas(16) Entry {
  int64_t from;
  int to, channel;
};

// What a buffer (a pipeline stage) holds: some input channels of TAPS filter rows x p.taps filter columns.
template <int TAPS>
struct Step {
  int group = 0, pass = 0, channel = 0, row = 0, column = 0;

  __device__ __forceinline__ void advance(const ConvDirectPlan& p) {
    if ((column += p.taps) == p.shape.kernel[1]) column = 0, row += TAPS;
    if (row == p.shape.kernel[0]) row = 0, channel += p.channels;
    if (channel >= p.shape.in_channels) channel = 0, ++pass;
    if (pass == p.passes) pass = 0, ++group;
  }
  __device__ __forceinline__ int channels(const ConvDirectPlan& p) const {
    return min(p.channels, static_cast<int>(p.shape.in_channels) - channel);
  }
};

// The strips with their halos: [channel][strip][column][row], zeros in the padding. The rows are a stride apart in the input,
// so that those of a thread lie side by side.
template <int TAPS>
__device__ __forceinline__ void copy_input(const ConvDirectPlan& p, const Strip* strips, Step<TAPS> step, uint32_t target) {
  const ConvShape& s = p.shape;
  const unsigned stride[2] = {unsigned(s.stride[0]), unsigned(s.stride[1])};
  const unsigned dilation[2] = {unsigned(s.dilation[0]), unsigned(s.dilation[1])};
  const int lanes = 1 << p.input_lanes_log2, lane = threadIdx.x & (lanes - 1);
  const int copies = (step.channels(p) - lane + lanes - 1) >> p.input_lanes_log2, pixels = (kRows + TAPS - 1) * p.columns;
  const int strip_size = p.columns * kColumnPitch, channel_size = p.strips_per_block * strip_size;
  const int64_t channel = (step.group * s.in_channels + step.channel + lane) * s.input_strides[1];
  const int64_t from_step = lanes * s.input_strides[1];
  const uint32_t to_step = lanes * channel_size * sizeof(float);
  for (int i = 0; i < p.strips_per_block; ++i) {
    // Unsigned, so that what lies before the input is past its end.
    const unsigned top = strips[i].row * stride[0] + step.row * dilation[0] - unsigned(s.padding[0]);
    const unsigned left = strips[i].column * stride[1] + step.column * dilation[1] - unsigned(s.padding[1]);
    for (int pixel = threadIdx.x >> p.input_lanes_log2; pixel < pixels; pixel += kThreads >> p.input_lanes_log2) {
      const int row = __umulhi(pixel, p.columns_inverse), column = pixel - row * p.columns;
      const unsigned y = top + row * stride[0], x = left + column * p.column_step;
      const bool inside = y < s.input[0] && x < s.input[1];
      const float* from = strips[i].image + channel + y * s.input_strides[2] + x * s.input_strides[3];
      uint32_t to = target + (lane * channel_size + i * strip_size + column * kColumnPitch + row) * sizeof(float);
#pragma unroll 4
      for (int copy = 0; copy < copies; ++copy, from += from_step, to += to_step) ptx::cp_async_4(to, from, inside);
    }
  }
}

// The weights: [channel][filter column][filter row][output channel]. Past the last output channel nothing is copied.
template <int CHANNELS, int TAPS>
__device__ __forceinline__ void copy_weights(const ConvDirectPlan& p, const Entry* table, Step<TAPS> step, uint32_t target) {
  constexpr int kLanes = 8, kSlots = kThreads / kLanes;
  const ConvShape& s = p.shape;
  const int channels = step.channels(p), slot = threadIdx.x / kLanes, first = step.pass * p.warps_per_strip * CHANNELS;
  const int outputs = min(p.warps_per_strip * CHANNELS, static_cast<int>(s.out_channels) - first);
  const float* weight = p.weight + (step.group * s.out_channels + first + slot) * s.weight_strides[0] +
                        step.channel * s.weight_strides[1] + step.row * s.weight_strides[2] + step.column * s.weight_strides[3];
  const int64_t from_step = kSlots * s.weight_strides[0];
  for (int i = threadIdx.x % kLanes; i < p.channels * p.taps * TAPS; i += kLanes) {
    const Entry entry = table[i];
    if (entry.channel >= channels) continue;
    const float* from = weight + entry.from;
    const uint32_t to = target + (entry.to + slot) * sizeof(float);
#pragma unroll
    for (int j = 0; j < kWarps * CHANNELS; j += kSlots, from += from_step) {
      if (slot + j < outputs) ptx::cp_async_4(to + j * sizeof(float), from, true);
    }
  }
}

// COUNT floats from shared memory, 16 bytes a load.
template <int COUNT>
__device__ __forceinline__ void load_shared(float (&to)[COUNT], const float* from) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}

// ---- the kernel ----

// Adds a column of the filter to partial sums, or starts them with it.
template <int CHANNELS, int TAPS, bool STARTS>
__device__ __forceinline__ void add_column(float (&partial)[kHalf<CHANNELS>][kRows], const float* x, const float* w) {
  float inputs[TAPS == 1 ? kRows : kColumnPitch];
  load_shared(inputs, x);
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    float weights[kHalf<CHANNELS>];
    load_shared(weights, w + t * kWeightPitch<CHANNELS>);
#pragma unroll
    for (int j = 0; j < kHalf<CHANNELS>; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        partial[j][i] = STARTS && t == 0 ? weights[j] * inputs[i] : fmaf(weights[j], inputs[i + t], partial[j][i]);
      }
    }
  }
}

// TAPS rows of the filter at a time share a thread's inputs; more than one need a stride that equals the dilation.
template <int CHANNELS, int TAPS>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<CHANNELS>) conv_direct_kernel(const __grid_constant__ ConvDirectPlan p) {
  static_assert(kRows + TAPS - 1 <= kColumnPitch, "TAPS: expected the rows of a strip and its halo to fit in a column");
  extern __shared__ Entry dynamic_shared[];
  __shared__ Strip strips[kMaxStrips];
  __shared__ float minima[kWarps][kRows][kWarpSize];
  // Whether multiplications start partial sums, so that none are cleared.
  // NOTE: not for three rows of the filter: that code is longer, and slower (nvcc 13.0, on an H200).
  constexpr bool kStarts = CHANNELS != kHalf<CHANNELS> && TAPS == 1;
  const ConvShape& s = p.shape;
  const int entries = p.channels * p.taps * TAPS, channel_size = p.strips_per_block * p.columns * kColumnPitch;
  const int input_size = p.channels * channel_size, buffer_size = input_size + entries * kWeightPitch<CHANNELS>;
  Entry* table = dynamic_shared;
  float* buffers = reinterpret_cast<float*>(table + entries);

  // Neighbouring blocks own neighbouring strips, and find what their halos share in the L2 cache. Past the end, the last strip
  // again.
  const int64_t first_strip = static_cast<int64_t>(blockIdx.x) * p.strips_per_block;
  if (threadIdx.x < p.strips_per_block) {
    const int64_t strip = min(first_strip + threadIdx.x, p.strips - 1), image = strip / p.strips_wide / p.strips_high;
    const int row = strip / p.strips_wide % p.strips_high * kRows, column = strip % p.strips_wide * p.strip_width;
    const int64_t output = (image * s.output[0] + row) * s.output[1] + column;
    strips[threadIdx.x] = {p.input + image * s.input_strides[0], output, row, column};
  }
  // The table follows the tensor's order, so that neighbouring lanes copy neighbours.
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int channel = p.weight_channels_fastest ? i % p.channels : i / (p.taps * TAPS);
    const int tap = p.weight_channels_fastest ? i / p.channels : i % (p.taps * TAPS);
    const int row = tap / p.taps, column = tap % p.taps;
    table[i] = {channel * s.weight_strides[1] + row * s.weight_strides[2] + column * s.weight_strides[3],
                ((channel * p.taps + column) * TAPS + row) * kWeightPitch<CHANNELS>, channel};
  }
  __syncthreads();

  const auto copy = [&](Step<TAPS> step, int buffer) {
    const uint32_t target = ptx::shared_address(buffers + buffer * buffer_size);
    copy_input(p, strips, step, target);
    copy_weights<CHANNELS>(p, table, step, target + input_size * sizeof(float));
    ptx::cp_async_commit();
  };

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int part = warp % p.warps_per_strip;  // which of the strip's channels
  const int strip = warp / p.warps_per_strip * (kWarpSize / p.strip_width) + lane / p.strip_width;
  const int column = lane % p.strip_width;
  const int in_channels = s.in_channels, out_channels = s.out_channels, passes = s.groups * p.passes;

  float smallest[kRows];
  int winner[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) smallest[i] = kInfinity<float>, winner[i] = 0;

  Step<TAPS> ahead;
  int buffer = 0;
  copy(ahead, buffer);
  for (int pass = 0; pass < passes; ++pass) {
    float sum[CHANNELS][kRows] = {}, partial[kHalf<CHANNELS>][kRows] = {};
    int left = p.run;  // columns of the filter, until the partial sums are added
    const auto add_partial = [&](int half) {
#pragma unroll
      for (int j = 0; j < kHalf<CHANNELS>; ++j) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          sum[half + j][i] += partial[j][i];
          if constexpr (!kStarts) partial[j][i] = 0;
        }
      }
      left = p.run;
    };
    for (int first = 0; first < in_channels; first += p.channels) {
      for (int piece = 0; piece < p.pieces; ++piece) {
        // Everyone's copies have landed, and everyone is done with the other buffer.
        ptx::cp_async_wait<0>();
        __syncthreads();
        ahead.advance(p);
        if (ahead.group < s.groups) copy(ahead, buffer ^ 1);

        const int columns = min(p.channels, in_channels - first) * p.taps;
#pragma unroll
        for (int half = 0; half < CHANNELS; half += kHalf<CHANNELS>) {
          const float* x = buffers + buffer * buffer_size + (strip * p.columns + column * p.lane_step) * kColumnPitch;
          const float* w = buffers + buffer * buffer_size + input_size + part * CHANNELS + half;
          for (int todo = columns, tap = p.taps; todo > 0;) {
            int now = min(left, todo);
            todo -= now, left -= now;
            const auto advance = [&] {
              x += p.tap_step;
              if (--tap == 0) tap = p.taps, x += p.channel_step;
              w += TAPS * kWeightPitch<CHANNELS>;
            };
            if constexpr (kStarts) {
              add_column<CHANNELS, TAPS, true>(partial, x, w);
              advance(), --now;
            }
            // Two columns at a time: the second one's loads come early.
#pragma unroll 2
            for (; now > 0; --now) {
              add_column<CHANNELS, TAPS, false>(partial, x, w);
              advance();
            }
            // The other half needs the registers.
            if (left == 0 || CHANNELS != kHalf<CHANNELS>) add_partial(half);
          }
        }
        buffer ^= 1;
      }
    }

    if (CHANNELS == kHalf<CHANNELS>) add_partial(0);
    const int first = (pass % p.passes * p.warps_per_strip + part) * CHANNELS;
    const auto take = [&](auto scaled) {
#pragma unroll
      for (int j = 0; j < CHANNELS; ++j) {
        if (first + j >= out_channels) break;
        const int64_t channel = pass / p.passes * s.out_channels + first + j;
        const float bias = p.bias ? p.bias[channel * p.bias_stride] : 0;
        const float scale = p.scales ? p.scales[channel * p.scales_stride] : p.scale;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float value = sum[j][i] + bias;
          take_smaller(smallest[i], scaled.value ? value * scale : value, winner[i], static_cast<int>(channel));
        }
      }
    };
    if (p.scales_minimum) {
      take(std::false_type());
    } else {
      take(std::true_type());
    }
  }

  // ---- epilogue: the minimum over a strip's warps, which take turns in finishing its rows ----
#pragma unroll
  for (int i = 0; i < kRows; ++i) minima[warp][i][lane] = smallest[i];
  if constexpr (kWinners) {
    __syncthreads();  // everyone is done with the buffers
#pragma unroll
    for (int i = 0; i < kRows; ++i) reinterpret_cast<int*>(dynamic_shared)[i * kThreads + threadIdx.x] = winner[i];
  }
  __syncthreads();
  const Strip mine = strips[strip];
  if (first_strip + strip >= p.strips || mine.column + column >= s.output[1]) return;
  for (int i = part; i < kRows && mine.row + i < s.output[0]; i += p.warps_per_strip) {
    float result = kInfinity<float>;
    for (int w = warp - part; w < warp - part + p.warps_per_strip; ++w) result = min_nan(result, minima[w][i][lane]);
    const int64_t pixel = mine.output + i * s.output[1] + column;
    p.output[pixel] = p.scales_minimum ? result * p.scale : result;
    if constexpr (kWinners) {
      int w = warp - part;  // the first whose minimum it is
      while (w < warp - part + p.warps_per_strip - 1 && !same_bits(minima[w][i][lane], result)) ++w;
      p.winners.put(pixel, reinterpret_cast<const int*>(dynamic_shared)[i * kThreads + w * kWarpSize + lane]);
    }
  }
}

// ---- host: the plan and the launch ----

template <int CHANNELS, int TAPS>
void launch(ConvDirectPlan p, int device, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  const Strips strips(s, kRows, CHANNELS);
  p.warps_per_strip = strips.warps;
  p.passes = strips.passes;
  p.strip_width = strips.width;
  p.strips_per_block = strips.per_block;
  p.strips_high = strips.high;
  p.strips_wide = strips.wide;
  p.strips = strips.count;

  int available = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  constexpr int kStaticBytes = 6 << 10;  // the kernel's own arrays, and what CUDA reserves
  const int64_t most = std::min(kMaxSharedBytes, available / kBlocksPerSM<CHANNELS> - kStaticBytes);
  // Columns that no tap reads are left out: what is read lies on multiples of the step.
  const auto step = [&](int64_t taps) { return taps > 1 ? std::gcd(s.stride[1], s.dilation[1]) : s.stride[1]; };
  const auto columns = [&](int64_t taps) {
    return ((p.strip_width - 1) * s.stride[1] + (taps - 1) * s.dilation[1]) / step(taps) + 1;
  };
  const auto channel_bytes = [&](int64_t taps) {
    const int64_t floats = p.strips_per_block * columns(taps) * kColumnPitch + taps * TAPS * kWeightPitch<CHANNELS>;
    return static_cast<int64_t>(2 * floats * sizeof(float) + taps * TAPS * sizeof(Entry));
  };
  // A step takes the filter's whole width, unless the strip with its halo does not fit, or needs no fewer columns than one
  // strip for each tap would.
  int64_t taps = s.kernel[1];
  while (taps > 1 && (s.kernel[1] % taps != 0 || columns(taps) >= taps * p.strip_width || channel_bytes(taps) > most)) --taps;
  p.channels = ceil_div(s.in_channels, ceil_div(s.in_channels, std::min(s.in_channels, most / channel_bytes(taps))));
  p.taps = taps;
  p.columns = columns(taps);
  p.columns_inverse = ceil_div(int64_t{1} << 32, p.columns);
  p.column_step = step(taps);
  p.lane_step = s.stride[1] / step(taps);
  p.tap_step = taps > 1 ? s.dilation[1] / step(taps) * kColumnPitch : 0;
  p.channel_step = p.strips_per_block * p.columns * kColumnPitch - taps * p.tap_step;
  p.pieces = s.kernel[0] / TAPS * (s.kernel[1] / taps);

  // An eighth more than promised: each partial sum takes time.
  const PartialSums sums(s.in_channels * s.taps(), 0.125);
  // A half's partial sums end with the step, as the other half needs the registers; those of all channels carry over.
  constexpr bool kCarryOver = CHANNELS == kHalf<CHANNELS>;
  const int64_t times = kCarryOver ? 1 : ceil_div(s.in_channels, p.channels) * p.pieces;
  const int64_t length = (kCarryOver ? s.in_channels * p.pieces : p.channels) * taps;  // columns of the filter
  const int64_t parts = sums.parts(length, TAPS, times);
  if constexpr (!kCarryOver) {
    // Steps that are far too short for that: four channels, though these take longer.
    if (sums.lost(length, TAPS, times, parts) > 2 * sums.allowed) return launch<4, TAPS>(p, device, stream);
  }
  p.run = ceil_div(length, parts);

  const auto kernel = conv_direct_kernel<CHANNELS, TAPS>;
  constexpr int64_t kWinnerBytes = kWinners ? kRows * kThreads * sizeof(int) : 0;
  const int shared = std::max(p.channels * channel_bytes(taps), kWinnerBytes);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<grid_size(ceil_div(p.strips, p.strips_per_block)), kThreads, shared, stream>>>(p);
}

// The precision is a permission to be less exact; this kernel does not use it.
Forward conv_direct(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                    std::string /*precision*/, const std::optional<Tensor>& scales = std::nullopt) {
  const ConvShape s = check_conv(input, weight, bias, stride, padding, dilation, groups);
  check_scales(scales, input, weight.size(0), scale);
  STD_TORCH_CHECK(input.scalar_type() == torch::headeronly::ScalarType::Float, "input: conv_direct expected float32, got ",
                  input.scalar_type());
  // Pixels and channels are counted in an int.
  const int64_t most = std::max({s.input[0] + padding[0] + padding[1], s.input[1] + padding[2] + padding[3], weight.size(0)});
  STD_TORCH_CHECK(most < 1 << 30, "input: conv_direct expected fewer than 2^30 padded rows, columns and channels, got ", most);
  Tensor output = torch::stable::new_empty(input, {s.images, 1, s.output[0], s.output[1]});
  const std::optional<Tensor> winners = new_winners(output, weight.size(0));
  if (output.numel() == 0) return forward_result(output, winners);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());

  ConvDirectPlan p{.shape = s, .scale = static_cast<float>(scale)};
  p.scales = scales ? static_cast<const float*>(scales->data_ptr()) : nullptr;
  p.scales_stride = scales ? scales->stride(0) : 0;
  p.scales_minimum = !scales && p.scale > 0 && std::isfinite(p.scale);
  p.input = static_cast<const float*>(input.data_ptr());
  p.weight = static_cast<const float*>(weight.data_ptr());
  p.bias = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  p.bias_stride = bias ? bias->stride(0) : 0;
  p.output = static_cast<float*>(output.data_ptr());
  p.winners = winners_in(winners);
  p.input_lanes_log2 = s.input_strides[1] == 1 && s.in_channels >= 4 ? 2 : 0;
  p.weight_channels_fastest = s.weight_strides[1] == 1;

  const bool three = s.kernel[0] % 3 == 0 && s.stride[0] == s.dilation[0], few = s.out_channels <= 4;
  const auto run = few ? (three ? launch<4, 3> : launch<4, 1>) : (three ? launch<16, 3> : launch<16, 1>);
  run(p, input.get_device_index(), current_stream(input));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return forward_result(output, winners);
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) {
  m.impl(FORWARD("conv_direct"), TORCH_BOX(&conv_direct));
}

}  // namespace fused_kernels
