"""Tensor subclasses that take calls over below autograd, and which of them know our operators.

Most know PyTorch's operators alone: for these PyTorch's own operations run, forward and backward. For DTensor there are rules
(:mod:`fused_kernels.sharding`), so that each process runs our operators on its part.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import sharding

# What takes over nothing: to find a type here takes less time than to ask it.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), float, int, bool, str, list, tuple, torch.Size})
_OVERRIDES_NOTHING = torch._C._disabled_torch_dispatch_impl


def take_over(*args):
    """Tell whether one of a call's arguments is such a subclass."""
    return any(map(_takes_over, args))


def know_only_aten(*args):
    """Tell whether one of a call's arguments is such a subclass that may know no operators but PyTorch's."""
    if torch.compiler.is_dynamo_compiling() or PLAIN.issuperset(map(type, args)):
        return False
    return any(_takes_over(arg) and not sharding.has_rules(arg) for arg in args)


def _takes_over(arg):
    overrides = getattr(type(arg), "__torch_dispatch__", _OVERRIDES_NOTHING) is not _OVERRIDES_NOTHING
    # With the two torch itself traces any operator.
    return overrides and not isinstance(arg, (FakeTensor, FunctionalTensor))
