// Whether one of torch's transforms is under way, for which operators have no rules but those of PyTorch's own operations.
// Lies here because csrc/autograd is compiled as the CPU's kernels are; no kernel includes it.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

namespace fused_kernels {

// Of torch.func, or forward-mode differentiation; dispatch.is_transformed asks the same.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

}  // namespace fused_kernels
