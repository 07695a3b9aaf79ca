"""The operators: schemas, shapes and gradients for torch, and the public functions that choose a rung."""

import concurrent.futures
import hashlib
import math
import os
import threading
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from . import arguments, build, gradients, reference
from .rungs import BACKWARD, COPY, LADDER, is_transformed, rungs

SCHEMAS = {
    "scale_min": "(Tensor input, float scale) -> Tensor",
    "conv2d_scale_min": "(Tensor input, Tensor weight, Tensor? bias, float scale, int[2] stride, int[4] padding, "
    "int[2] dilation, int groups, str precision) -> Tensor",
    **gradients.SCHEMAS,
}

# A Library takes its registrations back when it is collected.
_libraries = []
_load_locks = {}


def scale_min(input, scale, *, return_indices=False):
    """Multiply by a number and take the minimum over the channels, in one pass over the input.

    Equal to ``torch.min(input * scale, dim=1, keepdim=True).values``, NaN and infinities included; differentiable, any number
    of times. Where a gradient will be needed each pixel's winning channel is kept, a byte each up to 256 channels, and no more.

    Parameters
    ----------
    input : Tensor
        Shape (N, C, H, W), C at least 1, any strides; float32, float16, bfloat16 or float64; never modified.
    scale : float
        Any real Python number, negative and zero included. Under torch.compile each new value is compiled for anew.
    return_indices : bool
        Whether to give the winning channels, too, as :func:`torch.min` does. Of tied channels it may be any one, but the same
        one every time; where a channel is NaN, it is one that is NaN.

    Returns
    -------
    Tensor
        Shape (N, 1, H, W), contiguous, the input's dtype. 16-bit types are scaled in float32 and rounded once.
    Tensor
        The same shape, int64, only if ``return_indices``.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    arguments.check_input(input)
    scale = arguments.as_scale(scale)
    if not _has_scale_min(input):
        return _reference_scale_min(input, scale, return_indices)
    device = input.device.type
    return _run_forward(_SCALE_MIN[device], (gradients.SCALE_MIN_BACKWARD[device],), return_indices, input, scale)


def conv2d_scale_min(
    input,
    weight,
    bias=None,
    scale=1.0,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    precision="auto",
    return_indices=False,
):
    """Convolve, multiply by a number, take the minimum over the output channels.

    Equal to ``torch.min(conv2d(input, weight, bias, ...) * scale, dim=1, keepdim=True).values``; differentiable, any number of
    times. Where a gradient will be needed each pixel's winning channel is kept, a byte each up to 256 channels; the backward
    pass sums over the winners alone, and gives the same bits every time. A fused kernel runs where it can take the arguments
    and was measured to be faster (:func:`explain` says which), else the library's convolution followed by :func:`scale_min`.
    Under autocast the arguments are cast as PyTorch casts a convolution's.

    Parameters
    ----------
    input : Tensor
        Shape (N, C_in, H, W), any strides; float32, float16, bfloat16 or float64; never modified.
    weight : Tensor
        Shape (C_out, C_in / groups, kH, kW), the input's dtype and device.
    bias : Tensor, optional
        Shape (C_out,).
    scale : float
        Any real Python number. Under torch.compile each new value is compiled for anew.
    stride, padding, dilation, groups
        As for :func:`torch.nn.functional.conv2d`, "same" and "valid" included.
    precision : {"auto", "ieee", "tf32"}
        For float32: how exact the convolution must be, at any magnitude. "ieee": an rms error over the result no larger than
        a float32 convolution's. "tf32": operands of a 10-bit mantissa with float32 accumulation are allowed, with an rms
        error no larger than a TF32 convolution's. On tensor cores the operands are float16 times a power of two for each
        output channel and each part of the image, at "ieee" sums of two such numbers; where a part's values leave float16's
        range, the GPU reads it again and takes another power, without asking the processor. There small values may keep fewer
        digits beside much larger ones in the same rows of an image: ten thousand times as large at "ieee", a million times at
        "tf32"; and where they are so small that they count as zero, they give NaN with an infinite weight. "auto" follows
        ``torch.backends.cudnn``'s setting for convolutions at the call. The gradients keep the same promise. On a CPU, where
        3 x 3 filters of many channels share products between neighbouring pixels (Winograd), it holds as well; a small value
        keeps fewer digits up to two pixels beside a much larger one.
    return_indices : bool
        Whether to give the winning channels, too, as for :func:`scale_min`.

    Returns
    -------
    Tensor
        Shape (N, 1, H', W'), contiguous, the input's dtype.
    Tensor
        The same shape, int64, only if ``return_indices``.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    input, weight, bias = _autocast(input, weight, bias)
    scale = arguments.as_scale(scale)
    decision = _recall(input, weight, bias, stride, padding, dilation, groups, precision)
    if decision.rung == "composite" or _obstacle(decision.rung, input):
        return _composite(input, weight, bias, scale, *decision.geometry, precision, return_indices, decision.backward)
    args = input, weight, bias, scale, *decision.geometry, decision.precision
    return _run_forward(decision.rung, decision.backward, return_indices, *args)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: the rung that would run, at which precision, and why not a faster one.

    And the operators that would make the gradients of input and weights; none where PyTorch's own operations do.
    """

    rung: str
    precision: str
    why: str
    backward: tuple[str, ...] = ()

    def __str__(self):
        return f"{self.rung} at {self.precision}: {self.why}"


def explain(input, weight, bias=None, scale=1.0, *, stride=1, padding=0, dilation=1, groups=1, precision="auto"):
    """Say which rung :func:`conv2d_scale_min` would run for these arguments, at which precision, and why not a faster one.

    And which operators its backward pass would. Takes the same arguments, raises the same errors, computes nothing.

    Returns
    -------
    Explanation
    """
    input, weight, bias = _autocast(input, weight, bias)
    arguments.as_scale(scale)
    decision = _decide(input, weight, bias, stride, padding, dilation, groups, precision)
    name, why = decision.rung, decision.why
    if name != "composite" and (obstacle := _obstacle(name, input)):
        name, why = "composite", obstacle
    if name == "composite":
        inner = _SCALE_MIN.get(input.device.type)
        missing = _why_unavailable(inner, input.device.index) if inner else f"no kernel for {input.device.type} tensors"
        why = f"the library's convolution, then scale and min: {why}"
        why += f"; its scale and min: {inner}" if not missing else f"; its scale and min: PyTorch's own, because {missing}"
    dtype, backward = str(input.dtype).removeprefix("torch."), ()
    if name != "composite" or _has_scale_min(input):
        backward = decision.backward[:2]
    return Explanation(name, decision.precision if dtype == "float32" else dtype, why, backward)


# What runs where it can.
_SCALE_MIN = {"cpu": "scale_min", "cuda": "scale_min_vectorized"}
_CONV2D_SCALE_MIN = {"cpu": ("conv2d_scale_min",), "cuda": ("conv_wgmma_ieee", "conv_wgmma", "conv_mma", "conv_direct")}


class Decision(NamedTuple):
    """What the arguments' shapes, types and places alone decide: the geometry, the precision and the rung for them."""

    geometry: arguments.ConvArguments
    precision: str
    rung: str
    why: str
    backward: tuple[str, ...] = ()  # the operators of the backward pass; none while compiling, which chooses for itself


def _decide(input, weight, bias, stride, padding, dilation, groups, precision):
    """Check a fused convolution's arguments and choose a rung, or "composite"."""
    geometry = arguments.check_conv(input, weight, bias, stride, padding, dilation, groups)
    arguments.check_precision(precision)
    resolved = arguments.resolve_precision(input, precision)
    device = input.device.type
    if device == "cuda":
        rung, why = _choose_cuda(input, weight, geometry, resolved)
    elif device == "cpu":
        rung, why = _choose_cpu(input, weight, geometry)
    else:
        return Decision(geometry, resolved, "composite", f"no fused kernel for {device} tensors")
    if torch.compiler.is_compiling():
        return Decision(geometry, resolved, rung, why)
    return Decision(geometry, resolved, rung, why, gradients.choose(input, weight, (*geometry, resolved)))


# Decisions made, by all that they depend on: to make one takes as long as a small kernel.
_decisions = {}
_MOST_DECISIONS = 4096


def _recall(input, weight, bias, stride, padding, dilation, groups, precision):
    """Do what :func:`_decide` does, once for each combination of arguments."""
    given = (stride, padding, dilation, groups, precision)
    if torch.compiler.is_compiling() or not _is_exact(given):
        return _decide(input, weight, bias, *given)
    try:
        key = (
            *given,
            arguments.cudnn_precision() if precision == "auto" and input.dtype == torch.float32 else None,
            *(input.shape, input.stride(), input.dtype, input.device, input.layout),
            *(weight.shape, weight.dtype, weight.device, weight.layout),
            None if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout),
        )
        decision = _decisions.get(key)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        # What is wrong here, or only has no hash, is found out there.
        return _decide(input, weight, bias, *given)
    if decision is None:
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        decision = _decisions[key] = _decide(input, weight, bias, *given)
    return decision


def _is_exact(values):
    """Tell whether all are integers, strings or tuples of them: to a dictionary, 1.0 and True are 1."""
    types = {*map(type, values)}
    if tuple in types:
        types.remove(tuple)
        return types <= _EXACT and all(_is_exact(value) for value in values if type(value) is tuple)
    return types <= _EXACT


_EXACT = {int, str}


def _run(name, *args):
    """Call an operator. Its rule for gradients is Python, and to pass by it takes longer than a small kernel."""
    # The overload: the packet that holds it looks at every argument in Python first.
    operator = getattr(torch.ops.fused_kernels, name).default
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _run_forward(name, backward, return_indices, *args):
    """Call a forward operator, and where its winners are wanted the one that gives them, too."""
    if not return_indices and not _wants_gradient(*args):
        return _run(name, *args)
    output, winners = _run_with_winners(name, backward, *args)
    return (output, winners.long()) if return_indices else output


def _run_with_winners(name, backward, *args):
    """Call the operator of a rung that gives winners, too; ``backward``: the operators of its backward pass."""
    forward = f"{name}_winners"
    if torch.compiler.is_compiling() or not _wants_gradient(*args):
        return _run(forward, *args)
    if rungs[name].operator == "scale_min":
        return _from_winners("scale_min_from_winners")(*args, forward, backward)
    # The composite's operator is Python: to call it by way of torch takes longer than a small kernel.
    given = _composite_winners(*args) if name == "composite" else ()
    return _from_winners("conv_from_winners")(*args, forward, backward, given)


def _from_winners(name):
    """Give one of the two operators with a backward pass that runs without Python; they are built before the first call."""
    operator = _from_winners_operators.get(name)
    if operator is None:
        with _load_locks.setdefault("from_winners", threading.Lock()):
            if not hasattr(torch.ops.fused_kernels, name):
                build.load("from_winners", (build.CSRC / "autograd" / "from_winners.cpp").read_text(), device="cpu")
        operator = _from_winners_operators[name] = getattr(torch.ops.fused_kernels, name).default
    return operator


_from_winners_operators = {}


def _wants_gradient(*args):
    """Tell whether a gradient will flow back to one of these."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    return torch._C._any_requires_grad(*args)


def _obstacle(name, input):
    """Say why a fused kernel can't run here and now, whatever the shapes, or None."""
    if is_transformed():
        return f"{name} has no rule for torch.func's transforms and forward-mode gradients"
    return _why_unavailable(name, input.device.index)


def _has_scale_min(input):
    """Tell whether a kernel of ours can take the minimum on this tensor's device."""
    name = _SCALE_MIN.get(input.device.type)
    return name is not None and not is_transformed() and not _why_unavailable(name, input.device.index)


def _reference_scale_min(input, scale, return_indices):
    minimum = torch.min(input * scale, dim=1, keepdim=True)
    return tuple(minimum) if return_indices else minimum.values


def _choose_cpu(input, weight, geometry):
    (name,) = _CONV2D_SCALE_MIN["cpu"]
    pixels = math.prod(geometry.output_size(input.shape, weight.shape))
    if input.dtype in (torch.float32, torch.bfloat16) and weight.numel() >= 2**18 and pixels < 128:
        # Measured on Zen 4: 512 channels on 7 x 7 pixels leave vector lanes empty and are slow to pack the weights for. The
        # library has no fast float16 or float64 to lose to.
        return "composite", f"{name} is slower on an image so small with channels so many"
    return name, "all in one kernel, for cpu tensors"


# 72 tiles of 128 pixels. With fewer, half of an H200's 132 multiprocessors would have none; the library cuts its work smaller.
_FEW_PIXELS = 9 * 2**10


def _choose_cuda(input, weight, geometry, precision):
    """Choose by what was measured on an H200 and an H100, the fused kernels against each other and the composite."""
    wgmma_ieee, wgmma, mma, direct = _CONV2D_SCALE_MIN["cuda"]
    if input.dtype == torch.float64:
        return "composite", "no fused kernel takes float64"
    if max(*input.shape, *geometry.stride, *geometry.padding, *geometry.dilation) >= 2**28:
        return "composite", "the fused kernels count rows, columns and channels in 32 bits"
    out_channels, in_channels, kernel_h, kernel_w = weight.shape
    out_channels = out_channels // geometry.groups
    height, width = geometry.output_size(input.shape, weight.shape)
    images, taps = input.shape[0], kernel_h * kernel_w
    pixels, products = images * height * width, in_channels * taps * out_channels * geometry.groups  # products: a pixel's
    if geometry.groups > 1 and min(in_channels, out_channels) < 64:
        return "composite", "groups so small leave the fused kernels' tiles empty"
    is_float32 = input.dtype == torch.float32
    if is_float32 and products < 2**11:
        return direct, "all in one kernel; products so few are not worth tensor cores"

    # Fewer channels leave rows of wgmma's operands empty. A long reach does not fit in shared memory.
    fills = min(in_channels, out_channels) > 32 or (in_channels > 16 and out_channels >= 128)
    fits = max(d * (k - 1) for d, k in zip(geometry.dilation, (kernel_h, kernel_w), strict=True)) <= 12
    takes = geometry.stride == (1, 1) and geometry.groups == 1 and _is_hopper(input.device.index)
    if is_float32 and precision == "ieee":
        # Split operands lose more than a shorter sum in float32 does: up to 1.4 times, at 33 products.
        if fills and fits and takes and pixels >= 2**10 and in_channels * taps >= 2**6:
            return wgmma_ieee, "all in one kernel, float32's accuracy from Hopper's tensor cores"
        # 8 rows by 32 columns are what a warp of conv_direct owns; too few of them leave most of the chip idle.
        strips = images * -(-height // 8) * -(-width // 32)
        if taps == 1 and in_channels > 64:
            return "composite", f"{direct} is slower on a 1 x 1 kernel over channels so many"
        if strips < 256 and pixels * products > 2**24:
            return "composite", f"{direct} is slower on images so small with channels so many"
        return direct, "all in one kernel, in float32 throughout"

    if taps == 1 and out_channels <= in_channels:
        return "composite", f"{mma} is slower on a 1 x 1 kernel that makes no more channels than it gets"
    if products < 2**8:
        return "composite", f"{mma} is slower where an output has products so few"
    is_channels_last = input.stride(1) == 1
    few_pixels = pixels < _FEW_PIXELS
    if taps == 1 and takes:
        if few_pixels:
            return "composite", f"{mma} is slower on a 1 x 1 kernel where pixels are so few"
        # wgmma reads 16-bit channels_last as they lie; to convert what does not pays from some filter taps on.
        if fills and is_channels_last and not is_float32:
            if products >= 2**17 and in_channels > 64:
                return "composite", f"{wgmma} is slower than the library where an output has products so many"
            return wgmma, "all in one kernel, at the rate of Hopper's tensor cores"
    if taps > 1 and takes and fits:
        if not _beats_library_on_hopper(is_float32, is_channels_last, in_channels, out_channels, taps, pixels):
            return "composite", f"{wgmma} and {mma} are slower on this size, layout and dtype"
        leaves_empty = is_float32 and products < 2**19 and _leaves_tiles_empty(in_channels, out_channels)
        if not fills or leaves_empty or (few_pixels and in_channels <= 32):
            return mma, "all in one kernel, on tensor cores"
        return wgmma, "all in one kernel, at the rate of Hopper's tensor cores"
    # The more products an output has, and the fewer outputs there are, the better the library is at its share of the work.
    # With wgmma it multiplies faster than mma.sync can, unless its tiles stay empty or it has much to write.
    hampered = geometry.groups > 1 or in_channels <= 16 or out_channels >= 4 * in_channels
    library_has_wgmma = _library_has_wgmma(input.device.index)
    hampered |= not library_has_wgmma
    if taps == 1 and geometry.groups == 1 and library_has_wgmma:
        is_strided = geometry.stride != (1, 1)
        if pixels < (2**13 if is_strided and not (is_float32 and is_channels_last) else 2**12):
            return "composite", f"{mma} is slower on a 1 x 1 kernel where pixels are so few"
        if products >= (2**17 if is_float32 else 2**16):
            return "composite", f"{mma} is slower on a 1 x 1 kernel where an output has products so many"
    if is_float32:
        least_pixels = 2**16 if is_channels_last and taps > 1 else 2**14
        wins = products < (2**15 if is_channels_last else 2**16) or pixels >= least_pixels
    elif is_channels_last and not hampered:
        wins = products < 2**13 or (2**13 <= pixels < 2**17 and products < 2**16)
    else:
        wins = products < 2**13 or (pixels >= 2**11 and products < 2**17) or (pixels >= 2**13 and products < 2**18 and hampered)
    if not wins:
        return "composite", f"{mma} is slower on this size, layout and dtype"
    return mma, "all in one kernel, on tensor cores"


def _beats_library_on_hopper(is_float32, is_channels_last, in_channels, out_channels, taps, pixels):
    """Tell whether a fused kernel is faster than the library, for 3 x 3 to 7 x 7; each bound is from timing them on an H200."""
    least_channels, products = min(in_channels, out_channels), in_channels * out_channels * taps
    if products < 2**13:
        return True
    # Some of the library's kernels take several times as long as these, however few the pixels are.
    if is_float32 and (taps > 25 or (taps > 9 and least_channels >= 128 and pixels >= 2**12)):
        return True
    if taps > 25 and in_channels <= 32 and out_channels <= 64:
        return True
    if taps > 25 and least_channels >= 64 and out_channels > 64:
        return pixels >= 2**11
    if pixels < _FEW_PIXELS and is_channels_last:
        return is_float32 and least_channels >= 256 and pixels >= 6 * 2**10
    if pixels < _FEW_PIXELS:
        # In NCHW the library has to copy, and that takes its time where channels are few.
        if taps > 25 or in_channels > (48 if taps <= 9 else 32):
            return False
        return not is_float32 or (taps <= 9 and pixels >= 2**12)
    if is_float32:
        return pixels >= 2**14 or (least_channels > 32 and (taps > 9 or in_channels < 128 or out_channels > 64))
    if products >= 2**17 and _leaves_tiles_empty(in_channels, out_channels):
        return False
    if is_channels_last and 16 < in_channels <= 32 and out_channels < 128 and pixels >= 2**17:
        return False
    if not is_channels_last and in_channels > 32 and out_channels <= 64 and 9 < taps <= 25 and pixels < 2**16:
        return False
    return taps > 25 or least_channels < (128 if taps <= 9 and not is_channels_last else 256)


def _leaves_tiles_empty(in_channels, out_channels):
    """Tell whether conv_wgmma's tiles, of 64 input and 64 or 128 output channels, stay empty in part."""
    return (in_channels > 64 and in_channels % 64 > 0) or (out_channels > 64 and out_channels % 128 > 0)


def _library_has_wgmma(device_index):
    """Tell whether the GPU has instructions for tensor cores that are faster than mma.sync, which the library uses."""
    return torch.cuda.get_device_capability(device_index)[0] in (9, 10)


def _is_hopper(device_index):
    return torch.cuda.get_device_capability(device_index) == (9, 0)


# Constants of the device, which the compiler need not trace.
_library_has_wgmma._dynamo_marked_constant = True
_is_hopper._dynamo_marked_constant = True


def _why_unavailable(name, device_index):
    # Asked once a process: finding the compilers takes longer than a small kernel.
    key = (name, device_index)
    if key not in _availability:
        _availability[key] = (COPY if name == COPY.name else rungs[name]).why_unavailable(device_index)
    return _availability[key]


_availability = {}
# What torch.compiler.assume_constant_result sets; that function would import the compiler, one second, for this line.
_why_unavailable._dynamo_marked_constant = True


def composite(input, weight, bias, scale, stride, padding, dilation, groups, precision):
    """Convolve with torch's library, in the layout that its tensor cores want, then :func:`scale_min`, on a GPU with the bias.

    There PyTorch adds the bias in a pass of its own over the convolution's output. Where a gradient will be needed, it comes
    from the winners, as a fused kernel's does, and the convolution's output is not kept.
    """
    return _composite(input, weight, bias, scale, stride, padding, dilation, groups, precision)


def _composite(input, weight, bias, scale, stride, padding, dilation, groups, precision, return_indices=False, backward=()):
    conv = (stride, padding, dilation, groups, precision)
    if not _has_scale_min(input):
        return _reference_scale_min(_library_conv(input, weight, bias, *conv), scale, return_indices)
    if return_indices or _wants_gradient(input, weight, bias):
        # The gradients' precision is what it is now, whatever the setting will be then.
        precision = arguments.resolve_precision(input, precision)
        if not backward and not torch.compiler.is_compiling():
            backward = gradients.choose(input, weight, (*conv[:4], precision))
        output, winners = _run_with_winners("composite", backward, input, weight, bias, scale, *conv[:4], precision)
        return (output, winners.long()) if return_indices else output
    return _convolve_then_minimum(input, weight, bias, scale, *conv)


def _composite_winners(input, weight, bias, scale, *conv):
    with torch.no_grad():
        return _convolve_then_minimum(input, weight, bias, scale, *conv, suffix="_winners")


def _convolve_then_minimum(input, weight, bias, scale, stride, padding, dilation, groups, precision, suffix=""):
    geometry = arguments.ConvArguments(stride, padding, dilation, groups)
    input, weight, stride, early = _in_fastest_layout(input, weight, geometry, precision)
    conv = (stride, padding, dilation, groups, precision)
    if bias is None or not _adds_bias(input):
        return _run(_SCALE_MIN[input.device.type] + suffix, _library_conv(input, weight, bias, *conv), scale)
    output = _library_conv(input, weight, None, *conv)
    if bias.dtype != output.dtype:
        bias = bias.to(output.dtype)  # under autocast a convolution casts its arguments
    # After a 16-bit matrix product of the library's it loses a little by beginning early, unless the copy before did so, too.
    early |= input.dtype == torch.float32 or math.prod(weight.shape[2:]) > 1
    return _run("scale_min_bias" + suffix, output, bias, scale, early)


def _adds_bias(input):
    """Tell whether there is a kernel that takes the minimum and adds the bias on its way."""
    return input.is_cuda


def reference_operator(input, weight, bias, scale, stride, padding, dilation, groups, precision):
    """Do what :class:`fused_kernels.Model` does, one of PyTorch's operations after the other."""
    return reference.scale_min(_library_conv(input, weight, bias, stride, padding, dilation, groups, precision), scale)


def _library_conv(input, weight, bias, stride, padding, dilation, groups, precision):
    (top, bottom, left, right) = padding
    if (top, left) != (bottom, right):
        input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
    geometry = (stride, (top, left), dilation)
    follows_setting = precision == "auto" or input.dtype != torch.float32 or input.device.type != "cuda"
    if not follows_setting and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # What torch's own function does now is right, and no gradient will ask for it later.
        follows_setting = precision == arguments.cudnn_precision()
    if follows_setting:
        return F.conv2d(input, weight, bias, *geometry, groups)
    return torch.ops.fused_kernels.library_conv2d.default(input, weight, bias, *geometry, groups, precision == "tf32")


def _library_conv2d(input, weight, bias, stride, padding, dilation, groups, tf32):
    """Convolve with cuDNN at a precision that is an argument, not the global setting that torch's functions read."""
    flags = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled)
    return torch.ops.aten._convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups, *flags, tf32)


def _in_fastest_layout(input, weight, geometry, precision):
    """Copy input and weight where it pays, as measured on an H200 and an H100 with cuDNN 9.19.

    Gives them, the stride that is left, and whether there was a copy that began early, while the kernel before it ended.

    The library's tensor-core convolutions want channels_last; they copy input and output to get it, and the weights, and take
    long over it. Its 16-bit grouped convolutions are slower in channels_last than copies to NCHW and convolution together.
    """
    unchanged = input, weight, geometry.stride, False
    _, in_channels, kernel_h, kernel_w = weight.shape
    is_pointwise, is_strided = kernel_h * kernel_w == 1, max(geometry.stride) > 1
    least_products = 128
    if is_pointwise and is_strided:
        least_products = 32
    elif is_pointwise and input.element_size() == 2:
        least_products = 64
    # The quick questions first: a small convolution takes no longer than a few of them.
    if not input.is_cuda or input.dtype == torch.float64:
        return unchanged
    if geometry.groups == 1 and in_channels * kernel_h * kernel_w < least_products:
        return unchanged
    is_nchw = input.is_contiguous()
    is_channels_last = not is_nchw and input.is_contiguous(memory_format=torch.channels_last)
    if geometry.groups > 1:
        slow = is_channels_last and geometry.groups < input.shape[1] and input.dtype != torch.float32
        return (input.contiguous(), weight.contiguous(), geometry.stride, False) if slow else unchanged
    if is_channels_last:
        return unchanged
    outputs = input.shape[0] * weight.shape[0] * math.prod(geometry.output_size(input.shape, weight.shape))
    ours = is_nchw and _can_copy(input, weight)
    # A 1 x 1 kernel is a product of matrices as they lie, if it reads all of the input, but a slow one where planes are no
    # multiple of 16 bytes, and where it makes more channels than it gets. Its weights lie the same in both layouts.
    unaligned = math.prod(input.shape[2:]) * input.element_size() % 16 != 0
    gains = not is_pointwise or is_strided or unaligned or weight.shape[0] > in_channels
    # In float32 it is slow over many channels, too: there the copy pays where it is small.
    gains |= input.dtype == torch.float32 and in_channels >= 512 and input.numel() < 2**21
    # PyTorch's own copy is slower, and pays later.
    if outputs < 2**23 and not (ours and in_channels >= 16 and gains):
        return unchanged
    if input.dtype == torch.float32 and arguments.resolve_precision(input, precision) != "tf32":
        return unchanged
    if ours:
        stride = geometry.stride
        if is_pointwise and is_strided and not any(geometry.padding):
            # Most of the input is never read: the copy leaves it out.
            input, stride = input[:, :, :: stride[0], :: stride[1]], (1, 1)
        # Beginning early gains up to half a microsecond where all is small; where the output is not, it loses as much.
        early = max(2 * input.numel(), outputs) * input.element_size() < 2**21
        input, *copied = torch.ops.fused_kernels.to_channels_last.default(input, None if is_pointwise else weight, early)
        return input, *(copied or [weight]), stride, early
    channels_last = {"memory_format": torch.channels_last}
    return input.contiguous(**channels_last), weight.contiguous(**channels_last), geometry.stride, False


def _can_copy(input, weight):
    """Tell whether to_channels_last runs here; it has no gradient, and the compiler writes a copy of its own."""
    if torch.compiler.is_compiling() or is_transformed() or not weight.is_contiguous():
        return False
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return False
    return not _why_unavailable(COPY.name, input.device.index)


def _autocast(*tensors):
    """Cast as autocast casts a convolution's arguments: every floating-point tensor but float64."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if device not in ("cpu", "cuda") and not _has_autocast(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in castable else t for t in tensors]


def _has_autocast(device):
    return torch.amp.is_autocast_available(device)


# A constant of the device, which the compiler cannot trace.
_has_autocast._dynamo_marked_constant = True


def define(rung):
    """Register a rung's operators: schema, output shape, gradient, and an implementation that builds itself on first call."""
    if rung.device is None:
        library = _library(rung.namespace)
        library.define(rung.name + SCHEMAS[rung.operator])
        library.impl(rung.name, _FUNCTIONS[rung.name], "CompositeImplicitAutograd")
        return
    schema = SCHEMAS[rung.operator]
    _define(rung, rung.name, schema, _RULES[rung.operator])
    if rung.has_winners:
        _define(rung, f"{rung.name}_winners", _with_winners(schema), _RULES[f"{rung.operator}_winners"], winners=True)


def _define(rung, name, schema, rules, winners=False):
    """Register an operator of a rung's library, or of the one that is compiled to give winners."""
    library = _define_rules(rung.namespace, name, schema, rules)

    def stand_in(*args):
        """Take the operator's place until it is called, then build; once loaded, its own key goes first."""
        if args[0].device.type != rung.device:
            raise RuntimeError(f"input: {name} expected a {rung.device} tensor, got one on {args[0].device}")
        if missing := rung.why_unavailable(args[0].device.index):
            raise RuntimeError(f"{name} cannot run here: {missing}")
        _load(rung, name, winners)
        return getattr(getattr(torch.ops, rung.namespace), name).default(*args)

    library.impl(name, stand_in, "CompositeExplicitAutograd")


def _define_rules(namespace, name, schema, rules):
    """Register an operator without an implementation; its rules are output shape, gradient, and what that needs."""
    fake, backward, setup = rules
    library = _library(namespace)
    library.define(name + schema)
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    if backward:
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup, lib=library)
    return library


def _library(namespace):
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    return library


def _with_winners(schema):
    return schema.replace("-> Tensor", "-> (Tensor, Tensor)")


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
    if not hasattr(getattr(torch.ops, rung.namespace), rung.name):
        define(rung)
    return rung


def load():
    """Build and load now, several at a time, every rung that can run here; else each is built on its first call.

    What training needs besides, the same sources compiled to give winners, the backward kernels and what calls them, is built
    when it is first called in any case.

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
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda rung: rung.device and _load(rung, rung.name), ready))
    return [rung.name for rung in ready if rung is not COPY]


def _load(rung, name, winners=False):
    key = f"{rung.namespace}::{name}"

    def is_loaded():
        return torch._C._dispatch_has_kernel_for_dispatch_key(key, rung.device.upper())

    with _load_locks.setdefault((rung.namespace, rung.name, winners), threading.Lock()):
        if not is_loaded():
            rung.load(winners=winners)
        if not is_loaded():
            raise RuntimeError(f"{rung.name}: the source registers no {rung.device.upper()} implementation of {name}")


def _scale_min_fake(input, scale):
    return input.new_empty((input.shape[0], 1, *input.shape[2:]))


def _scale_min_setup(ctx, inputs, output):
    input, ctx.scale = inputs
    ctx.save_for_backward(input)


def _scale_min_backward(ctx, grad):
    (input,) = ctx.saved_tensors
    return _scale_min_vjp(input, ctx.scale, grad), None


def _scale_min_vjp(input, scale, grad):
    """Give the gradient to each pixel's winner, the channel that torch.min names."""
    winner = torch.min(input * scale, dim=1, keepdim=True).indices
    return torch.zeros_like(input).scatter(1, winner, grad * scale)


def _scale_min_bias_fake(input, bias, scale, early):
    return _scale_min_fake(input, scale)


def _conv2d_scale_min_fake(input, weight, bias, scale, stride, padding, dilation, groups, precision):
    geometry = arguments.ConvArguments(stride, padding, dilation, groups)
    return input.new_empty((input.shape[0], 1, *geometry.output_size(input.shape, weight.shape)))


def _conv2d_scale_min_setup(ctx, inputs, output):
    input, weight, bias, *ctx.rest = inputs
    ctx.save_for_backward(input, weight, bias)


def _conv2d_scale_min_backward(ctx, grad):
    """Find the winners first: this is the rule of operators that gave none."""
    input, weight, bias = ctx.saved_tensors
    scale, *conv = ctx.rest
    _, winners = torch.ops.fused_kernels.composite_winners.default(input, weight, bias, scale, *conv)
    sizes = input.shape[2:], weight.shape
    layout = gradients.is_channels_last(input)
    grads = gradients.gradients(grad, winners, input, weight, scale, conv, *sizes, layout, ctx.needs_input_grad[:3])
    return *grads, *[None] * 6


def _fake_with_winners(fake, channels):
    """Make the rule for an operator that gives winners of the one for its operator; ``channels``: how many compete."""

    def rule(*args):
        output = fake(*args)
        return output, output.new_empty(output.shape, dtype=gradients.winners_dtype(channels(*args)))

    return rule


def _library_conv2d_setup(ctx, inputs, output):
    input, weight, bias, *ctx.geometry, ctx.tf32 = inputs
    ctx.save_for_backward(input, weight, bias)


def _library_conv2d_backward(ctx, grad):
    """Differentiate at the forward's precision: this function of torch's has only the setting to say which."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if ctx.tf32 else "ieee"
    try:
        grads = _conv2d_vjp(grad, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[:3])
    finally:
        setting.fp32_precision = before
    return *grads, *[None] * 5


def _conv2d_vjp(grad, input, weight, bias, stride, padding, dilation, groups, needed):
    bias_sizes = None if bias is None else bias.shape
    return torch.ops.aten.convolution_backward(
        grad, input, weight, bias_sizes, stride, padding, dilation, False, (0, 0), groups, list(needed)
    )


def _define_scale_min_bias():
    """Register the second operators of scale_min_vectorized's libraries: the minimum over the channels of (x + bias) * scale.

    If ``early`` it may begin, where it is small, while the kernel before it ends. No rule for gradients: only the composite
    calls them, where none is wanted or below its own.
    """
    rung, schema = rungs[_SCALE_MIN["cuda"]], "(Tensor input, Tensor bias, float scale, bool early) -> Tensor"
    _define(rung, "scale_min_bias", schema, (_scale_min_bias_fake, None, None))
    fake = _fake_with_winners(_scale_min_bias_fake, lambda input, *_: input.shape[1])
    _define(rung, "scale_min_bias_winners", _with_winners(schema), (fake, None, None), winners=True)


def _define_backward():
    """Register the operators of the backward pass."""
    rungs_of_backward = {rung.name: rung for rung in BACKWARD}
    for rung in BACKWARD:
        _define(rung, rung.name, SCHEMAS[rung.operator], gradients.RULES[rung.operator])
    for name in gradients.GRAD_BIAS.values():
        _define(rungs_of_backward[name.replace("bias", "weight")], name, SCHEMAS["grad_bias"], gradients.RULES["grad_bias"])


def _define_composite_winners():
    rules = _RULES["conv2d_scale_min_winners"]
    library = _define_rules(build.NAMESPACE, "composite_winners", _with_winners(SCHEMAS["conv2d_scale_min"]), rules)
    library.impl("composite_winners", _composite_winners, "CompositeExplicitAutograd")


def _define_copy():
    """Register the copy of a convolution's input and weights; no rule for gradients, for none is wanted where it runs.

    If ``early`` it may begin while the kernel before it ends.
    """
    _define(COPY, COPY.name, "(Tensor input, Tensor? weight, bool early) -> Tensor[]", (_copy_fake, None, None))


def _copy_fake(input, weight, early):
    return [torch.empty_like(t, memory_format=torch.channels_last) for t in (input, weight) if t is not None]


def _define_library_conv2d():
    schema = (
        "(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, bool tf32) "
        "-> Tensor"
    )
    rules = (lambda *args: F.conv2d(*args[:-1])), _library_conv2d_backward, _library_conv2d_setup
    library = _define_rules(build.NAMESPACE, "library_conv2d", schema, rules)
    library.impl("library_conv2d", _library_conv2d, "CUDA")


_RULES = {
    "scale_min": (_scale_min_fake, _scale_min_backward, _scale_min_setup),
    "conv2d_scale_min": (_conv2d_scale_min_fake, _conv2d_scale_min_backward, _conv2d_scale_min_setup),
    "scale_min_winners": (
        _fake_with_winners(_scale_min_fake, lambda input, _: input.shape[1]),
        gradients.scale_min_winners_backward,
        gradients.scale_min_winners_setup,
    ),
    "conv2d_scale_min_winners": (
        _fake_with_winners(_conv2d_scale_min_fake, lambda _, weight, *__: weight.shape[0]),
        gradients.conv_winners_backward,
        gradients.conv_winners_setup,
    ),
}

# The rungs made of PyTorch's own operations: gradients, shapes and devices come from those.
_FUNCTIONS = {"reference": reference_operator, "composite": composite}

_define_library_conv2d()
_define_scale_min_bias()
_define_copy()
_define_composite_winners()
_define_backward()
for _rung in LADDER:
    define(_rung)
