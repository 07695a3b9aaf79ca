"""Run every notebook and then the quick benchmark on this machine: what ``make run`` calls once everything is installed.

Executed notebooks go to build/notebooks/, this machine's figures to build/figures/. The exit status is 1 if a notebook failed.
"""

import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from fused_kernels import bench, console, files, plots

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
EXECUTED, FIGURES = BUILD / "notebooks", BUILD / "figures"
TIMEOUT = 900  # seconds a cell, the slowest compiler included


def main():
    """Run it all; give the exit status."""
    paths = sorted(HERE.glob("[0-9]*.ipynb"))
    for file in (*(EXECUTED / path.name for path in paths), FIGURES / "new.png"):
        if reason := files.why_not(file):
            sys.exit(f"expected a folder that can be written, got {BUILD}: {reason}; copy the checkout to a folder of your own")
    failed = [path.stem for number, path in enumerate(paths, 1) if not run(path, f"[{number}/{len(paths)}] {path.stem}")]

    print("quick benchmark ...", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = bench.run(quick=True)
    plots.save_all(records, FIGURES)

    print(f"\n{bench.summary(records)}\n")
    print(f"executed notebooks: {EXECUTED}")
    print(f"figures:            {FIGURES}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(path, label):
    """Execute one notebook, print a line, and write it to build/notebooks; tell whether it went through."""
    notebook = nbformat.read(path, as_version=4)
    cells, start = len(notebook.cells), time.perf_counter()

    def progress(cell, cell_index):
        if sys.stdout.isatty():
            print(f"\r{label}  cell {cell_index + 1} of {cells}", end="", flush=True)

    client = NotebookClient(
        notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(HERE)}}, record_timing=False, on_cell_execute=progress
    )
    error = None
    try:
        # The kernel's own log; what cells write to stderr is in the notebook.
        client.execute(stderr=subprocess.DEVNULL)
    except CellExecutionError as problem:
        error = f"{problem.ename}: {problem.evalue}"
    except (DeadKernelError, TimeoutError) as problem:
        error = f"{type(problem).__name__}: {problem}"

    EXECUTED.mkdir(parents=True, exist_ok=True)
    files.write(EXECUTED / path.name, nbformat.writes(notebook) + "\n")
    clear = "\r\033[K" if sys.stdout.isatty() else ""
    print(f"{clear}{label}  {time.perf_counter() - start:.0f} s{'' if error is None else f'  FAILED: {error}'}", flush=True)
    return error is None


if __name__ == "__main__":
    sys.exit(console.run(main))
