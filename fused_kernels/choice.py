"""Which rung runs a problem, which copy the composite makes before it, and which operators its backward pass calls.

Each rule first asks what is legal, of what a kernel can take, then what is fast. Fast is what was timed on an H200, and in part
on an H100: the bounds are numbers read off those timings. All rules are functions of a :class:`~fused_kernels.problem.Problem`
and of the GPU's :class:`Hardware` alone.
"""

from typing import NamedTuple

import torch

from . import arguments
from .problem import Problem, check_problem, cudnn_precision, describe_problem
from .rungs import why_unavailable

# Candidate rungs for each device.
SCALE_MIN = {"cpu": "scale_min", "cuda": "scale_min_vectorized"}
CONV2D_SCALE_MIN = {"cpu": ("conv2d_scale_min",), "cuda": ("conv_wgmma_ieee", "conv_wgmma", "conv_mma", "conv_direct")}
# And the operators of their backward passes where there is no choice.
SCALE_MIN_BACKWARD = {"cpu": "scale_min_backward", "cuda": "scale_min_vectorized_backward"}
GRAD_BIAS = {"cpu": "grad_bias", "cuda": "grad_bias_private"}


class Hardware(NamedTuple):
    """What the rules ask of a GPU: its compute capability, and how much shared memory a block can have, in bytes."""

    capability: tuple[int, int]
    shared_bytes: int

    def is_hopper(self):
        """Tell whether it has Hopper's wgmma, which no other GPU has."""
        return self.capability == (9, 0)

    def library_has_wgmma(self):
        """Tell whether the library uses tensor-core instructions that are faster than mma.sync."""
        return self.capability[0] in (9, 10)


def read_hardware(device):
    """Read what the rules ask of a device; None of a CPU."""
    return _hardware(device.index) if device.type == "cuda" else None


def _hardware(device_index):
    # Asked once: the question takes as long as a small kernel's launch.
    if device_index not in _hardware_of:
        shared_bytes = torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin
        _hardware_of[device_index] = Hardware(torch.cuda.get_device_capability(device_index), shared_bytes)
    return _hardware_of[device_index]


_hardware_of = {}


class Copy(NamedTuple):
    """How the composite copies its arguments before the library's convolution."""

    by_kernel: bool  # to_channels_last, else PyTorch's own copy
    memory_format: torch.memory_format
    copies_weight: bool
    skips_unread: bool  # only what a 1 x 1 kernel with a stride reads is copied; the stride that is left is 1
    early: bool  # may begin while the kernel before it ends


class Decision(NamedTuple):
    """All that follows from a problem on one device; the last two may be left open."""

    problem: Problem
    rung: str
    why: str
    backward: tuple[str, ...] | None = None  # operators of the backward pass
    copies: tuple[Copy | None, Copy | None] | None = None  # the composite's, without and with to_channels_last


# Decisions made, by all that they depend on: to make one takes as long as a small kernel.
_decisions = {}
_MOST_DECISIONS = 4096


def decide(input, weight, bias, stride, padding, dilation, groups, precision):
    """Check a fused convolution's arguments and choose; what was decided for the same arguments before is recalled.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    return _recall(check_problem, input, weight, bias, (stride, padding, dilation, groups, precision))


def decide_checked(input, weight, bias, stride, padding, dilation, groups, precision):
    """Choose the same for what an operator was given, which its callers have checked; ``padding`` is that of four sides."""
    # Apart from the padding of the function above by its length.
    return _recall(_describe, input, weight, bias, (tuple(stride), tuple(padding), tuple(dilation), groups, precision))


def _describe(input, weight, bias, *conv):
    arguments.check_tensors(input, weight, bias)
    arguments.check_precision(conv[-1])
    return describe_problem(input, weight.shape, *conv)


def _recall(make_problem, input, weight, bias, given):
    if not _is_exact(given):
        return _decide(make_problem(input, weight, bias, *given))
    precision = given[-1]
    try:
        key = (
            *given,
            cudnn_precision() if precision == "auto" and input.dtype == torch.float32 else None,
            *(input.shape, input.stride(), input.dtype, input.device, input.layout),
            *(weight.shape, weight.dtype, weight.device, weight.layout),
            None if bias is None else (bias.shape, bias.dtype, bias.device, bias.layout),
        )
        decision = _decisions.get(key)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        # What is wrong here, or only has no hash, is found out there.
        return _decide(make_problem(input, weight, bias, *given))
    if decision is None:
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        decision = _decisions[key] = _decide(make_problem(input, weight, bias, *given))
    return decision


def _decide(problem):
    """Choose a rung that is there, or "composite"."""
    device = problem.device
    if device.type not in CONV2D_SCALE_MIN:
        return Decision(problem, "composite", f"no fused kernel for {device.type} tensors")
    of_gpu = read_hardware(device)
    rung, why = choose(problem, of_gpu)
    if rung != "composite" and (missing := why_unavailable(rung, device.index)):
        rung, why = "composite", missing
    return Decision(problem, rung, why, choose_backward(problem, of_gpu), choose_copies(problem))


def _is_exact(values):
    """Tell whether all are integers, strings or tuples of them: to a dictionary, 1.0 and True are 1."""
    types = {*map(type, values)}
    if tuple in types:
        types.remove(tuple)
        return types <= _EXACT and all(_is_exact(value) for value in values if type(value) is tuple)
    return types <= _EXACT


_EXACT = {int, str}


# ---- the rung ----


def choose(problem, hardware):
    """Name the rung that was measured fastest, or "composite", and say why it is no faster one."""
    return _choose_cpu(problem) if hardware is None else _choose_cuda(problem, hardware)


def _choose_cpu(problem):
    (name,) = CONV2D_SCALE_MIN["cpu"]
    out_channels, in_channels, kernel_h, kernel_w = problem.weight_shape
    height, width = problem.output_size
    weights = out_channels * in_channels * kernel_h * kernel_w
    if problem.dtype in (torch.float32, torch.bfloat16) and weights >= 2**18 and height * width < 128:
        # Measured on Zen 4: 512 channels on 7 x 7 pixels leave vector lanes empty and are slow to pack the weights for. The
        # library has no fast float16 or float64 to lose to.
        return "composite", f"{name} is slower on an image so small with channels so many"
    return name, "all in one kernel, for cpu tensors"


# 72 tiles of 128 pixels. With fewer, half of an H200's 132 multiprocessors would have none; the library cuts smaller tiles.
_FEW_PIXELS = 9 * 2**10


def _choose_cuda(problem, hardware):
    wgmma_ieee, wgmma, mma, direct = CONV2D_SCALE_MIN["cuda"]
    if problem.dtype == torch.float64:
        return "composite", "no fused kernel takes float64"
    if max(*problem.input_shape, *problem.stride, *problem.padding, *problem.dilation) >= 2**28:
        return "composite", "the fused kernels count rows, columns and channels in 32 bits"
    out_channels, in_channels, kernel_h, kernel_w = problem.weight_shape
    out_channels = out_channels // problem.groups
    height, width = problem.output_size
    images, taps, pixels = problem.input_shape[0], problem.taps, problem.pixels
    products = in_channels * taps * out_channels * problem.groups  # per pixel
    if problem.groups > 1 and min(in_channels, out_channels) < 64:
        return "composite", "groups so small leave the fused kernels' tiles empty"
    is_float32 = problem.dtype == torch.float32
    if is_float32 and products < 2**11:
        return direct, "all in one kernel; products so few are not worth tensor cores"

    # A filter that reaches further does not fit in shared memory.
    reach = max(d * (k - 1) for d, k in zip(problem.dilation, (kernel_h, kernel_w), strict=True))
    wgmma_is_legal = problem.stride == (1, 1) and problem.groups == 1 and reach <= 12 and hardware.is_hopper()
    # Fewer channels leave rows of its operands empty, which costs time.
    wgmma_has_full_rows = min(in_channels, out_channels) > 32 or (in_channels > 16 and out_channels >= 128)
    if is_float32 and problem.precision == "ieee":
        # Split operands lose more than a shorter sum in float32 does: up to 1.4 times, at 33 products.
        if wgmma_is_legal and wgmma_has_full_rows and pixels >= 2**10 and in_channels * taps >= 2**6:
            return wgmma_ieee, "all in one kernel, float32's accuracy from Hopper's tensor cores"
        # 8 rows by 32 columns are what a warp of conv_direct owns; too few of them leave most of the chip idle.
        strips = images * -(-height // 8) * -(-width // 32)
        if taps == 1 and in_channels > 64:
            return "composite", f"{direct} is slower on a 1 x 1 kernel over channels so many"
        if strips < 256 and pixels * products > 2**24:
            return "composite", f"{direct} is slower on images so small with channels so many"
        return direct, "all in one kernel, in float32 throughout"

    if taps == 1 and out_channels <= in_channels:
        return "composite", f"{mma} is slower on a 1 x 1 kernel that makes no more channels than it gets"
    if products < 2**8:
        return "composite", f"{mma} is slower where an output has products so few"
    channels_are_adjacent = problem.input_strides[1] == 1
    few_pixels = pixels < _FEW_PIXELS
    if taps == 1 and wgmma_is_legal:
        if few_pixels:
            return "composite", f"{mma} is slower on a 1 x 1 kernel where pixels are so few"
        # wgmma reads 16-bit channels_last as it lies in memory; converting anything else pays only with several filter taps.
        if wgmma_has_full_rows and channels_are_adjacent and not is_float32:
            if products >= 2**17 and in_channels > 64:
                return "composite", f"{wgmma} is slower than the library where an output has products so many"
            return wgmma, "all in one kernel, at the rate of Hopper's tensor cores"
    if taps > 1 and wgmma_is_legal:
        if not _beats_library_on_hopper(is_float32, channels_are_adjacent, in_channels, out_channels, taps, pixels):
            return "composite", f"{wgmma} and {mma} are slower on this size, layout and dtype"
        leaves_empty = is_float32 and products < 2**19 and _leaves_tiles_empty(in_channels, out_channels)
        if not wgmma_has_full_rows or leaves_empty or (few_pixels and in_channels <= 32):
            return mma, "all in one kernel, on tensor cores"
        return wgmma, "all in one kernel, at the rate of Hopper's tensor cores"
    # The more products an output has, and the fewer outputs there are, the better the library is at its share of the work.
    # With wgmma it multiplies faster than mma.sync can, unless its tiles stay empty or it has much to write.
    library_has_wgmma = hardware.library_has_wgmma()
    library_is_slow = problem.groups > 1 or in_channels <= 16 or out_channels >= 4 * in_channels or not library_has_wgmma
    if taps == 1 and problem.groups == 1 and library_has_wgmma:
        is_strided = problem.stride != (1, 1)
        if pixels < (2**13 if is_strided and not (is_float32 and channels_are_adjacent) else 2**12):
            return "composite", f"{mma} is slower on a 1 x 1 kernel where pixels are so few"
        if products >= (2**17 if is_float32 else 2**16):
            return "composite", f"{mma} is slower on a 1 x 1 kernel where an output has products so many"
    if is_float32:
        least_pixels = 2**16 if channels_are_adjacent and taps > 1 else 2**14
        mma_is_faster = products < (2**15 if channels_are_adjacent else 2**16) or pixels >= least_pixels
    elif channels_are_adjacent and not library_is_slow:
        mma_is_faster = products < 2**13 or (2**13 <= pixels < 2**17 and products < 2**16)
    else:
        mma_is_faster = (
            products < 2**13
            or (pixels >= 2**11 and products < 2**17)
            or (pixels >= 2**13 and products < 2**18 and library_is_slow)
        )
    if not mma_is_faster:
        return "composite", f"{mma} is slower on this size, layout and dtype"
    return mma, "all in one kernel, on tensor cores"


def _beats_library_on_hopper(is_float32, channels_are_adjacent, in_channels, out_channels, taps, pixels):
    """Tell whether a fused kernel is faster than the library, for 3 x 3 to 7 x 7; each bound is from timing them on an H200."""
    least_channels, products = min(in_channels, out_channels), in_channels * out_channels * taps
    if products < 2**13:
        return True
    # Some of the library's kernels take several times as long as these, however few the pixels are.
    if is_float32 and (taps > 25 or (taps > 9 and least_channels >= 128 and pixels >= 2**12)):
        return True
    if taps > 25 and in_channels <= 32 and out_channels <= 64:
        return True
    if taps > 25 and least_channels >= 64 and out_channels > 64:
        return pixels >= 2**11
    if pixels < _FEW_PIXELS and channels_are_adjacent:
        return is_float32 and least_channels >= 256 and pixels >= 6 * 2**10
    if pixels < _FEW_PIXELS:
        # In NCHW the library has to copy, and that takes its time where channels are few.
        if taps > 25 or in_channels > (48 if taps <= 9 else 32):
            return False
        return not is_float32 or (taps <= 9 and pixels >= 2**12)
    if is_float32:
        return pixels >= 2**14 or (least_channels > 32 and (taps > 9 or in_channels < 128 or out_channels > 64))
    if products >= 2**17 and _leaves_tiles_empty(in_channels, out_channels):
        return False
    if channels_are_adjacent and 16 < in_channels <= 32 and out_channels < 128 and pixels >= 2**17:
        return False
    if not channels_are_adjacent and in_channels > 32 and out_channels <= 64 and 9 < taps <= 25 and pixels < 2**16:
        return False
    return taps > 25 or least_channels < (128 if taps <= 9 and not channels_are_adjacent else 256)


def _leaves_tiles_empty(in_channels, out_channels):
    """Tell whether conv_wgmma's tiles, of 64 input and 64 or 128 output channels, stay empty in part."""
    return (in_channels > 64 and in_channels % 64 > 0) or (out_channels > 64 and out_channels % 128 > 0)


# ---- the composite's copy ----


def choose_copies(problem):
    """Choose the composite's copy where to_channels_last may not run, and where it may."""
    return choose_copy(problem, False), choose_copy(problem, True)


def choose_copy(problem, by_kernel):
    """Choose how the composite copies input and weights, None where that does not pay; measured with cuDNN 9.19.

    The library's tensor-core convolutions want channels_last; given NCHW they copy input, weights and output, which is slow.
    Its 16-bit grouped convolutions are slower in channels_last than copies to NCHW and the convolution together.

    Parameters
    ----------
    problem : Problem
    by_kernel : bool
        Whether to_channels_last may run: it has no gradient.
    """
    if problem.device.type != "cuda" or problem.dtype == torch.float64:
        return None
    out_channels, in_channels, *_ = problem.weight_shape
    is_pointwise, is_strided, is_float32 = problem.taps == 1, max(problem.stride) > 1, problem.dtype == torch.float32
    is_nchw = problem.is_contiguous
    is_channels_last = not is_nchw and problem.is_channels_last
    least_products = 128
    if is_pointwise and is_strided:
        least_products = 32
    elif is_pointwise and not is_float32:
        least_products = 64
    if problem.groups > 1:
        pays = is_channels_last and problem.groups < problem.input_shape[1] and not is_float32
        return Copy(False, torch.contiguous_format, True, False, False) if pays else None
    if in_channels * problem.taps < least_products or is_channels_last:
        return None
    by_kernel = by_kernel and is_nchw
    outputs = problem.pixels * out_channels
    # A 1 x 1 kernel that reads the whole input is a matrix product without any copy, but a slow one where planes are no
    # multiple of 16 bytes, and where it makes more channels than it gets. Its weights are the same in both layouts.
    _, _, height, width = problem.input_shape
    unaligned = height * width * problem.dtype.itemsize % 16 != 0
    gains = not is_pointwise or is_strided or unaligned or out_channels > in_channels
    # In float32 it is also slow over many channels: there a small copy pays.
    gains = gains or (is_float32 and in_channels >= 512 and problem.input_elements < 2**21)
    # PyTorch's own copy is slower, and pays later.
    if outputs < 2**23 and not (by_kernel and in_channels >= 16 and gains):
        return None
    if is_float32 and problem.precision != "tf32":
        return None
    if not by_kernel:
        return Copy(False, torch.channels_last, not is_pointwise, False, False)
    skips_unread = is_pointwise and is_strided and not any(problem.padding)
    copied = problem.pixels * in_channels if skips_unread else problem.input_elements
    # Beginning early gains up to half a microsecond on small tensors; with a large output it loses as much.
    early = max(2 * copied, outputs) * problem.dtype.itemsize < 2**21
    return Copy(True, torch.channels_last, not is_pointwise, skips_unread, early)


# ---- the backward pass ----


def choose_backward(problem, hardware):
    """Choose the operators that make the gradients of input, of weights and bias, and of a bias alone."""
    return choose_grad_input(problem, hardware), choose_grad_weight(problem, hardware), GRAD_BIAS[problem.device.type]


def choose_grad_input(problem, hardware):
    """Choose the operator that makes the gradient of the input, by what was measured on an H200."""
    if hardware is None:
        return "grad_input"
    in_channels, taps = problem.weight_shape[1], problem.taps
    # Bytes gathered in all: grad_input_mma first brings all weights to each multiprocessor, and pays only where these are many.
    bytes = problem.input_elements * taps * problem.dtype.itemsize
    if taps > 1:
        mma_is_faster = bytes >= 5 * 2**25
    elif problem.is_channels_last:
        mma_is_faster = bytes >= 5 * 2**23 and in_channels <= 512
    else:
        mma_is_faster = bytes >= 2**27 and in_channels < 512
    return "grad_input_mma" if mma_is_faster and grad_input_mma_is_legal(problem, hardware) else "grad_input_gather"


def grad_input_mma_is_legal(problem, hardware):
    """Tell whether grad_input_mma can take a problem."""
    out_channels, _, kernel_h, kernel_w = problem.weight_shape
    if not problem.allows_16_bit_operands or problem.groups > 1 or tuple(problem.stride) != (1, 1) or problem.taps > 49:
        return False
    # The weights of 32 input channels, and what each of 20 warps works on.
    tile = (4 + (kernel_h - 1) * problem.dilation[0]) * (32 + (kernel_w - 1) * problem.dilation[1])
    return out_channels * problem.taps * 64 + 20 * tile * 8 + 128 <= hardware.shared_bytes


def choose_grad_weight(problem, hardware):
    """Choose the operator that makes the gradients of weights and bias, by what was measured on an H200."""
    if hardware is None:
        return "grad_weight"
    out_channels, taps, pixels = problem.weight_shape[0], problem.taps, problem.pixels
    in_channels, is_float32 = problem.input_shape[1], problem.dtype == torch.float32
    # The input under a filter is a run of neighbours then.
    channels_are_adjacent = problem.input_strides[1] == 1
    # grad_weight_gather takes groups, but nobody has timed it with them.
    gather_is_timed = problem.groups == 1 and grad_weight_gather_is_legal(problem)
    if not problem.allows_16_bit_operands:
        return "grad_weight_gather" if gather_is_timed and pixels >= 2**10 else "grad_weight_private"
    if not grad_weight_sorted_is_legal(problem, hardware):
        return "grad_weight_gather" if gather_is_timed and channels_are_adjacent else "grad_weight_private"
    # grad_weight_sorted leaves most of its lists empty on an image of few pixels; with one tap or few channels it loads its
    # input for few products.
    if taps == 1 and channels_are_adjacent:
        gather_is_faster = in_channels >= (128 if is_float32 else 256)
    elif taps == 1:
        # grad_weight_gather first copies what it reads of the input, if its vectors are whole; with a stride that is less.
        if max(problem.stride) > 1:
            gather_is_faster = in_channels * out_channels >= (2**15 if is_float32 else 2**16)
        else:
            gather_is_faster = in_channels * out_channels >= 2**17 and pixels < 2**14
        gather_is_faster = gather_is_faster and in_channels % 8 == 0
    else:
        height, width = problem.output_size
        few_pixels = height * width <= 64 and pixels >= 2**10
        gather_is_faster = few_pixels and out_channels >= 256 and (is_float32 or not channels_are_adjacent)
        gather_is_faster = gather_is_faster or (in_channels <= 4 and taps > 25)
    return "grad_weight_gather" if gather_is_timed and gather_is_faster else "grad_weight_sorted"


def grad_weight_gather_is_legal(problem):
    """Tell whether grad_weight_gather can take a problem."""
    if problem.dtype == torch.float64:
        return False
    # The kernel counts rows and columns in 16 bits, elements in 32, of a copy as well.
    images, channels, *size = problem.input_shape
    reach = max(size) + sum(problem.padding) + max(problem.weight_shape[2:]) * max(problem.dilation)
    image, channel, row, column = problem.input_strides
    furthest = images * image + channels * channel + reach * (row + column)
    return reach < 2**15 and max(furthest, problem.input_elements, problem.pixels) < 2**30


def grad_weight_sorted_is_legal(problem, hardware):
    """Tell whether grad_weight_sorted can take a problem."""
    out_channels, _, kernel_h, kernel_w = problem.weight_shape
    if not problem.allows_16_bit_operands or problem.groups > 1 or problem.taps > 49 or out_channels > 4096:
        return False
    # Two tiles of the smallest size: their input, and their pixels in steps of 16 for each 8 output channels.
    tile = ((kernel_h - 1) * problem.dilation[0] + 1) * (63 * problem.stride[1] + (kernel_w - 1) * problem.dilation[1] + 1)
    shared_bytes = 2 * (tile * 80 + (64 // 16 + 1 + -(-out_channels // 8)) * 320) + 2**11
    tile_is_legal = tile <= 4096 and shared_bytes <= hardware.shared_bytes
    # The kernel counts offsets within a tile in 32 bits.
    _, channel, row, column = problem.input_strides
    return tile_is_legal and max(row, column) < 2**24 and max(*problem.input_shape, channel) < 2**28
