// conv_mma: convolution, scale and min in one kernel, on tensor cores, for every GPU since Ampere.
//
// The convolution is an implicit GEMM: M = output pixels, N = output channels, K = input channels x filter taps. A block takes
// a tile of the image and all its output channels, so that the minimum over N stays inside. It keeps the tile's halo in shared
// memory, pixel by pixel, a row of channels each; then a filter tap is nothing but another start address in it.
//   operand A   halo rows padded by 16 bytes (no bank conflicts), read by ldmatrix; two halos, the next one fills meanwhile
//   operand B   the weights, in the order in which the lanes hold them, in a ring of buffers
//   result      up to 128 sums a thread; bias, scale and min happen in those registers; one number a pixel goes to memory
// A warp that computes addresses does not multiply. So warps have roles: most multiply and do nothing else, one brings the
// weights, three bring the input and take the results away. 16-bit channels_last input comes by cp.async; all else passes
// through registers, which transposes and converts.
// float32 is computed with float16 operands: the same 10-bit mantissa as TF32, rounded to nearest, at twice TF32's rate. A
// power of two a tile and one an output channel keep the largest values inside float16's range: the device notices a tile that
// leaves it, and reads it again. What a small value beside a large one loses is at most 2^-31 of the largest in its tile.
// Limit: mma.sync, which reaches two thirds of the rate that wgmma gets out of Hopper's tensor cores.
// Previous rung: conv_direct.

#include "implicit_gemm.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/thread_index.cuh"

#include <numeric>

namespace fused_kernels {

// Powers of two up to this multiply those of the weights without leaving float32's range.
constexpr int kExactExponent = 12;

constexpr int kHalos = 2;           // buffers of input
constexpr int kResults = 3;         // and of results
constexpr int kUnit = 8;            // channels that a thread moves at once: 16 bytes of operand
constexpr int kRowPadding = 16;     // bytes; makes the pitch an odd multiple of 16
constexpr int kMaxSteps = 2048;     // entries of the table of tap offsets
constexpr int kHaloWarps = 3, kHaloThreads = kHaloWarps * kWarpSize;

// One instruction of one thread brings a stage of weights, where the chip has it.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

// What a block works on: BLOCK_M pixels by BLOCK_N output channels; a warp has M_TILES x 16 by N_TILES x 8 of them.
template <int WARPS_M_, int WARPS_N_, int M_TILES_, int N_TILES_>
struct Shape {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, M_TILES = M_TILES_, N_TILES = N_TILES_;
  static constexpr int BLOCK_M = WARPS_M * M_TILES * 16, BLOCK_N = WARPS_N * N_TILES * 8;
  static constexpr int kMathWarps = WARPS_M * WARPS_N, kMathThreads = kMathWarps * kWarpSize;
  static constexpr int kThreads = kMathThreads + kWarpSize + kHaloThreads;
  static constexpr int kStepBytes = kStepDepth * BLOCK_N * 2;  // of weights
};
// Chosen by measurement on an H200. kStages buffers of kStageSteps steps of weights: a short stage ends before the next one
// has come, unless there are several; kUnitsInFlight: of a thread that loads; kSpeed: 64 multiplications a clock of an SM.
struct Large : Shape<4, 2, 4, 8> {
  static constexpr int kBlocksPerSM = 1, kStages = 2, kStageSteps = 9, kUnitsInFlight = 6, kSpeed = 20;
};
struct Medium : Shape<2, 2, 4, 4> {
  static constexpr int kBlocksPerSM = 2, kStages = 4, kStageSteps = 6, kUnitsInFlight = 4, kSpeed = 17;
};
struct Small : Shape<4, 1, 1, 4> {
  static constexpr int kBlocksPerSM = 3, kStages = 4, kStageSteps = 6, kUnitsInFlight = 2, kSpeed = 10;
};

// How the work is cut; the same for every block.
struct Plan {
  int images, input[2], output[2], stride[2], padding[2];
  int64_t input_strides[4];
  int in_channels;               // of a group
  // A tile of 2^tile_log2[0] rows by 2^tile_log2[1] columns, of as many images as fill BLOCK_M.
  int tile_log2[2], tile_images, tiles_across[2], tiles;
  int tile_step[3];              // a block's next tile: so many images' tiles, rows of tiles and tiles on
  // Its halo: halo_step input rows apart; an output row is output_step halo rows on, a filter tap tap_step.
  int halo[2], halo_pixels, halo_step[2], output_step[2], tap_step[2];
  int matrix_rows[4];            // of a warp: where the pixels of its 16 x 16 matrices begin in the halo, in bytes
  // The sum over K comes in items: a piece of the filter (mostly all of it) for a chunk of the channels.
  int piece[2], pieces_across, pieces, piece_step[2], chunk, chunks, pitch;
  int steps, stage_steps, stages, units;  // of an item
  int blocks_n, groups;                     // blocks of output channels, in each group
  int splits, blocks_a_split;               // how the output channels are cut, blockIdx.y
  bool vectors;                             // channels side by side and aligned: wide loads
  int minors, minor_step, major_step;       // how the threads that load walk over an item's units
  float factor;                             // |scale|, or where a minimum does not commute with it, scale
  bool scale_first;
  // Only kWinners. The columns that won wait in global memory: in shared memory they would change the plan, and so the order of
  // the sums.
  int out_channels;                         // of a group
  int* columns;
  Winners winners;                          // of each split
};

// A block's place among the tiles, which it walks without dividing: in images, rows and columns of the output.
struct Tile {
  const Plan& plan;
  int index, at[3];  // at: of images, rows, columns of tiles

  __device__ __forceinline__ explicit Tile(const Plan& plan) : plan(plan), index(blockIdx.x) { locate(); }
  __device__ __forceinline__ void locate() {
    at[2] = index % plan.tiles_across[1];
    at[1] = index / plan.tiles_across[1] % plan.tiles_across[0];
    at[0] = index / plan.tiles_across[1] / plan.tiles_across[0];
  }
  __device__ __forceinline__ bool exists() const { return index < plan.tiles; }
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
  __device__ __forceinline__ int image() const { return at[0] * plan.tile_images; }
  __device__ __forceinline__ int row() const { return at[1] << plan.tile_log2[0]; }
  __device__ __forceinline__ int column() const { return at[2] << plan.tile_log2[1]; }
};

// Eight channels of one pixel on their way from global to shared memory.
template <typename R>
struct Unit {
  alignas(16) R values[kUnit];
  int target;  // byte offset in the halo's buffer, or -1
};

// A row of the halo's table: how far a pixel is from the halo's first one, in elements of the input and in coordinates.
struct HaloPixel {
  int64_t offset;
  int16_t image, row, column;
};

// Reads the halo of one item, a few units at a time.
template <typename R, int IN_FLIGHT>
struct Loader {
  const R* const input;
  const Plan& plan;
  const HaloPixel* const table;
  const int thread, first_minor, first_major;
  const R* base;
  int image, top, left, channels_left;
  bool whole;  // no padding, and as many channels as a chunk has
  int unit, minor, major;
  float largest;

  // Neighbouring lanes take neighbouring pixels, or where channels lie side by side, neighbouring channels.
  __device__ __forceinline__ Loader(const R* input, const Plan& plan, const HaloPixel* table, int thread)
      : input(input), plan(plan), table(table), thread(thread), first_minor(thread % plan.minors),
        first_major(thread / plan.minors) {}

  __device__ __forceinline__ void begin(const Tile& tile, int group, int item) {
    const int piece = item / plan.chunks, first = item % plan.chunks * plan.chunk;
    image = tile.image();
    top = tile.row() * plan.stride[0] - plan.padding[0] + piece / plan.pieces_across * plan.piece_step[0];
    left = tile.column() * plan.stride[1] - plan.padding[1] + piece % plan.pieces_across * plan.piece_step[1];
    whole = image + plan.tile_images <= plan.images && top >= 0 && left >= 0 &&
             top + (plan.halo[0] - 1) * plan.halo_step[0] < plan.input[0] &&
             left + (plan.halo[1] - 1) * plan.halo_step[1] < plan.input[1] && plan.in_channels - first >= plan.chunk;
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

  // How many channels from `first` on there are at a halo's pixel: none in the padding.
  __device__ __forceinline__ int count(const HaloPixel& pixel, int first) const {
    const int y = top + pixel.row * plan.halo_step[0], x = left + pixel.column * plan.halo_step[1];
    const bool padding = image + pixel.image >= plan.images ||
                         static_cast<unsigned>(y) >= static_cast<unsigned>(plan.input[0]) ||
                         static_cast<unsigned>(x) >= static_cast<unsigned>(plan.input[1]);
    return padding ? 0 : channels_left - first;
  }

  // One unit, on its way. WHOLE: no padding, all channels there. VECTORS: channels side by side and aligned. (__ldg although the
  // kernel begins early: the input is complete before any of it runs.)
  template <bool WHOLE, bool VECTORS>
  __device__ __forceinline__ void load(Unit<R>& u, uint32_t buffer) {
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
    unit += kHaloThreads;
    minor += plan.minor_step;
    major += plan.major_step;
    if (minor >= plan.minors) minor -= plan.minors, ++major;
  }

  __device__ __forceinline__ void store(const Unit<R>& u, char* buffer, float factor) {
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
  __device__ __forceinline__ void fill(char* buffer, float factor) {
#pragma unroll 1
    while (!done()) {
      Unit<R> units[IN_FLIGHT];
#pragma unroll
      for (auto& u : units) load<WHOLE, VECTORS>(u, ptx::shared_address(buffer));
      if constexpr (sizeof(R) == 4 || !VECTORS) {
#pragma unroll
        for (auto& u : units) store(u, buffer, factor);
      }
    }
  }

  // NOTE: all that is known beforehand is decided out here. A branch between two loads makes ptxas share a scoreboard between
  // them, and so wait for the first before it issues the second.
  __device__ __forceinline__ void fill(char* buffer, float factor) {
    if (plan.vectors) {
      whole ? fill<true, true>(buffer, factor) : fill<false, true>(buffer, factor);
    } else {
      whole ? fill<true, false>(buffer, factor) : fill<false, false>(buffer, factor);
    }
  }

  // Reads the item once more, for its largest value that is finite.
  template <bool VECTORS>
  __device__ __forceinline__ void find_largest_finite() {
#pragma unroll 1
    while (!done()) {
      Unit<R> u;
      load<false, VECTORS>(u, 0);
#pragma unroll
      for (R value : u.values) largest = fmaxf(largest, fabsf(value) < kInfinity<float> ? fabsf(value) : 0.0f);
    }
  }
};

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

// Where the m-th pixel of a tile is: image, row, column.
__host__ __device__ __forceinline__ void place(const Plan& plan, int m, int& image, int& row, int& column) {
  column = m & ((1 << plan.tile_log2[1]) - 1);
  row = m >> plan.tile_log2[1] & ((1 << plan.tile_log2[0]) - 1);
  image = m >> (plan.tile_log2[0] + plan.tile_log2[1]);
}

// And where its first filter tap's channels begin in the halo, in bytes.
__host__ __device__ __forceinline__ int halo_row(const Plan& plan, int m) {
  int image, row, column;
  place(plan, m, image, row, column);
  return ((image * plan.halo[0] + row * plan.output_step[0]) * plan.halo[1] + column * plan.output_step[1]) * plan.pitch;
}

// Where the winners of a result of this block wait, as columns of operand B: those that one share of the warps found.
template <class C>
__device__ __forceinline__ int* columns_of(const Plan& plan, int result, int share) {
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  return plan.columns + ((block * kResults + result) * C::WARPS_N + share) * C::BLOCK_M;
}

// Each warp has one of three roles, and they wait for each other only through the rings.
template <typename T, class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSM)
    conv_mma_kernel(const Raw<T>* input, const uint4* weights, const float2* constants, T* output, float* partial,
                    const __grid_constant__ Plan plan) {
  constexpr bool kScaled = sizeof(T) == 4;
  constexpr int kStepVectors = C::kStepBytes / 16;

  extern __shared__ uint4 shared[];
  char* const stages_b = reinterpret_cast<char*>(shared);
  const int stage_bytes = plan.stage_steps * C::kStepBytes;
  char* const halos = stages_b + C::kStages * stage_bytes;
  const int halo_bytes = plan.halo_pixels * plan.pitch;
  HaloPixel* const halo_table = reinterpret_cast<HaloPixel*>(halos + kHalos * halo_bytes);
  int* const step_table = reinterpret_cast<int*>(halo_table + plan.halo_pixels);
  __shared__ float minima[kResults][C::WARPS_N][C::BLOCK_M];
  __shared__ uint32_t largest[2][kHaloWarps];
  __shared__ int lane_table[C::kMathThreads];
  __shared__ int exponents[kHalos], changes[kHalos];  // a change: from the item before, where both are summed together
  __shared__ uint64_t barriers[2 * (C::kStages + kHalos) + kResults];

  // NOTE: the shuffle tells the compiler that all lanes have the same warp: what follows from it fits in uniform registers.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
  // Where a step's tap and channels begin in the halo, and which pixel a halo's row of channels is.
  for (int step = threadIdx.x; step < plan.steps; step += C::kThreads) {
    const int steps_a_tap = plan.chunk / kStepDepth, tap = step / steps_a_tap;
    const int row = tap / plan.piece[1] * plan.tap_step[0], column = tap % plan.piece[1] * plan.tap_step[1];
    step_table[step] = (row * plan.halo[1] + column) * plan.pitch + step % steps_a_tap * kStepDepth * 2;
  }
  for (int pixel = threadIdx.x; pixel < plan.halo_pixels; pixel += C::kThreads) {
    const int column = pixel % plan.halo[1], rest = pixel / plan.halo[1];
    const int row = rest % plan.halo[0], image = rest / plan.halo[0];
    const int64_t offset = image * plan.input_strides[0] + row * plan.halo_step[0] * plan.input_strides[2] +
                           column * plan.halo_step[1] * plan.input_strides[3];
    halo_table[pixel] = {offset, static_cast<int16_t>(image), static_cast<int16_t>(row), static_cast<int16_t>(column)};
  }
  const uint32_t first_barrier = ptx::shared_address(barriers);
  Ring<C::kStages> weight_ring{first_barrier};
  Ring<kHalos> halo_ring{first_barrier + 2 * C::kStages * 8};
  // A buffer of results is empty again when the halo of the tile that needs it next is full: no barrier has to say so.
  static_assert(kResults > kHalos, "kResults: expected more buffers than tiles that the input's warps are ahead");
  Ring<kResults> result_ring{first_barrier + 2 * (C::kStages + kHalos) * 8};
  if (warp < C::kMathWarps) {
    const int m = warp / C::WARPS_N * C::M_TILES * 16 + threadIdx.x % 16;
    lane_table[threadIdx.x] = halo_row(plan, m) + threadIdx.x % kWarpSize / 16 * 16;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(weight_ring.full(i), kBulkCopies ? 1 : kWarpSize);
      ptx::mbarrier_init(weight_ring.empty(i), C::kMathThreads);
    }
    for (int i = 0; i < kHalos; ++i) {
      ptx::mbarrier_init(halo_ring.full(i), 2 * kHaloThreads);
      ptx::mbarrier_init(halo_ring.empty(i), C::kMathThreads);
    }
    for (int i = 0; i < kResults; ++i) ptx::mbarrier_init(result_ring.full(i), C::kMathThreads);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  // This block's share of the output channels.
  const int first_n = blockIdx.y * plan.blocks_a_split;
  const int end_n = min(first_n + plan.blocks_a_split, plan.groups * plan.blocks_n);
  const int items = plan.pieces * plan.chunks;
  // One item and one group: a halo serves all the output channels.
  const bool keep_halo = items == 1 && plan.groups == 1;

  if (warp == C::kMathWarps) {
    // The weights' warp: a stream of stages, begun anew with every tile.
    const int lane = threadIdx.x % kWarpSize;
    if (kBulkCopies && lane > 0) return;
    ptx::wait_for_previous_grid();
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

  if (warp > C::kMathWarps) {
    // The input's warps. When they have brought a tile's halo they take away the results of the tile kHalos before it, which the
    // others are done with: nobody waits.
    // They don't wait for the packing kernel: it let this one begin only after the input was there. But this SM's cache may hold
    // what was there before. What they write, later, comes from warps that did wait.
    __threadfence();
    const int thread = threadIdx.x - C::kMathThreads - kWarpSize;
    Loader<Raw<T>, C::kUnitsInFlight> loader(input, plan, halo_table, thread);
    int exponent = kFirstExponent;  // float32's power of two: guessed from the item before, mended where the guess was wrong
    int turn = 0;
    const auto largest_of_all = [&] {
      const uint32_t most = __reduce_max_sync(0xffffffffu, __float_as_uint(loader.largest));
      turn ^= 1;
      if (threadIdx.x % kWarpSize == 0) largest[turn][thread / kWarpSize] = most;
      ptx::barrier_sync(1, kHaloThreads);
      uint32_t all = 0;
      for (uint32_t of_warp : largest[turn]) all = max(all, of_warp);
      return __uint_as_float(all);
    };
    Tile done(plan);
    const auto take_away = [&] {
      result_ring.wait_full();
      // NOTE: kept from tile to tile, the place was spilled (nvcc 13.0, sm_80).
      if constexpr (kWinners) done.locate();
#pragma unroll 1
      for (int m = thread; m < C::BLOCK_M; m += kHaloThreads) {
        float smallest = minima[result_ring.slot][0][m];
#pragma unroll
        for (int w = 1; w < C::WARPS_N; ++w) smallest = min_nan(smallest, minima[result_ring.slot][w][m]);
        int image, row, column;
        place(plan, m, image, row, column);
        image += done.image(), row += done.row(), column += done.column();
        if (image >= plan.images || row >= plan.output[0] || column >= plan.output[1]) continue;
        const int64_t plane = static_cast<int64_t>(plan.output[0]) * plan.output[1];
        const int64_t pixel = image * plane + static_cast<int64_t>(row) * plan.output[1] + column;
        if constexpr (kWinners) {
          int share = 0;  // the first whose minimum it is
          while (share + 1 < C::WARPS_N && !same_bits(minima[result_ring.slot][share][m], smallest)) ++share;
          // Past a group's last channel its weights were repeated.
          const int column = columns_of<C>(plan, result_ring.slot, share)[m], block_n = column / C::BLOCK_N;
          const int in_group = block_n % plan.blocks_n * C::BLOCK_N + column % C::BLOCK_N;
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
      result_ring.advance();
      done.advance();
    };
    for (Tile tile(plan); tile.exists(); tile.advance()) {
      for (int block_n = first_n; block_n < (keep_halo ? first_n + 1 : end_n); ++block_n) {
        float largest_summed = 0.0f;
        for (int item = 0; item < items; ++item) {
          char* const halo = halos + halo_ring.slot * halo_bytes;
          const uint32_t full = halo_ring.full(halo_ring.slot);
          const int exponent_before = exponent;
          loader.begin(tile, block_n / plan.blocks_n, item);
          halo_ring.wait_empty();
          loader.fill(halo, power_of_two(exponent));
          if constexpr (kScaled) {
            const auto fits = [&](float most) {
              const float scaled = most * power_of_two(exponent);
              return most == 0.0f || (scaled >= kSmallMaximum && scaled <= kLargestF16);
            };
            float most = fmaxf(largest_summed, largest_of_all());
            if (!fits(most)) {
              // Look again, past infinities; then choose a power of two for all that is summed together.
              loader.begin(tile, block_n / plan.blocks_n, item);
              plan.vectors ? loader.template find_largest_finite<true>() : loader.template find_largest_finite<false>();
              most = fmaxf(largest_summed, largest_of_all());
              if (!fits(most)) {
                exponent = exponent_for(most);
                loader.begin(tile, block_n / plan.blocks_n, item);
                loader.fill(halo, power_of_two(exponent));
              }
            }
            largest_summed = most;
          }
          if (thread == 0) {
            exponents[halo_ring.slot] = exponent;
            changes[halo_ring.slot] = item > 0 ? exponent - exponent_before : 0;
          }
          // Twice: a copy's arrival says nothing of what else the thread wrote and read.
          ptx::mbarrier_arrive(full);
          if (sizeof(T) == 2 && plan.vectors) {
            ptx::mbarrier_arrive_after_cp_async(full);
          } else {
            ptx::mbarrier_arrive(full);
          }
          halo_ring.advance();
        }
      }
      if (tile.index >= static_cast<int>(blockIdx.x + kHalos * gridDim.x)) take_away();
    }
    while (done.exists()) take_away();
    ptx::cp_async_wait_all();
    return;
  }

  // The warps that multiply.
  ptx::wait_for_previous_grid();
  const int lane = threadIdx.x % kWarpSize, warp_n = warp % C::WARPS_N;

  const int my_tiles = (plan.tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  for (int n = 0; n < my_tiles; ++n) {
    for (int block_n = first_n; block_n < end_n; ++block_n) {
      // NOTE: who this thread is, is asked anew wherever it matters: ptxas spills what it keeps through the main loop.
      const auto my_constants = [&] {
        const int thread = ptx::thread_index(), column = thread / kWarpSize % C::WARPS_N * C::N_TILES * 8 + thread % 4 * 2;
        return reinterpret_cast<const float4*>(constants + static_cast<int64_t>(block_n) * C::BLOCK_N + column);
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
        if (!keep_halo || block_n == first_n) {
          halo_ring.wait_full();
          if constexpr (kScaled) {
            const int change = changes[halo_ring.slot];
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
        const uint32_t halo = ptx::shared_address(halos) + halo_ring.slot * halo_bytes + lane_table[threadIdx.x];
        const char* const my_b = stages_b + (warp_n * (C::N_TILES / 2) * kWarpSize + lane) * 16;
        const int* offsets = step_table;
        // Operands are read ahead of their use, across steps and stages: A by a whole step, B by a pair of its matrices.
        uint32_t a[C::M_TILES][4];
        weight_ring.wait_full();
        const uint4* b = reinterpret_cast<const uint4*>(my_b + weight_ring.slot * stage_bytes);
        uint4 pair = *b;
#pragma unroll
        for (int i = 0; i < C::M_TILES; ++i) ptx::ldmatrix_x4(a[i], halo + *offsets + plan.matrix_rows[i]);
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
          for (int step = min(left, plan.stage_steps); step > 1; --step) multiply(b + kStepVectors, halo + *++offsets);
          // The last step of a stage reads on in the next stage; of all stages, anything.
          const int done = weight_ring.slot;
          weight_ring.advance();
          const uint4* next_b = b;
          if (left > plan.stage_steps) {
            ++offsets;
            weight_ring.wait_full();
            next_b = reinterpret_cast<const uint4*>(my_b + weight_ring.slot * stage_bytes);
          }
          multiply(next_b, halo + *offsets);
          weight_ring.release(done);
        }
        exponent = kScaled ? exponents[halo_ring.slot] : 0;
        if (!keep_halo || block_n + 1 == end_n) {
          halo_ring.release(halo_ring.slot);
          halo_ring.advance();
        }
      }

      // The epilogue: bias, scale and min where the sums are.
      float low[C::M_TILES][2];
      int winner[C::M_TILES][2];
#pragma unroll
      for (auto& row : low) row[0] = row[1] = kInfinity<float>;
#pragma unroll
      for (auto& row : winner) row[0] = row[1] = 0;
      constant = my_constants();
      // A scale that makes NaN of some channels multiplies each by itself; and so does a power of two that, together with the
      // weights', may leave float32's range.
      const float back = power_of_two(-exponent);
      const bool apart = plan.scale_first || abs(exponent) > kExactExponent;
      const float factor = plan.scale_first ? plan.factor : 1.0f;
#pragma unroll
      for (int j = 0; j < C::N_TILES; ++j) {
        float4 two = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
        if constexpr (kScaled) two = constant[j * 4];
        if (apart) {
#pragma unroll
          for (int i = 0; i < C::M_TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              sums[i][j][h] = fmaf(sums[i][j][h] * back, h % 2 == 0 ? two.x : two.z, h % 2 == 0 ? two.y : two.w) * factor;
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
      const int warp_m = warp / C::WARPS_N, warp_n = warp % C::WARPS_N, result = n % kResults;
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
    }

    ptx::mbarrier_arrive(result_ring.full(n % kResults));
  }
}

// A lane of mma.sync holds four registers of a pair of operand B's matrices: a column and two neighbouring k in each.
struct LaneOrder {
  static constexpr int kParts = 1;
  __device__ static int column(int word) { return word % 4 / 2 * 8 + word / 16; }
  __device__ static int k(int word) { return word % 2 * 8 + word / 4 % 4 * 2; }
  __device__ static void put(float2* block, int, int column, float factor, float bias) { block[column] = {factor, bias}; }
};

// What a block takes besides the plan's buffers: the results, the lanes' table, the rings' barriers, and what the system keeps.
template <class C>
constexpr int kStaticBytes = kResults * C::WARPS_N * C::BLOCK_M * 4 + C::kMathThreads * 4 + 256 + 1024;

template <class C>
struct Planned {
  Plan plan;
  int64_t cost = INT64_MAX;
  int shared_bytes = 0, blocks_per_sm = 1;
};

// Cuts the work: the filter whole, by rows or by taps; the tile's shape; the channels. Takes the cheapest that fits.
template <class C>
Planned<C> make_plan(const ConvShape& shape, bool vectors, const Device& device) {
  Planned<C> best;
  Plan p{};
  p.images = static_cast<int>(shape.images);
  p.in_channels = static_cast<int>(shape.in_channels);
  p.groups = static_cast<int>(shape.groups);
  p.blocks_n = static_cast<int>(ceil_div(shape.out_channels, C::BLOCK_N));
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
  // Tiles about as wide as a warp; a tile less wide than a matrix has bank conflicts, and only a narrow image wants it.
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
      p.halo_step[axis] = static_cast<int>(step);
      p.output_step[axis] = static_cast<int>(shape.stride[axis] / step);
      p.tap_step[axis] = piece[axis] > 1 ? static_cast<int>(shape.dilation[axis] / step) : 0;
    }
    for (int log2_columns = widest; log2_columns >= std::max(std::min(widest, 3), widest - 2); --log2_columns) {
      const int rows = std::min(highest, kLog2M - log2_columns);
      for (int log2_rows = rows; log2_rows >= std::max(rows - 2, 0); --log2_rows) {
        p.tile_log2[0] = log2_rows;
        p.tile_log2[1] = log2_columns;
        p.tile_images = 1 << (kLog2M - log2_rows - log2_columns);
        int64_t halo_pixels = p.tile_images, tiles = ceil_div(p.images, p.tile_images);
        bool small = p.tile_images <= 256;
        for (int axis = 0; axis < 2; ++axis) {
          const int64_t last_tap = (p.piece[axis] - 1) * static_cast<int64_t>(p.tap_step[axis]);
          const int64_t extent = ((int64_t{1} << p.tile_log2[axis]) - 1) * p.output_step[axis] + last_tap + 1;
          small &= extent < 4096;
          p.halo[axis] = static_cast<int>(std::min<int64_t>(extent, 4096));
          halo_pixels *= p.halo[axis];
          p.tiles_across[axis] = static_cast<int>(ceil_div(p.output[axis], 1 << p.tile_log2[axis]));
          tiles *= p.tiles_across[axis];
        }
        if (!small || halo_pixels > 16384) continue;
        p.halo_pixels = static_cast<int>(halo_pixels);
        // As many channels at once as there is room for.
        const int64_t fits = device.shared_bytes / C::kBlocksPerSM - kStaticBytes<C>;
        const int64_t most = (fits - C::kStages * C::kStepBytes) / halo_pixels / (2 * kHalos) / kStepDepth * kStepDepth;
        for (int64_t chunks = ceil_div(p.in_channels, std::max<int64_t>(most, kStepDepth));; ++chunks) {
          // Channels in equal chunks, multiples of what an mma instruction sums over.
          p.chunk = static_cast<int>(ceil_div(ceil_div(p.in_channels, chunks), kStepDepth)) * kStepDepth;
          p.chunks = static_cast<int>(ceil_div(p.in_channels, p.chunk));
          p.pitch = p.chunk * 2 + kRowPadding;
          p.steps = p.piece[0] * p.piece[1] * p.chunk / kStepDepth;
          // Stages as even as can be, and smaller where shared memory is short.
          const int64_t others = kHalos * halo_pixels * p.pitch + p.steps * 4 + halo_pixels * sizeof(HaloPixel);
          const int64_t room = fits > others ? (fits - others) / (C::kStages * C::kStepBytes) : 0;
          const bool possible = room > 0 && p.steps <= kMaxSteps;
          if (!possible && p.chunk > kStepDepth) continue;
          if (!possible) break;
          p.stages = static_cast<int>(ceil_div(p.steps, std::min<int64_t>(room, C::kStageSteps)));
          p.stage_steps = static_cast<int>(ceil_div(p.steps, p.stages));
          const int64_t bytes = others + C::kStages * p.stage_steps * C::kStepBytes;

          for (int i = 0; i < C::M_TILES; ++i) p.matrix_rows[i] = halo_row(p, i * 16);
          p.units = p.halo_pixels * (p.chunk / kUnit);
          p.minors = p.vectors ? p.chunk / kUnit : p.halo_pixels;
          p.minor_step = kHaloThreads % p.minors;
          p.major_step = kHaloThreads / p.minors;
          const int64_t items = static_cast<int64_t>(p.pieces) * p.chunks, blocks_n = p.groups * p.blocks_n;
          const int64_t loads = items == 1 && p.groups == 1 ? 1 : items * blocks_n;
          const int64_t step_cost = C::BLOCK_M * C::BLOCK_N / 4 / C::kSpeed;
          const int64_t arithmetic = blocks_n * (items * (p.steps * step_cost + p.stages * 60) + 800);
          const int64_t tile_cost = arithmetic + loads * p.units;
          const int64_t slots = static_cast<int64_t>(device.multiprocessors) * C::kBlocksPerSM;
          p.tiles = static_cast<int>(std::min<int64_t>(tiles, INT32_MAX / 2));
          p.blocks_a_split = static_cast<int>(ceil_div(blocks_n, std::max<int64_t>(1, std::min(blocks_n, slots / tiles))));
          p.splits = static_cast<int>(ceil_div(blocks_n, p.blocks_a_split));
          const int64_t cost = ceil_div(tiles * p.splits, slots) * ceil_div(tile_cost, p.splits) * C::kBlocksPerSM;
          if (cost < best.cost && tiles < INT32_MAX / 2) best = {p, cost, static_cast<int>(bytes), C::kBlocksPerSM};
          break;
        }
      }
    }
  }
  return best;
}

template <typename T, class C>
void launch(const Planned<C>& planned, const ConvShape& shape, const Tensor& input, const Tensor& weight,
            const std::optional<Tensor>& bias, double scale, Tensor& output, Winners winners, const Device& device) {
  Plan plan = planned.plan;
  const Scale scaled(scale);
  plan.scale_first = scaled.first;
  plan.factor = scaled.factor;
  const WeightOrder order{plan.in_channels,
                          {static_cast<int>(shape.kernel[0]), static_cast<int>(shape.kernel[1])},
                          {plan.piece[0], plan.piece[1]},
                          plan.pieces_across,
                          plan.pieces,
                          plan.chunk,
                          plan.chunks,
                          plan.steps,
                          plan.blocks_n};
  const int64_t blocks_n = static_cast<int64_t>(plan.groups) * plan.blocks_n;
  const int64_t packed_bytes = blocks_n * plan.pieces * plan.chunks * plan.steps * C::kStepBytes;
  const int slots = std::max(device.multiprocessors * planned.blocks_per_sm / plan.splits, 1);
  const dim3 grid(std::min(plan.tiles, slots), plan.splits);
  const int64_t partials = plan.splits > 1 ? plan.splits * shape.pixels() : 0;
  const Workspace workspace(input, packed_bytes, blocks_n * C::BLOCK_N, partials,
                            static_cast<int64_t>(grid.x) * grid.y * kResults * C::WARPS_N * C::BLOCK_M);
  const cudaStream_t stream = current_stream(input);
  pack_weights<T, LaneOrder>(order, shape, C::BLOCK_N, weight, bias, scaled, workspace, device, stream);

  const auto kernel = conv_mma_kernel<T, C>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, planned.shared_bytes));
  plan.tile_step[2] = grid.x % plan.tiles_across[1];
  plan.tile_step[1] = grid.x / plan.tiles_across[1] % plan.tiles_across[0];
  plan.tile_step[0] = grid.x / plan.tiles_across[1] / plan.tiles_across[0];
  plan.out_channels = static_cast<int>(shape.out_channels);
  plan.columns = workspace.more_winners;
  plan.winners = plan.splits == 1 ? winners : Winners{workspace.partial_winners, true};
  launch_early(kernel, grid, C::kThreads, planned.shared_bytes, stream, static_cast<const Raw<T>*>(input.data_ptr()),
               reinterpret_cast<const uint4*>(workspace.packed), workspace.constants, static_cast<T*>(output.data_ptr()),
               workspace.partial, plan);
  if (plan.splits > 1) combine<T>(workspace, plan.splits, shape.pixels(), output, winners, stream);
}

// Whether eight channels of a pixel (four float32) are one aligned run of 16 bytes wherever they begin.
bool channels_are_vectors(const Tensor& input, const ConvShape& shape) {
  const int64_t size = input.element_size(), width = 16 / size;
  if (shape.input_strides[1] != 1 || shape.in_channels % width != 0) return false;
  if (reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 != 0) return false;
  for (int d : {0, 2, 3}) {
    if (input.size(d) > 1 && shape.input_strides[d] % width != 0) return false;
  }
  return true;
}

template <typename T>
void run(const ConvShape& shape, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
         Tensor& output, Winners winners) {
  const int index = input.get_device_index();
  const Device device{attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)};
  const bool vectors = channels_are_vectors(input, shape);
  const auto large = make_plan<Large>(shape, vectors, device);
  const auto medium = make_plan<Medium>(shape, vectors, device);
  const auto small = make_plan<Small>(shape, vectors, device);
  const int64_t least = std::min({large.cost, medium.cost, small.cost});
  STD_TORCH_CHECK(least < INT64_MAX, "input: conv_mma has no plan for this shape");
  if (small.cost == least) {
    launch<T>(small, shape, input, weight, bias, scale, output, winners, device);
  } else if (medium.cost == least) {
    launch<T>(medium, shape, input, weight, bias, scale, output, winners, device);
  } else {
    launch<T>(large, shape, input, weight, bias, scale, output, winners, device);
  }
}

Forward conv_mma(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                 std::string precision) {
  const ConvShape shape = check_conv(input, weight, bias, stride, padding, dilation, groups);
  return convolve("conv_mma", "tf32", input, shape, precision, [&](auto type, Tensor& output, Winners winners) {
    run<decltype(type)>(shape, input, weight, bias, scale, output, winners);
  });
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(FORWARD("conv_mma"), TORCH_BOX(&conv_mma)); }

}  // namespace fused_kernels
