"""The public functions, and :func:`explain`, which says what they would do."""

from dataclasses import dataclass

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import arguments, auto, candidates, choice, composite, estimates, subclasses, trials
from .dispatch import is_transformed, run_forward
from .problem import describe_problem
from .rungs import why_unavailable


def scale_min(input, scale, *, return_indices=False):
    """Multiply by a number, or each channel by its own, and take the minimum over the channels, in one pass over the input.

    Equal to ``torch.min(input * scale, dim=1, keepdim=True).values``, NaN and infinities included; differentiable, any number
    of times. Where a gradient will be needed, each pixel's winning channel is kept: one byte per pixel up to 256 channels.

    Parameters
    ----------
    input : Tensor
        Shape (N, C, H, W) or (C, H, W), C at least 1, any strides; float32, float16, bfloat16 or float64; never modified.
    scale : float or Tensor
        Any real Python number, negative and zero included; under torch.compile each new value is compiled again. Or a tensor of
        real numbers, which may be learned: of one element, or of one for each channel, (C,), (C, 1, 1) or (1, C, 1, 1). It is
        taken in float32 (float64 for a float64 input) and never read by the processor.
    return_indices : bool
        Whether to give the winning channels as well, as :func:`torch.min` does. Among tied channels it is any one, but the same
        one every time; where a channel is NaN, it is one that is NaN.

    Returns
    -------
    Tensor
        Shape (N, 1, H, W), or (1, H, W) of one image; contiguous; the input's dtype, whatever the scale's. 16-bit types are
        scaled in float32 and rounded once.
    Tensor
        The same shape, int64, only if ``return_indices``.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    if has_torch_function_variadic(input, scale):
        return handle_torch_function(scale_min, (input, scale), input, scale, return_indices=return_indices)
    if arguments.is_unbatched(input):
        return arguments.unbatched(scale_min, input, scale, return_indices=return_indices)
    scale, scales = arguments.as_scale(scale), ()
    if auto.is_tracing(input, scale):
        auto.untraced(arguments.check_input, input)
        if type(scale) is not float:
            scale, scales = _per_channel(scale, input, input.shape[1])
        if auto.is_better_traced_by_library(input, *scales):
            return composite.reference_scale_min(input, scale, *scales, return_indices=return_indices)
        return auto.trace("scale_min", (input, scale, *scales), return_indices)
    arguments.check_input(input)
    if type(scale) is not float:
        scale, scales = _per_channel(scale, input, input.shape[1])
    name = composite.scale_min_for(input.device, input.dtype)
    if name is None:
        return composite.reference_scale_min(input, scale, *scales, return_indices=return_indices)
    args, backward = (input, scale, *scales), (choice.SCALE_MIN_BACKWARD[input.device.type],)
    return run_forward(name, args, backward, return_indices)


def _per_channel(scale, input, channels):
    """Give a tensor in two parts, as operators take it: the number to multiply by, and each channel's factor."""
    is_single = auto.untraced(arguments.check_scale, scale, channels, input.device)
    return 1.0, (arguments.scale_per_channel(scale, is_single, channels, input),)


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
    """Convolve, multiply by a number, or each channel by its own, take the minimum over the output channels.

    Equal to ``torch.min(conv2d(input, weight, bias, ...) * scale, dim=1, keepdim=True).values``; differentiable, any number of
    times. Where a gradient will be needed, each pixel's winning channel is kept: one byte per pixel up to 256 channels. The
    backward pass sums over the winners alone, and gives the same bits every time. A fused kernel runs where it can take the
    arguments and is faster by an estimate from recorded times (:func:`explain` says which), else the library's convolution
    followed by :func:`scale_min`. With ``torch.backends.cudnn.benchmark = True`` the first call of a problem (sizes, layout,
    dtype, precision) times the two or three candidates ranked first, and the fastest runs for the rest of the process: on a GPU
    whose times were not recorded, that alone is sure. It never happens while a graph is captured or a program traced, nor with
    deterministic algorithms; different processes, such as the ranks of a distributed run, may then choose differently. Under
    autocast the arguments are cast as PyTorch casts a convolution's.

    Parameters
    ----------
    input : Tensor
        Shape (N, C_in, H, W) or (C_in, H, W), any strides; float32, float16, bfloat16 or float64; never modified.
    weight : Tensor
        Shape (C_out, C_in / groups, kH, kW), the input's dtype and device.
    bias : Tensor, optional
        Shape (C_out,), the input's dtype; or float32 where that is a 16-bit type: it is added in float32 in any case.
    scale : float or Tensor
        A number, or a tensor of one element or of one for each output channel, as for :func:`scale_min`. Each channel's sum,
        bias included, is multiplied in float32.
    stride, padding, dilation, groups
        As for :func:`torch.nn.functional.conv2d`, "same" and "valid" included.
    precision : {"auto", "ieee", "tf32"}
        For float32: how exact the convolution must be, at any magnitude. "ieee": an rms error over the result no larger than
        a float32 convolution's. "tf32": operands of a 10-bit mantissa with float32 accumulation are allowed, with an rms
        error no larger than a TF32 convolution's. "auto" follows ``torch.backends.cudnn``'s setting for convolutions at the
        call. No pixel pays for its neighbours: beside values of any size, no-data values of 1e20 or a dark half of an image,
        each pixel keeps the digits that its own window lets it have, by the bound that ``fused_kernels.bounds.promise`` gives;
        an infinity or NaN reaches the pixels that it reaches in PyTorch, and no other. Every fused kernel keeps that, but for
        windows made to break it, which ``promise`` describes, and so do the gradients, for the values that they sum; the
        library's convolution, where that runs, promises no such thing. On a GPU's tensor cores the operands are float16 times a
        power of two for each output channel and each part of the image, at "ieee" sums of two such numbers. Where a part's
        values leave float16's range, the GPU takes another power for it; where that may leave results too few digits, it makes
        those again, by what their own windows hold, without asking the CPU. That is slow: outliers in every part of an image,
        or without a bias black patches in every part, can take many times as long.
    return_indices : bool
        Whether to give the winning channels as well, as for :func:`scale_min`.

    Returns
    -------
    Tensor
        Shape (N, 1, H', W'), or (1, H', W') of one image; contiguous; the input's dtype, whatever bias and scale have.
    Tensor
        The same shape, int64, only if ``return_indices``.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    if has_torch_function_variadic(input, weight, bias, scale) or arguments.is_unbatched(input):
        tensors, given = (input, weight, bias, scale), {"stride": stride, "padding": padding, "dilation": dilation}
        given |= {"groups": groups, "precision": precision, "return_indices": return_indices}
        if has_torch_function_variadic(*tensors):
            return handle_torch_function(conv2d_scale_min, tensors, *tensors, **given)
        return arguments.unbatched(conv2d_scale_min, *tensors, **given)
    scale, scales = arguments.as_scale(scale), ()
    if auto.is_tracing(input, weight, bias, scale):
        conv = stride, padding, dilation, groups, precision
        return _trace_conv(input, weight, bias, scale, return_indices, *conv)
    input, weight, bias = arguments.autocast(input, weight, bias)
    decision = choice.decide(input, weight, bias, stride, padding, dilation, groups, precision)
    if type(scale) is not float:
        scale, scales = _per_channel(scale, input, weight.shape[0])
    if trials.are_asked_for():
        decision = trials.settle(decision, (input, weight, bias, scale, *scales), return_indices)
    if decision.rung == "composite" or is_transformed():
        return composite.compute(decision, input, weight, bias, scale, *scales, return_indices=return_indices)
    args = input, weight, bias, scale, *decision.problem.conv, *scales
    # Chosen when first asked for: not where no gradient can be wanted.
    backward = decision.backward if torch.is_grad_enabled() else None
    return run_forward(decision.rung, args, backward, return_indices)


def _trace_conv(input, weight, bias, scale, return_indices, stride, padding, dilation, groups, precision):
    """Put the operator that chooses when it is called into the program: no condition of a choice becomes one of the program."""
    geometry, _ = auto.untraced(arguments.check_conv, input, weight, bias, stride, padding, dilation, groups)
    arguments.check_precision(precision)
    conv, scales = (*geometry, precision), ()
    if type(scale) is not float:
        scale, scales = _per_channel(scale, input, weight.shape[0])
    if auto.is_exporting() and not is_transformed():
        return auto.trace("conv2d_scale_min", (input, weight, bias, scale, *conv, *scales), return_indices, "_autocast")
    args = *arguments.autocast(input, weight, bias), scale
    if auto.is_better_traced_by_library(*args[:3], *scales):
        problem = describe_problem(args[0], weight.shape, *conv)
        return composite.compute_by_library(problem, *args, *scales, return_indices=return_indices)
    return auto.trace("conv2d_scale_min", (*args, *conv, *scales), return_indices)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a convolution's minimum, as :func:`explain` sees it.

    Attributes
    ----------
    name : str
        A fused rung; "composite", the library's convolution as the input lies and then scale_min; or "copied", the same after a
        copy of the input into the other memory layout.
    microseconds : float or None
        By estimate from recorded times; None where it can't run, and on a CPU.
    why_not : str or None
        Why it can't run.
    """

    name: str
    microseconds: float | None = None
    why_not: str | None = None

    def __str__(self):
        return f"{self.name}: {self.why_not or 'no estimate' if self.microseconds is None else f'{self.microseconds:.3g} us'}"


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes
    ----------
    rung : str
        What would run.
    precision : str
        At which precision: "ieee" or "tf32" for float32, else the dtype.
    why : str
        Why that, and not another rung.
    backward : tuple of str
        The operators that would make the gradients of input and weights; none where PyTorch's own operations do.
    candidates : tuple of Candidate
        What else there is on this device, the fastest by estimate first.
    nearest : str
        The recorded layer that is most like this one, and what its candidates took; "" on a CPU.
    """

    rung: str
    precision: str
    why: str
    backward: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    nearest: str = ""

    def __str__(self):
        return f"{self.rung} at {self.precision}: {self.why}"


def explain(input, weight, bias=None, scale=1.0, *, stride=1, padding=0, dilation=1, groups=1, precision="auto"):
    """Say which rung :func:`conv2d_scale_min` would run for these arguments, at which precision, and why no other one.

    It also gives every candidate's estimated time or why it can't run, the nearest layer that was measured, and the operators
    of the backward pass. Takes the same arguments, raises the same errors, computes nothing. What the first call has timed with
    ``torch.backends.cudnn.benchmark`` is said in place of the estimate.

    Returns
    -------
    Explanation
    """
    if arguments.is_unbatched(input):
        input = input.unsqueeze(0)
    input, weight, bias = arguments.autocast(input, weight, bias)
    scale = arguments.as_scale(scale)
    decision = choice.decide(input, weight, bias, stride, padding, dilation, groups, precision)
    if type(scale) is not float:
        arguments.check_scale(scale, weight.shape[0], input.device)
    if trials.are_asked_for():
        decision = trials.recall(decision, (input, weight, bias), False)
    name, why, device = decision.rung, decision.why, decision.problem.device
    if name != "composite" and is_transformed():
        name, why = "composite", f"{name} has no rule for torch.func's transforms and forward-mode gradients"
    foreign = [type(tensor).__name__ for tensor in (input, weight, bias) if subclasses.know_only_aten(tensor)]
    if foreign:
        name, why = "composite", f"a {foreign[0]} may know no operators but PyTorch's"
    if name == "composite":
        inner, *others = choice.SCALE_MIN.get(device.type, (None,))
        missing = why_unavailable(inner, device.index, input.dtype) if inner else f"no kernel for {device.type} tensors"
        for other in others:
            if missing and not why_unavailable(other, device.index, input.dtype):
                inner, missing = other, None
        missing = why if foreign else missing
        why = f"the library's convolution, then scale and min: {why}"
        why += f"; its scale and min: {inner}" if not missing else f"; its scale and min: PyTorch's own, because {missing}"
    dtype, backward = str(input.dtype).removeprefix("torch."), ()
    if decision.backward and not foreign and (name != "composite" or not (missing or is_transformed())):
        backward = decision.backward[:2]
    precision = decision.problem.precision if dtype == "float32" else dtype
    return Explanation(name, precision, why, backward, *_others(decision))


def _others(decision):
    """List a decision's candidates, and describe the nearest measured layer."""
    problem, seconds = decision.problem, decision.seconds or {}
    if problem.device.type not in candidates.FUSED:
        return (), ""
    hardware = choice.read_hardware(problem.device)
    refused = choice.why_not_fused(problem, hardware, lambda name: why_unavailable(name, problem.device.index, problem.dtype))
    ranked = [Candidate(name, 1e6 * seconds[name]) for name in sorted(seconds, key=seconds.get)]
    ranked += [Candidate(name, None, reason) for name, reason in refused.items() if name not in seconds]
    return tuple(ranked), estimates.nearest(problem, hardware) if hardware and seconds else ""
