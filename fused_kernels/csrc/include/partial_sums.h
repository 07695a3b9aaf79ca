#pragma once
// Sums of many products in parts: how long a part may be.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "conv_shape.h"

namespace fused_kernels {

// A sum of so many products that is made of partial sums. Of r products that are added one by one r - 1 can be lost, each just
// below half of the sum's last bit; of the partial sums, all but the first.
struct PartialSums {
  double allowed;   // to be lost: the promise of fused_kernels/bounds.py, in roundings, and an eighth, for fewer cuts
  int64_t longest;  // the largest r that keeps to it

  explicit PartialSums(int64_t products) {
    allowed = 1.125 * std::max(16.0, 2 * std::sqrt(static_cast<double>(products)));
    const double half = allowed / 2 + 1;  // r + products / r <= allowed + 2
    longest = static_cast<int64_t>(half + std::sqrt(half * half - products));
  }

  // Into how few partial sums to cut `count` numbers, of `size` products each, if that is done so many times.
  int64_t cuts(int64_t count, int64_t size, int64_t times) const {
    const int64_t enough = ceil_div(count, std::max<int64_t>(longest / size, 1)), fewer = std::max<int64_t>(enough - 1, 1);
    return lost(count, size, times, fewer) <= std::max<double>(lost(count, size, times, enough), allowed) ? fewer : enough;
  }
  static int64_t lost(int64_t count, int64_t size, int64_t times, int64_t cuts) {
    return ceil_div(count, cuts) * size + times * cuts - 2;
  }
};

}  // namespace fused_kernels
