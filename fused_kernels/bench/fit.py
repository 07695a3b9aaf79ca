"""The networks behind the estimates, learnt from the record of one GPU; and what they say of layers that they have not seen."""

import itertools
import json
import math

import numpy as np
import torch

from .. import estimates, files, measured, progress
from ..estimates import TARGETS
from ..measured import FORWARD, GRAD_INPUT, GRAD_WEIGHT
from . import regret
from .workloads import problem_of

# Of each kind of computation one candidate is chosen.
GRADIENTS = {"grad_input": GRAD_INPUT, "grad_weight": GRAD_WEIGHT}
KINDS = {"forward": FORWARD} | GRADIENTS

# Networks, whose mean is taken; their layers; steps of training.
_NETWORKS, _HIDDEN, _STEPS = 2, (128, 128), 4000
_BATCH, _RATE, _DECAY, _DROPOUT, _HUBER = 1024, 3e-3, 0.5, 0.1, 0.3
# Beside each time's error counts what would be lost by a choice that takes the shortest with a probability that falls by e for
# so much of its logarithm; from when the times are roughly learnt; no single layer counts for more than a factor e^1.5.
_LOST, _SOFTNESS, _FROM, _MOST_LOST = 2.0, 0.07, 0.3, 1.5


class Samples:
    """A record's rows as numbers: what the networks are told, the floors, and the times, as logarithms of seconds."""

    def __init__(self, rows, hardware):
        self.rows = [row for row in rows if any(name in row.times for name in TARGETS)]
        described, floors = [], []
        for row in self.rows:
            told, of_row = estimates.describe(problem_of(row), hardware)
            described.append(told)
            floors.append([math.log(of_row.get(name, 1)) for name in TARGETS])
        self.described, self.floors = np.array(described, np.float32), np.array(floors)
        self.times = np.array([[self._time(row, name) for name in TARGETS] for row in self.rows])
        self.known = ~np.isnan(self.times)

    @staticmethod
    def _time(row, name):
        # With winners the forward kernels are slower; the choice between them is the same.
        if name not in row.times or (row.direction == "training") == (name in FORWARD):
            return math.nan
        return math.log(1e-6 * row.times[name].p50)


def fit(rows, hardware):
    """Fit the networks to a record and write them beside it.

    Parameters
    ----------
    rows : list of Row
    hardware : Hardware
        On which they were recorded.

    Returns
    -------
    pathlib.Path
    """
    samples = Samples(rows, hardware)
    (found,) = _train(samples, [np.arange(len(samples.rows))])
    facts = {"hardware": hardware._asdict(), "rows": len(samples.rows)}
    file = measured.FOLDER / f"{estimates.file_name(hardware.name)}.npz"
    # Weights of 16 bits tell the same.
    stored = {name: value.astype(np.float16 if "weight" in name else np.float32) for name, value in found.items()}
    with files.whole(file) as whole:
        np.savez_compressed(whole, facts=json.dumps(facts), **stored)
    return file


def cross_validate(rows, hardware, folds=8):
    """Fit to all layers but some, in turns, and estimate those.

    Returns
    -------
    dict
        For each of :data:`KINDS`: a row's key -> the candidate with the least estimate. Rows in which fewer than two candidates
        were timed have none.
    """
    samples = Samples(rows, hardware)
    layers = sorted({row.layer for row in samples.rows})
    np.random.default_rng(0).shuffle(layers)
    fold = {tuple(layer): i % folds for i, layer in enumerate(layers)}
    of_row = np.array([fold[tuple(row.layer)] for row in samples.rows])
    chosen = {kind: {} for kind in KINDS}
    for i, found in enumerate(_train(samples, [np.flatnonzero(of_row != i) for i in range(folds)])):
        networks = estimates.Networks(found)
        for row in np.flatnonzero(of_row == i):
            seconds = samples.floors[row] + networks.ask(samples.described[row])
            for kind, names in KINDS.items():
                timed = [name for name in names if samples.known[row, TARGETS.index(name)]]
                if len(timed) > 1:
                    least = min(timed, key=lambda name, seconds=seconds: seconds[TARGETS.index(name)])
                    chosen[kind][samples.rows[row].key] = least
    return chosen


def lost_on_layers_left_out(rows, hardware, folds):
    """Say in lines what the choice by estimate loses on layers that were left out of the fit."""
    forward, *gradients = cross_validate(rows, hardware, folds).values()
    whole = [row for row in rows if row.key in forward and "eager" in row.times]
    lines = [regret.summary(regret.judge(whole, hardware, lambda row: forward[row.key]))]
    for (kind, names), chosen in zip(GRADIENTS.items(), gradients, strict=True):
        found = [row for row in rows if row.key in chosen]
        lost = [row.times[chosen[row.key]].p50 / min(row.times[n].p50 for n in names if n in row.times) for row in found]
        if lost:
            lines.append(f"{kind}: {len(found)} cells. {regret.losses('The kernel that is chosen', lost)}")
    return "\n".join(lines)


def _losses(samples, offset):
    """Give for each of KINDS: its columns; their floors, immense where one was not timed; by what each misses the fastest."""
    for names in KINDS.values():
        columns = slice(TARGETS.index(names[0]), TARGETS.index(names[-1]) + 1)
        known, times = samples.known[:, columns], samples.times[:, columns]
        floors = np.where(known, (samples.floors + offset)[:, columns], 1e4)
        fastest = np.where(known, times, np.inf).min(1, keepdims=True)
        lost = np.where(known, np.minimum(times - fastest, _MOST_LOST), 0)
        yield columns, *(torch.from_numpy(array.astype(np.float32)) for array in (floors, lost))


def _train(samples, folds):
    """Train so many networks on each fold's rows, all at once; give for each fold its networks' arrays by name."""
    torch.manual_seed(0)
    mean, deviation = samples.described.mean(0), samples.described.std(0) + 1e-6
    inputs = torch.from_numpy(np.clip((samples.described - mean) / deviation, -4, 4))
    wanted = np.where(samples.known, samples.times - samples.floors, np.nan)
    offset = np.nanmean(wanted, 0)
    targets = torch.from_numpy(np.nan_to_num(wanted - offset).astype(np.float32))
    weights_of = torch.from_numpy(samples.known.astype(np.float32))
    kinds = [*_losses(samples, offset)]
    many = len(folds) * _NETWORKS
    widths = inputs.shape[1], *_HIDDEN, len(TARGETS)
    last = len(widths) - 2
    weights = [
        torch.nn.Parameter(torch.randn(many, a, b) * math.sqrt(2 / a) * (0.1 if i == last else 1))
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    biases = [torch.nn.Parameter(torch.zeros(many, 1, b)) for b in widths[1:]]
    groups = [{"params": weights, "weight_decay": _DECAY}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS, pct_start=0.1)
    rows = [torch.from_numpy(folds[i % len(folds)]) for i in range(many)]
    with progress.task(f"fitting {many} networks to {len(samples.rows)} rows"):
        for step in range(_STEPS):
            batch = torch.stack([r[torch.randint(len(r), (_BATCH,))] for r in rows])
            x = inputs[batch]
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                x = torch.baddbmm(bias, x, weight)
                if i < last:
                    x = torch.nn.functional.dropout(torch.nn.functional.silu(x), _DROPOUT)
            apart, known = (x - targets[batch]).abs(), weights_of[batch]
            loss = torch.where(apart < _HUBER, apart**2 / (2 * _HUBER), apart - _HUBER / 2)
            loss = ((loss * known).sum((1, 2)) / known.sum((1, 2))).sum()
            if step > _FROM * _STEPS:
                for columns, floors, lost in kinds:
                    chosen = torch.softmax(-(x[..., columns] + floors[batch]) / _SOFTNESS, -1)
                    loss = loss + _LOST * (chosen * lost[batch]).sum(-1).mean(1).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    arrays = {f"weight{i}": weights[i] for i in range(last + 1)} | {f"bias{i}": biases[i] for i in range(last + 1)}
    arrays = {name: value.detach().numpy() for name, value in arrays.items()}
    scaling = {"mean": mean, "deviation": deviation, "offset": offset}
    return [scaling | {name: value[fold :: len(folds)] for name, value in arrays.items()} for fold in range(len(folds))]
