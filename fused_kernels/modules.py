"""Modules: a layer for one's own networks, and KernelBench's drop-in."""

from torch import nn

from . import arguments
from .ops import conv2d_scale_min


class Conv2dScaleMin(nn.Conv2d):
    """A convolution whose output is scaled and reduced to the minimum over its channels.

    Initialised as :class:`torch.nn.Conv2d`, with the same ``state_dict`` keys, ``weight`` and ``bias``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype
        As for :class:`torch.nn.Conv2d`.
    scale_factor : float
        What the convolution's output is multiplied by.
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
        precision="auto",
        device=None,
        dtype=None,
    ):
        arguments.check_layer(in_channels, out_channels, groups)
        arguments.check_precision(precision)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.scale_factor = arguments.as_scale(scale_factor)
        self.precision = precision

    def forward(self, input):
        """Map ``(N, in_channels, H, W)`` to ``(N, 1, H', W')``."""
        return conv2d_scale_min(
            input,
            self.weight,
            self.bias,
            self.scale_factor,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            precision=self.precision,
        )

    def extra_repr(self):
        """Add what :class:`torch.nn.Conv2d` does not have."""
        return f"{super().extra_repr()}, scale_factor={self.scale_factor}, precision={self.precision}"


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
        self.scale_factor = arguments.as_scale(scale_factor)

    def forward(self, x):
        """Map ``(N, in_channels, H, W)`` to ``(N, 1, H', W')``."""
        return conv2d_scale_min(x, self.conv.weight, self.conv.bias, self.scale_factor)
