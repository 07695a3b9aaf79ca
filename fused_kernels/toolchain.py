"""The compilers: which there are, what they say of themselves, and what they are called with."""

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
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from . import places
from .places import UnavailableError

CSRC = Path(__file__).parent / "csrc"
NAMESPACE = "fused_kernels"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version, and the GPU architectures it compiles for, such as 90 for sm_90."""

    home: Path
    version: tuple[int, int]
    architectures: frozenset[int]


# ---- C++ ----


def cxx():
    """Give the command that compiles C++: ``$CXX``, else c++."""
    return _words("CXX") or ["c++"]


def _words(variable):
    value = os.environ.get(variable) or ""
    try:
        return shlex.split(value)
    except ValueError:
        return [value]  # a quote without its end: nothing of that name will be found


def why_no_compiler():
    """Say in one sentence why nothing can be compiled here, or None."""
    command = cxx()
    if shutil.which(command[0]):
        return None
    return (
        f"no C++ compiler: {command[0]!r} was not found; install one (Debian: apt install g++; "
        "conda: conda install cxx-compiler) or name it in the environment variable CXX"
    )


@functools.cache
def compiler_version():
    """Give what the C++ compiler says of itself.

    Raises
    ------
    RuntimeError
        There is none (an UnavailableError), or it fails; the message holds what it said.
    """
    if reason := why_no_compiler():
        raise UnavailableError(reason)
    return say([*cxx(), "--version"])


def say(command):
    """Run a compiler and give what it prints about itself."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise RuntimeError(f"the compiler is there but cannot be started: {command[0]} ({error.strerror})") from error
    # A compiler speaks the locale's language, and need not write it in the locale's encoding.
    said = done.stdout.decode("utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"the compiler is there but fails: {shlex.join(map(str, command))} said: {said.strip()}")
    return said


@functools.cache
def cpu_features():
    """Read what ``-march=native`` depends on: a cache in a shared home must not serve another machine's instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.processor()


# What libraries are compiled for that run on other machines: the name, the compiler's flags, what a CPU must have. Best first.
_AVX2 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"])
_AVX512 = _AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_LEVELS = {
    "x86_64": [
        ("x86_64_v4_bf16", ["-march=x86-64-v4", "-mavx512bf16"], _AVX512 | {"avx512_bf16"}),
        ("x86_64_v4", ["-march=x86-64-v4"], _AVX512),
        ("x86_64_v3", ["-march=x86-64-v3"], _AVX2),
    ]
}


def cpu_levels():
    """Give the levels of this kind of CPU for which libraries can be prebuilt, the best first: name, flags, needed features."""
    return _LEVELS.get(platform.machine(), [(platform.machine().lower(), [], frozenset())])


def cpu_levels_here():
    """Name the levels whose libraries this CPU can run."""
    has = set(cpu_features().partition(":")[2].split())
    return [name for name, _, needed in cpu_levels() if needed <= has]


# ---- CUDA ----


NO_NVCC = "no CUDA compiler: nvcc was not found; pip install 'fused-kernels[cuda]', or install the CUDA toolkit"


def why_no_nvcc(capability):
    """Say in one sentence why nothing can be compiled here for a GPU of this compute capability, or None."""
    if reason := why_no_compiler():
        return reason
    toolkit = cuda_toolkit()
    if toolkit is None:
        return NO_NVCC
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


def visible_architectures():
    """Name what the visible GPUs need that a kernel of ours can run on: one library serves them all."""
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [architecture(c) for c in sorted(capabilities) if c >= (8, 0)]


def cover(compiled, needed):
    """Tell whether what was compiled for some architectures runs on all that are needed: 8.0's machine code runs on 8.6 too."""

    def runs(have, on):
        return have == on or ((have + on).isdigit() and have[:-1] == on[:-1] and have[-1] <= on[-1])

    return all(any(runs(have, on) for have in compiled) for on in needed)


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
        dry_run = say([nvcc, "--dryrun", "-x", "cu", os.devnull])
        version, listed = say([nvcc, "--version"]), say([nvcc, "--list-gpu-code"])
        top, release = re.search(r"TOP=(.*\S)", dry_run), re.search(r"release (\d+)\.(\d+)", version)
        if top and release:
            codes = frozenset(int(code) for code in re.findall(r"sm_(\d+)", listed))
            return Toolkit(Path(top[1]).resolve(), (int(release[1]), int(release[2])), codes)
    return None


def _nvcc_candidates():
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield os.path.join(home, "bin", "nvcc")
    yield shutil.which("nvcc")
    yield "/usr/local/cuda/bin/nvcc"
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        yield from sorted(str(path) for path in Path(folder).glob("cu*/bin/nvcc"))


def host_compiler():
    """Name the C++ compiler for nvcc to use, where ``$CC`` does; nvcc takes a compiler alone, nothing that calls one."""
    found = next((word for word in _words("CC") if Path(word).name not in ("ccache", "sccache", "distcc")), None)
    return ["-ccbin", found] if found else []


def cudart(toolkit):
    """Find a toolkit's CUDA runtime, to link with.

    NOTE: the toolkits of PyPI and conda keep it apart from ``lib64``, PyPI's under the name libcudart.so.13 alone.
    """
    home = toolkit.home
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib"), home.parent.parent / "lib"]
    for folder in folders:
        if found := sorted(folder.glob("libcudart.so*")):
            return found[0]
    raise RuntimeError(f"the CUDA toolkit in {home} has no libcudart.so; pip install 'fused-kernels[cuda]'")


def linkable_home(toolkit):
    """Give a toolkit's folder in which torch's own builds find ``lib64/libcudart.so``: PyPI's and conda's keep it elsewhere."""
    home, found = toolkit.home, cudart(toolkit)
    if (home / "lib64" / "libcudart.so").exists():
        return home
    shim = places.open_one() / f"cuda-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"
    with filelock.FileLock(f"{shim}.lock"):
        (shim / "lib64").mkdir(parents=True, exist_ok=True)
        for link, target in [(shim / part, home / part) for part in ("bin", "include", "nvvm")] + [
            (shim / "lib64" / "libcudart.so", found)
        ]:
            if target.exists() and not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(target)
    return shim


# ---- Triton ----


def why_no_triton():
    """Say in one sentence why Triton can compile nothing for a GPU here, or None."""
    # Not imported for the question: that takes a third of a second.
    found = importlib.util.find_spec("triton")
    if found is None:
        return "Triton was not found; pip install triton"
    if not any(Path(folder, "tools", "tensor_descriptor.py").exists() for folder in found.submodule_search_locations or ()):
        return "Triton is too old: expected 3.4 or newer; pip install -U triton"
    # What calls a kernel is C, which Triton compiles by one of these.
    # NOTE: Triton 3.6 takes the whole of $CC for the name of a file.
    given = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([given] if given else ["gcc", "clang"])):
        return f"Triton needs a C compiler, and {given or 'gcc'} was not found; on Debian: apt install gcc"
    header = python_header()
    if not header.exists():
        return f"Triton needs {header}; install Python's headers (Debian: apt install python3-dev)"
    return None


def python_header():
    """Give the place of Python.h, with which Triton and torch.compile compile."""
    return Path(sysconfig.get_path("include"), "Python.h")


# ---- what both are called with ----


def compiler_flags(device, namespace, archs, cpu=None):
    """Give what a library is compiled with, apart from its source and where headers lie.

    Parameters
    ----------
    device : {"cpu", "cuda"}
    namespace : str
        The operators' namespace.
    archs : sequence of str
        The GPU architectures, such as "90a".
    cpu : sequence of str, optional
        The flags of a CPU to compile for; by default this one's.
    """
    # NOTE: from torch 2.14 or 2.15 on, libtorch's headers (not those of the stable ABI) are C++20.
    needs_20 = device == "cpu" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    flags = [f"-std=c++{20 if needs_20 else 17}", f"-DFUSED_KERNELS_NAMESPACE={namespace}"]
    if device == "cpu":
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        return [*flags, "-O3", "-fPIC", *([native] if cpu is None else cpu), "-fno-math-errno"]
    # PyTorch's headers convert 16-bit types themselves, and call constexpr functions of the host on the device.
    unwanted = "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"
    flags += [f"-D__CUDA_NO_{what}__" for what in unwanted]
    flags += ["--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-DUSE_CUDA", "-lineinfo"]
    # Of the host's code alone, which has no loop that takes time: half a second less to compile.
    flags += ["-O1"]
    return [*flags, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]


def include_paths(device):
    """Name the folders of our own headers."""
    return [CSRC / device / "include", CSRC / "include"]


def torch_include_paths():
    """Name the folders of PyTorch's headers."""
    include = Path(torch.__file__).parent / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def link_command(device):
    """Give what links objects into a library: what stands before the objects, and the libraries after them."""
    shared = ["-shared", *(["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else [])]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    if device == "cuda":
        libraries += ["-lc10_cuda", "-ltorch_cuda", str(cudart(cuda_toolkit()))]
    return [*cxx(), *shared], [*libraries, *_cxx_runtime()]


def _cxx_runtime():
    """Name the C++ runtime that torch has loaded, so that our libraries link the same one.

    NOTE: a compiler may link a static one of its own (seen with a GCC 13); the first exception that reaches torch then kills
    the process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            # The sixth column is the path, blanks and all.
            *_, path = line.split(maxsplit=5)
            if re.match(r"libstdc\+\+\.so(\.\d+)*$", os.path.basename(path)):
                return [path]
    return []
