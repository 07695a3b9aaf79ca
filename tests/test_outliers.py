"""No pixel of a fused convolution pays for its neighbours: each keeps its own window's bound, whatever stands elsewhere."""

import math

import hypothesis
import pytest
import torch
from conftest import DEVICES, LAYOUTS, on, skip_unless_takes
from hypothesis import strategies as st
from torch.nn import functional as F

from fused_kernels import bounds, check, composite, conv2d_scale_min, explain, rungs
from fused_kernels.problem import check_problem
from fused_kernels.rungs import LADDER, Rung

KERNELS = [rung for rung in LADDER if rung.operator == "conv2d_scale_min" and rung.device]
# Each at its most exact precision: those that take both compute the same at either.
EVERY = pytest.mark.parametrize(
    ("function", "precision", "device"),
    [on(rung.device, rung, rung.float32_precisions[0], id=f"{rung.name}-{rung.float32_precisions[0]}") for rung in KERNELS],
)
PUBLIC = pytest.mark.parametrize(
    ("precision", "device"),
    [
        on(device, precision, id=f"{device}-{precision}")
        for device, precision in (("cpu", "ieee"), ("cuda", "ieee"), ("cuda", "tf32"))
    ],
)
LAYOUT = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


def draw(shape=(2, 64, 40, 40), out_channels=128, kernel=(3, 3), groups=1):
    """Draw normal input and weights, such that sums have about the input's size."""
    weight = torch.randn(out_channels, shape[1] // groups, *kernel)
    return torch.randn(shape), weight / math.sqrt(weight[0].numel())


def run(function, tensors, scale, precision, keeps_winners, **conv):
    """Give a result, and its winners or None."""
    if not keeps_winners:
        return function(*tensors, scale, precision=precision, **conv), None
    if not isinstance(function, Rung):
        return function(*tensors, scale, precision=precision, return_indices=True, **conv)
    geometry = (conv.get(name, default) for name, default in {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}.items())
    factors = [scale] if isinstance(scale, torch.Tensor) else []
    operator = getattr(torch.ops.fused_kernels, f"{function.name}_winners").default
    return operator(*tensors, 1.0 if factors else scale, *check_problem(*tensors, *geometry, precision).conv, *factors)


def assert_kept(function, precision, device, tensors, scale=1.5, layout="nchw", **conv):
    """Hold results to the promise, without winners and with them."""
    input, *others = (t if t is None else t.to(device) for t in tensors)
    tensors = LAYOUTS[layout](input), *others, *[None] * (2 - len(others))
    if isinstance(function, Rung):
        skip_unless_takes(function, input.dtype, precision, weight_shape=others[0].shape, **conv)
    elif (found := explain(*tensors, scale, precision=precision, **conv)).rung == "composite":
        pytest.skip(found.why)
    bare, _ = run(function, tensors, scale, precision, False, **conv)
    result, winners = run(function, tensors, scale, precision, True, **conv)
    judged = [(result, winners)] if bare.equal(result) else [(result, winners), (bare, None)]
    for values, chosen in judged:
        share = bounds.promise(*tensors, scale, winners=chosen, precision=precision, **conv).share(values)
        assert share <= 1, f"{share:.3g} times what is allowed, {'without' if chosen is None else 'with'} winners"


# ---- images ----


def spike(value, row=20, column=21, image=0, channel=3):
    def put(x):
        x[image, channel % x.shape[1], row % x.shape[2], column % x.shape[3]] = value
        return x

    return put


def times(factor):
    """Multiply by a number at each place: a function of places between 0 and 1, down, across and from channel to channel."""

    def multiply(x):
        places = torch.meshgrid(*(torch.linspace(0, 1, size, dtype=torch.float64) for size in x.shape[1:]), indexing="ij")
        channel, y, x_place = places
        return (x.double() * factor(y, x_place, channel)).float()

    return multiply


def fill(value):
    """A rectangle in all channels of each image: no data there, or a mask."""

    def put(x):
        x[..., 7:12, 9:23] = value
        return x

    return put


def many(value):
    def put(x):
        y, x_place = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        places = (7 * y + x_place) % 41 == 0
        x[:, 1::5, places] = value
        return x

    return put


def black_but_one(x):
    """The right half is black but for one faint pixel."""
    half = x.shape[3] // 2
    x[..., half:] = 0
    x[:, 2 % x.shape[1], x.shape[2] // 2, half + half // 2] = 1e-12
    return x


def bright_pixel(x):
    x[0, :, x.shape[2] // 2, x.shape[3] // 2] *= 1e8
    return x


def mixed_batch(x):
    return x * torch.logspace(-12, 12, len(x)).view(-1, 1, 1, 1)


MAGNITUDES = {f"all times {size:g}": times(lambda y, x, c, size=size: size) for size in (1e-38, 1e-30, 1e-8, 1e8, 1e30, 1e37)}
SPIKES = {f"one value of {value:g}": spike(value) for value in (1e6, -1e8, 1e10, 1e20, -3.4e38)} | {
    "in the first corner": spike(1e10, 0, 0),
    "in the last corner": spike(-1e20, -1, -1, -1, -1),
    "in the last row": spike(3.4e38, -1),
    "in the first column": spike(1e6, 17, 0),
    "many values of 1e+06": many(1e6),
    "many values of 1e+20": many(1e20),
    "a mask of -1e9": fill(-1e9),
    "no data, 1e20": fill(1e20),
    "no data, 3.4e38": fill(3.4e38),
}
PARTS = {
    "ramp across": times(lambda y, x, c: 10 ** (60 * x - 30)),
    "ramp down": times(lambda y, x, c: 10 ** (60 * y - 30)),
    "ramp up": times(lambda y, x, c: 10 ** (30 - 60 * y)),
    "slow ramp": times(lambda y, x, c: 10 ** (8 * x + 8 * y - 8)),
    "dark left": times(lambda y, x, c: torch.where(x < 0.5, 1e-8, 1.0)),
    "dark right": times(lambda y, x, c: torch.where(x > 0.5, 1e-20, 1.0)),
    "dark top": times(lambda y, x, c: torch.where(y < 0.5, 1e-20, 1.0)),
    "dark bottom": times(lambda y, x, c: torch.where(y > 0.5, 1e-8, 1.0)),
    "black right": times(lambda y, x, c: torch.where(x > 0.5, 0.0, 1.0)),
    "black top": times(lambda y, x, c: torch.where(y < 0.5, 0.0, 1.0)),
    "black": times(lambda y, x, c: 0.0),
    "channels apart": times(lambda y, x, c: 10 ** (6 * c - 3)),
    "channels far apart": times(lambda y, x, c: 10 ** (60 * c - 30)),
    "mixed batch": mixed_batch,
    "black but one": black_but_one,
    "a pixel in all channels": bright_pixel,
    "rectified": lambda x: spike(1e8)(x.relu() * (torch.rand_like(x) < 0.1)),
}
IMAGES = MAGNITUDES | SPIKES | PARTS
FEW = ["one value of 1e+10", "in the last row", "ramp across", "dark bottom", "black but one"]


@EVERY
@LAYOUT
@pytest.mark.parametrize("image", IMAGES)
def test_images(function, precision, device, image, layout):
    input, weight = draw()
    assert_kept(function, precision, device, (IMAGES[image](input), weight), layout=layout)


@EVERY
@pytest.mark.parametrize("image", [*MAGNITUDES, *FEW])
def test_a_bias_as_small_as_the_smallest_values(function, precision, device, image):
    input, weight = draw()
    input = IMAGES[image](input)
    faintest = input.abs().amax((0, 1)).min().clamp(min=1e-30)
    assert_kept(function, precision, device, (input, weight, torch.randn(len(weight)) * faintest), -0.7)


@EVERY
@LAYOUT
@pytest.mark.parametrize("image", FEW)
@pytest.mark.parametrize("channels", [1, 3, 16, 80, 192])
def test_input_channels(function, precision, device, channels, image, layout):
    input, weight = draw((1, channels, 40, 40), 64)
    assert_kept(function, precision, device, (IMAGES[image](input), weight), layout=layout)


@EVERY
@pytest.mark.parametrize("channel", [2, 70, 191])
def test_a_spike_in_any_channel(function, precision, device, channel):
    input, weight = draw((1, 192, 20, 24), 64)
    assert_kept(function, precision, device, (spike(1e10, 10, 11, channel=channel)(input), weight))


@EVERY
@pytest.mark.parametrize("image", FEW)
@pytest.mark.parametrize("out_channels", [5, 300])
def test_output_channels(function, precision, device, out_channels, image):
    input, weight = draw((1, 64, 40, 40), out_channels)
    assert_kept(function, precision, device, (IMAGES[image](input), weight))


@EVERY
@LAYOUT
@pytest.mark.parametrize("image", FEW)
@pytest.mark.parametrize("shape", [(3, 64, 14, 14), (1, 64, 9, 71), (5, 32, 4, 37)], ids=str)
def test_sizes(function, precision, device, shape, image, layout):
    input, weight = draw(shape)
    assert_kept(function, precision, device, (IMAGES[image](input), weight), layout=layout)


CONVOLUTIONS = {
    "padding": ((2, 64, 20, 24), 128, (3, 3), {"padding": 1}),
    "much padding": ((2, 32, 12, 15), 40, (3, 3), {"padding": (3, 5)}),
    "1x1": ((2, 64, 20, 24), 128, (1, 1), {}),
    "row": ((2, 64, 12, 40), 48, (1, 5), {}),
    "5x5, same": ((2, 32, 20, 24), 48, (5, 5), {"padding": "same"}),
    "dilation": ((2, 64, 20, 24), 128, (3, 3), {"dilation": 2, "padding": 2}),
    "stride": ((2, 64, 21, 25), 128, (3, 3), {"stride": 2, "padding": 1}),
    "stem": ((1, 3, 40, 44), 64, (7, 7), {"stride": 2, "padding": 3}),
    "groups": ((2, 32, 20, 24), 64, (3, 3), {"groups": 4, "padding": 1}),
}


@EVERY
@pytest.mark.parametrize("image", FEW)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolutions(function, precision, device, convolution, image):
    shape, out_channels, kernel, conv = CONVOLUTIONS[convolution]
    input, weight = draw(shape, out_channels, kernel, conv.get("groups", 1))
    assert_kept(function, precision, device, (IMAGES[image](input), weight), **conv)


# ---- weights and scales ----


def spread(weight, exponents):
    return weight * 10.0 ** torch.rand_like(weight).mul(exponents).sub(exponents)


def one_weight(weight):
    weight[:, 5, 1, 1] = 1e6
    return weight


def times_taps(factors):
    return lambda weight: weight * torch.tensor(factors).view(3, 3)


def one_tap_each(weight):
    """Of each output and input channel, another one."""
    channels = torch.arange(weight.shape[0]).view(-1, 1) + torch.arange(weight.shape[1])
    return weight * F.one_hot(channels % 9, 9).view(weight.shape)


WEIGHTS = {
    "mixed in a channel": lambda w: spread(w, 12),
    "one of each channel is large": one_weight,
    "one tap is large": times_taps([1.0, 1e10, 1, 1, 1, 1, 1, 1, 1]),
    "the middle is zero": times_taps([1.0, 1, 1, 1, 0, 1, 1, 1, 1]),
    "one tap each": one_tap_each,
    "ramp over input channels": lambda w: w * torch.logspace(-9, 9, w.shape[1]).view(-1, 1, 1),
    "channels apart": lambda w: w * torch.logspace(-12, 12, len(w)).view(-1, 1, 1, 1),
    "tiny": lambda w: w * 1e-37,
}
MEETING = [
    "all times 1e+08",
    "one value of 1e+10",
    "many values of 1e+06",
    "a pixel in all channels",
    "dark bottom",
    "ramp across",
]


@EVERY
@pytest.mark.parametrize("image", MEETING)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights(function, precision, device, weights, image):
    """What is large meets small weights and zeros: there it is no excuse for what is beside it."""
    input, weight = draw((2, 32, 40, 40), 64)
    assert_kept(function, precision, device, (IMAGES[image](input), WEIGHTS[weights](weight)))


@EVERY
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("image", [spike(1e8), many(1e6), bright_pixel], ids=["one value", "many values", "a pixel"])
@pytest.mark.parametrize("weights", [lambda w: w, WEIGHTS["channels apart"]], ids=["alike", "apart"])
def test_nothing_cancels(function, precision, device, weights, image, scale):
    """Minima of positive sums are those of the smallest weights; with a negative scale, of the largest."""
    input, weight = (t.abs() for t in draw((2, 32, 40, 40), 64))
    assert_kept(function, precision, device, (image(input), weights(weight)), scale)


@EVERY
@pytest.mark.parametrize("image", FEW)
def test_a_scale_for_each_channel(function, precision, device, image):
    input, weight = draw()
    scale = torch.randn(128) * torch.logspace(-8, 8, 128)
    input = IMAGES[image](input) * 1e-9  # results stay finite
    assert_kept(function, precision, device, (input, weight), scale.to(device))


@EVERY
@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_any_scale(function, precision, device, scale):
    input, weight = draw((1, 64, 20, 24))
    assert_kept(function, precision, device, (spike(1e20)(input), weight), scale)


@EVERY
def test_the_largest_values_that_there_are(function, precision, device):
    input, weight = draw()
    assert_kept(function, precision, device, (input / input.abs().max() * 3.3e38, weight / 1000))


@EVERY
def test_tiny_scales_for_each_channel(function, precision, device):
    """A channel's factor times its weights is tiny, the result is not."""
    input, weight = draw((1, 64, 20, 24))
    scale = torch.randn(128) * 1e-20
    assert_kept(function, precision, device, (spike(1e38)(input * 1e25), weight * 1e-25), scale.to(device))


@EVERY
@pytest.mark.parametrize("dark", range(8, 30, 2))
def test_ties_beside_the_smallest_values(function, precision, device, dark):
    """All operands are off as far as can be, to the same side, and half of the channels may vanish beside the bright half."""
    tie = 1 + 2.0**-11
    input, weight = torch.full((1, 64, 12, 80), tie), torch.full((64, 64, 3, 3), tie / 16)
    input[..., 40:] *= 2.0**-dark
    input[:, 32:, :, 40:] = 2.0**-33
    assert_kept(function, precision, device, (input, weight))


@EVERY
@pytest.mark.parametrize(
    ("channels", "kernel", "out_channels"),
    [
        (7, (1, 1), 64),
        (64, (1, 1), 2),
        (512, (1, 1), 16),
        (2048, (1, 1), 64),
        (1, (9, 9), 64),
        (3, (5, 5), 4),
        (64, (3, 3), 64),
        (64, (3, 3), 2),
        (5, (11, 11), 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("image", [lambda x: x, spike(1e10), spike(1e-10)], ids=["flat", "bright pixel", "dark pixel"])
def test_equal_products(function, precision, device, channels, kernel, out_channels, image):
    """A flat image and a box filter: each sum's roundings go to one side."""
    input, weight = torch.full((1, channels, 40, 44), 1.1), torch.full((out_channels, channels, *kernel), 0.3)
    assert_kept(function, precision, device, (image(input), weight))


@EVERY
@pytest.mark.parametrize(
    ("channels", "kernel", "out_channels"),
    [
        (36, 1, 64),
        (64, 1, 64),
        (128, 1, 64),
        (2048, 1, 16),
        (4096, 1, 2),
        (16, 3, 4),
        (64, 3, 64),
        (3, 6, 64),
        (3, 7, 64),
        (1, 9, 64),
    ],
)
@pytest.mark.parametrize("part", [0.5, 1, 1.99])
@pytest.mark.parametrize("large", [1, 16])
def test_windows_made_to_lose_each_product(function, precision, device, channels, kernel, out_channels, part, large):
    """One product, or some that sum to one, and many that are lost beside it: the exception that the promise names."""
    input = torch.full((1, channels, 40, 44), part * 2.0**-24 * (1 - 2.0**-11))
    input[:, :large, 20, 20] = 1 / large
    tensors = input.to(device), torch.ones(out_channels, channels, kernel, kernel, device=device)
    skip_unless_takes(function, input.dtype, precision, weight_shape=tensors[1].shape)
    result = run(function, (*tensors, None), 1.0, precision, False)[0]
    limit = 2 if device == "cuda" else 1.01
    assert bounds.promise(*tensors, precision=precision).share(result) <= limit


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("part", [1, 2, 4, 6])
def test_small_products_that_winograd_loses(channels, part):
    """Nine sums make a result, each rounded by its own size. Windows found by search may err twice as much as these."""
    generator = torch.Generator().manual_seed(0)
    input, large = torch.randn(2, 34, 34, generator=generator).sign()
    input = (part * 2.0**-24 * (1 - 2.0**-11) * input).repeat(1, channels, 1, 1)
    input[:, :4] = large
    weight = torch.randn(3, 3, generator=generator).sign().repeat(64, channels, 1, 1)
    assert bounds.promise(input, weight).share(conv2d_scale_min(input, weight)) <= 0.5


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("seed", [0, 3])
def test_channels_that_differ_by_sign_alone(channels, seed):
    """All products are alike, and so are Winograd's roundings, though the weights sum to nothing."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.tensor([1.0, -1.0]).repeat(channels // 2).view(-1, 1, 1)
    weight = ((torch.rand(3, 3, generator=generator) + 0.3) * sign).repeat(64, 1, 1, 1)
    image = torch.zeros(34, 34)
    bright = image[1::4, 1::4]
    bright += 1 + torch.rand(bright.shape, generator=generator)
    input = (image * sign).repeat(2, 1, 1, 1)
    assert bounds.promise(input, weight).share(conv2d_scale_min(input, weight)) <= 1


# ---- what is not finite ----


def specials(x):
    """An infinity of either sign and a NaN, each beside what is large or small."""
    x[..., x.shape[3] // 2 :] *= 1e-20
    for row, column, value in ((3, 5, math.inf), (9, 33, math.inf), (20, 8, -math.inf), (28, 30, math.nan), (33, 9, 3.4e38)):
        x[0, 6, row, column] = value
        x[0, 9, row, column + 3] = 1e20
    return x


@EVERY
@LAYOUT
@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_infinities_and_nan_beside_outliers(function, precision, device, layout, scale):
    input, weight = draw()
    assert_kept(function, precision, device, (specials(input), weight), scale, layout)


@EVERY
@pytest.mark.parametrize("scale", [2.0, -2.0])
@pytest.mark.parametrize("factor", [1e-8, 1e-30])
def test_an_infinite_weight_beside_a_dark_half(function, precision, device, factor, scale):
    """However small a value is, times an infinity it is one; only zero makes NaN of it."""
    input, weight = draw((1, 64, 20, 24))
    input = input.abs() + 0.1
    input[..., 12:] *= factor
    weight[7, 5, 1, 1] = math.inf
    assert_kept(function, precision, device, (input, weight), scale)


@EVERY
@LAYOUT
def test_infinities_where_all_else_is_black(function, precision, device, layout):
    input, weight = draw((2, 80, 40, 80), 160)
    input[..., 40:] = 0
    for row, column, value in ((3, 45, math.inf), (20, 60, -math.inf), (30, 70, math.nan)):
        input[0, 7, row, column] = input[1, -1, row, column] = value
    assert_kept(function, precision, device, (input, weight, torch.randn(160)), layout=layout)


@EVERY
@pytest.mark.parametrize("value", [1.0, math.inf])
def test_an_image_of_padding_alone(function, precision, device, value):
    """Zeros times an infinity are NaN. (torch.nn.functional.conv2d takes no image without pixels.)"""
    weight, bias = torch.full((64, 64, 3, 3), value, device=device), torch.randn(64, device=device)
    tensors = weight.new_empty(1, 64, 0, 30), weight, bias
    skip_unless_takes(function, weight.dtype, precision, weight_shape=weight.shape)
    result = run(function, tensors, 1.5, precision, False, padding=4)[0]
    expected = bias.min() * 1.5 if math.isfinite(value) else torch.tensor(math.nan)
    torch.testing.assert_close(result, expected.to(device).expand(1, 1, 6, 36), equal_nan=True)


@EVERY
def test_an_infinite_weight_beside_a_black_half(function, precision, device):
    input, weight = draw((1, 64, 20, 80))
    input[..., 40:] = 0
    weight[7, 5, 1, 1] = math.inf
    assert_kept(function, precision, device, (input, weight))


@EVERY
def test_an_infinite_scale_beside_a_dark_half(function, precision, device):
    """However small a sum is, times an infinity it is one, of the sum's own sign."""
    skip_unless_takes(function, torch.float32, precision)
    input, weight = (t.abs() + 0.01 for t in draw((1, 64, 20, 24)))
    input[..., 12:] *= 1e-30
    for sign in (1.0, -1.0):
        scale = torch.full((128,), math.inf)
        result = run(function, (input.to(device), (sign * weight).to(device), None), scale.to(device), precision, False)[0]
        assert (result == sign * math.inf).all()


# ---- other types than float32 ----


@EVERY
@LAYOUT
@pytest.mark.parametrize(
    ("dtype", "image"),
    [(torch.float16, spike(6e4)), (torch.float16, many(3e4)), (torch.float16, PARTS["slow ramp"])]
    + [(torch.float64, image) for image in (spike(1e20), PARTS["ramp down"])]
    + [(torch.bfloat16, IMAGES[image]) for image in ("one value of 1e+20", "ramp down", "dark left", "mixed batch")],
    ids=[
        "float16, spike",
        "float16, many spikes",
        "float16, ramp",
        "float64, spike",
        "float64, ramp",
        "bfloat16, spike",
        "bfloat16, ramp",
        "bfloat16, dark half",
        "bfloat16, mixed batch",
    ],
)
def test_other_types(function, precision, device, dtype, image, layout):
    input, weight = draw()
    input = image(input).clamp(-6e4, 6e4) if dtype == torch.float16 else image(input)
    assert_kept(function, precision, device, (input.to(dtype), weight.to(dtype)), layout=layout)


# ---- the public function ----


@PUBLIC
@pytest.mark.parametrize("image", IMAGES)
def test_the_public_function(precision, device, image):
    input, weight = draw()
    assert_kept(conv2d_scale_min, precision, device, (IMAGES[image](input), weight))


@PUBLIC
@pytest.mark.parametrize("image", FEW)
def test_while_training(precision, device, image):
    input, weight = draw()
    tensors = IMAGES[image](input).to(device), weight.to(device).requires_grad_()
    if explain(*tensors, precision=precision).rung == "composite":
        pytest.skip("the library's convolution runs")
    result = conv2d_scale_min(*tensors, precision=precision)
    assert result.requires_grad
    assert bounds.promise(*tensors, precision=precision).share(result) <= 1


# ---- the composite: what it does besides the library's convolution ----


def exact_conv(problem, input, weight, bias):
    """Convolve in float64, on the CPU, and round once: no library's errors. The output lies as the input does."""
    layout = torch.channels_last if input.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    top, bottom, left, right = problem.padding
    input, weight, bias = (t if t is None else t.detach().cpu().double() for t in (input, weight, bias))
    input = F.pad(input, (left, right, top, bottom))
    output = F.conv2d(input, weight, bias, problem.stride, 0, problem.dilation, problem.groups)
    return output.to(problem.device, problem.dtype).contiguous(memory_format=layout)


def assert_composite_keeps(name, tensors, device, layout, scale=1.5, **conv):
    input, *others = (t if t is None else t.to(device) for t in tensors)
    tensors, geometry = (LAYOUTS[layout](input), *others), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | conv
    problem = check_problem(*tensors, *geometry.values(), "ieee")
    scales = (scale,) if not isinstance(scale, torch.Tensor) else (1.0, scale)
    for suffix in ("", "_winners"):
        result = composite.candidate_calls(problem, [name], (*tensors, *scales), suffix)[name]()
        result, winners = result if suffix else (result, None)
        assert bounds.promise(*tensors, scale, winners=winners, **conv).share(result) <= 1


# As the input lies, or after a copy into the other layout.
COMPOSITE = pytest.mark.parametrize("name", ["composite", "copied"])


@COMPOSITE
@LAYOUT
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("image", IMAGES)
def test_the_composite_besides_the_convolution(monkeypatch, image, device, layout, name):
    monkeypatch.setattr(composite, "library_conv", exact_conv)
    input, weight = draw((2, 16, 20, 24), 32)
    input = IMAGES[image](input)
    faintest = input.abs().amax((0, 1)).min().clamp(min=1e-30)
    assert_composite_keeps(name, (input, weight, torch.randn(32) * faintest), device, layout)


@COMPOSITE
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_the_composites_convolutions(monkeypatch, convolution, device, name):
    monkeypatch.setattr(composite, "library_conv", exact_conv)
    shape, out_channels, kernel, conv = CONVOLUTIONS[convolution]
    input, weight = draw(shape, out_channels, kernel, conv.get("groups", 1))
    scale = torch.randn(out_channels, device=device) * torch.logspace(-8, 8, out_channels, device=device)
    assert_composite_keeps(name, (spike(1e10)(input) * 1e-9, weight, None), device, "nchw", scale, **conv)


@COMPOSITE
@LAYOUT
@pytest.mark.parametrize("image", FEW)
def test_the_composite_with_a_library_that_sums_in_float32(image, layout, name):
    """PyTorch's convolution on a CPU does, as it comes."""
    input, weight = draw()
    assert_composite_keeps(name, (IMAGES[image](input), weight, torch.randn(128)), "cpu", layout)


# ---- what is drawn ----


@st.composite
def draw_image(draw):
    """Draw a function that multiplies some rectangles of some channels by powers of ten, to zero some, and their order."""
    fraction, exponent = st.floats(0, 1, width=16), st.integers(-25, 25)
    rectangle = st.tuples(fraction, fraction, fraction, fraction)
    parts = draw(st.lists(st.tuples(rectangle, exponent, st.integers(1, 3)), max_size=4))
    spikes = draw(st.lists(st.tuples(fraction, fraction, fraction, exponent), max_size=4))
    black = draw(st.none() | rectangle)

    def index(*fractions_and_sizes):
        return tuple(int(fraction * (size - 1)) for fraction, size in fractions_and_sizes)

    def change(x):
        channels, height, width = x.shape[1:]

        def area(top, left, bottom, right):
            (top, bottom), (left, right) = (sorted(pair) for pair in ((top, bottom), (left, right)))
            rows, columns = index((top, height), (bottom, height)), index((left, width), (right, width))
            return slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1)

        for corners, power, step in parts:
            x[(slice(None), slice(None, None, step), *area(*corners))] *= 10.0**power
        x = x.clamp(-1e30, 1e30)
        if black is not None:
            x[(..., *area(*black))] = 0
        for *place, power in spikes:
            x[(-1, *index(*zip(place, (channels, height, width), strict=True)))] = -(10.0**power)
        return x

    return change


@EVERY
@hypothesis.given(
    change=draw_image(),
    layout=st.sampled_from(("nchw", "channels_last")),
    channels=st.sampled_from((2, 33, 64, 70)),
    size=st.tuples(st.integers(3, 30), st.integers(3, 40)),
    scale=st.sampled_from((1.0, -3.0)),
    bias=st.none() | st.integers(-20, 0),
)
def test_drawn(function, precision, device, change, layout, channels, size, scale, bias):
    torch.manual_seed(0)
    input, weight = draw((2, channels, *size), 48)
    bias = None if bias is None else torch.randn(48) * 10.0**bias
    assert_kept(function, precision, device, (change(input), weight, bias), scale, layout)


# ---- the measure itself ----


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_bound_of_one_pixel_by_hand(precision):
    input, weight, bias = torch.randn(1, 6, 7, 8), torch.randn(4, 3, 3, 2), torch.randn(4)
    scale = torch.tensor([1.0, -2.0, 0.5, 300.0])
    conv = {"groups": 2, "padding": (0, 1), "stride": (2, 1)}
    found = bounds.promise(input, weight, bias, scale, winners=torch.full((1, 1, 3, 9), 3), precision=precision, **conv)
    # The second group's last channel, at the third row and the first column, whose left tap is padding.
    window, taps = input[0, 3:, 4:7, :1].double().abs(), weight[3, :, :, 1:].double().abs()
    sums = (window * taps).sum() + bias[3].abs() + 2**-10 * 3 * window.amax(0).sum() * weight[3].abs().max()
    units = 16 * 2**-24 if precision == "ieee" else (2 + 18 / 4096) * 2**-11
    assert found.allowed[0, 0, 2, 0].item() == pytest.approx(units * 300 * sums.item())
    assert found.target.equal(check.expected(input, weight, bias, scale, **conv))


def test_without_winners_every_channel_that_could_win_counts():
    """The second channel's products cancel to nearly what the first gives; the third's are larger still, but so is its sum."""
    input = torch.ones(1, 2, 1, 1)
    weight = torch.tensor([[1.0, 0.0], [1001.0, -1000.0], [1e6, 1.0]]).view(3, 2, 1, 1)
    one, two = (bounds.promise(input, weight, winners=torch.full((1, 1, 1, 1), winner)) for winner in (0, 1))
    assert bounds.promise(input, weight).allowed == two.allowed > 100 * one.allowed


def by_one_power(x):
    """Round to float16, times one power of two for all of an image."""
    power = torch.exp2(15 - x.abs().max().log2().floor())
    return (x * power).half().double() / power.double()


@pytest.mark.parametrize(
    ("image", "is_kept"), [("all times 1e+08", True), ("one value of 1e+10", False), ("dark right", False)]
)
def test_one_power_of_two_for_an_image_breaks_the_promise(image, is_kept):
    input, weight = draw((1, 8, 20, 24), 16)
    input = IMAGES[image](input)
    result = check.expected(by_one_power(input), weight.double(), scale=2.0).float()
    assert (bounds.promise(input, weight, scale=2.0, precision="tf32").share(result) <= 1) == is_kept


def test_what_must_not_be_there_breaks_the_promise():
    input, weight = draw((1, 4, 8, 9), 6)
    input[0, 0, 2, 3], input[0, 1, 6, 6] = math.inf, 1e20
    found = bounds.promise(input, weight)
    right = found.target.float()
    assert found.share(right) < 1
    for place in ((0, 0, 0, 5), (0, 0, 1, 2)):  # finite, and not
        for value in (math.nan, math.inf, -math.inf, 3.0):
            result = right.clone()
            result[place] = value
            assert found.share(result) > 1e6 or right[place] == value
    assert found.share(right[..., 1:]) == math.inf


def test_a_result_may_overflow_where_float32_does():
    pixels = torch.tensor([[3e38, 2e38, 1.0], [-1.0, 1.0, 1.0]]).view(1, 2, 1, 3)
    found = bounds.promise(pixels, torch.full((1, 2, 1, 1), 1.5))
    assert found.target.flatten().tolist() == pytest.approx([4.5e38, 3e38, 3.0])
    assert found.may_overflow.flatten().tolist() == [True, False, False]
    # In another's place may stand an infinity or a larger channel's number, but no smaller one.
    for first, second, is_kept in ((math.inf, 3e38, True), (math.inf, math.inf, False), (3e38, 3e38, False)):
        assert (found.share(torch.tensor([first, second, 3.0]).view(1, 1, 1, 3)) <= 1) == is_kept


class CountsSmallForZero(Rung):
    """The CPU's kernel, with an input whose values below 1e-10 count as zero."""

    def load(self, **_):
        pass

    def __call__(self, input, *args, **kwargs):
        return super().__call__(torch.where(input.abs() < 1e-10, 0, input), *args, **kwargs)


def test_a_verdict_finds_a_kernel_in_which_small_values_pay():
    verdict = check.verdict(CountsSmallForZero(**vars(rungs["conv2d_scale_min"])))
    found = {case.label: case.correct for case in verdict.cases}
    assert not found["dark half"]
    assert found["float32 ieee, NCHW"]
    assert set(check.OUTLIERS) < set(found)


def test_a_verdict_asks_nothing_of_the_library_beside_outliers():
    verdict = check.verdict(rungs["reference"])
    assert not {case.label for case in verdict.cases} & set(check.OUTLIERS)
    assert {case.share for case in verdict.cases} == {0.0}
