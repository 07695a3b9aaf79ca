"""Modules: a layer for one's own networks, and KernelBench's drop-in."""

import torch
from torch import nn
from torch.nn import functional as F

from . import arguments
from .ops import conv2d_scale_min


class Conv2dScaleMin(nn.Conv2d):
    """A convolution whose output is scaled and reduced to the minimum over its channels.

    Initialised as :class:`torch.nn.Conv2d`, with the same ``state_dict`` keys, ``weight`` and ``bias``, and ``scale_factor`` if
    that is a tensor.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As for :class:`torch.nn.Conv2d`.
    scale_factor : float, Tensor or torch.nn.Parameter
        What the convolution's output is multiplied by: a number, or a tensor of one element or of one for each output channel,
        as for :func:`fused_kernels.conv2d_scale_min`. A parameter is learned; another tensor becomes a buffer.
    precision : {"auto", "ieee", "tf32"}
        As for :func:`fused_kernels.conv2d_scale_min`.

    Raises
    ------
    ValueError, TypeError
        An argument is off; the sentence says which, what was expected and what came.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        scale_factor,
        *,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        precision="auto",
        device=None,
        dtype=None,
    ):
        arguments.check_layer(in_channels, out_channels, groups)
        arguments.check_precision(precision)
        geometry = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(*geometry, bias, padding_mode, device=device, dtype=dtype)
        _hold_scale(self, scale_factor, self.out_channels)
        self.precision = precision

    def forward(self, input):
        """Map ``(N, in_channels, H, W)`` to ``(N, 1, H', W')``, and one image ``(in_channels, H, W)`` to ``(1, H', W')``."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return conv2d_scale_min(
            input,
            self.weight,
            self.bias,
            self.scale_factor,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            precision=self.precision,
        )

    def extra_repr(self):
        """Add what :class:`torch.nn.Conv2d` does not have."""
        scale = self.scale_factor
        if isinstance(scale, torch.Tensor):
            scale = f"{'parameter' if isinstance(scale, nn.Parameter) else 'tensor'} of shape {tuple(scale.shape)}"
        return f"{super().extra_repr()}, scale_factor={scale}, precision={self.precision}"


def _hold_scale(module, scale, channels, persistent=True):
    """Make a scale part of a module: a tensor as its parameter or buffer, a number as a number."""
    scale = arguments.as_scale(scale)
    if not isinstance(scale, torch.Tensor):
        module.scale_factor = scale
        return
    # It goes where the module goes.
    arguments.check_scale(scale, channels, scale.device)
    if isinstance(scale, nn.Parameter):
        module.scale_factor = scale
    else:
        module.register_buffer("scale_factor", scale, persistent)


class ModelNew(nn.Module):
    """KernelBench's drop-in for :class:`fused_kernels.Model`: same constructor, weights, ``state_dict`` and result.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, scale_factor
        As for :class:`fused_kernels.Model`.
    """

    def __init__(self, in_channels, out_channels, kernel_size, scale_factor):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        # Of what is not learned, Model saves nothing.
        _hold_scale(self, scale_factor, out_channels, persistent=False)

    def forward(self, x):
        """Map ``(N, in_channels, H, W)`` to ``(N, 1, H', W')``, and one image ``(in_channels, H, W)`` to ``(1, H', W')``."""
        return conv2d_scale_min(x, self.conv.weight, self.conv.bias, self.scale_factor)
