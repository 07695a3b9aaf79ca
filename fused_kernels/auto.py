"""The operators that choose when they are called: all that a compiled, exported or traced program holds of this package.

Such a program may run on other sizes than it was traced with, or on another device. So its operators name no rung and no
device, and nothing that the choice depends on becomes a condition of the program. Each operator's shapes follow from its
arguments' shapes; how a gradient lies in memory is an argument, fixed while tracing.

Of a convolution, torch.export records an operator that looks at autocast when it is called, and calls the one that chooses.

Below autograd there are two forward operators, with winners and without. Which of them is called depends on whether a gradient
will be needed; only a kernel at autograd's own key can tell. A program that is exported is recorded above that key.
"""

import functools

import torch

from . import arguments, build, choice, composite, dispatch, flops, gradients, registry, subclasses, trials
from .composite import has_backward, has_scale_min, scale_min_for
from .dispatch import is_jit_tracing, is_transformed, operator, run, wants_gradient
from .operators import SCHEMAS, define_rules
from .problem import make_problem
from .rungs import COPY
from .subclasses import PLAIN

_is_jit_tracing = torch._C._is_tracing


def is_tracing(input, weight=None, bias=None, scale=None):
    """Tell whether a call becomes part of a program, or one of the tensors is a subclass: then nothing is chosen yet.

    The programs are torch.compile's, torch.export's and torch.jit.trace's; to an operator that chooses when it is called, a
    subclass such as DTensor hands over what it holds.
    """
    if torch.compiler.is_compiling() or _is_jit_tracing():
        return True
    # Of each by itself: this takes a third of the time that a loop does.
    if type(input) in PLAIN and type(weight) in PLAIN and type(bias) in PLAIN and type(scale) in PLAIN:
        return False
    return subclasses.take_over(input, weight, bias, scale)


def untraced(check, *args):
    """Call a check outside of torch.jit's trace, which would warn of every comparison of sizes."""
    if torch.compiler.is_compiling():
        return check(*args)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return check(*args)
    finally:
        torch._C._set_tracing_state(state)


def trace(name, args, return_indices, suffix="_auto"):
    """Put a call into the program that is being traced."""
    if return_indices:
        output, winners = _operator(f"{name}_winners{suffix}")(*args)
        return output, winners.long()
    return _operator(name + suffix)(*args)


def is_better_traced_by_library(*tensors):
    """Tell whether to call PyTorch's own operations: a compiler fuses them, where there is no kernel; a subclass knows them."""
    if is_transformed():
        return True
    if not all(type(tensor) in PLAIN for tensor in tensors):
        # Below Dynamo the operator looks itself.
        return subclasses.know_only_aten(*tensors)
    return not (is_exporting() or is_jit_tracing() or has_scale_min(tensors[0].device, tensors[0].dtype))


def is_exporting():
    """Tell whether torch.export is tracing."""
    # NOTE: while Dynamo traces, torch 2.11's own function of this name says True always; the flag itself is right.
    return torch.compiler._is_exporting_flag


# Called by Dynamo, which cannot trace it.
is_exporting._dynamo_marked_constant = True


# ---- choices: an operator's name, the precision that "auto" means, and whether that holds from now on ----

# What is PyTorch's own, at least in part, and Python: not a rung's.
IN_PYTHON = "in_python"


def _choose_scale_min(input, scale, scales=None):
    arguments.check_input(input)
    return scale_min_for(input.device, input.dtype) or IN_PYTHON, "", True


def _decide(input, weight, bias, scale, *rest, winners):
    """Decide on what an operator was given: after the geometry and the precision the scales, if there are any."""
    decision = choice.decide_checked(input, weight, bias, *rest[:5])
    return trials.settle(decision, (input, weight, bias, scale, *rest[5:]), winners) if trials.are_asked_for() else decision


def _choose_conv2d_scale_min(*args):
    return _choose_forward(False, *args)


def _choose_conv2d_scale_min_winners(*args):
    return _choose_forward(True, *args)


def _choose_forward(winners, *args):
    decision = _decide(*args, winners=winners)
    name = IN_PYTHON if decision.rung == "composite" else decision.rung
    return name, decision.problem.precision, not trials.is_open(decision, (*args[:4], *args[9:]), winners)


def _choose_scale_min_backward(grad, *args):
    return choice.SCALE_MIN_BACKWARD[grad.device.type] if has_backward(grad.device, grad.dtype) else IN_PYTHON, "", True


def _choose_grad_bias(grad, *args):
    return choice.GRAD_BIAS[grad.device.type] if has_backward(grad.device, grad.dtype) else IN_PYTHON, "", True


def _choose_grad_input(grad, winners, weight, scale, input_size, *args):
    *conv, channels_last = args
    shape = (grad.shape[0], weight.shape[1] * conv[3], *input_size)
    problem = _problem(weight, shape, _strides(shape, channels_last), weight.shape, *conv)
    return _choose_gradient(
        "grad_input", problem, (grad, winners, weight, scale, input_size, *conv[:-1], problem.precision, channels_last)
    )


def _choose_grad_weight(grad, winners, input, scale, out_channels, kernel_size, *conv):
    weight_shape = (out_channels, input.shape[1] // conv[3], *kernel_size)
    problem = _problem(input, input.shape, input.stride(), weight_shape, *conv)
    return _choose_gradient(
        "grad_weight", problem, (grad, winners, input, scale, out_channels, kernel_size, *conv[:-1], problem.precision)
    )


def _choose_gradient(kind, problem, args):
    if not has_backward(problem.device, problem.dtype):
        return IN_PYTHON, problem.precision, True
    if trials.are_asked_for():
        name = trials.settle_gradient(kind, problem, args)
    else:
        name = choice.choose_gradient(kind, problem, choice.read_hardware(problem.device))
    return name, problem.precision, not trials.is_gradient_open(kind, problem, args, name)


def _problem(like, shape, strides, weight_shape, stride, padding, dilation, groups, precision):
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    size = arguments.output_size(shape, weight_shape, *geometry)
    return make_problem(shape, strides, like.dtype, like.device, weight_shape, geometry, size, precision)


def _strides(shape, channels_last):
    _, channels, height, width = shape
    if channels_last:
        return channels * height * width, 1, width * channels, channels
    return channels * height * width, height * width, width, 1


_CHOOSE = {
    "scale_min": _choose_scale_min,
    "scale_min_winners": _choose_scale_min,
    "conv2d_scale_min": _choose_conv2d_scale_min,
    "conv2d_scale_min_winners": _choose_conv2d_scale_min_winners,
    "scale_min_backward": _choose_scale_min_backward,
    "grad_input": _choose_grad_input,
    "grad_weight": _choose_grad_weight,
    "grad_bias": _choose_grad_bias,
}


# ---- what is Python when it is called ----


def _conv2d_scale_min(*args):
    return composite.compute_output(_decide(*args, winners=False), *args[:4], *args[9:])


def _conv2d_scale_min_winners(*args):
    return composite.compute_winners(_decide(*args, winners=True), *args[:4], *args[9:])


def _laid_out(function):
    """Lay a gradient out as the operator's last argument says."""

    def implementation(*args):
        layout = torch.channels_last if args[-1] else torch.contiguous_format
        return function(*args).contiguous(memory_format=layout)

    return implementation


_IN_PYTHON = {
    **gradients.BY_LIBRARY,
    "scale_min_backward": _laid_out(gradients.library_scale_min_backward),
    "grad_input": _laid_out(gradients.library_grad_input),
    "scale_min": composite.reference_scale_min,
    "scale_min_winners": composite.reference_winners,
    "conv2d_scale_min": _conv2d_scale_min,
    "conv2d_scale_min_winners": _conv2d_scale_min_winners,
}


def _call_chosen(kind):
    """Make an operator's implementation; csrc/autograd/auto.cpp does the same without Python, once it is built."""
    place = _place_of_precision(kind)

    def implementation(*args):
        # Takes over from the next call on, on a CPU and a GPU.
        dispatch.auto.is_loaded()
        name, precision, _ = _CHOOSE[kind](*args)
        # Arguments are of the dtype that is wanted by now.
        with torch._C._DisableAutocast():
            if name == IN_PYTHON:
                return _IN_PYTHON[kind](*args)
            if place is not None:
                args = (*args[:place], precision, *args[place + 1 :])
            return run(name + _suffix(kind), *args)

    return implementation


def _choose_for_dispatcher(kind):
    """Make what csrc/autograd/auto.cpp asks.

    It answers an operator's overload; the precision; of the composite its steps; and whether that holds for the same arguments
    from now on.
    """

    def implementation(*args):
        name, precision, holds = _CHOOSE[kind](*args)
        steps, suffix = (), _suffix(kind)
        if name == IN_PYTHON:
            found = None
            if kind.startswith("conv2d_scale_min") and has_scale_min(args[0].device, args[0].dtype):
                found = composite.steps(_decide(*args, winners=kind.endswith("_winners")), *args[:3])
            if found is None:
                # Python itself is the answer for as long as something else lasts, such as a transform.
                return f"{kind}_{IN_PYTHON}", precision, steps, False
            steps, name = found
        # What can't be had after all is not remembered: the next choice knows.
        needed = [name + suffix, *([COPY.name] if steps and steps.copy == composite.COPY_BY_KERNEL else [])]
        holds = holds and all(dispatch.is_had(one, args[0]) for one in needed)
        overload = operator(name + suffix, args[0].dtype)._overloadname
        name += suffix + ("" if overload == "default" else f".{overload}")
        return name, precision, [int(step) for step in steps], holds

    return implementation


def _suffix(kind):
    return "_winners" if kind.endswith("_winners") else ""


def _place_of_precision(kind):
    names = [argument.name for argument in _operator(f"{kind}_auto")._schema.arguments]
    return names.index("precision") if "precision" in names else None


# ---- with a gradient ----


# PyTorch's own operations, which have gradients of their own, and rules for transforms.
_BY_LIBRARY = {
    **gradients.BY_LIBRARY,
    "scale_min": composite.reference_scale_min,
    "scale_min_winners": composite.reference_winners,
    "conv2d_scale_min": composite.by_library,
    "conv2d_scale_min_winners": composite.winners_by_library,
}


def _by_winners(kind):
    """Make what a forward operator does where a gradient is wanted: the one that gives winners as well has a rule for it."""

    def function(*args):
        return _operator(f"{kind}_winners_auto")(*args)[0]

    return function


def _by_rule(kind):
    """Make what an operator with a rule does where a gradient is wanted."""
    backward, setup = gradients.RULES[kind]

    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = _operator(f"{kind}_auto")(*args)
        setup(ctx, args, output)
        return output

    rule = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{kind}_auto", (torch.autograd.Function,), rule).apply


def _at_autograd(kind):
    """Make what an operator does at autograd's key."""
    by_rule = _by_winners(kind) if f"{kind}_winners" in _CHOOSE else _by_rule(kind)

    def function(*args):
        wanted = wants_gradient(*args)
        by_library = is_transformed() or subclasses.know_only_aten(*args)
        if wanted and not by_library:
            # With DTensors each process calls the operators on its part, and looks then what there is.
            by_library = not has_scale_min(args[0].device, args[0].dtype) and not subclasses.take_over(*args)
        if by_library:
            with torch._C._DisableAutocast():
                return _BY_LIBRARY[kind](*args)
        if wanted:
            return by_rule(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(f"{kind}_auto")(*args)

    return function


# ---- under autocast ----


def _at_autocast(kind):
    """Make an operator's kernel at autocast's keys: a convolution before it may have been cast, its own weights not."""

    def kernel(input, weight, bias, *args):
        tensors = input, weight, bias
        if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
            tensors = arguments.autocast(*tensors)
        with torch._C._DisableAutocast():
            return _operator(f"{kind}_auto")(*tensors, *args)

    return kernel


def _cast_first(kind):
    """Make what torch.export records, as it records a conv2d: what is cast depends on where the program is called.

    To decompose the program leaves the operator above, which casts no more than a decomposed convolution.
    """
    chosen = _operator(f"{kind}_auto")

    def function(input, weight, bias, *args):
        return chosen(*arguments.autocast(input, weight, bias), *args)

    return function


# ---- registration ----


# NOTE: the second key is for vmap: without it, torch 2.11 runs a composite of Python's in a loop, and warns of that.
_COMPOSITE = "CompositeImplicitAutograd", "FuncTorchBatched"


def _operator(name):
    return getattr(torch.ops.fused_kernels, name).default


def _define(kind, library):
    """Register the operators of a kind."""
    schema, name, at_autograd = SCHEMAS[kind], f"{kind}_auto", _at_autograd(kind)
    # The tag: a compiler may hand over tensors with other strides than were traced; the kernels take any.
    define_rules(library, name, kind, tags=(torch.Tag.flexible_layout,), has_gradient=False)
    library.impl(name, _call_chosen(kind), "CompositeExplicitAutograd")
    library.impl(name, at_autograd, "Autograd")
    library.impl(name, at_autograd, "FuncTorchBatched")
    if kind.startswith("conv2d_scale_min"):
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, _at_autocast(kind), key)
        library.define(f"{kind}_autocast{schema}", tags=(torch.Tag.flexible_layout,))
        for key in ("AutocastCPU", "AutocastCUDA", *_COMPOSITE):
            library.impl(f"{kind}_autocast", _cast_first(kind), key)
    # What csrc/autograd/auto.cpp asks and calls.
    library.define(f"{name}_choice{schema.split(' -> ')[0]} -> (str, str, int[], bool)")
    library.impl(f"{name}_choice", _choose_for_dispatcher(kind), "CompositeExplicitAutograd")
    library.define(f"{name}_at_autograd{schema}")
    for key in _COMPOSITE:
        library.impl(f"{name}_at_autograd", at_autograd, key)
    library.define(f"{kind}_in_python{schema}")
    library.impl(f"{kind}_in_python", _IN_PYTHON[kind], "CompositeExplicitAutograd")


for _kind in _CHOOSE:
    registry.register(build.NAMESPACE, f"{_kind}_auto", _kind, functools.partial(_define, _kind))
flops.count()
