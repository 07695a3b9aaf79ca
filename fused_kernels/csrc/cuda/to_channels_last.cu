// to_channels_last: a convolution's NCHW input and weights, copied into the layout that the library's tensor cores want.
//
// For each image a transposition: rows of pixels become rows of channels. Whoever reads along one and writes along the other
// touches a whole sector of memory for each element. So a thread gathers 16 bytes of a pixel's channels, its warp side by side
// the pixels; the block exchanges them through shared memory, and a warp writes runs of 128 bytes, channels of a pixel.
// Pixels are counted through all images: one filter's nine taps would leave most of a warp idle, four filters' fill it.
// Both tensors go in one launch, for where they are small the launch is what takes time. Weights of 1 x 1 lie right as they are.
// Limit: the memory's bandwidth, in and out. PyTorch's own copy reaches a sixth of it (25 MB on an H200).
// Used by: composite.

#include <vector>

#include "launch.cuh"
#include "ptx/grid_dependency.cuh"

namespace fused_kernels {

constexpr int kPixels = 32, kUnits = 8;  // of a block: a thread brings one unit of 16 bytes, and takes another away
constexpr int kThreads = kPixels * kUnits;
static_assert(kPixels % kUnits == 0 && (kUnits & (kUnits - 1)) == 0, "kUnits: expected a power of two that divides kPixels");

template <typename T>
struct Transposition {
  static constexpr int kUnitChannels = 16 / sizeof(T);

  const T* source = nullptr;
  T* target = nullptr;
  int64_t channels = 0, plane = 0, pixels = 0, blocks_c = 0, blocks = 0;

  Transposition() = default;
  Transposition(const Tensor& from, const Tensor& to)
      : source(static_cast<const T*>(from.data_ptr())), target(static_cast<T*>(to.data_ptr())), channels(from.size(1)),
        plane(from.size(2) * from.size(3)), pixels(from.size(0) * plane),
        blocks_c(ceil_div(channels, kUnits * kUnitChannels)), blocks(ceil_div(pixels, kPixels) * blocks_c) {}

  __device__ __forceinline__ void run(int block) const {
    __shared__ uint4 units[kPixels][kUnits];
    const int across = static_cast<int>(blocks_c);
    const int64_t first_pixel = static_cast<int64_t>(block / across) * kPixels;
    const int64_t first_channel = static_cast<int64_t>(block % across) * (kUnits * kUnitChannels);
    {
      const int lane = threadIdx.x % kPixels, unit = threadIdx.x / kPixels;
      const int64_t pixel = min(first_pixel + lane, pixels - 1), channel = first_channel + unit * kUnitChannels;
      const T* from = source + (pixel / plane * channels + channel) * plane + pixel % plane;
      alignas(16) T values[kUnitChannels];
#pragma unroll
      for (int j = 0; j < kUnitChannels; ++j, from += plane) values[j] = channel + j < channels ? *from : T(0);
      // A unit's place in a row depends on the row: eight lanes that meet in a column or in a row meet no bank twice.
      units[lane][unit ^ lane % kUnits] = *reinterpret_cast<const uint4*>(values);
    }
    __syncthreads();

    const int row = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
    const int64_t pixel = first_pixel + row, channel = first_channel + unit * kUnitChannels;
    if (pixel >= pixels) return;
    const uint4 values = units[row][unit ^ row % kUnits];
    T* const to = target + pixel * channels + channel;
    if (channels % kUnitChannels == 0) {
      if (channel < channels) *reinterpret_cast<uint4*>(to) = values;
    } else {
#pragma unroll
      for (int j = 0; j < kUnitChannels; ++j) {
        if (channel + j < channels) to[j] = reinterpret_cast<const T*>(&values)[j];
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    to_channels_last_kernel(const __grid_constant__ Transposition<T> first, const __grid_constant__ Transposition<T> second) {
  ptx::wait_for_previous_grid();
  if (blockIdx.x < first.blocks) {
    first.run(blockIdx.x);
  } else {
    second.run(blockIdx.x - static_cast<int>(first.blocks));
  }
}

std::vector<Tensor> to_channels_last(const Tensor& input, const std::optional<Tensor>& weight) {
  using torch::headeronly::MemoryFormat;
  using torch::headeronly::ScalarType;
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "input: to_channels_last expected float32, float16 or bfloat16");
  std::vector<Tensor> outputs;
  const auto add = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous(), name, ": expected 4 dimensions, contiguous");
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == input.get_device_index() && t.scalar_type() == dtype,
                    name, ": expected the input's dtype and device");
    outputs.push_back(
        torch::stable::empty(t.sizes(), t.scalar_type(), std::nullopt, t.device(), std::nullopt, MemoryFormat::ChannelsLast));
  };
  add("input", input);
  if (weight) add("weight", *weight);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto launch = [&](auto element) {
    using Copy = Transposition<decltype(element)>;
    const Copy first(input, outputs[0]), second = weight ? Copy(*weight, outputs[1]) : Copy();
    const int64_t blocks = first.blocks + second.blocks;
    if (blocks == 0) return;
    launch_early(to_channels_last_kernel<decltype(element)>, grid_size(blocks), kThreads, 0, current_stream(input), first, second);
  };
  if (dtype == ScalarType::Float) {
    launch(uint32_t());
  } else {
    launch(uint16_t());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl("to_channels_last", TORCH_BOX(&to_channels_last)); }

}  // namespace fused_kernels
