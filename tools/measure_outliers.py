"""Measure what a few large values cost the pixels that don't see them: every fused rung beside PyTorch's own operations.

    python tools/measure_outliers.py [--record [FOLDER]]

At each precision and layout, the largest error of any pixel: in units of u times the pixel's own sum of abs(x * w), of the
channel that float64 chooses (u is 2^-11 at "tf32", 2^-24 at "ieee"), and as a share of what bounds.promise allows it. --record
appends it to FOLDER, by default figures/data/outliers, in a file named after the machine.
"""

import argparse
import csv
import dataclasses
import io
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from fused_kernels import bench, bounds, files, rungs
from fused_kernels.bench import environment, records

SHAPE, OUT_CHANNELS = (2, 64, 128, 128), 128
UNITS = {"tf32": 2.0**-11, "ieee": 2.0**-24}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
FIELDS = ("image", "rung", "precision", "layout", "shape", "units", "share")


def images():
    """Give name -> image: normal values, with one that is much larger, and with a dark half."""
    normal = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    yield "normal values", normal
    for size in (1e6, 1e8, 1e10, 1e20):
        spike = normal.clone()
        spike[0, 5, 60, 70] = size
        yield f"one value of {size:.0e}".replace("+", ""), spike
    dark = normal.clone()
    dark[..., SHAPE[3] // 2 :] *= 1e-8
    yield "right half times 1e-8", dark


def measure(device):
    """Give one line for each image, rung, precision and layout that there is."""
    shape = (OUT_CHANNELS, SHAPE[1], 3, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / math.sqrt(math.prod(shape[1:]))
    subject = "x".join(map(str, SHAPE)) + " * " + "x".join(map(str, shape))
    fused = [rung for rung in rungs.values() if rung.operator == "conv2d_scale_min" and rung.device == device.type]
    fused = [rung for rung in fused if not rung.why_unavailable()]
    for image, input in images():
        best = F.conv2d(input.double(), weight.double()).argmin(1, keepdim=True)
        sums = F.conv2d(input.double().abs(), weight.double().abs()).gather(1, best)
        for precision in ("tf32", "ieee") if device.type == "cuda" else ("ieee",):
            promise = bounds.promise(input, weight, precision=precision)
            for layout, memory_format in LAYOUTS.items():
                tensors = [t.to(device).contiguous(memory_format=memory_format) for t in (input, weight)]
                for rung in (rungs["reference"], *fused):
                    if rung.why_not(torch.float32, precision):
                        continue
                    with torch.no_grad():
                        result = rung(*tensors, precision=precision).cpu()
                    # An error of what is not finite counts as infinite.
                    units = (result.double() - promise.target).abs() / (UNITS[precision] * sums)
                    units = units.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
                    name = "eager" if rung.name == "reference" else rung.name
                    found = image, name, precision, layout, subject
                    yield dict(zip(FIELDS, (*found, f"{units:.3g}", f"{promise.share(result):.3g}"), strict=True))


def main():
    """Print the lines; with --record, keep them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="?", metavar="FOLDER", const=records.data_dir() / "outliers")
    folder = parser.parse_args().record
    device = bench.default_device()
    facts = dataclasses.asdict(environment.run_info(device))
    lines = []
    for line in measure(device):
        lines.append(facts | line)
        print(f"{line['image']:24}{line['rung']:18}{line['precision']:6}{line['layout']:15}", end="")
        print(f"{line['units']:>10} units{line['share']:>10} of what is allowed", flush=True)
    if folder is None:
        return
    file = Path(folder) / f"{facts['machine']}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    if not file.exists():
        writer.writeheader()
    writer.writerows(lines)
    files.append(file, text.getvalue())
    print(f"appended to {file}")


if __name__ == "__main__":
    main()
