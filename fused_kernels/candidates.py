"""What can compute a problem on a device: the kernels that can take it, and the copy that the composite can make before it.

Nothing here says what is fast.
"""

from typing import NamedTuple

import torch

from . import plans
from .rungs import rungs, steps
from .triton_kernels import conv_triton_plan

# The fused kernels of each device, and the kernels of the backward pass that there is a choice of.
FUSED = {
    "cpu": ("conv2d_scale_min",),
    "cuda": ("conv_direct", "conv_mma", "conv_triton", "conv_wgmma", "conv_wgmma_ieee"),
}
GRAD_INPUT = {"cpu": ("grad_input",), "cuda": ("grad_input_gather", "grad_input_mma")}
GRAD_WEIGHT = {"cpu": ("grad_weight",), "cuda": ("grad_weight_gather", "grad_weight_private", "grad_weight_sorted")}


class Hardware(NamedTuple):
    """What is asked of a GPU."""

    name: str  # as its driver names it
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # of shared memory, that a block can have
    shared_bytes_per_multiprocessor: int
    clock: float  # Hz, the highest
    bandwidth: float  # bytes per second of its memory, by clock and width


def read_hardware(device):
    """Read what is asked of a device; None of a CPU."""
    return _hardware(device.index) if device.type == "cuda" else None


def _hardware(device_index):
    # Asked once: the question takes as long as a small kernel's launch.
    if device_index not in _hardware_of:
        found = torch.cuda.get_device_properties(device_index)
        shared_bytes = found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
        # In kHz and bits; memory moves two bits a clock.
        rates = found.clock_rate * 1e3, found.memory_clock_rate * 1e3 * 2 * found.memory_bus_width / 8
        # Some virtual and integrated GPUs do not tell.
        rates = rates[0] or 1.5e9, rates[1] or 5e11
        facts = found.name, (found.major, found.minor), found.multi_processor_count
        _hardware_of[device_index] = Hardware(*facts, *shared_bytes, *rates)
    return _hardware_of[device_index]


_hardware_of = {}


def why_not(name, problem, hardware):
    """Say in one sentence why a kernel can't take a problem on such a GPU (None: a CPU), or None."""
    rung = rungs.get(name) or steps[name]
    if reason := rung.why_not(problem.dtype, problem.precision, problem.stride, problem.groups, problem.weight_shape):
        return reason
    if hardware is not None and not rung.runs_on(hardware.capability):
        return f"{name} runs on no GPU of compute capability {'.'.join(map(str, hardware.capability))}"
    check = _CHECKS.get(name)
    if check and (reason := check(name, problem, hardware)):
        return reason
    if hardware is not None and name in plans.PLANNED and plans.plan_costs(problem, hardware)[name] is None:
        return plans.why_unavailable() or f"{name} has no plan for such a shape"
    return None


def legal(names, problem, hardware):
    """Name those that can take a problem; ``names``: of each type of device."""
    return [name for name in names[problem.device.type] if not why_not(name, problem, hardware)]


# ---- forward ----


def _check_fused(name, problem, hardware):
    if max(*problem.input_shape, *problem.stride, *problem.padding, *problem.dilation) >= 2**28:
        return f"{name} counts rows, columns and channels in 32 bits"
    return None


def _check_triton(name, problem, hardware):
    how = conv_triton_plan.plan_of(problem, hardware)
    too_large = conv_triton_plan.why_too_large(how, problem.input_shape[0], problem.weight_shape, problem.groups)
    return _check_fused(name, problem, hardware) or too_large


def _check_wgmma(name, problem, hardware):
    reach = max(d * (k - 1) for d, k in zip(problem.dilation, problem.weight_shape[2:], strict=True))
    if reach > 12:
        return f"{name} has no room in shared memory for a filter that reaches {reach} pixels"
    return _check_fused(name, problem, hardware)


# ---- backward ----


def _check_grad_input_mma(name, problem, hardware):
    out_channels, _, kernel_h, kernel_w = problem.weight_shape
    if problem.taps > 49:
        return f"{name} takes filters of at most 49 taps, not {problem.taps}"
    if problem.input_shape[1] > 65535 * 32 or max(*problem.input_shape, *problem.padding, *problem.dilation) >= 2**28:
        return f"{name} counts rows and columns in 32 bits, chunks of channels in 16"
    # The weights of 32 input channels, and what each of 20 warps works on.
    tile = (4 + (kernel_h - 1) * problem.dilation[0]) * (32 + (kernel_w - 1) * problem.dilation[1])
    if out_channels * problem.taps * 64 + 20 * tile * 8 > hardware.shared_bytes:
        return f"{name} has no room in shared memory for {out_channels} channels of {problem.taps} weights"
    return None


def _check_grad_weight_gather(name, problem, hardware):
    if problem.groups >= 2**16:
        return f"{name} takes fewer than 65536 groups, not {problem.groups}"
    # The kernel counts rows and columns in 16 bits, elements in 32, of a copy as well.
    images, channels, *size = problem.input_shape
    reach = max(size) + sum(problem.padding) + max(problem.weight_shape[2:]) * max(problem.dilation)
    image, channel, row, column = problem.input_strides
    furthest = images * image + channels * channel + reach * (row + column)
    if reach >= 2**15 or max(furthest, problem.input_elements, problem.pixels) >= 2**30:
        return f"{name} counts rows and columns in 16 bits, elements in 32"
    return None


def _check_grad_weight_sorted(name, problem, hardware):
    out_channels, _, kernel_h, kernel_w = problem.weight_shape
    if problem.groups > 1:
        return f"{name} takes one group, not {problem.groups}"
    if problem.taps > 49 or out_channels > 4096:
        return f"{name} takes at most 49 taps and 4096 output channels, not {problem.taps} and {out_channels}"
    # Two tiles of the smallest size: their input, and their pixels in steps of 16 for each 8 output channels.
    tile = ((kernel_h - 1) * problem.dilation[0] + 1) * (63 * problem.stride[1] + (kernel_w - 1) * problem.dilation[1] + 1)
    shared_bytes = 2 * (tile * 80 + (64 // 16 + 1 + -(-out_channels // 8)) * 320) + 2**11
    if tile > 4096 or shared_bytes > hardware.shared_bytes:
        return f"{name} has no room in shared memory for two tiles of {tile} pixels and {out_channels} channels"
    # The kernel counts offsets within a tile in 32 bits.
    _, channel, row, column = problem.input_strides
    _, _, height, width = problem.input_shape
    if height * row + width * column >= 2**31 or max(row, column) >= 2**24 or max(*problem.input_shape, channel) >= 2**28:
        return f"{name} counts offsets within a tile in 32 bits"
    return None


_CHECKS = {
    "conv_direct": _check_fused,
    "conv_mma": _check_fused,
    "conv_triton": _check_triton,
    "conv_wgmma": _check_wgmma,
    "conv_wgmma_ieee": _check_wgmma,
    "grad_input_mma": _check_grad_input_mma,
    "grad_weight_gather": _check_grad_weight_gather,
    "grad_weight_sorted": _check_grad_weight_sorted,
}


def gradient_args(problem, grad, winners, input, weight, scale):
    """Give what the operators of each kind of gradient take, from a forward pass and the gradient that comes in."""
    return {
        "grad_input": (grad, winners, weight, scale, input.shape[2:], *problem.conv, problem.is_channels_last),
        "grad_weight": (grad, winners, input, scale, len(weight), weight.shape[2:], *problem.conv),
    }


# ---- the composite's copy ----


class Copy(NamedTuple):
    """How the composite copies its arguments before the library's convolution."""

    by_kernel: bool  # to_channels_last, else PyTorch's own copy
    memory_format: torch.memory_format
    copies_weight: bool
    skips_unread: bool  # only what a 1 x 1 kernel with a stride reads is copied; the stride that is left is 1
    early: bool  # may begin while the kernel before it ends


def copy_into_other_layout(problem, by_kernel):
    """Say how to copy the input into the layout that it is not in: NCHW into channels_last and back; None: not at all.

    Parameters
    ----------
    problem : Problem
    by_kernel : bool
        Whether to_channels_last may run: it has no gradient.
    """
    if problem.device.type != "cuda" or problem.dtype == torch.float64:
        return None
    is_pointwise = problem.taps == 1
    if problem.is_channels_last and not problem.is_contiguous:
        return Copy(False, torch.contiguous_format, not is_pointwise, False, False)
    # An image of one pixel, or of one channel, lies in both.
    if problem.input_shape[1] == 1:
        return None
    if not (by_kernel and problem.is_contiguous):
        return Copy(False, torch.channels_last, not is_pointwise, False, False)
    skips_unread = is_pointwise and max(problem.stride) > 1 and not any(problem.padding)
    copied = problem.pixels * problem.input_shape[1] if skips_unread else problem.input_elements
    # Beginning early gains up to half a microsecond on small tensors; with a large output it loses as much.
    early = max(2 * copied, problem.pixels * problem.weight_shape[0]) * problem.dtype.itemsize < 2**21
    return Copy(True, torch.channels_last, not is_pointwise, skips_unread, early)
