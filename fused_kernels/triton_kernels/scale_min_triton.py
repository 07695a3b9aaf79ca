"""scale_min_triton: scale and channel minimum in one pass, in Triton.

Idea: a program takes a tile of pixels and channels. The compiler gives each thread neighbours and loads 16 bytes of them at
once, where it can tell that all such groups begin at a multiple of 16 bytes: so strides come in units of what divides them.
Limit: the memory's bandwidth. Previous rung: scale_min_coalesced. Beside it: scale_min_vectorized, the same by hand.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ..problem import winners_dtype
from .common import Launch, check_input, check_scale, kind, new_results, on, smaller


@triton.jit(do_not_specialize=["blocks", "pixels", "width", "stride_n", "stride_c", "stride_h", "stride_w"])
def scale_min(
    x,
    bias,
    scales,
    output,
    winners,
    scale: tl.float64,
    blocks,  # of pixels in an image
    pixels,  # of an image; in units where pixels lie side by side
    width,
    stride_n,  # strides in units, but for the one that is 1
    stride_c,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,  # "pixels", "channels" or "none"
    UNIT: tl.constexpr,
    ONE_ROW: tl.constexpr,  # whether the rows of an image lie one behind the other
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Take the minimum over all channels of BLOCK_P pixels of an image, BLOCK_C channels at a time."""
    if SIDE_BY_SIDE == "pixels":
        pixels *= UNIT
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    step_p = 1 if SIDE_BY_SIDE == "pixels" else stride_w.to(INDEX) * UNIT
    step_c = 1 if SIDE_BY_SIDE == "channels" else stride_c.to(INDEX) * UNIT
    at = p.to(INDEX) * step_p
    if not ONE_ROW:
        at = (p % width).to(INDEX) * step_p + (p // width).to(INDEX) * (stride_h.to(INDEX) * UNIT)
    x += image * stride_n * UNIT
    least = tl.full([BLOCK_P], float("inf"), COMPUTE)
    winner = tl.zeros([BLOCK_P], tl.int32)
    for first in tl.range(0, CHANNELS, BLOCK_C, loop_unroll_factor=8):
        channel = first + tl.arange(0, BLOCK_C)
        inside = channel < CHANNELS
        # Neighbouring threads take neighbours along the last dimension.
        if SIDE_BY_SIDE == "channels":
            where = at[:, None] + channel.to(INDEX) * step_c
            values = tl.load(x + where, (p < pixels)[:, None] & inside, 0).to(COMPUTE)
        else:
            where = at + channel.to(INDEX)[:, None] * step_c
            values = tl.load(x + where, (p < pixels) & inside[:, None], 0).to(COMPUTE).T
        if bias is not None:
            values += tl.load(bias + channel, inside, 0).to(COMPUTE)
        values *= tl.cast(scale, COMPUTE) if scales is None else tl.load(scales + channel, inside, 0)
        if CHANNELS % BLOCK_C:
            values = tl.where(inside, values, float("inf"))
        found = tl.reduce(values, 1, smaller)
        is_less = (first == 0) | (found < least) | (found != found)
        least = tl.where(is_less, found, least)
        if winners is not None:
            # Where the minimum is NaN, no channel equals it: then one that is NaN.
            places = tl.where((values == found[:, None]) | (values != values), channel, CHANNELS)
            winner = tl.where(is_less, tl.min(places, 1), winner)
    tl.store(output + image * pixels + p, least, p < pixels)
    if winners is not None:
        tl.store(winners + image * pixels + p, winner, p < pixels)


def compute(input, scale, scales=None, *, bias=None, winners=False):
    """Compute the minimum, and each pixel's winner or None; on a GPU, or interpreted on a CPU.

    Parameters
    ----------
    input, scale, scales
        As of the operator.
    bias : Tensor, optional
        What is added to each channel before it is scaled.
    winners : bool

    Returns
    -------
    tuple
    """
    check_scale(scale, scales)
    bias, scales = (None if one is None else one.contiguous() for one in (bias, scales))
    shape, won_dtype, launch = _prepare(kind(input), kind(bias), kind(scales), winners)
    output, won = new_results(input, shape, won_dtype)
    if output.numel():
        with on(input.device):
            launch(input, bias, scales, output, won, scale)
    return output, won


@functools.lru_cache(4096)
def _prepare(input, bias, scales, winners):
    """Give the results' shape, the winners' dtype or None, and the launch for arguments of some kinds."""
    check_input(input, bias, scales, input.shape[1] if len(input.shape) > 1 else 0)
    images, channels, height, width = input.shape
    if height * width >= 2**30:
        raise RuntimeError(f"input: expected fewer than 2^30 pixels in an image, got shape {tuple(input.shape)}")
    stride_n, stride_c, stride_h, stride_w = input.strides
    # What is never stepped over may be of any size.
    stride_n, stride_w = stride_n if images > 1 else 0, stride_w if width > 1 else stride_h
    one_row = height == 1 or stride_h == width * stride_w
    side_by_side, strides = "none", ()
    if stride_c == 1 and channels > 1:
        side_by_side, strides = "channels", (stride_n, stride_w, 0 if one_row else stride_h)
    elif stride_w == 1 and one_row:
        side_by_side, strides = "pixels", (stride_n, stride_c, height * width)
    wide = 16 // input.dtype.itemsize
    unit = math.gcd(*strides, wide) if strides and input.is_aligned else 1
    block_p, block_c = tile(channels, side_by_side, wide)
    furthest = sum(stride * (size - 1) for stride, size in zip(input.strides[1:], input.shape[1:], strict=True))
    blocks, pixels = -(-height * width // block_p), height * width // (unit if side_by_side == "pixels" else 1)
    launch = Launch(
        scale_min,
        (blocks * images,),
        (
            *(blocks, pixels, width, *(stride // unit for stride in (stride_n, stride_c, stride_h, stride_w))),
            *(channels, side_by_side, unit, one_row, tl.int64 if furthest >= 2**30 else tl.int32),
            *(tl.float64 if input.dtype == torch.float64 else tl.float32, block_p, block_c),
        ),
        num_warps=4,
    )
    return (images, 1, height, width), winners_dtype(channels) if winners else None, launch


def tile(channels, side_by_side, wide):
    """Choose pixels and channels of a tile: each of 128 threads has several loads in flight, of ``wide`` elements each."""
    if side_by_side == "channels":
        block_c = min(triton.next_power_of_2(channels), 32 * wide)
        return max(8 * 128 * wide // block_c, 1), block_c
    return 128 * wide if side_by_side == "pixels" else 128, min(triton.next_power_of_2(channels), 16)
