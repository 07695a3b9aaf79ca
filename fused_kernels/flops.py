"""What our operators count in ``torch.utils.flop_counter``.

A convolution's minimum counts what the convolution does: two for each multiplication and addition. Its gradients count what the
operators do, which is the work of one channel for each pixel, the winner. What only scales, compares, copies or adds counts
nothing, as PyTorch's own operators of that kind.

To import that module is slow, so it gets the formulas when somebody else imports it.
"""

import importlib.abc
import importlib.machinery
import sys
from math import prod

import torch

from . import registry

_COUNTER = "torch.utils.flop_counter"


def _pixels(shape):
    images, _, height, width = shape
    return images * height * width


def _conv(input, weight, *args, out_shape=None, **kwargs):
    """Count each filter's multiplications and additions at each pixel; an operator may give winners as well."""
    return 2 * _pixels(out_shape if isinstance(out_shape, torch.Size) else out_shape[0]) * prod(weight)


def _grad_input(grad, winners, weight, *args, **kwargs):
    """Count one filter's at each pixel."""
    return 2 * _pixels(grad) * prod(weight[1:])


def _grad_weight(grad, *args, out_shape=None, **kwargs):
    """Count one filter's at each pixel."""
    return 2 * _pixels(grad) * prod(out_shape[0][1:])


# By the kind of operator.
FORMULAS = {
    "conv2d_scale_min": _conv,
    "conv2d_scale_min_winners": _conv,
    "library_conv2d": _conv,
    "grad_input": _grad_input,
    "grad_weight": _grad_weight,
}


def count():
    """Let the calls of all operators be counted.

    NOTE: in torch 2.11 the hash of an operator changes with each overload that is defined; so this comes after all of them.
    """
    if counter := sys.modules.get(_COUNTER):
        for namespace, name, kind in registry.registered():
            operator = getattr(getattr(torch.ops, namespace), name.partition(".")[0])
            if kind in FORMULAS and operator not in counter.flop_registry:
                counter.register_flop_formula(operator)(FORMULAS[kind])


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of the module that counts."""

    def find_spec(self, name, path=None, target=None):
        """Find it as Python would, and hand over the formulas once it was executed."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader):
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            count()
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module


# One is enough when this module is imported anew.
if _COUNTER not in sys.modules and not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
