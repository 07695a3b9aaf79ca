// scale_min_naive: the first kernel that comes to mind. One block per pixel, one thread per channel; one thread reduces.
//
// Limit: one block per pixel is millions of blocks, each started for one load per thread. Neighbouring threads read addresses H
// * W apart, so each 4-byte load moves a 32-byte sector. And one thread compares all channels while the others wait. Slower
// than the two PyTorch kernels that it replaces.
// Previous rung: none; this is the source document's kernel in other words, repaired just enough to build and to be right past
// 2^31 elements. Its faults of speed, and its fault with NaN, are kept as examples.

#include "launch.cuh"
#include "numerics.cuh"

namespace fused_kernels {

template <typename T>
__global__ void scale_min_naive_kernel(const T* input, Accumulator<T> scale, T* output, int64_t plane) {
  // NOTE: "extern __shared__ T values[]" in a template declares one symbol with several types and does not compile.
  extern __shared__ unsigned char bytes[];
  T* values = reinterpret_cast<T*>(bytes);

  const int channel = threadIdx.x, channels = blockDim.x;
  const int64_t image = blockIdx.x / plane, pixel = blockIdx.x % plane;
  values[channel] = static_cast<T>(input[(image * channels + channel) * plane + pixel] * scale);
  __syncthreads();

  if (channel == 0) {
    T smallest = values[0];
    for (int c = 1; c < channels; ++c) {
      // A comparison with NaN is false, so a NaN in any channel but the first is lost.
      if (values[c] < smallest) smallest = values[c];
    }
    output[blockIdx.x] = smallest;
  }
}

Tensor scale_min_naive(const Tensor& any_layout, double scale) {
  check_input(any_layout);
  const Tensor input = torch::stable::contiguous(any_layout);
  const int64_t images = input.size(0), channels = input.size(1), plane = input.size(2) * input.size(3);
  STD_TORCH_CHECK(channels <= 1024, "input: scale_min_naive expects at most 1024 channels, one per thread, got ", channels);
  // Zeroed first, then overwritten, as in the source document.
  Tensor output = torch::stable::new_zeros(input, {images, 1, input.size(2), input.size(3)});
  if (output.numel() == 0) return output;

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    scale_min_naive_kernel<T>
        <<<grid_size(images * plane), channels, channels * sizeof(T), current_stream(input)>>>(
            static_cast<const T*>(input.data_ptr()), static_cast<Accumulator<T>>(scale),
            static_cast<T*>(output.data_ptr()), plane);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(OPERATOR("scale_min_naive"), TORCH_BOX(&scale_min_naive)); }

}  // namespace fused_kernels
