"""Remove from the folder of built kernels what this version of the package would not load on this machine."""

import os
import re
import shutil

import filelock

from . import build, dispatch, plans
from .rungs import BACKWARD, COPY, LADDER

# What a library's folder is called, and what has lain in one: now the library, once all that its build made as well.
_FOLDER = re.compile(r"[a-z]\w*(\.\w+)?-[0-9a-f]{16}")
_CONTENT = re.compile(r"build-\w+|lock|build\.ninja|\.ninja_\w+|[\w.]+\.(so|o|d|cu|cpp|txt)")


def clean():
    """Remove old builds, what interrupted builds left behind, and their lock files.

    What is being built stays, and so does whatever does not look like a build of this package.

    Returns
    -------
    int
        How many folders were removed.
    int
        How many bytes they had.

    Raises
    ------
    RuntimeError
        The folder cannot be written, or no compiler is here, so that nothing tells which builds are old.
    """
    cache = build.cache_dir()
    if not cache.exists():
        return 0, 0
    if not os.access(cache, os.W_OK):
        raise RuntimeError(f"nothing was removed: {cache} cannot be written")
    if missing := build.why_no_compiler():
        raise RuntimeError(f"nothing was removed: {missing}")
    needed = {library.parent for library in loadable()}
    removed = [_remove(folder, folder in needed) for folder in sorted(cache.iterdir()) if _is_ours(folder)]
    for lock in cache.glob("*.lock"):
        folder = lock.with_suffix("")
        if _is_our_name(folder.name) and folder not in needed and lock.is_file() and not folder.exists():
            _remove(folder, is_needed=False)
    return sum(count for count, _ in removed), sum(size for _, size in removed)


def loadable():
    """List the libraries that this version would load on this machine, built or not."""
    sources = (dispatch.from_winners.library, dispatch.auto.library, plans.source())
    libraries = [build.find(*source, device="cpu") for source in sources]
    for rung in (*LADDER, COPY, *BACKWARD):
        if rung.device and not rung.why_unavailable():
            libraries += [
                build.find(**rung.library(overload, winners))
                for overload in rung.overloads
                for winners in ((False, True) if rung.winners else (False,))
            ]
    return libraries


def _is_ours(folder):
    if not _is_our_name(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    return all(_CONTENT.fullmatch(path.name) and not path.is_symlink() for path in folder.rglob("*"))


def _is_our_name(name):
    if not _FOLDER.fullmatch(name):
        return False
    library = name.rpartition("-")[0].partition(".")[0].removesuffix("_winners")
    parts = (dispatch.from_winners, dispatch.auto, *LADDER, COPY, *BACKWARD)
    return library in {plans.NAME, *(part.name for part in parts)}


def _remove(folder, is_needed):
    """Remove a folder, or of one that is needed what is not its library; give how many that were, and their bytes."""
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return 0, 0  # being built
    with lock:
        library = folder / f"{folder.name.rpartition('-')[0]}.so"
        if is_needed and library.exists():
            unneeded = [path for path in folder.iterdir() if path != library]
        else:
            unneeded = [folder] if folder.exists() else []
        size = sum(file.stat().st_size for path in unneeded for file in (path, *path.rglob("*")) if file.is_file())
        for path in unneeded:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not is_needed:
            os.unlink(lock.lock_file)
    return int(bool(unneeded)), size
