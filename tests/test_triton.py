"""The rungs in Triton: interpreted on a CPU, how a convolution is planned, and where they can run and do."""

import importlib.util
import inspect
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_sentence, assert_within, exact
from test_choice import GPUS, H200, problem

import fused_kernels as fk
from fused_kernels import choice, estimates, measured, operators, plans, toolchain
from fused_kernels.bench.workloads import problem_of
from fused_kernels.rungs import rungs
from fused_kernels.triton_kernels import conv_triton_plan
from fused_kernels.triton_kernels.conv_triton_plan import TILES, Config

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")

# ---- interpreted ----

# Memory that nobody wrote holds NaN.
INTERPRETED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from torch.nn.functional import conv2d, pad
from conftest import LAYOUTS, assert_within, exact, factors
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)

def check(values, factor, output, won, bound):
    values = values * factor
    least = values.min(1, keepdim=True).values
    assert_within(output, least, bound)
    assert won.dtype == (torch.uint8 if values.shape[1] <= 256 else torch.int32)
    if values.numel():
        assert_within(values.gather(1, won.long()), least, bound)
"""

CONV = """
from fused_kernels.triton_kernels import conv_triton
from fused_kernels.triton_kernels.conv_triton_plan import Config
CONFIGS = Config(64, 32, 32, 4, 2, 1), Config(32, 16, 16, 4, 2, 1)

def case(
    shape, out_channels, kernel, stride=(1, 1), padding=(0,) * 4, dilation=(1, 1), groups=1, scale=2.0,
    layout="channels_last", bias=True, scales=None, special=None, config=CONFIGS[0],
):
    x = torch.randn(shape).half()
    if special is not None:
        x[0, 1, 2, 3] = special
    x, weight = LAYOUTS[layout](x), torch.randn(out_channels, shape[1] // groups, *kernel).half() / 8
    weight = weight.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else weight
    bias = torch.randn(out_channels).half() if bias else None
    conv = stride, padding, dilation, groups
    output, won = conv_triton.compute(x, weight, bias, scale, *conv, "ieee", scales, winners=True, config=config)
    padded = pad(x.double(), (*padding[2:], *padding[:2]))
    values = conv2d(padded, weight.double(), None if bias is None else bias.double(), stride, 0, dilation, groups)
    check(values, factors(scale if scales is None else scales), output, won, 1e-2)

case((2, 16, 8, 8), 24, (3, 3))
case((2, 16, 8, 8), 40, (3, 3), layout="nchw", config=CONFIGS[1])
case((2, 5, 7, 6), 17, (3, 3), padding=(1, 2, 0, 3), layout="transposed", bias=False)
case((1, 8, 3, 5), 9, (2, 2), padding=(4, 3, 3, 4))
case((2, 5, 9, 10), 20, (3, 5), stride=(2, 3), padding=(2, 0, 1, 3))
case((2, 8, 9, 8), 33, (3, 3), dilation=(2, 2), padding=(2, 2, 2, 2), scale=-1.5)
case((1, 12, 7, 6), 20, (3, 3), groups=4, padding=(1, 1, 1, 1), scale=0.0, config=CONFIGS[1])
case((2, 24, 7, 7), 16, (1, 1), stride=(2, 2), layout="nchw")
case((1, 6, 6, 7), 10, (3, 3), groups=2, scale=1.0, scales=torch.randn(10))
case((0, 8, 5, 5), 9, (3, 3))
for special in float("nan"), float("inf"), -float("inf"):
    case((2, 8, 6, 6), 9, (3, 3), special=special, padding=(1, 1, 1, 1))
case((1, 8, 5, 6), 9, (3, 3), special=float("inf"), scale=0.0)
print("ok")
"""

SCALE_MIN = """
from fused_kernels.triton_kernels import scale_min_triton
# The interpreter takes a minimum element by element, also where there is no pixel.
scale_min_triton.tile = lambda channels, side_by_side, wide: (16, 4 if channels < 100 else 64)

def case(x, scale=2.0, scales=None, bias=None):
    output, won = scale_min_triton.compute(x, scale, scales, bias=bias, winners=True)
    values = x.double() if bias is None else x.double() + bias.double().view(-1, 1, 1)
    check(values, factors(scale if scales is None else scales), output, won, 1e-2 if x.dtype == torch.half else 1e-5)

for dtype in torch.float32, torch.float16, torch.float64:
    x = torch.randn(2, 5, 3, 8).to(dtype)
    for layout in "nchw", "channels_last", "sliced", "transposed", "cropped", "offset":
        case(LAYOUTS[layout](x), -1.5)
    case(x, bias=torch.randn(5).to(dtype))
    case(x, 1.0, torch.randn(5).to(torch.float64 if dtype == torch.float64 else torch.float32))
    case(torch.randn(1, 1, 1, 1).to(dtype))
    case(torch.randn(0, 3, 2, 2).to(dtype))
    case(torch.randn(1, 300, 2, 2).to(dtype).contiguous(memory_format=torch.channels_last))
    x[0, 4, 0, 0], x[1, 0, 2, 1] = float("nan"), float("inf")
    case(x)
    case(x, 0.0)
print("ok")
"""


@needs_triton
@pytest.mark.parametrize("cases", [CONV, SCALE_MIN], ids=["conv_triton", "scale_min_triton"])
def test_interpreted_on_a_cpu(run_python, cases):
    assert run_python(INTERPRETED + cases, TRITON_INTERPRET="1").strip() == "ok"


# ---- the plan ----


def make_plan(shape, weight_shape, padding=0, hardware=H200, stride=(1, 1), dilation=(1, 1), groups=1):
    gpu = hardware.multiprocessors, hardware.shared_bytes
    return conv_triton_plan.plan(shape, weight_shape, stride, (padding,) * 4, dilation, groups, (True, True), gpu)


def test_images_share_their_padding():
    how = make_plan((2, 64, 7, 7), (64, 64, 3, 3), padding=1)
    assert (how.pitch, how.out, how.copies_input) == ((8, 8), (7, 7), True)


def test_what_is_a_matrix_is_not_copied():
    how = make_plan((2, 64, 9, 10), (64, 64, 3, 3))
    assert (how.pitch, how.copies_input, how.copies_weight) == ((9, 10), False, False)


@pytest.mark.parametrize("capability", GPUS, ids=str)
def test_a_tiles_stages_fit_into_shared_memory(capability):
    hardware, draw = GPUS[capability], random.Random(0)
    for _ in range(40):
        groups, size = draw.choice((1, 1, 2, 8)), draw.randint(9, 300)
        channels, out_channels = draw.randint(1, 600), groups * draw.randint(1, 600)
        weight_shape = out_channels, channels, draw.randint(1, 5), draw.randint(1, 5)
        shape, stride = (draw.randint(1, 64), groups * channels, size, size), (draw.randint(1, 2),) * 2
        config = make_plan(shape, weight_shape, draw.randint(0, 2), hardware, stride, groups=groups).config
        tile = 2 * config.block_k * (config.block_m + config.block_n)
        assert config.stages > 1
        assert config.programs * config.stages * tile < hardware.shared_bytes


def test_tiles_leave_out_what_is_not_stored():
    assert conv_triton_plan.count_tiles(64, (256, 256), (254, 254), 256) == (64 * 254, 254, 256 * 256)
    assert conv_triton_plan.count_tiles(64, (8, 8), (7, 7), 256) == (16, 16, 64 * 64)


# ---- what is missing ----


@pytest.fixture
def all_there(tmp_path, monkeypatch):
    """Pretend that Triton, a C compiler and Python's headers are there."""
    for path in (tmp_path / "tools" / "tensor_descriptor.py", tmp_path / "Python.h"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(toolchain, "python_header", lambda: tmp_path / "Python.h")
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def test_nothing_is_missing(all_there, monkeypatch):
    assert toolchain.why_no_triton() is None
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "clang" else None)
    assert toolchain.why_no_triton() is None


@pytest.mark.parametrize("missing", ["pip install triton", "too old", "gcc", "my-cc", "Python.h"])
def test_what_is_missing_is_named(all_there, monkeypatch, missing):
    if missing == "pip install triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "too old":
        (all_there / "tools" / "tensor_descriptor.py").unlink()
    elif missing == "Python.h":
        (all_there / "Python.h").unlink()
    else:
        monkeypatch.setattr(shutil, "which", lambda name: name if name == "clang" and missing == "my-cc" else None)
        if missing == "my-cc":
            monkeypatch.setenv("CC", missing)
    reason = toolchain.why_no_triton()
    assert_one_sentence(reason)
    assert missing in reason


@pytest.fixture
def no_nvcc(monkeypatch):
    """Pretend that there is a GPU and no toolkit, but all that Triton needs."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(toolchain, "cuda_toolkit", lambda: None)
        monkeypatch.setattr(toolchain, "why_no_triton", lambda: None)

    return pretend


@pytest.mark.parametrize("name", ["scale_min_triton", "conv_triton"])
def test_triton_needs_no_nvcc(no_nvcc, name, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(tmp_path))
    no_nvcc((9, 0))
    assert rungs[name].why_unavailable() is None
    assert "nvcc" in rungs["conv_mma"].why_unavailable()
    monkeypatch.setattr(toolchain, "why_no_triton", lambda: "no Triton")
    assert rungs[name].why_unavailable() == "no Triton"


def test_an_old_gpu_is_refused(no_nvcc):
    no_nvcc((7, 5))
    reason = rungs["conv_triton"].why_unavailable()
    assert_one_sentence(reason)
    assert "8.0" in reason


# ---- the choice ----

BFLOAT16 = {"precision": "bfloat16", "layout": "channels_last"}


def only_triton(name):
    return None if name == "conv_triton" else "no nvcc"


def test_without_nvcc_it_is_chosen():
    assert choice.choose(problem(**BFLOAT16), H200, only_triton).rung == "conv_triton"


@pytest.mark.parametrize(
    ("triton", "mma", "library", "rung"),
    [
        (900, 1000, 1000, "conv_triton"),
        (970, 1000, 1100, "conv_mma"),
        (970, 1100, 1000, "composite"),
        (1000, 900, 1000, "conv_mma"),
        (20, 35, 80, "conv_mma"),
        (20, 140, 80, "conv_triton"),
    ],
)
def test_it_must_gain_enough(monkeypatch, triton, mma, library, rung):
    """Triton compiles it for each layer, and Python launches it."""
    times = {"composite": library, "conv_mma": mma, "conv_triton": triton}
    monkeypatch.setattr(estimates, "forward", lambda *_: {name: 1e-6 * time for name, time in times.items()})
    decision = choice.choose(problem(**BFLOAT16), H200)
    assert decision.rung == rung
    assert ("gains too little" in decision.why) == (rung != "conv_triton" and triton < times[rung])


def test_where_python_launches_all_that_does_not_count():
    assert choice.costs({"composite": 3e-5, "conv_triton": 2e-5}) == {"composite": 3e-5, "conv_triton": pytest.approx(2.1e-5)}
    assert choice.costs({"composite": 3e-5, "conv_mma": 3e-5, "conv_triton": 2e-5})["conv_triton"] > 3e-5


def test_it_is_chosen_where_it_was_recorded_to_be_far_ahead():
    rows = [row for row in measured.read(estimates.NETWORKS.with_suffix(".csv")) if "conv_triton" in row.times]
    costs = [{name: 1.3 * time.p50 if name == "conv_triton" else time.p50 for name, time in row.times.items()} for row in rows]
    ahead = [row for row, cost in zip(rows, costs, strict=True) if min(cost, key=cost.get) == "conv_triton"]
    ahead = [row for row in ahead if row.times["conv_triton"].p50 > 60]
    assert len(ahead) > 5
    assert {choice.choose(problem_of(row), H200).rung for row in ahead} == {"conv_triton"}


def test_on_other_gpus_it_is_expected_to_be_slow():
    """Nobody has timed it there."""
    decision = choice.choose(problem(**BFLOAT16), GPUS[8, 0])
    assert decision.rung == "conv_mma"
    assert decision.seconds["conv_triton"] > 1.5 * decision.seconds["conv_mma"]


def test_float32_is_refused():
    decision = choice.choose(problem(), H200, only_triton)
    assert decision.rung == "composite"
    assert "conv_triton does not take float32" in decision.why
    assert_one_sentence(choice.why_not_fused(problem(), H200, only_triton)["conv_triton"])


def test_without_a_compiler_for_plans_it_is_chosen(monkeypatch):
    plans.plan_costs.cache_clear()
    monkeypatch.setattr(plans, "why_unavailable", lambda: "no C++ compiler")
    decision = choice.choose(problem(**BFLOAT16), H200, only_triton)
    plans.plan_costs.cache_clear()
    assert decision.rung == "conv_triton"


# ---- edited ----


@needs_triton
def test_an_edited_source_is_a_module_of_its_own():
    edited = fk.edit("conv_triton", rungs["conv_triton"].source.replace("block_p, block_c = 64,", "block_p, block_c = 128,"))
    assert edited.namespace != rungs["conv_triton"].namespace
    module, original = operators.triton_module(edited), operators.triton_module(rungs["conv_triton"])
    assert operators.triton_module(edited) is module is not original
    assert "block_p, block_c = 128," in inspect.getsource(module._pack)
    assert "block_p, block_c = 64," in inspect.getsource(original._pack)


@needs_triton
def test_triton_compiles_the_edited_text():
    source = rungs["scale_min_triton"].source.replace("loop_unroll_factor=8", "loop_unroll_factor=3")
    edited = fk.edit("scale_min_triton", source)
    assert "loop_unroll_factor=3" in inspect.getsource(operators.triton_module(edited).scale_min.fn)


@needs_triton
def test_a_syntax_error_leaves_no_module():
    edited, before = fk.edit("conv_triton", "def compute(:\n"), set(sys.modules)
    for _ in range(2):
        with pytest.raises(SyntaxError):
            operators.triton_module(edited)
    assert not [name for name in set(sys.modules) - before if "edit_" in name]


# ---- launched ----

# Compiles for a GPU that is not there, and keeps what it would be given.
ABSENT_GPU = """
import torch, triton
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget

given = []

class Launcher(nvidia.CudaLauncher):
    def __init__(self, src, metadata):
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, False, False
        for name in ("global_scratch", "profile_scratch"):
            setattr(self, name + "_size", 0), setattr(self, name + "_align", 1)
        signature, descriptors = dict(src.signature.items()), getattr(metadata, "tensordesc_meta", None)
        self.launch = nvidia.wrap_handle_tensordesc(lambda *args: given.append(args), signature, descriptors)

class Driver:
    launcher_cls = Launcher
    utils = property(lambda self: self)
    map_python_to_cpp_type = staticmethod(nvidia.ty_to_cpp)

    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def get_device_capability(self, device=0): return 9, 0
    def get_device_properties(self, device): return {"max_shared_mem": 232448}
    def load_binary(self, name, *rest): return None, name, 64, 0, 1024
    def fill_tma_descriptor(self, pointer, *rest): return rest

triton.runtime.driver.set_active(Driver())
from fused_kernels.triton_kernels import conv_triton, scale_min_triton

def said(args):
    # Profilers are given a fresh dictionary.
    args = [arg for arg in args if type(arg).__name__ != "LazyDict"]
    return [(tuple(arg.shape), arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]

asked = []
for kernel in (conv_triton.conv, conv_triton.pack, scale_min_triton.scale_min):
    kernel.add_pre_run_hook(lambda *args, **options: asked.append(1))

def case(launches, function, *args, **options):
    del given[:], asked[:]
    for _ in range(3):
        function(*args, **options)
    assert len(asked) == launches and len(given) == 3 * launches, (asked, given)
    first, *again = ([said(args) for args in given[i * launches : (i + 1) * launches]] for i in range(3))
    assert again == [first, first], (first, again)

torch.manual_seed(0)
conv_triton.hardware = lambda device: (132, 232448)
for dtype in torch.bfloat16, torch.half:
    x, weight = torch.randn(2, 64, 9, 10, dtype=dtype), torch.randn(96, 64, 3, 3, dtype=dtype)
    bias, scales = torch.randn(96, dtype=dtype), torch.randn(96)
    near, plain = {"memory_format": torch.channels_last}, ((1, 1), (0,) * 4, (1, 1), 1)
    case(1, conv_triton.compute, x.contiguous(**near), weight.contiguous(**near), None, 2.0, *plain)
    case(1, conv_triton.compute, x.contiguous(**near), weight.contiguous(**near), bias, -2.0, *plain, winners=True)
    case(3, conv_triton.compute, x, weight, bias, 1.0, *plain, "ieee", scales, winners=True)
    case(2, conv_triton.compute, x, weight.contiguous(**near), bias.float(), 2.0, (2, 1), (1, 0, 2, 3), (1, 2), 1)
for dtype in torch.float32, torch.float16, torch.float64:
    x = torch.randn(2, 64, 9, 10, dtype=dtype)
    case(1, scale_min_triton.compute, x, 2.0)
    case(1, scale_min_triton.compute, x.contiguous(**near), -1.0, winners=True)
    scales = torch.randn(64, dtype=torch.promote_types(dtype, torch.float))
    case(1, scale_min_triton.compute, x[..., 1:], 1.0, scales, bias=x[0, :, 0, 0])
print("ok")
"""


@needs_triton
def test_triton_is_asked_once_what_to_launch(run_python):
    """A later launch is given what the first one was, of other tensors."""
    assert run_python(ABSENT_GPU).strip() == "ok"


# ---- on a GPU ----


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("out_channels", [96, 256])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}")
def test_any_tile_is_right_at_8_warps(poisoned, tile, warps, kernel, out_channels):
    """Triton's convolutions larger than 1 x 1 were reported wrong at 8 warps (pytorch/pytorch#173068)."""
    block_m, block_n, least, *rest = tile
    if warps < least:
        pytest.skip("more sums than registers")
    module = operators.triton_module(rungs["conv_triton"])
    input = torch.randn(3, 64, 20, 21).half().cuda().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, 64, kernel, kernel).div(8 * kernel).half().cuda()
    config = Config(block_m, block_n, 64, warps, *rest)
    config = conv_triton_plan._fit(config, module.hardware(input.device)[1])
    if config is None:
        pytest.skip("no room in shared memory")
    conv = (1, 1), (1,) * 4, (1, 1), 1
    first, *again = (module.compute(input, weight, None, 2.0, *conv, config=config)[0] for _ in range(3))
    assert_within(first, exact(input, 2.0, weight, padding=1), 1e-2)
    assert all(torch.equal(first, other) for other in again)


WITHOUT_NVCC = """
import warnings
import torch, fused_kernels as fk
from fused_kernels import toolchain
toolchain.cuda_toolkit = lambda: None
warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(16, 64, 112, 112, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
weight = torch.randn(128, 64, 3, 3, device="cuda").div(24).bfloat16().contiguous(memory_format=torch.channels_last)
bias = torch.randn(128, device="cuda").bfloat16()
def expected(x, weight, bias):
    return (torch.nn.functional.conv2d(x, weight, bias, padding=1) * 2.0).amin(1, keepdim=True)
print(fk.explain(x, weight, bias, 2.0, padding=1).rung)
output, right = fk.conv2d_scale_min(x, weight, bias, 2.0, padding=1), expected(x.double(), weight.double(), bias.double())
print((output.double() - right).norm().item() < 1e-2 * right.norm().item())
print(torch.equal(fk.scale_min(x, 2.0), (x * 2.0).amin(1, keepdim=True)))
given = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
fk.conv2d_scale_min(*given, 2.0, padding=1).sum().backward()
expected(*exact).sum().backward()
# A tie of rounded values sends a gradient elsewhere.
print(all((a.grad.double() - b.grad).norm() < 0.1 * b.grad.norm() for a, b in zip(given, exact)))
"""


@pytest.mark.gpu
@needs_triton
def test_without_nvcc_triton_runs(run_python):
    assert run_python(WITHOUT_NVCC).split() == ["conv_triton", "True", "True", "True"]
