#pragma once
// A convolution's sizes, and where winners lie. No header of CUDA or PyTorch is needed here: plans are made without either.

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace fused_kernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where winners lie: one byte each if there are no more than 256 channels, otherwise an int each.
struct Winners {
  void* data;
  bool wide;

  HOST_DEVICE int operator[](int64_t pixel) const {
    return wide ? static_cast<const int32_t*>(data)[pixel] : static_cast<const uint8_t*>(data)[pixel];
  }
  HOST_DEVICE void put(int64_t pixel, int channel) const {
    if (wide) {
      static_cast<int32_t*>(data)[pixel] = channel;
    } else {
      static_cast<uint8_t*>(data)[pixel] = static_cast<uint8_t>(channel);
    }
  }
};

// A convolution's sizes and strides, in elements; index 0 is vertical, 1 horizontal. Channels are those of one group.
struct ConvShape {
  int64_t images, groups, in_channels, out_channels;
  int64_t input[2], kernel[2], output[2], stride[2], dilation[2];
  int64_t padding[2];  // top and left; bottom and right are in the output's size
  int64_t input_strides[4], weight_strides[4];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return images * output[0] * output[1]; }
  int64_t input_size(int d) const { return d == 0 ? images : d == 1 ? groups * in_channels : input[d - 2]; }
  // At least the padded input's size.
  int64_t reach(int axis) const { return output[axis] * stride[axis] + kernel[axis] * dilation[axis]; }
};

}  // namespace fused_kernels
