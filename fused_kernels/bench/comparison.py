"""Candidates for one result: each is held against float64 before its time counts, then all are timed, in turns or sustained."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .. import check, progress
from ..check import Errors
from ..rungs import rungs
from .records import IN_TURNS, SUSTAINED, Record, RunInfo, Subject


@dataclass(frozen=True)
class Candidate:
    """Something to check and to time: ``make()`` gives the function, or raises where this machine lacks it."""

    rung: str
    make: Callable[[], Callable[[], torch.Tensor]]
    bytes: int
    flops: int = 0
    operator: str = "conv2d_scale_min"


@dataclass(frozen=True)
class _Checked:
    """A candidate's function that runs here, and what running it once has shown."""

    function: Callable[[], object]
    errors: Errors
    correct: bool
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """What candidates have in common.

    Attributes
    ----------
    info : RunInfo
    subject : Subject
        Of every candidate, except that operator and rung are the candidate's own.
    input : Tensor
        What they all read.
    target : Tensor
        The result in float64, of the :func:`ends` of the batch alone.
    library : Errors, optional
        Of PyTorch's own convolution; without it, results are held to one rounding.
    """

    info: RunInfo
    subject: Subject
    input: torch.Tensor
    target: torch.Tensor
    library: Errors | None = None

    def run(self, candidates, clock, *, reads=None, prepare=None, sustained=None):
        """Check every candidate, then time those that run.

        Parameters
        ----------
        candidates : list of Candidate
            PyTorch's own first.
        clock : callable
            Functions -> timings, under the same keys.
        reads : dict, optional
            Name -> a read-only reduction of the input; they are timed in the same turns, and the fastest is a ceiling.
        prepare : callable, optional
            Makes of a checked function the one that is timed.
        sustained : callable, optional
            Function -> its timing in the sustained clock state, which becomes a second record.

        Returns
        -------
        list of Record
        """
        ready = self._check(candidates, prepare)
        with progress.task(f"timing {len(ready)} of {candidates[0].operator} ({self._where})"):
            functions = {candidate: checked.function for candidate, checked in ready.items()}
            timings = clock({**functions, **(reads or {})})
        by_clock = {IN_TURNS: timings}
        if sustained:
            by_clock[SUSTAINED] = {}
            for candidate, function in functions.items():
                with progress.task(f"timing {candidate.rung}, sustained ({self._where})"):
                    by_clock[SUSTAINED][candidate] = sustained(function)
        torch.compiler.reset()
        done = []
        for state, found in by_clock.items():
            done += [self._record(c, checked, found[c], state) for c, checked in ready.items()]
        if reads:
            best = min(reads, key=lambda name: timings[name].p50)
            for rung, name in (("read", best), ("read-sum", "sum")):
                subject = replace(self.subject, operator="ceiling", rung=rung)
                done.append(Record.of(self.info, subject, timings[name], bytes=self.input.nbytes))
        return done

    def _check(self, candidates, prepare):
        """Run every candidate once: candidate -> what was found, without those that are missing or wrong."""
        ready = {}
        for candidate in candidates:
            try:
                with progress.task(f"checking {candidate.operator} {candidate.rung} ({self._where})"):
                    function = candidate.make()
                    result, peak = run_and_peak(function, self.input)
                    function = prepare(function) if prepare else function
            except Exception as error:
                if not _may_skip(candidate.rung, error):
                    raise
                print(f"skipped {candidate.rung} ({self._where}): {' '.join(str(error).split())[:300]}")
                continue
            found = check.errors(ends(result), self.target)
            del result
            if candidate is candidates[0]:
                # On the whole batch the library may choose another algorithm than on two images: its larger error is the
                # yardstick.
                library = self.library and Errors.worst(self.library, found)
                limit = check.tolerance(self.input.dtype, library, self.target)
            fine = found.within(limit)
            # A rung that is wrong is not worth a time; a peer may be less exact than promised here, and is then marked.
            if not fine and (candidate.rung in rungs or not found.within(Errors(*(10 * most for most in limit)))):
                print(f"not timed, being WRONG: {candidate.rung} ({self._where}): {found}, at most {limit}")
                continue
            ready[candidate] = _Checked(function, found, fine, peak)
        return ready

    def _record(self, candidate, checked, timing, clock):
        subject = replace(self.subject, operator=candidate.operator, rung=candidate.rung, clock=clock)
        cost = {"bytes": candidate.bytes, "flops": candidate.flops, "peak_bytes": checked.peak_bytes}
        errors = checked.errors.rms, checked.errors.max
        return Record.of(self.info, subject, timing, **cost, errors=errors, correct=checked.correct)

    @property
    def _where(self):
        return f"{self.subject.precision}, {self.subject.layout}"


def available(rung, function):
    """Give the function, or raise where the rung is not available on this machine."""
    if missing := rung.why_unavailable():
        raise RuntimeError(missing)
    return function


def run_and_peak(function, input):
    """Run once; give the result, and the most memory in use on a GPU, input included and what others keep excluded."""
    if input.device.type == "cpu":
        return function(), 0
    function()  # Compiling and building take memory of their own.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before + input.nbytes


def ends(tensor):
    """Take the first and the last image: float64 of the whole batch would cost more than the run."""
    return tensor if len(tensor) <= 2 else tensor[:: len(tensor) - 1]


def _may_skip(rung, error):
    """Tell whether a candidate may be left out: a peer, or a rung that declines; not one that fails to build or crashes."""
    if isinstance(error, torch.AcceleratorError):
        return False
    if rung in ("eager", "library", "reference"):
        return False
    return rung not in rungs or (isinstance(error, RuntimeError) and "Error building extension" not in str(error))
