"""ModelNew as KernelBench's drop-in, and Conv2dScaleMin as a layer among others."""

import copy
import io
import pickle

import pytest
import torch
from conftest import DEVICES, SCALES
from torch import nn
from torch.nn import functional as F

import fused_kernels as fk

ON = pytest.mark.parametrize("device", DEVICES)
ARGUMENTS = (3, 7, 3, -1.5)
OPTIONS = {"stride": 2, "padding": (1, 2), "dilation": (1, 2), "groups": 3, "bias": False}


def seeded(make):
    torch.manual_seed(7)
    return make()


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, saved_and_loaded, lambda module: pickle.loads(pickle.dumps(module))]


def test_model_new_draws_models_weights():
    old, new = (seeded(lambda kind=kind: kind(*ARGUMENTS).state_dict()) for kind in (fk.Model, fk.ModelNew))
    assert list(new) == list(old) == ["conv.weight", "conv.bias"]
    assert all(new[key].equal(old[key]) for key in old)


@ON
def test_model_new_gives_models_result(device):
    old, new = fk.Model(*ARGUMENTS).to(device), fk.ModelNew(*ARGUMENTS).to(device)
    new.load_state_dict(old.state_dict())
    input = torch.rand(2, 3, 20, 30, device=device)
    with torch.no_grad():
        torch.testing.assert_close(new(input), old(input), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_layer_is_initialised_as_conv2d(options):
    options = {"kernel_size": (3, 2), **options}
    layer = seeded(lambda: fk.Conv2dScaleMin(3, 6, scale_factor=2, **options))
    conv = seeded(lambda: nn.Conv2d(3, 6, **options))
    assert list(layer.state_dict()) == list(conv.state_dict())
    assert all(layer.state_dict()[key].equal(value) for key, value in conv.state_dict().items())


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layer_in_every_dtype(device, dtype, set_conv_precision):
    set_conv_precision("ieee")
    layer = fk.Conv2dScaleMin(3, 6, 3, 2, device=device, dtype=dtype)
    moved = fk.Conv2dScaleMin(3, 6, 3, 2).to(device, dtype)
    moved.load_state_dict(layer.state_dict())
    input = torch.randn(2, 3, 9, 9, device=device).to(dtype)
    with torch.no_grad():
        result = layer(input)
        expected = torch.min(layer._conv_forward(input, layer.weight, layer.bias) * 2, dim=1, keepdim=True).values
        assert moved(input).equal(result)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=3 * torch.finfo(dtype).eps, atol=max(8 * torch.finfo(dtype).eps, 1e-5))


@ON
@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer_with_every_option(device, padding, memory_format):
    options = {**OPTIONS, "padding": padding, "stride": 1 if padding == "same" else 2}
    layer = fk.Conv2dScaleMin(3, 6, (2, 3), -0.5, **options, precision="ieee", device=device).to(memory_format=memory_format)
    conv = nn.Conv2d(3, 6, (2, 3), **options, dtype=torch.float64)
    conv.load_state_dict(layer.state_dict())
    input = torch.randn(2, 3, 12, 15, device=device).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = torch.min(conv(input.cpu().double()) * -0.5, dim=1, keepdim=True).values
        torch.testing.assert_close(layer(input).cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_padding_modes_are_conv2ds(mode, padding, batched):
    options = {"padding": padding, "padding_mode": mode, "dilation": (1, 2)}
    layer = fk.Conv2dScaleMin(3, 6, (3, 2), -0.5, **options)
    conv = nn.Conv2d(3, 6, (3, 2), **options, dtype=torch.float64)
    conv.load_state_dict(layer.state_dict())
    input = torch.randn(*([2] if batched else []), 3, 9, 8, requires_grad=True)
    found, expected = layer(input), (conv(input.double()) * -0.5).amin(-3, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(y.sum(), input)[0] for y in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ("padding_mode" in repr(layer)) == (mode != "zeros")


@pytest.mark.parametrize("options", [{"padding_mode": "mirror"}, {"padding_mode": "reflect", "padding": 9}], ids=str)
def test_padding_modes_errors_are_conv2ds(options):
    said = []
    for make in (lambda: fk.Conv2dScaleMin(3, 6, 3, 1.0, **options), lambda: nn.Conv2d(3, 6, 3, **options)):
        with pytest.raises((ValueError, RuntimeError)) as error:
            make()(torch.randn(1, 3, 8, 9))
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def a_scale(form, kind):
    scale = SCALES[form](torch.randn(7)).detach().clone()
    return nn.Parameter(scale) if kind == "parameter" else scale


SCALE_IN_LAYER = pytest.mark.parametrize(
    ("form", "kind"), [(form, kind) for form in ("number", "vector", "(C, 1, 1)") for kind in ("parameter", "buffer")]
)


@SCALE_IN_LAYER
def test_a_tensor_scale_is_part_of_the_layer(form, kind):
    layer, twin = (fk.Conv2dScaleMin(3, 7, 3, a_scale(form, kind)) for _ in range(2))
    assert list(layer.state_dict()) == ["weight", "bias", "scale_factor"]
    assert ("scale_factor" in dict(layer.named_parameters())) == (kind == "parameter")
    assert ("scale_factor" in dict(layer.named_buffers())) == (kind == "buffer")
    twin.load_state_dict(layer.state_dict())
    input = torch.randn(2, 3, 8, 9)
    assert twin(input).equal(layer(input))
    for copied in COPIES:
        other = copied(layer)
        assert other(input).equal(layer(input))
        with torch.no_grad():
            other.scale_factor.zero_()
        assert not other(input).equal(layer(input))
    assert f"of shape {tuple(layer.scale_factor.shape)}" in repr(layer)


@ON
@SCALE_IN_LAYER
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_scale_goes_where_the_layer_goes(device, form, kind, dtype, set_conv_precision):
    set_conv_precision("ieee")
    layer = fk.Conv2dScaleMin(3, 7, 3, a_scale(form, kind), device=device).to(device, dtype)
    assert layer.scale_factor.device.type == device
    assert layer.scale_factor.dtype == dtype
    input = torch.randn(2, 3, 9, 9, device=device).to(dtype)
    with torch.no_grad():
        expected = F.conv2d(*(t.double() for t in (input, layer.weight, layer.bias)))
        expected = (expected * layer.scale_factor.double().view(-1, 1, 1)).amin(1, keepdim=True)
        result = layer(input)
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=2 * eps, atol=8 * eps)


def test_a_scale_is_learned():
    layer = fk.Conv2dScaleMin(3, 7, 3, nn.Parameter(torch.ones(7)))
    optimizer, input = torch.optim.SGD(layer.parameters(), 0.1), torch.randn(2, 3, 8, 9)
    before = layer.scale_factor.clone()
    layer(input).square().mean().backward()
    optimizer.step()
    assert not layer.scale_factor.equal(before)


@pytest.mark.parametrize("kind", ["number", "buffer", "parameter"])
def test_model_new_takes_the_scales_that_model_takes(kind):
    scale = {"number": 2.0, "buffer": torch.randn(7, 1, 1), "parameter": nn.Parameter(torch.randn(7, 1, 1))}[kind]
    old, new = (seeded(lambda kind=kind: kind(3, 7, 3, scale)) for kind in (fk.Model, fk.ModelNew))
    assert set(new.state_dict()) == set(old.state_dict())
    new.load_state_dict(old.state_dict())
    input = torch.rand(2, 3, 20, 30)
    torch.testing.assert_close(new(input), old(input), rtol=1e-5, atol=1e-5)
    for image in (new, fk.Conv2dScaleMin(3, 7, 3, scale)):
        assert image(input[0]).shape == (1, 18, 28)


@ON
def test_explain_takes_tensor_scales_and_single_images(device):
    input, weight, scale = (torch.ones(shape, device=device) for shape in ((2, 3, 8, 8), (7, 3, 3, 3), (7,)))
    assert fk.explain(input, weight, None, scale) == fk.explain(input, weight)
    assert fk.explain(input[0], weight) == fk.explain(input[:1], weight)
    mixed = fk.explain(input.bfloat16(), weight.bfloat16(), scale)
    assert mixed.rung == fk.explain(input.bfloat16(), weight.bfloat16()).rung


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "torch.save", "pickle"])
@pytest.mark.parametrize("kind", [fk.Conv2dScaleMin, fk.ModelNew])
def test_copies_give_the_same_result(copied, kind):
    module, input = kind(*ARGUMENTS), torch.randn(1, 3, 8, 8)
    twin = copied(module)
    with torch.no_grad():
        assert twin(input).equal(module(input))
        next(twin.parameters()).zero_()
        assert not twin(input).equal(module(input))


def test_layer_says_what_it_is():
    text = repr(fk.Conv2dScaleMin(3, 7, 3, 2.5, stride=2, precision="tf32"))
    assert text.startswith("Conv2dScaleMin(3, 7, kernel_size=(3, 3), stride=(2, 2)")
    assert "scale_factor=2.5" in text
    assert "precision=tf32" in text


@ON
def test_explain_names_the_rung_that_runs(device):
    layer = fk.Conv2dScaleMin(3, 7, 3, 2.0, device=device)
    input = torch.randn(1, 3, 8, 8, device=device)
    with torch.no_grad():
        fast = fk.explain(input, layer.weight, layer.bias, 2.0)
    training = fk.explain(input, layer.weight, layer.bias, 2.0)
    assert fk.rungs[fast.rung].device in (None, device)
    assert training == fast  # it gives the winners, too
    with torch.no_grad():
        assert fk.rungs[fast.rung](input, layer.weight, layer.bias, 2.0).equal(layer(input))


@ON
def test_explain_lists_the_candidates(device):
    """Each with its estimate, the fastest first, or why it can't run; on a GPU beside the nearest layer that was measured."""
    input, weight = torch.ones(2, 3, 8, 8, device=device), torch.ones(7, 3, 3, 3, device=device)
    found = fk.explain(input, weight, precision="ieee")
    names = [candidate.name for candidate in found.candidates]
    assert found.rung in names
    if device == "cpu":
        assert str(found.candidates[0]) == "conv2d_scale_min: no estimate"
        assert not found.nearest
        return
    estimates = [candidate.microseconds for candidate in found.candidates if candidate.microseconds]
    assert estimates == sorted(estimates)
    assert {"composite", "copied", "conv_direct"} <= set(names[: len(estimates)])
    (refused,) = (candidate for candidate in found.candidates if candidate.name == "conv_mma")
    assert "conv_mma computes float32 at the precision tf32" in str(refused)
    assert "ieee, NCHW, on an" in found.nearest


@ON
def test_explain_names_the_operators_of_the_backward_pass(device):
    """Those that a profiler sees; where PyTorch's own operations run, none."""
    layer, input = fk.Conv2dScaleMin(16, 40, 3, 2.0, device=device), torch.randn(1, 16, 8, 8, device=device)
    explained = fk.explain(input, layer.weight, layer.bias, 2.0)
    output = layer(input.requires_grad_()).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output.backward()
    called = {event.name for event in profile.events() if event.name.startswith("fused_kernels::")}
    called = {name for name in called if not name.endswith("_auto")}  # those that Python's rules call choose, and call these
    assert {f"fused_kernels::{name}" for name in explained.backward} == called
    assert fk.explain(*(torch.empty(1, 3, 4, 4, device="meta"),) * 2).backward == ()


@pytest.mark.parametrize(
    ("device", "precision", "setting", "expected"),
    [
        ("cpu", "auto", "tf32", "ieee"),
        ("cpu", "tf32", "ieee", "ieee"),
        ("meta", "auto", "tf32", "ieee"),
        pytest.param("cuda", "auto", "tf32", "tf32", marks=pytest.mark.gpu),
        pytest.param("cuda", "auto", "ieee", "ieee", marks=pytest.mark.gpu),
        pytest.param("cuda", "ieee", "tf32", "ieee", marks=pytest.mark.gpu),
    ],
)
def test_explain_names_the_precision(device, precision, setting, expected, set_conv_precision):
    set_conv_precision(setting)
    input, weight = torch.ones(1, 3, 8, 8, device=device), torch.ones(7, 3, 3, 3, device=device)
    assert fk.explain(input, weight, precision=precision).precision == expected
    assert fk.explain(input.half(), weight.half(), precision=precision).precision == "float16"


@pytest.mark.parametrize("make", [lambda: fk.Conv2dScaleMin(4, 6, 3, 2.0), lambda: fk.ModelNew(4, 6, 3, 2.0)])
def test_meta_tensors_pass_through(make):
    with torch.device("meta"):
        assert make()(torch.empty(2, 4, 8, 9)).shape == (2, 1, 6, 7)


def test_exports_with_any_size():
    layer, dynamic = fk.Conv2dScaleMin(4, 6, 3, 2.0, padding=1), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes={"input": {0: dynamic, 2: dynamic}})
        input = torch.randn(5, 4, 20, 9)
        torch.testing.assert_close(exported.module()(input), layer(input))
