// conv_wgmma_ieee: float32's accuracy at the rate of tensor cores.
//
// conv_wgmma's kernel with split operands: float32 as a sum of two float16, a high part (the nearest float16) and a low part
// (what that lost, again rounded). Together they hold 23 bits. Of the four products of parts three are computed; the fourth, of
// both low parts, is at most 2^-22 of the whole:
//   low weights x high pixels + high weights x low pixels + high weights x high pixels
// Tensor cores truncate a sum where a processor would round it; over a long sum that alone would cost more than float32's
// rounding. So no sum stays in the tensor cores for longer than a filter tap; then it is added to another sum, in float32
// registers. Sums of few products are more exact without all this: where a tap's are so few that the taps' sums make a long chain,
// this kernel declines. Others are as fast there.
// The weights' parts do not fit in shared memory and stream through a ring, unless they are few.
// Limit: the tensor cores, at three times conv_wgmma's work.
// Previous rung: conv_wgmma.
// After Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance", 2022: splitting, which products count, and adding outside.

#include "conv_wgmma_launch.cuh"

namespace fused_kernels {

using namespace wgmma;

// Compiled in up to 4 parts: two Sources for each size of tile.
#if FUSED_KERNELS_PART > 0
[[gnu::used]] const auto kLaunches = share_of_launches<Element>(SplitTiles());
#else
Forward conv_wgmma_ieee(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        std::string precision, const std::optional<Tensor>& scales = std::nullopt) {
  const ConvShape shape = check_plain_conv("conv_wgmma_ieee", input, weight, bias, stride, padding, dilation, groups);
  check_scales(scales, input, weight.size(0), scale);
  STD_TORCH_CHECK(input.scalar_type() == torch::headeronly::ScalarType::Float, "input: conv_wgmma_ieee expected float32");
  STD_TORCH_CHECK(shape.taps() <= kMostTapsPerChannel * shape.in_channels, "weight: conv_wgmma_ieee expected at most ",
                  kMostTapsPerChannel, " filter taps for each channel, got ", shape.taps(), " for ", shape.in_channels);
  return convolve("conv_wgmma_ieee", "ieee", input, shape, precision, [&](auto type, Tensor& output, Winners winners) {
    if constexpr (sizeof(type) == 4) {
      run_conv_wgmma<decltype(type)>(SplitTiles(), shape, input, weight, bias, Scale(scale, scales), output, winners);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) {
  m.impl(FORWARD("conv_wgmma_ieee"), TORCH_BOX(&conv_wgmma_ieee));
}
#endif

}  // namespace fused_kernels
