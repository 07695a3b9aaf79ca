"""check, bench, plots and the command line: what they compute, on a workload small enough for a test."""

import dataclasses
import functools
import math

import pytest
import torch
from conftest import implementations

import fused_kernels as fk
from fused_kernels import __main__, bench, check, plots, reference
from fused_kernels.rungs import LADDER

SMALL = {"in_channels": 3, "out_channels": 8, "height": 12, "width": 14}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command line records on the CPU; without torch.compile, whose first call takes longer than all tests here."""
    data = tmp_path_factory.mktemp("records") / "data"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(reference, name, value)
        patch.setattr(bench, "_compile_modes", lambda device, quick: [])
        patch.setattr(bench, "run", functools.partial(bench.run, seconds=0.01))
        __main__.main(["bench", "--device", "cpu", "--quick", "--data", str(data)])
        assert not data.exists()
        __main__.main(["bench", "--device", "cpu", "--quick", "--record", "--data", str(data)])
    return bench.records(data=data)


# check: does it find what is wrong, and nothing else?


@pytest.mark.parametrize(("rung", "device"), [p for o in check.DTYPES for p in implementations(o, public=False)])
def test_verdict_of_every_rung(rung, device):
    verdict = check.verdict(rung, device, nan=rung.name != "scale_min_naive")
    assert verdict.correct, str(verdict)


def test_verdict_reads_the_same_every_time():
    torch.manual_seed(1)
    first = str(check.verdict(fk.rungs["scale_min"]))
    torch.manual_seed(2)
    assert str(check.verdict(fk.rungs["scale_min"])) == first


FAULTY = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
Tensor scale_min(const Tensor& input, double scale) {
  return torch::stable::amax(input, {1}, true);
}
STABLE_TORCH_LIBRARY_IMPL(FUSED_KERNELS_NAMESPACE, CPU, m) { m.impl("scale_min", TORCH_BOX(&scale_min)); }
"""


def test_verdict_of_a_faulty_kernel():
    """It takes the maximum and ignores the scale, which is right for the empty batch alone."""
    verdict = check.verdict(fk.edit("scale_min", FAULTY))
    assert not verdict.correct
    right = [line for line in verdict.lines if not line.endswith("WRONG")]
    assert [line.split(" ")[:2] for line in right] == [["empty", "batch"]]
    assert f"1 of {len(verdict.lines)} cases correct" in str(verdict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_verdict_of_an_unavailable_rung_says_why():
    rung = next(rung for rung in LADDER if rung.device == "cuda")
    with pytest.raises(RuntimeError) as error:
        check.verdict(rung)
    assert rung.why_unavailable() in str(error.value)


def test_expected_is_float64():
    input, weight, bias = torch.randn(2, 3, 6, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    result = check.expected(input, weight, bias, -2.0, stride=2, padding=1)
    conv = torch.conv2d(input.double(), weight.double(), bias.double(), 2, 1)
    assert result.equal((conv * -2.0).amin(1, keepdim=True))
    assert check.expected(input, scale=3.0).equal((input.double() * 3.0).amin(1, keepdim=True))


def test_errors():
    expected = torch.tensor([1.0, -2.0, 4.0, math.inf, math.nan], dtype=torch.float64)
    result = expected.float() + torch.tensor([0.0, 0.5, -1.5, 0.0, 0.0])
    found = check.errors(result, expected)
    assert found.max == 1.5
    assert found.rms == pytest.approx(math.sqrt((0.25 + 2.25) / 3))
    assert check.errors(expected.float(), expected)[:2] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("place", "value"), [(0, math.nan), (0, math.inf), (1, 0.0), (1, math.inf), (2, math.nan), (2, -math.inf)]
)
def test_errors_are_infinite_where_specials_differ(place, value):
    expected = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    result = expected.float()
    result[place] = value
    assert check.errors(result, expected).max == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tolerance_of_scale_min_is_one_rounding(dtype):
    expected = torch.randn(1000, dtype=torch.float64)
    assert check.errors(expected.to(dtype), expected).within(check.tolerance(dtype))
    off_by_one = (expected.to(dtype).double() * (1 + 2 * torch.finfo(dtype).eps)).to(dtype)
    assert not check.errors(off_by_one, expected).within(check.tolerance(dtype))


# bench: what is recorded.


def test_run_measures_all_that_runs_here(measured):
    found = {(r.operator, r.rung) for r in measured}
    here = {(r.operator, r.name) for r in LADDER if r.device in (None, "cpu") and not r.why_unavailable()}
    whole = {("conv2d_scale_min", name) for _, name in here} | {("conv2d_scale_min", "eager"), ("scale_min", "eager")}
    ceilings = {("ceiling", name) for name in ("copy", "read", "matmul")}
    assert here | whole | ceilings | {("conv2d", "library")} <= found
    assert {r.layout for r in measured if r.operator == "conv2d_scale_min"} == {"NCHW", "channels_last"}
    assert len({r.run for r in measured}) == 1
    assert all(r.correct for r in measured)
    assert {(r.machine, r.direction, r.dtype) for r in measured} == {("cpu", "forward", "float32")}


def test_run_counts_bytes_and_flops(measured):
    (fused,) = bench.select(measured, rung="conv2d_scale_min", layout="NCHW")
    assert fused.shape == "2x3x12x14 * 8x3x3x3"
    assert fused.flops == 2 * 2 * 8 * 10 * 12 * 3 * 3 * 3
    assert fused.bytes == 4 * (2 * 3 * 12 * 14 + 8 * 3 * 3 * 3 + 8 + 2 * 10 * 12)
    (alone,) = bench.select(measured, operator="scale_min", rung="scale_min", layout="NCHW")
    assert alone.bytes == 4 * (2 * 8 * 10 * 12 + 2 * 10 * 12)
    assert fused.gbps == pytest.approx(fused.bytes / (fused.p50_ms * 1e-3) / 1e9)
    assert fused.tflops == pytest.approx(fused.flops / (fused.p50_ms * 1e-3) / 1e12)


@pytest.fixture
def other_shapes(monkeypatch):
    """Time two small shapes on the CPU; without torch.compile, whose first call takes longer than all tests here."""
    monkeypatch.setattr(bench, "SHAPES", [((32, 3, 7, 9), 5, 3, 2, 1), ((16, 512, 4, 4), 64, 3, 1, 0)])
    monkeypatch.setattr(bench, "_compiled", lambda function, mode, *args: functools.partial(function, *args))

    def run(dtype):
        device = torch.device("cpu")
        with torch.no_grad():
            parts = bench._other_shapes(bench._environment(device, None), device, [dtype], seconds=0.0)
            return [record for part in parts for record in part]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_are_timed_with_what_is_chosen_for_them(other_shapes, dtype):
    found = other_shapes(dtype)
    assert all(r.correct and r.p50_ms > 0 and 0 < r.rms_error < 0.01 for r in found)
    for layout in ("NCHW", "channels_last"):
        chosen = bench.select(found, operator="choice", layout=layout)
        first = "2x3x7x9 * 5x3x3x3 stride 2 padding 1"
        assert [r.rung for r in chosen if r.shape == first] == ["eager", "compile", "conv2d_scale_min"]
        assert [r.rung for r in chosen if r.shape != first] == ["eager", "compile", "composite"]
    assert [r.rung for r in bench.select(found, operator="host")] == ["eager", "compile", "conv2d_scale_min", "operator"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_are_timed_alone_and_recorded_apart(other_shapes, monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(bench, "LAYERS", bench.SHAPES)
    monkeypatch.setattr(bench, "data_dir", lambda: tmp_path)
    __main__.main(["bench", "--device", "cpu", "--layers", "--record", "--dtypes", dtype])
    assert not bench.records(data=tmp_path)
    found = bench.records(data=tmp_path / "layers")
    assert {(r.operator, r.dtype) for r in found} == {("choice", dtype)}
    assert len({(r.shape, r.layout) for r in found}) == 4


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Record small training steps on the CPU; without torch.compile, whose first call takes longer than all tests here."""
    for name, value in SMALL.items():
        monkeypatch.setattr(reference, name, value)
    monkeypatch.setattr(bench, "LAYERS", [((32, 3, 7, 9), 5, 3, 2, 1), ((1, 3, 7, 9), 5, 3, 1, 1), ((32, 4, 5, 6), 3, 1, 1, 0)])
    monkeypatch.setattr(bench, "_compile_modes", lambda device, quick: [])
    monkeypatch.setattr(bench, "run", functools.partial(bench.run, seconds=0.01))
    monkeypatch.setattr(bench, "data_dir", lambda: tmp_path)

    def run(*options):
        __main__.main(["bench", "--device", "cpu", "--training", "--record", *options])
        (path,) = tmp_path.rglob("cpu.csv")
        return path.parent.name, bench.records(data=path.parent)

    return run


def test_training_steps_and_their_parts_are_recorded_apart(training):
    folder, found = training()
    assert folder == "training"
    for layout in ("NCHW", "channels_last"):
        here = bench.select(found, layout=layout)
        steps = [(r.rung, r.shape) for r in here if r.direction == "training"]
        shape = "2x3x12x14 * 8x3x3x3"
        assert steps == [(n, shape + kind) for kind in ("", ", normal", ", smooth") for n in ("eager", "conv2d_scale_min")]
        assert [r.rung for r in here if r.direction == "forward with winners"] == ["conv2d_scale_min"]
        parts = [r for r in here if r.direction == "backward"]
        assert [r.rung for r in parts] == ["grad_input", "library", "grad_weight", "library"]
        assert all(0 < r.rms_error < 1e-6 for r in parts)
        dense = 2 * 2 * 8 * 10 * 12 * 3 * 3 * 3
        assert {r.rung: r.flops for r in parts} == {"grad_input": dense // 8, "grad_weight": dense // 8, "library": dense}
    assert all(r.p50_ms > 0 for r in found)


def test_training_steps_of_layers_are_recorded_apart(training):
    folder, found = training("--layers")
    assert folder == "training-layers"
    assert {(r.operator, r.direction) for r in found} == {("choice", "training")}
    for layout in ("NCHW", "channels_last"):
        assert [(r.rung, r.shape) for r in bench.select(found, layout=layout)] == [
            (name, shape)
            for shape in ("2x3x7x9 * 5x3x3x3 stride 2 padding 1", "2x4x5x6 * 3x4x1x1")
            for name in ("eager", "conv2d_scale_min")
        ]


def test_layers_cover_what_is_promised():
    """Sizes from 56 to 14 with 32 images and with one; kernels of 1, 3, 5 and 7."""
    for images in (32, 1):
        here = [(size[-1], kernel) for (count, *size), _, kernel, _, _ in bench.LAYERS if count == images]
        assert {(size, kernel) for size in (56, 28, 14) for kernel in (1, 3, 5)} <= set(here)
        assert {(size, 7) for size in (56, 28, 14, 224)} <= set(here)


def test_a_peer_that_fails_on_a_shape_is_skipped(other_shapes, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(bench, "_compiled", fail)
    found = other_shapes(torch.float32)
    assert {r.rung for r in found} == {"eager", "conv2d_scale_min", "composite", "operator"}
    assert "skipped compile" in capsys.readouterr().out


@pytest.mark.gpu
def test_replay_runs_every_call():
    total, one = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    again = bench.replay(lambda: total.add_(one), calls=4)
    before = total.clone()
    again()
    assert torch.equal(total, before + 4)


def test_records_go_through_a_file(measured, tmp_path):
    bench.append(measured, tmp_path)
    first = (tmp_path / "cpu.csv").read_bytes()
    later = [dataclasses.replace(r, run="later", date="2999-01-01T00:00:00+00:00") for r in measured]
    elsewhere = [dataclasses.replace(measured[0], machine="nvidia-x1", device='a "GPU", of sorts')]
    bench.append(later + elsewhere, tmp_path)
    assert (tmp_path / "cpu.csv").read_bytes().startswith(first)
    assert bench.records("cpu", tmp_path) == measured + later
    assert bench.records("nvidia-x1", tmp_path) == elsewhere
    assert bench.records(data=tmp_path) == measured + later + elsewhere
    assert bench.records("absent", tmp_path) == []
    assert bench.latest(bench.records(data=tmp_path), machine="cpu") == later
    assert bench.latest(measured, machine="absent") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workload_is_the_reference_models(dtype):
    load = bench.workload("cpu", dtype, channels_last=True, batch=1)
    assert load.input.shape == (1, 64, 256, 256)
    assert load.weight.shape == (128, 64, 3, 3)
    assert load.scale == 2.0
    assert load.input.is_contiguous(memory_format=torch.channels_last)
    assert load.input.dtype == load.weight.dtype == load.bias.dtype == dtype
    assert 0 <= load.input.min() < 0.01
    assert 0.99 < load.input.max() <= 1
    assert load.input.equal(bench.workload("cpu", dtype, batch=1).input)


def test_measure_calls_after_warming_up():
    calls = []
    timing = bench.measure(lambda: calls.append(1), "cpu", seconds=0.0)
    assert 5 <= timing.repeats < len(calls)
    assert 0 < timing.p20 <= timing.p50 <= timing.p80


def test_compare_calls_before_every_call():
    calls = []
    bench.compare({"": lambda: calls.append("call")}, "cpu", seconds=0.0, warm_up=0.0, before=lambda: calls.append("before"))
    assert calls == ["before", "call"] * (len(calls) // 2)


def test_machine_is_a_file_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert bench.machine("cuda") == "nvidia-h200-sxm"
    assert bench.machine("cpu") == "cpu"


# plots: what is drawn from records.


def test_table_has_one_row_per_rung_with_speedups(measured):
    text = plots.table(measured)
    for name in {r.rung for r in measured if r.operator == "conv2d_scale_min"} - {"reference"}:
        assert len([line for line in text.splitlines() if line.startswith((f"| {name} |", f"| `{name}` |"))]) == 1
    (eager,), (ours,) = (
        bench.select(measured, rung=n, layout="NCHW", operator="conv2d_scale_min") for n in ("eager", "composite")
    )
    (row,) = (line for line in text.splitlines() if "`composite`" in line)
    assert f"{eager.p50_ms / ours.p50_ms:.2f}" in row
    assert "(*)" not in text
    assert "(*)" in plots.table([dataclasses.replace(r, correct=r.rung != "composite") for r in measured])


def test_update_readme_changes_what_is_between_the_markers(measured, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{plots.BEGIN}\nold\n{plots.END}\nafter\n")
    plots.update_readme(path, measured)
    text = path.read_text()
    assert text.startswith(f"before\n\n{plots.BEGIN}\n")
    assert text.endswith(f"{plots.END}\nafter\n")
    assert plots.table(measured) in text
    assert "old" not in text
    plots.update_readme(path, measured)
    assert path.read_text() == text
    path.write_text("no markers")
    with pytest.raises(ValueError, match="path: "):
        plots.update_readme(path, measured)


def test_readme_shows_the_latest_gpu_first_and_the_cpu_last(measured, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{plots.BEGIN}\n{plots.END}\n")
    names = ["nvidia-h200", "nvidia-h100-80gb-hbm3", "cpu"]
    records = [dataclasses.replace(r, machine=name, device=f"<{name}>") for name in sorted(names) for r in measured]
    plots.update_readme(path, records)
    text = path.read_text()
    assert sorted(names, key=lambda name: text.index(f"<{name}>")) == names


def test_figures_are_drawn_and_reproducible(measured, tmp_path):
    first, second = (plots.save_all(measured, tmp_path / folder) for folder in ("one", "two"))
    assert {"access-pattern.png", "ladder-cpu.png", "roofline-cpu.png", "bandwidth-cpu.png"} <= {p.name for p in first}
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes().startswith(b"\x89PNG")
        assert one.read_bytes() == two.read_bytes()


def test_training_records_have_a_table_and_a_figure(tmp_path):
    training = bench.latest(bench.records(data=bench.data_dir() / "training"), machine="nvidia-h200")
    text = plots.training_table(training)
    (eager,), (ours,) = (
        [
            r
            for r in training
            if r.direction == "training"
            and r.precision == "tf32"
            and r.layout == "NCHW"
            and "," not in r.shape
            and r.rung == name
        ]
        for name in ("eager", "conv_wgmma")
    )
    (row,) = (line for line in text.splitlines() if line.startswith("| **fused_kernels** |"))
    assert f"{eager.p50_ms / ours.p50_ms:.2f}x" in row
    (path,) = (path for path in plots.save_all([], tmp_path, training) if path.name.startswith("training"))
    assert path.read_bytes().startswith(b"\x89PNG")


# The command line.


def test_doctor_says_of_each_rung_whether_it_runs(capsys):
    __main__.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for rung in LADDER:
        (line,) = (line for line in lines if line.split(maxsplit=1)[:1] == [rung.name])
        assert line.endswith(rung.why_unavailable() or "ready")


def test_figures_draws_what_is_recorded(measured, tmp_path, capsys):
    data = tmp_path / "figures" / "data"
    with pytest.raises(SystemExit, match="bench --record"):
        __main__.main(["figures", "--data", str(data)])
    bench.append(measured, data)
    __main__.main(["figures", "--data", str(data)])
    printed = capsys.readouterr().out.split()
    assert str(tmp_path / "figures" / "ladder-cpu.png") in printed
    assert all((tmp_path / "figures" / line).exists() for line in printed)
