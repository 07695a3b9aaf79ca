"""Say what takes long, on a terminal or in a notebook and never in a log; and once, what is in the way of a kernel."""

import contextlib
import sys
import time
import warnings


def interactive():
    """Tell whether a person watches: a terminal, or a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # Loggers that stand in for stdout may lack isatty, and there may be no stdout at all.
    isatty = getattr(sys.stdout, "isatty", None)
    return bool(isatty and isatty()) or (shell is not None and hasattr(shell, "kernel"))


@contextlib.contextmanager
def task(label):
    """Print ``label``, then again with the seconds that the block took: whole lines, as several may run at once."""
    if not interactive():
        yield
        return
    start = time.perf_counter()
    print(f"{label} ...", flush=True)
    try:
        yield
    except BaseException:
        print(f"{label} failed", flush=True)
        raise
    print(f"{label}: {time.perf_counter() - start:.1f} s", flush=True)


def warn_once(about, text):
    """Warn, the first time in a process that it is about this: what is in the way of one kernel is mostly in the way of all."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(f"{text}; see python -m fused_kernels doctor", stacklevel=3)


_warned = set()
