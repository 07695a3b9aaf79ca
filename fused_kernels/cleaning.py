"""Remove from the folders of built kernels what this version of the package would not load on this machine."""

import os
import re
import shutil

import filelock

from . import build, dispatch, places, plans, toolchain
from .rungs import BACKWARD, COPY, LADDER

# What a library's files begin with, and its builds' folders; before, all of them lay in a folder of that name.
_STEM = re.compile(r"([a-z]\w*)(\.\w+)*-[0-9a-f]{16}")
_FILE = re.compile(r"\.(so|sha256|lock|build-\w+)")
_OLD_CONTENT = re.compile(r"build-\w+|lock|build\.ninja|\.ninja_\w+|[\w.]+\.(so|o|d|cu|cpp|txt)")


def clean():
    """Remove old builds, what interrupted builds left behind, and their lock files.

    What is being built stays, and so does whatever does not look like a build of this package.

    Returns
    -------
    int
        How many libraries, or remains of one, were removed.
    int
        How many bytes they had.

    Raises
    ------
    RuntimeError
        A folder cannot be written, or no compiler is here, so that nothing tells which builds are old.
    """
    found = {folder: _by_stem(folder) for folder in places.folders() if os.path.isdir(folder) and places.is_trusted(folder)}
    if not any(found.values()):
        return 0, 0
    for folder in found:
        if not os.access(folder, os.W_OK):
            raise RuntimeError(f"nothing was removed: {folder} cannot be written")
    if missing := toolchain.why_no_compiler():
        raise RuntimeError(f"nothing was removed: {missing}")
    needed, prebuilt = _loadable()
    removed = []
    for folder, stems in found.items():
        for stem, paths in stems.items():
            is_needed = stem in needed or _without_target(stem) in prebuilt
            removed.append(_remove(folder / stem, paths, is_needed))
    return sum(count for count, _ in removed), sum(size for _, size in removed)


def _loadable():
    """Give the stems of the files that this version would load on this machine, and of prebuilt ones without their targets."""
    libraries = [build.Library(*source, device="cpu") for source in (dispatch.from_winners.library, dispatch.auto.library)]
    libraries.append(build.Library(*plans.source(), device="cpu"))
    native = [*libraries]
    for rung in (*LADDER, COPY, *BACKWARD):
        if rung.device:
            of_rung = [build.Library(**rung.library(*variant)) for variant in rung.variants]
            libraries += of_rung
            native += [] if rung.why_unavailable() else of_rung
    return (
        {library.native_file().removesuffix(".so") for library in native},
        {f"{library.label}-{library.prebuilt_key()}" for library in libraries},
    )


def _without_target(stem):
    """Take the CPU's level or the GPUs' architectures out of a prebuilt library's stem."""
    label, _, key = stem.rpartition("-")
    targets = "|".join([r"sm_\w+", *(name for name, _, _ in toolchain.cpu_levels())])
    label = re.sub(rf"(\.({targets}))+$", "", label)
    return f"{label}-{key}"


def _by_stem(folder):
    """Find what belongs to a library of this package: stem -> paths."""
    found = {}
    for path in sorted(folder.iterdir()):
        if not (match := _STEM.match(path.name)) or match[1].removesuffix("_winners") not in _names() or path.is_symlink():
            continue
        rest = path.name[match.end() :]
        is_ours = path.is_dir() and _is_old_build(path) if not rest else _FILE.fullmatch(rest)
        if is_ours:
            found.setdefault(match[0], []).append(path)
    return found


def _is_old_build(folder):
    return all(_OLD_CONTENT.fullmatch(path.name) and not path.is_symlink() for path in folder.rglob("*"))


def _names():
    return {plans.NAME, *(part.name for part in (dispatch.from_winners, dispatch.auto, *LADDER, COPY, *BACKWARD))}


def _remove(stem, paths, is_needed):
    """Remove a library's files, or of one that is needed what no call needs; give whether anything was, and its bytes."""
    lock = filelock.FileLock(f"{stem}.lock")
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):
        return 0, 0  # being built, or somebody else's
    with lock:
        is_whole = is_needed and places.is_whole(stem.with_name(f"{stem.name}.so"))
        kept = (".so", ".sha256", ".lock") if is_whole else (".lock",)
        unneeded = [path for path in paths if not path.name.endswith(kept)]
        size = sum(file.stat().st_size for path in unneeded for file in (path, *path.rglob("*")) if file.is_file())
        for path in unneeded:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not is_needed:
            # NOTE: newer versions of filelock remove it by themselves.
            (stem.parent / f"{stem.name}.lock").unlink(missing_ok=True)
    return int(bool(unneeded)), size
