#pragma once
// What the host functions of all kernels share, on a CPU and on a GPU: checks of the arguments, and a convolution's sizes.
// The Python functions explain what is wrong in full; these checks keep a direct call of an operator from reading out of
// bounds.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "conv_shape.h"

namespace fused_kernels {

using torch::stable::Tensor;

// Kernels count channels in an int, and step past the last one by no more than this.
constexpr int64_t kMostPastChannels = 4096;

inline void check_input(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4, "input: expected 4 dimensions (N, C, H, W), got ", input.dim());
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(channels > 0, "input: expected at least one channel to take the minimum over, got none");
  STD_TORCH_CHECK(channels <= INT32_MAX - kMostPastChannels, "input: expected at most ", INT32_MAX - kMostPastChannels,
                  " channels, got ", channels);
}

// A library is compiled for one dtype, FUSED_KERNELS_DTYPE (such as float32): the first call waits for what it needs, not for
// every dtype. It registers the operator's overload of that name. Compiled without it, a source takes all dtypes and registers
// the operator itself.
namespace dtypes {
using torch::headeronly::ScalarType;
constexpr ScalarType float32 = ScalarType::Float, float64 = ScalarType::Double;
constexpr ScalarType float16 = ScalarType::Half, bfloat16 = ScalarType::BFloat16;
}  // namespace dtypes

#define AS_STRING_OF(word) #word
#define AS_STRING(macro) AS_STRING_OF(macro)
#ifdef FUSED_KERNELS_DTYPE
#define OPERATOR(name) name "." AS_STRING(FUSED_KERNELS_DTYPE)
constexpr const char* kDtypes = AS_STRING(FUSED_KERNELS_DTYPE);
constexpr bool is_compiled(torch::headeronly::ScalarType dtype) { return dtype == dtypes::FUSED_KERNELS_DTYPE; }
#else
#define OPERATOR(name) name
constexpr const char* kDtypes = "float32, float64, float16 or bfloat16";
constexpr bool is_compiled(torch::headeronly::ScalarType) { return true; }
#endif

// Forward sources are compiled for inference, and where a gradient is wanted once more with FUSED_KERNELS_WINNERS. Then the
// operator, whose name ends in _winners, returns the minima and each pixel's winner: the channel that has the minimum.
#ifdef FUSED_KERNELS_WINNERS
constexpr bool kWinners = true;
#define FORWARD(name) OPERATOR(name "_winners")
using Forward = std::tuple<Tensor, Tensor>;
inline Forward forward_result(const Tensor& output, const std::optional<Tensor>& winners) { return {output, *winners}; }
#else
constexpr bool kWinners = false;
#define FORWARD(name) OPERATOR(name)
using Forward = Tensor;
inline Forward forward_result(const Tensor& output, const std::optional<Tensor>&) { return output; }
#endif

// Memory for the winners of an output; for inference, none.
inline std::optional<Tensor> new_winners(const Tensor& output, int64_t channels) {
  using torch::headeronly::ScalarType;
  if constexpr (!kWinners) return std::nullopt;
  const ScalarType dtype = channels <= 256 ? ScalarType::Byte : ScalarType::Int;
  return torch::stable::new_empty(output, {output.size(0), 1, output.size(2), output.size(3)}, dtype);
}

inline Winners winners_in(const std::optional<Tensor>& winners) {
  if (!winners) return {nullptr, false};
  return {winners->data_ptr(), winners->scalar_type() == torch::headeronly::ScalarType::Int};
}

// A bias has the input's dtype; beside 16-bit tensors it may be float32, in which it is added in any case.
inline bool is_wider(const Tensor& bias, const Tensor& input) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = input.scalar_type();
  return bias.scalar_type() == ScalarType::Float && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16);
}

inline bool are_together(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_bias(const Tensor& bias, const Tensor& input, int64_t channels) {
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == channels, "bias: expected one number for each of ", channels, " channels");
  STD_TORCH_CHECK(bias.scalar_type() == input.scalar_type() || is_wider(bias, input),
                  "bias: expected the input's dtype, or float32 beside 16-bit tensors");
  STD_TORCH_CHECK(are_together(bias, input), "bias: expected the input's device");
}

// Each channel's factor, in the dtype to compute in, in place of a scale that is 1 then. Neighbours may lie any distance apart:
// none, where one factor serves all channels.
inline void check_scales(const std::optional<Tensor>& scales, const Tensor& input, int64_t channels, double scale) {
  using torch::headeronly::ScalarType;
  if (!scales) return;
  STD_TORCH_CHECK(scale == 1.0, "scale: expected 1 beside scales, got ", scale);
  STD_TORCH_CHECK(scales->dim() == 1 && scales->size(0) == channels, "scales: expected one number for each of ", channels,
                  " channels");
  const ScalarType wanted = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(scales->scalar_type() == wanted, "scales: expected ", torch::headeronly::toString(wanted), ", got ",
                  torch::headeronly::toString(scales->scalar_type()));
  STD_TORCH_CHECK(are_together(*scales, input), "scales: expected the input's device");
}

// A schema's int[2] is what a single integer is expanded to: a list is handed over as it came, of any length.
inline void check_length(const char* name, const std::vector<int64_t>& list, size_t length) {
  STD_TORCH_CHECK(list.size() == length, name, ": expected ", length, " integers, got ", list.size());
}

inline void check_lengths(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation) {
  check_length("stride", stride, 2);
  check_length("padding", padding, 4);  // top, bottom, left, right
  check_length("dilation", dilation, 2);
}

inline ConvShape check_conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  check_input(input);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, "weight: expected 4 dimensions, none of size zero");
  check_lengths(stride, padding, dilation);
  const int64_t least = std::min({stride[0], stride[1], dilation[0], dilation[1], groups});
  STD_TORCH_CHECK(least > 0, "stride, dilation, groups: expected positive integers, got ", least);
  STD_TORCH_CHECK(*std::min_element(padding.begin(), padding.end()) >= 0, "padding: expected no negative number");
  STD_TORCH_CHECK(weight.size(0) % groups == 0 && weight.size(1) * groups == input.size(1), "input: expected ",
                  weight.size(1) * groups, " channels in ", groups, " groups, got ", input.size(1));
  STD_TORCH_CHECK(are_together(weight, input) && weight.scalar_type() == input.scalar_type(),
                  "weight: expected the input's dtype and device");
  if (bias) check_bias(*bias, input, weight.size(0));

  ConvShape shape;
  shape.images = input.size(0), shape.groups = groups;
  shape.in_channels = weight.size(1), shape.out_channels = weight.size(0) / groups;
  for (int axis = 0; axis < 2; ++axis) {
    shape.input[axis] = input.size(2 + axis);
    shape.kernel[axis] = weight.size(2 + axis);
    shape.stride[axis] = stride[axis];
    shape.dilation[axis] = dilation[axis];
    shape.padding[axis] = padding[2 * axis];
    const int64_t padded = shape.input[axis] + padding[2 * axis] + padding[2 * axis + 1];
    const int64_t extent = shape.dilation[axis] * (shape.kernel[axis] - 1) + 1;
    STD_TORCH_CHECK(padded >= extent, "weight: expected a kernel no larger than the padded input");
    shape.output[axis] = (padded - extent) / shape.stride[axis] + 1;
  }
  for (int d = 0; d < 4; ++d) {
    shape.input_strides[d] = input.stride(d);
    shape.weight_strides[d] = weight.stride(d);
  }
  return shape;
}

}  // namespace fused_kernels
