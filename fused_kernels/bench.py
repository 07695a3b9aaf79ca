"""Honest timing: every rung beside its peers and the machine's ceilings, in one run, each result checked before it is timed."""

import contextlib
import csv
import functools
import math
import os
import platform
import random
import re
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from . import arguments, build, check, composite, dispatch, ops, progress, reference
from .check import Errors
from .problem import check_problem, resolve_precision
from .rungs import LADDER, rungs

# What torch.compile searches longest with. The same kernels as "max-autotune", without the CUDA graph: its replay would first
# copy the whole input to a fixed address, half a millisecond that the peer need not pay.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


# ---- where and what ----


def default_device():
    """Give the GPU if a CUDA rung is available on it, else the CPU."""
    available = any(rung.device == "cuda" and rung.why_unavailable() is None for rung in LADDER)
    return torch.device("cuda" if available else "cpu")


def machine(device=None):
    """Name the machine as its file in figures/data is named: the GPU's name, such as "nvidia-h200", or "cpu"."""
    device = torch.device(device or default_device())
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@dataclass
class Workload:
    """A convolution's tensors, fresh random ones: input uniform in [0, 1), weight and bias as nn.Conv2d draws them."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    scale: float = reference.scale_factor
    stride: int = 1
    padding: int = 0

    @property
    def arguments(self):
        """What a conv2d_scale_min takes."""
        return self.input, self.weight, self.bias, self.scale

    @property
    def output_shape(self):
        """The convolution's output shape."""
        geometry = (self.stride,) * 2, (self.padding,) * 4, (1, 1)
        return len(self.input), len(self.weight), *arguments.output_size(self.input.shape, self.weight.shape, *geometry)

    @property
    def shape(self):
        """Name the shape, as a record does."""
        rest = f" stride {self.stride}" * (self.stride > 1) + f" padding {self.padding}" * (self.padding > 0)
        return f"{_by(self.input.shape)} * {_by(self.weight.shape)}{rest}"

    @property
    def flops(self):
        """Count the convolution's multiplications and additions."""
        return 2 * math.prod(self.output_shape) * self.weight[0].numel()

    @property
    def bytes(self):
        """Count what no implementation can avoid to move: input, weight, bias and result, each once."""
        elements = self.input.numel() + self.weight.numel() + self.bias.numel()
        return elements * self.input.element_size() + self.result_bytes

    @property
    def result_bytes(self):
        """Count the result's bytes."""
        return math.prod(self.output_shape) // self.output_shape[1] * self.input.element_size()

    def bytes_moved(self, passes):
        """Count what is moved if the convolution's output is written or read ``passes`` times between kernels."""
        return self.bytes + passes * math.prod(self.output_shape) * self.input.element_size()

    def conv_output(self):
        """Run the library's convolution: the input of a scale_min."""
        return F.conv2d(self.input, self.weight, self.bias, self.stride, self.padding)


# What else is timed: few channels, a usual layer, a large kernel; small images with many channels, a first layer, 1 x 1, one
# image, odd sizes. Input, output channels, kernel, stride, padding.
SHAPES = (
    ((128, 3, 32, 32), 16, 3, 1, 0),
    ((32, 64, 56, 56), 64, 3, 1, 0),
    ((8, 32, 512, 512), 256, 5, 1, 0),
    ((32, 512, 7, 7), 512, 3, 1, 1),
    ((32, 3, 224, 224), 64, 7, 2, 3),
    ((32, 256, 56, 56), 64, 1, 1, 0),
    ((1, 64, 56, 56), 64, 3, 1, 1),
    ((3, 40, 37, 53), 72, 3, 1, 0),
)
# And one so small that a call is nothing but overhead.
TINY = ((1, 16, 8, 8), 32, 3, 1, 0)

# The layers of a ResNet, and other kernels on images of its sizes: channels, height and width, output channels, kernel, stride.
# All padded as such networks pad, by half a kernel.
_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
_BASIC = tuple((channels, size, channels, 3, 1) for channels, size in _STAGES)
_POINTWISE = (
    *((channels, size, 4 * channels, 1, 1) for channels, size in _STAGES),
    *((4 * channels, size, channels, 1, 1) for channels, size in _STAGES),
)
_LAYERS = (
    *_BASIC,
    *((channels, size, 2 * channels, 3, 2) for channels, size in _STAGES[:3]),
    *_POINTWISE,
    *((4 * channels, size, 8 * channels, 1, 2) for channels, size in _STAGES[:3]),
    *((4 * channels, size, 2 * channels, 1, 2) for channels, size in _STAGES[:3]),
    *((channels, size, channels, 5, 1) for channels, size in _STAGES[:3]),
    (32, 56, 64, 5, 1),
    (64, 28, 128, 5, 1),
    (64, 56, 64, 7, 1),
    (64, 28, 64, 7, 1),
    (128, 14, 256, 7, 1),
    (3, 224, 64, 7, 2),
)
# Of them all with 32 images and with one; then a few of the most usual with other numbers of images.
LAYERS = tuple(
    ((images, channels, size, size), out_channels, kernel, stride, kernel // 2)
    for images, layers in ((32, _LAYERS), (1, _LAYERS), (4, _BASIC), (8, _BASIC + _POINTWISE), (64, _BASIC))
    for channels, size, out_channels, kernel, stride in layers
)


def workload(device=None, dtype=torch.float32, channels_last=False, *, batch=None, seed=0):
    """Draw the reference workload: 64 images on a GPU, 2 on a CPU, of 64 x 256 x 256; 128 output channels under a 3 x 3 kernel.

    Parameters
    ----------
    device : torch.device, optional
        By default :func:`default_device`.
    dtype : torch.dtype
    channels_last : bool
        Memory layout of input and weight.
    batch, seed : int, optional

    Returns
    -------
    Workload
    """
    device = torch.device(device or default_device())
    batch = batch or (reference.batch_size if device.type == "cuda" else 2)
    shape = (batch, reference.in_channels, reference.height, reference.width)
    return _draw(device, dtype, channels_last, shape, reference.out_channels, reference.kernel_size, seed=seed)


def _draw(device, dtype, channels_last, shape, out_channels, kernel_size, stride=1, padding=0, seed=0):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(seed)
    input = torch.rand(shape, device=device, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(shape[1], out_channels, kernel_size)
    weight = conv.weight.detach().to(device, dtype, memory_format=layout)
    bias = conv.bias.detach().to(device, dtype)
    return Workload(input.to(dtype).contiguous(memory_format=layout), weight, bias, stride=stride, padding=padding)


# ---- timing ----


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and the 20th and 80th percentiles of ``repeats`` calls."""

    p20: float
    p50: float
    p80: float
    repeats: int


def measure(function, device=None, *, bytes=None, seconds=0.3):
    """Time a function: warm-up, then at least ``seconds`` of calls, 10 at least on a GPU and 5 on a CPU.

    Parameters
    ----------
    function : callable
        Takes no arguments.
    device : torch.device, optional
        By default :func:`default_device`.
    bytes : int, optional
        What one call moves. Where that is less than four times the GPU's L2 cache, the cache is flushed before every call.
    seconds : float

    Returns
    -------
    Timing
    """
    return compare({"": function}, device, bytes=bytes, seconds=seconds)[""]


def compare(functions, device=None, *, bytes=None, seconds=0.3, warm_up=0.1, before=None):
    """Time several functions in turns, so that a drift of the machine's clock strikes all of them alike.

    Parameters
    ----------
    functions : dict
        Name -> callable without arguments.
    device, bytes, seconds
        As for :func:`measure`, ``seconds`` for each function on average.
    warm_up : float
        Seconds of calls before the first that counts, for the clocks to settle.
    before : callable, optional
        Called before every call and not timed, in place of the flush: what a call finds in the caches.

    Returns
    -------
    dict
        Name -> :class:`Timing`.
    """
    device = torch.device(device or default_device())
    clock = _cuda_times if device.type == "cuda" else _cpu_times
    before = before or _l2_flush(device, bytes)
    # The first call may build and allocate; the later ones also tell how long a call takes.
    clock(functions, 1, before)
    start, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - start < warm_up:
        clock(functions, 1, before)
        rounds += 1
    mean = (time.perf_counter() - start) / rounds / len(functions)
    least = 10 if device.type == "cuda" else 5
    repeats = max(least, min(1000, math.ceil(seconds / mean)))
    return {name: _timing(times) for name, times in clock(functions, repeats, before).items()}


def replay(function, calls=10):
    """Capture calls of a function in a CUDA graph; replayed, they take none of the host's time.

    Parameters
    ----------
    function : callable
        Takes no arguments; runs on the current GPU, and waits for nothing.
    calls : int
        How many, one after the other.

    Returns
    -------
    callable
        Runs all the calls; gives nothing.
    """
    # What is built or chosen on a first call cannot be captured.
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def _timing(times):
    p20, p50, p80 = (torch.tensor(times, dtype=torch.float64).quantile(q).item() for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(times))


def _cpu_times(functions, repeats, before):
    times = {name: [] for name in functions}
    for name, function in _in_turns(functions, repeats):
        before()
        start = time.perf_counter()
        function()
        times[name].append(time.perf_counter() - start)
    return times


def _cuda_times(functions, repeats, before):
    events = {name: [] for name in functions}
    for name, function in _in_turns(functions, repeats):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def _in_turns(functions, repeats):
    """Give every function once a round, each round in another order: each finds the caches as the one before it left them."""
    order, shuffle = list(functions.items()), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        yield from order


def _l2_flush(device, bytes):
    """Give a function that writes twice a GPU's L2 cache, or does nothing where the problem itself flushes it."""
    if device.type == "cpu":
        return lambda: None
    size = torch.cuda.get_device_properties(device).L2_cache_size
    if bytes is None or bytes >= 4 * size:
        return lambda: None
    buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)
    return buffer.zero_


def ceilings(device=None, dtype=torch.float32, precision=None):
    """Measure what the machine can do at best.

    Parameters
    ----------
    device : torch.device, optional
        By default :func:`default_device`.
    dtype : torch.dtype
    precision : {"ieee", "tf32"}, optional
        Of a float32 matmul on a GPU, "tf32" by default.

    Returns
    -------
    dict
        "copy": bytes/s, read and written, from one buffer of the device to another; "read": bytes/s of the best of a few
        read-only reductions; both over 1 GiB (128 MiB on a CPU). "matmul": flop/s of torch.matmul on square matrices of
        8192 (1024 on a CPU) random normal numbers.
    """
    device = torch.device(device or default_device())
    found = _ceilings(device, dtype, precision)
    return {name: amount / timing.p50 for name, (amount, timing, _) in found.items()}


def _ceilings(device, dtype, precision):
    """Give name -> (bytes or flops, timing, shape)."""
    on_gpu = device.type == "cuda"
    flat = torch.rand((2**30 if on_gpu else 2**27) // dtype.itemsize, device=device).to(dtype)
    other, size = torch.empty_like(flat), flat.numel() * dtype.itemsize
    copy = measure(functools.partial(other.copy_, flat), device, bytes=2 * size)
    read = min(compare(_reads(flat), device, bytes=size).values(), key=lambda timing: timing.p50)
    shape = str(flat.numel())
    del other, flat
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    # torch.matmul has a setting of its own, which is not the convolutions'.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != "ieee"
    try:
        matmul = measure(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"copy": (2 * size, copy, shape), "read": (size, read, shape), "matmul": (2 * side**3, matmul, _by([side] * 3))}


def _reads(tensor):
    """Give read-only reductions of a dense tensor's memory: torch's own sum of a 16-bit type is not the fastest reader."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    words = flat[: flat.numel() // 2 * 2].view(torch.float32)
    return {
        "sum": functools.partial(torch.sum, flat),
        "sum of words": functools.partial(torch.sum, words),
        "amax of words": functools.partial(torch.amax, words),
    }


# ---- records ----


@dataclass(frozen=True)
class Record:
    """One measurement, one line of figures/data/<machine>.csv.

    ``rung`` names a rung or a peer ("eager", "compile", "compile-max-autotune", "cudnn-graph"), the library's convolution alone
    ("library", operator "conv2d"), or a ceiling (operator "ceiling": "copy", "read", "read-sum" by torch.sum, "matmul").
    Where the operator is "choice", the rung is what conv2d_scale_min chose for the shape, and its time the public function's;
    where it is "host", times are the processor's for a call, and "operator" is that rung's operator by itself.
    Direction "training" is forward and backward with all three gradients; "forward with winners" and "backward" are its parts,
    whose operator is "grad_input" or "grad_weight" and whose error is relative, given the same winners. Of a whole step no
    error is recorded, for its winners are its own, and ``peak_bytes`` is what it needs beside the input.
    ``bytes`` counts what must move at the least, for the whole model also between the kernels that the work is divided into;
    ``run`` is one id an invocation, and ratios are taken within one run.
    """

    date: str
    commit: str
    machine: str
    device: str
    driver: str
    cuda: str
    torch: str
    run: str
    operator: str
    rung: str
    precision: str
    dtype: str
    layout: str
    shape: str
    direction: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    bytes: int
    flops: int
    peak_bytes: int
    rms_error: float
    max_error: float
    correct: bool

    @property
    def gbps(self):
        """The rate at which its bytes move, GB/s."""
        return self.bytes / self.p50_ms / 1e6

    @property
    def tflops(self):
        """The rate of its arithmetic, TFLOP/s."""
        return self.flops / self.p50_ms / 1e9


def data_dir():
    """Give the folder of the records: figures/data of the checkout that holds this package, else of the current folder."""
    checkout = Path(__file__).parent.parent
    base = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return base / "figures" / "data"


def records(machine=None, data=None):
    """Read what was recorded, on one machine or on all of them, oldest first."""
    folder = Path(data or data_dir())
    files = sorted(folder.glob("*.csv")) if machine is None else [folder / f"{machine}.csv"]
    found = []
    for file in files:
        if file.exists():
            with file.open(newline="") as lines:
                found += [_parse(row) for row in csv.DictReader(lines)]
    return found


def append(new, data=None):
    """Append records to their machines' files."""
    folder = Path(data or data_dir())
    folder.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Record)]
    for record in new:
        file = folder / f"{record.machine}.csv"
        fresh = not file.exists()
        with file.open("a", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            if fresh:
                writer.writerow(names)
            writer.writerow(astuple(record))


def latest(records, **where):
    """Select the newest run among the records that match, such as ``latest(all, machine="cpu", operator="scale_min")``."""
    matching = select(records, **where)
    if not matching:
        return []
    run = max(matching, key=lambda r: r.date).run
    return [r for r in matching if r.run == run]


def select(records, **where):
    """Select the records whose fields have these values, a tuple standing for any of its members."""
    return [
        r for r in records if all(getattr(r, k) in v if isinstance(v, tuple) else getattr(r, k) == v for k, v in where.items())
    ]


def _parse(row):
    convert = {int: lambda s: int(float(s)), float: float, bool: lambda s: s == "True", str: str}
    return Record(**{f.name: convert[f.type](row[f.name]) for f in fields(Record)})


# ---- the run ----


@dataclass(frozen=True)
class Candidate:
    """Something to check and to time: ``make()`` gives the function, or raises where this machine lacks it."""

    rung: str
    make: Callable[[], Callable[[], torch.Tensor]]
    bytes: int
    flops: int = 0
    operator: str = "conv2d_scale_min"


def run(device=None, *, dtypes=None, quick=False, layers=False, training=False, machine=None, seconds=0.3, each=None):
    """Check and time the whole model and scale_min alone: rungs, peers and ceilings, all in this process.

    And the public function on other shapes, where there is a choice to make.

    Rungs and peers of one dtype, precision and layout are timed in turns. What this machine lacks is skipped, with a printed
    reason.

    Parameters
    ----------
    device : torch.device, optional
        By default :func:`default_device`.
    dtypes : sequence of torch.dtype, optional
        By default float32, bfloat16 and float16 on a GPU, float32 and bfloat16 on a CPU or if ``layers``; float32 alone if
        ``quick``, or on a CPU if ``training``.
    quick : bool
        One dtype and shape, and without torch.compile's max-autotune, whose search takes minutes.
    layers : bool
        In place of all that, the public function on :data:`LAYERS`.
    training : bool
        In place of all that, training steps of the whole model, and their parts; with ``layers``, training steps of those.
    machine : str, optional
        By default :func:`machine`.
    seconds : float
        Time measured for each entry.
    each : callable, optional
        Called with the new records of every part as soon as they are there: the whole takes minutes.

    Returns
    -------
    list of Record
    """
    device = torch.device(device or default_device())
    common = _environment(device, machine)
    if dtypes is None:
        most = 1 if quick else 2 if layers or device.type == "cpu" else 3
        most = 1 if training and device.type == "cpu" else most
        dtypes = [torch.float32, torch.bfloat16, torch.float16][:most]
    done = []
    if training:
        from . import bench_training  # which needs this module

        parts = bench_training.parts(common, device, dtypes, quick, layers, seconds)
    elif layers:
        parts = _layers(common, device, dtypes, seconds / 5)
    else:
        parts = _parts(common, device, dtypes, quick, seconds)
    for part in parts:
        done += part
        if each:
            each(part)
    return done


@torch.no_grad()
def _parts(common, device, dtypes, quick, seconds):
    for dtype in dtypes:
        for channels_last in (False, True):
            load = workload(device, dtype, channels_last)
            for precision in _precisions(device, dtype):
                yield _whole_model(common, load, precision, quick, seconds)
            yield _scale_min_alone(common, load, quick, seconds)
            del load
        for precision in _precisions(device, dtype):
            yield _ceiling_records(common, device, dtype, precision)
    if not quick:
        # Other shapes tell two 16-bit types apart no more than this one does.
        yield from _other_shapes(common, device, [dtype for dtype in dtypes if dtype != torch.float16], seconds / 10)


def _other_shapes(common, device, dtypes, seconds):
    """Time conv2d_scale_min and its peers on :data:`SHAPES`, and what a call takes of the host's time on :data:`TINY`."""
    for dtype in dtypes:
        yield from _choices(common, device, dtype, SHAPES, seconds)
        yield _host(common, _draw(device, dtype, False, *TINY), seconds)


@torch.no_grad()
def _layers(common, device, dtypes, seconds):
    for dtype in dtypes:
        yield from _choices(common, device, dtype, LAYERS, seconds)


def _choices(common, device, dtype, shapes, seconds):
    """Time conv2d_scale_min and its peers on each shape, in both layouts.

    On a GPU the calls are replayed from CUDA graphs, a hundred in a row, or ten of the long ones: they take none of the host's
    time, and the caches are warm. (A graph takes a while to begin, which is not the kernels' time.)
    """
    for channels_last in (False, True):
        for (images, *size), *rest in shapes:
            images = images if device.type == "cuda" else max(1, images // 16)
            yield _choice(common, _draw(device, dtype, channels_last, (images, *size), *rest), seconds)


def _choice(common, load, seconds):
    """Time the public function, under the name of the rung that it chooses, and its peers."""
    calls = 1 if load.input.device.type == "cpu" else 100 if load.flops < 1e10 else 10

    def prepare(function):
        return replay(function, calls) if calls > 1 else function

    def clock(functions):
        return _per_call(compare(functions, load.input.device, seconds=seconds, warm_up=0.02), calls)

    (call, rung), precision = _public(load), _precisions(load.input.device, load.input.dtype)[0]
    return _on_a_shape(common, load, precision, "choice", {rung: lambda: call}, clock, prepare)


def _per_call(timings, calls):
    return {name: Timing(t.p20 / calls, t.p50 / calls, t.p80 / calls, t.repeats) for name, t in timings.items()}


def _host(common, load, seconds, calls=100):
    """Time calls that nobody waits for: on a GPU, checking, choosing, allocating and launching."""

    def clock(functions):
        return _unwaited(functions, load.input.device, max(5, math.ceil(seconds / (calls * 2e-5))), calls)

    (call, rung), precision = _public(load), _precisions(load.input.device, load.input.dtype)[0]
    problem = check_problem(*load.arguments[:3], load.stride, load.padding, 1, 1, "auto")
    alone = functools.partial(dispatch.run, rung, *load.arguments, *problem.conv)
    ours = {"conv2d_scale_min": lambda: call, "operator": lambda: alone}
    return _on_a_shape(common, load, precision, "host", ours, clock)


def _unwaited(functions, device, repeats, calls):
    """Time so many calls in a row by the host's clock, in turns."""
    times = {name: [] for name in functions}
    for name, function in _in_turns(functions, repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times[name].append((time.perf_counter() - start) / calls)
    return {name: _timing(found) for name, found in times.items()}


def _on_a_shape(common, load, precision, operator, ours, clock, prepare=None):
    """Check and time eager, torch.compile and what else is given: name -> what makes the function."""
    how = {"stride": load.stride, "padding": load.padding}
    tensors = _ends(load.input), load.weight, load.bias, load.scale
    resolved, target = resolve_precision(load.input.dtype, load.input.device.type, "auto"), check.expected(*tensors, **how)
    library = check.library_errors(*tensors, precision=resolved, target=target, **how)

    def eager(input, weight, bias, scale):
        return reference.scale_min(F.conv2d(input, weight, bias, **how), scale)

    makers = {
        "eager": lambda: functools.partial(eager, *load.arguments),
        "compile": functools.partial(_compiled, eager, "default", *load.arguments),
        **ours,
    }
    candidates = [Candidate(name, make, load.bytes, load.flops, operator) for name, make in makers.items()]
    return _section(common, candidates, target, library, load.input, load.shape, precision, clock, prepare=prepare)


def _public(load):
    """Give the public function's call, and what it chooses."""
    how = {"stride": load.stride, "padding": load.padding}
    return functools.partial(ops.conv2d_scale_min, *load.arguments, **how), ops.explain(*load.arguments, **how).rung


def _precisions(device, dtype):
    """Name the precisions to run, PyTorch's default first."""
    if dtype != torch.float32:
        return [_name(dtype)]
    if device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return ["tf32", "ieee"]
    return ["ieee"]


def _whole_model(common, load, precision, quick, seconds):
    device, dtype = load.input.device, load.input.dtype
    default = precision == _precisions(device, dtype)[0]
    asked = "auto" if default else precision

    def conv():
        if default:
            return load.conv_output()
        problem = check_problem(load.input, load.weight, load.bias, 1, 0, 1, 1, precision)
        return composite.library_conv(problem, load.input, load.weight, load.bias)

    def rung_of(rung):
        if rung.operator == "scale_min":
            return lambda: rung(load.conv_output(), load.scale)
        return lambda: rung(*load.arguments, precision=asked)

    def entry(name, passes, make):
        return Candidate(name, make, load.bytes_moved(passes), load.flops)

    def eager(input, weight, bias, scale):
        return reference.scale_min(F.conv2d(input, weight, bias), scale)

    # Between its kernels eager writes and reads the convolution's output, then writes and reads its multiple.
    candidates = [entry("eager", 4, lambda: lambda: reference.scale_min(conv(), load.scale))]
    for rung in LADDER:
        fused = rung.operator == "conv2d_scale_min"
        if rung.why_not(load.input.dtype, resolve_precision(load.input.dtype, device.type, asked)):
            continue
        if rung.device in (None, device.type) and (fused or default):
            passes = 4 if rung.name == "reference" else 2 if rung.device is None or not fused else 0
            candidates.append(entry(rung.name, passes, functools.partial(_available, rung, rung_of(rung))))
    if default:
        for name, mode in _compile_modes(device, quick):
            candidates.append(entry(name, 2, functools.partial(_compiled, eager, mode, *load.arguments)))
        if device.type == "cuda":
            candidates.append(entry("cudnn-graph", 0, functools.partial(_cudnn_graph, load)))
    ends = _ends(load.input)
    conv64 = F.conv2d(ends.double(), load.weight.double(), load.bias.double())
    target = check.expected(conv64, scale=load.scale)
    library = check.library_errors(ends, load.weight, load.bias, load.scale, precision=asked, target=target)
    clock = _steady(device, load.bytes_moved(4), seconds)
    done = _section(common, candidates, target, library, load.input, load.shape, precision, clock)

    # The convolution alone, for Amdahl.
    alone = Candidate("library", lambda: conv, load.bytes_moved(1) - load.result_bytes, load.flops, "conv2d")
    return done + _section(common, [alone], conv64, library, load.input, load.shape, precision, clock)


def _steady(device, bytes, seconds):
    """Give the clock of the large workloads: on a GPU warm enough to be as fast as it stays."""
    return lambda functions: compare(
        functions, device, bytes=bytes, seconds=seconds, warm_up=1.0 if device.type == "cuda" else 0.0
    )


def _scale_min_alone(common, load, quick, seconds):
    input, device = load.conv_output(), load.input.device
    moved = (input.numel() + input.numel() // input.shape[1]) * input.element_size()

    def entry(name, make):
        return Candidate(name, make, moved, 2 * input.numel(), "scale_min")

    candidates = [entry("eager", lambda: lambda: reference.scale_min(input, load.scale))]
    for rung in LADDER:
        if rung.operator == "scale_min" and rung.device == device.type:
            call = functools.partial(rung, input, load.scale)
            candidates.append(entry(rung.name, functools.partial(_available, rung, call)))
    for name, mode in _compile_modes(device, quick):
        candidates.append(entry(name, functools.partial(_compiled, reference.scale_min, mode, input, load.scale)))
    target, shape = check.expected(_ends(input), scale=load.scale), _by(input.shape)
    # The ceiling is taken on the same bytes, in the same turns.
    clock = _steady(device, moved, seconds)
    return _section(common, candidates, target, None, input, shape, _name(input.dtype), clock, _reads(input))


def _section(common, candidates, target, library, input, shape, precision, clock, reads=None, prepare=None):
    """Check every candidate, PyTorch's own first, then time those that run, in turns: ``clock(functions)`` gives the timings.

    What is timed is what ``prepare`` makes of a function; what ``reads`` holds is timed beside.
    """
    layout, ready = _layout(input), {}
    where = f"{precision}, {layout}"
    for candidate in candidates:
        try:
            with progress.task(f"checking {candidate.operator} {candidate.rung} ({where})"):
                function = candidate.make()
                result, peak = _run_and_peak(function, input)
                function = prepare(function) if prepare else function
        except Exception as error:
            if not _may_skip(candidate.rung, error):
                raise
            print(f"skipped {candidate.rung} ({where}): {' '.join(str(error).split())[:300]}")
            continue
        found = check.errors(_ends(result), target)
        del result
        if candidate is candidates[0]:
            # On the whole batch the library may choose another algorithm than on two images: its larger error is the yardstick.
            limit = check.tolerance(input.dtype, library and Errors.worst(library, found), target)
        fine = found.within(limit)
        # A rung that is wrong is not worth a time; a peer may be less exact than promised here, and is then marked.
        if not fine and (candidate.rung in rungs or not found.rms < 10 * limit.rms):
            print(f"not timed, being WRONG: {candidate.rung} ({where}): {found}, at most {limit}")
            continue
        ready[candidate] = function, found, fine, peak
    with progress.task(f"timing {len(ready)} of {candidates[0].operator} ({where})"):
        functions = {candidate: function for candidate, (function, *_) in ready.items()}
        timings = clock({**functions, **(reads or {})})
    torch.compiler.reset()
    done = []
    for c, (_, (rms, max, _), fine, peak) in ready.items():
        where = (c.operator, c.rung, precision, input.dtype, layout, shape)
        done.append(_record(common, *where, timings[c], c.bytes, c.flops, peak, rms, max, fine))
    if reads:
        best = min(reads, key=lambda name: timings[name].p50)
        size = input.numel() * input.element_size()
        for rung, name in (("read", best), ("read-sum", "sum")):
            done.append(_record(common, "ceiling", rung, precision, input.dtype, layout, shape, timings[name], size))
    return done


def _ceiling_records(common, device, dtype, precision):
    with progress.task(f"measuring the ceilings ({precision})"):
        found = _ceilings(device, dtype, precision)
    done = []
    for rung, (amount, timing, shape) in found.items():
        bytes, flops = (0, amount) if rung == "matmul" else (amount, 0)
        done.append(_record(common, "ceiling", rung, precision, dtype, "flat", shape, timing, bytes, flops))
    return done


def _record(
    common,
    operator,
    rung,
    precision,
    dtype,
    layout,
    shape,
    t,
    bytes,
    flops=0,
    peak=0,
    rms=0.0,
    max=0.0,
    correct=True,
    direction="forward",
):
    times = (round(1e3 * seconds, 6) for seconds in (t.p20, t.p50, t.p80))
    # Three figures of an error are more than enough; more only make the file hard to read.
    rms, max = (float(f"{error:.3g}") for error in (rms, max))
    fixed = (operator, rung, precision, _name(dtype), layout, shape, direction)
    return Record(*common, *fixed, *times, bytes, flops, peak, rms, max, correct)


def _available(rung, function):
    if missing := rung.why_unavailable():
        raise RuntimeError(missing)
    return function


def _may_skip(rung, error):
    """Tell whether a candidate may be left out: a peer, or a rung that declines; not one that fails to build or crashes."""
    if isinstance(error, torch.AcceleratorError):
        return False
    if rung in ("eager", "library", "reference"):
        return False
    return rung not in rungs or (isinstance(error, RuntimeError) and "Error building extension" not in str(error))


def _run_and_peak(function, input):
    """Run once; give the result, and the most memory in use on a GPU, input included and what others keep excluded."""
    if input.device.type == "cpu":
        return function(), 0
    function()  # Compiling and building take memory of their own.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before + input.numel() * input.element_size()


def _ends(tensor):
    """Take the first and the last image: float64 of the whole batch would cost more than the run."""
    return tensor if len(tensor) <= 2 else tensor[:: len(tensor) - 1]


# ---- peers ----


def _compile_modes(device, quick):
    modes = [("compile", "default")]
    if device.type == "cuda" and not quick:
        modes.append(("compile-max-autotune", MAX_AUTOTUNE))
    return modes


def _compiled(function, mode, *args):
    build.import_cpp_extension()  # quietly; torch.compile would do it with a warning where nvcc is and no GPU
    return functools.partial(torch.compile(function, mode=mode, dynamic=False), *args)


def _cudnn_graph(load):
    """Convolution, bias and minimum as one graph of cuDNN's, run by the fastest of the plans that it proposes.

    The scale is folded into weight and bias beforehand, outside the timing: in the peer's favour, and exact for a power of two.
    """
    try:
        import cudnn
    except ImportError as error:
        raise RuntimeError("no Python package cudnn; pip install nvidia-cudnn-frontend") from error

    kinds = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
    kind, single = getattr(cudnn.data_type, kinds[load.input.dtype]), cudnn.data_type.FLOAT
    weight, bias = load.weight * load.scale, (load.bias * load.scale).view(1, -1, 1, 1)
    batch, _, height, width = load.output_shape
    channel_stride = 1 if _layout(load.input) == "channels_last" else height * width
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)

    reasons = []
    # Some versions of cuDNN reduce into float32 only: then the cast of the small result is part of the call.
    for output_kind, output_dtype in {kind: load.input.dtype, single: torch.float32}.items():
        try:
            graph = cudnn.pygraph(handle=handle, io_data_type=kind, intermediate_data_type=single, compute_data_type=single)
            x, w, b = (graph.tensor_like(tensor) for tensor in (load.input, weight, bias))
            conv = graph.conv_fprop(image=x, weight=w, padding=[0, 0], stride=[1, 1], dilation=[1, 1])
            smallest = graph.reduction(input=graph.bias(input=conv, bias=b), mode=cudnn.reduction_mode.MIN)
            smallest.set_output(True).set_data_type(output_kind)
            smallest.set_dim([batch, 1, height, width]).set_stride([height * width, channel_stride, width, 1])
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            plans = _cudnn_plans(graph)
        except Exception as error:
            reasons.append(str(error))
            continue
        output = torch.empty((batch, 1, height, width), dtype=output_dtype, device=load.input.device)
        tensors = {x: load.input, w: weight, b: bias, smallest: output}

        def call(index, workspace, graph=graph, tensors=tensors, output=output):
            graph.execute_plan_at_index(tensors, workspace, index=index, handle=handle)
            return output.to(load.input.dtype)

        functions = {index: functools.partial(call, index, workspace) for index, workspace in plans.items()}
        if functions:
            timings = compare(functions, load.input.device, bytes=load.bytes, seconds=0.0)
            return functions[min(timings, key=lambda index: timings[index].p50)]
        reasons.append("none of the plans that it proposes can be built")
    raise RuntimeError("cuDNN has no plan for the fused graph: " + "; ".join(reasons))


def _cudnn_plans(graph, most=6):
    """Build the first few plans that cuDNN proposes, best guess first; give index -> workspace."""
    plans = {}
    for index in range(graph.get_execution_plan_count()):
        if len(plans) == most:
            break
        with contextlib.suppress(Exception):
            graph.build_plan_at_index(index)
            size = graph.get_workspace_size_plan_at_index(index)
            plans[index] = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
    return plans


# ---- names ----


def _environment(device, name):
    """Give the first fields of a record."""
    now = datetime.now(timezone.utc)
    on_gpu = device.type == "cuda"
    return (
        now.isoformat(timespec="seconds"),
        _commit(),
        name or machine(device),
        torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        _driver() if on_gpu else "",
        (torch.version.cuda or "") if on_gpu else "",
        torch.__version__,
        f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}",
    )


def _commit():
    if given := os.environ.get("FUSED_KERNELS_COMMIT"):
        return given
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _driver():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    return ""


def _cpu_name():
    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _layout(tensor):
    return "channels_last" if not tensor.is_contiguous() else "NCHW"


def _by(shape):
    return "x".join(map(str, shape))


def summary(records):
    """Lay out one run's records as plain text: time, speedup over eager in the same group, error, right or not."""
    lines = []
    names = ("operator", "dtype", "precision", "layout", "direction", "shape")
    for group in dict.fromkeys(tuple(getattr(r, name) for name in names) for r in records if r.operator != "ceiling"):
        operator, dtype, precision, layout, direction, shape = group
        title = " ".join(dict.fromkeys((operator, dtype, precision, layout, *[direction] * (direction != "forward"))))
        lines += ["", f"{title}, {shape}", f"{'rung':<22}{'ms':>10}{'speedup':>10}{'rms error':>12}  correct"]
        group = select(records, **dict(zip(names, group, strict=True)))
        eager = next((r.p50_ms for r in group if r.rung == "eager"), None)
        for r in group:
            speedup = f"{eager / r.p50_ms:.2f}x" if eager else ""
            lines.append(f"{r.rung:<22}{r.p50_ms:>10.3f}{speedup:>10}{r.rms_error:>12.2e}  {'yes' if r.correct else 'NO'}")
        for r in select(records, operator="ceiling", rung="read", dtype=dtype, layout=layout, shape=shape):
            lines.append(f"{'(reading it once)':<22}{r.p50_ms:>10.3f}")
    for r in select(records, operator="ceiling", layout="flat"):
        rate = f"{r.tflops:.3g} TFLOP/s" if r.rung == "matmul" else f"{r.gbps:.4g} GB/s"
        lines += [""] * (r.rung == "copy") + [
            f"ceiling {r.rung:<8}{' '.join(dict.fromkeys((r.dtype, r.precision))):<18}{rate:>16}"
        ]
    return "\n".join(lines[1:])
