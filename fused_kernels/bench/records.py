"""What was measured, as lines of figures/data: reading, appending and selecting them. Nothing here measures."""

import csv
import io
from dataclasses import dataclass, fields
from pathlib import Path

from .. import files

# The clock states: the same kernel takes longer on a GPU that has been busy with nothing else for seconds.
CLOCKS = IN_TURNS, SUSTAINED = "in turns", "sustained"


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts of one run, which all its records share; ``run`` is one id per invocation."""

    date: str
    commit: str
    machine: str
    device: str
    driver: str
    cuda: str
    torch: str
    run: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What one measurement is of.

    ``rung`` names a rung or a peer ("eager", "compile", "compile-max-autotune", "cudnn-graph"), the library's convolution alone
    ("library", operator "conv2d"), or a ceiling (operator "ceiling": "copy", "read", "read-sum" by torch.sum, "matmul").
    Where the operator is "choice", the rung is what conv2d_scale_min chose for the shape, and its time the public function's;
    where it is "host", times are the processor's for a call, and "operator" is that rung's operator by itself.
    Direction "training" is forward and backward with all three gradients; "forward with winners" and "backward" are its parts,
    whose operator is "grad_input" or "grad_weight".
    ``clock`` names the state: "in turns" with what it is compared with, or "sustained", the same call back to back for seconds
    until clock and power have settled. In both is the whole model alone, on a GPU; everything else is in turns.
    """

    operator: str
    rung: str
    precision: str
    dtype: str
    layout: str
    shape: str
    direction: str = "forward"
    clock: str = IN_TURNS


@dataclass(frozen=True, kw_only=True)
class Record(Subject, RunInfo):
    """One measurement, one line of figures/data/<machine>.csv: the facts of its run, its subject, and what was found.

    ``bytes`` counts what must move at the least, for the whole model also between the kernels that the work is divided into.
    The errors of "backward" are relative, given the same winners. A whole training step has no recorded error, because its
    winners are its own, and its ``peak_bytes`` do not count the input. Ratios are taken within one run.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    bytes: int
    flops: int
    peak_bytes: int
    rms_error: float
    max_error: float
    correct: bool

    @classmethod
    def of(cls, info, subject, timing, *, bytes, flops=0, peak_bytes=0, errors=(0.0, 0.0), correct=True):
        """Make a record.

        Parameters
        ----------
        info : RunInfo
        subject : Subject
        timing : Timing
            In seconds.
        bytes, flops, peak_bytes : int
        errors : pair of float
            rms and maximum.
        correct : bool
        """
        # Three figures of an error are more than enough; more only make the file hard to read.
        rms, most = (float(f"{error:.3g}") for error in errors)
        times = {f"{name}_ms": round(1e3 * getattr(timing, name), 6) for name in ("p20", "p50", "p80")}
        found = {"bytes": bytes, "flops": flops, "peak_bytes": peak_bytes, "rms_error": rms, "max_error": most}
        return cls(**vars(info), **vars(subject), **times, **found, correct=correct)

    @property
    def gbps(self):
        """The rate at which its bytes move, GB/s."""
        return self.bytes / self.p50_ms / 1e6

    @property
    def tflops(self):
        """The rate of its arithmetic, TFLOP/s."""
        return self.flops / self.p50_ms / 1e9


# As they stand in a file. The clock is the last, for it came last: lines from before it end without one.
_COLUMNS = sorted(fields(Record), key=lambda field: field.name == "clock")


def data_dir():
    """Give the folder of the records: figures/data of the checkout that holds this package, else of the current folder."""
    checkout = Path(__file__).parent.parent.parent
    base = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return base / "figures" / "data"


def file_of(machine, data=None):
    """Name the file of a machine's records."""
    return Path(data or data_dir()) / f"{machine}.csv"


def read(machine=None, data=None):
    """Read what was recorded, on one machine or on all of them, oldest first.

    Raises
    ------
    ValueError
        A file holds something else.
    """
    folder = Path(data or data_dir())
    found = []
    for file in sorted(folder.glob("*.csv")) if machine is None else [file_of(machine, folder)]:
        if file.exists():
            with file.open(newline="", encoding="utf-8") as lines:
                found += [_parse(row, file) for row in csv.DictReader(lines)]
    return found


def append(new, data=None):
    """Append records to their machines' files."""
    for machine in dict.fromkeys(record.machine for record in new):
        file = file_of(machine, data)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator="\n")
        if file.exists():
            _name_all_columns(file)
        else:
            writer.writerow(column.name for column in _COLUMNS)
        chosen = (record for record in new if record.machine == machine)
        writer.writerows([getattr(record, column.name) for column in _COLUMNS] for record in chosen)
        files.append(file, lines.getvalue())


def _name_all_columns(file):
    """Write the first line anew where it lacks the last columns; what was measured stays as it is."""
    head, end, measured = file.read_bytes().partition(b"\n")
    names, found = [column.name.encode() for column in _COLUMNS], head.strip().split(b",")
    if found != names and found == names[: len(found)]:
        with files.whole(file) as partial:
            partial.write_bytes(b",".join(names) + end + measured)


def latest(records, **where):
    """Select the newest run among the records that match, such as ``latest(all, machine="cpu", operator="scale_min")``.

    As :func:`select` does, in one clock state; ``clock=CLOCKS`` keeps both.
    """
    matching = select(records, **where)
    if not matching:
        return []
    run = max(matching, key=lambda r: r.date).run
    return [r for r in matching if r.run == run]


def select(records, **where):
    """Select the records whose fields have these values, a tuple standing for any of its members.

    Where no ``clock`` is asked for, in turns: of what was measured in both clock states, the one that compares with all else.
    """
    where = {"clock": IN_TURNS} | where
    return [
        r for r in records if all(getattr(r, k) in v if isinstance(v, tuple) else getattr(r, k) == v for k, v in where.items())
    ]


def _parse(row, file):
    convert = {int: lambda s: int(float(s)), float: float, bool: lambda s: s == "True", str: str}
    if row.get("clock") is None:
        row["clock"] = IN_TURNS
    try:
        return Record(**{column.name: convert[column.type](row[column.name]) for column in _COLUMNS})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data: expected a folder of bench's records, got {file}, which holds something else") from error
