"""conv2d_scale_min: every rung and the public function against float64, within bounds that follow from the arithmetic."""

import itertools
import math

import pytest
import torch
from conftest import (
    DEVICES,
    DTYPES,
    LAYOUTS,
    SCALES,
    assert_within,
    call,
    compiled,
    dtype_for,
    exact,
    factors,
    far_apart,
    implementations,
    precision_for,
    skip_unless_takes,
    takes_tensor_scales,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kernels import bounds, choice, composite, conv2d_scale_min, edit, export, rungs
from fused_kernels.rungs import Rung

EVERY = pytest.mark.parametrize(("function", "device"), implementations("conv2d_scale_min"))


def problem(device, input_shape, out_channels, kernel, dtype=torch.float32, groups=1, layout="nchw", bias=True):
    fan_in = input_shape[1] // groups * math.prod(kernel)
    weight = torch.randn(out_channels, input_shape[1] // groups, *kernel, device=device) / fan_in**0.5
    bias = torch.randn(out_channels, device=device).to(dtype) if bias else None
    return LAYOUTS[layout](torch.randn(input_shape, device=device).to(dtype)), weight.to(dtype), bias


def error_bound(input, weight, bias, scale, expected, precision, roundings=2, **conv):
    """Bound a pixel's error: the sums' roundings, the operands' under TF32, the result's; |min a - min b| <= max |a - b|."""
    magnitudes = F.conv2d(*(t if t is None else t.detach().cpu().double().abs() for t in (input, weight, bias)), **conv)
    scale = abs(factors(scale))
    terms = weight[0].numel() + roundings
    unit = 2**-53 if input.dtype == torch.float64 else 2**-24
    operands = 2 * 2**-11 if precision == "tf32" and input.dtype == torch.float32 else 0
    result = 0 if input.dtype in (torch.float32, torch.float64) else 1.01 * torch.finfo(input.dtype).eps
    # cuDNN rounds a 16-bit convolution once before it adds the bias, too.
    added = 0 if bias is None else (scale * bias.detach().cpu().double().abs().view(-1, 1, 1)).max()
    return (terms * unit + operands) * (scale * magnitudes).amax(1, keepdim=True) + result * (expected.abs() + added) + 1e-30


def rms_error(result, expected):
    return (result.cpu().double() - expected).square().mean().sqrt()


def check(function, input, weight, bias, scale, precision=None, **conv):
    precision = precision_for(function, precision)
    stride = conv.get("stride", 1)
    asked = {**conv, "stride": stride[0] if stride in ([1], (1, 1)) else stride}
    skip_unless_takes(function, input.dtype, precision, weight_shape=weight.shape, **asked)
    before = [t if t is None else t.clone() for t in (input, weight, bias)]
    result = function(input, weight, bias, scale, precision=precision, **conv)
    for now, then in zip((input, weight, bias), before, strict=True):
        assert now is None or now.equal(then)
    assert result.dtype == input.dtype
    assert result.device == input.device
    expected = exact(input, scale, weight, bias, **conv)
    # Split operands keep 23 bits, and leave a product out.
    roundings = 10 if function is rungs["conv_wgmma_ieee"] else 2
    assert_within(result, expected, error_bound(input, weight, bias, scale, expected, precision, roundings, **conv))
    return result


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(function, device, dtype, layout, poisoned):
    input, weight, bias = problem(device, (2, 6, 9, 11), 10, (3, 3), dtype, layout=layout)
    check(function, input, weight, bias, -1.5)
    check(function, input, LAYOUTS[layout](weight), bias.repeat_interleave(3)[::3], 2.0)


GEOMETRIES = {
    "one of everything": ((1, 1, 1, 1), 1, (1, 1), {}),
    "1x1": ((2, 3, 5, 7), 1, (1, 1), {}),
    "one input channel": ((1, 1, 17, 13), 7, (3, 3), {}),
    "reference's": ((1, 64, 20, 37), 128, (3, 3), {}),
    "past the blocks": ((1, 130, 5, 6), 129, (3, 3), {"padding": 1}),
    "Winograd": ((2, 33, 31, 44), 40, (3, 3), {"padding": 1}),
    "Winograd, many channels": ((1, 200, 21, 25), 190, (3, 3), {"padding": (1, 2)}),
    "row": ((2, 3, 1, 40), 5, (1, 5), {}),
    "column": ((2, 3, 40, 1), 5, (5, 1), {}),
    "one pixel": ((3, 5, 8, 8), 6, (8, 8), {}),
    "1500 channels": ((1, 4, 7, 9), 1500, (3, 2), {}),
    "11x11": ((1, 3, 33, 31), 17, (11, 11), {"padding": 5}),
    "stem": ((1, 3, 224, 9), 8, (7, 7), {"stride": 2, "padding": 3}),
    "uneven": ((2, 4, 13, 11), 6, (3, 3), {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)}),
    "lists of one": ((2, 4, 13, 11), 6, (3, 2), {"stride": [3], "padding": [2], "dilation": [3]}),
    "groups": ((2, 6, 9, 9), 8, (3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 6, 9, 9), 12, (3, 3), {"groups": 6, "stride": 2}),
    "same": ((2, 4, 9, 10), 6, (2, 4), {"padding": "same"}),
    "same dilated": ((2, 4, 9, 10), 6, (4, 3), {"padding": "same", "dilation": (1, 3)}),
    "valid": ((2, 4, 9, 10), 6, (2, 4), {"padding": "valid"}),
    "mostly padding": ((1, 3, 2, 2), 5, (3, 3), {"padding": (4, 1)}),
}


@EVERY
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(function, device, layout, geometry, poisoned):
    shape, out_channels, kernel, conv = GEOMETRIES[geometry]
    for bias in (True, False):
        dtype = dtype_for(function, torch.float32)
        tensors = problem(device, shape, out_channels, kernel, dtype, conv.get("groups", 1), layout, bias)
        check(function, *tensors, 1.7 if bias else -0.6, **conv)


# On a CPU: 3 x 3 filters with enough channels for Winograd's algorithm.


@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float32, 1e-30), (torch.float32, 1.0), (torch.float32, 1e25), (torch.float16, 1.0)], ids=str
)
def test_winograd_is_no_less_accurate_than_the_librarys_convolution(dtype, magnitude):
    input, weight, bias = problem("cpu", (2, 64, 40, 45), 96, (3, 3), dtype)
    input, bias = input * magnitude, bias * magnitude
    expected = exact(input, 1.5, weight, bias)
    errors = [
        (result.double() - expected).square().mean().sqrt()
        for result in (conv2d_scale_min(input, weight, bias, 1.5), rungs["reference"](input, weight, bias, 1.5))
    ]
    assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_winograd_does_not_spread_what_is_not_finite(value):
    input, weight, _ = problem("cpu", (2, 64, 40, 45), 48, (3, 3), torch.float32)
    input[1, 5, 17, 20] = value
    result, winners = conv2d_scale_min(input, weight, return_indices=True)
    torch.testing.assert_close(result, exact(input, 1.0, weight).float(), rtol=1e-5, atol=1e-4, equal_nan=True)
    assert winners.min() >= 0
    assert winners.max() < 48


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_winograd_is_not_taken_with_a_weight_that_is_not_finite(value):
    input, weight, bias = problem("cpu", (2, 64, 30, 31), 48, (3, 3), torch.float32)
    weight[7, 3, 1, 1] = value
    result, expected = (f(input, weight, bias, 1.0) for f in (conv2d_scale_min, rungs["reference"]))
    assert result.isnan().equal(expected.isnan())
    assert result.isinf().equal(expected.isinf())


def test_winograd_gives_the_same_from_any_number_of_threads():
    tensors, before = problem("cpu", (3, 40, 61, 75), 50, (3, 3), torch.float32), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(conv2d_scale_min(*tensors, 2.0))
    finally:
        torch.set_num_threads(before)
    assert all(result.equal(results[0]) for result in results)


@pytest.fixture(scope="module")
def conv_mma_of_older_gpus():
    """Build it for sm_80, as PTX that newer GPUs run too, with the shared memory of those that have least: 100 KB per SM."""
    source, asked = rungs["conv_mma"].source, "attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)"
    assert source.count(asked) == 1
    rung = edit("conv_mma", source.replace(asked, str(100 << 10)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCC_APPEND_FLAGS", "-gencode=arch=compute_80,code=compute_80")
        rung.load(arch="80")
    return rung


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("geometry", [*GEOMETRIES.values(), ((8, 64, 64, 96), 128, (3, 3), {})], ids=[*GEOMETRIES, "large"])
def test_older_gpus(conv_mma_of_older_gpus, dtype, layout, geometry, poisoned):
    """They copy and wait by other instructions than the GPU that runs the other tests."""
    shape, out_channels, kernel, conv = geometry
    tensors = problem("cuda", shape, out_channels, kernel, dtype, conv.get("groups", 1), layout)
    check(conv_mma_of_older_gpus, *tensors, -1.7, **conv)


@st.composite
def draw_problem(draw, function):
    """Draw the arguments of problem() and the convolution's, such as the function takes."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    plain = isinstance(function, Rung) and not function.strides_and_groups
    groups, stride = (1, (1, 1)) if plain else (draw(st.sampled_from((1, 1, 2, 3))), pair(1, 3))
    kernel, dilation = pair(1, 5), pair(1, 3)
    padding = draw(st.sampled_from(("same", "valid"))) if stride == (1, 1) and draw(st.booleans()) else pair(0, 3)
    size = [d * (k - 1) + 1 + draw(st.integers(0, 24)) for d, k in zip(dilation, kernel, strict=True)]
    most = isinstance(function, Rung) and function.most_taps_per_channel
    channels = draw(st.integers(math.ceil(math.prod(kernel) / most) if most else 1, 20))
    shape = (draw(st.integers(0, 3)), groups * channels, *size)
    dtypes = [dtype for dtype in DTYPES if not isinstance(function, Rung) or dtype in function.dtypes]
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(sorted(LAYOUTS)))
    tensors = (shape, groups * draw(st.integers(1, 40)), kernel, dtype, groups, layout, draw(st.booleans()))
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@EVERY
@given(data=st.data(), scale=st.floats(-8, 8, width=16))
def test_drawn(function, device, data, scale):
    torch.manual_seed(0)
    tensors, conv = data.draw(draw_problem(function))
    check(function, *problem(device, *tensors), scale, **conv)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("function", "device"), [p for p in implementations("conv2d_scale_min") if "conv_wgmma" in p.id])
def test_rows_stay_for_all_blocks_of_channels(function, device, dtype, layout, poisoned):
    """A strip so long that its rows take the place of earlier ones, each read once for every block of output channels."""
    check(function, *problem(device, (3, 32, 120, 260), 130, (5, 5), dtype, layout=layout), 1.5)


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "device"), [p for p in implementations("conv2d_scale_min") if "conv_wgmma" in p.id])
def test_a_filter_that_reaches_far(function, device, poisoned):
    """A strip would need a ring of more slots than there are barriers."""
    check(function, *problem(device, (64, 40, 8, 79), 439, (7, 7)), 1.5, padding=6, dilation=2)


@EVERY
def test_empty_batch(function, device):
    tensors = problem(device, (0, 3, 8, 9), 5, (3, 3), dtype_for(function, torch.float32))
    assert call(function, *tensors, 2.0).shape == (0, 1, 6, 7)


@EVERY
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_precision_at_any_magnitude(function, device, precision, magnitude):
    input, weight, bias = problem(device, (1, 32, 12, 17), 24, (3, 3))
    check(function, input * magnitude, weight, bias * magnitude, 2.0, precision)


MAGNITUDES = {
    "down the rows": lambda n, c, y, x: 2.0 ** (y - 30),
    "up the rows": lambda n, c, y, x: 2.0 ** (30 - y),
    "along the columns": lambda n, c, y, x: 2.0 ** (x // 4 - 9),
    "from image to image": lambda n, c, y, x: 1e9 ** (n - 1),
    "from channel to channel": lambda n, c, y, x: 2.0 ** (c // 8 - 9),
    "spikes": lambda n, c, y, x: torch.where((7 * y + x) % 41 == 0, 1e7, 1.0),
    "nothing but a spike": lambda n, c, y, x: torch.where((y == 33) & (x == 40), 3e5, 0.0),
}


@EVERY
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [32, 144])
@pytest.mark.parametrize("kind", MAGNITUDES)
def test_magnitudes_that_change(function, device, layout, channels, kind):
    """All over the input, values leave and re-enter the range of float16, which some kernels use inside."""
    input, weight, _ = problem(device, (3, channels, 60, 72), 24, (3, 3))
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in input.shape), indexing="ij")
    input = LAYOUTS[layout](input * MAGNITUDES[kind](*axes))
    check(function, input, weight, None, 2.0, "tf32")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [32, 144])
@pytest.mark.parametrize("kind", MAGNITUDES)
@pytest.mark.parametrize(("function", "device"), [p for p in implementations("conv2d_scale_min") if "conv_wgmma_ieee" in p.id])
def test_split_operands_at_magnitudes_that_change(function, device, kind, channels, layout):
    """Values leave and re-enter the range of float16, and small ones lie in the same rows as much larger ones."""
    input, weight, _ = problem(device, (3, channels, 60, 72), 24, (3, 3))
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in input.shape), indexing="ij")
    input = LAYOUTS[layout](input * MAGNITUDES[kind](*axes))
    result = function(input, weight, None, 2.0, precision="ieee")
    assert bounds.promise(input, weight, None, 2.0, precision="ieee").share(result) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "device"), [p for p in implementations("conv2d_scale_min") if "conv_wgmma_ieee" in p.id])
def test_split_operands_refuse_a_long_chain_of_taps(function, device):
    input, weight, bias = problem(device, (1, 2, 20, 20), 8, (7, 7))
    function(input, weight[..., :3], bias, precision="ieee")
    with pytest.raises(RuntimeError, match="takes at most 12 filter taps for each channel, not 49 for 2"):
        function(input, weight, bias, precision="ieee")
    call_operator = torch.ops.fused_kernels.conv_wgmma_ieee
    with pytest.raises(RuntimeError, match=r"weight: conv_wgmma_ieee expected at most 12 filter taps .* got 49 for 2"):
        call_operator(input, weight, bias, 1.0, [1, 1], [0] * 4, [1, 1], 1, "ieee")


@EVERY
@pytest.mark.parametrize("largest", [2.0**18, 0.3, 2.0**-20])
def test_small_values_keep_their_digits_next_to_a_large_one(function, device, largest):
    input, weight, _ = problem(device, (1, 32, 20, 36), 24, (3, 3))
    input = (0.5 + input.sigmoid() / 2) * largest * 2.0**-18
    input[0, :, 10, 18] = largest
    check(function, input, weight, None, 2.0, "tf32")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_calls_in_a_row_read_what_was_just_written(function, device, dtype, layout):
    """A kernel may begin while the one before it ends; it must not read what that one has yet to write."""
    dtype = dtype_for(function, dtype)
    input, weight, bias = problem(device, (2, 32, 24, 24), 24, (3, 3), dtype, layout=layout)
    inputs = torch.randn(20, *input.shape, device=device).to(dtype)
    precision = precision_for(function)
    in_a_row, apart = [], []
    for results in (in_a_row, apart):
        for values in inputs:
            input.copy_(values)
            results.append(function(input, weight, bias, 2.0, precision=precision))
            if device == "cuda" and results is apart:
                torch.cuda.synchronize()
    assert torch.stack(in_a_row).equal(torch.stack(apart))


@EVERY
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_no_less_accurate_than_torch(function, device, precision, set_conv_precision):
    """The design's promise: rms error at most 1.1 times that of torch's convolution at the same precision."""
    skip_unless_takes(function, torch.float32, precision)
    input, weight, bias = problem(device, (2, 64, 34, 66), 128, (3, 3))
    expected = exact(input, 2.0, weight, bias)
    set_conv_precision(precision)
    torch_own = torch.min(F.conv2d(input, weight, bias) * 2.0, dim=1, keepdim=True).values
    assert rms_error(function(input, weight, bias, 2.0, precision=precision), expected) <= 1.1 * rms_error(torch_own, expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_no_less_accurate_than_torch(function, device, dtype):
    input, weight, bias = problem(device, (2, 32, 34, 34), 64, (3, 3), dtype)
    expected = exact(input, 2.3, weight, bias)
    torch_own = torch.min(F.conv2d(input, weight, bias) * 2.3, dim=1, keepdim=True).values
    assert rms_error(function(input, weight, bias, 2.3), expected) <= 1.01 * rms_error(torch_own, expected)


@EVERY
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_auto_follows_torchs_setting(function, device, setting, set_conv_precision):
    input, weight, bias = problem(device, (1, 64, 20, 20), 32, (3, 3), dtype_for(function, torch.float32))
    set_conv_precision(setting)
    assert function(input, weight, bias, 2.0).equal(function(input, weight, bias, 2.0, precision=setting))


@EVERY
@pytest.mark.parametrize("scale", [0.0, -3.0, 1, True, 2**40 + 1, 1e-30])
def test_finite_scale(function, device, scale):
    check(function, *problem(device, (1, 5, 8, 9), 7, (3, 3)), scale)


@EVERY
@pytest.mark.parametrize("scale", [1e300, math.inf, -math.inf, 10**400])
def test_overflowing_scale(function, device, scale):
    """No output is zero, so that none becomes NaN."""
    tensors = problem(device, (1, 5, 8, 9), 7, (3, 3), dtype_for(function, torch.float32))
    sign = torch.min(F.conv2d(*tensors) * (-1 if scale < 0 else 1), dim=1, keepdim=True).values.sign()
    assert call(function, *tensors, scale).equal(sign * math.inf)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinities_reach_what_they_touch(function, device, dtype):
    input, weight, bias = problem(device, (1, 4, 12, 14), 6, (3, 3), dtype)
    input[0, 1, 3, 4] = math.nan
    input[0, 2, 9, 2] = math.inf
    input[0, 3, 8, 10] = -math.inf
    for scale in (2.0, -2.0):
        result, expected = call(function, input, weight, bias, scale), exact(input, scale, weight, bias)
        assert result.cpu().isnan().equal(expected.isnan())
        assert result.cpu().isinf().equal(expected.isinf())
        assert result.cpu()[expected.isinf()].double().equal(expected[expected.isinf()])


@EVERY
@pytest.mark.parametrize(
    ("value", "scale", "expected"), [(math.nan, 2.0, math.nan), (-math.inf, 2.0, -math.inf), (math.inf, -1.0, -math.inf)]
)
def test_one_special_bias_decides_every_pixel(function, device, value, scale, expected):
    input, weight, bias = problem(device, (2, 3, 7, 9), 11, (3, 3), dtype_for(function, torch.float32))
    bias[10] = value
    result = call(function, input, weight, bias, scale)
    torch.testing.assert_close(result, torch.full_like(result, expected), equal_nan=True)


@EVERY
def test_nan_weight_makes_every_pixel_nan(function, device):
    input, weight, bias = problem(device, (2, 3, 7, 9), 11, (3, 3), dtype_for(function, torch.float32))
    weight[5, 2, 1, 1] = math.nan
    assert call(function, input, weight, bias, -2.0).isnan().all()


TENSOR_SCALES = pytest.mark.parametrize(("function", "device"), takes_tensor_scales("conv2d_scale_min"))


@TENSOR_SCALES
class TestTensorScales:
    """A scale that is a tensor: one factor, or one for each output channel, which multiplies the sum with its bias."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_and_dtypes(self, function, device, dtype, layout, poisoned):
        input, weight, bias = problem(device, (2, 6, 9, 11), 10, (3, 3), dtype, layout=layout)
        check(function, input, weight, bias, torch.randn(10, device=device))
        check(function, input, weight, bias.repeat_interleave(3)[::3], torch.randn(10, device=device).to(dtype))

    @pytest.mark.parametrize("form", SCALES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_forms(self, function, device, form, dtype):
        input, weight, bias = problem(device, (2, 16, 9, 12), 48, (3, 3), dtype)
        check(function, input, weight, bias, SCALES[form](torch.randn(48, device=device)))

    @pytest.mark.parametrize("layout", ["nchw", "channels_last"])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_geometry(self, function, device, layout, geometry, poisoned):
        shape, out_channels, kernel, conv = GEOMETRIES[geometry]
        for bias in (True, False):
            tensors = problem(device, shape, out_channels, kernel, groups=conv.get("groups", 1), layout=layout, bias=bias)
            check(function, *tensors, torch.randn(out_channels, device=device), **conv)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "channels_last"])
    @pytest.mark.parametrize(
        ("shape", "out_channels"), [((4, 64, 60, 90), 128), ((3, 32, 50, 90), 200), ((3, 144, 40, 50), 200)], ids=str
    )
    def test_large(self, function, device, shape, out_channels, layout, dtype, poisoned):
        tensors = problem(device, shape, out_channels, (3, 3), dtype, layout=layout)
        check(function, *tensors, torch.randn(out_channels, device=device))

    @given(data=st.data(), form=st.sampled_from(sorted(SCALES)))
    def test_drawn(self, function, device, data, form):
        torch.manual_seed(0)
        tensors, conv = data.draw(draw_problem(function))
        input, weight, bias = problem(device, *tensors)
        check(function, input, weight, bias, SCALES[form](torch.randn(len(weight), device=device)), **conv)

    @pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
    @pytest.mark.parametrize("factor", [1e-8, 1e8])
    def test_any_magnitude(self, function, device, magnitude, factor):
        """A factor is applied to each sum as it is: it neither widens nor narrows what the operands may be."""
        input, weight, bias = problem(device, (1, 32, 12, 17), 24, (3, 3))
        scales = torch.randn(24, device=device) * factor
        if not 1e-30 < magnitude * factor < 1e30:
            scales = scales / factor
        check(function, input * magnitude, weight, bias * magnitude, scales, "ieee" if not isinstance(function, Rung) else None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan])
    def test_special_factors(self, function, device, dtype, value):
        """All sums are exact and none is zero, so that an infinite factor makes no NaN; an infinity times zero does."""
        dtype = dtype_for(function, dtype)
        input, weight, bias = (
            t.mul(2).round().clamp(-5, 5) + shift
            for t, shift in zip(problem(device, (1, 4, 12, 14), 6, (3, 3), dtype), (0, 0, 0.5), strict=True)
        )
        input[0, 2, 9, 2], input[0, 3, 2, 10] = math.inf, -math.inf
        scales = torch.randn(6, device=device)
        scales[[1, 4]] = value
        result, expected = call(function, input, weight, bias, scales).cpu(), exact(input, scales, weight, bias)
        assert result.isnan().equal(expected.isnan())
        assert result.isinf().equal(expected.isinf())
        assert result[expected.isinf()].double().equal(expected[expected.isinf()])

    def test_a_factor_multiplies_its_channel_alone(self, function, device):
        """Zero for all channels but the last, whose sum is negative: wherever the factors lay, they would be read there."""
        for out_channels in (1, 7, 64, 130, 300):
            input, weight, _ = problem(device, (1, 5, 8, 9), out_channels, (3, 3))
            bias = torch.full((out_channels,), -100.0, device=device)
            scales = torch.zeros(out_channels, device=device)
            scales[-1] = 0.5
            check(function, input, weight, bias, scales)


TAKES_16_BIT = [p for p in implementations("conv2d_scale_min") if "conv_direct" not in p.id and "ieee" not in p.id]


@pytest.mark.parametrize(("function", "device"), TAKES_16_BIT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
class TestFloat32Bias:
    """Beside 16-bit tensors a bias may be float32, in which it is added anyway."""

    @pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_geometry(self, function, device, dtype, layout, geometry, poisoned):
        shape, out_channels, kernel, conv = GEOMETRIES[geometry]
        input, weight, _ = problem(device, shape, out_channels, kernel, dtype, conv.get("groups", 1), layout)
        bias = torch.randn(out_channels, device=device)
        check(function, input, weight, bias, -1.3, **conv)
        check(function, input, weight, bias.repeat_interleave(3)[::3], torch.randn(out_channels, device=device), **conv)

    @pytest.mark.parametrize("tensor_scale", [False, True])
    def test_it_is_not_rounded_first(self, function, device, dtype, tensor_scale):
        """Each sum without it is -1, so that of a bias near 1 only what a 16-bit type would lose is left."""
        input, weight = torch.ones(1, 8, 9, 11, device=device).to(dtype), torch.zeros(6, 8, 3, 3, device=device).to(dtype)
        weight[:, 3, 1, 1] = -1
        bias = 1 + torch.finfo(dtype).eps * torch.linspace(0.1, 0.3, 6, device=device)
        scale = torch.full((6,), 3.0, device=device) if tensor_scale else 3.0
        expected = ((bias - 1) * 3.0).amin().to(dtype)
        assert expected > 0
        assert call(function, input, weight, bias, scale).eq(expected).all()


@EVERY
def test_one_image(function, device):
    """Without a batch around it."""
    input, weight, bias = problem(device, (2, 5, 8, 9), 6, (3, 3), dtype_for(function, torch.float32))
    assert call(function, input[1], weight, bias, -1.5).shape == (1, 6, 7)
    check_one = call(function, input[1], weight, bias, -1.5)
    torch.testing.assert_close(check_one, call(function, input[1:], weight, bias, -1.5)[0], rtol=0, atol=0)
    if function is conv2d_scale_min:
        values, winners = conv2d_scale_min(input[1], weight, bias, -1.5, return_indices=True)
        assert values.shape == winners.shape == (1, 6, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_scale_is_never_read_by_the_processor(dtype, precision):
    input, weight, _ = problem("cuda", (2, 64, 30, 34), 128, (3, 3), dtype)
    bias, scales = torch.randn(128, device="cuda"), torch.randn(128, device="cuda")
    conv2d_scale_min(input, weight, bias, scales, precision=precision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        conv2d_scale_min(input, weight, bias, scales, precision=precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = conv2d_scale_min(input, weight, bias, scales, precision=precision)
    scales.mul_(-0.3)
    graph.replay()
    torch.testing.assert_close(result, conv2d_scale_min(input, weight, bias, scales, precision=precision))


@pytest.fixture(scope="module", params=["conv_wgmma", "conv_wgmma_ieee"])
def shaken(request):
    """Give a rung and the same with pauses wherever warps wait for each other or let each other go on.

    Some warps pause each time, for some 20 microseconds; then others: they drift as far apart as they can.
    """
    rung, text = rungs[request.param], export.flattened(rungs[request.param].source_file)
    calls = ("ptx::mbarrier_wait(full(), phase);", "ptx::mbarrier_wait(empty(), phase ^ 1);", "ptx::mbarrier_arrive(empty());")
    for line in (*calls, "ptx::mbarrier_arrive(at.full());"):
        assert text.count(line) == 1
        text = text.replace(line, f"shake(); {line}")
    pause = """
        __device__ __forceinline__ void shake() {
          uint32_t hash = (clock() >> 15) * 2654435761u + threadIdx.x / 32 * 2246822519u + blockIdx.x * 3266489917u;
          hash = (hash ^ hash >> 15) * 2246822519u;
          if (hash >> 30 == 0) __nanosleep(hash >> 18 & 4095);
        }
    """
    return rung, edit(rung.name, text.replace("struct Ring {", pause + "\n\nstruct Ring {"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "out_channels"), [((4, 64, 150, 270), 128), ((6, 32, 250, 90), 200), ((3, 144, 120, 100), 200)], ids=str
)
def test_timing_decides_nothing(shaken, shape, out_channels, dtype, layout):
    """However warps drift apart, the bits are the same; a block has many tiles here, and its rings wrap around often."""
    rung, slowed = shaken
    if reason := rung.why_unavailable() or rung.why_not(dtype, precision_for(rung)):
        pytest.skip(reason)
    input, weight, bias = problem("cuda", shape, out_channels, (3, 3), dtype)
    rows = torch.arange(shape[2], device="cuda").view(-1, 1)
    for values in (input, input * 2.0 ** (rows // 3 - 10)):
        values = LAYOUTS[layout](values.to(dtype))
        wanted = call(rung, values, weight, bias, 1.3)
        assert all(call(slowed, values, weight, bias, 1.3).equal(wanted) for _ in range(3))


@EVERY
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_same_bits_every_time(function, device, layout):
    tensors = problem(device, (2, 33, 30, 41), 37, (3, 3), dtype_for(function, torch.float32), layout=layout)
    first = call(function, *tensors, 1.3)
    assert all(call(function, *tensors, 1.3).equal(first) for _ in range(4))


@EVERY
def test_strides_past_2_to_31_elements(function, device):
    input, weight, bias = problem(device, (1, 3, 5, 6), 4, (3, 3), dtype_for(function, torch.bfloat16))
    check(function, far_apart(input), weight, bias, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "device"), [p for p in implementations("conv2d_scale_min") if p.id.endswith("cuda")])
class TestGpu:
    def test_past_2_to_31_elements(self, function, device):
        if torch.cuda.mem_get_info()[0] < 32 * 2**30:
            pytest.skip("needs 32 GiB of free GPU memory")
        dtype = dtype_for(function, torch.bfloat16)
        input = torch.empty(3, 64, 4100, 2800, dtype=dtype, device=device).normal_()
        weight = torch.randn(8, 64, 3, 3, device=device).mul(0.04).to(dtype)
        result = call(function, input, weight, None, 2.0)
        for rows in (slice(0, 40), slice(-40, None)):
            part = input[2:, :, rows]
            expected = exact(part, 2.0, weight)
            bound = error_bound(part, weight, None, 2.0, expected, "ieee")
            assert_within(result[2:, :, :38] if rows.start == 0 else result[2:, :, -38:], expected, bound)

    def test_side_stream_and_graph_capture(self, function, device):
        input, weight, bias = problem(device, (2, 16, 20, 24), 32, (3, 3), dtype_for(function, torch.float32))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(function, input, weight, bias, 2.0)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(function, input, weight, bias, 2.0)
        input.copy_(torch.randn_like(input))
        graph.replay()
        torch.testing.assert_close(result, call(function, input, weight, bias, 2.0))

    def test_does_not_synchronise(self, function, device):
        tensors = problem(device, (2, 16, 20, 24), 32, (3, 3), dtype_for(function, torch.float32))
        call(function, *tensors, 2.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(function, *tensors, 2.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_second_device(self, function, device):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        tensors = problem("cuda:1", (2, 16, 20, 24), 32, (3, 3), dtype_for(function, torch.float32))
        check(function, *tensors, 2.0)
        assert torch.cuda.current_device() == 0


@pytest.fixture(params=DEVICES)
def composite_adds_bias(request, monkeypatch):
    """Give a device where composite adds the bias itself; on the CPU PyTorch's operations take the kernel's place."""
    if request.param == "cuda":
        yield "cuda"
        return

    def with_winners(input, bias, scale, early):
        values, winners = torch.min((input + bias.view(-1, 1, 1)) * scale, dim=1, keepdim=True)
        return values, winners.to(torch.uint8)

    monkeypatch.setattr(composite, "_adds_bias", lambda input: True)
    with torch.library._scoped_library("fused_kernels", "IMPL") as library:
        for overload in rungs["scale_min_vectorized"].overloads:
            library.impl(f"scale_min_bias.{overload}", lambda *args: with_winners(*args)[0], "CPU")
            library.impl(f"scale_min_bias_winners.{overload}", with_winners, "CPU")
        yield "cpu"


class TestCompositeAddsBias:
    """Composite leaves the bias out of the convolution, whose library would pass once more over its output to add it."""

    @staticmethod
    def eager(input, weight, bias, scale, **conv):
        return torch.min(F.conv2d(input, weight, bias, **conv) * scale, dim=1, keepdim=True).values

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_result(self, composite_adds_bias, dtype):
        input, weight, bias = problem(composite_adds_bias, (2, 6, 9, 11), 10, (3, 3), dtype)
        check(rungs["composite"], input, weight, bias.repeat_interleave(3)[::3], -1.5, stride=2, padding="valid")

    def test_convolves_without_bias(self, composite_adds_bias):
        class Record(TorchDispatchMode):
            calls = []  # noqa: RUF012

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.calls.append((function.name(), args))
                return function(*args, **(kwargs or {}))

        with Record() as record:
            rungs["composite"](*problem(composite_adds_bias, (2, 6, 9, 11), 10, (3, 3)), 2.0)
        assert [args[2] for name, args in record.calls if "conv" in name] == [None]
        assert [name for name, _ in record.calls][-1] == "fused_kernels::scale_min_bias.float32"

    @pytest.mark.parametrize("needed", [(0, 1, 2), (2,), (0,)], ids=str)
    def test_gradients(self, composite_adds_bias, needed):
        tensors = problem(composite_adds_bias, (2, 4, 9, 11), 6, (3, 3), torch.float64)
        wanted = [tensors[i].requires_grad_() for i in needed]
        for scale in (2.0, -0.7):
            outputs = [function(*tensors, scale, padding=1) for function in (rungs["composite"], self.eager)]
            grad = torch.randn_like(outputs[0])
            for one, other in zip(*(torch.autograd.grad(output, wanted, grad) for output in outputs), strict=True):
                torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compiles_in_one_graph(self, composite_adds_bias, requires_grad):
        tensors = problem(composite_adds_bias, (2, 4, 9, 11), 6, (3, 3), torch.float64)
        tensors = [t.requires_grad_(requires_grad) for t in tensors]
        function = compiled(lambda *t: rungs["composite"](*t, -1.3))
        result, expected = function(*tensors), self.eager(*tensors, -1.3)
        torch.testing.assert_close(result, expected)
        if requires_grad:
            for one, other in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (result, expected)), strict=True):
                torch.testing.assert_close(one, other)

    def test_follows_autocast(self, composite_adds_bias):
        tensors = problem(composite_adds_bias, (2, 4, 9, 11), 6, (3, 3))
        with torch.autocast(composite_adds_bias, torch.bfloat16):
            result, expected = rungs["composite"](*tensors, 2.0), self.eager(*tensors, 2.0)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
def test_transforms_differentiate_by_the_bias(device, transform):
    """The operator that adds the bias has no rule for them: without a way around it the derivative would be zero."""
    tensors = problem(device, (1, 3, 6, 5), 4, (3, 3), torch.float64)
    found = transform(lambda *t: conv2d_scale_min(*t, -1.5), 2)(*tensors)
    torch.testing.assert_close(found, transform(lambda *t: TestCompositeAddsBias.eager(*t, -1.5), 2)(*tensors))


def test_a_decision_is_recalled_for_the_same_shapes_alone():
    weight = torch.randn(3, 2, 3, 3)
    for size, stride in itertools.product((6, 9, 6), (1, 2, 1)):
        input = torch.randn(1, 2, size, size + 1)
        expected = F.conv2d(input, weight, stride=stride).amin(1, keepdim=True)
        torch.testing.assert_close(conv2d_scale_min(input, weight, stride=stride), expected)


def test_decisions_take_a_bounded_place(monkeypatch):
    monkeypatch.setattr(choice, "_decisions", {})
    monkeypatch.setattr(choice, "_MOST_DECISIONS", 3)
    weight = torch.randn(3, 2, 3, 3)
    for size in range(5, 15):
        conv2d_scale_min(torch.randn(1, 2, size, size), weight)
        assert 0 < len(choice._decisions) <= 3
