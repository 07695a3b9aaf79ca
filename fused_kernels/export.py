"""A rung in one file of KernelBench's form: nothing imported but torch, the CUDA source inside."""

import re

from . import reference, toolchain
from .rungs import LADDER, rungs

OPERATOR = "conv2d_scale_min"
EXPORTABLE = tuple(r.name for r in LADDER if r.operator == OPERATOR and r.device == "cuda" and not r.in_triton)

TEMPLATE = '''"""{idea}."""

import torch
from torch import nn
from torch.utils.cpp_extension import load_inline

SOURCE = r"""
{source}

namespace fused_kernels {{
Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, double scale) {{
  return {name}(input, weight, bias, scale, {{1, 1}}, {{0, 0, 0, 0}}, {{1, 1}}, 1, "{precision}");
}}
}}

STABLE_TORCH_LIBRARY_FRAGMENT({namespace}, m) {{
  m.def("forward(Tensor input, Tensor weight, Tensor? bias, float scale) -> Tensor");
}}

STABLE_TORCH_LIBRARY_IMPL({namespace}, CUDA, m) {{
  m.impl("forward", TORCH_BOX(&fused_kernels::forward));
}}
"""

arch = {arch}
load_inline(
    "{namespace}",
    cpp_sources=[""],
    cuda_sources=[SOURCE],
    extra_cuda_cflags=[
        "-O3",
        "-DUSE_CUDA",
        f"-gencode=arch=compute_{{arch}},code=sm_{{arch}}",
    ],
    is_python_module=False,
    no_implicit_headers=True,
)
operator = torch.ops.{namespace}.forward.default


class ModelNew(nn.Module):
    """min over channels of (scale * conv2d(x))."""

    def __init__(self, in_channels, out_channels, kernel_size, scale_factor):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        self.scale_factor = scale_factor

    def forward(self, x):
        return operator(x, self.conv.weight, self.conv.bias, self.scale_factor)


def get_inputs():
    return [torch.rand({batch_size}, {in_channels}, {height}, {width})]


def get_init_inputs():
    return [{in_channels}, {out_channels}, {kernel_size}, {scale_factor}]
'''


def kernelbench(name="conv_wgmma"):
    """Write a rung as one file: ``ModelNew``, ``get_inputs``, ``get_init_inputs``, and the CUDA source inline.

    Parameters
    ----------
    name : str
        A rung of the fused convolution that is a CUDA kernel.

    Returns
    -------
    str
        The file's text.

    Raises
    ------
    ValueError
        No such rung.
    """
    if name not in EXPORTABLE:
        raise ValueError(f"rung: expected one of {', '.join(EXPORTABLE)}, got {name!r}")
    rung = rungs[name]
    # Only what runs: KernelBench refuses some of Python's words, even in comments and in C++.
    source = re.sub(r"[ \t]*//[^\n]*", "", flattened(rung.source_file))
    source = re.sub(r"\bpass\b", "turn", source)
    # The rung's own operator also takes lists and a string; each call would pass them through PyTorch's dispatcher.
    source = re.sub(r"STABLE_TORCH_LIBRARY_IMPL\([^{]*\{[^}]*\}", "", source)
    capability = rung.only_capability
    current = '"".join(map(str, torch.cuda.get_device_capability()))'
    return TEMPLATE.format(
        idea=rung.idea[0].upper() + rung.idea[1:],
        source=re.sub(r"\n\s*\n+", "\n\n", source).strip(),
        namespace=f"kernelbench_{name}",
        name=name,
        arch=f'"{toolchain.architecture(capability)}"' if capability else current,
        precision=rung.float32_precisions[0],
        **{key: getattr(reference, key) for key in ("batch_size", "in_channels", "out_channels", "height", "width")},
        **{key: getattr(reference, key) for key in ("kernel_size", "scale_factor")},
    )


def flattened(path, seen=None):
    """Read a source with the package's own headers put where they are included, each once."""
    seen = set() if seen is None else seen
    folders = (path.parent, *toolchain.include_paths("cuda"))

    def replace(match):
        found = next((folder / match[1] for folder in folders if (folder / match[1]).exists()), None)
        if found is None:
            return match[0]
        if found.resolve() in seen:
            return ""
        seen.add(found.resolve())
        return flattened(found, seen)

    text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return re.sub(r'^#include "([^"]+)"$', replace, text, flags=re.MULTILINE)
