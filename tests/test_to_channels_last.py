"""The copy of a convolution's input and weights into channels_last, and where composite makes it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kernels import composite
from fused_kernels.candidates import copy_into_other_layout
from fused_kernels.choice import Decision
from fused_kernels.dispatch import wants_gradient
from fused_kernels.problem import check_problem
from fused_kernels.rungs import rungs

SHAPES = [
    (0, 4, 3, 3),
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 64, 8, 8),
    (3, 65, 9, 15),
    (2, 130, 7, 7),
    (1, 17, 1, 200),
    (2, 600, 1, 1),
    (1, 5000, 1, 2),
    (3, 40, 131, 127),
    (2, 192, 7, 7),
    (3, 64, 6, 5),
    (5, 128, 4, 4),
]


def copy(input, weight, early=False):
    return torch.ops.fused_kernels.to_channels_last(input, weight, early)


@pytest.mark.gpu
class TestCopy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_moves_every_element(self, poisoned, shape, dtype):
        given = torch.randn(shape, device="cuda").to(dtype), torch.randn(5, shape[1], 3, 3, device="cuda").to(dtype)
        for before, after in zip(given, copy(*given), strict=True):
            assert torch.equal(before, after)
            assert after.is_contiguous(memory_format=torch.channels_last)

    def test_takes_weights_of_groups(self, poisoned):
        given = torch.randn(2, 128, 8, 8, device="cuda"), torch.randn(6, 40, 3, 3, device="cuda")
        for before, after in zip(given, copy(*given), strict=True):
            assert torch.equal(before, after)

    def test_waits_for_its_input_when_it_begins_early(self, poisoned):
        left, right = torch.randn(256, 4096, device="cuda").bfloat16(), torch.randn(4096, 49, device="cuda").bfloat16()
        for _ in range(20):
            left = -left  # what the memory held before has another sign
            input = (left @ right).view(2, 128, 7, 7)
            (copied,) = copy(input, None, early=True)
            assert torch.equal(copied, input)

    def test_takes_the_input_alone(self, poisoned):
        input = torch.randn(2, 70, 5, 7, device="cuda")
        (copied,) = copy(input, None)
        assert torch.equal(copied, input)
        assert copied.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [*SHAPES, (40, 600, 14, 14)], ids=str)
    def test_takes_any_strides(self, poisoned, shape, dtype):
        whole = torch.randn(shape, device="cuda").to(dtype)
        views = whole[:, :, ::2, ::3], whole[:, :, :, ::2], whole[:, ::2], whole[::2, :, ::2], whole.transpose(2, 3)
        for input in (*views, whole.contiguous(memory_format=torch.channels_last)):
            (copied,) = copy(input, None)
            assert torch.equal(copied, input)
            assert copied.is_contiguous(memory_format=torch.channels_last)

    def test_takes_only_tensors_alike(self):
        input, weight = torch.randn(2, 4, 5, 6, device="cuda"), torch.randn(8, 4, 3, 3, device="cuda")
        with pytest.raises(RuntimeError, match=r"input: expected 4 dimensions"):
            copy(input[0], weight)
        with pytest.raises(RuntimeError, match=r"weight: expected the input's dtype"):
            copy(input, weight.half())

    def test_past_2_to_31_elements(self):
        if torch.cuda.mem_get_info()[0] < 16 * 2**30:
            pytest.skip("needs 16 GiB of free GPU memory")
        input = torch.empty(3, 96, 3200, 2400, dtype=torch.float16, device="cuda").normal_()
        weight = torch.randn(8, 96, 3, 3, device="cuda").half()
        assert torch.equal(copy(input, weight)[0][2:], input[2:])
        every_other = input[2:, :, ::2, 1::2]
        assert torch.equal(copy(every_other, None)[0], every_other)
        assert torch.equal(copy(input[:, :, ::40, ::40], None)[0], input[:, :, ::40, ::40])


def test_shapes_and_layouts_need_no_device():
    given = torch.empty(2, 5, 3, 4, device="meta"), torch.empty(7, 5, 2, 2, device="meta")
    for before, after in zip(given, copy(*given), strict=True):
        assert after.shape == before.shape
        assert after.is_contiguous(memory_format=torch.channels_last)


def test_weights_may_be_left_out():
    assert [t.shape for t in copy(torch.empty(2, 5, 3, 4, device="meta"), None)] == [(2, 5, 3, 4)]


def test_is_made_where_weights_are_contiguous_and_nothing_transforms(monkeypatch):
    monkeypatch.setattr(composite, "why_unavailable", lambda name, index, dtype: None)
    monkeypatch.setattr(composite, "first_available", lambda names, index, dtype: names[0])
    input, weight = torch.randn(2, 8, 5, 5), torch.randn(3, 8, 3, 3)
    assert composite.can_copy(input, weight)
    assert not composite.can_copy(input, weight.contiguous(memory_format=torch.channels_last))
    seen = []
    torch.func.vmap(lambda x: seen.append(composite.can_copy(x, weight)) or x)(input.unsqueeze(0))
    assert seen == [False]


@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("return_indices", [False, True])
def test_is_made_where_no_gradient_is_wanted(monkeypatch, needed, return_indices):
    """It has none: the composite makes it below the gradient of its own."""
    tensors = [torch.randn(2, 3, 6, 7), torch.randn(4, 3, 3, 3), torch.randn(4)]
    for i in needed:
        tensors[i].requires_grad_()
    where_it_is_made, wanted = composite._convolve_then_minimum, []

    def record(decision, *args, **options):
        wanted.append(wants_gradient(*args))
        return where_it_is_made(decision, *args, **options)

    monkeypatch.setattr(composite, "_convolve_then_minimum", record)
    problem = check_problem(*tensors, 1, 0, 1, 1, "auto")
    result = composite.compute(Decision(problem, "composite", ""), *tensors, 2.0, return_indices=return_indices)
    output = result[0] if return_indices else result
    assert output.requires_grad == bool(needed)
    assert wanted == [False]


def test_refuses_a_cpu_tensor():
    with pytest.raises(RuntimeError, match=r"input: to_channels_last expected a cuda tensor, got one on cpu"):
        copy(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 1))


@pytest.fixture
def layout(monkeypatch):
    """Give what composite does to its arguments on a GPU, which need not be there: it depends on shapes and types alone."""
    monkeypatch.setattr(composite, "why_unavailable", lambda name, index, dtype: None)
    monkeypatch.setattr(composite, "first_available", lambda names, index, dtype: names[0])

    def layout(shape, dtype, out_channels, kernel, *, stride=1, padding=0, groups=1, precision="tf32"):
        input = torch.empty(shape, device="cuda", dtype=dtype)
        weight = torch.empty(out_channels, shape[1] // groups, kernel, kernel, device="cuda", dtype=dtype)
        problem = check_problem(input, weight, None, stride, padding, 1, groups, precision)
        copy = copy_into_other_layout(problem, composite.can_copy(input, weight))
        if copy is None:
            return False, tuple(input.shape), problem.stride
        left, copied, copied_weight = composite.copied(problem, copy, input, weight)
        assert copied.is_contiguous(memory_format=torch.channels_last)
        assert (copied_weight is weight) == (kernel == 1)
        return True, tuple(copied.shape), left.stride

    with FakeTensorMode():
        yield layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_channels", [24, 256])
def test_composite_copies_only_what_a_strided_1_x_1_kernel_reads(layout, dtype, out_channels):
    stride = (2, 3)
    assert layout((3, 64, 15, 20), dtype, out_channels, 1, stride=stride) == (True, (3, 64, 8, 7), (1, 1))
    assert layout((3, 64, 15, 20), dtype, out_channels, 1, stride=stride, padding=1) == (True, (3, 64, 15, 20), stride)
    assert layout((3, 64, 15, 20), dtype, out_channels, 3, stride=stride) == (True, (3, 64, 15, 20), stride)


@pytest.fixture
def early(monkeypatch):
    """Give what composite lets begin early: the copy, or None for input that lies in channels_last already, and the minimum."""
    monkeypatch.setattr(composite, "why_unavailable", lambda name, index, dtype: None)
    monkeypatch.setattr(composite, "first_available", lambda names, index, dtype: names[0])

    def early(shape, dtype, out_channels, kernel, memory_format=torch.contiguous_format):
        seen = []
        monkeypatch.setattr(composite, "run", lambda name, *args: seen.append(args[-1]))
        input = torch.empty(shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
        weight = torch.empty(out_channels, shape[1], kernel, kernel, device="cuda", dtype=dtype)
        bias = torch.empty(out_channels, device="cuda", dtype=dtype)
        problem = check_problem(input, weight, bias, 1, kernel // 2, 1, 1, "tf32")
        copy = copy_into_other_layout(problem, composite.can_copy(input, weight))
        if memory_format == torch.channels_last:
            copy = None
        composite.compute(Decision(problem, "composite", "", copies=(copy, copy)), input, weight, bias, 2.0)
        return copy and copy.early, *seen

    with FakeTensorMode():
        yield early


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_composite_lets_the_copy_begin_early_where_input_and_output_are_small(early, dtype):
    assert early((1, 512, 7, 7), dtype, 2048, 1)[0]
    assert not early((32, 512, 7, 7), dtype, 2048, 1)[0]
    assert not early((8, 2048, 7, 7), dtype, 512, 1)[0]
    assert early((1, 64, 28, 28), dtype, 64, 3)[0]


def test_composite_lets_the_minimum_begin_early_unless_alone_after_a_16_bit_matrix_product(early):
    bf16, tf32 = torch.bfloat16, torch.float32
    assert early((1, 128, 28, 28), bf16, 512, 1, torch.channels_last) == (None, False)
    assert early((1, 128, 28, 28), bf16, 512, 1) == (True, True)
    assert early((8, 1024, 14, 14), bf16, 256, 1) == (False, False)
    assert early((8, 1024, 14, 14), tf32, 256, 1) == (False, True)
    assert early((1, 128, 28, 28), tf32, 512, 1, torch.channels_last) == (None, True)
    assert early((1, 128, 28, 28), bf16, 512, 3, torch.channels_last) == (None, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_composite_is_right_with_a_strided_1_x_1_kernel(dtype, padding):
    # Small integers: exact in each type, and in any order.
    input = torch.randint(-2, 3, (3, 64, 15, 20), device="cuda").to(dtype)
    weight = torch.randint(-2, 3, (128, 64, 1, 1), device="cuda").to(dtype)
    bias = torch.randint(-2, 3, (128,), device="cuda").to(dtype)
    how = {"stride": (2, 3), "padding": padding}
    expected = torch.nn.functional.conv2d(*(t.double() for t in (input, weight, bias)), **how)
    actual = rungs["composite"](input, weight, bias, -0.5, **how, precision="tf32")
    assert torch.equal(actual.double(), expected.mul(-0.5).amin(1, keepdim=True))
