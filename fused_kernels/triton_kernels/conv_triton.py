"""conv_triton: implicit GEMM in Triton, whose compiler writes the pipeline.

Idea: with channels side by side, all images are one matrix, a pixel a row, and every tap of the filter is that same matrix
begun some rows later: one tensor descriptor, no im2col, no halo. What straddles an edge of an image is multiplied and not
stored. The taps of a filter row lie side by side as well, so the descriptor's rows overlap: each is k_w pixels wide.
What is no such matrix (NCHW, padding, strides, rows that are no multiple of 16 bytes) is first copied into one.
Limit: every row of the filter is brought from the L2 cache again, and nothing is multiplied while a minimum is taken.
Previous rung: conv_mma, whose pipeline is written by hand. Next: conv_wgmma, which brings each pixel once.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..problem import is_channels_last, winners_dtype
from .common import Launch, check_conv, check_input, check_scale, kind, new_results, on, smaller
from .conv_triton_plan import count_tiles, plan, why_too_large


# Not specialized: sizes change from call to call, and each new kind of number would be compiled anew.
@triton.jit(do_not_specialize=["tiles", "part_tiles", "part", "plane", "pitch_h", "pitch_w", "out_h", "out_w"])
def conv(
    x,  # [rows, GROUPS * SPAN]: a pixel a row, beside it its neighbours under a row of the filter
    w,  # [GROUPS * OUT_CHANNELS, pieces of the filter, SPAN]
    bias,
    scales,
    output,
    winners,
    scale,
    tiles,
    part_tiles,  # of a part, which is one image or all of them
    part,  # rows of a part
    plane,  # rows of a plane: with a stride, pixels whose rows and columns leave one remainder are one
    pitch_h,
    pitch_w,
    out_h,
    out_w,
    OUT_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPAN: tl.constexpr,
    PIECES_H: tl.constexpr,
    PIECES_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    PLANES_W: tl.constexpr,
    SCALE_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply BLOCK_M pixels by BLOCK_N output channels at a time, and keep each pixel's minimum."""
    CHUNKS: tl.constexpr = (SPAN + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    TOP: tl.constexpr = (PADDING_H + STRIDE_H - 1) // STRIDE_H
    LEFT: tl.constexpr = (PADDING_W + STRIDE_W - 1) // STRIDE_W
    program, programs = tl.program_id(0), tl.num_programs(0)
    least = tl.full([BLOCK_M], float("inf"), tl.float32)
    winner = tl.zeros([BLOCK_M], tl.int32)
    # One loop over tiles and blocks of channels: flattened, the next one's loads are in flight while a minimum is taken.
    for item in tl.range(0, tl.cdiv(tiles - program, programs) * GROUPS * BLOCKS, flatten=True):
        tile, block = program + item // (GROUPS * BLOCKS) * programs, item % (GROUPS * BLOCKS)
        begin = tile // part_tiles * part
        first = begin + tile % part_tiles * BLOCK_M
        group, k = block // BLOCKS, block % BLOCKS * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(PIECES_H * PIECES_W * CHUNKS):
            piece, c = step // CHUNKS, step % CHUNKS * BLOCK_K
            h, v = piece // PIECES_W * DILATION_H, piece % PIECES_W * DILATION_W
            # Counted from LEFT rows of zeros, with which the matrix begins: a row there holds the first image's pixels as well.
            row = first + (h % STRIDE_H * PLANES_W + v % STRIDE_W) * plane
            row += ((h + TOP * STRIDE_H - PADDING_H) // STRIDE_H - TOP) * pitch_w
            row += (v + LEFT * STRIDE_W - PADDING_W) // STRIDE_W
            weights = w.load([group * OUT_CHANNELS + k, piece, c]).reshape(BLOCK_N, BLOCK_K)
            sums = tl.dot(x.load([row, group * SPAN + c]), weights.T, sums)
        k += tl.arange(0, BLOCK_N)
        channel = group * OUT_CHANNELS + k
        if bias is not None:
            sums += tl.load(bias + channel, k < OUT_CHANNELS, 0).to(tl.float32)
        if scales is not None:
            sums *= tl.load(scales + channel, k < OUT_CHANNELS, 0)
        elif not SCALE_LAST:
            sums *= scale
        if OUT_CHANNELS % BLOCK_N:
            sums = tl.where(k < OUT_CHANNELS, sums, float("inf"))
        found = tl.reduce(sums, 1, smaller)
        is_less = (block == 0) | (found < least) | (found != found)
        least = tl.where(is_less, found, least)
        p = first + tl.arange(0, BLOCK_M)
        h, v = p // pitch_w % pitch_h, p % pitch_w
        at = ((p // (pitch_h * pitch_w)).to(tl.int64) * out_h + h) * out_w + v
        is_last = (block == GROUPS * BLOCKS - 1) & (p < begin + part) & (h < out_h) & (v < out_w)
        tl.store(output + at, least * scale if SCALE_LAST else least, is_last)
        if winners is not None:
            # Where the minimum is NaN, no channel equals it: then one that is NaN.
            places = tl.where((sums == found[:, None]) | (sums != sums), channel, 2**31 - 1)
            winner = tl.where(is_less, tl.min(places, 1), winner)
            tl.store(winners + at, winner, is_last)


@triton.jit(do_not_specialize=["rows", "plane", "height", "width", "pitch_h", "pitch_w"])
def pack(
    x,
    matrix,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    rows,
    plane,
    height,
    width,
    pitch_h,
    pitch_w,
    CHANNELS: tl.constexpr,  # of a group; zeros fill them up to WIDTH
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    PLANES_W: tl.constexpr,
    LEFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # whether the channels of a pixel lie side by side
    UNIT: tl.constexpr,  # of so many pixels that lie side by side all are copied or none, and begin at a multiple of 16 bytes
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy images of any layout into the rows of a matrix, with zeros between the rows of an image and between images."""
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p, remainder = (row - LEFT) % plane, (row - LEFT) // plane
    # The remainders are counted from where the filter begins, which may be in the padding.
    h = p // pitch_w % pitch_h * STRIDE_H + (remainder // PLANES_W + STRIDE_H * PADDING_H - PADDING_H) % STRIDE_H
    v = p % pitch_w * STRIDE_W + (remainder % PLANES_W + STRIDE_W * PADDING_W - PADDING_W) % STRIDE_W
    c = column % WIDTH
    is_pixel = tl.max_constancy((row >= LEFT) & (row < rows) & (h < height) & (v < width), UNIT)
    is_channel = (c < CHANNELS) & (column < GROUPS * WIDTH)
    at_pixel = (p // (pitch_h * pitch_w)).to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + v.to(tl.int64) * stride_w
    at_pixel = tl.max_contiguous(tl.multiple_of(at_pixel, UNIT), UNIT)
    at_channel = (column // WIDTH * CHANNELS + c).to(tl.int64) * (stride_c * UNIT)
    # Neighbouring threads take neighbours along the last dimension.
    if CHANNELS_LAST:
        values = tl.load(x + at_pixel[:, None] + at_channel, is_pixel[:, None] & is_channel, 0)
    else:
        values = tl.load(x + at_channel[:, None] + at_pixel, is_channel[:, None] & is_pixel, 0).T
    at = row.to(tl.int64)[:, None] * (GROUPS * WIDTH) + column
    tl.store(matrix + at, values, (row < rows)[:, None] & (column < GROUPS * WIDTH))


# ---- what is launched ----


def compute(
    input, weight, bias, scale, stride, padding, dilation, groups, precision="ieee", scales=None, *, winners=False, config=None
):
    """Compute the minimum, and each pixel's winner or None; on a GPU, or interpreted on a CPU.

    Parameters
    ----------
    input, weight, bias, scale, stride, padding, dilation, groups, precision, scales
        As of the operator.
    winners : bool
    config : Config, optional
        By default the one that is estimated to be fastest.

    Returns
    -------
    tuple
    """
    check_scale(scale, scales)
    bias, scales = (None if one is None else one.contiguous() for one in (bias, scales))
    # A positive factor changes no order: so it need not be applied to every channel.
    scale_last = scales is None and 0 < scale < math.inf
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    kinds = kind(input), kind(weight), kind(bias), kind(scales)
    ready = _prepare(*kinds, *geometry, winners, scale_last, config)
    output, won = new_results(input, ready.shape, ready.winners)
    if output.numel():
        with on(input.device):
            if ready.pack_input:
                input = _packed(ready.pack_input, input)
            if ready.pack_weight:
                weight = _packed(ready.pack_weight, weight)
            ready.conv(_descriptor(ready.x, input), _descriptor(ready.w, weight), bias, scales, output, won, scale)
    return output, won


class _Ready(NamedTuple):
    """What is launched for arguments of some kinds."""

    shape: tuple[int, ...]
    winners: torch.dtype | None
    pack_input: tuple | None  # the matrix's shape, and the launch
    pack_weight: tuple | None
    x: dict  # descriptors without their tensors
    w: dict
    conv: Launch


@functools.lru_cache(4096)
def _prepare(input, weight, bias, scales, stride, padding, dilation, groups, winners, scale_last, config):
    check_input(input, bias, scales, weight.shape[0])
    check_conv(input, weight, stride, padding, dilation, groups)
    (images, *_), (out_channels, channels, *kernel) = input.shape, weight.shape
    multiprocessors, shared_bytes = hardware(input.device)
    matrices, gpu = (_is_matrix(input), _is_matrix(weight)), (multiprocessors, shared_bytes)
    how = plan(tuple(input.shape), tuple(weight.shape), stride, padding, dilation, groups, matrices, gpu, config)
    if reason := why_too_large(how, images, weight.shape, groups):
        raise RuntimeError(f"input: expected fewer pixels and channels, got {tuple(input.shape)}: {reason}")
    config, rows, pieces = how.config, images * math.prod(how.pitch), math.prod(how.pieces)
    # The last rows have no neighbours beside them in memory; nothing that is stored begins there.
    all_rows = math.prod(how.planes) * rows + how.left - how.span // how.width + 1
    of_weight = how._replace(pitch=tuple(kernel), planes=(1, 1), left=0)
    tiles, *part = count_tiles(images, how.pitch, how.out, config.block_m)
    launch = Launch(
        conv,
        (min(tiles, config.programs * multiprocessors),),
        (
            *(tiles, *part, rows, *how.pitch, *how.out, out_channels // groups, groups, how.span, *how.pieces),
            *(*stride, *dilation, padding[0], padding[2], how.planes[1], scale_last, *config[:3]),
        ),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return _Ready(
        (images, 1, *how.out),
        winners_dtype(out_channels) if winners else None,
        _pack(how, input, channels, groups, stride, padding) if how.copies_input else None,
        _pack(of_weight, weight, channels, 1, (1, 1), (0,) * 4) if how.copies_weight else None,
        _fields((all_rows, groups * how.span), (groups * how.width, 1), (config.block_m, config.block_k)),
        _fields((out_channels, pieces, how.span), (pieces * how.span, how.span, 1), (config.block_n, 1, config.block_k)),
        launch,
    )


def _pack(how, tensor, channels, groups, stride, padding):
    """Say how to copy images into such a matrix."""
    plane, columns = tensor.shape[0] * math.prod(how.pitch), groups * how.width
    rows = math.prod(how.planes) * plane + how.left
    block_p, block_c = 64, min(64, triton.next_power_of_2(columns))
    stride_n, stride_c, stride_h, stride_w = tensor.strides
    channels_last, unit = stride_c == 1, 1
    if not channels_last and stride_w == 1 and stride == (1, 1) and not how.left and tensor.is_aligned:
        unit = math.gcd(8, stride_n, stride_c, stride_h, tensor.shape[3], how.pitch[1])
    strides = stride_n, stride_c // unit, stride_h, stride_w
    launch = Launch(
        pack,
        (-(-rows // block_p), -(-columns // block_c)),
        (
            *(*strides, rows, plane, *tensor.shape[2:], *how.pitch, channels, how.width, groups),
            *(*stride, padding[0], padding[2], how.planes[1], how.left, channels_last, unit, block_p, block_c),
        ),
    )
    return (rows, columns), launch


def _packed(how, tensor):
    shape, launch = how
    matrix = tensor.new_empty(shape)
    launch(tensor, matrix)
    return matrix


def _fields(shape, strides, block_shape):
    return {"shape": [*shape], "strides": [*strides], "block_shape": [*block_shape], "padding": "zero"}


def _descriptor(fields, tensor):
    """Make a descriptor without its checks, which hold for every tensor of a kind."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


def _is_matrix(tensor):
    return is_channels_last(tensor.shape, tensor.strides) and tensor.is_aligned


@functools.cache
def hardware(device):
    """Give the multiprocessors, and the bytes of shared memory that a block can have."""
    if device.type == "cpu":
        return 2, 2**18
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin
