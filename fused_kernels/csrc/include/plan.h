#pragma once
// What the kernels' plans share. A plan is made without CUDA and PyTorch: the choice between kernels asks for it, too.

#include "conv_shape.h"

namespace fused_kernels {

constexpr int kWarpSize = 32;
constexpr int kStepDepth = 16;  // K of one instruction of the tensor cores

// Rows and columns are counted in an int, and past the last one.
constexpr int64_t kMostReach = 1 << 30;

struct Device {
  int multiprocessors, shared_bytes;  // of a multiprocessor
};

// Types, such as the sizes of tiles that a rung has to choose from.
template <class... Ts>
struct List {};

}  // namespace fused_kernels
