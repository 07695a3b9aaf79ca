// grad_weight_sorted: pixels sorted by their winners, so that tensor cores can sum the gradients of the weights.
//
// A tile's output pixels are sorted into lists, one for every eight output channels; sixteen pixels of a list are a step. At a
// tap
//   operand A   the inputs under the filter: 16 input channels by 16 pixels, gathered by ldmatrix from the input tile (the tile
//               with its halo, the margin that the filter reaches into)
//   operand B   the pixels' gradients, each in its winner's column of eight
//   result      16 input channels by 8 output channels, added to sums that stay in registers from the first tile to the last
// A multiprocessor's registers have the sums of 16 or 32 input channels, 9 taps and 128 output channels: 72 or 144 KiB. Each
// consumer warp has one tap and walks through all the lists, whichever channels win: however skewed the winners are, all do the
// same work.
//   sort_kernel     one block per tile: the lists, and the tile's part of the bias's gradient
//   sum_kernel      a persistent grid with warp specialization: producers bring the input tile of the next tile, nine consumers
//                   multiply
//   reduce_kernel   adds the blocks' sums
// Every sum has one owner and one order: the same bits every time.
// NOTE: ldmatrix reads eight rows at once, and rows at the same place modulo 8 are in the same banks. So a step's pixels are
// chosen by their place: the first eight have all eight places, as far as there are such pixels, and so do the second eight.
// float32 is multiplied as float16, times powers of two that the largest values of a tile ask for. A tile whose values are too
// far apart for that comes in bands, one after the other through the same pipeline: the largest values, then the largest of
// those left, until none are.
// grad_weight_sorted_plan.cuh cuts the work.
// Limit: shared memory, 128 bytes per clock.
// Previous rung: grad_weight_private.

#include "grad_weight_sorted_plan.cuh"
#include "gradients.h"
#include "implicit_gemm.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"

namespace fused_kernels {

// How many loads a producer thread has in flight, for 16 bytes of operand each. Before Hopper more of them spill.
#if __CUDA_ARCH__ >= 900
constexpr int kInFlight = 4;
#else
constexpr int kInFlight = 2;
#endif

// An entry: a gradient of 16 bits, its winner's column, and where its input begins in the tile's.
constexpr int kColumnShift = 12;

struct Place {
  int image, row, column;  // of a tile's first output pixel
};

__device__ __forceinline__ Place place_of(const GradWeightSortedPlan& plan, int tile) {
  // Rows inside columns inside images: neighbouring tiles find what their halos share in the cache.
  return {tile / plan.tiles_across[0] / plan.tiles_across[1], tile % plan.tiles_across[0] * plan.tile[0],
          tile / plan.tiles_across[0] % plan.tiles_across[1] * plan.tile[1]};
}

// ---- float32's powers of two ----

// Where a tile has other powers of two than the sums so far, these are multiplied by the quotient. Further than 2^kMostApart
// from where they began, sums could leave float32's range: they are added up in memory, and others begin.
constexpr int kMostApart = 32;
constexpr int kNoExponent = INT32_MAX;  // of a tile of zeros
// A power of two was right if the largest float16 is in [2^6, 2^14): here as bits.
constexpr uint32_t kLeastSeen = 0x5400, kMostSeen = 0x7400;
// As float16 an input is off by 2^-11 of itself, or by 2^-25 if that is more: which is no more than 2^-20 of the largest of its
// pixel's channels where one of them is as large as this.
constexpr float kLargeEnough = 0x1p-5f;

// The power of two for a tile's largest value; in steps of eight, so that most tiles have the same one. The largest value is
// still at least 64.
__device__ __forceinline__ int common_exponent(float largest) {
  const int exponent = exponent_for(largest);
  return exponent < kLargestExponent / 8 * 8 ? exponent & ~7 : exponent;
}

__device__ __forceinline__ float finite_magnitude(float value) { return fabsf(value) < kInfinity<float> ? fabsf(value) : 0.0f; }

// Values that one power of two brings to where float16 keeps all their digits.
struct Band {
  int exponent;
  float least, below;  // their magnitudes: from one to below the other. Below infinity: what is not finite, too

  __device__ __forceinline__ Band(float largest, float below) : exponent(exponent_for(largest)), below(below) {
    // The largest power of two takes what is left.
    least = exponent < kLargestExponent ? kSmallestNormalF16 * power_of_two(-exponent) : 0.0f;
  }
  // A value times the power of two, or zero if another band has it.
  __device__ __forceinline__ float operator()(float value) const {
    const bool has = !(fabsf(value) < least) && (fabsf(value) < below || below == kInfinity<float>);
    return has ? value * power_of_two(exponent) : 0.0f;
  }
};

// ---- sort_kernel ----

// Lists: [tile][entry]. The entries' exact gradients, only of tiles where float16 loses digits: likewise. Where each list
// begins, in steps: [tile][list], one more for the end. A tile's exponent, times two, and one more if digits are lost. Sums for
// the bias: [tile][channel].
template <typename T>
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const T* grad, Winners winners, uint32_t* entries, float* exact, uint16_t* begins, int* exponents,
                float* bias_parts, const __grid_constant__ GradWeightSortedPlan plan) {
  constexpr int kRounds = kMostPixels / kSortThreads;
  extern __shared__ __align__(128) char shared[];
  const int bins = plan.lists * kPlaces;
  float* const sorted = reinterpret_cast<float*>(shared);                           // gradients
  uint32_t* const sorted_entries = reinterpret_cast<uint32_t*>(sorted + plan.capacity);
  int* const in_bin = reinterpret_cast<int*>(sorted_entries + plan.capacity);          // how many
  int* const spare = in_bin + bins;                                                 // where a bin's surplus begins in the list's
  int* const first_round = spare + bins;                                            // a list's, in eights
  uint16_t* const before = reinterpret_cast<uint16_t*>(first_round + plan.lists + 1);  // [warp][bin]
  __shared__ uint32_t largest, smallest;

  for (int i = threadIdx.x; i < plan.capacity; i += kSortThreads) sorted[i] = 0.0f, sorted_entries[i] = 0;
  for (int i = threadIdx.x; i < kSortWarps * bins; i += kSortThreads) before[i] = 0;
  if (threadIdx.x == 0) largest = 0, smallest = __float_as_uint(kInfinity<float>);
  __syncthreads();

  // ---- count: which bin each pixel is in, and its rank there ----
  // Each warp has a run of pixels, and counts those of a bin before each of them.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Place tile = place_of(plan, blockIdx.x);
  const int pixels = plan.tile[0] * plan.tile[1];
  float gradients[kRounds];
  int bin_of[kRounds], rank[kRounds], place[kRounds], column[kRounds];
  float most = 0.0f, least = kInfinity<float>;
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
      place[k] = row * plan.stride[0] * plan.input_tile[1] + x * plan.stride[1];
      column[k] = winner % kColumns;
      bin_of[k] = winner / kColumns * kPlaces + place[k] % kPlaces;
      most = fmaxf(most, finite_magnitude(gradients[k]));
      if (gradients[k] != 0.0f) least = fminf(least, fabsf(gradients[k]));
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
  if constexpr (sizeof(T) == 4) {
    const uint32_t most_of_warp = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
    const uint32_t least_of_warp = __reduce_min_sync(0xffffffffu, __float_as_uint(least));
    if (lane == 0) atomicMax(&largest, most_of_warp), atomicMin(&smallest, least_of_warp);
  }
  __syncthreads();

  // ---- where bins and lists begin ----
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

  // ---- place the pixels ----
  // The power of two that neighbours have, too, if the smallest gradient lets it.
  int exponent = common_exponent(__uint_as_float(largest));
  const auto loses_digits = [&] { return __uint_as_float(smallest) * power_of_two(exponent) < kSmallestNormalF16; };
  if (loses_digits()) exponent = exponent_for(__uint_as_float(largest));
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    if (bin_of[k] < 0) continue;
    const int bin = bin_of[k], list = bin / kPlaces, first = first_round[list], rounds = first_round[list + 1] - first;
    int round = before[warp * bins + bin] + rank[k], slot = bin % kPlaces;
    if (round >= rounds) {
      // More pixels than rounds: into slots that the other places leave free.
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

  // ---- store the lists; sum the bias ----
  const int count = first_round[plan.lists] * kPlaces;
  uint4* const target = reinterpret_cast<uint4*>(entries + static_cast<int64_t>(blockIdx.x) * plan.capacity);
  for (int i = threadIdx.x; i < count / 4; i += kSortThreads) target[i] = reinterpret_cast<const uint4*>(sorted_entries)[i];
  for (int list = threadIdx.x; list <= plan.lists; list += kSortThreads) {
    begins[static_cast<int64_t>(blockIdx.x) * (plan.lists + 1) + list] = static_cast<uint16_t>(first_round[list] / 2);
  }
  if (threadIdx.x == 0) exponents[blockIdx.x] = largest > 0 ? exponent * 2 + loses_digits() : kNoExponent;
  if (loses_digits()) {
    float* const to = exact + static_cast<int64_t>(blockIdx.x) * plan.capacity;
    for (int i = threadIdx.x; i < count; i += kSortThreads) to[i] = sorted[i];
  }
  // The bias: for each of a list's eight columns, four lanes sum a quarter each.
  for (int list = warp; list < plan.lists; list += kSortWarps) {
    const int end = first_round[list + 1] * kPlaces;
    double sum = 0.0;
    for (int i = first_round[list] * kPlaces + lane / kColumns; i < end; i += kWarpSize / kColumns) {
      if ((sorted_entries[i] >> kColumnShift) % kColumns == lane % kColumns) sum += sorted[i];
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    const int channel = list * kColumns + lane;
    if (lane < kColumns && channel < plan.out_channels) {
      bias_parts[static_cast<int64_t>(blockIdx.x) * plan.out_channels + channel] = static_cast<float>(sum);
    }
  }
}

// ---- sum_kernel ----

// What a stage asks for: to add up the sums so far in memory first; to go on to the next tile after it.
constexpr int kAddsUp = 2, kEndsTile = 1;

// A place in the pipeline. Each stage has two barriers: one says that it is full, one that it is empty again.
struct Stage {
  int index, phase;

  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// What a thread saw of an input tile: the largest magnitudes, two float16, and whether float16 lost digits that count.
struct Seen {
  uint32_t most = 0;
  bool loses_digits = false;
};

// Stores eight channels of a pixel as operand A.
template <typename T>
__device__ __forceinline__ void put_group(const Raw<T>(&values)[8], float factor, Seen& seen, char* target) {
  uint32_t packed[4];
  [[maybe_unused]] uint32_t most = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Raw<T> low = values[2 * c], high = values[2 * c + 1];
    if constexpr (sizeof(T) == 4) {
      packed[c] = ptx::pack_f16(low * factor, high * factor);
      most = ptx::max_magnitudes_f16(most, packed[c]);
    } else {
      packed[c] = low | static_cast<uint32_t>(high) << 16;
    }
  }
  if constexpr (sizeof(T) == 4) {
    seen.most = ptx::max_magnitudes_f16(seen.most, most);
    if (__hblt2(reinterpret_cast<const __half2&>(most), __float2half2_rn(kLargeEnough))) {
#pragma unroll
      for (float value : values) seen.loses_digits |= value != 0.0f && fabsf(value * factor) < kSmallestNormalF16;
    }
  }
  *reinterpret_cast<uint4*>(target) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// Where an input tile lies.
template <typename T, class C>
struct InputTile {
  const Raw<T>* first;  // of the tile's first pixel, the chunk's first channel; perhaps outside the image
  int top, left, channels;
  bool whole;  // no padding, all channels exist

  __device__ __forceinline__ InputTile(const T* input, const GradWeightSortedPlan& plan, const Place& tile, int first_channel)
      : top(tile.row * plan.stride[0] - plan.padding[0]), left(tile.column * plan.stride[1] - plan.padding[1]),
        channels(min(plan.in_channels - first_channel, C::kChunk)) {
    const int64_t* const strides = plan.input_strides;
    first = reinterpret_cast<const Raw<T>*>(input) + tile.image * strides[0] + first_channel * strides[1] + top * strides[2] +
            left * strides[3];
    whole = top >= 0 && left >= 0 && top + plan.input_tile[0] <= plan.input[0] && left + plan.input_tile[1] <= plan.input[1] &&
            channels == C::kChunk;
  }
  __device__ __forceinline__ bool has(const GradWeightSortedPlan& plan, int row, int column) const {
    return static_cast<unsigned>(top + row) < static_cast<unsigned>(plan.input[0]) &&
           static_cast<unsigned>(left + column) < static_cast<unsigned>(plan.input[1]);
  }
};

// Brings an input tile: [pixel][channel] in 16 bits, zeros in the padding. Past the last pixel the last one is read again, so
// that a whole tile's loads have no conditions.
template <typename T, bool DENSE, bool WHOLE, class C>
__device__ __forceinline__ Seen bring_input(const InputTile<T, C>& tile, const GradWeightSortedPlan& plan, int thread,
                                            float factor, char* target) {
  const int pixels = plan.input_tile[0] * plan.input_tile[1];
  const int row_stride = static_cast<int>(plan.input_strides[2]), column_stride = static_cast<int>(plan.input_strides[3]);
  const int channel_stride = static_cast<int>(plan.input_strides[1]);
  Seen seen;
  // DENSE: eight threads have the same group of channels of eight neighbouring pixels; otherwise all threads have neighbouring
  // pixels. Both write to different banks.
  constexpr int kStride = DENSE ? C::kInputThreads / C::kGroups : C::kInputThreads;
  const int group = DENSE ? thread / 8 % C::kGroups : 0;
  const int first_pixel = DENSE ? thread / (8 * C::kGroups) * 8 + thread % 8 : thread;
  const Raw<T>* const source = tile.first + group * 8;
  char* const to = target + group * 16;
  const auto offset_of = [&](int pixel, bool& inside) {
    pixel = min(pixel, pixels - 1);
    const int row = __umulhi(pixel, plan.width_inverse), column = pixel - row * plan.input_tile[1];
    inside = WHOLE || tile.has(plan, row, column);
    return row * row_stride + column * column_stride;
  };
  if constexpr (C::kCopies) {
#pragma unroll 4
    for (int pixel = first_pixel; pixel < pixels; pixel += kStride) {
      bool inside;
      const int offset = offset_of(pixel, inside);
      inside &= WHOLE || group * 8 < tile.channels;
      ptx::cp_async_16(ptx::shared_address(to) + pixel * C::kPixelBytes, inside ? source + offset : tile.first, inside);
    }
  } else {
    constexpr int kPixels = DENSE ? kInFlight : 1, kRuns = DENSE ? 1 : C::kGroups;
#pragma unroll 1
    for (int first = first_pixel; first < pixels; first += kStride * kPixels) {
      Raw<T> values[kPixels][kRuns][8];
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        bool inside;
        const Raw<T>* from = source + offset_of(first + k * kStride, inside);
        if constexpr (DENSE) {
          const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          inside &= WHOLE || group * 8 < tile.channels;
          float4* const two = reinterpret_cast<float4*>(values[k][0]);
          two[0] = inside ? __ldg(reinterpret_cast<const float4*>(from)) : zero;
          two[1] = inside ? __ldg(reinterpret_cast<const float4*>(from) + 1) : zero;
        } else {
#pragma unroll
          for (int c = 0; c < C::kChunk; ++c) {
            values[k][c / 8][c % 8] = inside && (WHOLE || c < tile.channels) ? __ldg(from) : Raw<T>(0);
            from += channel_stride;
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const int pixel = first + k * kStride;
        if (pixel >= pixels) break;
#pragma unroll
        for (int r = 0; r < kRuns; ++r) put_group<T>(values[k][r], factor, seen, to + pixel * C::kPixelBytes + r * 16);
      }
    }
  }
  return seen;
}

// Brings a band of an input tile.
template <typename T, class C>
__device__ __forceinline__ void bring_band(const InputTile<T, C>& tile, const GradWeightSortedPlan& plan, int thread,
                                           const Band& band, char* target) {
  for (int i = thread; i < plan.input_tile[0] * plan.input_tile[1] * C::kGroups; i += C::kInputThreads) {
    const int pixel = i / C::kGroups, first = i % C::kGroups * 8;
    const int row = __umulhi(pixel, plan.width_inverse), column = pixel - row * plan.input_tile[1];
    const Raw<T>* const source = tile.first + row * plan.input_strides[2] + column * plan.input_strides[3];
    Raw<T> values[8] = {};
    if (tile.has(plan, row, column)) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (first + c < tile.channels) values[c] = band(source[(first + c) * plan.input_strides[1]]);
      }
    }
    Seen seen;
    put_group<T>(values, 1.0f, seen, target + pixel * C::kPixelBytes + first * 2);
  }
}

// Reads an input tile once more, for its largest value below a limit.
template <typename T, class C>
__device__ __forceinline__ float largest_below(float limit, const InputTile<T, C>& tile, const GradWeightSortedPlan& plan,
                                               int thread) {
  float most = 0.0f;
  for (int pixel = thread; pixel < plan.input_tile[0] * plan.input_tile[1]; pixel += C::kInputThreads) {
    const int row = __umulhi(pixel, plan.width_inverse), column = pixel - row * plan.input_tile[1];
    if (!tile.has(plan, row, column)) continue;
    const Raw<T>* source = tile.first + row * plan.input_strides[2] + column * plan.input_strides[3];
    for (int c = 0; c < tile.channels; ++c, source += plan.input_strides[1]) {
      const float magnitude = fabsf(*source);
      most = fmaxf(most, magnitude < limit ? magnitude : 0.0f);
    }
  }
  return most;
}

// Makes two entries two neighbours of operand B: their gradients if the column is this lane's, otherwise zero.
__device__ __forceinline__ uint32_t operand_b(uint2 two, __half2 column) {
  const uint32_t gradients = __byte_perm(two.x, two.y, 0x7632);
  const uint32_t columns = __byte_perm(two.x, two.y, 0x5410) & (kColumns - 1) * (0x10001u << kColumnShift);
  return gradients & __heq2_mask(reinterpret_cast<const __half2&>(columns), column);
}

// Partial sums: [slice][output channels of a block][chunk][tap][list][16 input channels][lane][its four].
template <typename T, bool DENSE>
__global__ void __launch_bounds__(Cut<T, DENSE>::kThreads, 1)
    sum_kernel(const T* input, const uint32_t* entries, const float* exact, const uint16_t* begins, const int* exponents,
               float* partial, const __grid_constant__ GradWeightSortedPlan plan) {
  using C = Cut<T, DENSE>;
  extern __shared__ __align__(128) char shared[];
  const int input_bytes = plan.input_tile[0] * plan.input_tile[1] * C::kPixelBytes,
            stage_bytes = input_bytes + plan.capacity / kStep * kStepBytes;
  __shared__ uint16_t list_begins[kStages][kLists + 1];
  __shared__ int stage_exponents[kStages];  // times four, with kAddsUp and kEndsTile
  __shared__ uint32_t largest[2];
  __shared__ bool any_loses[2];
  __shared__ uint64_t barriers[2 * kStages];
  const int first_tap = blockIdx.y * kTaps, taps = min(plan.taps - first_tap, kTaps);
  const uint32_t first_barrier = ptx::shared_address(barriers);
  const auto full = [&](const Stage& s) { return first_barrier + s.index * 16; };
  const auto empty = [&](const Stage& s) { return first_barrier + s.index * 16 + 8; };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(first_barrier + s * 16, C::kInputThreads);
      ptx::mbarrier_init(first_barrier + s * 16 + 8, taps * kWarpSize);
    }
    ptx::mbarrier_init_fence();
    largest[0] = largest[1] = 0;
    any_loses[0] = any_loses[1] = false;
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int chunk = blockIdx.x % plan.chunks, range = blockIdx.x / plan.chunks % plan.ranges;
  const int slice = blockIdx.x / plan.chunks / plan.ranges;
  const int begin = static_cast<int>(static_cast<int64_t>(plan.tiles) * slice / plan.slices);
  const int end = static_cast<int>(static_cast<int64_t>(plan.tiles) * (slice + 1) / plan.slices);
  const int first_list = range * kLists, lists = min(plan.lists - first_list, kLists);
  Stage stage{0, 0};

  // ---- producers: the input tile, and operand B ----
  if (warp >= kTaps) {
    const int thread = threadIdx.x - kTaps * kWarpSize;
    const uint32_t n = lane / 4 << kColumnShift, both = n * 0x10001u;
    const __half2 column = reinterpret_cast<const __half2&>(both);
    int exponent = sizeof(T) == 4 ? 8 : 0, turn = 0;
    // The largest number of all producers, and whether any of them lost digits.
    const auto largest_of_all = [&](uint32_t bits, bool& loses_digits) {
      bits = __reduce_max_sync(0xffffffffu, bits);
      loses_digits = __any_sync(0xffffffffu, loses_digits);
      if (lane == 0) {
        atomicMax(&largest[turn], bits);
        if (loses_digits) any_loses[turn] = true;
      }
      ptx::barrier_sync(1, C::kInputThreads);
      bits = largest[turn], loses_digits = any_loses[turn];
      turn ^= 1;
      if (thread == 0) largest[turn] = 0, any_loses[turn] = false;
      ptx::barrier_sync(1, C::kInputThreads);
      return bits;
    };
    // The sums' exponent, and what it was after they were last added up in memory.
    int total = 0, first_total = kNoExponent;
    const auto announce = [&](int of_stage, bool ends_tile) {
      const bool adds_up = first_total != kNoExponent && abs(of_stage - first_total) > kMostApart;
      if (adds_up || first_total == kNoExponent) first_total = of_stage;
      total = of_stage;
      if (thread == 0) stage_exponents[stage.index] = total * 4 + (adds_up ? kAddsUp : 0) + (ends_tile ? kEndsTile : 0);
    };
    for (int tile = begin; tile < end; ++tile) {
      const uint16_t* const tile_begins = begins + static_cast<int64_t>(tile) * (plan.lists + 1) + first_list;
      const int steps = tile_begins[lists] - tile_begins[0];
      const uint32_t* const source = entries + static_cast<int64_t>(tile) * plan.capacity + tile_begins[0] * kStep;
      const InputTile<T, C> input_tile(input, plan, place_of(plan, tile), chunk * C::kChunk);
      const auto begin_stage = [&] {
        ptx::mbarrier_wait(empty(stage), stage.phase ^ 1);
        if (thread <= kLists) {
          list_begins[stage.index][thread] = static_cast<uint16_t>(tile_begins[min(thread, lists)] - tile_begins[0]);
        }
        return shared + stage.index * stage_bytes;
      };
      const auto put_step = [&](char* target, int step, uint2 low, uint2 high, uint32_t entry) {
        uint2* const operands = reinterpret_cast<uint2*>(target + input_bytes) + step * kWarpSize;
        operands[lane] = make_uint2(operand_b(low, column), operand_b(high, column));
        if (lane < kStep) {
          uint32_t* const rows = reinterpret_cast<uint32_t*>(target + input_bytes + plan.capacity / kStep * kWarpSize * 8);
          rows[step * kStep + lane] = (entry & ((1 << kColumnShift) - 1)) * C::kPixelBytes;
        }
      };
      char* const target = begin_stage();
      const auto bring = [&] {
        const float factor = power_of_two(exponent);
        return input_tile.whole ? bring_input<T, DENSE, true>(input_tile, plan, thread, factor, target)
                                : bring_input<T, DENSE, false>(input_tile, plan, thread, factor, target);
      };
      Seen seen = bring();
      if constexpr (sizeof(T) == 4) {
        // The power of two was a guess, the last tile's. If it was wrong, bring the tile again.
        bool loses_digits = seen.loses_digits, ignored = false;
        uint32_t most = largest_of_all(max(seen.most & 0xffff, seen.most >> 16), loses_digits);
        const auto largest_input = [&](float limit) {
          return __uint_as_float(largest_of_all(__float_as_uint(largest_below(limit, input_tile, plan, thread)), ignored));
        };
        if (most < kLeastSeen || most >= kMostSeen) {
          const float value = largest_input(kInfinity<float>);
          most = __float_as_uint(value);
          if (value > 0.0f && common_exponent(value) != exponent) {
            exponent = common_exponent(value);
            seen = bring();
            loses_digits = seen.loses_digits;
            largest_of_all(0, loses_digits);
          }
        }
        const int of_gradients = exponents[tile];
        const bool adds = of_gradients != kNoExponent && most > 0;
        if (adds && (loses_digits || of_gradients & 1)) {
          // Each band of the inputs with each of the gradients, a stage for each two.
          const auto gradient_at = [&](int i) {
            if (of_gradients & 1) return __ldg(exact + (source - entries) + i);
            return __half2float(__ushort_as_half(__ldg(source + i) >> 16)) * power_of_two(-(of_gradients >> 1));
          };
          const auto largest_gradient = [&](float limit) {
            float largest = 0.0f;
            for (int i = thread; i < steps * kStep; i += C::kInputThreads) {
              const float magnitude = fabsf(gradient_at(i));
              largest = fmaxf(largest, magnitude < limit ? magnitude : 0.0f);
            }
            return __uint_as_float(largest_of_all(__float_as_uint(largest), ignored));
          };
          Band inputs(largest_input(kInfinity<float>), kInfinity<float>);
          while (true) {
            const float next_input = largest_input(inputs.least);
            Band gradients(largest_gradient(kInfinity<float>), kInfinity<float>);
            while (true) {
              const float next_gradient = largest_gradient(gradients.least);
              char* const target = begin_stage();
              bring_band(input_tile, plan, thread, inputs, target);
              for (int step = thread / kWarpSize; step < steps; step += C::kInputWarps) {
                const int i = step * kStep + lane % kStep;
                const uint32_t entry = __ldg(source + i);
                const uint32_t mine = ptx::pack_f16(0.0f, gradients(gradient_at(i))) | (entry & 0xffff);
                uint32_t of_lane[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) of_lane[j] = __shfl_sync(0xffffffffu, mine, lane % 4 * 2 + j % 2 + j / 2 * 8);
                put_step(target, step, make_uint2(of_lane[0], of_lane[1]), make_uint2(of_lane[2], of_lane[3]), entry);
              }
              announce(inputs.exponent + gradients.exponent, next_input == 0.0f && next_gradient == 0.0f);
              ptx::mbarrier_arrive(full(stage));
              stage.advance();
              if (next_gradient == 0.0f) break;
              gradients = Band(next_gradient, gradients.least);
            }
            if (next_input == 0.0f) break;
            inputs = Band(next_input, inputs.least);
          }
          continue;
        }
        if (adds) {
          announce(exponent + (of_gradients >> 1), true);
        } else if (thread == 0) {
          stage_exponents[stage.index] = total * 4 + kEndsTile;
        }
      }
      // The lists, in the order in which the tensor cores read them.
#pragma unroll 4
      for (int step = thread / kWarpSize; step < steps; step += C::kInputWarps) {
        const uint2* const four = reinterpret_cast<const uint2*>(source + step * kStep) + lane % 4;
        const uint2 low = __ldg(four), high = __ldg(four + 4);
        put_step(target, step, low, high, lane < kStep ? __ldg(source + step * kStep + lane) : 0);
      }
      ptx::cp_async_wait_all();
      ptx::mbarrier_arrive(full(stage));
      stage.advance();
    }
    return;
  }
  if (warp >= taps) return;

  // ---- consumers: one tap per warp ----
  float sums[kLists][C::kChunk / 16][4] = {};
  int exponent = 0;
  // Adds the sums to this block's in memory, if it has any there.
  bool is_stored = false;
  float* const target = partial + (static_cast<int64_t>(blockIdx.x) * plan.taps + first_tap + warp) * C::kSums + lane * 4;
  const auto put = [&] {
    const float back = power_of_two(-exponent / 2), rest = power_of_two(-(exponent - exponent / 2));
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      if (i >= lists) break;
#pragma unroll
      for (int m = 0; m < C::kChunk / 16; ++m) {
        float* const at = target + (i * C::kChunk / 16 + m) * 4 * kWarpSize;
        const float(&sum)[4] = sums[i][m];
        float4 all = is_stored ? *reinterpret_cast<const float4*>(at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        all.x += sum[0] * back * rest, all.y += sum[1] * back * rest;
        all.z += sum[2] * back * rest, all.w += sum[3] * back * rest;
        *reinterpret_cast<float4*>(at) = all;
      }
    }
    is_stored = true;
  };
  const int slot = lane % 8 + lane / 16 * 8;  // the pixel whose row this lane gives to ldmatrix
  const uint32_t shift = plan.tap_offset[first_tap + warp] + lane / 8 % 2 * 16;
  for (int tile = begin; tile < end;) {
    const char* const inputs = shared + stage.index * stage_bytes;
    const uint2* operand = reinterpret_cast<const uint2*>(inputs + input_bytes) + lane;
    const uint2* const first_operand = operand;
    const uint32_t* row_of = reinterpret_cast<const uint32_t*>(inputs + input_bytes + plan.capacity / kStep * kWarpSize * 8) + slot;
    const uint32_t first_row = ptx::shared_address(inputs) + shift;
    ptx::mbarrier_wait(full(stage), stage.phase);
    const int announced = sizeof(T) == 4 ? stage_exponents[stage.index] : kEndsTile;
    if (announced & kEndsTile) ++tile;
    const int change = sizeof(T) == 4 ? (announced >> 2) - exponent : 0;
    if (change != 0) {
      float first = power_of_two(change / 2);  // or zero: no branch has fewer registers
      if (announced & kAddsUp) {
        put();
        first = 0.0f;
      }
      exponent += change;
#pragma unroll
      for (auto& of_list : sums) {
#pragma unroll
        for (auto& of_matrix : of_list) {
#pragma unroll
          for (float& sum : of_matrix) sum = sum * first * power_of_two(change - change / 2);
        }
      }
    }
    const uint16_t* const ends = list_begins[stage.index] + 1;
    // A step ahead: past the last there is still shared memory.
    uint32_t row = *row_of;
    uint2 b = *operand;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const uint2* const list_end = first_operand + ends[i] * kWarpSize;
#pragma unroll 1
      while (operand < list_end) {
        uint32_t a[C::kChunk / 16][4];
#pragma unroll
        for (int m = 0; m < C::kChunk / 16; ++m) ptx::ldmatrix_x4_transposed(a[m], first_row + row + m * 32);
        operand += kWarpSize, row_of += kStep;
        row = *row_of;
        const uint2 next = *operand;
#pragma unroll
        for (int m = 0; m < C::kChunk / 16; ++m) ptx::mma_m16n8k16(sums[i][m], a[m], b.x, b.y, Operand<T>());
        b = next;
      }
    }
    ptx::mbarrier_arrive(empty(stage));
    stage.advance();
  }

  put();
}

// ---- reduce_kernel ----

// Adds the slices' sums: one thread per weight, in the order of sum_kernel's lanes.
template <typename T, class C>
__global__ void __launch_bounds__(256)
    reduce_kernel(const float* partial, float scale, T* grad_weight, const __grid_constant__ GradWeightSortedPlan plan) {
  const int64_t count = static_cast<int64_t>(plan.chunks) * plan.ranges * plan.taps * C::kSums;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  const int k = i % 4, lane = i / 4 % kWarpSize, in_block = i % C::kSums / (4 * kWarpSize), block = i / C::kSums / plan.taps;
  const int list = block / plan.chunks * kLists + in_block / (C::kChunk / 16), m = in_block % (C::kChunk / 16);
  const int64_t output = list * kColumns + lane % 4 * 2 + k % 2, tap = i / C::kSums % plan.taps;
  const int channel = block % plan.chunks * C::kChunk + m * 16 + lane / 4 + k / 2 * 8;
  if (output >= plan.out_channels || channel >= plan.in_channels) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int slice = 0; slice < plan.slices; ++slice) sum += partial[slice * count + i];
  grad_weight[(output * plan.in_channels + channel) * plan.taps + tap] = static_cast<T>(sum * scale);
}

// Adds the tiles' sums of the bias: one block per output channel.
template <typename T>
__global__ void __launch_bounds__(256) reduce_bias_kernel(const float* parts, float scale, T* grad_bias, int tiles, int channels) {
  __shared__ double of_warps[256 / kWarpSize];
  double sum = 0.0;
  for (int tile = threadIdx.x; tile < tiles; tile += 256) sum += parts[static_cast<int64_t>(tile) * channels + blockIdx.x];
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0.0;
  for (double of_warp : of_warps) sum += of_warp;
  grad_bias[blockIdx.x] = static_cast<T>(static_cast<float>(sum) * scale);
}

// ---- host ----

template <typename T, bool DENSE>
void launch_grad_weight_sorted(GradWeightSortedPlan plan, const Tensor& grad, const Tensor& winners, const Tensor& input,
                               float scale, Tensor& grad_weight, Tensor& grad_bias) {
  using C = Cut<T, DENSE>;
  const int device = input.get_device_index();
  const int shared_bytes = cut_grad_weight_sorted<C>(plan, device);
  const int64_t tiles = plan.tiles;
  const int tap_sets = static_cast<int>(ceil_div(plan.taps, kTaps));

  // Workspace, all parts multiples of 16 bytes.
  const auto rounded = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  const int64_t sums = static_cast<int64_t>(plan.chunks) * plan.ranges * plan.taps * C::kSums;
  const int64_t sizes[] = {rounded(tiles * plan.capacity * 4),     rounded(sizeof(T) == 4 ? tiles * plan.capacity * 4 : 0),
                           rounded(tiles * (plan.lists + 1) * 2),  rounded(tiles * 4),
                           rounded(tiles * plan.out_channels * 4), rounded(plan.slices * sums * 4)};
  int64_t bytes = 0;
  for (int64_t size : sizes) bytes += size;
  const Tensor memory = torch::stable::new_empty(input, {bytes}, torch::headeronly::ScalarType::Byte);
  char* next = static_cast<char*>(memory.data_ptr());
  char* parts[6];
  for (int i = 0; i < 6; ++i) parts[i] = next, next += sizes[i];
  const auto entries = reinterpret_cast<uint32_t*>(parts[0]);
  const auto exact = reinterpret_cast<float*>(parts[1]);
  const auto begins = reinterpret_cast<uint16_t*>(parts[2]);
  const auto exponents = reinterpret_cast<int*>(parts[3]);
  const auto bias_parts = reinterpret_cast<float*>(parts[4]), partial = reinterpret_cast<float*>(parts[5]);

  const cudaStream_t stream = current_stream(input);
  const int bins = plan.lists * kPlaces;
  const int sort_bytes = plan.capacity * 8 + bins * 8 + (plan.lists + 1) * 4 + kSortWarps * bins * 2;
  STD_CUDA_CHECK(cudaFuncSetAttribute(sort_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sort_bytes));
  sort_kernel<T><<<plan.tiles, kSortThreads, sort_bytes, stream>>>(
      static_cast<const T*>(grad.data_ptr()), winners_in(winners), entries, exact, begins, exponents, bias_parts, plan);
  const auto kernel = sum_kernel<T, DENSE>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<dim3(plan.chunks * plan.ranges * plan.slices, tap_sets), C::kThreads, shared_bytes, stream>>>(
      static_cast<const T*>(input.data_ptr()), entries, exact, begins, exponents, partial, plan);
  reduce_kernel<T, C><<<grid_size(ceil_div(sums, 256)), 256, 0, stream>>>(partial, scale,
                                                                          static_cast<T*>(grad_weight.data_ptr()), plan);
  reduce_bias_kernel<T><<<grid_size(plan.out_channels), 256, 0, stream>>>(
      bias_parts, scale, static_cast<T*>(grad_bias.data_ptr()), plan.tiles, plan.out_channels);
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

  GradWeightSortedPlan plan{};
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
  // Eight channels side by side and aligned.
  bool dense = shape.input_strides[1] == 1 && shape.in_channels % 8 == 0 &&
               reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 == 0;
  for (int d = 0; d < 4; ++d) {
    plan.grad_strides[d] = grad.stride(d);
    plan.input_strides[d] = shape.input_strides[d];
    if (d != 1 && shape.input_strides[d] % 8 != 0) dense = false;
    // A tile's offsets are counted in an int.
    STD_TORCH_CHECK(d == 0 || (shape.input_strides[d] >= 0 && shape.input_strides[d] < (d == 1 ? INT32_MAX : 1 << 24)),
                    "input: grad_weight_sorted expected smaller strides, got ", shape.input_strides[d]);
  }
  if (shape.pixels() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_weight, grad_bias};
  }
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 4) {
      const auto launch = dense ? launch_grad_weight_sorted<T, true> : launch_grad_weight_sorted<T, false>;
      launch(plan, grad, winners, input, static_cast<float>(scale), grad_weight, grad_bias);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(OPERATOR("grad_weight_sorted"), TORCH_BOX(&grad_weight_sorted)); }

}  // namespace fused_kernels
