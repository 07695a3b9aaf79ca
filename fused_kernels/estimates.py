"""How long each candidate would take: a physical floor times a factor that small networks have learnt from recorded times.

The floor is counted: operations over the rate of the units that do them, rounded up to whole tiles on whole waves of
multiprocessors; bytes over the memory's bandwidth; launches. A fused kernel's operations are the cycles of its own plan. So a
floor is known for any GPU. What the networks have learnt, on one, is by how much each candidate misses its floor: less surely
for the library, which has hundreds of kernels, than for the fused kernels, whose times follow from their plans.

The times lie in ``choices/`` as text, the networks beside them; ``python -m fused_kernels bench --choices --fit`` makes the
networks from the times. A problem that was timed itself has its own times.
"""

import array
import ctypes
import functools
import json
import math
import re

import numpy as np
import torch

from . import measured, plans
from .measured import FORWARD, GRAD_INPUT, GRAD_WEIGHT, Index
from .triton_kernels import conv_triton_plan

# Of a GPU on which no times were recorded these are a careful guess.
NETWORKS = measured.FOLDER / "nvidia-h200.npz"
# There a fused kernel must be faster by so much: the library is tuned on all of them.
_MARGIN = 1.15
# NOTE: with large filters over 16 channels or more, in 16 bits, the library takes more than three times what was estimated on
# one layer in seven (cuDNN 9.19 on an H200; 14 % of 622 such rows in choices/, each left out of the fit; in the median seven
# times), which follows from nothing that an estimate is told. There a fused kernel may be slower by so much, by estimate. A few
# layers decide by how much: 1.1 to 1.5 do about as well. From 256 channels on it gained nothing on the few that were timed.
_ERRATIC = 1.2
# What the networks tell: log of time over floor.
TARGETS = (*FORWARD, *GRAD_INPUT, *GRAD_WEIGHT)


def forward(problem, hardware, fused):
    """Estimate a forward pass.

    Parameters
    ----------
    problem : Problem
    hardware : Hardware
    fused : list of str
        The fused kernels that can run it.

    Returns
    -------
    dict
        Name -> seconds, of these, of the composite, and of the composite after a copy where there is another layout.
    """
    library = ["composite", *(["copied"] if problem.input_shape[1] > 1 else [])]
    if "conv_triton" in fused and plans.why_unavailable():
        # The networks are told of plans. In three of four recorded layers the library takes more than this times its floor.
        floors = _floors(problem, hardware, {})
        return {name: 1.7 * floors[name] for name in library} | {"conv_triton": floors["conv_triton"]}
    if not fused or plans.plan_costs(problem, hardware)["conv_mma"] is None:
        return {}
    return _estimate(problem, hardware, [*library, *fused])


def backward(problem, hardware, names):
    """Estimate the kernels of a backward pass: name -> seconds; nothing where there is no pixel, or the sizes are immense."""
    if plans.plan_costs(problem, hardware)["conv_mma"] is None:
        return {}
    return _estimate(problem, hardware, names)


def margin(problem, hardware):
    """Give by what factor a fused kernel must be faster than the library, by estimate, to be chosen."""
    if not is_recorded(hardware.name):
        return _MARGIN
    _, in_channels, *kernel = problem.weight_shape
    is_erratic = problem.dtype.itemsize == 2 and min(kernel) >= 6 and problem.groups == 1 and 16 <= in_channels < 256
    return 1 / _ERRATIC if is_erratic and "composite" not in recorded(problem, hardware) else 1.0


@functools.cache
def is_recorded(name):
    """Tell whether there are networks that have learnt from a GPU of this name."""
    return _file(name).stem == file_name(name)


@functools.cache
def _file(name):
    own = measured.FOLDER / f"{file_name(name)}.npz"
    return own if own.exists() else NETWORKS


def file_name(name):
    """Name the files of a GPU: "NVIDIA H200" has "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _estimate(problem, hardware, names):
    found = _estimate_all(problem, hardware)
    return {name: found[name] for name in names}


# Forward and backward are asked for one after the other.
@functools.lru_cache(16)
def _estimate_all(problem, hardware):
    described, floors = describe(problem, hardware)
    factors = networks(hardware.name)[0].ask(described)
    said = {name: floors[name] * math.exp(factor) for name, factor in zip(TARGETS, factors, strict=True) if name in floors}
    # What was timed need not be estimated.
    return said | recorded(problem, hardware)


# ---- the floors ----

_LAUNCH = 4e-6
# What the library multiplies per cycle and multiprocessor: on the tensor cores of Hopper and Blackwell, and of Ampere and Ada.
_PER_CYCLE = {"16": (2300, 1150), "tf32": (1260, 630), "ieee": (153, 153)}
# Of its fastest, memory gives most kernels so much; and a clock that is not the highest, under such a load.
_OF_BANDWIDTH, _OF_CLOCK = 0.77, 0.85
_FMAS_PER_CYCLE = 110


def copy_seconds(problem, hardware):
    """Estimate what a copy of the input takes, in seconds."""
    return 2 * problem.input_elements * problem.dtype.itemsize / (_OF_BANDWIDTH * hardware.bandwidth)


def _floors(problem, hardware, planned):
    """Count each candidate's floor in seconds."""
    size, groups = problem.dtype.itemsize, problem.groups
    out_channels, in_channels, *_ = problem.weight_shape
    per_group, pixels, taps = out_channels // groups, problem.pixels, problem.taps
    bandwidth, clock = _OF_BANDWIDTH * hardware.bandwidth, _OF_CLOCK * hardware.clock
    # Wide GPUs are faster in tensor cores alone, which the library uses; ours have cycles from their plans.
    rate = _PER_CYCLE[_arithmetic(problem)][hardware.capability[0] not in (9, 10)] * hardware.multiprocessors * clock * 2
    read = problem.input_elements * size / bandwidth
    written, result = pixels * out_channels * size / bandwidth, pixels * size / bandwidth
    weights = out_channels * in_channels * taps * size / bandwidth
    tile = 64 if per_group <= 64 else 128
    depth = _up(in_channels, 8) * taps
    waves = -(-(-(-pixels // 128) * -(-per_group // tile) * groups) // hardware.multiprocessors)
    whole = waves * hardware.multiprocessors * 128 * tile
    multiplied = 2 * max(whole, pixels * out_channels) * depth / rate
    floors = {"composite": max(multiplied, read + written + weights) + written + result + _LAUNCH}
    floors["copied"] = floors["composite"] + 2 * read + _LAUNCH / 2
    for name, plan in planned.items():
        if plan is not None:
            # The weights are brought into the kernel's order first, by few multiprocessors.
            floors[name] = max(plan.cost / clock, read + result) + 2.5 * weights + _LAUNCH
    if size == 2:
        floors["conv_triton"] = conv_triton_plan.seconds(problem, hardware)
    # A gradient reaches one channel of each pixel: as many products as the input of all pixels has, under all taps.
    reached = pixels * in_channels * taps
    for name in (*GRAD_INPUT, *GRAD_WEIGHT):
        floors[name] = max(reached / (_FMAS_PER_CYCLE * hardware.multiprocessors * clock), read) + weights + _LAUNCH
    return floors


def _arithmetic(problem):
    return "16" if problem.dtype.itemsize == 2 else problem.precision


def _up(number, multiple):
    return -(-number // multiple) * multiple


# ---- what the networks are told ----


def describe(problem, hardware):
    """Describe a problem by numbers that mean the same on any GPU, and give the floors in seconds.

    Returns
    -------
    list of float
        As many for every problem, in one order: logarithms of sizes, how full tiles and waves are, alignments, the plans.
    dict
        Name -> floor.
    """
    planned = plans.plan_costs(problem, hardware)
    floors = _floors(problem, hardware, planned)
    images, channels, height, width = problem.input_shape
    out_channels, in_channels, kernel_h, kernel_w = problem.weight_shape
    out_h, out_w = problem.output_size
    groups, taps, pixels, size = problem.groups, problem.taps, problem.pixels, problem.dtype.itemsize
    per_group, multiprocessors = out_channels // groups, hardware.multiprocessors
    kernel, stride, dilation = max(kernel_h, kernel_w), max(problem.stride), max(problem.dilation)
    read, written = problem.input_elements, pixels * out_channels
    weights, flops = out_channels * in_channels * taps, written * in_channels * taps
    is_grouped, is_one, is_large = groups > 1, taps == 1, kernel >= 5
    padding = max(problem.padding)
    arithmetic = _arithmetic(problem)
    described = [
        *(arithmetic == "tf32", arithmetic == "ieee", arithmetic == "16", problem.dtype == torch.float16),
        problem.is_channels_last and not problem.is_contiguous,
        # Sizes.
        *map(_log, (in_channels, per_group, pixels, images, out_h, out_w, taps, groups, stride, dilation, flops)),
        *map(_log, (out_h * out_w, read * size, written * size, weights * size)),
        *(kernel_h, kernel_w, (kernel - 1) * dilation, padding > 0, padding / kernel),
        # How full tiles of channels, columns, rows and pixels are.
        *(_fill(in_channels, n) for n in (8, 16, 32, 64)),
        *(_fill(per_group, n) for n in (8, 32, 64, 128, 256)),
        *(_fill(out_w, n) for n in (8, 64)),
        *(_fill(out_h, 8), _fill(pixels, 128), _fill(out_h * out_w, 128)),
        # Powers of two that divide.
        *map(_twos, (channels, out_channels, in_channels, per_group, height * width, out_h * out_w, width, out_w)),
        # Relations.
        _log(written / max(read, 1)),
        _log(flops / (read + written + weights) / size),
        *map(_log, (in_channels * taps, in_channels * taps * out_h * out_w * size, channels * height * width * size)),
        *(_log(weights / (read + written)), _log(out_w / out_h)),
        _log((height + 2 * padding) * (width + 2 * padding)),
        # Kinds that libraries treat apart.
        *(is_grouped, is_grouped and in_channels == 1, is_grouped and per_group > 1, is_one),
        is_one and stride == 1 and padding == 0,
        *(stride > 1, stride > min(kernel_h, kernel_w), kernel_h == kernel_w, is_large, kernel >= 7, is_large and stride > 1),
        (kernel_h, kernel_w, stride, dilation, groups) == (3, 3, 1, 1, 1),
        *(dilation > 1, out_h == -(-height // stride), channels <= 4),
    ]
    # Waves of tiles, and how full they are.
    for block_m, block_n in ((128, 128), (256, 64), (256, 128), (64, 64)):
        tiles = -(-pixels // block_m) * -(-per_group // block_n) * groups
        waves = -(-tiles // multiprocessors)
        described += [_log(waves), tiles / multiprocessors / waves]
    mma, wgmma = planned["conv_mma"], planned["conv_wgmma_ieee" if arithmetic == "ieee" else "conv_wgmma"]
    described += [_log(mma.cost), mma.config == 0, mma.config == 2, _log(mma.splits), _log(mma.items), mma.vectors]
    if wgmma:
        described += [0, _log(wgmma.cost), wgmma.config, wgmma.config >= 3, wgmma.resident, _log(wgmma.splits), wgmma.sliding]
        described += [wgmma.source == 0, wgmma.source == 1, wgmma.bulk]
    else:
        described += [1, _log(mma.cost), *[-1] * 8]
    described += conv_triton_plan.describe(problem, hardware) if size == 2 else conv_triton_plan.NOTHING
    described += [math.log(floors.get(name, floors["composite"]) / floors["composite"]) for name in FORWARD[1:]]
    described.append(math.log(floors["composite"]))
    return described, floors


def _log(number):
    return math.log2(number if number > 1e-9 else 1e-9)


def _fill(number, tile):
    return number / _up(number, tile)


def _twos(number):
    return min((number & -number).bit_length() - 1, 6)


# ---- the networks ----


class _Networks(ctypes.Structure):
    """As networks.h has them."""

    _fields_ = (
        *(("count", ctypes.c_int64), ("widths", ctypes.c_int64 * 4)),
        *((name, ctypes.c_void_p) for name in ("mean", "deviation", "offset")),
        *(("weights", ctypes.c_void_p * 3), ("biases", ctypes.c_void_p * 3)),
    )


class Networks:
    """Small networks, whose answers are averaged.

    Parameters
    ----------
    arrays : dict
        Name -> array: of each layer the weights and biases of all networks together, and how inputs and outputs are scaled.
    """

    def __init__(self, arrays):
        # The C++ reads them where they lie.
        self._arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
        layers = [[self._arrays[f"{kind}{i}"] for i in range(3)] for kind in ("weight", "bias")]
        count, self._inputs, _ = layers[0][0].shape
        *_, self._outputs = widths = self._inputs, *(weights.shape[2] for weights in layers[0])
        self._struct = _Networks(count, widths)
        for name in ("mean", "deviation", "offset"):
            setattr(self._struct, name, self._arrays[name].ctypes.data)
        for name, of_layers in zip(("weights", "biases"), layers, strict=True):
            setattr(self._struct, name, tuple(array.ctypes.data for array in of_layers))

    def ask(self, described):
        """Give what they say on average, for each of the ``TARGETS``: log of time over floor."""
        told, answer = array.array("f", described), array.array("f", bytes(4 * self._outputs))
        if len(told) != self._inputs:
            raise ValueError(
                f"described: expected {self._inputs} numbers, as many as the networks have learnt, got {len(told)}"
            )
        plans.library().ask_networks(ctypes.byref(self._struct), _address(told), _address(answer))
        return answer.tolist()


def _address(values):
    return ctypes.c_void_p(values.buffer_info()[0])


@functools.cache
def networks(name):
    """Load a GPU's networks, and the facts of what they have learnt."""
    with np.load(_file(name)) as stored:
        return Networks({name: stored[name] for name in stored if name != "facts"}), json.loads(str(stored["facts"]))


# ---- what was measured ----


def recorded(problem, hardware):
    """Look up what was timed of this very problem on this GPU: name -> seconds."""
    (stride, other_stride), (dilation, other_dilation), padding = problem.stride, problem.dilation, problem.padding
    is_square = stride == other_stride and dilation == other_dilation and padding.count(padding[0]) == 4
    if not is_square or not (problem.is_contiguous or problem.is_channels_last) or not is_recorded(hardware.name):
        return {}
    out_channels, _, *kernel = problem.weight_shape
    key = *problem.input_shape, out_channels, *kernel, stride, padding[0], dilation, problem.groups, *_how(problem)
    find = _index(hardware.name).find
    times = {name: time for name, time in find(*key, "forward").items() if name in FORWARD}
    # With winners the forward kernels are slower; the choice between them is the same.
    times |= {name: time for name, time in find(*key, "training").items() if name not in FORWARD}
    return {name: 1e-6 * time for name, time in times.items()}


def _how(problem):
    """Name a problem's precision and layout as the records do."""
    precision = problem.precision if problem.dtype == torch.float32 else str(problem.dtype).removeprefix("torch.")
    return precision, "channels_last" if problem.is_channels_last and not problem.is_contiguous else "NCHW"


@functools.cache
def _index(name):
    return Index(_file(name).with_suffix(".csv"))


@functools.cache
def _rows(name):
    return [row for row in measured.read(_file(name).with_suffix(".csv")) if row.direction == "forward"]


def nearest(problem, hardware):
    """Describe the recorded layer that is most like a problem, and what its candidates took."""
    how = _how(problem)
    wanted = _place(problem.weight_shape, problem.pixels, problem.input_shape[2:], max(problem.stride), problem.groups)

    def distance(row):
        layer = row.layer
        size = layer.height, layer.width
        found = _place(layer.weight_shape, layer.pixels, size, layer.stride, layer.groups)
        return sum((a - b) ** 2 for a, b in zip(wanted, found, strict=True))

    row = min((row for row in _rows(hardware.name) if (row.precision, row.layout) == how), key=distance, default=None)
    if row is None:
        return ""
    times = sorted((time.p50, name) for name, time in row.times.items() if name in FORWARD)
    said = ", ".join(f"{name} {microseconds:.4g} us" for microseconds, name in times)
    return f"{row.layer}, {row.precision}, {row.layout}, on an {networks(hardware.name)[1]['hardware']['name']}: {said}"


def _place(weight_shape, pixels, size, stride, groups):
    out_channels, in_channels, kernel_h, kernel_w = weight_shape
    sizes = [_log(number) for number in (in_channels, out_channels, pixels, *size)]
    return *sizes, 2 * _log(kernel_h), 2 * _log(kernel_w), 4 * _log(stride), 4 * _log(groups)
