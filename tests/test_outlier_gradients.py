"""No element of a gradient pays for a value that it does not sum: outliers, dark halves, ramps, mixed magnitudes."""

import pytest
import torch
from conftest import LAYOUTS, on
from torch.nn.grad import conv2d_input, conv2d_weight

from fused_kernels import arguments, candidates
from fused_kernels.problem import check_problem, describe_problem, winners_dtype
from fused_kernels.rungs import BACKWARD

GRAD_INPUT, GRAD_WEIGHT = (
    pytest.mark.parametrize(("rung", "device"), [on(r.device, r, id=r.name) for r in BACKWARD if r.operator == name])
    for name in ("grad_input", "grad_weight")
)
# Several tiles and images; more channels than a block takes; few channels; a stride; a 1 x 1 kernel.
LAYERS = pytest.mark.parametrize(
    ("layout", "shape", "out_channels", "kernel", "conv"),
    [
        ("nchw", (2, 24, 24, 70), 40, 3, {}),
        ("channels_last", (2, 24, 24, 70), 40, 3, {}),
        ("channels_last", (3, 72, 20, 35), 136, 3, {"padding": 1}),
        ("nchw", (2, 3, 30, 31), 16, 5, {"padding": 2}),
        ("nchw", (2, 16, 33, 40), 20, 3, {"stride": 2, "padding": 1}),
        ("channels_last", (2, 40, 12, 130), 24, 1, {}),
    ],
    ids=str,
)
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


# What the tensors are like.


def spike(value):
    def put(x):
        x[(0, *(size // 3 for size in x.shape[1:]))] = value
        return x

    return put


def dark_half(x):
    x[..., : x.shape[-1] // 2] *= 1e-9
    return x


def ramp(x):
    return x * torch.logspace(-12, 6, x.shape[-1], device=x.device)


def mixed(dim):
    """Give a range of magnitudes along a dimension."""

    def scale(x):
        factors = torch.logspace(-10, 8, x.shape[dim], device=x.device)
        return x * factors.view(-1, *[1] * (x.dim() - 1 - dim))

    return scale


def mostly_zeros(x):
    x[torch.rand_like(x) < 0.7] = 0.0
    x[..., 0, 0] = 1e9
    return x


LIKE = {
    "usual": lambda x: x,
    "zeros": torch.zeros_like,
    **{f"spike of {value:g}": spike(value) for value in (1e6, 1e20, 3e37)},
    "dark half": dark_half,
    "ramp": ramp,
    "mixed batch": mixed(0),
    "mixed channels": mixed(1),
    "mostly zeros": mostly_zeros,
}
# Of the input or the weights, and of the gradient of the minima.
PAIRS = [(first, "usual") for first in LIKE]
PAIRS += [("usual", second) for second in LIKE if second not in ("usual", "mixed channels")]
PAIRS += [("dark half", "ramp"), ("spike of 1e+06", "spike of 1e+06"), ("mostly zeros", "mostly zeros"), ("ramp", "dark half")]


def draw(device, layout, layer, of_factor, of_gradient, factor_is_weight):
    """Draw input, weights, gradient and winners, one of the first two like the first word says."""
    shape, out_channels, kernel, conv = layer
    input = torch.randn(shape, device=device)
    weight = torch.randn(out_channels, shape[1], kernel, kernel, device=device)
    if factor_is_weight:
        weight = LIKE[of_factor](weight)
    else:
        input = LAYOUTS[layout](LIKE[of_factor](input))
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **conv}
    geometry = check_problem(input, weight, None, **given, precision="ieee").conv[:4]
    size = shape[0], 1, *arguments.output_size(input.shape, weight.shape, *geometry)
    # Small where the other factor's spike is near the end of float32.
    grad = LIKE[of_gradient](0.1 * torch.randn(size, device=device))
    winners = torch.randint(out_channels, size, device=device)
    return input, weight, grad, winners, geometry


def at_winners(grad, winners, out_channels):
    """Give the gradient of all channels, in float64, on the CPU: the library's convolutions have no transforms there."""
    dense = torch.zeros(len(grad), out_channels, *grad.shape[2:], dtype=torch.float64)
    return dense.scatter_(1, winners.cpu(), grad.cpu().double())


def tolerated(precision, products, magnitudes, slack):
    """Give the bound on errors, from the number of products that an element sums, and from sums of magnitudes."""
    if precision == "tf32":
        return 2**-11 * (2 + products / 4096) * (magnitudes + 2**-10 * slack)
    return 2**-24 * products.sqrt().mul(2).clamp_min(16) * (magnitudes + 2**-10 * slack)


def assert_bounded(result, expected, bound):
    """Compare; leave out what is next to float32's ends."""
    fits = bound * 2**12 < torch.finfo(torch.float32).max
    wrong = ~((result.cpu().double() - expected).abs() <= bound.clamp_min(SMALLEST_NORMAL)) & fits
    found = ", ".join(
        f"{float(r):g} for {float(e):g}" for r, e in zip(result.cpu()[wrong][:4], expected[wrong][:4], strict=True)
    )
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are wrong: {found}"


def precisions(rung):
    return rung.float32_precisions if rung.device == "cuda" else ("ieee",)


def skip_refused(rung, input, weight_shape, geometry, precision):
    described = describe_problem(input, weight_shape, *geometry, precision)
    if reason := candidates.why_not(rung.name, described, candidates.read_hardware(input.device)):
        pytest.skip(reason)


def operator(name):
    return getattr(torch.ops.fused_kernels, name).default


def check_grad_weight(rung, input, weight_shape, grad, winners, geometry):
    """Compare the gradients of weights and bias with float64's."""
    out_channels, _, *kernel = weight_shape
    stride, (top, _, left, _), dilation, _ = geometry

    def dense(of_grad, of_input):
        tensors = of_input.cpu().double(), weight_shape, at_winners(of_grad, winners, out_channels)
        return conv2d_weight(*tensors, stride, (top, left), dilation)

    expected, magnitudes = -1.5 * dense(grad, input), 1.5 * dense(grad.abs(), input.abs())
    slack = 1.5 * dense(grad.abs(), input.abs().amax(1, keepdim=True).expand(input.shape))
    products = dense(torch.ones_like(grad), torch.ones_like(input))
    by_channel = at_winners(grad, winners, out_channels)
    pixels = at_winners(torch.ones_like(grad), winners, out_channels).sum((0, 2, 3))
    bias_bound = tolerated("ieee", pixels, 1.5 * by_channel.abs().sum((0, 2, 3)), 0.0)
    given = winners.to(winners_dtype(out_channels))
    for precision in precisions(rung):
        skip_refused(rung, input, weight_shape, geometry, precision)
        args = grad, given, input, -1.5, out_channels, kernel, *geometry, precision
        results = operator(rung.name)(*args)
        assert_bounded(results[0], expected, tolerated(precision, products, magnitudes, slack))
        assert_bounded(results[1], -1.5 * by_channel.sum((0, 2, 3)), bias_bound)
        for one, other in zip(results, operator(rung.name)(*args), strict=True):
            assert one.equal(other)


# The tests.


@GRAD_WEIGHT
@LAYERS
@pytest.mark.parametrize(("of_input", "of_gradient"), PAIRS)
def test_grad_weight(rung, device, layout, shape, out_channels, kernel, conv, of_input, of_gradient, poisoned):
    layer = shape, out_channels, kernel, conv
    input, weight, grad, winners, geometry = draw(device, layout, layer, of_input, of_gradient, False)
    check_grad_weight(rung, input, weight.shape, grad, winners, geometry)


@GRAD_INPUT
@LAYERS
@pytest.mark.parametrize(("of_weight", "of_gradient"), PAIRS)
def test_grad_input(rung, device, layout, shape, out_channels, kernel, conv, of_weight, of_gradient, poisoned):
    layer = shape, out_channels, kernel, conv
    input, weight, grad, winners, geometry = draw(device, layout, layer, of_weight, of_gradient, True)
    stride, (top, _, left, _), dilation, _ = geometry

    def dense(of_grad, of_weight):
        tensors = of_weight.cpu().double(), at_winners(of_grad, winners, out_channels)
        return conv2d_input(shape, *tensors, stride, (top, left), dilation)

    expected, magnitudes = -1.5 * dense(grad, weight), 1.5 * dense(grad.abs(), weight.abs())
    slack = 1.5 * dense(grad.abs(), weight.abs().amax((1, 2, 3), keepdim=True).expand(weight.shape))
    products = dense(torch.ones_like(grad), torch.ones_like(weight))
    given = winners.to(winners_dtype(out_channels))
    for precision in precisions(rung):
        skip_refused(rung, input, weight.shape, geometry, precision)
        args = grad, given, weight, -1.5, shape[2:], *geometry, precision, layout == "channels_last"
        result = operator(rung.name)(*args)
        assert_bounded(result, expected, tolerated(precision, products, magnitudes, slack))
        assert result.equal(operator(rung.name)(*args))


@GRAD_WEIGHT
@pytest.mark.parametrize("far", [1e-30, 1e-12, 1e12, 1e30])
def test_grad_weight_of_images_far_apart(rung, device, far, poisoned):
    """Images of which each has winners of its own: large sums of one must not cost another's."""
    input, grad = torch.randn(6, 16, 34, 66, device=device), torch.randn(6, 1, 32, 64, device=device)
    input[::2] *= far
    winners = torch.randint(4, grad.shape, device=device) + 4 * torch.arange(6, device=device).view(-1, 1, 1, 1)
    check_grad_weight(rung, input, (24, 16, 3, 3), grad, winners, ([1, 1], [0] * 4, [1, 1], 1))


@GRAD_WEIGHT
@pytest.mark.parametrize("grad_layout", ["transposed", "sliced", "batch_inside"])
def test_grad_weight_from_a_gradient_of_any_strides(rung, device, grad_layout, poisoned):
    input = spike(1e15)(torch.randn(2, 16, 12, 40, device=device))
    grad = LAYOUTS[grad_layout](spike(1e12)(torch.randn(2, 1, 10, 38, device=device)))
    winners = torch.randint(24, grad.shape, device=device)
    check_grad_weight(rung, input, (24, 16, 3, 3), grad, winners, ([1, 1], [0] * 4, [1, 1], 1))
