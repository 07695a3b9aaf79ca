// to_channels_last: a convolution's input and weights, copied into the layout that the library's tensor cores want.
//
// For each image a transposition: rows of pixels become rows of channels. Reading along one and writing along the other would
// touch a whole sector of memory for each element. So a thread gathers 16 bytes of a pixel's channels, a warp those of
// neighbouring pixels; the block exchanges them through shared memory, and a warp writes runs of 128 bytes, channels of a
// pixel. Both tensors go in one launch, because where they are small the launch is what takes time. Weights of 1 x 1 need no
// copy. With them a convolution of stride 2 reads one pixel of four: then the input may be such a view, and only those pixels
// are copied.
// Limit: the memory's bandwidth, in and out. PyTorch's own copy reaches a sixth of it (25 MB on an H200).
// Used by: composite.

#include <vector>

#include "launch.cuh"
#include "ptx/grid_dependency.cuh"

namespace fused_kernels {

constexpr int kLanes = 32, kUnits = 8;  // of a block: one pixel per lane, one unit of 16 bytes of their channels per warp
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

// How many elements lie between a tensor's first and last one, both included.
int64_t span(const Tensor& t) {
  int64_t span = 1;
  for (int d = 0; d < 4; ++d) span += (t.size(d) - 1) * t.stride(d);
  return span;
}

// Whether the pixels of a plane lie at equal distances.
bool in_one_run(const Tensor& t) { return t.stride(2) == t.size(3) * t.stride(3); }

// NOTE: where everything is in L2, instructions decide: 87 per thread instead of 125 (read off the SASS) took a tenth off the
// time (on an H100). So Index has 32 bits where that is enough, and templates leave out what the usual shapes do not need.
template <typename T, typename Index>
struct Transposition {
  static constexpr int kUnitChannels = 16 / sizeof(T), kBlockChannels = kUnits * kUnitChannels;

  const T* source = nullptr;
  T* target = nullptr;
  Index channels = 0, images = 0, steps[4] = {};  // steps: of the source, in elements
  Divisor<Index> plane, width;                    // width: of its rows, or where they are one run, of its planes
  Divisor<uint32_t> blocks_c, blocks_p;
  uint32_t blocks = 0;

  Transposition() = default;
  // planes: whether a block stays in one image, which needs no division of pixels by planes. Otherwise pixels are counted
  // through all images: the nine taps of one filter would leave most of a warp idle, those of four filters fill it.
  Transposition(const Tensor& from, const Tensor& to, bool planes)
      : source(static_cast<const T*>(from.data_ptr())), target(static_cast<T*>(to.data_ptr())),
        channels(static_cast<Index>(from.size(1))), images(static_cast<Index>(from.size(0))),
        plane(from.size(2) * from.size(3)), width(in_one_run(from) ? from.size(2) * from.size(3) : from.size(3)),
        blocks_c(ceil_div(from.size(1), kBlockChannels)) {
    const int64_t pixels = from.size(2) * from.size(3), groups = planes ? from.size(0) : 1;
    const int64_t blocks_of_group = ceil_div(planes ? pixels : from.size(0) * pixels, kLanes);
    blocks = grid_size(groups * ceil_div(from.size(1), kBlockChannels) * blocks_of_group);
    blocks_p = Divisor<uint32_t>(blocks_of_group);
    for (int d = 0; d < 4; ++d) steps[d] = static_cast<Index>(from.stride(d));
  }

  // EVEN: whether channels fill their blocks. PLANES: as above.
  template <bool EVEN, bool PLANES>
  __device__ __forceinline__ void run(uint32_t block) const {
    __shared__ uint4 units[kLanes][kUnits];
    Index first_channel, first_pixel, pixels;  // pixels: of this block, or more
    {
      const uint32_t lane = threadIdx.x % kLanes, unit = threadIdx.x / kLanes;
      Index from;
      if constexpr (PLANES) {
        const uint32_t rest = blocks_p(block), image = blocks_c(rest);
        const Index inside = (block - rest * blocks_p.value) * kLanes;
        first_channel = (rest - image * blocks_c.value) * kBlockChannels;
        first_pixel = image * plane.value + inside;
        pixels = plane.value - inside;
        from = image * steps[0] + (inside + min(lane, pixels - 1)) * steps[3];
      } else {
        const uint32_t block_pixels = blocks_c(block);
        first_channel = (block - block_pixels * blocks_c.value) * kBlockChannels;
        first_pixel = Index{block_pixels} * kLanes;
        pixels = images * plane.value - first_pixel;
        const Index pixel = first_pixel + min(Index{lane}, pixels - 1);
        const Index image = plane(pixel), inside = pixel - image * plane.value;
        const Index row = width(inside), column = inside - row * width.value;
        from = image * steps[0] + row * steps[2] + column * steps[3];
      }
      const Index channel = first_channel + unit * kUnitChannels;
      const T* const base = source + (from + channel * steps[1]);
      alignas(16) T values[kUnitChannels];
      ptx::wait_for_previous_grid();
#pragma unroll
      for (int j = 0; j < kUnitChannels; ++j) values[j] = EVEN || channel + j < channels ? base[j * steps[1]] : T{};
      // A unit's place in a row depends on the lane: eight lanes that meet in a column or in a row meet no bank twice.
      units[lane][unit ^ lane % kUnits] = *reinterpret_cast<const uint4*>(values);
    }
    __syncthreads();

    const uint32_t row = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
    const Index channel = first_channel + unit * kUnitChannels;
    if (row >= pixels) return;
    T* const to = target + ((first_pixel + row) * channels + channel);
    // NOTE: held in a variable for both branches, the 16 bytes left in four stores of 4 (read off the SASS, nvcc 13.0).
    const uint4* const from = &units[row][unit ^ row % kUnits];
    if (EVEN || channels % kUnitChannels == 0) {
      if (EVEN || channel < channels) *reinterpret_cast<uint4*>(to) = *from;
    } else {
#pragma unroll
      for (int j = 0; j < kUnitChannels; ++j) {
        if (channel + j < channels) to[j] = reinterpret_cast<const T*>(from)[j];
      }
    }
  }
};

// PLAIN: whether blocks of the input stay in an image, and all channels fill their blocks.
// WEIGHT: whether there are weights. A small copy has no time to wait for code that it does not run.
template <typename T, typename Index, bool PLAIN, bool WEIGHT>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    to_channels_last_kernel(const __grid_constant__ Transposition<T, Index> input,
                            const __grid_constant__ Transposition<T, Index> weight) {
  if (!WEIGHT || blockIdx.x < input.blocks) {
    input.template run<PLAIN, PLAIN>(blockIdx.x);
  } else {
    weight.template run<PLAIN, false>(blockIdx.x - input.blocks);
  }
}

std::vector<Tensor> to_channels_last(const Tensor& input, const std::optional<Tensor>& weight, bool early) {
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
  const auto launch = [&](auto element, auto index, auto plain) {
    using T = decltype(element);
    using Index = decltype(index);
    const Transposition<T, Index> first(input, outputs[0], plain);
    const auto second = weight ? Transposition<T, Index>(*weight, outputs[1], false) : Transposition<T, Index>();
    const int64_t blocks = static_cast<int64_t>(first.blocks) + second.blocks;
    if (blocks == 0) return;
    const auto kernel =
        weight ? to_channels_last_kernel<T, Index, plain, true> : to_channels_last_kernel<T, Index, plain, false>;
    launch_kernel(early, kernel, grid_size(blocks), kThreads, 0, current_stream(input), first, second);
  };
  const auto choose = [&](auto element) {
    const auto fits = [](const Tensor& t) { return std::max(span(t), t.numel()) <= INT32_MAX; };
    constexpr int kBlockChannels = Transposition<decltype(element), uint32_t>::kBlockChannels;
    const auto even = [](const Tensor& t) { return t.size(1) % kBlockChannels == 0; };
    // A plane's pixels should fill two thirds of their blocks' lanes, at least.
    const int64_t pixels = input.size(2) * input.size(3), lanes = ceil_div(pixels, kLanes) * kLanes;
    const bool plain = in_one_run(input) && 3 * pixels >= 2 * lanes && even(input) && (!weight || even(*weight));
    if (!fits(input) || (weight && !fits(*weight))) {
      launch(element, uint64_t(), std::false_type());
    } else if (plain) {
      launch(element, uint32_t(), std::true_type());
    } else {
      launch(element, uint32_t(), std::false_type());
    }
  };
  dispatch(dtype, [&](auto type) {
    if constexpr (sizeof(type) <= 4) choose(std::conditional_t<sizeof(type) == 4, uint32_t, uint16_t>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(OPERATOR("to_channels_last"), TORCH_BOX(&to_channels_last)); }

}  // namespace fused_kernels
