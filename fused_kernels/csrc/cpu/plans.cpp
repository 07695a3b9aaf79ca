// For the choice between the fused kernels: what they would cost on a GPU by their own plans, and what the networks make of a
// problem. No kernel, no CUDA, no PyTorch.

#include "conv_direct_plan.h"
#include "conv_mma_plan.h"
#include "conv_wgmma_plan.h"
#include "networks.h"

namespace fused_kernels {
namespace {

// NOTE: as in conv_mma.cu and conv_direct.cu, where the lesson changes them.
constexpr int kRowPadding = 16, kRows = 8;

// All in the order of plans.py. Channels are those of one group; padding: top and left; strides in elements.
struct Question {
  int64_t images, in_channels, out_channels, groups, input[2], output[2], kernel[2], stride[2], padding[2], dilation[2];
  int64_t input_strides[4], element_size, multiprocessors, shared_bytes;
};

// Costs in cycles of the busiest multiprocessor; -1: the kernel cannot take it.
struct DirectAnswer {
  int64_t cost = -1, config = 0;
};
struct MmaAnswer {
  int64_t cost = -1, config = 0, splits = 0, items = 0, vectors = 0, blocks_per_sm = 0;
};
struct WgmmaAnswer {
  int64_t cost = -1, config = 0, splits = 0, slots = 0, resident = 0, sliding = 0, source = 0, bulk = 0;
};
struct Answer {
  DirectAnswer direct;
  MmaAnswer mma;
  WgmmaAnswer wgmma, wgmma_ieee;
};

// Without pixels there is nothing to do, and the kernels count in 32 bits. Nor has a tensor 10^12 elements.
bool can_be_planned(const ConvShape& s) {
  const auto fits = [](int64_t size) { return size > 0 && size < kMostReach; };
  if (!fits(s.images) || !fits(s.groups) || !fits(s.in_channels) || !fits(s.out_channels)) return false;
  for (int axis = 0; axis < 2; ++axis) {
    for (int64_t size : {s.input[axis], s.output[axis], s.kernel[axis], s.stride[axis], s.dilation[axis], s.reach(axis)}) {
      if (!fits(size)) return false;
    }
  }
  const double groups = s.groups, weight = groups * s.out_channels * s.in_channels * s.kernel[0] * s.kernel[1];
  const double input = groups * s.in_channels * s.images * s.input[0] * s.input[1];
  const double output = groups * s.out_channels * s.images * s.output[0] * s.output[1];
  return std::max({input, weight, output}) < 1e12;
}

// A block has 128 threads, a multiprocessor as many FMA units: a block's cycles are a thread's FMAs.
DirectAnswer ask_direct(const ConvShape& s, const Device& device) {
  const bool few = s.out_channels <= 4;
  const int channels = few ? 4 : 16;
  const direct::Strips strips(s, kRows, channels);
  const int64_t cycles = s.groups * strips.passes * s.in_channels * s.taps() * channels * kRows;
  return {ceil_div(ceil_div(strips.count, strips.per_block), device.multiprocessors) * cycles, few};
}

MmaAnswer ask_mma(const ConvShape& s, int element_size, const Device& device) {
  const bool vectors = mma::channels_are_vectors(s, element_size, true);
  const mma::ConvMmaCandidate best = mma::plan_conv_mma(mma::Tiles(), s, vectors, element_size, kRowPadding, false, device);
  if (best.config < 0) return {};
  return {best.cost, best.config, best.plan.splits, int64_t{best.plan.pieces} * best.plan.chunks, vectors, best.blocks_per_sm};
}

template <class Configs>
WgmmaAnswer ask_wgmma(Configs configs, const ConvShape& s, int element_size, const Device& device) {
  const wgmma::Way way = wgmma::choose_way(s, element_size, true);
  const wgmma::ConvWgmmaCandidate best = wgmma::plan_conv_wgmma(configs, s, way, element_size, false, device);
  if (best.config < 0) return {};
  const wgmma::ConvWgmmaPlan& plan = best.plan;
  const int64_t source = static_cast<int64_t>(way.source);
  return {best.cost, best.config, plan.splits, plan.slots, plan.resident, plan.sliding, source, plan.bulk};
}

}  // namespace
}  // namespace fused_kernels

extern "C" void plan_kernels(const fused_kernels::Question* question, fused_kernels::Answer* answer) {
  using namespace fused_kernels;
  const Question& q = *question;
  ConvShape s{};
  s.images = q.images, s.groups = q.groups, s.in_channels = q.in_channels, s.out_channels = q.out_channels;
  std::copy_n(q.input_strides, 4, s.input_strides);
  for (int axis = 0; axis < 2; ++axis) {
    s.input[axis] = q.input[axis], s.output[axis] = q.output[axis], s.kernel[axis] = q.kernel[axis];
    s.stride[axis] = q.stride[axis], s.padding[axis] = q.padding[axis], s.dilation[axis] = q.dilation[axis];
  }
  *answer = {};
  if (!can_be_planned(s)) return;
  const Device device{static_cast<int>(q.multiprocessors), static_cast<int>(q.shared_bytes)};
  const int size = static_cast<int>(q.element_size);
  const bool plain = s.stride[0] == 1 && s.stride[1] == 1 && s.groups == 1;
  if (size == 4) answer->direct = ask_direct(s, device);
  if (size <= 4) answer->mma = ask_mma(s, size, device);
  if (size <= 4 && plain) answer->wgmma = ask_wgmma(wgmma::Tiles(), s, size, device);
  if (size == 4 && plain) answer->wgmma_ieee = ask_wgmma(wgmma::SplitTiles(), s, size, device);
}

extern "C" void ask_networks(const fused_kernels::Networks* networks, const float* described, float* answer) {
  fused_kernels::ask(*networks, described, answer);
}
