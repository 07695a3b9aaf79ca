"""Gradients, autocast, opcheck and torch.compile."""

import pytest
import torch
from conftest import (
    DEVICES,
    SCALES,
    call,
    compiled,
    dtype_for,
    implementations,
    precision_for,
    skip_unless_takes,
    takes_tensor_scales,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fused_kernels as fk
from fused_kernels.rungs import LADDER

SCALE_MIN = pytest.mark.parametrize(("function", "device"), implementations("scale_min"))
CONV = pytest.mark.parametrize(("function", "device"), implementations("conv2d_scale_min"))
ON = pytest.mark.parametrize("device", DEVICES)
GEOMETRIES = [
    {},
    {"stride": 2, "padding": (1, 2)},
    {"dilation": (2, 1), "padding": 1},
    {"groups": 2},
    {"padding": "same"},
]


def tensors(device, dtype=torch.float32, groups=1, **_):
    shapes = (2, 4, 9, 11), (6, 4 // groups, 3, 2), (6,)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def distinct(*shape, device, step=0.1):
    """Give float64 values so far apart that gradcheck's small step changes no winner."""
    count = torch.Size(shape).numel()
    return ((torch.randperm(count, device=device).double() - count / 2) * step).view(shape).requires_grad_()


def composed(input, weight, bias, scale, **conv):
    scale = scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
    return torch.min(F.conv2d(input, weight, bias, **conv) * scale, dim=1, keepdim=True).values


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn(output.shape).to(output))


@SCALE_MIN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0, -0.7, 0.0])
def test_scale_min_gradient(function, device, dtype, scale):
    """Rounded values tie often: the gradient goes to one of those that have the minimum."""
    input = torch.randn(2, 9, 7, 5, device=device).mul(2).round().to(dtype).requires_grad_()
    output = function(input, scale)
    torch.manual_seed(1)
    incoming = torch.rand(output.shape).add(0.5).to(output)
    (grad,) = torch.autograd.grad(output, input, incoming)
    assert grad.sum(1, keepdim=True).equal(incoming * scale)
    got_it = grad != 0
    assert int(got_it.sum()) == (output.numel() if scale else 0)
    assert (input * scale)[got_it].equal(output.expand_as(input)[got_it])


@SCALE_MIN
def test_scale_min_gradcheck(function, device):
    assert torch.autograd.gradcheck(lambda x: function(x, -1.5), distinct(2, 5, 3, 2, device=device))


@SCALE_MIN
def test_scale_min_gradient_of_nan_goes_to_the_nan(function, device):
    input = torch.randn(1, 5, 2, 2, device=device)
    input[0, 3, 1, 0] = torch.nan
    (grad,) = gradients(function(input.requires_grad_(), 2.0), [input])
    assert grad[0, 3, 1, 0] != 0
    assert (grad != 0).sum() == 4


@CONV
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_conv_gradients(function, device, dtype, conv, set_conv_precision):
    skip_unless_takes(function, dtype, **conv)
    inputs = tensors(device, dtype, **conv)
    set_conv_precision("ieee")
    found = gradients(function(*inputs, -1.3, **conv), inputs)
    for one, other in zip(found, gradients(composed(*inputs, -1.3, **conv), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@CONV
def test_conv_gradcheck(function, device):
    """The products differ by at least 1e-3, so that a step of 1e-6 changes no winner."""
    skip_unless_takes(function, torch.float64)
    inputs = distinct(1, 2, 4, 4, device=device), distinct(3, 2, 2, 2, device=device), distinct(3, device=device, step=0.037)
    assert torch.autograd.gradcheck(lambda *t: function(*t, 1.5, padding=1, stride=2), inputs)


@CONV
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1)], ids=str)
def test_gradient_of_some_arguments_alone(function, device, needed, set_conv_precision):
    skip_unless_takes(function, torch.float32)
    set_conv_precision("ieee")
    inputs = tensors(device)
    if needed == (0, 1):
        inputs[2] = None
    for i, tensor in enumerate(inputs):
        if tensor is not None:
            tensor.requires_grad_(i in needed)
    wanted = [inputs[i] for i in needed]
    for one, other in zip(gradients(function(*inputs, 2.0), wanted), gradients(composed(*inputs, 2.0), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@CONV
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_where_none_is_wanted(function, device, mode):
    with mode():
        assert not call(function, *tensors(device, dtype_for(function, torch.float32)), 2.0).requires_grad


@pytest.mark.parametrize(("function", "device"), takes_tensor_scales("scale_min"))
class TestTensorScalesOfScaleMin:
    @pytest.mark.parametrize("form", SCALES)
    def test_gradcheck(self, function, device, form):
        """The scale's gradient has the scale's own form."""
        scales = torch.tensor([1.5, -0.7, 0.4, 2.0, -1.1], dtype=torch.float64, device=device)
        scales = SCALES[form](scales).detach().clone().requires_grad_()
        input = distinct(2, 5, 3, 2, device=device)
        assert torch.autograd.gradcheck(function, (input, scales))
        assert torch.autograd.gradgradcheck(function, (input, scales))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_gradients(self, function, device, dtype, of, layout):
        input = torch.randn(2, 9, 17, 25, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
        scales = torch.randn(9, 1, 1, device=device).to(of).requires_grad_()
        exact = [t.detach().double().requires_grad_() for t in (input, scales)]
        least, others = (exact[0] * exact[1]).sort(1).values.split([1, 8], 1)
        # Of channels that tie, or nearly, any may get the gradient: so none comes in there.
        apart = (others[:, :1] - least).detach() > 1e-6 * least.detach().abs()
        found = gradients(function(input, scales) * apart, [input, scales])
        expected = gradients(least * apart, exact)
        for one, other, tensor in zip(found, expected, (input, scales), strict=True):
            assert one.dtype == tensor.dtype
            assert one.shape == tensor.shape
            tolerance = 2 * torch.finfo(torch.promote_types(dtype, of) if dtype == of else torch.bfloat16).eps
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))

    def test_the_scales_alone(self, function, device):
        input, scales = torch.randn(2, 9, 7, 5, device=device), torch.randn(9, device=device, requires_grad=True)
        (found,) = gradients(function(input, scales), [scales])
        (expected,) = gradients((input * scales.view(-1, 1, 1)).amin(1, keepdim=True), [scales])
        torch.testing.assert_close(found, expected)
        assert gradients(function(input, scales), [scales])[0].equal(found)


@pytest.mark.parametrize(("function", "device"), takes_tensor_scales("conv2d_scale_min"))
class TestTensorScalesOfConvolutions:
    @pytest.mark.parametrize("form", SCALES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_gradcheck(self, function, device, form, bias):
        skip_unless_takes(function, torch.float64)
        scales = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64, device=device)
        scales = SCALES[form](scales).detach().clone().requires_grad_()
        inputs = [distinct(1, 2, 4, 4, device=device), distinct(3, 2, 2, 2, device=device)]
        inputs += [distinct(3, device=device, step=0.037)] if bias else []

        def fused(scales, input, weight, bias=None):
            return function(input, weight, bias, scales, padding=1, stride=2)

        assert torch.autograd.gradcheck(fused, (scales, *inputs))
        assert torch.autograd.gradgradcheck(fused, (scales, *inputs))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
    @pytest.mark.parametrize("learned", [True, False])
    def test_gradients(self, function, device, dtype, conv, learned, set_conv_precision):
        skip_unless_takes(function, dtype, **conv)
        set_conv_precision("ieee")
        inputs = tensors(device, dtype, **conv)
        scales = torch.randn(6, device=device, dtype=dtype, requires_grad=learned)
        wanted = [*inputs, scales][: 4 if learned else 3]
        found = gradients(function(*inputs, scales, **conv), wanted)
        for one, other in zip(found, gradients(composed(*inputs, scales, **conv), wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("needed", [(3,), (0, 3), (1, 3), (2, 3), (0,), (2,)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_some_arguments_alone(self, function, device, needed, bias, set_conv_precision):
        skip_unless_takes(function, torch.float32)
        set_conv_precision("ieee")
        inputs = [*tensors(device), torch.randn(6, device=device)]
        if not bias:
            inputs[2], needed = None, tuple(i for i in needed if i != 2) or (3,)
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                tensor.requires_grad_(i in needed)
        wanted = [inputs[i] for i in needed]
        for one, other in zip(gradients(function(*inputs), wanted), gradients(composed(*inputs), wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_same_bits_every_time(self, function, device):
        inputs = [*tensors(device, dtype_for(function, torch.float32)), torch.randn(6, device=device, requires_grad=True)]
        first = gradients(call(function, *inputs), inputs)
        for _ in range(3):
            assert all(one.equal(other) for one, other in zip(first, gradients(call(function, *inputs), inputs), strict=True))


@pytest.mark.parametrize(
    ("function", "device"), [p for p in implementations("conv2d_scale_min") if "conv_direct" not in p.id and "ieee" not in p.id]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
class TestFloat32Bias:
    @pytest.mark.parametrize("kind", ["number", "tensor", "learned tensor"])
    @pytest.mark.parametrize("needed", [(0, 1, 2), (2,)], ids=str)
    def test_gradients(self, function, device, dtype, kind, needed):
        """The bias's is a sum in float32, of whose terms none is rounded where the scale is a number."""
        scales = -1.5 if kind == "number" else torch.randn(6, device=device, requires_grad=kind == "learned tensor")
        inputs = [t.detach().to(d) for t, d in zip(tensors(device), (dtype, dtype, torch.float32), strict=True)]
        wanted = [inputs[i].requires_grad_() for i in needed] + ([scales] if kind == "learned tensor" else [])
        output = function(*inputs, scales)
        torch.manual_seed(1)
        grad = torch.randn(output.shape).to(output)
        found = torch.autograd.grad(output, wanted, grad)
        assert [one.dtype for one in found] == [tensor.dtype for tensor in wanted]
        exact = {id(t): t.detach().double().requires_grad_() for t in (*inputs, *([scales] if kind != "number" else []))}
        conv = F.conv2d(*(exact[id(t)] for t in inputs))
        scaled = conv * (scales if kind == "number" else exact[id(scales)].view(-1, 1, 1))
        expected = torch.autograd.grad(scaled.amin(1, keepdim=True), [exact[id(t)] for t in wanted], grad.double())
        for one, other, tensor in zip(found, expected, wanted, strict=True):
            eps = 1e-6 if tensor is inputs[2] and kind != "tensor" else 4 * torch.finfo(dtype).eps
            assert (one.double() - other).norm() <= eps * other.norm()


@ON
@pytest.mark.parametrize("name", ["conv2d_scale_min", "Conv2dScaleMin", "ModelNew"])
def test_autocast_casts_like_a_convolution(device, name):
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    layer = fk.ModelNew(4, 6, 3, 2.0) if name == "ModelNew" else fk.Conv2dScaleMin(4, 6, 3, 2.0)
    layer.to(device)
    weight, bias = layer.parameters()
    input = torch.randn(2, 4, 9, 11, device=device)
    with torch.autocast(device, dtype):
        result = fk.conv2d_scale_min(input, weight, bias, 2.0) if name == "conv2d_scale_min" else layer(input)
        expected = composed(input, weight, bias, 2.0)
    assert result.dtype == expected.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    result.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.abs().sum() > 0


@ON
def test_autocast_leaves_float64_alone(device):
    inputs = [t.detach() for t in tensors(device, torch.float64)]
    with torch.autocast(device, torch.bfloat16):
        result = fk.conv2d_scale_min(*inputs, 2.0)
    torch.testing.assert_close(result, composed(*inputs, 2.0))


@ON
def test_training_step_changes_the_weights_as_eager_does(device):
    losses = []
    for kind in (fk.Model, fk.ModelNew):
        torch.manual_seed(0)
        model = kind(3, 8, 3, 2.0).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        input = torch.rand(4, 3, 10, 10, device=device)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_gradient_of_the_librarys_convolution_has_the_precision_asked_for(precision, set_conv_precision):
    set_conv_precision("tf32" if precision == "ieee" else "ieee")
    input, weight = torch.randn(8, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda", requires_grad=True)
    plain = ([1, 1], [0, 0], [1, 1], 1)
    output = torch.ops.fused_kernels.library_conv2d.default(input, weight, None, *plain, precision == "tf32")
    grad = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, weight, grad)
    expected = torch.nn.grad.conv2d_weight(input.double(), weight.shape, grad.double())
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5 if precision == "ieee" else 1e-4 < error < 1e-3
    assert torch.backends.cudnn.conv.fp32_precision != precision


OPERATORS = [p for operator in ("scale_min", "conv2d_scale_min") for p in implementations(operator, public=False)]


@pytest.mark.parametrize(("rung", "device"), OPERATORS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(rung, device, requires_grad):
    operator = getattr(torch.ops.fused_kernels, rung.name).default
    input, weight, bias = (t.detach().requires_grad_(requires_grad) for t in tensors(device, dtype_for(rung, torch.float32)))
    if rung.operator == "scale_min":
        samples = [(input, 2.0), (input[:, :1, ::2], -1.0)]
    else:
        plain, precision = ([1, 1], [0, 0, 0, 0], [1, 1], 1), precision_for(rung)
        stride = [2, 1] if rung.strides_and_groups else [1, 1]
        auto = "auto" if len(rung.float32_precisions) > 1 else precision
        samples = [
            (input, weight, bias, 2.0, *plain, precision),
            (input, weight, None, -1.0, stride, [1, 0, 2, 1], [1, 2], 1, auto),
        ]
    if rung.takes_scales:
        scales = torch.randn(4 if rung.operator == "scale_min" else 6, device=device, requires_grad=requires_grad)
        place = 1 if rung.operator == "scale_min" else 3
        samples.append((*samples[0][:place], 1.0, *samples[0][place + 1 :], scales))
    for sample in samples:
        torch.library.opcheck(operator, sample)


@ON
@pytest.mark.parametrize("name", ["conv2d_scale_min", "Conv2dScaleMin", "ModelNew"])
def test_autocast_leaves_a_scale_in_float32(device, name):
    """As it does the multiplication of a convolution's output; that and the minimum are rounded once."""
    dtype, scales = (
        torch.bfloat16 if device == "cpu" else torch.float16,
        torch.nn.Parameter(torch.randn(6, 1, 1, device=device)),
    )
    layer = (fk.ModelNew if name == "ModelNew" else fk.Conv2dScaleMin)(4, 6, 3, scales).to(device)
    weight, bias = (parameter for parameter in layer.parameters() if parameter is not scales)
    input = torch.randn(2, 4, 9, 11, device=device)
    with torch.autocast(device, dtype):
        result = fk.conv2d_scale_min(input, weight, bias, scales) if name == "conv2d_scale_min" else layer(input)
        expected = composed(input, weight, bias, scales)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    result.float().sum().backward()
    assert scales.grad.dtype == torch.float32
    assert scales.grad.abs().sum() > 0


@ON
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
class TestCompile:
    @pytest.mark.parametrize("form", ["number", "(C, 1, 1)"])
    def test_tensor_scale(self, device, dynamic, requires_grad, form):
        """And each new value without compiling anew."""
        counter = CompileCounterWithBackend("aot_eager")
        functions = (
            fk.conv2d_scale_min,
            lambda input, weight, bias, scale: fk.scale_min(input[:, :3], scale.view(-1)[:1] * bias[:3]),
        )
        for function in functions:
            run, frames = compiled(function, dynamic, counter), 0
            for value in (1.0, -2.0):
                inputs = [t.detach().requires_grad_(requires_grad) for t in tensors(device)]
                inputs.append(SCALES[form](torch.randn(6, device=device)).mul(value).requires_grad_(requires_grad))
                result, expected = run(*inputs), function(*inputs)
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
                if requires_grad:
                    wanted = [inputs[0], inputs[3]]
                    for one, other in zip(gradients(result, wanted), gradients(expected, wanted), strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
                frames = frames or counter.frame_count
            assert counter.frame_count == frames

    def test_scale_min(self, device, dynamic, requires_grad):
        function = compiled(fk.scale_min, dynamic)
        for height in (9, 6):
            input = torch.randn(2, 5, height, 7, device=device, requires_grad=requires_grad)
            result, expected = function(input, 2.0), fk.scale_min(input, 2.0)
            assert result.equal(expected)
            if requires_grad:
                assert gradients(result, [input])[0].equal(gradients(expected, [input])[0])

    def test_conv2d_scale_min(self, device, dynamic, requires_grad):
        function = compiled(lambda *t: fk.conv2d_scale_min(*t, 2.0, stride=2, padding=(1, 0), dilation=1), dynamic)
        for height in (9, 8):
            inputs = [t.requires_grad_(requires_grad) for t in tensors(device)]
            inputs[0] = inputs[0][:, :, :height]
            torch.testing.assert_close(
                function(*inputs), composed(*inputs, 2.0, stride=2, padding=(1, 0)), rtol=1e-3, atol=1e-3
            )

    @pytest.mark.parametrize("kind", [fk.Conv2dScaleMin, fk.ModelNew])
    def test_module(self, device, dynamic, requires_grad, kind):
        module = kind(4, 6, 3, 2.0).to(device).requires_grad_(requires_grad)
        function = compiled(module, dynamic)
        for size in (9, 12):
            input = torch.randn(2, 4, size, size, device=device)
            torch.testing.assert_close(function(input), module(input), rtol=1e-3, atol=1e-3)


@ON
def test_inductor(device):
    """Between two of PyTorch's own operations, which inductor compiles."""
    module = fk.Conv2dScaleMin(4, 6, 3, 2.0).to(device).requires_grad_(False)
    network = lambda x: module(x.relu() + 1).sigmoid()  # noqa: E731
    input = torch.randn(2, 4, 9, 9, device=device)
    torch.testing.assert_close(compiled(network, False, "inductor")(input), network(input), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [rung.name for rung in LADDER])
def test_fake_tensors_need_no_device(name):
    """A meta tensor goes through each rung's shape rule, built or not."""
    rung = fk.rungs[name]
    input, weight, bias = (t.to("meta") for t in tensors("cpu"))
    result = rung(input, 2.0) if rung.operator == "scale_min" else rung(input, weight, bias, 2.0, stride=2, padding="valid")
    assert result.shape == ((2, 1, 9, 11) if rung.operator == "scale_min" else (2, 1, 4, 5))
    assert result.is_contiguous()


def test_forward_mode_and_func_transforms_are_torchs_own():
    """An operator without such rules would silently give a derivative of zero."""
    input, weight = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)

    def own(x, w):
        return fk.scale_min(fk.conv2d_scale_min(x, w, scale=-1.5), 2.0)

    def torchs(x, w):
        return torch.min(F.conv2d(x, w) * -1.5, dim=1, keepdim=True).values * 2.0

    for transform in (torch.func.jacfwd, torch.func.jacrev):
        for argument in (0, 1):
            torch.testing.assert_close(transform(own, argument)(input, weight), transform(torchs, argument)(input, weight))
    scales = torch.randn(4, dtype=torch.float64)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        found = transform(lambda s: fk.conv2d_scale_min(input, weight, None, s))(scales)
        torch.testing.assert_close(found, transform(lambda s: composed(input, weight, None, s))(scales))
    batched = torch.func.vmap(own, (0, None))(input[None].repeat(3, 1, 1, 1, 1), weight)
    torch.testing.assert_close(batched, torchs(input, weight).expand_as(batched))


def test_a_rung_refuses_transforms_that_it_has_no_rule_for():
    rung, input = fk.rungs["scale_min"], torch.randn(1, 3, 4, 4)
    with pytest.raises(RuntimeError, match="scale_min has no rule"):
        torch.func.jvp(lambda x: rung(x, 2.0), (input,), (input,))
