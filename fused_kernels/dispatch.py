"""How the package calls its operators: below autograd where no gradient will flow, with winners where one will."""

import contextlib
import os
import threading
import warnings

import torch

from . import build

# An operator's overload for each dtype, which is a library of its own.
OVERLOADS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def operator(name, dtype, namespace=build.NAMESPACE):
    """Give an operator's overload for a dtype; of one that is Python, the operator itself."""
    packet = getattr(getattr(torch.ops, namespace), name)
    return getattr(packet, OVERLOADS.get(dtype, "default"), packet.default)


def run(name, *args):
    """Call an operator. Its rule for gradients is Python; to go around it saves more time than a small kernel takes."""
    if torch.compiler.is_compiling():
        return operator(name, args[0].dtype)(*args)
    found = _operators.get((name, args[0].dtype))
    if found is None:
        found = _operators[name, args[0].dtype] = operator(name, args[0].dtype)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return found(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return found(*args)


_operators = {}


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
    """Call a forward operator such that its gradients come from its winners; without Python, once what that takes is built.

    ``given``: its results, where it is Python itself: to call that by way of torch takes longer than a small kernel.
    """
    input = args[0]
    rules = _rules.get((input.dtype, input.requires_grad, backward)) or rules_without_python(input, backward)
    if rules is None:
        return run(forward, *args)
    if len(backward) == 1:  # scale_min's: input, scale, and maybe scales
        return rules(*args[:2], forward, backward, *args[2:])
    return rules(*args[:9], forward, backward, given, *args[9:])


def require(namespace, name, tensor):
    """Have the library that an operator needs for a tensor; raise UnavailableError where it can't be had."""
    key = namespace, name, tensor.device, tensor.dtype
    if key in _had or type(tensor) not in _PLAIN or tensor.is_meta or torch.compiler.is_compiling():
        return
    if load := loaders.get((namespace, name)):
        load(tensor.device, tensor.dtype)
    _had.add(key)


def is_had(name, tensor):
    """Tell whether the library that an operator needs for a tensor is loaded, or can be, and load it."""
    try:
        require(build.NAMESPACE, name, tensor)
    except build.UnavailableError:
        return False
    except RuntimeError:
        pass  # a compiler's error is for the call itself to raise
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What loads an operator's library, by its namespace and name: a function of a device and a dtype; operators.py fills it.
loaders = {}
_had = set()


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


def is_jit_tracing():
    """Tell whether torch.jit is tracing."""
    return torch._C._is_tracing()


# Called by Dynamo, which cannot trace it.
is_jit_tracing._dynamo_marked_constant = True


# ---- the first training step ----


def rules_without_python(input, backward):
    """Give the operator of from_winners that calls these backward operators, or None until it is built.

    The first call for a dtype begins to build what its backward pass will call, while the forward operator's own library is
    built; and from_winners, which takes longest. Until that is there, Python's rules do the same.
    """
    key = input.dtype, input.requires_grad, backward
    return _rules.get(key) or _prepare(*key)


def _prepare(dtype, needs_input, backward):
    # The last one is called only where the weights' gradient is not wanted.
    for name in backward[:2] if needs_input else backward[1:2]:
        start(name, dtype)
    if not from_winners.is_loaded():
        return None
    name = "scale_min_from_winners" if len(backward) == 1 else "conv_from_winners"
    found = _rules[dtype, needs_input, backward] = getattr(torch.ops.fused_kernels, name).default
    return found


def start(name, dtype):
    """Begin to build an operator's library, unless that was begun before. An error is the call's that needs it."""
    key = name, dtype
    if key in makers and key not in _started:
        _started.add(key)
        _in_background(makers[key])


def finish_builds():
    """Wait for what is being built in the background."""
    for thread in list(_threads):
        thread.join()


def _in_background(make):
    """Run a function that builds, and loads nothing: the interpreter may end meanwhile."""

    def run():
        with contextlib.suppress(RuntimeError):
            make()
        _threads.discard(threading.current_thread())

    thread = threading.Thread(target=run, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


class WithoutPython:
    """A library of csrc/autograd, which does without Python what Python does meanwhile.

    It is built in the background when it is first asked for, then loaded.

    Parameters
    ----------
    name : str
    loss : str
        What is lost where it cannot be built.
    operator, key : str
        Something that it registers, and at which key.
    """

    def __init__(self, name, loss, operator, key):
        self.name, self.loss = name, loss
        self.operator, self.key = operator, key
        self._lock, self._thread, self._error = threading.Lock(), None, None
        self._loaded = self._failed = False

    @property
    def library(self):
        """Its name and source."""
        return self.name, (build.CSRC / "autograd" / f"{self.name}.cpp").read_text(encoding="utf-8")

    def is_loaded(self):
        """Tell whether it is loaded; load it if it can be, and begin to build it if nobody has."""
        if self._loaded or self._failed:
            return self._loaded
        with self._lock:
            if not (self._loaded or self._failed):
                try:
                    self._loaded = self._is_registered()
                    if not self._loaded and self._is_built():
                        build.load(*self.library, device="cpu")
                        self._loaded = True
                except build.UnavailableError:
                    # The kernels lack the same, and say so.
                    self._loaded, self._failed = False, True
                except RuntimeError as error:
                    self._loaded, self._failed = False, True
                    warnings.warn(f"{self.loss}: {error}", stacklevel=2)
        return self._loaded

    def _is_registered(self):
        # What was loaded stays when this module is imported anew.
        if not hasattr(getattr(torch.ops, build.NAMESPACE), self.operator):
            return False
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{build.NAMESPACE}::{self.operator}", self.key)

    def _is_built(self):
        # Every call asks meanwhile, and to look for the file takes longer than a small kernel.
        if self._thread and self._thread.is_alive():
            return False
        if build.find(*self.library, device="cpu"):
            return True
        if self._thread:
            raise self._error or RuntimeError(f"{self.name} was not built")
        self._thread = _in_background(self._make)
        return False

    def forget(self):
        """Start over in a forked process, which has no threads."""
        self._lock, self._thread = threading.Lock(), None

    def _make(self):
        try:
            build.make(*self.library, device="cpu", quiet=True)
        except RuntimeError as error:
            self._error = error


# What builds an operator's library, by its name and a dtype; operators.py fills it.
makers = {}
_rules = {}
_started = set()
_threads = set()
from_winners = WithoutPython(
    *("from_winners", "training is slower than it could be, by microseconds a step"),
    *("conv_from_winners", "CompositeImplicitAutograd"),
)
auto = WithoutPython(
    *("auto", "compiled and exported programs are slower than they could be, by microseconds a call"),
    *("scale_min_auto", "CPU"),
)


def _forget():
    _started.clear()
    _threads.clear()
    from_winners.forget()
    auto.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
