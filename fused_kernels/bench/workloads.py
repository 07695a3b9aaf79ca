"""What is timed: the reference workload, other shapes, and the layers of usual networks."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .. import reference
from ..problem import check_problem, make_problem
from .environment import default_device
from .records import Subject


@dataclass
class Workload:
    """A convolution's tensors, fresh random ones: input uniform in [0, 1), weight and bias as nn.Conv2d draws them."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    scale: float = reference.scale_factor
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def arguments(self):
        """What a conv2d_scale_min takes."""
        return self.input, self.weight, self.bias, self.scale

    @property
    def options(self):
        """The keyword arguments that a convolution takes."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def problem(self, precision="auto"):
        """Give what follows from the arguments; "auto" means PyTorch's own setting."""
        return check_problem(self.input, self.weight, self.bias, **self.options, precision=precision)

    @property
    def output_shape(self):
        """The convolution's output shape."""
        return len(self.input), len(self.weight), *self.problem().output_size

    @property
    def shape(self):
        """Name the shape, as a record does."""
        usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        rest = "".join(f" {name} {value}" for name, value in self.options.items() if value != usual[name])
        return f"{shape_name(self.input.shape)} * {shape_name(self.weight.shape)}{rest}"

    @property
    def precision(self):
        """Name the precision of PyTorch's default, as a record does."""
        return precisions(self.input.device, self.input.dtype)[0]

    @property
    def flops(self):
        """Count the convolution's multiplications and additions."""
        return 2 * math.prod(self.output_shape) * self.weight[0].numel()

    @property
    def bytes(self):
        """Count what every implementation must move: input, weight, bias and result, each once."""
        elements = self.input.numel() + self.weight.numel() + self.bias.numel()
        return elements * self.input.element_size() + self.result_bytes

    @property
    def result_bytes(self):
        """Count the result's bytes."""
        return math.prod(self.output_shape) // self.output_shape[1] * self.input.element_size()

    def bytes_moved(self, passes):
        """Count what is moved if the convolution's output is written or read ``passes`` times between kernels."""
        return self.bytes + passes * math.prod(self.output_shape) * self.input.element_size()

    def conv_output(self):
        """Run the library's convolution: the input of a scale_min."""
        return F.conv2d(self.input, self.weight, self.bias, **self.options)

    def subject(self, operator, rung, **other):
        """Say what a measurement on it is of; ``other`` fields as for :class:`Subject`."""
        how = {"precision": self.precision, "shape": self.shape, **other}
        return Subject(operator=operator, rung=rung, dtype=dtype_name(self.input.dtype), layout=layout_name(self.input), **how)


# What else is timed: few channels, a usual layer, a large kernel; small images with many channels, a first layer, 1 x 1, one
# image, odd sizes. Input, output channels, kernel, stride, padding.
SHAPES = (
    ((128, 3, 32, 32), 16, 3, 1, 0),
    ((32, 64, 56, 56), 64, 3, 1, 0),
    ((8, 32, 512, 512), 256, 5, 1, 0),
    ((32, 512, 7, 7), 512, 3, 1, 1),
    ((32, 3, 224, 224), 64, 7, 2, 3),
    ((32, 256, 56, 56), 64, 1, 1, 0),
    ((1, 64, 56, 56), 64, 3, 1, 1),
    ((3, 40, 37, 53), 72, 3, 1, 0),
)
# And one so small that a call is nothing but overhead.
TINY = ((1, 16, 8, 8), 32, 3, 1, 0)

# The layers of a ResNet, and other kernels on images of its sizes: channels, height and width, output channels, kernel, stride.
# All padded as such networks pad, by half a kernel.
_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
_BASIC = tuple((channels, size, channels, 3, 1) for channels, size in _STAGES)
_POINTWISE = (
    *((channels, size, 4 * channels, 1, 1) for channels, size in _STAGES),
    *((4 * channels, size, channels, 1, 1) for channels, size in _STAGES),
)
_LAYERS = (
    *_BASIC,
    *((channels, size, 2 * channels, 3, 2) for channels, size in _STAGES[:3]),
    *_POINTWISE,
    *((4 * channels, size, 8 * channels, 1, 2) for channels, size in _STAGES[:3]),
    *((4 * channels, size, 2 * channels, 1, 2) for channels, size in _STAGES[:3]),
    *((channels, size, channels, 5, 1) for channels, size in _STAGES[:3]),
    (32, 56, 64, 5, 1),
    (64, 28, 128, 5, 1),
    (64, 56, 64, 7, 1),
    (64, 28, 64, 7, 1),
    (128, 14, 256, 7, 1),
    (3, 224, 64, 7, 2),
)
# Of them all with 32 images and with one; then a few of the most usual with other numbers of images.
LAYERS = tuple(
    ((images, channels, size, size), out_channels, kernel, stride, kernel // 2)
    for images, layers in ((32, _LAYERS), (1, _LAYERS), (4, _BASIC), (8, _BASIC + _POINTWISE), (64, _BASIC))
    for channels, size, out_channels, kernel, stride in layers
)


def workload(device=None, dtype=torch.float32, channels_last=False, *, batch=None, seed=0):
    """Draw the reference workload: 64 images on a GPU, 2 on a CPU, of 64 x 256 x 256; 128 output channels under a 3 x 3 kernel.

    Parameters
    ----------
    device : torch.device, optional
        By default :func:`default_device`.
    dtype : torch.dtype
    channels_last : bool
        Memory layout of input and weight.
    batch, seed : int, optional

    Returns
    -------
    Workload
    """
    device = torch.device(device or default_device())
    batch = batch or (reference.batch_size if device.type == "cuda" else 2)
    shape = (batch, reference.in_channels, reference.height, reference.width)
    return draw(device, dtype, channels_last, shape, reference.out_channels, reference.kernel_size, seed=seed)


def draw(device, dtype, channels_last, shape, out_channels, kernel_size, stride=1, padding=0, seed=0):
    """Draw the :class:`Workload` of one shape, the rest as in :data:`SHAPES`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(seed)
    input = torch.rand(shape, device=device, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(shape[1], out_channels, kernel_size)
    weight = conv.weight.detach().to(device, dtype, memory_format=layout)
    bias = conv.bias.detach().to(device, dtype)
    return Workload(input.to(dtype).contiguous(memory_format=layout), weight, bias, stride=stride, padding=padding)


def problem_of(row, device="cuda"):
    """Give the problem of a recorded row (:class:`fused_kernels.measured.Row`), without tensors."""
    layer = row.layer
    _, channels, height, width = layer.input_shape
    strides = channels * height * width, height * width, width, 1
    if row.layout == "channels_last":
        strides = channels * height * width, 1, channels * width, channels
    is_float32 = row.precision in ("tf32", "ieee")
    geometry = (layer.stride,) * 2, (layer.padding,) * 4, (layer.dilation,) * 2, layer.groups
    how = layer.weight_shape, geometry, layer.output_size, row.precision if is_float32 else "ieee"
    dtype = torch.float32 if is_float32 else getattr(torch, row.precision)
    return make_problem(layer.input_shape, strides, dtype, torch.device(device, 0), *how)


def precisions(device, dtype):
    """Name the precisions to run, PyTorch's default first."""
    if dtype != torch.float32:
        return [dtype_name(dtype)]
    if device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return ["tf32", "ieee"]
    return ["ieee"]


def dtype_name(dtype):
    """Name a dtype as a record does."""
    return str(dtype).removeprefix("torch.")


def layout_name(tensor):
    """Name a tensor's memory layout as a record does."""
    return "channels_last" if not tensor.is_contiguous() else "NCHW"


def shape_name(shape):
    """Name a tensor's shape as a record does."""
    return "x".join(map(str, shape))
