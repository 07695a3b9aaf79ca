// The gradients of min over channels of scale * conv2d(input) with respect to the convolution's weight and bias.
//
// Idea: what reaches the convolution's output is one number per pixel, in the channel that had the minimum. So a channel's
//   weights gather, from each pixel that it won, the patch of the input below the filter times that number: 1 / C_out of the
//   dense work. The pixels of a tile are sorted by their winners, so that a channel's sums stay in registers for all pixels
//   that it won there. A thread copies what a tile needs of a few input channels to its cache, channels innermost: padding,
//   layout and dtype are dealt with there, and the taps of a filter's row lie in one run of vectors. Threads share the channels
//   of the input, not the pixels, while there are enough: then each has sums of its own, and nothing is left to add up.
// Limit: reading patches and sums from the L2 cache.
// Previous rung: PyTorch's backward, a dense convolution over a gradient that is nearly all zeros, which min wrote to memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "minima_grad.h"

namespace {
using namespace fused_kernels;

constexpr int VECTORS = REGISTERS / 2;     // of a filter's row whose sums are in registers together, ...
constexpr int CHAIN = 32;                  // ... over few pixels: a sum of short sums has small rounding errors
constexpr int64_t BAND_BYTES = 192 << 10;  // of the input, for one tile: leaves half of an L2 cache or more to the sums
constexpr int64_t TILE_COLUMNS = 64, TILE_PIXELS = 2048;
constexpr int64_t MIN_WORK = 1 << 16;      // multiply-adds; less is not worth waking a thread for

// ---- the band: what a tile needs of the input ----

// One axis of a band: where it has what an output needs at a tap. It has all places in between or, where those are more, a part
// for each tap with what the outputs need there.
struct Axis {
  int64_t taps, stride, dilation, padding, input, tile;
  int64_t output_step, tap_step, size;

  Axis(const ConvShape& shape, int axis, int64_t tile)
      : taps(shape.kernel[axis]), stride(shape.stride[axis]), dilation(shape.dilation[axis]), padding(shape.padding[axis]),
        input(shape.input[axis]), tile(tile), output_step(stride), tap_step(dilation),
        size((tile - 1) * stride + (taps - 1) * dilation + 1) {
    if (size > taps * tile) output_step = 1, tap_step = tile, size = taps * tile;
  }
  // Call f(first place in the band, its place in the input, how many, how far apart these are in the input).
  template <class F> void for_each_run(int64_t first_output, const F& f) const {
    const int64_t first = first_output * stride - padding;
    if (output_step == stride && tap_step == dilation) return f(0, first, size, int64_t(1));
    for (int64_t tap = 0; tap < taps; tap++) f(tap * tile, first + tap * dilation, tile, stride);
  }
};

// ---- the kernel: patches summed in registers ----

// A pixel of the output: its gradient, and where its patch begins in the band.
template <class Scalar> struct Pixel {
  Scalar grad;
  int at;
};

// Pixels of a tile that one channel won: those before the end, and after the winner's before.
struct Winner {
  int channel, end;
};

template <int COUNT, class Scalar>
void add_patches(const Scalar* band, const Pixel<Scalar>* pixel, const Pixel<Scalar>* end, bool first, Scalar* sums) {
  using Vector = typename Compute<Scalar>::Vector;
  Vector total[COUNT] = {};
  while (pixel != end) {
    Vector sum[COUNT] = {};
    for (const Pixel<Scalar>* stop = pixel + std::min<int64_t>(CHAIN, end - pixel); pixel != stop; pixel++)
#pragma GCC unroll 16
      for (int v = 0; v < COUNT; v++) sum[v] += load(band + pixel->at + v * LANES<Scalar>) * pixel->grad;
#pragma GCC unroll 16
    for (int v = 0; v < COUNT; v++) total[v] += sum[v];
  }
#pragma GCC unroll 16
  for (int v = 0; v < COUNT; v++) {
    if (!first) total[v] += load(sums + v * LANES<Scalar>);
    store(sums + v * LANES<Scalar>, total[v]);
  }
}

template <class Scalar> using AddPatches = decltype(&add_patches<1, Scalar>);
template <class Scalar, size_t... I> AddPatches<Scalar> add_patches_of(int vectors, std::index_sequence<I...>) {
  static constexpr AddPatches<Scalar> kernels[] = {add_patches<I + 1, Scalar>...};
  return kernels[vectors - 1];
}

// ---- the bias ----

// The sums over the pixels that each channel won, in double: they are long, and reading takes longer anyway. How the pixels are
// shared does not depend on the number of threads, so neither does the result.
template <class T> void sum_grads(const MinimaGrad<T>& minima, T* result) {
  const int64_t pixels = minima.images * minima.rows * minima.columns, channels = minima.last_channel + 1;
  const int64_t parts = std::min<int64_t>(std::max<int64_t>(pixels / std::max<int64_t>(1 << 14, 4 * channels), 1), 64);
  std::vector<double> sums(parts * channels);
  torch::stable::parallel_for(0, parts, ceil_div(parts * MIN_WORK, pixels + 1), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t first = part * pixels / parts, count = (part + 1) * pixels / parts - first;
      double* to = sums.data() + part * channels;
      minima.for_each(first, count, [&](int64_t, auto grad, int channel) { to[channel] += grad; });
    }
  });
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t part = 1; part < parts; part++) sums[c] += sums[part * channels + c];
    result[c] = T(typename Compute<T>::Scalar(sums[c]));
  }
}

// ---- the weights: sorting, packing, threads ----

template <class T> struct GradWeight {
  using Scalar = typename Compute<T>::Scalar;
  static constexpr int N = LANES<T>;

  const ConvShape& shape;
  const MinimaGrad<T>& minima;
  const T* input;
  const int64_t in_channels = shape.in_channels, out_channels = shape.out_channels;  // of one group
  const int64_t taps = shape.taps();
  const int64_t* const strides = shape.input_strides;

  // Where a row's taps are neighbours in the band, they are one run of vectors, and fewer channels fill the registers. A chunk:
  // the channels that a thread sums at a time.
  const bool neighbours = shape.dilation[1] == 1 && shape.stride[1] <= shape.kernel[1];
  const int64_t joined = neighbours ? shape.kernel[1] : 1, runs = taps / joined;
  const int64_t chunk = std::min(in_channels, std::max<int64_t>(VECTORS / joined, 1) * N);
  const int64_t chunks = ceil_div(in_channels, chunk), vectors = ceil_div(joined * chunk, N);

  // Tiles as square as the image lets them, whose bands fit in the cache.
  const std::pair<int64_t, int64_t> tile = choose_tile();
  const Axis rows{shape, 0, tile.first}, columns{shape, 1, tile.second};
  const int64_t high = ceil_div(minima.rows, rows.tile), wide = ceil_div(minima.columns, columns.tile);
  const int64_t tiles = shape.images * high * wide, tile_pixels = rows.tile * columns.tile;
  const std::unique_ptr<Pixel<Scalar>[]> pixels{new Pixel<Scalar>[tiles * tile_pixels]};
  std::vector<std::vector<Winner>> winners = std::vector<std::vector<Winner>>(tiles);

  std::pair<int64_t, int64_t> choose_tile() const {
    int64_t columns = std::min(TILE_COLUMNS, minima.columns), rows = std::min(ceil_div(TILE_PIXELS, columns), minima.rows);
    const auto numbers = [&] { return Axis(shape, 0, rows).size * Axis(shape, 1, columns).size * chunk; };
    while (rows * columns > 1 && numbers() * (int64_t)sizeof(Scalar) > BAND_BYTES) {
      int64_t& longer = rows > columns ? rows : columns;
      longer = ceil_div(longer, 2);
    }
    return {ceil_div(minima.rows, ceil_div(minima.rows, rows)), ceil_div(minima.columns, ceil_div(minima.columns, columns))};
  }

  // Sort every tile's pixels by their winners, each winner's in the order in which they lie in memory.
  void sort_pixels() {
    const int64_t channels = out_channels * shape.groups;
    torch::stable::parallel_for(0, tiles, ceil_div(MIN_WORK, tile_pixels), [&](int64_t begin, int64_t end) {
      std::vector<int> next(channels + 1);
      for (int64_t t = begin; t < end; t++) {
        const int64_t column = t % wide * columns.tile, row = t / wide % high * rows.tile, image = t / wide / high;
        const int64_t column_count = std::min(columns.tile, minima.columns - column);
        const int64_t row_count = std::min(rows.tile, minima.rows - row);
        const auto for_each = [&](const auto& f) {
          for (int64_t i = 0; i < row_count; i++) {
            const int64_t at = i * rows.output_step * columns.size, step = columns.output_step;
            minima.for_each((image * minima.rows + row + i) * minima.columns + column, column_count,
                            [&](int64_t j, Scalar grad, int channel) { f(int((at + j * step) * chunk), grad, channel); });
          }
        };
        std::fill(next.begin(), next.end(), 0);
        for_each([&](int, Scalar, int channel) { next[channel + 1]++; });
        for (int64_t c = 0; c < channels; c++) {
          if (next[c + 1] > 0) winners[t].push_back({int(c), next[c] + next[c + 1]});
          next[c + 1] += next[c];
        }
        Pixel<Scalar>* const to = pixels.get() + t * tile_pixels;
        for_each([&](int at, Scalar grad, int channel) { to[next[channel]++] = {grad, at}; });
      }
    });
  }

  // Copy some channels of pixels of a row, step apart, to [pixel][channel], with zeros for what is left of the chunk.
  void copy_row(const T* from, int64_t channels, int64_t step, int64_t pixels, Scalar* to) const {
    int64_t c = 0, in_vectors = 0;
    if (strides[1] == 1) {
      for (; c + N <= channels; c += N)
        for (int64_t i = 0; i < pixels; i++) store(to + i * chunk + c, load(from + i * step + c));
    } else if (step == 1) {
      in_vectors = pixels / N * N;
      for (; c + N <= channels; c += N) {
        for (int64_t i = 0; i < in_vectors; i += N) {
          typename Compute<T>::Vector square[N];
          for (int k = 0; k < N; k++) square[k] = load(from + (c + k) * strides[1] + i);
          transpose(square);
          for (int k = 0; k < N; k++) store(to + (i + k) * chunk + c, square[k]);
        }
        for (int64_t i = in_vectors; i < pixels; i++)
          for (int k = 0; k < N; k++) to[i * chunk + c + k] = Scalar(from[(c + k) * strides[1] + i]);
      }
    }
    for (; c < channels; c++)
      for (int64_t i = 0; i < pixels; i++) to[i * chunk + c] = Scalar(from[c * strides[1] + i * step]);
    for (; c < chunk; c++)
      for (int64_t i = 0; i < pixels; i++) to[i * chunk + c] = Scalar(0);
  }

  // Copy what a tile needs of some channels, zeros in the padding: [row][column][channel].
  void pack_band(const T* from, int64_t channels, int64_t first_row, int64_t first_column, Scalar* band) const {
    rows.for_each_run(first_row, [&](int64_t at_row, int64_t row, int64_t row_count, int64_t row_step) {
      for (int64_t i = 0; i < row_count; i++, row += row_step)
        columns.for_each_run(first_column, [&](int64_t at_column, int64_t column, int64_t count, int64_t step) {
          // Columns low to high of this run lie inside the input.
          int64_t low = std::min(ceil_div(std::max<int64_t>(-column, 0), step), count);
          int64_t high = std::min(ceil_div(std::max<int64_t>(columns.input - column, 0), step), count);
          if (row < 0 || row >= rows.input || high < low) low = high = 0;
          Scalar* to = band + ((at_row + i) * columns.size + at_column) * chunk;
          std::fill(to, to + low * chunk, Scalar(0));
          std::fill(to + high * chunk, to + count * chunk, Scalar(0));
          const T* at = from + row * strides[2] + (column + low * step) * strides[3];
          if (low < high) copy_row(at, channels, step * strides[3], high - low, to + low * chunk);
        });
    });
  }

  // What one tile adds to the sums of one group's channels.
  void add_tile(int64_t t, int64_t group, const Scalar* band, char* begun, Scalar* sums) const {
    const int64_t blocks = ceil_div(vectors, VECTORS), block = ceil_div(vectors, blocks);
    constexpr auto kernels = std::make_index_sequence<VECTORS>();
    const AddPatches<Scalar> add = add_patches_of<Scalar>(int(block), kernels);
    const AddPatches<Scalar> add_last = add_patches_of<Scalar>(int(vectors - (blocks - 1) * block), kernels);
    for (auto winner = first_winner(t, group); winner != winners[t].end() && winner->channel < (group + 1) * out_channels;
         winner++) {
      const Pixel<Scalar>* from = pixels.get() + t * tile_pixels;
      const Pixel<Scalar>* const end = from + winner->end;
      if (winner != winners[t].begin()) from += winner[-1].end;
      const int64_t channel = winner->channel - group * out_channels;
      Scalar* to = sums + channel * runs * vectors * N;
      for (int64_t run = 0; run < runs; run++) {
        const int64_t tap = run * joined, row = tap / shape.kernel[1] * rows.tap_step;
        const Scalar* patch = band + (row * columns.size + tap % shape.kernel[1] * columns.tap_step) * chunk;
        for (int64_t b = 0; b < blocks; b++, patch += block * N) {
          const bool last = b == blocks - 1;
          (last ? add_last : add)(patch, from, end, !begun[channel], to);
          to += (last ? vectors - b * block : block) * N;
        }
      }
      begun[channel] = 1;
    }
  }
  auto first_winner(int64_t t, int64_t group) const {
    const auto before = [](const Winner& winner, int64_t channel) { return winner.channel < channel; };
    return std::lower_bound(winners[t].begin(), winners[t].end(), group * out_channels, before);
  }

  void run(T* result) const {
    // One piece of work: a chunk of a group's channels and, where those are too few for all threads, a part of the tiles.
    const int64_t units = shape.groups * chunks, threads = torch::stable::get_num_threads();
    const int64_t read = shape.images * shape.input[0] * shape.input[1];
    const int64_t work = (shape.pixels() * taps + read) * in_channels + 1;
    int64_t parts = 1;
    while (units * parts % threads != 0 && units * parts < 4 * threads) parts++;
    parts = std::max<int64_t>(std::min({parts, tiles, work / MIN_WORK}), 1);

    const int64_t sums_of_channel = runs * vectors * N, all_sums = out_channels * sums_of_channel;
    const Lines<Scalar> sums(units * parts * all_sums);
    std::vector<char> begun(units * parts * out_channels);
    torch::stable::parallel_for(0, units * parts, ceil_div(MIN_WORK * units * parts, work), [&](int64_t begin, int64_t end) {
      std::vector<Scalar> band(rows.size * columns.size * chunk + N);
      for (int64_t item = begin; item < end; item++) {
        const int64_t part = item / units, group = item % units / chunks, channel = item % chunks * chunk;
        for (int64_t t = part * tiles / parts; t < (part + 1) * tiles / parts; t++) {
          const auto winner = first_winner(t, group);
          if (winner == winners[t].end() || winner->channel >= (group + 1) * out_channels) continue;
          const int64_t column = t % wide * columns.tile, row = t / wide % high * rows.tile, image = t / wide / high;
          const T* from = input + image * strides[0] + (group * in_channels + channel) * strides[1];
          pack_band(from, std::min(chunk, in_channels - channel), row, column, band.data());
          add_tile(t, group, band.data(), begun.data() + item * out_channels, sums.data() + item * all_sums);
        }
      }
    });

    // Add up the parts, in their order, and turn [tap][channel] into [channel][tap].
    const int64_t grain = ceil_div(MIN_WORK, taps * in_channels);
    torch::stable::parallel_for(0, shape.groups * out_channels, grain, [&](int64_t begin, int64_t end) {
      std::vector<Scalar> total(sums_of_channel);
      for (int64_t o = begin; o < end; o++)
        for (int64_t c = 0; c < chunks; c++) {
          std::fill(total.begin(), total.end(), Scalar(0));
          bool any = false;
          for (int64_t part = 0; part < parts; part++) {
            const int64_t item = (part * shape.groups + o / out_channels) * chunks + c, channel = o % out_channels;
            if (!begun[item * out_channels + channel]) continue;
            const Scalar* from = sums.data() + item * all_sums + channel * sums_of_channel;
            for (int64_t i = 0; i < sums_of_channel; i++) total[i] += from[i];
            any = true;
          }
          const int64_t channels = std::min(chunk, in_channels - c * chunk);
          T* to = result + (o * in_channels + c * chunk) * taps;
          if (!any) std::fill(to, to + channels * taps, T(0));
          else
            for (int64_t run = 0; run < runs; run++)
              for (int64_t tap = 0; tap < joined; tap++)
                for (int64_t k = 0; k < channels; k++)
                  to[k * taps + run * joined + tap] = T(total[run * vectors * N + tap * chunk + k]);
        }
    });
  }
};

// ---- the operators ----

// The precision is a choice of GPUs; here float32 is float32.
std::tuple<Tensor, Tensor> grad_weight(const Tensor& grad, const Tensor& winners, const Tensor& input, double scale,
                                       int64_t out_channels, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                       std::string /*precision*/) {
  const ConvShape shape =
      check_grad_weight(grad, winners, input, out_channels, kernel_size, stride, padding, dilation, groups);
  Tensor weight = torch::stable::new_empty(grad, {out_channels, shape.in_channels, kernel_size[0], kernel_size[1]});
  Tensor bias = torch::stable::new_empty(grad, {out_channels});
  dispatch(grad.scalar_type(), [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    const MinimaGrad<T> minima(grad, winners, scale, out_channels);
    GradWeight<T> gradient{shape, minima, (const T*)input.data_ptr()};
    gradient.sort_pixels();
    gradient.run((T*)weight.data_ptr());
    sum_grads(minima, (T*)bias.data_ptr());
  });
  return {weight, bias};
}

Tensor grad_bias(const Tensor& grad, const Tensor& winners, double scale, int64_t out_channels) {
  check_grad(grad, winners);
  STD_TORCH_CHECK(out_channels > 0 && out_channels <= INT32_MAX, "out_channels: expected a positive number, got ",
                  out_channels);
  Tensor bias = torch::stable::new_empty(grad, {out_channels});
  dispatch(grad.scalar_type(), [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    sum_grads(MinimaGrad<T>(grad, winners, scale, out_channels), (T*)bias.data_ptr());
  });
  return bias;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) {
  m.impl(OPERATOR("grad_weight"), TORCH_BOX(&grad_weight));
  m.impl(OPERATOR("grad_bias"), TORCH_BOX(&grad_bias));
}
