"""Bad input: every error is one sentence with the argument's name, what was expected and what was given."""

import numpy as np
import pytest
import torch
from conftest import assert_one_sentence, implementations, on

import fused_kernels as fk
from fused_kernels.rungs import LADDER

SCALE_MIN = pytest.mark.parametrize(("function", "device"), implementations("scale_min"))
CONV = pytest.mark.parametrize(
    ("function", "device"), [*implementations("conv2d_scale_min"), on("cpu", fk.explain, id="explain")]
)

X = torch.ones(1, 3, 4, 5)
SCALE_MIN_ERRORS = {
    "input as a list": (([1.0], 2.0), TypeError, r"input: .*\(N, C, H, W\).*list"),
    "input as an array": ((np.ones((1, 3, 4, 5)), 2.0), TypeError, r"input: .*ndarray"),
    "two dimensions": ((X[0, 0], 2.0), ValueError, r"input: .*\(N, C, H, W\) or \(C, H, W\).*\(4, 5\)"),
    "five dimensions": ((X[None], 2.0), ValueError, r"input: .*4.*\(1, 1, 3, 4, 5\)"),
    "no channels": ((X[:, :0], 2.0), ValueError, r"input: .*channel.*\(1, 0, 4, 5\)"),
    "integers": ((X.int(), 2.0), TypeError, r"input: .*float32.*int32"),
    "bool": ((X.bool(), 2.0), TypeError, r"input: .*float32.*bool"),
    "complex": ((X.cfloat(), 2.0), TypeError, r"input: .*float32.*complex64"),
    "float8": ((X.to(torch.float8_e4m3fn), 2.0), TypeError, r"input: .*float32.*float8"),
    "sparse": ((X.to_sparse(), 2.0), TypeError, r"input: .*strided.*sparse"),
    "image without channels": ((X[0, :0], 2.0), ValueError, r"input: .*channel.*\(1, 0, 4, 5\)"),
    "scales two": ((X, torch.ones(2)), ValueError, r"scale: .*\(3,\), \(3, 1, 1\) or \(1, 3, 1, 1\).*\(2,\)"),
    "scales of columns": ((X, torch.ones(1, 3)), ValueError, r"scale: .*\(3, 1, 1\).*\(1, 3\)"),
    "scales of pixels": ((X, torch.ones(3, 4, 5)), ValueError, r"scale: .*\(3, 1, 1\).*\(3, 4, 5\)"),
    "no scales": ((X, torch.ones(0)), ValueError, r"scale: .*one element.*\(0,\)"),
    "scales complex": ((X, torch.ones(3).cfloat()), TypeError, r"scale: .*real.*complex64"),
    "scales sparse": ((X, torch.ones(3).to_sparse()), TypeError, r"scale: .*dense.*sparse"),
    "scales elsewhere": ((X, torch.ones(3, device="meta")), ValueError, r"scale: .*device (cpu|cuda:0), got meta"),
    "scale a string": ((X, "2"), TypeError, r"scale: .*number.*'2'"),
    "scale complex": ((X, 2j), TypeError, r"scale: .*number.*2j"),
    "scale None": ((X, None), TypeError, r"scale: .*number.*None"),
}

x, w, b = torch.ones(1, 4, 8, 9), torch.ones(6, 4, 3, 3), torch.ones(6)
CONV_ERRORS = {
    "input two dimensions": ((x[0, 0], w, b), {}, ValueError, r"input: .*\(N, C, H, W\) or \(C, H, W\).*\(8, 9\)"),
    "input five dimensions": ((x[None], w, b), {}, ValueError, r"input: .*\(C, H, W\).*\(1, 1, 4, 8, 9\)"),
    "image's channels": ((x[0, :3], w, b), {}, ValueError, r"input: .*4 channels.*got 3"),
    "input integers": ((x.long(), w, b), {}, TypeError, r"input: .*float32.*int64"),
    "input complex": ((x.cdouble(), w, b), {}, TypeError, r"input: .*float32.*complex128"),
    "input None": ((None, w, b), {}, TypeError, r"input: .*tensor.*None"),
    "weight three dimensions": ((x, w[0], b), {}, ValueError, r"weight: .*4.*\(4, 3, 3\)"),
    "weight a list": ((x, [1.0], b), {}, TypeError, r"weight: .*tensor.*list"),
    "weight complex": ((x, w.cfloat(), b), {}, TypeError, r"weight: .*complex64"),
    "weight dtype": ((x, w.double(), b), {}, ValueError, r"weight: .*float32.*float64"),
    "weight device": ((x, w.to("meta"), b), {}, ValueError, r"weight: .*cpu.*meta"),
    "no input channels": ((x[:, :0], w[:, :0], b), {}, ValueError, r"weight: .*zero.*\(6, 0, 3, 3\)"),
    "no output channels": ((x, w[:0], b[:0]), {}, ValueError, r"weight: .*zero.*\(0, 4, 3, 3\)"),
    "empty kernel": ((x, w[:, :, :0], b), {}, ValueError, r"weight: .*zero.*\(6, 4, 0, 3\)"),
    "channels": ((x[:, :3], w, b), {}, ValueError, r"input: .*4 channels.*got 3"),
    "channels of groups": ((x, w, b), {"groups": 2}, ValueError, r"input: .*8 channels.*got 4"),
    "groups divide outputs": ((x, w[:5, :2], b[:5]), {"groups": 2}, ValueError, r"groups: .*5 output.*got 2"),
    "groups zero": ((x, w, b), {"groups": 0}, ValueError, r"groups: .*positive.*got 0"),
    "groups a float": ((x, w, b), {"groups": 1.0}, ValueError, r"groups: .*integer.*1\.0"),
    "bias two dimensions": ((x, w, b[None]), {}, ValueError, r"bias: .*1.*\(1, 6\)"),
    "bias length": ((x, w, b[:5]), {}, ValueError, r"bias: .*6.*got 5"),
    "bias dtype": ((x, w, b.half()), {}, ValueError, r"bias: .*float32.*float16"),
    "bias device": ((x, w, b.to("meta")), {}, ValueError, r"bias: .*cpu.*meta"),
    "bias a bool": ((x, w, True), {}, TypeError, r"bias: .*tensor.*bool"),
    "bias float64": ((x.half(), w.half(), b.double()), {}, ValueError, r"bias: .*float16 or torch.float32, got .*float64"),
    "bias of another 16 bits": ((x.half(), w.half(), b.bfloat16()), {}, ValueError, r"bias: .*float16 or .*float32.*bfloat16"),
    "bias wider than float32": ((x, w, b.double()), {}, ValueError, r"bias: .*float32, got torch.float64"),
    "scales of the input's channels": ((x, w, b, x[0, :, 0, 0]), {}, ValueError, r"scale: .*\(6,\).*got shape \(4,\)"),
    "scales elsewhere": ((x, w, b, b.to("meta")), {}, ValueError, r"scale: .*cpu.*meta"),
    "scale a list": ((x, w, b, [1.0]), {}, TypeError, r"scale: .*number or a tensor.*list"),
    "kernel too large": ((x[:, :, :2], w, b), {}, ValueError, r"weight: .*padded input 2 x 9.*3 x 3"),
    "dilated kernel too large": ((x, w, b), {"dilation": 4}, ValueError, r"weight: .*8 x 9.*3 x 3.*4"),
    "stride zero": ((x, w, b), {"stride": 0}, ValueError, r"stride: .*at least 1.*got 0"),
    "stride a triple": ((x, w, b), {"stride": (1, 1, 1)}, ValueError, r"stride: .*pair.*\(1, 1, 1\)"),
    "stride a float": ((x, w, b), {"stride": 1.5}, ValueError, r"stride: .*integer.*1\.5"),
    "dilation zero": ((x, w, b), {"dilation": (1, 0)}, ValueError, r"dilation: .*at least 1.*\(1, 0\)"),
    "padding negative": ((x, w, b), {"padding": -1}, ValueError, r"padding: .*at least 0.*got -1"),
    "padding unknown": ((x, w, b), {"padding": "full"}, ValueError, r'padding: .*"same".*"valid".*full'),
    "padding same strided": ((x, w, b), {"padding": "same", "stride": 2}, ValueError, r'padding: .*"same".*stride 1'),
    "precision unknown": ((x, w, b), {"precision": "fp8"}, ValueError, r'precision: .*"auto".*"ieee".*"tf32".*fp8'),
    "precision None": ((x, w, b), {"precision": None}, ValueError, r"precision: .*None"),
    "precision a list": ((x, w, b), {"precision": ["ieee"]}, ValueError, r"precision: .*\['ieee'\]"),
}


def assert_refuses(call, error, pattern):
    with pytest.raises(error, match=f"^{pattern}") as caught:
        call()
    assert_one_sentence(str(caught.value))


def move(args, device):
    return [a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.dim() else a for a in args]


@SCALE_MIN
@pytest.mark.parametrize("case", SCALE_MIN_ERRORS)
def test_scale_min(function, device, case):
    args, error, pattern = SCALE_MIN_ERRORS[case]
    assert_refuses(lambda: function(*move(args, device)), error, pattern)


@CONV
@pytest.mark.parametrize("case", CONV_ERRORS)
def test_conv2d_scale_min(function, device, case):
    args, conv, error, pattern = CONV_ERRORS[case]
    assert_refuses(lambda: function(*move(args, device), **conv), error, pattern.replace("cpu", device))


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ({"scale_factor": torch.ones(4)}, ValueError, r"scale: .*\(6,\).*got shape \(4,\)"),
        ({"scale_factor": "x"}, TypeError, r"scale.*number.*'x'"),
        ({"precision": "fp8"}, ValueError, r'precision: .*"ieee".*fp8'),
        ({"groups": 3}, ValueError, r".*groups.*3"),
        ({"out_channels": 0}, ValueError, r".*\b0\b"),
        ({"in_channels": 5}, ValueError, r"input: .*5 channels.*got 4"),
        ({"stride": 0}, ValueError, r"stride: .*at least 1.*0"),
        ({"dilation": 0}, ValueError, r"dilation: .*at least 1.*0"),
        ({"padding": -1}, ValueError, r"padding: .*at least 0.*-1"),
        ({"padding": "full"}, ValueError, r".*padding.*full.*same"),
        ({"padding": "same", "stride": 2}, ValueError, r"padding.*same.*strid"),
        ({"dtype": torch.float64}, ValueError, r"weight: .*float32.*float64"),
        ({"kernel_size": 9}, ValueError, r"weight: .*8 x 9.*9 x 9"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_module(arguments, error, pattern):
    """When the layer is made, or at its first call at the latest."""
    accepted = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "scale_factor": 2.0}
    assert fk.Conv2dScaleMin(**accepted)(x).shape == (1, 1, 6, 7)
    assert_refuses(lambda: fk.Conv2dScaleMin(**{**accepted, **arguments})(x), error, pattern)


@pytest.mark.parametrize("name", [rung.name for rung in fk.rungs.values() if rung.device is None])
def test_a_rung_without_a_kernel_cannot_be_edited(name):
    assert_refuses(lambda: fk.edit(name, "text"), ValueError, rf".*{name}")


def test_edit_names_an_unknown_rung():
    assert_refuses(lambda: fk.edit("scale_max", "text"), (KeyError, ValueError), r".*scale_min_naive.*scale_max")


def test_an_edited_source_without_scales_takes_numbers_alone():
    """Its function has no argument for them."""
    source = fk.rungs["scale_min"].source
    assert fk.edit("scale_min", source).takes_scales
    edited = fk.edit("scale_min", "Tensor scale_min(const Tensor& input, double scale);")
    assert_refuses(lambda: edited(X, torch.ones(3)), RuntimeError, r"scale: scale_min expected a number.*\(3,\)")
    assert "scales" not in str(getattr(torch.ops, edited.namespace).scale_min.default._schema)


@pytest.mark.parametrize("name", [rung.name for rung in LADDER if rung.device == "cuda"])
def test_cuda_rung_on_cpu_tensors(name):
    """What a learner without a GPU does first."""
    args = (X,) if fk.rungs[name].operator == "scale_min" else (x, w, b)
    assert_refuses(lambda: fk.rungs[name](*args, 2.0), (ValueError, RuntimeError), r".*(?i:cuda|gpu)")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [rung.name for rung in LADDER if rung.device == "cpu"])
def test_cpu_rung_on_cuda_tensors(name):
    args = (X,) if fk.rungs[name].operator == "scale_min" else (x, w, b)
    assert_refuses(lambda: fk.rungs[name](*move(args, "cuda"), 2.0), (ValueError, RuntimeError), r".*(?i:cpu)")


NUMPY = {"stride": np.int64(2), "padding": (np.int32(1), 1), "dilation": np.int16(1), "groups": np.int64(2)}


@pytest.mark.parametrize("model", [fk.Conv2dScaleMin, fk.ModelNew])
def test_a_layer_of_a_numpy_scale_compiles(model):
    """NumPy's float64 is a float, but to the compiler an array."""
    layer, input = model(3, 4, 3, 1 / np.sqrt(4)), torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(input), layer(input))


def test_numpy_integers_are_integers():
    input, weight = torch.rand(1, 4, 8, 9), torch.rand(6, 2, 3, 3)
    plain = fk.conv2d_scale_min(input, weight, stride=2, padding=1, groups=2)
    assert fk.conv2d_scale_min(input, weight, **NUMPY).equal(plain)
    assert fk.Conv2dScaleMin(np.int64(4), np.int32(6), 3, 2.0, groups=np.int16(2))(input).shape == (1, 1, 6, 7)


DIRECT = {
    "no channels": lambda op, x, w: op.scale_min(x[:, :0], 2.0),
    "rank": lambda op, x, w: op.scale_min(x[0], 2.0),
    "stride": lambda op, x, w: op.conv2d_scale_min(x, w, None, 2.0, [0, 1], [0] * 4, [1, 1], 1, "ieee"),
    "groups": lambda op, x, w: op.conv2d_scale_min(x, w, None, 2.0, [1, 1], [0] * 4, [1, 1], 0, "ieee"),
    "channels": lambda op, x, w: op.conv2d_scale_min(x[:, :1], w, None, 2.0, [1, 1], [0] * 4, [1, 1], 1, "ieee"),
    "dtype": lambda op, x, w: op.conv2d_scale_min(x, w.half(), None, 2.0, [1, 1], [0] * 4, [1, 1], 1, "ieee"),
    "bias": lambda op, x, w: op.conv2d_scale_min(x, w, w[0, 0, 0], 2.0, [1, 1], [0] * 4, [1, 1], 1, "ieee"),
    "kernel": lambda op, x, w: op.conv2d_scale_min(x[..., :2], w, None, 2.0, [1, 1], [0] * 4, [1, 1], 1, "ieee"),
    "bias of two types": lambda op, x, w: op.conv2d_scale_min(
        x, w, w[:, 0, 0, 0].half(), 2.0, [1, 1], [0] * 4, [1, 1], 1, "ieee"
    ),
    "scales of another number": lambda op, x, w: op.scale_min(x, 1.0, torch.ones(3)),
    "scales of another dtype": lambda op, x, w: op.scale_min(x, 1.0, torch.ones(4).double()),
    "scales with dimensions": lambda op, x, w: op.scale_min(x, 1.0, torch.ones(4, 1)),
    "scales and a scale": lambda op, x, w: op.scale_min(x, 2.0, torch.ones(4)),
    "scales of the input's channels": lambda op, x, w: op.conv2d_scale_min(
        x, w, None, 1.0, [1, 1], [0] * 4, [1, 1], 1, "ieee", torch.ones(4)
    ),
}


GEOMETRY = {"stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1]}


def refuses_other_lengths(operator, *args, rest=()):
    """Call an operator with each list of a geometry too short and too long."""
    for name, plain in GEOMETRY.items():
        for length in {0, 1, len(plain) - 1, len(plain) + 1}:
            given = GEOMETRY | {name: [1] * length}
            with pytest.raises(RuntimeError, match=rf"\b{name}: expected {len(plain)} integers, got {length}(\n|$)"):
                operator(*args, *given.values(), 1, "ieee", *rest)


def test_a_direct_call_with_lists_of_another_length():
    """A schema's int[4] takes a list of any length."""
    if missing := fk.rungs["conv2d_scale_min"].why_unavailable():
        pytest.skip(missing)
    op, x, w = torch.ops.fused_kernels, torch.rand(1, 4, 8, 9), torch.rand(6, 4, 3, 3)
    for operator in (op.conv2d_scale_min, op.conv2d_scale_min_winners):
        refuses_other_lengths(operator, x, w, None, 2.0)
    grad, winners = torch.rand(1, 1, 6, 7), torch.zeros(1, 1, 6, 7, dtype=torch.uint8)
    refuses_other_lengths(op.grad_input, grad, winners, w, 2.0, [8, 9], rest=(False,))
    refuses_other_lengths(op.grad_weight, grad, winners, x, 2.0, 6, [3, 3])
    with pytest.raises(RuntimeError, match=r"\binput_size: expected 2 integers, got 3"):
        op.grad_input(grad, winners, w, 2.0, [8, 9, 1], *GEOMETRY.values(), 1, "ieee", False)
    with pytest.raises(RuntimeError, match=r"\bkernel_size: expected 2 integers, got 1"):
        op.grad_weight(grad, winners, x, 2.0, 6, [3], *GEOMETRY.values(), 1, "ieee")


@pytest.mark.gpu
@pytest.mark.parametrize("rung", [rung for rung in LADDER if rung.device == "cuda" and rung.operator == "conv2d_scale_min"])
def test_a_direct_call_of_a_cuda_operator_with_lists_of_another_length(rung):
    x, w = (torch.rand(shape, device="cuda", dtype=rung.dtypes[0]) for shape in ((1, 4, 8, 9), (6, 4, 3, 3)))
    refuses_other_lengths(getattr(torch.ops.fused_kernels, rung.name), x, w, None, 2.0)


@pytest.mark.parametrize("call", DIRECT.values(), ids=DIRECT)
def test_a_direct_call_of_an_operator_reads_nothing_out_of_bounds(call):
    """Called directly, past the checks in Python, the C++ refuses what it cannot read."""
    if missing := fk.rungs["scale_min"].why_unavailable():
        pytest.skip(missing)
    with pytest.raises(RuntimeError, match="expected"):
        call(torch.ops.fused_kernels, torch.rand(1, 4, 8, 9), torch.rand(6, 4, 3, 3))


NOT_AN_INPUT = {
    "no channels": lambda x: x[:, :0],
    "three dimensions": lambda x: x[0],
    "five dimensions": lambda x: x[None],
    "more channels than an int counts": lambda x: x[:1, :1, :1, :1].expand(1, 2**31, 1, 1),
    "integers": lambda x: x.int(),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [rung.name for rung in LADDER if rung.device == "cuda" and rung.operator == "scale_min"])
@pytest.mark.parametrize("change", NOT_AN_INPUT.values(), ids=NOT_AN_INPUT)
def test_a_direct_call_of_a_cuda_operator_is_refused_before_a_launch(name, change):
    operator = getattr(torch.ops.fused_kernels, name)
    with pytest.raises(RuntimeError, match="input: expected"):
        operator(change(torch.rand(1, 4, 8, 9, device="cuda")), 2.0)
    assert operator(torch.ones(1, 1, 1, 1, device="cuda"), 2.0).item() == 2.0


@pytest.mark.parametrize("wrong", [{"stride": 1.0}, {"stride": True}, {"dilation": (1, 1.0)}, {"groups": True}], ids=str)
def test_what_was_decided_for_an_integer_is_not_recalled_for_its_like(wrong):
    """In a dictionary 1, 1.0 and True are the same key."""
    input, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    fk.conv2d_scale_min(input, weight, stride=1, dilation=(1, 1), groups=1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fk.conv2d_scale_min(input, weight, **wrong)
