#pragma once
// How grad_weight_gather cuts its work, decided on the host: a block has some columns, some output channels and a slice of the
// pixels.

#include "launch.cuh"

namespace fused_kernels {

// ---- constants and the plan ----

constexpr int kWarpSize = 32, kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kRounds = 8, kBatch = kRounds * kThreads;  // pixels that a thread looks up, and a block sorts
constexpr int kMostOutputs = 32;                         // of a block
static_assert(kMostOutputs == kWarpSize && kMostOutputs * kWarps == kThreads, "a thread counts for one of them and one warp");
constexpr int kMostReach = 1 << 15;                      // an entry keeps a row and a column in 16 bits each

struct GradWeightGatherPlan {
  ConvShape shape;
  int64_t grad_strides[4];
  int taps, vectors, units, chunks;   // filter taps; vectors of channels; vectors at all taps, and blocks that share them
  int outputs_per_block, ranges;      // of a group
  int pixels, slices;
  bool channels_fastest;              // the order of columns: what neighbouring lanes read lies side by side
};

// A pixel of a list.
struct alignas(16) Entry {
  int offset;       // of the input under the filter's first tap
  float gradient;
  int corner;       // where that lies: a row, and a column in the lower 16 bits
  int output;       // of the block's
};

template <typename S, int VEC>
constexpr int kUnits = VEC > 1 ? 1 : 16 / sizeof(S);  // of a lane
template <typename S, int VEC>
constexpr int kColumns = kWarpSize * VEC * kUnits<S, VEC>;

template <typename S, int VEC>
constexpr int shared_bytes(int outputs) {
  return kBatch * sizeof(Entry) + (outputs + 2 * kWarps) * kColumns<S, VEC> * sizeof(S);
}

// ---- how many blocks ----

// Completes a plan that has the problem's sizes.
template <typename S, int VEC>
void cut_grad_weight_gather(GradWeightGatherPlan& plan, int device) {
  const ConvShape& s = plan.shape;
  plan.vectors = static_cast<int>(s.in_channels / VEC);
  plan.units = plan.vectors * plan.taps;
  plan.chunks = static_cast<int>(ceil_div(plan.units, kWarpSize * kUnits<S, VEC>));
  // Two blocks for each multiprocessor: first by slices, of no less than a batch, which share the lists of channels that win
  // often; then by fewer output channels each.
  const int64_t wanted = 2 * multiprocessors(device), batches = std::max<int64_t>(ceil_div(plan.pixels, kBatch), 1);
  const auto blocks = [&] { return plan.chunks * ceil_div(s.out_channels, plan.outputs_per_block) * s.groups; };
  plan.outputs_per_block = kMostOutputs;
  const int64_t batches_per_slice = ceil_div(batches, std::clamp<int64_t>(wanted / blocks(), 1, batches));
  plan.slices = static_cast<int>(ceil_div(batches, batches_per_slice));
  while (plan.outputs_per_block > 8 && 2 * plan.slices * blocks() <= wanted) plan.outputs_per_block /= 2;
  plan.ranges = static_cast<int>(ceil_div(s.out_channels, plan.outputs_per_block));
}

}  // namespace fused_kernels
