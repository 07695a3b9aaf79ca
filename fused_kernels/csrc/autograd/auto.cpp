// auto: the operators that choose when they are called, without Python.
//
// auto.py has them in Python, which takes longer to call than a small layer's kernels. Where this library is loaded, a call
// looks up by its arguments' sizes, strides and dtypes which operator was chosen for the same ones before, and hands its
// arguments on. Only what is new is asked of Python. What wants a gradient, and is not compiled, goes to Python as well.
// NOTE: PyTorch's stable ABI has neither keys nor boxed calls; so this source uses the headers of libtorch.

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>

namespace fused_kernels {

using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

const char* const kOperators[] = {"scale_min_auto",          "scale_min_winners_auto",        "conv2d_scale_min_auto",
                                  "conv2d_scale_min_winners_auto", "scale_min_backward_auto", "grad_input_auto",
                                  "grad_weight_auto",        "grad_bias_auto"};

OperatorHandle find(const std::string& name) {
  const size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fused_kernels::" + name.substr(0, dot)).c_str(), overload.c_str());
}

// ---- what a choice depends on ----

class Key {
 public:
  std::string bytes;

  Key(const OperatorHandle& op, const Stack& arguments) {
    bytes.reserve(512);
    put(reinterpret_cast<int64_t>(&op.schema()));
    // What precision "auto" means.
    put(static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV)));
    for (const IValue& argument : arguments) put(argument);
  }

 private:
  void put(int64_t value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void put(c10::IntArrayRef values) {
    put(static_cast<int64_t>(values.size()));
    for (int64_t value : values) put(value);
  }
  void put(const IValue& value) {
    if (value.isTensor()) {
      const at::Tensor& tensor = value.toTensor();
      put(static_cast<int64_t>(tensor.scalar_type()) << 32 | static_cast<int64_t>(tensor.device().type()) << 16 |
          (tensor.device().index() & 0xffff));
      put(tensor.sizes());
      put(tensor.strides());
    } else if (value.isInt() || value.isBool()) {
      put(value.isInt() ? value.toInt() : int64_t{value.toBool()});
    } else if (value.isIntList()) {
      const auto list = value.toIntList();
      put(static_cast<int64_t>(list.size()));
      for (int64_t item : list) put(item);
    } else if (value.isString()) {
      bytes.append(value.toStringRef());
    }  // no choice depends on the scale
  }
};

// ---- choices made ----

struct Choice {
  OperatorHandle op;
  IValue precision;  // what "auto" meant
};

Choice choose(const OperatorHandle& op, const Stack& arguments) {
  static std::mutex mutex;
  static std::unordered_map<std::string, Choice> choices;
  constexpr size_t kMostChoices = 4096;
  const Key key(op, arguments);
  {
    const std::lock_guard lock(mutex);
    if (const auto found = choices.find(key.bytes); found != choices.end()) return found->second;
  }
  // Without the lock: Python has one of its own.
  Stack asked = arguments;
  find(op.schema().name().substr(sizeof("fused_kernels::") - 1) + "_choice").callBoxed(asked);
  const Choice choice{find(asked[0].toStringRef()), asked[1]};
  const std::lock_guard lock(mutex);
  if (choices.size() >= kMostChoices) choices.clear();
  choices.emplace(key.bytes, choice);
  return choice;
}

void call_chosen(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  TORCH_INTERNAL_ASSERT(stack->size() == count);
  const at::AutoDispatchBelowAutograd below;
  const Choice choice = choose(op, *stack);
  if (const auto place = op.schema().argumentIndexWithName("precision")) (*stack)[*place] = choice.precision;
  choice.op.callBoxed(stack);
}

// ---- at autograd's key ----

bool wants_gradient(const Stack& arguments) {
  const bool enabled = at::GradMode::is_enabled();
  for (const IValue& argument : arguments) {
    if (!argument.isTensor()) continue;
    const at::Tensor& tensor = argument.toTensor();
    // In the forward mode a tangent is one.
    if ((enabled && tensor.requires_grad()) || tensor._fw_grad(0).defined()) return true;
  }
  return false;
}

bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode);
}

void at_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  if (wants_gradient(*stack) || is_transformed()) {
    find(op.schema().name().substr(sizeof("fused_kernels::") - 1) + "_with_gradient").callBoxed(stack);
  } else {
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
}

TORCH_LIBRARY_IMPL(fused_kernels, CPU, m) {
  for (const char* name : kOperators) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_chosen>());
}
TORCH_LIBRARY_IMPL(fused_kernels, CUDA, m) {
  for (const char* name : kOperators) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_chosen>());
}
TORCH_LIBRARY_IMPL(fused_kernels, AutogradCPU, m) {
  for (const char* name : kOperators) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&at_autograd>());
}
TORCH_LIBRARY_IMPL(fused_kernels, AutogradCUDA, m) {
  for (const char* name : kOperators) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&at_autograd>());
}

}  // namespace fused_kernels
