"""ModelNew as KernelBench's drop-in, and Conv2dScaleMin as a layer among others."""

import copy
import io
import pickle

import pytest
import torch
from conftest import DEVICES
from torch import nn

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
