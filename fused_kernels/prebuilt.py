"""Make libraries for other machines: a folder of them needs no compiler where it is used."""

import os
import re
from pathlib import Path

import torch

from . import build, dispatch, jobs, places, plans, toolchain
from .rungs import BACKWARD, COPY, LADDER


def prebuild(folder, archs=None):
    """Make a folder of ready libraries, every kernel for every dtype, forward and backward; for images and clusters.

    Where it is used, ``FUSED_KERNELS_CACHE`` names the folder; it may be read-only there, and no compiler is needed. What runs
    there must be the same version of this package and of torch. The CPU's kernels are made for several levels of its kind, of
    which a machine takes the best one that it can run; on an x86-64 CPU without AVX2, PyTorch's own operations run.

    What is in the folder already is not made again. On a few cores it takes minutes for the CPU, and more for each GPU
    architecture; on a terminal or in a notebook each library is said.

    Parameters
    ----------
    folder : str or path
        Made if it is not there.
    archs : sequence of str, optional
        The GPU architectures, such as ``["80", "90a"]``; by default those of the GPUs that are visible, and without one the
        CPU's kernels alone. No GPU is needed to compile for one. Code for 8.0 runs on 8.6 and 8.9 too; 9.0 is "90a".

    Returns
    -------
    list of pathlib.Path
        The libraries.

    Raises
    ------
    ValueError
        ``archs`` has something that is no architecture of 8.0 or newer, or that the CUDA toolkit does not compile for.
    RuntimeError
        The folder cannot be written, there is no toolchain, or the compiler failed; the message holds what it said.
    """
    folder = Path(folder).expanduser().absolute()
    archs = _check(toolchain.visible_architectures() if archs is None else archs)
    if missing := toolchain.why_no_compiler():
        raise build.UnavailableError(missing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        todo = [job for library in _libraries(bool(archs)) for job in _jobs(library, folder, archs)]
        # Longest first: there are more libraries than cores.
        todo.sort(key=lambda job: "wgmma" not in job[1].name)
        return jobs.map_all(lambda job: build.build(*job, at_once=1), todo, os.cpu_count() or 1)
    except OSError as error:
        raise places.NoPlaceError(
            f"folder: expected one that can be written, got {folder} ({error.strerror or error})"
        ) from error


def _check(archs):
    if isinstance(archs, str) or not all(isinstance(arch, str) and re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise ValueError(f'archs: expected GPU architectures, such as ["80", "90a"], got {archs!r}')
    archs = sorted({"90a" if arch == "90" else arch for arch in archs}, key=_number)
    if not archs:
        return []
    if torch.version.cuda is None:
        raise build.UnavailableError(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    toolkit = toolchain.cuda_toolkit()
    if toolkit is None:
        raise build.UnavailableError(toolchain.NO_NVCC)
    known = sorted(code for code in toolkit.architectures if code >= 80)
    for arch in archs:
        if _number(arch) not in known:
            raise ValueError(f"archs: expected some of {', '.join(map(str, known))}, which the CUDA toolkit has, got {arch!r}")
    return archs


def _number(arch):
    return int(re.sub(r"\D", "", arch))


def _libraries(with_cuda):
    yield build.Library(*dispatch.from_winners.library, device="cpu")
    yield build.Library(*dispatch.auto.library, device="cpu")
    yield build.Library(*plans.source(), device="cpu")
    for rung in (*LADDER, COPY, *BACKWARD):
        if rung.device == "cpu" or (rung.device and with_cuda):
            yield from (build.Library(**rung.library(*variant)) for variant in rung.variants)


def _jobs(library, folder, archs):
    """Give what to build of a library: the library, its file, and for which GPUs or which CPU."""
    stem = f"{{}}-{library.prebuilt_key()}.so"
    if library.device == "cpu":
        for level, flags, _ in toolchain.cpu_levels():
            yield library, folder / stem.format(f"{library.label}.{level}"), (), flags
        return
    archs = [arch for arch in archs if library.arch in (None, arch)]
    if archs:
        yield library, folder / stem.format(".sm_".join([library.label, *archs])), archs
