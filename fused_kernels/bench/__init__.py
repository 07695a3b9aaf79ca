"""Honest timing: every rung beside its peers and the machine's ceilings, in one run, each result checked before it is timed.

Measuring: :mod:`.workloads` are timed by :mod:`.clock` on the machine that :mod:`.environment` describes, against
:mod:`.peers` and :mod:`.limits`; :mod:`.comparison` checks results before their times count; :mod:`.forward` and
:mod:`.training` say what is measured, and :mod:`.suite` runs it. Recording: :mod:`.records` keeps what was measured in
figures/data, and :mod:`.report` prints it. Drawing is not here: :mod:`fused_kernels.plots` reads the records. The choice
between kernels: :mod:`.choices` times all on many layers, :mod:`.fit` learns from that, :mod:`.regret` says what is lost.
"""

import importlib

# A name is loaded when it is first used: who only reads records does not load what measures.
_NAMES = {
    "clock": ("Timing", "compare", "measure", "replay", "sustained"),
    "environment": ("default_device", "machine"),
    "limits": ("ceilings",),
    "peers": ("MAX_AUTOTUNE",),
    "records": ("Record", "RunInfo", "Subject", "append", "data_dir", "latest", "select"),
    "report": ("summary",),
    "suite": ("run",),
    "workloads": ("LAYERS", "SHAPES", "TINY", "Workload", "workload"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name):
    """Load a public name's module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})
