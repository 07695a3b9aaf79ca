"""Building: cold, warm, at once, after a kill, without a toolchain, with a broken one, and for every GPU architecture."""

import concurrent.futures
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import assert_one_sentence

import fused_kernels as fk
from fused_kernels import build, toolchain
from fused_kernels.__main__ import main
from fused_kernels.rungs import BACKWARD, COPY, LADDER, rungs

pytestmark = pytest.mark.skipif(toolchain.why_no_compiler() is not None, reason=str(toolchain.why_no_compiler()))

# A kernel of the operator's signature that builds in a second, whose result nobody else gives.
FILL = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
Tensor scale_min(const Tensor& input, double scale) {
  Tensor result = torch::stable::new_empty(input, {input.size(0), 1, input.size(2), input.size(3)});
  return torch::stable::fill_(result, VALUE);
}
STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) { m.impl("scale_min", TORCH_BOX(&scale_min)); }
"""
PREPARE = f"""
import sys, torch, fused_kernels as fk
FILL = {FILL!r}
input = torch.tensor([3., 1., -2.]).view(1, 3, 1, 1)
def filled(value): return fk.edit("scale_min", FILL.replace("VALUE", str(value)))
"""


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def forever(tmp_path):
    """Give a shell's command that ends with the test, or with the tests themselves: what is to be killed may be missed."""
    pipe = tmp_path / "the test runs"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    yield f"exec cat '{pipe}'"
    pipe.unlink()
    os.close(end)


def load_all(jobs):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: build.load(**job), jobs))


def wait_for(path, process):
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_import_is_light(run_python):
    heavy = "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "matplotlib", "IPython", "pandas", "triton"
    heavy += "torch.distributed.tensor", "torch.utils.flop_counter"
    out = run_python(
        f"import sys, torch\nbefore = set(sys.modules)\nimport fused_kernels\nprint(set({heavy}) & set(sys.modules) - before)"
    )
    assert out.strip() == "set()"


def test_cold_builds_and_warm_does_not(run_python, tmp_path):
    """The second process gets the same results without compiling; nothing else is printed into a log."""
    compiled = tmp_path / "compiled"
    counting = script(tmp_path / "counting", f'case "$*" in *" -c "*) echo once >> {compiled};; esac\nexec c++ "$@"')
    code = (
        PREPARE
        + "print(fk.scale_min(input, 2.0).item(), filled(7).__call__(input, 1.0).item(), filled(8)(input, 1.0).item())\n"
    )
    for _ in range(2):
        assert run_python(code, CXX=counting).split() == ["-4.0", "7.0", "8.0"]
        assert compiled.read_text(encoding="utf-8").split() == ["once"] * 3
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".so", ".sha256", ".lock"}


def test_a_call_builds_its_own_dtype_alone(run_python, tmp_path):
    code = PREPARE + "print(fk.scale_min(input, 2.0).item(), torch.ops.fused_kernels.scale_min(input.half(), 2.0).item())"
    assert run_python(code).split() == ["-4.0", "-4.0"]
    built = {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert built == {"scale_min.float32", "scale_min.float16"}


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core compiles one thing at a time")
def test_a_verdict_builds_its_dtypes_at_once(run_python, tmp_path):
    started = tmp_path / "started"
    two = f"[ $(wc -l < {started}) -ge 2 ]"
    meets = f"echo >> {started}; for i in $(seq 300); do {two} && break; sleep 0.1; done; {two} || exit 1"
    together = script(tmp_path / "together", f'case "$*" in *" -c "*) {meets};; esac\nexec c++ "$@"')
    code = PREPARE + "from fused_kernels import check\n"
    code += "print(check.verdict(fk.edit('scale_min', fk.rungs['scale_min'].source + '// changed')).correct)"
    assert run_python(code, CXX=together).strip() == "True"


def test_a_wrong_dtype_is_refused():
    input = torch.ones(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="expected float32, got"):
        torch.ops.fused_kernels.scale_min.float32(input.half(), 2.0)
    with pytest.raises(RuntimeError, match=r"input: expected float32 or .* for scale_min, got torch\.int64"):
        torch.ops.fused_kernels.scale_min(input.long(), 2.0)


TRAIN = """
import threading, time, torch, fused_kernels as fk
from fused_kernels import dispatch
def step():
    torch.manual_seed(0)
    input, layer = torch.randn(2, 3, 9, 8, requires_grad=True), fk.Conv2dScaleMin(3, 5, 3, 2.0)
    fk.scale_min(layer(input) + input[:, :, :7, :6], 2.0).square().sum().backward()
    return [t.grad for t in (input, *layer.parameters())]
def rules():
    return hasattr(torch.ops.fused_kernels, "conv_from_winners")
"""


def test_the_first_training_step_does_not_wait_for_what_makes_later_ones_faster(run_python):
    """Python's rules run meanwhile, and give the same bits."""
    code = (
        TRAIN
        + """
first, was_there = step(), rules()
dispatch.finish_builds()
second = step()
print(was_there, rules(), all(a.equal(b) for a, b in zip(first, second)))
"""
    )
    assert run_python(code).split() == ["False", "True", "True"]
    assert run_python(code).split() == ["True", "True", "True"]


def test_a_checkpointed_step_may_begin_with_one_kind_of_rules_and_end_with_the_other(run_python):
    code = (
        TRAIN
        + """
from torch.utils.checkpoint import checkpoint
def forward(input):
    return fk.scale_min(layer(input) + input[:, :, :7, :6], 2.0)
input, layer = torch.randn(2, 3, 9, 8, requires_grad=True), fk.Conv2dScaleMin(3, 5, 3, 2.0)
output = checkpoint(forward, input, use_reentrant=False)
before = rules()
dispatch.finish_builds()
mixed = torch.autograd.grad(output.sum(), [input, *layer.parameters()])
plain = torch.autograd.grad(forward(input).sum(), [input, *layer.parameters()])
print(before, rules(), all(a.equal(b) for a, b in zip(mixed, plain)))
"""
    )
    assert run_python(code).split() == ["False", "True", "True"]


def test_the_process_ends_while_something_is_built(run_python, tmp_path, forever):
    slow = script(tmp_path / "slow", f'case "$*" in *from_winners.cpp*) {forever};; esac\nexec c++ "$@"')
    start = time.monotonic()
    assert run_python(TRAIN + "step(); print(rules())", CXX=slow).strip() == "False"
    assert time.monotonic() - start < 60
    assert run_python(TRAIN + "step(); dispatch.finish_builds(); step(); print(rules())", CXX="c++").strip() == "True"


def test_what_is_being_built_is_not_looked_for_at_every_step(run_python, tmp_path, forever):
    slow = script(tmp_path / "slow", f'case "$*" in *from_winners.cpp*) {forever};; esac\nexec c++ "$@"')
    code = (
        TRAIN
        + """
from fused_kernels import build
step()
def find(*args, **options): raise AssertionError("looked for a library")
build.find = find
step(); print(rules())
"""
    )
    assert run_python(code, CXX=slow).strip() == "False"


def test_a_failing_build_in_the_background_is_said_once(run_python, tmp_path):
    broken = script(tmp_path / "broken", 'case "$*" in *from_winners.cpp*) echo boom; exit 1;; esac\nexec c++ "$@"')
    code = (
        TRAIN
        + """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step(); dispatch.finish_builds(); step(); step()
print(rules(), len([w for w in caught if "boom" in str(w.message)]))
"""
    )
    assert run_python(code, CXX=broken).split() == ["False", "1"]


def test_two_processes_at_once(run_python):
    code = PREPARE + "print(filled(9)(input, 1.0).item())"
    processes = [run_python(code, wait=False) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in answers] == ["9.0", "9.0"], answers


def test_several_libraries_at_once_in_one_process(empty_cache):
    before = os.environ["PATH"]
    jobs = [
        {"name": "scale_min", "source": FILL.replace("VALUE", "1.0"), "device": "cpu", "namespace": f"fused_kernels_test_{i}"}
        for i in range(2)
    ]
    libraries = load_all(jobs)
    assert len(set(libraries)) == 2
    assert all(library.exists() for library in libraries)
    assert os.environ["PATH"] == before


def test_a_killed_build_does_not_hang_the_next(run_python, tmp_path, forever):
    """SIGKILL in the middle of the compiler leaves half the files."""
    started = tmp_path / "started"
    slow = script(tmp_path / "slow", f'case "$*" in *scale_min*) touch {started}; {forever};; esac\nexec c++ "$@"')
    code = PREPARE + "print(filled(5)(input, 1.0).item())"
    process = run_python(code, wait=False, CXX=slow)
    wait_for(started, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert list((tmp_path / "cache").glob("scale_min-*.build-*"))
    assert not list((tmp_path / "cache").glob("scale_min-*.so"))
    assert run_python(code, CXX="c++").strip() == "5.0"
    assert not list((tmp_path / "cache").glob("scale_min-*.build-*"))


def test_an_interrupt_ends_the_compilers(run_python, tmp_path, forever):
    started, held = tmp_path / "started", tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    waits = f"exec 9> {held}; touch {started}; {forever}"
    slow = script(tmp_path / "slow", f'case "$*" in *scale_min*) {waits};; esac\nexec c++ "$@"')
    # A shell lets what it runs in the background ignore interrupts.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += PREPARE + "print(filled(5)(input, 1.0).item())"
    process = run_python(code, wait=False, CXX=slow)
    wait_for(started, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said.splitlines()[-1] == "KeyboardInterrupt"
    # The end of the file: nobody holds it open for writing.
    ended, _, _ = select.select([reader], [], [], 10)
    os.close(reader)
    assert ended
    assert run_python(code, CXX="c++").strip() == "5.0"


def test_without_a_compiler(run_python, tmp_path):
    """Importing works, PyTorch's own operations compute, and the rungs say what is missing."""
    (tmp_path / "empty").mkdir()
    code = (
        PREPARE
        + """
print(fk.scale_min(input, 2.0).item(), fk.ModelNew(3, 4, 1, 2.0)(input).shape)
with torch.no_grad():
    print(fk.explain(input, torch.ones(2, 3, 1, 1)).rung, fk.conv2d_scale_min(input, torch.ones(2, 3, 1, 1)).item())
print(fk.rungs["scale_min"].why_unavailable())
try:
    fk.rungs["scale_min"](input, 2.0)
except RuntimeError as error:
    print(error)
"""
    )
    out = run_python(code, CXX=str(tmp_path / "nothing"), PATH=str(tmp_path / "empty")).splitlines()
    assert out[:2] == ["-4.0 torch.Size([1, 1, 1, 1])", "composite 2.0"]
    for sentence in out[2:]:
        assert_one_sentence(sentence)
        assert "C++ compiler" in sentence
        assert "install" in sentence
    assert len(out) == 4


def test_a_cache_that_refuses_a_lock_is_named(empty_cache, monkeypatch):
    def refuse(lock):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(build.places, "folders", lambda: [empty_cache])
    with pytest.raises(RuntimeError, match="FUSED_KERNELS_CACHE") as error:
        fk.rungs["scale_min"].load()
    assert_one_sentence(str(error.value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_loading_what_cannot_run_here_says_why():
    with pytest.raises(RuntimeError, match="CUDA") as error:
        fk.rungs["scale_min_naive"].load()
    assert_one_sentence(str(error.value))


def test_failing_compiler_is_an_error_until_it_is_mended(run_python, tmp_path):
    compiler = tmp_path / "compiler"
    script(compiler, "echo boom; exit 1")
    code = (
        PREPARE
        + f"""
for run in range(2):
    for call in (lambda: fk.scale_min(input, 2.0), lambda: fk.rungs["scale_min"](input, 2.0)):
        try:
            print(call().item())
        except RuntimeError as error:
            print("boom" in str(error))
    open({str(compiler)!r}, "w").write('#!/bin/sh\\nexec c++ "$@"\\n')
"""
    )
    assert run_python(code, CXX=str(compiler)).split() == ["True", "True", "-4.0", "-4.0"]


def test_edit_gives_a_variant_next_to_the_original():
    input = torch.randn(2, 5, 3, 4)
    original = fk.rungs["scale_min"]
    before = original(input, 2.0)
    edited = fk.edit("scale_min", FILL.replace("VALUE", "42.0"))
    assert (edited(input, 2.0) == 42).all()
    assert original(input, 2.0).equal(before)
    assert fk.scale_min(input, 2.0).equal(before)
    assert (edited.name, edited.operator, edited.device) == ("scale_min", "scale_min", "cpu")
    assert edited.source != original.source == original.source_file.read_text(encoding="utf-8")


def test_edit_of_a_comment_gives_the_same_result():
    rung, input = fk.rungs["scale_min"], torch.randn(2, 5, 6, 7)
    assert fk.edit("scale_min", rung.source + "\n// A reader's comment.\n")(input, 2.0).equal(rung(input, 2.0))


def test_a_source_that_registers_nothing_is_an_error():
    empty = fk.edit("scale_min", FILL.replace("VALUE", "1.0").split("STABLE_TORCH")[0])
    with pytest.raises(RuntimeError, match="scale_min") as error:
        empty(torch.ones(1, 2, 3, 4), 2.0)
    assert_one_sentence(str(error.value))


def test_load_builds_every_rung_that_can_run_here():
    assert fk.load() == [name for name, rung in fk.rungs.items() if rung.why_unavailable() is None]


def test_a_syntax_error_shows_the_compilers_words():
    broken = fk.edit("scale_min", FILL.replace("VALUE", "42.0 nonsense"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="nonsense") as error:
            broken(torch.ones(1, 2, 3, 4), 2.0)
        assert "scale_min.cpp:8" in str(error.value)
    assert (fk.edit("scale_min", FILL.replace("VALUE", "43.0"))(torch.ones(1, 2, 3, 4), 2.0) == 43).all()


# CUDA without a GPU: what is found, what is missing, and that every kernel compiles for every architecture.

ARCHITECTURES = {"80": (8, 0), "90a": (9, 0), "100": (10, 0), "120": (12, 0)}
CUDA_RUNGS = [rung for rung in (*LADDER, COPY, *BACKWARD) if rung.device == "cuda" and not rung.in_triton]
# In float32: not the kernel, but make_again with mma::Small's 80 registers. The other sizes are held to none.
FLOAT32_SPILLS = ("conv_mma",)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU and a toolkit."""

    def pretend(capability, toolkit):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(toolchain, "cuda_toolkit", lambda: toolkit)

    return pretend


@pytest.mark.parametrize(
    ("capability", "codes", "words"),
    [
        ((7, 5), {75, 80, 90}, ("7.5", "8.0")),
        ((12, 0), {80, 90}, ("12.0", "12.8", "newer toolkit")),
        ((9, 0), None, ("nvcc", "pip install")),
        ((9, 0), {80, 90}, None),
    ],
    ids=["GPU too old", "toolkit too old", "no nvcc", "all there"],
)
def test_why_unavailable(gpu, capability, codes, words):
    rung = CUDA_RUNGS[0]
    gpu(capability, None if codes is None else toolchain.Toolkit(Path("/opt/cuda"), (12, 8), frozenset(codes)))
    reason = rung.why_unavailable()
    if words is None:
        assert reason is None
        return
    assert_one_sentence(reason)
    assert all(word in reason for word in words)


def test_an_operator_asks_a_device_once(monkeypatch):
    """To find the compilers takes longer than a small kernel."""
    operator = torch.ops.fused_kernels.scale_min.default
    expected = operator(torch.ones(1, 2, 3, 3), 2.0)
    monkeypatch.setattr(type(fk.rungs["scale_min"]), "why_unavailable", lambda *_: "asked again")
    assert operator(torch.ones(1, 2, 3, 3), 2.0).equal(expected)


def test_why_unavailable_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_sentence(CUDA_RUNGS[0].why_unavailable())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build of torch" in CUDA_RUNGS[0].why_unavailable()


@pytest.mark.parametrize(("capability", "name"), [(c, a) for a, c in ARCHITECTURES.items()])
def test_architecture(capability, name):
    assert toolchain.architecture(capability) == name


def test_nvcc_from_pypi_is_found_and_made_linkable(tmp_path, monkeypatch, empty_cache):
    """site-packages/nvidia/cu13 has nvcc, and libcudart.so.13 under a name and in a folder where no linker looks."""
    home = tmp_path / "site-packages" / "nvidia" / "cu13"
    for folder in ("bin", "include", "nvvm", "lib"):
        (home / folder).mkdir(parents=True)
    (home / "lib" / "libcudart.so.13").touch()
    says = {
        "--dryrun": f"echo '#$ TOP={home}' >&2",
        "--version": "echo 'release 13.0, V13'",
        "--list-gpu-code": "echo sm_80 sm_90",
    }
    nvcc = script(
        home / "bin" / "nvcc", "case $1 in\n" + "\n".join(f"{flag}) {what};;" for flag, what in says.items()) + "\nesac"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages"), *sys.path])
    candidates = list(toolchain._nvcc_candidates())
    assert nvcc in candidates

    monkeypatch.setattr(
        toolchain, "_nvcc_candidates", lambda: [None, str(tmp_path / "absent"), *candidates[candidates.index(nvcc) :]]
    )
    toolkit = toolchain.cuda_toolkit.__wrapped__()
    assert toolkit == toolchain.Toolkit(home.resolve(), (13, 0), frozenset({80, 90}))

    for _ in range(2):  # made, then found
        shim = toolchain.linkable_home(toolkit)
        assert (shim / "lib64" / "libcudart.so").resolve() == (home / "lib" / "libcudart.so.13").resolve()
        assert (shim / "bin" / "nvcc").samefile(nvcc)
        assert (shim / "include").is_dir()
        assert (shim / "nvvm").is_dir()

    (home / "lib" / "libcudart.so.13").unlink()
    shutil.rmtree(shim)
    with pytest.raises(RuntimeError, match="no libcudart") as error:
        toolchain.linkable_home(toolkit)
    assert_one_sentence(str(error.value))


def test_cuda_home_goes_before_all_other_toolkits(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    assert next(toolchain._nvcc_candidates()) == "/chosen/bin/nvcc"


def cuda_jobs():
    toolkit = toolchain.cuda_toolkit()
    for rung in CUDA_RUNGS:
        for arch, capability in ARCHITECTURES.items():
            # Of the backward pass the oldest and Hopper are enough: it has no instructions that others lack.
            if rung in BACKWARD and arch not in ("80", "90a"):
                continue
            if rung.runs_on(capability) and capability[0] * 10 + capability[1] in toolkit.architectures:
                namespace = f"fused_kernels_test_sm_{arch}"
                yield {"name": rung.name, "source": rung.source, "device": "cuda", "namespace": namespace, "arch": arch}


def winners_jobs():
    """Give those that give winners, too, on one architecture: they differ in the epilogue alone."""
    for job in cuda_jobs():
        if job["arch"] == "90a" and any(rung.name == job["name"] and rung.winners for rung in CUDA_RUNGS):
            yield {**job, "winners": True}


@pytest.mark.skipif(toolchain.cuda_toolkit() is None, reason="no nvcc")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_every_cuda_rung_builds_for_every_architecture(monkeypatch):
    """And loads, without a GPU; a register spill is an error, whose message names the kernel."""
    jobs = [*cuda_jobs(), *winners_jobs()]
    spilling = [job for job in jobs if job["name"] in FLOAT32_SPILLS]
    libraries = load_all([{**job, "dtype": "float32"} for job in spilling])
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=--warn-on-spills,--warning-as-error")
    libraries += load_all([job for job in jobs if job not in spilling])
    assert len(set(libraries)) == len(jobs) >= len(CUDA_RUNGS)
    for job in spilling:
        large = job["source"].replace("Tiles()", "List<Medium, Large>()")
        assert large != job["source"]
        others = [dtype for dtype in rungs[job["name"]].overloads if dtype != "float32"]
        libraries += load_all([{**job, "dtype": "float32", "source": large}, *({**job, "dtype": dtype} for dtype in others)])
    assert all(library.exists() for library in libraries)


@pytest.mark.skipif(toolchain.cuda_toolkit() is None, reason="no nvcc")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize("name", [rung.name for rung in CUDA_RUNGS if "wgmma" in rung.name])
@pytest.mark.parametrize("winners", [False, True])
def test_parts_make_one_library(name, winners, empty_cache):
    """It loads, so nothing that one part needs of another is missing, and it registers the overload."""
    (job,) = (job for job in cuda_jobs() if job["name"] == name)
    namespace = f"fused_kernels_test_parts_{winners}"
    build.load(**{**job, "namespace": namespace}, dtype="float32", winners=winners, at_once=3)
    overload = f"{namespace}::{name}{'_winners' if winners else ''}.float32"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CUDA")


@pytest.mark.skipif(toolchain.cuda_toolkit() is None, reason="no nvcc")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize("name", [rung.name for rung in CUDA_RUNGS if "wgmma" in rung.name])
def test_wgmma_is_not_serialised(name, tmp_path):
    """Where ptxas cannot follow which sums are under way, it makes the tensor cores wait, and says so in a remark alone."""
    (job,) = (job for job in cuda_jobs() if job["name"] == name)
    (tmp_path / f"{name}.cu").write_text(job["source"], encoding="utf-8")
    # Compiled here, not by build.load: a cached library was compiled silently, by a checkout that may be gone.
    folders = [*toolchain.include_paths("cuda"), *toolchain.torch_include_paths()]
    flags = toolchain.compiler_flags("cuda", job["namespace"], [job["arch"]])
    nvcc = toolchain.cuda_toolkit().home / "bin" / "nvcc"
    said = subprocess.run(
        [nvcc, "-Xptxas=-v", "-cubin", *flags, *(f"-I{folder}" for folder in folders), f"{name}.cu"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert said.returncode == 0, said.stderr
    remarks = said.stdout + said.stderr
    assert "conv_wgmma_kernel" in remarks
    assert not re.findall(r".*serialized.*", remarks)


def test_one_library_serves_every_visible_gpu(monkeypatch):
    """The current device may not be the tensor's: build for all that can run a kernel, and for no other."""
    capabilities = [(9, 0), (7, 5), (8, 6), (9, 0), (99, 0)]
    monkeypatch.setattr(
        toolchain, "cuda_toolkit", lambda: toolchain.Toolkit(Path("/nowhere"), (13, 0), frozenset({75, 80, 86, 90}))
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    library = build.Library("somewhere", "", "cuda")
    flags = library.flags(library.buildable_archs())
    assert [flag for flag in flags if "gencode" in flag] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


# What is old is removed, and nothing else.


def make_build(cache, stem, endings=(".so", ".sha256", ".lock")):
    """Make the files of a build that is not this version's."""
    cache.mkdir(exist_ok=True)
    paths = [cache / f"{stem}{ending}" for ending in endings]
    for path in paths:
        path.write_bytes(b"x" * 1000)
    return paths


def test_clean_removes_what_this_version_would_not_load(empty_cache, capsys):
    library = fk.rungs["scale_min"].library("float32")
    needed = build.make(**library)
    left = empty_cache / f"{needed.stem}.build-half"
    left.mkdir()
    half_made = build.Library(**{**library, "dtype": "float64"}).native_file().removesuffix(".so")
    gone = make_build(empty_cache, half_made, [".so"])  # without its digest
    gone += make_build(empty_cache, "conv_mma-fedcba9876543210")
    gone += make_build(empty_cache, "conv_mma.float32.sm_80.sm_90a-fedcba9876543210")
    gone += make_build(empty_cache, "conv_mma-aaaaaaaaaaaaaaaa", [".lock"])
    before = empty_cache / "conv_mma-0123456789abcdef"  # as libraries lay in earlier versions
    before.mkdir()
    for name in ("conv_mma.so", "main.cpp", "build.ninja", ".ninja_log"):
        (before / name).touch()
    foreign = [empty_cache / "notes-0123456789abcdef", empty_cache / "cuda-0123456789ab", empty_cache / "mine"]
    for folder in foreign:
        folder.mkdir()
        (folder / "letter.doc").touch()
    at_work = make_build(empty_cache, "conv_direct-0123456789abcdef")
    with filelock.FileLock(empty_cache / "conv_direct-0123456789abcdef.lock"):
        main(["doctor", "--clean"])
    assert re.fullmatch(r"removed \d+ old builds, 0\.0 MB, from .*\n", capsys.readouterr().out)
    assert needed.exists()
    assert not left.exists()
    assert not before.exists()
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in (*at_work[:2], *foreign))
    main(["doctor", "--clean"])
    assert not [path for path in at_work if path.exists()]
    main(["doctor", "--clean"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("removed 0 old builds")
    assert build.make(**library) == needed


def test_clean_says_where_it_cannot_write(empty_cache, monkeypatch):
    make_build(empty_cache, "conv_mma-fedcba9876543210")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="cannot be written") as error:
        main(["doctor", "--clean"])
    assert_one_sentence(str(error.value))


FORK = """
import os, sys, time
import torch
from fused_kernels import dispatch, jobs, scale_min

dispatch.auto.is_loaded()
dispatch.from_winners.is_loaded()
while not any(job._processes for job in jobs._jobs):
    time.sleep(0.01)
if (child := os.fork()) == 0:
    scale_min(torch.randn(1, 3, 4, 4), 2.0)
    sys.exit(0)  # with what runs at the end of a process
assert os.waitpid(child, 0)[1] == 0
dispatch.finish_builds()
assert dispatch.auto.is_loaded() and dispatch.from_winners.is_loaded()
print("both built")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_libraries_are_built(run_python):
    """The child builds what it needs, and leaves its parent's compilers alone."""
    assert run_python(FORK).strip() == "both built"
