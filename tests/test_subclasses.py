"""Tensor subclasses: PyTorch's operations for those that know no others, our own for DTensors, modes and plain subclasses."""

import pytest
import torch
from conftest import DEVICES, compiled
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fused_kernels as fk
from fused_kernels import dispatch, gradients, places

ON = pytest.mark.parametrize("device", DEVICES)
CONV = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
SHAPES = (4, 4, 9, 8), (6, 2, 3, 3), (6,)


class Aten(torch.Tensor):
    """A wrapper that refuses all operators but PyTorch's."""

    @staticmethod
    def __new__(cls, inner):
        like = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"{func}: expected one of PyTorch's operators")
        args, kwargs = tree_map_only(Aten, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


class Bare(Aten):
    """The same below ``__torch_function__`` alone, as most wrappers are."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Named(torch.Tensor):
    """A subclass that takes over nothing."""


def unwrapped(value):
    return tree_map_only(Aten, lambda t: t.inner, value)


def drawn(device, kind=lambda t: t, shapes=SHAPES):
    torch.manual_seed(0)
    return [kind(torch.randn(shape, device=device)).requires_grad_() for shape in shapes]


def composed(input, weight, bias, scale=-1.5, conv=CONV):
    return torch.min(F.conv2d(input, weight, bias, **conv) * scale, dim=1, keepdim=True)


@pytest.fixture(params=["in Python", "without Python"])
def how(request, monkeypatch):
    """Whether the libraries that save Python's time are there."""
    for library in (dispatch.from_winners, dispatch.auto):
        library.is_loaded()
        dispatch.finish_builds()
        assert library.is_loaded()
    if request.param == "in Python":
        monkeypatch.setattr(dispatch.from_winners, "is_loaded", lambda: False)
        monkeypatch.setattr(dispatch, "_rules", {})


@ON
@pytest.mark.parametrize("kind", [Aten, Bare])
@pytest.mark.parametrize("wrapped", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_a_subclass_gets_pytorchs_operations(kind, wrapped, device, set_conv_precision):
    set_conv_precision("ieee")
    plain = drawn(device)
    tensors = [kind(t.detach()).requires_grad_() if i in wrapped else t for i, t in enumerate(plain)]
    found, expected = fk.conv2d_scale_min(*tensors, -1.5, **CONV, return_indices=True), composed(*plain)
    assert isinstance(found[0], kind)
    torch.testing.assert_close(unwrapped(found), tuple(expected))
    grad = torch.randn_like(expected.values)
    found = torch.autograd.grad(found[0], tensors, kind(grad))
    torch.testing.assert_close(unwrapped(found), torch.autograd.grad(expected.values, plain, grad), rtol=1e-4, atol=1e-4)


@ON
@pytest.mark.parametrize("kind", [Aten, Bare])
def test_scale_min_of_a_subclass(kind, device):
    (plain,) = drawn(device, shapes=SHAPES[:1])
    wrapped = kind(plain.detach()).requires_grad_()
    found, expected = fk.scale_min(wrapped, -1.5, return_indices=True), torch.min(plain * -1.5, 1, keepdim=True)
    torch.testing.assert_close(unwrapped(found), tuple(expected))
    grads = (torch.autograd.grad(y.square().sum(), t)[0] for y, t in ((found[0], wrapped), (expected.values, plain)))
    torch.testing.assert_close(*unwrapped(list(grads)))


@ON
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [fk.ModelNew, fk.Conv2dScaleMin])
def test_layers_take_a_subclass_without_gradients(kind, mode, device):
    layer = kind(4, 6, 3, -1.5).to(device)
    with mode():
        input = torch.randn(SHAPES[0], device=device)
        torch.testing.assert_close(unwrapped(layer(Bare(input))), layer(input), rtol=1e-3, atol=1e-3)


@ON
def test_a_subclass_under_autocast(device):
    layer, input = fk.ModelNew(4, 6, 3, -1.5).to(device), torch.randn(SHAPES[0], device=device)
    with torch.autocast(device, torch.bfloat16):
        found, expected = layer(Bare(input)), layer(input)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(unwrapped(found), expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_subclass_gets_the_precision_asked_for(precision, set_conv_precision):
    set_conv_precision("tf32" if precision == "ieee" else "ieee")
    plain = drawn("cuda", shapes=[(8, 64, 32, 32), (64, 64, 3, 3), (64,)])
    wrapped = [Bare(t.detach()).requires_grad_() for t in plain]
    found = unwrapped(fk.conv2d_scale_min(*wrapped, 2.0, precision=precision))
    expected = composed(*(t.detach().double() for t in plain), 2.0, {}).values
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5 if precision == "ieee" else 1e-4 < error < 1e-3


@ON
def test_the_librarys_convolution_for_a_subclass(device, set_conv_precision):
    """At a precision of its own, with gradients, by PyTorch's operators alone."""
    set_conv_precision("ieee")
    plain, wrapped = drawn(device), drawn(device, Bare)
    geometry = ([1, 2], [1, 0], [1, 1], 2)
    found, expected = gradients.LibraryConv2d.apply(*wrapped, *geometry, False), F.conv2d(*plain, *geometry)
    torch.testing.assert_close(unwrapped(found), expected)
    grads = (torch.autograd.grad(y.square().sum(), t) for y, t in ((found, wrapped), (expected, plain)))
    torch.testing.assert_close(*unwrapped(list(grads)), rtol=1e-4, atol=1e-4)


@ON
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_that_is_a_subclass(create_graph, how, device):
    """Of a forward pass of plain tensors."""
    tensors = drawn(device)
    outputs = {fk.conv2d_scale_min(*tensors, -1.5, **CONV): tensors, fk.scale_min(tensors[0], 2.0): tensors[:1]}
    for output, wanted in outputs.items():
        grad = torch.randn_like(output)
        found = torch.autograd.grad(output, wanted, Bare(grad), retain_graph=True, create_graph=create_graph)
        assert all(isinstance(one, Bare) for one in found)
        expected = torch.autograd.grad(output, wanted, grad, create_graph=create_graph)
        torch.testing.assert_close(unwrapped(found), expected, rtol=1e-3, atol=1e-3)


@ON
@pytest.mark.parametrize("name", ["conv2d_scale_min_auto", "conv2d_scale_min_winners_auto"])
def test_an_operator_of_a_program_takes_a_subclass(name, how, device, set_conv_precision):
    set_conv_precision("ieee")
    operator = getattr(torch.ops.fused_kernels, name)
    plain, wrapped = drawn(device), drawn(device, Bare)
    args = (-1.5, [1, 2], [1, 1, 0, 0], [1, 1], 2, "auto")
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found, expected = operator(*wrapped, *args), operator(*plain, *args)
        torch.testing.assert_close(unwrapped(found), expected, rtol=1e-4, atol=1e-4)


@ON
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_subclass(dynamic, device):
    layer, (input,) = fk.Conv2dScaleMin(4, 6, 3, -1.5, padding=1).to(device), drawn(device, shapes=SHAPES[:1])
    wrapped = TwoTensor(input.detach().clone(), input.detach().clone()).requires_grad_()

    def network(x):
        least, channels = fk.scale_min(x.relu(), 2.0, return_indices=True)
        return layer(x.sin()) + least, channels

    found, expected = compiled(network, dynamic)(wrapped), network(input)
    torch.testing.assert_close(tuple(t.a for t in found), expected, rtol=1e-3, atol=1e-3)
    wanted, losses = list(layer.parameters()), [found[0].square().sum(), expected[0].square().sum()]
    found, expected = (torch.autograd.grad(loss, [x, *wanted]) for loss, x in zip(losses, (wrapped, input), strict=True))
    found = tuple(one.a if isinstance(one, TwoTensor) else one for one in found)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Log(TorchDispatchMode):
    """Lists the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@ON
def test_a_mode_sees_our_operators(how, device):
    tensors = drawn(device)
    with Log() as log:
        fk.scale_min(fk.conv2d_scale_min(*tensors, -1.5, **CONV), 2.0).sum().backward()
    assert {name.split("::")[0] for name in log.names} == {"aten", "fused_kernels"}
    assert "aten::convolution" not in log.names or device == "cuda"


@pytest.mark.parametrize("kind", [Named, torch.nn.Parameter])
def test_plain_subclasses_keep_the_kernels(kind):
    tensors = [t.detach() for t in drawn("cpu")]
    input = tensors[0].as_subclass(kind) if kind is Named else kind(tensors[0])
    with Log() as log:
        found = fk.conv2d_scale_min(input, *tensors[1:], -1.5, **CONV)
    assert "fused_kernels::conv2d_scale_min" in {name.removesuffix("_winners") for name in log.names}
    assert isinstance(found, Named) == (kind is Named)


def test_fake_tensors_go_to_the_rungs():
    with torch._subclasses.FakeTensorMode(), Log() as log:
        tensors = [torch.empty(shape) for shape in SHAPES]
        assert fk.conv2d_scale_min(*tensors, -1.5, **CONV).shape == (4, 1, 9, 3)
    assert "fused_kernels::conv2d_scale_min" in log.names


def test_explain_tells_of_a_subclass():
    found = fk.explain(*drawn("cpu", Bare), -1.5, **CONV)
    assert found.rung == "composite"
    assert "Bare" in found.why
    assert not found.backward


# ---- DTensor ----


@pytest.fixture
def mesh():
    """Two processes, of which this is the first; the other one is not there, and nothing is exchanged."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def first_half(mesh, input, *whole):
    """Make DTensors of the first process's half of a batch, and of what both have."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    parts = [DTensor.from_local(input.detach()[: len(input) // 2], mesh, [Shard(0)])]
    parts += [DTensor.from_local(t.detach(), mesh, [Replicate()]) for t in whole]
    return [part.requires_grad_() for part in parts]


@pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_a_sharded_batch_runs_our_operators_on_each_part(run, mesh, how):
    from torch.distributed.tensor import Partial, Shard

    plain, parts = drawn("cpu"), first_half(mesh, *drawn("cpu"))
    with Log() as log:
        found = fk.conv2d_scale_min(*parts, -1.5, **CONV)
        torch.autograd.grad(found.sum(), parts)
    assert {"fused_kernels::conv2d_scale_min_winners_auto", "fused_kernels::grad_weight_auto"} <= log.names
    found = run(lambda *t: fk.conv2d_scale_min(*t, -1.5, **CONV))(*parts)
    half = fk.conv2d_scale_min(plain[0][:2], *plain[1:], -1.5, **CONV)
    assert found.shape == (4, 1, 9, 3)
    assert found.placements == (Shard(0),)
    torch.testing.assert_close(found.to_local(), half)
    found, expected = (torch.autograd.grad(y.square().sum(), t) for y, t in ((found.to_local(), parts), (half, plain)))
    assert [one.placements for one in found] == [(Shard(0),), (Partial(),), (Partial(),)]
    expected = expected[0][:2], *expected[1:]
    torch.testing.assert_close(tuple(one.to_local() for one in found), expected)


def test_another_padding_of_dtensors_of_the_same_sizes(mesh):
    parts = first_half(mesh, *drawn("cpu"))
    shapes = [fk.conv2d_scale_min(*parts, groups=2, padding=padding).shape for padding in (0, 1, (0, 2))]
    assert shapes == [(4, 1, 7, 6), (4, 1, 9, 8), (4, 1, 7, 10)]


def test_rows_of_scale_min_may_be_sharded(mesh):
    from torch.distributed.tensor import DTensor, Shard

    local = torch.randn(2, 5, 3, 4)
    for dimension in (0, 2, 3):
        input = DTensor.from_local(local, mesh, [Shard(dimension)]).requires_grad_()
        found, channels = fk.scale_min(input, 2.0, return_indices=True)
        expected = torch.min(local * 2.0, 1, keepdim=True)
        torch.testing.assert_close((found.to_local(), channels.to_local()), tuple(expected))
        (grad,) = torch.autograd.grad(found.sum(), input)
        assert found.placements == channels.placements == grad.placements == (Shard(dimension),)


PROCESS = """
import sys, torch, torch.distributed as dist
import fused_kernels as fk
assert "torch.distributed.tensor" not in sys.modules
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", init_method="file://{file}", rank={rank}, world_size=2)
mesh = init_device_mesh("cpu", (2,))
R, S = Replicate(), Shard(0)
CASES = (4, (S, R, R)), (3, (S, R, R)), (1, (S, R, R)), (2, (R, R, R)), (2, (R, S, S)), (2, (Shard(2), R, R))
for batch, placements in CASES:
    torch.manual_seed(0)
    plain = [torch.randn(shape, requires_grad=True) for shape in ((batch, 4, 9, 8), (6, 2, 3, 3), (6,))]
    tensors = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(plain, placements)]
    conv = dict(stride=(1, 2), padding=(1, 0), groups=2)
    found, channels = fk.conv2d_scale_min(*tensors, -1.5, **conv, return_indices=True)
    expected = torch.min(torch.nn.functional.conv2d(*plain, **conv) * -1.5, 1, keepdim=True)
    torch.testing.assert_close(found.full_tensor(), expected.values)
    assert channels.full_tensor().equal(expected.indices)
    found, expected = (torch.autograd.grad(y.square().sum(), t) for y, t in ((found, tensors), (expected.values, plain)))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.full_tensor(), other, rtol=1e-4, atol=1e-4)
torch.manual_seed(1)
plain, input = fk.ModelNew(4, 6, 3, 2.0), torch.randn(4, 4, 9, 8)
expected = torch.autograd.grad(plain(input).sum(), plain.parameters())
layer = distribute_module(plain, mesh)
found = torch.autograd.grad(layer(distribute_tensor(input, mesh, [S])).sum(), layer.parameters())
for one, other in zip(found, expected):
    torch.testing.assert_close(one.full_tensor(), other, rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("compiler", [None, "no-such-compiler"])
def test_two_processes_give_what_one_does(compiler, run_python, tmp_path):
    environment = {"FUSED_KERNELS_CACHE": str(places.cache_dir()), **({"CXX": compiler} if compiler else {})}
    codes = [PROCESS.format(file=tmp_path / "store", rank=rank) for rank in (0, 1)]
    other = run_python(codes[1], wait=False, **environment)
    run_python(codes[0], **environment)
    assert other.wait(60) == 0
