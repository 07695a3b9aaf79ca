// Multiply by a number, or each channel by its own, and take the minimum over the channels, in one pass over the input.
//
// Idea: memory is the limit, so read every element once and in long runs. Where neighbouring pixels are neighbours in memory
//   (NCHW), go through the channels one after the other and keep the running minima of a block of pixels in the L1 cache:
//   pixels lie in vector lanes and the minimum needs no shuffles. Where a pixel's channels are neighbours (channels_last), a
//   vector holds channels, and is reduced to one number at the end of each pixel.
// Limit: main memory's bandwidth, in bfloat16 also the conversion to float. The convolution before it wrote all that this
//   kernel reads: fusing both saves that traffic.
// Previous rung: PyTorch's mul and min, which read or write three such tensors instead of one, min in scalar code.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "vectors.h"

namespace {
using namespace fused_kernels;

constexpr int BLOCK = 2048;            // pixels whose running minima one thread keeps in its L1 cache
constexpr int AT_ONCE = 8;             // channels read together: fewer passes over the minima, more loads in flight
constexpr int64_t MIN_WORK = 1 << 16;  // elements; less is not worth waking a thread for

// What multiplies a channel: one scale for all of them, or each channel's own.
template <class Scalar> struct One {
  Scalar scale;
  Scalar of(int64_t) const { return scale; }
  Scalar of_vector(int64_t) const { return scale; }
};
template <class Scalar> struct Each {
  const Scalar* factors;
  Scalar of(int64_t channel) const { return factors[channel]; }
  auto of_vector(int64_t channel) const { return load(factors + channel); }
};

// Any strides, and what is left over from the two kernels below. Channels are numbered from first on.
template <class T, class Scalar, class Factors>
void minima_of_anything(const T* x, int64_t first, int64_t channels, int64_t channel_stride, int64_t pixel_stride, int pixels,
                        Factors factors, Minima<Scalar> minima) {
  for (int64_t c = 0; c < channels; c++, x += channel_stride) {
    const Scalar scale = factors.of(first + c);
    for (int i = 0; i < pixels; i++) minima.take(i, Scalar(x[i * pixel_stride]) * scale, first + c);
  }
}

// Neighbouring pixels are neighbours in memory: pixels in lanes, a few channels after the other.
template <class T, class Scalar, class Factors>
void minima_of_rows(const T* x, int64_t first, int64_t channels, int64_t channel_stride, int pixels, Factors factors,
                    Minima<Scalar> minima) {
  const Index<typename Compute<T>::Vector> zero = {};
  int64_t c = 0;
  for (; c + AT_ONCE <= channels; c += AT_ONCE, x += AT_ONCE * channel_stride) {
    int i = 0;
    for (; i + LANES<T> <= pixels; i += LANES<T>) {
      auto minimum = minima.load_vector(i);
      for (int k = 0; k < AT_ONCE; k++) {
        const Scalar scale = factors.of(first + c + k);
        minimum.take(load(x + k * channel_stride + i) * scale, zero + Index<Scalar>(first + c + k));
      }
      minima.store_vector(i, minimum);
    }
    for (; i < pixels; i++) {
      for (int k = 0; k < AT_ONCE; k++) {
        const Scalar scale = factors.of(first + c + k);
        minima.take(i, Scalar(x[k * channel_stride + i]) * scale, first + c + k);
      }
    }
  }
  minima_of_anything(x, first + c, channels - c, channel_stride, 1, pixels, factors, minima);
}

// A pixel's channels are neighbours in memory, at least LANES of them: channels in lanes, a vector of pixels at a time.
template <class T, class Scalar, class Factors>
void minima_of_pixels(const T* x, int64_t first, int64_t channels, int64_t pixel_stride, int pixels, Factors factors,
                      Minima<Scalar> minima) {
  using Vector = typename Compute<T>::Vector;
  Index<Vector> numbers;  // of the channels in a pixel's first vector
  for (int k = 0; k < LANES<T>; k++) numbers[k] = Index<Scalar>(first + k);
  for (int i = 0; i < pixels; i += LANES<T>) {
    Vector values[LANES<T>];
    Index<Vector> winning[LANES<T>];
    for (int k = 0; k < LANES<T>; k++) {
      const T* pixel = x + std::min(i + k, pixels - 1) * pixel_stride;
      auto scale = factors.of_vector(first);
      Running<Vector> minimum{load(pixel) * scale, numbers};
      for (int64_t c = LANES<T>; c + LANES<T> <= channels; c += LANES<T>) {
        scale = factors.of_vector(first + c);
        minimum.take(load(pixel + c) * scale, numbers + Index<Scalar>(c));
      }
      // The last vector overlaps the one before it: a minimum does not mind.
      const int64_t last = channels - LANES<T>;
      scale = factors.of_vector(first + last);
      minimum.take(load(pixel + last) * scale, numbers + Index<Scalar>(last));
      values[k] = minimum.value;
      if constexpr (kWinners) winning[k] = minimum.channel;
    }
    min_of_each(values, winning);
    const int count = std::min(LANES<T>, pixels - i);
    std::memcpy(minima.values + i, values, count * sizeof(Scalar));
    if constexpr (kWinners) std::memcpy(minima.channels + i, winning, count * sizeof(Scalar));
  }
}

template <class T, class Factors>
void run(const Tensor& input, Factors factors, Tensor& output, const std::optional<Tensor>& winners) {
  using Scalar = typename Compute<T>::Scalar;
  const T* x = (const T*)input.data_ptr();
  const int64_t images = input.size(0), image_stride = input.stride(0);
  const int64_t channels = input.size(1), channel_stride = input.stride(1);
  int64_t rows = input.size(2), columns = input.size(3), row_stride = input.stride(2), column_stride = input.stride(3);
  // An image without gaps between its rows is one long row.
  if (row_stride == columns * column_stride || rows == 1) columns *= rows, rows = 1;

  // One piece of work: a block of one row's pixels and, where there are too few blocks for all threads, a part of the channels.
  const int64_t blocks = ceil_div(columns, BLOCK), places = images * rows * blocks;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = std::min({ceil_div(threads, places), channels, input.numel() / MIN_WORK});
  const int64_t parts = std::max<int64_t>(wanted, 1), per_part = ceil_div(channels, parts);
  PartialMinima<T> minima_of_parts(output, winners, parts);

  const int64_t grain = ceil_div(MIN_WORK * places * parts, input.numel());
  torch::stable::parallel_for(0, places * parts, grain, [&](int64_t begin, int64_t end) {
    Scalar values[BLOCK];
    Index<Scalar> winning[kWinners ? BLOCK : 1];
    const Minima<Scalar> minima{values, winning};
    for (int64_t work = begin; work < end; work++) {
      const int64_t place = work % places, first_channel = std::min(work / places * per_part, channels);
      const int64_t first = place % blocks * BLOCK, row = place / blocks % rows, image = place / blocks / rows;
      const int pixels = (int)std::min<int64_t>(BLOCK, columns - first);
      const int64_t count = std::min(per_part, channels - first_channel);
      const T* from = x + image * image_stride + row * row_stride + first * column_stride + first_channel * channel_stride;

      minima.clear(pixels, std::min(first_channel, channels - 1));
      if (column_stride == 1 && pixels > 1)
        minima_of_rows(from, first_channel, count, channel_stride, pixels, factors, minima);
      else if (channel_stride == 1 && count >= LANES<T>)
        minima_of_pixels(from, first_channel, count, column_stride, pixels, factors, minima);
      else
        minima_of_anything(from, first_channel, count, channel_stride, column_stride, pixels, factors, minima);

      minima_of_parts.put(work / places, (image * rows + row) * columns + first, minima, pixels);
    }
  });
  minima_of_parts.finish();
}

Forward scale_min(const Tensor& input, double scale, const std::optional<Tensor>& scales) {
  check_input(input);
  check_scales(scales, input, input.size(1), scale);
  Tensor output = torch::stable::new_empty(input, {input.size(0), 1, input.size(2), input.size(3)});
  const std::optional<Tensor> winners = new_winners(output, input.size(1));
  if (output.numel() == 0) return forward_result(output, winners);
  dispatch(input.scalar_type(), [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    using Scalar = typename Compute<T>::Scalar;
    if (!scales) return run<T>(input, One<Scalar>{Scalar(scale)}, output, winners);
    const std::vector<Scalar> dense = numbers_of<Scalar>(*scales);
    run<T>(input, Each<Scalar>{dense.data()}, output, winners);
  });
  return forward_result(output, winners);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) { m.impl(FORWARD("scale_min"), TORCH_BOX(&scale_min)); }
