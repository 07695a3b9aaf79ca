"""What the fused CUDA kernels would cost by their own plans, the C++ that cuts their work before a launch; no GPU is needed."""

import ctypes
import functools
from typing import NamedTuple

from . import build

NAME = "plans"


class DirectPlan(NamedTuple):
    """A plan of conv_direct.

    Attributes
    ----------
    cost : int
        Cycles of the busiest multiprocessor.
    config : int
        What was chosen: 0 where a thread sums 16 output channels, 1 where it sums 4. (Where a pipeline stage holds too few of
        a sum's products, as of hundreds of channels of a 1 x 1 filter or more, the kernel takes 4 as well; this says 0.)
    """

    cost: int
    config: int


class MmaPlan(NamedTuple):
    """A plan of conv_mma.

    Attributes
    ----------
    cost : int
        Cycles of the busiest multiprocessor.
    config : int
        What was chosen: its place in mma::Tiles.
    splits : int
        How many blocks share a tile's output channels.
    items : int
        Pieces of the filter times chunks of the channels.
    vectors : int
        Whether channels lie side by side and aligned, 0 or 1.
    blocks_per_sm : int
        Blocks on a multiprocessor at a time.
    """

    cost: int
    config: int
    splits: int
    items: int
    vectors: int
    blocks_per_sm: int


class WgmmaPlan(NamedTuple):
    """A plan of conv_wgmma or conv_wgmma_ieee.

    Attributes
    ----------
    cost : int
        Cycles of the busiest multiprocessor.
    config : int
        What was chosen: its place in wgmma::Tiles or wgmma::SplitTiles.
    splits : int
        How many blocks share a tile's output channels.
    slots : int
        Of the ring of input.
    resident, sliding, bulk : int
        Whether the weights stay in shared memory, strips slide, the TMA brings the input; 0 or 1.
    source : int
        How the input reaches shared memory: 0 tiles, 1 planes, 2 pixels.
    """

    cost: int
    config: int
    splits: int
    slots: int
    resident: int
    sliding: int
    source: int
    bulk: int


# In the order of plans.cpp.
_KINDS = {"conv_direct": DirectPlan, "conv_mma": MmaPlan, "conv_wgmma": WgmmaPlan, "conv_wgmma_ieee": WgmmaPlan}
PLANNED = tuple(_KINDS)
_ENDS = [sum(len(kind._fields) for kind in [*_KINDS.values()][: i + 1]) for i in range(len(_KINDS))]
_PLACES = [(name, kind, end - len(kind._fields), end) for (name, kind), end in zip(_KINDS.items(), _ENDS, strict=True)]
_Question, _Answer = ctypes.c_int64 * 25, ctypes.c_int64 * _ENDS[-1]


def source():
    """Give the name and the source of the library that plans."""
    return NAME, (build.CSRC / "cpu" / f"{NAME}.cpp").read_text(encoding="utf-8")


@functools.cache
def why_unavailable():
    """Say in one sentence why the planning can't be asked here, or None."""
    try:
        library()
    except build.UnavailableError as error:
        return str(error)
    return None


# Whether a kernel can take a problem, and what it would cost, are asked one after the other.
@functools.lru_cache(16)
def plan_costs(problem, hardware):
    """Ask each fused kernel for its plan.

    Tensors are taken to begin at a multiple of 16 bytes, and the scale to be neither zero nor infinite.

    Parameters
    ----------
    problem : fused_kernels.problem.Problem
    hardware
        Anything with ``multiprocessors`` and ``shared_bytes_per_multiprocessor``.

    Returns
    -------
    dict
        For each kernel's name its plan; None where it has none, or cannot take such a convolution, or where the planning can't
        be asked. The precision and the GPU's compute capability are not looked at.

    Raises
    ------
    RuntimeError
        The compiler failed; the message holds what it said.
    """
    if why_unavailable():
        return dict.fromkeys(_KINDS)
    images, _, height, width = problem.input_shape
    out_channels, in_channels, kernel_h, kernel_w = problem.weight_shape
    top, _, left, _ = problem.padding
    question = _Question(
        *(images, in_channels, out_channels // problem.groups, problem.groups),
        *(height, width, *problem.output_size, kernel_h, kernel_w),
        *(*problem.stride, top, left, *problem.dilation, *problem.input_strides),
        *(problem.dtype.itemsize, hardware.multiprocessors, hardware.shared_bytes_per_multiprocessor),
    )
    answer = _Answer()
    library().plan_kernels(question, answer)
    values = answer[:]
    return {name: kind._make(values[first:end]) if values[first] >= 0 else None for name, kind, first, end in _PLACES}


@functools.cache
def library():
    """Load the library that plans, built where it is not yet; for callers that have asked ``why_unavailable``."""
    found = build.make(*source(), device="cpu", quiet=True)
    try:
        return ctypes.CDLL(str(found))
    except OSError as error:
        raise build.UnavailableError(build.does_not_load(found, error)) from error
