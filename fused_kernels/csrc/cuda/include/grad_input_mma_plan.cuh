#pragma once
// How grad_input_mma cuts its work, decided on the host: patches of the input, one per warp, and chunks of its channels; and
// what lies in shared memory. A patch is reached by output pixels: those that lie over it, and a halo (margin) of more around
// them.

#include "implicit_gemm.cuh"

namespace fused_kernels {

// ---- constants and the plan ----

constexpr int kWarps = 20, kThreads = kWarps * kWarpSize;
constexpr int kGroup = 8;                            // channels in 16 bytes, pixels of an instruction
constexpr int kStrips = 2, kRun = kStrips * kGroup;  // pixels side by side that a warp works on together
constexpr int kPatchRows = 4, kPatchColumns = 32;    // pixels that a warp works on, one run after the other
constexpr int kMostTaps = 49;

struct GradInputMmaPlan {
  int images, input[2], output[2], padding[2], dilation[2], kernel[2], taps;
  int64_t grad_strides[4];
  int in_channels, out_channels;
  int reach[2], reach_pixels, patches_across[2], patches;  // reach: the output pixels that reach a patch of the input
  uint32_t width_inverse;                                  // 2^32 / reach[1], rounded up
  int tap_offset[kMostTaps];    // of an output pixel from the last one that reaches an input pixel
  bool channels_last, vectors;  // vectors: whole vectors of pixels or channels can be stored
};

// The rows of weights in shared memory: CHUNK input channels each.
template <int CHUNK>
struct Rows {
  static constexpr int kBytes = CHUNK * 2, kGroups = CHUNK / kGroup, kMatrices = CHUNK / 16;
};

// ---- what fits ----

// A plan that can run, and with what.
struct GradInputMmaCandidate {
  GradInputMmaPlan plan;
  bool narrow;  // a block has the weights of 32 input channels, not of 64
  int shared_bytes;
};

// Cuts the work.
inline GradInputMmaCandidate plan_grad_input_mma(const ConvShape& shape, const Tensor& grad, bool channels_last) {
  GradInputMmaPlan plan{};
  plan.images = static_cast<int>(shape.images), plan.taps = static_cast<int>(shape.taps());
  plan.in_channels = static_cast<int>(shape.in_channels), plan.out_channels = static_cast<int>(shape.out_channels);
  for (int axis = 0; axis < 2; ++axis) {
    plan.input[axis] = static_cast<int>(shape.input[axis]);
    plan.output[axis] = static_cast<int>(shape.output[axis]);
    plan.kernel[axis] = static_cast<int>(shape.kernel[axis]);
    plan.padding[axis] = static_cast<int>(shape.padding[axis]);
    plan.dilation[axis] = static_cast<int>(shape.dilation[axis]);
  }
  for (int d = 0; d < 4; ++d) plan.grad_strides[d] = grad.stride(d);
  plan.channels_last = channels_last;
  const int64_t run = channels_last ? shape.in_channels : shape.input[1];
  plan.vectors = run % (channels_last ? 2 : 2 * kStrips) == 0;

  const int patch[2] = {kPatchRows, kPatchColumns};
  for (int axis = 0; axis < 2; ++axis) {
    plan.reach[axis] = patch[axis] + (plan.kernel[axis] - 1) * plan.dilation[axis];
    plan.patches_across[axis] = static_cast<int>(ceil_div(plan.input[axis], patch[axis]));
  }
  STD_TORCH_CHECK(int64_t{plan.reach[0]} * plan.reach[1] < 1 << 16, "dilation: grad_input_mma expected a filter of a shorter reach");
  plan.reach_pixels = plan.reach[0] * plan.reach[1];
  plan.width_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / plan.reach[1] + 1);
  const int64_t patches = shape.images * plan.patches_across[0] * plan.patches_across[1];
  STD_TORCH_CHECK(patches < INT32_MAX / 2, "input_size: grad_input_mma expected fewer patches, got ", patches);
  plan.patches = static_cast<int>(patches);

  // The weights of 64 input channels, or of 32.
  const auto bytes = [&](int64_t chunk) {
    return plan.out_channels * plan.taps * chunk * 2 + int64_t{kWarps} * plan.reach_pixels * 8;
  };
  const int available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, grad.get_device_index());
  const bool narrow = shape.in_channels <= 32 || bytes(64) > available;
  const int64_t shared_bytes = bytes(narrow ? 32 : 64);
  STD_TORCH_CHECK(shared_bytes <= available,
                  "weight: grad_input_mma expected the weights of 32 input channels to fit in shared memory");
  for (int tap = 0; tap < plan.taps; ++tap) {
    const int y = plan.kernel[0] - 1 - tap / plan.kernel[1], x = plan.kernel[1] - 1 - tap % plan.kernel[1];
    plan.tap_offset[tap] = y * plan.dilation[0] * plan.reach[1] + x * plan.dilation[1];
  }
  return {plan, narrow, static_cast<int>(shared_bytes)};
}

}  // namespace fused_kernels
