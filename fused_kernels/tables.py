"""Every table and counted sentence, from recorded data, as Markdown: README's ladder and the page figures/README.md."""

from pathlib import Path
from statistics import median

from . import files
from .bench.records import CLOCKS, SUSTAINED, latest, select
from .bench.views import PARTS, PEERS, in_order, machines, parts_of_a_step, precision_words, three, time_ratios, whole_model

BEGIN, END = "<!-- ladder:begin -->", "<!-- ladder:end -->"
_DRAWS = "<!-- draws:begin -->", "<!-- draws:end -->"

GENERATED = "<!-- Made by `python -m fused_kernels figures` from data/: do not edit. -->"
_INTRODUCTION = f"""{GENERATED}

# Figures and tables

Every number and every picture comes from [`data/`](data), to which `python -m fused_kernels bench --record` appends. A table
shows one run, in which ours and its peers were timed in turns: compare within a table, not between tables."""

_PICTURES = {
    "roofline": "Roofline: the rate of every rung and peer over FLOP per byte, under the measured ceilings.",
    "bandwidth": "Bars: how fast every scale_min reads its input, beside the fastest read of the same bytes.",
    "where-time-goes": "Bars: the library's convolution, and what comes after it in eager and with every scale_min.",
    "precision-against-time": "Points: rms error against float64 over time, for every peer and fused rung.",
}

_ACCESS_PATTERN = """## What one load of a warp touches

![Three grids of 32-byte sectors, one row per channel. A warp of scale_min_naive touches one sector in each of 32 channels, \
one of scale_min_coalesced four neighbouring sectors of one channel, one of scale_min_vectorized sixteen.]\
(access-pattern.png)"""

_LAYERS = """## Layers of usual networks

The public function beside eager and torch.compile, by the GPU's time alone: calls are replayed from CUDA graphs. Recorded in
[`data/layers/`](data/layers) by `python -m fused_kernels bench --layers --record`."""

_TRAINING = """## Training

The gradient of a channel minimum reaches one channel of each pixel. PyTorch and its compiler write it into a tensor of zeros as
large as the convolution's output, and run two dense convolutions over that. Here each pixel's winner is kept, in one byte, and
the gradients are sums over winners alone: with 128 output channels 1/128 of the work, the same bits every time, and errors no
larger than the library's."""

_TRAINING_PICTURE = (
    "Bars: time of a training step for eager, torch.compile and ours in each precision and layout, {}; "
    "ours is divided into forward, the gradient of the input, and the gradients of weights and bias."
)

_TRAINING_NOTES = """The reference's input is uniform: few channels win most pixels. In normal input all channels win alike, and
in smooth images neighbours share their winner. The parts were timed by themselves, each at the clock that the chip's power
allows it alone. Errors are relative, against float64 given the same winners. Recorded in [`data/training/`](data/training) by
`python -m fused_kernels bench --training --record`."""

_TRAINING_LAYERS = """## Training steps on layers of usual networks

Layers of usual networks gain less, because their convolutions are a larger part of a step. Recorded in
[`data/training-layers/`](data/training-layers) by `python -m fused_kernels bench --training --layers --record`."""

_TWO_CLOCKS = (
    " Of two times the first is that of calls in turns with the column's others, between which the chip stays cool, the second "
    "that of the same call back to back for three seconds, when clock and power have settled; the speedup is the first's."
)

# What has changed since the commit of a table's records; it falls away with the next record.
_SINCE = {
    "76fccbc": "Since this record `scale_min_vectorized` has changed, and `composite` with it.",
    "c8e390b": "Since this record `conv2d_scale_min` has become faster: it shares products now.",
}


def ladder(records, dtypes=("float32", "bfloat16")):
    """Lay out one run's ladder: the whole model's time, sustained where recorded, and its speedup over eager in the column."""
    where = {"operator": "conv2d_scale_min", "direction": "forward", "dtype": tuple(dtypes)}
    whole = select(records, **where)
    held = {(r.rung, r.precision, r.layout): r for r in select(records, **where, clock=SUSTAINED)}
    columns = list(dict.fromkeys((r.precision, r.layout) for r in whole))
    cells = {(r.rung, r.precision, r.layout): r for r in whole}

    def cell(name, column):
        r = cells.get((name, *column))
        if r is None:
            return ""
        times = _time_and_speedup(r, cells[("eager", *column)], held.get((name, *column)))
        return times + ("" if r.correct else " (*)")

    lines = [
        f"Milliseconds, and speedup over eager at the same precision and layout; {whole[0].shape}, forward. "
        f"{_origin(whole[0])}{_TWO_CLOCKS if held else ''}",
        *_heads([f"{precision}, {layout}" for precision, layout in columns] + ["rms error"]),
    ]
    for name in in_order(whole):
        shown = next(cells[(name, *column)] for column in columns if (name, *column) in cells)
        error = f"{shown.rms_error:.1e} {shown.precision}"
        lines.append(_row(name if name in PEERS else f"`{name}`", [*(cell(name, column) for column in columns), error]))
    if not all(r.correct for r in whole):
        lines += ["", "(*) less accurate than 1.1 times the error of PyTorch's own convolution at that precision."]
    return "\n".join(lines)


def training(records, dtypes=("float32", "bfloat16")):
    """Lay out one run's training steps: times, speedups over eager, memory, our parts beside the library's."""
    steps = select(records, direction="training", dtype=tuple(dtypes))
    columns = list(dict.fromkeys((r.precision, r.layout) for r in steps if "," not in r.shape))
    shape = next(r.shape for r in steps if "," not in r.shape)

    def at(rung, column, kind=""):
        (found,) = (r for r in steps if r.shape == shape + kind and (r.precision, r.layout) == column and rung(r.rung))
        return found

    lines = [
        f"Milliseconds of a training step (forward, and the gradients of input, weights and bias), and speedup over eager; "
        f"{shape}. {_origin(steps[0])}",
        *_heads([f"{precision}, {layout}" for precision, layout in columns]),
    ]
    for name in (name for name in PEERS if name in {r.rung for r in steps}):
        found = [(at(name.__eq__, column), at("eager".__eq__, column)) for column in columns]
        lines.append(_row(name, [_time_and_speedup(r, eager) for r, eager in found]))
    for kind in dict.fromkeys(r.shape.removeprefix(shape) for r in steps):
        found = [(at(_is_ours, column, kind), at("eager".__eq__, column, kind)) for column in columns]
        title = f"**fused_kernels**{kind} input" if kind else "**fused_kernels**"
        lines.append(_row(title, [_time_and_speedup(r, eager) for r, eager in found]))
    if any(r.peak_bytes for r in steps):
        found = [(at(_is_ours, column), at("eager".__eq__, column)) for column in columns]
        cells = [f"{r.peak_bytes / 2**30:.2f} GiB, eager {eager.peak_bytes / 2**30:.2f}" for r, eager in found]
        lines.append(_row("memory, input not counted", cells))
    for i, title in enumerate(PARTS):
        cells = []
        for column in columns:
            part = parts_of_a_step(records, *column)[i]
            library = select(records, operator=part.operator, rung="library", precision=part.precision, layout=part.layout)
            cells.append(three(part.p50_ms) + (f", library {three(library[0].p50_ms)}" if library else ""))
        lines.append(_row(title, cells))
    for operator, title in (("grad_input", "error, input"), ("grad_weight", "error, weights")):
        cells = []
        for precision, layout in columns:
            found = select(records, operator=operator, precision=precision, layout=layout, direction="backward")
            ours, library = (next(r for r in found if (r.rung == "library") == is_library) for is_library in (False, True))
            cells.append(f"{ours.rms_error:.1e}, library {library.rms_error:.1e}")
        lines.append(_row(title, cells))
    return "\n".join(lines)


def layers(records):
    """Count in sentences how one run of ``bench --layers`` compares with the better of eager and torch.compile."""
    ratios = time_ratios(select(records, operator="choice"), "eager", "compile")
    return (
        f"{records[0].device}: of {len(ratios)} cases (a layer in one precision and layout), `conv2d_scale_min` takes less "
        f"time than the better of eager and torch.compile in {_faster(ratios)}. {_median_and_worst(ratios)}"
    )


def training_layers(records):
    """Count in sentences how one run of ``bench --training --layers`` compares with eager and torch.compile."""
    steps, host = (select(records, operator=operator) for operator in ("choice", "host"))
    better, eager = time_ratios(steps, "eager", "compile"), time_ratios(steps, "eager")
    # A CPU's steps have one time alone.
    less = "less of the GPU's time" if host else "less time"
    text = (
        f"{records[0].device}: of {len(better)} steps (a layer of 32 images in one precision and layout), {_faster(eager)} "
        f"take {less} than eager's, and {_faster(better)} less than the better of eager's and torch.compile's. "
        f"{_median_and_worst(better)}"
    )
    if not host:
        return text
    eager, compiled = time_ratios(host, "eager"), time_ratios(host, "compile")
    return (
        f"{text} The processor's time counts where the GPU waits for it. Of that, {_faster(compiled)} take less than "
        f"torch.compile's and {_faster(eager)} less than eager's; at worst {_worst(eager)} than eager's. The slower ones call "
        "the library's convolution, mostly a copy before it, and more kernels after it from Python."
    )


def update_readme(path, records, draws=""):
    """Write the first machine's newest ladder, and what is said of the draws, between the README's markers.

    Raises
    ------
    ValueError
        The file lacks the markers.
    """
    path = Path(path)
    newest = latest(records, machine=machines(records)[0], clock=CLOCKS)
    text = _replace(path, path.read_text(encoding="utf-8"), BEGIN, END, ladder(newest))
    if draws:
        text = _replace(path, text, *_DRAWS, draws)
    files.write(path, text)


def _replace(path, text, begin, end, new):
    if begin not in text or end not in text:
        raise ValueError(f"path: expected a file with the lines {begin} and {end}, got {path}")
    before, rest = text.split(begin, 1)
    return "\n\n".join([before + begin, new, end + rest.split(end, 1)[1]])


def figures_page(records, training_records=(), layer_records=(), training_layer_records=()):
    """Write the page of figures/: every machine's newest ladder, pictures, layers and training steps.

    Parameters
    ----------
    records : list of Record
        Of ``bench``, all runs and machines.
    training_records, layer_records, training_layer_records : list of Record
        Of ``bench --training``, ``--layers``, and both.

    Returns
    -------
    str
        Markdown; its links to pictures are those that :func:`fused_kernels.plots.save_all` draws.
    """
    parts = [_INTRODUCTION]
    for name in machines(records):
        newest = latest(records, machine=name, clock=CLOCKS)
        parts += [f"## {newest[0].device}", ladder(newest)]
        if newest[0].commit in _SINCE:
            parts.append(_SINCE[newest[0].commit])
        parts += _pictures(newest, name)
    parts.append(_ACCESS_PATTERN)
    if layer_records:
        parts.append(_LAYERS)
        parts += _counts(layers, layer_records, "layers")
    if training_records:
        parts.append(_TRAINING)
        for name in machines(training_records):
            newest = latest(training_records, machine=name)
            parts += [training(newest), f"![{_TRAINING_PICTURE.format(newest[0].device)}](training-{name}.png)"]
        parts.append(_TRAINING_NOTES)
    if training_layer_records:
        parts.append(_TRAINING_LAYERS)
        parts += _counts(training_layers, training_layer_records, "training-layers")
    return "\n\n".join(parts) + "\n"


def _counts(sentences, records, folder):
    """Make every machine's sentences from its newest run, with the place of the records."""
    return [
        f"{sentences(latest(records, machine=name))} Records: [`data/{folder}/{name}.csv`](data/{folder}/{name}.csv)."
        for name in machines(records)
    ]


def _pictures(records, name):
    """List one machine's pictures, with what they show in words."""
    dtypes = {r.dtype for r in records if r.operator == "conv2d_scale_min"}
    found = []
    for dtype in sorted(dtypes, key=lambda dtype: (dtype != "float32", dtype)):
        chosen, _ = whole_model(records, dtype, None)
        here = [r for r in chosen if r.layout == "NCHW"]
        eager = next(r for r in here if r.rung == "eager")
        best = min(here, key=lambda r: r.p50_ms)
        alt = (
            f"Bars: time of every rung and peer in {precision_words(eager)}, NCHW and channels_last; "
            f"in NCHW from {three(eager.p50_ms)} ms of eager to {three(best.p50_ms)} ms of {best.rung}."
        )
        if select(records, operator="conv2d_scale_min", dtype=dtype, clock=SUSTAINED):
            alt += " Diamonds: the times back to back."
        found.append((f"ladder-{name}" if dtype == "float32" else f"ladder-{dtype}-{name}", alt))
    found += [(f"{kind}-{name}", alt) for kind, alt in _PICTURES.items()]
    return [f"![{alt}]({file}.png)" for file, alt in found]


def _faster(ratios):
    """Count what takes less time: all of them in a word."""
    count = sum(ratio < 1 for ratio in ratios)
    return "all" if count == len(ratios) else str(count)


def _median_and_worst(ratios):
    return f"In the median it takes {median(ratios):.2f} of that time, at worst {_worst(ratios)}."


def _worst(ratios):
    return f"{ratios[-1] - 1:.1%} more" if ratios[-1] > 1 else f"{1 - ratios[-1]:.1%} less"


def _origin(record):
    return f"{record.device}, torch {record.torch}, {record.date[:10]}, commit {record.commit}."


def _heads(titles):
    return ["", f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]


def _row(title, cells):
    return f"| {title} | {' | '.join(cells)} |"


def _is_ours(rung):
    return rung not in PEERS


def _time_and_speedup(record, eager, held=None):
    """Write a time, behind a stroke the sustained one where there is one, and the speedup."""
    times = " / ".join(three(r.p50_ms) for r in (record, held) if r)
    speedup = "" if record.rung == "eager" else f" · {eager.p50_ms / record.p50_ms:.2f}x"
    return times + speedup
