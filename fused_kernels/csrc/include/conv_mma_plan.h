#pragma once
// How conv_mma cuts its work, decided on the host: tiles with their halo (the margin that the filter reaches into), pieces of
// the filter, chunks of the channels, pipeline stages of weights. Of what fits in shared memory the cheapest runs.

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "plan.h"

namespace fused_kernels::mma {

// ---- constants and tile sizes ----

constexpr int kInputBuffers = 2;    // an input tile each
constexpr int kResults = 3;         // buffers of results
constexpr int kUnit = 8;            // channels that a thread moves at once: 16 bytes of operand
constexpr int kMaxSteps = 2048;     // entries of the table of tap offsets
constexpr int kInputWarps = 3, kInputThreads = kInputWarps * kWarpSize;

// What a block works on: BLOCK_M pixels by BLOCK_N output channels; a warp has M_TILES x 16 by N_TILES x 8 of them.
template <int WARPS_M_, int WARPS_N_, int M_TILES_, int N_TILES_>
struct TileConfig {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, M_TILES = M_TILES_, N_TILES = N_TILES_;
  static constexpr int BLOCK_M = WARPS_M * M_TILES * 16, BLOCK_N = WARPS_N * N_TILES * 8;
  static constexpr int kMathWarps = WARPS_M * WARPS_N, kMathThreads = kMathWarps * kWarpSize;
  static constexpr int kThreads = kMathThreads + kWarpSize + kInputThreads;
  static constexpr int kStepBytes = kStepDepth * BLOCK_N * 2;  // of weights
  // Whether it can multiply each sum before the minimum is taken. NOTE: with 128 sums of float32, ptxas spills for it (sm_80,
  // nvcc 13.0).
  static constexpr bool takes_scale_first(size_t element_size) { return M_TILES * N_TILES < 32 || element_size == 2; }
};

// Chosen by measurement on an H200. kStages buffers hold kStageSteps steps of weights each: a short stage ends before the next
// one has arrived, unless there are several. kUnitsInFlight: of a thread that loads. kSpeed: multiplications per clock of an
// SM, in units of 64.
struct Large : TileConfig<4, 2, 4, 8> {
  static constexpr int kBlocksPerSM = 1, kStages = 2, kStageSteps = 9, kUnitsInFlight = 6, kSpeed = 20;
};
struct Medium : TileConfig<2, 2, 4, 4> {
  static constexpr int kBlocksPerSM = 2, kStages = 4, kStageSteps = 6, kUnitsInFlight = 4, kSpeed = 17;
};
struct Small : TileConfig<4, 1, 1, 4> {
  static constexpr int kBlocksPerSM = 3, kStages = 4, kStageSteps = 6, kUnitsInFlight = 2, kSpeed = 10;
};
using Tiles = List<Small, Medium, Large>;

// ---- the plan ----

// How the work is cut; the same for every block.
struct ConvMmaPlan {
  int images, input[2], output[2], stride[2], padding[2];
  int64_t input_strides[4];
  int in_channels;               // of a group
  // A tile of 2^tile_log2[0] rows by 2^tile_log2[1] columns, of as many images as fill BLOCK_M.
  int tile_log2[2], tile_images, tiles_across[2], tiles;
  int tile_step[3];              // a block's next tile: so many images' tiles, rows of tiles and tiles on
  // The input tile, that is the tile with its halo. Its rows are input_step rows of the input apart; from one output row to the
  // next it is output_step of them, from one filter tap to the next tap_step. Likewise for columns.
  int input_tile[2], input_tile_pixels, input_step[2], output_step[2], tap_step[2];
  int matrix_rows[4];            // of a warp: where the pixels of its 16 x 16 matrices begin in the input tile, in bytes
  // The sum over K is cut into items: a piece of the filter (mostly all of it) for a chunk of the channels.
  int piece[2], pieces_across, pieces, piece_step[2], chunk, chunks, pitch;
  int steps, stage_steps, stages, units;  // of an item
  int blocks_n, groups, all_blocks_n;       // blocks of output channels, in each group; of all groups
  int splits, blocks_per_split;             // how the output channels are cut, blockIdx.y
  bool vectors;                             // channels lie side by side and aligned: wide loads
  int minors, minor_step, major_step;       // how the threads that load walk over an item's units
  float factor;                             // |scale|
  bool scale_first;                         // where a minimum does not commute with it: the columns' constants hold it
  // Only if kWinners. The columns that won wait in global memory: in shared memory they would change the plan, and so the order
  // of the sums.
  int out_channels;                         // of a group
  int* columns;
  Winners winners;                          // of each split
};

// A pixel of the input tile: how far it is from the first one, in elements of the input and in coordinates.
struct InputPixel {
  int64_t offset;
  int16_t image, row, column;
};

// Where the m-th pixel of a tile is: image, row, column.
HOST_DEVICE void place(const ConvMmaPlan& plan, int m, int& image, int& row, int& column) {
  column = m & ((1 << plan.tile_log2[1]) - 1);
  row = m >> plan.tile_log2[1] & ((1 << plan.tile_log2[0]) - 1);
  image = m >> (plan.tile_log2[0] + plan.tile_log2[1]);
}

// And where the channels under its first filter tap begin in the input tile, in bytes.
HOST_DEVICE int input_row(const ConvMmaPlan& plan, int m) {
  int image, row, column;
  place(plan, m, image, row, column);
  return ((image * plan.input_tile[0] + row * plan.output_step[0]) * plan.input_tile[1] + column * plan.output_step[1]) *
         plan.pitch;
}

// ---- what fits, and what it costs ----

// Shared memory that a block needs in addition to the plan's buffers: the results, the lanes' table, the rings' barriers, and
// what the system keeps.
template <class C>
constexpr int kStaticBytes = kResults * C::WARPS_N * C::BLOCK_M * 4 + C::kMathThreads * 4 + 256 + 1024;

// A plan that can run, and what it costs.
struct ConvMmaCandidate {
  ConvMmaPlan plan;
  int64_t cost = INT64_MAX;  // in cycles of the busiest multiprocessor
  int shared_bytes = 0, blocks_per_sm = 1;
  int config = -1;           // its place in the list of configurations; -1: there is none
};

// Whether eight channels of a pixel (four of float32) are one aligned run of 16 bytes, wherever they begin; aligned: the input
// begins at a multiple of 16 bytes.
inline bool channels_are_vectors(const ConvShape& shape, int element_size, bool aligned) {
  const int64_t width = 16 / element_size;
  if (shape.input_strides[1] != 1 || shape.in_channels % width != 0 || !aligned) return false;
  for (int d : {0, 2, 3}) {
    if (shape.input_size(d) > 1 && shape.input_strides[d] % width != 0) return false;
  }
  return true;
}

// Cuts the work: the filter whole, by rows or by taps; the tile's shape; the channels. Takes the cheapest way that fits.
// row_padding: bytes after each pixel's channels.
template <class C>
ConvMmaCandidate plan_tile(int config, const ConvShape& shape, bool vectors, int row_padding, const Device& device) {
  ConvMmaCandidate best;
  ConvMmaPlan p{};
  p.images = static_cast<int>(shape.images);
  p.in_channels = static_cast<int>(shape.in_channels);
  p.groups = static_cast<int>(shape.groups);
  p.blocks_n = static_cast<int>(ceil_div(shape.out_channels, C::BLOCK_N));
  p.all_blocks_n = p.groups * p.blocks_n;
  p.vectors = vectors;
  for (int axis = 0; axis < 2; ++axis) {
    p.input[axis] = static_cast<int>(shape.input[axis]);
    p.output[axis] = static_cast<int>(shape.output[axis]);
    p.stride[axis] = static_cast<int>(shape.stride[axis]);
    p.padding[axis] = static_cast<int>(shape.padding[axis]);
  }
  for (int d = 0; d < 4; ++d) p.input_strides[d] = shape.input_strides[d];

  constexpr int kLog2M = C::BLOCK_M == 256 ? 8 : C::BLOCK_M == 128 ? 7 : 6;
  static_assert(1 << kLog2M == C::BLOCK_M, "BLOCK_M: expected 64, 128 or 256");
  const auto log2_of = [](int64_t size) {
    int log2 = 0;
    while (int64_t{1} << log2 < size) ++log2;
    return log2;
  };
  // Tiles about as wide as a warp; a tile narrower than a matrix has bank conflicts: only for a narrow image.
  const int widest = std::min({log2_of(p.output[1]), 5, kLog2M}), highest = log2_of(p.output[0]);
  for (int cut = 0; cut < 3 && best.cost == INT64_MAX; ++cut) {
    const int64_t piece[2] = {cut >= 1 ? 1 : shape.kernel[0], cut >= 2 ? 1 : shape.kernel[1]};
    if ((cut == 1 && shape.kernel[0] == 1) || (cut == 2 && shape.kernel[1] == 1)) continue;
    p.pieces_across = static_cast<int>(shape.kernel[1] / piece[1]);
    p.pieces = static_cast<int>(shape.kernel[0] / piece[0]) * p.pieces_across;
    for (int axis = 0; axis < 2; ++axis) {
      p.piece[axis] = static_cast<int>(piece[axis]);
      p.piece_step[axis] = static_cast<int>(piece[axis] * shape.dilation[axis]);
      // Outputs and taps meet input rows that are multiples of this apart.
      const int64_t step = std::gcd(shape.stride[axis], piece[axis] > 1 ? shape.dilation[axis] : 0);
      p.input_step[axis] = static_cast<int>(step);
      p.output_step[axis] = static_cast<int>(shape.stride[axis] / step);
      p.tap_step[axis] = piece[axis] > 1 ? static_cast<int>(shape.dilation[axis] / step) : 0;
    }
    for (int log2_columns = widest; log2_columns >= std::max(std::min(widest, 3), widest - 2); --log2_columns) {
      const int rows = std::min(highest, kLog2M - log2_columns);
      for (int log2_rows = rows; log2_rows >= std::max(rows - 2, 0); --log2_rows) {
        p.tile_log2[0] = log2_rows;
        p.tile_log2[1] = log2_columns;
        p.tile_images = 1 << (kLog2M - log2_rows - log2_columns);
        int64_t input_tile_pixels = p.tile_images, tiles = ceil_div(p.images, p.tile_images);
        bool small = p.tile_images <= 256;
        for (int axis = 0; axis < 2; ++axis) {
          const int64_t last_tap = (p.piece[axis] - 1) * static_cast<int64_t>(p.tap_step[axis]);
          const int64_t extent = ((int64_t{1} << p.tile_log2[axis]) - 1) * p.output_step[axis] + last_tap + 1;
          small &= extent < 4096;
          p.input_tile[axis] = static_cast<int>(std::min<int64_t>(extent, 4096));
          input_tile_pixels *= p.input_tile[axis];
          p.tiles_across[axis] = static_cast<int>(ceil_div(p.output[axis], 1 << p.tile_log2[axis]));
          tiles *= p.tiles_across[axis];
        }
        if (!small || input_tile_pixels > 16384) continue;
        p.input_tile_pixels = static_cast<int>(input_tile_pixels);
        // As many channels at once as there is room for.
        const int64_t fits = device.shared_bytes / C::kBlocksPerSM - kStaticBytes<C>;
        const int64_t most =
            (fits - C::kStages * C::kStepBytes) / input_tile_pixels / (2 * kInputBuffers) / kStepDepth * kStepDepth;
        for (int64_t chunks = ceil_div(p.in_channels, std::max<int64_t>(most, kStepDepth));; ++chunks) {
          // Channels in equal chunks, multiples of what an mma instruction sums over.
          p.chunk = static_cast<int>(ceil_div(ceil_div(p.in_channels, chunks), kStepDepth)) * kStepDepth;
          p.chunks = static_cast<int>(ceil_div(p.in_channels, p.chunk));
          p.pitch = p.chunk * 2 + row_padding;
          p.steps = p.piece[0] * p.piece[1] * p.chunk / kStepDepth;
          // Stages as even as can be, and smaller where shared memory is short.
          const int64_t others =
              kInputBuffers * input_tile_pixels * p.pitch + p.steps * 4 + input_tile_pixels * sizeof(InputPixel);
          const int64_t room = fits > others ? (fits - others) / (C::kStages * C::kStepBytes) : 0;
          const bool possible = room > 0 && p.steps <= kMaxSteps;
          if (!possible && p.chunk > kStepDepth) continue;
          if (!possible) break;
          p.stages = static_cast<int>(ceil_div(p.steps, std::min<int64_t>(room, C::kStageSteps)));
          p.stage_steps = static_cast<int>(ceil_div(p.steps, p.stages));
          const int64_t bytes = others + C::kStages * p.stage_steps * C::kStepBytes;

          for (int i = 0; i < C::M_TILES; ++i) p.matrix_rows[i] = input_row(p, i * 16);
          p.units = p.input_tile_pixels * (p.chunk / kUnit);
          p.minors = p.vectors ? p.chunk / kUnit : p.input_tile_pixels;
          p.minor_step = kInputThreads % p.minors;
          p.major_step = kInputThreads / p.minors;
          const int64_t items = static_cast<int64_t>(p.pieces) * p.chunks, blocks_n = p.all_blocks_n;
          const int64_t loads = items == 1 && p.groups == 1 ? 1 : items * blocks_n;
          const int64_t step_cost = C::BLOCK_M * C::BLOCK_N / 4 / C::kSpeed;
          const int64_t arithmetic = blocks_n * (items * (p.steps * step_cost + p.stages * 60) + 800);
          const int64_t tile_cost = arithmetic + loads * p.units;
          const int64_t slots = static_cast<int64_t>(device.multiprocessors) * C::kBlocksPerSM;
          p.tiles = static_cast<int>(std::min<int64_t>(tiles, INT32_MAX / 2));
          p.blocks_per_split = static_cast<int>(ceil_div(blocks_n, std::max<int64_t>(1, std::min(blocks_n, slots / tiles))));
          p.splits = static_cast<int>(ceil_div(blocks_n, p.blocks_per_split));
          const int64_t cost = ceil_div(tiles * p.splits, slots) * ceil_div(tile_cost, p.splits) * C::kBlocksPerSM;
          if (cost < best.cost && tiles < INT32_MAX / 2) best = {p, cost, static_cast<int>(bytes), C::kBlocksPerSM, config};
          break;
        }
      }
    }
  }
  return best;
}

// Gives the cheapest of these configurations, of equal ones the first; its config is -1 where none fits.
template <class... Configs>
ConvMmaCandidate plan_conv_mma(List<Configs...>, const ConvShape& shape, bool vectors, int element_size, int row_padding,
                               bool scale_first, const Device& device) {
  ConvMmaCandidate best;
  int config = 0;
  const auto consider = [&](auto tile) {
    using C = decltype(tile);
    if (!scale_first || C::takes_scale_first(element_size)) {
      const ConvMmaCandidate candidate = plan_tile<C>(config, shape, vectors, row_padding, device);
      if (candidate.cost < best.cost) best = candidate;
    }
    ++config;
  };
  (consider(Configs()), ...);
  return best;
}

}  // namespace fused_kernels::mma
