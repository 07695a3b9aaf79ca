// scale_min_vectorized_backward: the gradient of scale_min's input, from the winners alone.
//
// The gradient of a channel minimum reaches one channel of each pixel: the winner, which the forward kernel gave. So there is
// next to nothing to compute or to read; what takes time is writing the result, zeros nearly everywhere. Each element is
// written once: a thread reads the gradient and the winner of its pixels once, and stores several vectors of up to 16 bytes.
//   NCHW           a thread owns a vector of pixels and some of its channels
//   channels_last  a thread owns some vectors of channels, one block's threads apart
// Limit: the memory's write bandwidth.
// Previous rung: PyTorch's zeros, then scatter, which write the winners' elements twice.

#include "launch.cuh"
#include "numerics.cuh"
#include "vectors.cuh"

namespace fused_kernels {

struct Backward {
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 16;  // NCHW: of a thread's vector of pixels
  static constexpr int kVectors = 4;    // channels_last: of a thread
};

// NCHW. Neighbouring blocks take other channels of the same pixels: what they read is in the cache.
template <typename T, int VEC>
__global__ void __launch_bounds__(Backward::kThreads)
    planes_backward_kernel(const T* grad, int64_t step, Winners winners, Accumulator<T> scale, T* result, int64_t vectors,
                           int channels, int64_t plane, int parts) {
  const int part = blockIdx.x % parts;
  const int64_t vector = static_cast<int64_t>(blockIdx.x / parts) * Backward::kThreads + threadIdx.x;
  if (vector >= vectors) return;
  T value[VEC];
  int winner[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    value[i] = static_cast<T>(static_cast<Accumulator<T>>(grad[(vector * VEC + i) * step]) * scale);
    winner[i] = winners[vector * VEC + i];
  }
  const int64_t vectors_per_plane = plane / VEC;
  const int64_t image = vector / vectors_per_plane, offset = vector % vectors_per_plane * VEC;
  const int first = part * Backward::kChannels, end = min(first + Backward::kChannels, channels);
  T* target = result + (image * channels + first) * plane + offset;
#pragma unroll 4
  for (int channel = first; channel < end; ++channel) {
    Vector<T, VEC> stored;
#pragma unroll
    for (int i = 0; i < VEC; ++i) stored.values[i] = winner[i] == channel ? value[i] : T(0);
    *reinterpret_cast<Vector<T, VEC>*>(target) = stored;
    target += plane;
  }
}

// channels_last. All vectors in the order in which they lie.
template <typename T, int VEC>
__global__ void __launch_bounds__(Backward::kThreads)
    channels_last_backward_kernel(const T* grad, int64_t step, Winners winners, Accumulator<T> scale, T* result,
                                  int64_t vectors, int vectors_per_pixel) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Backward::kThreads * Backward::kVectors + threadIdx.x;
  int64_t pixel = first / vectors_per_pixel;
  int place = static_cast<int>(first % vectors_per_pixel);  // of the vector in its pixel
  const int pixel_step = Backward::kThreads / vectors_per_pixel, place_step = Backward::kThreads % vectors_per_pixel;
  T value[Backward::kVectors];
  int winner[Backward::kVectors];  // from the vector's first channel on
#pragma unroll
  for (int k = 0; k < Backward::kVectors; ++k) {
    if (first + k * Backward::kThreads < vectors) {
      value[k] = static_cast<T>(static_cast<Accumulator<T>>(grad[pixel * step]) * scale);
      winner[k] = winners[pixel] - place * VEC;
    }
    pixel += pixel_step, place += place_step;
    if (place >= vectors_per_pixel) place -= vectors_per_pixel, ++pixel;
  }
#pragma unroll
  for (int k = 0; k < Backward::kVectors; ++k) {
    const int64_t vector = first + k * Backward::kThreads;
    Vector<T, VEC> stored;
#pragma unroll
    for (int i = 0; i < VEC; ++i) stored.values[i] = winner[k] == i ? value[k] : T(0);
    if (vector < vectors) *reinterpret_cast<Vector<T, VEC>*>(result + vector * VEC) = stored;
  }
}

// How far apart neighbouring pixels are, if it is the same everywhere: one in most gradients, zero in an expanded number.
std::optional<int64_t> pixel_step(const Tensor& t) {
  int64_t pixels = 1, step = 0;
  for (int d : {3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (pixels == 1) step = t.stride(d);
    if (t.stride(d) != step * pixels) return std::nullopt;
    pixels *= t.size(d);
  }
  return step;
}

// The gradient of scale_min's input: the minimum's times the scale at the winner, elsewhere zero.
Tensor scale_min_vectorized_backward(const Tensor& any_grad, const Tensor& any_winners, double scale, int64_t channels,
                                     bool channels_last) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(any_grad.dim() == 4 && any_grad.size(1) == 1, "grad: expected 4 dimensions (N, 1, H, W)");
  STD_TORCH_CHECK(channels > 0 && channels <= INT32_MAX - kMostPastChannels, "channels: expected a number from 1 to ",
                  INT32_MAX - kMostPastChannels, ", got ", channels);
  const ScalarType of_winners = any_winners.scalar_type();
  STD_TORCH_CHECK(of_winners == ScalarType::Byte || of_winners == ScalarType::Int, "winners: expected uint8 or int32");
  STD_TORCH_CHECK(any_winners.dim() == 4 && any_winners.is_cuda() &&
                      any_winners.get_device_index() == any_grad.get_device_index(),
                  "winners: expected 4 dimensions, on grad's device");
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(any_winners.size(d) == any_grad.size(d), "winners: expected grad's shape");
  }
  using torch::headeronly::MemoryFormat;
  const int64_t images = any_grad.size(0), height = any_grad.size(2), width = any_grad.size(3);
  const std::vector<int64_t> sizes{images, channels, height, width};
  Tensor result = torch::stable::empty(sizes, any_grad.scalar_type(), std::nullopt, any_grad.device(), std::nullopt,
                                       channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (result.numel() == 0) return result;
  const torch::stable::accelerator::DeviceGuard guard(any_grad.get_device_index());
  // A gradient in any other order is copied into this one: it is small compared to the result.
  const bool even = pixel_step(any_grad).has_value();
  const Tensor grad = even ? any_grad : torch::stable::contiguous(any_grad);
  const std::optional<Tensor> winners = any_winners.is_contiguous() ? any_winners : torch::stable::contiguous(any_winners);
  const int64_t step = even ? *pixel_step(any_grad) : 1, plane = height * width, pixels = images * plane;
  const cudaStream_t stream = current_stream(grad);
  dispatch(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(grad.data_ptr());
    T* target = static_cast<T*>(result.data_ptr());
    const auto factor = static_cast<Accumulator<T>>(scale);
    with_width<T>(vector_width<T>(target, channels_last ? channels : plane), [&](auto vec) {
      if (channels_last) {
        const int64_t vectors = pixels * (channels / vec);
        const int64_t blocks = ceil_div(vectors, Backward::kThreads * Backward::kVectors);
        channels_last_backward_kernel<T, vec><<<grid_size(blocks), Backward::kThreads, 0, stream>>>(
            source, step, winners_in(winners), factor, target, vectors, static_cast<int>(channels / vec));
      } else {
        const int64_t vectors = pixels / vec, parts = ceil_div(channels, Backward::kChannels);
        const int64_t blocks = ceil_div(vectors, Backward::kThreads) * parts;
        planes_backward_kernel<T, vec><<<grid_size(blocks), Backward::kThreads, 0, stream>>>(
            source, step, winners_in(winners), factor, target, vectors, static_cast<int>(channels), plane,
            static_cast<int>(parts));
      }
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) {
  m.impl(OPERATOR("scale_min_vectorized_backward"), TORCH_BOX(&scale_min_vectorized_backward));
}

}  // namespace fused_kernels
