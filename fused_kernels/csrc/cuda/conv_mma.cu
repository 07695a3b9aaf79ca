// conv_mma: convolution, scale and min in one kernel, on tensor cores, for every GPU since Ampere.
//
// The convolution is an implicit GEMM: M = output pixels, N = output channels, K = input channels x filter taps. A block takes
// a tile of the image and all its output channels, so that the minimum over N stays inside. It keeps its input tile, that is
// the tile with its halo (the margin that the filter reaches into), in shared memory: one row of channels for each pixel. Then
// a filter tap is nothing but another start address.
//   operand A   rows of the input tile, padded by 16 bytes (no bank conflicts), read by ldmatrix; two buffers, one fills
//               meanwhile
//   operand B   the weights, in the order in which the lanes hold them, in a ring of buffers (pipeline stages)
//   result      up to 128 sums per thread; the epilogue (bias, scale, min) happens in those registers; one number per pixel
//               goes to memory
// A warp that computes addresses does not multiply. So warps are specialized: most are consumers, which multiply and do nothing
// else; one producer warp brings the weights, three bring the input and take the results away. 16-bit channels_last input comes
// by cp.async; everything else passes through registers, which transposes and converts. The grid is persistent.
// float32 is computed with float16 operands: the same 10-bit mantissa as TF32, rounded to nearest, at twice TF32's rate. One
// power of two per tile and one per output channel keep the largest values inside float16's range: the device notices a tile
// that leaves it, and reads it again. It also notices results so small, beside the largest values of their tile, that they may
// have lost digits: at the end those are made again, with powers of their own (again.cuh).
// conv_mma_plan.h cuts the work.
// Limit: mma.sync, which reaches two thirds of the rate that wgmma gets out of Hopper's tensor cores.
// Previous rung: conv_direct.

#include "again.cuh"
#include "conv_mma_plan.h"
#include "implicit_gemm.cuh"
#include "parts.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/thread_index.cuh"

namespace fused_kernels {

using namespace mma;

// ---- constants ----

constexpr int kRowPadding = 16;  // bytes after a pixel's channels; makes the pitch an odd multiple of 16

// Where the chip has bulk copies, one instruction of one thread brings a stage of weights.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

// ---- how the weights are packed ----

// A lane of mma.sync holds four registers of a pair of operand B's matrices: a column and two neighbouring k in each.
struct LaneOrder {
  static constexpr int kParts = 1;
  __device__ static int column(int word) { return word % 4 / 2 * 8 + word / 16; }
  __device__ static int k(int word) { return word % 2 * 8 + word / 4 % 4 * 2; }
  __device__ static int word(int lane, int i) { return lane * 4 + i; }
  // First the columns' powers of two and biases in turn, then their own factors and their weights' magnitudes.
  struct Places {
    int bias, factor, own, size;
  };
  __device__ static Places places(int columns, int column) {
    const int own = (columns + column) * 2;
    return {column * 2 + 1, column * 2, own, own + 1};
  }
};

// ---- producers: the input tile ----

// A block's place among the tiles, which it walks without dividing: in images, rows and columns of the output.
struct Tile {
  const ConvMmaPlan& plan;
  int index, at[3];  // at: of images, rows, columns of tiles

  __device__ __forceinline__ explicit Tile(const ConvMmaPlan& plan) : plan(plan), index(blockIdx.x) {
    at[2] = index % plan.tiles_across[1];
    at[1] = index / plan.tiles_across[1] % plan.tiles_across[0];
    at[0] = index / plan.tiles_across[1] / plan.tiles_across[0];
  }
  // Neither past the last tile nor before the first.
  __device__ __forceinline__ bool exists() const {
    return static_cast<unsigned>(index) < static_cast<unsigned>(plan.tiles);
  }
  __device__ __forceinline__ void advance() {
    index += gridDim.x;
    at[2] += plan.tile_step[2];
    const bool next_row = at[2] >= plan.tiles_across[1];
    if (next_row) at[2] -= plan.tiles_across[1];
    at[1] += plan.tile_step[1] + next_row;
    const bool next_image = at[1] >= plan.tiles_across[0];
    if (next_image) at[1] -= plan.tiles_across[0];
    at[0] += plan.tile_step[0] + next_image;
  }
  __device__ __forceinline__ void retreat() {
    index -= gridDim.x;
    at[2] -= plan.tile_step[2];
    const bool row_before = at[2] < 0;
    if (row_before) at[2] += plan.tiles_across[1];
    at[1] -= plan.tile_step[1] + row_before;
    const bool image_before = at[1] < 0;
    if (image_before) at[1] += plan.tiles_across[0];
    at[0] -= plan.tile_step[0] + image_before;
  }
  __device__ __forceinline__ int image() const { return at[0] * plan.tile_images; }
  __device__ __forceinline__ int row() const { return at[1] << plan.tile_log2[0]; }
  __device__ __forceinline__ int column() const { return at[2] << plan.tile_log2[1]; }
};

// Eight channels of one pixel on their way from global to shared memory.
template <typename R>
struct Unit {
  alignas(16) R values[kUnit];
  int target;  // byte offset in the input tile's buffer, or -1
};

// Reads the input tile of one item, a few units at a time.
template <typename R, int IN_FLIGHT>
struct Loader {
  const R* const input;
  const ConvMmaPlan& plan;
  const InputPixel* const table;
  const int thread, first_minor, first_major;
  const R* base;
  int image, top, left, channels_left;
  bool whole;  // no padding, and as many channels as a chunk has
  int unit, minor, major;
  float largest;

  // Neighbouring lanes take neighbouring pixels, or where channels lie side by side, neighbouring channels.
  __device__ __forceinline__ Loader(const R* input, const ConvMmaPlan& plan, const InputPixel* table, int thread)
      : input(input), plan(plan), table(table), thread(thread), first_minor(thread % plan.minors),
        first_major(thread / plan.minors) {}

  __device__ __forceinline__ void begin(const Tile& tile, int group, int item) {
    const int piece = item / plan.chunks, first = item % plan.chunks * plan.chunk;
    image = tile.image();
    top = tile.row() * plan.stride[0] - plan.padding[0] + piece / plan.pieces_across * plan.piece_step[0];
    left = tile.column() * plan.stride[1] - plan.padding[1] + piece % plan.pieces_across * plan.piece_step[1];
    whole = image + plan.tile_images <= plan.images && top >= 0 && left >= 0 &&
             top + (plan.input_tile[0] - 1) * plan.input_step[0] < plan.input[0] &&
             left + (plan.input_tile[1] - 1) * plan.input_step[1] < plan.input[1] && plan.in_channels - first >= plan.chunk;
    const int64_t* const strides = plan.input_strides;
    base = input + image * strides[0] + top * strides[2] + left * strides[3] +
           (static_cast<int64_t>(group) * plan.in_channels + first) * strides[1];
    channels_left = plan.in_channels - first;
    largest = 0.0f;
    unit = thread;
    minor = first_minor;
    major = first_major;
  }

  __device__ __forceinline__ bool done() const { return unit >= plan.units; }

  // How many channels there are from `first` on at a pixel of the input tile: none in the padding.
  __device__ __forceinline__ int count(const InputPixel& pixel, int first) const {
    const int y = top + pixel.row * plan.input_step[0], x = left + pixel.column * plan.input_step[1];
    const bool padding = image + pixel.image >= plan.images ||
                         static_cast<unsigned>(y) >= static_cast<unsigned>(plan.input[0]) ||
                         static_cast<unsigned>(x) >= static_cast<unsigned>(plan.input[1]);
    return padding ? 0 : channels_left - first;
  }

  // Starts loading one unit. WHOLE: no padding, all channels exist. VECTORS: channels side by side and aligned. (__ldg although
  // the kernel begins early: the input is complete before any of it runs.)
  template <bool WHOLE, bool VECTORS>
  __device__ __forceinline__ void load_unit(Unit<R>& u, uint32_t buffer) {
    const bool any = !done();
    const int pixel = any ? (VECTORS ? major : minor) : 0, first = any ? (VECTORS ? minor : major) * kUnit : 0;
    const int channels = WHOLE ? kUnit : count(table[pixel], first);
    const R* source = base + table[pixel].offset;
    const int target = pixel * plan.pitch + first * 2;
    u.target = any ? target : -1;
    if constexpr (!VECTORS) {
      source += first * plan.input_strides[1];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        u.values[j] = j < channels ? __ldg(source) : R(0);
        source += plan.input_strides[1];
      }
    } else {
      source = WHOLE || channels > 0 ? source + first : input;
      if constexpr (sizeof(R) == 2) {
        if (any) ptx::cp_async_16(buffer + target, source, channels > 0);
      } else {
        const float4 zero = make_float4(0, 0, 0, 0);
        float4* const values = reinterpret_cast<float4*>(u.values);
        values[0] = channels > 0 ? __ldg(reinterpret_cast<const float4*>(source)) : zero;
        values[1] = channels > 4 ? __ldg(reinterpret_cast<const float4*>(source) + 1) : zero;
      }
    }
    unit += kInputThreads;
    minor += plan.minor_step;
    major += plan.major_step;
    if (minor >= plan.minors) minor -= plan.minors, ++major;
  }

  __device__ __forceinline__ void store_unit(const Unit<R>& u, char* buffer, float factor) {
    if (u.target < 0) return;
    uint32_t packed[kUnit / 2];
#pragma unroll
    for (int j = 0; j < kUnit / 2; ++j) {
      const R low = u.values[2 * j], high = u.values[2 * j + 1];
      if constexpr (sizeof(R) == 2) {
        packed[j] = low | static_cast<uint32_t>(high) << 16;
      } else {
        largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(high)));
        packed[j] = ptx::pack_f16(low * factor, high * factor);
      }
    }
    *reinterpret_cast<uint4*>(buffer + u.target) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }

  // Brings the whole item, several units at a time.
  template <bool WHOLE, bool VECTORS>
  __device__ __forceinline__ void fill_as(char* buffer, float factor) {
#pragma unroll 1
    while (!done()) {
      Unit<R> units[IN_FLIGHT];
#pragma unroll
      for (auto& u : units) load_unit<WHOLE, VECTORS>(u, ptx::shared_address(buffer));
      if constexpr (sizeof(R) == 4 || !VECTORS) {
#pragma unroll
        for (auto& u : units) store_unit(u, buffer, factor);
      }
    }
  }

  // NOTE: all that is known beforehand is decided out here. A branch between two loads makes ptxas share a scoreboard between
  // them, and so wait for the first before it issues the second.
  __device__ __forceinline__ void fill(char* buffer, float factor) {
    if (plan.vectors) {
      whole ? fill_as<true, true>(buffer, factor) : fill_as<false, true>(buffer, factor);
    } else {
      whole ? fill_as<true, false>(buffer, factor) : fill_as<false, false>(buffer, factor);
    }
  }

  // Reads the item once more, for its largest value that is finite.
  template <bool VECTORS>
  __device__ __forceinline__ void find_largest_finite() {
#pragma unroll 1
    while (!done()) {
      Unit<R> u;
      load_unit<false, VECTORS>(u, 0);
#pragma unroll
      for (R value : u.values) largest = fmaxf(largest, fabsf(value) < kInfinity<float> ? fabsf(value) : 0.0f);
    }
  }
};

// ---- where producers and consumers meet ----

// A place in a ring of buffers, each with two mbarriers: one says that it is full, one (where needed) that it is empty again.
template <int SLOTS>
struct Ring {
  uint32_t barriers;  // the address of SLOTS of the first kind, then of the second
  int slot = 0, phase = 0;

  __device__ __forceinline__ uint32_t full(int which) const { return barriers + which * 8; }
  __device__ __forceinline__ uint32_t empty(int which) const { return barriers + (SLOTS + which) * 8; }

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(full(slot), phase); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(slot), phase ^ 1); }
  // By each thread, done with reading.
  // NOTE: one lane's arrival after __syncwarp would be enough. But __syncwarp of a warp that is together leaves no instruction,
  // and compute-sanitizer's racecheck, which follows instructions, then reports every buffer. All 32 cost nothing.
  __device__ __forceinline__ void release(int which) const { ptx::mbarrier_arrive(empty(which)); }
};

// This block's share of the output channels. NOTE: each role asks by itself; kept for all of them, ptxas spilled it (nvcc 13.0).
__device__ __forceinline__ int first_block(const ConvMmaPlan& plan) { return blockIdx.y * plan.blocks_per_split; }
__device__ __forceinline__ int end_block(const ConvMmaPlan& plan) {
  return min(first_block(plan) + plan.blocks_per_split, plan.all_blocks_n);
}

// Where the winners of one of this block's results wait, as columns of operand B: those that one share of the warps found.
template <class C>
__device__ __forceinline__ int* columns_of(const ConvMmaPlan& plan, int result, int share) {
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  return plan.columns + ((block * kResults + result) * C::WARPS_N + share) * C::BLOCK_M;
}

// ---- results ----

// Where a tile's results are, and how they get into the output.
template <typename T, class C>
struct Results {
  const ConvMmaPlan& plan;
  T* const output;
  float* const partial;

  __device__ __forceinline__ OutputPixel pixel(const Tile& tile, int m) const {
    OutputPixel at;
    place(plan, m, at.image, at.row, at.column);
    at.image += tile.image(), at.row += tile.row(), at.column += tile.column();
    return at;
  }

  __device__ __forceinline__ bool exists(const OutputPixel& at) const { return at.inside(plan.images, plan.output); }

  __device__ __forceinline__ void put(const OutputPixel& at, float smallest, [[maybe_unused]] int column) const {
    const int64_t plane = static_cast<int64_t>(plan.output[0]) * plan.output[1];
    const int64_t pixel = at.image * plane + static_cast<int64_t>(at.row) * plan.output[1] + at.column;
    if constexpr (kWinners) {
      // Past a group's last channel its weights were repeated.
      const int block_n = column / C::BLOCK_N, in_group = block_n % plan.blocks_n * C::BLOCK_N + column % C::BLOCK_N;
      const int winner = block_n / plan.blocks_n * plan.out_channels + min(in_group, plan.out_channels - 1);
      plan.winners.put(blockIdx.y * plan.images * plane + pixel, winner);
    }
    if (!plan.scale_first) smallest *= plan.factor;
    if (plan.splits == 1) {
      output[pixel] = static_cast<T>(smallest);
    } else {
      partial[blockIdx.y * plan.images * plane + pixel] = smallest;
    }
  }
};

// Where a tile with results to make again is noted.
__device__ __forceinline__ Doubt doubt_of(const Tile& tile) { return Doubt(tile.index / gridDim.x); }

// Makes a warp's share of the results again, of the tiles that are noted.
// NOTE: a call, and not inlined, for the kernel's other code: ptxas allocates its registers apart.
template <class C>
__device__ __noinline__ void make_again(const ConvMmaPlan& plan, const WindowPlan& window_plan, const uint32_t* doubts) {
  // As for the input's warps: this SM's cache may hold what was there before.
  __threadfence();
  using Warp = Again<LaneOrder, C::BLOCK_N, C::BLOCK_N == 32 ? 1 : 2>;
  const Results<float, C> results{plan, window_plan.output, window_plan.partial};
  const int first_n = first_block(plan), end_n = end_block(plan);
  const int lane = threadIdx.x % kWarpSize;
  const bool infinite = Warp::any_infinite(window_plan, first_n, end_n, lane);
#pragma unroll 1
  for (Tile tile(plan); tile.exists(); tile.advance()) {
    if (!doubt_of(tile).noted(doubts)) continue;
#pragma unroll 1
    for (int first = threadIdx.x / kWarpSize * 16; first < C::BLOCK_M; first += C::kMathWarps * 16) {
      const OutputPixel pixels[2] = {results.pixel(tile, first + lane / 4), results.pixel(tile, first + lane / 4 + 8)};
      Warp{window_plan, pixels, lane, infinite}.put(results, first_n, end_n);
    }
  }
}

// ---- the kernel ----

// Producers and consumers wait for each other only through the rings.
template <typename T, class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSM)
    conv_mma_kernel(const Raw<T>* input, const uint4* weights, const float* constants, T* output, float* partial,
                    const __grid_constant__ ConvMmaPlan plan, const __grid_constant__ WindowPlan window_plan) {
  constexpr bool kScaled = sizeof(T) == 4;
  constexpr int kStepVectors = C::kStepBytes / 16;

  // NOTE: aligned, for bulk copies of whole lines: faster (on an H200).
  extern __shared__ __align__(128) uint4 shared[];
  char* const stages_b = reinterpret_cast<char*>(shared);
  const int stage_bytes = plan.stage_steps * C::kStepBytes;
  char* const inputs = stages_b + C::kStages * stage_bytes;
  const int input_bytes = plan.input_tile_pixels * plan.pitch;
  InputPixel* const input_table = reinterpret_cast<InputPixel*>(inputs + kInputBuffers * input_bytes);
  int* const step_table = reinterpret_cast<int*>(input_table + plan.input_tile_pixels);
  __shared__ float minima[kResults][C::WARPS_N][C::BLOCK_M];
  __shared__ float backs[kResults];          // what undoes the input's power of two
  __shared__ float least;                    // how much a result must be, times that, to be beyond doubt
  __shared__ uint32_t doubts[kDoubts / 32];  // this block's tiles with results to make again
  __shared__ uint32_t largest[2][kInputWarps];
  __shared__ int lane_table[C::kMathThreads];
  // Of each input tile; a change: from the item before, where both are summed together.
  __shared__ int exponents[kInputBuffers], changes[kInputBuffers];
  __shared__ uint64_t barriers[2 * (C::kStages + kInputBuffers) + kResults + 1];

  // NOTE: the shuffle tells the compiler that all lanes have the same warp: what follows from it fits in uniform registers.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
  // Where a step's tap and channels begin in the input tile, and which pixel each of its rows of channels is.
  for (int step = threadIdx.x; step < plan.steps; step += C::kThreads) {
    const int steps_per_tap = plan.chunk / kStepDepth, tap = step / steps_per_tap;
    const int row = tap / plan.piece[1] * plan.tap_step[0], column = tap % plan.piece[1] * plan.tap_step[1];
    step_table[step] = (row * plan.input_tile[1] + column) * plan.pitch + step % steps_per_tap * kStepDepth * 2;
  }
  for (int pixel = threadIdx.x; pixel < plan.input_tile_pixels; pixel += C::kThreads) {
    const int column = pixel % plan.input_tile[1], rest = pixel / plan.input_tile[1];
    const int row = rest % plan.input_tile[0], image = rest / plan.input_tile[0];
    const int64_t offset = image * plan.input_strides[0] + row * plan.input_step[0] * plan.input_strides[2] +
                           column * plan.input_step[1] * plan.input_strides[3];
    input_table[pixel] = {offset, static_cast<int16_t>(image), static_cast<int16_t>(row), static_cast<int16_t>(column)};
  }
  const uint32_t first_barrier = ptx::shared_address(barriers);
  Ring<C::kStages> weight_ring{first_barrier};
  Ring<kInputBuffers> input_ring{first_barrier + 2 * C::kStages * 8};
  // A buffer of results is empty again when the input tile that leads to its next result is full: no barrier has to say so.
  static_assert(kResults > kInputBuffers, "kResults: expected more buffers than tiles that the input's warps are ahead");
  Ring<kResults> result_ring{first_barrier + 2 * (C::kStages + kInputBuffers) * 8};
  const uint32_t all_stored = result_ring.full(kResults);  // all results are where they belong
  if (warp < C::kMathWarps) {
    const int m = warp / C::WARPS_N * C::M_TILES * 16 + threadIdx.x % 16;
    lane_table[threadIdx.x] = input_row(plan, m) + threadIdx.x % kWarpSize / 16 * 16;
  }
  if (kScaled && threadIdx.x < kDoubts / 32) doubts[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(weight_ring.full(i), kBulkCopies ? 1 : kWarpSize);
      ptx::mbarrier_init(weight_ring.empty(i), C::kMathThreads);
    }
    for (int i = 0; i < kInputBuffers; ++i) {
      ptx::mbarrier_init(input_ring.full(i), 2 * kInputThreads);
      ptx::mbarrier_init(input_ring.empty(i), C::kMathThreads);
    }
    for (int i = 0; i < kResults; ++i) ptx::mbarrier_init(result_ring.full(i), C::kMathThreads);
    ptx::mbarrier_init(all_stored, kInputThreads);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const int items = plan.pieces * plan.chunks;
  // One item and one group: an input tile serves all the output channels.
  const bool keep_input = items == 1 && plan.groups == 1;

  const Results<T, C> results{plan, output, partial};

  // ---- producer: weights ----
  if (warp == C::kMathWarps) {
    // The weights' warp: a stream of stages, begun anew with every tile.
    const int lane = threadIdx.x % kWarpSize;
    if (kBulkCopies && lane > 0) return;
    ptx::wait_for_previous_grid();
    const int first_n = first_block(plan), end_n = end_block(plan);
    for (int tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
      const uint4* source = weights + static_cast<int64_t>(first_n) * items * plan.steps * kStepVectors;
      for (int item = 0; item < (end_n - first_n) * items; ++item) {
        for (int steps = plan.steps; steps > 0; steps -= plan.stage_steps) {
          const int vectors = min(steps, plan.stage_steps) * kStepVectors;
          const uint32_t target = ptx::shared_address(stages_b) + weight_ring.slot * stage_bytes;
          const uint32_t full = weight_ring.full(weight_ring.slot);
          weight_ring.wait_empty();
          if constexpr (kBulkCopies) {
            ptx::mbarrier_arrive_expect_bytes(full, vectors * 16);
            ptx::bulk_copy(target, source, vectors * 16, full);
          } else {
#pragma unroll 8
            for (int i = lane; i < vectors; i += kWarpSize) ptx::cp_async_16(target + i * 16, source + i, true);
            ptx::mbarrier_arrive_after_cp_async(full);
          }
          weight_ring.advance();
          source += vectors;
        }
      }
    }
    ptx::cp_async_wait_all();
    return;
  }

  // ---- producers: input; and results on their way out ----
  if (warp > C::kMathWarps) {
    // The input's warps. Each time they have brought an input tile they store the results of the tile kInputBuffers before it,
    // which the consumers are done with: nobody waits.
    // No wait for the packing kernel: it let this one begin only after the input was complete. But this SM's cache may hold
    // what was there before. The results that are stored later come from warps that did wait.
    __threadfence();
    const int thread = threadIdx.x - C::kMathThreads - kWarpSize;
    const int first_n = first_block(plan), end_n = end_block(plan);
    Loader<Raw<T>, C::kUnitsInFlight> loader(input, plan, input_table, thread);
    int exponent = kFirstExponent;  // float32's power of two: guessed from the item before, mended where the guess was wrong
    int turn = 0;
    const auto largest_of_all = [&] {
      const uint32_t most = __reduce_max_sync(0xffffffffu, __float_as_uint(loader.largest));
      turn ^= 1;
      if (threadIdx.x % kWarpSize == 0) largest[turn][thread / kWarpSize] = most;
      ptx::barrier_sync(1, kInputThreads);
      uint32_t all = 0;
      for (uint32_t of_warp : largest[turn]) all = max(all, of_warp);
      return __uint_as_float(all);
    };
    const auto store_results = [&](const Tile& done) {
      result_ring.wait_full();
      float enough = 0.0f;
      bool doubtful = false;
      if constexpr (kScaled) {
        // Where weights are infinite, a NaN may come from what was no zero; where the scale is, a sign.
        enough = least * backs[result_ring.slot];
        doubtful = enough == kInfinity<float>;
      }
#pragma unroll 1
      for (int m = thread; m < C::BLOCK_M; m += kInputThreads) {
        float smallest = minima[result_ring.slot][0][m];
#pragma unroll
        for (int w = 1; w < C::WARPS_N; ++w) smallest = min_nan(smallest, minima[result_ring.slot][w][m]);
        const OutputPixel pixel = results.pixel(done, m);
        if (!results.exists(pixel)) continue;
        if (kScaled) doubtful |= fabsf(smallest) < enough;
        int column = 0;
        if constexpr (kWinners) {
          int share = 0;  // the first whose minimum it is
          while (share + 1 < C::WARPS_N && !same_bits(minima[result_ring.slot][share][m], smallest)) ++share;
          column = columns_of<C>(plan, result_ring.slot, share)[m];
        }
        results.put(pixel, smallest, column);
      }
      if (kScaled && doubtful) doubt_of(done).note(doubts);
      result_ring.advance();
    };
    Tile tile(plan);
    for (; tile.exists(); tile.advance()) {
      for (int block_n = first_n; block_n < (keep_input ? first_n + 1 : end_n); ++block_n) {
        float largest_summed = 0.0f;
        for (int item = 0; item < items; ++item) {
          char* const buffer = inputs + input_ring.slot * input_bytes;
          const uint32_t full = input_ring.full(input_ring.slot);
          const int exponent_before = exponent;
          loader.begin(tile, block_n / plan.blocks_n, item);
          input_ring.wait_empty();
          loader.fill(buffer, power_of_two(exponent));
          if constexpr (kScaled) {
            const auto fits = [&](float most) {
              const float scaled = most * power_of_two(exponent);
              return most == 0.0f || (scaled >= kSmallMaximum && scaled <= kLargestF16);
            };
            float most = fmaxf(largest_summed, largest_of_all());
            if (!fits(most)) {
              // Read again, leaving out infinities; then choose a power of two for all that is summed together.
              loader.begin(tile, block_n / plan.blocks_n, item);
              plan.vectors ? loader.template find_largest_finite<true>() : loader.template find_largest_finite<false>();
              // Not zero, if only infinities are.
              most = fmaxf(fmaxf(largest_summed, largest_of_all()), kSmallestNormal);
              if (!fits(most)) {
                exponent = even_exponent_for(most);
                loader.begin(tile, block_n / plan.blocks_n, item);
                loader.fill(buffer, power_of_two(exponent));
              }
            }
            largest_summed = most;
          }
          if (thread == 0) {
            exponents[input_ring.slot] = largest_summed == 0.0f ? kExponentOfZeros : exponent;
            changes[input_ring.slot] = item > 0 ? exponent - exponent_before : 0;
          }
          // Arrive twice: a copy's arrival says nothing about what else the thread wrote and read.
          ptx::mbarrier_arrive(full);
          if (sizeof(T) == 2 && plan.vectors) {
            ptx::mbarrier_arrive_after_cp_async(full);
          } else {
            ptx::mbarrier_arrive(full);
          }
          input_ring.advance();
        }
      }
      // NOTE: found anew; kept from tile to tile, ptxas spilled it (nvcc 13.0).
      Tile done = tile;
#pragma unroll
      for (int i = 0; i < kInputBuffers; ++i) done.retreat();
      if (done.exists()) store_results(done);
    }
#pragma unroll
    for (int i = 0; i < kInputBuffers; ++i) tile.retreat();
#pragma unroll 1
    for (int i = 0; i < kInputBuffers; ++i) {
      if (tile.exists()) store_results(tile);
      tile.advance();
    }
    ptx::cp_async_wait_all();
    if (kScaled) ptx::mbarrier_arrive(all_stored);
    return;
  }

  // ---- consumers: multiply ----
  // The warps that multiply.
  ptx::wait_for_previous_grid();
  const int lane = threadIdx.x % kWarpSize, warp_n = warp % C::WARPS_N;
  const int first_n = first_block(plan), end_n = end_block(plan);
  if (kScaled && warp == 0) {
    float most = 0.0f;
    for (int column = first_n * C::BLOCK_N + lane; column < end_n * C::BLOCK_N; column += kWarpSize) {
      const float* const block = constants + static_cast<int64_t>(column / C::BLOCK_N) * (C::BLOCK_N * kConstants);
      most = fmaxf(most, block[LaneOrder::places(C::BLOCK_N, column % C::BLOCK_N).size]);
    }
    most = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most)));
    if (lane == 0) least = most * window_plan.least;
  }
  for (int tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    for (int block_n = first_n; block_n < end_n; ++block_n) {
      // NOTE: the thread's index is read anew wherever it matters: ptxas spills what it keeps through the main loop.
      const auto my_constants = [&] {
        const int thread = ptx::thread_index(), column = thread / kWarpSize % C::WARPS_N * C::N_TILES * 8 + thread % 4 * 2;
        return reinterpret_cast<const float4*>(constants + static_cast<int64_t>(block_n) * (C::BLOCK_N * kConstants) + column * 2);
      };
      // The sums begin with the bias, unless a power of two comes between.
      const float4* constant = my_constants();
      float sums[C::M_TILES][C::N_TILES][4];
#pragma unroll
      for (int j = 0; j < C::N_TILES; ++j) {
        const float4 two = kScaled ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : constant[j * 4];
#pragma unroll
        for (int i = 0; i < C::M_TILES; ++i) sums[i][j][0] = sums[i][j][2] = two.y, sums[i][j][1] = sums[i][j][3] = two.w;
      }
      int exponent = 0;
      for (int item = 0; item < items; ++item) {
        if (!keep_input || block_n == first_n) {
          input_ring.wait_full();
          if constexpr (kScaled) {
            const int change = changes[input_ring.slot];
            if (change != 0) {
#pragma unroll
              for (auto& row : sums) {
#pragma unroll
                for (auto& matrix : row) {
#pragma unroll
                  for (float& sum : matrix) sum = sum * power_of_two(change / 2) * power_of_two(change - change / 2);
                }
              }
            }
          }
        }
        // A lane's row of the warp's first 16 x 16 matrix of A, as ldmatrix wants it. A tile's sides are powers of two, so that
        // the other matrices are the same distances away (plan.matrix_rows) from any row.
        const uint32_t my_row = ptx::shared_address(inputs) + input_ring.slot * input_bytes + lane_table[threadIdx.x];
        const char* const my_b = stages_b + (warp_n * (C::N_TILES / 2) * kWarpSize + lane) * 16;
        const int* offsets = step_table;
        // Operands are read ahead of their use, across steps and stages: A by a whole step, B by a pair of its matrices.
        uint32_t a[C::M_TILES][4];
        weight_ring.wait_full();
        const uint4* b = reinterpret_cast<const uint4*>(my_b + weight_ring.slot * stage_bytes);
        uint4 pair = *b;
#pragma unroll
        for (int i = 0; i < C::M_TILES; ++i) ptx::ldmatrix_x4(a[i], my_row + *offsets + plan.matrix_rows[i]);
        const auto multiply = [&](const uint4* next_b, uint32_t next_row) {
#pragma unroll
          for (int j = 0; j < C::N_TILES / 2; ++j) {
            const bool last = j + 1 == C::N_TILES / 2;
            const uint4 next_pair = last ? *next_b : b[(j + 1) * kWarpSize];
#pragma unroll
            for (int i = 0; i < C::M_TILES; ++i) {
              ptx::mma_m16n8k16(sums[i][2 * j], a[i], pair.x, pair.y, Operand<T>());
              ptx::mma_m16n8k16(sums[i][2 * j + 1], a[i], pair.z, pair.w, Operand<T>());
              if (last) ptx::ldmatrix_x4(a[i], next_row + plan.matrix_rows[i]);
            }
            pair = next_pair;
          }
          b = next_b;
        };
#pragma unroll 1
        for (int left = plan.steps; left > 0; left -= plan.stage_steps) {
#pragma unroll 1
          for (int step = min(left, plan.stage_steps); step > 1; --step) multiply(b + kStepVectors, my_row + *++offsets);
          // The last step of a stage reads ahead in the next stage; the last step of all reads anything.
          const int done = weight_ring.slot;
          weight_ring.advance();
          const uint4* next_b = b;
          if (left > plan.stage_steps) {
            ++offsets;
            weight_ring.wait_full();
            next_b = reinterpret_cast<const uint4*>(my_b + weight_ring.slot * stage_bytes);
          }
          multiply(next_b, my_row + *offsets);
          weight_ring.release(done);
        }
        if (kScaled && item + 1 == items) exponent = exponents[input_ring.slot];
        if (!keep_input || block_n + 1 == end_n) {
          input_ring.release(input_ring.slot);
          input_ring.advance();
        }
      }

      // ---- epilogue: bias, scale and min, in the registers that have the sums ----
      float low[C::M_TILES][2];
      int winner[C::M_TILES][2];
#pragma unroll
      for (auto& row : low) row[0] = row[1] = kInfinity<float>;
#pragma unroll
      for (auto& row : winner) row[0] = row[1] = 0;
      constant = my_constants();
      // A scale that makes NaN of some channels multiplies each channel's value, and so does a channel's own factor; and a power
      // of two whose product with the weights' may leave float32's range.
      const float root = power_of_two(-exponent / 2), back = root * root;
      const bool apart = plan.scale_first || abs(exponent) > kMostJoined;
#pragma unroll
      for (int j = 0; j < C::N_TILES; ++j) {
        float4 two = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
        if constexpr (kScaled) two = constant[j * 4];
        if (apart) {
          float4 own = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
          if constexpr (C::takes_scale_first(sizeof(T))) own = constant[C::BLOCK_N / 2 + j * 4];
#pragma unroll
          for (int i = 0; i < C::M_TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              sums[i][j][h] = scale_back(sums[i][j][h], root, h % 2 == 0 ? two.x : two.z, h % 2 == 0 ? two.y : two.w) *
                              (h % 2 == 0 ? own.x : own.z);
            }
          }
          two = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
        } else {
          two.x *= back, two.z *= back;
        }
#pragma unroll
        for (int i = 0; i < C::M_TILES; ++i) {
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            const float sum = sums[i][j][h];
            const float value = kScaled ? fmaf(sum, h % 2 == 0 ? two.x : two.z, h % 2 == 0 ? two.y : two.w) : sum;
            take_smaller(low[i][h / 2], value, winner[i][h / 2], j * 8 + h % 2);
          }
        }
      }
      const int thread = ptx::thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
      const int warp_m = warp / C::WARPS_N, warp_n = warp % C::WARPS_N, result = result_ring.slot;
      // Four lanes share a pixel. What one of them leaves in shared memory is its own until the tile is done.
#pragma unroll
      for (int i = 0; i < C::M_TILES; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          winner[i][h] += block_n * C::BLOCK_N + warp_n * C::N_TILES * 8 + lane % 4 * 2;
          take_smaller_of_lanes(low[i][h], winner[i][h], 1);
          take_smaller_of_lanes(low[i][h], winner[i][h], 2);
          const int m = ((warp_m * C::M_TILES + i) * 2 + h) * 8 + lane / 4;
          float& smallest = minima[result][warp_n][m];
          if constexpr (kWinners) {
            const bool wins = block_n == first_n || !same_bits(smallest, min_nan(smallest, low[i][h]));
            if (lane % 4 == 0 && wins) columns_of<C>(plan, result, warp_n)[m] = winner[i][h];
          }
          if (lane % 4 == 0) smallest = block_n == first_n ? low[i][h] : min_nan(smallest, low[i][h]);
        }
      }
      if (kScaled && thread == 0) backs[result] = block_n == first_n ? back : fmaxf(backs[result], back);
    }

    ptx::mbarrier_arrive(result_ring.full(result_ring.slot));
    result_ring.advance();
  }

  // ---- consumers: results with too few digits, again ----
  if constexpr (kScaled) {
    ptx::mbarrier_wait(all_stored, 0);
    bool any = false;
    for (uint32_t bits : doubts) any |= bits != 0;
    if (any) make_again<C>(plan, window_plan, doubts);
  }
}

// ---- host: launch ----

template <typename T, class C>
struct MmaLaunch {
  static void run(const Tensor& input, const Workspace& workspace, Tensor& output, const ConvMmaPlan& plan,
                  const WindowPlan& windows, int shared_bytes, dim3 grid, cudaStream_t stream);
};

#if !LAUNCHES_LIE_ELSEWHERE
template <typename T, class C>
void MmaLaunch<T, C>::run(const Tensor& input, const Workspace& workspace, Tensor& output, const ConvMmaPlan& plan,
                          const WindowPlan& windows, int shared_bytes, dim3 grid, cudaStream_t stream) {
  const auto kernel = conv_mma_kernel<T, C>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  launch_early(kernel, grid, C::kThreads, shared_bytes, stream, static_cast<const Raw<T>*>(input.data_ptr()),
               reinterpret_cast<const uint4*>(workspace.packed), workspace.constants, static_cast<T*>(output.data_ptr()),
               workspace.partial, plan, windows);
}
#endif

template <typename T, class C>
void launch_conv_mma(const ConvMmaCandidate& candidate, const ConvShape& shape, const Tensor& input, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Scale& scale, Tensor& output, Winners winners,
                     const Device& device) {
  ConvMmaPlan plan = candidate.plan;
  plan.scale_first = scale.first;
  plan.factor = scale.factor;
  const WeightOrder order{plan.in_channels,
                          {static_cast<int>(shape.kernel[0]), static_cast<int>(shape.kernel[1])},
                          {plan.piece[0], plan.piece[1]},
                          plan.pieces_across,
                          plan.pieces,
                          plan.chunk,
                          plan.chunks,
                          plan.steps,
                          plan.blocks_n};
  const int64_t blocks_n = plan.all_blocks_n;
  const int64_t packed_bytes = blocks_n * plan.pieces * plan.chunks * plan.steps * C::kStepBytes;
  const int slots = std::max(device.multiprocessors * candidate.blocks_per_sm / plan.splits, 1);
  const dim3 grid(std::min(plan.tiles, slots), plan.splits);
  const int64_t partials = plan.splits > 1 ? plan.splits * shape.pixels() : 0;
  const Workspace workspace(input, packed_bytes, blocks_n * C::BLOCK_N * kConstants, partials,
                            static_cast<int64_t>(grid.x) * grid.y * kResults * C::WARPS_N * C::BLOCK_M);
  const cudaStream_t stream = current_stream(input);
  pack_weights<T, LaneOrder>(order, shape, C::BLOCK_N, weight, bias, scale, workspace, device, stream);

  plan.tile_step[2] = grid.x % plan.tiles_across[1];
  plan.tile_step[1] = grid.x / plan.tiles_across[1] % plan.tiles_across[0];
  plan.tile_step[0] = grid.x / plan.tiles_across[1] / plan.tiles_across[0];
  plan.out_channels = static_cast<int>(shape.out_channels);
  plan.columns = workspace.more_winners;
  plan.winners = plan.splits == 1 ? winners : Winners{workspace.partial_winners, true};
  MmaLaunch<T, C>::run(input, workspace, output, plan, WindowPlan(order, shape, scale.first, false, input, workspace, output),
                       candidate.shared_bytes, grid, stream);
  if (plan.splits > 1) combine<T>(workspace, plan.splits, shape.pixels(), output, winners, stream);
}

// Launches the cheapest of these configurations.
template <typename T, class... Configs>
void run_conv_mma(List<Configs...> configs, const ConvShape& shape, const Tensor& input, const Tensor& weight,
                  const std::optional<Tensor>& bias, const Scale& scale, Tensor& output, Winners winners) {
  const int index = input.get_device_index();
  const Device device{attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)};
  const bool vectors = channels_are_vectors(shape, sizeof(T), is_aligned(input));
  const ConvMmaCandidate best = plan_conv_mma(configs, shape, vectors, sizeof(T), kRowPadding, scale.first, device);
  STD_TORCH_CHECK(best.config >= 0, "input: conv_mma has no plan for this shape");
  int config = 0;
  const auto launch = [&](auto tile) {
    if (config++ != best.config) return;
    launch_conv_mma<T, decltype(tile)>(best, shape, input, weight, bias, scale, output, winners, device);
  };
  (launch(Configs()), ...);
}

template <typename T, class... Configs>
auto share_of_launches(List<Configs...>) {
  return share_of(List<MmaLaunch<T, Configs>...>());
}

// Compiled in up to 3 parts.
#if FUSED_KERNELS_PART > 0
[[gnu::used]] const auto kLaunches = share_of_launches<Element>(Tiles());
#else
Forward conv_mma(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                 std::string precision, const std::optional<Tensor>& scales = std::nullopt) {
  const ConvShape shape = check_conv(input, weight, bias, stride, padding, dilation, groups);
  check_scales(scales, input, weight.size(0), scale);
  return convolve("conv_mma", "tf32", input, shape, precision, [&](auto type, Tensor& output, Winners winners) {
    run_conv_mma<decltype(type)>(Tiles(), shape, input, weight, bias, Scale(scale, scales), output, winners);
  });
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(FORWARD("conv_mma"), TORCH_BOX(&conv_mma)); }
#endif

}  // namespace fused_kernels
