"""Gradients from winners: the rules of the backward pass, for torch, and which of its kernels runs.

A channel minimum hands its gradient to one channel of each pixel, the winner. So the forward operators whose names end in
``_winners`` keep that channel's number, and the gradients of input, weights and bias are sums over pixels, not over pixels and
channels. Each of them is linear in the incoming gradient and in one other tensor, and so are its own gradients: a second
derivative is made of the same operators.
"""

import math

import torch
from torch.nn import functional as F

from . import arguments

_CONV = "int[2] stride, int[4] padding, int[2] dilation, int groups, str precision"
_FROM_WINNERS = "(Tensor grad, Tensor winners"

SCHEMAS = {
    "scale_min_backward": f"{_FROM_WINNERS}, float scale, SymInt channels, bool channels_last) -> Tensor",
    "grad_input": f"{_FROM_WINNERS}, Tensor weight, float scale, SymInt[2] input_size, {_CONV}, bool channels_last) -> Tensor",
    "grad_weight": f"{_FROM_WINNERS}, Tensor input, float scale, SymInt out_channels, SymInt[2] kernel_size, {_CONV}) "
    "-> (Tensor, Tensor)",
    "grad_bias": f"{_FROM_WINNERS}, float scale, SymInt out_channels) -> Tensor",
}

# What runs where.
SCALE_MIN_BACKWARD = {"cpu": "scale_min_backward", "cuda": "scale_min_vectorized_backward"}
GRAD_BIAS = {"cpu": "grad_bias", "cuda": "grad_bias_private"}


def choose(input, weight, conv):
    """Choose the operators that make the gradients of input, of weights and bias, and of a bias alone.

    ``conv``: stride, padding, dilation, groups, precision.
    """
    by_input = choose_grad_input(weight, input.shape, is_channels_last(input), conv)
    by_weight = choose_grad_weight(input, weight.shape[0], weight.shape[2:], conv)
    return by_input, by_weight, GRAD_BIAS[input.device.type]


def choose_grad_input(weight, input_shape, channels_last, conv):
    """Choose the operator that makes the gradient of an input of this shape and layout, by what was measured on an H200."""
    if weight.device.type == "cpu":
        return "grad_input"
    in_channels, taps = weight.shape[1], math.prod(weight.shape[2:])
    # What is gathered in all: grad_input_mma first brings all weights to each multiprocessor, and only pays where that is much.
    bytes = math.prod(input_shape) * taps * weight.element_size()
    if taps > 1:
        pays = bytes >= 5 * 2**25
    elif channels_last:
        pays = bytes >= 5 * 2**23 and in_channels <= 512
    else:
        pays = bytes >= 2**27 and in_channels < 512
    return "grad_input_mma" if pays and fits_grad_input_mma(weight, conv) else "grad_input_gather"


def fits_grad_input_mma(weight, conv):
    """Tell whether grad_input_mma takes these."""
    stride, _, dilation, groups, precision = conv
    out_channels, _, kernel_h, kernel_w = weight.shape
    if not _is_16_bit(weight.dtype, precision) or groups > 1 or tuple(stride) != (1, 1) or kernel_h * kernel_w > 49:
        return False
    # The weights of 32 input channels, and beside them what each of 20 warps works on.
    halo = (4 + (kernel_h - 1) * dilation[0]) * (32 + (kernel_w - 1) * dilation[1])
    shared_bytes = out_channels * kernel_h * kernel_w * 64 + 20 * halo * 8 + 128
    return shared_bytes <= _shared_bytes(weight.device.index)


def choose_grad_weight(input, out_channels, kernel_size, conv):
    """Choose the operator that makes the gradients of weights and bias, by what was measured on an H200."""
    if input.device.type == "cpu":
        return "grad_weight"
    stride, padding, dilation, groups, precision = conv
    images, in_channels = input.shape[:2]
    geometry = arguments.ConvArguments(stride, padding, dilation, groups)
    out_h, out_w = geometry.output_size(input.shape, (out_channels, in_channels, *kernel_size))
    taps, pixels = math.prod(kernel_size), images * out_h * out_w
    # The input under a filter is a run of neighbours then.
    is_channels_last, is_float32 = input.stride(1) == 1, input.dtype == torch.float32
    gathers = fits_grad_weight_gather(input, kernel_size, conv) and pixels < 2**30
    if not _is_16_bit(input.dtype, precision):
        return "grad_weight_gather" if gathers and pixels >= 2**10 else "grad_weight_private"
    if not fits_grad_weight_sorted(input, out_channels, kernel_size, conv):
        return "grad_weight_gather" if gathers and is_channels_last else "grad_weight_private"
    # grad_weight_sorted sorts an image of few pixels into many lists, which stay empty; and where there is one tap, or channels
    # are next to none, it brings its input for few products.
    if taps == 1 and is_channels_last:
        gathers = gathers and in_channels >= (128 if is_float32 else 256)
    elif taps == 1:
        # grad_weight_gather copies what is read of the input, if its vectors are whole: with a stride, less than all of it.
        gathers = gathers and in_channels % 8 == 0
        if max(stride) > 1:
            gathers = gathers and in_channels * out_channels >= (2**15 if is_float32 else 2**16)
        else:
            gathers = gathers and in_channels * out_channels >= 2**17 and pixels < 2**14
    else:
        few_pixels = out_h * out_w <= 64 and out_channels >= 256 and pixels >= 2**10 and (is_float32 or not is_channels_last)
        gathers = gathers and (few_pixels or (in_channels <= 4 and taps > 25))
    return "grad_weight_gather" if gathers else "grad_weight_sorted"


def fits_grad_weight_gather(input, kernel_size, conv):
    """Tell whether grad_weight_gather takes these. It takes groups, too, but nobody has timed them: no."""
    _, padding, dilation, groups, _ = conv
    if input.dtype == torch.float64 or groups > 1:
        return False
    # The kernel counts rows and columns in 16 bits, elements in 32, of a copy as well.
    reach = max(input.shape[2:]) + sum(padding) + max(kernel_size) * max(dilation)
    image, channel, row, column = input.stride()
    furthest = input.shape[0] * image + input.shape[1] * channel + reach * (row + column)
    return reach < 2**15 and max(furthest, math.prod(input.shape)) < 2**30


def fits_grad_weight_sorted(input, out_channels, kernel_size, conv):
    """Tell whether grad_weight_sorted takes these."""
    stride, _, dilation, groups, precision = conv
    kernel_h, kernel_w = kernel_size
    if not _is_16_bit(input.dtype, precision) or groups > 1 or kernel_h * kernel_w > 49 or out_channels > 4096:
        return False
    # Two tiles of the least size: their input, and their pixels in steps of 16 for each 8 output channels.
    halo = ((kernel_h - 1) * dilation[0] + 1) * (63 * stride[1] + (kernel_w - 1) * dilation[1] + 1)
    shared_bytes = 2 * (halo * 80 + (64 // 16 + 1 + -(-out_channels // 8)) * 320) + 2**11
    fits = halo <= 4096 and shared_bytes <= _shared_bytes(input.device.index)
    # The kernel counts offsets within a tile in 32 bits.
    return fits and max(input.stride(2), input.stride(3)) < 2**24 and max(*input.shape, input.stride(1)) < 2**28


def _is_16_bit(dtype, precision):
    """Tell whether operands of 16 bits are as exact as is asked."""
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and precision == "tf32")


def _shared_bytes(device_index):
    if device_index not in _shared_bytes_of:
        _shared_bytes_of[device_index] = torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin
    return _shared_bytes_of[device_index]


# Asked once: the question takes as long as a small kernel's launch.
_shared_bytes_of = {}
# A constant of the device, which the compiler need not trace.
_shared_bytes._dynamo_marked_constant = True


def is_channels_last(tensor):
    """Tell whether a pixel's channels lie side by side, as they shall in the gradient then."""
    return tensor.shape[1] > 1 and tensor.is_contiguous(memory_format=torch.channels_last)


def winners_dtype(channels):
    """Give the dtype in which winners among so many channels are kept."""
    return torch.uint8 if channels <= 256 else torch.int32


# NOTE: csrc/autograd/from_winners.cpp has the rules of scale_min_winners and conv_winners a second time, in C++. Where torch
# compiles nothing, those are followed: change both.

# scale_min: forward with winners, and its gradient.


def scale_min_winners_setup(ctx, inputs, output):
    """Keep the winners; of the input, its size and layout."""
    input, scale = inputs
    ctx.save_for_backward(output[1])
    ctx.rest = scale, input.shape[1], is_channels_last(input)


def scale_min_winners_backward(ctx, grad, _):
    """Give each pixel's gradient to its winner."""
    (winners,) = ctx.saved_tensors
    return _run(SCALE_MIN_BACKWARD[grad.device.type], grad, winners, *ctx.rest), None


def scale_min_backward_fake(grad, winners, scale, channels, channels_last):
    """Give the shape and layout of a gradient of scale_min's input."""
    images, _, height, width = grad.shape
    return _new(grad, (images, channels, height, width), channels_last)


def scale_min_backward_setup(ctx, inputs, output):
    """Keep what says which channel's gradient comes back."""
    _, winners, ctx.scale, *_ = inputs
    ctx.save_for_backward(winners)


def scale_min_backward_backward(ctx, grad):
    """Take the gradient at the winners."""
    (winners,) = ctx.saved_tensors
    return _at_winners(grad, winners, ctx.scale), *[None] * 4


# The fused convolutions: forward with winners, and the gradients of input, weights and bias.


def conv_winners_setup(ctx, inputs, output):
    """Keep the winners, and of input and weights what the other one's gradient needs."""
    input, weight, _, *ctx.rest = inputs
    needs_input, needs_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(output[1], input if needs_weight else None, weight if needs_input else None)
    ctx.sizes = input.shape[2:], weight.shape
    ctx.channels_last = is_channels_last(input)


def conv_winners_backward(ctx, grad, _):
    """Make the gradients that are wanted from the winners."""
    winners, input, weight = ctx.saved_tensors
    scale, *conv = ctx.rest
    input_size, weight_size = ctx.sizes
    grads = gradients(
        grad, winners, input, weight, scale, conv, input_size, weight_size, ctx.channels_last, ctx.needs_input_grad[:3]
    )
    return *grads, *[None] * 6


def gradients(grad, winners, input, weight, scale, conv, input_size, weight_size, channels_last, needed):
    """Make the gradients of input, weights and bias, None for those not needed."""
    needs_input, needs_weight, needs_bias = needed
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        shape = grad.shape[0], weight_size[1] * conv[3], *input_size
        name = choose_grad_input(weight, shape, channels_last, conv)
        grad_input = _run(name, grad, winners, weight, scale, input_size, *conv, channels_last)
    if needs_weight:
        name = choose_grad_weight(input, weight_size[0], weight_size[2:], conv)
        grad_weight, grad_bias = _run(name, grad, winners, input, scale, weight_size[0], weight_size[2:], *conv)
    elif needs_bias:
        grad_bias = _run(GRAD_BIAS[grad.device.type], grad, winners, scale, weight_size[0])
    return grad_input, grad_weight, grad_bias if needs_bias else None


def grad_input_fake(grad, winners, weight, scale, input_size, stride, padding, dilation, groups, precision, channels_last):
    """Give the shape and layout of an input's gradient."""
    return _new(weight, (grad.shape[0], weight.shape[1] * groups, *input_size), channels_last)


def grad_input_setup(ctx, inputs, output):
    """Keep what its own gradients need."""
    grad, winners, weight, ctx.scale, _, *ctx.conv, _ = inputs
    ctx.save_for_backward(grad, winners, weight)


def grad_input_backward(ctx, grad_output):
    """Differentiate an input's gradient: a convolution at the winners, and a gradient of weights."""
    grad, winners, weight = ctx.saved_tensors
    by_grad = by_weight = None
    if ctx.needs_input_grad[0]:
        by_grad = _at_winners(_convolve(grad_output, weight, None, ctx.conv), winners, ctx.scale)
    if ctx.needs_input_grad[2]:
        sizes = weight.shape[0], weight.shape[2:]
        name = choose_grad_weight(grad_output, *sizes, ctx.conv)
        by_weight, _ = _run(name, grad, winners, grad_output, ctx.scale, *sizes, *ctx.conv)
    return by_grad, None, by_weight, *[None] * 8


def grad_weight_fake(grad, winners, input, scale, out_channels, kernel_size, stride, padding, dilation, groups, precision):
    """Give the shapes of the gradients of weights and bias."""
    return input.new_empty((out_channels, input.shape[1] // groups, *kernel_size)), input.new_empty((out_channels,))


def grad_weight_setup(ctx, inputs, output):
    """Keep what its own gradients need."""
    grad, winners, input, ctx.scale, _, _, *ctx.conv = inputs
    ctx.save_for_backward(grad, winners, input)


def grad_weight_backward(ctx, grad_weight, grad_bias):
    """Differentiate the gradients of weights and bias: a convolution at the winners, and a gradient of the input."""
    grad, winners, input = ctx.saved_tensors
    by_grad = by_input = None
    if ctx.needs_input_grad[0]:
        by_grad = _at_winners(_convolve(input, grad_weight, grad_bias, ctx.conv), winners, ctx.scale)
    if ctx.needs_input_grad[2]:
        layout = is_channels_last(input)
        name = choose_grad_input(grad_weight, input.shape, layout, ctx.conv)
        by_input = _run(name, grad, winners, grad_weight, ctx.scale, input.shape[2:], *ctx.conv, layout)
    return by_grad, None, by_input, *[None] * 8


def grad_bias_fake(grad, winners, scale, out_channels):
    """Give the shape of a bias's gradient."""
    return grad.new_empty((out_channels,))


def grad_bias_setup(ctx, inputs, output):
    """Keep what says which gradient comes back."""
    _, winners, ctx.scale, _ = inputs
    ctx.save_for_backward(winners)


def grad_bias_backward(ctx, grad_bias):
    """Each pixel's part in its winner's sum is its own gradient."""
    (winners,) = ctx.saved_tensors
    return grad_bias[winners.long()] * ctx.scale, *[None] * 3


RULES = {
    "scale_min_backward": (scale_min_backward_fake, scale_min_backward_backward, scale_min_backward_setup),
    "grad_input": (grad_input_fake, grad_input_backward, grad_input_setup),
    "grad_weight": (grad_weight_fake, grad_weight_backward, grad_weight_setup),
    "grad_bias": (grad_bias_fake, grad_bias_backward, grad_bias_setup),
}


def _run(name, *args):
    """Call an operator. Its rule for gradients is Python, and where no second derivative is wanted it is passed by."""
    operator = getattr(torch.ops.fused_kernels, name).default
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _at_winners(tensor, winners, scale):
    return tensor.gather(1, winners.long()) * scale


def _convolve(input, weight, bias, conv):
    stride, (top, bottom, left, right), dilation, groups, _ = conv
    return F.conv2d(F.pad(input, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)


def _new(like, size, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
