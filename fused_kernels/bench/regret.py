"""How good the choice is on layers that it was not made from: what it loses to the best candidate, what it gains on others."""

import math
from dataclasses import dataclass
from pathlib import Path

from .. import choice
from ..candidates import Hardware
from ..measured import FORWARD, hardware_facts, read
from . import records
from .workloads import problem_of


@dataclass(frozen=True)
class Cell:
    """One row of a draw, and what became of it.

    Attributes
    ----------
    row : Row
    chosen : str
        The candidate that is chosen.
    regret : float
        What it costs (:func:`fused_kernels.choice.costs`) over what the best candidate does; 1 where their times overlap.
    gain : float
        The better of eager's and torch.compile's time over its time.
    possible : float
        The same for the best candidate.
    """

    row: object
    chosen: str
    regret: float
    gain: float
    possible: float


def data_dir():
    """Give the folder of the draws' records."""
    return records.data_dir() / "draws"


def judge(rows, hardware, name_candidate=None):
    """Judge the choice on rows of one GPU.

    Parameters
    ----------
    rows : list of Row
    hardware : Hardware
    name_candidate : callable, optional
        Row -> the candidate that runs; by default what is chosen by estimate.

    Returns
    -------
    list of Cell
    """
    name_candidate = name_candidate or (lambda row: by_estimate(row, hardware))
    return [_cell(row, name_candidate(row)) for row in rows if row.direction == "forward"]


def by_estimate(row, hardware):
    """Name the candidate that is chosen by estimate."""
    decision = choice.choose(problem_of(row), hardware)
    if decision.rung != "composite":
        return decision.rung
    return "copied" if decision.copies[1] and "copied" in row.times else "composite"


def _cell(row, chosen):
    costs = choice.costs({name: 1e-6 * row.times[name].p50 for name in FORWARD if name in row.times})
    best = min(costs, key=costs.get)
    ours, least = row.times[chosen], row.times[best]
    regret = 1.0 if ours.p20 <= least.p80 else costs[chosen] / costs[best]
    others = min(row.times[name].p50 for name in ("eager", "compile") if name in row.times)
    return Cell(row, chosen, regret, others / ours.p50, others / least.p50)


def geometric_mean(values):
    """Give the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def quantile(values, share):
    """Give the value below which this share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def summary(cells):
    """Say in lines how good the choice was, and what remains behind, by class."""
    regrets, gains = [cell.regret for cell in cells], [cell.gain for cell in cells]
    behind = [cell for cell in cells if cell.gain < 0.98]
    lines = [
        f"{len(cells)} cells. Regret: geometric mean {geometric_mean(regrets):.3f}, "
        f"95th percentile {quantile(regrets, 0.95):.2f}, worst {max(regrets):.2f}.",
        f"Over the better of eager and torch.compile: geometric mean {geometric_mean(gains):.2f}, "
        f"with the best candidate {geometric_mean([cell.possible for cell in cells]):.2f}; behind by more than 2 %: "
        f"{len(behind)}, of which a candidate would win {sum(cell.possible >= 0.98 for cell in behind)}.",
    ]
    for name, found in _classes(cells).items():
        behind = [cell for cell in found if cell.possible < 0.98]
        if behind:
            worst = min(behind, key=lambda cell: cell.possible)
            lines.append(
                f"behind with every candidate, {name}: {len(behind)} of {len(found)}, "
                f"geometric mean {geometric_mean([cell.possible for cell in behind]):.2f}, worst {worst.possible:.2f} "
                f"({worst.row.layer}, {worst.row.precision}, {worst.row.layout})"
            )
    return "\n".join(lines)


def sentences(folder=None):
    """Say for the README how good the choice is on all layers that were drawn; "" where none were."""
    parts = []
    for file in sorted(Path(folder or data_dir()).glob("*.csv")):
        rows, hardware = read(file), Hardware(*hardware_facts(file))
        cells = judge(rows, hardware)
        layers, behind = len({cell.row.layer for cell in cells}), sum(cell.gain < 0.98 for cell in cells)
        chosen, best = (geometric_mean(gains) for gains in ([c.gain for c in cells], [c.possible for c in cells]))
        text = (
            f"On {layers} layers drawn at random ({len(cells)} cases: float32 at TF32 and bfloat16, NCHW and channels_last; "
            f"{hardware.name}) the kernel that is chosen by recorded times is {chosen:.2f} times as fast as the better of "
            f"eager and torch.compile (geometric mean, by the GPU's time alone), and behind that by more than 2 % in {behind} "
            f"cases; the best candidate is {best:.2f} times as fast, where what conv_triton costs to compile and launch "
            f"counts. {losses('The choice', [cell.regret for cell in cells])}"
        )
        tried = [row for row in rows if row.trial]
        if tried:
            cells = judge(tried, hardware, lambda row: row.trial.split()[0])
            text += (
                f" With `torch.backends.cudnn.benchmark = True`, which times the candidates on a layer's first call, it is "
                f"{geometric_mean([c.gain for c in cells]):.2f} times as fast, and behind in "
                f"{sum(c.gain < 0.98 for c in cells)} cases. {losses('What it keeps', [cell.regret for cell in cells])}"
            )
        parts.append(text)
    return "\n\n".join(parts)


def losses(what, regrets):
    """Say what is lost to the best candidate."""
    return (
        f"{what} takes {geometric_mean(regrets):.3f} times as long as the best candidate (geometric mean), in 95 of 100 cases "
        f"at most {quantile(regrets, 0.95):.2f} times, at worst {max(regrets):.2f} times."
    )


def _classes(cells):
    """Sort cells by what makes a layer hard: name -> cells."""
    tests = {
        "groups": lambda layer: layer.groups > 1,
        "stride 2 and more": lambda layer: layer.groups == 1 and layer.stride > 1,
        "1 x 1": lambda layer: layer.groups == layer.stride == layer.kernel_h == layer.kernel_w == 1,
        "fewer than 9216 pixels": lambda layer: layer.pixels < 9216,
        "other": lambda layer: True,
    }
    found = {name: [] for name in tests}
    for cell in cells:
        found[next(name for name, test in tests.items() if test(cell.row.layer))].append(cell)
    return found
