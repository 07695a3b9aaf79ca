"""Honest timing of training steps: ours beside eager and torch.compile, and each part of one beside the library's."""

import functools
import math
from dataclasses import replace

import torch
from torch.nn import functional as F

from . import bench, choice, ops, progress, reference
from .problem import check_problem
from .rungs import rungs

# What decides how the winners are spread: the reference's own input, in which few channels win; one in which all channels are
# alike; and one in which neighbours mostly have the same winner.
INPUTS = ("uniform", "normal", "smooth")


def parts(common, device, dtypes, quick, layers, seconds):
    """Give the records of ``bench --training``, part by part: the whole model's steps, or with ``layers`` those of layers."""
    for dtype in dtypes:
        for channels_last in (False, True):
            if layers:
                yield from _layers(common, device, dtype, channels_last, seconds / 10)
                continue
            for kind in INPUTS[: 1 if quick else None]:
                load = _filled(bench.workload(device, dtype, channels_last), kind)
                yield _whole_model(common, load, kind, quick, seconds)
                if kind == "uniform":
                    yield _parts_of_a_step(common, load, seconds)
                del load


def _filled(load, kind):
    """Give the workload with other input."""
    if kind == "uniform":
        return load
    batch, channels, height, width = load.input.shape
    generator = torch.Generator(load.input.device).manual_seed(1)
    size = (height, width) if kind == "normal" else (height // 8 + 1, width // 8 + 1)
    input = torch.randn(batch, channels, *size, device=load.input.device, generator=generator)
    if kind == "smooth":
        input = F.interpolate(input, size=(height, width), mode="bicubic")
    layout = torch.channels_last if bench._layout(load.input) == "channels_last" else torch.contiguous_format
    return replace(load, input=input.to(load.input.dtype).contiguous(memory_format=layout))


def _whole_model(common, load, kind, quick, seconds):
    """Time training steps of the whole model on one kind of input; and the memory that they take besides the input's."""
    device, needed = load.input.device, load.input.numel() * load.input.element_size()
    steps, peaks = _steps(load, quick, kind)
    precision, layout = bench._precisions(device, load.input.dtype)[0], bench._layout(load.input)
    with progress.task(f"timing {len(steps)} training steps ({precision}, {layout}, {kind})"):
        timings = bench._steady(device, load.bytes_moved(8), seconds)(steps)
    torch.compiler.reset()
    shape = load.shape + f", {kind}" * (kind != "uniform")
    return [
        _record(common, load, "conv2d_scale_min", name, timing, shape, max(peaks[name] - needed, 0))
        for name, timing in timings.items()
    ]


def _layers(common, device, dtype, channels_last, seconds):
    """Time training steps on :data:`bench.LAYERS` of 32 images, or two on a CPU.

    On a GPU in two ways: replayed from a CUDA graph, which takes none of the host's time, and as calls that nobody waits for,
    which take nothing else ("host").
    """
    for (images, *size), *rest in bench.LAYERS:
        if images != 32:
            continue
        images = images if device.type == "cuda" else 2
        load = bench._draw(device, dtype, channels_last, (images, *size), *rest)
        steps, _ = _steps(load, True, load.shape)
        with progress.task(f"timing {len(steps)} training steps ({bench._name(dtype)}, {load.shape})"):
            if device.type == "cpu":
                timings = {"choice": bench.compare(steps, device, seconds=seconds, warm_up=0.0)}
            else:
                repeats = max(5, math.ceil(seconds / 1e-2))
                timings = {
                    "choice": _replayed(steps, device, seconds),
                    "host": bench._unwaited(steps, device, repeats, calls=20),
                }
        torch.compiler.reset()
        yield [
            _record(common, load, operator, name, timing, load.shape)
            for operator, found in timings.items()
            for name, timing in found.items()
        ]


def _steps(load, quick, what):
    """Make the steps and run each once: name -> function, name -> the most memory in use; ours by the rung that is chosen."""
    device, how = load.input.device, {"stride": load.stride, "padding": load.padding}
    tensors = [t.detach().requires_grad_() for t in (load.input, load.weight, load.bias)]
    grad = torch.randn(load.output_shape[0], 1, *load.output_shape[2:], device=device).to(load.input.dtype)

    def eager(input, weight, bias):
        return reference.scale_min(F.conv2d(input, weight, bias, **how), load.scale)

    def ours(*tensors):
        return ops.conv2d_scale_min(*tensors, load.scale, **how)

    makers = {"eager": lambda: eager, ops.explain(*load.arguments, **how).rung: lambda: ours}
    for name, mode in bench._compile_modes(device, quick):
        makers[name] = functools.partial(torch.compile, eager, mode=mode, dynamic=False)
    steps, peaks, yardstick = {}, {}, None
    where = f"{bench._precisions(device, load.input.dtype)[0]}, {bench._layout(load.input)}, {what}"
    for name, make in makers.items():
        with progress.task(f"checking a training step, {name} ({where})"):
            function = make()
            step = functools.partial(_step, function, tensors, grad)
            grads, peaks[name] = bench._run_and_peak(step, load.input)
        weights = grads[1].double()
        yardstick = weights if yardstick is None else yardstick
        # Not even the winners are quite the same; the parts are held against float64.
        if not (weights - yardstick).norm() < yardstick.norm():
            raise RuntimeError(f"{name}: the weights' gradient is not eager's")
        steps[name] = step
        del grads
    return steps, peaks


def _step(function, tensors, grad):
    return torch.autograd.grad(function(*tensors), tensors, grad)


def _record(common, load, operator, name, timing, shape, peak=0):
    """Make a record: by the book three dense convolutions, and ours one, and for two gradients an output channel's share."""
    dense, is_ours = load.flops, name in rungs
    flops = dense + 3 * dense // len(load.weight) if is_ours else 3 * dense
    # Ours reads the input twice and writes its gradient once.
    bytes = (load.bytes if is_ours else load.bytes_moved(8)) + 2 * load.input.numel() * load.input.element_size()
    where = (bench._precisions(load.input.device, load.input.dtype)[0], load.input.dtype, bench._layout(load.input), shape)
    return bench._record(common, operator, name, *where, timing, bytes, flops, peak, direction="training")


def _replayed(steps, device, seconds, calls=10):
    replays = {name: bench.replay(step, calls) for name, step in steps.items()}
    return bench._per_call(bench.compare(replays, device, seconds=seconds), calls)


@torch.no_grad()
def _parts_of_a_step(common, load, seconds):
    """Time forward with winners, and each gradient beside the library's of the same winners; errors on two images."""
    device, dtype, scale = load.input.device, load.input.dtype, load.scale
    precision, layout = bench._precisions(device, dtype)[0], bench._layout(load.input)
    explained = ops.explain(*load.arguments)
    problem = check_problem(*load.arguments[:3], 1, 0, 1, 1, "auto")
    forward = getattr(torch.ops.fused_kernels, f"{explained.rung}_winners").default
    grad = torch.randn(load.output_shape[0], 1, *load.output_shape[2:], device=device).to(dtype)

    def ours(operator, input, winners, grad):
        by_input, by_weight, _ = choice.choose_backward(problem, choice.hardware(device))
        if operator == "grad_input":
            name = by_input
            args = grad, winners, load.weight, scale, input.shape[2:], *problem.conv, problem.is_channels_last
        else:
            name = by_weight
            args = grad, winners, input, scale, len(load.weight), load.weight.shape[2:], *problem.conv
        return name, lambda: getattr(torch.ops.fused_kernels, name).default(*args)

    def library(operator, input, winners, grad, dtype=dtype):
        """Scatter, then the dense pass: what PyTorch does, but for its multiplication by the scale."""
        mask = [operator == "grad_input", operator == "grad_weight", operator == "grad_weight"]
        indices, geometry = winners.long(), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
        tensors = (grad * scale).to(dtype), input.to(dtype), load.weight.to(dtype)

        def run():
            conv_grad = torch.zeros((len(input), *load.output_shape[1:]), dtype=dtype, device=device)
            if layout == "channels_last":
                conv_grad = conv_grad.contiguous(memory_format=torch.channels_last)
            conv_grad.scatter_(1, indices, tensors[0])
            return torch.ops.aten.convolution_backward(conv_grad, *tensors[1:], [len(load.weight)], *geometry)

        return run

    _, winners = forward(*load.arguments, *problem.conv)
    small = bench._ends(load.input), bench._ends(winners).contiguous(), bench._ends(grad)
    clock, done = bench._steady(device, load.bytes, seconds), []
    where = (precision, dtype, layout, load.shape)
    timing = clock({"winners": lambda: forward(*load.arguments, *problem.conv)})["winners"]
    what = ("conv2d_scale_min", explained.rung, *where, timing, load.bytes, load.flops)
    done.append(bench._record(common, *what, direction="forward with winners"))
    for operator in ("grad_input", "grad_weight"):
        name, function = ours(operator, load.input, winners, grad)
        with progress.task(f"checking and timing {operator} ({precision}, {layout})"):
            exact = library(operator, *small, dtype=torch.float64)()
            which = 0 if operator == "grad_input" else 1
            found = {name: ours(operator, *small)[1](), "library": library(operator, *small)()[which]}
            timings = clock({name: function, "library": library(operator, load.input, winners, grad)})
        for rung, result in found.items():
            result = result if isinstance(result, torch.Tensor) else result[0]
            apart, size = result.double() - exact[which], exact[which].square().mean().sqrt()
            errors = float(apart.square().mean().sqrt() / size), float(apart.abs().max() / size)
            flops = load.flops if rung == "library" else load.flops // len(load.weight)
            what = (operator, rung, *where, timings[rung], load.bytes, flops, 0, *errors)
            done.append(bench._record(common, *what, direction="backward"))
    return done
