"""Modules that are reloaded or imported anew, while torch keeps what they have registered."""

import pytest
import torch

from fused_kernels import places, registry, toolchain

CHECK = """
import gc, importlib, sys, torch
from torch.nn import functional as F
import fused_kernels as fk

def check(fk, compiles=False):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 4, 9, 8), (6, 4, 3, 3), (6,))]
        expected = (F.conv2d(*tensors, padding=1) * -2.0).amin(1, keepdim=True)
        found = [fk.conv2d_scale_min(*tensors, -2.0, padding=1), fk.rungs["conv2d_scale_min"](*tensors, -2.0, padding=1)]
        if compiles:
            found.append(torch.compile(lambda *t: fk.conv2d_scale_min(*t, -2.0, padding=1), backend="aot_eager")(*tensors))
        for output in found:
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
            grads = [torch.autograd.grad(y.square().sum(), tensors, retain_graph=True) for y in (output, expected)]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
        least = fk.scale_min(tensors[0], 2.0)
        torch.testing.assert_close(least, (tensors[0] * 2.0).amin(1, keepdim=True))
        least.sum().backward()

def modules():
    return [name for name in sys.modules if name.split(".")[0] == "fused_kernels"]

def module(name):
    return sys.modules["fused_kernels." + name]

def build_all():
    for library in (module("dispatch").from_winners, module("dispatch").auto):
        library.is_loaded()
        module("dispatch").finish_builds()
        assert library.is_loaded()
"""

RELOAD = """
for name in sorted(modules()):
    importlib.reload(sys.modules[name])
    gc.collect()
    check(fk)
check(fk, compiles=True)
print("right")
"""

IMPORT_ANEW = """
program = torch.export.export(fk.ModelNew(4, 6, 3, 2.0), (torch.randn(2, 4, 9, 8),)).module()
for _ in range(2):
    for name in modules():
        del sys.modules[name]
    del fk
    gc.collect()
    import fused_kernels as fk
    check(fk, compiles=True)
    program(torch.randn(2, 4, 9, 8)).sum().backward()
    assert module("dispatch").makers
build_all()
check(fk)
print("right")
"""


@pytest.mark.skipif(toolchain.why_no_compiler() is not None, reason=str(toolchain.why_no_compiler()))
@pytest.mark.parametrize("code", [RELOAD, IMPORT_ANEW], ids=["reloaded", "imported anew"])
@pytest.mark.parametrize("before", ["", "build_all()\ncheck(fk, compiles=True)\n"], ids=["unused", "used"])
def test_results_and_gradients_stay_right(before, code, run_python):
    out = run_python(CHECK + before + code, FUSED_KERNELS_CACHE=str(places.cache_dir()))
    assert out.split()[-1] == "right"


def test_what_fails_to_register_leaves_nothing_behind():
    def fail(library):
        library.define("half(Tensor input) -> Tensor")
        raise KeyboardInterrupt

    def fill(library):
        library.define("half(Tensor input) -> Tensor")
        library.impl("half", lambda input: input / 2, "CompositeExplicitAutograd")

    with pytest.raises(KeyboardInterrupt):
        registry.register("fused_kernels_test", "half", "none", fail)
    for _ in range(2):
        registry.register("fused_kernels_test", "half", "none", fill)
    assert torch.ops.fused_kernels_test.half(torch.ones(1)).item() == 0.5
