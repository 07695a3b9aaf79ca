"""What figures and tables pick from the records, and how they write numbers."""

from ..rungs import LADDER
from .records import select

PEERS = ("eager", "compile", "compile-max-autotune", "cudnn-graph")
# Of a training step, in the order in which they run.
PARTS = ("forward with winners", "gradient of the input", "gradients of weights and bias")


def machines(records):
    """Name the machines: GPUs first, of a family the latest."""
    return sorted({r.machine for r in records}, key=lambda name: (name != "cpu", name), reverse=True)


def whole_model(records, dtype, precision):
    """Select the whole model's records at one precision, and name their layouts."""
    chosen = select(records, operator="conv2d_scale_min", direction="forward", dtype=dtype)
    if precision is None and chosen:
        precision = chosen[0].precision
    chosen = [r for r in chosen if r.precision == precision]
    if not chosen:
        raise ValueError(f"records: expected some of the whole model in {dtype}, got none")
    return chosen, list(dict.fromkeys(r.layout for r in chosen))


def in_order(records):
    """Name eager, then the rungs as they climb, then the other peers; the reference is eager by another name."""
    present = {r.rung for r in records} - {"reference"}
    rungs = [rung.name for rung in LADDER if rung.name in present]
    later = sorted(present - set(rungs) - set(PEERS))
    return [name for name in ("eager", *rungs, *later, *PEERS[1:]) if name in present]


def parts_of_a_step(records, precision, layout):
    """Select our records of the :data:`PARTS` of a training step."""
    where = {"precision": precision, "layout": layout}
    (forward,) = select(records, direction="forward with winners", **where)
    backward = [r for r in select(records, direction="backward", **where) if r.rung != "library"]
    return [forward, *(next(r for r in backward if r.operator == operator) for operator in ("grad_input", "grad_weight"))]


def time_ratios(records, *peers):
    """Give our time over the best of these peers', for every shape, precision and layout: the least first.

    Parameters
    ----------
    records : list of Record
        Of one run and one operator.
    *peers : str
        Such as "eager" and "compile".
    """
    cells = {}
    for r in records:
        cells.setdefault((r.shape, r.precision, r.layout), {})[r.rung] = r.p50_ms
    found = []
    for times in cells.values():
        # One rung of ours was chosen; "operator" is that rung by itself, without the choice.
        (ours,) = (ms for rung, ms in times.items() if rung not in (*PEERS, "operator"))
        found.append(ours / min(times[peer] for peer in peers if peer in times))
    return sorted(found)


def three(value):
    """Write a number with three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def precision_words(record):
    """Name a record's dtype, and its precision where that says more."""
    return record.dtype if record.precision == record.dtype else f"{record.dtype} at {record.precision}"
