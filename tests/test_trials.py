"""What torch.backends.cudnn.benchmark = True does here: the first call of a problem times a few candidates."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused_kernels as fk
from fused_kernels import auto, choice, dispatch, trials

SECONDS = {"conv2d_scale_min": 1.0, "composite": 1.5}


@pytest.fixture
def benchmark(monkeypatch):
    """Ask for trials, of new decisions."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(choice, "_decisions", {})
    monkeypatch.setattr(trials, "_settled", {})


@pytest.fixture
def clock(monkeypatch, benchmark):
    """Let trials run on a CPU, with a clock that says what the test wants; gives the list of what was tried."""
    tried = []
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: problem.pixels > 0)
    monkeypatch.setattr(choice, "_decide", lambda problem: choice.choose(problem, None)._replace(seconds=SECONDS))

    def fastest(calls, device):
        results = [call() for call in calls.values()]
        results = [found[0] if isinstance(found, tuple) else found for found in results]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])
        tried.append(list(calls))
        return "composite", {"conv2d_scale_min": 2.0, "composite": 1.0}

    monkeypatch.setattr(trials, "fastest", fastest)
    return tried


def tensors(device="cpu", requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 9, 8), (5, 3, 3, 3), (5,)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(requires_grad) for shape in shapes]


def expected(input, weight, bias):
    return (F.conv2d(input, weight, bias) * 2.0).amin(1, keepdim=True)


def test_the_first_call_tries_and_the_next_one_recalls(clock):
    args = tensors()
    for _ in range(3):
        torch.testing.assert_close(fk.conv2d_scale_min(*args, 2.0), expected(*args))
    assert clock == [["conv2d_scale_min", "composite"]]
    found = fk.explain(*args, 2.0)
    assert found.rung == "composite"
    assert "timed on its first call: composite 1e+06 us, conv2d_scale_min 2e+06 us" in found.why


def test_what_was_kept_is_recalled_where_nothing_may_be_tried(clock, monkeypatch):
    """As while a graph is captured; but not where deterministic algorithms are asked for."""
    args = tensors()
    decision = choice.decide(*args, 1, 0, 1, 1, "auto")
    assert trials.settle(decision, (*args, 2.0), False).rung == "composite"
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: False)
    assert trials.settle(decision, (*args, 2.0), False).rung == "composite"
    assert trials.settle(decision, (*args, 2.0), True).rung == "conv2d_scale_min"
    monkeypatch.setattr(trials, "_is_deterministic", lambda: True)
    assert trials.settle(decision, (*args, 2.0), False).rung == "conv2d_scale_min"


def test_what_alone_could_run_is_kept(clock, monkeypatch):
    monkeypatch.setattr(trials, "fastest", lambda calls, device: ("composite", {}))
    assert fk.conv2d_scale_min(*tensors(), 2.0).shape == (2, 1, 7, 6)
    assert fk.explain(*tensors(), 2.0).rung == "composite"


def test_where_memory_lacked_it_is_tried_again(clock, monkeypatch):
    monkeypatch.setattr(trials, "fastest", lambda calls, device: (None, {}))
    fk.conv2d_scale_min(*tensors(), 2.0)
    assert trials._settled == {}


def test_what_is_kept_takes_a_bounded_place(clock, monkeypatch):
    monkeypatch.setattr(trials, "_MOST_SETTLED", 2)
    input, *rest = tensors()
    for width in range(4, 9):
        fk.conv2d_scale_min(input[..., :width], *rest, 2.0)
        assert 0 < len(trials._settled) <= 2


def test_without_estimates_there_is_nothing_to_try(clock, monkeypatch):
    """As for float64 on a GPU."""
    monkeypatch.setattr(choice, "_decide", lambda problem: choice.choose(problem, None)._replace(seconds={}))
    fk.conv2d_scale_min(*tensors(), 2.0)
    assert clock == []


def test_another_shape_is_another_problem(clock):
    input, *rest = tensors()
    for images in (1, 2, 1):
        fk.conv2d_scale_min(input[:images], *rest, 2.0)
    assert len(clock) == 2


def test_what_gives_winners_is_tried_by_itself(clock):
    args = tensors()
    fk.conv2d_scale_min(*args, 2.0)
    fk.conv2d_scale_min(*args, 2.0, return_indices=True)
    fk.conv2d_scale_min(*args, 2.0, return_indices=True)
    assert len(clock) == 2


def test_training_takes_what_is_fastest_and_its_gradients_are_right(clock):
    args, others = tensors(requires_grad=True), tensors(requires_grad=True)
    fk.conv2d_scale_min(*args, 2.0).sum().backward()
    expected(*others).sum().backward()
    for found, wanted in zip(args, others, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    assert clock[0] == ["conv2d_scale_min", "composite"]


def test_without_the_setting_nothing_is_tried(clock, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    fk.conv2d_scale_min(*tensors(), 2.0)
    assert clock == []


def test_an_empty_batch_is_not_tried(clock):
    input, *rest = tensors()
    assert fk.conv2d_scale_min(input[:0], *rest, 2.0).shape == (0, 1, 7, 6)
    assert clock == []


def test_a_compiled_program_tries_when_it_is_called(clock, monkeypatch):
    monkeypatch.setattr(dispatch.auto, "_failed", True)  # Python's own rules
    monkeypatch.setattr(dispatch.auto, "_loaded", False)
    args = tensors()
    found = auto._operator("conv2d_scale_min_auto")(*args, 2.0, [1, 1], [0] * 4, [1, 1], 1, "auto")
    torch.testing.assert_close(found, expected(*args))
    assert len(clock) == 1


@pytest.mark.parametrize(
    "why", ["deterministic", "use_deterministic_algorithms", "a subclass", "a mode of torch's dispatcher", "a CPU"]
)
def test_where_nothing_may_be_tried(why, monkeypatch, benchmark):
    args = tensors()
    problem = choice.decide(*args, 1, 0, 1, 1, "auto").problem
    if why != "a CPU":
        problem = problem._replace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert trials._may_try(args, problem) == (why != "a CPU")
    if why == "deterministic":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    elif why == "use_deterministic_algorithms":
        monkeypatch.setattr(torch._C, "_get_deterministic_algorithms", lambda: True)
    elif why == "a mode of torch's dispatcher":
        with FlopCounterMode(display=False):
            assert not trials._may_try(args, problem)
        return
    elif why == "a subclass":
        args[0] = args[0].as_subclass(type("Special", (torch.Tensor,), {}))
    assert not trials._may_try(args, problem)


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    args = tensors()
    problem = choice.decide(*args, 1, 0, 1, 1, "auto").problem._replace(device=torch.device("cuda", 0))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert trials._may_try(args, problem) != capturing


@pytest.mark.parametrize("why", ["not now", "no memory"])
def test_without_python_what_could_not_be_tried_is_asked_again(why, clock, without_python, monkeypatch):
    call, args = torch.ops.fused_kernels.conv2d_scale_min_auto, (*tensors(), 2.0, [1, 1], [0] * 4, [1, 1], 1, "ieee")
    # A size of its own: the library remembers what other tests chose.
    args = (args[0][:, :, : 5 + (why == "not now"), :7].clone(), *args[1:])
    fastest, asked = trials.fastest, []
    choose = auto._CHOOSE["conv2d_scale_min"]
    monkeypatch.setitem(auto._CHOOSE, "conv2d_scale_min", lambda *args: asked.append(args) or choose(*args))
    if why == "not now":
        monkeypatch.setattr(trials, "_may_try", lambda args, problem: False)
    else:
        monkeypatch.setattr(trials, "fastest", lambda calls, device: (None, {}))
    for times in (1, 2):
        call(*args)
        assert len(asked) == times
    assert clock == []
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: True)
    monkeypatch.setattr(trials, "fastest", fastest)
    for _ in range(3):
        call(*args)
        assert len(asked) == 3
    assert clock == [["conv2d_scale_min", "composite"]]


def ask(kind, *args):
    """Give what a program is told: an operator's name, and whether that holds from now on."""
    name, *_, holds = getattr(torch.ops.fused_kernels, f"{kind}_auto_choice")(*args)
    return name, holds


CONV = [1, 1], [0, 0, 0, 0], [1, 1], 1, "ieee"


def test_a_choice_holds_once_its_own_trial_has_run(clock, monkeypatch):
    args = *tensors(), 2.0, *CONV
    may_try = trials._may_try
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: False)
    assert not ask("conv2d_scale_min_winners", *args)[1]
    monkeypatch.setattr(trials, "_may_try", may_try)
    assert ask("conv2d_scale_min_winners", *args)[1]
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: False)
    # Without winners it is another trial.
    assert ask("conv2d_scale_min_winners", *args)[1]
    assert not ask("conv2d_scale_min", *args)[1]
    assert len(clock) == 1


@pytest.mark.parametrize("why", ["deterministic", "no estimate", "a subclass", "the setting is off"])
def test_a_choice_holds_where_no_trial_will_ever_run(why, clock, monkeypatch):
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: False)
    args = [*tensors(), 2.0, *CONV]
    if why == "deterministic":
        monkeypatch.setattr(trials, "_is_deterministic", lambda: True)
    elif why == "no estimate":
        monkeypatch.setattr(choice, "_decide", lambda problem: choice.choose(problem, None))
    elif why == "a subclass":
        args[0] = args[0].as_subclass(type("Special", (torch.Tensor,), {}))
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert ask("conv2d_scale_min", *args)[1]


@pytest.mark.parametrize("kind", ["grad_input", "grad_weight"])
def test_a_gradients_operator_holds_once_its_trial_has_run(kind, benchmark, monkeypatch):
    input, weight, bias = tensors()
    output, winners = fk.scale_min(F.conv2d(input, weight, bias), 2.0, return_indices=True)
    args = {
        "grad_input": (output, winners.byte(), weight, 2.0, input.shape[2:], *CONV, False),
        "grad_weight": (output, winners.byte(), input, 2.0, len(weight), weight.shape[2:], *CONV),
    }[kind]
    # Nothing is estimated on a CPU.
    assert ask(kind, *args) == (f"{kind}.float32", True)
    monkeypatch.setattr(trials, "_gradient_seconds", lambda kind, problem: {kind: 1.0})
    monkeypatch.setattr(trials, "fastest", lambda calls, device: (next(iter(calls)), {}))
    assert ask(kind, *args) == (f"{kind}.float32", False)
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: True)
    assert ask(kind, *args) == (f"{kind}.float32", True)
    monkeypatch.setattr(trials, "_may_try", lambda args, problem: False)
    assert ask(kind, *args) == (f"{kind}.float32", True)


def test_only_what_is_close_or_built_is_tried(monkeypatch):
    seconds = {"conv_mma": 1.0, "composite": 1.9, "conv_wgmma": 2.1, "copied": 3.0, "conv_direct": 5.0}
    monkeypatch.setattr(trials, "_is_built", lambda name, dtype, winners: False)
    assert trials.shortlist(seconds, torch.float32, False) == ["conv_mma", "composite"]
    monkeypatch.setattr(trials, "_is_built", lambda name, dtype, winners: True)
    assert trials.shortlist(seconds, torch.float32, False) == ["conv_mma", "composite", "conv_wgmma", "copied"]
    close = dict.fromkeys(seconds, 1.0)
    monkeypatch.setattr(trials, "_is_built", lambda name, dtype, winners: False)
    assert len(trials.shortlist(close, torch.float32, False)) == 3


# ---- on a GPU ----


@pytest.mark.gpu
def test_the_clock_names_the_fastest(benchmark):
    input = torch.randn(1 << 22, device="cuda")
    calls = {"slow": lambda: [input + 1 for _ in range(8)], "fast": lambda: input + 1}
    best, medians = trials.fastest(calls, input.device)
    assert best == "fast"
    assert medians["fast"] < medians["slow"]


@pytest.mark.gpu
def test_what_lacks_memory_or_cannot_be_built_is_left_out():
    device = torch.device("cuda", 0)

    def too_large():
        return torch.empty(1 << 50, device=device)

    def broken():
        raise RuntimeError("does not build")

    assert trials.fastest({"large": too_large, "broken": broken, "right": lambda: None}, device)[0] == "right"
    assert trials.fastest({"large": too_large}, device) == (None, {})
    with pytest.raises(RuntimeError, match="does not build"):
        trials.fastest({"broken": broken}, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients_are_right_after_a_trial(benchmark, dtype):
    found, wanted = ([tensor.detach().to(dtype).requires_grad_() for tensor in tensors("cuda")] for _ in range(2))
    for _ in range(2):
        output = fk.conv2d_scale_min(*found, 2.0)
    target = expected(*(tensor.double() for tensor in wanted))
    tolerance = {"rtol": 2e-2, "atol": 2e-2 if dtype == torch.bfloat16 else 2e-3}
    torch.testing.assert_close(output.double(), target, **tolerance)
    output.backward(torch.ones_like(output))
    target.sum().backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=5e-2, atol=0.5 if dtype == torch.bfloat16 else 5e-2)
    assert "timed on its first call" in fk.explain(*found, 2.0).why


@pytest.mark.gpu
def test_a_graph_is_captured_with_the_setting_on(benchmark):
    args = tensors("cuda")
    fk.conv2d_scale_min(*args, 2.0)
    other = [args[0][:1].clone(), *args[1:]]  # not tried before
    wanted = expected(*other)  # the library's convolution was: PyTorch can't capture one with the setting on that it never ran
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fk.conv2d_scale_min(*other, 2.0)
    graph.replay()
    torch.testing.assert_close(output, wanted, rtol=1e-2, atol=1e-2)
    assert len(trials._settled) == 1


@pytest.mark.gpu
def test_a_compiled_step_tries_forward_and_backward(benchmark):
    args = tensors("cuda", requires_grad=True)
    compiled = torch.compile(lambda *t: fk.conv2d_scale_min(*t, 2.0).sum(), fullgraph=True)
    for _ in range(2):
        compiled(*args).backward()
    assert {kind for kind, _ in trials._settled} >= {"grad_input", "grad_weight"}
    wanted = tensors("cuda", requires_grad=True)
    expected(*wanted).sum().backward()
    for a, b in zip(args, wanted, strict=True):
        torch.testing.assert_close(a.grad / 2, b.grad, rtol=5e-2, atol=5e-2)
