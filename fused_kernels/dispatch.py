"""How the package calls its operators: below autograd where no gradient will flow, with winners where one will."""

import threading

import torch

from . import build


def run(name, *args):
    """Call an operator. Its rule for gradients is Python; to go around it saves more time than a small kernel takes."""
    # The overload: the packet that holds it looks at every argument in Python first.
    operator = getattr(torch.ops.fused_kernels, name).default
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def run_forward(name, args, backward, return_indices):
    """Call a forward operator; where its winners are wanted, the one that gives them as well.

    ``backward``: the operators of its backward pass.
    """
    if not return_indices and not wants_gradient(*args):
        return run(name, *args)
    output, winners = run_with_winners(name, args, backward)
    return (output, winners.long()) if return_indices else output


def run_with_winners(name, args, backward):
    """Call the operator of a rung that gives winners as well."""
    forward = f"{name}_winners"
    if torch.compiler.is_compiling() or not wants_gradient(*args):
        return run(forward, *args)
    return attach_backward(forward, args, backward)


def attach_backward(forward, args, backward, given=()):
    """Call a forward operator such that its gradients come from its winners, without Python.

    ``given``: its results, where it is Python itself: to call that by way of torch takes longer than a small kernel.
    """
    if len(args) == 2:  # scale_min's: input and scale
        return _from_winners("scale_min_from_winners")(*args, forward, backward)
    return _from_winners("conv_from_winners")(*args, forward, backward, given)


def wants_gradient(*args):
    """Tell whether a gradient will flow back to one of these."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    return torch._C._any_requires_grad(*args)


def is_transformed():
    """Tell whether a transform of torch.func or forward-mode differentiation is under way: no operator has a rule for those."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _from_winners(name):
    """Give one of the two operators whose backward pass runs without Python; they are built before the first call."""
    operator = _from_winners_operators.get(name)
    if operator is None:
        with _from_winners_lock:
            if not hasattr(torch.ops.fused_kernels, name):
                build.load("from_winners", (build.CSRC / "autograd" / "from_winners.cpp").read_text(), device="cpu")
        operator = _from_winners_operators[name] = getattr(torch.ops.fused_kernels, name).default
    return operator


_from_winners_operators = {}
_from_winners_lock = threading.Lock()
