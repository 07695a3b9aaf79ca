"""The sdist holds the whole checkout; the wheel, built from it and installed elsewhere, the whole package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import project_files

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in (ROOT / "fused_kernels").rglob("*") if path.is_file() and path.suffix != ".pyc")

# NOTE: an editable install finds what the wheel lacks in the checkout, sub-modules too: take its finder away.
AWAY = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def run(command, folder, **environment):
    """Run to the end; give what it printed."""
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Build the sdist from a copy in which somebody has worked, offline, with the setuptools that is installed."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copyfile(path, copy / path.name)
    for name in ("fused_kernels", "tests", "notebooks", "figures", "tools", ".ci"):
        shutil.copytree(ROOT / name, copy / name, copy_function=shutil.copyfile)
    for left in ("tests/__pycache__/test.pyc", "notebooks/.ipynb_checkpoints/00.ipynb", "build/notebooks/00.ipynb"):
        (copy / left).parent.mkdir(parents=True, exist_ok=True)
        (copy / left).touch()
    run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"], copy)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Build the wheel from the sdist."""
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run([*pip, "--no-build-isolation", "--wheel-dir", str(out), str(sdist)], out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel in a folder of its own; give a function that runs Python there."""
    target, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run([*pip, "--target", str(target), str(wheel)], elsewhere)

    def python(code, *arguments):
        return run([sys.executable, "-c", AWAY + code, *arguments], elsewhere, PYTHONPATH=str(target))

    python.target = target
    return python


def cli(*arguments):
    """Write what ``python -m fused_kernels`` does with these arguments, and where that was imported from."""
    return f"""
import runpy, fused_kernels
sys.argv[1:] = {list(map(str, arguments))}
runpy.run_module("fused_kernels", run_name="__main__", alter_sys=True)
print(fused_kernels.__file__)
"""


def test_the_sdist_holds_every_file_of_the_checkout_and_nothing_else(sdist):
    """So the tests pass and the notebooks run from it."""
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    made = {name for name in names if name.parts[0] in ("PKG-INFO", "setup.cfg", "fused_kernels.egg-info")}
    assert names - made == {path.relative_to(ROOT) for path in project_files()}


def test_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info"
    assert {str(path.relative_to(ROOT)) for path in FILES} == {name for name in names if not name.startswith(info)}
    assert f"{info}/licenses/LICENSE" in names


def test_names_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "\nLicense-Expression: MIT\n" in archive.read(name).decode()


def test_every_module_is_imported_from_there(installed):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.suffix == ".py"]
    code = """
import importlib
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""
    printed = installed(code, *(name for name in names if not name.endswith("__main__"))).splitlines()
    assert len(printed) == len(names) - 1
    assert all(Path(line).is_relative_to(installed.target) for line in printed)


def test_runs_a_kernel(installed):
    code = """
import torch, fused_kernels
from fused_kernels import rungs
x = torch.randn(2, 5, 7, 11)
rung = rungs["scale_min"]
assert not rung.why_unavailable(), rung.why_unavailable()
for result in (rung(x, 2.0), fused_kernels.scale_min(x, 2.0)):
    assert torch.equal(result, torch.min(x * 2.0, dim=1, keepdim=True).values)
print(rung.source_file)
"""
    assert Path(installed(code).strip()).is_relative_to(installed.target)


def test_doctor_runs(installed):
    *printed, file = installed(cli("doctor")).splitlines()
    assert Path(file).is_relative_to(installed.target)
    assert any(line.split() == ["conv2d_scale_min", "ready"] for line in printed)


def test_figures_are_drawn(installed, tmp_path):
    data, out = tmp_path / "data", tmp_path / "figures"
    data.mkdir()
    shutil.copy(ROOT / "figures" / "data" / "cpu.csv", data)
    *_, file = installed(cli("figures", "--data", data, "--out", out)).splitlines()
    assert Path(file).is_relative_to(installed.target)
    assert (out / "ladder-cpu.png").stat().st_size > 10_000
