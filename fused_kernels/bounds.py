"""The promise of a fused convolution: how far each pixel may be from float64, whatever stands elsewhere in the image."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

# Of the largest values of a window, times the largest weight: what one power of two for a part of the image may cost.
SLACK = 2.0**-10


class Promise(NamedTuple):
    """What a result is held to at every pixel; all of shape (N, 1, H', W'), on the CPU.

    Attributes
    ----------
    target : Tensor
        The result in float64.
    allowed : Tensor
        How far a result may be from it.
    may_overflow : Tensor
        Where sums of finite numbers may leave the range in which they are made: there a result need not be finite, and the
        channel that float64 chooses may have lost to a larger one.
    """

    target: torch.Tensor
    allowed: torch.Tensor
    may_overflow: torch.Tensor

    def shares(self, result):
        """Give each pixel's error as a share of what is allowed: 1 or less where the promise is kept.

        Infinite where NaNs and infinities are not the target's. What is finite in float64 may rightly overflow in the result's
        own dtype: its infinity counts as the smallest number that is rounded to it.
        """
        info, result = torch.finfo(result.dtype), result.detach().cpu()
        limit = info.max * (1 + info.eps / 4)
        found, target = (values.double().clamp(-limit, limit) for values in (result, self.target))
        excused = self.may_overflow & (~result.isfinite() | (found > target))
        shares = torch.where(excused, 0.0, (found - target).abs() / self.allowed)
        special = ~self.target.isfinite()
        same = (result == self.target) | (result.isnan() & self.target.isnan())
        return torch.where(special, torch.where(same, 0.0, math.inf), shares.nan_to_num(nan=math.inf, posinf=math.inf))

    def share(self, result):
        """Give the largest of :meth:`shares`."""
        if result.shape != self.target.shape:
            return math.inf
        return self.shares(result).max().item() if result.numel() else 0.0


def every_channel(input, weight, bias=None, scale=1.0, **geometry):
    """Compute ``scale * conv2d(input)`` in float64; the scale is first rounded to float32, where the input is not float64."""
    bias = None if bias is None else bias.double()
    return F.conv2d(input.double(), weight.double(), bias, **geometry) * factors(scale, input)


def factors(scale, input):
    """Give a scale, number or tensor, in float64 as what multiplies channels; first rounded as for :func:`every_channel`."""
    scale = torch.as_tensor(scale, dtype=None if isinstance(scale, torch.Tensor) else torch.float64, device=input.device)
    return scale.to(input.dtype if input.dtype == torch.float64 else torch.float32).double().view(-1, 1, 1)


def promise(input, weight, bias=None, scale=1.0, *, winners=None, precision="ieee", groups=1, **geometry):
    """Say how far each pixel of ``conv2d_scale_min(input, weight, bias, scale, ...)`` may be from float64.

    No pixel pays for its neighbours. With every sum over the pixel's own window alone, padding counted as zero, a channel may
    be wrong by ``c * u * abs(scale) * (sum of abs(x * w) + abs(b) + slack)``. The slack is ``2^-10 * C`` times the window's sum
    of each place's largest value, times the channel's largest weight. With C input channels in a group and K products in a sum,

    - "tf32": u = 2^-11, c = 2 + K / 4096,
    - "ieee": u = 2^-24 (float64: 2^-53; the target's own errors are as large), c = max(16, 2 * sqrt(K)).

    A minimum may be wrong by the larger of two such bounds, of the channel that was chosen and of the one that float64 chooses.
    16-bit types are held to "ieee" and one rounding more. What underflows is not promised: added everywhere is the smallest
    normal number of the type in which sums are made, times the scale where that is more than 1.

    The root stands for roundings that differ in sign. Of hundreds of equal products, as of a flat image under a box filter, all
    may be rounded to one side; and beside a large product many small ones may be lost. Hence every kernel adds partial sums.
    A window made against these, one product first and then many of just under half of its last bit, may still err by more than
    the bound: in searches for the worst by less than twice as much, on the CPU by less than a fifth more.

    Parameters
    ----------
    input, weight, bias, scale, groups, **geometry
        As for :func:`fused_kernels.conv2d_scale_min`.
    precision : {"ieee", "tf32"}
        What was asked of float32; of other types it changes nothing.
    winners : Tensor, optional
        The channels that were chosen, (N, 1, H', W'). Without them, each that could win if all err by what they may.

    Returns
    -------
    Promise
    """
    # On the CPU: a GPU's library may mix neighbours itself, and lose more digits beside a large one than float64 has.
    input, weight, bias = (t if t is None else t.detach().cpu() for t in (input, weight, bias))
    scale = scale.detach().cpu() if isinstance(scale, torch.Tensor) else scale
    geometry["groups"] = groups
    values = every_channel(input, weight, bias, scale, **geometry)
    # With an infinity or NaN in its window a pixel has no bound; with a weight that is one, a channel has none.
    sizes = [t if t is None else t.double().abs() for t in (input, weight, bias)]
    sums = F.conv2d(*sizes, **geometry)
    largest = sizes[0].unflatten(1, (groups, weight.shape[1])).amax(2)
    windows = F.conv2d(largest, torch.ones(groups, 1, *weight.shape[2:], dtype=torch.float64), **geometry)
    heaviest = sizes[1].amax((1, 2, 3)).view(-1, 1, 1)
    slack = SLACK * weight.shape[1] * heaviest * windows.repeat_interleave(len(weight) // groups, 1)

    size, info = factors(scale, input).abs(), torch.finfo(input.dtype)
    narrow = info if input.dtype == torch.float64 else torch.finfo(torch.float32)
    allowed = _units(weight[0].numel(), input.dtype, precision) * size * (sums + slack)
    allowed += narrow.smallest_normal * size.clamp(min=1)
    target, best = values.min(1, keepdim=True)
    if winners is None:
        could_win = values - allowed <= (values + allowed).amin(1, keepdim=True)
        chosen = torch.where(could_win, allowed, 0.0).amax(1, keepdim=True)
    else:
        chosen = allowed.gather(1, winners.detach().cpu().long())
    allowed = torch.maximum(allowed.gather(1, best), chosen)
    if info.bits == 16:
        allowed = allowed + ((target.abs() + allowed) * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)
    sums = sums * size.clamp(min=1)
    return Promise(target, allowed, ((sums > narrow.max) & sums.isfinite()).any(1, keepdim=True))


def _units(products, dtype, precision):
    """Give ``c * u``."""
    if dtype == torch.float32 and precision == "tf32":
        return (2 + products / 4096) * 2.0**-11
    return max(16, 2 * math.sqrt(products)) * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
