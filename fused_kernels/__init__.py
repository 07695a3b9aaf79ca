"""Fused kernels for ``min over channels of (scale * conv2d(x))``, from the first try to the limit of the chip.

Importing compiles nothing and needs no GPU; each kernel is built on its first call.
"""

from .modules import Conv2dScaleMin, ModelNew
from .operators import edit, load
from .ops import conv2d_scale_min, explain, scale_min
from .prebuilt import prebuild
from .reference import Model, get_init_inputs, get_inputs
from .rungs import rungs

__version__ = "0.1.0"

__all__ = [
    "Conv2dScaleMin",
    "Model",
    "ModelNew",
    "conv2d_scale_min",
    "edit",
    "explain",
    "get_init_inputs",
    "get_inputs",
    "load",
    "prebuild",
    "rungs",
    "scale_min",
]
