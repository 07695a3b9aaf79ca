"""Training steps: ours beside eager and torch.compile, and each part of one beside the library's."""

import functools
import math
from dataclasses import replace

import torch
from torch.nn import functional as F

from .. import dispatch, ops, progress
from ..candidates import gradient_args, read_hardware
from ..choice import choose_backward
from ..rungs import rungs
from . import peers, workloads
from .clock import compare, per_call, replay, steady, unwaited
from .comparison import ends, run_and_peak
from .records import Record
from .workloads import draw, layout_name, workload

# What decides how the winners are spread: the reference's own input, in which few channels win; one in which all channels are
# alike; and one in which neighbours mostly have the same winner.
INPUTS = ("uniform", "normal", "smooth")


def whole_model(info, device, dtypes, quick, seconds):
    """Give the records of ``bench --training``, part by part: steps of the whole model, and their parts."""
    for dtype in dtypes:
        for channels_last in (False, True):
            for kind in INPUTS[: 1 if quick else None]:
                work = _filled(workload(device, dtype, channels_last), kind)
                yield _whole_steps(info, work, kind, quick, seconds)
                if kind == "uniform":
                    yield _parts_of_a_step(info, work, seconds)
                del work


def layers(info, device, dtypes, seconds):
    """Give the records of ``bench --training --layers``: steps on those of ``LAYERS`` with 32 images, or two on a CPU.

    On a GPU in two ways: replayed from a CUDA graph, which takes none of the host's time, and as calls that nobody waits for,
    which take nothing else ("host").
    """
    for dtype in dtypes:
        for channels_last in (False, True):
            for (images, *size), *rest in workloads.LAYERS:
                if images == 32:
                    images = images if device.type == "cuda" else 2
                    yield _layer_steps(info, draw(device, dtype, channels_last, (images, *size), *rest), seconds)


def _filled(work, kind):
    """Give the workload with other input."""
    if kind == "uniform":
        return work
    batch, channels, height, width = work.input.shape
    generator = torch.Generator(work.input.device).manual_seed(1)
    size = (height, width) if kind == "normal" else (height // 8 + 1, width // 8 + 1)
    input = torch.randn(batch, channels, *size, device=work.input.device, generator=generator)
    if kind == "smooth":
        input = F.interpolate(input, size=(height, width), mode="bicubic")
    layout = torch.channels_last if layout_name(work.input) == "channels_last" else torch.contiguous_format
    return replace(work, input=input.to(work.input.dtype).contiguous(memory_format=layout))


def _whole_steps(info, work, kind, quick, seconds):
    """Time training steps of the whole model on one kind of input, and the memory that they take in addition to the input's."""
    steps, peaks = _steps(work, quick, kind)
    with progress.task(f"timing {len(steps)} training steps ({work.precision}, {layout_name(work.input)}, {kind})"):
        timings = steady(work.input.device, work.bytes_moved(8), seconds)(steps)
    torch.compiler.reset()
    shape, needed = work.shape + f", {kind}" * (kind != "uniform"), work.input.nbytes
    return [
        _record(info, work, work.subject("conv2d_scale_min", name, shape=shape), timing, max(peaks[name] - needed, 0))
        for name, timing in timings.items()
    ]


def _layer_steps(info, work, seconds):
    device = work.input.device
    steps, _ = _steps(work, True, work.shape)
    with progress.task(f"timing {len(steps)} training steps ({work.precision}, {layout_name(work.input)}, {work.shape})"):
        if device.type == "cpu":
            timings = {"choice": compare(steps, device, seconds=seconds, warm_up=0.0)}
        else:
            repeats = max(5, math.ceil(seconds / 1e-2))
            timings = {"choice": _replayed(steps, device, seconds), "host": unwaited(steps, device, repeats, calls=20)}
    torch.compiler.reset()
    return [
        _record(info, work, work.subject(operator, name), timing)
        for operator, found in timings.items()
        for name, timing in found.items()
    ]


def _steps(work, quick, what):
    """Make the steps and run each once: name -> function, name -> the most memory in use; ours by the rung that is chosen."""
    tensors = [t.detach().requires_grad_() for t in (work.input, work.weight, work.bias)]
    grad, eager = _incoming(work), peers.eager(work)

    def ours(*tensors):
        return ops.conv2d_scale_min(*tensors, work.scale, **work.options)

    makers = {"eager": lambda: eager, ops.explain(*work.arguments, **work.options).rung: lambda: ours}
    for name, mode in peers.compile_modes(work.input.device, quick):
        makers[name] = functools.partial(peers.compiled, eager, mode)
    steps, peaks, yardstick = {}, {}, None
    where = f"{work.precision}, {layout_name(work.input)}, {what}"
    for name, make in makers.items():
        with progress.task(f"checking a training step, {name} ({where})"):
            function = make()
            step = functools.partial(_step, function, tensors, grad)
            grads, peaks[name] = run_and_peak(step, work.input)
        weights = grads[1].double()
        yardstick = weights if yardstick is None else yardstick
        # Not even the winners are quite the same; the parts are held against float64.
        if not (weights - yardstick).norm() < yardstick.norm():
            raise RuntimeError(f"{name}: the weights' gradient is not eager's")
        steps[name] = step
        del grads
    # What is built in the background would take the processor from what is timed.
    dispatch.finish_builds()
    return steps, peaks


def _step(function, tensors, grad):
    return torch.autograd.grad(function(*tensors), tensors, grad)


def _incoming(work):
    """Draw the gradient that arrives from behind."""
    images, _, *size = work.output_shape
    return torch.randn(images, 1, *size, device=work.input.device).to(work.input.dtype)


def _replayed(steps, device, seconds, calls=10):
    replays = {name: replay(step, calls) for name, step in steps.items()}
    return per_call(compare(replays, device, seconds=seconds), calls)


def _record(info, work, subject, timing, peak_bytes=0):
    """Make a step's record.

    A library's step is three dense convolutions: forward, and the gradients of input and weights. Ours is one, and each of the
    two gradients reaches one channel of each pixel: a dense convolution's work divided by the output channels.
    """
    is_ours, dense = subject.rung in rungs, work.flops
    flops = dense + 2 * dense // len(work.weight) if is_ours else 3 * dense
    # Ours reads the input twice and writes its gradient once.
    bytes = (work.bytes if is_ours else work.bytes_moved(8)) + 2 * work.input.nbytes
    subject = replace(subject, direction="training")
    return Record.of(info, subject, timing, bytes=bytes, flops=flops, peak_bytes=peak_bytes)


@torch.no_grad()
def _parts_of_a_step(info, work, seconds):
    """Time forward with winners, and each gradient beside the library's of the same winners; errors on two images."""
    rung, grad = ops.explain(*work.arguments).rung, _incoming(work)
    forward = dispatch.operator(f"{rung}_winners", work.input.dtype)
    winners_of = functools.partial(forward, *work.arguments, *work.problem().conv)
    _, winners = winners_of()
    small = ends(work.input), ends(winners).contiguous(), ends(grad)
    clock, done = steady(work.input.device, work.bytes, seconds), []
    subject = work.subject("conv2d_scale_min", rung, direction="forward with winners")
    timing = clock({"winners": winners_of})["winners"]
    done.append(Record.of(info, subject, timing, bytes=work.bytes, flops=work.flops))
    for which, operator in enumerate(("grad_input", "grad_weight")):
        name, function = _ours(work, operator, work.input, winners, grad)
        with progress.task(f"checking and timing {operator} ({work.precision}, {layout_name(work.input)})"):
            exact = _library(work, operator, *small, dtype=torch.float64)()[which]
            found = {name: _ours(work, operator, *small)[1](), "library": _library(work, operator, *small)()[which]}
            timings = clock({name: function, "library": _library(work, operator, work.input, winners, grad)})
        for rung, result in found.items():
            result = result if isinstance(result, torch.Tensor) else result[0]
            apart, size = result.double() - exact, exact.square().mean().sqrt()
            errors = float(apart.square().mean().sqrt() / size), float(apart.abs().max() / size)
            flops = work.flops if rung == "library" else work.flops // len(work.weight)
            subject = work.subject(operator, rung, direction="backward")
            done.append(Record.of(info, subject, timings[rung], bytes=work.bytes, flops=flops, errors=errors))
    return done


def _ours(work, operator, input, winners, grad):
    """Give the name of the kernel that is chosen for a gradient, and its call."""
    problem = work.problem()
    by_input, by_weight, _ = choose_backward(problem, read_hardware(problem.device))
    name = by_input if operator == "grad_input" else by_weight
    args = gradient_args(problem, grad, winners, input, work.weight, work.scale)[operator]
    return name, functools.partial(dispatch.operator(name, grad.dtype), *args)


def _library(work, operator, input, winners, grad, dtype=None):
    """Give the library's call for a gradient: scatter, then the dense pass, as PyTorch does without its scaling."""
    dtype = dtype or work.input.dtype
    mask = [operator == "grad_input", operator == "grad_weight", operator == "grad_weight"]
    indices, geometry = winners.long(), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
    values, input, weight = (grad * work.scale).to(dtype), input.to(dtype), work.weight.to(dtype)

    def run():
        conv_grad = torch.zeros((len(input), *work.output_shape[1:]), dtype=dtype, device=input.device)
        if layout_name(work.input) == "channels_last":
            conv_grad = conv_grad.contiguous(memory_format=torch.channels_last)
        conv_grad.scatter_(1, indices, values)
        return torch.ops.aten.convolution_backward(conv_grad, input, weight, [len(weight)], *geometry)

    return run
