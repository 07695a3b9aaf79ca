"""Time compiled layers and networks of one or more versions of the package, side by side; needs a GPU.

    python tools/time_programs.py [FOLDER ...]

FOLDER: where a version of the package lies (``git archive REV fused_kernels | tar -x -C FOLDER``); by default this one's. Each
version runs in a process of its own. Columns: the GPU's time in a CUDA graph, and the processor's time to issue one call, eager
and compiled by torch.compile with its defaults, all in microseconds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
# Channels in and out, kernel, image: some where the library's convolution is chosen, some where a rung is.
LAYERS = [(512, 512, 3, 7), (3, 16, 3, 8), (64, 128, 3, 56), (256, 256, 3, 14), (64, 64, 3, 14)]


class Network(nn.Module):
    """The layer between operations that a compiler writes itself."""

    def __init__(self, in_channels, out_channels, kernel):
        from fused_kernels import Conv2dScaleMin

        super().__init__()
        self.min = Conv2dScaleMin(in_channels, out_channels, kernel, -1.0, padding=kernel // 2)

    def forward(self, x):
        """Map (N, C, H, W) to (N, 1, H, W)."""
        return torch.sigmoid(self.min(x.relu())) * 2


def graph_us(function, calls=20, repeats=30):
    """Give the GPU's median time of a call, replayed from a graph."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls * 1e3)
    return statistics.median(times)


def host_us(function, calls=300, repeats=9):
    """Give the processor's least time to issue a call."""
    for _ in range(50):
        function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times)


def measure():
    """Print a line for each layer, dtype and layout, inference, then training steps."""
    from fused_kernels import dispatch, explain

    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for in_channels, out_channels, kernel, size in LAYERS:
        for dtype, layout in ((torch.float32, "nchw"), (torch.bfloat16, "nchw"), (torch.bfloat16, "channels_last")):
            torch._dynamo.reset()
            form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            model = Network(in_channels, out_channels, kernel).cuda().to(dtype).to(memory_format=form)
            input = torch.randn(32, in_channels, size, size, device="cuda", dtype=dtype).contiguous(memory_format=form)
            rung = explain(input, model.min.weight, model.min.bias, -1.0, padding=kernel // 2).rung
            compiled = torch.compile(model)
            with torch.no_grad():
                compiled(input)
                getattr(dispatch, "finish_builds", lambda: None)()
                compiled(input)
                calls = partial(model, input), partial(compiled, input)
                times = graph_us(calls[1]), *map(host_us, calls)
            label = f"{in_channels} to {out_channels} at {size}, {str(dtype)[6:]}, {layout}: {rung}"
            print(f"{label:<60}" + "".join(f"{t:>10.1f}" for t in times), flush=True)
    layer = Network(3, 16, 3).cuda()
    input, compiled = torch.randn(1, 3, 8, 8, device="cuda", requires_grad=True), torch.compile(layer)
    for function in (layer, compiled):
        function(input).sum().backward()
    getattr(dispatch, "finish_builds", lambda: None)()
    steps = (host_us(lambda f=f: f(input).sum().backward()) for f in (layer, compiled))
    print(f"{'training step, 3 to 16 at 8':<60}{'':>10}" + "".join(f"{t:>10.1f}" for t in steps))


def main():
    """Run this file once for each version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return measure()
    for folder in options.folders:
        if not (folder / "fused_kernels").is_dir():
            parser.error(f"FOLDER: expected one that holds fused_kernels, got {folder}")
        print(f"{folder!s:<60}{'GPU':>10}{'eager':>10}{'compiled':>10}", flush=True)
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        subprocess.run([sys.executable, __file__, "--here"], env=environment, check=True)
    return None


if __name__ == "__main__":
    main()
