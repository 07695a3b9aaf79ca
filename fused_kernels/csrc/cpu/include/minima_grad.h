// What the backward kernels share: the gradient of the minima, which reaches one channel of each pixel.
#pragma once
#include "gradients.h"
#include "vectors.h"

namespace fused_kernels {

// Read along rows: the gradient times the scale, in the type to compute in, and the winner that it reaches.
template <class T> struct MinimaGrad {
  using Scalar = typename Compute<T>::Scalar;
  const T* grad;
  const Winners winners;
  const Scalar scale;
  const int last_channel;
  const int64_t images, rows, columns, image_stride, row_stride, column_stride;

  MinimaGrad(const Tensor& grad, const Tensor& winners, double scale, int64_t channels)
      : grad((const T*)grad.data_ptr()), winners(winners_in(winners)), scale(Scalar(scale)), last_channel(int(channels - 1)),
        images(grad.size(0)), rows(grad.size(2)), columns(grad.size(3)), image_stride(grad.stride(0)),
        row_stride(grad.stride(2)), column_stride(grad.stride(3)) {}

  // Call f(i, gradient, channel) for i from 0 to count - 1: pixels next to each other, the rows of all images laid end to end.
  // A number that no forward kernel gave must not lead past the last channel.
  template <class F> void for_each(int64_t first, int64_t count, const F& f) const {
    for (int64_t done = 0; done < count;) {
      const int64_t pixel = first + done, row = pixel / columns, column = pixel % columns;
      const int64_t end = std::min(done + columns - column, count);
      const T* from = grad + row / rows * image_stride + row % rows * row_stride + column * column_stride;
      for (int64_t i = 0; i < end - done; i++)
        f(done + i, Scalar(from[i * column_stride]) * scale,
          (int)std::min((unsigned)winners[pixel + i], (unsigned)last_channel));
      done = end;
    }
  }
};

}  // namespace fused_kernels
