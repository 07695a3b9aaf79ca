#pragma once
// Where the warps of conv_wgmma are: at which tile, and at which place in the rings of buffers (pipeline stages) where
// producers and consumers meet.

#include "conv_wgmma_plan.h"
#include "ptx/mbarrier.cuh"

namespace fused_kernels::wgmma {

// ---- tiles ----

// A block's place among the tiles: rows inside columns inside images.
struct Tile {
  const ConvWgmmaPlan& plan;
  int index, end, row, column, image;
  bool begins;  // a strip

  __device__ __forceinline__ explicit Tile(const ConvWgmmaPlan& plan) : plan(plan), begins(true) {
    // Equal shares; the first blocks have one tile more, where some are left.
    const int block = blockIdx.x, share = plan.tiles / static_cast<int>(gridDim.x), more = plan.tiles - share * gridDim.x;
    index = block * share + min(block, more);
    end = index + share + (block < more);
    row = index % plan.tiles_down;
    column = index / plan.tiles_down % plan.tiles_across;
    image = index / plan.tiles_down / plan.tiles_across;
  }
  __device__ __forceinline__ bool exists() const { return index < end; }
  __device__ __forceinline__ void advance() {
    ++index;
    begins = !plan.sliding;
    if (++row < plan.tiles_down) return;
    row = 0;
    begins = true;
    if (++column < plan.tiles_across) return;
    column = 0;
    ++image;
  }
  // Slots that this tile shares with the one before it.
  __device__ __forceinline__ int kept() const { return begins ? 0 : plan.kept; }
};

// ---- rings of buffers ----
// Apart from conv_mma's ring, whose size is known when compiled and whose barriers lie in another order: one ring for both
// would change machine code.

// A place in a ring of slots, each with two mbarriers: one says that it is full, one that it is empty again.
struct Ring {
  uint32_t barriers;
  int slots, slot, phase;

  __device__ __forceinline__ Ring(uint32_t barriers, int slots) : barriers(barriers), slots(slots), slot(0), phase(0) {}
  __device__ __forceinline__ uint32_t full() const { return barriers + slot * 16; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + slot * 16 + 8; }
  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(full(), phase); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  // By each thread, done with reading.
  __device__ __forceinline__ void release() const { ptx::mbarrier_arrive(empty()); }
  __device__ __forceinline__ void advance() {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
  // The place so many slots on, or back; no more than there are.
  __device__ __forceinline__ Ring operator+(int n) const {
    Ring other = *this;
    other.slot += n;
    if (other.slot >= slots) other.slot -= slots, other.phase ^= 1;
    return other;
  }
  __device__ __forceinline__ Ring operator-(int n) const {
    Ring other = *this;
    other.slot -= n;
    if (other.slot < 0) other.slot += slots, other.phase ^= 1;
    return other;
  }
};

// ---- the producers' walk ----

// The order in which producers fill the slots of input.
struct Cursor {
  const ConvWgmmaPlan& plan;
  Tile tile;
  int load, loads, chunk, row;

  __device__ __forceinline__ Cursor(const ConvWgmmaPlan& plan, int blocks_n)
      : plan(plan), tile(plan), load(0), loads(plan.chunks == 1 ? 1 : blocks_n), chunk(0), row(0) {}
  __device__ __forceinline__ bool exists() const { return tile.exists(); }
  __device__ __forceinline__ int window() const { return plan.kept + plan.fresh; }
  __device__ __forceinline__ void advance() {
    if (++row < window()) return;
    row = 0;
    if (++chunk < plan.chunks) return;
    chunk = 0;
    if (++load < loads) return;
    load = 0;
    tile.advance();
    row = tile.kept();
  }
  // Where the slot's first pixel is in the input.
  __device__ __forceinline__ int image() const { return tile.image * plan.tile_images; }
  __device__ __forceinline__ int y() const { return tile.row * plan.tile_rows - plan.padding[0] + row; }
  __device__ __forceinline__ int x() const { return tile.column * plan.tile_columns - plan.padding[1]; }
  __device__ __forceinline__ int channel() const { return chunk * plan.chunk; }
};

}  // namespace fused_kernels::wgmma
