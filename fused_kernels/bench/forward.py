"""Forward passes: the whole model, scale_min alone, other shapes, layers of networks, and what a call takes of the host."""

import functools
import math

import torch
from torch.nn import functional as F

from .. import check, composite, dispatch, ops, reference
from ..rungs import LADDER
from . import peers, workloads
from .clock import compare, per_call, replay, steady, sustained, unwaited
from .comparison import Candidate, Comparison, available, ends
from .limits import ceiling_records, reads
from .records import Subject
from .workloads import draw, dtype_name, layout_name, precisions, shape_name, workload


@torch.no_grad()
def everything(info, device, dtypes, quick, seconds):
    """Give the records of ``bench``, part by part."""
    for dtype in dtypes:
        for channels_last in (False, True):
            work = workload(device, dtype, channels_last)
            for precision in precisions(device, dtype):
                yield _whole_model(info, work, precision, quick, seconds)
            yield _scale_min_alone(info, work, quick, seconds)
            del work
        for precision in precisions(device, dtype):
            yield ceiling_records(info, device, dtype, precision)
    if not quick:
        # Other shapes tell two 16-bit types apart no more than this one does.
        yield from other_shapes(info, device, [dtype for dtype in dtypes if dtype != torch.float16], seconds / 10)


@torch.no_grad()
def other_shapes(info, device, dtypes, seconds):
    """Time the public function and its peers on ``SHAPES``, and what a call takes of the host's time on ``TINY``."""
    for dtype in dtypes:
        yield from _choices(info, device, dtype, workloads.SHAPES, seconds)
        yield _host(info, draw(device, dtype, False, *workloads.TINY), seconds)


@torch.no_grad()
def layers(info, device, dtypes, seconds):
    """Give the records of ``bench --layers``: the public function and its peers on ``LAYERS``."""
    for dtype in dtypes:
        yield from _choices(info, device, dtype, workloads.LAYERS, seconds)


def _whole_model(info, work, precision, quick, seconds):
    """Check and time every rung and peer on the reference workload: in turns, and on a GPU sustained as well."""
    device = work.input.device
    asked = "auto" if precision == work.precision else precision
    candidates = _rungs_and_eager(work, asked)
    if asked == "auto":
        for name, mode in peers.compile_modes(device, quick):
            make = functools.partial(peers.compiled, peers.eager(work), mode, *work.arguments)
            candidates.append(Candidate(name, make, work.bytes_moved(2), work.flops))
        if device.type == "cuda":
            make = functools.partial(peers.cudnn_graph, work)
            candidates.append(Candidate("cudnn-graph", make, work.bytes, work.flops))
    images = ends(work.input)
    conv64 = F.conv2d(images.double(), work.weight.double(), work.bias.double())
    target = check.expected(conv64, scale=work.scale)
    library = check.library_errors(images, work.weight, work.bias, work.scale, precision=asked, target=target)
    subject = work.subject("conv2d_scale_min", "eager", precision=precision)
    clock = steady(device, work.bytes_moved(4), seconds)
    # The convolution alone, for Amdahl; first, before the sustained times heat the chip.
    moved = work.bytes_moved(1) - work.result_bytes
    alone = Candidate("library", lambda: functools.partial(_conv_output, work, asked), moved, work.flops, "conv2d")
    done = Comparison(info, subject, work.input, conv64, library).run([alone], clock)
    hold = functools.partial(sustained, device=device) if device.type == "cuda" and not quick else None
    return Comparison(info, subject, work.input, target, library).run(candidates, clock, sustained=hold) + done


def _rungs_and_eager(work, asked):
    """List eager and every rung that can run the workload at the precision that is asked for."""

    def eager():
        return reference.scale_min(_conv_output(work, asked), work.scale)

    # Between its kernels eager writes and reads the convolution's output, then writes and reads its multiple.
    candidates = [Candidate("eager", lambda: eager, work.bytes_moved(4), work.flops)]
    for rung in LADDER:
        fused = rung.operator == "conv2d_scale_min"
        here = rung.device in (None, work.input.device.type) and (fused or asked == "auto")
        if not here or rung.why_not(work.input.dtype, work.problem(asked).precision, weight_shape=work.weight.shape):
            continue
        call = functools.partial(rung, *work.arguments, precision=asked) if fused else functools.partial(_conv_then, rung, work)
        passes = 4 if rung.name == "reference" else 2 if rung.device is None or not fused else 0
        make = functools.partial(available, rung, call)
        candidates.append(Candidate(rung.name, make, work.bytes_moved(passes), work.flops))
    return candidates


def _conv_output(work, asked):
    """Run the library's convolution at the precision that is asked for."""
    if asked == "auto":
        return work.conv_output()
    return composite.library_conv(work.problem(asked), work.input, work.weight, work.bias)


def _conv_then(rung, work):
    """Run the library's convolution, then a scale_min."""
    return rung(work.conv_output(), work.scale)


def _scale_min_alone(info, work, quick, seconds):
    """Check and time scale_min on the convolution's output."""
    input, device = work.conv_output(), work.input.device
    moved = (input.numel() + input.numel() // input.shape[1]) * input.element_size()

    def entry(name, make):
        return Candidate(name, make, moved, 2 * input.numel(), "scale_min")

    candidates = [entry("eager", lambda: lambda: reference.scale_min(input, work.scale))]
    for rung in LADDER:
        if rung.operator == "scale_min" and rung.device == device.type:
            call = functools.partial(rung, input, work.scale)
            candidates.append(entry(rung.name, functools.partial(available, rung, call)))
    for name, mode in peers.compile_modes(device, quick):
        candidates.append(entry(name, functools.partial(peers.compiled, reference.scale_min, mode, input, work.scale)))
    dtype = dtype_name(input.dtype)
    what = {"precision": dtype, "dtype": dtype, "layout": layout_name(input), "shape": shape_name(input.shape)}
    subject = Subject(operator="scale_min", rung="eager", **what)
    comparison = Comparison(info, subject, input, check.expected(ends(input), scale=work.scale))
    # The ceiling is taken on the same bytes, in the same turns.
    return comparison.run(candidates, steady(device, moved, seconds), reads=reads(input))


def _choices(info, device, dtype, shapes, seconds):
    """Time conv2d_scale_min and its peers on each shape, in both layouts.

    On a GPU the calls are replayed from CUDA graphs, a hundred in a row, or ten of the long ones: they take none of the host's
    time, and the caches are warm. (A graph takes a while to begin, which is not the kernels' time.)
    """
    for channels_last in (False, True):
        for (images, *size), *rest in shapes:
            images = images if device.type == "cuda" else max(1, images // 16)
            yield _choice(info, draw(device, dtype, channels_last, (images, *size), *rest), seconds)


def _choice(info, work, seconds):
    """Time the public function, under the name of the rung that it chooses, and its peers."""
    calls = 1 if work.input.device.type == "cpu" else 100 if work.flops < 1e10 else 10

    def prepare(function):
        return replay(function, calls) if calls > 1 else function

    def clock(functions):
        return per_call(compare(functions, work.input.device, seconds=seconds, warm_up=0.02), calls)

    call, rung = _public(work)
    return _on_a_shape(info, work, "choice", {rung: lambda: call}, clock, prepare)


def _host(info, work, seconds, calls=100):
    """Time calls that nobody waits for: on a GPU, checking, choosing, allocating and launching."""

    def clock(functions):
        return unwaited(functions, work.input.device, max(5, math.ceil(seconds / (calls * 2e-5))), calls)

    call, rung = _public(work)
    alone = functools.partial(dispatch.run, rung, *work.arguments, *work.problem().conv)
    return _on_a_shape(info, work, "host", {"conv2d_scale_min": lambda: call, "operator": lambda: alone}, clock)


def _on_a_shape(info, work, operator, ours, clock, prepare=None):
    """Check and time eager, torch.compile and what else is given: name -> what makes the function."""
    tensors = ends(work.input), work.weight, work.bias, work.scale
    target = check.expected(*tensors, **work.options)
    library = check.library_errors(*tensors, precision=work.problem().precision, target=target, **work.options)
    eager = peers.eager(work)
    makers = {
        "eager": lambda: functools.partial(eager, *work.arguments),
        "compile": functools.partial(peers.compiled, eager, "default", *work.arguments),
        **ours,
    }
    candidates = [Candidate(name, make, work.bytes, work.flops, operator) for name, make in makers.items()]
    comparison = Comparison(info, work.subject(operator, "eager"), work.input, target, library)
    return comparison.run(candidates, clock, prepare=prepare)


def _public(work):
    """Give the public function's call, and what it chooses."""
    call = functools.partial(ops.conv2d_scale_min, *work.arguments, **work.options)
    return call, ops.explain(*work.arguments, **work.options).rung
