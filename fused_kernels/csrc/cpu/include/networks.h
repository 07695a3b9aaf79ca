#pragma once
// What small networks make of a problem's description: several, with three layers each, whose answers are averaged.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fused_kernels {

// In the order of estimates.py. Of each layer the weights of all networks, one after the other, then the biases.
struct Networks {
  int64_t count, widths[4];  // of networks; of their layers, the first one's inputs to the last one's outputs
  const float *mean, *deviation, *offset, *weights[3], *biases[3];
};

// y = x * weight + bias; the sums of a row of outputs stay in registers and the nearest cache.
inline void multiply(const float* x, int64_t inputs, const float* weight, const float* bias, int64_t outputs, float* y) {
  std::copy_n(bias, outputs, y);
  for (int64_t i = 0; i < inputs; ++i) {
    const float factor = x[i], *const row = weight + i * outputs;
    for (int64_t j = 0; j < outputs; ++j) y[j] += factor * row[j];
  }
}

inline void ask(const Networks& n, const float* described, float* answer) {
  constexpr float kMost = 4;  // what lies further from the mean than all that was learnt is taken to lie at the edge
  std::vector<float> scaled(n.widths[0]), x, y;
  for (int64_t i = 0; i < n.widths[0]; ++i) {
    scaled[i] = std::clamp((described[i] - n.mean[i]) / n.deviation[i], -kMost, kMost);
  }
  std::copy_n(n.offset, n.widths[3], answer);
  for (int64_t network = 0; network < n.count; ++network) {
    x = scaled;
    for (int layer = 0; layer < 3; ++layer) {
      const int64_t inputs = n.widths[layer], outputs = n.widths[layer + 1];
      y.resize(outputs);
      multiply(x.data(), inputs, n.weights[layer] + network * inputs * outputs, n.biases[layer] + network * outputs, outputs,
               y.data());
      if (layer < 2) {
        for (float& value : y) value /= 1 + std::exp(-value);
      }
      x.swap(y);
    }
    for (int64_t i = 0; i < n.widths[3]; ++i) answer[i] += x[i] / static_cast<float>(n.count);
  }
}

}  // namespace fused_kernels
