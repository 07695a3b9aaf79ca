// scale_min_vectorized: wide loads, several of them in flight, in whichever layout the input has.
//
// Full memory bandwidth needs tens of kilobytes of loads in flight on each SM all the time (bandwidth x latency). So a thread
// asks for several vectors of up to 16 bytes before it uses the first.
//   NCHW           a thread owns a vector of pixels and walks through the channels; each pixel has a minimum of its own.
//   channels_last  a group of threads owns a pixel, whose channels lie side by side; exchanges among lanes finish the minimum.
//   other strides  a thread owns a pixel, as in the previous rung.
// The same kernels make a second operator, scale_min_bias, that first adds one number per channel: a convolution's bias, for
// which PyTorch passes once more over all that cuDNN wrote. Here it costs one addition while everything waits for memory.
// Where each channel has a factor of its own, or a bias wider than the input, scale_min_each.cuh has two kernels that do the same.
// For training they also give each pixel's winner, from which scale_min_vectorized_backward makes the gradient.
// Limit: the memory's read bandwidth.
// Previous rung: scale_min_coalesced.

#include <algorithm>

#include "launch.cuh"
#include "numerics.cuh"
#include "ptx/grid_dependency.cuh"
#include "scale_min_each.cuh"
#include "vectors.cuh"

namespace fused_kernels {

constexpr int kWarpBits = 5, kWarpSize = 1 << kWarpBits;

// What to add to an element before it is scaled. NOTE: x + -0.0 is x, whatever x is: without a bias the addition compiles away.
template <bool BIAS, typename T>
__device__ __forceinline__ Accumulator<T> addend(const T& bias) {
  if constexpr (BIAS) return bias;
  return -0.0;
}

// How a kernel is launched: threads per block, vectors in flight per thread (Planes: bytes), blocks that must fit on an SM.
// Chosen by measurement. NOTE: more in flight than needed is slower again, by 1 % at 128 bytes (float32, H200).
// NOTE: told no number of blocks, ptxas saves registers for more of them by moving each load next to its use: of four in the
// source, two are in flight (read off the SASS, nvcc 13.0).
struct Planes {
  static constexpr int kThreadBits = 8, kThreads = 1 << kThreadBits, kBytesInFlight = 64, kBlocksPerSM = 4;
};
struct ChannelsLast {
  static constexpr int kThreadBits = 7, kThreads = 1 << kThreadBits, kPixels = 8, kBlocksPerSM = 8;
  // A small image keeps more of the chip busy with fewer pixels per thread, and where it has many channels, with several
  // vectors of a single pixel: all of them at once, if possible.
  static constexpr int kFewPixels = 2, kFewVectors = 2, kVectors = 4;
  static constexpr int kAnyGroup = -1;  // the size of a group is known at run time only
};
struct Strided {
  static constexpr int kThreads = 256, kInFlight = 8, kBlocksPerSM = 4;
};

// One load instruction of VEC * sizeof(T) bytes.
// NOTE: the hint evict_first (__ldcs) gains after a kernel that read and loses after one that wrote, such as the convolution
// (H200; notebook 03, exercise 3).
template <typename T, int VEC>
__device__ __forceinline__ Vector<T, VEC> load_vector(const T* address) {
  using Bits = std::conditional_t<
      VEC * sizeof(T) == 16, uint4,
      std::conditional_t<VEC * sizeof(T) == 8, uint2,
                         std::conditional_t<VEC * sizeof(T) == 4, uint32_t, uint16_t>>>;
  const Bits bits = *reinterpret_cast<const Bits*>(address);
  return reinterpret_cast<const Vector<T, VEC>&>(bits);
}

// Several pixels' winners: one store, or where they are ints, a few.
template <int VEC>
__device__ __forceinline__ void put_winners(Winners winners, int64_t pixel, const int (&winner)[VEC]) {
  const auto put = [&](auto* data) {
    using I = std::remove_pointer_t<decltype(data)>;
    Vector<I, VEC> vector;
#pragma unroll
    for (int i = 0; i < VEC; ++i) vector.values[i] = static_cast<I>(winner[i]);
    *reinterpret_cast<Vector<I, VEC>*>(data + pixel) = vector;
  };
  winners.wide ? put(static_cast<int32_t*>(winners.data)) : put(static_cast<uint8_t*>(winners.data));
}

// ---- NCHW ----

// A load of less than 8 bytes counts as one of 8: more of them at once gained nothing on an H200.
template <typename T, int VEC>
constexpr int kPlanesInFlight = Planes::kBytesInFlight / (VEC * sizeof(T) > 8 ? VEC * sizeof(T) : 8);

// NCHW. The block's threads are `split` equal rows: a row owns every split-th channel, so that a small image with many
// channels keeps the chip busy too.
template <typename T, int VEC, bool BIAS>
__global__ void __launch_bounds__(Planes::kThreads, Planes::kBlocksPerSM)
    planes_kernel(const T* input, Accumulator<T> scale, T* output, int64_t vectors, int channels, int64_t plane, int split_bits,
                  const T* bias, Winners winners) {
  using A = Accumulator<T>;
  constexpr int kInFlight = kPlanesInFlight<T, VEC>;
  static_assert(kInFlight > 0, "kBytesInFlight: expected 16 at the least, one of the widest loads");
  const int split = 1 << split_bits, row_bits = Planes::kThreadBits - split_bits, row_threads = 1 << row_bits;
  const int row = threadIdx.x >> row_bits, column = threadIdx.x & (row_threads - 1);
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * row_threads + column;
  const bool inside = vector < vectors;

  A smallest[VEC];
  int winner[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) smallest[i] = kInfinity<A>, winner[i] = row;

  if (inside) {
    const int64_t vectors_per_plane = plane / VEC;
    const int64_t image = vector / vectors_per_plane, offset = vector % vectors_per_plane * VEC;
    const T* source = input + (image * channels + row) * plane + offset;
    const int64_t step = split * plane;
    bias += row;

    ptx::wait_for_previous_grid();  // a small kernel may begin while the one before it ends
    for (int channel = row; channel < channels; channel += kInFlight * split) {
      Vector<T, VEC> loaded[kInFlight];
      A added[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        loaded[k] = load_vector<T, VEC>(source);
        added[k] = addend<BIAS>(*bias);
        // Past the end the last channel is read again: it is in the cache, and a minimum does not mind.
        const bool more = channel + (k + 1) * split < channels;
        if (more) source += step;
        if (BIAS && more) bias += split;  // NOTE: in one statement with the other, the plain kernel's code changed
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          take_smaller(smallest[i], (loaded[k].values[i] + added[k]) * scale, winner[i], channel + k * split);
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
    if constexpr (kWinners) put_winners(winners, vector * VEC, winner);
  }
}

// ---- channels_last ----

// The least of a warp's numbers, in one instruction instead of five exchanges among lanes, each waiting for the one before.
// It takes integers: here in the numbers' order, with NaN the least. For training also the winner, of several the first channel.
__device__ __forceinline__ float warp_min(float value, [[maybe_unused]] int& winner) {
  const auto flip = [](int bits) { return bits < 0 ? bits ^ INT32_MAX : bits; };  // a negative number's bits count backwards
  const int ordered = value != value ? INT32_MIN : flip(__float_as_int(value));
  const int least = __reduce_min_sync(0xffffffffu, ordered);
  if constexpr (kWinners) winner = __reduce_min_sync(0xffffffffu, ordered == least ? winner : INT32_MAX);
  return least == INT32_MIN ? __int_as_float(INT32_MAX) : __int_as_float(flip(least));
}

// channels_last. A group of threads, a power of two, owns a pixel together; each with several pixels on the way, or several
// vectors of one. GROUP_BITS: its logarithm where that is known when compiled, for a whole warp or the whole block.
// NOTE: a vector of the bias takes registers too: with as many blocks as without it, a kernel spilled (nvcc 13.0, sm_120). So do
// winners: with as many, a kernel used its first vectors before it asked for the last ones (sm_90a).
template <typename T, int VEC, bool BIAS, int PIXELS, int VECTORS, int GROUP_BITS>
__global__ void __launch_bounds__(ChannelsLast::kThreads, ChannelsLast::kBlocksPerSM - (BIAS ? 1 : 0) - (kWinners ? 1 : 0))
    channels_last_kernel(const T* input, Accumulator<T> scale, T* output, int64_t pixels, int channels, int any_group_bits,
                         const T* bias, Winners winners) {
  using A = Accumulator<T>;
  constexpr bool BLOCK = GROUP_BITS > kWarpBits;
  constexpr int kOwnerBits = BLOCK ? ChannelsLast::kThreadBits : kWarpBits, kOwners = ChannelsLast::kThreads >> kOwnerBits;
  const int group_bits = GROUP_BITS == ChannelsLast::kAnyGroup ? any_group_bits : GROUP_BITS;
  static_assert((VECTORS * VEC << kOwnerBits) <= kMostPastChannels, "kMostPastChannels: expected no less than a step");
  // Shifts, not divisions: a small kernel takes no longer than a few of those.
  const int thread = threadIdx.x & ((1 << kOwnerBits) - 1), group = 1 << group_bits, groups = 1 << (kOwnerBits - group_bits);
  const int member = thread & (group - 1);
  const int64_t owner = static_cast<int64_t>(blockIdx.x) * kOwners + (threadIdx.x >> kOwnerBits);
  // The groups of a warp take neighbouring pixels, so that one load of the warp is one run of addresses.
  const int64_t first = owner * PIXELS * groups + (thread >> group_bits);
  // Past the end the last pixel is read again: no branch in the loop, and no result of it is stored.
  const int64_t left = pixels - 1 - first;
  const bool full = left >= PIXELS * groups;
  const int last = full ? PIXELS - 1 : max(static_cast<int>(left), 0) >> (kOwnerBits - group_bits);
  const T* source = input + min(first, pixels - 1) * channels;
  const int step = groups * channels;

  A smallest[PIXELS];
  int winner[PIXELS];
#pragma unroll
  for (int k = 0; k < PIXELS; ++k) smallest[k] = kInfinity<A>, winner[k] = 0;

  ptx::wait_for_previous_grid();  // a small kernel may begin while the one before it ends
  // NOTE: unrolled, as nvcc would have it, up to 2 % slower on small images (H200): mostly there is only one step.
#pragma unroll 1
  for (int channel = member * VEC; channel < channels; channel += VECTORS * group * VEC) {
    Vector<T, VEC> loaded[VECTORS][PIXELS], added[VECTORS];
    int at = channel, first_channel[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      first_channel[v] = at;
      if constexpr (BIAS) added[v] = load_vector<T, VEC>(bias + at);
      const T* address = source + at;
#pragma unroll
      for (int k = 0; k < PIXELS; ++k) {
        loaded[v][k] = load_vector<T, VEC>(address);
        if (k < last) address += step;
      }
      // Past the last channel, too, a vector is read again: a minimum does not mind.
      if (v + 1 < VECTORS && at + group * VEC < channels) at += group * VEC;
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
      for (int k = 0; k < PIXELS; ++k) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const A value = (loaded[v][k].values[i] + addend<BIAS>(added[v].values[i])) * scale;
          take_smaller(smallest[k], value, winner[k], first_channel[v] + i);
        }
      }
    }
  }

  if (std::is_same_v<A, float> && group >= kWarpSize) {
#pragma unroll
    for (int k = 0; k < PIXELS; ++k) smallest[k] = warp_min(smallest[k], winner[k]);
  } else {
    for (int distance = min(group, kWarpSize) / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int k = 0; k < PIXELS; ++k) take_smaller_of_lanes(smallest[k], winner[k], distance);
    }
  }
  if constexpr (BLOCK) {
    static_assert(PIXELS == 1, "PIXELS: expected 1 where a block owns a pixel");
    __shared__ A of_warps[ChannelsLast::kThreads / kWarpSize];
    __shared__ int winners_of_warps[ChannelsLast::kThreads / kWarpSize];
    if (thread % kWarpSize == 0) {
      of_warps[thread / kWarpSize] = smallest[0];
      if constexpr (kWinners) winners_of_warps[thread / kWarpSize] = winner[0];
    }
    __syncthreads();
    for (int w = 0; w < ChannelsLast::kThreads / kWarpSize; ++w) {
      take_smaller(smallest[0], of_warps[w], winner[0], kWinners ? winners_of_warps[w] : 0);
    }
  }

  // Every member now knows all the group's results; they take turns in storing them.
#pragma unroll
  for (int k = 0; k < PIXELS; ++k) {
    const int64_t pixel = first + k * groups;
    if (member == (k & (group - 1)) && pixel < pixels) {
      output[pixel] = static_cast<T>(smallest[k]);
      if constexpr (kWinners) winners.put(pixel, winner[k]);
    }
  }
}

// ---- any strides ----

// In elements.
struct Strides {
  int64_t image, channel, row, column;
};

template <typename T, bool BIAS>
__global__ void __launch_bounds__(Strided::kThreads, Strided::kBlocksPerSM)
    strided_kernel(const T* input, Accumulator<T> scale, T* output, int64_t pixels, int channels, int64_t height,
                   int64_t width, Strides strides, const T* bias, Winners winners) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * Strided::kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const int64_t column = pixel % width, row = pixel / width % height, image = pixel / width / height;
  const T* source = input + image * strides.image + row * strides.row + column * strides.column;
  Accumulator<T> smallest = kInfinity<Accumulator<T>>;
  int winner = 0;
#pragma unroll Strided::kInFlight
  for (int channel = 0; channel < channels; ++channel) {
    take_smaller(smallest, (source[channel * strides.channel] + addend<BIAS>(bias[channel])) * scale, winner, channel);
  }
  output[pixel] = static_cast<T>(smallest);
  if constexpr (kWinners) winners.put(pixel, winner);
}

// ---- host: which kernel, how many threads ----

bool is_channels_last(const Tensor& t) {
  const int64_t expected[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int d = 0; d < 4; ++d) {
    if (t.size(d) > 1 && t.stride(d) != expected[d]) return false;
  }
  return true;
}

template <typename T, bool BIAS>
void launch_scale_min(const Tensor& input, const T* bias, Accumulator<T> scale, bool early, Tensor& output, Winners winners) {
  const int channels = input.size(1);
  const int64_t height = input.size(2), width = input.size(3), plane = height * width, pixels = input.size(0) * plane;
  const T* source = static_cast<const T*>(input.data_ptr());
  T* target = static_cast<T*>(output.data_ptr());
  const cudaStream_t stream = current_stream(input);

  if (channels > 1 && is_channels_last(input)) {
    // The bias is read in the same vectors; where there is none, its null address is aligned for all of them.
    const int common = std::min(vector_width<T>(source, channels), vector_width<T>(bias, channels));
    with_width<T>(common, [&](auto vec) {
      int group_bits = 0;
      while (group_bits < kWarpBits && (vec << group_bits) < channels) ++group_bits;
      const auto start = [&](auto pixels_per_group, auto vectors, auto known_bits) {
        const int bits = known_bits == ChannelsLast::kAnyGroup ? group_bits : known_bits;
        const int64_t blocks = ceil_div(pixels, (ChannelsLast::kThreads >> bits) * pixels_per_group);
        launch_kernel(early, channels_last_kernel<T, vec, BIAS, pixels_per_group, vectors, known_bits>, grid_size(blocks),
                      ChannelsLast::kThreads, 0, stream, source, scale, target, pixels, channels, bits, bias, winners);
      };
      constexpr std::integral_constant<int, 1> kOne;
      constexpr std::integral_constant<int, ChannelsLast::kFewVectors> kFewVectors;
      constexpr std::integral_constant<int, ChannelsLast::kVectors> kVectors;
      constexpr std::integral_constant<int, ChannelsLast::kAnyGroup> kGroup;
      constexpr std::integral_constant<int, kWarpBits> kWarp;
      constexpr std::integral_constant<int, ChannelsLast::kThreadBits> kBlock;
      const int64_t multiprocessor_count = multiprocessors(input.get_device_index());
      const int pass = vec << group_bits;  // channels that a group loads at once; where there are more, it is a whole warp
      if (ceil_div(pixels, (ChannelsLast::kThreads >> group_bits) * ChannelsLast::kPixels) >= 2 * multiprocessor_count) {
        start(std::integral_constant<int, ChannelsLast::kPixels>(), kOne, kGroup);
      } else if (channels <= pass) {
        start(std::integral_constant<int, ChannelsLast::kFewPixels>(), kOne, kGroup);
      } else if (channels <= kFewVectors * pass) {
        start(kOne, kFewVectors, kWarp);
      } else if (pixels > 4 * multiprocessor_count) {
        start(kOne, kVectors, kWarp);
      } else if (channels <= vec * ChannelsLast::kThreads) {
        start(kOne, kOne, kBlock);
      } else if (channels <= vec * ChannelsLast::kThreads * kFewVectors) {
        start(kOne, kFewVectors, kBlock);
      } else {
        start(kOne, kVectors, kBlock);
      }
    });
  } else if (input.is_contiguous()) {
    with_width<T>(vector_width<T>(source, plane), [&](auto vec) {
      const int64_t vectors = pixels / vec;
      // Enough threads to fill half the chip, unless a thread would be left with too few channels.
      const int64_t wanted = static_cast<int64_t>(multiprocessors(input.get_device_index())) * 1024;
      int split_bits = 0;
      while (split_bits < 4 && vectors << split_bits < wanted && channels >= kPlanesInFlight<T, vec> << (split_bits + 1)) {
        ++split_bits;
      }
      launch_kernel(early, planes_kernel<T, vec, BIAS>,
                    grid_size(ceil_div(vectors, Planes::kThreads >> split_bits)), Planes::kThreads, 0, stream, source, scale,
                    target, vectors, channels, plane, split_bits, bias, winners);
    });
  } else {
    const Strides strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
    strided_kernel<T, BIAS><<<grid_size(ceil_div(pixels, Strided::kThreads)), Strided::kThreads, 0, stream>>>(
        source, scale, target, pixels, channels, height, width, strides, bias, winners);
  }
}

// Whether to begin early after a kernel of the library's.
// NOTE: what reads less than this gains up to half a microsecond; what reads more gains nothing, or costs convolution and
// minimum together up to a tenth (all layers of bench --layers that run so, in CUDA graphs on an H100; cause unknown).
bool is_small(const Tensor& input) { return input.numel() * input.element_size() < 2 << 20; }

template <bool BIAS>
Forward run_scale_min(const Tensor& input, const std::optional<Tensor>& bias, double scale, const std::optional<Tensor>& scales,
                      bool early) {
  Tensor output = torch::stable::new_empty(input, {input.size(0), 1, input.size(2), input.size(3)});
  const std::optional<Tensor> winners = new_winners(output, input.size(1));
  if (output.numel() == 0) return forward_result(output, winners);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    early = early && is_small(input);
    if (scales || (bias && is_wider(*bias, input))) {
      const bool channels_last = input.size(1) > 1 && is_channels_last(input);
      return each::launch<T>(input, bias, scale, scales, early, channels_last, output, winners_in(winners));
    }
    const std::optional<Tensor> dense = bias && !bias->is_contiguous() ? torch::stable::contiguous(*bias) : bias;
    launch_scale_min<T, BIAS>(input, dense ? static_cast<const T*>(dense->data_ptr()) : nullptr,
                              static_cast<Accumulator<T>>(scale), early, output, winners_in(winners));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return forward_result(output, winners);
}

Forward scale_min_vectorized(const Tensor& input, double scale, const std::optional<Tensor>& scales) {
  check_input(input);
  check_scales(scales, input, input.size(1), scale);
  return run_scale_min<false>(input, std::nullopt, scale, scales, true);
}

Forward scale_min_bias(const Tensor& input, const Tensor& bias, double scale, bool early, const std::optional<Tensor>& scales) {
  check_input(input);
  check_bias(bias, input, input.size(1));
  check_scales(scales, input, input.size(1), scale);
  return run_scale_min<true>(input, bias, scale, scales, early);
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) {
  m.impl(FORWARD("scale_min_vectorized"), TORCH_BOX(&scale_min_vectorized));
  m.impl(FORWARD("scale_min_bias"), TORCH_BOX(&scale_min_bias));
}

}  // namespace fused_kernels
