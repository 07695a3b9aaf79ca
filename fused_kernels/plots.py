"""Every figure, from recorded data: functions take records (:mod:`fused_kernels.bench.records`) and return a Figure.

Only this module imports matplotlib, and only when something is drawn.
"""

import math
from pathlib import Path

from . import files
from .bench.records import CLOCKS, SUSTAINED, latest, select
from .bench.views import PARTS, PEERS, in_order, machines, parts_of_a_step, precision_words, three, whole_model
from .rungs import LADDER

# Peers are grey; a rung keeps its colour in every figure. Told apart by the colour-blind (Okabe and Ito; Tol).
COLOURS = {
    "eager": "#999999",
    "reference": "#999999",
    "compile": "#7f7f7f",
    "compile-max-autotune": "#666666",
    "cudnn-graph": "#404040",
    "library": "#c8c8c8",
    "scale_min_naive": "#cc79a7",
    "scale_min_coalesced": "#e69f00",
    "scale_min_vectorized": "#56b4e9",
    "scale_min_triton": "#aa4499",
    "scale_min": "#56b4e9",
    "composite": "#0072b2",
    "conv_direct": "#ddaa33",
    "conv_mma": "#44aa99",
    "conv_triton": "#aa4499",
    "conv_wgmma": "#117733",
    "conv2d_scale_min": "#117733",
    "conv_wgmma_ieee": "#882255",
    "backward": "#d55e00",
}
OTHER = "#332288"
# Of the parts of a training step.
_PART_COLOURS = ("#117733", "#56b4e9", "#d55e00")
_SUSTAINED = "second time: back to back for three seconds"


def ladder(records, dtype="float32", precision=None):
    """Draw the whole model's time: every rung and peer, with speedups over eager, beside the machine's floors.

    Bars and speedups are of calls in turns; where sustained times are recorded, diamonds and the second numbers are those.

    Parameters
    ----------
    records : list of Record
        Of one run.
    dtype : str
    precision : str, optional
        By default PyTorch's own for this dtype: "tf32" for float32 on a GPU.
    """
    chosen, layouts = whole_model(records, dtype, precision)
    like = {"operator": chosen[0].operator, "direction": "forward", "dtype": dtype, "precision": chosen[0].precision}
    names = in_order(chosen)
    figure, axes = _figure(len(layouts), 1.1 + 0.33 * len(names), sharey=True)
    for axis, layout in zip(axes, layouts, strict=True):
        here = {r.rung: r for r in chosen if r.layout == layout}
        held = {r.rung: r.p50_ms for r in select(records, **like, layout=layout, clock=SUSTAINED)}
        eager = here["eager"].p50_ms
        for y, name in enumerate(names):
            if name not in here:
                continue
            time = here[name].p50_ms
            axis.barh(y, time, color=_colour(name), height=0.72)
            error = [[time - here[name].p20_ms], [here[name].p80_ms - time]]
            axis.errorbar(time, y, xerr=error, color="black", linewidth=0.8)
            speedup = ("" if name == "eager" else f"  {eager / time:.2f}x") + ("" if here[name].correct else "  (less exact)")
            times, end = three(time), max(time, here[name].p80_ms)
            if name in held:
                axis.plot(held[name], y, "D", color="black", markeredgecolor="white", markersize=4.5, label=_SUSTAINED)
                times, end = f"{times} / {three(held[name])}", max(end, held[name])
            _label(axis, end, y, f"{times} ms{speedup}")
        for y, (label, floor) in zip((-0.6, -1.05), _floors(records, chosen[0]).items(), strict=True):
            axis.axvline(floor, color="black", linestyle=":", linewidth=1)
            _label(axis, floor, y, f"{label}, {_ms(floor)}", fontsize=7, color="#404040")
        axis.set_xlim(0, (1.45 if held else 1.32) * max([*(r.p50_ms for r in here.values()), *held.values()]))
        axis.set_ylim(len(names) - 0.4, -1.4)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("ms, less is better")
        axis.set_title(f"{layout} input", fontsize=9, loc="left")
    if marks := axes[0].get_legend_handles_labels()[0]:
        figure.legend(handles=marks[:1], loc="upper right", fontsize=8, frameon=False)
    return _finish(figure, f"min over channels of (scale · conv2d(x)), {precision_words(chosen[0])}", chosen[0])


def roofline(records, dtype="float32", precision=None, layout="NCHW"):
    """Draw the rungs and peers under the ceilings of memory and arithmetic, both as measured.

    To the right, fewer bytes: fusion moves a point there, a better kernel up. A rung that multiplies float32 in float16, at the
    accuracy of TF32, has float16's ceiling, drawn dashed.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    chosen, _ = whole_model(records, dtype, precision)
    chosen = [r for r in chosen if r.layout == layout and r.rung != "reference"]
    memory, rate = _ceilings(records, chosen[0])
    unit, letter = (1e12, "T") if rate > 1e12 else (1e9, "G")
    points = sorted((r.flops / r.bytes, r.tflops * 1e12 / unit, r) for r in chosen if r.p50_ms)
    ridge, top = rate / memory, rate / unit
    left, right = min(ridge, points[0][0]) / 4, max(ridge, points[-1][0]) * 6
    figure, (axis,) = _figure(1, 4.6, width=8)
    axis.plot([left, ridge, right], [left * memory / unit, top, top], color="black", linewidth=1.4)
    axis.text(ridge * 1.2, top * 1.04, f"matmul, {top:.3g} {letter}FLOP/s", va="bottom", fontsize=8)
    highest = top
    faster = select(records, operator="ceiling", rung="matmul", precision="float16")
    if chosen[0].precision == "tf32" and faster:
        highest = faster[0].tflops * 1e12 / unit
        bend, label = highest * unit / memory, f"in float16, {highest:.3g} {letter}FLOP/s"
        axis.plot([ridge, bend, right], [top, highest, highest], "--", color="#808080", linewidth=1)
        axis.text(bend * 1.2, highest * 1.04, label, va="bottom", fontsize=8, color="#606060")
    middle = math.sqrt(left * ridge)
    axis.text(middle * 1.1, middle * memory / unit, f"reading memory, {memory / unit:.3g} {letter}B/s", va="top", fontsize=8)
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    rates = [speed for _, speed, _ in points]
    axis.set_ylim(min(*rates, middle * memory / unit) / 2, max(highest, *rates) * 1.6)
    gap = (axis.get_ylim()[1] / axis.get_ylim()[0]) ** 0.042
    used = {}
    for intensity, speed, r in points:
        axis.plot(intensity, speed, "o", color=_colour(r.rung), markersize=7)
        # Labels of one column keep a line's distance; those of the leftmost stand to the left.
        at = used[intensity] = max(speed, used.get(intensity, 0.0) * gap)
        side = intensity > points[0][0] or len({x for x, _, _ in points}) == 1
        axis.annotate(
            f"{r.rung}, {_ms(r.p50_ms)}",
            (intensity, speed),
            xytext=(intensity * (1.13 if side else 0.88), at),
            fontsize=7.5,
            va="center",
            ha="left" if side else "right",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#808080", "shrinkA": 0, "shrinkB": 3},
        )
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(lambda value, _: f"{value:g}")
        ticks.set_minor_formatter(NullFormatter())
    axis.set_xlabel("FLOP for each byte that has to move into, out of and between the kernels")
    axis.set_ylabel(f"{letter}FLOP/s")
    return _finish(figure, f"Roofline, {precision_words(chosen[0])}, {layout}", chosen[0])


def bandwidth(records):
    """Draw how fast each scale_min gets through its input, beside the fastest read-only reduction of the same bytes."""
    chosen = select(records, operator="scale_min", direction="forward")
    columns = list(dict.fromkeys((r.dtype, r.layout) for r in chosen))
    names = in_order(chosen)
    across = min(len(columns), 2)
    down = math.ceil(len(columns) / across)
    figure, axes = _figure(across, (0.75 + 0.28 * len(names)) * down + 0.3, down=down, sharey=True, sharex=True)
    for axis, (dtype, layout) in zip(axes, columns, strict=False):
        here = {r.rung: r for r in chosen if (r.dtype, r.layout) == (dtype, layout)}
        (ceiling,) = select(records, operator="ceiling", rung="read", dtype=dtype, layout=layout)
        for y, name in enumerate(names):
            if name in here:
                rate = ceiling.bytes / here[name].p50_ms / 1e6
                axis.barh(y, rate, color=_colour(name), height=0.72)
                _label(axis, rate, y, f"{three(rate)}  {rate / ceiling.gbps:.0%}")
        axis.axvline(ceiling.gbps, color="black", linestyle=":", linewidth=1)
        _label(axis, ceiling.gbps, -0.65, three(ceiling.gbps), fontsize=7, color="#404040")
        axis.set_ylim(len(names) - 0.4, -1.0)
        axis.set_xlim(
            0, 1.5 * max(r.gbps for r in records if (r.operator, r.rung, r.shape) == ("ceiling", "read", ceiling.shape))
        )
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{dtype}, {layout}", fontsize=9, loc="left")
    for axis in axes[-across:]:
        axis.set_xlabel("GB/s; dotted: the fastest read of the same bytes")
    return _finish(figure, f"scale_min alone on {chosen[0].shape}", chosen[0])


def where_time_goes(records, dtype="float32", precision=None, layout="NCHW"):
    """Draw how much of the whole model's time is the library's convolution, and how much comes after it (Amdahl's law)."""
    chosen, _ = whole_model(records, dtype, precision)
    here = {r.rung: r for r in chosen if r.layout == layout}
    first = chosen[0]
    (conv,) = select(records, operator="conv2d", dtype=dtype, precision=first.precision, layout=layout)
    split = {rung.name for rung in LADDER if rung.operator == "scale_min"} | {"eager"}
    names = [name for name in in_order(chosen) if name in split and name in here]
    figure, (axis,) = _figure(1, 1.2 + 0.42 * len(names), width=7.5)
    for y, name in enumerate(names):
        total = here[name].p50_ms
        rest = max(total - conv.p50_ms, 0.0)
        axis.barh(y, total - rest, color=COLOURS["library"], height=0.7)
        axis.barh(y, rest, left=total - rest, color=_colour(name), height=0.7)
        _label(axis, total, y, f"{_ms(rest)} after the convolution, {rest / total:.0%}")
    _label(axis, 0, -0.6, f"the library's convolution, {_ms(conv.p50_ms)}")
    axis.set_xlim(0, 1.55 * max(here[name].p50_ms for name in names))
    axis.set_ylim(len(names) - 0.5, -0.9)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("ms")
    return _finish(figure, f"Where the time goes, {precision_words(first)}, {layout}", first)


def precision_against_time(records, layout="NCHW"):
    """Draw the error of peers and fused rungs over their time, every precision: to the left is faster, down more accurate.

    A line stands at eager's error at one precision; fair comparisons are along it.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    fused = {rung.name for rung in LADDER if rung.operator == "conv2d_scale_min" and rung.device}
    chosen = select(records, operator="conv2d_scale_min", direction="forward", layout=layout)
    chosen = [r for r in chosen if r.rung in fused | set(PEERS)]
    # What is exact at every precision stands there once.
    exact = {(r.rung, r.dtype) for r in chosen if r.precision == "ieee"}
    chosen = [r for r in chosen if r.precision == "ieee" or (r.rung, r.dtype) not in exact or r.rung in PEERS]
    if not chosen:
        raise ValueError(f"records: expected some of the whole model in {layout}, got none")
    figure, (axis,) = _figure(1, 3.9, width=8.5)
    shapes = dict(zip(PEERS, "osD^", strict=True))
    for name in in_order(chosen):
        points = [(r.p50_ms, r.rms_error) for r in chosen if r.rung == name]
        size = 38 if name in PEERS else 80
        axis.scatter(
            *zip(*points, strict=True), s=size, color=_colour(name), marker=shapes.get(name, "o"), label=name, zorder=3
        )
    for r in chosen:
        if r.rung == "eager":
            axis.axhline(r.rms_error, color="#b0b0b0", linestyle=":", linewidth=1)
            axis.text(1.01, r.rms_error, precision_words(r), transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.set(xscale="log", yscale="log")
    axis.margins(x=0.08, y=0.12)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_minor_formatter(NullFormatter())
    axis.set_xlabel("ms, less is better")
    axis.set_ylabel("rms error against float64")
    axis.legend(fontsize=8, framealpha=1, edgecolor="#d0d0d0", loc="best")
    return _finish(figure, f"Precision against time, {layout}", chosen[0])


def access_pattern(channels=6):
    """Draw which addresses one load of a warp touches in the naive, the coalesced and the vectorized rung (float32, NCHW).

    Of the 32 channels that the naive rung's warp reads, the first few are shown.
    """
    from matplotlib.patches import Rectangle

    loads = {
        "scale_min_naive": (
            [(lane, 3, 1) for lane in range(32)],
            "one lane per channel: 32 sectors move (6 are shown), 128 of 1024 bytes are used",
        ),
        "scale_min_coalesced": (
            [(0, lane, 1) for lane in range(32)],
            "one lane per pixel: 4 sectors move, 128 of 128 bytes are used",
        ),
        "scale_min_vectorized": (
            [(0, 4 * lane, 4) for lane in range(32)],
            "16 bytes per lane: 16 sectors move, 512 of 512 bytes are used",
        ),
    }
    figure, axes = _figure(1, 5.2, down=3, width=9)
    for axis, (name, (touched, words)) in zip(axes, loads.items(), strict=True):
        for channel in range(channels):
            for sector in range(0, 128, 8):
                moved = any(c == channel and sector <= at < sector + 8 for c, at, _ in touched)
                colour = "#dddddd" if moved else "white"
                axis.add_patch(Rectangle((sector, channel), 8, 0.8, facecolor=colour, edgecolor="#b0b0b0", linewidth=0.5))
        for lane, (channel, at, width) in enumerate(touched):
            if channel < channels:
                axis.add_patch(Rectangle((at, channel), width, 0.8, facecolor=_colour(name), edgecolor="white", linewidth=0.4))
                if width == 4:
                    axis.text(at + 2, channel + 0.42, lane, fontsize=5, ha="center", va="center")
        axis.set_xlim(-0.5, 128.5)
        axis.set_ylim(channels, -0.3)
        axis.set_yticks([0.4, channels - 0.6], ["channel 0", f"channel {channels - 1}"], fontsize=7)
        axis.set_xticks(range(0, 129, 32), [f"{4 * at} B" for at in range(0, 129, 32)], fontsize=7)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.set_title(f"{name}: {words}", fontsize=9, loc="left")
    return _finish(figure, "What one load of a warp touches: a box is a sector of 32 bytes, grey if it moves", None)


def training(records):
    """Draw a training step's time beside its peers', and where ours goes: forward, and the gradients of input and weights.

    Parameters
    ----------
    records : list of Record
        Of one run of ``bench --training``.
    """
    steps = [r for r in select(records, direction="training") if "," not in r.shape and r.dtype != "float16"]
    columns = list(dict.fromkeys((r.precision, r.layout) for r in steps))
    across = min(len(columns), 2)
    down = math.ceil(len(columns) / across)
    names = [*(name for name in PEERS if name in {r.rung for r in steps}), "ours"]
    figure, axes = _figure(across, (0.9 + 0.36 * len(names)) * down + 0.3, down=down, sharey=True)
    for axis, (precision, layout) in zip(axes, columns, strict=False):
        times = {
            r.rung if r.rung in PEERS else "ours": r.p50_ms for r in steps if (r.precision, r.layout) == (precision, layout)
        }
        for y, name in enumerate(names):
            axis.barh(y, times[name], color=_colour(name), height=0.72)
            speedup = "" if name == "eager" else f"  {times['eager'] / times[name]:.2f}x"
            _label(axis, times[name], y, f"{_ms(times[name])}{speedup}")
        # In the shares that they have by themselves, each at a clock of its own.
        parts, left = parts_of_a_step(records, precision, layout), 0.0
        share = times["ours"] / sum(part.p50_ms for part in parts)
        for part, title, colour in zip(parts, PARTS, _PART_COLOURS, strict=True):
            axis.barh(len(names) - 1, share * part.p50_ms, left=left, color=colour, height=0.72, label=title)
            left += share * part.p50_ms
        axis.set_xlim(0, 1.35 * max(times.values()))
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{precision}, {layout}", fontsize=9, loc="left")
    for axis in axes[-across:]:
        axis.set_xlabel("ms, less is better")
    axes[0].legend(loc="lower right", fontsize=7.5, frameon=False)
    return _finish(figure, f"A training step, {steps[0].shape}", steps[0])


def save_all(records, out, training_records=()):
    """Draw every machine's figures from its newest run into a folder; give the paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    drawn = {"access-pattern": access_pattern()}
    for name in machines(records):
        newest = latest(records, machine=name, clock=CLOCKS)
        for draw in (ladder, roofline, bandwidth, where_time_goes, precision_against_time):
            drawn[f"{draw.__name__.replace('_', '-')}-{name}"] = draw(newest)
        for dtype in sorted({r.dtype for r in newest if r.operator == "conv2d_scale_min"} - {"float32"}):
            drawn[f"ladder-{dtype}-{name}"] = ladder(newest, dtype)
    for name in machines(training_records):
        drawn[f"training-{name}"] = training(latest(training_records, machine=name))
    paths = []
    for name, figure in drawn.items():
        paths.append(out / f"{name}.png")
        # Without the date that matplotlib would put in, the same records give the same file.
        with files.whole(paths[-1]) as file:
            figure.savefig(file, dpi=150, metadata={"Software": None})
    return paths


def _ceilings(records, like):
    """Give bytes/s of reading and flop/s of a matmul, as measured in the same run."""
    found = select(records, operator="ceiling", layout="flat", dtype=like.dtype, precision=like.precision)
    rates = {r.rung: r for r in found}
    return rates["read"].gbps * 1e9, rates["matmul"].tflops * 1e12


def _floors(records, like):
    """Give label -> milliseconds: the least that memory and arithmetic take."""
    memory, rate = _ceilings(records, like)
    fused = min(r.bytes for r in select(records, operator=like.operator, dtype=like.dtype))
    return {"input read once": fused / memory * 1e3, f"matmul in {like.precision}": like.flops / rate * 1e3}


def _colour(name):
    return COLOURS.get(name, OTHER)


def _ms(milliseconds):
    return f"{three(milliseconds)} ms"


def _label(axis, x, y, text, fontsize=8, color="black"):
    # A space of its own over the dotted lines.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    space = axis.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=fontsize, color=color)
    space.set_bbox(box)


def _figure(across, height, *, down=1, width=10.0, **shared):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would keep every figure alive, and show it twice in a notebook.
    figure = Figure(figsize=(width, height + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, **shared).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _finish(figure, title, record):
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left", fontweight="bold")
    if record is not None:
        note = f"{record.device}, torch {record.torch}, {record.date[:10]}, {record.commit}"
        figure.supxlabel(note, fontsize=6.5, x=0.99, ha="right", color="#606060")
    return figure
