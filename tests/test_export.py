"""The export: one file that builds and computes what the reference does, and holds no word that KernelBench refuses."""

import ast
import os
import re
import subprocess
import sys

import pytest
import torch

from fused_kernels import export, reference, rungs, toolchain
from fused_kernels.__main__ import main

NO_NVCC = toolchain.cuda_toolkit() is None or torch.version.cuda is None


@pytest.mark.parametrize("name", export.EXPORTABLE)
def test_stands_alone(name):
    text = export.kernelbench(name)
    assert not re.findall(r"\b(?:try|except|pass)\b", text)
    assert not re.findall(r'#include "', text)
    tree = ast.parse(text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} == {"torch"}
    assert {"ModelNew", "get_inputs", "get_init_inputs"} <= {getattr(node, "name", None) for node in tree.body}


def test_command_prints_it(capsys):
    main(["export", "conv_mma"])
    assert capsys.readouterr().out == export.kernelbench("conv_mma")


def test_unknown_rung():
    with pytest.raises(ValueError, match=r"rung: expected one of conv_direct, .*, got 'scale_min'"):
        export.kernelbench("scale_min")


# What KernelBench does with the file, except for timing; without a GPU, as much of that as possible.
USE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from exported import ModelNew, get_init_inputs, get_inputs
from fused_kernels.reference import Model
models = []
for kind in (Model, ModelNew):
    torch.manual_seed(42)
    models.append(kind(*get_init_inputs()))
reference, new = models
assert all(torch.equal(a, b) for a, b in zip(reference.state_dict().values(), new.state_dict().values(), strict=True))
torch.backends.cudnn.allow_tf32 = True
if torch.cuda.is_available():
    reference, new = reference.cuda(), new.cuda()
    with torch.no_grad():
        for seed in range(5):
            torch.manual_seed(seed)
            (x,) = (t.cuda() for t in get_inputs())
            torch.testing.assert_close(new(x), reference(x), atol=1e-4, rtol=1e-4)
print(get_init_inputs())
"""


@pytest.mark.skipif(NO_NVCC, reason="no nvcc, or torch is built without CUDA")
@pytest.mark.parametrize("name", ["conv_wgmma", pytest.param("conv_mma", marks=pytest.mark.gpu)])
def test_builds_and_agrees(name, tmp_path):
    (tmp_path / "exported.py").write_text(export.kernelbench(name), encoding="utf-8")
    if torch.cuda.is_available() and (reason := rungs[name].why_unavailable()):
        pytest.skip(reason)
    ninja = pytest.importorskip("ninja").BIN_DIR
    environment = {**os.environ, "PATH": os.pathsep.join((ninja, os.environ["PATH"])), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment["CUDA_HOME"] = str(toolchain.linkable_home(toolchain.cuda_toolkit()))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(reference.get_init_inputs())
