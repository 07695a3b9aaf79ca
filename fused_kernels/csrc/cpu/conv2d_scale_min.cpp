// WIP simple
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <string>
#include <vector>
using torch::stable::Tensor;
Tensor conv2d_scale_min(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale,
  std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, std::string precision) {
  int64_t N = input.size(0), C = weight.size(1), H = input.size(2), W = input.size(3), K = weight.size(0), R = weight.size(2), S = weight.size(3);
  int64_t P = (H + padding[0] + padding[1] - dilation[0]*(R-1) - 1) / stride[0] + 1, Q = (W + padding[2] + padding[3] - dilation[1]*(S-1) - 1) / stride[1] + 1;
  Tensor out = torch::stable::new_empty(input, {N, 1, P, Q});
  const float* x = (const float*)input.data_ptr(); const float* wt = (const float*)weight.data_ptr(); float* q = (float*)out.data_ptr();
  auto s = input.strides(); auto t = weight.strides();
  for (int64_t n = 0; n < N; n++) for (int64_t p = 0; p < P; p++) for (int64_t o = 0; o < Q; o++) {
    float m = INFINITY;
    for (int64_t k = 0; k < K; k++) { 
      float v = bias ? ((const float*)bias->data_ptr())[k] : 0.f; int64_t g = k / (K / groups);
      for (int64_t c = 0; c < C; c++) for (int64_t i = 0; i < R; i++) for (int64_t j = 0; j < S; j++) {
        int64_t h = p*stride[0]-padding[0]+i*dilation[0], w = o*stride[1]-padding[2]+j*dilation[1];
        if (h < 0 || h >= H || w < 0 || w >= W) continue;
        v += x[n*s[0]+(g*C+c)*s[1]+h*s[2]+w*s[3]] * wt[k*t[0]+c*t[1]+i*t[2]+j*t[3]];
      }
      v *= (float)scale; m = (v < m || v != v) ? v : m; }
    *q++ = m;
  }
  return out;
}
STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) { m.impl("conv2d_scale_min", TORCH_BOX(&conv2d_scale_min)); }
