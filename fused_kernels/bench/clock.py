"""How calls are timed: warm-up, turns, CUDA events, replayed graphs, seconds back to back, calls that nobody waits for."""

import math
import random
import time
from dataclasses import dataclass

import torch

from .environment import default_device

# A GPU that is kept busy has so many seconds of calls before it: longer than the host is ever late, shorter than its queue.
_WAITING = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 20th and 80th percentiles of ``repeats`` calls."""

    p20: float
    p50: float
    p80: float
    repeats: int


def measure(function, device=None, *, bytes=None, seconds=0.3):
    """Time a function: warm-up, then at least ``seconds`` of calls, 10 at least on a GPU and 5 on a CPU.

    Parameters
    ----------
    function : callable
        Takes no arguments.
    device : torch.device, optional
        By default :func:`default_device`.
    bytes : int, optional
        What one call moves. Where that is less than four times the GPU's L2 cache, the cache is flushed before every call.
    seconds : float

    Returns
    -------
    Timing
    """
    return compare({"": function}, device, bytes=bytes, seconds=seconds)[""]


def compare(functions, device=None, *, bytes=None, seconds=0.3, warm_up=0.1, before=None):
    """Time several functions in turns, so that a drift of the machine's clock affects all of them equally.

    Parameters
    ----------
    functions : dict
        Name -> callable without arguments.
    device, bytes, seconds
        As for :func:`measure`, ``seconds`` for each function on average.
    warm_up : float
        Seconds of calls before the first that counts, for the clocks to settle.
    before : callable, optional
        Called before every call and not timed, in place of the flush: what a call finds in the caches.

    Returns
    -------
    dict
        Name -> :class:`Timing`.
    """
    device = torch.device(device or default_device())
    clock = _cuda_times if device.type == "cuda" else _cpu_times
    before = before or _l2_flush(device, bytes)
    # The first call may build and allocate; the later ones also tell how long a call takes.
    clock(functions, 1, before)
    start, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - start < warm_up:
        clock(functions, 1, before)
        rounds += 1
    mean = (time.perf_counter() - start) / rounds / len(functions)
    least = 10 if device.type == "cuda" else 5
    repeats = max(least, min(1000, math.ceil(seconds / mean)))
    return {name: _timing(times) for name, times in clock(functions, repeats, before).items()}


def sustained(function, device, seconds=3.0):
    """Time a function back to back, until clock and power have settled: of ``seconds`` of calls those of the last third count.

    Parameters
    ----------
    function : callable
        Takes no arguments. What it moves should be far more than the L2 cache holds, as the reference workload's is: nothing is
        flushed in between, which would leave the chip time to recover.
    device : torch.device
        A GPU: no other device is timed in this state.
    seconds : float

    Returns
    -------
    Timing
    """
    if device.type != "cuda":
        raise ValueError(f"device: expected a GPU, got {device}")
    once = min(_cuda_times({"": function}, 3, lambda: None)[""])
    ahead = 2 + math.ceil(_WAITING / once)
    calls, elapsed = [], 0.0
    while elapsed < seconds:
        calls.append(_between_events(function))
        if len(calls) > ahead:
            calls[-ahead - 1][1].synchronize()
            elapsed = calls[0][0].elapsed_time(calls[-ahead - 1][1]) / 1e3
    torch.cuda.synchronize(device)
    first, last = calls[0][0], calls[-1][1]
    settled = 2 / 3 * first.elapsed_time(last)
    return _timing([start.elapsed_time(end) / 1e3 for start, end in calls if first.elapsed_time(start) >= settled])


def replay(function, calls=10):
    """Capture calls of a function in a CUDA graph; replayed, they take none of the host's time.

    Parameters
    ----------
    function : callable
        Takes no arguments; runs on the current GPU, and waits for nothing.
    calls : int
        How many, one after the other.

    Returns
    -------
    callable
        Runs all the calls; gives nothing.
    """
    # What is built or chosen on a first call cannot be captured.
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def _timing(times):
    p20, p50, p80 = (torch.tensor(times, dtype=torch.float64).quantile(q).item() for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(times))


def _cpu_times(functions, repeats, before):
    times = {name: [] for name in functions}
    for name, function in _in_turns(functions, repeats):
        before()
        start = time.perf_counter()
        function()
        times[name].append(time.perf_counter() - start)
    return times


def _cuda_times(functions, repeats, before):
    events = {name: [] for name in functions}
    for name, function in _in_turns(functions, repeats):
        before()
        events[name].append(_between_events(function))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def _between_events(function):
    """Call a function, and give the events before and after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    return start, end


def _in_turns(functions, repeats):
    """Yield every function once per round, each round in another order: each finds the caches as the one before left them."""
    order, shuffle = list(functions.items()), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        yield from order


def _l2_flush(device, bytes):
    """Give a function that writes twice a GPU's L2 cache, or does nothing where the problem itself flushes it."""
    if device.type == "cpu":
        return lambda: None
    size = torch.cuda.get_device_properties(device).L2_cache_size
    if bytes is None or bytes >= 4 * size:
        return lambda: None
    buffer = torch.empty(2 * size, dtype=torch.uint8, device=device)
    return buffer.zero_


def steady(device, bytes, seconds):
    """Give the clock of the large workloads, functions -> timings: on a GPU warm enough to be as fast as it stays."""
    warm_up = 1.0 if device.type == "cuda" else 0.0
    return lambda functions: compare(functions, device, bytes=bytes, seconds=seconds, warm_up=warm_up)


def per_call(timings, calls):
    """Divide timings of so many calls each."""
    return {name: Timing(t.p20 / calls, t.p50 / calls, t.p80 / calls, t.repeats) for name, t in timings.items()}


def unwaited(functions, device, repeats, calls):
    """Time so many calls in a row by the host's clock, in turns."""
    times = {name: [] for name in functions}
    for name, function in _in_turns(functions, repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times[name].append((time.perf_counter() - start) / calls)
    return {name: _timing(found) for name, found in times.items()}
