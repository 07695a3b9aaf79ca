"""What the package has registered with torch, which outlives its modules.

A module that is reloaded, or imported anew, finds its operators here and leaves them as they are: C++ keeps handles of them, so
to register them again, or to take one back, could be a segmentation fault.
"""

import torch

from . import build

# NOTE: a Library takes its registrations back when it is collected; so they lie where they last as long as torch.
_registered = vars(getattr(torch.ops, build.NAMESPACE)).setdefault("_registered", {})


def register(namespace, name, kind, fill):
    """Register an operator, or one overload of it, unless that was done before.

    Parameters
    ----------
    namespace, name : str
    kind : str
        The kind of operator that it is.
    fill : callable
        Defines it and all that belongs to it in a ``torch.library.Library``; where it fails, nothing stays registered.
    """
    if (namespace, name) in _registered:
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    try:
        fill(library)
    except BaseException:
        library._destroy()
        raise
    _registered[namespace, name] = library, kind


def registered():
    """List namespace, name and kind of all operators; an overload's name follows after a dot."""
    return [(*names, kind) for names, (_, kind) in list(_registered.items())]
