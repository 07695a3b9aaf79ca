"""Files that commands write: whether they can be written, asked before minutes of work, and all of a file or nothing."""

import contextlib
import os
from pathlib import Path


def why_not(path):
    """Say in a few words why a file can't be written, or None; nothing is written to find out."""
    # NOTE: not asked with pathlib, which may raise where somebody else's folder hides what is in it.
    path = Path(path).absolute()
    if os.path.isdir(path):
        return f"{path} is a folder"
    folder = next(place for place in path.parents if os.path.lexists(place))
    if not os.path.isdir(folder):
        return f"{folder} is not a folder"
    # To put a file into a folder takes both permissions.
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    if os.path.exists(path) and not os.access(path, os.W_OK):
        return f"{path} cannot be written"
    return None


@contextlib.contextmanager
def whole(path):
    """Give the name of a file to write, which then takes the place of ``path``; where writing fails, the former one stays."""
    path = Path(path).resolve()
    # The end of the name tells some libraries what to write.
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with _named(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(path, text):
    """Write all of a text file, or leave the former one as it was."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def append(path, text):
    """Append all of a text to a file, or where the disk is full, nothing."""
    left = text.encode()
    with Path(path).open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            with _named(path):
                while left:
                    left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def _named(path):
    """Give an error the name of the file, which a full disk's lacks."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
