#pragma once
// What every rung's host function needs: tensors and streams through PyTorch's stable ABI, and dispatch over dtypes.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "arguments.h"

namespace fused_kernels {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls f with a value of the C++ type that the dtype stands for. Only what this library is compiled for is instantiated.
template <typename F>
void dispatch(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  if constexpr (is_compiled(ScalarType::Float)) {
    if (dtype == ScalarType::Float) return f(float());
  }
  if constexpr (is_compiled(ScalarType::Double)) {
    if (dtype == ScalarType::Double) return f(double());
  }
  if constexpr (is_compiled(ScalarType::Half)) {
    if (dtype == ScalarType::Half) return f(torch::headeronly::Half());
  }
  if constexpr (is_compiled(ScalarType::BFloat16)) {
    if (dtype == ScalarType::BFloat16) return f(torch::headeronly::BFloat16());
  }
  STD_TORCH_CHECK(false, "input: expected ", kDtypes, ", got ", torch::headeronly::toString(dtype));
}

// The C++ type of the dtype that this library is compiled for, if one of the three that tensor cores take.
using Element = std::conditional_t<
    is_compiled(torch::headeronly::ScalarType::Float), float,
    std::conditional_t<is_compiled(torch::headeronly::ScalarType::Half), torch::headeronly::Half, torch::headeronly::BFloat16>>;

// Whether a kernel can begin while the one before it ends: on all architectures that this is compiled for.
#ifdef __CUDA_ARCH_LIST__
constexpr bool kBeginsEarly = std::min({__CUDA_ARCH_LIST__}) >= 900;
#else
constexpr bool kBeginsEarly = false;
#endif

// Launches a kernel whose threads call ptx::wait_for_previous_grid before they touch what others may still write or read. If
// early, its blocks are placed and set up while the kernel before it ends ("programmatic dependent launch", CUDA programming
// guide).
// NOTE: what such a kernel reads after the wait must be neither __restrict__ nor __ldg: both promise that nobody writes it
// while the kernel runs, and the compiler could read it before the wait.
template <typename... Params, typename... Args>
void launch_kernel(bool early, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = kBeginsEarly && early ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

template <typename... Params, typename... Args>
void launch_early(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream, Args... args) {
  launch_kernel(true, kernel, grid, threads, shared_bytes, stream, args...);
}

inline int multiprocessors(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// A grid's x extent, checked: CUDA takes at most 2^31 - 1 blocks.
inline unsigned int grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "input: expected at most 2^31 - 1 blocks of work, got ", blocks);
  return static_cast<unsigned int>(blocks);
}

}  // namespace fused_kernels
