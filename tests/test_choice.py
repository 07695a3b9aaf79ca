"""The choice is what it was: for some thousands of problems on several GPUs, none of which need be there.

``data/choices.csv`` was written before the rules moved to :mod:`fused_kernels.choice`. A change of a rule changes lines in it,
each of which is then looked at.
"""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kernels.choice import Hardware, choose, choose_backward, choose_copies
from fused_kernels.problem import describe_problem

FILE = Path(__file__).parent / "data" / "choices.csv"
# What a block can have of shared memory, in bytes.
SHARED = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}


def rows():
    with FILE.open(newline="") as lines:
        return list(csv.DictReader(lines))


def by(numbers):
    return tuple(map(int, numbers.split("x")))


def recorded_problem(row):
    """Give a recorded problem, and its GPU or None; nothing is allocated."""
    device = "cpu" if row["capability"] == "cpu" else "cuda"
    with FakeTensorMode():
        input = torch.empty_strided(by(row["input"]), by(row["strides"]), dtype=getattr(torch, row["dtype"]), device=device)
    conv = *(by(row[name]) for name in ("stride", "padding", "dilation")), int(row["groups"]), row["precision"]
    problem = describe_problem(input, by(row["weight"]), *conv)
    if device == "cpu":
        return problem, None
    capability = tuple(map(int, row["capability"].split(".")))
    return problem, Hardware(capability, SHARED[capability])


def words(problem, copy):
    """Describe a copy as the record does."""
    if copy is None:
        return "none"
    if copy.memory_format == torch.contiguous_format:
        return "NCHW"
    said = "ours" if copy.by_kernel else "library"
    said += " weight" * copy.copies_weight
    return said + " stride 1x1" * copy.skips_unread + " early" * copy.early


def test_every_recorded_choice_is_made_again():
    wrong = []
    for row in rows():
        problem, hardware = recorded_problem(row)
        backward = choose_backward(problem, hardware)[:2]
        otherwise, copy = (words(problem, copy) for copy in choose_copies(problem))
        found = (choose(problem, hardware)[0], *backward, copy, otherwise)
        expected = tuple(row[name] for name in ("rung", "grad_input", "grad_weight", "copy", "copy_else"))
        if found != expected:
            wrong.append((tuple(row.values()), found))
    assert not wrong, f"{len(wrong)} choices differ; the first: {wrong[0]}"


def test_the_record_holds_every_rung_and_many_problems():
    recorded = rows()
    assert len(recorded) > 3000
    assert Counter(row["rung"] for row in recorded).keys() == {
        *("conv2d_scale_min", "conv_direct", "conv_mma", "conv_wgmma", "conv_wgmma_ieee", "composite")
    }
    assert {row["capability"] for row in recorded} == {"cpu", *(f"{major}.{minor}" for major, minor in SHARED)}
    assert {row["dtype"] for row in recorded} == {"float32", "float16", "bfloat16", "float64"}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (2, 1, 1, 5), (3, 4, 5, 1), (0, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("margin", [0, 1])
def test_a_problem_knows_its_inputs_layout_as_torch_does(shape, order, margin):
    padded = [size + margin for size in shape]
    input = torch.empty([padded[d] for d in order]).permute([order.index(d) for d in range(4)])
    input = input[tuple(slice(size) for size in shape)]
    problem = describe_problem(input, (2, shape[1], 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, "ieee")
    assert problem.is_contiguous == input.is_contiguous()
    is_channels_last = shape[1] > 1 and input.is_contiguous(memory_format=torch.channels_last)
    assert problem.is_channels_last == is_channels_last
