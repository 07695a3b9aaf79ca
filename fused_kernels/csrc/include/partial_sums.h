#pragma once
// Sums of many products in parts: how long a part may be.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "conv_shape.h"

namespace fused_kernels {

// Partial sums of a sum of so many products. Of r products that are added one by one r - 1 can be lost, each just below half of
// the sum's last bit; of the partial sums, all but the first.
struct PartialSums {
  double allowed;   // to be lost: the promise of fused_kernels/bounds.py, in roundings, and a margin, for fewer parts
  int64_t longest;  // the largest r that keeps to it

  explicit PartialSums(int64_t products, double margin = 0) {
    allowed = (1 + margin) * std::max(16.0, 2 * std::sqrt(static_cast<double>(products)));
    const double half = allowed / 2 + 1;  // r + products / r <= allowed + 2
    longest = static_cast<int64_t>(half + std::sqrt(half * half - products));
  }

  // Where that is done several times: how few partial sums serve `count` terms of `size` products each.
  int64_t parts(int64_t count, int64_t size, int64_t times) const {
    const int64_t enough = ceil_div(count, std::max<int64_t>(longest / size, 1)), fewer = std::max<int64_t>(enough - 1, 1);
    return lost(count, size, times, fewer) <= std::max<double>(lost(count, size, times, enough), allowed) ? fewer : enough;
  }
  static int64_t lost(int64_t count, int64_t size, int64_t times, int64_t parts) {
    return ceil_div(count, parts) * size + times * parts - 2;
  }
};

}  // namespace fused_kernels
