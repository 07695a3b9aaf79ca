"""Compile a kernel's source on first use and load it: keys, lock, parts.

Each rung, and the copy that the composite makes, is one library for each dtype: a call compiles what it needs alone, and an
edited kernel is rebuilt in seconds. The longest sources are compiled in parts, as many at once as there are cores. The schemas
live in Python (:mod:`fused_kernels.operators`); a library only registers implementations, through PyTorch's stable ABI, whose
headers compile in a fraction of the time that ``torch/extension.h`` takes. Two more libraries have no kernel but save Python's
time: ``from_winners`` in training, ``auto`` in compiled and exported programs. Autograd and the dispatcher are not in that ABI,
so these use libtorch's headers.

A library's file is named by a key of all that its machine code depends on. What :mod:`fused_kernels.prebuilt` makes for other
machines has a key without this machine's compiler and CPU, and goes first where it is there.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from . import jobs, places, progress, toolchain
from .places import UnavailableError
from .toolchain import CSRC, NAMESPACE

__all__ = ["CSRC", "NAMESPACE", "Library", "UnavailableError", "find", "load", "make", "takes_one_dtype"]


@dataclass(frozen=True)
class Library:
    """What is compiled into one library.

    Attributes
    ----------
    name : str
        A rung's, or ``from_winners``.
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
    """

    name: str
    source: str
    device: str
    namespace: str = NAMESPACE
    arch: str | None = None
    winners: bool = False
    dtype: str | None = None

    @property
    def label(self):
        """What its file's name begins with."""
        return f"{self.name}{'_winners' if self.winners else ''}{f'.{self.dtype}' if self.dtype else ''}"

    @property
    def archs(self):
        """The GPU architectures that are wanted here."""
        if self.device == "cpu":
            return []
        return [self.arch] if self.arch else toolchain.visible_architectures()

    def buildable_archs(self):
        """Give those of them that the CUDA toolkit compiles for."""
        known = toolchain.cuda_toolkit().architectures if self.device == "cuda" else ()
        return [arch for arch in self.archs if self.arch or int(re.sub(r"\D", "", arch)) in known]

    def flags(self, archs, cpu=None):
        """Give what it is compiled with."""
        flags = toolchain.compiler_flags(self.device, self.namespace, archs, cpu)
        flags += ["-DFUSED_KERNELS_WINNERS"] if self.winners else []
        return flags + ([f"-DFUSED_KERNELS_DTYPE={self.dtype}"] if self.dtype else [])

    def native_file(self):
        """Name the file that is built here: by everything that its machine code depends on, so that any change builds it anew.

        Raises
        ------
        RuntimeError
            No toolchain (an UnavailableError), or it fails.
        """
        version = toolchain.compiler_version()
        if self.device == "cuda" and toolchain.cuda_toolkit() is None:
            raise UnavailableError(toolchain.NO_NVCC)
        target = toolchain.cpu_features() if self.device == "cpu" else str(toolchain.cuda_toolkit())
        return f"{self.label}-{self._key(self.flags(self.buildable_archs()), version, target)}.so"

    def prebuilt_key(self):
        """Give the key of the same library made for other machines: without compiler, CPU and GPUs."""
        cuda = (torch.version.cuda or "").partition(".")[0] if self.device == "cuda" else ""
        return self._key(self.flags((), ()), platform.machine(), cuda)

    def _key(self, flags, compiler, target):
        headers = sorted(
            path for folder in toolchain.include_paths(self.device) for path in folder.rglob("*") if path.is_file()
        )
        headers = [path.read_text(encoding="utf-8") for path in headers]
        parts = [self.source, *flags, torch.__version__, compiler, *headers, target]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def find(self):
        """Give the library where it is there and whole, made here or for machines like this one; or None."""
        if self.namespace == NAMESPACE and (found := self._find_prebuilt()):
            return found
        if toolchain.why_no_compiler() or (self.device == "cuda" and toolchain.cuda_toolkit() is None):
            return None
        return places.find(self.native_file())

    def _find_prebuilt(self):
        if self.device == "cpu":
            key = self.prebuilt_key()
            found = (places.find(f"{self.label}.{level}-{key}.so") for level in toolchain.cpu_levels_here())
            return next(filter(None, found), None)
        for library in places.matching(f"{self.label}.sm_*-*.so"):
            label, _, key = library.stem.rpartition("-")
            archs = label.partition(".sm_")[2].split(".sm_")
            if key == self.prebuilt_key() and toolchain.cover(archs, self.archs) and places.is_whole(library):
                return library
        return None


def load(name, source, *, at_once=None, quiet=False, **options):
    """Build a library unless the same one was built before, load it, and so register its operators.

    The arguments are :func:`make`'s, and so are the errors.

    Returns
    -------
    pathlib.Path
        The library.
    """
    while True:
        library = make(name, source, at_once=at_once, quiet=quiet, **options)
        try:
            torch.ops.load_library(str(library))
            return library
        except OSError as error:
            reason = str(error.__cause__ or error)  # torch's own error does not give the loader's
            if "failed to map segment" in reason:
                # What a folder's mount flags do not tell: somewhere else it may load.
                places.refuse_to_load(library)
            elif Library(name, source, **options).prebuilt_key() in library.name and not toolchain.why_no_compiler():
                # Made on a machine that differs after all, say in its C library: one made here may load.
                places.spoiled.add(library)
            else:
                raise UnavailableError(does_not_load(library, reason)) from error


def does_not_load(library, reason):
    """Say in one sentence that a library does not load, and how to mend that."""
    return f"a built library does not load ({reason}); remove {library.parent / library.stem}.* to have it built anew"


def why_not_loading(library):
    """Say in one sentence why a built library does not load, or None."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return does_not_load(library, error)
    return None


def make(name, source, *, at_once=None, quiet=False, **options):
    """Build a library unless the same one was built before.

    Parameters
    ----------
    name, source, **options
        As for :class:`Library`.
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
    UnavailableError
        There is no toolchain, or no folder to build in.
    RuntimeError
        The compiler failed; the message holds what it said.
    """
    wanted = Library(name, source, **options)
    if found := wanted.find():
        return found
    file = wanted.native_file()
    while True:
        folder = places.open_one()
        if found := places.why_not_wanted():
            progress.warn_once("places", found)
        try:
            return build(wanted, folder / file, wanted.buildable_archs(), at_once=at_once, quiet=quiet)
        except (OSError, NotImplementedError) as error:
            places.refuse(folder, error)


def find(name, source, **options):
    """Give the library that :func:`make` would give for these arguments if it is there and whole, else None."""
    return Library(name, source, **options).find()


def build(wanted, target, archs, cpu=None, at_once=None, quiet=False):
    """Compile a library to a file, unless somebody else does so meanwhile.

    Parameters
    ----------
    wanted : Library
    target : pathlib.Path
    archs, cpu
        As for :func:`toolchain.compiler_flags`.
    at_once, quiet
        As for :func:`make`.

    Raises
    ------
    OSError
        Its folder refused it.
    RuntimeError
        The compiler failed; the message holds what it said.
    """
    with filelock.FileLock(target.with_suffix(".lock")):
        if places.is_whole(target):
            return target
        # What killed builds left, as far as it goes. Each has a folder of its own: its compilers may outlive it.
        for left in target.parent.glob(f"{target.stem}.build-*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.build-", dir=target.parent))
        variant = " ".join(
            [wanted.name, *([wanted.dtype] if wanted.dtype else []), *(["with winners"] if wanted.winners else [])]
        )
        label = " for ".join([f"building {variant}", *(f"sm_{arch}" for arch in archs)])
        try:
            with contextlib.nullcontext() if quiet else progress.task(label):
                built = _compile(wanted, folder, wanted.flags(archs, cpu), at_once or os.cpu_count() or 1)
            places.keep(built, target)
        except RuntimeError:
            places.raise_if_full(folder)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def why_nothing_builds(device):
    """Compile, link and load a line of C++ or CUDA; say in one sentence why that fails, or None."""
    line = 'extern "C" int probe() { return 42; }\n' + ("__global__ void kernel() {}\n" if device == "cuda" else "")
    probe = Library("probe", line, device)
    try:
        if device == "cuda" and not probe.buildable_archs():
            return None
        place = None if places.why_none() else places.open_one()
        with tempfile.TemporaryDirectory(prefix="probe-", dir=place) as folder:
            built = _compile(probe, Path(folder), probe.flags(probe.buildable_archs()), 1)
            if ctypes.CDLL(str(built)).probe() != 42:
                return "what the compiler makes gives wrong results"
    except (RuntimeError, OSError) as error:
        if isinstance(error, UnavailableError):
            return str(error)
        # Of all that a compiler says, the line that counts.
        _, *said = str(error).splitlines()
        worst = next((line.strip() for line in said if re.search("error|cannot|not found", line)), "")
        compiler = toolchain.cxx()[0] if device == "cpu" else "nvcc"
        return f"the compiler {compiler} is there but fails: {worst or next(iter(said), '') or 'it does not say why'}"
    return None


def takes_one_dtype(source):
    """Tell whether a source can be compiled for one dtype alone: where it names its operators by the macros for that."""
    return re.search(r"m\.impl\((OPERATOR|FORWARD)\(", source) is not None


def _compile(wanted, folder, flags, at_once):
    """Compile a source, as several translation units at once if it says that it can be, and link them.

    The compilers run in the folder and write to names in it: its own path may have any character.
    """
    name, device = wanted.name, wanted.device
    found = re.search(r"^// Compiled in up to (\d+) parts", wanted.source, re.MULTILINE)
    parts = min(int(found[1]), at_once) if found and wanted.dtype else 1
    file = folder / f"{name}.{'cu' if device == 'cuda' else 'cpp'}"
    file.write_text(wanted.source, encoding="utf-8")
    plain = functools.partial(_plain, folder)
    nvcc = [f"{plain(toolchain.cuda_toolkit().home)}/bin/nvcc", *toolchain.host_compiler()] if device == "cuda" else None
    units = [[]] if parts == 1 else [[f"-DFUSED_KERNELS_PARTS={parts}", f"-DFUSED_KERNELS_PART={i}"] for i in range(parts + 1)]
    objects = [f"{name}.{i}.o" for i in range(len(units))]
    includes = [f"-I{plain(path)}" for path in toolchain.include_paths(device)]
    includes += [part for path in toolchain.torch_include_paths() for part in ("-isystem", plain(path))]
    common = [*(nvcc or toolchain.cxx()), *flags, *includes, "-c", file.name]
    jobs.run_all([[*common, *macros, "-o", object] for macros, object in zip(units, objects, strict=True)], folder)
    link, libraries = toolchain.link_command(device)
    jobs.run_all([[*link, *objects, *libraries, "-o", f"{name}.so"]], folder)
    return folder / f"{name}.so"


def _plain(folder, path):
    """Give a path without odd characters: its own, or a link's in the folder where the compiler runs.

    NOTE: nvcc hands paths to a shell, and puts only some of its characters in quotes (13.0: no $ of its own path, no ').
    """
    if re.fullmatch(r"[\w./+-]+", str(path)):
        return str(path)
    link = Path(f"path-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}")
    with contextlib.suppress(FileExistsError):
        (folder / link).symlink_to(path)
    return f"./{link}"
