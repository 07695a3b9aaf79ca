// The gradient of min over channels of scale * conv2d(input) with respect to the input.
//
// Idea: what reaches the convolution's output is one number per pixel, in the channel that had the minimum. So a pixel of the
//   input gathers, from each output pixel whose filter covers it, the winner's weights at that tap times that number: 1 / C_out
//   of the dense work. A tap's weights lie next to each other over the input channels, which are in vector lanes; their sums
//   stay in registers until the pixel is done. For NCHW, a few pixels at a time are transposed in the L1 cache.
// Limit: reading the weights from the L2 cache, then writing the result, for which the system first has to hand out memory.
// Previous rung: PyTorch's backward, a dense convolution over a gradient that is nearly all zeros, which min wrote to memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "minima_grad.h"

namespace {
using namespace fused_kernels;

constexpr int VECTORS = REGISTERS / 2;  // of input channels whose sums are in registers together
constexpr int64_t BUFFER = 4096;        // numbers of a few pixels that are written together
constexpr int64_t MIN_WORK = 1 << 16;   // multiply-adds; less is not worth waking a thread for

// ---- which outputs reach an input ----

// One axis: from which outputs, through which taps, each input place gathers. Both are in steps of what follows them in memory.
struct Axis {
  struct Pair {
    int64_t output, tap;
  };
  std::vector<int64_t> first;  // each place's first pair, and an end
  std::vector<Pair> pairs;

  Axis(const ConvShape& shape, int axis, int64_t output_step, int64_t tap_step) : first(shape.input[axis] + 1) {
    const auto for_each = [&](auto f) {
      for (int64_t tap = 0; tap < shape.kernel[axis]; tap++)
        for (int64_t output = 0; output < shape.output[axis]; output++) {
          const int64_t place = output * shape.stride[axis] + tap * shape.dilation[axis] - shape.padding[axis];
          if (place >= 0 && place < shape.input[axis]) f(place, output, tap);
        }
    };
    for_each([&](int64_t place, int64_t, int64_t) { first[place + 1]++; });
    for (int64_t place = 0; place < shape.input[axis]; place++) first[place + 1] += first[place];
    pairs.resize(first.back());
    std::vector<int64_t> next = first;
    for_each([&](int64_t place, int64_t output, int64_t tap) {
      pairs[next[place]++] = {output * output_step, tap * tap_step};
    });
  }
  const Pair* begin(int64_t place) const { return pairs.data() + first[place]; }
  const Pair* end(int64_t place) const { return pairs.data() + first[place + 1]; }
};

// ---- the kernel: parts summed in registers ----

// What one output pixel adds to one input pixel: weights times a number, to the channels of a group.
template <class Scalar> struct Part {
  const Scalar* weights;
  Scalar grad;
  int group;
};

template <int COUNT, class Scalar>
void sum_parts(const Part<Scalar>* parts, const Part<Scalar>* end, int64_t channel, Scalar* sums, bool first) {
  typename Compute<Scalar>::Vector sum[COUNT] = {};
  for (; parts != end; parts++)
#pragma GCC unroll 16
    for (int v = 0; v < COUNT; v++) sum[v] += load(parts->weights + channel + v * LANES<Scalar>) * parts->grad;
  for (int v = 0; v < COUNT; v++) {
    if (!first) sum[v] += load(sums + channel + v * LANES<Scalar>);
    store(sums + channel + v * LANES<Scalar>, sum[v]);
  }
}

// All vectors of a pixel's channels, the registers full while there are enough.
template <int COUNT, class Scalar>
void sum_vectors(const Part<Scalar>* parts, const Part<Scalar>* end, int64_t channel, int64_t vectors, Scalar* sums) {
  for (; vectors >= COUNT; vectors -= COUNT, channel += COUNT * LANES<Scalar>) {
    // Two short sums have smaller rounding errors than one long one.
    const Part<Scalar>* const middle = parts + (end - parts + 1) / 2;
    sum_parts<COUNT>(parts, middle, channel, sums, true);
    sum_parts<COUNT>(middle, end, channel, sums, false);
  }
  if constexpr (COUNT > 1)
    if (vectors > 0) sum_vectors<COUNT / 2>(parts, end, channel, vectors, sums);
}

// ---- packing, gathering, threads ----

template <class T> struct GradInput {
  using Scalar = typename Compute<T>::Scalar;
  static constexpr int N = LANES<T>;

  const ConvShape& shape;
  const MinimaGrad<T>& minima;
  const bool channels_last;
  const int64_t in_channels = shape.in_channels, channels = in_channels * shape.groups, taps = shape.taps();
  const int64_t out_channels = shape.out_channels * shape.groups, out_pixels = minima.rows * minima.columns;
  const int64_t pitch = ceil_div(in_channels, N) * N;  // between the weights of two taps
  const int64_t row = ceil_div(channels, N) * N;       // between the sums of two pixels
  const Lines<Scalar> weights{out_channels * taps * pitch};
  const std::unique_ptr<Part<Scalar>[]> winners{new Part<Scalar>[shape.pixels()]};

  // What all taps of a pixel share, and which channels win at all: small images leave most of the weights unread.
  using Flags = std::vector<std::atomic<bool>>;
  Flags read_minima() const {
    Flags wins(out_channels);
    torch::stable::parallel_for(0, shape.pixels(), MIN_WORK, [&](int64_t begin, int64_t end) {
      minima.for_each(begin, end - begin, [&](int64_t i, Scalar grad, int channel) {
        const int group = shape.groups == 1 ? 0 : channel / int(shape.out_channels);
        winners[begin + i] = {weights.data() + channel * taps * pitch, grad, group};
        // Seldom written: threads need not wait for each other's cache lines.
        if (!wins[channel].load(std::memory_order_relaxed)) wins[channel].store(true, std::memory_order_relaxed);
      });
    });
    return wins;
  }

  // The order in which they are read: output channel, tap, input channel.
  void pack_weights(const T* weight, const Flags& wins) const {
    const int64_t* stride = shape.weight_strides;
    torch::stable::parallel_for(0, out_channels, ceil_div(MIN_WORK, taps * in_channels), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; o++) {
        if (!wins[o]) continue;
        Scalar* to = weights.data() + o * taps * pitch;
        for (int64_t tap = 0; tap < taps; tap++, to += pitch) {
          const T* from = weight + o * stride[0] + tap / shape.kernel[1] * stride[2] + tap % shape.kernel[1] * stride[3];
          for (int64_t c = 0; c < in_channels; c++) to[c] = Scalar(from[c * stride[1]]);
          std::fill(to + in_channels, to + pitch, Scalar(0));
        }
      }
    });
  }

  // All that one pixel of the input gathers.
  template <class F>
  void for_each_part(const Axis& rows, const Axis& columns, int64_t image, int64_t y, int64_t x, const F& f) const {
    const Part<Scalar>* from = winners.get() + image * out_pixels;
    for (auto vertical = rows.begin(y); vertical != rows.end(y); vertical++)
      for (auto horizontal = columns.begin(x); horizontal != columns.end(x); horizontal++) {
        const Part<Scalar>& winner = from[vertical->output + horizontal->output];
        f(Part<Scalar>{winner.weights + vertical->tap + horizontal->tap, winner.grad, winner.group});
      }
  }

  void sum(const Axis& rows, const Axis& columns, int64_t image, int64_t y, int64_t x, Part<Scalar>* parts,
           Scalar* sums) const {
    if (shape.groups > 1) {
      // Each part has channels of its own group alone.
      std::fill(sums, sums + row, Scalar(0));
      return for_each_part(rows, columns, image, y, x, [&](const Part<Scalar>& part) {
        Scalar* to = sums + part.group * in_channels;
        for (int64_t c = 0; c < in_channels; c++) to[c] += part.grad * part.weights[c];
      });
    }
    if (pitch == N) {
      // Few channels: nothing to read the parts twice for.
      typename Compute<T>::Vector sum = {};
      for_each_part(rows, columns, image, y, x, [&](const Part<Scalar>& part) { sum += load(part.weights) * part.grad; });
      return store(sums, sum);
    }
    Part<Scalar>* end = parts;
    for_each_part(rows, columns, image, y, x, [&](const Part<Scalar>& part) { *end++ = part; });
    sum_vectors<VECTORS>(parts, end, 0, pitch / N, sums);
  }

  // Some pixels of a row, from [pixel][channel] to where the result has them.
  void write(const Scalar* sums, int64_t pixels, T* to) const {
    const int64_t plane = shape.input[0] * shape.input[1];
    if (channels_last) {
      for (int64_t i = 0; i < pixels; i++, sums += row, to += channels) {
        int64_t c = 0;
        for (; c + N <= channels; c += N) store(to + c, load(sums + c));
        for (; c < channels; c++) to[c] = T(sums[c]);
      }
      return;
    }
    for (int64_t c = 0; c < channels; c += N) {
      const int64_t some = std::min<int64_t>(N, channels - c);
      int64_t i = 0;
      for (; i + N <= pixels; i += N) {
        typename Compute<T>::Vector square[N];
        for (int k = 0; k < N; k++) square[k] = load(sums + (i + k) * row + c);
        transpose(square);
        for (int k = 0; k < some; k++) store(to + (c + k) * plane + i, square[k]);
      }
      for (; i < pixels; i++)
        for (int k = 0; k < some; k++) to[(c + k) * plane + i] = T(sums[i * row + c + k]);
    }
  }

  void run(T* result) const {
    const Axis rows(shape, 0, minima.columns, shape.kernel[1] * pitch), columns(shape, 1, 1, pitch);
    const int64_t height = shape.input[0], width = shape.input[1];
    // One piece of work: a few pixels of a row.
    const int64_t few = std::min(std::max<int64_t>(BUFFER / row / N, 2) * N, width), blocks = ceil_div(width, few);
    const int64_t grain = ceil_div(MIN_WORK, few * row);
    torch::stable::parallel_for(0, shape.images * height * blocks, grain, [&](int64_t begin, int64_t end) {
      const Lines<Scalar> sums(few * row);
      std::vector<Part<Scalar>> parts(taps);
      for (int64_t work = begin; work < end; work++) {
        const int64_t x = work % blocks * few, y = work / blocks % height, image = work / blocks / height;
        const int64_t pixels = std::min(few, width - x);
        for (int64_t i = 0; i < pixels; i++)
          sum(rows, columns, image, y, x + i, parts.data(), sums.data() + i * row);
        const int64_t place = y * width + x;
        write(sums.data(), pixels, result + image * channels * height * width + place * (channels_last ? channels : 1));
      }
    });
  }
};

// ---- the operator ----

// The precision is a choice of GPUs; here float32 is float32.
Tensor grad_input(const Tensor& grad, const Tensor& winners, const Tensor& weight, double scale,
                  std::vector<int64_t> input_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  std::vector<int64_t> dilation, int64_t groups, std::string /*precision*/, bool channels_last) {
  const ConvShape shape = check_grad_input(grad, winners, weight, input_size, stride, padding, dilation, groups);
  const int64_t channels = shape.in_channels * groups;
  Tensor result = new_gradient(grad, {shape.images, channels, shape.input[0], shape.input[1]}, channels_last);
  if (result.numel() == 0) return result;
  dispatch(grad.scalar_type(), [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    const MinimaGrad<T> minima(grad, winners, scale, shape.out_channels * groups);
    const GradInput<T> gradient{shape, minima, channels_last};
    gradient.pack_weights((const T*)weight.data_ptr(), gradient.read_minima());
    gradient.run((T*)result.data_ptr());
  });
  return result;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) { m.impl(OPERATOR("grad_input"), TORCH_BOX(&grad_input)); }
