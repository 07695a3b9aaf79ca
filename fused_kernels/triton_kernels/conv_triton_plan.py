"""How conv_triton computes a convolution: what it copies first, the matrix that the copy makes, the tile. No Triton here."""

import functools
import math
from typing import NamedTuple


class Config(NamedTuple):
    """A tile, and how the compiler cuts the work on it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int  # on a multiprocessor


class Plan(NamedTuple):
    """How a convolution is computed: what is copied first, and what is launched."""

    copies_input: bool
    copies_weight: bool
    out: tuple[int, int]
    width: int  # channels of a group in the matrix
    span: int  # and with their neighbours
    pieces: tuple[int, int]  # of the filter, of so many channels each
    pitch: tuple[int, int]  # rows and columns of an image in the matrix
    planes: tuple[int, int]
    left: int  # rows of zeros before the first image
    config: Config


@functools.lru_cache(4096)
def plan(shape, weight_shape, stride, padding, dilation, groups, matrices, hardware, config=None):
    """Say how to compute a convolution.

    Parameters
    ----------
    shape, weight_shape, stride, padding, dilation, groups
        As of :class:`fused_kernels.problem.Problem`; all are tuples, as plans are remembered.
    matrices : pair of bool
        Whether input and weights lie channel by channel, without gaps and from a multiple of 16 bytes on.
    hardware : pair of int
        The GPU's multiprocessors, and the bytes of shared memory that a block can have.
    config : Config, optional
        By default the one that is estimated to be fastest.

    Returns
    -------
    Plan
    """
    images, _, *size = shape
    out_channels, channels, *kernel = weight_shape
    out, pitch, planes = [], [], []
    for i in range(2):
        before, after = padding[2 * i : 2 * i + 2]
        reach = dilation[i] * (kernel[i] - 1)
        out.append((size[i] + before + after - reach - 1) // stride[i] + 1)
        # Zeros behind a row are also those before the next one, and behind an image those before the next.
        zeros = -(-before // stride[i])
        pitch.append(max(-(-size[i] // stride[i]) + zeros, out[i] + max((reach - before) // stride[i], 0)))
        planes.append(min(stride[i], reach + 1))
    merges = groups == stride[1] == dilation[1] == 1
    taps = (kernel[1], (kernel[0], 1)) if merges else (1, tuple(kernel))
    if config is None:
        sizes = Sizes(images, pitch, out, groups * _up(channels, 8))
        config = choose(sizes, channels * taps[0], math.prod(taps[1]), out_channels, groups, hardware)
    # A group's last chunk must not reach into the next group.
    width = _up(channels, 8 if groups == 1 else config.block_k)
    is_whole = width == channels and tuple(stride) == (1, 1) and pitch == size
    copies = not (matrices[0] and is_whole), not (matrices[1] and width == channels)
    return Plan(
        *copies, tuple(out), width, width * taps[0], taps[1], tuple(pitch), tuple(planes), -(-padding[2] // stride[1]), config
    )


def why_too_large(how, images, weight_shape, groups):
    """Say in one sentence what does not fit into 32 bits, or into a grid, or None."""
    out_channels, _, *kernel = weight_shape
    rows = max(images * math.prod(how.pitch) * math.prod(how.planes) + how.left, out_channels * math.prod(kernel))
    if rows >= 2**30:
        return f"conv_triton counts the rows of a matrix in 32 bits, not {rows}"
    if groups * how.width >= 2**21 or groups * how.span >= 2**30:
        return f"conv_triton takes fewer than 2^21 channels, not {groups * how.width}"
    return None


# Pixels, output channels, warps, stages, programs: what was left of those that were timed on an H200.
TILES = (
    *((256, 128, 8, 4, 1), (128, 256, 8, 4, 1), (128, 128, 4, 3, 2), (256, 64, 8, 4, 1), (128, 64, 4, 4, 2)),
    *((64, 256, 8, 4, 1), (64, 128, 4, 4, 2), (64, 64, 4, 4, 3), (128, 32, 4, 4, 3), (128, 16, 4, 4, 4)),
)


def choose(sizes, span, pieces, out_channels, groups, hardware):
    """Choose the tile with the least estimate of cycles; arguments as of ``cycles``, and the bytes of shared memory."""
    multiprocessors, shared_bytes = hardware
    of_group = out_channels // groups
    tiles = [tile for tile in TILES if tile[1] < 2 * max(16, of_group)]
    # A row that begins at a multiple of 64 bytes is brought whole in steps of so many.
    block_ks = [64 if span > 32 else 32 if span > 16 else 16, *([32] if span > 32 and sizes.columns % 64 == 32 else [])]
    configs = [_fit(Config(m, n, k, *rest), shared_bytes) for m, n, *rest in tiles for k in block_ks]
    return min(filter(None, configs), key=lambda config: cycles(config, sizes, span, pieces, of_group, groups, multiprocessors))


def _fit(config, shared_bytes):
    """Take as many stages as fit into shared memory, and fewer programs before there is no pipeline; None where none fits."""
    stage = 2 * config.block_k * (config.block_m + config.block_n)
    for programs in (config.programs, 1):
        stages = min(config.stages, (shared_bytes - 1024) // (programs * stage))
        if stages > 1:
            return config._replace(stages=stages, programs=programs)
    return None


class Sizes(NamedTuple):
    """The matrix that stands for the images."""

    images: int
    pitch: tuple[int, int]  # rows and columns of an image
    out: tuple[int, int]  # of these, what is stored
    columns: int  # channels of a pixel


def cycles(config, sizes, span, pieces, of_group, groups, multiprocessors):
    """Estimate the cycles of the busiest multiprocessor; the constants were fitted to times of many layers on an H200."""
    block_m, block_n, block_k, _, _, programs = config
    blocks, steps = groups * -(-of_group // block_n), pieces * -(-span // block_k)
    # The tensor cores' 2048 products a cycle; shared memory's 128 bytes: all comes in and goes out, weights for 64 pixels each.
    moved = 2 * block_k * (2 * block_m + block_n + block_n * block_m / 64)
    # A row that begins within a line of 128 bytes is brought as two.
    begins = math.gcd(2 * sizes.columns, 128)
    astride = max(2 * block_k - begins, 0) / 128
    step = max(block_m * block_n * block_k / 2048, moved / 128) + 45 + 0.53 * astride * block_m
    alone = blocks * (steps * max(step, 400) + 1100) + 770
    shared = blocks * (steps * step + 1100)
    if programs > 1:
        # One multiplies while another takes its minimum; but they ask for more lines.
        shared *= 0.86 if begins == 128 else 1.2
    tiles = -(-count_tiles(sizes.images, sizes.pitch, sizes.out, block_m)[0] // multiprocessors)
    return max(-(-tiles // programs) * alone, tiles * shared)


def count_tiles(images, pitch, out, block_m):
    """Count the tiles: of each image by itself, where fewer then hold no pixel that is stored, or of all together.

    Returns
    -------
    tuple of int
        Tiles; tiles of a part; rows of a part.
    """
    rows, stored = math.prod(pitch), (out[0] - 1) * pitch[1] + out[1]
    each, together = -(-stored // block_m), -(-images * rows // block_m)
    return (images * each, each, rows) if images * each < together else (together, together, images * rows)


def _up(number, multiple):
    return -(-number // multiple) * multiple


def plan_of(problem, hardware):
    """Say how to compute a problem.

    Parameters
    ----------
    problem : fused_kernels.problem.Problem
    hardware : fused_kernels.candidates.Hardware

    Returns
    -------
    Plan
    """
    gpu = hardware.multiprocessors, hardware.shared_bytes
    geometry = problem.stride, problem.padding, problem.dilation, problem.groups
    return plan(problem.input_shape, problem.weight_shape, *geometry, (problem.is_channels_last, True), gpu)


def seconds(problem, hardware):
    """Estimate what a problem takes, with what is copied first; arguments as of ``plan_of``."""
    how, images, groups = plan_of(problem, hardware), problem.input_shape[0], problem.groups
    sizes = Sizes(images, how.pitch, how.out, groups * how.width)
    of_group, pieces = problem.weight_shape[0] // groups, math.prod(how.pieces)
    busy = cycles(how.config, sizes, how.span, pieces, of_group, groups, hardware.multiprocessors) / (0.88 * hardware.clock)
    if hardware.capability[0] not in (9, 10):
        # A guess: tensor cores of half the rate or less, and before Hopper no TMA, without which Triton writes no pipeline.
        busy *= 3
    read = problem.input_elements * problem.dtype.itemsize / (0.77 * hardware.bandwidth)
    copied = 2 * images * math.prod(how.pitch + how.planes) * sizes.columns if how.copies_input else 0
    return 6e-6 + max(busy, read) + (2.4e-6 + copied / (0.32 * hardware.bandwidth) if copied else 0)


def describe(problem, hardware):
    """Describe a plan by numbers for an estimate: the tile, how full tiles and waves are; arguments as of ``plan_of``."""
    how, images, groups = plan_of(problem, hardware), problem.input_shape[0], problem.groups
    block_m, block_n, block_k, _, _, programs = how.config
    of_group, pieces = problem.weight_shape[0] // groups, math.prod(how.pieces)
    tiles = count_tiles(images, how.pitch, how.out, block_m)[0]
    blocks, chunks = -(-of_group // block_n), -(-how.span // block_k)
    waves = -(-tiles // (programs * hardware.multiprocessors))
    rows = images * math.prod(how.pitch + how.planes)
    return [
        *(how.copies_input, math.log2(block_m), math.log2(block_n), math.log2(block_k), programs),
        *(math.log2(waves), tiles / (programs * hardware.multiprocessors * waves), math.log2(groups * blocks)),
        *(math.log2(pieces * chunks), problem.pixels / (tiles * block_m), of_group / (blocks * block_n)),
        *(how.span / (chunks * block_k), problem.input_shape[0] * math.prod(problem.input_shape[2:]) / rows),
        math.gcd(2 * groups * how.width, 128) / 128,
    ]


# As many as there are of one that is described.
NOTHING = [0.0] * 14
