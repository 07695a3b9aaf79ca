// grad_input_mma: the gather of grad_input_gather, with tensor cores to multiply and add what shared memory hands out.
//
// All weights of 64 input channels stay in shared memory, a row of 128 bytes for each output channel and tap. Eight pixels at a
// tap need eight rows, wherever their winners lie: ldmatrix takes one address per row, which makes it a gather. Then
//   operand A   those rows, transposed: 16 input channels by 16 (8 pixels at each of two taps)
//   operand B   the pixels' gradients, on the diagonal of a matrix of 16 by 8: a pixel's column meets its own rows alone
//   result      16 input channels by 8 pixels, summed over the taps in float32
// Seven of eight products are with zero; tensor cores have time for them, and nothing else takes as few instructions per row.
// NOTE: all rows begin in the same banks. So pixel p reads its groups of eight channels in another order, group i ^ p at the
// i-th step: no two pixels in the same banks. At the end a lane holds channels of group i ^ p; as each pixel has a column of
// its own, nothing is mixed.
// A warp's pixels and the gradients that reach them are its own: no warp waits for another.
// float32 is multiplied as float16: weights times a power of two for each output channel, gradients times what undoes it and a
// power of two for each patch. A patch whose gradients are too far apart for that is gone through again for the smaller ones.
// grad_input_mma_plan.cuh cuts the work.
// Limit: shared memory, 128 bytes per clock; then the memory that the gradient is written to.
// Previous rung: grad_input_gather.

#include "grad_input_mma_plan.cuh"
#include "gradients.h"
#include "implicit_gemm.cuh"
#include "ptx/cp_async.cuh"

namespace fused_kernels {

constexpr int kPackRowsThreads = 256;

// ---- the weights as operand A ----

// Where a channel lies in its row, so that what a lane holds of two groups are neighbours: 16 e + 2 r + s at group 2 e + s.
__device__ __forceinline__ int place_in_row(int channel) { return channel / 16 * 16 + channel % 2 * 8 + channel % 16 / 2; }

// Packs operand A: [chunk][output channel][tap][place]. A block has an output channel; the factor undoes its power of two.
template <typename T, int CHUNK>
__global__ void __launch_bounds__(kPackRowsThreads)
    pack_rows_kernel(const T* weight, Strides4 strides, int in_channels, int kernel_w, int taps, uint16_t* rows,
                     float* factors) {
  const int output = blockIdx.x, padded = (in_channels + CHUNK - 1) / CHUNK * CHUNK;
  const T* const source = weight + output * strides.of[0];
  const auto value = [&](int i) {
    const int channel = i % padded, tap = i / padded;
    if (channel >= in_channels) return T(0);
    return source[channel * strides.of[1] + tap / kernel_w * strides.of[2] + tap % kernel_w * strides.of[3]];
  };
  float power = 1.0f;
  if constexpr (sizeof(T) == 4) {
    __shared__ uint32_t largest;
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    float most = 0.0f;
    for (int i = threadIdx.x; i < taps * padded; i += kPackRowsThreads) {
      const float magnitude = fabsf(value(i));
      most = fmaxf(most, magnitude < kInfinity<float> ? magnitude : 0.0f);
    }
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
    if (threadIdx.x % kWarpSize == 0) atomicMax(&largest, of_warp);
    __syncthreads();
    const int exponent = largest > 0 ? exponent_for(__uint_as_float(largest)) : 0;
    power = power_of_two(exponent);
    if (threadIdx.x == 0) factors[output] = power_of_two(-exponent);
  }
  for (int i = threadIdx.x; i < taps * padded; i += kPackRowsThreads) {
    const T v = value(i);
    uint16_t bits;
    if constexpr (sizeof(T) == 4) {
      bits = static_cast<uint16_t>(ptx::pack_f16(v * power, 0.0f));
    } else {
      bits = reinterpret_cast<const uint16_t&>(v);
    }
    const int channel = i % padded, tap = i / padded;
    const int64_t row = (static_cast<int64_t>(channel / CHUNK) * gridDim.x + output) * taps + tap;
    rows[row * CHUNK + place_in_row(channel % CHUNK)] = bits;
  }
}

// ---- the kernel ----

// Puts in order what a lane holds: at i, the number of channel i ^ bits.
template <int N>
__device__ __forceinline__ void sort_by(int bits, float (&values)[N]) {
#pragma unroll
  for (int distance = 1; distance < N; distance *= 2) {
    const bool swaps = bits & distance;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i & distance) continue;
      const float first = values[i], second = values[i | distance];
      values[i] = swaps ? second : first;
      values[i | distance] = swaps ? first : second;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const T a = static_cast<T>(low), b = static_cast<T>(high);
  return reinterpret_cast<const uint16_t&>(a) | static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(b)) << 16;
}

template <typename T, int CHUNK, int TAPS>
__global__ void __launch_bounds__(kThreads, 1)
    grad_input_kernel(const T* grad, Winners winners, const uint16_t* rows, const float* factors, float scale, T* output,
                      const __grid_constant__ GradInputMmaPlan plan) {
  constexpr bool kScaled = sizeof(T) == 4;
  constexpr int kRowBytes = Rows<CHUNK>::kBytes, kMatrices = Rows<CHUNK>::kMatrices;
  extern __shared__ __align__(128) char shared[];
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
  const int taps = TAPS > 0 ? TAPS : plan.taps, rows_bytes = plan.out_channels * taps * kRowBytes;
  uint32_t* const row_of = reinterpret_cast<uint32_t*>(shared + rows_bytes) + warp * 2 * plan.reach_pixels;
  uint32_t* const gradient_of = row_of + plan.reach_pixels;

  // ---- all weights into shared memory ----
  const uint32_t first_row = ptx::shared_address(shared);
  const char* const source = reinterpret_cast<const char*>(rows) + static_cast<int64_t>(blockIdx.y) * rows_bytes;
  for (int i = threadIdx.x * 16; i < rows_bytes; i += kThreads * 16) ptx::cp_async_16(first_row + i, source + i, true);
  ptx::cp_async_wait_all();
  __syncthreads();

  const int q = lane % 4, r = lane / 4;  // of the result a lane has pixels 2q and 2q + 1, channels of number r
  // As ldmatrix wants it: this lane gives the row of pixel lane % 8, of the first or second tap, of one of two groups.
  const int pixel = lane % 8, second_tap = lane / 16;
  const uint32_t group = (lane / 8 % 2 ^ pixel % Rows<CHUNK>::kGroups) * 16;
  // Which pixels a strip has: such that what a lane stores of one channel are neighbours, and what four lanes store together,
  // too.
  const auto column_of = [](int p, int strip) { return p / 2 * (2 * kStrips) + strip * 2 + p % 2; };
  // Its place in operand B is on the diagonal for one of four lanes.
  const uint32_t on_diagonal = q != r / 2 ? 0u : r % 2 == 0 ? 0xffffu : 0xffff0000u;

  // A patch's float32 gradients come in bands: what one power of two brings to where float16 keeps all digits. Mostly the first
  // band has all; the next one has what is below, and is added to what is stored.
  float below = 0.0f;  // zero: a new patch
  for (int patch = blockIdx.x * kWarps + warp; patch < plan.patches; patch += below > 0.0f ? 0 : gridDim.x * kWarps) {
    const int first_x = patch % plan.patches_across[1] * kPatchColumns;
    const int first_y = patch / plan.patches_across[1] % plan.patches_across[0] * kPatchRows;
    const int image = patch / plan.patches_across[1] / plan.patches_across[0];
    const int64_t plane = static_cast<int64_t>(plan.input[0]) * plan.input[1];
    // ---- winners and gradients of the output pixels that reach the patch ----
    // Of each its winner's first row, and its gradient, twice, as an operand.
    const int top = first_y + plan.padding[0] - (plan.kernel[0] - 1) * plan.dilation[0];
    const int left = first_x + plan.padding[1] - (plan.kernel[1] - 1) * plan.dilation[1];
    const int64_t first_output = static_cast<int64_t>(image) * plan.output[0] * plan.output[1];
    const T* const first_grad = grad + image * plan.grad_strides[0];
    const bool adds = below > 0.0f;
    float most = 0.0f;
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < plan.reach_pixels; i += kWarpSize) {
      const int line = __umulhi(i, plan.width_inverse), y = top + line, x = left + i - line * plan.reach[1];
      const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(plan.output[0]) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(plan.output[1]);
      uint32_t row = 0, bits = 0;
      if (inside) {
        const int winner = winners[first_output + static_cast<int64_t>(y) * plan.output[1] + x];
        row = winner * (taps * kRowBytes);
        const T g = first_grad[y * plan.grad_strides[2] + x * plan.grad_strides[3]];
        if constexpr (kScaled) {
          const float scaled = g * __ldg(factors + winner);
          if (!adds || fabsf(scaled) < below) bits = __float_as_uint(scaled);
          const float magnitude = fabsf(__uint_as_float(bits));
          most = fmaxf(most, magnitude < kInfinity<float> ? magnitude : 0.0f);
        } else {
          bits = reinterpret_cast<const uint16_t&>(g) * 0x10001u;
        }
      }
      row_of[i] = row;
      gradient_of[i] = bits;
    }
    float back = scale;
    if constexpr (kScaled) {
      const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
      const int exponent = bits > 0 ? exponent_for(__uint_as_float(bits)) : 0;
      back *= power_of_two(-exponent);
      below = exponent < kLargestExponent ? kSmallestNormalF16 * power_of_two(-exponent) : 0.0f;
      bool more = false;
      for (int i = lane; i < plan.reach_pixels; i += kWarpSize) {
        const float g = __uint_as_float(gradient_of[i]);
        const bool waits = fabsf(g) < below;
        more |= waits && g != 0.0f;
        const float scaled = waits ? 0.0f : g * power_of_two(exponent);
        gradient_of[i] = ptx::pack_f16(scaled, scaled);
      }
      if (!__any_sync(0xffffffffu, more)) below = 0.0f;
    }
    __syncwarp();

    // ---- gather, multiply, sum over the taps ----
#pragma unroll 1
    for (int run = 0; run < kPatchRows * kPatchColumns / kRun; ++run) {
      const int y = run / (kPatchColumns / kRun), x = run % (kPatchColumns / kRun) * kRun;
      if (first_y + y >= plan.input[0] || first_x + x >= plan.input[1]) continue;
      float sums[kStrips][kMatrices][4] = {};
      const int place = y * plan.reach[1] + x;
      const auto operand_b = [&](int tap, int strip) {
        return gradient_of[place + plan.tap_offset[tap] + column_of(r, strip)] & on_diagonal;
      };
      const auto add_two_taps = [&](int tap) {
        const int my_tap = tap + second_tap, my_place = place + plan.tap_offset[my_tap];
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          const uint32_t address = (first_row + my_tap * kRowBytes + row_of[my_place + column_of(pixel, strip)]) ^ group;
          const uint32_t b0 = operand_b(tap, strip), b1 = operand_b(tap + 1, strip);
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) {
            uint32_t a[4];
            ptx::ldmatrix_x4_transposed(a, address ^ (m * 32));
            ptx::mma_m16n8k16(sums[strip][m], a, b0, b1, Operand<T>());
          }
        }
      };
      const auto add_tap = [&](int tap) {
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
          const int my_place = place + plan.tap_offset[tap] + column_of(pixel, strip);
          const uint32_t address = (first_row + tap * kRowBytes + row_of[my_place]) ^ group, b = operand_b(tap, strip);
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) {
            uint32_t a[2];
            ptx::ldmatrix_x2_transposed(a, address ^ (m * 32));
            ptx::mma_m16n8k8(sums[strip][m], a, b, Operand<T>());
          }
        }
      };
      if constexpr (TAPS > 0) {
#pragma unroll
        for (int tap = 0; tap + 1 < TAPS; tap += 2) add_two_taps(tap);
        if (TAPS % 2 == 1) add_tap(TAPS - 1);
      } else {
#pragma unroll 1
        for (int tap = 0; tap + 1 < taps; tap += 2) add_two_taps(tap);
        if (taps % 2 == 1) add_tap(taps - 1);
      }

      // ---- epilogue: scale and store ----
      // Channels 16 e + 2 r and the next, where e = m ^ q: of pixel 2q they are sums 0 and 2, of pixel 2q + 1 sums 3 and 1.
#pragma unroll
      for (auto& of_strip : sums) {
#pragma unroll
        for (auto& of_matrix : of_strip) {
#pragma unroll
          for (float& sum : of_matrix) sum *= back;
        }
      }
      T* const first_pixel = output + image * plane * plan.in_channels;
      const int out_x = first_x + x, first_channel = blockIdx.y * CHUNK;
      const int64_t line = static_cast<int64_t>(first_y + y) * plan.input[1];
      // Atomic because then no register waits for what is stored: nobody else adds to these elements.
      const auto put = [&](T* to, float value) {
        if constexpr (kScaled) {
          if (adds) {
            atomicAdd(to, value);
            return;
          }
        }
        *to = static_cast<T>(value);
      };
      if (plan.channels_last) {
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const int column = out_x + column_of(2 * q + odd, strip);
            if (column >= plan.input[1]) continue;
            T* const to = first_pixel + (line + column) * plan.in_channels + first_channel;
#pragma unroll
            for (int m = 0; m < kMatrices; ++m) {
              const int channel = (m ^ (q & (kMatrices - 1))) * 16 + 2 * r;
              const float first = sums[strip][m][odd ? 3 : 0], second = sums[strip][m][odd ? 1 : 2];
              if (plan.vectors && !adds && first_channel + channel < plan.in_channels) {
                if constexpr (kScaled) {
                  __stwb(reinterpret_cast<float2*>(to + channel), make_float2(first, second));
                } else {
                  __stwb(reinterpret_cast<unsigned*>(to + channel), pack_pair<T>(first, second));
                }
              } else {
                if (first_channel + channel < plan.in_channels) put(to + channel, first);
                if (first_channel + channel + 1 < plan.in_channels) put(to + channel + 1, second);
              }
            }
          }
        }
      } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          // A channel's pixels: two neighbours of each strip.
          float values[kStrips][2][kMatrices];
#pragma unroll
          for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
              for (int m = 0; m < kMatrices; ++m) values[strip][odd][m] = sums[strip][m][odd ? (s ? 1 : 3) : (s ? 2 : 0)];
              sort_by(q, values[strip][odd]);
            }
          }
#pragma unroll
          for (int e = 0; e < kMatrices; ++e) {
            const int channel = first_channel + e * 16 + 2 * r + s;
            if (channel >= plan.in_channels) continue;
            T* const to = first_pixel + channel * plane + line + out_x;
            const int column = column_of(2 * q, 0);
            // NOTE: __stwb, because nvcc merges plain stores of the two branches into one, of single elements.
            if (plan.vectors && !adds) {
              if (out_x + column >= plan.input[1]) continue;
              if constexpr (kScaled) {
                __stwb(reinterpret_cast<float4*>(to + column),
                       make_float4(values[0][0][e], values[0][1][e], values[1][0][e], values[1][1][e]));
              } else {
                __stwb(reinterpret_cast<uint2*>(to + column), make_uint2(pack_pair<T>(values[0][0][e], values[0][1][e]),
                                                                         pack_pair<T>(values[1][0][e], values[1][1][e])));
              }
            } else {
#pragma unroll
              for (int i = 0; i < 2 * kStrips; ++i) {
                if (out_x + column + i < plan.input[1]) put(to + column + i, values[i / 2][i % 2][e]);
              }
            }
          }
        }
      }
    }
  }
}

// ---- host ----

template <typename T, int CHUNK, int TAPS>
void launch_grad_input_mma(const GradInputMmaPlan& plan, int shared_bytes, const Tensor& grad, const Tensor& winners,
                           const Tensor& weight, float scale, Tensor& output) {
  const int chunks = static_cast<int>(ceil_div(plan.in_channels, CHUNK)), device = grad.get_device_index();
  const int64_t rows_bytes = static_cast<int64_t>(chunks) * plan.out_channels * plan.taps * CHUNK * 2;
  const Tensor memory =
      torch::stable::new_empty(weight, {rows_bytes + plan.out_channels * 4}, torch::headeronly::ScalarType::Byte);
  uint16_t* const rows = static_cast<uint16_t*>(memory.data_ptr());
  float* const factors = reinterpret_cast<float*>(static_cast<char*>(memory.data_ptr()) + rows_bytes);
  const cudaStream_t stream = current_stream(grad);
  const int64_t strides[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  pack_rows_kernel<T, CHUNK><<<plan.out_channels, kPackRowsThreads, 0, stream>>>(
      static_cast<const T*>(weight.data_ptr()), Strides4(strides), plan.in_channels, plan.kernel[1], plan.taps, rows, factors);
  const auto kernel = grad_input_kernel<T, CHUNK, TAPS>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const int blocks = std::max(multiprocessors(device) / chunks, 1);
  const dim3 grid(std::min(static_cast<int>(ceil_div(plan.patches, kWarps)), blocks), chunks);
  kernel<<<grid, kThreads, shared_bytes, stream>>>(static_cast<const T*>(grad.data_ptr()), winners_in(winners), rows, factors,
                                                   scale, static_cast<T*>(output.data_ptr()), plan);
}

Tensor grad_input_mma(const Tensor& grad, const Tensor& winners, const Tensor& weight, double scale,
                      std::vector<int64_t> input_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups, std::string precision, bool channels_last) {
  using torch::headeronly::ScalarType;
  const ConvShape shape = check_grad_input(grad, winners, weight, input_size, stride, padding, dilation, groups);
  for (int64_t s : shape.stride) STD_TORCH_CHECK(s == 1, "stride: grad_input_mma expected 1, got ", s);
  STD_TORCH_CHECK(groups == 1, "groups: grad_input_mma expected 1, got ", groups);
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double, "weight: grad_input_mma does not take float64");
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Float || precision == "tf32",
                  "precision: grad_input_mma expected tf32 for float32, got ", precision);
  STD_TORCH_CHECK(shape.taps() <= kMostTaps, "weight: grad_input_mma expected at most ", kMostTaps, " filter taps");
  const int64_t most = std::max({shape.images, shape.in_channels, shape.out_channels, shape.input[0], shape.input[1],
                                 shape.padding[0], shape.padding[1], shape.kernel[0] * shape.dilation[0],
                                 shape.kernel[1] * shape.dilation[1]});
  STD_TORCH_CHECK(most < 1 << 28, "input_size: grad_input_mma expected sizes below 2^28, got ", most);
  Tensor output = new_gradient(weight, {shape.images, shape.in_channels, shape.input[0], shape.input[1]}, channels_last);
  if (output.numel() == 0) return output;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());

  const GradInputMmaCandidate candidate = plan_grad_input_mma(shape, grad, channels_last);
  dispatch(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 4) {
      const bool narrow = candidate.narrow;
      const auto launch = candidate.plan.taps == 9
                              ? (narrow ? launch_grad_input_mma<T, 32, 9> : launch_grad_input_mma<T, 64, 9>)
                              : (narrow ? launch_grad_input_mma<T, 32, 0> : launch_grad_input_mma<T, 64, 0>);
      launch(candidate.plan, candidate.shared_bytes, grad, winners, weight, static_cast<float>(scale), output);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CUDA, m) { m.impl(OPERATOR("grad_input_mma"), TORCH_BOX(&grad_input_mma)); }

}  // namespace fused_kernels
