#pragma once
// How conv_wgmma cuts its work, decided on the host: tiles with their halo (the margin that the filter reaches into), strips,
// the rings' slots (pipeline stages), and who does what. Candidates that fit in shared memory are costed in cycles; the
// cheapest runs.

#include <algorithm>
#include <cstdint>

#include "plan.h"

namespace fused_kernels::wgmma {

// ---- constants, roles, tile sizes ----

constexpr int kSubtile = 64;                                                              // M of one instruction
constexpr int kRowChannels = 64, kRowBytes = 128, kRowSteps = kRowChannels / kStepDepth;  // of operand A
constexpr int kGroup = 8;  // channels in 16 bytes of operand A, pixels in a block
constexpr int kWarpgroups = 2, kMathThreads = kWarpgroups * 128;  // that multiply
constexpr int kInputWarps = 6, kInputThreads = kInputWarps * kWarpSize;
constexpr int kMostSlots = 16;                         // of a ring
constexpr int kMostTapsPerChannel = 12;                // where split sums of a tap are added one by one
constexpr int kStagingBytes = 27 * 1024, kMostPlaces = 32;  // for pieces of input

enum class Source { kTiles, kPlanes, kPixels };

// Who does what, and in how many registers: warp specialization. Two warpgroups consume. Of the producers, the last two warps
// give orders to the TMA, and the others, if there are any, convert the input.
template <Source S, bool SPLIT>
struct Roles {
  static constexpr int kThreads = kMathThreads + (S == Source::kTiles ? 128 : 256);
  static constexpr int kMathRegisters = S == Source::kTiles ? 216 : SPLIT ? 184 : 176;
  static constexpr int kOtherRegisters = S != Source::kTiles && !SPLIT ? 80 : 72;
  static constexpr int kWeightWarp = kThreads / kWarpSize - 1, kCopyWarp = kWeightWarp - 1;
};

// Sizes of a tile. Each warpgroup has SUBTILES x 64 pixels by BLOCK_N output channels, and as many sums in registers. OVERLAPS:
// it has twice as many sums, so that the epilogue of one tile overlaps with the work on the next; only for the most frequent
// case, filters three wide, full rows of channels, and weights that stay. SPLIT: float32 as a sum of two float16, a high and a
// low part, in operand A (a slot has all high parts first) and in operand B (a step has them first); three products of parts
// make one.
template <int BLOCK_N_, int SUBTILES_, bool OVERLAPS_, bool SPLIT_ = false>
struct TileConfig {
  static constexpr int BLOCK_N = BLOCK_N_, SUBTILES = SUBTILES_;
  static constexpr bool OVERLAPS = OVERLAPS_, SPLIT = SPLIT_;
  static constexpr int kParts = SPLIT ? 2 : 1;
  static constexpr int kRowTaps = 3;  // where it overlaps
  // Whether it can multiply each sum before the minimum is taken. NOTE: with 128 sums of float32 and winners, ptxas spills for it
  // (nvcc 13.0).
  static constexpr bool takes_scale_first(size_t element_size) { return !OVERLAPS && (SUBTILES == 1 || element_size == 2); }
  // Cycles of the tensor cores for a subtile's step; and of the warp that issues a tap. From times on an H200.
  static constexpr int kCycles = (BLOCK_N == 128 ? 68 : 40) * (SPLIT ? 3 : 1), kLeastCycles = 250 * (SPLIT ? 3 : 1);
  static constexpr int kSubtiles = kWarpgroups * SUBTILES, BLOCK_M = kSubtiles * kSubtile;
  static constexpr int kPartBytes = kStepDepth * BLOCK_N * 2, kStepBytes = kParts * kPartBytes;  // of weights
};

// What conv_wgmma and conv_wgmma_ieee choose from.
using Tiles = List<TileConfig<128, 1, true>, TileConfig<128, 1, false>, TileConfig<128, 2, false>,
                   TileConfig<64, 1, true>, TileConfig<64, 1, false>>;
using SplitTiles = List<TileConfig<128, 1, false, true>, TileConfig<64, 1, false, true>>;

// ---- how the input reaches shared memory ----

struct Way {
  Source source;
  bool bulk;  // the TMA brings it
};

constexpr Source channels_last_source(int element_size) { return element_size == 2 ? Source::kTiles : Source::kPixels; }

// Whether the TMA can bring the input: the innermost dimension dense, all others multiples of 16 bytes apart.
inline bool tma_supports(const ConvShape& shape, int innermost, int element_size, bool aligned) {
  if (!aligned) return false;
  if (shape.input_strides[innermost] != 1 && shape.input_size(innermost) > 1) return false;
  for (int d = 0; d < 4; ++d) {
    const int64_t bytes = shape.input_strides[d] * element_size;
    if (d != innermost && (bytes <= 0 || bytes % 16 != 0 || bytes >= int64_t{1} << 40)) return false;
  }
  return true;
}

// By the input's layout; aligned: it begins at a multiple of 16 bytes.
inline Way choose_way(const ConvShape& shape, int element_size, bool aligned) {
  if (tma_supports(shape, 1, element_size, aligned)) return {channels_last_source(element_size), true};
  return {Source::kPlanes, tma_supports(shape, 3, element_size, aligned)};
}

// ---- the plan ----

// How the work is cut; the same for every block.
struct ConvWgmmaPlan {
  int images, input[2], output[2], padding[2], dilation[2], kernel[2];
  int64_t input_strides[4];
  int in_channels, chunk, chunks;     // chunk: channels at once
  int blocks_n, splits, blocks_per_split;  // of output channels; how they are cut, blockIdx.y
  // A tile, and how many there are.
  int tile_images, tile_rows, tile_columns, tiles_down, tiles_across, tiles;
  // The tile with its halo lies in slots of a ring: in one slot; or where a strip slides, one slot per image row, of which a
  // tile keeps some from the tile before.
  bool sliding;
  int slots, slot_bytes, slot_rows, pitch, kept, fresh;
  uint32_t pitch_inverse, rows_inverse;  // 2^32 / pitch and 2^32 / slot_rows, rounded up
  int image_subtiles, subtile_offset[4];  // unless sliding: subtiles of an image; bytes from the slot's beginning
  // The weights of an item (a chunk of the channels) come in pipeline stages.
  int stage_taps, weight_slots;
  bool resident;
  // Input that has to be transposed or converted is staged in pieces first. A part is eight channels or eight pixels; warps
  // share it.
  bool bulk;
  int blocks, pieces, parts, shares, part_bytes, piece_bytes, places;
  uint32_t shares_inverse;  // 2^31 / shares, rounded up
  int lead, line, plane_stride;  // lead: staged pixels before a row's first
  float factor;
  bool scale_first;
  bool whole_taps;  // split sums stay in the tensor cores for 48 or 64 channels of a tap, not for 32
  // Only if kWinners:
  int out_channels;
  Winners winners;
  int* partial_winners;
};

// Eight neighbouring pixels of a slot's row, as they are staged: some of them may lie left or right of the slot.
struct PixelBlock {
  int staged;         // where they begin in a piece, in elements
  int16_t position;   // the first one's in the slot, in rows of operand A
  int8_t first, end;  // those that the slot has
  int16_t image, row, column;
};

// Shared memory that a block needs in addition to the plan's buffers: static arrays, and what the system keeps.
constexpr int kOtherBytes = 3 * 1024;

// A plan that can run, and what it costs.
struct ConvWgmmaCandidate {
  ConvWgmmaPlan plan;
  int64_t cost = INT64_MAX;  // in cycles of the busiest multiprocessor
  int shared_bytes = 0;
  int config = -1;           // its place in the list of configurations; -1: there is none
};

// ---- what fits, and what it costs ----

// Lays out shared memory for a tile's shape: the ring of input, the weights, the staging. False where it does not fit.
template <class C>
bool lay_out(ConvWgmmaPlan& p, Source source, int element_size, const Device& device, int& shared_bytes) {
  const int taps = p.kernel[0] * p.kernel[1], tap_bytes = p.chunk / kStepDepth * C::kStepBytes;
  const int window = p.kept + p.fresh;
  int room = device.shared_bytes - kOtherBytes;

  // Staging: as many pieces ahead as hide the memory's latency.
  p.blocks = p.pieces = p.parts = p.part_bytes = p.piece_bytes = p.places = p.lead = p.line = p.plane_stride = 0;
  p.shares = 1;
  if (source != Source::kTiles) {
    // NOTE: the TMA faults on an innermost coordinate that is no multiple of 16 bytes (seen on an H200).
    const int dense = 16 / element_size;
    p.lead = source == Source::kPlanes ? (dense - p.padding[1] % dense) % dense : 0;
    int across = static_cast<int>(ceil_div(p.lead + p.pitch, kGroup));
    // NOTE: the TMA takes long over each order: make pieces large, but so that a few of them are on their way.
    const int groups = p.chunk / kGroup;
    if (source == Source::kPlanes) {
      p.line = across * kGroup;
      p.plane_stride = p.slot_rows * p.line;
      p.part_bytes = kGroup * p.plane_stride * element_size;
      p.parts = groups;
      while (p.parts > 1 && (groups % p.parts != 0 || p.parts * p.tile_images * p.part_bytes > kStagingBytes / 6)) --p.parts;
      p.pieces = groups / p.parts;
      p.piece_bytes = p.parts * p.tile_images * p.part_bytes;
      if (p.line > 256 || p.slot_rows > 256) p.bulk = false;
    } else {
      p.parts = std::min(across, 3);
      across = static_cast<int>(ceil_div(across, p.parts)) * p.parts;
      p.part_bytes = kGroup * kRowChannels * 4;
      p.piece_bytes = p.parts * p.part_bytes;
      p.pieces = p.tile_images * p.slot_rows * across / p.parts;
    }
    p.blocks = p.tile_images * p.slot_rows * across;
    if (p.bulk) {
      // As many places as fit, but so that a warp has the same ones each time round the ring; where that would cost half of the
      // places, warps share the parts.
      const int most = std::clamp(kStagingBytes / p.piece_bytes, 2, kMostPlaces);
      for (p.shares = 1; p.places == 0; ++p.shares) {
        for (p.places = most; p.places >= 2 && p.places * p.parts * p.shares % kInputWarps != 0;) --p.places;
        if (p.places * 2 > most) break;
        p.places = 0;
      }
    }
    p.shares_inverse = static_cast<uint32_t>(ceil_div(int64_t{1} << 31, p.shares));
    room -= p.blocks * static_cast<int>(sizeof(PixelBlock)) + p.places * p.piece_bytes;
  }
  // The last subtile reads past its slot: that must lie in shared memory, too.
  const int reach = p.sliding ? 0 : kSubtile * C::kSubtiles * kRowBytes;

  // The weights stay if all of them fit next to the ring.
  const int64_t all_stages_bytes = static_cast<int64_t>(taps) * p.chunks * tap_bytes;
  const int least_slots = p.sliding ? window + p.fresh : 2;
  p.resident = p.blocks_per_split == 1 && all_stages_bytes + least_slots * p.slot_bytes <= room;
  if (p.resident) {
    p.stage_taps = std::max<int>(p.kernel[1], static_cast<int>(ceil_div(taps * p.chunks, kMostSlots)));
    p.weight_slots = static_cast<int>(ceil_div(taps, p.stage_taps)) * p.chunks;
    if (p.weight_slots > kMostSlots) return false;
    p.slots = std::min<int>((room - p.weight_slots * p.stage_taps * tap_bytes) / p.slot_bytes, p.sliding ? kMostSlots : 4);
    if (p.slots < least_slots) p.resident = false;
  }
  if (!p.resident) {
    p.slots = least_slots;
    if (p.slots > kMostSlots) return false;
    const int left = room - p.slots * p.slot_bytes;
    p.stage_taps = std::clamp<int>(16384 / tap_bytes, 1, taps);
    while (p.stage_taps > 1 && left / (p.stage_taps * tap_bytes) < 3) --p.stage_taps;
    p.weight_slots = left > 0 ? std::min(left / (p.stage_taps * tap_bytes), 8) : 0;
    if (p.weight_slots < 2) return false;
  }
  shared_bytes = p.slots * p.slot_bytes + p.weight_slots * p.stage_taps * tap_bytes + p.places * p.piece_bytes +
                 p.blocks * static_cast<int>(sizeof(PixelBlock));
  shared_bytes = std::max(shared_bytes, p.slots * p.slot_bytes + reach);
  return shared_bytes + kOtherBytes <= device.shared_bytes;
}

// Cuts the work in the cheapest way that fits, if that is cheaper than the best so far.
template <class C>
void improve(ConvWgmmaCandidate& best, int config, const ConvShape& shape, Way way, int element_size, const Device& device) {
  const Source source = way.source;
  ConvWgmmaPlan p{};
  p.images = static_cast<int>(shape.images);
  p.in_channels = static_cast<int>(shape.in_channels);
  p.blocks_n = static_cast<int>(ceil_div(shape.out_channels, C::BLOCK_N));
  for (int axis = 0; axis < 2; ++axis) {
    p.input[axis] = static_cast<int>(shape.input[axis]);
    p.output[axis] = static_cast<int>(shape.output[axis]);
    p.padding[axis] = static_cast<int>(shape.padding[axis]);
    p.dilation[axis] = static_cast<int>(shape.dilation[axis]);
    p.kernel[axis] = static_cast<int>(shape.kernel[axis]);
  }
  for (int d = 0; d < 4; ++d) p.input_strides[d] = shape.input_strides[d];
  // Channels in equal chunks, multiples of what an instruction sums over.
  const int64_t channel_steps = ceil_div(p.in_channels, kStepDepth);
  p.chunks = static_cast<int>(ceil_div(channel_steps, kRowSteps));
  p.chunk = static_cast<int>(ceil_div(channel_steps, p.chunks)) * kStepDepth;
  // NOTE: tensor cores truncate (notebook 08 has the sources), so beside a large product sums lose more than a processor's.
  // The fewer products there are in all, the less may be lost.
  p.whole_taps = p.chunk > 2 * kStepDepth && shape.in_channels * shape.taps() >= 256;
  if (C::OVERLAPS && (p.chunks > 1 || p.chunk != kRowChannels || p.kernel[1] != C::kRowTaps)) return;

  const int64_t reach[2] = {(shape.kernel[0] - 1) * shape.dilation[0], (shape.kernel[1] - 1) * shape.dilation[1]};
  const auto consider = [&] {
    const int64_t pitch = p.tile_columns + reach[1], rows = p.sliding ? 1 : p.tile_rows + reach[0];
    if (pitch > 256 || rows > 256) return;
    p.pitch = static_cast<int>(std::max<int64_t>(pitch, 2));
    p.slot_rows = static_cast<int>(rows);
    p.kept = p.sliding ? static_cast<int>(reach[0]) : 0;
    p.fresh = p.sliding ? p.tile_rows : 1;
    const int64_t positions = static_cast<int64_t>(p.tile_images) * p.slot_rows * p.pitch;
    if (positions > 4096) return;
    p.slot_bytes = static_cast<int>(positions) * kRowBytes * C::kParts;
    p.pitch_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / p.pitch + 1);
    p.rows_inverse = p.slot_rows > 1 ? static_cast<uint32_t>((uint64_t{1} << 32) / p.slot_rows + 1) : 0;
    p.tiles_down = static_cast<int>(ceil_div(p.output[0], p.tile_rows));
    p.tiles_across = static_cast<int>(ceil_div(p.output[1], p.tile_columns));
    const int64_t tiles = ceil_div(p.images, p.tile_images) * p.tiles_down * p.tiles_across;
    if (tiles > INT32_MAX / 2) return;
    p.tiles = static_cast<int>(tiles);
    // Cycles, from times on an H200: of the tensor cores for a block of output channels, or of the warp that issues a tap.
    const int64_t taps = static_cast<int64_t>(p.kernel[0]) * p.kernel[1] * p.chunks, steps_per_tap = p.chunk / kStepDepth;
    const int64_t block_arithmetic = taps * std::max<int64_t>(steps_per_tap * C::kSubtiles * C::kCycles, C::kLeastCycles);
    // However they are split, it costs no less.
    if (1.125 * tiles * p.blocks_n * block_arithmetic / device.multiprocessors >= best.cost) return;
    for (int split = C::OVERLAPS ? p.blocks_n : 1; split <= std::min(p.blocks_n, device.multiprocessors); ++split) {
      p.blocks_per_split = static_cast<int>(ceil_div(p.blocks_n, split));
      p.splits = static_cast<int>(ceil_div(p.blocks_n, p.blocks_per_split));
      if (p.splits != split) continue;
      // And of the weights' way from L2, of the input's way. They overlap, but not for free: an eighth of each is added.
      const auto cost_if = [&](bool resident, bool bulk) {
        const int64_t arithmetic = p.blocks_per_split * block_arithmetic;
        const int64_t stream = resident ? 0 : taps * p.blocks_per_split * steps_per_tap * C::kStepBytes / 24;
        const int64_t loads = p.chunks == 1 ? 1 : p.blocks_per_split;
        const int64_t fresh_positions = positions * p.fresh * p.chunks * loads;
        const int64_t loading = fresh_positions * (source == Source::kTiles ? 3 : bulk ? 12 : 60);
        const int64_t epilogues = p.blocks_per_split * (C::OVERLAPS ? 0 : 300) + (p.sliding ? 100 : 600);
        const int64_t tile_cost = std::max({arithmetic, stream, loading}) + (arithmetic + stream + loading) / 8 + epilogues;
        const int64_t blocks = std::max(device.multiprocessors / p.splits, 1);
        const int64_t start = 3000 + (p.splits > 1 ? 2500 : 0);
        return ceil_div(tiles, blocks) * tile_cost + start;
      };
      // To lay it out takes longest: only what may be cheaper.
      if (cost_if(p.blocks_per_split == 1, way.bulk) >= best.cost) continue;
      p.bulk = way.bulk;
      int shared_bytes = 0;
      if (!lay_out<C>(p, source, element_size, device, shared_bytes)) continue;
      if (source == Source::kTiles && !p.bulk) continue;
      if (C::OVERLAPS && (!p.resident || p.stage_taps % C::kRowTaps != 0)) continue;
      const int64_t cost = cost_if(p.resident, p.bulk);
      if (cost < best.cost) best = {p, cost, shared_bytes, config};
    }
  };

  // A strip slides where a row of it has all channels.
  if (p.chunks == 1) {
    p.sliding = true;
    p.tile_images = p.image_subtiles = 1;
    p.tile_rows = C::kSubtiles;
    p.tile_columns = kSubtile;
    consider();
  }
  // Otherwise (or where the image is small) tiles, of rows that are whole or cut evenly.
  p.sliding = false;
  for (int64_t cuts = ceil_div(p.output[1], C::BLOCK_M);;) {
    p.tile_columns = static_cast<int>(ceil_div(p.output[1], cuts));
    if (cuts > 1) p.tile_columns = static_cast<int>(ceil_div(p.tile_columns, kGroup)) * kGroup;
    const int64_t pitch = std::max<int64_t>(p.tile_columns + reach[1], 2);
    for (int images = 1; images <= C::kSubtiles; ++images) {
      p.image_subtiles = C::kSubtiles / images;
      // The last row needs no more than its outputs.
      const int64_t rows = (p.image_subtiles * kSubtile - p.tile_columns) / pitch + 1;
      if (p.image_subtiles * kSubtile < p.tile_columns) break;
      if (images > 1 && rows < p.output[0]) break;
      p.tile_images = images;
      for (int64_t r = std::min<int64_t>(rows, p.output[0]); r >= 1; r = r > 2 ? (r + 1) / 2 : r - 1) {
        p.tile_rows = static_cast<int>(r);
        for (int i = 0; i < C::kSubtiles; ++i) {
          const int64_t first = static_cast<int64_t>(std::min(i / p.image_subtiles, images - 1)) * (r + reach[0]) * pitch;
          p.subtile_offset[i] = static_cast<int>(first + i % p.image_subtiles * kSubtile) * kRowBytes;
        }
        if (images == 1 || r == p.output[0]) consider();
      }
    }
    if (p.tile_columns <= kGroup) break;
    cuts = ceil_div(p.output[1], (p.tile_columns - 1) / kGroup * kGroup);  // the fewest that make tiles narrower
  }
}

// Gives the cheapest of these configurations, of equal ones the first; its config is -1 where none fits.
template <class... Configs>
ConvWgmmaCandidate plan_conv_wgmma(List<Configs...>, const ConvShape& shape, Way way, int element_size, bool scale_first,
                                   const Device& device) {
  ConvWgmmaCandidate best;
  int config = 0;
  const auto consider = [&](auto tile) {
    using C = decltype(tile);
    if (!scale_first || C::takes_scale_first(element_size)) improve<C>(best, config, shape, way, element_size, device);
    ++config;
  };
  (consider(Configs()), ...);
  return best;
}

}  // namespace fused_kernels::wgmma
