"""Say what takes long: on a terminal or in a notebook, never in a log."""

import contextlib
import sys
import time


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
