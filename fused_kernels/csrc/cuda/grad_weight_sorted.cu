// grad_weight_sorted: pixels sorted by their winners, so that tensor cores can sum the gradients of the weights.
//
// A tile's output pixels are put in lists, one for each eight output channels; sixteen pixels of a list are a step. At a tap
//   operand A   the inputs that the filter lay on: 16 input channels by 16 pixels, gathered by ldmatrix from the tile's input
//   operand B   the pixels' gradients, each in its winner's column of eight
//   result      16 input channels by 8 output channels, added to sums that stay in registers from the first tile to the last
// A multiprocessor's registers have the sums of 32 input channels, 9 taps and 128 output channels: 144 KiB. A warp has a tap, and
// walks through all the lists, whichever channels win: however skewed the winners are, all warps do the same work.
//   sort_kernel     one block a tile: the lists; and the tile's part of the bias's gradient, in float32
//   sum_kernel      warps of two kinds: three bring the input of the next tile, nine multiply
//   reduce_kernel   adds what the blocks found
// Every sum has one owner and one order: the same bits every time.
// NOTE: ldmatrix reads eight rows at once, and rows at the same place modulo 8 are in the same banks. So a step's pixels are dealt
// out by their place: the first eight have all eight places, as far as there are such pixels, and so do the second eight.
// float32 is multiplied as float16, times powers of two that a tile's largest values ask for.
// Limit: shared memory, 128 bytes a clock.
// Previous rung: grad_weight_private.

#include "gradients.h"
#include "implicit_gemm.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"

namespace fused_kernels {

constexpr int kColumns = 8, kStep = 16;               // output channels of a list, pixels of a step
constexpr int kLists = 16;                             // of a block that sums
constexpr int kChunk = 32, kPixelBytes = kChunk * 2 + 16;  // input channels; padded so that places modulo 8 are different banks
constexpr int kPlaces = 8;
constexpr int kMostTaps = 9, kInputWarps = 3, kSumThreads = (kMostTaps + kInputWarps) * kWarpSize;
constexpr int kInputThreads = kInputWarps * kWarpSize;
constexpr int kMostPixels = 1024, kMostHalo = 4096;  // of a tile, and of its input
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarpSize;
constexpr int kStages = 2;
constexpr int kUnitsInFlight = 8;                    // of a thread that brings input, 8 channels of a pixel each

// An entry: a gradient of 16 bits, its winner's column, and where its input begins in the tile's.
constexpr int kColumnShift = 12;

struct Plan {
  int images, input[2], output[2], padding[2], stride[2], dilation[2], kernel[2], taps;
  int64_t input_strides[4], grad_strides[4];
  int in_channels, out_channels;
  int tile[2], halo[2], tiles_across[2], tiles;
  int lists, capacity;                 // of a tile: lists, entries
  int chunks, ranges, slices;          // of input channels, output channels, tiles
  int tap_offset[kMostTaps];           // in pixels of the halo
  uint32_t width_inverse, pixels_inverse;  // 2^32 / its width and / its pixels, rounded up
  bool dense_channels;                 // the input's channels side by side and aligned
};

struct Place {
  int image, row, column;  // of a tile's first output pixel
};

__device__ __forceinline__ Place place_of(const Plan& plan, int tile) {
  // Rows inside columns inside images: a tile's halo meets the next one's in the cache.
  return {tile / plan.tiles_across[0] / plan.tiles_across[1], tile % plan.tiles_across[0] * plan.tile[0],
          tile / plan.tiles_across[0] % plan.tiles_across[1] * plan.tile[1]};
}

// A sum of products with other powers of two is multiplied by their quotient, but by no more than this on the way up: where small
// values follow large ones they are multiplied by less.
constexpr int kMostRise = 48;
constexpr int kNoExponent = INT32_MAX;  // of a tile all zeros

// For the largest of a tile's values; in steps of eight, so that most tiles have the same one: the largest value is at least 64 still.
__device__ __forceinline__ int common_exponent(float largest) {
  const int exponent = exponent_for(largest);
  return exponent < kLargestExponent / 8 * 8 ? exponent & ~7 : exponent;
}

__device__ __forceinline__ float finite_magnitude(float value) { return fabsf(value) < kInfinity<float> ? fabsf(value) : 0.0f; }

// Lists: [tile][entry]. Where each list begins, in steps: [tile][list], one more for the end. Sums for the bias: [tile][channel].
template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const T* grad, Winners winners, uint32_t* entries, uint16_t* begins, int* exponents, float* bias_parts,
                const __grid_constant__ Plan plan) {
  constexpr int kRounds = kMostPixels / kSortThreads;
  extern __shared__ __align__(128) char shared[];
  const int bins = plan.lists * kPlaces;
  float* const sorted = reinterpret_cast<float*>(shared);                           // gradients
  uint32_t* const sorted_entries = reinterpret_cast<uint32_t*>(sorted + plan.capacity);
  int* const in_bin = reinterpret_cast<int*>(sorted_entries + plan.capacity);          // how many
  int* const spare = in_bin + bins;                                                 // where a bin's surplus begins among the list's
  int* const first_round = spare + bins;                                            // a list's, in eights
  uint16_t* const before = reinterpret_cast<uint16_t*>(first_round + plan.lists + 1);  // [warp][bin]
  __shared__ uint32_t largest;

  for (int i = threadIdx.x; i < plan.capacity; i += kSortThreads) sorted[i] = 0.0f, sorted_entries[i] = 0;
  for (int i = threadIdx.x; i < kSortWarps * bins; i += kSortThreads) before[i] = 0;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();

  // Each warp has a run of pixels, and counts those of a bin before each of them.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Place tile = place_of(plan, blockIdx.x);
  const int pixels = plan.tile[0] * plan.tile[1];
  float gradients[kRounds];
  int bin_of[kRounds], rank[kRounds], place[kRounds], column[kRounds];
  float most = 0.0f;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const int pixel = (warp * kRounds + k) * kWarpSize + lane;
    const int row = pixel / plan.tile[1], x = pixel % plan.tile[1];
    bin_of[k] = -1;
    if (pixel < pixels && tile.row + row < plan.output[0] && tile.column + x < plan.output[1]) {
      const int64_t at = (static_cast<int64_t>(tile.image) * plan.output[0] + tile.row + row) * plan.output[1] + tile.column + x;
      const int winner = winners[at];
      gradients[k] = static_cast<float>(grad[tile.image * plan.grad_strides[0] + (tile.row + row) * plan.grad_strides[2] +
                                            (tile.column + x) * plan.grad_strides[3]]);
      place[k] = row * plan.stride[0] * plan.halo[1] + x * plan.stride[1];
      column[k] = winner % kColumns;
      bin_of[k] = winner / kColumns * kPlaces + place[k] % kPlaces;
      most = fmaxf(most, finite_magnitude(gradients[k]));
    }
  }
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    const unsigned same = __match_any_sync(0xffffffffu, bin_of[k]);
    uint16_t* const count = before + warp * bins + bin_of[k];
    if (bin_of[k] >= 0) rank[k] = *count + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (bin_of[k] >= 0 && (same >> lane) == 1) *count += __popc(same);
    __syncwarp();
  }
  const uint32_t of_warp = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
  if (lane == 0) atomicMax(&largest, of_warp);
  __syncthreads();

  for (int bin = threadIdx.x; bin < bins; bin += kSortThreads) {
    int sum = 0;
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = before[w * bins + bin];
      before[w * bins + bin] = static_cast<uint16_t>(sum);
      sum += count;
    }
    in_bin[bin] = sum;
  }
  __syncthreads();
  // A list's rounds of eight, an even number: each round has a slot for each place.
  for (int list = threadIdx.x; list < plan.lists; list += kSortThreads) {
    int count = 0;
    for (int p = 0; p < kPlaces; ++p) count += in_bin[list * kPlaces + p];
    const int rounds = (count + kStep - 1) / kStep * 2;
    int surplus = 0;
    for (int p = 0; p < kPlaces; ++p) {
      spare[list * kPlaces + p] = surplus;
      surplus += max(in_bin[list * kPlaces + p] - rounds, 0);
    }
    first_round[list + 1] = rounds;
  }
  __syncthreads();
  if (warp == 0) {
    int total = 0;
    for (int first = 0; first < plan.lists; first += kWarpSize) {
      const int list = first + lane;
      int sum = list < plan.lists ? first_round[list + 1] : 0;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (list < plan.lists) first_round[list + 1] = total + sum;
      total += __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
    }
    if (lane == 0) first_round[0] = 0;
  }
  __syncthreads();

  const int exponent = sizeof(T) == 4 ? common_exponent(__uint_as_float(largest)) : 0;
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    if (bin_of[k] < 0) continue;
    const int bin = bin_of[k], list = bin / kPlaces, first = first_round[list], rounds = first_round[list + 1] - first;
    int round = before[warp * bins + bin] + rank[k], slot = bin % kPlaces;
    if (round >= rounds) {
      // More than there are rounds: into what the other places leave free.
      int free = spare[bin] + round - rounds;
      for (slot = 0;; ++slot) {
        const int room = max(rounds - in_bin[list * kPlaces + slot], 0);
        if (free < room) break;
        free -= room;
      }
      round = in_bin[list * kPlaces + slot] + free;
    }
    const int at = (first + round) * kPlaces + slot;
    uint32_t bits;
    if constexpr (sizeof(T) == 4) {
      bits = ptx::pack_f16(0.0f, gradients[k] * power_of_two(exponent));
    } else {
      const T rounded = static_cast<T>(gradients[k]);
      bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(rounded)) << 16;
    }
    sorted[at] = gradients[k];
    sorted_entries[at] = bits | column[k] << kColumnShift | place[k];
  }
  __syncthreads();

  const int count = first_round[plan.lists] * kPlaces;
  uint4* const target = reinterpret_cast<uint4*>(entries + static_cast<int64_t>(blockIdx.x) * plan.capacity);
  for (int i = threadIdx.x; i < count / 4; i += kSortThreads) target[i] = reinterpret_cast<const uint4*>(sorted_entries)[i];
  for (int list = threadIdx.x; list <= plan.lists; list += kSortThreads) {
    begins[static_cast<int64_t>(blockIdx.x) * (plan.lists + 1) + list] = static_cast<uint16_t>(first_round[list] / 2);
  }
  if (threadIdx.x == 0) exponents[blockIdx.x] = largest > 0 ? exponent : kNoExponent;
  // The bias: of a list's eight columns four lanes each sum a quarter.
  for (int list = warp; list < plan.lists; list += kSortWarps) {
    const int end = first_round[list + 1] * kPlaces;
    float sum = 0.0f;
    for (int i = first_round[list] * kPlaces + lane / kColumns; i < end; i += kWarpSize / kColumns) {
      if ((sorted_entries[i] >> kColumnShift) % kColumns == lane % kColumns) sum += sorted[i];
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    const int channel = list * kColumns + lane;
    if (lane < kColumns && channel < plan.out_channels) {
      bias_parts[static_cast<int64_t>(blockIdx.x) * plan.out_channels + channel] = sum;
    }
  }
}

// A stage's barriers: one says that it is full, one that it is empty again.
struct Stage {
  int index, phase;

  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// Brings a tile's input: [pixel][channel], in 16 bits, zeros in the padding. Gives the largest magnitude that it saw.
template <typename T>
__device__ __forceinline__ float bring_input(const T* input, const Plan& plan, const Place& tile, int first_channel, int thread,
                                             float factor, char* target) {
  constexpr int kGroups = kChunk / 8;
  const int top = tile.row * plan.stride[0] - plan.padding[0], left = tile.column * plan.stride[1] - plan.padding[1];
  const int units = plan.halo[0] * plan.halo[1] * kGroups, pixels = plan.halo[0] * plan.halo[1];
  const T* const image = input + tile.image * plan.input_strides[0] + first_channel * plan.input_strides[1];
  const int channels = min(plan.in_channels - first_channel, kChunk);
  float most = 0.0f;
#pragma unroll 1
  for (int first = thread; first < units; first += kInputThreads * kUnitsInFlight) {
    Raw<T> values[kUnitsInFlight][8];
    int targets[kUnitsInFlight];
#pragma unroll
    for (int k = 0; k < kUnitsInFlight; ++k) {
      // Neighbouring threads have neighbouring pixels, or groups of channels.
      const int unit = first + k * kInputThreads;
      const int group = plan.dense_channels ? unit % kGroups : __umulhi(unit, plan.pixels_inverse);
      const int pixel = plan.dense_channels ? unit / kGroups : unit - group * pixels;
      const int row = __umulhi(pixel, plan.width_inverse), column = pixel - row * plan.halo[1];
      const int y = top + row, x = left + column;
      targets[k] = unit < units ? pixel * kPixelBytes + group * 16 : -1;
      const bool inside = unit < units && static_cast<unsigned>(y) < static_cast<unsigned>(plan.input[0]) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(plan.input[1]);
      const int count = inside ? channels - group * 8 : 0;
      const T* const source = image + y * plan.input_strides[2] + x * plan.input_strides[3] + group * 8 * plan.input_strides[1];
      if (plan.dense_channels) {
        constexpr int kVector = 16 / sizeof(T);
#pragma unroll
        for (int v = 0; v < 8; v += kVector) {
          uint4 loaded = make_uint4(0, 0, 0, 0);
          if (count > v) loaded = __ldg(reinterpret_cast<const uint4*>(source + v));
          *reinterpret_cast<uint4*>(values[k] + v) = loaded;
        }
      } else {
        const Raw<T>* from = reinterpret_cast<const Raw<T>*>(source);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          values[k][c] = c < count ? __ldg(from) : Raw<T>(0);
          from += plan.input_strides[1];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kUnitsInFlight; ++k) {
      uint32_t packed[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const auto low = values[k][2 * c], high = values[k][2 * c + 1];
        if constexpr (sizeof(T) == 4) {
          most = fmaxf(most, fmaxf(finite_magnitude(low), finite_magnitude(high)));
          packed[c] = ptx::pack_f16(low * factor, high * factor);
        } else {
          packed[c] = low | static_cast<uint32_t>(high) << 16;
        }
      }
      if (targets[k] >= 0) *reinterpret_cast<uint4*>(target + targets[k]) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
  return most;
}

// Two entries as two neighbours of operand B: their gradients where the column is this lane's, else zero.
template <typename T>
__device__ __forceinline__ uint32_t operand_b(uint2 two, __half2 column, __half2 factor) {
  uint32_t gradients = __byte_perm(two.x, two.y, 0x7632);
  if constexpr (sizeof(T) == 4) {
    const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(gradients), factor);
    gradients = reinterpret_cast<const uint32_t&>(scaled);
  }
  const uint32_t columns = __byte_perm(two.x, two.y, 0x5410) & (kColumns - 1) * (0x10001u << kColumnShift);
  return gradients & __heq2_mask(reinterpret_cast<const __half2&>(columns), column);
}

// Partial sums: [slice][tap][output channel][input channel].
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 1)
    sum_kernel(const T* input, const uint32_t* entries, const uint16_t* begins, const int* exponents, float* partial,
               const __grid_constant__ Plan plan) {
  extern __shared__ __align__(128) char shared[];
  const int input_bytes = plan.halo[0] * plan.halo[1] * kPixelBytes, stage_bytes = input_bytes + plan.capacity * 4;
  __shared__ uint16_t list_begins[kStages][kLists + 1];
  __shared__ int stage_exponents[kStages];
  __shared__ __half2 stage_factors[kStages];  // for gradients that are to be multiplied by less
  __shared__ uint32_t largest[2];
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t first_barrier = ptx::shared_address(barriers);
  const auto full = [&](const Stage& s) { return first_barrier + s.index * 16; };
  const auto empty = [&](const Stage& s) { return first_barrier + s.index * 16 + 8; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(first_barrier + s * 16, kInputThreads);
      ptx::mbarrier_init(first_barrier + s * 16 + 8, plan.taps * kWarpSize);
    }
    ptx::mbarrier_init_fence();
    largest[0] = largest[1] = 0;
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int chunk = blockIdx.x % plan.chunks, range = blockIdx.x / plan.chunks % plan.ranges;
  const int slice = blockIdx.x / plan.chunks / plan.ranges;
  const int begin = static_cast<int>(static_cast<int64_t>(plan.tiles) * slice / plan.slices);
  const int end = static_cast<int>(static_cast<int64_t>(plan.tiles) * (slice + 1) / plan.slices);
  const int first_list = range * kLists, lists = min(plan.lists - first_list, kLists);
  Stage stage{0, 0};

  if (warp >= kMostTaps) {
    const int thread = threadIdx.x - kMostTaps * kWarpSize;
    int exponent = sizeof(T) == 4 ? 8 : 0, turn = 0, least = 4 * kLargestExponent, total = 0;
    for (int tile = begin; tile < end; ++tile) {
      char* const target = shared + stage.index * stage_bytes;
      const uint16_t* const tile_begins = begins + static_cast<int64_t>(tile) * (plan.lists + 1) + first_list;
      const int first = tile_begins[0] * kStep, count = tile_begins[lists] * kStep - first;
      const uint32_t* const source = entries + static_cast<int64_t>(tile) * plan.capacity + first;
      ptx::mbarrier_wait(empty(stage), stage.phase ^ 1);
      const uint32_t list_target = ptx::shared_address(target + input_bytes);
      for (int i = thread * 4; i < count; i += kInputThreads * 4) ptx::cp_async_16(list_target + i * 4, source + i, true);
      if (thread <= kLists) list_begins[stage.index][thread] = static_cast<uint16_t>(tile_begins[min(thread, lists)] - tile_begins[0]);
      const Place place = place_of(plan, tile);
      float most = bring_input(input, plan, place, chunk * kChunk, thread, power_of_two(exponent), target);
      if constexpr (sizeof(T) == 4) {
        // The power of two was a guess, the last tile's; where it was wrong, again.
        const uint32_t of_warp = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
        if (lane == 0) atomicMax(&largest[turn], of_warp);
        ptx::barrier_sync(1, kInputThreads);
        most = __uint_as_float(largest[turn]);
        turn ^= 1;
        if (thread == 0) largest[turn] = 0;
        const int wanted = common_exponent(most);
        if (most > 0.0f && wanted != exponent) {
          exponent = wanted;
          bring_input(input, plan, place, chunk * kChunk, thread, power_of_two(exponent), target);
        }
        ptx::barrier_sync(1, kInputThreads);
      }
      if (sizeof(T) == 4 && thread == 0) {
        int excess = 0;
        if (const int of_gradients = exponents[tile]; of_gradients != kNoExponent && most > 0.0f) {
          total = exponent + of_gradients;
          least = min(least, total);
          excess = max(total - least - kMostRise, 0);
          total -= excess;
        }
        stage_exponents[stage.index] = total;
        stage_factors[stage.index] = __float2half2_rn(power_of_two(-min(excess, kLargestExponent)));
      }
      ptx::cp_async_wait_all();
      ptx::mbarrier_arrive(full(stage));
      stage.advance();
    }
    return;
  }
  if (warp >= plan.taps) return;

  // A warp that multiplies: a tap.
  float sums[kLists][kChunk / 16][4] = {};
  int exponent = 0;
  const uint32_t n = lane / 4 << kColumnShift, both = n * 0x10001u;
  const __half2 column = reinterpret_cast<const __half2&>(both);
  const int slot = lane % 8 + lane / 16 * 8;  // the pixel whose row this lane names
  const uint32_t shift = plan.tap_offset[warp] * kPixelBytes + lane / 8 % 2 * 16;
  for (int tile = begin; tile < end; ++tile) {
    const char* const inputs = shared + stage.index * stage_bytes;
    const uint32_t* const list = reinterpret_cast<const uint32_t*>(inputs + input_bytes);
    const uint32_t first_row = ptx::shared_address(inputs) + shift;
    ptx::mbarrier_wait(full(stage), stage.phase);
    const int change = sizeof(T) == 4 ? stage_exponents[stage.index] - exponent : 0;
    const __half2 factor = stage_factors[stage.index];
    if (change != 0) {
      exponent += change;
#pragma unroll
      for (auto& of_list : sums) {
#pragma unroll
        for (auto& of_matrix : of_list) {
#pragma unroll
          for (float& sum : of_matrix) sum = sum * power_of_two(change / 2) * power_of_two(change - change / 2);
        }
      }
    }
    const uint16_t* const ends = list_begins[stage.index] + 1;
    const uint32_t* at = list;
    // A step ahead: past the last there is still shared memory.
    uint32_t mine = at[slot];
    uint2 low = *reinterpret_cast<const uint2*>(at + lane % 4 * 2), high = *reinterpret_cast<const uint2*>(at + lane % 4 * 2 + 8);
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const uint32_t* const list_end = list + ends[i] * kStep;
#pragma unroll 1
      while (at < list_end) {
        const uint32_t row = first_row + (mine & ((1 << kColumnShift) - 1)) * kPixelBytes;
        const uint32_t b0 = operand_b<T>(low, column, factor), b1 = operand_b<T>(high, column, factor);
        at += kStep;
        mine = at[slot];
        low = *reinterpret_cast<const uint2*>(at + lane % 4 * 2), high = *reinterpret_cast<const uint2*>(at + lane % 4 * 2 + 8);
#pragma unroll
        for (int m = 0; m < kChunk / 16; ++m) {
          uint32_t a[4];
          ptx::ldmatrix_x4_transposed(a, row + m * 32);
          ptx::mma_m16n8k16(sums[i][m], a, b0, b1, Operand<T>());
        }
      }
    }
    ptx::mbarrier_arrive(empty(stage));
    stage.advance();
  }

  const float back = power_of_two(-exponent / 2), rest = power_of_two(-(exponent - exponent / 2));
  const int padded = plan.chunks * kChunk;
  float* const target = partial + (static_cast<int64_t>(slice) * plan.taps + warp) * plan.out_channels * padded + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
#pragma unroll
    for (int m = 0; m < kChunk / 16; ++m) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int output = (first_list + i) * kColumns + lane % 4 * 2 + k % 2, channel = m * 16 + lane / 4 + k / 2 * 8;
        if (output < plan.out_channels) target[static_cast<int64_t>(output) * padded + channel] = sums[i][m][k] * back * rest;
      }
    }
  }
}

// A thread adds an element's slices.
template <typename T>
__global__ void __launch_bounds__(256)
    reduce_kernel(const float* partial, float scale, T* grad_weight, const __grid_constant__ Plan plan) {
  const int padded = plan.chunks * kChunk;
  const int64_t count = static_cast<int64_t>(plan.taps) * plan.out_channels * padded;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int channel = i % padded;
  if (i >= count || channel >= plan.in_channels) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int slice = 0; slice < plan.slices; ++slice) sum += partial[slice * count + i];
  const int64_t output = i / padded % plan.out_channels, tap = i / padded / plan.out_channels;
  grad_weight[(output * plan.in_channels + channel) * plan.taps + tap] = static_cast<T>(sum * scale);
}

// A block adds an output channel's tiles: short sums, then sums of those.
template <typename T>
__global__ void __launch_bounds__(256) reduce_bias_kernel(const float* parts, float scale, T* grad_bias, int tiles, int channels) {
  __shared__ float of_warps[256 / kWarpSize];
  float sum = 0.0f;
  for (int tile = threadIdx.x; tile < tiles; tile += 256) sum += parts[static_cast<int64_t>(tile) * channels + blockIdx.x];
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0.0f;
  for (float of_warp : of_warps) sum += of_warp;
  grad_bias[blockIdx.x] = static_cast<T>(sum * scale);
}

// Cuts the work; false where no tile's input fits in shared memory.
bool lay_out(Plan& plan, int most, int& shared_bytes) {
  plan.lists = static_cast<int>(ceil_div(plan.out_channels, kColumns));
  for (int width = std::min(64, plan.output[1]), height = 16; height >= 2; height /= 2) {
    plan.tile[1] = width;
    plan.tile[0] = std::min({height * 64 / width, kMostPixels / width, plan.output[0]});
    for (int axis = 0; axis < 2; ++axis) {
      plan.halo[axis] = (plan.tile[axis] - 1) * plan.stride[axis] + (plan.kernel[axis] - 1) * plan.dilation[axis] + 1;
    }
    plan.halo[1] = std::max(plan.halo[1], 2);  // for the inverse
    plan.capacity = (plan.tile[0] * plan.tile[1] / kStep + 1 + plan.lists) * kStep;
    const int64_t halo = static_cast<int64_t>(plan.halo[0]) * plan.halo[1];
    // A step past the lists' end is read, and not used.
    const int64_t bytes = kStages * (halo * kPixelBytes + plan.capacity * int64_t{4}) + kStep * 4;
    if (halo > kMostHalo || bytes > most) continue;
    shared_bytes = static_cast<int>(bytes);
    return true;
  }
  return false;
}

std::tuple<Tensor, Tensor> grad_weight_sorted(const Tensor& grad, const Tensor& winners, const Tensor& input, double scale,
                                              int64_t out_channels, std::vector<int64_t> kernel_size,
                                              std::vector<int64_t> stride, std::vector<int64_t> padding,
                                              std::vector<int64_t> dilation, int64_t groups, std::string precision) {
  using torch::headeronly::ScalarType;
  const ConvShape shape = check_grad_weight(grad, winners, input, out_channels, kernel_size, stride, padding, dilation, groups);
  STD_TORCH_CHECK(groups == 1, "groups: grad_weight_sorted expected 1, got ", groups);
  STD_TORCH_CHECK(input.scalar_type() != ScalarType::Double, "input: grad_weight_sorted does not take float64");
  STD_TORCH_CHECK(input.scalar_type() != ScalarType::Float || precision == "tf32",
                  "precision: grad_weight_sorted expected tf32 for float32, got ", precision);
  STD_TORCH_CHECK(shape.taps() <= kMostTaps, "kernel_size: grad_weight_sorted expected at most ", kMostTaps, " filter taps");
  const int64_t most = std::max({shape.images, shape.in_channels, shape.input[0], shape.input[1], shape.padding[0],
                                 shape.padding[1], shape.kernel[0] * shape.dilation[0], shape.kernel[1] * shape.dilation[1]});
  STD_TORCH_CHECK(most < 1 << 28 && out_channels <= 4096,
                  "input: grad_weight_sorted expected sizes below 2^28 and at most 4096 output channels");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Tensor grad_weight = torch::stable::new_empty(input, {out_channels, shape.in_channels, shape.kernel[0], shape.kernel[1]});
  Tensor grad_bias = torch::stable::new_empty(input, {out_channels});

  Plan plan{};
  plan.images = static_cast<int>(shape.images), plan.taps = static_cast<int>(shape.taps());
  plan.in_channels = static_cast<int>(shape.in_channels), plan.out_channels = static_cast<int>(out_channels);
  for (int axis = 0; axis < 2; ++axis) {
    plan.input[axis] = static_cast<int>(shape.input[axis]);
    plan.output[axis] = static_cast<int>(shape.output[axis]);
    plan.kernel[axis] = static_cast<int>(shape.kernel[axis]);
    plan.padding[axis] = static_cast<int>(shape.padding[axis]);
    plan.stride[axis] = static_cast<int>(shape.stride[axis]);
    plan.dilation[axis] = static_cast<int>(shape.dilation[axis]);
  }
  plan.dense_channels = shape.input_strides[1] == 1 && shape.in_channels % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 == 0;
  for (int d = 0; d < 4; ++d) {
    plan.grad_strides[d] = grad.stride(d);
    plan.input_strides[d] = shape.input_strides[d];
    if (d != 1 && shape.input_strides[d] % 8 != 0) plan.dense_channels = false;
  }
  const int device = input.get_device_index();
  int shared_bytes = 0;
  const int available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - 1024;
  STD_TORCH_CHECK(shape.pixels() == 0 || lay_out(plan, available, shared_bytes),
                  "input: grad_weight_sorted expected a tile's input to fit in shared memory");
  if (shape.pixels() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_weight, grad_bias};
  }
  for (int axis = 0; axis < 2; ++axis) plan.tiles_across[axis] = static_cast<int>(ceil_div(plan.output[axis], plan.tile[axis]));
  const int64_t tiles = shape.images * plan.tiles_across[0] * plan.tiles_across[1];
  STD_TORCH_CHECK(tiles < INT32_MAX / 2, "grad: grad_weight_sorted expected fewer tiles, got ", tiles);
  plan.tiles = static_cast<int>(tiles);
  plan.width_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / plan.halo[1] + 1);
  plan.pixels_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / (plan.halo[0] * plan.halo[1]) + 1);
  plan.chunks = static_cast<int>(ceil_div(plan.in_channels, kChunk));
  plan.ranges = static_cast<int>(ceil_div(plan.lists, kLists));
  plan.slices = std::clamp(multiprocessors(device) / (plan.chunks * plan.ranges), 1, plan.tiles);
  for (int tap = 0; tap < plan.taps; ++tap) {
    plan.tap_offset[tap] = tap / plan.kernel[1] * plan.dilation[0] * plan.halo[1] + tap % plan.kernel[1] * plan.dilation[1];
  }

  // Workspace, all parts multiples of 16 bytes.
  const auto rounded = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  const int64_t sums = static_cast<int64_t>(plan.taps) * out_channels * plan.chunks * kChunk;
  const int64_t sizes[] = {rounded(tiles * plan.capacity * 4), rounded(tiles * (plan.lists + 1) * 2), rounded(tiles * 4),
                           rounded(tiles * out_channels * 4), rounded(plan.slices * sums * 4)};
  int64_t bytes = 0;
  for (int64_t size : sizes) bytes += size;
  const Tensor memory = torch::stable::new_empty(input, {bytes}, ScalarType::Byte);
  char* next = static_cast<char*>(memory.data_ptr());
  char* parts[5];
  for (int i = 0; i < 5; ++i) parts[i] = next, next += sizes[i];
  const auto entries = reinterpret_cast<uint32_t*>(parts[0]);
  const auto begins = reinterpret_cast<uint16_t*>(parts[1]);
  const auto exponents = reinterpret_cast<int*>(parts[2]);
  const auto bias_parts = reinterpret_cast<float*>(parts[3]), partial = reinterpret_cast<float*>(parts[4]);

  const cudaStream_t stream = current_stream(input);
  const int bins = plan.lists * kPlaces;
  const int sort_bytes = plan.capacity * 8 + bins * 8 + (plan.lists + 1) * 4 + kSortWarps * bins * 2;
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 4) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(sort_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sort_bytes));
      sort_kernel<T><<<plan.tiles, kSortThreads, sort_bytes, stream>>>(static_cast<const T*>(grad.data_ptr()), winners_in(winners),
                                                                      entries, begins, exponents, bias_parts, plan);
      STD_CUDA_CHECK(cudaFuncSetAttribute(sum_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
      sum_kernel<T><<<plan.chunks * plan.ranges * plan.slices, kSumThreads, shared_bytes, stream>>>(
          static_cast<const T*>(input.data_ptr()), entries, begins, exponents, partial, plan);
      reduce_kernel<T><<<grid_size(ceil_div(sums, 256)), 256, 0, stream>>>(partial, static_cast<float>(scale),
                                                                          static_cast<T*>(grad_weight.data_ptr()), plan);
      reduce_bias_kernel<T><<<grid_size(out_channels), 256, 0, stream>>>(bias_parts, static_cast<float>(scale),
                                                                        static_cast<T*>(grad_bias.data_ptr()), plan.tiles,
                                                                        plan.out_channels);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl("grad_weight_sorted", TORCH_BOX(&grad_weight_sorted)); }

}  // namespace fused_kernels
