"""Run compilers: several at once, all told no more than there are cores, and none of them outlives this process."""

import atexit
import concurrent.futures
import contextlib
import os
import shlex
import signal
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
                with self._lock, said.open("wb") as output:
                    if self.error:
                        return
                    # A group of its own, in which the compiler starts others.
                    process = subprocess.Popen(
                        command,
                        cwd=self.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                    self._processes.append(process)
                if process.wait() == 0:
                    return
                text = said.read_text(encoding="utf-8", errors="replace").strip()
            except OSError as error:
                text = error
        self.stop(RuntimeError(f"the compiler failed: {shlex.join(command)} said:\n{text}"))

    def stop(self, error=None):
        """End all that run, and start no other."""
        with self._lock:
            self.error = self.error or error or RuntimeError("the build was stopped")
            for process in self._processes:
                if process.poll() is None:
                    with contextlib.suppress(OSError):
                        os.killpg(process.pid, signal.SIGTERM)


def map_all(function, items, at_once):
    """Call a function that builds for each item, several at a time; an interrupt ends all compilers."""
    if len(items) == 1:
        return [function(items[0])]
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        try:
            return list(pool.map(function, items))
        except Exception:
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _stop_all()
            raise


@atexit.register
def _stop_all():
    for job in list(_jobs):
        job.stop()


def _forget():
    """Start over in a forked process: the jobs, and the cores that they keep, are its parent's."""
    global _cores
    _cores = threading.Semaphore(os.cpu_count() or 1)
    _jobs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
