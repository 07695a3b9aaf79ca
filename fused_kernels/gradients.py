"""Gradients from winners: the rules of the backward pass, for torch.

A channel minimum hands its gradient to one channel of each pixel, the winner. So the forward operators whose names end in
``_winners`` keep that channel's number, and the gradients of input, weights and bias are sums over pixels, not over pixels and
channels. Each of them is linear in the incoming gradient and in one other tensor, and so are its own gradients: a second
derivative is made of the same operators. None of them takes a tensor scale: its factors multiply the incoming gradient.

NOTE: csrc/autograd/from_winners.cpp has the rules of scale_min_winners and conv_winners a second time, in C++. Where torch
compiles nothing, those are followed once they are built: change both.
"""

import contextlib

import torch
from torch.nn import functional as F

from . import dispatch, subclasses
from .problem import is_channels_last

# ---- scale_min ----


def scale_min_setup(ctx, inputs, output):
    """Keep the input: this is the rule of an operator that gives no winners."""
    input, ctx.scale, *scales = inputs
    ctx.save_for_backward(input, scales[0] if scales else None)


def scale_min_backward(ctx, grad):
    """Give the gradient to each pixel's winner, the channel that torch.min names."""
    input, scales = ctx.saved_tensors
    factors = ctx.scale if scales is None else scales.view(-1, 1, 1)
    winners = torch.min(input * factors, dim=1, keepdim=True).indices
    scaled = grad * ctx.scale if scales is None else _times_factors(grad, winners, scales)
    by_scales = None
    if _needs_scales(ctx, scales, 2):
        by_scales = _grad_scales(grad, winners.int(), input, scales)
    return torch.zeros_like(input).scatter(1, winners, scaled), None, by_scales


def scale_min_winners_setup(ctx, inputs, output):
    """Keep the winners; of the input, its size and layout, and for the scales' gradient the input itself."""
    input, scale, *rest = inputs
    scales = rest[0] if rest else None
    ctx.save_for_backward(output[1], scales, input if _needs_scales(ctx, scales, 2) else None)
    channels = input.shape[1]
    ctx.rest = scale, channels, is_channels_last(input.shape, input.stride())


def scale_min_winners_backward(ctx, grad, _):
    """Give each pixel's gradient to its winner."""
    winners, scales, input = ctx.saved_tensors
    by_input = by_scales = None
    if ctx.needs_input_grad[0]:
        by_input = _run("scale_min_backward", _times_factors(grad, winners, scales), winners, *ctx.rest)
    if _needs_scales(ctx, scales, 2):
        by_scales = _grad_scales(grad, winners, input, scales)
    return by_input, None, by_scales


def _needs_scales(ctx, scales, place):
    """Tell whether a gradient of the scales is wanted; what is not given has no place among the arguments."""
    return scales is not None and ctx.needs_input_grad[place]


def scale_min_backward_setup(ctx, inputs, output):
    """Keep what says which channel's gradient comes back."""
    _, winners, ctx.scale, *_ = inputs
    ctx.save_for_backward(winners)


def scale_min_backward_backward(ctx, grad):
    """Take the gradient at the winners."""
    (winners,) = ctx.saved_tensors
    return _at_winners(grad, winners, ctx.scale), *[None] * 4


# ---- the fused convolutions ----


def conv_setup(ctx, inputs, output):
    """Keep the tensors: this is the rule of an operator that gives no winners."""
    input, weight, bias, ctx.scale, *ctx.conv = inputs
    scales = ctx.conv.pop() if len(ctx.conv) > 5 else None
    ctx.save_for_backward(input, weight, bias, scales)


def conv_backward(ctx, grad):
    """Find the winners first, then make the gradients that are wanted from them."""
    input, weight, bias, scales = ctx.saved_tensors
    _, winners = torch.ops.fused_kernels.composite_winners.default(input, weight, bias, ctx.scale, *ctx.conv, scales)
    geometry, bias_dtype = Geometry(input, weight, ctx.conv), None if bias is None else bias.dtype
    return _conv_gradients(ctx, geometry, grad, winners, (input, weight, bias, scales), bias_dtype)


def conv_winners_setup(ctx, inputs, output):
    """Keep the winners, and of input and weights what the other one's gradient needs; for the scales' gradient all."""
    input, weight, bias, ctx.scale, *conv = inputs
    scales = conv.pop() if len(conv) > 5 else None
    needs_scales = _needs_scales(ctx, scales, 9)
    needs_input, needs_weight = (needed or needs_scales for needed in ctx.needs_input_grad[:2])
    tensors = input if needs_weight else None, weight if needs_input else None, bias if needs_scales else None
    ctx.save_for_backward(output[1], *tensors, scales)
    ctx.geometry, ctx.bias_dtype = Geometry(input, weight, conv), None if bias is None else bias.dtype


def conv_winners_backward(ctx, grad, _):
    """Make the gradients that are wanted from the winners."""
    winners, *tensors = ctx.saved_tensors
    return _conv_gradients(ctx, ctx.geometry, grad, winners, tensors, ctx.bias_dtype)


def _conv_gradients(ctx, geometry, grad, winners, tensors, bias_dtype):
    """Make a gradient of each of the operator's arguments."""
    input, weight, bias, scales = tensors
    needed, found = ctx.needs_input_grad[:3], (geometry, grad, winners, input, weight)
    if scales is None:
        return *gradients(*found, ctx.scale, needed, bias_dtype), *[None] * 7
    needed = *needed, _needs_scales(ctx, scales, 9)
    *grads, by_scales = scaled_gradients(*found, bias, scales, needed, bias_dtype)
    return *grads, *[None] * 6, by_scales


def gradients(geometry, grad, winners, input, weight, scale, needed, bias_dtype=None):
    """Make the gradients of input, weights and bias, None for those not needed; for these neither are weight and input.

    ``bias_dtype``: what the bias's gradient is summed in, if not in the dtype of the gradient that comes in.
    """
    needs_input, needs_weight, needs_bias = needed
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        grad_input = geometry.grad_input(grad, winners, weight, scale)
    if needs_weight:
        grad_weight, grad_bias = geometry.grad_weight(grad, winners, input, scale)
    if needs_bias and (grad_bias is None or bias_dtype not in (None, grad.dtype)):
        grad_bias = _run("grad_bias", grad.to(bias_dtype or grad.dtype), winners, scale, geometry.weight_shape[0])
    return grad_input, grad_weight, grad_bias if needs_bias else None


def scaled_gradients(geometry, grad, winners, input, weight, bias, scales, needed, bias_dtype):
    """Make the same where each channel has a factor of its own, and the factors' gradient."""
    needs_input, needs_weight, needs_bias, needs_scales = needed
    scaled = _times_factors(grad, winners, scales)
    if not needs_scales:
        return *gradients(geometry, scaled, winners, input, weight, 1.0, needed[:3], bias_dtype), None
    grad_input, *_ = gradients(geometry, scaled, winners, input, weight, 1.0, (needs_input, False, False))
    # Let G be the parameters' gradients if all factors were one. A channel's output is its factor times a linear function of
    # its parameters: so their gradients are the factor times G, and the factor's is the sum of the parameters times G.
    by_weight, by_bias = geometry.grad_weight(grad, winners, input, 1.0)
    grad_scales = (by_weight.to(scales.dtype) * weight).sum((1, 2, 3))
    if bias is not None:
        if grad.dtype != scales.dtype:
            by_bias = _run("grad_bias", grad.to(scales.dtype), winners, 1.0, len(scales))
        grad_scales = grad_scales + by_bias * bias
    grad_weight = (by_weight * scales.view(-1, 1, 1, 1)).to(weight.dtype) if needs_weight else None
    return grad_input, grad_weight, (by_bias * scales).to(bias_dtype) if needs_bias else None, grad_scales


class Geometry:
    """What gradients need to know of a convolution's arguments, whose tensors need not be kept."""

    def __init__(self, input, weight, conv):
        """Look at input, weights, and stride, padding, dilation, groups and precision."""
        self.input_size, self.weight_shape, self.conv = input.shape[2:], weight.shape, conv
        self.channels_last = is_channels_last(input.shape, input.stride())

    def grad_input(self, grad, winners, weight, scale):
        """Make the gradient of the input."""
        return _run("grad_input", grad, winners, weight, scale, self.input_size, *self.conv, self.channels_last)

    def grad_weight(self, grad, winners, input, scale):
        """Make the gradients of weights and bias."""
        out_channels, _, *kernel_size = self.weight_shape
        return _run("grad_weight", grad, winners, input, scale, out_channels, kernel_size, *self.conv)


# ---- their own gradients ----


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
        by_weight, _ = Geometry(grad_output, weight, ctx.conv).grad_weight(grad, winners, grad_output, ctx.scale)
    return by_grad, None, by_weight, *[None] * 8


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
        by_input = Geometry(input, grad_weight, ctx.conv).grad_input(grad, winners, grad_weight, ctx.scale)
    return by_grad, None, by_input, *[None] * 8


def grad_bias_setup(ctx, inputs, output):
    """Keep what says which gradient comes back."""
    _, winners, ctx.scale, _ = inputs
    ctx.save_for_backward(winners)


def grad_bias_backward(ctx, grad_bias):
    """Each pixel's part in its winner's sum is its own gradient."""
    (winners,) = ctx.saved_tensors
    return grad_bias[winners.long()] * ctx.scale, *[None] * 3


# ---- the library's convolution at a precision of its own ----


def library_conv2d_setup(ctx, inputs, output):
    """Keep what its gradients need."""
    input, weight, bias, *ctx.geometry, ctx.tf32 = inputs
    ctx.save_for_backward(input, weight, bias)


def library_conv2d_backward(ctx, grad):
    """Differentiate at the forward's precision."""
    input, weight, bias = ctx.saved_tensors
    bias_size = None if bias is None else bias.shape
    precision = "tf32" if ctx.tf32 else "ieee"
    grads = _convolution_backward(grad, input, weight, bias_size, *ctx.geometry, precision, list(ctx.needs_input_grad[:3]))
    return *grads, *[None] * 5


# Name of an operator's kind -> its rule, and what keeps what that needs.
RULES = {
    "scale_min": (scale_min_backward, scale_min_setup),
    "scale_min_winners": (scale_min_winners_backward, scale_min_winners_setup),
    "scale_min_backward": (scale_min_backward_backward, scale_min_backward_setup),
    "conv2d_scale_min": (conv_backward, conv_setup),
    "conv2d_scale_min_winners": (conv_winners_backward, conv_winners_setup),
    "grad_input": (grad_input_backward, grad_input_setup),
    "grad_weight": (grad_weight_backward, grad_weight_setup),
    "grad_bias": (grad_bias_backward, grad_bias_setup),
    "library_conv2d": (library_conv2d_backward, library_conv2d_setup),
}


# ---- by PyTorch's own operations: under a transform or for a subclass, for which our operators have no rules ----


def library_scale_min_backward(grad, winners, scale, channels, channels_last=False):
    """Give each pixel's gradient to its winner, and zero to the other channels; in whatever layout."""
    zeros = grad.new_zeros(grad.shape[0], channels, *grad.shape[2:])
    return zeros.scatter(1, winners.long(), grad * scale)


def library_grad_input(grad, winners, weight, scale, input_size, *args):
    """Make the gradient of the input from that of all channels."""
    stride, (top, bottom, left, right), dilation, groups, precision, _ = args
    dense = library_scale_min_backward(grad, winners, scale, weight.shape[0])
    (height, width), channels = input_size, weight.shape[1] * groups
    padded = grad.new_empty(()).expand(grad.shape[0], channels, height + top + bottom, width + left + right)
    of_padded, _, _ = _convolution_backward(
        dense, padded, weight, None, stride, (0, 0), dilation, groups, precision, [True, False, False]
    )
    return of_padded[:, :, top : top + height, left : left + width]


def library_grad_weight(grad, winners, input, scale, out_channels, kernel_size, *conv):
    """Make the gradients of weights and bias from that of all channels."""
    stride, (top, bottom, left, right), dilation, groups, precision = conv
    dense = library_scale_min_backward(grad, winners, scale, out_channels)
    weight = grad.new_empty(()).expand(out_channels, input.shape[1] // groups, *kernel_size)
    input, sizes = F.pad(input, (left, right, top, bottom)), [out_channels]
    _, *grads = _convolution_backward(
        dense, input, weight, sizes, stride, (0, 0), dilation, groups, precision, [False, True, True]
    )
    return tuple(grads)


def library_grad_bias(grad, winners, scale, out_channels):
    """Make the gradient of the bias from that of all channels."""
    return library_scale_min_backward(grad, winners, scale, out_channels).sum((0, 2, 3))


BY_LIBRARY = {
    "scale_min_backward": library_scale_min_backward,
    "grad_input": library_grad_input,
    "grad_weight": library_grad_weight,
    "grad_bias": library_grad_bias,
}


def _convolution_backward(grad, input, weight, bias_sizes, stride, padding, dilation, groups, precision, needed):
    """Differentiate a convolution at a precision: this function of torch's has only the setting to say which."""
    with _setting(precision):
        return torch.ops.aten.convolution_backward(
            grad, input, weight, bias_sizes, stride, padding, dilation, False, (0, 0), groups, needed
        )


@contextlib.contextmanager
def _setting(precision):
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    if precision != "auto":
        conv.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision = before


class LibraryConv2d(torch.autograd.Function):
    """The same operator, made of PyTorch's own: for subclasses that know no others."""

    @staticmethod
    def forward(input, weight, bias, stride, padding, dilation, groups, tf32):
        """Convolve at a precision."""
        with _setting("tf32" if tf32 else "ieee"):
            return torch.ops.aten.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)

    setup_context, backward = staticmethod(library_conv2d_setup), staticmethod(library_conv2d_backward)


def _run(kind, *args):
    """Call a backward operator."""
    if dispatch.is_transformed() or subclasses.know_only_aten(*args):
        return BY_LIBRARY[kind](*args)
    # A tensor that vmap wraps does not tell whether it needs a gradient: ask the mode alone.
    if torch.is_grad_enabled():
        return getattr(torch.ops.fused_kernels, f"{kind}_auto").default(*args)
    return dispatch.run(f"{kind}_auto", *args)


def _at_winners(tensor, winners, scale):
    return tensor.gather(1, winners.long()) * scale


def _times_factors(grad, winners, scales):
    """Multiply each pixel's gradient by its winner's factor, where there are factors."""
    return grad if scales is None else (grad * scales[winners.long()]).to(grad.dtype)


def _grad_scales(grad, winners, input, scales):
    """Sum what each channel's pixels would be without its factor, times their gradients."""
    products = grad.to(scales.dtype) * input.gather(1, winners.long())
    return _run("grad_bias", products, winners, 1.0, input.shape[1])


def _convolve(input, weight, bias, conv):
    stride, (top, bottom, left, right), dilation, groups, _ = conv
    return F.conv2d(F.pad(input, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)
