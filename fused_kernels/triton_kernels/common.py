"""What the Triton rungs share: a minimum that keeps NaN, and an interpreter that works beside today's NumPy."""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def smaller(a, b):
    """Give the smaller number, or NaN where one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


# ---- what is asked of the arguments ----


class Kind(NamedTuple):
    """All of a tensor that says what is launched for it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_aligned: bool  # whether it begins at a multiple of 16 bytes


def kind(tensor):
    """Describe a tensor; None: there is none."""
    if tensor is None:
        return None
    return Kind(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0)


def check_scale(scale, scales):
    """Raise where an operator called directly gave two factors."""
    if scales is not None and scale != 1:
        raise RuntimeError(f"scale: expected 1 beside scales, got {scale}")


def check_input(input, bias, scales, channels):
    """Raise unless an operator called directly gave what can be read; all are Kinds, ``channels`` compete."""
    _expect(len(input.shape) == 4, f"input: expected 4 dimensions (N, C, H, W), got {len(input.shape)}")
    in_range = 0 < input.shape[1] < 2**31 - 4096
    _expect(in_range, f"input: expected at least one channel and fewer than 2^31 - 4096, got {input.shape[1]}")
    if bias is not None:
        _expect(bias.shape == (channels,), f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
        is_wider = bias.dtype == torch.float32 and input.dtype.itemsize == 2
        _expect(bias.dtype == input.dtype or is_wider, f"bias: expected {input.dtype}, or float32 for it, got {bias.dtype}")
        _expect(bias.device == input.device, f"bias: expected the input's device {input.device}, got {bias.device}")
    if scales is not None:
        _expect(scales.shape == (channels,), f"scales: expected shape ({channels},), got {tuple(scales.shape)}")
        wanted = torch.float64 if input.dtype == torch.float64 else torch.float32
        _expect(scales.dtype == wanted, f"scales: expected {wanted}, got {scales.dtype}")
        _expect(scales.device == input.device, f"scales: expected the input's device {input.device}, got {scales.device}")


def check_conv(input, weight, stride, padding, dilation, groups):
    """Raise unless a convolution's operator called directly gave what can be read; input and weight are Kinds."""
    for name, given, length in (("stride", stride, 2), ("padding", padding, 4), ("dilation", dilation, 2)):
        _expect(len(given) == length, f"{name}: expected {length} integers, got {len(given)}")
    least = min(*stride, *dilation, groups)
    _expect(least > 0, f"stride, dilation, groups: expected positive integers, got {least}")
    _expect(min(padding) >= 0, f"padding: expected no negative number, got {min(padding)}")
    _expect(len(weight.shape) == 4 and min(weight.shape) > 0, "weight: expected 4 dimensions, none of size zero")
    out_channels, channels, *kernel = weight.shape
    fits = out_channels % groups == 0 and channels * groups == input.shape[1]
    _expect(fits, f"input: expected {channels * groups} channels in {groups} groups, got {input.shape[1]}")
    is_like = weight.dtype == input.dtype and weight.device == input.device
    _expect(is_like, f"weight: expected {input.dtype} on {input.device}, got {weight.dtype} on {weight.device}")
    for i in range(2):
        padded = input.shape[2 + i] + padding[2 * i] + padding[2 * i + 1]
        _expect(padded > dilation[i] * (kernel[i] - 1), "weight: expected a kernel no larger than the padded input")


def _expect(holds, sentence):
    if not holds:
        raise RuntimeError(sentence)


# ---- what is launched ----


class Launch:
    """A launch of a kernel: grid, and all arguments but the first, which are tensors and a factor.

    To find out which of its compiled kernels some arguments want takes Triton longer than many a kernel runs. So it is asked
    once: all that a Launch is called with must be of the same kinds.
    """

    def __init__(self, kernel, grid, rest, **options):
        self._kernel, self._grid, self._rest, self._options = kernel, (*grid, 1, 1)[:3], rest, options
        self._compiled = None

    def __call__(self, *first):
        """Launch it on the current GPU and stream."""
        if self._compiled is None:
            # Interpreted, nothing is compiled, and None stays.
            self._compiled = self._kernel[self._grid](*first, *self._rest, **self._options)
        else:
            self._compiled[self._grid](*first, *self._rest)


def on(device):
    """Make a device the current one, where it is not."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def new_results(input, shape, winners):
    """Allocate the minima, and each pixel's winner in that dtype, or None."""
    return input.new_empty(shape), None if winners is None else input.new_empty(shape, dtype=winners)


# ---- the interpreter ----


def _mend_interpreter():
    """Let TRITON_INTERPRET=1 run kernels whose loops have a computed end."""
    patch = interpreter._patch_lang_tensor

    # NOTE: Triton 3.6 gives Python an array of one element as such an end, which NumPy 2.4 refuses.
    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if triton.knobs.runtime.interpret:
    _mend_interpreter()
