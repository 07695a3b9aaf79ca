"""What ``torch.utils.flop_counter`` counts of our operators."""

import pytest
import torch
from conftest import DEVICES, have_rules
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused_kernels as fk
from fused_kernels import dispatch, places
from fused_kernels.rungs import LADDER

ON = pytest.mark.parametrize("device", DEVICES)
CONV = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
SHAPES = (2, 4, 9, 8), (6, 2, 3, 3), (6,)
# Of a layer that the library's convolution is faster for, on a CPU.
SMALL_IMAGE = (2, 512, 7, 7), (512, 512, 3, 3), (512,)


def drawn(device, shapes=SHAPES):
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def of_conv2d(tensors, **conv):
    """Count what PyTorch's convolution does."""
    with torch.no_grad():
        return counted(lambda: F.conv2d(*tensors, **conv))


@pytest.fixture(params=["in Python", "without Python"])
def how(request, monkeypatch):
    """Whether the library that saves Python's time in training is there."""
    have_rules(monkeypatch, in_python=request.param == "in Python")


def test_the_count_is_the_textbooks():
    tensors = drawn("cpu")
    assert of_conv2d(tensors, **CONV) == 2 * (2 * 9 * 3) * 6 * (2 * 3 * 3)


@ON
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("return_indices", [False, True])
def test_forward_counts_what_a_convolution_does(return_indices, mode, how, device):
    for shapes, conv in ((SHAPES, CONV), (SMALL_IMAGE, {"padding": 1})):
        tensors = drawn(device, shapes)
        with mode():
            found = counted(lambda t=tensors, c=conv: fk.conv2d_scale_min(*t, 2.0, return_indices=return_indices, **c))
        assert found == of_conv2d(tensors, **conv)


@ON
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_gradients_count_one_channel_for_each_pixel(wanted, how, device):
    for shapes, conv in ((SHAPES, CONV), (SMALL_IMAGE, {"padding": 1})):
        tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(drawn(device, shapes))]
        output = fk.conv2d_scale_min(*tensors, 2.0, **conv)
        inputs = [tensors[i] for i in wanted]
        found = counted(lambda y=output, t=inputs: torch.autograd.grad(y.sum(), t))
        by_one_channel = of_conv2d(tensors, **conv) // shapes[1][0]
        assert found == by_one_channel * len({0, 1} & set(wanted))


@ON
def test_scale_min_counts_nothing(how, device):
    (input,) = drawn(device, SHAPES[:1])
    assert counted(lambda: fk.scale_min(input, 2.0).sum().backward()) == 0


@pytest.mark.parametrize("rung", [rung for rung in LADDER if rung.operator == "conv2d_scale_min"], ids=lambda rung: rung.name)
def test_every_rung_counts_once(rung):
    """Without a kernel's being there: fake tensors have their shapes."""
    tensors = [t.to("meta") for t in drawn("cpu", [(2, 4, 9, 8), (6, 4, 3, 3), (6,)])]
    with torch.no_grad():
        assert counted(lambda: rung(*tensors, 2.0)) == of_conv2d(tensors)


@pytest.mark.parametrize("suffix", ["auto", "winners_auto", "autocast", "winners_autocast"])
def test_operators_of_programs_count_once(suffix):
    tensors, operator = drawn("cpu"), getattr(torch.ops.fused_kernels, f"conv2d_scale_min_{suffix}")
    args = *tensors, 2.0, [1, 2], [1, 1, 0, 0], [1, 1], 2, "auto"
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert counted(lambda: operator(*args)) == of_conv2d(tensors, **CONV)


def test_what_calls_others_counts_once():
    tensors, conv = [t.detach() for t in drawn("cpu")], ([1, 2], [1, 1, 0, 0], [1, 1], 2, "auto")
    operators, expected = torch.ops.fused_kernels, of_conv2d(drawn("cpu"), **CONV)
    dispatch.from_winners.is_loaded()
    dispatch.finish_builds()
    assert dispatch.from_winners.is_loaded()
    args, chosen = (*tensors, 2.0, *conv), ("conv2d_scale_min_winners", ["grad_input", "grad_weight", "grad_bias"], [])
    assert counted(lambda: operators.conv_from_winners(*args, *chosen)) == expected
    assert counted(lambda: operators.composite_winners(*args)) == expected
    assert counted(lambda: operators.conv2d_scale_min_auto_at_autograd(*args)) == expected


def test_the_librarys_convolution_at_a_precision_counts_once():
    tensors = [t.to("meta") for t in drawn("cpu")]
    found = counted(lambda: torch.ops.fused_kernels.library_conv2d(*tensors, [1, 2], [1, 0], [1, 1], 2, True))
    assert found == of_conv2d(tensors, **CONV)


def test_training_an_exported_program_counts_once():
    model = fk.ModelNew(4, 6, 3, 2.0)
    program = torch.export.export(model, (torch.randn(SHAPES[0]),)).module()
    of_conv = of_conv2d([torch.randn(SHAPES[0]), *model.conv.parameters()])
    assert counted(lambda: program(torch.randn(SHAPES[0])).sum().backward()) == of_conv + of_conv // 6


def test_an_edited_rung_counts():
    rung = fk.edit("conv2d_scale_min", fk.rungs["conv2d_scale_min"].source + "\n// counted")
    tensors = [t.to("meta") for t in drawn("cpu")]
    assert counted(lambda: rung(*tensors, 2.0, **CONV)) == of_conv2d(tensors, **CONV)


LATE = """
import sys, torch, fused_kernels as fk
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode

tensors = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    fk.conv2d_scale_min(*tensors)
print(counter.get_total_flops(), [finder for finder in sys.meta_path if type(finder).__module__.startswith("fused_kernels.")])
"""


def test_the_counter_may_be_imported_later(run_python):
    """And nothing waits for it any more."""
    assert run_python(LATE, FUSED_KERNELS_CACHE=str(places.cache_dir())).split() == [str(2 * 16 * 3 * 2), "[]"]
