// The gradient of min over channels of scale * input with respect to the input.
//
// Idea: it is zero in all channels of a pixel but one, the winner, which the forward kernel gave. So write the result in one
//   pass. In NCHW one channel after the other, while the gradients and winners of a block of pixels stay in the L1 cache;
//   otherwise a few pixels are zeroed, and then corrected while they are in the L1 cache.
// Limit: writing the result, for which the system first has to hand out memory.
// Previous rung: PyTorch's zeros, then scatter, which pass over the result one after the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "minima_grad.h"

namespace {
using namespace fused_kernels;

constexpr int BLOCK = 2048;            // pixels whose gradients and winners one thread keeps in its L1 cache
constexpr int64_t ZEROS = 2048;        // elements that are zeroed before one in each pixel is written
constexpr int64_t MIN_WORK = 1 << 16;  // elements; less is not worth waking a thread for

template <class Bits>
void write_channel(const Bits* __restrict grads, const Bits* __restrict winners, Bits channel, int pixels,
                   Bits* __restrict to) {
  for (int i = 0; i < pixels; i++) to[i] = winners[i] == channel ? grads[i] : Bits(0);
}

template <class T>
void run_backward(const Tensor& grad, const Tensor& winners, double scale, bool channels_last, Tensor& result) {
  // Numbers are copied as bits, and winners compared as integers of the same size, so that both fill vectors alike.
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const MinimaGrad<T> minima(grad, winners, scale, result.size(1));
  const int64_t channels = result.size(1), pixels = minima.rows * minima.columns;
  const int64_t channel_stride = channels_last ? 1 : pixels, pixel_stride = channels_last ? channels : 1;
  const bool by_channel = !channels_last && channels <= int64_t(std::numeric_limits<Bits>::max() >> 1);

  // One piece of work: a block of one image's pixels and, where those are too few for all threads, a part of the channels.
  const int64_t blocks = ceil_div(pixels, BLOCK), places = minima.images * blocks;
  const int64_t wanted = std::min({ceil_div(torch::stable::get_num_threads(), places), channels, result.numel() / MIN_WORK});
  const int64_t parts = by_channel ? std::max<int64_t>(wanted, 1) : 1;
  const int64_t grain = ceil_div(MIN_WORK * places * parts, result.numel());
  torch::stable::parallel_for(0, places * parts, grain, [&](int64_t begin, int64_t end) {
    Bits grads[BLOCK], winning[BLOCK];
    for (int64_t work = begin; work < end; work++) {
      const int64_t place = work % places, part = work / places, first = place % blocks * BLOCK, image = place / blocks;
      const int64_t count = std::min<int64_t>(BLOCK, pixels - first);
      Bits* to = (Bits*)result.data_ptr() + image * channels * pixels + first * pixel_stride;
      if (by_channel) {
        // NCHW: one channel after the other, the pixels' gradients and winners stay in the L1 cache.
        minima.for_each(image * pixels + first, count, [&](int64_t i, auto value, int channel) {
          const T rounded = T(value);
          std::memcpy(grads + i, &rounded, sizeof rounded);
          winning[i] = Bits(channel);
        });
        for (int64_t c = part * channels / parts; c < (part + 1) * channels / parts; c++)
          write_channel(grads, winning, Bits(c), (int)count, to + c * channel_stride);
        continue;
      }
      // A few pixels' channels are zeroed and then corrected while they are in the L1 cache.
      const int64_t few = std::max<int64_t>(ZEROS / channels, 1);
      for (int64_t i = 0; i < count; i += few) {
        const int64_t now = std::min(few, count - i), run = channels_last ? now * channels : now;
        for (int64_t c = 0; c < (channels_last ? 1 : channels); c++)
          std::fill_n(to + c * channel_stride + i * pixel_stride, run, Bits(0));
        minima.for_each(image * pixels + first + i, now, [&](int64_t k, auto value, int channel) {
          const T rounded = T(value);
          std::memcpy(to + channel * channel_stride + (i + k) * pixel_stride, &rounded, sizeof rounded);
        });
      }
    }
  });
}

Tensor scale_min_backward(const Tensor& grad, const Tensor& winners, double scale, int64_t channels, bool channels_last) {
  check_grad(grad, winners);
  STD_TORCH_CHECK(channels > 0 && channels <= INT32_MAX, "channels: expected a positive number, got ", channels);
  Tensor result = new_gradient(grad, {grad.size(0), channels, grad.size(2), grad.size(3)}, channels_last);
  if (result.numel() == 0) return result;
  dispatch(grad.scalar_type(), [&](auto* type) {
    run_backward<std::decay_t<decltype(*type)>>(grad, winners, scale, channels_last, result);
  });
  return result;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) {
  m.impl(OPERATOR("scale_min_backward"), TORCH_BOX(&scale_min_backward));
}
