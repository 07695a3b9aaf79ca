"""The kernels' own plans, asked without a GPU: what they can take, what fits, and that cost follows the work."""

import random
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kernels import plans, toolchain
from fused_kernels.candidates import Hardware
from fused_kernels.problem import make_problem

pytestmark = pytest.mark.skipif(toolchain.why_no_compiler() is not None, reason=str(toolchain.why_no_compiler()))

H200 = Hardware("NVIDIA H200", (9, 0), 132, 227 << 10, 228 << 10, 1.98e9, 4.8e12)
RTX = Hardware("NVIDIA GeForce RTX 3080", (8, 6), 84, 99 << 10, 100 << 10, 1.7e9, 0.76e12)
WGMMA = ("conv_wgmma", "conv_wgmma_ieee")
ALL = ("conv_direct", "conv_mma", *WGMMA)


def problem(shape, out_channels, kernel, stride=1, padding=0, dilation=1, groups=1, dtype=torch.float32, channels_last=False):
    _, channels, *size = shape
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    output = tuple((s + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for s, k in zip(size, kernel, strict=True))
    image, row = channels * size[0] * size[1], size[1]
    strides = (image, 1, row * channels, channels) if channels_last else (image, size[0] * row, row, 1)
    geometry = (stride, stride), (padding,) * 4, (dilation, dilation), groups
    weight_shape = (out_channels, channels // groups, *kernel)
    return make_problem(shape, strides, dtype, torch.device("cuda"), weight_shape, geometry, output, "tf32")


def reference(**other):
    return problem((64, 64, 256, 256), 128, 3, **other)


def names(problem, hardware=H200):
    return tuple(name for name, plan in plans.plan_costs(problem, hardware).items() if plan)


def random_layers(count, most_reach):
    """Draw layers with filters that reach so far at most, in every dtype that a GPU's kernels take and both layouts."""
    draws = random.Random(0)
    for _ in range(count):
        dilation = draws.choice((1, 1, 2, 3))
        kernel = tuple(draws.randint(1, most_reach // dilation + 1) for _ in range(2))
        reach = max(kernel) * dilation
        size = [draws.choice((7, 8, 14, 40, 79, 224, 1000)) + reach for _ in range(2)]
        shape = (draws.choice((1, 8, 64)), draws.choice((1, 3, 40, 64, 100, 256, 1000)), *size)
        how = {"padding": draws.randint(0, reach), "dilation": dilation, "channels_last": draws.random() < 0.5}
        dtype = draws.choice((torch.float32, torch.float16, torch.bfloat16))
        yield problem(shape, draws.choice((1, 16, 100, 439, 2000)), kernel, dtype=dtype, **how)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_reference_workload_has_plans(channels_last):
    assert names(reference(channels_last=channels_last)) == ALL
    assert names(reference(channels_last=channels_last, dtype=torch.bfloat16)) == ("conv_mma", "conv_wgmma")
    assert names(reference(channels_last=channels_last, dtype=torch.float64)) == ()


def test_how_the_input_comes_depends_on_its_layout():
    tiles, planes, pixels = (
        plans.plan_costs(reference(channels_last=last, dtype=dtype), H200)
        for last, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float32))
    )
    assert [found["conv_wgmma"].source for found in (tiles, planes, pixels)] == [0, 1, 2]
    assert [found["conv_mma"].vectors for found in (tiles, planes, pixels)] == [1, 0, 1]
    rows_of_odd_length = plans.plan_costs(problem((8, 64, 57, 57), 64, 3), H200)["conv_wgmma"]
    assert (rows_of_odd_length.source, rows_of_odd_length.bulk) == (1, 0)


@pytest.mark.parametrize("other", [{"stride": 2}, {"groups": 4}, {"stride": 3, "groups": 64}], ids=str)
def test_wgmma_has_no_plan_with_strides_or_groups(other):
    assert names(reference(**other)) == ("conv_direct", "conv_mma")


def test_no_pixels_no_plan():
    assert names(problem((0, 64, 56, 56), 64, 3)) == ()


def test_a_filter_that_reaches_too_far_has_no_plan():
    found = plans.plan_costs(problem((1, 64, 500, 500), 64, 300), H200)
    assert [found[name] for name in WGMMA] == [None, None]


@pytest.mark.parametrize("hardware", [H200, RTX], ids=["H200", "RTX"])
def test_rings_have_no_more_slots_than_barriers(hardware):
    """A ring of more than 16 slots would write past the barriers in shared memory."""
    for layer in random_layers(500, most_reach=12):
        found = plans.plan_costs(layer, hardware)
        assert found["conv_mma"], layer
        for name in WGMMA:
            if layer.dtype == torch.float32 or name == "conv_wgmma":
                assert found[name] or hardware is RTX, (name, layer)
                assert not found[name] or 2 <= found[name].slots <= 16, (name, layer)


def test_the_layer_whose_ring_was_too_long():
    found = plans.plan_costs(problem((64, 40, 8, 79), 439, 7, padding=6, dilation=2), H200)
    assert all(2 <= found[name].slots <= 16 for name in WGMMA)


@pytest.mark.parametrize("name", ALL)
def test_cost_grows_with_the_image(name):
    costs = [plans.plan_costs(problem((8, 64, n, n), 128, 3), H200)[name].cost for n in (56, 112, 224, 448)]
    assert costs == sorted(set(costs))


@pytest.mark.parametrize("name", ALL)
def test_fewer_multiprocessors_cost_more(name):
    half = H200._replace(multiprocessors=66)
    assert plans.plan_costs(reference(), half)[name].cost > 1.9 * plans.plan_costs(reference(), H200)[name].cost


def test_the_same_question_has_the_same_answer():
    layers = [*random_layers(50, most_reach=8)]
    first = [plans.plan_costs(layer, H200) for layer in layers]
    plans.plan_costs.cache_clear()
    assert [plans.plan_costs(layer, H200) for layer in reversed(layers)] == first[::-1]


def test_no_operator_is_called():
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    with Refuse():
        assert names(reference()) == ALL


@pytest.mark.parametrize(("rung", "number"), [("conv_mma", "kRowPadding"), ("conv_direct", "kRows")])
def test_numbers_that_stand_twice_are_the_same(rung, number):
    texts = (toolchain.CSRC / "cuda" / f"{rung}.cu").read_text(encoding="utf-8"), plans.source()[1]
    assert len({re.search(rf"\b{number} = (\d+)", text)[1] for text in texts}) == 1
