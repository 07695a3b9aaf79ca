// from_winners: training steps whose backward pass runs without Python.
//
// The rules for gradients are in gradients.py, as torch.library wants them. But what torch.library runs around them, in Python,
// takes longer than a small layer's kernels; and a GPU's backward pass runs in a thread of its own, which has to wait for
// Python's lock. So where nothing is compiled or transformed the first-order rules are followed here. The caller says which
// operators to call. Until this is built, in the background, the rules in gradients.py do the same. Second derivatives still
// come from the operators' own rules.
//   forward operator    gives output and winners; or "given": the caller ran a forward in Python and hands over both
//   backward operators  grad_input, grad_weight with the bias's gradient, grad_bias where that is wanted alone
// NOTE: PyTorch's stable ABI has no autograd functions; so this source uses the headers of libtorch.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "transforms.h"

namespace fused_kernels {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Stack = torch::jit::Stack;

// The overload for a tensor's dtype, as its library registers it.
const char* overload_for(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    default: return "";
  }
}

// Calls an operator of this namespace, and leaves its results in place of its arguments.
void call(const std::string& name, const char* overload, Stack& stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(("fused_kernels::" + name).c_str(), overload).callBoxed(stack);
}

// The same, of a rung, which has an overload for the dtype of its first argument.
void call(const std::string& name, Stack& stack) { call(name, overload_for(stack[0].toTensor()), stack); }

// Whether Python must be asked what a backward pass calls: under a transform, and where a tensor is of a subclass that takes
// calls over, which may know no operators of ours.
bool must_ask(const Tensor& grad, const variable_list& saved) {
  const auto takes_over = [](const Tensor& t) { return t.defined() && t.key_set().has(c10::DispatchKey::Python); };
  return is_transformed() || takes_over(grad) || std::any_of(saved.begin(), saved.end(), takes_over);
}

// Calls a backward operator: the one that was chosen; or asks Python, which may do the same by PyTorch's own operations.
void call_backward(const std::string& kind, const IValue& chosen, bool asks, Stack& stack) {
  if (!asks) return call(chosen.toStringRef(), stack);
  call(kind + "_auto_at_autograd", "", stack);
}

// A tensor scale's factors multiply the gradient that comes in, each pixel's by its winner's.
Tensor times_factors(const Tensor& grad, const Tensor& winners, const Tensor& scales) {
  return scales.defined() ? grad.mul(scales.index({winners.to(at::kLong)})).to(grad.scalar_type()) : grad;
}

// The sums of a gradient over the pixels that each channel wins, in the gradient's dtype.
Tensor sum_by_winner(const Tensor& grad, const Tensor& winners, const IValue& scale, int64_t channels) {
  Stack stack{grad, winners, scale, channels};
  call("grad_bias_auto", "", stack);
  return stack[0].toTensor();
}

// Where no second derivative is wanted, no rule of the operators that are called is needed.
struct BelowAutograd {
  std::optional<at::AutoDispatchBelowAutograd> guard;
  explicit BelowAutograd(bool is_below) {
    if (is_below) guard.emplace();
  }
};

bool is_channels_last(const Tensor& tensor) { return tensor.size(1) > 1 && tensor.is_contiguous(at::MemoryFormat::ChannelsLast); }

// Wrapped in a struct, so that Function::apply does not take these for tensors to differentiate by.
struct Forward {
  Tensor output, winners;
  const Stack& rest;  // of the operator's arguments
  const std::vector<std::string>& backward;
};

struct Conv2dScaleMin : torch::autograd::Function<Conv2dScaleMin> {
  // The rest: what they are saved as, each by itself. Compiled autograd takes no lists within a list.
  static constexpr const char* kRest[] = {"scale", "stride", "padding", "dilation", "groups", "precision"};

  static Tensor forward(AutogradContext* context, const Forward& forward, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& scales) {
    context->set_materialize_grads(false);
    // Of input and weights, what the other one's gradient needs; for the scales' gradient all.
    const bool needs_scales = scales && scales->requires_grad();
    context->save_for_backward({forward.winners, weight.requires_grad() || needs_scales ? input : Tensor(),
                                input.requires_grad() || needs_scales ? weight : Tensor(),
                                bias && needs_scales ? *bias : Tensor(), scales.value_or(Tensor())});
    for (size_t i = 0; i < std::size(kRest); ++i) context->saved_data[kRest[i]] = forward.rest[i];
    context->saved_data["backward"] = forward.backward;
    context->saved_data["input_size"] = input.sizes().slice(2);
    context->saved_data["weight_size"] = weight.sizes();
    context->saved_data["channels_last"] = is_channels_last(input);
    context->saved_data["bias_dtype"] = bias ? IValue(bias->scalar_type()) : IValue();
    return forward.output;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list results(5);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return results;
    // Before the guard: hooks may compute these anew, as checkpointing does, with all rules for gradients.
    const auto saved = context->get_saved_variables();
    const Tensor &winners = saved[0], &input = saved[1], &weight = saved[2], &bias = saved[3], &scales = saved[4];
    const bool asks = must_ask(grad, saved);
    const BelowAutograd below(!at::GradMode::is_enabled() && !asks);
    auto& data = context->saved_data;
    const auto add_geometry = [&](Stack& stack) {
      for (size_t i = 1; i < std::size(kRest); ++i) stack.push_back(data[kRest[i]]);
    };
    const auto names = data["backward"].toListRef();
    const auto weight_size = data["weight_size"].toIntVector();
    // NOTE: counted without a bias that there is not.
    const bool has_bias = !data["bias_dtype"].isNone(), needs_bias = has_bias && context->needs_input_grad(2);
    const bool needs_weight = context->needs_input_grad(1);
    const bool needs_scales = scales.defined() && context->needs_input_grad(has_bias ? 3 : 2);
    const Tensor scaled = needs_scales && !context->needs_input_grad(0) ? grad : times_factors(grad, winners, scales);
    if (context->needs_input_grad(0)) {
      Stack stack{scaled, winners, weight, data["scale"], data["input_size"]};
      add_geometry(stack);
      stack.emplace_back(data["channels_last"]);
      call_backward("grad_input", names[0], asks, stack);
      results[1] = stack[0].toTensor();
    }
    // For the scales' gradient the other gradients are made as if all factors were one: see gradients.py.
    const Tensor& arrives = needs_scales ? grad : scaled;
    if (needs_weight || needs_scales) {
      Stack stack{arrives, winners, input, data["scale"], weight_size[0], std::vector<int64_t>{weight_size[2], weight_size[3]}};
      add_geometry(stack);
      call_backward("grad_weight", names[1], asks, stack);
      results[2] = stack[0].toTensor();
      if (needs_bias || bias.defined()) results[3] = stack[1].toTensor();
    } else if (needs_bias) {
      Stack stack{arrives, winners, data["scale"], weight_size[0]};
      call_backward("grad_bias", names[2], asks, stack);
      results[3] = stack[0].toTensor();
    }
    // A wider bias's gradient is summed in its dtype, and so is what the scales' gradient needs of a bias.
    const auto wide = needs_scales && bias.defined() ? scales.scalar_type()
                      : needs_bias                   ? data["bias_dtype"].toScalarType()
                                                     : grad.scalar_type();
    if (wide != grad.scalar_type()) results[3] = sum_by_winner(arrives.to(wide), winners, data["scale"], weight_size[0]);
    if (!needs_scales) return results;
    results[4] = results[2].to(scales.scalar_type()).mul(weight).sum({1, 2, 3});
    if (bias.defined()) results[4] = results[4].add(results[3].mul(bias));
    results[2] = needs_weight ? results[2].mul(scales.view({-1, 1, 1, 1})).to(weight.scalar_type()) : Tensor();
    results[3] = needs_bias ? results[3].mul(scales).to(data["bias_dtype"].toScalarType()) : Tensor();
    return results;
  }
};

struct ScaleMin : torch::autograd::Function<ScaleMin> {
  static Tensor forward(AutogradContext* context, const Forward& forward, const Tensor& input,
                        const std::optional<Tensor>& scales) {
    context->set_materialize_grads(false);
    const bool needs_scales = scales && scales->requires_grad();
    context->save_for_backward({forward.winners, needs_scales ? input : Tensor(), scales.value_or(Tensor())});
    context->saved_data["scale"] = forward.rest[0];
    context->saved_data["backward"] = forward.backward[0];
    context->saved_data["channels"] = input.size(1);
    context->saved_data["channels_last"] = is_channels_last(input);
    return forward.output;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list results(3);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return results;
    const auto saved = context->get_saved_variables();
    const Tensor &winners = saved[0], &input = saved[1], &scales = saved[2];
    const bool asks = must_ask(grad, saved);
    const BelowAutograd below(!at::GradMode::is_enabled() && !asks);
    auto& data = context->saved_data;
    if (context->needs_input_grad(0)) {
      Stack stack{times_factors(grad, winners, scales), winners, data["scale"], data["channels"], data["channels_last"]};
      call_backward("scale_min_backward", data["backward"], asks, stack);
      results[1] = stack[0].toTensor();
    }
    if (scales.defined() && context->needs_input_grad(1)) {
      const Tensor products = grad.to(scales.scalar_type()).mul(input.gather(1, winners.to(at::kLong)));
      results[2] = sum_by_winner(products, winners, 1.0, data["channels"].toInt());
    }
    return results;
  }
};

std::tuple<Tensor, Tensor> run_forward(const std::string& forward, Stack arguments) {
  const at::AutoDispatchBelowAutograd below;
  call(forward, arguments);
  return {arguments[0].toTensor(), arguments[1].toTensor()};
}

std::tuple<Tensor, Tensor> conv_from_winners(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                             double scale, c10::List<int64_t> stride, c10::List<int64_t> padding,
                                             c10::List<int64_t> dilation, int64_t groups, const std::string& precision,
                                             const std::string& forward, const std::vector<std::string>& backward,
                                             const std::vector<Tensor>& given, const std::optional<Tensor>& scales) {
  Stack rest{scale, stride, padding, dilation, groups, precision};
  Stack arguments{input, weight, bias};
  arguments.insert(arguments.end(), rest.begin(), rest.end());
  arguments.emplace_back(scales);
  const auto [output, winners] = given.size() == 2 ? std::tuple{given[0], given[1]} : run_forward(forward, std::move(arguments));
  return {Conv2dScaleMin::apply(Forward{output, winners, rest, backward}, input, weight, bias, scales), winners};
}

std::tuple<Tensor, Tensor> scale_min_from_winners(const Tensor& input, double scale, const std::string& forward,
                                                  const std::vector<std::string>& backward,
                                                  const std::optional<Tensor>& scales) {
  const auto [output, winners] = run_forward(forward, {input, scale, scales});
  const Stack rest{scale};
  return {ScaleMin::apply(Forward{output, winners, rest, backward}, input, scales), winners};
}

TORCH_LIBRARY_FRAGMENT(fused_kernels, m) {
  m.def(
      "conv_from_winners(Tensor input, Tensor weight, Tensor? bias, float scale, int[2] stride, int[4] padding, int[2] dilation, "
      "int groups, str precision, str forward, str[] backward, Tensor[] given, Tensor? scales=None) -> (Tensor, Tensor)",
      conv_from_winners);
  m.def(
      "scale_min_from_winners(Tensor input, float scale, str forward, str[] backward, Tensor? scales=None) -> (Tensor, Tensor)",
      scale_min_from_winners);
}

}  // namespace fused_kernels
