"""How our operators run on DTensors: the batch may be sharded, and what sums over it is then a partial sum of each process.

The rules are handed to torch when the first DTensor comes; to import what they take is slow.
"""

import functools
import sys

import torch

from . import build

# The operators that choose when they are called, by the kind of rule that they take.
_PER_PIXEL = ("scale_min", "scale_min_winners", "scale_min_backward")
_PER_IMAGE = ("conv2d_scale_min", "conv2d_scale_min_winners", "grad_input")
_SUMS = ("grad_weight", "grad_bias")

_BATCH, _ROWS, _COLUMNS = 0, 2, 3
# The arguments that have a batch; any other tensor is whole in each process.
_BATCHED = ("input", "grad", "winners")


def has_rules(tensor):
    """Tell whether a tensor is a DTensor that has the rules; hand them to torch if nobody has."""
    # Nobody has a DTensor who has not imported this.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor) and _register()


@functools.cache
def _register():
    """Hand the rules to torch; tell whether it takes them."""
    # NOTE: the first is public but experimental in torch 2.11; the others are not public.
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
        from torch.distributed.tensor.experimental import register_sharding

        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        for kind in (*_PER_PIXEL, *_PER_IMAGE, *_SUMS):
            operator = getattr(getattr(torch.ops, build.NAMESPACE), f"{kind}_auto").default
            register_sharding(operator)(functools.partial(_placements, operator, kind))
            # NOTE: by itself it takes calls for the same whose arguments before the first integer differ, such as the padding.
            known[operator] = RuntimeSchemaInfo(static_argnum=1, needs_pytree=True)
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def _placements(operator, kind, *args):
    """Say which placements of outputs and inputs fit together: all whole, or all with a batch sharded alike."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    names = [argument.name for argument in operator._schema.arguments]
    outputs = len(operator._schema.returns)

    def inputs(batched):
        return [
            (batched if name in _BATCHED else Replicate()) if isinstance(arg, DTensorSpec) else None
            for name, arg in zip(names, args, strict=False)
        ]

    fitting = [([Replicate()] * outputs, inputs(Replicate()))]
    for dimension in (_BATCH,) if kind in (*_PER_IMAGE, "grad_weight") else (_BATCH, _ROWS, _COLUMNS):
        output = Partial() if kind in _SUMS else Shard(dimension)
        fitting.append(([output] * outputs, inputs(Shard(dimension))))
    return fitting
