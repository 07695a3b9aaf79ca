"""How long every candidate takes, on layers drawn at random: the record that the choice is made from, and one that tests it.

``bench --choices`` times each rung that can take a layer, the composite with and without a copy, eager, and for training the
kernels of the backward pass. ``bench --choices --draw SEED`` draws other layers, and times torch.compile and a trial as well.
"""

import contextlib
import functools
import itertools
import math
import random
from dataclasses import replace

import torch

from .. import candidates, choice, composite, dispatch, estimates, measured, progress, trials
from ..candidates import FUSED, GRAD_INPUT, GRAD_WEIGHT
from ..measured import Layer, Row, Time
from ..triton_kernels import conv_triton_plan
from . import peers, regret
from .clock import Timing, compare
from .environment import run_info
from .workloads import LAYERS, Workload, problem_of

# A cell's most operations, and bytes of input, output and winners: what no GPU does in a few milliseconds teaches little more.
_MOST_FLOPS, _MOST_BYTES = 2.5e11, 2**31
PRECISIONS = ("tf32", "ieee", "bfloat16", "float16")
LAYOUTS = ("NCHW", "channels_last")
# One layer in so many is also timed in float16, which takes what bfloat16 takes, and one in so many in training.
_FLOAT16_EVERY, _TRAINING_EVERY = 4, 4


# ---- the layers ----


def layers(seed, usual=0.85):
    """Draw layers without end, the same ones for the same seed; ``usual``: the share of channels that are people's choice."""
    draws = random.Random(seed)
    while True:
        layer = _draw(draws, usual)
        if not layer or not _is_within_caps(layer):
            continue
        # Of those so small that launches are most of their time, half are enough.
        if layer.flops > 2**28 or draws.random() < 0.5:
            yield layer


def of_networks():
    """Give the reference workload and the layers of usual networks."""
    yield Layer(64, 64, 256, 256, 128, 3, 3, 1, 0, 1, 1)
    for (images, channels, height, width), out_channels, kernel, stride, padding in LAYERS:
        yield Layer(images, channels, height, width, out_channels, kernel, kernel, stride, padding, 1, 1)


def with_other_images():
    """Give the layers of usual networks with every power of two of images, where they are not among the former."""
    known = {*of_networks()}
    for layer in dict.fromkeys(layer._replace(images=1) for layer in of_networks()):
        batches = (layer._replace(images=2**i) for i in range(9))
        yield from (layer for layer in batches if layer not in known and _is_within_caps(layer))


def _is_within_caps(layer):
    return layer.flops <= _MOST_FLOPS and layer.bytes <= _MOST_BYTES


# What people take; the other draws lie between.
_CHANNELS = (1, 3, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
_SIZES = (7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 224, 256, 384, 512, 1024)
_KERNELS = ((1, 25), (3, 38), (5, 17), (7, 14), (2, 2), (4, 2), (6, 1))


def _draw(draws, usual):
    def between(least, most):
        return round(math.exp(draws.uniform(math.log(least), math.log(most))))

    kernel = draws.choices(*zip(*_KERNELS, strict=True))[0]
    kernel_h, kernel_w = (kernel, kernel) if kernel == 1 or draws.random() < 0.97 else draws.choice(((1, kernel), (kernel, 1)))
    stride = draws.choices((1, 2, 3), (77, 21, 2))[0]
    in_channels = draws.choice(_CHANNELS) if draws.random() < usual else between(1, 1024)
    out_channels = draws.choice([c for c in _CHANNELS if c >= 8]) if draws.random() < usual else between(8, 1024)
    if draws.random() < 0.1:
        out_channels = between(1024, 16384 if kernel == 1 else 2048)
    height = draws.choice(_SIZES) if draws.random() < 0.6 else between(7, 1024)
    width = height if draws.random() < 0.8 else between(7, 1024)
    images = 2 ** draws.randint(0, 8) if draws.random() < 0.9 else between(1, 256)
    groups = draws.choices((1, 2, 4, 8, in_channels), (88, 4, 2, 2, 4))[0]
    if groups == in_channels and groups >= 8:
        out_channels = groups * draws.choice((1, 1, 2, 4))
    in_channels, out_channels = (max(groups, channels - channels % groups) for channels in (in_channels, out_channels))
    dilation = 2 if kernel > 1 and draws.random() < 0.05 else 1
    padding = draws.choices((0, kernel // 2 * dilation, 1), (35, 60, 5))[0]
    layer = Layer(images, in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, dilation, groups)
    return layer if min(layer.output_size) >= 1 and min(height, width) >= 7 else None


def draw(layer, precision, layout, device="cuda"):
    """Draw a layer's tensors: input normal, weights and bias as large as nn.Conv2d draws them."""
    dtype = torch.float32 if precision in ("tf32", "ieee") else getattr(torch, precision)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    bound = 1 / math.sqrt(math.prod(layer.weight_shape[1:]))

    def uniform(*shape):
        return torch.rand(shape, device=device, generator=generator).mul_(2 * bound).sub_(bound).to(dtype)

    input = torch.randn(layer.input_shape, device=device, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    weight = uniform(*layer.weight_shape).contiguous(memory_format=memory_format)
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return Workload(input, weight, uniform(layer.out_channels), **how)


# ---- the candidates ----


def _forward(work, problem, hardware, only):
    """Name what can run, or of that some: name -> function; one dictionary of all that compute the same."""
    names = _names(problem, hardware)
    functions = {"eager": functools.partial(peers.eager(work), *work.arguments)}
    functions |= composite.candidate_calls(problem, names, work.arguments)
    return [{name: function for name, function in functions.items() if only is None or name in only}]


def _names(problem, hardware):
    """Name the composite, with a copy and without, and each kernel that can take a problem."""
    names = ["composite", *(["copied"] if candidates.copy_into_other_layout(problem, True) else [])]
    return names + candidates.legal(FUSED, problem, hardware)


def _training(work, problem, hardware):
    """Name what a training step can call: forward with winners, and the kernels of each gradient."""
    # What layers of networks read: nowhere negative, so that some channels win more pixels than others.
    work = replace(work, input=work.input.relu())
    forward = composite.candidate_calls(problem, _names(problem, hardware), work.arguments, "_winners")
    _, winners = forward["composite"]()
    grad = torch.randn(winners.shape, device=winners.device).to(work.input.dtype)
    args = candidates.gradient_args(problem, grad, winners, work.input, work.weight, work.scale)
    by_kind = {"grad_input": GRAD_INPUT, "grad_weight": GRAD_WEIGHT}
    gradients = (
        {name: functools.partial(dispatch.run, name, *args[kind]) for name in candidates.legal(names, problem, hardware)}
        for kind, names in by_kind.items()
    )
    return [forward, *gradients]


# ---- timing ----


class Graphs:
    """Captures calls in CUDA graphs that share memory: each capture by torch.cuda.graph would first give all memory back."""

    def __init__(self):
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        # NOTE: the memory is given back with the last graph that uses it, and the handle is worth nothing then: keep one.
        self._kept = self.capture(torch.zeros(1, device="cuda").zero_)

    def capture(self, function):
        """Give a function that replays a call, after two calls that build and choose what they need."""
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                function()
            finally:
                graph.capture_end()
        return graph.replay


# What takes so many times as long as the fastest, and so many seconds, is timed once: it will not be chosen.
_SLOW, _LONG = 4, 5e-4


def time_cell(graphs, functions, work, seconds):
    """Time functions in turns, each replayed from a graph, from a cold L2; name -> Timing. What lacks memory is left out."""
    once, replays = {}, {}
    for name, function in functions.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            function()
            once[name] = _time_once(function)
    slow = {name: t for name, t in once.items() if t > max(_SLOW * min(once.values()), _LONG)}
    for name in once.keys() - slow.keys():
        with contextlib.suppress(torch.OutOfMemoryError):
            replays[name] = graphs.capture(functions[name])
    timings = compare(replays, work.input.device, bytes=work.bytes, seconds=seconds, warm_up=0.0)
    return timings | {name: Timing(t, t, t, 1) for name, t in slow.items()}


def _time_once(function):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextlib.contextmanager
def setting(precision):
    """Set what PyTorch's own convolutions do in float32."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee" if precision == "ieee" else "tf32"
    try:
        yield
    finally:
        conv.fp32_precision = before


# Shares of the largest absolute result, far beyond what rounding makes; a kernel that is wrong is further off.
_ROUGHLY = {"ieee": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 3e-2}


def _right(functions, precision, label):
    """Leave out what can't run or differs from the first: a time of a wrong result is worth nothing.

    ``functions``: name -> function; of several results the first is compared.
    """
    expected, right = None, {}
    for name, function in functions.items():
        try:
            found = function()
            found = (found[0] if isinstance(found, tuple) else found).float()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            print(f"not timed: {name} ({label}): {' '.join(str(error).split())[:300]}", flush=True)
            continue
        expected = found if expected is None else expected
        error, size = (found - expected).abs().max(), expected.abs().max()
        if found.shape != expected.shape or not error <= _ROUGHLY[precision] * size:
            print(f"not timed, being WRONG: {name} ({label}): off by {float(error):.2g} of {float(size):.2g}", flush=True)
            continue
        right[name] = function
    return right


def cells(layers, precisions=PRECISIONS, training=True):
    """Give layers with the precisions, layouts and directions to time them in; some in float16 and in training alone."""
    for number, layer in enumerate(layers):
        for precision in precisions:
            if precision == "float16" and number % _FLOAT16_EVERY:
                continue
            for layout in LAYOUTS:
                yield layer, precision, layout, "forward"
                if training and number % _TRAINING_EVERY == 0 and precision != "float16":
                    yield layer, precision, layout, "training"


_LIBRARY = ("composite", "copied")


def broad(count=1260, library=2050):
    """Give the cells of the record, and what alone is timed of each, or None.

    Of the first layers, many of which have sizes that no tile divides, everything is timed. What the fused kernels take follows
    from how they cut their work; the library's choice of a kernel does not, and is learnt from many more layers.
    """
    first = itertools.islice(itertools.chain(of_networks(), layers(0, usual=0.6)), count)
    for cell in cells(first):
        yield cell, None
    for cell in cells(itertools.islice(layers("library"), library), PRECISIONS[:3], training=False):
        yield cell, _LIBRARY
    # What is looked up most often need not be estimated.
    for cell in cells(with_other_images(), PRECISIONS[:3], training=False):
        yield cell, None
    for cell in itertools.product(of_networks(), PRECISIONS[:3], LAYOUTS, ("training",)):
        yield cell, None


def drawn(seed, count):
    """Give the cells of so many other layers, on which the choice is tested."""
    return cells(itertools.islice(layers(f"draw {seed}"), count), ("tf32", "bfloat16"), training=False)


@torch.no_grad()
def measure(cells, drawn=False, seconds=2e-3):
    """Time cells.

    Parameters
    ----------
    cells : iterable
        Pairs: a row's key; the names of what alone is timed, or None.
    drawn : bool
        Whether torch.compile is timed as well, and what a trial finds that ``torch.backends.cudnn.benchmark`` asks for.
    seconds : float
        Time measured for each function, at the least ten calls.

    Yields
    ------
    Row
    """
    device, graphs, cells = torch.device("cuda", torch.cuda.current_device()), Graphs(), list(cells)
    hardware = candidates.read_hardware(device)
    _compile_beforehand(cells, hardware, drawn)
    for number, (key, only) in enumerate(cells, 1):
        layer, precision, layout, direction = key
        label = f"{layer}, {precision}, {layout}, {direction}"
        with progress.task(f"{number} of {len(cells)}: timing {label}"), setting(precision):
            try:
                work = draw(layer, precision, layout, device)
                problem = work.problem()
                if direction == "forward":
                    kinds = _forward(work, problem, hardware, only)
                else:
                    kinds = _training(work, problem, hardware)
                if drawn and only is None:
                    kinds[0]["compile"] = peers.compiled(peers.eager(work), "default", *work.arguments)
                functions = {n: function for kind in kinds for n, function in _right(kind, precision, label).items()}
                trial = _trial(work, problem, hardware) if drawn else ""
                timings = time_cell(graphs, functions, work, seconds)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            finally:
                if drawn:
                    torch.compiler.reset()
        yield Row(*key, {name: Time(1e6 * t.p20, 1e6 * t.p50, 1e6 * t.p80) for name, t in timings.items()}, trial)


def _trial(work, problem, hardware):
    """Name what a trial finds fastest, then all that it tries."""
    names = trials.shortlist(choice.costs(choice.choose(problem, hardware).seconds), problem.dtype, False)
    best, _ = trials.fastest(composite.candidate_calls(problem, names, work.arguments), problem.device)
    return " ".join((best, *names)) if best else ""


def _compile_beforehand(todo, hardware, drawn, workers=16):
    """Compile in several processes, into the compilers' caches on disk: one by one it takes minutes."""
    import multiprocessing

    triton = {}
    for key, only in todo:
        if only is None or "conv_triton" in only:
            triton.setdefault(_triton_kernel(key, hardware), key)
    triton.pop(None, None)
    # Two layouts share most: one after the other, it is compiled once.
    jobs = [(key, False) for key in sorted(triton.values(), key=lambda key: key[2])]
    jobs += [(key, True) for key, only in todo if drawn and only is None]
    if jobs:
        with progress.task(f"compiling for {len(jobs)} cells"), multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_compile_one, jobs):
                pass


def _triton_kernel(key, hardware):
    """Tell apart what Triton compiles for cells, None: nothing. Most sizes change nothing."""
    layer, precision, layout, direction = key
    problem = problem_of(Row(*key, {}))
    if direction != "forward" or candidates.why_not("conv_triton", problem, hardware):
        return None
    how = conv_triton_plan.plan_of(problem, hardware)
    powers = math.gcd(16, layer.height * layer.width), math.gcd(16, layer.width)
    return layer._replace(images=0, height=0, width=0), precision, layout, how.config, how.copies_input, powers


def _compile_one(job):
    (layer, precision, layout, _), by_torch = job
    # What fails here fails again, and says so, when it is timed.
    with setting(precision), torch.no_grad(), contextlib.suppress(RuntimeError):
        work = draw(layer, precision, layout)
        if by_torch:
            peers.compiled(peers.eager(work), "default", *work.arguments)()
        else:
            dispatch.run("conv_triton", *work.arguments, *work.problem().conv)
        torch.cuda.synchronize()
        torch.compiler.reset()
        torch.cuda.empty_cache()


# ---- a run ----


def _lacking(row, hardware, anew):
    """Name the candidates that a row lacks, and what to time beside them; none of training, where nothing new is estimated."""
    legal = [] if row.direction == "training" else candidates.legal(FUSED, problem_of(row), hardware)
    lacking = {name for name in legal if name not in row.times or name in anew}
    rivals = row.times.keys() & {*measured.FORWARD} - lacking
    return lacking.union(sorted(rivals, key=lambda name: row.times[name].p50)[:2]) if lacking else lacking


def run(draw=None, count=34, record=True, file=None, each=None, anew=()):
    """Time the cells of the record, or of a draw, that are not in a file yet, and append them to it as they come.

    Of a cell that is there, candidates that it lacks are timed, beside the two fastest of the others.

    Parameters
    ----------
    draw : int, optional
        Seed of layers on which the choice is tested; by default the cells of the record, from which it is made.
    count : int
        Of layers drawn.
    record : bool
        Whether to append to the file.
    file : pathlib.Path, optional
        By default the GPU's in :data:`fused_kernels.measured.FOLDER`, or for a draw in figures/data/draws.
    each : callable, optional
        Called with every row.
    anew : sequence of str
        Fused kernels that have become faster: what was recorded of them is taken as lacking.

    Returns
    -------
    list of Row
        What was timed now.
    """
    hardware = candidates.read_hardware(torch.device("cuda", torch.cuda.current_device()))
    folder = measured.FOLDER if draw is None else regret.data_dir()
    file = file or folder / f"{estimates.file_name(hardware.name)}.csv"
    done = {row.key: row for row in measured.read(file)} if record else {}
    todo = {}
    for key, only in broad() if draw is None else ((key, None) for key in drawn(draw, count)):
        if key not in done:
            todo.setdefault(key, only)
        elif only is None and (lacking := _lacking(done[key], hardware, anew)):
            todo[key] = lacking
    rows = measure(todo.items(), drawn=draw is not None)
    info = run_info(torch.device("cuda"))
    facts = {name: getattr(info, name) for name in ("date", "commit", "driver", "cuda", "torch", "run")}
    facts |= {"cudnn": torch.backends.cudnn.version(), "hardware": tuple(hardware)} | ({} if draw is None else {"draw": draw})
    found = []
    for row in measured.append(file, facts, rows, spread=draw is not None) if record else rows:
        found.append(row)
        if each:
            each(row)
    return found
