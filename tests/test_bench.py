"""check, bench, plots, tables and the command line: what they compute, on a workload small enough for a test."""

import dataclasses
import functools
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import implementations

import fused_kernels as fk
from fused_kernels import __main__, bench, check, plots, reference, tables
from fused_kernels.bench import choices, clock, comparison, environment, forward, peers, records, views, workloads
from fused_kernels.rungs import LADDER

SMALL = {"in_channels": 3, "out_channels": 8, "height": 12, "width": 14}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command line records on the CPU; without torch.compile, whose first call takes longer than all tests here."""
    data = tmp_path_factory.mktemp("records") / "data"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(reference, name, value)
        patch.setattr(peers, "compile_modes", lambda device, quick: [])
        patch.setattr(bench, "run", functools.partial(bench.run, seconds=0.01))
        __main__.main(["bench", "--device", "cpu", "--quick", "--data", str(data)])
        assert not data.exists()
        __main__.main(["bench", "--device", "cpu", "--quick", "--record", "--data", str(data)])
    return records.read(data=data)


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
    (fused,) = records.select(measured, rung="conv2d_scale_min", layout="NCHW")
    assert fused.shape == "2x3x12x14 * 8x3x3x3"
    assert fused.flops == 2 * 2 * 8 * 10 * 12 * 3 * 3 * 3
    assert fused.bytes == 4 * (2 * 3 * 12 * 14 + 8 * 3 * 3 * 3 + 8 + 2 * 10 * 12)
    (alone,) = records.select(measured, operator="scale_min", rung="scale_min", layout="NCHW")
    assert alone.bytes == 4 * (2 * 8 * 10 * 12 + 2 * 10 * 12)
    assert fused.gbps == pytest.approx(fused.bytes / (fused.p50_ms * 1e-3) / 1e9)
    assert fused.tflops == pytest.approx(fused.flops / (fused.p50_ms * 1e-3) / 1e12)


@pytest.fixture
def other_shapes(monkeypatch):
    """Time two small shapes on the CPU; without torch.compile, whose first call takes longer than all tests here."""
    monkeypatch.setattr(workloads, "SHAPES", [((32, 3, 7, 9), 5, 3, 2, 1), ((16, 512, 4, 4), 64, 3, 1, 0)])
    monkeypatch.setattr(peers, "compiled", lambda function, mode, *args: functools.partial(function, *args))

    def run(dtype):
        device = torch.device("cpu")
        parts = forward.other_shapes(environment.run_info(device), device, [dtype], seconds=0.0)
        return [record for part in parts for record in part]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_are_timed_with_what_is_chosen_for_them(other_shapes, dtype):
    found = other_shapes(dtype)
    assert all(r.correct and r.p50_ms > 0 and 0 < r.rms_error < 0.01 for r in found)
    for layout in ("NCHW", "channels_last"):
        chosen = records.select(found, operator="choice", layout=layout)
        first = "2x3x7x9 * 5x3x3x3 stride 2 padding 1"
        assert [r.rung for r in chosen if r.shape == first] == ["eager", "compile", "conv2d_scale_min"]
        assert [r.rung for r in chosen if r.shape != first] == ["eager", "compile", "composite"]
    assert [r.rung for r in records.select(found, operator="host")] == ["eager", "compile", "conv2d_scale_min", "operator"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_are_timed_alone_and_recorded_apart(other_shapes, monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(workloads, "LAYERS", workloads.SHAPES)
    monkeypatch.setattr(records, "data_dir", lambda: tmp_path)
    __main__.main(["bench", "--device", "cpu", "--layers", "--record", "--dtypes", dtype])
    assert not records.read(data=tmp_path)
    found = records.read(data=tmp_path / "layers")
    assert {(r.operator, r.dtype) for r in found} == {("choice", dtype)}
    assert len({(r.shape, r.layout) for r in found}) == 4


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Record small training steps on the CPU; without torch.compile, whose first call takes longer than all tests here."""
    for name, value in SMALL.items():
        monkeypatch.setattr(reference, name, value)
    monkeypatch.setattr(
        workloads, "LAYERS", [((32, 3, 7, 9), 5, 3, 2, 1), ((1, 3, 7, 9), 5, 3, 1, 1), ((32, 4, 5, 6), 3, 1, 1, 0)]
    )
    monkeypatch.setattr(peers, "compile_modes", lambda device, quick: [])
    monkeypatch.setattr(bench, "run", functools.partial(bench.run, seconds=0.01))
    monkeypatch.setattr(records, "data_dir", lambda: tmp_path)

    def run(*options):
        __main__.main(["bench", "--device", "cpu", "--training", "--record", *options])
        (path,) = tmp_path.rglob("cpu.csv")
        return path.parent.name, records.read(data=path.parent)

    return run


def test_training_steps_and_their_parts_are_recorded_apart(training):
    folder, found = training()
    assert folder == "training"
    for layout in ("NCHW", "channels_last"):
        here = records.select(found, layout=layout)
        steps = [(r.rung, r.shape) for r in here if r.direction == "training"]
        shape = "2x3x12x14 * 8x3x3x3"
        assert steps == [(n, shape + kind) for kind in ("", ", normal", ", smooth") for n in ("eager", "conv2d_scale_min")]
        assert [r.rung for r in here if r.direction == "forward with winners"] == ["conv2d_scale_min"]
        parts = [r for r in here if r.direction == "backward"]
        assert [r.rung for r in parts] == ["grad_input", "library", "grad_weight", "library"]
        assert all(0 < r.rms_error < 1e-6 for r in parts)
        dense = 2 * 2 * 8 * 10 * 12 * 3 * 3 * 3
        counted = {r.rung: r.flops for r in here if r.direction == "training"}
        assert counted == {"eager": 3 * dense, "conv2d_scale_min": dense + 2 * (dense // 8)}
        assert {r.rung: r.flops for r in parts} == {"grad_input": dense // 8, "grad_weight": dense // 8, "library": dense}
    assert all(r.p50_ms > 0 for r in found)


def test_training_steps_of_layers_are_recorded_apart(training):
    folder, found = training("--layers")
    assert folder == "training-layers"
    assert {(r.operator, r.direction) for r in found} == {("choice", "training")}
    for layout in ("NCHW", "channels_last"):
        assert [(r.rung, r.shape) for r in records.select(found, layout=layout)] == [
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

    monkeypatch.setattr(peers, "compiled", fail)
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
    records.append(measured, tmp_path)
    first = (tmp_path / "cpu.csv").read_bytes()
    later = [dataclasses.replace(r, run="later", date="2999-01-01T00:00:00+00:00") for r in measured]
    elsewhere = [dataclasses.replace(measured[0], machine="nvidia-x1", device='a "GPU", of sorts')]
    records.append(later + elsewhere, tmp_path)
    assert (tmp_path / "cpu.csv").read_bytes().startswith(first)
    assert records.read("cpu", tmp_path) == measured + later
    assert records.read("nvidia-x1", tmp_path) == elsewhere
    assert records.read(data=tmp_path) == measured + later + elsewhere
    assert records.read("absent", tmp_path) == []
    assert records.latest(records.read(data=tmp_path), machine="cpu") == later
    assert records.latest(measured, machine="absent") == []


def test_a_file_from_before_the_clock_column_is_read_and_goes_on(measured, tmp_path):
    records.append(measured[:2], tmp_path)
    file = tmp_path / "cpu.csv"
    head, *lines = (line.rpartition(b",")[0] for line in file.read_bytes().splitlines())
    assert head.endswith(b",correct")
    file.write_bytes(b"\n".join([head, *lines, b""]))
    assert records.read(data=tmp_path) == measured[:2]
    later = dataclasses.replace(measured[2], clock="sustained")
    for _ in range(2):
        records.append([later], tmp_path)
    assert file.read_bytes().startswith(b"\n".join([head + b",clock", *lines, b""]))
    assert records.read(data=tmp_path) == [*measured[:2], later, later]


def test_records_in_turns_are_selected_unless_others_are_asked_for(measured):
    both = with_sustained(measured)
    (one,) = records.select(both, rung="conv2d_scale_min", layout="NCHW")
    (other,) = records.select(both, rung="conv2d_scale_min", layout="NCHW", clock="sustained")
    assert (one.clock, other.clock) == ("in turns", "sustained")
    assert records.latest(both) == records.select(both) == measured
    assert records.latest(both, clock=records.CLOCKS) == records.select(both, clock=records.CLOCKS) == both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workload_is_the_reference_models(dtype):
    work = bench.workload("cpu", dtype, channels_last=True, batch=1)
    assert work.input.shape == (1, 64, 256, 256)
    assert work.weight.shape == (128, 64, 3, 3)
    assert work.scale == 2.0
    assert work.input.is_contiguous(memory_format=torch.channels_last)
    assert work.input.dtype == work.weight.dtype == work.bias.dtype == dtype
    assert 0 <= work.input.min() < 0.01
    assert 0.99 < work.input.max() <= 1
    assert work.input.equal(bench.workload("cpu", dtype, batch=1).input)


def test_measure_calls_after_warming_up():
    calls = []
    timing = bench.measure(lambda: calls.append(1), "cpu", seconds=0.0)
    assert 5 <= timing.repeats < len(calls)
    assert 0 < timing.p20 <= timing.p50 <= timing.p80


def test_compare_calls_before_every_call():
    calls = []
    bench.compare({"": lambda: calls.append("call")}, "cpu", seconds=0.0, warm_up=0.0, before=lambda: calls.append("before"))
    assert calls == ["before", "call"] * (len(calls) // 2)


class Gpu:
    """Stands for a GPU that becomes slower after a while, and is never caught up with."""

    def __init__(self):
        self.end, self.ahead = 0.0, []

    def call(self):
        self.end += 1e-3 if self.end < 1.5 else 1.25e-3

    def event(self, enable_timing):
        return GpuEvent(self)


class GpuEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.end

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)

    def synchronize(self):
        self.gpu.ahead.append(self.gpu.end - self.at)


@pytest.fixture
def busy(monkeypatch):
    """Give what a pretended GPU had before it whenever it was waited for, and the timing of its calls."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    timing = clock.sustained(gpu.call, torch.device("cuda"))
    return gpu.ahead, timing


def test_sustained_counts_the_last_second_alone(busy):
    _, timing = busy
    assert [timing.p20, timing.p50, timing.p80] == pytest.approx([1.25e-3] * 3)
    assert 1.0 < timing.repeats * timing.p50 < 1.05


def test_sustained_never_lets_the_gpu_wait_nor_runs_far_ahead(busy):
    ahead, _ = busy
    assert min(ahead) > 0.05
    assert max(ahead) < 0.1


def test_sustained_is_of_gpus_alone():
    with pytest.raises(ValueError, match="device: expected a GPU, got cpu"):
        bench.sustained(lambda: None, torch.device("cpu"))


@pytest.mark.gpu
def test_sustained_counts_some_of_the_calls():
    calls, x = [], torch.ones(2**20, device="cuda")
    timing = bench.sustained(lambda: calls.append(x.add_(1)), x.device, seconds=0.02)
    assert 0 < timing.repeats < len(calls)
    assert 0 < timing.p20 <= timing.p50 <= timing.p80


def test_what_is_right_is_recorded_in_both_clock_states():
    input = torch.randn(2, 8, 5, 6)
    functions = {"eager": lambda: reference.scale_min(input, 2.0), "compile": lambda: reference.scale_min(input, 3.0)}
    subject = records.Subject(operator="", rung="", precision="ieee", dtype="float32", layout="NCHW", shape="")
    compared = comparison.Comparison(
        environment.run_info(torch.device("cpu")), subject, input, check.expected(input, scale=2.0)
    )
    first, second = compared.run(
        [comparison.Candidate(name, lambda f=f: f, 8, 6, "scale_min") for name, f in functions.items()],
        lambda functions: dict.fromkeys(functions, bench.Timing(1e-3, 2e-3, 3e-3, 10)),
        sustained=lambda function: bench.Timing(4e-3, 5e-3, 6e-3, 10),
    )
    assert (first.rung, first.clock, first.p50_ms) == ("eager", "in turns", 2.0)
    times = {"p20_ms": 4.0, "p50_ms": 5.0, "p80_ms": 6.0}
    assert second == dataclasses.replace(first, clock="sustained", **times)


def test_a_cpu_is_timed_in_turns_alone(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(reference, name, value)
    monkeypatch.setattr(peers, "compile_modes", lambda device, quick: [])
    work = bench.workload("cpu")
    found = forward._whole_model(environment.run_info(torch.device("cpu")), work, "ieee", quick=False, seconds=0.0)
    assert {r.clock for r in found} == {"in turns"}


@pytest.mark.parametrize("wrong", [False, True])
def test_a_draw_times_the_compiler_where_it_is_right(monkeypatch, wrong):
    def compiled(function, mode, *args):
        return lambda: function(*args) + wrong

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(peers, "compiled", compiled)
    monkeypatch.setattr(choices, "Graphs", lambda: None)
    monkeypatch.setattr(choices, "_compile_beforehand", lambda *_: None)
    monkeypatch.setattr(choices, "_trial", lambda *_: "")
    draw = choices.draw
    monkeypatch.setattr(choices, "draw", lambda layer, precision, layout, device: draw(layer, precision, layout, "cpu"))
    monkeypatch.setattr(choices.candidates, "read_hardware", lambda device: None)
    monkeypatch.setattr(choices, "time_cell", lambda graphs, functions, *_: dict.fromkeys(functions, bench.Timing(1, 1, 1, 1)))
    layer = choices.Layer(2, 3, 9, 9, 8, 3, 3, 1, 0, 1, 1)
    (row,) = choices.measure([((layer, "ieee", "NCHW", "forward"), None)], drawn=True)
    assert {"eager", "composite"} <= row.times.keys()
    assert ("compile" in row.times) != wrong


def test_machine_is_a_file_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (SXM)")
    assert bench.machine("cuda") == "nvidia-h200-sxm"
    assert bench.machine("cpu") == "cpu"


def test_reading_records_loads_nothing_that_measures():
    script = """
import sys
from fused_kernels import plots, tables
from fused_kernels.bench import records
loaded = {name.removeprefix("fused_kernels.bench.") for name in sys.modules if name.startswith("fused_kernels.bench.")}
assert loaded == {"records", "views"}, loaded
from fused_kernels import bench
assert bench.latest is records.latest
assert "fused_kernels.bench.clock" not in sys.modules
assert bench.measure.__module__ == "fused_kernels.bench.clock"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_bench_offers_its_names_and_no_others():
    for name in bench.__all__:
        assert getattr(bench, name) is not None
        assert name in dir(bench)
    assert bench.workload is workloads.workload
    assert bench.select is records.select
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bench.nothing  # noqa: B018


def test_run_info_says_where_a_run_takes_place(monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_COMMIT", "abc1234")
    info, other = (environment.run_info(torch.device("cpu"), name) for name in (None, "laptop"))
    assert (info.machine, other.machine) == ("cpu", "laptop")
    assert (info.commit, info.torch, info.driver, info.cuda) == ("abc1234", torch.__version__, "", "")
    assert info.device.endswith(f", {torch.get_num_threads()} threads")
    assert info.run != other.run
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.commit = "another"


def test_a_record_is_a_runs_facts_a_subject_and_what_was_found(monkeypatch):
    monkeypatch.setenv("FUSED_KERNELS_COMMIT", "abc1234")
    info = environment.run_info(torch.device("cpu"))
    subject = workloads.workload("cpu", torch.bfloat16, batch=1).subject("conv2d_scale_min", "eager")
    assert subject == records.Subject(
        operator="conv2d_scale_min",
        rung="eager",
        precision="bfloat16",
        dtype="bfloat16",
        layout="NCHW",
        shape="1x64x256x256 * 128x64x3x3",
    )
    record = records.Record.of(info, subject, bench.Timing(1e-3, 2e-3, 4e-3, 10), bytes=8, flops=6, errors=(0.12345, 1.0))
    assert dataclasses.asdict(record) == {
        **dataclasses.asdict(info),
        **dataclasses.asdict(subject),
        **{"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 4.0, "bytes": 8, "flops": 6, "peak_bytes": 0},
        **{"rms_error": 0.123, "max_error": 1.0, "correct": True},
    }


# plots and tables: what is drawn and written from records.


def test_table_has_one_row_per_rung_with_speedups(measured):
    text = tables.ladder(measured)
    for name in {r.rung for r in measured if r.operator == "conv2d_scale_min"} - {"reference"}:
        assert len([line for line in text.splitlines() if line.startswith((f"| {name} |", f"| `{name}` |"))]) == 1
    (eager,), (ours,) = (
        records.select(measured, rung=n, layout="NCHW", operator="conv2d_scale_min") for n in ("eager", "composite")
    )
    (row,) = (line for line in text.splitlines() if "`composite`" in line)
    assert f"{eager.p50_ms / ours.p50_ms:.2f}" in row
    assert "(*)" not in text
    assert "(*)" in tables.ladder([dataclasses.replace(r, correct=r.rung != "composite") for r in measured])


def with_sustained(found):
    """Add the whole model's times in the other clock state: one and a half times those in turns."""
    whole = [r for r in found if r.operator == "conv2d_scale_min"]
    return found + [dataclasses.replace(r, clock="sustained", p50_ms=1.5 * r.p50_ms, p80_ms=2 * r.p80_ms) for r in whole]


def test_table_shows_sustained_times_behind_those_in_turns(measured):
    text = tables.ladder(with_sustained(measured))
    (ours,) = records.select(measured, rung="composite", layout="NCHW")
    (row,) = (line for line in text.splitlines() if "`composite`" in line)
    assert f" {views.three(ours.p50_ms)} / {views.three(1.5 * ours.p50_ms)} · " in row
    (sentence,) = (line for line in text.splitlines() if "back to back" in line)
    older = tables.ladder(measured)
    assert sentence.startswith(older.splitlines()[0])
    assert re.sub(r" / [\d.,]+", "", text).splitlines()[1:] == older.splitlines()[1:]


def test_summary_has_a_column_of_sustained_times(measured):
    older, text = bench.summary(measured).splitlines(), bench.summary(with_sustained(measured)).splitlines()
    assert "sustained" not in "".join(older)
    (ours,) = records.select(measured, rung="composite", layout="NCHW")
    row = next(line for line in text if line.startswith("composite"))
    assert row.split()[1:3] == [f"{ours.p50_ms:.3f}", f"{1.5 * ours.p50_ms:.3f}"]
    # The convolution alone and scale_min alone have no such column.
    assert [line for line in text if line.startswith("library")] == [line for line in older if line.startswith("library")]


def test_ladder_marks_sustained_times(measured):
    (legend,) = plots.ladder(with_sustained(measured)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["second time: back to back for three seconds"]
    assert not plots.ladder(measured).legends


@pytest.mark.parametrize("draw", [plots.roofline, plots.bandwidth, plots.where_time_goes, plots.precision_against_time])
def test_other_figures_are_of_times_in_turns(measured, tmp_path, draw):
    for name, found in (("one", measured), ("two", with_sustained(measured))):
        draw(found).savefig(tmp_path / name, format="png")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_update_readme_changes_what_is_between_the_markers(measured, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\nafter\n", encoding="utf-8")
    tables.update_readme(path, measured)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{tables.BEGIN}\n")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert tables.ladder(measured) in text
    assert "old" not in text
    tables.update_readme(path, measured)
    assert path.read_text(encoding="utf-8") == text
    tables.update_readme(path, with_sustained(measured))
    assert tables.ladder(with_sustained(measured)) in path.read_text(encoding="utf-8")
    path.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="path: "):
        tables.update_readme(path, measured)


NAMES = ["nvidia-h200", "nvidia-h100-80gb-hbm3", "cpu"]


def on_machines(measured):
    return [dataclasses.replace(r, machine=name, device=f"<{name}>") for name in sorted(NAMES) for r in measured]


def test_readme_shows_the_latest_gpu_alone(measured, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"{tables.BEGIN}\n{tables.END}\n", encoding="utf-8")
    tables.update_readme(path, on_machines(measured))
    text = path.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"<{name}>" in text] == NAMES[:1]
    assert text.count("| eager |") == 1


def test_figures_page_shows_the_latest_gpu_first_and_the_cpu_last(measured):
    text = tables.figures_page(on_machines(measured))
    assert sorted(NAMES, key=lambda name: text.index(f"<{name}>")) == NAMES
    for name in NAMES:
        assert tables.ladder(records.select(on_machines(measured), machine=name)) in text


def test_figures_are_drawn_and_reproducible(measured, tmp_path):
    first, second = (plots.save_all(measured, tmp_path / folder) for folder in ("one", "two"))
    assert {"access-pattern.png", "ladder-cpu.png", "roofline-cpu.png", "bandwidth-cpu.png"} <= {p.name for p in first}
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes().startswith(b"\x89PNG")
        assert one.read_bytes() == two.read_bytes()


def test_training_records_have_a_table_and_a_figure(tmp_path):
    training = records.latest(records.read(data=records.data_dir() / "training"), machine="nvidia-h200")
    text = tables.training(training)
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


def made_up(operator, *times, **fields):
    """Make records of one shape after another: each {rung: milliseconds}."""
    info = dict.fromkeys(("date", "commit", "machine", "driver", "cuda", "torch", "run"), "") | {"device": "<GPU>"}
    found = {"bytes": 1, "flops": 1, "peak_bytes": 0, "rms_error": 0.0, "max_error": 0.0, "correct": True}
    where = {"operator": operator, "precision": "tf32", "dtype": "float32", "layout": "NCHW", **fields}
    return [
        records.Record(**info, **where, **found, rung=rung, shape=f"shape {number}", p20_ms=ms, p50_ms=ms, p80_ms=ms)
        for number, of_rung in enumerate(times)
        for rung, ms in of_rung.items()
    ]


SLOWER = {"eager": 4.0, "compile": 2.0, "composite": 3.0}
FASTER = {"eager": 4.0, "compile": 5.0, "conv_mma": 1.0}
FASTEST = {"eager": 10.0, "compile": 10.0, "conv_mma": 1.0}


def test_time_ratios_is_ours_over_the_best_of_the_peers():
    found = made_up("host", {**SLOWER, "operator": 0.1}, {"eager": 4.0, "conv_wgmma": 1.0})
    assert views.time_ratios(found, "eager", "compile") == [0.25, 1.5]
    assert views.time_ratios(found, "eager") == [0.25, 0.75]


def test_counts_of_layers_are_sentences():
    text = tables.layers(made_up("choice", SLOWER, FASTER, FASTEST))
    assert text.startswith("<GPU>: of 3 cases")
    assert text.endswith("of eager and torch.compile in 2. In the median it takes 0.25 of that time, at worst 50.0% more.")
    text = tables.layers(made_up("choice", FASTER))
    assert text.endswith("torch.compile in all. In the median it takes 0.25 of that time, at worst 75.0% less.")


def test_counts_of_training_steps_are_sentences():
    steps = made_up("choice", SLOWER, FASTER, direction="training")
    text = tables.training_layers(steps)
    assert text.startswith("<GPU>: of 2 steps")
    assert "all take less time than eager's, and 1 less than the better of eager's and torch.compile's." in text
    assert "processor" not in text
    host = {"eager": 1.0, "compile": 3.0, "composite": 2.0}, {"eager": 1.0, "compile": 3.0, "conv_mma": 0.5}
    text = tables.training_layers(steps + made_up("host", *host, direction="training"))
    assert "all take less of the GPU's time than eager's, and 1 less than the better of eager's and torch.compile's." in text
    assert "In the median it takes 0.88 of that time, at worst 50.0% more." in text
    assert "all take less than torch.compile's and 1 less than eager's; at worst 100.0% more than eager's." in text


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
    records.append(measured, data)
    __main__.main(["figures", "--data", str(data)])
    printed = capsys.readouterr().out.split()
    assert str(tmp_path / "figures" / "ladder-cpu.png") in printed
    assert all((tmp_path / "figures" / line).exists() for line in printed)
    page = tmp_path / "figures" / "README.md"
    assert page.read_text(encoding="utf-8") == tables.figures_page(measured)
    page.write_text("someone's own", encoding="utf-8")
    with pytest.raises(SystemExit, match="--out: expected"):
        __main__.main(["figures", "--data", str(data)])
    assert page.read_text(encoding="utf-8") == "someone's own"
