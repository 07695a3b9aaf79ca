"""scale_min: every rung and the public function against float64 and against torch's own two operations."""

import math

import pytest
import torch
from conftest import (
    DEVICES,
    DTYPES,
    LAYOUTS,
    SCALES,
    assert_one_sentence,
    assert_within,
    exact,
    far_apart,
    implementations,
    takes_tensor_scales,
)
from hypothesis import given
from hypothesis import strategies as st

from fused_kernels import rungs, scale_min

EVERY = pytest.mark.parametrize(("function", "device"), implementations("scale_min"))
# scale_min_naive keeps the source document's faults: it drops NaN.
PROPAGATES_NAN = pytest.mark.parametrize(
    ("function", "device"), [p for p in implementations("scale_min") if not p.id.startswith("scale_min_naive")]
)
NAIVE = pytest.mark.parametrize(
    ("function", "device"), [p for p in implementations("scale_min") if p.id.startswith("scale_min_naive")]
)
NAIVE_MAX_CHANNELS = 1024


def torch_own(input, scale):
    return torch.min(input * scale, dim=1, keepdim=True).values


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def check(function, input, scale):
    """Run, compare with float64, and see that the input stayed as it was."""
    before = input.clone()
    result = function(input, scale)
    torch.testing.assert_close(input, before, rtol=0, atol=0, equal_nan=True)
    assert result.dtype == input.dtype
    assert result.device == input.device
    assert result.is_contiguous()
    expected = exact(input, scale)
    # One rounding to the dtype, of the product; float32 rounds the scale as well.
    eps = torch.finfo(input.dtype).eps
    roundings = 1.01 if input.dtype == torch.float32 else 0.51
    assert_within(result, expected, roundings * eps * expected.abs() + torch.finfo(input.dtype).smallest_normal * eps)
    return result


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(function, device, dtype, layout, poisoned):
    input = LAYOUTS[layout](torch.randn(3, 7, 11, 13, device=device).to(dtype))
    check(function, input, -1.7)


@EVERY
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (1, 1, 5, 3),
        (2, 2, 1, 1),
        (1, 3, 1, 509),
        (5, 7, 31, 1),
        (2, 8, 16, 16),
        (1, 128, 33, 65),
        (2, 129, 17, 19),
        (1, 1000, 3, 5),
        (1, 1500, 7, 2),
        (1, 192, 9, 7),
        (3, 600, 15, 17),
        (7, 64, 2, 2),
        (3, 37, 61, 67),
        (2, 128, 97, 101),
    ],
    ids=str,
)
def test_shapes(function, device, shape, layout, poisoned):
    if shape[1] > NAIVE_MAX_CHANNELS and getattr(function, "name", "") == "scale_min_naive":
        pytest.skip("refuses so many channels: test_naive_names_its_limit")
    input = LAYOUTS[layout](torch.randn(shape, device=device))
    check(function, input, 0.3)
    check(function, input.bfloat16(), 2)


@EVERY
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(-8, 8, width=16),
)
def test_drawn(function, device, shape, layout, dtype, scale):
    torch.manual_seed(0)
    check(function, LAYOUTS[layout](torch.randn(shape, device=device).to(dtype)), scale)


@EVERY
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (3, 5, 0, 4), (3, 5, 4, 0)], ids=str)
def test_empty(function, device, shape):
    result = function(torch.empty(shape, device=device), 2.0)
    assert result.shape == (shape[0], 1, *shape[2:])


@EVERY
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_float32_is_bit_equal_to_torch(function, device, layout):
    input = LAYOUTS[layout](torch.randn(2, 37, 23, 29, device=device))
    for scale in (2.0, -1.1, 1 / 3, 1e-30):
        assert function(input, scale).view(torch.int32).equal(torch_own(input, scale).view(torch.int32))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.0, -3.0, 1, True, 2**60 + 1, 1e-320, 1e300, math.inf, -math.inf])
def test_scale_is_torchs(function, device, dtype, scale):
    """No element is zero, so that even an infinite scale makes no NaN, which one rung drops."""
    input = torch.randn(2, 9, 8, 7, device=device).to(dtype)
    torch.testing.assert_close(function(input, scale), torch_own(input, float(scale)), rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("sign", [1, -1])
def test_integer_scale_too_large_for_a_float_is_infinite(function, device, sign):
    input = torch.randn(2, 9, 8, 7, device=device)
    assert function(input, sign * 10**400).equal(function(input, sign * math.inf))


@PROPAGATES_NAN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_nan_propagates_from_any_channel(function, device, dtype, layout, poisoned):
    channels = 19
    input = torch.randn(1, channels, 5, channels + 1, device=device).to(dtype)
    for c in range(channels):
        input[:, c, :, c] = math.nan
    result = function(LAYOUTS[layout](input), -2.0)
    assert result[..., :channels].isnan().all()
    assert not result[..., channels].isnan().any()


@PROPAGATES_NAN
def test_infinity_times_zero_is_nan(function, device):
    input = torch.randn(1, 4, 3, 8, device=device)
    input[0, 2, :, 5] = math.inf
    assert function(input, 0.0).isnan()[0, 0].equal(input[0, 2] == math.inf)


@NAIVE
def test_naive_drops_nan_on_purpose(function, device):
    """The source document's fault, kept for the lesson: NaN loses every comparison, so it is never the minimum."""
    input = torch.randn(1, 5, 4, 4, device=device)
    input[:, 2] = math.nan
    without = input[:, [0, 1, 3, 4]]
    assert function(input, 2.0).equal(torch_own(without, 2.0))


@NAIVE
def test_naive_names_its_limit(function, device):
    assert function(torch.randn(1, NAIVE_MAX_CHANNELS, 2, 2, device=device), 1.0).shape == (1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"1024.*1025") as error:
        function(torch.randn(1, NAIVE_MAX_CHANNELS + 1, 2, 2, device=device), 1.0)
    assert_one_sentence(str(error.value).splitlines()[0])


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_infinities(function, device, dtype, scale):
    input = torch.randn(1, 6, 3, 5, device=device).to(dtype)
    input[0, 1, 0, 0] = math.inf
    input[0, 5, 1, 1] = -math.inf
    input[0, :, 2, 2] = math.inf
    input[0, :, 2, 3] = -math.inf
    assert function(input, scale).equal(torch_own(input, scale))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_is_scaled_in_float32_and_rounded_once(function, device, dtype):
    """The scale lies between two numbers of the type: one that was rounded first would be 1 + eps."""
    input = torch.linspace(1, 2, 4096, device=device).to(dtype).view(1, 1, 64, 64)
    scale = 1 + 0.75 * torch.finfo(dtype).eps
    assert function(input, scale).equal((input.float() * scale).to(dtype))


TENSOR_SCALES = pytest.mark.parametrize(("function", "device"), takes_tensor_scales("scale_min"))


@TENSOR_SCALES
class TestTensorScales:
    """A scale that is a tensor: one factor, or one for each channel."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_and_dtypes(self, function, device, dtype, layout, poisoned):
        input = LAYOUTS[layout](torch.randn(3, 7, 11, 13, device=device).to(dtype))
        scales = torch.randn(7, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        check(function, input, scales)

    @pytest.mark.parametrize("form", SCALES)
    @pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_forms(self, function, device, layout, form, dtype):
        input = LAYOUTS[layout](torch.randn(2, 48, 9, 12, device=device).to(dtype))
        check(function, input, SCALES[form](torch.randn(48, device=device)))

    @pytest.mark.parametrize("layout", ["nchw", "channels_last"])
    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1, 1), (1, 3, 1, 509), (2, 8, 16, 16), (2, 129, 17, 19), (1, 1000, 3, 5), (3, 600, 15, 17), (2, 128, 97, 101)],
        ids=str,
    )
    def test_shapes(self, function, device, shape, layout, poisoned):
        input, scales = LAYOUTS[layout](torch.randn(shape, device=device)), torch.randn(shape[1], device=device)
        check(function, input, scales)
        check(function, input.bfloat16(), scales)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("of", [*DTYPES, torch.int64, torch.bool], ids=str)
    def test_the_output_has_the_inputs_dtype(self, function, device, dtype, of):
        input, scales = torch.randn(2, 6, 5, 7, device=device).to(dtype), torch.randn(6, device=device).mul(3).to(of)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        check(function, input, scales)
        assert function(input, scales).equal(function(input, scales.to(wide)))

    @pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_special_factors_are_torchs(self, function, device, dtype, layout):
        """Of channels with such a factor; a zero times an infinity is NaN, and the minimum."""
        values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, -2.0], device=device)
        input = torch.randn(2, 16, 8, 9, device=device).to(dtype)
        input[0, :, 3, 4], input[0, 5, 5], input[1, 9, :, 2], input[1, 2, 6] = 0.0, math.inf, -math.inf, math.nan
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for value in values:
            scales = torch.randn(16, device=device, dtype=wide)
            scales[[2, 9]] = value.to(wide)
            expected = torch_own(input.to(wide), scales.view(-1, 1, 1)).to(dtype)
            assert_same(function(LAYOUTS[layout](input), scales), expected)

    @given(
        shape=st.tuples(st.integers(0, 4), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
        layout=st.sampled_from(sorted(LAYOUTS)),
        dtype=st.sampled_from(DTYPES),
        form=st.sampled_from(sorted(SCALES)),
    )
    def test_drawn(self, function, device, shape, layout, dtype, form):
        torch.manual_seed(0)
        input = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
        check(function, input, SCALES[form](torch.randn(shape[1], device=device)))

    @pytest.mark.parametrize("layout", ["nchw", "channels_last"])
    def test_a_number_gives_the_same_bits(self, function, device, layout):
        for dtype in DTYPES:
            input = LAYOUTS[layout](torch.randn(2, 37, 23, 29, device=device).to(dtype))
            assert function(input, torch.tensor(1.25, device=device)).equal(function(input, 1.25))

    def test_a_number_on_the_cpu_serves_any_device(self, function, device):
        input = torch.randn(2, 5, 6, 7, device=device)
        assert function(input, torch.tensor(-1.7)).equal(function(input, torch.tensor(-1.7, device=device)))

    def test_strides_past_2_to_31_elements(self, function, device):
        input = far_apart(torch.randn(1, 3, 3, 5, dtype=torch.bfloat16, device=device))
        check(function, input, torch.randn(3, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [torch.randn(33, device="meta"), torch.tensor(2.0)], ids=["vector", "number on the CPU"])
def test_a_tensor_scale_is_never_read_by_the_processor(scale):
    """Neither waits for the GPU, so a graph can be captured of both; it reads the vector again at each replay."""
    input = torch.randn(2, 33, 17, 31, device="cuda")
    if scale.device.type == "meta":
        scale = torch.randn(33, device="cuda")
    expected = scale_min(input, scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale_min(input, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = scale_min(input, scale)
    if scale.is_cuda:
        scale.mul_(-0.3)
        expected = scale_min(input, scale)
    graph.replay()
    assert result.equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, rung in rungs.items() if not rung.takes_scales])
def test_a_rung_that_takes_numbers_alone_says_so(name):
    with pytest.raises(RuntimeError, match=rf"scale: {name} expected a number, got a tensor of shape \(5,\)") as error:
        rungs[name](torch.randn(1, 5, 3, 4, device="cuda"), torch.ones(5, device="cuda"))
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("device", DEVICES)
def test_winners_of_scaled_channels(device):
    input, scales = torch.randn(2, 300, 5, 6, device=device), torch.randn(300, device=device)
    values, winners = scale_min(input, scales, return_indices=True)
    expected = torch.min(input * scales.view(-1, 1, 1), dim=1, keepdim=True)
    assert values.equal(expected.values)
    assert winners.equal(expected.indices)


@EVERY
def test_one_image(function, device):
    """Without a batch around it."""
    input = torch.randn(2, 5, 6, 7, device=device)
    assert function(input[1], -1.5).equal(function(input, -1.5)[1])
    if function is scale_min:
        found = scale_min(input[1], -1.5, return_indices=True)
        assert all(one.equal(all_[1]) for one, all_ in zip(found, scale_min(input, -1.5, return_indices=True), strict=True))


@EVERY
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_every_time(function, device, layout):
    input = LAYOUTS[layout](torch.randn(4, 65, 37, 41, device=device))
    first = function(input, 1.3)
    assert all(function(input, 1.3).equal(first) for _ in range(5))


@EVERY
def test_strides_past_2_to_31_elements(function, device):
    check(function, far_apart(torch.randn(1, 3, 3, 5, dtype=torch.bfloat16, device=device)), 2.0)


def test_more_channels_than_are_counted():
    """A step past the last channel must not pass the end of an int."""
    input = torch.zeros(1).expand(1, 2**31 - 4096, 1, 1)
    with pytest.raises(RuntimeError, match=r"input: expected at most 2147479551 channels, got 2147479552"):
        torch.ops.fused_kernels.scale_min(input, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "device"), [p for p in implementations("scale_min") if p.id.endswith("cuda")])
class TestGpu:
    @pytest.mark.parametrize("layout", ["nchw", "channels_last"])
    def test_past_2_to_31_elements(self, function, device, layout):
        shape = (2, 64, 4100, 4100)
        if torch.cuda.mem_get_info()[0] < 12 * 2**30:
            pytest.skip("needs 12 GiB of free GPU memory")
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        input = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=memory_format).normal_()
        result = function(input, -2.0)
        for n in range(shape[0]):
            for rows in torch.arange(shape[2], device="cpu").split(512):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                assert result[n, :, part].equal(torch_own(input[n : n + 1, :, part], -2.0)[0]), (n, part)

    def test_runs_on_the_current_stream(self, function, device):
        function(torch.randn(1, 3, 4, 4, device=device), 1.0)
        source = torch.randn(8, 64, 256, 256, device=device)
        input = torch.zeros_like(source)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            input.copy_(source)
            result = function(input, 2.0)
        stream.synchronize()
        assert result.equal(torch_own(source, 2.0))

    def test_graph_capture(self, function, device):
        input = torch.randn(2, 33, 17, 31, device=device)
        function(input, 2.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(input, 2.0)
        input.copy_(torch.randn_like(input))
        graph.replay()
        assert result.equal(torch_own(input, 2.0))

    def test_does_not_synchronise(self, function, device):
        input = torch.randn(2, 33, 17, 31, device=device)
        function(input, 2.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(input, 2.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_second_device(self, function, device):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        input = torch.randn(2, 33, 17, 31, device="cuda:1")
        result = function(input, 2.0)
        assert torch.cuda.current_device() == 0
        assert result.equal(torch_own(input, 2.0))


def add_in_accumulator(input, bias, scale):
    """Do what scale_min_bias promises, with PyTorch's operations: all in float32 for 16-bit types, rounded once."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return torch_own(input.to(wide) + bias.to(wide).view(-1, 1, 1), scale).to(input.dtype)


BIASES = {
    "dense": lambda b: b,
    "strided": lambda b: b.repeat_interleave(3)[::3],
    "misaligned": lambda b: torch.cat([b.new_zeros(1), b])[1:],
    "expanded": lambda b: b[:1].expand(b.shape),
}


@pytest.mark.gpu
class TestBias:
    """The operator in scale_min_vectorized's library that adds a convolution's bias first."""

    @staticmethod
    def run(input, bias, scale, early=True):
        return torch.ops.fused_kernels.scale_min_bias(input, bias, scale, early)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_and_dtypes(self, dtype, layout, poisoned):
        bias = torch.randn(7, device="cuda").to(dtype)
        input = LAYOUTS[layout](torch.randn(3, 7, 11, 13, device="cuda").to(dtype))
        before = input.clone()
        result = self.run(input, bias, -1.7)
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert input.equal(before)
        expected = exact(input.double() + bias.double().view(-1, 1, 1), -1.7)
        # The sum, the scale and the product are rounded to float32; only the result is rounded to a 16-bit type.
        roundings = 1.51 if dtype.itemsize > 2 else 0.51
        assert_within(result, expected, roundings * torch.finfo(dtype).eps * expected.abs() + 1e-30)

    @pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
    @pytest.mark.parametrize(
        "shape",
        [
            (1, 1, 5, 3),
            (5, 7, 31, 1),
            (2, 8, 16, 16),
            (1, 128, 33, 65),
            (2, 129, 17, 19),
            (1, 1500, 7, 2),
            (1, 192, 9, 7),
            (3, 600, 15, 17),
            (2, 128, 97, 101),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bit_equal_to_torch_in_the_accumulators_type(self, dtype, shape, layout):
        input = LAYOUTS[layout](torch.randn(shape, device="cuda").to(dtype))
        bias = torch.randn(shape[1], device="cuda").to(dtype)
        for scale, early in ((2.0, True), (-1.1, False), (0.0, True)):
            assert self.run(input, bias, scale, early).equal(add_in_accumulator(input, bias, scale))

    @pytest.mark.parametrize("kind", BIASES)
    @pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_any_stride_and_alignment_of_the_bias(self, dtype, layout, kind):
        input = LAYOUTS[layout](torch.randn(2, 48, 9, 12, device="cuda").to(dtype))
        bias = BIASES[kind](torch.randn(48, device="cuda").to(dtype))
        assert self.run(input, bias, -0.3).equal(add_in_accumulator(input, bias, -0.3))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
    def test_nan_and_infinities_of_input_and_bias(self, dtype, layout):
        channels = 19
        input = torch.randn(1, channels, 5, channels + 1, device="cuda").to(dtype)
        for c in range(channels):
            input[:, c, :, c] = (math.nan, math.inf, -math.inf)[c % 3]
        for value in (0.5, math.nan, math.inf, -math.inf):
            bias = torch.randn(channels, device="cuda").to(dtype)
            bias[channels - 2] = value
            for scale in (2.0, -2.0, 0.0):
                result, expected = self.run(LAYOUTS[layout](input), bias, scale), add_in_accumulator(input, bias, scale)
                torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("shape", [(0, 5, 4, 4), (3, 5, 0, 4)], ids=str)
    def test_empty(self, shape):
        result = self.run(torch.empty(shape, device="cuda"), torch.randn(5, device="cuda"), 2.0)
        assert result.shape == (shape[0], 1, *shape[2:])

    def test_strides_past_2_to_31_elements(self):
        input = far_apart(torch.randn(1, 3, 3, 5, dtype=torch.bfloat16, device="cuda"))
        bias = torch.randn(3, device="cuda").bfloat16()
        assert self.run(input, bias, 2.0).equal(add_in_accumulator(input, bias, 2.0))

    @pytest.mark.parametrize(
        ("size", "options"),
        [((4,), {}), ((5, 1), {}), ((5,), {"dtype": torch.float16}), ((5,), {"device": "cpu"})],
        ids=["length", "rank", "dtype", "device"],
    )
    def test_names_a_bias_that_does_not_fit(self, size, options):
        bias = torch.zeros(size, **{"device": "cuda", **options})
        with pytest.raises(RuntimeError, match="bias: expected") as error:
            self.run(torch.zeros(2, 5, 3, 4, device="cuda"), bias, 2.0)
        assert_one_sentence(str(error.value).splitlines()[0])

    def test_opcheck(self):
        """It has no gradient of its own: the composite's is made from the winners."""
        input, bias = torch.randn(2, 6, 4, 5, device="cuda"), torch.randn(6, device="cuda")
        for sample in ((input, bias, 2.0, True), (input[:, :, ::2], bias, -1.0, False)):
            torch.library.opcheck(torch.ops.fused_kernels.scale_min_bias.default, sample)


def test_bias_operators_shape_needs_no_device():
    tensors = torch.empty(2, 5, 3, 4, device="meta"), torch.empty(5, device="meta")
    result = torch.ops.fused_kernels.scale_min_bias(*tensors, 2.0, False)
    assert result.shape == (2, 1, 3, 4)
    assert result.is_contiguous()


def test_bias_operator_says_where_it_runs():
    with pytest.raises(RuntimeError, match="scale_min_bias expected a cuda tensor, got one on cpu") as error:
        torch.ops.fused_kernels.scale_min_bias(torch.zeros(2, 5, 3, 4), torch.zeros(5), 2.0, False)
    assert_one_sentence(str(error.value))


def test_ladder_has_the_rungs_that_the_course_climbs():
    on_gpu = [name for name, rung in rungs.items() if rung.operator == "scale_min" and rung.device == "cuda"]
    assert on_gpu[:3] == ["scale_min_naive", "scale_min_coalesced", "scale_min_vectorized"]
