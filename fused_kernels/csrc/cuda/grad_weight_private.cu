// grad_weight_private: the gradients of weights and bias, summed from the winners alone, by blocks with sums of their own.
//
// An output pixel adds to the weights of its winner only: its gradient times the input under the filter. Which row of the
// weights that is changes from pixel to pixel, and all pixels may hit the same one: atomic additions would queue up. So each
// block keeps private sums in shared memory, and each sum has one owner, a thread: no atomics, one order, the same bits every
// time. A second kernel adds the blocks' sums.
//   a column   an input channel at a filter tap, whose input a thread reads for pixel after pixel; one more for the bias: all
//              ones
//   a block    some columns, some output channels, and a slice of the pixels
// Takes everything: any stride, padding, dilation, groups, dtype. Sums are double, or float32 for 16-bit types: a long sum of
// float32 in float32 would lose more than the library's shorter sums do.
// Limit: each product's way to shared memory and back.
// Previous rung: the dense backward convolution of PyTorch's library.

#include "gradients.h"
#include "launch.cuh"
#include "numerics.cuh"

#include <string>

namespace fused_kernels {

constexpr int kWarpSize = 32;
constexpr int kBatch = 8;              // pixels whose inputs are on their way together
constexpr int kMostColumns = 256;      // of a block, one per thread
constexpr int kSharedBytes = 72 << 10;  // for a block's sums: three blocks per multiprocessor

template <typename T>
using Sum = std::conditional_t<sizeof(T) == 2, float, double>;

struct GradWeightPrivatePlan {
  ConvShape shape;
  int64_t grad_strides[4];
  int columns, columns_per_block, column_blocks;   // of a group
  int outputs_per_block, output_blocks;            // of a group
  int64_t pixels, slices;
  bool channels_fastest;                         // the order of columns: what neighbouring threads read lies side by side
};

// Partial sums: [slice][output channel][column], the bias last.
template <typename T, bool PADDED>
__global__ void __launch_bounds__(kMostColumns, 1)
    private_kernel(const T* grad, Winners winners, const T* input, Sum<T>* partial,
                   const __grid_constant__ GradWeightPrivatePlan plan) {
  extern __shared__ double dynamic_shared[];
  Sum<T>* const sums = reinterpret_cast<Sum<T>*>(dynamic_shared);
  const ConvShape& s = plan.shape;
  // One dimension of blocks, for the others end at 65535: groups, their output channels, slices, columns.
  const int64_t rest = blockIdx.x / plan.column_blocks, slice = rest % plan.slices;
  const int of_outputs = static_cast<int>(rest / plan.slices);
  const int group = of_outputs / plan.output_blocks, first_output = of_outputs % plan.output_blocks * plan.outputs_per_block;
  const int outputs = min(plan.outputs_per_block, static_cast<int>(s.out_channels) - first_output);
  const int first_winner = group * static_cast<int>(s.out_channels) + first_output;
  const int column = blockIdx.x % plan.column_blocks * plan.columns_per_block + threadIdx.x;
  const int64_t begin = plan.pixels * slice / plan.slices, end = plan.pixels * (slice + 1) / plan.slices;
  Sum<T>* const mine = sums + threadIdx.x;
  for (int i = 0; i < outputs; ++i) mine[i * blockDim.x] = 0;

  // What this thread's column reads: a channel, shifted by a tap; for the bias, ones.
  const int taps = s.kernel[0] * s.kernel[1], channels = s.in_channels;
  const bool is_bias = column + 1 == plan.columns, exists = column < plan.columns, reads = exists && !is_bias;
  const int channel = plan.channels_fastest ? column % channels : column / taps;
  const int tap = plan.channels_fastest ? column / channels : column % taps;
  const int shift_y = reads ? tap / static_cast<int>(s.kernel[1]) * s.dilation[0] : 0;
  const int shift_x = reads ? tap % static_cast<int>(s.kernel[1]) * s.dilation[1] : 0;
  const T* const source = input + (reads ? (group * s.in_channels + channel) * s.input_strides[1] +
                                               shift_y * s.input_strides[2] + shift_x * s.input_strides[3]
                                         : 0);
  const int width = s.output[1], height = s.output[0], lane = threadIdx.x % kWarpSize;
  const int input_height = s.input[0], input_width = s.input[1];

  for (int64_t first = begin; first < end; first += kWarpSize) {
    // Each lane looks up one pixel: its winner, its gradient, and where the filter's first tap lies on the input.
    const int count = static_cast<int>(min(end - first, static_cast<int64_t>(kWarpSize)));
    int top = 0, left = 0, winner = -1;
    int64_t offset = 0;
    float g = 0.0f;
    double wide_g = 0.0;
    if (lane < count) {
      const int64_t pixel = first + lane, line = pixel / width, image = line / height;
      const int x = static_cast<int>(pixel - line * width), y = static_cast<int>(line - image * height);
      winner = winners[pixel] - first_winner;
      if (winner < 0 || winner >= outputs) winner = -1;
      const T value = grad[image * plan.grad_strides[0] + y * plan.grad_strides[2] + x * plan.grad_strides[3]];
      g = static_cast<float>(value), wide_g = static_cast<double>(value);
      top = static_cast<int>(y * s.stride[0] - s.padding[0]), left = static_cast<int>(x * s.stride[1] - s.padding[1]);
      offset = image * s.input_strides[0] + top * s.input_strides[2] + left * s.input_strides[3];
    }
    unsigned wanted = __ballot_sync(0xffffffffu, winner >= 0);
    // Then all lanes work on each of the pixels together, a few at once.
    while (wanted) {
      Sum<T> products[kBatch];
      int owners[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int from = wanted ? __ffs(wanted) - 1 : 0;
        owners[k] = wanted ? __shfl_sync(0xffffffffu, winner, from) : -1;
        wanted &= wanted - 1;
        const T* const at = source + __shfl_sync(0xffffffffu, offset, from);
        bool inside = reads;
        if constexpr (PADDED) {
          const int y = __shfl_sync(0xffffffffu, top, from) + shift_y, x = __shfl_sync(0xffffffffu, left, from) + shift_x;
          inside &= static_cast<unsigned>(y) < static_cast<unsigned>(input_height) &&
                    static_cast<unsigned>(x) < static_cast<unsigned>(input_width);
        }
        // In the padding there is nothing to add, not even for a gradient that is infinite.
        if constexpr (sizeof(T) == 8) {
          const double factor = __shfl_sync(0xffffffffu, wide_g, from);
          products[k] = inside ? factor * static_cast<double>(__ldg(at)) : is_bias ? factor : 0.0;
        } else {
          const Sum<T> factor = __shfl_sync(0xffffffffu, g, from);
          products[k] = inside ? factor * static_cast<Sum<T>>(*at) : is_bias ? factor : Sum<T>(0);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (owners[k] >= 0) mine[owners[k] * blockDim.x] += products[k];
      }
    }
  }

  if (!exists) return;
  const int64_t out_channels = s.groups * s.out_channels;
  Sum<T>* const to = partial + (slice * out_channels + first_winner) * plan.columns + column;
  for (int i = 0; i < outputs; ++i) to[static_cast<int64_t>(i) * plan.columns] = mine[i * blockDim.x];
}

// Adds the slices, always in the same order.
template <typename T>
__global__ void __launch_bounds__(256)
    reduce_kernel(const Sum<T>* partial, Sum<T> scale, T* grad_weight, T* grad_bias,
                  const __grid_constant__ GradWeightPrivatePlan plan) {
  const ConvShape& s = plan.shape;
  const int64_t count = s.groups * s.out_channels * plan.columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  Sum<T> sum = 0;
  for (int64_t slice = 0; slice < plan.slices; ++slice) sum += partial[slice * count + i];
  const int64_t output = i / plan.columns;
  const int column = i % plan.columns, taps = s.kernel[0] * s.kernel[1], channels = s.in_channels;
  const T rounded = static_cast<T>(sum * scale);
  if (column + 1 == plan.columns) {
    grad_bias[output] = rounded;
  } else {
    const int at = plan.channels_fastest ? column % channels * taps + column / channels : column;
    grad_weight[output * channels * taps + at] = rounded;
  }
}

// Launches both kernels; without an input, for the bias alone.
std::tuple<Tensor, Tensor> sum_gradients(const Tensor& grad, const Tensor& winners, const std::optional<Tensor>& input,
                                         double scale, const ConvShape& shape) {
  const int64_t out_channels = shape.out_channels * shape.groups, columns = input ? shape.in_channels * shape.taps() + 1 : 1;
  STD_TORCH_CHECK(columns < 1 << 30 && out_channels < 1 << 30, "input: expected fewer than 2^30 weights of an output channel");
  STD_TORCH_CHECK(shape.images * shape.output[0] < INT32_MAX && shape.output[1] < INT32_MAX,
                  "grad: expected fewer than 2^31 rows in all images");
  const int64_t channels = input ? shape.in_channels : 0, kernel_h = shape.kernel[0], kernel_w = shape.kernel[1];
  Tensor grad_weight = torch::stable::new_empty(grad, {out_channels, channels, kernel_h, kernel_w});
  Tensor grad_bias = torch::stable::new_empty(grad, {out_channels});
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);

  GradWeightPrivatePlan plan{.shape = shape, .columns = static_cast<int>(columns), .pixels = shape.pixels(),
            .channels_fastest = input && shape.input_strides[1] == 1};
  for (int d = 0; d < 4; ++d) plan.grad_strides[d] = grad.stride(d);
  // Whether a filter anywhere hangs over the input's edge.
  bool is_padded = false;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = (shape.output[axis] - 1) * shape.stride[axis] + (shape.kernel[axis] - 1) * shape.dilation[axis];
    is_padded |= shape.padding[axis] > 0 || reach >= shape.input[axis];
    STD_TORCH_CHECK(reach + shape.input[axis] < INT32_MAX / 2, "input: expected a padded height and width below 2^30");
  }
  dispatch(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Sum<T>;
    // As many output channels as leave room for the columns of two warps, or of all that there are; a warp's sums have room
    // for 32 columns, however few it has.
    const int64_t fit = kSharedBytes / sizeof(A), least = columns > kWarpSize ? 2 * kWarpSize : kWarpSize;
    plan.outputs_per_block = static_cast<int>(std::min(shape.out_channels, fit / least));
    plan.output_blocks = static_cast<int>(ceil_div(shape.out_channels, plan.outputs_per_block));
    plan.outputs_per_block = static_cast<int>(ceil_div(shape.out_channels, plan.output_blocks));
    const int64_t most = std::min<int64_t>(fit / plan.outputs_per_block / kWarpSize * kWarpSize, kMostColumns);
    const int64_t even = ceil_div(columns, ceil_div(columns, most));
    const int block = static_cast<int>(ceil_div(even, kWarpSize)) * kWarpSize;
    plan.columns_per_block = block;
    plan.column_blocks = static_cast<int>(ceil_div(columns, block));
    const int shared = static_cast<int>(plan.outputs_per_block * block * sizeof(A));
    // Slices: enough to fill the chip a few times, but with so many pixels each that adding the slices' sums is little work.
    const int64_t blocks = static_cast<int64_t>(plan.column_blocks) * plan.output_blocks * shape.groups;
    const int64_t resident = std::clamp<int64_t>((200 << 10) / (shared + 1024), 1, 2048 / block);
    const int64_t wanted = multiprocessors(grad.get_device_index()) * resident / blocks;
    plan.slices = std::clamp<int64_t>(std::min(wanted, plan.pixels / 256), 1, 1024);
    const Tensor memory = torch::stable::new_empty(grad, {plan.slices * out_channels * columns * static_cast<int64_t>(sizeof(A))},
                                                   torch::headeronly::ScalarType::Byte);
    A* const partial = static_cast<A*>(memory.data_ptr());
    const auto kernel = is_padded ? private_kernel<T, true> : private_kernel<T, false>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<grid_size(blocks * plan.slices), block, shared, stream>>>(
        static_cast<const T*>(grad.data_ptr()), winners_in(winners), input ? static_cast<const T*>(input->data_ptr()) : nullptr,
        partial, plan);
    reduce_kernel<T><<<grid_size(ceil_div(out_channels * columns, 256)), 256, 0, stream>>>(
        partial, static_cast<A>(scale), static_cast<T*>(grad_weight.data_ptr()), static_cast<T*>(grad_bias.data_ptr()), plan);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> grad_weight_private(const Tensor& grad, const Tensor& winners, const Tensor& input, double scale,
                                               int64_t out_channels, std::vector<int64_t> kernel_size,
                                               std::vector<int64_t> stride, std::vector<int64_t> padding,
                                               std::vector<int64_t> dilation, int64_t groups, std::string /*precision*/) {
  return sum_gradients(grad, winners, input, scale,
                       check_grad_weight(grad, winners, input, out_channels, kernel_size, stride, padding, dilation, groups));
}

Tensor grad_bias_private(const Tensor& grad, const Tensor& winners, double scale, int64_t out_channels) {
  check_grad(grad, winners);
  const ConvShape shape = check_sizes(grad, 1, out_channels, {grad.size(2), grad.size(3)}, {1, 1}, {1, 1}, {0, 0, 0, 0}, {1, 1}, 1);
  return std::get<1>(sum_gradients(grad, winners, std::nullopt, scale, shape));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) {
  m.impl(OPERATOR("grad_weight_private"), TORCH_BOX(&grad_weight_private));
  m.impl(OPERATOR("grad_bias_private"), TORCH_BOX(&grad_bias_private));
}

}  // namespace fused_kernels
