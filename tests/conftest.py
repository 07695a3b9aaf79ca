"""What all tests share: which implementation runs where, inputs in awkward layouts, and what the result must be."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.nn import functional as F

import fused_kernels as fk
from fused_kernels import dispatch
from fused_kernels.rungs import LADDER, Rung

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_RUNG = next(rung for rung in LADDER if rung.device == "cuda")
PUBLIC = {"scale_min": fk.scale_min, "conv2d_scale_min": fk.conv2d_scale_min}

hypothesis.settings.register_profile("fused_kernels", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("fused_kernels")


def on(device, *values, id):
    return pytest.param(*values, device, id=id, marks=[pytest.mark.gpu] if device == "cuda" else [])


DEVICES = [on(device, id=device) for device in ("cpu", "cuda")]


def implementations(operator, *, public=True):
    """Give (function, device) for the public function and for every rung of an operator, on each device that it runs on."""
    named = [("public", PUBLIC[operator], None)] if public else []
    named += [(rung.name, rung, rung.device) for rung in LADDER if rung.operator == operator]
    return _on_devices(named)


def takes_tensor_scales(operator):
    """Give those of them that take a tensor for the scale."""
    named = [("public", PUBLIC[operator], None)]
    named += [(rung.name, rung, rung.device) for rung in LADDER if rung.operator == operator and rung.takes_scales]
    return _on_devices(named)


def _on_devices(named):
    return [
        on(device, function, id=f"{name}-{device}")
        for name, function, only in named
        for device in ("cpu", "cuda")
        if only in (None, device)
    ]


def precision_for(function, asked=None):
    """Give the precision to test a function at: the one asked for, else the most exact that it offers."""
    if asked is not None or not isinstance(function, Rung):
        return asked or "ieee"
    return "ieee" if "ieee" in function.float32_precisions else "tf32"


def dtype_for(function, wanted):
    """Give the wanted dtype, or where a rung does not take it, one that it takes."""
    return function.dtypes[0] if isinstance(function, Rung) and wanted not in function.dtypes else wanted


def call(function, *args):
    """Call at the default precision, or at a rung's only one."""
    only_ieee = isinstance(function, Rung) and function.float32_precisions == ("ieee",)
    return function(*args, precision="ieee" if only_ieee else "auto")


def skip_unless_takes(function, dtype, precision="ieee", stride=1, groups=1, weight_shape=None, **_):
    if isinstance(function, Rung) and (reason := function.why_not(dtype, precision, stride, groups, weight_shape)):
        pytest.skip(reason)


def pytest_runtest_setup(item):
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    asked = [value for value in values if isinstance(value, Rung)]
    takers = list(asked)
    asked += [GPU_RUNG] if item.get_closest_marker("gpu") else []
    for rung in asked:
        if reason := rung.why_unavailable():
            pytest.skip(reason)
    given = item.callspec.params if hasattr(item, "callspec") else {}
    dtype = given.get("dtype")
    precision = precision_for(given.get("function", given.get("rung")), given.get("precision", given.get("setting")))
    for rung in takers:
        if reason := rung.why_not(dtype_for(rung, torch.float32) if dtype is None else dtype, precision):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill the memory of new tensors with NaN (integers: the largest), so that an element nobody wrote shows."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def set_conv_precision():
    """Set what precision="auto" follows, for the length of a test."""
    before = torch.backends.cudnn.conv.fp32_precision

    def set_to(precision):
        torch.backends.cudnn.conv.fp32_precision = precision

    yield set_to
    set_to(before)


LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels_last_offset": lambda x: LAYOUTS["offset"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "sliced": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, 1::3],
    "cropped": lambda x: F.pad(x, (1, 2, 3, 0, 1, 1), value=float("nan"))[:, 1:-1, 3:, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1, :, :, :1].expand(x.shape),
}


def compiled(function, dynamic=None, backend="aot_eager"):
    """Compile anew, in one graph."""
    torch._dynamo.reset()
    # NOTE: with this on, torch 2.11 writes to memory that it freed once a compiled module dies (pytorch/pytorch#179730).
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def far_apart(x):
    """Copy to where the channels lie 2^30 + 1 elements apart; the memory in between is never touched."""
    batch, channels, height, width = x.shape
    stride = 2**30 + 1
    storage = torch.empty((channels - 1) * stride + height * width, dtype=x.dtype, device=x.device)
    assert batch == 1
    return storage.as_strided(x.shape, (height * width, stride, width, 1)).copy_(x)


# The forms of a tensor scale, from one factor for each channel.
SCALES = {
    "number": lambda s: s[0],
    "one element": lambda s: s[:1],
    "vector": lambda s: s,
    "(C, 1, 1)": lambda s: s.view(-1, 1, 1),
    "(1, C, 1, 1)": lambda s: s.view(1, -1, 1, 1),
    "strided": lambda s: s.repeat_interleave(3)[::3],
    "expanded": lambda s: s[:1].expand(s.shape),
}


def factors(scale):
    """Give a scale as what multiplies images of float64 on the CPU."""
    return scale.detach().cpu().double().view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale


def exact(input, scale, weight=None, bias=None, **conv):
    """Give the result in float64, on the CPU, by PyTorch's own operations."""
    input, weight, bias = (t if t is None else t.detach().cpu().double() for t in (input, weight, bias))
    if weight is not None:
        input = F.conv2d(input, weight, bias, **conv)
    return torch.min(input * factors(scale), dim=1, keepdim=True).values


def assert_within(result, expected, bound):
    """Compare with float64: at most ``bound`` apart, the same NaN and infinities."""
    assert result.shape == expected.shape
    result, rounded = result.detach().cpu().double(), expected.to(result.dtype).double()
    wrong = ~((result == rounded) | (result.isnan() & rounded.isnan()) | ((result - expected).abs() <= bound))
    count = int(wrong.sum())
    assert count == 0, f"{count} of {wrong.numel()} are wrong: {result[wrong][:4]}, expected {expected[wrong][:4]}"


def project_files():
    """Give the files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    root = Path(__file__).parent.parent
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        pytest.skip("no git")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [root / name for name in listed.stdout.split("\0") if (root / name).is_file()]


def assert_one_sentence(text):
    assert "\n" not in text
    assert text.strip() == text
    assert not text.endswith(".")
    assert ". " not in text
    assert len(text) < 320


@pytest.fixture
def run_python(tmp_path):
    """Start a fresh interpreter on some code, its kernel cache empty; gives the process."""
    started = []

    def run(code, wait=True, **environment):
        environment = {"FUSED_KERNELS_CACHE": str(tmp_path / "cache"), **environment}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        started.append(process)
        if not wait:
            return process
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()


@pytest.fixture(scope="module")
def without_python():
    """Have the library that calls what was chosen without Python."""
    dispatch.auto.is_loaded()
    dispatch.finish_builds()
    assert dispatch.auto.is_loaded()


def have_rules(monkeypatch, in_python):
    """Have the library that runs a training step's rules without Python, or have Python run them, as until that is built."""
    dispatch.from_winners.is_loaded()
    dispatch.finish_builds()
    assert dispatch.from_winners.is_loaded()
    if in_python:
        monkeypatch.setattr(dispatch.from_winners, "is_loaded", lambda: False)
        monkeypatch.setattr(dispatch, "_rules", {})
