"""How a command meets its terminal: it can print any text, and where a file refuses it ends with one sentence."""

import os
import sys


def run(main):
    """Call a command's main function and give what it gives.

    Raises
    ------
    SystemExit
        A file, a folder or the terminal refused; with one sentence, or none where nobody reads on, as before ``| head``.
    """
    # NOTE: where the locale is ASCII, to print any other letter is an error; stderr escapes it.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            _flush()
    except BrokenPipeError as error:
        raise SystemExit(1) from error
    except OSError as error:
        raise SystemExit(sentence(error)) from error


def sentence(error):
    """Say in one sentence what an OSError says."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _flush():
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        # What is left in the buffer would be an error once more when the interpreter ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise
