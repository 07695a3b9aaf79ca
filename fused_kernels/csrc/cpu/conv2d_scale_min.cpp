// Convolve, multiply by a number, or each channel by its own, take the minimum over the output channels: what lies between never
// leaves the core.
//
// Idea: an implicit matrix product, weights (output channels x depth) times pixels (depth x output pixels), where the depth is
//   input channels x filter taps. A tile of output pixels needs a patch of the input (the tile with its halo, the margin that
//   the filter reaches into), which a thread copies into its L2 cache: padding, strides, layout and dtype are dealt with there.
//   Every tap then reads the same patch from another start address, so there is no im2col. Pixels lie in vector lanes and a
//   block of output channels in registers (register blocking), so that bias, scale and the minimum over channels need neither
//   shuffles nor memory. Where a 3 x 3 filter has enough channels, squares of two by two output pixels share products
//   (Winograd): 16 per channel instead of 36.
// Limit: one vector multiply-add per clock and core (two on some). The sums of one block fill the registers, to keep it busy.
// Previous rung: composite: the library's convolution writes every channel to memory, scale_min reads it back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "partial_sums.h"
#include "vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {
using namespace fused_kernels;

constexpr int BLOCK = REGISTERS == 32 ? 8 : 4;  // output channels whose sums are in registers together, ...
constexpr int STRIP = 3;                        // ... for this many vectors of pixels, ...
constexpr int64_t CHAIN = 48;                   // ... over so many terms at most: a sum of short sums has small rounding errors
constexpr int64_t DEPTH = 576;                  // terms of one patch: BLOCK x DEPTH weights stay in the L1 cache
constexpr int64_t PATCH_BYTES = 256 << 10;      // leaves most of an L2 cache to the weights
constexpr int64_t TILE_COLUMNS = 128, TILE_PIXELS = 4096;
constexpr int64_t WINOGRAD_BYTES = 256 << 10;   // of a tile's transformed input, all channels
constexpr int PARTS = 4;                        // of the input channels: a few outliers do not reach all of them
constexpr double ROUNDINGS = 12;                // Winograd's error, by experiment: see keeps_digits
constexpr double LEAST_WEIGHT = 1e-30;          // of a channel's largest: quarters of much smaller ones have fewer digits
constexpr int64_t MIN_WORK = 1 << 20;           // multiply-adds; less is not worth waking a thread for

// ---- terms, and the patch that they are read from ----

// One term of a pixel's sum: a number of one input channel or, where the processor has bfloat16 dot products, of two.
template <class T> struct Term {
  using Type = typename Compute<T>::Scalar;
  static constexpr int CHANNELS = 1;
  static Type of(const T* x, int64_t /*channel_stride*/, int64_t /*channels*/) { return Type(*x); }
  static auto of_pixels(const T* x, int64_t /*channel_stride*/) { return load(x); }  // LANES neighbours, pixels or channels
  static auto of_channels(const T* x) { return load(x); }
};
template <class Vector, class Scalar> Vector multiply_add(Vector sum, Vector pixels, Scalar weight) {
  return sum + pixels * weight;
}

#ifdef __AVX512BF16__
template <> struct Term<BFloat16> {
  using Type = uint32_t;
  static constexpr int CHANNELS = 2;
  static Type of(const BFloat16* x, int64_t channel_stride, int64_t channels) {
    return x[0].x | (channels > 1 ? uint32_t(x[channel_stride].x) << 16 : 0);
  }
  static auto of_pixels(const BFloat16* x, int64_t channel_stride) {
    return (BitsVector)load(x) >> 16 | (BitsVector)load(x + channel_stride);
  }
  static auto of_channels(const BFloat16* x) { return load_as<BitsVector>(x); }
};
// NOTE: this instruction takes numbers below 2^-126 for zero.
inline FloatVector multiply_add(FloatVector sum, BitsVector pixels, uint32_t weight) {
  return (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pixels, (__m512bh)(BitsVector{} + weight));
}
#endif

// One axis of a patch. Taps whose distance is a multiple of the stride read one plane, each at its own shift. Where the
// dilation is so large that a plane of its own for every tap is smaller, they get that.
struct Axis {
  int64_t stride, padding, input, length;           // input: its size; length: a plane's
  std::vector<int64_t> planes, plane_of, shift_of;  // where each plane begins in the input; each tap's plane and shift in it

  Axis(int64_t taps, int64_t dilation, int64_t stride, int64_t padding, int64_t input, int64_t tile)
      : stride(stride), padding(padding), input(input), length(tile + (taps - 1) * dilation / stride) {
    for (int64_t tap = 0; tap < taps; tap++) {
      const int64_t start = tap * dilation % stride;
      const auto found = std::find(planes.begin(), planes.end(), start);
      plane_of.push_back(found - planes.begin());
      shift_of.push_back(tap * dilation / stride);
      if (found == planes.end()) planes.push_back(start);
    }
    if (size() <= taps * tile) return;
    length = tile;
    planes.resize(taps);
    for (int64_t tap = 0; tap < taps; tap++) planes[tap] = tap * dilation, plane_of[tap] = tap, shift_of[tap] = 0;
  }
  int64_t size() const { return (int64_t)planes.size() * length; }
};

// ---- the kernel: register blocking, minimum in the epilogue ----

// What one call of the innermost kernel works on.
template <class Scalar, class Element> struct Strip {
  const Element *weights, *patch;
  const int *starts, *offsets;  // of the vectors of pixels, and of the terms, in the patch
  int64_t depth, chain, pitch;  // terms; of those, in a short sum; distance between the channels of unfinished sums
  bool first, last;             // of the blocks that the whole depth is cut into
  const Scalar *bias, *factors;
  Scalar* unfinished;
  Minima<Scalar> minima;
  int64_t channel, last_channel;  // the block's first, the group's last

  template <class Vector> void take(Running<Vector>& minimum, const Vector& total, int o) const {
    const Index<Vector> zero = {};
    minimum.take((total + bias[o]) * factors[o], zero + Index<Scalar>(std::min(channel + o, last_channel)));
  }
};

template <int CHANNELS, int VECTORS, class Scalar, class Element>
__attribute__((noinline)) void convolve(const Strip<Scalar, Element>& s) {
  typename Compute<Scalar>::Vector total[CHANNELS][VECTORS] = {};
  const Element *weights = s.weights, *from[VECTORS];
  for (int v = 0; v < VECTORS; v++) from[v] = s.patch + s.starts[v];
  for (const int *offset = s.offsets, *end = offset + s.depth; offset != end;) {
    // The innermost loop: VECTORS loads, CHANNELS broadcasts, and a multiply-add for each pair of them.
    typename Compute<Scalar>::Vector sum[CHANNELS][VECTORS] = {};
#pragma GCC unroll 2
    for (const int* stop = offset + std::min<int64_t>(s.chain, end - offset); offset != stop; offset++, weights += CHANNELS) {
      decltype(load(s.patch)) pixels[VECTORS];
      for (int v = 0; v < VECTORS; v++) pixels[v] = load(from[v] + *offset);
#pragma GCC unroll 8
      for (int o = 0; o < CHANNELS; o++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sum[o][v] = multiply_add(sum[o][v], pixels[v], weights[o]);
    }
#pragma GCC unroll 8
    for (int o = 0; o < CHANNELS; o++)
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; v++) total[o][v] += sum[o][v];
  }
  for (int v = 0; v < VECTORS; v++) {
    auto minimum = s.minima.load_vector(v * LANES<Scalar>);
    for (int o = 0; o < CHANNELS; o++) {
      Scalar* unfinished = s.unfinished + o * s.pitch + v * LANES<Scalar>;
      if (!s.first) total[o][v] += load(unfinished);
      if (s.last) s.take(minimum, total[o][v], o);
      else store(unfinished, total[o][v]);
    }
    s.minima.store_vector(v * LANES<Scalar>, minimum);
  }
}

// All pixels of a tile for one block of output channels.
template <int CHANNELS, class Scalar, class Element> void convolve_tile(Strip<Scalar, Element> s, int channels, int vectors) {
  if constexpr (CHANNELS > 1)
    if (channels < CHANNELS) return convolve_tile<CHANNELS / 2>(s, channels, vectors);
  for (; vectors > 0; vectors -= STRIP) {
    if (vectors >= STRIP) convolve<CHANNELS, STRIP>(s);
    else if (vectors == 2) convolve<CHANNELS, 2>(s);
    else convolve<CHANNELS, 1>(s);
    s.starts += STRIP, s.unfinished += STRIP * LANES<Scalar>, s.minima = s.minima + STRIP * LANES<Scalar>;
  }
}

// Winograd's four pixels of each square from its 16 sums, and their minima: pixels at one place of all squares lie together.
template <int CHANNELS, class Scalar, class Element> void transform_output(const Strip<Scalar, Element>& s, int channels) {
  if constexpr (CHANNELS > 1)
    if (channels < CHANNELS) return transform_output<CHANNELS / 2>(s, channels);
  using Vector = typename Compute<Scalar>::Vector;
  const int64_t column = BLOCK * s.pitch, row = 4 * column;  // from one sum to the next
  for (int64_t at = 0; at < s.pitch; at += LANES<Scalar>) {
    Running<Vector> minimum[4];
    for (int i = 0; i < 4; i++) minimum[i] = s.minima.load_vector(i * s.pitch + at);
    for (int o = 0; o < CHANNELS; o++) {
      Vector rows[2][4];
      for (int i = 0; i < 4; i++) {
        const Scalar* from = s.unfinished + o * s.pitch + i * column + at;
        const Vector a = load(from), b = load(from + row), c = load(from + 2 * row), d = load(from + 3 * row);
        rows[0][i] = a + (b + c), rows[1][i] = (b - c) - d;
      }
      for (int i = 0; i < 2; i++) {
        s.take(minimum[2 * i], rows[i][0] + (rows[i][1] + rows[i][2]), o);
        s.take(minimum[2 * i + 1], (rows[i][1] - rows[i][2]) - rows[i][3], o);
      }
    }
    for (int i = 0; i < 4; i++) s.minima.store_vector(i * s.pitch + at, minimum[i]);
  }
}

// ---- the convolution: packing, tiles, threads ----

// How the output is cut into tiles, which places of the input each needs, and how far apart these lie of two terms.
struct Tiling {
  int64_t tile_rows, tile_columns, high, wide;
  Axis rows, columns;
  int64_t pitch;
};

template <class T> struct Convolution {
  using Scalar = typename Compute<T>::Scalar;
  using Element = typename Term<T>::Type;
  static constexpr int N = LANES<T>, PER_TERM = Term<T>::CHANNELS;

  const Tensor &input, &weight, &output;
  const std::optional<Tensor>& winners;
  const int64_t groups, in_channels = weight.size(1), out_channels = weight.size(0) / groups;  // channels of one group
  const int64_t kernel_h = weight.size(2), kernel_w = weight.size(3), taps = kernel_h * kernel_w;
  const int64_t images = output.size(0), out_rows = output.size(2), out_columns = output.size(3);

  // The depth is cut evenly, so that the weights stay in the L1 cache, but into few enough blocks for the promise. The last
  // block of output channels may be smaller: a power of two, its last channel repeated, which a minimum does not mind.
  const PartialSums partial_sums = PartialSums(in_channels * taps);
  const int64_t terms = ceil_div(in_channels, PER_TERM);
  const int64_t cuts = std::min(ceil_div(terms, std::max<int64_t>(DEPTH / taps, 1)), ceil_div(partial_sums.longest, 2));
  const int64_t block_terms = ceil_div(terms, cuts), depth_blocks = ceil_div(terms, block_terms);
  // Each part of the depth is summed in chains, short enough for the promise.
  const int64_t depth = block_terms * taps;
  const int64_t chains = partial_sums.parts(depth, PER_TERM, depth_blocks);
  const int64_t chain = ceil_div(depth, std::max(chains, ceil_div(depth, CHAIN)));
  // Winograd's sums are of the channels only, but nine of them make a result.
  const int64_t winograd_chain = ceil_div(in_channels, PartialSums(in_channels).parts(in_channels, 1, 1));
  const int64_t out_blocks = ceil_div(out_channels, BLOCK);
  const int64_t padded_out = (out_blocks - 1) * BLOCK + block_size(out_blocks - 1);
  std::unique_ptr<Element[]> weights{}, transformed_weights{};
  std::vector<Scalar> biases = std::vector<Scalar>(groups * padded_out), factors = biases;
  Scalar shares[9] = {};  // of the taps, see keeps_digits

  int block_size(int64_t block) const {
    int size = 1;
    while (size < std::min<int64_t>(BLOCK, out_channels - block * BLOCK)) size *= 2;
    return size;
  }
  int64_t channel_of(int64_t block) const { return block / out_blocks * out_channels + block % out_blocks * BLOCK; }
  int64_t terms_in(int64_t depth_block) const { return std::min(block_terms, terms - depth_block * block_terms); }
  int64_t weights_at(int64_t group, int64_t block, int64_t depth_block) const {
    return ((group * terms + depth_block * block_terms) * padded_out + block * BLOCK * terms_in(depth_block)) * taps;
  }

  // The output channel whose weights are read in some place of a block.
  int64_t packed_channel(int64_t group, int64_t block, int64_t o) const {
    return group * out_channels + std::min(block * BLOCK + o, out_channels - 1);
  }

  void pack_constants(const std::optional<Tensor>& bias, double scale, const std::optional<Tensor>& scales) {
    const auto bias_of = [&](int64_t channel) {
      if (!bias) return Scalar(0);
      const int64_t at = channel * bias->stride(0);
      return is_wider(*bias, input) ? Scalar(((const float*)bias->data_ptr())[at]) : Scalar(((const T*)bias->data_ptr())[at]);
    };
    for (int64_t group = 0; group < groups; group++)
      for (int64_t o = 0; o < padded_out; o++) {
        const int64_t channel = packed_channel(group, o / BLOCK, o % BLOCK), at = group * padded_out + o;
        biases[at] = bias_of(channel);
        factors[at] = scales ? ((const Scalar*)scales->data_ptr())[channel * scales->stride(0)] : Scalar(scale);
      }
  }

  // Put the weights in the order in which they are read: depth block, block of output channels, term, tap, output channel.
  void pack_weights() {
    const int64_t s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2), s3 = weight.stride(3);
    const int64_t grain = ceil_div(MIN_WORK / 16, BLOCK * in_channels * taps);
    weights.reset(new Element[groups * padded_out * terms * taps]);
    torch::stable::parallel_for(0, groups * out_blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t work = begin; work < end; work++) {
        const int64_t group = work / out_blocks, block = work % out_blocks, size = block_size(block);
        const T* from[BLOCK];
        for (int64_t o = 0; o < size; o++) from[o] = (const T*)weight.data_ptr() + packed_channel(group, block, o) * s0;
        for (int64_t b = 0; b < depth_blocks; b++) {
          Element* to = weights.get() + weights_at(group, block, b);
          for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t t = 0; t < terms_in(b); t++) {
              const int64_t channel = (b * block_terms + t) * PER_TERM;
              const int64_t at = channel * s1 + tap / kernel_w * s2 + tap % kernel_w * s3;
              for (int64_t o = 0; o < size; o++)
                to[(t * taps + tap) * size + o] = Term<T>::of(from[o] + at, s1, in_channels - channel);
            }
        }
      }
    });
  }

  // Copy some channels of some pixels of a row, step apart, to rows of terms, pitch apart.
  void copy_row(const T* from, int64_t channels, int64_t step, int64_t pixels, int64_t pitch, Element* to) const {
    const int64_t channel_stride = input.stride(1), all = ceil_div(channels, PER_TERM), in_vectors = pixels / N * N;
    int64_t terms_done = 0;
    if (step == 1) {
      for (; (terms_done + 1) * PER_TERM <= channels; terms_done++) {
        const T* row = from + terms_done * PER_TERM * channel_stride;
        for (int64_t j = 0; j < in_vectors; j += N)
          store(to + terms_done * pitch + j, Term<T>::of_pixels(row + j, channel_stride));
      }
    } else if (channel_stride == 1) {
      for (; (terms_done + N) * PER_TERM <= channels; terms_done += N)
        for (int64_t j = 0; j < in_vectors; j += N) {
          decltype(Term<T>::of_channels(from)) square[N];
          for (int k = 0; k < N; k++) square[k] = Term<T>::of_channels(from + (j + k) * step + terms_done * PER_TERM);
          transpose(square);
          for (int k = 0; k < N; k++) store(to + (terms_done + k) * pitch + j, square[k]);
        }
    }
    // What does not fill vectors, one by one.
    for (int64_t t = 0; t < all; t++)
      for (int64_t j = t < terms_done ? in_vectors : 0; j < pixels; j++) {
        const int64_t channel = t * PER_TERM;
        to[t * pitch + j] = Term<T>::of(from + channel * channel_stride + j * step, channel_stride, channels - channel);
      }
  }

  // Copy what a tile needs of some channels, zeros in the padding: [term][row plane][column plane][row][column].
  void pack_patch(const T* x, int64_t channels, const Axis& rows, const Axis& columns, int64_t first_row, int64_t first_column,
                  int64_t pitch, Element* patch) const {
    for (int64_t row_plane : rows.planes)
      for (int64_t column_plane : columns.planes)
        for (int64_t i = 0; i < rows.length; i++, patch += columns.length) {
          const int64_t row = (first_row + i) * rows.stride - rows.padding + row_plane;
          const int64_t column = first_column * columns.stride - columns.padding + column_plane;
          // Columns low to high of the patch's row lie inside the input.
          int64_t low = std::min(ceil_div(std::max<int64_t>(-column, 0), columns.stride), columns.length);
          int64_t high = std::min(ceil_div(std::max<int64_t>(columns.input - column, 0), columns.stride), columns.length);
          if (row < 0 || row >= rows.input || high < low) low = high = 0;
          for (int64_t t = 0; t < ceil_div(channels, PER_TERM); t++) {
            std::fill(patch + t * pitch, patch + t * pitch + low, Element(0));
            std::fill(patch + t * pitch + high, patch + t * pitch + columns.length, Element(0));
          }
          const T* from = x + row * input.stride(2) + (column + low * columns.stride) * input.stride(3);
          copy_row(from, channels, columns.stride * input.stride(3), high - low, pitch, patch + low);
        }
  }

  using Ints = const std::vector<int64_t>&;
  Tiling tiling(int64_t tile_rows, int64_t tile_columns, Ints stride, Ints padding, Ints dilation) const {
    const Axis rows(kernel_h, dilation[0], stride[0], padding[0], input.size(2), tile_rows);
    const Axis columns(kernel_w, dilation[1], stride[1], padding[2], input.size(3), tile_columns);
    // An odd number of cache lines between a patch's channels spreads them over all sets of the cache.
    const int64_t line = 64 / sizeof(Element), pitch = (ceil_div(rows.size() * columns.size(), line) | 1) * line;
    return {tile_rows, tile_columns, ceil_div(out_rows, tile_rows), ceil_div(out_columns, tile_columns), rows, columns, pitch};
  }

  // Columns in even parts, as many rows as keep the patch in the cache and leave every thread several tiles.
  Tiling tile_direct(Ints stride, Ints padding, Ints dilation) const {
    const int64_t threads = torch::stable::get_num_threads(), wide = ceil_div(out_columns, TILE_COLUMNS);
    const int64_t tile_columns = wide == 1 ? out_columns : ceil_div(ceil_div(out_columns, wide), N) * N;
    const int64_t columns = tiling(1, tile_columns, stride, padding, dilation).columns.size();
    const int64_t least = std::min(out_rows, ceil_div(STRIP * N, tile_columns));
    const int64_t fair = images * wide * out_rows / (4 * threads);
    int64_t tile_rows = std::max(least, std::min({out_rows, TILE_PIXELS / tile_columns, fair}));
    const int64_t most = PATCH_BYTES / (int64_t)sizeof(Element) / (block_terms * columns);
    while (tile_rows > least && tiling(tile_rows, tile_columns, stride, padding, dilation).rows.size() > most)
      tile_rows -= ceil_div(tile_rows, 16);
    return tiling(ceil_div(out_rows, ceil_div(out_rows, tile_rows)), tile_columns, stride, padding, dilation);
  }

  void run(Ints stride, Ints padding, Ints dilation) {
    const Scalar limit = takes_winograd(stride, dilation) ? transform_weights() : Scalar(0);
    const Tiling tiling = limit > 0 ? tile_winograd(padding) : tile_direct(stride, padding, dilation);

    // Where there are fewer tiles than threads, several threads share a tile's output channels.
    const int64_t threads = torch::stable::get_num_threads(), tiles = images * tiling.high * tiling.wide;
    const int64_t work = tiling.tile_rows * tiling.tile_columns * in_channels * taps * weight.size(0);
    const int64_t parts =
        std::max<int64_t>(std::min({ceil_div(threads, tiles), groups * out_blocks, tiles * work / MIN_WORK}), 1);
    const int64_t grain = ceil_div(MIN_WORK, ceil_div(work, parts));
    PartialMinima<T> minima_of_parts(output, winners, parts);
    std::vector<char> done(tiles * parts);
    if (limit > 0)
      torch::stable::parallel_for(0, tiles * parts, grain, [&](int64_t begin, int64_t end) {
        run_winograd(begin, end, tiling, limit, minima_of_parts, done.data());
      });
    if (std::find(done.begin(), done.end(), 0) != done.end()) {
      pack_weights();
      torch::stable::parallel_for(0, tiles * parts, grain, [&](int64_t begin, int64_t end) {
        run_direct(begin, end, tiling, minima_of_parts, done.data());
      });
    }
    minima_of_parts.finish();
  }

  // One piece of work: a tile, or some of its output channels, those of the blocks from the first to the end.
  struct Item {
    int64_t part, image, row, column, row_count, column_count, first_block, end_block;
  };
  Item item(int64_t i, const Tiling& t, int64_t parts) const {
    const int64_t part = i % parts, tile = i / parts, blocks = groups * out_blocks;
    const int64_t column = tile % t.wide * t.tile_columns, row = tile / t.wide % t.high * t.tile_rows;
    return {part, tile / t.wide / t.high, row, column, std::min(t.tile_rows, out_rows - row),
            std::min(t.tile_columns, out_columns - column), part * blocks / parts, (part + 1) * blocks / parts};
  }
  int64_t first_pixel(const Item& item, int64_t row) const {
    return (item.image * out_rows + item.row + row) * out_columns + item.column;
  }
  void pack(const Item& item, const Tiling& t, int64_t group, int64_t depth_block, Element* patch) const {
    const int64_t image = item.image, channel = depth_block * block_terms * PER_TERM;
    const int64_t channels = std::min(block_terms * PER_TERM, in_channels - channel);
    const int64_t at = image * input.stride(0) + (group * in_channels + channel) * input.stride(1);
    pack_patch((const T*)input.data_ptr() + at, channels, t.rows, t.columns, item.row, item.column, t.pitch, patch);
  }

  // The items that are not done, tap after tap.
  void run_direct(int64_t begin, int64_t end, const Tiling& t, PartialMinima<T>& minima_of_parts,
                   const char* done) const {
    std::vector<int> offsets, starts;
    for (int64_t term = 0; term < block_terms; term++)
      for (int64_t y = 0; y < kernel_h; y++)
        for (int64_t x = 0; x < kernel_w; x++) {
          const int64_t plane = t.rows.plane_of[y] * (int64_t)t.columns.planes.size() + t.columns.plane_of[x];
          const int64_t row = plane * t.rows.length + t.rows.shift_of[y];
          offsets.push_back(int(term * t.pitch + row * t.columns.length + t.columns.shift_of[x]));
        }
    const int64_t most_vectors = t.tile_rows * ceil_div(t.columns.length, N);
    std::vector<Element> patch(block_terms * t.pitch + N);
    std::vector<Scalar> values(most_vectors * N), unfinished(depth_blocks > 1 ? padded_out * most_vectors * N : 0);
    std::vector<Index<Scalar>> winning(kWinners ? most_vectors * N : 0);
    const Minima<Scalar> minima{values.data(), winning.data()};
    for (int64_t i = begin; i < end; i++) {
      if (done[i]) continue;
      const Item item = this->item(i, t, minima_of_parts.parts);

      // Vectors run on through the whole patch, row ends included, or begin anew in each row: whichever are fewer.
      const int64_t in_row = ceil_div(item.column_count, N);
      const int64_t running = ceil_div((item.row_count - 1) * t.columns.length + item.column_count, N);
      const bool anew = item.row_count * in_row <= running;
      const int64_t vectors = anew ? item.row_count * in_row : running, row_pitch = anew ? in_row * N : t.columns.length;
      starts.clear();
      for (int64_t v = 0; v < vectors; v++)
        starts.push_back(int(anew ? v / in_row * t.columns.length + v % in_row * N : v * N));

      minima.clear(most_vectors * N, channel_of(item.first_block));
      for (int64_t group = item.first_block / out_blocks; group * out_blocks < item.end_block; group++)
        for (int64_t b = 0; b < depth_blocks; b++) {
          pack(item, t, group, b, patch.data());
          const int64_t before = group * out_blocks, last = std::min(out_blocks, item.end_block - before);
          for (int64_t o = std::max<int64_t>(item.first_block - before, 0); o < last; o++) {
            Strip<Scalar, Element> strip;
            strip.weights = weights.get() + weights_at(group, o, b), strip.patch = patch.data();
            strip.starts = starts.data(), strip.offsets = offsets.data();
            strip.depth = terms_in(b) * taps, strip.chain = chain, strip.pitch = vectors * N;
            strip.first = b == 0, strip.last = b == depth_blocks - 1;
            strip.bias = biases.data() + group * padded_out + o * BLOCK;
            strip.factors = factors.data() + group * padded_out + o * BLOCK;
            strip.unfinished = unfinished.data() + o * BLOCK * strip.pitch, strip.minima = minima;
            strip.channel = channel_of(before + o), strip.last_channel = (group + 1) * out_channels - 1;
            convolve_tile<BLOCK>(strip, block_size(o), (int)vectors);
          }
        }
      for (int64_t row = 0; row < item.row_count; row++)
        minima_of_parts.put(item.part, first_pixel(item, row), minima + row * row_pitch, item.column_count);
    }
  }

  // ---- Winograd ----

  // Winograd's algorithm: of a 3 x 3 filter without strides, two by two output pixels take 16 products per channel instead of
  // 36, each of a sum of the square's 4 x 4 input pixels and a sum of the weights. Summed over the channels these are 16
  // products of matrices, and a pixel is a sum of nine of their elements: F(2 x 2, 3 x 3) of Lavin and Gray, "Fast algorithms
  // for convolutional neural networks". A number that is not finite would spread over its square: it, or what may lead to one,
  // sends its tile back to the taps. So does one so large that its rounding could be seen where its weight is small.
  bool takes_winograd(Ints stride, Ints dilation) const {
    const bool is_plain = stride[0] * stride[1] == 1 && dilation[0] * dilation[1] == 1 && groups == 1;
    const int64_t least_channels = std::min(in_channels, out_channels), pixels = images * out_rows * out_columns;
    // Measured on a Zen, up to 512 channels.
    const bool pays = least_channels >= 32 && in_channels <= 1024 && pixels >= 256 && least_channels * pixels >= 1 << 16;
    return std::is_same_v<Element, float> && kernel_h == 3 && kernel_w == 3 && is_plain && pays;
  }

  // What some output channels' weights are like. A tap's share is its sum over the input channels, divided by the sum of their
  // largest weights; of the output channels the smallest.
  struct Sizes {
    double shares[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, largest = 1;
    double alike = 0;  // 1 where all input channels have one filter, but for its sign: then rounding errors may all add up
    bool fit = true;   // finite, and no quarter loses digits

    void take(const double* sizes, const double* sums, double of_largest, double most) {
      double all = 0;
      for (int tap = 0; tap < 9; tap++) all += sizes[tap];
      if (all == 0) return;
      fit &= all <= std::numeric_limits<double>::max() && most >= LEAST_WEIGHT;
      for (int tap = 0; tap < 9; tap++) {
        shares[tap] = std::min(shares[tap], sizes[tap] / of_largest);
        alike = std::max(alike, std::abs(sums[tap]) / of_largest);
      }
      largest = std::max(largest, most);
    }
    void take(const Sizes& other) {
      for (int tap = 0; tap < 9; tap++) shares[tap] = std::min(shares[tap], other.shares[tap]);
      alike = std::max(alike, other.alike), largest = std::max(largest, other.largest), fit &= other.fit;
    }
  };

  // Sums of the weights, in the order in which they are read: block of output channels, which sum, input channel, output
  // channel. Gives the largest number that the input may have, 0 if there is none.
  Scalar transform_weights() {
    const int64_t s0 = weight.stride(0), s1 = weight.stride(1), s2 = weight.stride(2), s3 = weight.stride(3);
    transformed_weights.reset(new Element[padded_out * in_channels * 16]);
    std::vector<Sizes> sizes(out_blocks);
    torch::stable::parallel_for(0, out_blocks, ceil_div(MIN_WORK / 64, BLOCK * in_channels), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t size = block_size(block);
        Element* to = transformed_weights.get() + block * BLOCK * in_channels * 16;
        double sizes_of[BLOCK][9] = {}, sums_of[BLOCK][9] = {}, of_largest[BLOCK] = {}, largest[BLOCK] = {};
        for (int64_t c = 0; c < in_channels; c++)
          for (int64_t o = 0; o < size; o++) {
            const T* from = (const T*)weight.data_ptr() + packed_channel(0, block, o) * s0 + c * s1;
            double rows[4][3], filter[9], most = 0, along = 0;
            for (int x = 0; x < 3; x++) {
              const double a = Scalar(from[x * s3]), b = Scalar(from[s2 + x * s3]), d = Scalar(from[2 * s2 + x * s3]);
              rows[0][x] = a, rows[1][x] = (a + d + b) / 2, rows[2][x] = (a + d - b) / 2, rows[3][x] = d;
              const double column[3] = {a, b, d};
              for (int y = 0; y < 3; y++) {
                const int tap = 3 * y + x;
                filter[tap] = column[y], sizes_of[o][tap] += std::abs(column[y]);
                along += sums_of[o][tap] * column[y], most = std::max(most, std::abs(column[y]));
              }
            }
            // Whatever their signs: where the input's follow them, all products are alike.
            for (int tap = 0; tap < 9; tap++) sums_of[o][tap] += along < 0 ? -filter[tap] : filter[tap];
            of_largest[o] += most, largest[o] = std::max(largest[o], most);
            for (int y = 0; y < 4; y++) {
              const double a = rows[y][0], b = rows[y][1], d = rows[y][2];
              const double sums[4] = {a, (a + d + b) / 2, (a + d - b) / 2, d};
              for (int x = 0; x < 4; x++) to[((4 * y + x) * in_channels + c) * size + o] = Element(sums[x]);
            }
          }
        for (int64_t o = 0; o < size; o++) sizes[block].take(sizes_of[o], sums_of[o], of_largest[o], largest[o]);
      }
    });
    Sizes all;
    for (const Sizes& some : sizes) all.take(some);
    if (!all.fit) return 0;
    const double allowed = std::max(16.0, 2 * std::sqrt(9.0 * double(in_channels)));
    const double roundings = ROUNDINGS * std::max(1.0, 5 * all.alike * all.alike);
    for (int tap = 0; tap < 9; tap++) shares[tap] = Scalar(all.shares[tap] * allowed / roundings);
    // A sum of four numbers of the input, times one of the weights, over all channels, nine times; and room for the bias.
    const double limit = std::numeric_limits<Scalar>::max() / 256.0 / double(in_channels) / all.largest;
    return limit > 1 ? Scalar(limit) : Scalar(0);
  }

  // As many squares as keep their numbers in the cache and leave every thread several tiles.
  Tiling tile_winograd(Ints padding) const {
    const int64_t squares = WINOGRAD_BYTES / (int64_t)sizeof(Element) / 16 / in_channels;
    const int64_t most_columns = std::min(TILE_COLUMNS, std::max<int64_t>(2 * squares, 4 * N));
    const int64_t tile_columns = ceil_div(ceil_div(out_columns, ceil_div(out_columns, most_columns)), 2) * 2;
    const int64_t wide = ceil_div(out_columns, tile_columns), square_rows = ceil_div(out_rows, 2);
    const int64_t fair = images * wide * square_rows / (4 * torch::stable::get_num_threads());
    const int64_t most_rows = std::max<int64_t>(std::min({square_rows, 2 * squares / tile_columns, fair}), 1);
    const int64_t tile_rows = 2 * ceil_div(square_rows, ceil_div(square_rows, most_rows));
    return tiling(tile_rows, tile_columns, {1, 1}, padding, {1, 1});
  }

  // The 16 numbers of each square, of some channels: [which][channel][square]. Keeps each pixel's largest number in each part
  // of the channels.
  void transform_input(const Element* patch, int64_t first, int64_t channels, const Tiling& t, int64_t plane, int64_t pitch,
                    std::vector<Element>& scratch, Element* largest, Element* to) const {
    using Vector = typename Compute<Scalar>::Vector;
    using Bits = Index<Vector>;
    const int64_t length = t.columns.length, in_row = t.tile_columns / 2;
    Element* const even = scratch.data();
    Element* const odd = even + scratch.size() / 2;
    for (int64_t c = 0; c < channels; c++, patch += t.pitch, to += pitch) {
      Element* const most = largest + (first + c) % PARTS * t.pitch;
      for (int64_t i = 0; i < t.pitch; i += N) {
        // Without their signs floats are in the order of their bits, and NaN above all.
        const Bits x = (Bits)load(patch + i) & std::numeric_limits<Index<Scalar>>::max(), before = load_as<Bits>(most + i);
        store(most + i, x > before ? x : before);
      }
      for (int64_t row = 0; row < t.tile_rows / 2; row++) {
        const Element* const from = patch + 2 * row * length;
        for (int y = 0; y < 4; y++) {
          // One of rows 0 - 2, 1 + 2, 2 - 1, 1 - 3, then the same of columns.
          const Element* const first = from + (y == 0 ? 0 : y == 2 ? 2 : 1) * length;
          const Element* const second = from + (y == 3 ? 3 : y == 2 ? 1 : 2) * length;
          const Scalar sign = y == 1 ? 1 : -1;
          for (int64_t j = 0; j <= in_row; j += N) {
            const Vector a = load(first + 2 * j) + sign * load(second + 2 * j);
            const Vector b = load(first + 2 * j + N) + sign * load(second + 2 * j + N);
            store(even + j, every_second<0>(a, b, std::make_index_sequence<N>()));
            store(odd + j, every_second<1>(a, b, std::make_index_sequence<N>()));
          }
          Element* const at = to + 4 * y * plane + row * in_row;
          for (int64_t j = 0; j < in_row; j += N) {
            const Vector a = load(even + j), b = load(odd + j), d = load(even + j + 1), e = load(odd + j + 1);
            store(at + j, a - d);
            store(at + plane + j, b + d);
            store(at + 2 * plane + j, d - b);
            store(at + 3 * plane + j, b - e);
          }
        }
      }
    }
  }

  // Whether every pixel of a tile keeps the digits that its own window allows: an error of c u sum(|x| |w|), with u = 2^-24 and
  // c = max(16, 2 sqrt(9 channels)). Winograd sums only what lies in the window, but rounds an x in proportion to its channel's
  // largest weight, not to the one at its tap, which may be small or zero. With N the sum of the channels' largest weights:
  //   its error is below ROUNDINGS u N m (five times that where all channels are alike), m the largest of the window's means
  //     over the parts of what is largest in them;
  //   sum(|x| |w|) is about N sum_taps(share x), with x a number that every part reaches at that tap. Where only few channels
  //     are large their own weights may be small: then x may be what is largest, but two taps do not count.
  bool keeps_digits(const Item& item, const Tiling& t, Scalar limit, Element* largest) const {
    using Vector = typename Compute<Scalar>::Vector;
    Element *const least = largest + t.pitch, *const mean = least + t.pitch;
    auto large = Vector{} != Vector{};
    for (int64_t i = 0; i < t.pitch; i += N) {
      Vector low = load(largest + i), high = low, sum = low;
      for (int part = 1; part < PARTS; part++) {
        const Vector x = load(largest + part * t.pitch + i);
        low = x < low ? x : low, high = x > high ? x : high, sum += x;
      }
      large |= ~(sum <= limit);  // NaN as well
      store(largest + i, high), store(least + i, low), store(mean + i, sum / Scalar(PARTS));
    }
    for (int k = 0; k < N; k++)
      if (large[k]) return false;
    const Scalar enough = 1 + 2 * *std::max_element(shares, shares + 9);
    for (int64_t j = 0; j < item.column_count; j += N) {
      auto bad = Vector{} != Vector{};
      for (int64_t row = 0; row < item.row_count; row++) {
        Vector of_least{}, of_largest{}, most{}, most_mean{};
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; tap++) {
          const int64_t at = (row + tap / 3) * t.columns.length + j + tap % 3;
          const Vector x = load(largest + at), m = load(mean + at);
          of_least += shares[tap] * load(least + at), of_largest += shares[tap] * x;
          most = x > most ? x : most, most_mean = m > most_mean ? m : most_mean;
        }
        bad |= ~((of_least >= most_mean) | (of_largest >= enough * most));
      }
      for (int k = 0; k < std::min<int64_t>(N, item.column_count - j); k++)
        if (bad[k]) return false;
    }
    return true;
  }

  void run_winograd(int64_t begin, int64_t end, const Tiling& t, Scalar limit, PartialMinima<T>& minima_of_parts,
                   char* done) const {
    if constexpr (std::is_same_v<Element, float>) {
      const int64_t in_row = t.tile_columns / 2, vectors = ceil_div(t.tile_rows / 2 * in_row, N), squares = vectors * N;
      const int64_t pitch = squares + N, plane = in_channels * pitch;
      std::vector<Element> patch(block_terms * t.pitch + 2 * N), numbers(16 * plane), scratch(2 * (in_row + 2 * N));
      std::vector<Element> largest(PARTS * t.pitch);
      std::vector<Scalar> values(4 * squares), row_values(t.tile_columns), unfinished(16 * BLOCK * squares);
      std::vector<Index<Scalar>> winning(kWinners ? 4 * squares : 0), row_winning(kWinners ? t.tile_columns : 0);
      const Minima<Scalar> minima{values.data(), winning.data()}, row_minima{row_values.data(), row_winning.data()};
      std::vector<int> offsets, starts;
      for (int64_t c = 0; c < in_channels; c++) offsets.push_back(int(c * pitch));
      for (int64_t v = 0; v < vectors; v++) starts.push_back(int(v * N));
      for (int64_t i = begin; i < end; i++) {
        const Item item = this->item(i, t, minima_of_parts.parts);
        std::fill(largest.begin(), largest.end(), Element(0));
        for (int64_t b = 0; b < depth_blocks; b++) {
          pack(item, t, 0, b, patch.data());
          Element* const to = numbers.data() + b * block_terms * pitch;
          transform_input(patch.data(), b * block_terms, terms_in(b), t, plane, pitch, scratch, largest.data(), to);
        }
        if (!keeps_digits(item, t, limit, largest.data())) continue;
        minima.clear(4 * squares, item.first_block * BLOCK);
        for (int64_t o = item.first_block; o < item.end_block; o++) {
          const int size = block_size(o);
          Strip<Scalar, Element> strip;
          strip.starts = starts.data(), strip.offsets = offsets.data(), strip.depth = in_channels;
          strip.chain = winograd_chain, strip.pitch = squares;
          strip.first = true, strip.last = false, strip.minima = minima;
          strip.bias = biases.data() + o * BLOCK, strip.factors = factors.data() + o * BLOCK;
          strip.channel = o * BLOCK, strip.last_channel = out_channels - 1;
          for (int which = 0; which < 16; which++) {
            strip.weights = transformed_weights.get() + (o * BLOCK * 16 + which * size) * in_channels;
            strip.patch = numbers.data() + which * plane, strip.unfinished = unfinished.data() + which * BLOCK * squares;
            convolve_tile<BLOCK>(strip, size, (int)vectors);
          }
          strip.unfinished = unfinished.data();
          transform_output<BLOCK>(strip, size);
        }
        for (int64_t row = 0; row < item.row_count; row++) {
          for (int64_t j = 0; j < item.column_count; j++) {
            const int64_t at = (row % 2 * 2 + j % 2) * squares + row / 2 * in_row + j / 2;
            row_values[j] = values[at];
            if constexpr (kWinners) row_winning[j] = winning[at];
          }
          minima_of_parts.put(item.part, first_pixel(item, row), row_minima, item.column_count);
        }
        done[i] = true;
      }
    }
  }
};

// ---- the operator ----

// The precision is a choice of GPUs; here float32 is float32.
Forward conv2d_scale_min(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, std::string /*precision*/, const std::optional<Tensor>& scales) {
  const ConvShape shape = check_conv(input, weight, bias, stride, padding, dilation, groups);
  check_scales(scales, input, weight.size(0), scale);
  Tensor output = torch::stable::new_empty(input, {shape.images, 1, shape.output[0], shape.output[1]});
  const std::optional<Tensor> winners = new_winners(output, weight.size(0));
  if (output.numel() == 0) return forward_result(output, winners);
  dispatch(input.scalar_type(), [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    Convolution<T> convolution{input, weight, output, winners, groups};
    convolution.pack_constants(bias, scale, scales);
    convolution.run(stride, padding, dilation);
  });
  return forward_result(output, winners);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) {
  m.impl(FORWARD("conv2d_scale_min"), TORCH_BOX(&conv2d_scale_min));
}
