// scale_min_coalesced: one thread per pixel, so that neighbouring threads read neighbouring addresses.
//
// The 32 lanes of a warp read 32 consecutive pixels of one channel: every byte of every sector is used, each lane keeps its
// own minimum in a register, and nothing is shared.
// Limit: its loads are narrow, and how many are in flight is the compiler's choice; other layouts than NCHW are copied first.
// Previous rung: scale_min_naive.

#include "launch.cuh"
#include "numerics.cuh"

namespace fused_kernels {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_min_coalesced_kernel(const T* input, Accumulator<T> scale, T* output, int64_t pixels, int channels, int64_t plane) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;

  const T* source = input + pixel / plane * channels * plane + pixel % plane;
  Accumulator<T> smallest = kInfinity<Accumulator<T>>;
  for (int channel = 0; channel < channels; ++channel) {
    smallest = min_nan(smallest, source[channel * plane] * scale);
  }
  output[pixel] = static_cast<T>(smallest);
}

Tensor scale_min_coalesced(const Tensor& any_layout, double scale) {
  check_input(any_layout);
  const Tensor input = torch::stable::contiguous(any_layout);
  const int64_t channels = input.size(1), plane = input.size(2) * input.size(3), pixels = input.size(0) * plane;
  Tensor output = torch::stable::new_empty(input, {input.size(0), 1, input.size(2), input.size(3)});
  if (pixels == 0) return output;

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    scale_min_coalesced_kernel<T><<<grid_size(ceil_div(pixels, kThreads)), kThreads, 0, current_stream(input)>>>(
        static_cast<const T*>(input.data_ptr()), static_cast<Accumulator<T>>(scale),
        static_cast<T*>(output.data_ptr()), pixels, channels, plane);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) {
  m.impl(OPERATOR("scale_min_coalesced"), TORCH_BOX(&scale_min_coalesced));
}

}  // namespace fused_kernels
