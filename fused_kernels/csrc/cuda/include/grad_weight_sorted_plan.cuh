#pragma once
// How grad_weight_sorted cuts its work, decided on the host: tiles of output pixels, chunks of input channels, lists of output
// channels; and what lies in shared memory. An input tile is what the filter reads for a tile of outputs: the tile with its
// halo.

#include "implicit_gemm.cuh"

namespace fused_kernels {

// ---- constants and sizes ----

constexpr int kColumns = 8, kStep = 16;                   // output channels of a list, pixels of a step
constexpr int kLists = 16;                                // of a block that sums
constexpr int kPlaces = 8;                                // of rows in the banks of shared memory
constexpr int kTaps = 9, kMostTaps = 49;                  // of a block that sums, and in all
constexpr int kMostPixels = 1024, kMostInputTile = 4096;  // of a tile, and of its input tile
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarpSize;
constexpr int kStages = 2;                                // of the pipeline: input tiles in shared memory
constexpr int kStepBytes = kWarpSize * 8 + kStep * 4;     // operand B of a step, and where its pixels' rows begin

// How a block that sums cuts the input's channels, and how many producer warps bring them. 16-bit channels that lie side by
// side are copied past the registers, by few warps. Everything else is converted or transposed by more warps, whose registers
// leave room for the sums of 16 channels only.
template <typename T, bool DENSE>
struct Cut {
  static constexpr bool kCopies = DENSE && sizeof(T) == 2;
  static constexpr int kChunk = kCopies ? 32 : 16, kGroups = kChunk / 8;
  static constexpr int kPixelBytes = kChunk * 2 + 16;  // padded so that places modulo 8 are different banks
  static constexpr int kInputWarps = kCopies ? 3 : 11, kInputThreads = kInputWarps * kWarpSize;
  static constexpr int kThreads = kTaps * kWarpSize + kInputThreads;
  static constexpr int kSums = kLists * kColumns * kChunk;  // of a tap
};

// ---- the plan ----

// How the work is cut; the same for every block.
struct GradWeightSortedPlan {
  int images, input[2], output[2], padding[2], stride[2], dilation[2], kernel[2], taps;
  int64_t input_strides[4], grad_strides[4];
  int in_channels, out_channels;
  int tile[2], input_tile[2], tiles_across[2], tiles;
  int lists, capacity;                 // of a tile: lists, entries
  int chunks, ranges, slices;          // of input channels, output channels, tiles
  int tap_offset[kMostTaps];           // in the input tile, in bytes
  uint32_t width_inverse;              // 2^32 / input_tile[1], rounded up
};

// ---- what fits ----

// Chooses a tile; false where no input tile fits in shared memory.
inline bool lay_out_grad_weight_sorted(GradWeightSortedPlan& plan, int pixel_bytes, int most, int& shared_bytes) {
  plan.lists = static_cast<int>(ceil_div(plan.out_channels, kColumns));
  plan.tile[1] = static_cast<int>(ceil_div(plan.output[1], ceil_div(plan.output[1], 64)));
  for (int most_rows = std::min(kMostPixels / plan.tile[1], plan.output[0]); most_rows > 0; --most_rows) {
    plan.tile[0] = static_cast<int>(ceil_div(plan.output[0], ceil_div(plan.output[0], most_rows)));
    for (int axis = 0; axis < 2; ++axis) {
      plan.input_tile[axis] = (plan.tile[axis] - 1) * plan.stride[axis] + (plan.kernel[axis] - 1) * plan.dilation[axis] + 1;
    }
    plan.input_tile[1] = std::max(plan.input_tile[1], 2);  // for the inverse
    plan.capacity = (plan.tile[0] * plan.tile[1] / kStep + 1 + plan.lists) * kStep;
    const int64_t input_pixels = static_cast<int64_t>(plan.input_tile[0]) * plan.input_tile[1];
    // A step past the last is read, and not used.
    const int64_t bytes = kStages * (input_pixels * pixel_bytes + plan.capacity / kStep * int64_t{kStepBytes}) + kWarpSize * 8;
    if (input_pixels > kMostInputTile || bytes > most) continue;
    shared_bytes = static_cast<int>(bytes);
    return true;
  }
  return false;
}

// Completes a plan that has the problem's sizes; gives the bytes of shared memory that sum_kernel needs.
template <class C>
int cut_grad_weight_sorted(GradWeightSortedPlan& plan, int device) {
  int shared_bytes = 0;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - 1024;
  STD_TORCH_CHECK(lay_out_grad_weight_sorted(plan, C::kPixelBytes, most, shared_bytes),
                  "input: grad_weight_sorted expected a tile's input to fit in shared memory");
  for (int axis = 0; axis < 2; ++axis) plan.tiles_across[axis] = static_cast<int>(ceil_div(plan.output[axis], plan.tile[axis]));
  const int64_t tiles = static_cast<int64_t>(plan.images) * plan.tiles_across[0] * plan.tiles_across[1];
  STD_TORCH_CHECK(tiles < INT32_MAX / 2, "grad: grad_weight_sorted expected fewer tiles, got ", tiles);
  plan.tiles = static_cast<int>(tiles);
  plan.width_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / plan.input_tile[1] + 1);
  plan.chunks = static_cast<int>(ceil_div(plan.in_channels, C::kChunk));
  plan.ranges = static_cast<int>(ceil_div(plan.lists, kLists));
  const int tap_sets = static_cast<int>(ceil_div(plan.taps, kTaps));
  plan.slices = std::clamp(multiprocessors(device) / (plan.chunks * plan.ranges * tap_sets), 1, plan.tiles);
  for (int tap = 0; tap < plan.taps; ++tap) {
    const int row = tap / plan.kernel[1] * plan.dilation[0], column = tap % plan.kernel[1] * plan.dilation[1];
    plan.tap_offset[tap] = (row * plan.input_tile[1] + column) * C::kPixelBytes;
  }
  return shared_bytes;
}

}  // namespace fused_kernels
