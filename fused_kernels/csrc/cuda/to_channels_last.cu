// to_channels_last: a convolution's input and weights, copied into the layout that the library's tensor cores want.
//
// For each image a transposition: rows of pixels become rows of channels. Whoever reads along one and writes along the other
// touches a whole sector of memory for each element. So a thread gathers 16 bytes of channels for each of a few neighbouring
// pixels, its warp side by side the pixels; the block exchanges them through shared memory, and a warp writes runs of 128 bytes,
// channels of a pixel. Pixels are counted through all images: one filter's nine taps would leave most of a warp idle, four
// filters' fill it.
// Both tensors go in one launch, for where they are small the launch is what takes time. Weights of 1 x 1 lie right as they are;
// and with them a convolution of stride 2 reads one pixel of four, so the input may be such a view, and the copy takes no more.
// Limit: the memory's bandwidth, in and out. PyTorch's own copy reaches a sixth of it (25 MB on an H200).
// Used by: composite.

#include <vector>

#include "launch.cuh"
#include "ptx/grid_dependency.cuh"

namespace fused_kernels {

constexpr int kLanes = 32, kUnits = 8;  // of a block: a lane a vector of pixels, a warp a unit of 16 bytes of their channels
constexpr int kThreads = kLanes * kUnits, kBlocksPerSM = 4;
static_assert(kLanes % kUnits == 0, "kUnits: expected a divisor of kLanes");

// Division by a number that the host knows, exact below 2^31: multiply and shift (Granlund and Montgomery, PLDI 1994).
// NOTE: a plain one takes some hundred clocks from start to end, and nothing can be loaded before.
template <typename Index>
struct Divisor {
  Index value = 1;
  uint32_t multiplier = 0, shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t value) : value(static_cast<Index>(std::max<int64_t>(value, 1))) {
    if constexpr (sizeof(Index) == 4) {
      while (int64_t{1} << (shift - 31) < value) ++shift;
      multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + this->value - 1) / this->value);
    }
  }
  __device__ __forceinline__ Index operator()(Index dividend) const {
    if constexpr (sizeof(Index) == 4) return static_cast<Index>(static_cast<uint64_t>(dividend) * multiplier >> shift);
    return dividend / value;
  }
};

// NOTE: addresses in 64 bits were half of all instructions (read off the SASS), and instructions decide where all is in L2: so
// Index has 32 bits where that is enough.
template <typename T, int VEC, typename Index>
struct Transposition {
  static constexpr int kUnitChannels = 16 / sizeof(T), kBlockChannels = kUnits * kUnitChannels, kPixels = kLanes * VEC;
  struct alignas(VEC * sizeof(T)) Vector {
    T values[VEC];
  };

  const T* source = nullptr;
  T* target = nullptr;
  Index channels = 0, pixels = 0, steps[4] = {};  // steps: of the source, in elements
  Divisor<Index> plane, width;                    // width: of its rows, or where they are one run, of its planes
  Divisor<uint32_t> blocks_c;
  uint32_t blocks = 0;

  Transposition() = default;
  Transposition(const Tensor& from, const Tensor& to)
      : source(static_cast<const T*>(from.data_ptr())), target(static_cast<T*>(to.data_ptr())),
        channels(static_cast<Index>(from.size(1))), plane(from.size(2) * from.size(3)),
        width(from.stride(2) == from.size(3) * from.stride(3) ? from.size(2) * from.size(3) : from.size(3)),
        blocks_c(ceil_div(from.size(1), kBlockChannels)) {
    const int64_t all = from.size(0) * from.size(2) * from.size(3);
    pixels = static_cast<Index>(all);
    blocks = grid_size(ceil_div(all, kPixels) * ceil_div(from.size(1), kBlockChannels));
    for (int d = 0; d < 4; ++d) steps[d] = static_cast<Index>(from.stride(d));
  }

  __device__ __forceinline__ void run(uint32_t block) const {
    __shared__ uint4 units[kPixels][kUnits];
    const Index block_pixels = blocks_c(block), block_channels = block - block_pixels * blocks_c.value;
    const Index first_pixel = block_pixels * kPixels, first_channel = block_channels * kBlockChannels;
    {
      const uint32_t lane = threadIdx.x % kLanes, unit = threadIdx.x / kLanes;
      const Index pixel = min(first_pixel + lane * VEC, pixels - VEC), channel = first_channel + unit * kUnitChannels;
      const Index image = plane(pixel), inside = pixel - image * plane.value;
      const Index row = width(inside), column = inside - row * width.value;
      Index from = image * steps[0] + channel * steps[1] + row * steps[2] + column * steps[3];
      Vector loaded[kUnitChannels];
      ptx::wait_for_previous_grid();
#pragma unroll
      for (int j = 0; j < kUnitChannels; ++j, from += steps[1]) {
        loaded[j] = channel + j < channels ? *reinterpret_cast<const Vector*>(source + from) : Vector{};
      }
      // A unit's place in a row depends on the lane: eight lanes that meet in a column or in a row meet no bank twice.
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        alignas(16) T values[kUnitChannels];
#pragma unroll
        for (int j = 0; j < kUnitChannels; ++j) values[j] = loaded[j].values[k];
        units[lane * VEC + k][unit ^ lane % kUnits] = *reinterpret_cast<const uint4*>(values);
      }
    }
    __syncthreads();

    const uint32_t unit = threadIdx.x % kUnits;
    const Index channel = first_channel + unit * kUnitChannels;
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      const uint32_t row = k * kLanes + threadIdx.x / kUnits;
      if (first_pixel + row >= pixels) return;
      T* const to = target + (first_pixel + row) * channels + channel;
      // NOTE: held in a variable for both branches, the 16 bytes left in four stores of 4 (read off the SASS, nvcc 13.0).
      const uint4* const from = &units[row][unit ^ row / VEC % kUnits];
      if (channels % kUnitChannels == 0) {
        if (channel < channels) *reinterpret_cast<uint4*>(to) = *from;
      } else {
#pragma unroll
        for (int j = 0; j < kUnitChannels; ++j) {
          if (channel + j < channels) to[j] = reinterpret_cast<const T*>(from)[j];
        }
      }
    }
  }
};

// WEIGHT: whether there are weights. A small copy has no time to wait for code that it does not run.
template <typename T, int VEC, typename Index, bool WEIGHT>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    to_channels_last_kernel(const __grid_constant__ Transposition<T, VEC, Index> input,
                            const __grid_constant__ Transposition<T, 1, Index> weight) {
  if (!WEIGHT || blockIdx.x < input.blocks) {
    input.run(blockIdx.x);
  } else {
    weight.run(blockIdx.x - input.blocks);
  }
}

// How many elements lie between a tensor's first and last one, both included.
int64_t span(const Tensor& t) {
  int64_t span = 1;
  for (int d = 0; d < 4; ++d) span += (t.size(d) - 1) * t.stride(d);
  return span;
}

std::vector<Tensor> to_channels_last(const Tensor& input, const std::optional<Tensor>& weight) {
  using torch::headeronly::MemoryFormat;
  using torch::headeronly::ScalarType;
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "input: to_channels_last expected float32, float16 or bfloat16");
  std::vector<Tensor> outputs;
  const auto add = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions");
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == input.get_device_index() && t.scalar_type() == dtype,
                    name, ": expected the input's dtype and device");
    outputs.push_back(
        torch::stable::empty(t.sizes(), t.scalar_type(), std::nullopt, t.device(), std::nullopt, MemoryFormat::ChannelsLast));
  };
  add("input", input);
  if (weight) add("weight", *weight);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto launch = [&](auto element, auto vec, auto index) {
    using T = decltype(element);
    using Index = decltype(index);
    const Transposition<T, vec, Index> first(input, outputs[0]);
    const auto second = weight ? Transposition<T, 1, Index>(*weight, outputs[1]) : Transposition<T, 1, Index>();
    const int64_t blocks = static_cast<int64_t>(first.blocks) + second.blocks;
    if (blocks == 0) return;
    const auto kernel =
        weight ? to_channels_last_kernel<T, vec, Index, true> : to_channels_last_kernel<T, vec, Index, false>;
    launch_kernel(is_small(input), kernel, grid_size(blocks), kThreads, 0, current_stream(input), first, second);
  };
  const auto choose = [&](auto element, auto vec) {
    // Wide blocks of vectors leave some of the chip idle where the image is small.
    const int64_t wide_blocks = Transposition<decltype(element), vec, uint64_t>(input, outputs[0]).blocks;
    const bool aligned = input.is_contiguous() && input.size(2) * input.size(3) % vec == 0 &&
                         reinterpret_cast<uintptr_t>(input.data_ptr()) % (vec * sizeof(element)) == 0;
    const bool wide = aligned && wide_blocks >= 2 * multiprocessors(input.get_device_index());
    const auto with_index = [&](auto index) {
      wide ? launch(element, vec, index) : launch(element, std::integral_constant<int, 1>(), index);
    };
    if (std::max(span(input), weight ? span(*weight) : 0) <= INT32_MAX) {
      with_index(uint32_t());
    } else {
      with_index(uint64_t());
    }
  };
  if (dtype == ScalarType::Float) {
    choose(uint32_t(), std::integral_constant<int, 1>());  // a lane of 4 bytes: more gained nothing
  } else {
    choose(uint16_t(), std::integral_constant<int, 4>());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl("to_channels_last", TORCH_BOX(&to_channels_last)); }

}  // namespace fused_kernels
