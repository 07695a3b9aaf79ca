"""The rungs made of PyTorch's own operations: its convolution, then scale and min.

``reference`` does what :class:`fused_kernels.Model` does. ``composite`` runs the convolution in the layout that the library's
tensor cores want, and takes the minimum by a kernel of ours, on a GPU with the bias.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from . import choice, gradients, subclasses
from .candidates import copy_into_other_layout
from .choice import Decision
from .dispatch import attach_backward, is_transformed, operator, rules_without_python, run, wants_gradient
from .problem import cudnn_precision, describe_problem, winners_dtype
from .rungs import COPY, first_available, rungs, why_unavailable


def compute(decision, input, weight, bias, scale, scales=None, return_indices=False):
    """Convolve with torch's library, in the layout that its tensor cores want, then scale and take the minimum.

    PyTorch adds a bias in a pass of its own over the convolution's output on a GPU; here the minimum's kernel does. Where a
    gradient will be needed, it comes from the winners, as a fused kernel's does, and the convolution's output is not kept.

    Parameters
    ----------
    decision : Decision
        What was decided for these arguments.
    input, weight, bias, scale, return_indices
        As for :func:`fused_kernels.conv2d_scale_min`.
    scales : Tensor, optional
        Each channel's factor, in place of the scale.
    """
    problem, args = decision.problem, (input, weight, bias, scale)
    if not has_scale_min(problem.device, problem.dtype):
        return compute_by_library(problem, *args, scales, return_indices)
    wanted = wants_gradient(input, weight, bias, scales)
    if not wanted and not return_indices:
        return _convolve_then_minimum(decision, *args, scales)
    backward = None
    if wanted and not torch.compiler.is_compiling():
        backward = decision.backward
    if torch.compiler.is_compiling() or (wanted and rules_without_python(input, backward) is None):
        output, winners = run("composite_winners", *args, *problem.conv, *_given(scales))
    else:
        output, winners = compute_winners(decision, *args, scales)
        if wanted:
            args = *args, *problem.conv, *_given(scales)
            output, winners = attach_backward("composite_winners", args, backward, (output, winners))
    return (output, winners.long()) if return_indices else output


def _given(scales):
    """Give what to add to an operator's arguments: to leave out what there is not costs least."""
    return () if scales is None else (scales,)


def compute_output(decision, input, weight, bias, scale, scales=None):
    """Do the same without a gradient."""
    with torch.no_grad():
        return compute(decision, input, weight, bias, scale, scales)


def compute_winners(decision, input, weight, bias, scale, scales=None):
    """Do the same without a gradient, and give each pixel's winner."""
    with torch.no_grad():
        if has_scale_min(input.device, input.dtype):
            return _convolve_then_minimum(decision, input, weight, bias, scale, scales, suffix="_winners")
        return _winners_by_library(decision.problem, input, weight, bias, scale, scales)


def candidate_calls(problem, names, args, suffix=""):
    """Make the calls of candidates, without a gradient: name -> callable.

    Parameters
    ----------
    problem : Problem
    names : sequence of str
        Fused rungs; "composite", the library's convolution as the input lies, or "copied", with a copy before it.
    args : tuple
        Input, weight, bias, scale, and the scales if there are any.
    suffix : str
        "" or "_winners".
    """
    copy = copy_into_other_layout(problem, can_copy(*args[:2]))
    compute = compute_winners if suffix else compute_output
    calls = {}
    for name in names:
        if name in ("composite", "copied"):
            copies = (copy, copy) if name == "copied" else (None, None)
            calls[name] = functools.partial(compute, Decision(problem, "composite", "", copies=copies), *args)
        elif name in rungs:
            calls[name] = functools.partial(run, name + suffix, *args[:4], *problem.conv, *args[4:])
    return calls


def compute_by_library(problem, input, weight, bias, scale, scales=None, return_indices=False):
    """Do the same by PyTorch's own operations alone."""
    convolved = library_conv(problem, input, weight, bias)
    minimum = reference_scale_min(convolved, scale, scales, return_indices)
    if not _is_wider(bias, input):
        return minimum
    return (minimum[0].to(input.dtype), minimum[1]) if return_indices else minimum.to(input.dtype)


def _winners_by_library(problem, input, weight, bias, scale, scales=None):
    """Do the same and give each pixel's winner."""
    minimum, winners = compute_by_library(problem, input, weight, bias, scale, scales, return_indices=True)
    return minimum, winners.to(winners_dtype(weight.shape[0]))


def composite_operator(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales=None):
    """Do what :func:`compute` does; the implementation of the operator ``composite``."""
    conv = stride, padding, dilation, groups, precision
    if subclasses.know_only_aten(input, weight, bias, scales):
        return reference_operator(input, weight, bias, scale, *conv, scales)
    return compute(_by_name(input, weight, bias, conv), input, weight, bias, scale, scales)


def composite_winners_operator(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales=None):
    """Do the same and give each pixel's winner, with no gradient; the implementation of ``composite_winners``."""
    decision = _by_name(input, weight, bias, (stride, padding, dilation, groups, precision))
    return compute_winners(decision, input, weight, bias, scale, scales)


def reference_operator(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales=None):
    """Do what :class:`fused_kernels.Model` does, one of PyTorch's operations after the other."""
    return by_library(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales)


def _by_name(input, weight, bias, conv):
    """Decide how the composite runs, for whom it was asked for by name; a compiler writes copies of its own."""
    is_symbolic = any(type(size) is not int for size in (*input.shape, *weight.shape))
    if torch.compiler.is_compiling() or is_symbolic or not has_scale_min(input.device, input.dtype):
        return Decision(describe_problem(input, weight.shape, *conv), "composite", "asked for by name")
    return choice.decide_checked(input, weight, bias, *conv)


def scale_min_for(device, dtype):
    """Name the kernel of ours that takes the minimum of such tensors, or None."""
    return None if is_transformed() else first_available(choice.SCALE_MIN.get(device.type, ()), device.index, dtype)


def has_scale_min(device, dtype):
    """Tell whether there is one."""
    return scale_min_for(device, dtype) is not None


def has_backward(device, dtype):
    """Tell whether the kernels of the backward pass can be had: those are compiled, none is Triton's."""
    names = choice.SCALE_MIN.get(device.type, ())[:1]
    return bool(names) and not is_transformed() and not why_unavailable(names[0], device.index, dtype)


def reference_scale_min(input, scale, scales=None, return_indices=False):
    """Scale and take the minimum by PyTorch's own operations."""
    # 16-bit times float32 is float32 here.
    scaled = input * scale if scales is None else input * scales.view(-1, 1, 1)
    minimum, winners = torch.min(scaled, dim=1, keepdim=True)
    if scales is not None:
        minimum = minimum.to(input.dtype)
    return (minimum, winners) if return_indices else minimum


def reference_winners(input, scale, scales=None):
    """Do the same, with the channels as operators give them that keep winners."""
    minimum, winners = reference_scale_min(input, scale, scales, return_indices=True)
    return minimum, winners.to(winners_dtype(input.shape[1]))


def reference_bias_winners(input, bias, scale, early, scales=None):
    """Do the same after a number is added for each channel."""
    minimum, winners = reference_winners(input + bias.view(-1, 1, 1), scale, scales)
    return minimum.to(input.dtype), winners


def by_library(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales=None):
    """Do what an operator of a fused convolution does by PyTorch's own operations."""
    problem = describe_problem(input, weight.shape, stride, padding, dilation, groups, precision)
    return compute_by_library(problem, input, weight, bias, scale, scales)


def winners_by_library(input, weight, bias, scale, stride, padding, dilation, groups, precision, scales=None):
    """Do the same and give each pixel's winner."""
    problem = describe_problem(input, weight.shape, stride, padding, dilation, groups, precision)
    return _winners_by_library(problem, input, weight, bias, scale, scales)


def _convolve_then_minimum(decision, input, weight, bias, scale, scales, suffix=""):
    problem, copy, dtype = decision.problem, None, input.dtype
    if decision.copies and any(decision.copies):
        copy = decision.copies[can_copy(input, weight)]
    if copy:
        problem, input, weight = copied(problem, copy, input, weight)
    if bias is None or not _adds_bias(input):
        args = library_conv(problem, input, weight, bias), scale, *_given(scales)
        minimum = run(scale_min_for(input.device, dtype) + suffix, *args)
        if not _is_wider(bias, input):
            return minimum
        return (minimum[0].to(dtype), minimum[1]) if suffix else minimum.to(dtype)
    output = library_conv(problem, input, weight, None)
    if bias.dtype != output.dtype and not _is_wider(bias, input):
        bias = bias.to(output.dtype)  # under autocast a convolution casts its arguments
    name, early = _adding_bias(scale_min_for(input.device, dtype)) + suffix, _minimum_is_early(problem, copy)
    return run(name, output, bias, scale, early, *_given(scales))


def _is_wider(bias, input):
    """Tell whether a bias is float32 beside 16-bit tensors: PyTorch's own convolution takes none such."""
    return bias is not None and bias.dtype == torch.float32 and input.dtype.itemsize == 2


def _minimum_is_early(problem, copy):
    # Beginning early costs a little after the library's 16-bit matrix products, unless the copy before began early as well.
    return problem.dtype == torch.float32 or problem.taps > 1 or (copy is not None and copy.early)


class Steps(NamedTuple):
    """How the composite runs, as integers: csrc/autograd/auto.cpp follows them without Python."""

    copy: int  # 0: none; 1: by to_channels_last; PyTorch's own, 2: contiguous, 3: channels_last
    copies_weight: bool
    skips_unread: bool
    copy_early: bool
    library_precision: int  # -1: what the setting says; 0: "ieee", 1: "tf32"
    adds_bias: bool
    minimum_early: bool


COPY_BY_KERNEL = 1


def steps(decision, input, weight, bias):
    """Give the steps for these arguments, where no gradient is wanted, and the operator that takes the minimum.

    None where a wider bias has to be added in between.
    """
    if _is_wider(bias, input) and not _adds_bias(input):
        return None
    problem, copy = decision.problem, decision.copies[can_copy(input, weight)]
    kind = 0
    if copy:
        kind = COPY_BY_KERNEL if copy.by_kernel else 2 if copy.memory_format == torch.contiguous_format else 3
    with torch.no_grad():
        precision = -1 if _can_follow_setting(problem) else int(problem.precision == "tf32")
    adds_bias = bias is not None and _adds_bias(input)
    copied = (copy.copies_weight, copy.skips_unread, copy.early) if copy else (False, False, False)
    name = scale_min_for(input.device, input.dtype)
    name = _adding_bias(name) if adds_bias else name
    return Steps(kind, *copied, precision, adds_bias, _minimum_is_early(problem, copy)), name


def copied(problem, copy, input, weight):
    """Copy input and weights as was chosen; give them, and the problem that is left."""
    if not copy.by_kernel:
        formatted = {"memory_format": copy.memory_format}
        return problem, input.contiguous(**formatted), weight.contiguous(**formatted)
    if copy.skips_unread:
        vertical, horizontal = problem.stride
        input, problem = input[:, :, ::vertical, ::horizontal], problem._replace(stride=(1, 1))
    copies = operator(COPY.name, input.dtype)
    input, *rest = copies(input, weight if copy.copies_weight else None, copy.early)
    return problem, input, *(rest or [weight])


def can_copy(input, weight):
    """Tell whether to_channels_last runs here, where no gradient is wanted; the compiler writes a copy of its own."""
    if torch.compiler.is_compiling() or is_transformed() or not weight.is_contiguous():
        return False
    return not why_unavailable(COPY.name, input.device.index, input.dtype)


def _adding_bias(name):
    """Name the operator of the same rung that adds a bias on its way."""
    return "scale_min_bias_triton" if name == "scale_min_triton" else "scale_min_bias"


def _adds_bias(input):
    """Tell whether there is a kernel that takes the minimum and adds the bias on its way."""
    return input.is_cuda


def library_conv(problem, input, weight, bias):
    """Convolve with torch's library at the problem's precision; with a wider bias, which is added after it, in float32."""
    if _is_wider(bias, input):
        return library_conv(problem, input, weight, None) + bias.view(-1, 1, 1)
    (top, bottom, left, right) = problem.padding
    if (top, left) != (bottom, right):
        input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
    geometry = (problem.stride, (top, left), problem.dilation, problem.groups)
    if _can_follow_setting(problem):
        return F.conv2d(input, weight, bias, *geometry)
    convolve = torch.ops.fused_kernels.library_conv2d.default
    if subclasses.know_only_aten(input, weight, bias):
        convolve = gradients.LibraryConv2d.apply
    return convolve(input, weight, bias, *geometry, problem.precision == "tf32")


def _can_follow_setting(problem):
    """Tell whether the setting, which torch's own function reads, is right now and when a gradient reads it later."""
    if problem.follows_setting or problem.dtype != torch.float32 or problem.device.type != "cuda":
        return True
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return problem.precision == cudnn_precision()


def library_conv2d(input, weight, bias, stride, padding, dilation, groups, tf32):
    """Convolve with cuDNN at a precision that is an argument, not the global setting that torch's functions read."""
    flags = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled)
    return torch.ops.aten._convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups, *flags, tf32)
