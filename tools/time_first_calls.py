"""Time first calls, from an empty cache of built kernels and again from a full one; each in a process of its own.

    python tools/time_first_calls.py [forward] [edit] [training] [load]

forward: the reference layer in each dtype, layout and precision of the GPU. edit: a changed kernel. training: a step, and one
after a forward call. load: all kernels. Times are seconds after the imports, until the GPU is done.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BODY = {
    "forward": "with torch.no_grad():\n    layer(x)",
    "training": "layer(x.requires_grad_()).sum().backward()",
    "load": "fk.load()",
    "edit": "rung = fk.rungs[{rung!r}]\n"
    "text = export.flattened(rung.source_file) + chr(10) + '// changed' + chr(10)\n"
    "with torch.no_grad():\n"
    "    fk.edit(rung.name, text)(x, layer.weight, layer.bias, 2.0, precision={precision!r})",
}
CODE = """
import time, torch
import fused_kernels as fk
from fused_kernels import export

x = torch.rand(16, 64, 256, 256, device="cuda", dtype=torch.{dtype}).contiguous(memory_format=torch.{layout})
layer = fk.Conv2dScaleMin(64, 128, 3, 2.0, device="cuda", dtype=torch.{dtype}, precision={precision!r})
torch.cuda.synchronize()
start = time.perf_counter()
{body}
torch.cuda.synchronize()
print(round(time.perf_counter() - start, 1))
"""
PROBLEMS = [("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"), ("float64", "ieee")]
EDITS = [
    ("conv_wgmma", "float32", "tf32"),
    ("conv_wgmma", "bfloat16", "ieee"),
    ("conv_wgmma_ieee", "float32", "ieee"),
    ("conv_mma", "float32", "tf32"),
    ("conv_direct", "float32", "ieee"),
]


def seconds(what, cache, dtype="float32", precision="tf32", layout="contiguous_format", rung=None):
    """Run one first call in a fresh interpreter."""
    body = BODY[what].format(rung=rung, precision=precision)
    code = CODE.format(dtype=dtype, layout=layout, precision=precision, body=body)
    environment = {**os.environ, "FUSED_KERNELS_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return float(done.stdout)


def cold_and_warm(label, what, **problem):
    """Print the time from an empty cache, then from the one that this filled."""
    with tempfile.TemporaryDirectory() as cache:
        print(f"{label:<48}{seconds(what, cache, **problem):>8}{seconds(what, cache, **problem):>8}", flush=True)


def main():
    """Time what the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(BODY))
    wanted = parser.parse_args().what or list(BODY)
    if unknown := set(wanted) - set(BODY):
        parser.error(f"what: expected {', '.join(BODY)}, got {', '.join(sorted(unknown))}")
    print(f"{'':<48}{'cold':>8}{'warm':>8}")
    for dtype, precision in PROBLEMS if "forward" in wanted else ():
        for layout in ("contiguous_format", "channels_last"):
            problem = {"dtype": dtype, "precision": precision, "layout": layout}
            cold_and_warm(f"forward, {dtype} at {precision}, {layout}", "forward", **problem)
    for rung, dtype, precision in EDITS if "edit" in wanted else ():
        cold_and_warm(f"edited {rung}, {dtype}", "edit", rung=rung, dtype=dtype, precision=precision)
    for dtype, precision in PROBLEMS[:4] if "training" in wanted else ():
        cold_and_warm(f"training step, {dtype} at {precision}", "training", dtype=dtype, precision=precision)
    if "training" in wanted:
        with tempfile.TemporaryDirectory() as cache:
            forward, step = (seconds(what, cache, dtype="bfloat16", precision="ieee") for what in ("forward", "training"))
            print(f"forward, then a training step, bfloat16: {forward}, {step} more")
    if "load" in wanted:
        cold_and_warm("load()", "load")


if __name__ == "__main__":
    main()
