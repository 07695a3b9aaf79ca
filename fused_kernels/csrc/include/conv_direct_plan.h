#pragma once
// How conv_direct cuts the output, decided on the host: strips, and passes over a group's output channels.

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "plan.h"

namespace fused_kernels::direct {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kMinStripWidth = 8;  // in a narrow image a warp owns several strips

// The size whose blocks cover a length with the least waste; of equal ones the first.
inline int64_t least_waste(int64_t length, std::initializer_list<int64_t> sizes) {
  const auto covered = [&](int64_t size) { return ceil_div(length, size) * size; };
  return *std::min_element(sizes.begin(), sizes.end(), [&](int64_t a, int64_t b) { return covered(a) < covered(b); });
}

struct Strips {
  int64_t passes, warps, width, per_block, high, wide, count;  // warps: that split a strip's channels

  // A thread sums so many rows x channels.
  Strips(const ConvShape& s, int rows, int channels) {
    const int64_t slots = least_waste(s.out_channels, {kWarps * channels, kWarps / 2 * channels, channels});
    warps = slots / channels;
    passes = ceil_div(s.out_channels, slots);
    width = least_waste(s.output[1], {kWarpSize, kWarpSize / 2, kMinStripWidth});
    per_block = kThreads / warps / width;
    high = ceil_div(s.output[0], rows);
    wide = ceil_div(s.output[1], width);
    count = s.images * high * wide;
  }
};

}  // namespace fused_kernels::direct
