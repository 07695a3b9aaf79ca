// grad_input_gather: the convolution's input gradient, gathered from the winners alone.
//
// The gradient of a channel minimum reaches one channel of each output pixel, its winner. So an input pixel gets, through each
// filter tap, the gradient of one output pixel times one row of the weights, the winner's. That is 1/out_channels of what a
// dense backward convolution multiplies, and that convolution's operand, the gradient of all channels, is never in memory.
//   packed weights   [output channel][tap][input channel]: a winner's row for a tap is a run of neighbours
//   a thread         a few channels of one input pixel; it walks over the taps and adds rows
// Takes everything: any stride, padding, dilation, groups, dtype. Each sum has one owner and one order: the same bits every
// time.
// Limit: the cache, which delivers a row of the weights for each pixel and tap.
// Previous rung: the dense backward convolution of PyTorch's library.

#include "gradients.h"
#include "launch.cuh"
#include "numerics.cuh"
#include "vectors.cuh"

#include <string>

namespace fused_kernels {

constexpr int kThreads = 256;

struct GradInputGatherPlan {
  ConvShape shape;
  int64_t grad_strides[4];
  int channels, taps, vectors;  // input channels in all, filter taps, vectors of channels in a group
  bool channels_last, whole;        // whole: no vector of channels reaches past a pixel's last one
};

// Packs the weights: [output channel][tap][input channel], the last padded to whole vectors with zeros.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* weight, T* packed, int64_t count, int padded, const __grid_constant__ GradInputGatherPlan plan) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const ConvShape& s = plan.shape;
  const int channel = i % padded, tap = i / padded % plan.taps;
  const int64_t output = i / padded / plan.taps, row = tap / s.kernel[1], column = tap % s.kernel[1];
  const int64_t* const strides = s.weight_strides;
  const int64_t from = output * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3];
  packed[i] = channel < s.in_channels ? weight[from] : T(0);
}

// One block per row of the input gradient.
// NOTE: told no number of blocks, ptxas gives the float kernel 32 registers on sm_100 and spills (nvcc 13.0).
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 5)
    gather_kernel(const T* grad, Winners winners, const T* packed, Accumulator<T> scale, T* output,
                  const __grid_constant__ GradInputGatherPlan plan) {
  using A = Accumulator<T>;
  const ConvShape& s = plan.shape;
  const int height = s.input[0], width = s.input[1], padded = plan.vectors * VEC;
  const int64_t image = blockIdx.x / height;
  const int y = blockIdx.x % height, all_vectors = plan.vectors * static_cast<int>(s.groups);
  const int64_t plane = static_cast<int64_t>(height) * width;

  // The output pixel that meets an input pixel at a tap, on one axis; -1 where there is none.
  const int kernel_h = s.kernel[0], kernel_w = s.kernel[1], out_channels = s.out_channels;
  const bool grouped = s.groups > 1;
  const int sizes[2] = {static_cast<int>(s.output[0]), static_cast<int>(s.output[1])};
  const int strides[2] = {static_cast<int>(s.stride[0]), static_cast<int>(s.stride[1])};
  const int paddings[2] = {static_cast<int>(s.padding[0]), static_cast<int>(s.padding[1])};
  const int dilations[2] = {static_cast<int>(s.dilation[0]), static_cast<int>(s.dilation[1])};
  const auto meets = [&](int at, int tap, int axis) {
    const int distance = at + paddings[axis] - tap * dilations[axis];
    if (distance < 0) return -1;
    if (strides[axis] == 1) return distance < sizes[axis] ? distance : -1;
    const int place = distance / strides[axis];
    return place * strides[axis] == distance && place < sizes[axis] ? place : -1;
  };

  for (unsigned item = threadIdx.x; item < static_cast<unsigned>(width) * all_vectors; item += kThreads) {
    // Neighbouring threads write neighbours.
    const int x = plan.channels_last ? item / all_vectors : item % width;
    const int vector = plan.channels_last ? item % all_vectors : item / width;
    const int group = vector / plan.vectors, in_group = vector % plan.vectors * VEC;
    A sums[VEC] = {};
    const T* const rows = packed + in_group;
    for (int ky = 0; ky < kernel_h; ++ky) {
      const int row = meets(y, ky, 0);
      if (row < 0) continue;
      const int64_t line = (image * s.output[0] + row) * s.output[1];
      A of_row[VEC] = {};  // short sums have small rounding errors
      const T* const grad_line = grad + image * plan.grad_strides[0] + row * plan.grad_strides[2];
      for (int kx = 0; kx < kernel_w; ++kx) {
        const int column = meets(x, kx, 1);
        if (column < 0) continue;
        const int winner = winners[line + column];
        if (grouped && winner / out_channels != group) continue;
        const A g = static_cast<A>(grad_line[column * plan.grad_strides[3]]);
        const auto weights = *reinterpret_cast<const Vector<T, VEC>*>(rows + (winner * plan.taps + ky * kernel_w + kx) * padded);
#pragma unroll
        for (int i = 0; i < VEC; ++i) of_row[i] += g * static_cast<A>(weights.values[i]);
      }
#pragma unroll
      for (int i = 0; i < VEC; ++i) sums[i] += of_row[i];
    }
    const int channel = group * static_cast<int>(s.in_channels) + in_group;
    const int count = min(VEC, static_cast<int>(s.in_channels) - in_group);
    const int64_t pixel = static_cast<int64_t>(y) * width + x;
    T* const to = output + (plan.channels_last ? (image * plane + pixel) * plan.channels + channel
                                               : (image * plan.channels + channel) * plane + pixel);
    if (plan.channels_last && plan.whole) {
      Vector<T, VEC> result;
#pragma unroll
      for (int i = 0; i < VEC; ++i) result.values[i] = static_cast<T>(sums[i] * scale);
      *reinterpret_cast<Vector<T, VEC>*>(to) = result;
      continue;
    }
    const int64_t step = plan.channels_last ? 1 : plane;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if (i < count) to[i * step] = static_cast<T>(sums[i] * scale);
    }
  }
}

Tensor grad_input_gather(const Tensor& grad, const Tensor& winners, const Tensor& weight, double scale,
                         std::vector<int64_t> input_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, std::string /*precision*/, bool channels_last) {
  const ConvShape shape = check_grad_input(grad, winners, weight, input_size, stride, padding, dilation, groups);
  const int64_t channels = shape.in_channels * groups, height = shape.input[0], width = shape.input[1];
  const int64_t reach = std::max({shape.padding[0], shape.padding[1], shape.stride[0], shape.stride[1],
                                  shape.kernel[0] * shape.dilation[0], shape.kernel[1] * shape.dilation[1]});
  STD_TORCH_CHECK(reach < 1 << 29, "padding, stride, dilation: grad_input_gather expected less than 2^29, got ", reach);
  STD_TORCH_CHECK(height < 1 << 30 && (channels + 8 * groups) * width < 1 << 30,
                  "input_size: grad_input_gather expected fewer than 2^30 rows, and elements in all channels of a row");
  Tensor output = new_gradient(weight, {shape.images, channels, height, width}, channels_last);
  if (output.numel() == 0) return output;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const cudaStream_t stream = current_stream(weight);

  GradInputGatherPlan plan{.shape = shape, .channels = static_cast<int>(channels), .taps = static_cast<int>(shape.taps()),
            .channels_last = channels_last};
  for (int d = 0; d < 4; ++d) plan.grad_strides[d] = grad.stride(d);
  dispatch(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    constexpr int VEC = 16 / sizeof(T);
    plan.vectors = static_cast<int>(ceil_div(shape.in_channels, VEC));
    const int64_t count = weight.size(0) * plan.taps * plan.vectors * VEC;
    STD_TORCH_CHECK(count < INT32_MAX, "weight: grad_input_gather expected fewer than 2^31 weights, got ", count);
    plan.whole = shape.in_channels % VEC == 0;
    const T* rows = static_cast<const T*>(weight.data_ptr());
    // The weights of a 1 x 1 kernel, and all weights in channels_last, lie as they should already.
    const int64_t row = shape.kernel[1] * shape.in_channels, *const strides = shape.weight_strides;
    const bool is_packed = plan.whole && reinterpret_cast<uintptr_t>(rows) % 16 == 0 && strides[0] == shape.kernel[0] * row &&
                           strides[1] == 1 && (plan.taps == 1 || (strides[2] == row && strides[3] == shape.in_channels));
    const Tensor packed = torch::stable::new_empty(weight, {is_packed ? 0 : count});
    if (!is_packed) {
      T* const to = static_cast<T*>(packed.data_ptr());
      pack_kernel<<<grid_size(ceil_div(count, kThreads)), kThreads, 0, stream>>>(rows, to, count, plan.vectors * VEC, plan);
      rows = to;
    }
    gather_kernel<T, VEC><<<grid_size(shape.images * height), kThreads, 0, stream>>>(
        static_cast<const T*>(grad.data_ptr()), winners_in(winners), rows, static_cast<Accumulator<T>>(scale),
        static_cast<T*>(output.data_ptr()), plan);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(OPERATOR("grad_input_gather"), TORCH_BOX(&grad_input_gather)); }

}  // namespace fused_kernels
