"""Measure what a compiler gets out of Triton on a GPU: conv_triton's tiles, and Triton beside the kernels by hand.

    python tools/measure_triton.py [--record [FOLDER]]

The first table is the benchmark in bfloat16 and channels_last by many tiles, in turns. The second one has layers of usual
networks, replayed from CUDA graphs; what a launch takes the processor; the benchmark in turns and sustained, with the shortest
such kernel, "flat"; the same for float32, which it multiplies as TF32; and with a 5-D descriptor, whose boxes are reshaped.
Each result is held against float64 before its time counts. --record appends to FOLDER/triton-tiles and FOLDER/triton-layers,
by default in figures/data, in a file named after the machine: notebook 06's tables.
"""

import argparse
import csv
import dataclasses
import functools
import io
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_kernels import bench, files, rungs
from fused_kernels.bench import clock, environment, peers, records, workloads
from fused_kernels.triton_kernels import conv_triton
from fused_kernels.triton_kernels.common import smaller
from fused_kernels.triton_kernels.conv_triton_plan import Config

# Pixels, output channels, channels of a step, warps, stages, programs on a multiprocessor.
TILES = (
    *((256, 128, 64, 8, 4, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 3, 2)),
    *((256, 128, 32, 8, 7, 1), (256, 64, 64, 8, 2, 2), (256, 128, 128, 8, 2, 1), (128, 256, 64, 8, 4, 1)),
    (256, 128, 64, 4, 4, 1),
)
# Input, output channels, kernel; no padding.
LAYERS = (
    ((32, 64, 56, 56), 64, 3),
    ((32, 128, 28, 28), 128, 3),
    ((32, 256, 14, 14), 256, 3),
    ((32, 80, 56, 56), 256, 5),
    ((8, 512, 50, 50), 512, 3),
    ((32, 32, 384, 384), 80, 3),
)
BY_HAND = ("conv_wgmma", "conv_mma", "composite")
INFO = ("date", "commit", "machine", "device", "torch", "triton")
TILE_FIELDS = (*INFO, "kernel", *Config._fields, "p50_us")
LAYER_FIELDS = (*INFO, "dtype", "layout", "shape", "clock", "kernel", "p50_us")


@triton.jit
def flat(
    x, weight, bias, output, scale, rows, H, W, OUT_H, OUT_W,
    C: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """Do what notebook 06's kernel does for 3 x 3; with BOX_W, a tile is a box of so many columns, not a run of pixels."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), flatten=True):
        sums = tl.zeros([BLOCK_M, K], tl.float32)
        first = tile * BLOCK_M
        if BOX_W:
            image, band, v = first // (H * W), first // (BLOCK_M // BOX_W * W), first // (BLOCK_M // BOX_W) % W
            h, v = band * (BLOCK_M // BOX_W) % H, v // BOX_W * BOX_W
        for step in range(9 * (C // BLOCK_C)):
            tap, c = step // (C // BLOCK_C), step % (C // BLOCK_C) * BLOCK_C
            if BOX_W:
                pixels = x.load([image, h + tap // 3, 0, v + tap % 3, c]).reshape(BLOCK_M, BLOCK_C)
            else:
                pixels = x.load([first + tap // 3 * W + tap % 3, c])
            sums = tl.dot(pixels, weight.load([tap * C + c, 0]), sums)
        least = tl.reduce((sums + tl.load(bias + tl.arange(0, K))) * scale, 1, smaller)
        p = tl.arange(0, BLOCK_M)
        if BOX_W:
            h, v = h + p // BOX_W, v + p % BOX_W
        else:
            image, h, v = (first + p) // (H * W), (first + p) // W % H, (first + p) % W
        tl.store(output + (image * OUT_H + h) * OUT_W + v, least, (first + p < rows) & (h < OUT_H) & (v < OUT_W))


def call_flat(work, block_c, stages, box_w=0):
    """Give the call of that kernel on the benchmark."""
    images, channels, height, width = work.input.shape
    _, out_channels, out_h, out_w = work.output_shape
    taps = work.weight.permute(2, 3, 1, 0).reshape(-1, out_channels).contiguous()
    rows, block_m = images * height * width, 256
    x = TensorDescriptor(work.input, [rows, channels], [channels, 1], [block_m, block_c])
    if box_w:
        shape, strides = [images, height, 1, width, channels], [height * width * channels, *[width * channels] * 2, channels, 1]
        x = TensorDescriptor(work.input, shape, strides, [1, block_m // box_w, 1, box_w, block_c])
    weight = TensorDescriptor(taps, list(taps.shape), [out_channels, 1], [block_c, out_channels])
    output = work.input.new_full((images, 1, out_h, out_w), float("nan"))
    grid = (torch.cuda.get_device_properties(work.input.device).multi_processor_count,)

    def call():
        sizes = rows, height, width, out_h, out_w, channels, out_channels, block_m, block_c, box_w
        flat[grid](x, weight, work.bias, output, work.scale, *sizes, num_warps=8, num_stages=stages)
        return output

    return call


def right(functions, work):
    """Leave out what is wrong, on the first image, or can't run: a time of a wrong result is worth nothing."""
    images = work.input[:1].double()
    target = (F.conv2d(images, work.weight.double(), work.bias.double()) * work.scale).amin(1, keepdim=True)
    found = {}
    for name, function in functions.items():
        try:
            off = float((function()[:1].double() - target).abs().max())
        except triton.runtime.errors.OutOfResources as error:
            print(f"not timed: {name}: {error}")
            continue
        # Four steps of a bfloat16, or of a TF32 product.
        if off <= 0.03 * float(target.abs().max()):
            found[name] = function
        else:
            print(f"not timed, being WRONG: {name}: off by {off:.2g}")
    return found


def tiles(work, seconds):
    """Time the benchmark by every tile: kernel and tile -> Timing."""
    geometry = (1, 1), (0,) * 4, (1, 1), 1
    functions = {("conv_wgmma", None): functools.partial(rungs["conv_wgmma"], *work.arguments)}
    for tile in TILES:
        call = functools.partial(conv_triton.compute, *work.arguments, *geometry, config=Config(*tile))
        functions["conv_triton", tile] = lambda call=call: call()[0]
    return clock.compare(right(functions, work), work.input.device, bytes=work.bytes_moved(4), seconds=seconds, warm_up=1.0)


def layers(device, seconds):
    """Give what was timed: dtype, shape, clock state, kernel, Timing."""
    for shape, out_channels, kernel in LAYERS:
        work = workloads.draw(device, torch.bfloat16, True, shape, out_channels, kernel)
        functions = {name: functools.partial(rungs[name], *work.arguments) for name in ("conv_triton", *BY_HAND)}
        replays = {name: clock.replay(function, 1) for name, function in right(functions, work).items()}
        for name, timing in clock.compare(replays, device, bytes=work.bytes, seconds=seconds / 10).items():
            yield "bfloat16", work.shape, "graph replays", name, timing
    # What a launch takes the processor: flat's as Triton launches, conv_triton's by what it keeps.
    tiny = workloads.draw(device, torch.bfloat16, True, (1, 64, 14, 14), 128, 3)
    functions = {name: functools.partial(rungs[name], *tiny.arguments) for name in ("conv_triton", *BY_HAND)}
    functions["flat"] = call_flat(tiny, 64, 4)
    for name, timing in clock.unwaited(right(functions, tiny), device, 20, 100).items():
        yield "bfloat16", tiny.shape, "launches", name, timing
    for dtype in (torch.bfloat16, torch.float32):
        work = workloads.workload(device, dtype, True)
        names = [name for name in ("conv_triton", *BY_HAND) if not rungs[name].why_not(dtype, "tf32")]
        functions = {name: functools.partial(rungs[name], *work.arguments) for name in names}
        functions["flat"] = call_flat(work, 64 if dtype == torch.bfloat16 else 32, 4)
        if dtype == torch.bfloat16:
            functions["flat with a 5-D descriptor"] = call_flat(work, 64, 4, 64)
        functions["compile"] = peers.compiled(peers.eager(work), "default", *work.arguments)
        functions = right(functions, work)
        turns = clock.compare(functions, device, bytes=work.bytes_moved(4), seconds=seconds, warm_up=1.0)
        for name, timing in turns.items():
            yield workloads.dtype_name(dtype), work.shape, "in turns", name, timing
        for name in ("conv_triton", "conv_wgmma", "conv_mma", "flat", "compile"):
            if name in functions and dtype == torch.bfloat16:
                timing = clock.sustained(functions[name], device)
                yield workloads.dtype_name(dtype), work.shape, "sustained", name, timing


def append(file, fields, rows):
    """Append rows to a file of such."""
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    if not file.exists():
        writer.writerow(fields)
    writer.writerows(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.append(file, lines.getvalue())


@torch.no_grad()
def main():
    """Measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", nargs="?", const=records.data_dir(), type=Path, metavar="FOLDER", help="append to its files"
    )
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    info = dataclasses.asdict(environment.run_info(device)) | {"triton": triton.__version__}
    first = [str(info[name])[:10] if name == "date" else info[name] for name in INFO]
    made, timed = [], []
    for (kernel, tile), timing in tiles(workloads.workload(device, torch.bfloat16, True), 0.2).items():
        made.append([*first, kernel, *(tile or [""] * len(Config._fields)), f"{1e6 * timing.p50:.1f}"])
        print(*made[-1][len(INFO) :], flush=True)
    for dtype, shape, state, kernel, timing in layers(device, 0.2):
        timed.append([*first, dtype, "channels_last", shape, state, kernel, f"{1e6 * timing.p50:.1f}"])
        print(*timed[-1][len(INFO) :], flush=True)
    if options.record:
        for folder, fields, rows in (("triton-tiles", TILE_FIELDS, made), ("triton-layers", LAYER_FIELDS, timed)):
            append(options.record / folder / f"{bench.machine(device)}.csv", fields, rows)


if __name__ == "__main__":
    main()
