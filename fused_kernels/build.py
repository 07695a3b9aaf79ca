"""Compile a kernel's source on first use and load it: toolchain, flags, cache, lock.

Each rung, and the copy that the composite makes, is one library of its own, so that the first call of a rung compiles that rung
alone and an edited kernel is rebuilt in seconds. The schemas live in Python (:mod:`fused_kernels.operators`); a library only
registers implementations, through PyTorch's stable ABI, whose headers compile in a fraction of the time that
``torch/extension.h`` takes. One more library, ``from_winners``, is for training: autograd is not in that ABI, so it uses
libtorch's headers and brings its own schemas.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from . import progress

CSRC = Path(__file__).parent / "csrc"
NAMESPACE = "fused_kernels"

# load_inline reads the PATH and a global of torch's: the first of several builds at once sets them, the last one restores them.
_environment_lock = threading.Lock()
_environment_users = []
_builds = itertools.count()


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version, and the GPU architectures it compiles for, such as 90 for sm_90."""

    home: Path
    version: tuple[int, int]
    architectures: frozenset[int]


def cache_dir():
    """Give the folder of the built libraries: ``$FUSED_KERNELS_CACHE``, else ``fused_kernels`` in the user's cache."""
    if chosen := os.environ.get("FUSED_KERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_kernels"


def why_no_compiler():
    """Say in one sentence why no C++ library can be built here, or None."""
    command = _cxx()
    if not shutil.which(command[0]):
        return (
            f"no C++ compiler: {command[0]!r} was not found; install one (Debian: apt install g++; "
            "conda: conda install cxx-compiler) or name it in the environment variable CXX"
        )
    folder = cache_dir().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    # A cache that is there may be complete, and then need not be writable.
    if existing != folder and not (existing.is_dir() and os.access(existing, os.W_OK)):
        return _no_place(folder)
    return None


def _no_place(folder):
    return f"no place for built kernels: {folder} cannot be written; name another folder in FUSED_KERNELS_CACHE"


def why_no_nvcc(capability):
    """Say in one sentence why no library for a GPU of this compute capability can be built here, or None."""
    if reason := why_no_compiler():
        return reason
    toolkit = cuda_toolkit()
    if toolkit is None:
        return "no CUDA compiler: nvcc was not found; pip install 'fused-kernels[cuda]', or install the CUDA toolkit"
    number = capability[0] * 10 + capability[1]
    if number not in toolkit.architectures:
        version = ".".join(map(str, toolkit.version))
        return (
            f"the CUDA toolkit {version} in {toolkit.home} cannot compile for this GPU's compute capability "
            f"{capability[0]}.{capability[1]}; install a newer toolkit"
        )
    return None


def architecture(capability):
    """Name what to compile for: "90a" for (9, 0), whose wgmma needs the "a", else plain digits."""
    number = f"{capability[0]}{capability[1]}"
    return "90a" if number == "90" else number


@functools.cache
def cuda_toolkit():
    """Find the CUDA toolkit, or None.

    Looked for in this order: ``$CUDA_HOME``, ``$CUDA_PATH``, nvcc on the PATH, ``/usr/local/cuda``, and the PyPI packages that
    ``pip install 'fused-kernels[cuda]'`` brings.

    Raises
    ------
    RuntimeError
        An nvcc is there but fails; the message holds what it said.
    """
    for nvcc in _nvcc_candidates():
        if not nvcc or not os.access(nvcc, os.X_OK):
            continue
        # NOTE: nvcc on the PATH may be a script outside the toolkit (seen on Debian and in conda); only nvcc itself knows home.
        dry_run = _say([nvcc, "--dryrun", "-x", "cu", os.devnull])
        version, listed = _say([nvcc, "--version"]), _say([nvcc, "--list-gpu-code"])
        top, release = re.search(r"TOP=(\S+)", dry_run), re.search(r"release (\d+)\.(\d+)", version)
        if top and release:
            codes = frozenset(int(code) for code in re.findall(r"sm_(\d+)", listed))
            return Toolkit(Path(top[1]).resolve(), (int(release[1]), int(release[2])), codes)
    return None


def load(name, source, *, device, namespace=NAMESPACE, arch=None, winners=False):
    """Build a library unless the same one was built before, load it, and so register its operators.

    Parameters
    ----------
    name : str
        The library's name, a rung's or ``from_winners``.
    source : str
        C++ (``device="cpu"``) or CUDA C++ (``device="cuda"``) source text.
    device : {"cpu", "cuda"}
    namespace : str
        The operators' namespace, what ``FUSED_KERNELS_NAMESPACE`` is in the source.
    arch : str, optional
        What to compile for, such as "90a"; by default every GPU that is visible.
    winners : bool
        Whether the forward operators also give each pixel's winner, as training needs: the same text, compiled apart.

    Returns
    -------
    pathlib.Path
        The library.

    Raises
    ------
    RuntimeError
        No toolchain, or the compiler failed; the message holds what it said.
    """
    archs = ([arch] if arch else _visible_architectures()) if device == "cuda" else []
    flags = compiler_flags(device, namespace, archs)
    if winners:
        name, flags = f"{name}_winners", [*flags, "-DFUSED_KERNELS_WINNERS"]
    key = _key(source, device, flags)
    directory = cache_dir() / f"{name}-{key}"
    library = directory / f"{name}.so"
    if not library.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{directory}.lock").acquire()
        except OSError as error:
            raise RuntimeError(_no_place(directory.parent)) from error
        with lock:
            if not library.exists():
                # NOTE: a killed build leaves torch's own lock file, on which the next build would wait forever: start clean.
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                # NOTE: torch remembers names: it would not build again what failed, and add a version to what it built.
                unique = f"{name}_{next(_builds)}"
                with progress.task(" for ".join([f"building {name}", *(f"sm_{arch}" for arch in archs)])):
                    _compile_and_load(name, unique, source, device, flags, directory)
                # The final name is what says that a build was completed.
                (directory / f"{unique}.so").replace(library)
                return library
    torch.ops.load_library(str(library))
    return library


def _compile_and_load(name, unique, source, device, flags, directory):
    cpp_extension = import_cpp_extension()
    text = [f'#line 1 "{name}.{"cu" if device == "cuda" else "cpp"}"\n{source}']
    with _build_environment(cpp_extension, device):
        cpp_extension.load_inline(
            unique,
            cpp_sources=[""] if device == "cuda" else text,
            cuda_sources=text if device == "cuda" else None,
            extra_cflags=flags if device == "cpu" else None,
            extra_cuda_cflags=flags if device == "cuda" else None,
            extra_ldflags=_cxx_runtime(),
            extra_include_paths=[str(path) for path in include_paths(device)],
            build_directory=str(directory),
            is_python_module=False,
            no_implicit_headers=True,
        )


def import_cpp_extension():
    """Import torch's build tool only where something is compiled: it takes 0.3 s, and warns of a toolkit without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    with _environment_lock:
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            from torch.utils import cpp_extension
        finally:
            logger.setLevel(before)
    return cpp_extension


@contextlib.contextmanager
def _build_environment(cpp_extension, device):
    """Let load_inline find ninja and the toolkit, which it takes from the PATH and from a global."""
    home = str(_linkable_home(cuda_toolkit())) if device == "cuda" else None
    with _environment_lock:
        _environment_users.append((os.environ.get("PATH", ""), cpp_extension.CUDA_HOME))
        # NOTE: ninja from PyPI lies beside python, which is not on the PATH where nobody activated the environment.
        with contextlib.suppress(ImportError):
            import ninja

            os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))
        cpp_extension.CUDA_HOME = home or cpp_extension.CUDA_HOME
    try:
        yield
    finally:
        with _environment_lock:
            before = _environment_users[0]
            _environment_users.pop()
            if not _environment_users:
                os.environ["PATH"], cpp_extension.CUDA_HOME = before


def _linkable_home(toolkit):
    """Give a toolkit folder in which torch's build finds ``lib64/libcudart.so``.

    NOTE: the toolkits of PyPI and conda keep it elsewhere, PyPI's under the name libcudart.so.13 alone: link it.
    """
    home = toolkit.home
    if (home / "lib64" / "libcudart.so").exists():
        return home
    folders = [home / "lib", *home.glob("targets/*/lib"), home.parent.parent / "lib"]
    found = [f for folder in folders for f in sorted(folder.glob("libcudart.so*"))]
    if not found:
        raise RuntimeError(f"the CUDA toolkit in {home} has no libcudart.so; pip install 'fused-kernels[cuda]'")
    shim = cache_dir() / f"cuda-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"
    with filelock.FileLock(f"{shim}.lock"):
        (shim / "lib64").mkdir(parents=True, exist_ok=True)
        for link, target in [(shim / part, home / part) for part in ("bin", "include", "nvvm")] + [
            (shim / "lib64" / "libcudart.so", found[0])
        ]:
            if target.exists() and not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(target)
    return shim


def _cxx_runtime():
    """Name the C++ runtime that torch has loaded, so that our libraries link the same one.

    NOTE: a compiler may link a static one of its own (seen with a GCC 13); the first exception that reaches torch then kills
    the process.
    """
    with contextlib.suppress(OSError):
        mapped = re.search(r"/\S*libstdc\+\+\.so\S*", Path("/proc/self/maps").read_text())
        return [shlex.quote(mapped[0])] if mapped else None


def include_paths(device):
    """Name the folders of our own headers."""
    return [CSRC / device / "include", CSRC / "include"]


def _visible_architectures():
    """Name what the visible GPUs need that a kernel of ours can run on: one library serves them all."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    known = cuda_toolkit().architectures
    return [architecture(c) for c in sorted(capabilities) if c >= (8, 0) and c[0] * 10 + c[1] in known]


def compiler_flags(device, namespace, archs):
    """Give what a library is compiled with, apart from its source and where headers lie."""
    flags = ["-O3", f"-DFUSED_KERNELS_NAMESPACE={namespace}"]
    if device == "cpu":
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        return [*flags, native, "-fno-math-errno"]
    # NOTE: torch never chooses sm_90a by itself, and fails where no GPU is: always name the target.
    return [*flags, "-DUSE_CUDA", "-lineinfo", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]


def _key(source, device, flags):
    """Name a library by everything that its machine code depends on, so that any change builds it again."""
    headers = sorted(path for folder in include_paths(device) for path in folder.rglob("*") if path.is_file())
    parts = [source, *flags, torch.__version__, _compiler_version()]
    parts += [path.read_text() for path in headers]
    parts.append(_cpu_features() if device == "cpu" else str(cuda_toolkit()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cxx():
    return shlex.split(os.environ.get("CXX") or "c++")


@functools.cache
def _compiler_version():
    if reason := why_no_compiler():
        raise RuntimeError(reason)
    return _say([*_cxx(), "--version"])


def _say(command):
    """Run a compiler and give what it prints about itself."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiler is there but fails: {shlex.join(command)} said: {done.stdout.strip()}")
    return done.stdout


@functools.cache
def _cpu_features():
    """Read what ``-march=native`` depends on: a cache in a shared home must not serve another machine's instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.processor()


def _nvcc_candidates():
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield os.path.join(home, "bin", "nvcc")
    yield shutil.which("nvcc")
    yield "/usr/local/cuda/bin/nvcc"
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        yield from sorted(str(path) for path in Path(folder).glob("cu*/bin/nvcc"))
