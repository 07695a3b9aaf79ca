#pragma once
// scale_min_vectorized where each channel has a factor of its own, an addend wider than the input, or both.
//
// Such numbers come in several types and strides. So a small kernel first lays them side by side, in the type to compute in; then
// there are two kernels instead of one for each case. They do what scale_min_vectorized's do, at fewer sizes: what these cost to
// compile, every first call would wait for.

#include "launch.cuh"
#include "numerics.cuh"
#include "ptx/grid_dependency.cuh"
#include "vectors.cuh"

namespace fused_kernels::each {

constexpr int kWarpBits = 5, kWarpSize = 1 << kWarpBits;

// Pixels in neighbouring lanes: as many bytes in flight per thread; channels: as many pixels of a group.
struct Planes {
  static constexpr int kThreadBits = 8, kThreads = 1 << kThreadBits, kBytesInFlight = 64, kBlocksPerSM = 4;
};
struct Pixels {
  static constexpr int kThreads = 128, kPixels = 8, kBlocksPerSM = 4;
};

// Of each channel what is added and what it is then multiplied by, each run from a multiple of 16 bytes on.
template <typename A>
struct Terms {
  A *addends, *factors;
};

// In elements.
struct Strides {
  int64_t image, channel, row, column;
};

template <typename T>
__global__ void __launch_bounds__(Planes::kThreads)
    pack_terms_kernel(const void* bias, bool bias_is_wider, int64_t bias_stride, const Accumulator<T>* scales,
                      int64_t scales_stride, Accumulator<T> scale, Terms<Accumulator<T>> terms, int channels) {
  using A = Accumulator<T>;
  ptx::wait_for_previous_grid();
  ptx::let_next_grid_begin();
  const int channel = blockIdx.x * Planes::kThreads + threadIdx.x;
  if (channel >= channels) return;
  A addend = -0.0;  // x + -0.0 is x, whatever x is
  if (bias) {
    const int64_t at = channel * bias_stride;
    addend = bias_is_wider ? static_cast<const A*>(bias)[at] : static_cast<A>(static_cast<const T*>(bias)[at]);
  }
  terms.addends[channel] = addend;
  terms.factors[channel] = scales ? scales[channel * scales_stride] : scale;
}

// NCHW, and one by one in any strides. The block's threads are `split` equal rows: a row owns every split-th channel.
template <typename T, int VEC>
__global__ void __launch_bounds__(Planes::kThreads, Planes::kBlocksPerSM)
    planes_kernel(const T* input, Terms<Accumulator<T>> terms, T* output, int64_t vectors, int channels, int64_t height,
                  int64_t width, Strides strides, int split_bits, Winners winners) {
  using A = Accumulator<T>;
  constexpr int kInFlight = Planes::kBytesInFlight / (VEC * sizeof(T) > 8 ? VEC * sizeof(T) : 8);
  const int split = 1 << split_bits, row_bits = Planes::kThreadBits - split_bits, row_threads = 1 << row_bits;
  const int row = threadIdx.x >> row_bits, column = threadIdx.x & (row_threads - 1);
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * row_threads + column;
  const bool inside = vector < vectors;

  A smallest[VEC];
  int winner[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) smallest[i] = kInfinity<A>, winner[i] = row;

  if (inside) {
    const int64_t pixel = vector * VEC, line = pixel / width;
    const T* source = input + line / height * strides.image + line % height * strides.row + pixel % width * strides.column +
                      row * strides.channel;
    ptx::wait_for_previous_grid();
    for (int channel = row; channel < channels; channel += kInFlight * split) {
      Vector<T, VEC> loaded[kInFlight];
      A addend[kInFlight], factor[kInFlight];
      int at = channel;
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        loaded[k] = *reinterpret_cast<const Vector<T, VEC>*>(source);
        addend[k] = terms.addends[at], factor[k] = terms.factors[at];
        // Past the end the last channel is read again: it is in the cache, and a minimum does not mind.
        if (at + split < channels) at += split, source += split * strides.channel;
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          take_smaller(smallest[i], (loaded[k].values[i] + addend[k]) * factor[k], winner[i], channel + k * split);
        }
      }
    }
  }

  if (split > 1) {
    __shared__ A partial[VEC][Planes::kThreads];
    __shared__ int partial_winners[kWinners ? VEC : 1][kWinners ? Planes::kThreads : 1];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      partial[i][threadIdx.x] = smallest[i];
      if constexpr (kWinners) partial_winners[i][threadIdx.x] = winner[i];
    }
    __syncthreads();
    if (row > 0) return;
    for (int r = 1; r < split; ++r) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const int thread = r * row_threads + column;
        take_smaller(smallest[i], partial[i][thread], winner[i], kWinners ? partial_winners[i][thread] : 0);
      }
    }
  }

  if (inside) {
    Vector<T, VEC> result;
#pragma unroll
    for (int i = 0; i < VEC; ++i) result.values[i] = static_cast<T>(smallest[i]);
    *reinterpret_cast<Vector<T, VEC>*>(output + vector * VEC) = result;
    for (int i = 0; i < VEC; ++i) {
      if constexpr (kWinners) winners.put(vector * VEC + i, winner[i]);
    }
  }
}

// Neighbouring terms, in loads of up to 16 bytes.
template <int VEC, typename A>
__device__ __forceinline__ void load_terms(const A* from, A (&to)[VEC]) {
  constexpr int kWide = VEC * sizeof(A) > kVectorBytes ? kVectorBytes / sizeof(A) : VEC;
#pragma unroll
  for (int i = 0; i < VEC; i += kWide) {
    const Vector<A, kWide> wide = *reinterpret_cast<const Vector<A, kWide>*>(from + i);
#pragma unroll
    for (int j = 0; j < kWide; ++j) to[i + j] = wide.values[j];
  }
}

// channels_last. A group of a warp's lanes, a power of two, owns kPixels pixels together.
template <typename T, int VEC>
__global__ void __launch_bounds__(Pixels::kThreads, Pixels::kBlocksPerSM)
    pixels_kernel(const T* input, Terms<Accumulator<T>> terms, T* output, int64_t pixels, int channels, int group_bits,
                  Winners winners) {
  using A = Accumulator<T>;
  constexpr int kPixels = Pixels::kPixels;
  static_assert(VEC * kWarpSize <= kMostPastChannels, "kMostPastChannels: expected no less than a step");
  const int lane = threadIdx.x % kWarpSize, group = 1 << group_bits, groups = kWarpSize >> group_bits, member = lane & (group - 1);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (Pixels::kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  // The groups of a warp take neighbouring pixels, so that one load of the warp is one run of addresses.
  const int64_t first = warp * kPixels * groups + (lane >> group_bits);

  A smallest[kPixels];
  int winner[kPixels];
#pragma unroll
  for (int k = 0; k < kPixels; ++k) smallest[k] = kInfinity<A>, winner[k] = 0;

  ptx::wait_for_previous_grid();
#pragma unroll 1
  for (int channel = member * VEC; channel < channels; channel += group * VEC) {
    Vector<T, VEC> loaded[kPixels];
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      // Past the end the last pixel is read again, and no result of it is stored.
      const T* const pixel = input + min(first + k * groups, pixels - 1) * channels;
      loaded[k] = *reinterpret_cast<const Vector<T, VEC>*>(pixel + channel);
    }
    A addend[VEC], factor[VEC];
    load_terms(terms.addends + channel, addend);
    load_terms(terms.factors + channel, factor);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        take_smaller(smallest[k], (loaded[k].values[i] + addend[i]) * factor[i], winner[k], channel + i);
      }
    }
  }
  for (int distance = group / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) take_smaller_of_lanes(smallest[k], winner[k], distance);
  }
  // Every member now knows all the group's results; they take turns in storing them.
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    const int64_t pixel = first + k * groups;
    if (member == (k & (group - 1)) && pixel < pixels) {
      output[pixel] = static_cast<T>(smallest[k]);
      if constexpr (kWinners) winners.put(pixel, winner[k]);
    }
  }
}

// ---- host ----

template <typename T>
void launch(const Tensor& input, const std::optional<Tensor>& bias, double scale, const std::optional<Tensor>& scales, bool early,
            bool channels_last, Tensor& output, Winners winners) {
  using A = Accumulator<T>;
  const int channels = input.size(1), device = input.get_device_index();
  const int64_t height = input.size(2), width = input.size(3), plane = height * width, pixels = input.size(0) * plane;
  const T* source = static_cast<const T*>(input.data_ptr());
  T* target = static_cast<T*>(output.data_ptr());
  const cudaStream_t stream = current_stream(input);

  const int64_t pitch = ceil_div(channels, kVectorBytes) * kVectorBytes;
  Tensor memory = torch::stable::new_empty(input, {2 * pitch * static_cast<int64_t>(sizeof(A))}, torch::headeronly::ScalarType::Byte);
  A* const numbers = static_cast<A*>(memory.data_ptr());
  const Terms<A> terms{numbers, numbers + pitch};
  launch_kernel(early, pack_terms_kernel<T>, grid_size(ceil_div(channels, Planes::kThreads)), Planes::kThreads, 0, stream,
                bias ? bias->data_ptr() : nullptr, bias && is_wider(*bias, input), bias ? bias->stride(0) : 0,
                scales ? static_cast<const A*>(scales->data_ptr()) : nullptr, scales ? scales->stride(0) : 0,
                static_cast<A>(scale), terms, channels);

  if (channels_last) {
    with_width<T>(vector_width<T>(source, channels), [&](auto vec) {
      int group_bits = 0;
      while (group_bits < kWarpBits && (vec << group_bits) < channels) ++group_bits;
      const int64_t blocks = ceil_div(pixels, (Pixels::kThreads >> group_bits) * Pixels::kPixels);
      launch_kernel(true, pixels_kernel<T, vec>, grid_size(blocks), Pixels::kThreads, 0, stream, source, terms, target, pixels,
                    channels, group_bits, winners);
    });
    return;
  }
  const bool dense = input.is_contiguous();
  with_width<T>(dense ? vector_width<T>(source, plane) : 1, [&](auto vec) {
    const int64_t vectors = pixels / vec, wanted = static_cast<int64_t>(multiprocessors(device)) * 1024;
    // Enough threads to fill half the chip, unless a thread would be left with too few channels.
    int split_bits = 0;
    while (split_bits < 4 && vectors << split_bits < wanted && channels >= 16 << split_bits) ++split_bits;
    const Strides strides = dense ? Strides{channels * plane, plane, width, 1}
                                  : Strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
    launch_kernel(true, planes_kernel<T, vec>, grid_size(ceil_div(vectors, Planes::kThreads >> split_bits)), Planes::kThreads, 0,
                  stream, source, terms, target, vectors, channels, height, width, strides, split_bits, winners);
  });
}

}  // namespace fused_kernels::each
