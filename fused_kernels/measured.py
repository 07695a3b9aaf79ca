"""What was measured: how long every candidate took on layers drawn at random, one line for a layer in one precision and layout.

The files lie in ``choices/``, one for each GPU; ``python -m fused_kernels bench --choices --record`` appends to them. Where a
candidate came later there is a second line, of its times and those of its best rivals: a later time counts.
"""

import ast
import csv
import re
from pathlib import Path
from typing import NamedTuple

from . import files

FOLDER = Path(__file__).parent / "choices"

# What was timed, in microseconds. Forward: PyTorch's own operations; the composite as the input lies, and with a copy into the
# other layout before it; the fused kernels. And the kernels of the backward pass.
PEERS = ("eager", "compile")
FORWARD = ("composite", "copied", "conv_direct", "conv_mma", "conv_triton", "conv_wgmma", "conv_wgmma_ieee")
GRAD_INPUT = ("grad_input_gather", "grad_input_mma")
GRAD_WEIGHT = ("grad_weight_gather", "grad_weight_private", "grad_weight_sorted")
TIMED = (*PEERS, *FORWARD, *GRAD_INPUT, *GRAD_WEIGHT)


class Layer(NamedTuple):
    """A convolution's sizes."""

    images: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def input_shape(self):
        """(N, C_in, H, W)."""
        return self.images, self.in_channels, self.height, self.width

    @property
    def weight_shape(self):
        """(C_out, C_in / groups, kH, kW)."""
        return self.out_channels, self.in_channels // self.groups, self.kernel_h, self.kernel_w

    @property
    def output_size(self):
        """(H', W')."""
        return tuple(
            (size + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, kernel in ((self.height, self.kernel_h), (self.width, self.kernel_w))
        )

    @property
    def pixels(self):
        """Of the output, all images together."""
        return self.images * self.output_size[0] * self.output_size[1]

    @property
    def flops(self):
        """The convolution's multiplications and additions."""
        return 2 * self.pixels * self.out_channels * self.in_channels // self.groups * self.kernel_h * self.kernel_w

    @property
    def bytes(self):
        """Of input and convolution's output in float32."""
        return 4 * (self.images * self.in_channels * self.height * self.width + self.pixels * self.out_channels)

    def __str__(self):
        how = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        shapes = " * ".join("x".join(map(str, shape)) for shape in (self.input_shape, self.weight_shape))
        return shapes + "".join(f" {name} {value}" for name, value in how.items() if value != usual[name])


class Time(NamedTuple):
    """Microseconds: 20th percentile, median, 80th percentile; three times the median where that alone was kept."""

    p20: float
    p50: float
    p80: float


class Row(NamedTuple):
    """One line: a layer; how it was computed ("tf32", "ieee", "bfloat16", "float16"); the times of what could run."""

    layer: Layer
    precision: str
    layout: str  # "NCHW" or "channels_last"
    direction: str  # "forward", or "training": forward with winners, and the gradients' kernels
    times: dict[str, Time]
    trial: str = ""  # what a trial found fastest, then all that it tried

    @property
    def key(self):
        """What was timed, all lines of which are one row."""
        return self[:4]


_KEY = (*Layer._fields, "precision", "layout", "direction")
_COLUMNS = (*_KEY, *TIMED, "trial")


def read(file):
    """Read a file's rows, each key's once; none if it is not there."""
    rows = {}
    for row in map(_parse, csv.DictReader(_lines(file), restval="")):
        before = rows.get(row.key, row)
        rows[row.key] = row._replace(times=before.times | row.times, trial=row.trial or before.trial)
    return [*rows.values()]


def _lines(file):
    """Give a file's lines without the facts, and without what a run that was killed had written of its last one."""
    text = Path(file).read_text(encoding="utf-8") if Path(file).exists() else ""
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if not line.startswith("#")]


class Index:
    """A file's times, none if it is not there, to be looked up by a row's key: to parse all lines would take too long."""

    def __init__(self, file):
        names, *lines = _lines(file) or [""]
        self._names, self._rest = names.split(",")[len(_KEY) :], {}
        for line in lines:
            *key, rest = line.split(",", len(_KEY))
            self._rest.setdefault(",".join(key), []).append(rest)

    def find(self, *key):
        """Give the medians in microseconds by name; none of what was not timed; ``key``: all its numbers and words."""
        found = {}
        for rest in self._rest.get(",".join(map(str, key)), ()):
            pairs = zip(self._names, rest.split(","), strict=False)
            found |= {name: _time(word).p50 for name, word in pairs if word and name in TIMED}
        return found


def hardware_facts(file):
    """Give the facts of the GPU on which a file was recorded, as its last run wrote them."""
    found = re.findall(r"^# .*?\bhardware=(\(.*?\))(?= \w+=|$).*\n", Path(file).read_text(encoding="utf-8"), re.MULTILINE)
    return ast.literal_eval(found[-1])


def append(file, facts, rows, spread=False):
    """Append rows as they come; the facts of their run, a dictionary, stand before the first one.

    ``spread``: whether the percentiles are kept beside the medians.

    Yields
    ------
    Row
        Each one, once it is written.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    columns, about = _prepare(file), "# " + " ".join(f"{name}={value!r}" for name, value in facts.items()) + "\n"
    with file.open("a", encoding="utf-8") as lines:
        for row in rows:
            words = dict(zip(_KEY, map(str, (*row.layer, *row.key[1:])), strict=True)) | {"trial": row.trial}
            words |= {name: _words(time, spread) for name, time in row.times.items()}
            lines.write(about + ",".join(words.get(name, "") for name in columns).rstrip(",") + "\n")
            about = ""
            lines.flush()
            yield row


def _prepare(file):
    """Take away what a run that was killed had written of a line, and add columns that are new; give all columns."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    names, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    columns = list(dict.fromkeys([*filter(None, names.split(",")), *_COLUMNS]))
    files.write(file, "\n".join([",".join(columns), *lines]) + "\n")
    return columns


def _words(time, spread):
    return " ".join(f"{value:.4g}" for value in (time if spread else (time.p50,)))


def _time(words):
    values = [float(word) for word in words.split()]
    return Time(*values) if len(values) == 3 else Time(*values * 3)


def _parse(line):
    layer = Layer(*(int(line[name]) for name in Layer._fields))
    times = {name: _time(line[name]) for name in TIMED if line.get(name)}
    return Row(layer, line["precision"], line["layout"], line["direction"], times, line["trial"])
