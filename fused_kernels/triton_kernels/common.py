"""What the Triton rungs share: a minimum that keeps NaN, and an interpreter that works beside today's NumPy."""

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def smaller(a, b):
    """Give the smaller number, or NaN where one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


def check_input(input, bias, scale, scales, channels):
    """Raise unless an operator called directly gave what can be read; ``channels`` compete."""
    _expect(input.dim() == 4, f"input: expected 4 dimensions (N, C, H, W), got {input.dim()}")
    in_range = 0 < input.shape[1] < 2**31 - 4096
    _expect(in_range, f"input: expected at least one channel and fewer than 2^31 - 4096, got {input.shape[1]}")
    if bias is not None:
        _expect(bias.shape == (channels,), f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
        is_wider = bias.dtype == torch.float32 and input.dtype.itemsize == 2
        _expect(bias.dtype == input.dtype or is_wider, f"bias: expected {input.dtype}, or float32 for it, got {bias.dtype}")
        _expect(bias.device == input.device, f"bias: expected the input's device {input.device}, got {bias.device}")
    if scales is not None:
        _expect(scale == 1, f"scale: expected 1 beside scales, got {scale}")
        _expect(scales.shape == (channels,), f"scales: expected shape ({channels},), got {tuple(scales.shape)}")
        wanted = torch.float64 if input.dtype == torch.float64 else torch.float32
        _expect(scales.dtype == wanted, f"scales: expected {wanted}, got {scales.dtype}")
        _expect(scales.device == input.device, f"scales: expected the input's device {input.device}, got {scales.device}")


def check_conv(input, weight, stride, padding, dilation, groups):
    """Raise unless a convolution's operator called directly gave what can be read."""
    for name, given, length in (("stride", stride, 2), ("padding", padding, 4), ("dilation", dilation, 2)):
        _expect(len(given) == length, f"{name}: expected {length} integers, got {len(given)}")
    least = min(*stride, *dilation, groups)
    _expect(least > 0, f"stride, dilation, groups: expected positive integers, got {least}")
    _expect(min(padding) >= 0, f"padding: expected no negative number, got {min(padding)}")
    _expect(weight.dim() == 4 and weight.numel() > 0, "weight: expected 4 dimensions, none of size zero")
    fits = len(weight) % groups == 0 and weight.shape[1] * groups == input.shape[1]
    _expect(fits, f"input: expected {weight.shape[1] * groups} channels in {groups} groups, got {input.shape[1]}")
    is_like = weight.dtype == input.dtype and weight.device == input.device
    _expect(is_like, f"weight: expected {input.dtype} on {input.device}, got {weight.dtype} on {weight.device}")
    for i in range(2):
        padded = input.shape[2 + i] + padding[2 * i] + padding[2 * i + 1]
        _expect(padded > dilation[i] * (weight.shape[2 + i] - 1), "weight: expected a kernel no larger than the padded input")


def _expect(holds, sentence):
    if not holds:
        raise RuntimeError(sentence)


def new_results(input, channels, size, winners):
    """Allocate the minima, and each pixel's winner or None."""
    output = input.new_empty((input.shape[0], 1, *size))
    if not winners:
        return output, None
    return output, torch.empty_like(output, dtype=torch.uint8 if channels <= 256 else torch.int32)


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
