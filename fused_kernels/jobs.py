"""Run compilers: several at once, all told no more than there are cores, and none of them outlives this process."""

import atexit
import contextlib
import os
import shlex
import subprocess
import threading
import weakref

_cores = threading.Semaphore(os.cpu_count() or 1)
_jobs = weakref.WeakSet()


def run_all(commands, folder):
    """Run commands at the same time; if one fails, end the others.

    Parameters
    ----------
    commands : list of list of str
    folder : pathlib.Path
        Where to run them.

    Raises
    ------
    RuntimeError
        One failed; the message holds what it said.
    """
    job = _Job(folder)
    # NOTE: no pool of concurrent.futures: at its end the interpreter would wait for that one's threads, and so for a build that
    # nobody needs any more.
    threads = [threading.Thread(target=job.run, args=(command, number), daemon=True) for number, command in enumerate(commands)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        job.stop()
        raise
    if job.error:
        raise job.error


class _Job:
    """Commands of which each needs all the others."""

    def __init__(self, folder):
        self.folder, self.error = folder, None
        self._processes, self._lock = [], threading.Lock()
        _jobs.add(self)

    def run(self, command, number):
        """Run one when a core is free."""
        with _cores:
            # Into a file: a pipe would stay open for as long as what the compiler started itself.
            said = self.folder / f"{number}.txt"
            try:
                with self._lock, said.open("w") as output:
                    if self.error:
                        return
                    process = subprocess.Popen(
                        command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                    )
                    self._processes.append(process)
                if process.wait() == 0:
                    return
                text = said.read_text(errors="replace").strip()
            except OSError as error:
                text = error
        self.stop(RuntimeError(f"the compiler failed: {shlex.join(command)} said:\n{text}"))

    def stop(self, error=None):
        """End all that run, and start no other."""
        with self._lock:
            self.error = self.error or error or RuntimeError("the build was stopped")
            for process in self._processes:
                with contextlib.suppress(OSError):
                    process.terminate()


@atexit.register
def _stop_all():
    for job in list(_jobs):
        job.stop()
