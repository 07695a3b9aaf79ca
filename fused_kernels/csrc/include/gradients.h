#pragma once
// What the host functions of all backward kernels share: checks of the arguments, and a gradient's memory.

#include "arguments.h"

namespace fused_kernels {

// A backward operator gets the gradient of the minima, with any strides, and what the forward operator gave as winners.
inline void check_grad(const Tensor& grad, const Tensor& winners) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(1) == 1, "grad: expected the shape (N, 1, H, W)");
  STD_TORCH_CHECK(winners.scalar_type() == ScalarType::Byte || winners.scalar_type() == ScalarType::Int,
                  "winners: expected uint8 or int32, got ", torch::headeronly::toString(winners.scalar_type()));
  STD_TORCH_CHECK(winners.dim() == 4 && winners.is_contiguous(), "winners: expected 4 dimensions, contiguous");
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(winners.size(d) == grad.size(d), "winners: expected grad's shape, got ", winners.size(d),
                    " in place of ", grad.size(d), " in dimension ", d);
  }
  STD_TORCH_CHECK(winners.is_cuda() == grad.is_cuda() && winners.get_device_index() == grad.get_device_index(),
                  "winners: expected grad's device");
}

// The shape of the convolution that these are the output's sizes of.
inline ConvShape check_sizes(const Tensor& grad, int64_t in_channels, int64_t out_channels, const std::vector<int64_t>& input_size,
                             const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  check_length("input_size", input_size, 2);
  check_length("kernel_size", kernel_size, 2);
  check_lengths(stride, padding, dilation);
  const int64_t least = std::min({stride[0], stride[1], dilation[0], dilation[1], groups, kernel_size[0], kernel_size[1],
                                  in_channels, out_channels});
  STD_TORCH_CHECK(least > 0, "stride, dilation, groups, sizes: expected positive integers, got ", least);
  STD_TORCH_CHECK(out_channels % groups == 0, "groups: expected a divisor of ", out_channels, ", got ", groups);
  STD_TORCH_CHECK(*std::min_element(padding.begin(), padding.end()) >= 0, "padding: expected no negative number");
  ConvShape shape{};
  shape.images = grad.size(0), shape.groups = groups;
  shape.in_channels = in_channels, shape.out_channels = out_channels / groups;
  for (int axis = 0; axis < 2; ++axis) {
    shape.input[axis] = input_size[axis];
    shape.kernel[axis] = kernel_size[axis];
    shape.stride[axis] = stride[axis];
    shape.dilation[axis] = dilation[axis];
    shape.padding[axis] = padding[2 * axis];
    const int64_t padded = input_size[axis] + padding[2 * axis] + padding[2 * axis + 1];
    const int64_t extent = dilation[axis] * (kernel_size[axis] - 1) + 1;
    shape.output[axis] = (padded - extent) / stride[axis] + 1;
    STD_TORCH_CHECK(padded >= extent && shape.output[axis] == grad.size(2 + axis), "grad: expected ", shape.output[axis],
                    " in dimension ", 2 + axis, ", got ", grad.size(2 + axis));
  }
  return shape;
}

inline ConvShape check_grad_input(const Tensor& grad, const Tensor& winners, const Tensor& weight,
                                  const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  check_grad(grad, winners);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == grad.scalar_type() && weight.is_cuda() == grad.is_cuda() &&
                      weight.get_device_index() == grad.get_device_index(),
                  "weight: expected 4 dimensions, grad's dtype and device");
  ConvShape shape = check_sizes(grad, weight.size(1), weight.size(0), input_size, {weight.size(2), weight.size(3)}, stride,
                                padding, dilation, groups);
  for (int d = 0; d < 4; ++d) shape.weight_strides[d] = weight.stride(d);
  return shape;
}

inline ConvShape check_grad_weight(const Tensor& grad, const Tensor& winners, const Tensor& input, int64_t out_channels,
                                   const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  check_grad(grad, winners);
  STD_TORCH_CHECK(input.dim() == 4 && input.scalar_type() == grad.scalar_type() && input.is_cuda() == grad.is_cuda() &&
                      input.get_device_index() == grad.get_device_index() && input.size(0) == grad.size(0),
                  "input: expected 4 dimensions, grad's dtype, device and number of images");
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0, "groups: expected a divisor of ", input.size(1), ", got ", groups);
  ConvShape shape = check_sizes(grad, input.size(1) / groups, out_channels, {input.size(2), input.size(3)}, kernel_size, stride,
                                padding, dilation, groups);
  for (int d = 0; d < 4; ++d) shape.input_strides[d] = input.stride(d);
  return shape;
}

// Memory for a gradient of this shape, dense in either layout.
inline Tensor new_gradient(const Tensor& like, const std::vector<int64_t>& size, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(like, size);
  const Tensor dense = torch::stable::new_empty(like, {size[0], size[2], size[3], size[1]});
  return torch::stable::transpose(torch::stable::transpose(dense, 1, 3), 2, 3);
}

}  // namespace fused_kernels
