"""Winners, and gradients made from them alone."""

import sys

import pytest
import torch
from conftest import DEVICES, LAYOUTS, assert_one_sentence, dtype_for, on, skip_unless_takes
from torch.nn import functional as F

import fused_kernels as fk
from fused_kernels import arguments, candidates, choice, dispatch, gradients, places
from fused_kernels.problem import check_problem, describe_problem, winners_dtype
from fused_kernels.rungs import BACKWARD, LADDER

ON = pytest.mark.parametrize("device", DEVICES)
WITH_WINNERS = [rung for rung in LADDER if rung.winners]


def rungs_of(operator):
    return pytest.mark.parametrize(
        ("rung", "device"), [on(r.device, r, id=r.name) for r in WITH_WINNERS if r.operator == operator]
    )


def backward_of(operator):
    return pytest.mark.parametrize(("rung", "device"), [on(r.device, r, id=r.name) for r in BACKWARD if r.operator == operator])


def operator(name):
    return getattr(torch.ops.fused_kernels, name).default


def precision_of(rung, dtype):
    return "ieee" if "ieee" in rung.float32_precisions else "tf32"


SCALE_MIN, CONV = rungs_of("scale_min"), rungs_of("conv2d_scale_min")
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
TOLERANCES = {torch.float32: 2e-3, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


# Winners.


@SCALE_MIN
@DTYPE
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("scale", [2.0, -0.7])
@pytest.mark.parametrize("shape", [(2, 9, 7, 5), (3, 128, 6, 8), (1, 300, 5, 3), (2, 1, 4, 4), (1, 64, 1, 1)], ids=str)
def test_winner_of_scale_min_has_the_minimum(rung, device, dtype, layout, scale, shape):
    input = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    output, winners = operator(f"{rung.name}_winners")(input, scale)
    assert output.equal(operator(rung.name)(input, scale))
    assert winners.dtype == (torch.uint8 if shape[1] <= 256 else torch.int32)
    assert winners.shape == output.shape
    at_winner = (input.double() * scale).gather(1, winners.long())
    assert at_winner.equal((input.double() * scale).amin(1, keepdim=True))


@SCALE_MIN
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
def test_winner_of_scale_min_among_values_not_finite(rung, device, value, layout):
    input = torch.randn(2, 70, 9, 8, device=device)
    input[:, 3:60:7, ::2] = value
    input[0, :, 1] = torch.inf
    input[1, 40:, 3, 3] = torch.nan
    output, winners = operator(f"{rung.name}_winners")(LAYOUTS[layout](input), 1.5)
    at_winner = (input * 1.5).gather(1, winners.long())
    torch.testing.assert_close(at_winner, output, rtol=0, atol=0, equal_nan=True)


@CONV
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "out_channels", "conv"),
    [
        ((2, 64, 20, 70), 128, {}),
        ((2, 64, 37, 21), 72, {"padding": 1}),
        ((1, 24, 9, 11), 300, {"padding": 2, "dilation": 2}),
        ((3, 3, 14, 13), 20, {"stride": 2}),
        ((2, 8, 12, 9), 24, {"groups": 4}),
        ((5, 150, 4, 5), 40, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [2.0, -0.6, 0.0])
def test_winner_of_a_convolution_has_the_minimum(rung, device, dtype, layout, shape, out_channels, conv, scale):
    precision = precision_of(rung, dtype)
    skip_unless_takes(rung, dtype, precision, **conv)
    input = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    weight = torch.randn(out_channels, shape[1] // conv.get("groups", 1), 3, 3, device=device).mul(0.1).to(dtype)
    bias = torch.randn(out_channels, device=device).to(dtype)
    args = input, weight, bias, scale, *geometry_of(input, weight, conv), precision
    output, winners = operator(f"{rung.name}_winners")(*args)
    assert output.equal(operator(rung.name)(*args))
    products = F.conv2d(input.double(), weight.double(), bias.double(), **conv) * scale
    assert int(winners.max()) < out_channels
    excess = products.gather(1, winners.long()) - products.amin(1, keepdim=True)
    # float16 operands, or float32's own sums: two channels so near each other may change places.
    assert float(excess.max()) <= 2e-2 * abs(scale)


@CONV
def test_winner_of_a_convolution_is_a_nan_where_there_is_one(rung, device):
    dtype = dtype_for(rung, torch.float32)
    shapes = (2, 16, 20, 24), (40, 16, 3, 3), (40,)
    input, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    bias[7] = torch.nan
    input[1, 3, 5, 6] = torch.inf
    output, winners = operator(f"{rung.name}_winners")(
        input, weight, bias, 2.0, [1, 1], [0] * 4, [1, 1], 1, precision_of(rung, input.dtype)
    )
    assert output.isnan().all()
    products = F.conv2d(input, weight, bias) * 2.0
    assert products.gather(1, winners.long())[0].isnan().all()


@ON
@pytest.mark.parametrize("name", ["scale_min", "conv2d_scale_min"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_return_indices(device, name, requires_grad, set_conv_precision):
    set_conv_precision("ieee")
    input = torch.randn(2, 5, 8, 9, device=device, requires_grad=requires_grad)
    weight = torch.randn(7, 5, 3, 3, device=device)
    args, tensor = ((input, -1.5), input) if name == "scale_min" else ((input, weight, None, -1.5), F.conv2d(input, weight))
    values, indices = getattr(fk, name)(*args, return_indices=True)
    expected = torch.min(tensor * -1.5, dim=1, keepdim=True)
    torch.testing.assert_close(values, expected.values, rtol=1e-5, atol=1e-5)
    assert indices.equal(expected.indices)
    assert indices.dtype == torch.int64
    assert values.requires_grad == requires_grad
    assert not indices.requires_grad


def test_return_indices_under_a_transform():
    input = torch.randn(3, 2, 5, 4, 4)
    indices = torch.func.vmap(lambda x: fk.scale_min(x, 2.0, return_indices=True)[1])(input)
    assert indices.equal(input.argmin(2, keepdim=True))


# Gradients, given the winners.

GEOMETRIES = [
    ((2, 64, 20, 70), 128, 3, {}),
    ((2, 32, 19, 37), 72, 3, {"padding": 1}),
    ((1, 96, 20, 33), 300, 3, {"padding": 2, "dilation": 2}),
    ((2, 12, 40, 37), 20, 3, {"stride": 2, "padding": 1}),
    ((3, 12, 24, 25), 24, 5, {"stride": (3, 2), "padding": 2, "dilation": 2, "groups": 4}),
    ((2, 3, 30, 31), 16, 7, {"padding": 3}),
    ((2, 40, 9, 130), 33, 1, {}),
    ((1, 8, 5, 5), 4, 5, {}),
    ((1, 5, 1, 4), 6, (1, 2), {}),
    ((3, 128, 7, 7), 513, 1, {}),
    ((2, 4, 11, 9), 4474, 1, {"groups": 2}),
    ((2, 64, 14, 14), 96, 1, {"stride": 2}),
    ((2, 128, 46, 40), 512, 3, {"padding": 1}),
]
GEOMETRY = pytest.mark.parametrize(("shape", "out_channels", "kernel", "conv"), GEOMETRIES, ids=str)


def geometry_of(input, weight, conv):
    """Give a convolution's stride, padding, dilation and groups as operators take them."""
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **conv}
    return check_problem(input, weight, None, **given, precision="ieee").conv[:4]


def problem(device, dtype, layout, shape, out_channels, kernel, conv, skewed=False, grad_layout=None):
    """Draw a convolution's tensors, some winners, and a gradient of the minima; give the exact gradients, too."""
    kernel_h, kernel_w = (kernel, kernel) if isinstance(kernel, int) else kernel
    input = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    weight = torch.randn(out_channels, shape[1] // conv.get("groups", 1), kernel_h, kernel_w, device=device).to(dtype)
    geometry = stride, padding, dilation, groups = geometry_of(input, weight, conv)
    size = shape[0], 1, *arguments.output_size(input.shape, weight.shape, *geometry)
    winners = torch.randint(out_channels, size, device=device)
    if skewed:
        winners[torch.rand(size, device=device) < 0.6] = out_channels // 2
    grad = LAYOUTS[grad_layout or "nchw"](torch.randn(size, device=device).to(dtype))
    at_winners = torch.zeros(shape[0], out_channels, *size[2:], dtype=torch.float64, device=device)
    at_winners.scatter_(1, winners, -1.5 * grad.double())
    winners = winners.to(winners_dtype(out_channels))
    top_left = [padding[0], padding[2]]

    def dense(dtype, tf32=False):
        """The library's own backward pass, of the same winners; or one whose operands alone are rounded, to TF32."""
        tensors = at_winners.to(dtype), input.to(dtype), weight.to(dtype)
        if tf32:
            tensors = [to_tf32(t) for t in tensors]
        return torch.ops.aten.convolution_backward(
            *tensors, [out_channels], stride, top_left, dilation, False, [0, 0], groups, [True] * 3
        )

    return input, weight, grad, winners, geometry, dense


def to_tf32(tensor):
    """Round to a mantissa of 10 bits, to nearest."""
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


def relative_error(result, expected):
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return float((result.double() - expected).square().mean().sqrt() / scale)


def assert_no_less_accurate(results, dense, dtype, precision="ieee", floor=1e-14):
    """Compare with float64: an rms error no larger than the library's or, where allowed, that of TF32's operands.

    Of few elements it may be more, by chance; and where both are next to nothing, as in a sum of few terms, four times that
    of rounding the result, or the floor.
    """
    exact = dense(torch.float64)
    peers = [dense(dtype), *([dense(torch.float64, tf32=True)] if dtype == torch.float32 and precision == "tf32" else [])]
    for i, result in enumerate(results):
        if result is None:
            continue
        assert result.shape == exact[i].shape
        chance = 1.2 if result.numel() > 200 else 3.0
        errors = [chance * relative_error(peer[i], exact[i]) for peer in peers]
        rounding = relative_error(exact[i].to(dtype), exact[i])
        assert relative_error(result, exact[i]) <= max(*errors, 4 * rounding, floor)


def precisions(rung, dtype):
    return rung.float32_precisions if dtype == torch.float32 and rung.device == "cuda" else ("ieee",)


def skip_refused(name, problem):
    """Skip what a kernel says that it can't take."""
    if reason := candidates.why_not(name, problem, candidates.read_hardware(problem.device)):
        pytest.skip(reason)


@backward_of("grad_input")
@DTYPE
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@GEOMETRY
def test_grad_input(rung, device, dtype, layout, shape, out_channels, kernel, conv, poisoned, set_conv_precision):
    for precision in precisions(rung, dtype):
        set_conv_precision(precision)
        input, weight, grad, winners, geometry, dense = problem(device, dtype, layout, shape, out_channels, kernel, conv)
        described = describe_problem(input, weight.shape, *geometry, precision)
        skip_refused(rung.name, described)
        is_channels_last = layout == "channels_last"
        result = operator(rung.name)(grad, winners, weight, -1.5, shape[2:], *geometry, precision, is_channels_last)
        assert_no_less_accurate((result, None, None), dense, dtype, precision)
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        assert result.is_contiguous(memory_format=memory_format)


@backward_of("grad_weight")
@DTYPE
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "cropped", "expanded"])
@GEOMETRY
def test_grad_weight(rung, device, dtype, layout, shape, out_channels, kernel, conv, poisoned, set_conv_precision):
    for precision in precisions(rung, dtype):
        set_conv_precision(precision)
        layer, skewed = (shape, out_channels, kernel, conv), layout in ("channels_last", "cropped")
        input, weight, grad, winners, geometry, dense = problem(device, dtype, layout, *layer, skewed)
        described = describe_problem(input, weight.shape, *geometry, precision)
        skip_refused(rung.name, described)
        args = grad, winners, input, -1.5, out_channels, weight.shape[2:], *geometry, precision
        results = operator(rung.name)(*args)
        assert_no_less_accurate((None, *results), dense, dtype, precision)
        for one, other in zip(results, operator(rung.name)(*args), strict=True):
            assert one.equal(other)


@pytest.mark.gpu
def test_a_copy_before_the_weights_gradient_runs_no_python():
    """The operator that takes all dtypes is Python, which takes longer than the kernels."""
    input, _, grad, winners, geometry, _ = problem("cuda", torch.bfloat16, "nchw", (2, 64, 14, 14), 96, 1, {})
    args = grad, winners, input, -1.5, 96, (1, 1), *geometry, "ieee"
    gather = dispatch.operator("grad_weight_gather", torch.bfloat16)
    gather(*args)
    called = set()
    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_name))
    try:
        gather(*args)
    finally:
        sys.setprofile(None)
    assert "stand_in" not in called


@pytest.mark.gpu
def test_any_number_of_groups():
    input, weight, grad, winners, geometry, dense = problem(
        "cuda", torch.float32, "nchw", (8, 65536, 4, 5), 65536, 3, {"groups": 65536}
    )
    described = describe_problem(input, weight.shape, *geometry, "ieee")
    assert candidates.legal(candidates.GRAD_WEIGHT, described, candidates.read_hardware(input.device)) == [
        "grad_weight_private"
    ]
    args = grad, winners, input, -1.5, len(weight), weight.shape[2:], *geometry, "ieee"
    results = operator("grad_weight_private")(*args)
    assert_no_less_accurate((None, *results), dense, torch.float32, "ieee")


@ON
@DTYPE
@pytest.mark.parametrize("out_channels", [40, 2237])
def test_grad_bias_alone(device, dtype, out_channels, poisoned):
    _, _, grad, winners, _, dense = problem(device, dtype, "nchw", (3, 4, 20, 30), out_channels, 3, {}, skewed=True)
    result = operator(choice.GRAD_BIAS[device])(grad, winners, -1.5, out_channels)
    assert_no_less_accurate((None, None, result), dense, dtype)


@ON
@pytest.mark.parametrize("grad_layout", ["expanded", "transposed", "sliced", "channels_last_offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_strides(device, grad_layout, dtype, set_conv_precision):
    """The gradient of a sum is one number, expanded; others come transposed or sliced."""
    set_conv_precision("tf32")
    input, weight, grad, winners, geometry, dense = problem(
        device, dtype, "nchw", (2, 16, 12, 40), 24, 3, {}, grad_layout=grad_layout
    )
    geometry = gradients.Geometry(input, weight, (*geometry, "tf32"))
    results = gradients.gradients(geometry, grad, winners, input, weight, -1.5, (True, True, True))
    # Rounded to a mantissa of 10 bits, one number may be off by 2^-11, and all of an expanded gradient alike.
    assert_no_less_accurate(results, dense, dtype, "tf32", floor=6e-4)


@ON
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e5, 1e20])
def test_float32_gradients_at_any_magnitude(device, magnitude, set_conv_precision):
    set_conv_precision("tf32")
    input, weight, grad, winners, geometry, _ = problem(device, torch.float32, "nchw", (2, 32, 20, 70), 64, 3, {})
    grad = grad * torch.logspace(-3, 0, grad.shape[3], device=device) * magnitude
    geometry = gradients.Geometry(input, weight, (*geometry, "tf32"))
    results = gradients.gradients(geometry, grad, winners, input / magnitude, weight, -1.5, (True, True, True))
    at_winners = torch.zeros(2, 64, *grad.shape[2:], dtype=torch.float64, device=device)
    at_winners.scatter_(1, winners.long(), -1.5 * grad.double())
    exact_results = torch.ops.aten.convolution_backward(
        at_winners, (input / magnitude).double(), weight.double(), [64], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3
    )
    for result, expected in zip(results, exact_results, strict=True):
        assert relative_error(result, expected) < 6e-4


@ON
@DTYPE
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 7, 5), (3, 128, 6, 8), (1, 300, 5, 3)], ids=str)
@pytest.mark.parametrize("grad_layout", ["nchw", "expanded", "transposed"])
def test_scale_min_backward(device, dtype, channels_last, shape, grad_layout, poisoned):
    batch, channels, height, width = shape
    winners = torch.randint(channels, (batch, 1, height, width), device=device)
    grad = LAYOUTS[grad_layout](torch.randn(batch, 1, height, width, device=device).to(dtype))
    name = choice.SCALE_MIN_BACKWARD[device]
    result = operator(name)(grad, winners.to(winners_dtype(channels)), -1.5, channels, channels_last)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.zeros(shape, dtype=compute, device=device).scatter_(1, winners, grad.to(compute) * -1.5).to(dtype)
    assert result.equal(expected)
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# As a user trains.


def composed(input, weight, bias, scale, **conv):
    return torch.min(F.conv2d(input, weight, bias, **conv) * scale, dim=1, keepdim=True).values


def far_apart(*shape, device, step):
    """Give float64 values so far apart that no small step changes a winner."""
    count = torch.Size(shape).numel()
    return ((torch.randperm(count, device=device).double() - count / 2) * step).view(shape).requires_grad_()


@ON
@pytest.mark.parametrize("name", ["scale_min", "conv2d_scale_min"])
def test_second_derivatives(device, name):
    input = far_apart(1, 2, 4, 4, device=device, step=0.1)
    if name == "scale_min":
        assert torch.autograd.gradgradcheck(lambda x: fk.scale_min(x, -1.5), input)
        return
    inputs = input, far_apart(3, 2, 2, 2, device=device, step=0.1), far_apart(3, device=device, step=0.037)
    assert torch.autograd.gradgradcheck(lambda *t: fk.conv2d_scale_min(*t, 1.5, padding=1, stride=2), inputs)


@ON
@pytest.mark.parametrize("kind", ["layer", "layer after another", "scale_min after another"])
def test_checkpointing(device, kind):
    """What stands before is computed anew while our backward pass asks for what it kept."""
    layer = fk.Conv2dScaleMin(4, 6, 3, 2.0).to(device)
    function = {
        "layer": layer,
        "layer after another": lambda x: layer(x.sin()),
        "scale_min after another": lambda x: fk.scale_min(x.sin(), 2.0),
    }[kind]
    leaves = [torch.randn(2, 4, 9, 11, device=device, requires_grad=True)]
    if "layer" in kind:
        leaves += layer.parameters()
    plain = torch.autograd.grad(function(leaves[0]).square().sum(), leaves)
    output = torch.utils.checkpoint.checkpoint(function, leaves[0], use_reentrant=False)
    again = torch.autograd.grad(output.square().sum(), leaves)
    for one, other in zip(plain, again, strict=True):
        assert one.equal(other)


@ON
def test_gradients_accumulate(device):
    layer = fk.Conv2dScaleMin(4, 6, 3, 2.0).to(device)
    input = torch.randn(2, 4, 9, 11, device=device)
    layer(input).sum().backward()
    once = layer.weight.grad.clone()
    layer(input).sum().backward()
    assert layer.weight.grad.equal(2 * once)


@ON
def test_no_gradient_comes_back_where_none_arrives(device):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    input = torch.randn(2, 4, 7, 8, device=device, requires_grad=True)
    layer = fk.Conv2dScaleMin(4, 6, 3, 2.0).to(device)
    for function in (layer, lambda x: fk.scale_min(x, 2.0)):
        assert torch.autograd.grad(Stop.apply(function(input)).sum(), input, allow_unused=True) == (None,)


@ON
@pytest.mark.parametrize("name", ["scale_min", "conv2d_scale_min"])
def test_result_may_be_changed_in_place(device, name, set_conv_precision):
    set_conv_precision("ieee")
    input, weight = torch.randn(2, 4, 7, 8, device=device, requires_grad=True), torch.randn(6, 4, 3, 3, device=device)
    args, tensor = ((input, 1.5), input) if name == "scale_min" else ((input, weight, None, 1.5), F.conv2d(input, weight))
    found = torch.autograd.grad(getattr(fk, name)(*args).relu_().sum(), input)
    expected = torch.autograd.grad(torch.min(tensor * 1.5, dim=1, keepdim=True).values.relu().sum(), input)
    torch.testing.assert_close(found, expected)


@ON
def test_functional_gradient(device, set_conv_precision):
    set_conv_precision("ieee")
    input, weight = torch.randn(2, 4, 9, 11, device=device), torch.randn(6, 4, 3, 3, device=device)
    found = torch.func.grad(lambda w: fk.conv2d_scale_min(input, w, scale=-1.5).sum())(weight)
    expected = torch.func.grad(lambda w: composed(input, w, None, -1.5).sum())(weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


COMPILED_STEP = """
import torch
import fused_kernels as fk

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"
layer = fk.Conv2dScaleMin(4, 6, 3, 2.0, padding=1).to({device!r})
step = torch.compile(lambda x: layer(x.relu()).square().mean(), fullgraph=True, dynamic={dynamic})
for size in (9, 12):
    input = torch.randn(2, 4, size, size, device={device!r}, requires_grad=True)
    parameters = [input, *layer.parameters()]
    found = torch.autograd.grad(step(input), parameters)
    expected = torch.autograd.grad(layer(input.relu()).square().mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
print("all close")
"""


COMPILED_AUTOGRAD = """
import torch
import fused_kernels as fk

layer = fk.Conv2dScaleMin(4, 6, 3, 2.0).to({device!r})
input = torch.randn(2, 4, 9, 11, device={device!r}, requires_grad=True)
for function in (lambda x: layer(x.relu()), lambda x: fk.scale_min(x.relu(), 2.0)):
    (expected,) = torch.autograd.grad(function(input).square().sum(), input)
    input.grad = None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        function(input).square().sum().backward()
    torch.testing.assert_close(input.grad, expected)
print("all close")
"""


@ON
def test_compiled_autograd(device, run_python):
    code = COMPILED_AUTOGRAD.format(device=device)
    assert run_python(code, FUSED_KERNELS_CACHE=str(places.cache_dir())).strip() == "all close"


# NOTE: in a process of its own. After some thousand other tests, torch 2.11 aborted here in half of the runs ("corrupted size
# vs. prev_size", below CompiledFunction.apply); alone it never did, and valgrind and ASAN see nothing.
@ON
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step(device, dynamic, run_python):
    code = COMPILED_STEP.format(device=device, dynamic=dynamic)
    assert run_python(code, FUSED_KERNELS_CACHE=str(places.cache_dir())).strip() == "all close"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_of_a_training_step(dtype, channels_last, set_conv_precision):
    """No more than the input's gradient, the winners, the output, and a tenth of them."""
    set_conv_precision("tf32")
    input = torch.randn(64, 64, 256, 256, device="cuda", dtype=dtype)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    layer = fk.Conv2dScaleMin(64, 128, 3, 2.0, device="cuda", dtype=dtype)
    tensors = [input.requires_grad_(), *layer.parameters()]
    torch.autograd.grad(layer(input).sum(), tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(layer(input).sum(), tensors)
    used = torch.cuda.max_memory_allocated() - before
    pixels = 64 * 254 * 254
    assert used <= 1.1 * (found[0].nbytes + pixels * (1 + dtype.itemsize))


@ON
def test_inference_keeps_no_winners(device):
    layer = fk.Conv2dScaleMin(4, 6, 3, 2.0).to(device)
    input = torch.randn(2, 4, 9, 11, device=device)
    found = []
    for enabled in (False, True):
        with torch.profiler.profile() as profile, torch.set_grad_enabled(enabled):
            layer(input)
        found.append(any("winners" in event.key for event in profile.key_averages()))
    assert found == [False, True]


def test_errors_are_one_sentence():
    grad, winners = torch.randn(1, 1, 3, 3), torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    weight, conv = torch.randn(4, 2, 3, 3), ([1, 1], [0] * 4, [1, 1], 1, "ieee")
    wrong = [
        lambda: operator("grad_input")(grad, winners, weight, 1.0, [9, 9], *conv, False),
        lambda: operator("grad_input")(grad, winners.long(), weight, 1.0, [5, 5], *conv, False),
        lambda: operator("grad_weight")(grad, winners, torch.randn(1, 2, 5, 6), 1.0, 4, [3, 3], *conv),
        lambda: operator("grad_weight")(grad, winners, torch.randn(1, 2, 5, 5).double(), 1.0, 4, [3, 3], *conv),
        lambda: operator("scale_min_backward")(grad[0], winners, 1.0, 4, False),
    ]
    for function in wrong:
        with pytest.raises(RuntimeError) as caught:
            function()
        assert_one_sentence(str(caught.value).splitlines()[0])


OPERATORS = [on(r.device, f"{r.name}_winners", r, id=f"{r.name}_winners") for r in WITH_WINNERS]


@pytest.mark.parametrize(("name", "rung", "device"), OPERATORS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_operators_with_winners(name, rung, device, requires_grad):
    shapes, how = ((2, 4, 9, 11), (6, 4, 3, 2), (6,)), {"device": device, "dtype": dtype_for(rung, torch.float32)}
    input, weight, bias = (torch.randn(shape, **how, requires_grad=requires_grad) for shape in shapes)
    args = (input, 2.0)
    if rung.operator == "conv2d_scale_min":
        args = input, weight, bias, 2.0, [1, 1], [0] * 4, [1, 1], 1, precision_of(rung, input.dtype)
    torch.library.opcheck(operator(name), args)


@pytest.mark.parametrize(("rung", "device"), [on(r.device, r, id=r.name) for r in BACKWARD])
def test_opcheck_of_backward_operators(rung, device):
    input, weight, grad, winners, geometry, _ = problem(device, torch.float32, "nchw", (2, 4, 9, 11), 6, 3, {})
    input, weight, grad = (t.detach().requires_grad_() for t in (input, weight, grad))
    precision = precision_of(rung, input.dtype)
    args = (grad, winners, weight, -1.5, [9, 11], *geometry, precision, False)
    if rung.operator == "grad_weight":
        args = (grad, winners, input, -1.5, 6, [3, 3], *geometry, precision)
    elif rung.operator == "scale_min_backward":
        args = (grad, winners, -1.5, 6, False)
    torch.library.opcheck(operator(rung.name), args)
