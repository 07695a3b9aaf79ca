// to_channels_last: a convolution's NCHW input and weights, copied into the layout that the library's tensor cores want.
//
// For each image a transposition: rows of pixels become rows of channels. Whoever reads along one and writes along the other
// touches a whole sector of memory for each element; so a block brings a square tile to shared memory by rows, and takes it away
// by columns. Both tensors go in one launch, for where they are small the launch is what takes time.
// Limit: the memory's bandwidth, in and out. PyTorch's own copy reaches a sixth of it (25 MB on an H200).
// Used by: composite.

#include <tuple>

#include "launch.cuh"
#include "ptx/grid_dependency.cuh"

namespace fused_kernels {

constexpr int kTile = 64;  // channels and pixels
constexpr int kThreads = 256, kRowsAtOnce = kThreads / kTile;

template <typename T>
struct Transposition {
  const T* source;
  T* target;
  int channels;
  int64_t plane, tiles_c, tiles_p, blocks;

  Transposition(const Tensor& from, const Tensor& to)
      : source(static_cast<const T*>(from.data_ptr())), target(static_cast<T*>(to.data_ptr())), channels(from.size(1)),
        plane(from.size(2) * from.size(3)), tiles_c(ceil_div(channels, kTile)), tiles_p(ceil_div(plane, kTile)),
        blocks(from.size(0) * tiles_c * tiles_p) {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    to_channels_last_kernel(const __grid_constant__ Transposition<T> first, const __grid_constant__ Transposition<T> second) {
  // A row's pitch is an odd number of banks: a warp meets no bank twice, along a row or down a column.
  __shared__ T tile[kTile][kTile + 4 / sizeof(T)];
  ptx::wait_for_previous_grid();
  const bool is_first = blockIdx.x < first.blocks;
  const Transposition<T>& t = is_first ? first : second;
  const int64_t index = is_first ? blockIdx.x : blockIdx.x - first.blocks;
  const int64_t image = index / (t.tiles_p * t.tiles_c);
  const int first_c = index / t.tiles_p % t.tiles_c * kTile, fast = threadIdx.x % kTile, slow = threadIdx.x / kTile;
  const int64_t first_p = index % t.tiles_p * kTile;
  const int channels = min(t.channels - first_c, kTile), pixels = static_cast<int>(min(t.plane - first_p, int64_t{kTile}));

  const T* source = t.source + (image * t.channels + first_c + slow) * t.plane + first_p + fast;
  T values[kTile / kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kTile / kRowsAtOnce; ++i) {
    if (fast < pixels && slow + i * kRowsAtOnce < channels) values[i] = source[i * kRowsAtOnce * t.plane];
  }
#pragma unroll
  for (int i = 0; i < kTile / kRowsAtOnce; ++i) tile[slow + i * kRowsAtOnce][fast] = values[i];
  __syncthreads();

  T* target = t.target + (image * t.plane + first_p + slow) * t.channels + first_c + fast;
#pragma unroll
  for (int i = 0; i < kTile / kRowsAtOnce; ++i) {
    if (fast < channels && slow + i * kRowsAtOnce < pixels) {
      target[static_cast<int64_t>(i) * kRowsAtOnce * t.channels] = tile[fast][slow + i * kRowsAtOnce];
    }
  }
}

std::tuple<Tensor, Tensor> to_channels_last(const Tensor& input, const Tensor& weight) {
  using torch::headeronly::MemoryFormat;
  using torch::headeronly::ScalarType;
  const auto check = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous(), name, ": expected 4 dimensions, contiguous");
    STD_TORCH_CHECK(t.size(1) <= INT32_MAX - kTile, name, ": expected fewer channels, got ", t.size(1));
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == input.get_device_index() && t.scalar_type() == input.scalar_type(),
                    name, ": expected the input's dtype and device");
  };
  check("input", input);
  check("weight", weight);
  const auto like = [&](const Tensor& t) {
    return torch::stable::empty(t.sizes(), t.scalar_type(), std::nullopt, t.device(), std::nullopt, MemoryFormat::ChannelsLast);
  };
  const Tensor outputs[2] = {like(input), like(weight)};
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto launch = [&](auto element) {
    using T = decltype(element);
    const Transposition<T> first(input, outputs[0]), second(weight, outputs[1]);
    const int64_t blocks = first.blocks + second.blocks;
    if (blocks == 0) return;
    launch_early(to_channels_last_kernel<T>, grid_size(blocks), kThreads, 0, current_stream(input), first, second);
  };
  const int64_t size = input.element_size();
  STD_TORCH_CHECK(size == 2 || size == 4, "input: expected float32, float16 or bfloat16");
  if (size == 2) {
    launch(uint16_t());
  } else {
    launch(uint32_t());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {outputs[0], outputs[1]};
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl("to_channels_last", TORCH_BOX(&to_channels_last)); }

}  // namespace fused_kernels
