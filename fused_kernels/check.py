"""How right a result is: its errors against float64, what each precision is held to, and a verdict on any rung."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .bounds import every_channel, factors, promise
from .dispatch import OVERLOADS
from .rungs import rungs

# What a rung of each operator must take; some take float64 convolutions as well.
DTYPES = {
    "scale_min": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "conv2d_scale_min": (torch.float32, torch.float16, torch.bfloat16),
}
# Cases of the fused kernels that one large value, or a bright part, could make wrong elsewhere.
OUTLIERS = ("one value of 1e20", "dark half")


class Errors(NamedTuple):
    """How far a result is from float64, or, as a tolerance, how far it may be.

    ``roundings`` is the largest error of an element in units of half its last place, the error of one rounding.
    """

    rms: float
    max: float
    roundings: float

    def within(self, tolerance):
        """Tell whether none of the errors is larger than the tolerance's."""
        return all(error <= limit for error, limit in zip(self, tolerance, strict=True))

    def worst(self, other):
        """Give the larger of each error."""
        return Errors(*map(max, self, other))


def expected(input, weight=None, bias=None, scale=1.0, *, stride=1, padding=0, dilation=1, groups=1):
    """Compute the result in float64: ``min over channels of (scale * conv2d(input))``, without a weight of ``scale * input``.

    The scale is first rounded to float32, as PyTorch does, where the input is not float64 itself.
    """
    if weight is None:
        output = input.double() * factors(scale, input)
    else:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        output = every_channel(input, weight, bias, scale, **geometry)
    return torch.min(output, dim=1, keepdim=True).values


def errors(result, expected):
    """Compare a result with :func:`expected`'s.

    Returns
    -------
    Errors
        Infinite where the shapes differ or where NaNs and infinities do not stand at the same places.
    """
    wrong = Errors(math.inf, math.inf, math.inf)
    if result.shape != expected.shape:
        return wrong
    # What is finite in float64 may rightly overflow in the result's own dtype.
    rounded = expected.to(result.dtype)
    finite = rounded.isfinite()
    if not torch.equal(finite, result.isfinite()):
        return wrong
    if not torch.equal(result[~finite].nan_to_num(nan=0.0), rounded[~finite].nan_to_num(nan=0.0)):
        return wrong
    target = expected[finite]
    if target.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    difference = (result[finite].double() - target).abs()
    info = torch.finfo(result.dtype)
    one_rounding = (target.abs() * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)
    return Errors(difference.square().mean().sqrt().item(), difference.max().item(), (difference / one_rounding).max().item())


def library_errors(input, weight, bias=None, scale=1.0, *, precision="ieee", target=None, **geometry):
    """Give the errors of PyTorch's own convolution, scale and minimum: the yardstick of :func:`tolerance`.

    The larger errors of the two memory layouts, since the library converts one to the other as it likes; ``target`` spares
    computing :func:`expected` again. For "tf32" also the error that rounding the operands to TF32 makes by itself: cuDNN
    computes some small problems in full float32 although TF32 is allowed.
    """
    if target is None:
        target = expected(input, weight, bias, scale, **geometry)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = (t.contiguous(memory_format=layout) for t in (input, weight))
        found.append(errors(rungs["reference"](*tensors, bias, scale, precision=precision, **geometry), target))
    if precision == "tf32" and input.dtype == torch.float32 and input.device.type == "cuda":
        rounded = expected(as_tf32(input), as_tf32(weight), bias, scale, **geometry)
        found.append(errors(rounded.to(input.dtype), target))
    return functools.reduce(Errors.worst, found)


def as_tf32(values):
    """Round float32 to the 10-bit mantissa of TF32, to nearest even; the result is float32 still."""
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF
    return torch.where(values.isfinite(), rounded.view(torch.float32), values)


def tolerance(dtype, library=None, target=None):
    """Say what a result is held to.

    - ``scale_min``: one rounding. 16-bit types are scaled in float32 and then rounded: slightly more than one.
    - ``conv2d_scale_min``: an rms error no larger than 1.1 times that of PyTorch's own convolution at the same precision and
      dtype on the same input, plus three standard errors of an rms over so few pixels.

    Parameters
    ----------
    dtype : torch.dtype
        The result's.
    library : Errors, optional
        From :func:`library_errors` at the promised precision; without it the tolerance is that of ``scale_min``.
    target : Tensor, optional
        From :func:`expected`: its size gives the standard error, its magnitude the one rounding that is always allowed, even
        where the library happens to be exact.

    Returns
    -------
    Errors
    """
    unit = torch.finfo(dtype).eps / 2
    if library is None:
        return Errors(math.inf, math.inf, 1.0 if dtype in (torch.float32, torch.float64) else 1.0 + 2**-24 / unit)
    factor, floor = 1.1, 0.0
    if target is not None and target.numel():
        factor += 3 / math.sqrt(target.numel())
        floor = unit * target[target.isfinite()].abs().max().item()
    return Errors(max(factor * library.rms, floor), math.inf, math.inf)


@dataclass(frozen=True)
class Case:
    """One comparison of a verdict.

    Attributes
    ----------
    label : str
    errors, tolerance : Errors
    share : float
        Of a fused convolution's kernel: the largest error of a pixel as a share of what is promised for it.
    """

    label: str
    errors: Errors
    tolerance: Errors
    share: float = 0.0

    @property
    def correct(self):
        """Whether the errors are within the tolerance, and every pixel's within its own bound."""
        return self.errors.within(self.tolerance) and self.share <= 1


@dataclass(frozen=True)
class Verdict:
    """What :func:`verdict` found; printed, it reads the same on every machine."""

    cases: tuple[Case, ...]

    @property
    def correct(self):
        """Whether every case is right."""
        return all(case.correct for case in self.cases)

    @property
    def lines(self):
        """One line per case."""
        width = max(len(case.label) for case in self.cases)
        return [f"{case.label:<{width}}  {'correct' if case.correct else 'WRONG'}" for case in self.cases]

    def __str__(self):
        right = sum(case.correct for case in self.cases)
        return "\n".join([*self.lines, f"{right} of {len(self.cases)} cases correct"])


def verdict(rung, device=None, *, nan=True):
    """Run a rung, your own edited one too, on small random cases that it takes and compare with float64.

    A fused convolution's kernel is also held to :func:`fused_kernels.bounds.promise` at every pixel, beside outliers to that
    alone. Rungs made of PyTorch's own operations are not, and get no outliers: its libraries promise nothing there.

    Parameters
    ----------
    rung : Rung
    device : torch.device, optional
        By default the rung's own; for a rung made of PyTorch's operations, the CPU.
    nan : bool
        Whether to ask that NaN propagates; scale_min_naive is known to lose it.

    Returns
    -------
    Verdict

    Raises
    ------
    RuntimeError
        The rung is unavailable here, or its source does not compile.
    """
    if missing := rung.why_unavailable(device):
        raise RuntimeError(f"{rung.name}: {missing}")
    device = torch.device(device or rung.device or "cpu")
    # Built at once: a case builds its own dtype alone, and would leave most cores idle.
    asked = {None, *(OVERLOADS[dtype] for dtype in DTYPES[rung.operator])}  # None: an edited source that takes all at once
    rung.load(overloads=[overload for overload in rung.overloads if overload in asked])
    make = _scale_min_cases if rung.operator == "scale_min" else _conv2d_scale_min_cases
    # A float64 convolution is asked only of PyTorch's own; a kernel may leave it to the composite.
    dtypes = DTYPES[rung.operator] + ((torch.float64,) if rung.device is None else ())
    with torch.no_grad():
        cases = [_judge(rung, *case) for case in make(device, dtypes, nan) if _takes(rung, *case)]
    merged = {}
    for case in cases:
        # Variants of one case are one line, the worst of them.
        if case.label not in merged or not case.correct:
            merged[case.label] = case
    return Verdict(tuple(merged.values()))


def _takes(rung, label, tensors, scale, options):
    if label in OUTLIERS and rung.device is None:
        return False
    if rung.device == "cpu":
        return True
    asked = options.get("stride", 1), options.get("groups", 1), tensors[1].shape if len(tensors) > 1 else None
    precisions = (options["precision"],) if "precision" in options else ("ieee", "tf32")
    return any(rung.why_not(tensors[0].dtype, precision, *asked) is None for precision in precisions)


def _judge(rung, label, tensors, scale, options):
    is_conv = rung.operator == "conv2d_scale_min"
    if is_conv:
        exact = rung.why_not(tensors[0].dtype, "ieee") is None
        options = {"precision": "ieee" if exact else "tf32", **options}
    target = expected(*tensors, scale=scale, **{k: v for k, v in options.items() if k != "precision"})
    limit = Errors(math.inf, math.inf, math.inf)
    if label not in OUTLIERS:
        library = library_errors(*tensors, scale=scale, target=target, **options) if is_conv else None
        limit = tolerance(tensors[0].dtype, library, target)
    # Freed at once: the result probably gets this memory, and a pixel that nobody wrote shows as NaN.
    torch.full(target.shape, math.nan, dtype=tensors[0].dtype, device=target.device)
    before = [tensor.clone() for tensor in tensors]
    result = rung(*tensors, scale=scale, **options)
    found = errors(result, target)
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, tensors, strict=True)):
        found = Errors(math.inf, math.inf, math.inf)  # It wrote to its input.
    share = promise(*tensors, scale=scale, **options).share(result) if is_conv and rung.device else 0.0
    return Case(label, found, limit, share)


def _scale_min_cases(device, dtypes, nan):
    def draw(*shape, dtype=torch.float32):
        return (torch.randn(shape, generator=generator) * 4).to(device, dtype)

    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for shape in ((3, 37, 61, 67), (2, 128, 97, 101)):  # on a GPU, enough pixels for its kernels' usual form
            input = draw(*shape, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            yield f"{name}, NCHW", [input], 2.0, {}
            yield f"{name}, channels_last", [input.contiguous(memory_format=torch.channels_last)], 2.0, {}
    yield "negative scale", [draw(2, 16, 9, 31)], -1.5, {}
    yield "scale zero", [draw(2, 16, 9, 31)], 0.0, {}
    yield "one channel", [draw(2, 1, 7, 33)], 2.0, {}
    yield "one pixel", [draw(1, 300, 1, 1)], 2.0, {}
    yield "1024 channels", [draw(1, 1024, 3, 5)], 2.0, {}
    yield "strided view", [draw(2, 20, 16, 40)[:, 1::2, ::3, 5:]], 2.0, {}
    yield "empty batch", [draw(0, 16, 4, 4)], 2.0, {}
    specials = [("infinities", (math.inf, -math.inf))] + [("NaN", (math.nan,))] * nan
    for label, values in specials:
        for value in values:
            input = draw(2, 32, 6, 35)
            # In the first channel, the last, one between, and all of a pixel.
            for channel, column in ((0, 0), (31, 11), (17, 33), (slice(None), 34)):
                input[:, channel, :, column] = value
            yield label, [input], 2.0, {}
            yield label, [input.contiguous(memory_format=torch.channels_last)], 2.0, {}


def _conv2d_scale_min_cases(device, dtypes, nan):
    def draw(batch, in_channels, height, width, out_channels, kernel_h, kernel_w, groups=1, dtype=torch.float32):
        fan_in = in_channels // groups * kernel_h * kernel_w
        shapes = (batch, in_channels, height, width), (out_channels, in_channels // groups, kernel_h, kernel_w), (out_channels,)
        input, weight, bias = (torch.rand(shape, generator=generator) for shape in shapes)
        weight, bias = ((2 * t - 1) / math.sqrt(fan_in) for t in (weight, bias))
        return [tensor.to(device, dtype) for tensor in (input, weight, bias)]

    def channels_last(tensors):
        return [*(t.contiguous(memory_format=torch.channels_last) for t in tensors[:2]), tensors[2]]

    generator = torch.Generator().manual_seed(0)
    reference = (1, 64, 9, 71, 128, 3, 3)
    for dtype in dtypes:
        tensors = draw(*reference, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("auto",):
            label = f"{name} {precision}" if dtype == torch.float32 else name
            yield f"{label}, NCHW", tensors, 2.0, {"precision": precision}
            yield f"{label}, channels_last", channels_last(tensors), 2.0, {"precision": precision}
    yield "negative scale", draw(*reference), -1.5, {}
    yield "scale zero", draw(*reference), 0.0, {}
    yield "no bias", draw(*reference)[:2], 2.0, {}
    for label, size in (("values near 1e6", 1e6), ("values near 1e-6", 1e-6)):
        input, weight, bias = draw(*reference)
        yield label, [input * size, weight, bias * size], 2.0, {}
    yield "odd channels", draw(2, 5, 12, 19, 7, 3, 3), 2.0, {}
    yield "1 x 1 kernel", draw(2, 16, 6, 11, 24, 1, 1), 2.0, {}
    yield "stride, padding", draw(2, 8, 15, 22, 16, 5, 3), 2.0, {"stride": (2, 3), "padding": (2, 1)}
    yield "dilation", draw(2, 8, 15, 22, 16, 3, 3), 2.0, {"dilation": 2}
    yield "groups", draw(2, 12, 9, 20, 24, 3, 3, groups=4), 2.0, {"groups": 4}
    input, weight, bias = draw(1, 64, 17, 40, 128, 3, 3)
    yield "strided view", [input[:, :, ::2, 3:], weight, bias], 2.0, {}
    yield "empty batch", draw(0, 64, 9, 20, 128, 3, 3), 2.0, {}
    specials = [("infinities", (math.inf, -math.inf))] + [("NaN", (math.nan,))] * nan
    for label, values in specials:
        for value in values:
            input, weight, bias = draw(*reference)
            input[0, 5, 4, 40] = value
            yield label, [input, weight, bias], 2.0, {}
    for label in OUTLIERS:
        input, weight, bias = draw(*reference)
        if label == "dark half":
            input[..., 36:] *= 1e-12
            bias *= 1e-12
        else:
            input[0, 5, 4, 40] = 1e20
        for precision in ("ieee", "tf32"):
            yield label, [input, weight, bias], 2.0, {"precision": precision}
            yield label, channels_last([input, weight, bias]), 2.0, {"precision": precision}
