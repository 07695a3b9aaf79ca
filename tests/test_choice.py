"""Which candidates there are, which of them is chosen, and how good the choice is on layers that it was not made from."""

import itertools
import math
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fused_kernels import __main__, candidates, choice, estimates, measured, plans
from fused_kernels.bench import choices, fit, regret
from fused_kernels.bench.workloads import problem_of
from fused_kernels.candidates import Hardware
from fused_kernels.measured import FORWARD, Layer, Row, Time
from fused_kernels.problem import describe_problem

H200 = Hardware(*measured.hardware_facts(estimates.NETWORKS.with_suffix(".csv")))
# Other GPUs: multiprocessors, shared memory of a block and of a multiprocessor in bytes, Hz, bytes per second.
GPUS = {
    (7, 5): Hardware("Tesla T4", (7, 5), 40, 65536, 65536, 1.59e9, 0.32e12),
    (8, 0): Hardware("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 1.41e9, 2.04e12),
    (8, 6): Hardware("NVIDIA GeForce RTX 3090", (8, 6), 82, 101376, 102400, 1.7e9, 0.936e12),
    (8, 9): Hardware("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 102400, 2.52e9, 1.01e12),
    (9, 0): H200,
    (10, 0): Hardware("NVIDIA B200", (10, 0), 148, 232448, 233472, 1.96e9, 8e12),
    (12, 0): Hardware("NVIDIA GeForce RTX 5090", (12, 0), 170, 101376, 102400, 2.4e9, 1.79e12),
}
REFERENCE = Layer(64, 64, 256, 256, 128, 3, 3, 1, 0, 1, 1)
PRECISIONS = ("tf32", "ieee", "bfloat16", "float16")
LAYOUTS = ("NCHW", "channels_last")


def problem(layer=REFERENCE, precision="tf32", layout="NCHW", **changes):
    return problem_of(Row(layer._replace(**changes), precision, layout, "forward", {}))


def legal(hardware=H200, **how):
    return set(candidates.legal(candidates.FUSED, problem(**how), hardware))


# ---- what is legal ----


def test_a_kernel_runs_where_its_instructions_are():
    for capability, hardware in GPUS.items():
        expected = {"conv_direct", "conv_mma"} | ({"conv_wgmma"} if capability == (9, 0) else set())
        expected = set() if capability < (8, 0) else expected
        assert legal(hardware) == expected


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_kernel_runs_at_the_precisions_that_it_keeps(precision):
    expected = {
        "tf32": {"conv_direct", "conv_mma", "conv_wgmma"},
        "ieee": {"conv_direct", "conv_wgmma_ieee"},
        "bfloat16": {"conv_mma", "conv_triton", "conv_wgmma"},
        "float16": {"conv_mma", "conv_triton", "conv_wgmma"},
    }
    assert legal(precision=precision) == expected[precision]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"stride": 2}, {"conv_wgmma"}),
        ({"groups": 2}, {"conv_wgmma"}),
        ({"kernel_h": 7, "dilation": 2}, set()),
        ({"kernel_h": 7, "dilation": 3}, {"conv_wgmma"}),
        ({"height": 2**28}, {"conv_direct", "conv_mma", "conv_wgmma"}),
    ],
)
def test_a_kernel_says_which_shapes_it_does_not_take(changes, refused):
    assert legal(**changes) == {"conv_direct", "conv_mma", "conv_wgmma"} - refused
    for name in refused:
        assert name in candidates.why_not(name, problem(**changes), H200)


@pytest.mark.parametrize(("channels", "taken"), [(3, False), (4, True)])
def test_split_operands_take_no_long_chain_of_taps(channels, taken):
    few = {"precision": "ieee", "in_channels": channels, "kernel_h": 8, "kernel_w": 6}
    assert legal(**few) == {"conv_direct"} | ({"conv_wgmma_ieee"} if taken else set())
    if not taken:
        why = "conv_wgmma_ieee takes at most 12 filter taps for each channel, not 48 for 3"
        assert candidates.why_not("conv_wgmma_ieee", problem(**few), H200) == why


def test_no_fused_kernel_takes_float64():
    with FakeTensorMode():
        input = torch.empty(2, 3, 8, 8, device="cuda", dtype=torch.float64)
    found = describe_problem(input, (4, 3, 3, 3), (1, 1), (0,) * 4, (1, 1), 1, "ieee")
    decision = choice.choose(found, H200)
    assert decision.rung == "composite"
    assert "float64" in decision.why


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_empty_batch_and_an_immense_image_are_the_librarys(precision):
    for changes in ({"images": 0}, {"height": 2**28}):
        found = problem(precision=precision, **changes)
        assert choice.choose(found, H200).rung == "composite"
        by_input, by_weight, _ = choice.choose_backward(found, H200)
        assert by_input in candidates.GRAD_INPUT["cuda"]
        assert by_weight in candidates.GRAD_WEIGHT["cuda"]


def test_where_the_planning_cannot_be_asked_the_library_runs(monkeypatch):
    caches = plans.plan_costs, choice._choose_gradient
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(plans, "why_unavailable", lambda: "no place for built kernels")
    decision, backward = choice.choose(problem(), H200), choice.choose_backward(problem(), H200)
    for cache in caches:
        cache.cache_clear()
    assert decision.rung == "composite"
    assert "no place for built kernels" in decision.why
    assert backward == ("grad_input_gather", "grad_weight_gather", "grad_bias_private")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_leads_into_the_other_layout(layout):
    copy = candidates.copy_into_other_layout(problem(layout=layout), by_kernel=True)
    other = torch.channels_last if layout == "NCHW" else torch.contiguous_format
    assert (copy.memory_format, copy.by_kernel) == (other, layout == "NCHW")
    assert candidates.copy_into_other_layout(problem(layout=layout, in_channels=1), True) is None


# ---- what is chosen ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("precision", "rung"), [("tf32", "conv_wgmma"), ("ieee", "conv_wgmma_ieee"), ("bfloat16", "conv_wgmma")]
)
def test_the_reference_workload_has_its_fastest_rung(precision, rung, layout):
    assert choice.choose(problem(precision=precision, layout=layout), H200).rung == rung


def test_the_library_is_chosen_where_it_is_far_ahead():
    depthwise = {"in_channels": 512, "out_channels": 512, "groups": 512}
    assert choice.choose(problem(precision="bfloat16", layout="channels_last", **depthwise), H200).rung == "composite"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", GPUS, ids=str)
def test_a_choice_can_run(capability, precision):
    """On any GPU: the rung is one of those that can take the problem, and so are the operators of the backward pass."""
    hardware = GPUS[capability]
    for number in (1, 8, 65, 512):
        for changes in ({}, {"stride": 2}, {"kernel_h": 1, "kernel_w": 1}, {"images": 1, "height": 9, "width": 9}):
            found = problem(precision=precision, in_channels=number, out_channels=number, **changes)
            decision = choice.choose(found, hardware)
            assert decision.rung in {"composite", *candidates.legal(candidates.FUSED, found, hardware)}
            by_input, by_weight, _ = choice.choose_backward(found, hardware)
            if capability >= (8, 0):
                assert by_input in candidates.legal(candidates.GRAD_INPUT, found, hardware)
                assert by_weight in candidates.legal(candidates.GRAD_WEIGHT, found, hardware)
            assert all(0 < seconds < 10 for seconds in decision.seconds.values())


def test_sizes_that_are_not_known_yet_are_the_librarys():
    seen = []

    def function(input):
        found = describe_problem(input, (4, 5, 3, 3), (1, 1), (0,) * 4, (1, 1), 1, "ieee")
        decision = choice._decide(found._replace(device=torch.device("cuda", 0)))
        seen.append((found.is_symbolic, decision.rung, choice.choose_gradient("grad_weight", decision.problem, H200)))
        return input

    make_fx(function, tracing_mode="symbolic")(torch.empty(3, 5, 9, 11))
    assert seen == [(True, "composite", "grad_weight_private")]
    assert not problem().is_symbolic


def test_a_kernel_that_is_not_to_be_had_is_not_chosen():
    decision = choice.choose(problem(), H200, lambda name: f"{name}: no compiler")
    assert decision.rung == "composite"
    assert "no compiler" in decision.why
    assert choice.choose(problem(), H200, lambda name: "no" if name == "conv_wgmma" else None).rung == "conv_mma"


def test_a_choice_is_the_same_every_time():
    decisions = []
    for _ in range(2):
        for function in (estimates._estimate_all, plans.plan_costs, choice._choose_gradient):
            function.cache_clear()
        decisions.append(choice.choose(problem(), H200))
    assert decisions[0] == decisions[1]


def test_the_composite_copies_only_where_that_is_faster_by_estimate():
    found = problem(layout="channels_last")
    for copied, expected in ((1.0, (False, False)), (0.5, (True, True))):
        copies = choice.choose_copies(found, H200, {"composite": 1.0, "copied": copied})
        assert tuple(copy is not None for copy in copies) == expected
    # PyTorch's own copy into channels_last is slower than ours.
    assert choice.choose_copies(problem(), H200, {"composite": 1.0, "copied": 1.0 - 1e-6})[0] is None


def test_a_gpu_without_records_must_gain_more(monkeypatch):
    found, unknown = problem(), H200._replace(name="NVIDIA H300")
    seconds = choice.choose(found, H200).seconds
    library = min(seconds["composite"], seconds["copied"])
    monkeypatch.setattr(estimates, "forward", lambda *_: seconds | {"conv_wgmma": 0.95 * library, "conv_mma": library})
    assert choice.choose(found, H200).rung == "conv_wgmma"
    assert choice.choose(found, unknown).rung == "composite"


def test_a_gpu_without_records_gets_one_hint(monkeypatch):
    monkeypatch.setattr(choice, "_hinted", set())
    with pytest.warns(UserWarning, match=r"no times were recorded on this GPU \(NVIDIA H300\).*cudnn\.benchmark = True"):
        choice._hint("NVIDIA H300")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice._hint("NVIDIA H300")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        choice._hint("NVIDIA H301")


def test_larger_batches_do_not_go_back_and_forth():
    """Over batch sizes a choice changes from one candidate to another, and seldom back."""
    returns = cells = 0
    for size, channels in ((7, 512), (14, 256), (28, 128), (56, 64), (112, 32)):
        for precision in ("tf32", "ieee", "bfloat16"):
            for layout in LAYOUTS:
                changes = {"height": size, "width": size, "in_channels": channels, "out_channels": channels, "padding": 1}
                rungs = [
                    choice.choose(problem(precision=precision, layout=layout, images=2**i, **changes), H200).rung
                    for i in range(9)
                ]
                runs = [rung for i, rung in enumerate(rungs) if i == 0 or rung != rungs[i - 1]]
                returns += len(runs) - len(set(runs))
                cells += 1
    assert returns <= cells // 10


# ---- how good it is ----


def test_networks_compute_what_they_should():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    widths = 7, 5, 6, 3
    arrays = {"mean": draw(7), "deviation": draw(7).abs() + 0.1, "offset": draw(3)}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        arrays |= {f"weight{i}": draw(2, inputs, outputs), f"bias{i}": draw(2, 1, outputs)}
    described = 3 * draw(7)
    x = ((described - arrays["mean"]) / arrays["deviation"]).clamp(-4, 4)[None]
    for i in range(3):
        x = x @ arrays[f"weight{i}"] + arrays[f"bias{i}"]
        x = torch.nn.functional.silu(x) if i < 2 else x
    networks = estimates.Networks({name: tensor.numpy() for name, tensor in arrays.items()})
    torch.testing.assert_close(torch.tensor(networks.ask(described.tolist())), x.mean(0)[0] + arrays["offset"])
    with pytest.raises(ValueError, match="described: expected 7 numbers"):
        networks.ask(described[1:].tolist())


def test_a_shape_not_seen_before_is_decided_in_microseconds():
    def seconds(first):
        problems = [problem(images=first + i) for i in range(50)]
        start = time.perf_counter()
        for new in problems:
            choice.choose(new, H200)
        return (time.perf_counter() - start) / len(problems)

    # 75 us on a quiet machine.
    assert min(seconds(1000 + 50 * turn) for turn in range(8)) < 3e-4


def test_the_networks_have_learnt_the_record():
    rows = [row for row in measured.read(estimates.NETWORKS.with_suffix(".csv")) if "conv_mma" in row.times][::29]
    networks, place, errors = estimates.networks(H200.name)[0], estimates.TARGETS.index("conv_mma"), []
    for row in rows:
        if row.direction == "forward":
            described, floors = estimates.describe(problem_of(row), H200)
            seconds = floors["conv_mma"] * math.exp(networks.ask(described)[place])
            errors.append(abs(seconds * 1e6 / row.times["conv_mma"].p50 - 1))
    assert len(errors) > 50
    assert sorted(errors)[len(errors) // 2] < 0.1


def test_what_was_timed_is_not_estimated():
    # An image of one channel lies in both layouts.
    rows = [row for row in measured.read(estimates.NETWORKS.with_suffix(".csv")) if row.layer.in_channels > 1][::97]
    assert {row.direction for row in rows} == {"forward", "training"}
    for row in rows:
        recorded = {
            n: 1e-6 * t.p50 for n, t in row.times.items() if n != "eager" and (row.direction == "forward") == (n in FORWARD)
        }
        assert estimates.recorded(problem_of(row), H200).items() >= recorded.items()
        if row.direction == "forward":
            seconds = choice.choose(problem_of(row), H200).seconds
            assert {name: seconds[name] for name in recorded if name in seconds}.items() <= recorded.items()


def test_where_the_library_is_erratic_it_must_be_expected_to_win_clearly(monkeypatch):
    large = problem(precision="bfloat16", kernel_h=7, kernel_w=7)
    seconds = {"composite": 1.0, "copied": 1.5, "conv_mma": 1.1, "conv_wgmma": 1.5}
    monkeypatch.setattr(estimates, "forward", lambda *args: seconds)
    assert choice.choose(large, H200).rung == "conv_mma"
    assert choice.choose(large, H200).why.endswith(
        "conv_mma 1.1e+06 us, the library's convolution and scale_min 1e+06 us, which is less sure"
    )
    others = {"precision": "tf32"}, {"kernel_w": 1}, {"in_channels": 8}, {"in_channels": 256}, {"groups": 2}
    for other in (problem(**{"precision": "bfloat16", "kernel_h": 7, "kernel_w": 7} | changes) for changes in others):
        assert choice.choose(other, H200).rung == "composite"
    monkeypatch.setattr(estimates, "recorded", lambda *args: seconds)
    assert choice.choose(large, H200).rung == "composite"


def test_a_record_says_nothing_of_other_layers():
    recorded = problem()
    assert estimates.recorded(recorded, H200)
    others = [
        recorded._replace(is_contiguous=False),
        recorded._replace(stride=(1, 2)),
        recorded._replace(padding=(0, 1, 0, 0)),
        recorded._replace(dilation=(2, 1)),
        problem(images=63),
    ]
    assert not any(estimates.recorded(other, H200) for other in others)
    assert not estimates.recorded(recorded, GPUS[8, 0])


def test_the_record_is_broad():
    rows = measured.read(estimates.NETWORKS.with_suffix(".csv"))
    layers = {row.layer for row in rows}
    assert len(layers) > 2000
    assert {row.precision for row in rows} == set(PRECISIONS)
    assert {row.direction for row in rows} == {"forward", "training"}
    for name, least, most in (("in_channels", 1, 1024), ("out_channels", 8, 16384), ("images", 1, 256), ("kernel_h", 1, 7)):
        found = [getattr(layer, name) for layer in layers]
        assert min(found) <= least
        assert max(found) >= 0.8 * most
    assert estimates.NETWORKS.with_suffix(".csv").stat().st_size + estimates.NETWORKS.stat().st_size < 3e6


DRAWS = regret.data_dir() / f"{estimates.NETWORKS.stem}.csv"


@pytest.fixture(scope="module")
def drawn():
    """Judge the choice on the layers that were drawn to test it, none of which the networks have seen."""
    return regret.judge(measured.read(DRAWS), Hardware(*measured.hardware_facts(DRAWS)))


@pytest.fixture(scope="module")
def tried():
    """Judge what a trial kept on them."""
    return regret.judge([row for row in measured.read(DRAWS) if row.trial], H200, lambda row: row.trial.split()[0])


def test_the_choice_loses_little_on_layers_that_it_was_not_made_from(drawn):
    regrets = [cell.regret for cell in drawn]
    assert len(drawn) >= 1000
    assert regret.geometric_mean(regrets) <= 1.035
    assert regret.quantile(regrets, 0.95) <= 1.25
    # The library falls to a tenth of its speed on some large filters, which follows from nothing that an estimate is told.
    assert sum(r > 1.35 for r in regrets) <= len(regrets) // 33


def test_a_trial_loses_next_to_nothing(tried):
    regrets = [cell.regret for cell in tried]
    assert len(tried) >= 1000
    assert regret.geometric_mean(regrets) <= 1.01
    assert regret.quantile(regrets, 0.95) <= 1.05
    # When these trials were made, conv_triton's launch did not count.
    assert max(regrets) <= 1.6


def test_fitting_says_what_is_lost_on_layers_left_out(monkeypatch, tmp_path, capsys):
    names, facts, *rows = estimates.NETWORKS.with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    file = tmp_path / f"{estimates.NETWORKS.stem}.csv"
    file.write_text("\n".join([names, facts, *(row for row in rows[::50] if not row.startswith("#"))]) + "\n", encoding="utf-8")
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    monkeypatch.setattr(fit, "_STEPS", 20)
    __main__.main(["bench", "--choices", "--fit", "--folds", "2"])
    said = capsys.readouterr().out
    assert file.with_suffix(".npz").exists()
    assert re.search(r"\d+ cells. Regret: geometric mean \d\.\d+", said)
    for kind in fit.GRADIENTS:
        assert re.search(rf"{kind}: \d+ cells. The kernel that is chosen takes \d\.\d+ times as long as the best", said)


def test_the_choice_is_faster_than_pytorch_and_its_compiler(drawn, tried):
    for cells, behind in ((drawn, 10), (tried, 20)):
        gains = [cell.gain for cell in cells]
        assert regret.geometric_mean(gains) >= 1.5
        assert sum(gain < 0.98 for gain in gains) <= len(gains) // behind


def test_no_layer_was_drawn_that_the_record_holds(drawn):
    recorded = {row.layer for row in measured.read(estimates.NETWORKS.with_suffix(".csv"))}
    assert sum(cell.row.layer in recorded for cell in drawn) <= len(drawn) // 20


def test_the_readme_says_what_the_record_says():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    said = regret.sentences()
    assert said.startswith("On ")
    assert said in readme


def test_regret_counts_what_was_measured():
    times = {"eager": Time(9, 10, 11), "composite": Time(7, 8, 9), "conv_mma": Time(3, 4, 5), "conv_wgmma": Time(5, 5, 6)}
    row = Row(REFERENCE, "tf32", "NCHW", "forward", times)
    (worst,), (tied,), (best,) = (
        regret.judge([row], H200, lambda _, name=name: name) for name in ("composite", "conv_wgmma", "conv_mma")
    )
    assert (worst.regret, worst.gain, worst.possible) == (2.0, 1.25, 2.5)
    assert (tied.regret, best.regret) == (1.0, 1.0)
    assert "Regret: geometric mean 2.000" in regret.summary([worst])


def test_a_record_is_read_as_it_was_written(tmp_path):
    row = Row(REFERENCE, "tf32", "NCHW", "forward", {"eager": Time(1.5, 2.5, 3.5)}, "conv_mma conv_mma composite")
    facts = {"commit": "abc", "hardware": tuple(H200), "draw": 1}
    for spread, expected in ((True, row), (False, row._replace(times={"eager": Time(2.5, 2.5, 2.5)}))):
        file = tmp_path / f"{spread}.csv"
        assert list(measured.append(file, facts, [row], spread)) == [row]
        assert measured.read(file) == [expected]
        assert Hardware(*measured.hardware_facts(file)) == H200
        list(measured.append(file, facts, [row], spread))
        assert measured.read(file) == [expected]


def test_a_later_line_adds_what_came_later(tmp_path):
    """A candidate that is new has a column of its own, after those that the file has; its rivals were timed again beside it."""
    row = Row(REFERENCE, "bfloat16", "NCHW", "forward", {"conv_mma": Time(4, 4, 4), "composite": Time(5, 5, 5)})
    other = row._replace(layout="channels_last")
    file, facts = tmp_path / "gpu.csv", {"hardware": tuple(H200)}
    list(measured.append(file, facts, [row, other]))
    names, *lines = file.read_text(encoding="utf-8").replace(",conv_triton", "").splitlines()
    file.write_text("\n".join([names, *lines]) + "\n", encoding="utf-8")
    assert measured.read(file) == [row, other]
    later = row._replace(times={"conv_mma": Time(3, 3, 3), "conv_triton": Time(2, 2, 2)})
    list(measured.append(file, facts, [later]))
    assert file.read_text(encoding="utf-8").splitlines()[0] == names + ",conv_triton"
    merged = row.times | later.times
    assert measured.read(file) == [row._replace(times=merged), other]
    found = measured.Index(file).find(*REFERENCE, "bfloat16", "NCHW", "forward")
    assert found == {name: time.p50 for name, time in merged.items()}


def test_of_a_row_what_it_lacks_is_timed_beside_its_two_fastest():
    times = {"eager": 1.0, "composite": 4.0, "copied": 3.0, "conv_mma": 2.0, "conv_wgmma": 5.0}
    row = Row(REFERENCE, "bfloat16", "NCHW", "forward", {name: Time(time, time, time) for name, time in times.items()})
    assert choices._lacking(row, H200, ()) == {"conv_mma", "copied", "conv_triton"}
    whole = row._replace(times=row.times | {"conv_triton": Time(1, 1, 1)})
    assert choices._lacking(whole, H200, ()) == set()
    assert choices._lacking(whole, H200, ["conv_mma"]) == {"conv_mma", "conv_triton", "copied"}
    assert not choices._lacking(row._replace(direction="training"), H200, ["conv_mma"])


def test_a_line_that_was_cut_off_is_written_again(tmp_path):
    rows = [Row(REFERENCE._replace(images=i), "tf32", "NCHW", "forward", {"composite": Time(2.5, 2.5, 2.5)}) for i in (1, 2)]
    file, facts = tmp_path / "gpu.csv", {"hardware": tuple(H200)}
    list(measured.append(file, facts, rows))
    file.write_text(file.read_text(encoding="utf-8")[:-3], encoding="utf-8")
    assert measured.read(file) == rows[:1]
    assert measured.hardware_facts(file) == tuple(H200)
    assert not measured.Index(file).find(*rows[1].layer, "tf32", "NCHW", "forward")
    list(measured.append(file, facts, rows[1:]))
    assert measured.read(file) == rows
    assert measured.Index(file).find(*rows[1].layer, "tf32", "NCHW", "forward") == {"composite": 2.5}
    file.write_text(file.read_text(encoding="utf-8")[:20], encoding="utf-8")
    list(measured.append(file, facts, rows))
    assert measured.read(file) == rows


def test_without_a_record_all_is_estimated(tmp_path):
    assert measured.read(tmp_path / "none.csv") == []
    assert measured.Index(tmp_path / "none.csv").find(*REFERENCE, "tf32", "NCHW", "forward") == {}


# ---- explain ----


def test_the_nearest_measured_layer_is_named():
    said = estimates.nearest(problem(images=60), H200)
    assert said.startswith(f"{REFERENCE}, tf32, NCHW, on an NVIDIA H200: conv_wgmma ")


# ---- a problem's layout ----


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (2, 1, 1, 5), (3, 4, 5, 1), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("margin", [0, 1])
def test_a_problem_knows_its_inputs_layout_as_torch_does(shape, order, margin):
    padded = [size + margin for size in shape]
    input = torch.empty([padded[d] for d in order]).permute([order.index(d) for d in range(4)])
    input = input[tuple(slice(size) for size in shape)]
    found = describe_problem(input, (2, shape[1], 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, "ieee")
    assert found.is_contiguous == input.is_contiguous()
    is_channels_last = shape[1] > 1 and input.is_contiguous(memory_format=torch.channels_last)
    assert found.is_channels_last == is_channels_last
