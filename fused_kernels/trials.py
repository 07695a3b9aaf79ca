"""What ``torch.backends.cudnn.benchmark = True`` asks for: the first call of a problem times a few candidates.

The fastest is kept for the process. So a GPU on which nobody has measured anything gets a right choice. Nothing is timed while
a graph is captured or a program traced, nor where deterministic algorithms are asked for: then the estimates decide.
"""

import contextlib
import functools
import os
import statistics
import threading

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from . import build, candidates, choice, composite, dispatch, estimates
from .dispatch import is_transformed
from .rungs import rungs, steps

# Of those ranked first so many are tried, and none that is expected to take so many times as long as the first.
_MOST, _MOST_GRADIENTS, _FACTOR = 3, 2, 2.0
_ROUNDS = 7
# A tie, and a difference that noise makes, goes to what is ranked first.
_GAIN = 0.98
# The GPU waits for so many cycles before each call, half a millisecond: the processor is ahead then, and its time is not
# measured. NOTE: the composite's calls can take it 0.2 ms; with a tenth of a millisecond it lost by up to 1.9 times to kernels
# that are slower.
_HEAD_START = 1_000_000

# Tells whether PyTorch's setting asks for trials.
are_asked_for = torch._C._get_cudnn_benchmark

# What was fastest: decisions by what was wanted and the problem, and gradients' operators by their kind and the problem.
_settled = {}
_MOST_SETTLED = 4096
_NAMES = {"grad_input": candidates.GRAD_INPUT, "grad_weight": candidates.GRAD_WEIGHT}


def _make_lock():
    """Make the lock, anew in a forked process: the thread that held it is not there."""
    global _lock
    _lock = threading.RLock()


_make_lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_lock)


def is_open(decision, args, winners):
    """Tell whether a trial that is asked for could still say otherwise than a decision; arguments: as of ``settle``."""
    problem = decision.problem
    if not _are_wanted() or not decision.seconds or not composite.has_scale_min(problem.device, problem.dtype):
        return False
    return _settled.get((_wanted(args, winners), problem)) is not decision and _can_be_tried(args, problem)


def is_gradient_open(kind, problem, args, name):
    """Tell the same of what ``settle_gradient`` named."""
    if not _are_wanted() or _settled.get((kind, problem)) == name:
        return False
    return bool(_gradient_seconds(kind, problem)) and _can_be_tried(args, problem)


def settle(decision, args, winners):
    """Give a decision with what was fastest in place of what was estimated to be.

    Parameters
    ----------
    decision : Decision
    args : tuple
        Input, weight, bias, scale, and the scales if there are any.
    winners : bool
        Whether each pixel's winner is asked for; it is as well where a gradient will be needed.
    """
    found = recall(decision, args, winners)
    problem, wanted = decision.problem, _wanted(args, winners)
    if found is not decision or not decision.seconds or not _may_try(args, problem):
        return found
    with _lock:
        return _settled.get((wanted, problem)) or _keep((wanted, problem), _settle_forward(decision, args, wanted)) or decision


def recall(decision, args, winners):
    """Give what was settled before for the same, else the decision itself."""
    if _is_deterministic():
        return decision
    return _settled.get((_wanted(args, winners), decision.problem), decision)


def settle_gradient(kind, problem, args):
    """Name the operator that makes a gradient fastest.

    Parameters
    ----------
    kind : str
        "grad_input" or "grad_weight".
    problem : Problem
    args : tuple
        Such an operator's, with the problem's precision, not "auto".
    """
    key = kind, problem
    if not _is_deterministic() and key in _settled:
        return _settled[key]
    estimated = choice.choose_gradient(kind, problem, candidates.read_hardware(problem.device))
    seconds = _gradient_seconds(kind, problem)
    if not seconds or not _may_try(args, problem):
        return estimated
    with _lock:
        if key not in _settled:
            names = shortlist(seconds, problem.dtype, False, _MOST_GRADIENTS)
            calls = {name: functools.partial(dispatch.operator(name, problem.dtype), *args) for name in names}
            best, _ = fastest(calls, problem.device)
            return _keep(key, best) or estimated
        return _settled[key]


def _are_wanted():
    return are_asked_for() and not _is_deterministic()


def _gradient_seconds(kind, problem):
    hardware = candidates.read_hardware(problem.device)
    return hardware and estimates.backward(problem, hardware, candidates.legal(_NAMES[kind], problem, hardware))


def _keep(key, found):
    if found is not None:
        if len(_settled) >= _MOST_SETTLED:
            _settled.clear()
        _settled[key] = found
    return found


def _wanted(args, winners):
    """Say which gradients will be needed, if winners are asked for or any is."""
    wanted = tuple(tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in args[:3])
    if len(args) > 4 and args[4].requires_grad and torch.is_grad_enabled():
        wanted = wanted[0], True, wanted[2]  # the scales' gradient is made from the weights'
    return wanted if winners or any(wanted) else None


def _is_deterministic():
    return torch._C._get_cudnn_deterministic() or torch._C._get_deterministic_algorithms()


def _may_try(args, problem):
    """Tell whether a trial may run now, on these tensors."""
    if problem.device.type != "cuda" or _is_deterministic() or is_transformed():
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing() or _get_current_dispatch_mode_stack():
        return False
    # The last question is asked of the driver.
    return _can_be_tried(args, problem) and not torch.cuda.is_current_stream_capturing()


def _can_be_tried(args, problem):
    """Tell whether there is something to time, of tensors that are nothing but tensors."""
    plain = all(type(arg) in (torch.Tensor, torch.nn.Parameter) for arg in args if isinstance(arg, torch.Tensor))
    return plain and problem.pixels > 0 and problem.input_elements > 0


def _settle_forward(decision, args, wanted):
    """Time what is ranked first; give the decision for the fastest, or None where there was nothing to time."""
    problem = decision.problem
    if not composite.has_scale_min(problem.device, problem.dtype):
        return None
    suffix = "_winners" if wanted else ""
    names = shortlist(choice.costs(decision.seconds), problem.dtype, bool(wanted), _MOST)
    with torch.no_grad():
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        calls = composite.candidate_calls(problem, names, args, suffix)
        if len(calls) > 1:
            # Compiled together, where they are not built.
            for name in names:
                dispatch.start(name + suffix, problem.dtype)
        # Where one can't be had after all, PyTorch's operations would be timed under its name.
        calls = {name: call for name, call in calls.items() if dispatch.is_had(name + suffix, args[0])}
        best, times = fastest(calls, problem.device)
        if best is None:
            return None
        said = ", ".join(f"{name} {1e6 * times[name]:.3g} us" for name in sorted(times, key=times.get))
        why = f"timed on its first call: {said}" if times else "of those tried on its first call, it alone could run"
        decision = decision._replace(**choice.kept(problem, best), why=why)
        if wanted and any(wanted):
            with contextlib.suppress(torch.OutOfMemoryError):
                decision = decision._replace(timed_backward=_settle_backward(decision, args, wanted, calls[best]))
    return decision


def _settle_backward(decision, args, wanted, call):
    """Time the gradients' kernels before a backward pass asks for them."""
    input, weight, _, scale, *_ = args
    problem, (by_input, by_weight, by_bias) = decision.problem, decision.backward
    output, winners = call()
    grad = torch.ones_like(output)
    args = candidates.gradient_args(problem, grad, winners, input, weight, scale)
    if wanted[0]:
        by_input = settle_gradient("grad_input", problem, args["grad_input"])
    if wanted[1]:
        by_weight = settle_gradient("grad_weight", problem, args["grad_weight"])
    return by_input, by_weight, by_bias


def shortlist(seconds, dtype, winners, most=_MOST):
    """Name what to try, the best guess first; what is built already costs no compiler's time, and may be slower by estimate.

    Parameters
    ----------
    seconds : dict
        Name -> estimate.
    dtype : torch.dtype
    winners : bool
        Whether what gives each pixel's winner is tried.
    most : int
        Of those that may have to be built.
    """
    ranked = sorted(seconds, key=seconds.get)
    least = seconds[ranked[0]]
    close = [name for name in ranked[:most] if seconds[name] <= _FACTOR * least]
    others = [name for name in ranked if name not in close and seconds[name] <= _FACTOR**2 * least]
    return close + [name for name in others if _is_built(name, dtype, winners)]


def _is_built(name, dtype, winners):
    rung = rungs.get(name) or steps.get(name)
    if rung is None or rung.device is None:
        return True
    return build.find(**rung.library(dispatch.OVERLOADS[dtype], winners and rung.winners)) is not None


# ---- timing ----


@torch.no_grad()
def fastest(calls, device):
    """Time calls in turns; name the fastest, or None where none ran, and give the medians in seconds of those that were timed.

    What lacks memory is left out, and what can't be built, unless nothing else is there.

    Parameters
    ----------
    calls : dict
        Name -> callable without arguments, the best guess first.
    device : torch.device
    """
    ready, medians, failed = [], {}, None
    with torch.cuda.device(device), _disable_current_modes(), torch._C._DisableAutocast():
        for name, call in calls.items():
            try:
                call()
                ready.append(name)
            except torch.OutOfMemoryError:
                continue
            except torch.AcceleratorError:
                raise
            except RuntimeError:
                failed = name
        if failed and not ready:
            calls[failed]()  # and says why
        if len(ready) > 1:
            with contextlib.suppress(torch.OutOfMemoryError):
                medians = _time({name: calls[name] for name in ready}, device)
    best, costs = ready[0] if ready else None, choice.costs(medians)
    for name in costs:
        if costs[name] < _GAIN * costs[best]:
            best = name
    return best, medians


def _time(calls, device):
    # Twice the L2 cache, written before each call: what a call reads comes from memory, as in a network that is larger.
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    events = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START)
            flush.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    end.synchronize()
    return {name: statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs) for name, pairs in events.items()}
