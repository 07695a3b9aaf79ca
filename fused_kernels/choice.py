"""Which rung runs a problem, which copy the composite makes before it, and which operators its backward pass calls.

First what is legal, as the kernels say (:mod:`fused_kernels.candidates`); then what is fast, which is estimated from recorded
times (:mod:`fused_kernels.estimates`), or timed on the spot (:mod:`fused_kernels.trials`). What is decided here follows from a
:class:`~fused_kernels.problem.Problem` and the GPU's :class:`~fused_kernels.candidates.Hardware` alone.
"""

import functools
import warnings
from typing import NamedTuple

import torch

from . import arguments, candidates, estimates
from .candidates import Copy, read_hardware
from .problem import Problem, check_problem, cudnn_precision, describe_problem
from .rungs import rungs, when_unavailable, why_unavailable

# Where there is no choice: the first that can be had.
SCALE_MIN = {"cpu": ("scale_min",), "cuda": ("scale_min_vectorized", "scale_min_triton")}
SCALE_MIN_BACKWARD = {"cpu": "scale_min_backward", "cuda": "scale_min_vectorized_backward"}
GRAD_BIAS = {"cpu": "grad_bias", "cuda": "grad_bias_private"}


class _Decided(NamedTuple):
    problem: Problem
    rung: str
    why: str
    copies: tuple[Copy | None, Copy | None] | None = None  # the composite's, without and with to_channels_last
    seconds: dict[str, float] | None = None  # estimated, by candidate
    timed_backward: tuple[str, ...] | None = None  # operators of the backward pass, where a trial has found them


class Decision(_Decided):
    """All that follows from a problem on one device."""

    @functools.cached_property
    def backward(self):
        """The operators of the backward pass; None where there are none for the device. Chosen when first asked for."""
        if self.problem.device.type not in GRAD_BIAS:
            return None
        return self.timed_backward or choose_backward(self.problem, read_hardware(self.problem.device))


# Decisions made, by all that they depend on: to make one takes as long as a small kernel.
_decisions = {}
_MOST_DECISIONS = 4096
when_unavailable.append(_decisions.clear)


def decide(input, weight, bias, stride, padding, dilation, groups, precision):
    """Check a fused convolution's arguments and choose; what was decided for the same arguments before is recalled.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    return _recall(check_problem, input, weight, bias, (stride, padding, dilation, groups, precision))


def decide_checked(input, weight, bias, stride, padding, dilation, groups, precision):
    """Choose the same for what an operator was given, which its callers have checked; ``padding`` is that of four sides."""
    # Apart from the padding of the function above by its length.
    return _recall(_describe, input, weight, bias, (tuple(stride), tuple(padding), tuple(dilation), groups, precision))


def _describe(input, weight, bias, *conv):
    arguments.check_tensors(input, weight, bias)
    arguments.check_precision(conv[-1])
    return describe_problem(input, weight.shape, *conv)


def _recall(make_problem, input, weight, bias, given):
    if not _is_exact(given):
        return _decide(make_problem(input, weight, bias, *given))
    precision = given[-1]
    try:
        key = (
            *given,
            cudnn_precision() if precision == "auto" and input.dtype == torch.float32 else None,
            *(input.shape, input.stride(), input.dtype, input.device, input.layout),
            *(weight.shape, weight.dtype, weight.device, weight.layout),
            None if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout),
        )
        decision = _decisions.get(key)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        # What is wrong here, or only has no hash, is found out there.
        return _decide(make_problem(input, weight, bias, *given))
    if decision is None:
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        decision = _decisions[key] = _decide(make_problem(input, weight, bias, *given))
    return decision


def _decide(problem):
    """Choose a rung that is there, or "composite"."""
    device = problem.device
    if device.type not in candidates.FUSED:
        return Decision(problem, "composite", f"no fused kernel for {device.type} tensors")
    if problem.is_symbolic:
        return Decision(problem, "composite", "its sizes are not known yet", (None, None))
    hardware = read_hardware(device)
    decision = choose(problem, hardware, lambda name: why_unavailable(name, device.index, problem.dtype))
    if decision.seconds and not estimates.is_recorded(hardware.name):
        _hint(hardware.name)
    return decision


def _hint(name):
    """Say once what is best on a GPU whose times were not recorded."""
    if name not in _hinted and not torch.backends.cudnn.benchmark:
        _hinted.add(name)
        text = f"no times were recorded on this GPU ({name}), so the choice between kernels is a careful guess; with "
        text += "torch.backends.cudnn.benchmark = True the first call of each problem times them instead"
        warnings.warn(text, stacklevel=6)


_hinted = set()


def _is_exact(values):
    """Tell whether all are integers, strings or tuples of them: to a dictionary, 1.0 and True are 1."""
    types = {*map(type, values)}
    if tuple in types:
        types.remove(tuple)
        return types <= _EXACT and all(_is_exact(value) for value in values if type(value) is tuple)
    return types <= _EXACT


_EXACT = {int, str}


# ---- the choice ----


def choose(problem, hardware, missing=lambda name: None):
    """Choose what is fastest by the estimates.

    Parameters
    ----------
    problem : Problem
    hardware : Hardware
        None of a CPU.
    missing : callable
        Says in one sentence why a kernel is not to be had here, or gives None.

    Returns
    -------
    Decision
    """
    if hardware is None:
        return Decision(problem, *_choose_cpu(problem, missing), (None, None))
    refused = why_not_fused(problem, hardware, missing)
    seconds = estimates.forward(problem, hardware, [name for name, reason in refused.items() if not reason])
    rung, why = _fastest(seconds, refused, estimates.margin(problem, hardware))
    return Decision(problem, rung, why, choose_copies(problem, hardware, seconds), seconds)


def why_not_fused(problem, hardware, missing):
    """Say of each fused kernel why it can't run, or None."""
    names = candidates.FUSED[problem.device.type]
    return {name: missing(name) or candidates.why_not(name, problem, hardware) for name in names}


# Triton compiles conv_triton for every layer, while its first call waits: it must gain so much by it.
_FOR_ONE_LAYER = 1.05
# Seconds that a launch takes the processor, which runs Python for it: a GPU that has nothing else to do waits for so long.
# Where no other kernel of ours can be had, Python launches all. A guess, from launches without a GPU.
_LAUNCHED_BY_PYTHON = 4e-5


def costs(seconds):
    """Give what counts in a choice, name -> seconds: a kernel's time, of conv_triton somewhat more."""
    counted = dict(seconds)
    if "conv_triton" in seconds:
        least = _LAUNCHED_BY_PYTHON if len(seconds.keys() & {*candidates.FUSED["cuda"]}) > 1 else 0.0
        counted["conv_triton"] = max(_FOR_ONE_LAYER * seconds["conv_triton"], least)
    return counted


def _fastest(seconds, refused, margin):
    """Name the candidate with the shortest time, and say what it was compared with.

    ``margin``: by what factor a fused kernel must be faster than the library; below one where the library's time is not sure.
    """
    fused = [name for name in seconds if name in refused]
    if not fused:
        return "composite", "; ".join(dict.fromkeys(filter(None, refused.values()))) or "there is no plan for such sizes"
    library = min(seconds[name] for name in ("composite", "copied") if name in seconds)
    counted = costs(seconds)
    best = min(fused, key=counted.get)
    is_fused = counted[best] * margin <= library
    why = f"estimated from recorded times: {best} {_microseconds(seconds[best])}"
    why += f", the library's convolution and scale_min {_microseconds(library)}"
    rung, taken = (best, seconds[best]) if is_fused else ("composite", library)
    if rung != "conv_triton" and seconds.get("conv_triton", taken) < taken:
        why += f"; conv_triton, {_microseconds(seconds['conv_triton'])}, gains too little for what is compiled for one layer"
        why += " and launched by Python"
    if not is_fused:
        return rung, why
    return rung, f"all in one kernel; {why}" + (", which is less sure" if taken > library else "")


def _microseconds(seconds):
    return f"{1e6 * seconds:.3g} us"


def _choose_cpu(problem, missing):
    (name,) = candidates.FUSED["cpu"]
    if reason := missing(name):
        return "composite", reason
    out_channels, in_channels, kernel_h, kernel_w = problem.weight_shape
    height, width = problem.output_size
    weights = out_channels * in_channels * kernel_h * kernel_w
    if problem.dtype in (torch.float32, torch.bfloat16) and weights >= 2**18 and height * width < 128:
        # Measured on Zen 4: 512 channels on 7 x 7 pixels leave vector lanes empty and are slow to pack the weights for. The
        # library has no fast float16 or float64 to lose to.
        return "composite", f"{name} is slower on an image so small with channels so many"
    return name, "all in one kernel, for cpu tensors"


def kept(problem, name):
    """Give a decision's fields where a candidate was the fastest of those timed."""
    if name in rungs and name != "composite":
        return {"rung": name}
    copies = [candidates.copy_into_other_layout(problem, by_kernel) for by_kernel in (False, True)]
    return {"rung": "composite", "copies": tuple(copies) if name == "copied" else (None, None)}


def choose_copies(problem, hardware, seconds):
    """Choose the composite's copy where to_channels_last may not run, and where it may: only where it was measured to gain."""
    if not ("copied" in seconds and seconds["copied"] < seconds["composite"]):
        return None, None
    kernel, torchs = (candidates.copy_into_other_layout(problem, by_kernel) for by_kernel in (True, False))
    if kernel is None or not kernel.by_kernel:
        return torchs, torchs
    # PyTorch's own copy is slower, by as much as it moves once more.
    gains = seconds["copied"] + 2 * estimates.copy_seconds(problem, hardware) < seconds["composite"]
    return torchs if gains else None, kernel


def choose_backward(problem, hardware):
    """Choose the operators that make the gradients of input, of weights and bias, and of a bias alone."""
    by_input, by_weight = (choose_gradient(kind, problem, hardware) for kind in ("grad_input", "grad_weight"))
    return by_input, by_weight, GRAD_BIAS[problem.device.type]


def choose_gradient(kind, problem, hardware):
    """Choose an operator of the backward pass; ``kind``: "grad_input" or "grad_weight"."""
    if problem.is_symbolic:
        return _always_legal(problem)[kind == "grad_weight"]
    return _choose_gradient(kind, problem, hardware)


# Python's rules ask at every call.
@functools.lru_cache(4096)
def _choose_gradient(kind, problem, hardware):
    names = candidates.GRAD_INPUT if kind == "grad_input" else candidates.GRAD_WEIGHT
    legal = candidates.legal(names, problem, hardware)
    if len(legal) < 2:
        # A GPU that is too old for all of them runs PyTorch's own operations, and none of these.
        return next(iter(legal), names[problem.device.type][0])
    seconds = estimates.backward(problem, hardware, legal)
    return min(legal, key=seconds.get) if seconds else legal[0]


def _always_legal(problem):
    on_gpu = problem.device.type == "cuda"
    names = ("grad_input_gather", "grad_weight_private") if on_gpu else ("grad_input", "grad_weight")
    return *names, GRAD_BIAS[problem.device.type]
