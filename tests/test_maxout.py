"""A small network that contains the operation learns the same with PyTorch's operations and with the fused layer."""

import pytest
import torch
from conftest import DEVICES

import fused_kernels as fk
from fused_kernels import maxout

ON = pytest.mark.parametrize("device", DEVICES)
SMALL = {"units": 4, "pieces": 12, "images": 1024, "held_out": 256}


def mean(values):
    return sum(values) / len(values)


def test_data_are_the_same_each_time_and_of_all_classes():
    images, labels = maxout.draw(200, seed=3)
    assert images.shape == (200, 1, 24, 24)
    assert images.isfinite().all()
    assert labels.unique().tolist() == list(range(len(maxout.CLASSES)))
    again, same = maxout.draw(200, seed=3)
    assert images.equal(again)
    assert labels.equal(same)
    assert not images.equal(maxout.draw(200, seed=4)[0])


def test_all_implementations_draw_the_same_weights():
    states = []
    for implementation in maxout.IMPLEMENTATIONS:
        torch.manual_seed(0)
        states.append(maxout.Classifier(3, 5, implementation).state_dict())
    assert all(state.keys() == states[0].keys() for state in states)
    assert all(state[name].equal(states[0][name]) for state in states for name in state)


@ON
@pytest.mark.parametrize("implementation", maxout.IMPLEMENTATIONS)
def test_a_layer_takes_the_maximum_over_a_units_pieces(device, implementation):
    layer = maxout.MaxoutLayer(2, 3, 5, 3, implementation).to(device, torch.float64)
    input = torch.randn(2, 2, 6, 7, device=device, dtype=torch.float64)
    pieces = [torch.conv2d(input, unit.weight, unit.bias, padding=1) for unit in layer.units]
    torch.testing.assert_close(layer(input), torch.stack([p.amax(1) for p in pieces], 1))
    assert all(isinstance(unit, fk.Conv2dScaleMin) == (implementation == "fused") for unit in layer.units)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"implementation: expected one of 'eager', .*, got 'fast'"):
        maxout.MaxoutLayer(1, 2, 3, 3, "fast")


@ON
def test_both_learn_and_have_the_same_loss_curve(device):
    eager, fused = (maxout.train(i, steps=60, units=6, pieces=12, device=device) for i in ("eager", "fused"))
    for training in (eager, fused):
        assert mean(training.losses[-10:]) < 0.6 * mean(training.losses[:5])
        assert training.accuracy > 0.4
        assert training.step_ms > 0
        assert (training.peak_bytes is None) == (device == "cpu")
    # Roundings differ, and what follows from them grows with the steps.
    torch.testing.assert_close(fused.losses[:5], eager.losses[:5], rtol=2e-2, atol=0)
    assert mean([abs(f - e) for f, e in zip(fused.losses, eager.losses, strict=True)]) < 0.1
    assert abs(fused.accuracy - eager.accuracy) < 0.15


@ON
def test_in_float64_the_curves_are_one(device):
    curves = [maxout.train(i, steps=12, device=device, dtype=torch.float64, **SMALL).losses for i in maxout.IMPLEMENTATIONS]
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-6, atol=0)


@ON
def test_training_is_the_same_each_time_and_leaves_the_generator_alone(device):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (maxout.train(steps=8, device=device, **SMALL) for _ in range(2))
    assert torch.rand(3).equal(expected)
    assert first.losses == second.losses
    assert first.accuracy == second.accuracy


@ON
def test_learns_under_autocast(device):
    training = maxout.train(steps=25, device=device, autocast=torch.bfloat16, **SMALL)
    assert mean(training.losses[-5:]) < 0.9 * mean(training.losses[:5])
