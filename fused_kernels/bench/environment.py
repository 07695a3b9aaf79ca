"""Where a run takes place: the device, the machine's name, and the facts that its records keep."""

import contextlib
import os
import platform
import re
import secrets
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..rungs import LADDER
from .records import RunInfo

_TEXT = {"encoding": "utf-8", "errors": "replace", "check": True}


def default_device():
    """Give the GPU if a CUDA rung is available on it, else the CPU."""
    available = any(rung.device == "cuda" and rung.why_unavailable() is None for rung in LADDER)
    return torch.device("cuda" if available else "cpu")


def machine(device=None):
    """Name the machine as its file in figures/data is named: the GPU's name, such as "nvidia-h200", or "cpu"."""
    device = torch.device(device or default_device())
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def run_info(device, name=None):
    """Collect the facts of a run that begins now.

    Parameters
    ----------
    device : torch.device
    name : str, optional
        The machine's, by default :func:`machine`.

    Returns
    -------
    RunInfo
    """
    now = datetime.now(timezone.utc)
    on_gpu = device.type == "cuda"
    return RunInfo(
        date=now.isoformat(timespec="seconds"),
        commit=_commit(),
        machine=name or machine(device),
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        driver=_driver() if on_gpu else "",
        cuda=(torch.version.cuda or "") if on_gpu else "",
        torch=torch.__version__,
        run=f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}",
    )


def _commit():
    if given := os.environ.get("FUSED_KERNELS_COMMIT"):
        return given
    package = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=package, capture_output=True, **_TEXT)
        status = subprocess.run(["git", "status", "--porcelain", "."], cwd=package, capture_output=True, **_TEXT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _driver():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, **_TEXT).stdout.split("\n")[0].strip()
    return ""


def _cpu_name():
    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"
