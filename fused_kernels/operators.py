"""The operators: schemas, output shapes and registration for torch; each builds its library on its first call."""

import functools
import hashlib
import importlib
import linecache
import os
import subprocess
import sys
import threading
import types
from dataclasses import replace

import torch
from torch.nn import functional as F

from . import arguments, build, choice, composite, dispatch, flops, gradients, jobs, plans, progress, registry
from .problem import winners_dtype
from .rungs import BACKWARD, COPY, INSTEAD, LADDER, note_unavailable, rungs

_CONV = "int[2] stride, int[4] padding, int[2] dilation, int groups, str precision"
_FROM_WINNERS = "Tensor grad, Tensor winners"

# Each channel's factor, in place of a scale that is 1 then; in float32, or float64 for float64.
_SCALES = ", Tensor? scales=None"

# By the kind of operator: a rung's, or a step's of others.
SCHEMAS = {
    "scale_min": f"(Tensor input, float scale{_SCALES}) -> Tensor",
    "scale_min_bias": f"(Tensor input, Tensor bias, float scale, bool early{_SCALES}) -> Tensor",
    "conv2d_scale_min": f"(Tensor input, Tensor weight, Tensor? bias, float scale, {_CONV}{_SCALES}) -> Tensor",
    "to_channels_last": "(Tensor input, Tensor? weight, bool early) -> Tensor[]",
    "library_conv2d": "(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "bool tf32) -> Tensor",
    "scale_min_backward": f"({_FROM_WINNERS}, float scale, SymInt channels, bool channels_last) -> Tensor",
    "grad_input": f"({_FROM_WINNERS}, Tensor weight, float scale, SymInt[2] input_size, {_CONV}, bool channels_last) -> Tensor",
    "grad_weight": f"({_FROM_WINNERS}, Tensor input, float scale, SymInt out_channels, SymInt[2] kernel_size, {_CONV}) "
    "-> (Tensor, Tensor)",
    "grad_bias": f"({_FROM_WINNERS}, float scale, SymInt out_channels) -> Tensor",
}
# Each forward operator has a twin that gives winners as well.
FORWARD = ("scale_min", "scale_min_bias", "conv2d_scale_min")
SCHEMAS |= {f"{kind}_winners": SCHEMAS[kind].replace("-> Tensor", "-> (Tensor, Tensor)") for kind in FORWARD}

_load_locks = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_load_locks.clear)


def edit(name, source):
    """Make a rung of your own out of another one: the same operator with your kernel's text.

    Parameters
    ----------
    name : str
        The rung to start from; the source must keep its name and signature.
    source : str
        The whole text, such as ``rungs[name].source`` with a few lines changed.

    Returns
    -------
    Rung
        Callable as any other; it is compiled on the first call.

    Raises
    ------
    ValueError
        No rung of that name has a source.
    """
    editable = [rung.name for rung in LADDER if rung.device]
    if name not in editable:
        raise ValueError(f"name: expected a rung with a source, one of {', '.join(editable)}, got {name!r}")
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    rung = replace(rungs[name], edited_source=source, namespace=f"fused_kernels_edit_{digest}")
    define(rung)
    flops.count()
    return rung


def load():
    """Build and load every rung that can run here now, for all dtypes, several at a time.

    Otherwise each is built on its first call, for that call's dtype.

    What training needs in addition (the same sources compiled to give winners, the backward kernels, and what calls them) is
    still built when it is first called.

    Returns
    -------
    list of str
        The names of the rungs that are ready.

    Raises
    ------
    RuntimeError
        A compiler failed; the message holds what it said.
    """
    ready = [rung for rung in (*LADDER, COPY) if not rung.why_unavailable()]
    if any(rung.device == "cuda" for rung in ready):
        plans.why_unavailable()  # the choice asks it, and this builds it
    libraries = [(rung, overload) for rung in ready if rung.device for overload in rung.overloads]
    # Those that take longest first, and whole: there are more libraries than cores.
    libraries.sort(key=lambda library: library[0].only_capability is None)
    jobs.map_all(lambda library: _load(library[0], library[0].name, library[1], at_once=1), libraries, os.cpu_count())
    return [rung.name for rung in ready if rung is not COPY]


# ---- output shapes ----


def _scale_min_fake(input, scale, scales=None):
    return input.new_empty((input.shape[0], 1, *input.shape[2:]))


def _scale_min_bias_fake(input, bias, scale, early, scales=None):
    return _scale_min_fake(input, scale)


def _conv2d_scale_min_fake(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales=None):
    size = arguments.output_size(input.shape, weight.shape, stride, padding, dilation)
    return input.new_empty((input.shape[0], 1, *size))


def _with_winners(fake, channels):
    """Make the rule of the twin that gives winners; ``channels``: how many compete."""

    def rule(*args):
        output = fake(*args)
        return output, output.new_empty(output.shape, dtype=winners_dtype(channels(*args)))

    return rule


def _copy_fake(input, weight, early):
    return [torch.empty_like(t, memory_format=torch.channels_last) for t in (input, weight) if t is not None]


def _library_conv2d_fake(*args):
    return F.conv2d(*args[:-1])


def _scale_min_backward_fake(grad, winners, scale, channels, channels_last):
    images, _, height, width = grad.shape
    return _new(grad, (images, channels, height, width), channels_last)


def _grad_input_fake(grad, winners, weight, scale, input_size, stride, padding, dilation, groups, precision, channels_last):
    return _new(weight, (grad.shape[0], weight.shape[1] * groups, *input_size), channels_last)


def _grad_weight_fake(grad, winners, input, scale, out_channels, kernel_size, stride, padding, dilation, groups, precision):
    return input.new_empty((out_channels, input.shape[1] // groups, *kernel_size)), input.new_empty((out_channels,))


def _grad_bias_fake(grad, winners, scale, out_channels):
    return grad.new_empty((out_channels,))


def _new(like, size, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


FAKES = {
    "scale_min": _scale_min_fake,
    "scale_min_winners": _with_winners(_scale_min_fake, lambda input, *_: input.shape[1]),
    "scale_min_bias": _scale_min_bias_fake,
    "scale_min_bias_winners": _with_winners(_scale_min_bias_fake, lambda input, *_: input.shape[1]),
    "conv2d_scale_min": _conv2d_scale_min_fake,
    "conv2d_scale_min_winners": _with_winners(_conv2d_scale_min_fake, lambda _, weight, *__: weight.shape[0]),
    "to_channels_last": _copy_fake,
    "library_conv2d": _library_conv2d_fake,
    "scale_min_backward": _scale_min_backward_fake,
    "grad_input": _grad_input_fake,
    "grad_weight": _grad_weight_fake,
    "grad_bias": _grad_bias_fake,
}


# ---- registration ----


def define(rung):
    """Register a rung's operators: schema, output shape, gradient, and an implementation that builds itself on first call."""
    if rung.device is None:

        def fill(library):
            library.define(rung.name + SCHEMAS[rung.operator])
            library.impl(rung.name, _FUNCTIONS[rung.name], "CompositeImplicitAutograd")

        # Not by its kind: it is made of operators that count by themselves.
        registry.register(rung.namespace, rung.name, "composite", fill)
        return
    if rung.in_triton:
        _define_triton(rung, rung.name, rung.operator)
        if rung.has_winners:
            _define_triton(rung, f"{rung.name}_winners", f"{rung.operator}_winners", winners=True)
        return
    _define_built(rung, rung.name, rung.operator)
    if rung.has_winners:
        _define_built(rung, f"{rung.name}_winners", f"{rung.operator}_winners", winners=True)


def _define_built(rung, name, kind, winners=False):
    """Register an operator of a rung's libraries, or of those that are compiled to give winners.

    Each dtype has a library and an overload of its own. The operator itself is Python and calls those; it is the only one where
    an edited source takes all dtypes in one library.
    """
    _define_implementation(rung, name, kind, winners, None)
    for overload in rung.overloads:
        if overload is not None:
            _define_implementation(rung, name, kind, winners, overload)
            if rung.edited_source is None:
                make = functools.partial(_make, rung, overload, winners)
                dispatch.makers[name, getattr(torch, overload)] = make


def _define_implementation(rung, name, kind, winners, overload):
    qualified = f"{name}.{overload}" if overload else name
    available_on = set()

    def load(device, dtype):
        """Load what takes such tensors; give the overload that has an implementation now."""
        if device.type != rung.device:
            raise RuntimeError(f"input: {name} expected a {rung.device} tensor, got one on {device}")
        wanted = overload
        if overload is None and rung.overloads != (None,):
            wanted = dispatch.OVERLOADS.get(dtype)
            if wanted not in rung.overloads:
                raise RuntimeError(f"input: expected {' or '.join(rung.overloads)} for {name}, got {dtype}")
        if (device, dtype) not in available_on:
            # To find the compilers takes longer than a small kernel; what is missing may be there at the next call.
            if missing := rung.why_unavailable(device.index, dtype):
                raise build.UnavailableError(f"{name} cannot run here: {missing}")
            available_on.add((device, dtype))
        try:
            return _load(rung, name, wanted, winners)
        except build.UnavailableError as error:
            available_on.clear()
            note_unavailable(rung, wanted, str(error))
            raise

    def stand_in(*args):
        """Take the operator's place until it is called, then build; once loaded, its own key goes first."""
        try:
            found = load(args[0].device, args[0].dtype)
        except build.UnavailableError as error:
            if rung.edited_source is not None:
                raise
            # Not an error of whoever called: the choice was made before this could be known.
            progress.warn_once("kernels", f"{INSTEAD}: {error}")
            return _by_library(kind, args)
        return getattr(getattr(getattr(torch.ops, rung.namespace), name), found)(*args)

    if overload is None:
        dispatch.loaders[rung.namespace, name] = load
    _register_python(rung.namespace, qualified, kind, stand_in, "CompositeExplicitAutograd", rung.takes_scales)


def _define_triton(rung, name, kind, winners=False, arguments_of=lambda *args: (args, {})):
    """Register an operator of a rung in Triton: a function of its module, which compiles when it is called.

    ``arguments_of``: gives the function's positional and named arguments from the operator's.
    """
    loaded = {}

    def load(device, dtype):
        """Give the module, which has been found to run such tensors before or does now."""
        if (device, dtype) in loaded:
            return loaded[device, dtype]
        if device.type != rung.device:
            raise RuntimeError(f"input: {name} expected a {rung.device} tensor, got one on {device}")
        if dtype not in rung.dtypes:
            taken = " or ".join(str(one).removeprefix("torch.") for one in rung.dtypes)
            raise RuntimeError(f"input: expected {taken} for {name}, got {dtype}")
        if missing := rung.why_unavailable(device.index):
            raise build.UnavailableError(f"{name} cannot run here: {missing}")
        loaded[device, dtype] = triton_module(rung)
        return loaded[device, dtype]

    def implementation(*args):
        try:
            module = load(args[0].device, args[0].dtype)
            positional, named = arguments_of(*args)
            output, won = module.compute(*positional, winners=winners, **named)
        except (build.UnavailableError, OSError, ImportError, subprocess.SubprocessError) as error:
            # Such as a folder that cannot be written, for what Triton compiles, or a C compiler that fails.
            if rung.edited_source is not None:
                raise
            loaded.clear()
            note_unavailable(rung, None, str(error))
            progress.warn_once("kernels", f"{INSTEAD}: {error}")
            return _by_library(kind, args)
        return (output, won) if winners else output

    dispatch.loaders[rung.namespace, name] = load
    # An overload for each dtype, as the others have: who calls without Python names it.
    for qualified in (name, *(f"{name}.{dispatch.OVERLOADS[dtype]}" for dtype in rung.dtypes)):
        _register_python(rung.namespace, qualified, kind, implementation, "CompositeExplicitAutograd", rung.takes_scales)


def triton_module(rung):
    """Import the module of a rung in Triton, or make one of an edited source."""
    if rung.edited_source is None:
        return importlib.import_module(f".triton_kernels.{rung.name}", __package__)
    name = f"{__package__}.triton_kernels.{rung.namespace.removeprefix('fused_kernels_')}"
    with _load_locks.setdefault(name, threading.Lock()):
        if name in sys.modules:
            return sys.modules[name]
        module = types.ModuleType(name)
        module.__package__, module.__file__ = f"{__package__}.triton_kernels", f"<{rung.name}, {rung.namespace}>"
        # Triton compiles the text that it finds here.
        lines = rung.source.splitlines(keepends=True)
        linecache.cache[module.__file__] = len(rung.source), None, lines, module.__file__
        sys.modules[name] = module
        try:
            exec(compile(rung.source, module.__file__, "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _register_python(namespace, name, kind, function, key, takes_scales=True):
    """Register an operator whose implementation is Python."""

    def fill(library):
        define_rules(library, name, kind, takes_scales=takes_scales)
        library.impl(name, function, key)

    registry.register(namespace, name, kind, fill)


def _by_library(kind, args):
    """Do what an operator does by PyTorch's own operations; the results lie in memory as the operator's would."""
    with torch._C._DisableAutocast():
        found, outputs = _BY_LIBRARY[kind](*args), FAKES[kind](*args)
    for output, values in zip(*((outputs, found) if isinstance(outputs, (tuple, list)) else ([outputs], [found])), strict=True):
        output.copy_(values)
    return outputs


_BY_LIBRARY = {
    **gradients.BY_LIBRARY,
    "scale_min": composite.reference_scale_min,
    "scale_min_winners": composite.reference_winners,
    "scale_min_bias": lambda *args: composite.reference_bias_winners(*args)[0],
    "scale_min_bias_winners": composite.reference_bias_winners,
    "conv2d_scale_min": composite.by_library,
    "conv2d_scale_min_winners": composite.winners_by_library,
    "to_channels_last": lambda input, weight, early: [tensor for tensor in (input, weight) if tensor is not None],
}


def _make(rung, overload, winners):
    """Build a library in the background."""
    if not rung.why_unavailable():
        build.make(**rung.library(overload, winners), quiet=True)


def define_rules(library, name, kind, tags=(), has_gradient=True, takes_scales=True):
    """Register an operator without an implementation: its schema, its output's shape, and its gradient if it has one."""
    library.define(name + (SCHEMAS[kind] if takes_scales else SCHEMAS[kind].replace(_SCALES, "")), tags=tags)
    torch.library.register_fake(f"{library.ns}::{name}", FAKES[kind], lib=library)
    if has_gradient and kind in gradients.RULES:
        backward, setup = gradients.RULES[kind]
        torch.library.register_autograd(f"{library.ns}::{name}", backward, setup_context=setup, lib=library)


def _load(rung, name, overload, winners=False, at_once=None):
    """Load the library of an overload of an operator; give the name of what has an implementation now.

    That is the overload, or "default" where an edited source registers the operator itself.
    """

    def implemented():
        key = rung.device.upper()
        for candidate in (overload, "default"):
            qualified = f"{name}.{candidate}" if candidate != "default" else name
            if candidate and torch._C._dispatch_has_kernel_for_dispatch_key(f"{rung.namespace}::{qualified}", key):
                return candidate
        return None

    with _load_locks.setdefault((rung.namespace, rung.name, overload, winners), threading.Lock()):
        if not implemented():
            rung.load(winners=winners, overloads=[overload], at_once=at_once)
        if not (found := implemented()):
            raise RuntimeError(f"{rung.name}: the source registers no {rung.device.upper()} implementation of {name}")
    return found


# The rungs made of PyTorch's own operations: gradients, shapes and devices come from those.
_FUNCTIONS = {"reference": composite.reference_operator, "composite": composite.composite_operator}


def _define_all():
    for rung in (*LADDER, COPY, *BACKWARD):
        define(rung)

    # The second operators of scale_min_vectorized's libraries: the minimum over the channels of (x + bias) * scale. If `early`
    # they may begin, where small, while the kernel before them ends. Only the composite calls them, below its own gradient.
    with_bias = rungs["scale_min_vectorized"]
    _define_built(with_bias, "scale_min_bias", "scale_min_bias")
    _define_built(with_bias, "scale_min_bias_winners", "scale_min_bias_winners", winners=True)

    # The same of scale_min_triton, to which early is nothing.
    def with_bias_in_triton(input, bias, scale, early, scales=None):
        return (input, scale, scales), {"bias": bias}

    for suffix in ("", "_winners"):
        names = f"scale_min_bias_triton{suffix}", f"scale_min_bias{suffix}"
        _define_triton(rungs["scale_min_triton"], *names, bool(suffix), with_bias_in_triton)

    # A library that makes the gradient of weights also makes that of a bias alone.
    for rung in BACKWARD:
        name = rung.name.replace("weight", "bias")
        if rung.operator == "grad_weight" and name in choice.GRAD_BIAS.values():
            _define_built(rung, name, "grad_bias")

    # These two are Python themselves.
    of_composite = "composite_winners", "conv2d_scale_min_winners", composite.composite_winners_operator
    _register_python(build.NAMESPACE, *of_composite, "CompositeExplicitAutograd")
    _register_python(build.NAMESPACE, "library_conv2d", "library_conv2d", composite.library_conv2d, "CUDA")


_define_all()
