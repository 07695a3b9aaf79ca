"""Compare the machine code of every CUDA kernel at two revisions; exit with 1 if any differs.

    python tools/compare_machine_code.py REV_A [REV_B] [--cache FOLDER] [-j 2]

REV_B is the working tree if left out. Each source under csrc/cuda is compiled for sm_80 and sm_90a, a forward kernel also with
FUSED_KERNELS_WINNERS, and disassembled. No GPU is needed. Kernels are compared without their names, as one multiset per
architecture, so a kernel may move to another file, change its name, or move between the builds with and without winners.
Equal means the same instructions with the same encodings (scheduling included), registers, stack, shared memory and parameters.
A compilation is cached under a hash of the source with its headers, comments and layout left out.
"""

import argparse
import concurrent.futures
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_kernels import toolchain

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a")


@dataclass(frozen=True)
class Job:
    """One compilation; ``key`` names its result in the cache."""

    source: Path
    csrc: Path
    arch: str
    winners: bool
    key: str

    def __str__(self):
        return f"{self.source.name} for sm_{self.arch}{' with winners' if self.winners else ''}"


@dataclass(frozen=True)
class Kernel:
    """One kernel as disassembled: ``code`` decides equality, ``instructions`` are for reports."""

    name: str
    job: str
    code: str
    instructions: tuple[str, ...]


def main():
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", metavar="REV_A")
    parser.add_argument("after", metavar="REV_B", nargs="?", help="by default the working tree")
    parser.add_argument("--cache", type=Path, help="where to keep disassemblies from run to run")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="compilations at once (default 2)")
    parser.add_argument("--only", default="", metavar="WORD", help="only sources whose name contains this")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        cache = arguments.cache or temporary / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        jobs = [
            plan_jobs(check_out(revision, temporary / side), arguments.only)
            for side, revision in (("before", arguments.before), ("after", arguments.after))
        ]
        compile_all([*jobs[0], *jobs[1]], cache, arguments.jobs)
        before, after = ([kernel for job in side for kernel in read_kernels(job, cache)] for side in jobs)
    sys.exit(not report(before, after))


# ---- sources and their compilations ----


def check_out(revision, folder):
    """Give csrc of a revision, unpacked into ``folder``; of the working tree where ``revision`` is None."""
    if revision is None:
        return ROOT / "fused_kernels" / "csrc"
    done = subprocess.run(["git", "archive", revision, "fused_kernels/csrc"], cwd=ROOT, capture_output=True)
    if done.returncode:
        sys.exit(f"{revision}: git archive said: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "fused_kernels" / "csrc"


def plan_jobs(csrc, only):
    """List what to compile. Which variants a source has is read from its text, so that any revision can be compared."""
    jobs = []
    for source in sorted((csrc / "cuda").rglob("*.cu")):
        if only not in source.name:
            continue
        text = flatten(source, csrc)
        for arch in ARCHITECTURES:
            if "wgmma.mma_async" in text and arch != "90a":
                continue
            for winners in (False, True) if "m.impl(FORWARD(" in text else (False,):
                parts = [without_layout(text), *compiler_flags(arch, winners), torch.__version__, compiler_version()]
                jobs.append(Job(source, csrc, arch, winners, hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]))
    return jobs


def flatten(path, csrc, seen=None):
    """Read a source with our own headers in place, each once."""
    seen = set() if seen is None else seen

    def include(match):
        folders = (path.parent, *include_folders(csrc))
        found = next((folder / match[1] for folder in folders if (folder / match[1]).exists()), None)
        if found is None or found.resolve() in seen:
            return match[0] if found is None else ""
        seen.add(found.resolve())
        return flatten(found, csrc, seen)

    return re.sub(r'^#include "([^"]+)"$', include, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def without_layout(text):
    """Drop comments, blank lines and line ends, but for those of the preprocessor's lines; strings stay as they are."""
    text = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or " ", text, flags=re.DOTALL)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip() not in ("", "#pragma once"))
    return re.sub(r" +", " ", "".join(f"\n{line}\n" if line.startswith("#") else f" {line}" for line in lines))


def include_folders(csrc):
    """Name the folders of our own headers, as toolchain.include_paths does."""
    return [csrc / path.relative_to(toolchain.CSRC) for path in toolchain.include_paths("cuda")]


@functools.cache
def compiler_flags(arch, winners):
    """Give the flags that a library is built with."""
    flags = toolchain.compiler_flags("cuda", toolchain.NAMESPACE, [arch])
    return [*flags, "-DFUSED_KERNELS_WINNERS"] if winners else flags


@functools.cache
def compiler_version():
    """Give what nvcc says of itself."""
    return subprocess.run([toolkit() / "bin" / "nvcc", "--version"], capture_output=True, encoding="utf-8", check=True).stdout


@functools.cache
def toolkit():
    """Give the CUDA toolkit's folder."""
    found = toolchain.cuda_toolkit()
    return found.home if found else sys.exit("no nvcc: expected a CUDA toolkit, see python -m fused_kernels doctor")


@functools.cache
def disassembler():
    """Find cuobjdump: next to nvcc, on the PATH, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [
        toolkit() / "bin",
        *(Path(f) / "backends/nvidia/bin" for f in (triton and triton.submodule_search_locations) or ()),
    ]
    found = next((str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists()), shutil.which("cuobjdump"))
    return found or sys.exit("no cuobjdump: expected one next to nvcc, on the PATH or in Triton")


# ---- compiling and disassembling ----


def compile_all(jobs, cache, workers):
    """Fill the cache with what is missing."""
    missing = list({job.key: job for job in jobs if not cached(job, cache).exists()}.values())
    # conv_wgmma takes longest: begin with it.
    missing.sort(key=lambda job: ("wgmma" not in job.source.name, -job.source.stat().st_size))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(compile_one, job, cache): job for job in missing}
        for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
            seconds = future.result()
            if sys.stderr.isatty():
                print(f"[{number}/{len(missing)}] {futures[future]}: {seconds:.0f} s", file=sys.stderr, flush=True)


def compile_one(job, cache):
    """Compile and disassemble; give the seconds that it took."""
    start = time.perf_counter()
    folders = [*include_folders(job.csrc), *toolchain.torch_include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [toolkit() / "bin" / "nvcc", "-cubin", *compiler_flags(job.arch, job.winners)]
        done = subprocess.run(
            [*command, *(f"-I{f}" for f in folders), job.source, "-o", cubin], capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            raise RuntimeError(f"{job} does not compile: {done.stdout}{done.stderr}")
        usage = say([disassembler(), "-res-usage", cubin])
        sass = say([disassembler(), "-sass", cubin])
    text = json.dumps({"usage": usage, "sass": sass})
    partial = cached(job, cache).with_suffix(f".{os.getpid()}.partial")
    with gzip.open(partial, "wt", compresslevel=3, encoding="utf-8") as file:
        file.write(text)
    partial.replace(cached(job, cache))
    return time.perf_counter() - start


def say(command):
    """Run a tool for its output."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def cached(job, cache):
    """Name a compilation's place in the cache."""
    return cache / f"{job.key}.json.gz"


def read_kernels(job, cache):
    """Split a disassembly into its kernels."""
    with gzip.open(cached(job, cache), "rt", encoding="utf-8") as file:
        text = json.load(file)
    # NOTE: cuobjdump writes -res-usage to stdout as " Function NAME:" and a line of numbers.
    usage = dict(re.findall(r"Function (\S+?):\s*\n\s*([^\n]+)", text["usage"]))
    kernels = []
    for part in re.split(r"^\s*Function : ", text["sass"], flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        name = name.strip()
        instructions = tuple(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body))
        encodings = re.findall(r"/\* (0x[0-9a-f]{16}) \*/", body)
        code = hashlib.sha256("\n".join([usage[name], *instructions, *encodings]).encode()).hexdigest()
        kernels.append(Kernel(name, str(job), code, (usage[name], *instructions)))
    return kernels


# ---- comparing ----


def report(before, after):
    """Print how many kernels are equal and which are not; tell whether all are."""
    equal = 0
    unmatched = [], []
    for arch in ARCHITECTURES:
        sides = [defaultdict(list), defaultdict(list)]
        for side, kernels in zip(sides, (before, after), strict=True):
            for kernel in kernels:
                if f"sm_{arch}" in kernel.job:
                    side[kernel.code].append(kernel)
        same = 0
        for code in {*sides[0], *sides[1]}:
            count = min(len(side[code]) for side in sides)
            same += count
            for left, side in zip(unmatched, sides, strict=True):
                left.extend(side[code][count:])
        print(f"sm_{arch}: {same} kernels equal")
        equal += same
    lost, new = unmatched
    print(f"{equal} kernels equal, {len(lost)} of {len(before)} before and {len(new)} of {len(after)} after without an equal")
    for kernel in sorted(lost, key=lambda kernel: (kernel.job, kernel.name)):
        others = [other for other in new if other.job.split(" for ")[1] == kernel.job.split(" for ")[1]]
        other = min(others, key=lambda other: (other.name != kernel.name, difference(kernel, other)), default=None)
        print(f"- {demangled(kernel.name)}\n    {kernel.job}, {len(kernel.instructions)} instructions")
        if other:
            new.remove(other)
            print(f"+ {demangled(other.name)}\n    {other.job}: {difference(kernel, other)} instructions differ")
            print(f"    {kernel.instructions[0]}\n    {other.instructions[0]}")
    for kernel in new:
        print(f"+ {demangled(kernel.name)}\n    {kernel.job}: new")
    return not unmatched[0] and not unmatched[1]


def difference(one, other):
    """Count the instructions that only one of two kernels has, wherever they stand."""
    counts = [Counter(kernel.instructions[1:]) for kernel in (one, other)]
    return (counts[0] - counts[1]).total() + (counts[1] - counts[0]).total()


def demangled(name):
    """Give a kernel's name as in the source."""
    tool = shutil.which("c++filt")
    return say([tool, name]).strip() if tool else name


if __name__ == "__main__":
    main()
