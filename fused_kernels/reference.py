"""What right means: KernelBench level 2, problem 32, in plain PyTorch.

Everything else in this package computes what :class:`Model` computes, only faster.
"""

import torch
from torch import nn

batch_size = 64
in_channels = 64
out_channels = 128
height = width = 256
kernel_size = 3
scale_factor = 2.0


class Model(nn.Module):
    """``min over channels of (scale * conv2d(x))``, one PyTorch operation at a time.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        As for :class:`torch.nn.Conv2d`.
    scale_factor : float
        What the convolution's output is multiplied by.
    """

    def __init__(self, in_channels, out_channels, kernel_size, scale_factor):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        self.scale_factor = scale_factor

    def forward(self, x):
        """Map ``(N, in_channels, H, W)`` to ``(N, 1, H', W')``."""
        return scale_min(self.conv(x), self.scale_factor)


def scale_min(input, scale):
    """``torch.min(input * scale, dim=1, keepdim=True).values``, the fallback of every other rung."""
    return torch.min(input * scale, dim=1, keepdim=True).values


def get_inputs():
    """Draw the reference workload's input: 64 x 64 x 256 x 256, uniform in [0, 1), float32, 1.07 GB."""
    return [torch.rand(batch_size, in_channels, height, width)]


def get_init_inputs():
    """Give the arguments of ``Model(...)`` for the reference workload."""
    return [in_channels, out_channels, kernel_size, scale_factor]
