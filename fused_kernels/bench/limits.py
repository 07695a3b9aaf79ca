"""What the machine can do at best: its ceilings of copying, reading and multiplying, as measured."""

import functools

import torch

from .. import progress
from .clock import compare, measure
from .environment import default_device
from .records import Record, Subject
from .workloads import dtype_name, shape_name


def ceilings(device=None, dtype=torch.float32, precision=None):
    """Measure what the machine can do at best.

    Parameters
    ----------
    device : torch.device, optional
        By default :func:`default_device`.
    dtype : torch.dtype
    precision : {"ieee", "tf32"}, optional
        Of a float32 matmul on a GPU, "tf32" by default.

    Returns
    -------
    dict
        "copy": bytes/s, read and written, from one buffer of the device to another; "read": bytes/s of the best of a few
        read-only reductions; both over 1 GiB (128 MiB on a CPU). "matmul": flop/s of torch.matmul on square matrices of
        8192 (1024 on a CPU) random normal numbers.
    """
    device = torch.device(device or default_device())
    found = _measured(device, dtype, precision)
    return {name: amount / timing.p50 for name, (amount, timing, _) in found.items()}


def _measured(device, dtype, precision):
    """Give name -> (bytes or flops, timing, shape)."""
    on_gpu = device.type == "cuda"
    flat = torch.rand((2**30 if on_gpu else 2**27) // dtype.itemsize, device=device).to(dtype)
    other, size = torch.empty_like(flat), flat.numel() * dtype.itemsize
    copy = measure(functools.partial(other.copy_, flat), device, bytes=2 * size)
    read = min(compare(reads(flat), device, bytes=size).values(), key=lambda timing: timing.p50)
    shape = str(flat.numel())
    del other, flat
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    # torch.matmul has a setting of its own, which is not the convolutions'.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != "ieee"
    try:
        matmul = measure(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {
        "copy": (2 * size, copy, shape),
        "read": (size, read, shape),
        "matmul": (2 * side**3, matmul, shape_name([side] * 3)),
    }


def reads(tensor):
    """Give read-only reductions of a dense tensor's memory: torch's own sum of a 16-bit type is not the fastest reader."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    words = flat[: flat.numel() // 2 * 2].view(torch.float32)
    return {
        "sum": functools.partial(torch.sum, flat),
        "sum of words": functools.partial(torch.sum, words),
        "amax of words": functools.partial(torch.amax, words),
    }


def ceiling_records(info, device, dtype, precision):
    """Measure the ceilings and give their records."""
    with progress.task(f"measuring the ceilings ({precision})"):
        found = _measured(device, dtype, precision)
    done = []
    for rung, (amount, timing, shape) in found.items():
        bytes, flops = (0, amount) if rung == "matmul" else (amount, 0)
        what = {"precision": precision, "dtype": dtype_name(dtype), "layout": "flat", "shape": shape}
        done.append(Record.of(info, Subject(operator="ceiling", rung=rung, **what), timing, bytes=bytes, flops=flops))
    return done
