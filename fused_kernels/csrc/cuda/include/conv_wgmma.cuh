#pragma once
// The kernel of conv_wgmma and conv_wgmma_ieee: an implicit GEMM in a persistent grid, with warp specialization.
//
// Producer warps fill three rings of buffers (pipeline stages) in shared memory, consumer warps empty them; each buffer has two
// mbarriers, one that says full and one that says empty.
//   ring of input    operand A; a slot has a tile with its halo (the margin that the filter reaches into), or one row of it
//   ring of weights  operand B; one producer warp brings it by bulk copies
//   staging ring     float32 and NCHW input as the TMA brought it, before six producer warps convert or transpose it
// Two warpgroups consume: wgmma, then the epilogue (bias, scale, min) in registers.
// conv_wgmma_plan.h cuts the work; conv_wgmma_launch.cuh launches it.

#include "again.cuh"
#include "conv_wgmma_plan.h"
#include "conv_wgmma_walk.cuh"
#include "implicit_gemm.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/register_count.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/thread_index.cuh"
#include "ptx/wgmma.cuh"

namespace fused_kernels::wgmma {

// ---- how the weights are packed ----

// Operand B's core matrices: 8 columns by 8 k, two side by side.
template <int PARTS>
struct CoreMatrixOrder {
  static constexpr int kParts = PARTS;
  __device__ static int column(int word) { return word / 64 * 8 + word / 4 % 8; }
  __device__ static int k(int word) { return word / 32 % 2 * 8 + word % 4 * 2; }
  // The words that a lane of mma.sync has of a unit.
  __device__ static int word(int lane, int i) { return i * 32 + lane; }
  // First all biases, then all powers of two, and so on. A thread's columns are 8 j + 2 (lane % 4) and the next: of two j, side
  // by side.
  // NOTE: neighbouring threads' columns follow each other. Global loads have bank conflicts as well, and each one slows the
  // tensor cores down.
  struct Places {
    int bias, factor, own, size;
  };
  __device__ static Places places(int columns, int column) {
    const int at = column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
    return {at, at + columns, at + 2 * columns, at + 3 * columns};
  }
};

// ---- helpers ----

__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ uint32_t divide(uint32_t a, uint32_t inverse) { return __umulhi(a, inverse); }

// Where eight channels, 16 bytes, lie in a row of operand A: swizzled by the row's address.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, int group) { return row + (((row >> 7 & 7) ^ group) << 4); }

// Where a tile's complete sums are.
template <class C, class Sums, class Rounded>
__device__ __forceinline__ auto& totals(Sums& sums, Rounded& rounded) {
  if constexpr (C::SPLIT) {
    return rounded;
  } else {
    return sums;
  }
}

// ---- results ----

// Where the results of a consumer's thread are, and how they get into the output.
template <typename T, class C>
struct Results {
  const ConvWgmmaPlan& plan;
  T* const output;
  float* const partial;

  // One of a thread's pixels in a subtile; past the last image, if the tile has none there.
  template <class Tile>
  __device__ __forceinline__ OutputPixel pixel(const Tile& tile, int warpgroup, int thread, int i, int h) const {
    OutputPixel at{tile.image, tile.row, tile.column};
    const int subtile = warpgroup * C::SUBTILES + i, m = thread % 128 / 32 * 16 + h * 8 + thread % 32 / 4;
    if (plan.sliding) {
      at.row += subtile;
      at.column += m;
    } else {
      const int in_image = subtile % plan.image_subtiles * kSubtile + m, line = divide(in_image, plan.pitch_inverse);
      const int in_line = in_image - line * plan.pitch;
      at.image += subtile / plan.image_subtiles;
      at.row += line;
      at.column += in_line;
      const bool inside = subtile < plan.tile_images * plan.image_subtiles && line < plan.tile_rows && in_line < plan.tile_columns;
      if (!inside) at.image = plan.images;
    }
    return at;
  }

  __device__ __forceinline__ bool exists(const OutputPixel& at) const { return at.inside(plan.images, plan.output); }

  __device__ __forceinline__ void put(const OutputPixel& at, float smallest, [[maybe_unused]] int winner) const {
    if (!plan.scale_first) smallest *= plan.factor;
    const int64_t pixel = (static_cast<int64_t>(at.image) * plan.output[0] + at.row) * plan.output[1] + at.column;
    if (plan.splits == 1) {
      output[pixel] = static_cast<T>(smallest);
      if (kWinners) plan.winners.put(pixel, min(winner, plan.out_channels - 1));
    } else {
      const int64_t pixels = static_cast<int64_t>(plan.images) * plan.output[0] * plan.output[1];
      partial[blockIdx.y * pixels + pixel] = smallest;
      if (kWinners) plan.partial_winners[blockIdx.y * pixels + pixel] = min(winner, plan.out_channels - 1);
    }
  }
};

// Where a warp notes a tile with results to make again.
// NOTE: the bit depends on the warp only so that the compiler can't prepare it in every tile (nvcc 13.0).
template <class Tile>
__device__ __forceinline__ Doubt doubt_of(const Tile& tile, int warp) {
  return Doubt(warp + tile.row + tile.column * 3u + tile.image * 7u);
}
__device__ __forceinline__ uint32_t* doubts_of(uint32_t* doubts, int warp) { return doubts + warp * (kDoubts / 32); }

// Makes a warp's results of the tiles that it noted again.
// NOTE: a call, and not inlined, for the kernel's other code: ptxas allocates its registers apart.
template <class C>
__device__ __noinline__ void make_again(const ConvWgmmaPlan& plan, const WindowPlan& window_plan, const uint32_t* doubts) {
  // As for the input's warps: this SM's cache may hold what was there before.
  __threadfence();
  using Warp = Again<CoreMatrixOrder<C::kParts>, C::BLOCK_N, C::BLOCK_N == 64 || C::SPLIT ? 2 : 4>;
  const Results<float, C> results{plan, window_plan.output, window_plan.partial};
  const int first_n = blockIdx.y * plan.blocks_per_split, end_n = min(first_n + plan.blocks_per_split, plan.blocks_n);
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const bool infinite = Warp::any_infinite(window_plan, first_n, end_n, lane);
#pragma unroll 1
  for (Tile tile(plan); tile.exists(); tile.advance()) {
    const OutputPixel first{tile.image * plan.tile_images, tile.row * plan.tile_rows, tile.column * plan.tile_columns};
    if (!doubt_of(first, thread / kWarpSize).noted(doubts)) continue;
#pragma unroll 1
    for (int i = 0; i < C::SUBTILES; ++i) {
      const OutputPixel pixels[2] = {results.pixel(first, thread / 128, thread, i, 0),
                                     results.pixel(first, thread / 128, thread, i, 1)};
      Warp{window_plan, pixels, lane, infinite}.put(results, first_n, end_n);
    }
  }
}

// ---- the kernel ----

template <typename T, Source S, class C>
__global__ void __launch_bounds__(Roles<S, C::SPLIT>::kThreads, 1)
    conv_wgmma_kernel(const __grid_constant__ CUtensorMap map, const Raw<T>* input, const char* weights,
                      const float* constants, T* output, float* partial, const __grid_constant__ ConvWgmmaPlan plan,
                      const __grid_constant__ WindowPlan window_plan) {
  constexpr bool kScaled = sizeof(T) == 4;
  constexpr int kThreads = Roles<S, C::SPLIT>::kThreads;

  extern __shared__ __align__(128) char shared[];
  const uint32_t base = ptx::shared_address(shared);  // the ring of input comes first
  const uint32_t stages = base + plan.slots * plan.slot_bytes;
  const int steps_per_tap = plan.chunk / kStepDepth;
  const uint32_t low_parts = plan.slot_bytes / C::kParts;  // from a slot's beginning
  const int stage_bytes = plan.stage_taps * steps_per_tap * C::kStepBytes;
  const int staging_offset = plan.slots * plan.slot_bytes + plan.weight_slots * stage_bytes;
  PixelBlock* const block_table = reinterpret_cast<PixelBlock*>(shared + staging_offset + plan.places * plan.piece_bytes);
  __shared__ alignas(8) uint64_t barriers[4 * kMostSlots + 2 * kMostPlaces];
  __shared__ alignas(128) char trash[128];             // for pixels that no slot has
  __shared__ uint32_t largest[kMostSlots][kInputWarps];  // of a slot's values, scaled, as float16
  __shared__ float finite[kInputWarps];
  __shared__ int exponents[kMostSlots];
  __shared__ int changes[kMostSlots];  // sliding: a new run begins here; else: of the exponent, from the chunk before
  __shared__ uint32_t doubts[kMathThreads / kWarpSize * (kDoubts / 32)];  // a consumer warp's tiles with results to make again

  // NOTE: the shuffle tells the compiler that all lanes have the same warp: what follows from it fits in uniform registers.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
  const uint32_t first_barrier = ptx::shared_address(barriers);
  Ring input_ring(first_barrier, plan.slots);
  Ring weight_ring(first_barrier + kMostSlots * 16, plan.weight_slots);
  Ring staging_ring(first_barrier + kMostSlots * 32, plan.places);
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.slots; ++i) {
      ptx::mbarrier_init((input_ring + i).full(), S == Source::kTiles ? 1 : kInputThreads);
      ptx::mbarrier_init((input_ring + i).empty(), kMathThreads);
    }
    for (int i = 0; i < plan.weight_slots; ++i) {
      ptx::mbarrier_init((weight_ring + i).full(), 1);
      ptx::mbarrier_init((weight_ring + i).empty(), kMathThreads);
    }
    for (int i = 0; i < plan.places; ++i) {
      ptx::mbarrier_init((staging_ring + i).full(), 1);
      ptx::mbarrier_init((staging_ring + i).empty(), plan.parts * plan.shares * kWarpSize);
    }
    ptx::mbarrier_init_fence();
  }
  if (kScaled && threadIdx.x < sizeof doubts / 4) doubts[threadIdx.x] = 0;
  if (S != Source::kTiles) {
    const int across = plan.blocks / (plan.tile_images * plan.slot_rows);
    for (int i = threadIdx.x; i < plan.blocks; i += kThreads) {
      const int column = i % across * kGroup, row = i / across % plan.slot_rows, image = i / across / plan.slot_rows;
      PixelBlock block;
      block.staged = image * plan.parts * kGroup * plan.plane_stride + row * plan.line + column;
      block.position = (image * plan.slot_rows + row) * plan.pitch + column - plan.lead;
      block.first = max(plan.lead - column, 0);
      block.end = min(plan.lead + plan.pitch - column, kGroup);
      block.image = image, block.row = row, block.column = column;
      block_table[i] = block;
    }
  }
  __syncthreads();

  // This block's share of the output channels.
  const int first_n = blockIdx.y * plan.blocks_per_split;
  const int end_n = min(first_n + plan.blocks_per_split, plan.blocks_n);
  const int taps = plan.kernel[0] * plan.kernel[1];

  if (warp >= kMathThreads / kWarpSize) {  // a producer
    ptx::fewer_registers<Roles<S, C::SPLIT>::kOtherRegisters>();
    const int thread = threadIdx.x - kMathThreads;

    // ---- producer: weights ----
    if (warp == Roles<S, C::SPLIT>::kWeightWarp) {
      if (threadIdx.x % kWarpSize > 0) return;
      ptx::wait_for_previous_grid();
      const int64_t item_bytes = static_cast<int64_t>(taps) * steps_per_tap * C::kStepBytes;
      const char* const first = weights + first_n * plan.chunks * item_bytes;
      for (Tile tile(plan); tile.exists(); tile.advance()) {
        const char* source = first;
        for (int item = 0; item < (end_n - first_n) * plan.chunks; ++item) {
          for (int left = taps; left > 0; left -= plan.stage_taps) {
            const int bytes = min(left, plan.stage_taps) * steps_per_tap * C::kStepBytes;
            weight_ring.wait_empty();
            ptx::mbarrier_arrive_expect_bytes(weight_ring.full(), bytes);
            ptx::bulk_copy(stages + weight_ring.slot * stage_bytes, source, bytes, weight_ring.full());
            weight_ring.advance();
            source += bytes;
          }
        }
        if (plan.resident) break;
      }
      return;
    }

    // ---- producer: input through the TMA, slot after slot or piece after piece ----
    if (warp == Roles<S, C::SPLIT>::kCopyWarp) {
      if (threadIdx.x % kWarpSize > 0 || (S != Source::kTiles && !plan.bulk)) return;
      ptx::prefetch_tensor_map(&map);
      for (Cursor cursor(plan, end_n - first_n); cursor.exists(); cursor.advance()) {
        if constexpr (S == Source::kTiles) {
          const int image_bytes = plan.slot_rows * plan.pitch * kRowBytes;
          input_ring.wait_empty();
          ptx::mbarrier_arrive_expect_bytes(input_ring.full(), plan.tile_images * image_bytes);
          for (int i = 0; i < plan.tile_images; ++i) {
            ptx::tensor_copy(base + input_ring.slot * plan.slot_bytes + i * image_bytes, &map, cursor.channel(), cursor.x(),
                             cursor.y(), cursor.image() + i, input_ring.full());
          }
          input_ring.advance();
        } else {
          for (int piece = 0; piece < plan.pieces; ++piece) {
            const uint32_t target = base + staging_offset + staging_ring.slot * plan.piece_bytes, full = staging_ring.full();
            staging_ring.wait_empty();
            ptx::mbarrier_arrive_expect_bytes(full, plan.piece_bytes);
            if constexpr (S == Source::kPlanes) {
              const int image_bytes = plan.piece_bytes / plan.tile_images;
              for (int i = 0; i < plan.tile_images; ++i) {
                ptx::tensor_copy(target + i * image_bytes, &map, cursor.x() - plan.lead, cursor.y(),
                                 cursor.channel() + piece * plan.parts * kGroup, cursor.image() + i, full);
              }
            } else {
              const PixelBlock& block = block_table[piece * plan.parts];
              ptx::tensor_copy(target, &map, cursor.channel(), cursor.x() + block.column, cursor.y() + block.row,
                               cursor.image() + block.image, full);
            }
            staging_ring.advance();
          }
        }
      }
      return;
    }

    // ---- producers: input that is converted or transposed, piece after piece in turn, into operand A ----
    if constexpr (S != Source::kTiles) {
      // No wait for the packing kernel: it let this one begin only after the input was complete. But this SM's cache may hold
      // what was there before.
      __threadfence();
      // NOTE: `warp` is in a uniform register, and so is all that follows from it. Faster than thread / kWarpSize (on an H200).
      const int lane = thread % kWarpSize, my_warp = warp - kMathThreads / kWarpSize;
      int exponent = !kScaled ? 0 : C::SPLIT ? kFirstSplitExponent : kFirstExponent;
      bool zeros = false;  // nothing but zeros is summed
      uint32_t most = 0;   // of two float16
      // Packs two neighbours as float16; split: their low parts, too.
      const auto pack = [&](float first, float second, uint32_t& low) {
        const float factor = power_of_two(exponent);
        uint32_t packed;
        if constexpr (C::SPLIT) {
          split_f16(first * factor, second * factor, packed, low);
        } else {
          packed = ptx::pack_f16(first * factor, second * factor);
        }
        most = ptx::max_magnitudes_f16(most, packed);
        return packed;
      };

      // Four blocks are a quad, which one instruction stores. kQuads at once hide shared memory's latency. Where a piece has no
      // more, their table entries stay in registers.
      constexpr int kQuads = C::SPLIT ? 2 : 3;
      struct {
        int staged[4];  // where the quad's blocks begin, or of 16-bit pixels, this lane's row of them in the first
        int target;     // this lane's row in the slot, or -1
      } quads[kQuads];
      const auto look_up = [&](int first) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const int mine = first + q * 4 + lane / 8;
          const PixelBlock block = block_table[min(mine, plan.blocks - 1)];
          const bool valid = mine < plan.blocks && lane % 8 >= block.first && lane % 8 < block.end;
          quads[q].target = valid ? (block.position + lane % 8) * kRowBytes : -1;
          if constexpr (kScaled) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int staged = block_table[min(first + q * 4 + j, plan.blocks - 1)].staged;
              quads[q].staged[j] = (staged + lane / 4 * plan.plane_stride + lane % 4 * 2) * 4;
            }
          } else {
            quads[q].staged[0] = (block.staged + lane % 8 * plan.plane_stride) * 2;
          }
        }
      };
      if (S == Source::kPlanes && plan.bulk) look_up(0);

      // Converts a share of a part, from the staging ring into its slot.
      const auto convert = [&](int source, uint32_t slot, int part, int share) {
        if constexpr (S == Source::kPlanes) {
#pragma unroll 1
          for (int i = share * (kQuads * 4); i < plan.blocks; i += plan.shares * (kQuads * 4)) {
            if (plan.blocks > kQuads * 4) look_up(i);
            uint32_t matrices[kQuads][4], low[kQuads][4];
#pragma unroll
            for (int q = 0; q < kQuads; ++q) {
              if constexpr (kScaled) {
                // Two pixels of a channel, in each of four blocks.
                float2 two[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) two[j] = *reinterpret_cast<const float2*>(shared + source + quads[q].staged[j]);
#pragma unroll
                for (int j = 0; j < 4; ++j) matrices[q][j] = pack(two[j].x, two[j].y, low[q][j]);
              } else {
                ptx::ldmatrix_x4(matrices[q], base + source + quads[q].staged[0]);
              }
            }
#pragma unroll
            for (int q = 0; q < kQuads; ++q) {
              const auto store = [&](uint32_t parts, const uint32_t(&of_quad)[4]) {
                const uint32_t row = swizzled(parts + quads[q].target, part);
                ptx::stmatrix_x4_transposed(quads[q].target < 0 ? ptx::shared_address(trash) : row, of_quad);
              };
              store(slot, matrices[q]);
              if constexpr (C::SPLIT) store(slot + low_parts, low[q]);
            }
          }
        } else {
          const PixelBlock block = block_table[part];
#pragma unroll
          for (int i = 0; i < kGroup / 2; ++i) {
            const int pixel = 2 * i + lane / 16;
            const float4 four = reinterpret_cast<const float4*>(shared + source)[pixel * (kRowChannels / 4) + lane % 16];
            uint2 packed, low;
            packed.x = pack(four.x, four.y, low.x), packed.y = pack(four.z, four.w, low.y);
            const auto store = [&](uint32_t parts, uint2 of_pixel) {
              const uint32_t address = swizzled(parts + (block.position + pixel) * kRowBytes, lane % 16 / 2) + lane % 2 * 8;
              if (pixel < block.end) *reinterpret_cast<uint2*>(shared + (address - base)) = of_pixel;
            };
            store(slot, packed);
            if constexpr (C::SPLIT) store(slot + low_parts, low);
          }
        }
      };

      // A unit is eight channels of one position in the slot.
      const int positions = plan.tile_images * plan.slot_rows * plan.pitch, units = positions * (plan.chunk / kGroup);
      const auto load_unit = [&](const Cursor& cursor, int unit, int row, Raw<T>(&values)[kGroup]) {
        const int group = unit / positions, position = unit % positions;
        const int line = divide(position, plan.pitch_inverse), image = divide(line, plan.rows_inverse);
        const int n = cursor.image() + image, x = cursor.x() + position - line * plan.pitch;
        const int y = cursor.y() - cursor.row + row + line - image * plan.slot_rows, channel = cursor.channel() + group * kGroup;
        const bool inside = unit < units && n < plan.images && static_cast<unsigned>(y) < static_cast<unsigned>(plan.input[0]) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(plan.input[1]);
        const int channels = inside ? plan.in_channels - channel : 0;
        const Raw<T>* source = input + n * plan.input_strides[0] + channel * plan.input_strides[1] +
                               y * plan.input_strides[2] + x * plan.input_strides[3];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          values[j] = j < channels ? __ldg(source) : Raw<T>(0);
          source += plan.input_strides[1];
        }
      };
      // Fills a slot through registers: with the window's row, or with a whole tile and its halo.
      const auto fill_slot = [&](const Cursor& cursor, uint32_t slot, int row) {
#pragma unroll 1
        for (int unit = thread; unit < units; unit += kInputThreads) {
          Raw<T> values[kGroup];
          load_unit(cursor, unit, row, values);
          uint32_t packed[kGroup / 2], low[kGroup / 2];
#pragma unroll
          for (int j = 0; j < kGroup / 2; ++j) {
            if constexpr (kScaled) {
              packed[j] = pack(values[2 * j], values[2 * j + 1], low[j]);
            } else {
              packed[j] = values[2 * j] | static_cast<uint32_t>(values[2 * j + 1]) << 16;
            }
          }
          const auto store = [&](uint32_t parts, const uint32_t(&of_unit)[kGroup / 2]) {
            const uint32_t address = swizzled(parts + unit % positions * kRowBytes, unit / positions);
            *reinterpret_cast<uint4*>(shared + (address - base)) = make_uint4(of_unit[0], of_unit[1], of_unit[2], of_unit[3]);
          };
          store(slot, packed);
          if constexpr (C::SPLIT) store(slot + low_parts, low);
        }
      };
      const auto slot_address = [&](const Ring& at) { return base + at.slot * plan.slot_bytes; };
      const auto publish = [&](const Ring& at, int change) {
        if (kScaled && thread == 0) exponents[at.slot] = zeros ? kExponentOfZeros : exponent, changes[at.slot] = change;
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(at.full());
      };
      const auto note_largest = [&](const Ring& at) {
        const uint32_t both = max(most & 0xffff, most >> 16), all = __reduce_max_sync(0xffffffffu, both);
        if (lane == 0) largest[at.slot][my_warp] = all;
        most = 0;
      };

      // No larger power of two exists than kLargestExponent's: accept that what is too small flushes to zero.
      const auto fits = [&](float most) {
        const float scaled = most * power_of_two(exponent);
        const float smallest = C::SPLIT ? kSmallSplitMaximum : kSmallMaximum;
        return (scaled >= smallest || exponent == kLargestExponent) && (C::SPLIT ? scaled < kLargestF16 : scaled <= kLargestF16);
      };
      int unpublished = 0;          // slots before input_ring's that are filled, but not yet handed over
      float largest_summed = 0.0f;  // of the chunks before this one
      // NOTE: a wait tells phases apart by their parity alone: it would take the phase after the next for this one. So a warp
      // has its shares at the same places each time round (places x units is a multiple of the warps), and sees every phase of
      // those.
      const int units_of_piece = plan.parts * plan.shares, units_of_slot = plan.pieces * units_of_piece;
      // NOTE: a division takes tens of instructions, and these warps' instructions are what limits the kernel.
      const auto part_of = [&](int unit) { return static_cast<int>(divide(2 * unit, plan.shares_inverse)); };
      Ring place = staging_ring;
      int unit_of_slot = my_warp, unit_of_piece = my_warp;
      for (Cursor cursor(plan, end_n - first_n); cursor.exists(); cursor.advance()) {
        input_ring.wait_empty();
        if (plan.bulk) {
          for (; unit_of_slot < units_of_slot; unit_of_slot += kInputWarps) {
            for (; unit_of_piece >= units_of_piece; unit_of_piece -= units_of_piece) place.advance();
            place.wait_full();
            const int part = part_of(unit_of_piece);
            const int source = staging_offset + place.slot * plan.piece_bytes + part * plan.part_bytes;
            convert(source, slot_address(input_ring), part_of(unit_of_slot), unit_of_piece - part * plan.shares);
            place.release();
            unit_of_piece += kInputWarps;
          }
          unit_of_slot -= units_of_slot;
        } else {
          fill_slot(cursor, slot_address(input_ring), cursor.row);
        }
        if constexpr (!kScaled) {
          publish(input_ring, 0);
          input_ring.advance();
        } else {
          note_largest(input_ring);
          input_ring.advance();
          ++unpublished;
          if (cursor.row + 1 < cursor.window()) continue;

          Ring next = input_ring - unpublished;
          if (cursor.load > 0) {
            // The first block of output channels has chosen the power of two.
            publish(next, 0);
            unpublished = 0;
            continue;
          }
          // All rows that a tile sums over are in their slots. Do they fit in float16?
          const int window = cursor.window(), kept = cursor.tile.kept();
          ptx::barrier_sync(1, kInputThreads);
          uint32_t bits = 0;
          for (int i = lane; i < window * kInputWarps; i += kWarpSize) {
            bits = max(bits, largest[(input_ring - (1 + i / kInputWarps)).slot][i % kInputWarps]);
          }
          bits = __reduce_max_sync(0xffffffffu, bits);
          float most_of_all = fmaxf(largest_summed, __half2float(__ushort_as_half(bits)) * power_of_two(-exponent));
          zeros = most_of_all == 0.0f;
          int change = 0;
          if (!fits(most_of_all)) {
            // Read again, leaving out infinities; then choose a power of two for all that is summed together.
            float finite_most = 0.0f;
            for (int row = 0; row < window; ++row) {
#pragma unroll 1
              for (int unit = thread; unit < units; unit += kInputThreads) {
                Raw<T> values[kGroup];
                load_unit(cursor, unit, row, values);
#pragma unroll
                for (float value : values) finite_most = fmaxf(finite_most, fabsf(value) < kInfinity<float> ? fabsf(value) : 0.0f);
              }
            }
            finite_most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(finite_most)));
            if (lane == 0) finite[my_warp] = finite_most;
            ptx::barrier_sync(1, kInputThreads);
            for (float of_warp : finite) finite_most = fmaxf(finite_most, of_warp);
            ptx::barrier_sync(1, kInputThreads);
            // Not zero, if only infinities are.
            most_of_all = fmaxf(largest_summed, bits != 0 ? fmaxf(finite_most, kSmallestNormal) : finite_most);
            zeros = most_of_all == 0.0f;
            if (!fits(most_of_all)) {
              const int before = exponent;
              exponent = even_exponent_for(most_of_all);
              if (plan.sliding) {
                // A new run of rows: those that the previous tile uses as well are brought again.
                for (int row = 0; row < window; ++row) {
                  if (row >= unpublished) next.wait_empty();
                  fill_slot(cursor, slot_address(next), row);
                  note_largest(next);
                  publish(next, row == 0 && kept > 0);
                  next.advance();
                }
                input_ring = next;
                unpublished = 0;
              } else {
                fill_slot(cursor, slot_address(next), 0);
                most = 0;  // known already, and no part of the next slot
                change = cursor.chunk > 0 ? exponent - before : 0;
              }
            }
          }
          largest_summed = cursor.chunk + 1 < plan.chunks ? most_of_all : 0.0f;
          for (; unpublished > 0; --unpublished) {
            publish(next, change);
            next.advance();
          }
        }
      }
    }
    return;
  }

  // ---- consumers: two warpgroups multiply ----
  ptx::more_registers<Roles<S, C::SPLIT>::kMathRegisters>();
  ptx::wait_for_previous_grid();
  const int warpgroup = warp / 4;
  const int window = plan.kept + plan.fresh;
  int oldest = 0;        // slot that this warpgroup has not released
  int to_release = 0;    // slots, as soon as the sums under way are complete
  int released = 0;      // slots of a strip's window
  int stages_begun = 0;  // unless the weights are resident
  // NOTE: a slot may be released unread once a later one was seen full: it was filled before.
  const auto release = [&](int slots) {
#pragma unroll 1
    for (; slots > 0; --slots) {
      Ring ring = input_ring;
      ring.slot = oldest;
      ring.release();
      if (++oldest == plan.slots) oldest = 0;
    }
  };

  // Where all output channels have the same power of two, as is usual, it joins the input's: one multiplication less.
  float common_factor = 0.0f;
  if constexpr (kScaled && C::OVERLAPS) {
    const float* const factors = constants + first_n * C::BLOCK_N * kConstants + C::BLOCK_N;
    bool same = true;
    for (int column = threadIdx.x % kWarpSize; column < C::BLOCK_N; column += kWarpSize) same &= factors[column] == factors[0];
    if (__all_sync(0xffffffffu, same)) common_factor = factors[0];
  }
  // How much a result must be to be beyond doubt, times what undoes the input's power of two.
  float least = 0.0f;
  if constexpr (kScaled) {
    for (int block_n = first_n; block_n < end_n; ++block_n) {
      const float* const sizes = constants + (static_cast<int64_t>(block_n) * kConstants + 3) * C::BLOCK_N;
      for (int column = threadIdx.x % kWarpSize; column < C::BLOCK_N; column += kWarpSize) least = fmaxf(least, sizes[column]);
    }
    least = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(least))) * window_plan.least;
    // Where weights are infinite, a NaN may come from what was no zero; where the scale is, a sign. Doubt all: nothing is enough.
    if (least == kInfinity<float>) least = __uint_as_float(0x7fffffffu);
  }
  // NOTE: tensor cores truncate their sums instead of rounding them, so errors grow with the number of products. Split: the
  // sums of each tap are added to `rounded`, outside the tensor cores.
  float rounded[C::SUBTILES][C::SPLIT ? C::BLOCK_N / 2 : 1];
  float low[C::SUBTILES][2];
  int winners[C::SUBTILES][2];  // only kWinners; counted from this thread's first channel of the latest block_n
  // What the epilogue needs to know of a tile, next to its sums.
  struct Done {
    int block_n, exponent, image, row, column;
  };
  const Results<T, C> results{plan, output, partial};

  // ---- epilogue: bias, scale and min, in the registers that have the sums ----
  const auto finish = [&](const float(&sums)[C::SUBTILES][C::BLOCK_N / 2], const Done& done) {
    if (C::OVERLAPS || done.block_n == first_n) {
#pragma unroll
      for (auto& two : low) two[0] = two[1] = kInfinity<float>;
#pragma unroll
      for (auto& two : winners) two[0] = two[1] = 0;
    } else if (kWinners) {
#pragma unroll
      for (auto& two : winners) two[0] -= C::BLOCK_N, two[1] -= C::BLOCK_N;
    }
    // NOTE: split, the thread's index is read anew: ptxas spills what it keeps through the main loop (nvcc 13.0).
    const int index = C::SPLIT ? ptx::thread_index() : threadIdx.x;
    const float4* const biases =
        reinterpret_cast<const float4*>(constants + static_cast<int64_t>(done.block_n) * (C::BLOCK_N * kConstants)) +
        index % 4;
    const float4 *const factors = biases + C::BLOCK_N / 4, *const own_factors = factors + C::BLOCK_N / 4;
    const float root = power_of_two(-done.exponent / 2);
    const float back = root * root, joined = common_factor * back;
    const auto take = [&](auto scale_first, auto joins) {
      constexpr bool kJoins = kScaled && decltype(joins)::value;
#pragma unroll
      for (int pair = 0; pair < C::BLOCK_N / 16; ++pair) {
        const float4 bias4 = biases[pair * 4], factor4 = kScaled && !(kJoins && C::OVERLAPS) ? factors[pair * 4] : bias4;
        const float bias[4] = {bias4.x, bias4.y, bias4.z, bias4.w};
        float factor[4] = {factor4.x, factor4.y, factor4.z, factor4.w};
        const float4 own4 = decltype(scale_first)::value ? own_factors[pair * 4] : bias4;
        const float own[4] = {own4.x, own4.y, own4.z, own4.w};
        if constexpr (kJoins && !C::OVERLAPS) {
#pragma unroll
          for (float& one : factor) one *= back;
        }
#pragma unroll
        for (int i = 0; i < C::SUBTILES; ++i) {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const float sum = sums[i][pair * 8 + k];
            const int column = k / 4 * 2 + k % 2;
            float value = sum + bias[column];
            if constexpr (kScaled) {
              value = !kJoins ? scale_back(sum, root, factor[column], bias[column])
                              : fmaf(sum, C::OVERLAPS ? joined : factor[column], bias[column]);
            }
            if (decltype(scale_first)::value) value *= own[column];
            take_smaller(low[i][k / 2 % 2], value, winners[i][k / 2 % 2], pair * 16 + k / 4 * 8 + k % 2);
          }
        }
      }
    };
    const bool joins = C::OVERLAPS ? fabsf(joined) >= kSmallestNormal && fabsf(joined) < kInfinity<float>
                                   : done.exponent >= -kMostJoined && done.exponent <= kMostJoined && !plan.scale_first;
    if (kScaled && joins) {
      take(std::false_type(), std::true_type());
    } else if (C::takes_scale_first(sizeof(T)) && plan.scale_first) {
      // A scale that makes NaN of some channels multiplies each by itself, and so does a channel's own factor.
      take(std::true_type(), std::false_type());
    } else {
      take(std::false_type(), std::false_type());
    }
    if (!C::OVERLAPS && done.block_n + 1 < end_n) return;

    float smallest_of_all = kInfinity<float>;
    // Four lanes share a pixel.
#pragma unroll
    for (int i = 0; i < C::SUBTILES; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float smallest = low[i][h];
        int winner = done.block_n * C::BLOCK_N + index % 4 * 2 + winners[i][h];
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) take_smaller_of_lanes(smallest, winner, distance);
        const OutputPixel pixel = results.pixel(done, warpgroup, index, i, h);
        if (index % 4 == 0 && results.exists(pixel)) {
          if (kScaled) smallest_of_all = fminf(smallest_of_all, fabsf(smallest));
          results.put(pixel, smallest, winner);
        }
      }
    }
    if (kScaled && !(smallest_of_all >= least * back)) {
      // NOTE: the thread's index is read anew: else the compiler prepares for this in every tile.
      const int warp = ptx::thread_index() / kWarpSize;
      doubt_of(done, warp).note(doubts_of(doubts, warp));
    }
  };

  // ---- main loop: one tile, one block of output channels ----
  // Issues the multiplications; the sums are complete only after wgmma_wait. `meanwhile` runs as soon as the tensor cores have
  // work and all earlier sums are complete. Gives the exponent of the input's power of two.
  const auto multiply = [&](float(&sums)[C::SUBTILES][C::BLOCK_N / 2], bool last_n, const auto& meanwhile) {
    const int step_a = kStepDepth * 2 >> 4, step_b = C::kStepBytes >> 4;
    const int tap_a = plan.dilation[1] * kRowBytes >> 4, tap_b = steps_per_tap * step_b;
    // Once a filter row's first multiplications are under way, all before them are done.
    const auto begin_filter_row = [&](int dy) {
      ptx::wgmma_wait<1>();
      if (plan.sliding && last_n) {
        // This tile's rows from here on, and the next one's, are still needed.
        const int unneeded = min(warpgroup * C::SUBTILES + dy * plan.dilation[0], plan.fresh);
        to_release += max(unneeded - released, 0);
        released = max(unneeded, released);
      }
      release(to_release);
      to_release = 0;
    };
    int add = 0, exponent = 0;
    if constexpr (C::SPLIT) {
#pragma unroll
      for (auto& of_subtile : rounded) {
#pragma unroll
        for (float& sum : of_subtile) sum = 0.0f;
      }
    }
    if (plan.resident) weight_ring.slot = weight_ring.phase = 0;  // their first phase is over for good
    const int chunks = C::OVERLAPS ? 1 : plan.chunks;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if constexpr (kScaled && !C::OVERLAPS) {
        if (chunk > 0) {
          input_ring.wait_full();
          ptx::wgmma_wait<0>();
          const int change = changes[input_ring.slot];
          if (change != 0) {
#pragma unroll
            for (auto& of_subtile : totals<C>(sums, rounded)) {
#pragma unroll
              for (float& sum : of_subtile) sum = sum * power_of_two(change / 2) * power_of_two(change - change / 2);
            }
          }
        }
      }
      int taps_left = 0;  // in the stage
      uint64_t b = 0;
#pragma unroll 1
      for (int dy = 0; dy < plan.kernel[0]; ++dy) {
        // Where the filter row's first tap has its input.
        uint64_t a[C::SUBTILES];
#pragma unroll
        for (int i = 0; i < C::SUBTILES; ++i) {
          const int subtile = warpgroup * C::SUBTILES + i;
          uint32_t start;
          if (plan.sliding) {
            const Ring row = input_ring + (subtile + dy * plan.dilation[0]);
            row.wait_full();
            start = row.slot * plan.slot_bytes;
          } else {
            if (dy == 0) input_ring.wait_full();
            start = input_ring.slot * plan.slot_bytes + plan.subtile_offset[subtile] + dy * plan.dilation[0] * plan.pitch * kRowBytes;
          }
          a[i] = ptx::descriptor(ptx::kSwizzledRows, base + start);
        }
        if constexpr (C::OVERLAPS) {
          if (taps_left == 0) {
            weight_ring.wait_full();
            b = ptx::descriptor(ptx::kCoreMatrices, stages + weight_ring.slot * stage_bytes);
            taps_left = plan.stage_taps;
            weight_ring.advance();
          }
          const auto multiply_taps = [&](int first, int end) {
            ptx::wgmma_fence();
#pragma unroll
            for (int i = first * kRowSteps; i < end * kRowSteps; ++i) {
              ptx::wgmma(sums[0], a[0] + i / kRowSteps * tap_a + i % kRowSteps * step_a, b + i * step_b, add, Operand<T>());
              add = 1;
            }
            ptx::wgmma_commit();
          };
          // Two taps keep the tensor cores busy while the epilogue of the tile before runs.
          // NOTE: up to 3 % faster than one or all three, and nowhere more than 0.5 % slower (on an H200).
          multiply_taps(0, C::kRowTaps - 1);
          begin_filter_row(dy);
          if (dy == 0) meanwhile();
          multiply_taps(C::kRowTaps - 1, C::kRowTaps);
          b += C::kRowTaps * tap_b;
          taps_left -= C::kRowTaps;
          continue;
        }
#pragma unroll 1
        for (int dx = 0; dx < plan.kernel[1]; ++dx) {
          const bool new_stage = taps_left == 0;
          if (new_stage) {
            weight_ring.wait_full();
            b = ptx::descriptor(ptx::kCoreMatrices, stages + weight_ring.slot * stage_bytes);
            taps_left = plan.stage_taps;
          }
          if constexpr (C::SPLIT) {
            // The low parts' products first, that a large sum would cut more from.
            const auto multiply_steps = [&](auto& to, int first, auto steps) {
              ptx::wgmma_fence();
#pragma unroll
              for (int i = 0; i < 3 * steps; ++i) {
                const int s = first + i % steps;
                const uint64_t part_a = a[0] + s * step_a + (i / steps == 1 ? low_parts >> 4 : 0);
                const uint64_t part_b = b + s * step_b + (i / steps == 0 ? C::kPartBytes >> 4 : 0);
                ptx::wgmma(to[0], part_a, part_b, i > 0, Operand<T>());
              }
              ptx::wgmma_commit();
            };
            const auto promote = [&] {
              ptx::wgmma_wait<0>();
#pragma unroll
              for (int j = 0; j < C::BLOCK_N / 2; ++j) rounded[0][j] += sums[0][j];
            };
            constexpr std::integral_constant<int, 1> kOne;
            constexpr std::integral_constant<int, 2> kTwo;
            if (plan.whole_taps && steps_per_tap == kRowSteps) {
              multiply_steps(sums, 0, std::integral_constant<int, kRowSteps>());
            } else if (plan.whole_taps) {
              multiply_steps(sums, 0, std::integral_constant<int, 3>());
            } else if (steps_per_tap > 2) {
              // Half a tap at a time. The first of all is summed where the others are added to.
              if (!add) multiply_steps(rounded, 0, kTwo);
              else multiply_steps(sums, 0, kTwo), promote();
              add = 1;
              if (steps_per_tap == kRowSteps) multiply_steps(sums, 2, kTwo);
              else multiply_steps(sums, 2, kOne);
            } else if (steps_per_tap == 2) {
              multiply_steps(sums, 0, kTwo);
            } else {
              multiply_steps(sums, 0, kOne);
            }
            b += tap_b;
            a[0] += tap_a;
            --taps_left;
            promote();
            if (new_stage) weight_ring.advance();
            const bool stage_ends = taps_left == 0 || (dy + 1 == plan.kernel[0] && dx + 1 == plan.kernel[1]);
            if (!plan.resident && stage_ends) (weight_ring - 1).release();
            if (dx == 0 && (plan.sliding || dy == 0)) begin_filter_row(dy);
            continue;
          }
          // NOTE: the commit stays next to its multiplications; in a basic block of its own, ptxas adds an empty one to carry
          // it.
          const auto step = [&](int s) {
#pragma unroll
            for (int i = 0; i < C::SUBTILES; ++i) ptx::wgmma(sums[i], a[i] + s * step_a, b + s * step_b, add, Operand<T>());
            add = 1;
          };
          if (steps_per_tap == kRowSteps) {
            ptx::wgmma_fence();
#pragma unroll
            for (int s = 0; s < kRowSteps; ++s) step(s);
            ptx::wgmma_commit();
          } else {
#pragma unroll 1
            for (int s = 0; s + 1 < steps_per_tap; ++s) {
              ptx::wgmma_fence();
              step(s);
            }
            ptx::wgmma_fence();
            step(steps_per_tap - 1);
            ptx::wgmma_commit();
          }
          b += tap_b;
#pragma unroll
          for (auto& of_subtile : a) of_subtile += tap_a;
          --taps_left;
          if (new_stage) {
            if (!plan.resident) {
              // All multiplications with the stage before this one are done.
              ptx::wgmma_wait<1>();
              if (stages_begun++ > 0) (weight_ring - 1).release();
            }
            weight_ring.advance();
          }
          if (dx == 0 && (plan.sliding || dy == 0)) begin_filter_row(dy);
        }
      }
      if constexpr (kScaled) {
        // From a slot that this warpgroup has seen full and still holds: a strip's earlier ones may be refilled already.
        const Ring held = input_ring + (plan.sliding ? warpgroup * C::SUBTILES + plan.kept : 0);
        exponent = uniform(exponents[held.slot]);
      }
      if (!plan.sliding && (chunks > 1 || last_n)) {
        input_ring.advance();
        to_release = 1;
      }
    }
    return exponent;
  };

  // ---- consumers: from tile to tile ----
  Tile tile(plan);
  while (tile.exists()) {
    // A run of tiles: a strip's, each of which keeps rows of the previous one; or any tiles, each with a halo of its own.
    // NOTE: the shuffles tell the compiler that all lanes go the same way; else it may make the rest ready for divergence.
    const int tiles_left = tile.end - tile.index;
    const int run = uniform(plan.sliding ? min(plan.tiles_down - tile.row, tiles_left) : tiles_left);
    released = 0;
    const auto begin_tile = [&](int t) {
      if (!plan.sliding || t == 0) return;
      input_ring = input_ring + plan.fresh;
      to_release = plan.fresh - released;
      released = 0;
      if constexpr (kScaled) {
        // Does another power of two begin here? Then the tile keeps none of the previous tile's rows.
        const Ring first_new = input_ring + plan.kept;
        first_new.wait_full();
        if (plan.kept > 0 && __any_sync(0xffffffffu, changes[first_new.slot] != 0)) {
          ptx::wgmma_wait<0>();
          const int held = first_new.slot - oldest;
          release(held < 0 ? held + plan.slots : held);
          input_ring = first_new;
          to_release = released = 0;
        }
      }
    };
    const auto place = [&](int block_n, int exponent) {
      const Done done{block_n, exponent, tile.image * plan.tile_images, tile.row * plan.tile_rows, tile.column * plan.tile_columns};
      return done;
    };

    float sums[C::SUBTILES][C::BLOCK_N / 2];
    if constexpr (!C::OVERLAPS) {
#pragma unroll 1
      for (int t = 0; t < run; ++t) {
        begin_tile(t);
#pragma unroll 1
        for (int block_n = first_n; block_n < end_n; ++block_n) {
          const int exponent = multiply(sums, block_n + 1 == end_n, [] {});
          ptx::wgmma_wait<0>();
          finish(totals<C>(sums, rounded), place(block_n, exponent));
        }
        tile.advance();
      }
    } else {
      // Two sets of sums: the epilogue of one tile runs while the tensor cores work on the next.
      float others[C::SUBTILES][C::BLOCK_N / 2];
      int exponent = multiply(sums, true, [] {});
      Done done = place(first_n, exponent);
#pragma unroll 1
      for (int t = 1;; t += 2) {
        tile.advance();
        if (t == run) {
          ptx::wgmma_wait<0>();
          finish(sums, done);
          break;
        }
        begin_tile(t);
        exponent = multiply(others, true, [&] { finish(sums, done); });
        done = place(first_n, exponent);
        tile.advance();
        if (t + 1 == run) {
          ptx::wgmma_wait<0>();
          finish(others, done);
          break;
        }
        begin_tile(t + 1);
        exponent = multiply(sums, true, [&] { finish(others, done); });
        done = place(first_n, exponent);
      }
    }
    if (plan.sliding) {
      // The producers may need these slots to begin the next strip.
      (input_ring + (window - 1)).wait_full();
      release(window - released);
      input_ring = input_ring + window;
    }
  }

  // ---- consumers: results with too few digits, again; each warp its own ----
  if constexpr (kScaled) {
    __syncwarp();
    const int warp = ptx::thread_index() / kWarpSize, lane = ptx::thread_index() % kWarpSize;
    const uint32_t* const mine = doubts_of(doubts, warp);
    if (!__any_sync(0xffffffffu, lane < kDoubts / 32 && mine[lane % (kDoubts / 32)] != 0)) return;
    make_again<C>(plan, window_plan, mine);
  }
}

}  // namespace fused_kernels::wgmma
