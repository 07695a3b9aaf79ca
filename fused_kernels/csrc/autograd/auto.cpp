// auto: the operators that choose when they are called, without Python.
//
// auto.py has them in Python, which takes longer to call than a small layer's kernels. Where this library is loaded, a call
// looks up by its arguments' sizes, strides and dtypes which operator was chosen for the same ones before, and hands its
// arguments on. Only what is new is asked of Python, or may still be tried. What wants a gradient, and is not compiled, goes to
// Python as well.
// NOTE: PyTorch's stable ABI has neither keys nor boxed calls; so this source uses the headers of libtorch.

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "transforms.h"

namespace fused_kernels {

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

const char* const kOperators[] = {
    "scale_min_auto",          "scale_min_winners_auto", "conv2d_scale_min_auto", "conv2d_scale_min_winners_auto",
    "scale_min_backward_auto", "grad_input_auto",        "grad_weight_auto",      "grad_bias_auto"};

OperatorHandle find(const std::string& name) {
  const size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fused_kernels::" + name.substr(0, dot)).c_str(), overload.c_str());
}

std::string own_name(const OperatorHandle& op) { return op.schema().name().substr(sizeof("fused_kernels::") - 1); }

// A stack may hold more below them.
c10::ArrayRef<IValue> arguments_of(const OperatorHandle& op, const Stack& stack) {
  return torch::jit::last(stack, op.schema().arguments().size());
}

// ---- what a choice depends on ----

class Key {
 public:
  std::string bytes;

  Key(const OperatorHandle& op, c10::ArrayRef<IValue> arguments) {
    bytes.reserve(512);
    put(reinterpret_cast<int64_t>(&op.schema()));
    // What precision "auto" means.
    put(static_cast<int64_t>(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV)));
    // Whether the first call of a problem times candidates.
    const auto& context = at::globalContext();
    put(int64_t{context.benchmarkCuDNN() && !context.deterministicCuDNN() && !context.deterministicAlgorithms()});
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
      const Tensor& tensor = value.toTensor();
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
    } else if (value.isNone()) {
      put(int64_t{-1});
    }  // no choice depends on the scale
  }
};

// ---- choices made ----

// How the composite runs, in the order of composite.py's Steps.
struct Steps {
  int64_t copy, copies_weight, skips_unread, copy_early, library_precision, adds_bias, minimum_early;
};
enum Copy { kNone, kByKernel, kContiguous, kChannelsLast };
constexpr int64_t kFollowsSetting = -1;

struct Choice {
  OperatorHandle op;         // of the composite, what takes the minimum
  IValue precision;          // what "auto" meant
  std::optional<Steps> steps;  // the composite's
};

Choice choose(const OperatorHandle& op, c10::ArrayRef<IValue> arguments) {
  static std::mutex mutex;
  static std::unordered_map<std::string, Choice> choices;
  constexpr size_t kMostChoices = 4096;
  const Key key(op, arguments);
  {
    const std::lock_guard lock(mutex);
    if (const auto found = choices.find(key.bytes); found != choices.end()) return found->second;
  }
  // Without the lock: Python has one of its own.
  Stack asked = arguments.vec();
  find(own_name(op) + "_choice").callBoxed(asked);
  Choice choice{find(asked[0].toStringRef()), asked[1], std::nullopt};
  if (const auto steps = asked[2].toIntVector(); !steps.empty()) {
    choice.steps = {steps[0], steps[1], steps[2], steps[3], steps[4], steps[5], steps[6]};
  }
  if (const bool holds = asked[3].toBool(); !holds) return choice;
  const std::lock_guard lock(mutex);
  if (choices.size() >= kMostChoices) choices.clear();
  choices.emplace(key.bytes, choice);
  return choice;
}

// The library's convolution, then the minimum: what composite.py does.
Stack call_composite(const Choice& choice, c10::ArrayRef<IValue> arguments) {
  const Steps& steps = *choice.steps;
  Tensor input = arguments[0].toTensor(), weight = arguments[1].toTensor();
  std::optional<Tensor> bias = arguments[2].toOptional<Tensor>();
  std::vector<int64_t> stride = arguments[4].toIntVector();
  const std::vector<int64_t> sides = arguments[5].toIntVector(), dilation = arguments[6].toIntVector();
  const int64_t groups = arguments[7].toInt();
  if (steps.copy == kByKernel) {
    if (steps.skips_unread) {
      input = input.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]);
      stride = {1, 1};
    }
    Stack copy{input, steps.copies_weight ? IValue(weight) : IValue(), steps.copy_early != 0};
    find("to_channels_last." + choice.op.operator_name().overload_name).callBoxed(copy);
    const std::vector<Tensor> copied = copy[0].toTensorVector();
    input = copied[0];
    if (steps.copies_weight) weight = copied[1];
  } else if (steps.copy != kNone) {
    const auto format = steps.copy == kChannelsLast ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    input = input.contiguous(format);
    weight = weight.contiguous(format);
  }
  std::vector<int64_t> padding{sides[0], sides[2]};
  if (sides[0] != sides[1] || sides[2] != sides[3]) {
    input = at::constant_pad_nd(input, {sides[2], sides[3], sides[0], sides[1]});
    padding = {0, 0};
  }
  const std::optional<Tensor> added = steps.adds_bias ? std::nullopt : bias;
  Tensor output;
  if (steps.library_precision == kFollowsSetting) {
    output = at::conv2d(input, weight, added, stride, padding, dilation, groups);
  } else {
    Stack library{input, weight, added, stride, padding, dilation, groups, steps.library_precision != 0};
    find("library_conv2d").callBoxed(library);
    output = library[0].toTensor();
  }
  Stack minimum{output};
  if (steps.adds_bias) minimum.emplace_back(*bias);
  minimum.emplace_back(arguments[3]);
  if (steps.adds_bias) minimum.emplace_back(steps.minimum_early != 0);
  minimum.emplace_back(arguments[9]);  // the scales
  choice.op.callBoxed(minimum);
  return minimum;
}

void call_chosen(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const at::AutoDispatchBelowAutograd below;
  // Arguments are of the dtype that is wanted by now.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto arguments = arguments_of(op, *stack);
  const Choice choice = choose(op, arguments);
  if (choice.steps) {
    Stack results = call_composite(choice, arguments);
    torch::jit::drop(*stack, arguments.size());
    for (IValue& result : results) stack->push_back(std::move(result));
    return;
  }
  const size_t first = stack->size() - arguments.size();
  if (const auto place = op.schema().argumentIndexWithName("precision")) (*stack)[first + *place] = choice.precision;
  choice.op.callBoxed(stack);
}

// ---- at autograd's key ----

bool wants_gradient(c10::ArrayRef<IValue> arguments) {
  if (!at::GradMode::is_enabled()) return false;
  for (const IValue& argument : arguments) {
    if (argument.isTensor() && argument.toTensor().requires_grad()) return true;
  }
  return false;
}

// It may know no operators of ours.
bool has_subclass(c10::ArrayRef<IValue> arguments) {
  return std::any_of(arguments.begin(), arguments.end(), [](const IValue& argument) {
    return argument.isTensor() && argument.toTensor().key_set().has(DispatchKey::Python);
  });
}

void at_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const auto arguments = arguments_of(op, *stack);
  if (wants_gradient(arguments) || is_transformed() || has_subclass(arguments)) {
    find(own_name(op) + "_at_autograd").callBoxed(stack);
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
