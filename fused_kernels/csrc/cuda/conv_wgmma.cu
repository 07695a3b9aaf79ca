// conv_wgmma: convolution, scale and min in one kernel at the rate of Hopper's tensor cores.
//
// An implicit GEMM as in conv_mma (M = output pixels, N = output channels, K = input channels x filter taps), fed by wgmma, which
// reads both operands from shared memory by itself.
//   operand A   input pixels, 64 channels of 16 bits a row of 128 bytes, swizzled; a filter tap is another start address
//   operand B   the weights, which stay in shared memory if they fit, and else stream through a ring
//   result      64 pixels x BLOCK_N channels of sums a warpgroup; bias, scale and min happen in those registers
// Blocks are persistent. Where all channels fit in a row, a block walks down a strip of the image 64 pixels wide, and its input
// is a ring of image rows: each is brought once and serves all filter rows. Else a tile's halo is brought for each 64 channels.
// Warps have roles: two warpgroups multiply, one warp brings the weights, one the input; where that must be converted, six do.
// How a row reaches shared memory is all that differs between the inputs (Source):
//   kTiles      16-bit channels_last: the copy engine writes operand A as it must lie
//   kPixels     float32 channels_last: the copy engine brings pixels; warps convert them
//   kPlanes     NCHW and all else: the copy engine brings rows of pixels of some channels; warps transpose them;
//               what it cannot bring, such as rows that are no multiple of 16 bytes, they load themselves
// float32 is computed with float16 operands, as in conv_mma: a power of two for each run of rows keeps the largest values in
// float16's range; where a row leaves it, a new run begins with another power, and the rows that it shares are read again.
// Limit: the tensor cores; at full rate, the chip's power.
// Previous rung: conv_mma.

#include "conv_wgmma.cuh"

namespace fused_kernels {

Forward conv_wgmma(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                   std::string precision) {
  const ConvShape shape = check_plain_conv("conv_wgmma", input, weight, bias, stride, padding, dilation, groups);
  return convolve("conv_wgmma", "tf32", input, shape, precision, [&](auto type, Tensor& output, Winners winners) {
    run<decltype(type), Shape<128, 1, true>, Shape<128, 1, false>, Shape<128, 2, false>, Shape<64, 1, true>, Shape<64, 1, false>>(
        shape, input, weight, bias, scale, output, winners);
  });
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(FORWARD("conv_wgmma"), TORCH_BOX(&conv_wgmma)); }

}  // namespace fused_kernels
