"""Check the operators' arguments and bring them into one form; every error is one sentence."""

import math
import numbers
import operator

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PRECISIONS = ("auto", "ieee", "tf32")


def check_input(input):
    """Raise unless ``input`` is an (N, C, H, W) tensor of a supported dtype with at least one channel."""
    _check_tensor("input", input)
    if input.shape[1] == 0:
        raise ValueError(f"input: expected at least one channel to take the minimum over, got shape {_shape(input)}")


def is_unbatched(input):
    """Tell whether ``input`` is one image without a batch around it, (C, H, W)."""
    return isinstance(input, torch.Tensor) and input.dim() == 3


def unbatched(function, input, *args, **kwargs):
    """Call a function that takes a batch on one image, and take what it gives out of the batch."""
    result = function(input.unsqueeze(0), *args, **kwargs)
    return tuple(tensor.squeeze(0) for tensor in result) if isinstance(result, tuple) else result.squeeze(0)


def as_scale(scale):
    """Return a number as a float, integers too large for one as an infinity; and a tensor of real numbers as it is."""
    # Not a subclass, such as NumPy's: to a compiler that one is an array.
    if type(scale) is float:
        return scale
    if isinstance(scale, torch.Tensor):
        if scale.is_complex() or scale.layout != torch.strided:
            raise TypeError(f"scale: expected a dense tensor of real numbers, got {scale.dtype}, layout {scale.layout}")
        return scale
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a real number or a tensor of them, got {_describe(scale)}")
    try:
        return float(scale)
    except OverflowError:
        return math.inf if scale > 0 else -math.inf


def check_scale(scale, channels, device):
    """Raise unless a tensor holds one factor, or one for each channel, on the device; tell whether it holds one.

    Of all tensors on another device, only a number on the CPU will do, as in PyTorch's own operations.
    """
    shape = _shape(scale)
    if math.prod(shape) != 1 and shape not in ((channels,), (channels, 1, 1), (1, channels, 1, 1)):
        shapes = f"({channels},), ({channels}, 1, 1) or (1, {channels}, 1, 1)"
        raise ValueError(f"scale: expected one element or one for each channel, of shape {shapes}, got shape {shape}")
    if scale.device != device and (shape or scale.device.type != "cpu"):
        raise ValueError(f"scale: expected the input's device {device}, got {scale.device}")
    return math.prod(shape) == 1


def scale_per_channel(scale, is_single, channels, like):
    """Give a checked tensor as the operators take it: an element for each channel, in the dtype to compute ``like`` in."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if scale.device != like.device:
        # Multiplied by it, and not copied there: the GPU's queue goes on, and a graph can be captured.
        return torch.ones(channels, dtype=dtype, device=like.device) * scale
    scale = scale.to(dtype)
    if is_single:
        return scale.reshape(1).expand(channels)
    return scale if scale.dim() == 1 else scale.reshape(channels)


def check_conv(input, weight, bias, stride, padding, dilation, groups):
    """Check a fused convolution's tensors and geometry.

    Returns
    -------
    tuple
        The geometry, "same" and "valid" resolved: stride (vertical, horizontal), padding (top, bottom, left, right), dilation
        (vertical, horizontal), groups.
    tuple of int
        The convolution's (H', W').
    """
    check_tensors(input, weight, bias)
    groups, given = _integer(groups), groups
    if groups is None or groups < 1:
        raise ValueError(f"groups: expected a positive integer, got {given!r}")

    input_shape, weight_shape = input.shape, weight.shape
    out_channels, group_channels, kernel_h, kernel_w = weight_shape
    if 0 in weight_shape:
        raise ValueError(f"weight: expected no dimension of size zero, got shape {_shape(weight)}")
    if input_shape[1] != group_channels * groups:
        raise ValueError(
            f"input: expected {group_channels * groups} channels "
            f"(weight.shape[1] {group_channels} x groups {groups}), got {input_shape[1]}"
        )
    if out_channels % groups:
        raise ValueError(f"groups: expected a divisor of the {out_channels} output channels, got {groups}")
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(f"bias: expected {out_channels} elements, one per output channel, got {bias.shape[0]}")

    stride = _pair("stride", stride, 1)
    dilation = _pair("dilation", dilation, 1)
    padding = _padding(padding, stride, dilation, (kernel_h, kernel_w))
    geometry = stride, padding, dilation, groups
    height, width = output_size(input_shape, weight_shape, *geometry)
    if height < 1 or width < 1:
        top, bottom, left, right = padding
        raise ValueError(
            f"weight: expected a kernel no larger than the padded input "
            f"{input_shape[2] + top + bottom} x {input_shape[3] + left + right}, got {kernel_h} x {kernel_w} "
            f"with dilation {dilation}"
        )
    return geometry, (height, width)


def check_tensors(input, weight, bias):
    """Raise unless a fused convolution's tensors have the right number of dimensions, and one device and dtype.

    Dtypes that autocast is going to make one may differ, and the bias of 16-bit tensors may be float32.
    """
    _check_tensor("input", input)
    _check_tensor("weight", weight)
    if bias is not None:
        _check_tensor("bias", bias)
    dtype, device = input.dtype, input.device
    castable = _CASTABLE if autocast_dtype(input) else ()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != dtype and not (tensor.dtype in castable and dtype in castable):
            wide = name == "bias" and dtype in (torch.float16, torch.bfloat16)
            if not (wide and tensor.dtype == torch.float32):
                expected = f"the input's dtype {dtype}{' or torch.float32' if wide else ''}"
                raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected the input's device {device}, got {tensor.device}")


def output_size(input_shape, weight_shape, stride, padding, dilation, groups=1):
    """Give a convolution's (H', W'); ``padding`` is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    height = input_shape[2] + top + bottom - dilation[0] * (weight_shape[2] - 1) - 1
    width = input_shape[3] + left + right - dilation[1] * (weight_shape[3] - 1) - 1
    return height // stride[0] + 1, width // stride[1] + 1


def check_layer(in_channels, out_channels, groups):
    """Raise unless a layer's channels can be divided into its groups."""
    divisor = _integer(groups)
    for name, given in (("in_channels", in_channels), ("out_channels", out_channels)):
        channels = _integer(given)
        if channels is None or channels < 1:
            raise ValueError(f"{name}: expected a positive integer, got {given!r}")
        if divisor is None or divisor < 1 or channels % divisor:
            raise ValueError(f"groups: expected a divisor of {name} {channels}, got {groups!r}")


def check_precision(precision):
    """Raise unless ``precision`` is one that the operators know."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision: expected "auto", "ieee" or "tf32", got {precision!r}')


def autocast(*tensors):
    """Cast as autocast casts a convolution's arguments: every floating-point tensor but float64."""
    # First what costs least: a small kernel takes less time than a tensor's device.
    if not torch._C._is_any_autocast_enabled():
        return tensors
    wanted = autocast_dtype(tensors[0])
    return [t.to(wanted) if wanted and isinstance(t, torch.Tensor) and t.dtype in _CASTABLE else t for t in tensors]


def autocast_dtype(input):
    """Give the dtype to which autocast casts the arguments of a convolution of ``input``, or None."""
    device = input.device.type if isinstance(input, torch.Tensor) else "cpu"
    if device not in ("cpu", "cuda") and not _has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


def _has_autocast(device):
    return torch.amp.is_autocast_available(device)


# A constant of the device, which the compiler cannot trace.
_has_autocast._dynamo_marked_constant = True


RANK = {"input": 4, "weight": 4, "bias": 1}
# The other one is one image, which the public functions make a batch of.
_SHAPES = {"input": "(N, C, H, W) or (C, H, W)", "weight": "(C_out, C_in / groups, kH, kW)", "bias": "(C_out,)"}


def _check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {_SHAPES[name]}, got {_describe(value)}")
    if value.dim() != RANK[name]:
        rank = "4 or 3" if name == "input" else RANK[name]
        raise ValueError(f"{name}: expected {rank} dimensions {_SHAPES[name]}, got shape {_shape(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")


def _pair(name, value, smallest):
    # The common cases first: a small kernel takes less time than a careful check.
    if type(value) is int and value >= smallest:
        return (value, value)
    pair = tuple(_integer(v) for v in (value if isinstance(value, (tuple, list)) else (value,)))
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or not all(v is not None and v >= smallest for v in pair):
        raise ValueError(f"{name}: expected an integer of at least {smallest} or a pair of them, got {value!r}")
    return pair


def _padding(padding, stride, dilation, kernel):
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding: expected numbers where stride is {stride}, got "same", which needs stride 1')
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        # Where the total is odd, the extra row or column goes below and to the right, as in PyTorch.
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    if isinstance(padding, str):
        raise ValueError(f'padding: expected numbers, "same" or "valid", got {padding!r}')
    vertical, horizontal = _pair("padding", padding, 0)
    return (vertical, vertical, horizontal, horizontal)


def _integer(value):
    """Return an integer of any kind, NumPy's too, as an int; None for everything else, booleans included."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def _shape(tensor):
    return tuple(tensor.shape)


def _describe(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {_shape(value)}"
    return f"{value!r}" if isinstance(value, (str, complex)) else f"{type(value).__name__}"
