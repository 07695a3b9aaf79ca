// grad_weight_gather: the gradients of weights and bias where pixels are few or channels many. Each weight's sum stays in a
// register while the pixels that its output channel wins go by.
//
// The pixels that an output channel wins form a list. A warp walks through it, gathers the input under the filter, multiplies
// by the pixel's gradient, and adds. So products need not go to shared memory and back, as in grad_weight_private; and no step
// of 16 pixels must be filled for each 8 output channels, as in grad_weight_sorted, whose steps stay nearly empty where few
// pixels are shared by many channels.
//   a column   an input channel at a filter tap; a lane has a vector of neighbours, or a few single ones. For the sake of
//              vectors, what a 1 x 1 kernel reads of NCHW is copied to channels_last first
//   a block    some columns, up to 32 output channels, and a slice of the pixels, in batches
//   a batch    is sorted by winner in shared memory, then cut into runs of equal length, one per warp, however skewed the
//              winners are
// A run may begin or end in the middle of a list; such parts of a list's sums are kept, and added in order afterwards. Every
// sum has one owner and one order: the same bits every time.
// Sums are float32, but double for float32 at "ieee" precision: a long sum would lose more than the library's shorter sums do.
// grad_weight_gather_plan.cuh cuts the work.
// Limit: the cache, which delivers the input once for each output pixel and tap.
// Previous rung: grad_weight_sorted, grad_weight_private.

#include "grad_weight_gather_plan.cuh"
#include "gradients.h"
#include "launch.cuh"
#include "numerics.cuh"
#include "vectors.cuh"

#include <string>

namespace fused_kernels {

// Partial sums: [slice][output channel][column], the bias last. Where there is one slice, they are the result.
template <typename T, typename S, int VEC, bool PADDED>
__global__ void __launch_bounds__(kThreads, 2)
    sum_kernel(const T* grad, Winners winners, const T* input, S* partial, T* grad_weight, T* grad_bias, S scale,
               const __grid_constant__ GradWeightGatherPlan plan) {
  constexpr int kInFlight = VEC == 1 ? 3 : sizeof(S) == 4 ? 6 : 4;  // more of them spill
  extern __shared__ __align__(16) char shared[];
  Entry* const entries = reinterpret_cast<Entry*>(shared);
  // Of an output channel, and of a warp's first and last list in parts: [vector][its channel][lane].
  S* const sums = reinterpret_cast<S*>(entries + kBatch);
  S* const parts = sums + plan.outputs_per_block * kColumns<S, VEC>;
  __shared__ S bias_sums[kMostOutputs], bias_parts[kWarps][2];
  __shared__ int before[kWarps][kMostOutputs], begins[kMostOutputs + 1], of_warps[kWarps];

  const ConvShape& s = plan.shape;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int chunk = blockIdx.x % plan.chunks, first_output = blockIdx.x / plan.chunks * plan.outputs_per_block;
  const int outputs = min(plan.outputs_per_block, static_cast<int>(s.out_channels) - first_output);
  const int group = blockIdx.y, first_winner = group * static_cast<int>(s.out_channels) + first_output;
  const int slice = blockIdx.z;
  const int begin = static_cast<int64_t>(plan.pixels) * slice / plan.slices;
  const int end = static_cast<int64_t>(plan.pixels) * (slice + 1) / plan.slices;
  for (int i = threadIdx.x; i < outputs * kColumns<S, VEC>; i += kThreads) sums[i] = 0;
  if (threadIdx.x < kMostOutputs) bias_sums[threadIdx.x] = 0;

  // What this lane reads for a pixel: vectors of channels, each shifted by a tap.
  const auto unit_of = [&](int j) { return (chunk * kUnits<S, VEC> + j) * kWarpSize + lane; };
  const auto channel_of = [&](int unit) { return (plan.channels_fastest ? unit % plan.vectors : unit / plan.taps) * VEC; };
  const auto tap_of = [&](int unit) { return plan.channels_fastest ? unit / plan.vectors : unit % plan.taps; };
  int shift[kUnits<S, VEC>], distance[kUnits<S, VEC>];
  bool exists[kUnits<S, VEC>];
#pragma unroll
  for (int j = 0; j < kUnits<S, VEC>; ++j) {
    const int unit = unit_of(j), tap = tap_of(unit);
    exists[j] = unit < plan.units;
    const int rows = tap / static_cast<int>(s.kernel[1]) * static_cast<int>(s.dilation[0]);
    const int columns = tap % static_cast<int>(s.kernel[1]) * static_cast<int>(s.dilation[1]);
    shift[j] = static_cast<int>(channel_of(unit) * s.input_strides[1] + rows * s.input_strides[2] + columns * s.input_strides[3]);
    distance[j] = rows << 16 | columns;
  }
  const T* const source = input + group * s.in_channels * s.input_strides[1];
  const int height = s.input[0], width = s.input[1], output_h = s.output[0], output_w = s.output[1];

  for (int first = begin; first < end; first += kBatch) {
    // ---- sort a batch by winner ----
    // Each warp has a run of pixels. A pixel's rank is the number of those before it in the run that have the same winner.
    int owner[kRounds], rank[kRounds];
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      const int pixel = first + (warp * kRounds + k) * kWarpSize + lane;
      owner[k] = pixel < end ? winners[pixel] - first_winner : -1;
      if (owner[k] < 0 || owner[k] >= outputs) owner[k] = -1;
    }
    before[warp][lane] = 0;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      const unsigned same = __match_any_sync(0xffffffffu, owner[k]), lower = same & ((1u << lane) - 1);
      rank[k] = owner[k] >= 0 ? before[warp][owner[k]] + __popc(lower) : 0;
      __syncwarp();
      if (owner[k] >= 0 && lower == 0) before[warp][owner[k]] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    // Where each warp's pixels begin in each list: a sum over all lists and warps before. One list and warp per thread.
    {
      const int output = threadIdx.x / kWarps, of = threadIdx.x % kWarps, mine = before[of][output];
      int sum = mine;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (lane == kWarpSize - 1) of_warps[warp] = sum;
      __syncthreads();
      for (int w = 0; w < warp; ++w) sum += of_warps[w];
      before[of][output] = sum - mine;
      if (of == 0) begins[output] = sum - mine;
      if (threadIdx.x == kThreads - 1) begins[kMostOutputs] = sum;
    }
    __syncthreads();
    float gradients[kRounds];
    int corners[kRounds], offsets[kRounds];
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      if (owner[k] < 0) continue;
      const int pixel = first + (warp * kRounds + k) * kWarpSize + lane, line = pixel / output_w, image = line / output_h;
      const int x = pixel - line * output_w, y = line - image * output_h;
      gradients[k] = static_cast<float>(grad[image * plan.grad_strides[0] + y * plan.grad_strides[2] + x * plan.grad_strides[3]]);
      const int top = static_cast<int>(y * s.stride[0] - s.padding[0]), left = static_cast<int>(x * s.stride[1] - s.padding[1]);
      corners[k] = top << 16 | (left & 0xffff);
      offsets[k] = static_cast<int>(image * s.input_strides[0] + top * s.input_strides[2] + left * s.input_strides[3]);
    }
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      if (owner[k] < 0) continue;
      entries[before[warp][owner[k]] + rank[k]] = {offsets[k], gradients[k], corners[k], owner[k]};
    }
    __syncthreads();

    // ---- walk through a run, sums in registers ----
    const int count = begins[kMostOutputs];
    const auto run_begin = [&](int w) { return count * w / kWarps; };
    const int low = run_begin(warp), high = run_begin(warp + 1);
    S sum[kUnits<S, VEC>][VEC] = {}, bias = 0;
    int current = -1;
    const auto put = [&] {
      const bool is_whole = begins[current] >= low && begins[current + 1] <= high;
      const int part = begins[current] < low ? 0 : 1;
      S* const to = is_whole ? sums + current * kColumns<S, VEC> : parts + (warp * 2 + part) * kColumns<S, VEC>;
#pragma unroll
      for (int j = 0; j < kUnits<S, VEC>; ++j) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          S& at = to[(j * VEC + v) * kWarpSize + lane];
          at = is_whole ? at + sum[j][v] : sum[j][v];
          sum[j][v] = 0;
        }
      }
      if (lane == 0) (is_whole ? bias_sums[current] : bias_parts[warp][part]) = is_whole ? bias_sums[current] + bias : bias;
      bias = 0;
    };
    for (int at = low; at < high; at += kInFlight) {
      Vector<T, VEC> values[kInFlight][kUnits<S, VEC>];
      float gradients[kInFlight];
      int to[kInFlight];
      unsigned outside = 0;
#pragma unroll
      for (int b = 0; b < kInFlight; ++b) {
        const Entry entry = entries[min(at + b, high - 1)];
        gradients[b] = entry.gradient, to[b] = entry.output;
#pragma unroll
        for (int j = 0; j < kUnits<S, VEC>; ++j) {
          bool inside = exists[j];
          if constexpr (PADDED) {
            // No row or column is below -2^15 or reaches 2^15.
            const int y = (entry.corner >> 16) + (distance[j] >> 16);
            const int x = static_cast<int16_t>(entry.corner) + static_cast<int16_t>(distance[j]);
            inside &= static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(width);
          }
          values[b][j] = {};
          if (!inside) outside |= 1u << (b * kUnits<S, VEC> + j);
          if (inside) values[b][j] = *reinterpret_cast<const Vector<T, VEC>*>(source + entry.offset + shift[j]);
        }
      }
#pragma unroll
      for (int b = 0; b < kInFlight; ++b) {
        if (at + b >= high) break;
        if (to[b] != current) {
          if (current >= 0) put();
          current = to[b];
        }
        bias += gradients[b];
#pragma unroll
        for (int j = 0; j < kUnits<S, VEC>; ++j) {
          // In the padding there is nothing to add, not even for a gradient that is infinite.
          const S gradient = PADDED && outside >> (b * kUnits<S, VEC> + j) & 1 ? 0 : gradients[b];
#pragma unroll
          for (int v = 0; v < VEC; ++v) sum[j][v] += gradient * static_cast<S>(values[b][j].values[v]);
        }
      }
    }
    if (current >= 0) put();
    __syncthreads();

    // ---- add the parts of lists that several warps had ----
    for (int output = warp; output < outputs; output += kWarps) {
      const int from = begins[output], to = begins[output + 1];
      if (from == to) continue;
      int w = 0;
      while (run_begin(w + 1) <= from) ++w;
      if (run_begin(w + 1) >= to) continue;
      for (int part = 1; w < kWarps && run_begin(w) < to; ++w) {
        if (run_begin(w) == run_begin(w + 1)) continue;
        for (int i = lane; i < kColumns<S, VEC>; i += kWarpSize) {
          sums[output * kColumns<S, VEC> + i] += parts[(w * 2 + part) * kColumns<S, VEC> + i];
        }
        if (lane == 0) bias_sums[output] += bias_parts[w][part];
        part = 0;
      }
    }
  }
  __syncthreads();

  // ---- store ----
  for (int output = warp; output < outputs; output += kWarps) {
    const int64_t row = static_cast<int64_t>(slice) * s.out_channels * s.groups + first_winner + output;
    const int64_t columns = static_cast<int64_t>(plan.units) * VEC;
#pragma unroll
    for (int j = 0; j < kUnits<S, VEC>; ++j) {
      if (!exists[j]) continue;
      const int unit = unit_of(j), channel = channel_of(unit), tap = tap_of(unit);
      T* const to = grad_weight + (row * s.in_channels + channel) * plan.taps + tap;
      Vector<T, VEC> results;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const S value = sums[output * kColumns<S, VEC> + (j * VEC + v) * kWarpSize + lane];
        results.values[v] = static_cast<T>(value * scale);
        if (plan.slices > 1) {
          partial[row * (columns + 1) + unit * VEC + v] = value;
        } else if (plan.taps > 1) {
          to[v * plan.taps] = results.values[v];
        }
      }
      if (plan.slices == 1 && plan.taps == 1) *reinterpret_cast<Vector<T, VEC>*>(to) = results;
    }
    if (chunk > 0 || lane > 0) continue;
    if (plan.slices > 1) {
      partial[row * (columns + 1) + columns] = bias_sums[output];
    } else {
      grad_bias[row] = static_cast<T>(bias_sums[output] * scale);
    }
  }
}

// Adds the slices' sums: one thread per weight.
template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const S* partial, S scale, T* grad_weight, T* grad_bias, int vec,
                  const __grid_constant__ GradWeightGatherPlan plan) {
  const int64_t columns = static_cast<int64_t>(plan.units) * vec;
  const int64_t count = plan.shape.out_channels * plan.shape.groups * (columns + 1);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  S sum = 0;
#pragma unroll 8
  for (int slice = 0; slice < plan.slices; ++slice) sum += partial[slice * count + i];
  const int64_t output = i / (columns + 1);
  const int column = static_cast<int>(i - output * (columns + 1)), channels = static_cast<int>(plan.shape.in_channels);
  if (column == columns) {
    grad_bias[output] = static_cast<T>(sum * scale);
    return;
  }
  const int channel = plan.channels_fastest ? column % channels : column / plan.taps;
  const int tap = plan.channels_fastest ? column / channels : column % plan.taps;
  grad_weight[(output * channels + channel) * plan.taps + tap] = static_cast<T>(sum * scale);
}

// ---- host ----

template <typename T, typename S, int VEC>
void launch_grad_weight_gather(GradWeightGatherPlan plan, bool is_padded, const Tensor& grad, const Tensor& winners,
                               const Tensor& input, double scale, Tensor& grad_weight, Tensor& grad_bias) {
  const ConvShape& s = plan.shape;
  const int device = input.get_device_index();
  cut_grad_weight_gather<S, VEC>(plan, device);
  const int64_t sums = s.out_channels * s.groups * (static_cast<int64_t>(plan.units) * VEC + 1);
  const int64_t bytes = plan.slices > 1 ? plan.slices * sums * static_cast<int64_t>(sizeof(S)) : 0;
  const Tensor memory = torch::stable::new_empty(input, {bytes}, torch::headeronly::ScalarType::Byte);
  S* const partial = static_cast<S*>(memory.data_ptr());
  const cudaStream_t stream = current_stream(input);

  const auto kernel = is_padded ? sum_kernel<T, S, VEC, true> : sum_kernel<T, S, VEC, false>;
  const int shared = shared_bytes<S, VEC>(plan.outputs_per_block);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const dim3 grid(grid_size(static_cast<int64_t>(plan.chunks) * plan.ranges), static_cast<unsigned>(s.groups), plan.slices);
  T* const to_weight = static_cast<T*>(grad_weight.data_ptr());
  T* const to_bias = static_cast<T*>(grad_bias.data_ptr());
  kernel<<<grid, kThreads, shared, stream>>>(static_cast<const T*>(grad.data_ptr()), winners_in(winners),
                                             static_cast<const T*>(input.data_ptr()), partial, to_weight, to_bias,
                                             static_cast<S>(scale), plan);
  if (plan.slices == 1) return;
  reduce_kernel<T, S><<<grid_size(ceil_div(sums, kThreads)), kThreads, 0, stream>>>(partial, static_cast<S>(scale), to_weight,
                                                                                    to_bias, VEC, plan);
}

// Copies what a 1 x 1 kernel reads of an input whose channels do not lie side by side, so that they do; updates the sizes.
// Vectors of channels gain more than the copy costs.
Tensor in_channels_last(const Tensor& input, ConvShape& shape) {
  Tensor read = input;
  for (int axis = 0; axis < 2; ++axis) {
    if (shape.padding[axis] > 0 || shape.stride[axis] == 1) continue;
    StableIValue arguments[] = {torch::stable::detail::from(read), torch::stable::detail::from(int64_t{2} + axis),
                                torch::stable::detail::from(std::optional<int64_t>()),
                                torch::stable::detail::from(std::optional<int64_t>()),
                                torch::stable::detail::from(shape.stride[axis])};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::slice", "Tensor", arguments, TORCH_ABI_VERSION));
    read = torch::stable::detail::to<Tensor>(arguments[0]);
    shape.stride[axis] = 1;
    shape.input[axis] = read.size(2 + axis);
  }
  StableIValue arguments[] = {torch::stable::detail::from(read), torch::stable::detail::from(std::optional<Tensor>()),
                              torch::stable::detail::from(false)};
  // The overload for this dtype: the operator itself is Python. Only a source compiled for all dtypes calls that.
  const char* const overload = *OPERATOR("") ? OPERATOR("") + 1 : "";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fused_kernels::to_channels_last", overload, arguments, TORCH_ABI_VERSION));
  const Tensor copy = torch::stable::detail::to<std::vector<Tensor>>(arguments[0])[0];
  for (int d = 0; d < 4; ++d) shape.input_strides[d] = copy.stride(d);
  return copy;
}

std::tuple<Tensor, Tensor> grad_weight_gather(const Tensor& grad, const Tensor& winners, const Tensor& given, double scale,
                                              int64_t out_channels, std::vector<int64_t> kernel_size,
                                              std::vector<int64_t> stride, std::vector<int64_t> padding,
                                              std::vector<int64_t> dilation, int64_t groups, std::string precision) {
  using torch::headeronly::ScalarType;
  ConvShape shape = check_grad_weight(grad, winners, given, out_channels, kernel_size, stride, padding, dilation, groups);
  STD_TORCH_CHECK(given.scalar_type() != ScalarType::Double, "input: grad_weight_gather does not take float64");
  STD_TORCH_CHECK(shape.pixels() <= INT32_MAX - kBatch, "grad: grad_weight_gather expected fewer pixels, got ", shape.pixels());
  STD_TORCH_CHECK(out_channels < 1 << 28 && shape.in_channels * shape.taps() < 1 << 28 && groups < 1 << 16,
                  "input: grad_weight_gather expected fewer than 2^28 channels, and weights of one, in fewer than 2^16 groups");
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const bool copies = shape.taps() == 1 && shape.input_strides[1] != 1 && shape.in_channels % 8 == 0 && groups == 1;
  const Tensor input = copies ? in_channels_last(given, shape) : given;
  // Whether a filter anywhere hangs over the input's edge.
  bool is_padded = false;
  int64_t furthest = 0;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = (shape.output[axis] - 1) * shape.stride[axis] + (shape.kernel[axis] - 1) * shape.dilation[axis];
    is_padded |= shape.padding[axis] > 0 || reach >= shape.input[axis];
    STD_TORCH_CHECK(std::max({reach, shape.input[axis], shape.padding[axis]}) < kMostReach,
                    "input: grad_weight_gather expected a padded height and width below 2^15");
    furthest += std::max(reach, shape.input[axis]) * shape.input_strides[2 + axis];
  }
  furthest += (shape.images - 1) * shape.input_strides[0] + shape.in_channels * shape.input_strides[1];
  STD_TORCH_CHECK(furthest < INT32_MAX, "input: grad_weight_gather expected images no further than 2^31 elements apart");
  Tensor grad_weight = torch::stable::new_empty(input, {out_channels, shape.in_channels, shape.kernel[0], shape.kernel[1]});
  Tensor grad_bias = torch::stable::new_empty(input, {out_channels});

  GradWeightGatherPlan plan{.shape = shape, .taps = static_cast<int>(shape.taps()), .pixels = static_cast<int>(shape.pixels()),
            .channels_fastest = shape.input_strides[1] == 1};
  for (int d = 0; d < 4; ++d) plan.grad_strides[d] = grad.stride(d);
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 4) {
      constexpr int VEC = 16 / sizeof(T);
      bool dense = plan.channels_fastest && shape.in_channels % VEC == 0 && reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 == 0;
      for (int d : {0, 2, 3}) dense = dense && (input.size(d) == 1 || shape.input_strides[d] % VEC == 0);
      const auto with_sums_of = [&](auto sum) {
        using S = decltype(sum);
        const auto launch = dense ? launch_grad_weight_gather<T, S, VEC> : launch_grad_weight_gather<T, S, 1>;
        launch(plan, is_padded, grad, winners, input, scale, grad_weight, grad_bias);
      };
      if constexpr (sizeof(T) == 4) {
        if (precision != "tf32") return with_sums_of(double());
      }
      with_sums_of(float());
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(OPERATOR("grad_weight_gather"), TORCH_BOX(&grad_weight_gather)); }

}  // namespace fused_kernels
