"""One value for a fused convolution: its checked arguments, and what follows from them.

Made once from a call's arguments; everything below takes it, and nothing there computes sizes or precision again.
"""

from typing import NamedTuple

import torch

from . import arguments


class Problem(NamedTuple):
    """A fused convolution, without the tensors' contents.

    Attributes
    ----------
    input_shape, input_strides : tuple of int
        (N, C_in, H, W); strides in elements.
    weight_shape : tuple of int
        (C_out, C_in / groups, kH, kW).
    stride, dilation : tuple of int
        (vertical, horizontal).
    padding : tuple of int
        (top, bottom, left, right).
    groups : int
    precision : {"ieee", "tf32"}
        What "auto" meant at the call.
    follows_setting : bool
        Whether it was "auto": then PyTorch's own convolution, which reads the same setting, is as exact as is asked.
    dtype : torch.dtype
        Of all tensors.
    device : torch.device
        Of all tensors.
    output_size : tuple of int
        (H', W').
    taps : int
        Elements of the filter per channel.
    pixels, input_elements : int
        Of the output, all images together; of the input, all channels.
    is_contiguous, is_channels_last : bool
        How the input lies in memory, without gaps; an image of one pixel may be both. The input's gradient lies as the input.
    """

    input_shape: tuple[int, int, int, int]
    input_strides: tuple[int, int, int, int]
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    precision: str
    follows_setting: bool
    dtype: torch.dtype
    device: torch.device
    output_size: tuple[int, int]
    taps: int
    pixels: int
    input_elements: int
    is_contiguous: bool
    is_channels_last: bool

    @property
    def conv(self):
        """The geometry and the precision, as the operators take them after the scale."""
        return self.stride, self.padding, self.dilation, self.groups, self.precision

    @property
    def is_symbolic(self):
        """Whether a size is not known yet, as while shapes of any size are traced."""
        return any(type(size) is not int for size in (*self.input_shape, *self.input_strides, *self.weight_shape))


def check_problem(input, weight, bias, stride, padding, dilation, groups, precision):
    """Check a fused convolution's arguments.

    Returns
    -------
    Problem

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """
    geometry, output_size = arguments.check_conv(input, weight, bias, stride, padding, dilation, groups)
    arguments.check_precision(precision)
    return make_problem(*_facts(input), weight.shape, geometry, output_size, precision)


def describe_problem(input, weight_shape, stride, padding, dilation, groups, precision):
    """Make the same value from what an operator was given, which its callers have checked."""
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    output_size = arguments.output_size(input.shape, weight_shape, *geometry)
    return make_problem(*_facts(input), weight_shape, geometry, output_size, precision)


def _facts(input):
    return input.shape, input.stride(), input.dtype, input.device


def make_problem(shape, strides, dtype, device, weight_shape, geometry, output_size, precision):
    """Make the same value from its parts: the input's, then the convolution's."""
    images, channels, height, width = shape
    resolved = resolve_precision(dtype, device.type, precision)
    return Problem(
        *(shape, strides, weight_shape, *geometry, resolved, precision == "auto", dtype, device, output_size),
        taps=weight_shape[2] * weight_shape[3],
        pixels=images * output_size[0] * output_size[1],
        input_elements=images * channels * height * width,
        is_contiguous=_is_dense(shape, strides, (3, 2, 1, 0)) or 0 in shape,
        is_channels_last=is_channels_last(shape, strides),
    )


def resolve_precision(dtype, device_type, precision):
    """Say what "auto" means: "tf32" only for float32 on a GPU where torch's setting for convolutions says so."""
    if dtype != torch.float32 or device_type != "cuda":
        return "ieee"
    return cudnn_precision() if precision == "auto" else precision


# The object lasts as long as torch; to find it takes a module that looks up every name anew.
_CUDNN_CONV = torch.backends.cudnn.conv


def cudnn_precision():
    """Read torch's setting for cuDNN's convolutions."""
    return "tf32" if _CUDNN_CONV.fp32_precision == "tf32" else "ieee"


# Read while tracing, as torch.compile reads it for its own convolutions.
cudnn_precision._dynamo_marked_constant = True


def winners_dtype(channels):
    """Give the dtype in which winners among so many channels are kept."""
    return torch.uint8 if channels <= 256 else torch.int32


def is_channels_last(shape, strides):
    """Tell whether an image of several channels lies in memory channel by channel, without gaps."""
    return shape[1] > 1 and _is_dense(shape, strides, (1, 3, 2, 0))


def _is_dense(shape, strides, order):
    """Tell whether elements lie without gaps, the first dimension of ``order`` innermost, as torch tells it."""
    expected = 1
    for d in order:
        # The stride first: a symbolic size that need not be looked at gets no guard.
        if strides[d] != expected and shape[d] != 1:
            return False
        expected *= shape[d]
    return True
