"""Compile a kernel's source on first use and load it: toolchain, flags, cache, lock.

Each rung, and the copy that the composite makes, is one library for each dtype: a call compiles what it needs alone, and an
edited kernel is rebuilt in seconds. The longest sources are compiled in parts, as many at once as there are cores. The schemas
live in Python (:mod:`fused_kernels.operators`); a library only registers implementations, through PyTorch's stable ABI, whose
headers compile in a fraction of the time that ``torch/extension.h`` takes. Two more libraries have no kernel but save Python's
time: ``from_winners`` in training, ``auto`` in compiled and exported programs. Autograd and the dispatcher are not in that ABI,
so these use libtorch's headers.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from . import jobs, progress

CSRC = Path(__file__).parent / "csrc"
NAMESPACE = "fused_kernels"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version, and the GPU architectures it compiles for, such as 90 for sm_90."""

    home: Path
    version: tuple[int, int]
    architectures: frozenset[int]


class NoPlaceError(RuntimeError):
    """The folder of the built libraries can't be written."""


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


def load(name, source, **options):
    """Build a library unless the same one was built before, load it, and so register its operators.

    The arguments are :func:`make`'s.

    Returns
    -------
    pathlib.Path
        The library.
    """
    library = make(name, source, **options)
    torch.ops.load_library(str(library))
    return library


def make(name, source, *, device, namespace=NAMESPACE, arch=None, winners=False, dtype=None, at_once=None, quiet=False):
    """Build a library unless the same one was built before.

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
    dtype : str, optional
        The only dtype to compile for, such as "float32"; by default all that the source has.
    at_once : int, optional
        At most how many parts of a source that says it can be compiled in parts; by default one per core.
    quiet : bool
        Whether to say nothing where somebody watches.

    Returns
    -------
    pathlib.Path
        The library.

    Raises
    ------
    RuntimeError
        No toolchain, or the compiler failed; the message holds what it said.
    """
    library, archs, flags = _plan(name, source, device, namespace, arch, winners, dtype)
    if library.exists():
        return library
    directory = library.parent
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{directory}.lock").acquire()
    except OSError as error:
        raise NoPlaceError(_no_place(directory.parent)) from error
    with lock:
        if not library.exists():
            # A killed build leaves half its files.
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            variant = " ".join([name, *([dtype] if dtype else []), *(["with winners"] if winners else [])])
            label = " for ".join([f"building {variant}", *(f"sm_{arch}" for arch in archs)])
            with contextlib.nullcontext() if quiet else progress.task(label):
                _compile(library, name, source, device, flags, at_once or os.cpu_count() or 1)
    return library


def find(name, source, *, device, namespace=NAMESPACE, arch=None, winners=False, dtype=None):
    """Name the library that :func:`make` would give for these arguments, whether or not it is there."""
    return _plan(name, source, device, namespace, arch, winners, dtype)[0]


def _plan(name, source, device, namespace, arch, winners, dtype):
    archs = ([arch] if arch else _visible_architectures()) if device == "cuda" else []
    flags = compiler_flags(device, namespace, archs)
    folder = name
    if winners:
        folder, flags = f"{folder}_winners", [*flags, "-DFUSED_KERNELS_WINNERS"]
    if dtype:
        folder, flags = f"{folder}.{dtype}", [*flags, f"-DFUSED_KERNELS_DTYPE={dtype}"]
    return cache_dir() / f"{folder}-{_key(source, device, flags)}" / f"{folder}.so", archs, flags


# ---- compiling ----


def takes_one_dtype(source):
    """Tell whether a source can be compiled for one dtype alone: where it names its operators by the macros for that."""
    return re.search(r"m\.impl\((OPERATOR|FORWARD)\(", source) is not None


def _compile(library, name, source, device, flags, at_once):
    """Compile a source, as several translation units at once if it says that it can be, and link them."""
    suffix = "cu" if device == "cuda" else "cpp"
    found = re.search(r"^// Compiled in up to (\d+) parts", source, re.MULTILINE)
    parts = min(int(found[1]), at_once) if found and "-DFUSED_KERNELS_DTYPE" in " ".join(flags) else 1
    # A compiler that outlives this process must not write where the next one builds.
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=library.parent))
    (folder / f"{name}.{suffix}").write_text(source)
    compiler = [str(cuda_toolkit().home / "bin" / "nvcc"), *_host_compiler()] if device == "cuda" else _cxx()
    units = [[]] if parts == 1 else [[f"-DFUSED_KERNELS_PARTS={parts}", f"-DFUSED_KERNELS_PART={i}"] for i in range(parts + 1)]
    objects = [f"{name}.{i}.o" for i in range(len(units))]
    includes = [f"-I{path}" for path in include_paths(device)]
    includes += [part for path in torch_include_paths() for part in ("-isystem", str(path))]
    common = [*compiler, *flags, *includes, "-c", f"{name}.{suffix}"]
    jobs.run_all([[*common, *macros, "-o", object] for macros, object in zip(units, objects, strict=True)], folder)
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    if device == "cuda":
        libraries += ["-lc10_cuda", "-ltorch_cuda", f"-L{_linkable_home(cuda_toolkit()) / 'lib64'}", "-lcudart"]
    shared = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    jobs.run_all([[*_cxx(), *shared, *objects, *libraries, *_cxx_runtime(), "-o", library.name]], folder)
    # The final name is what says that a build was completed.
    (folder / library.name).replace(library)
    shutil.rmtree(folder, ignore_errors=True)


def _host_compiler():
    """Name the C++ compiler for nvcc to use, where the environment does."""
    return ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []


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
        return [mapped[0]] if mapped else []
    return []


def include_paths(device):
    """Name the folders of our own headers."""
    return [CSRC / device / "include", CSRC / "include"]


def torch_include_paths():
    """Name the folders of PyTorch's headers."""
    include = Path(torch.__file__).parent / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def _visible_architectures():
    """Name what the visible GPUs need that a kernel of ours can run on: one library serves them all."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    known = cuda_toolkit().architectures
    return [architecture(c) for c in sorted(capabilities) if c >= (8, 0) and c[0] * 10 + c[1] in known]


def compiler_flags(device, namespace, archs):
    """Give what a library is compiled with, apart from its source and where headers lie."""
    flags = ["-std=c++17", f"-DFUSED_KERNELS_NAMESPACE={namespace}"]
    if device == "cpu":
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        return [*flags, "-O3", "-fPIC", native, "-fno-math-errno"]
    # PyTorch's headers convert 16-bit types themselves, and call constexpr functions of the host on the device.
    unwanted = "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"
    flags += [f"-D__CUDA_NO_{what}__" for what in unwanted]
    flags += ["--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-DUSE_CUDA", "-lineinfo"]
    # Of the host's code alone, which has no loop that takes time: half a second less to compile.
    flags += ["-O1"]
    return [*flags, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]


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
