// conv_wgmma: convolution, scale and min in one kernel at the rate of Hopper's tensor cores.
//
// An implicit GEMM as in conv_mma (M = output pixels, N = output channels, K = input channels x filter taps), fed by wgmma,
// which reads both operands from shared memory by itself.
//   operand A   input pixels, each a row of 128 bytes: 64 channels of 16 bits, swizzled; a filter tap is another start address
//   operand B   the weights, which stay in shared memory if they fit, and otherwise stream through a ring
//   result      64 pixels x BLOCK_N channels of sums per warpgroup; the epilogue (bias, scale, min) happens in those registers
// A persistent grid: each block works on tile after tile. Where all channels fit in a row, a block walks down a strip of the
// image 64 pixels wide, and its input is a ring of image rows: each is brought once and serves all filter rows. Otherwise a
// tile is brought with its halo, the margin that the filter reaches into, 64 channels at a time.
// Warp specialization: two warpgroups are consumers and multiply; one producer warp brings the weights, one the input, and
// where that must be converted six more producer warps do so. They meet at rings of buffers with mbarriers.
// How the input reaches shared memory is all that differs between dtypes and layouts (Source):
//   kTiles      16-bit channels_last: the TMA writes operand A as it must lie
//   kPixels     float32 channels_last: the TMA brings pixels; warps convert them
//   kPlanes     NCHW and everything else: the TMA brings rows of pixels of some channels; warps transpose them. What the TMA
//               cannot bring, such as rows that are no multiple of 16 bytes, the warps load themselves
// float32 is computed with float16 operands, as in conv_mma: a power of two for each run of rows keeps the largest values in
// float16's range. Where a row leaves it, a new run begins with another power, and the rows that both runs need are read again.
// Results so small, beside the largest values of their tile, that they may have lost digits are made again at the end, with powers
// of their own (again.cuh).
// Limit: the tensor cores; at their full rate, the chip's power.
// Previous rung: conv_mma.

#include "conv_wgmma_launch.cuh"

namespace fused_kernels {

using namespace wgmma;

// Compiled in up to 10 parts: two Sources for each size of tile.
#if FUSED_KERNELS_PART > 0
[[gnu::used]] const auto kLaunches = share_of_launches<Element>(Tiles());
#else
Forward conv_wgmma(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                   std::string precision, const std::optional<Tensor>& scales = std::nullopt) {
  const ConvShape shape = check_plain_conv("conv_wgmma", input, weight, bias, stride, padding, dilation, groups);
  check_scales(scales, input, weight.size(0), scale);
  return convolve("conv_wgmma", "tf32", input, shape, precision, [&](auto type, Tensor& output, Winners winners) {
    run_conv_wgmma<decltype(type)>(Tiles(), shape, input, weight, bias, Scale(scale, scales), output, winners);
  });
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(FORWARD("conv_wgmma"), TORCH_BOX(&conv_wgmma)); }
#endif

}  // namespace fused_kernels
