"""Where built libraries lie: in the user's cache, or where that can't be used in a private folder under the temporary one.

A library is a file beside its digest, which says whether it is whole: a full disk or a crash can leave a part of a file under
its final name, and to load that kills the process.
"""

import contextlib
import errno
import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path

# Folders that refused a file though nothing had told so before, and what they said.
_refused = {}
# Folders from which nothing could be loaded.
_not_loadable = set()
# Libraries that are whole but do not load.
spoiled = set()
# Libraries whose digests were found right: where, and which file that was.
_whole = {}


class UnavailableError(RuntimeError):
    """A kernel can't be had on this machine; PyTorch's own operations compute the same."""


class NoPlaceError(UnavailableError):
    """There is no folder in which built libraries can be kept."""


def cache_dir():
    """Give the folder of the built libraries: ``$FUSED_KERNELS_CACHE``, else ``fused_kernels`` in the user's cache.

    Where there is no home either, or nothing can be written in that folder, it is one under the temporary folder; None where
    there is not even that.
    """
    usable = [folder for folder in folders() if not why_not(folder)]
    return next(iter(usable or folders()), None)


def folders():
    """List the folders in which libraries may lie, the wanted one first."""
    return [folder for folder in (_wanted(), _temporary()) if folder]


def why_not(folder):
    """Say in a few words why no library can be built and loaded in a folder, or None; nothing is written to find out."""
    if folder in _refused:
        return _refused[folder]
    if folder == _temporary() and os.path.lexists(folder) and not _is_private(folder):
        return f"{folder} is not this user's alone"
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    # NOTE: pathlib's is_dir raises where a link leads into somebody else's folder.
    if not (os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)):
        return f"{folder} cannot be written"
    with contextlib.suppress(OSError):
        if os.statvfs(existing).f_flag & os.ST_NOEXEC:
            return f"{folder} is mounted such that no library can be loaded from it (noexec)"
    return None


def why_none():
    """Say in one sentence why there is no place for built libraries, or None."""
    reasons = [why_not(folder) for folder in folders()]
    if not all(reasons):
        return None
    found = ", and ".join(reasons) or "there is neither a home nor a temporary folder"
    return f"no place for built kernels: {found}; name another folder in FUSED_KERNELS_CACHE"


def why_not_wanted():
    """Say in one sentence why built libraries are kept under the temporary folder, or None."""
    wanted, kept = _wanted(), cache_dir()
    if kept == wanted or why_none():
        return None
    reason = why_not(wanted) if wanted else "there is no home folder"
    return f"built kernels are kept in {kept}, where they may not last: {reason}; name another folder in FUSED_KERNELS_CACHE"


def open_one():
    """Make the folder in which to build, and give it.

    Raises
    ------
    NoPlaceError
        There is none; the message says why.
    """
    for folder in folders():
        if why_not(folder):
            continue
        try:
            folder.mkdir(0o700 if folder == _temporary() else 0o777, parents=True, exist_ok=True)
            # What tells of permissions may not tell of quotas and other refusals.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            refuse(folder, error)
            continue
        if not why_not(folder):
            return folder
    raise NoPlaceError(why_none())


def refuse(folder, error):
    """Note that a folder refused what a build needs, so that nothing is built there again."""
    _refused[folder] = f"{folder} cannot be written ({os.strerror(error.errno) if error.errno else error})"


def refuse_to_load(library):
    """Note that a whole library could not be loaded from where it lies, so that it is made somewhere else."""
    _refused[library.parent] = f"no library can be loaded from {library.parent}"
    _not_loadable.add(library.parent)


def raise_if_full(folder):
    """Raise OSError if a folder's disk has no room for a build."""
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < 2**22:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- whole libraries ----


def find(file):
    """Give the library of that name in the first folder that has it whole, or None."""
    return next((folder / file for folder in _searched() if is_whole(folder / file)), None)


def matching(pattern):
    """List the libraries, whole or not, whose names match."""
    found = []
    for folder in _searched():
        with contextlib.suppress(OSError):
            if is_trusted(folder):
                found += sorted(folder.glob(pattern))
    return found


def _searched():
    """List the folders to look in: the temporary one only where the wanted one is of no use."""
    wanted = _wanted()
    return [wanted] if wanted and not why_not(wanted) else folders()


def is_whole(library):
    """Tell whether a library is there, with the digest that it was built with."""
    try:
        if library in spoiled or not is_trusted(library.parent):
            return False
        status = library.stat()
        found = status.st_ino, status.st_size, status.st_mtime_ns
        if _whole.get(library) == found:
            return True
        if _digest(library) != digest_file(library).read_text(encoding="ascii").strip():
            return False
    except (OSError, UnicodeDecodeError):
        return False
    _whole[library] = found
    return True


def digest_file(library):
    """Name the file beside a library that has its digest."""
    return library.with_name(f"{library.stem}.sha256")


def keep(built, library):
    """Move a library to its final place, its digest first; a crash on the way leaves none that counts as whole."""
    digest = built.with_suffix(".sha256")
    digest.write_text(f"{_digest(built)}\n", encoding="ascii")
    for file in (built, digest):
        _sync(file)
    digest.replace(digest_file(library))
    built.replace(library)
    with contextlib.suppress(OSError):
        _sync(library.parent)


def _digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- the folders ----


def _wanted():
    try:
        if chosen := os.environ.get("FUSED_KERNELS_CACHE"):
            return _absolute(os.path.expanduser(chosen))
        if base := os.environ.get("XDG_CACHE_HOME"):
            return _absolute(base) / "fused_kernels"
        return Path.home() / ".cache" / "fused_kernels"
    except (OSError, RuntimeError):
        return None


@functools.cache
def _absolute(path):
    """Tell once where a path leads: a process may go to another folder."""
    return Path(path).absolute()


def _temporary():
    try:
        return Path(tempfile.gettempdir()).absolute() / f"fused_kernels-{os.getuid()}"
    except OSError:
        return None


def is_trusted(folder):
    """Tell whether libraries in a folder may be loaded: anybody can make folders under the temporary one."""
    return folder not in _not_loadable and (folder != _temporary() or _is_private(folder))


def _is_private(folder):
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
