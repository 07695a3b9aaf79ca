"""Programs that were compiled, exported or traced: one operator in them, which chooses when it is called."""

import contextlib
import io
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICES, LAYOUTS, assert_one_sentence, have_rules
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.export.passes import move_to_device_pass

import fused_kernels as fk
from fused_kernels import arguments, places

ON = pytest.mark.parametrize("device", DEVICES)
# torch warns where vmap runs an operator in a loop, for want of a rule.
IN_NO_LOOP = pytest.mark.filterwarnings("error:There is a performance drop")
CONV, MIN = (f"fused_kernels.{name}_auto.default" for name in ("conv2d_scale_min", "scale_min"))
# What torch.export records of the first one: it looks at autocast as well.
EXPORTED = "fused_kernels.conv2d_scale_min_autocast.default"


@dataclass(frozen=True)
class Layer:
    """One of a network's layers: its channels, kernel, padding, and its image's height and width."""

    in_channels: int
    out_channels: int
    kernel: int
    size: int
    padding: int = 0

    def make(self, device, dtype=torch.float32):
        torch.manual_seed(0)
        return fk.Conv2dScaleMin(
            *(self.in_channels, self.out_channels, self.kernel, -1.5), padding=self.padding, device=device, dtype=dtype
        )

    def draw(self, device, dtype=torch.float32, layout="nchw", batch=2, more=0):
        size = self.size + more
        return LAYOUTS[layout](torch.randn(batch, self.in_channels, size, size + more // 2, device=device).to(dtype))

    def __str__(self):
        return f"{self.in_channels}to{self.out_channels}-{self.kernel}x{self.kernel}-at{self.size}"


LAYERS = [
    Layer(3, 64, 7, 56, 3),
    Layer(512, 512, 3, 7, 1),
    Layer(64, 256, 1, 28),
    Layer(256, 256, 3, 14, 1),
    Layer(128, 128, 3, 28, 1),
    Layer(16, 32, 3, 56, 1),
    Layer(32, 64, 5, 28, 2),
    Layer(64, 128, 3, 32),
]
SMALL = Layer(4, 6, 3, 9, 1)


def calls(program):
    """Name the operators that a program calls."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def close(found, expected):
    # The library may take another algorithm for the same sizes.
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if found.dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found, expected, **tolerance)


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_exports(layer, layout, dtype, device):
    """In grad mode, the default; a batch of any size, then an image of any size: no condition of a choice is the program's."""
    model = layer.make(device, dtype)
    input = layer.draw(device, dtype, layout)

    def side(name):
        # PyTorch's own convolution asks for the same: an output of more than one pixel.
        return Dim(name, min=layer.kernel + 1)

    any_batch = export(model, (input,), dynamic_shapes={"input": {0: Dim("B", min=1, max=512)}})
    any_size = export(model, (input,), dynamic_shapes={"input": {0: Dim("B"), 2: side("H"), 3: side("W")}})
    assert calls(any_batch) == calls(any_size) == [EXPORTED]
    with torch.no_grad():
        for batch in (1, 2, 5):
            other = layer.draw(device, dtype, layout, batch)
            close(any_batch.module()(other), model(other))
        for batch, more in ((1, 0), (3, 4), (2, 14)):
            other = layer.draw(device, dtype, layout, batch, more)
            close(any_size.module()(other), model(other))


@pytest.mark.parametrize("strict", [False, True])
def test_both_ways_to_export(strict):
    model = SMALL.make("cpu")
    program = export(model, (SMALL.draw("cpu"),), dynamic_shapes={"input": {0: Dim("B")}}, strict=strict)
    assert calls(program) == [EXPORTED]
    assert calls(program.run_decompositions()) == [CONV]


def test_scale_min_and_its_winners_export():
    class Winners(torch.nn.Module):
        def forward(self, input, weight):
            least, channels = fk.scale_min(input, 2.0, return_indices=True)
            return least, channels, *fk.conv2d_scale_min(input, weight, return_indices=True)

    args = SMALL.draw("cpu"), torch.randn(6, 4, 3, 3)
    program = export(Winners(), args, dynamic_shapes=({0: Dim("B")}, None))
    args = SMALL.draw("cpu", batch=3), args[1]
    for found, expected in zip(program.module()(*args), Winners()(*args), strict=True):
        torch.testing.assert_close(found, expected)
    assert {name for name in calls(program) if "fused" in name} == {
        "fused_kernels.scale_min_winners_auto.default",
        "fused_kernels.conv2d_scale_min_winners_autocast.default",
    }


@ON
@pytest.mark.parametrize("how", ["exported", "strict", "decomposed", "jit", "compiled"])
@pytest.mark.parametrize("shape", [(), (6,), (6, 1, 1), (1, 6, 1, 1)], ids=str)
def test_programs_of_a_learned_scale(shape, how, device):
    """It is read when the program is called."""
    torch._dynamo.reset()
    layer = fk.Conv2dScaleMin(4, 6, 3, torch.nn.Parameter(torch.randn(shape)), padding=1, device=device).to(device)
    input, other = SMALL.draw(device), SMALL.draw(device, batch=2)
    program = TRACES[how](layer, (input,))
    with torch.no_grad():
        layer.scale_factor.mul_(-0.7)
    found, expected = program(other), layer(other)
    close(found, expected)
    assert found.requires_grad


def test_a_scale_exports_as_one_operator_with_any_batch():
    layer = fk.Conv2dScaleMin(4, 6, 3, torch.randn(6), padding=1)
    program = export(layer, (SMALL.draw("cpu"),), dynamic_shapes={"input": {0: Dim("B")}})
    assert [name for name in calls(program) if "fused" in name] == [EXPORTED]
    assert "scale_factor" in program.state_dict
    input = SMALL.draw("cpu", batch=5)
    close(program.module()(input), layer(input))
    close(moved(program, "cpu")(input), layer(input))


@ON
def test_one_image_exports(device):
    layer, input = SMALL.make(device), SMALL.draw(device)
    for trace in (TRACES["exported"], TRACES["jit"], TRACES["compiled"]):
        torch._dynamo.reset()
        with torch.no_grad():
            close(trace(layer, (input[0],))(input[1]), layer(input)[1])


def moved(program, device):
    """Save a program, load it, and move it, as one would from a machine to another."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return move_to_device_pass(torch.export.load(buffer), device).module()


@pytest.mark.parametrize(
    ("exported_on", "device"),
    [("cpu", "meta"), *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in (("cpu", "cuda"), ("cuda", "cpu")))],
)
def test_an_exported_program_moves_to_another_device(exported_on, device):
    model = SMALL.make(exported_on)
    program = moved(export(model, (SMALL.draw(exported_on),), dynamic_shapes={"input": {0: Dim("B")}}), device)
    input = SMALL.draw(device, batch=5)
    with torch.no_grad():
        found, expected = program(input), model.to(device)(input)
    assert found.device.type == device
    assert found.shape == expected.shape
    if device != "meta":
        close(found, expected)


WITHOUT_A_COMPILER = """
import torch
import fused_kernels

program, args = torch.export.load({program!r}).module(), torch.load({args!r})
with torch.no_grad():
    torch.save(program(*args), {result!r})
found = program(*args)
found = found + torch.ops.fused_kernels.conv2d_scale_min_winners_auto(
    *args, *program.parameters(), -1.5, [1, 1], [1] * 4, [1, 1], 1, "auto"
)[0]
least = torch.ops.fused_kernels.scale_min_auto(args[0].requires_grad_(), 2.0)
torch.testing.assert_close(least, args[0].mul(2.0).amin(1, keepdim=True))
torch.autograd.grad(least.sum(), args)
print(found.requires_grad, torch.autograd.grad(found.sum(), program.parameters())[0].shape)
"""


def test_where_no_kernel_can_be_had_pytorchs_operations_run(run_python, tmp_path):
    model, input = SMALL.make("cpu"), SMALL.draw("cpu", batch=5)
    files = {name: str(tmp_path / f"{name}.pt2") for name in ("program", "args", "result")}
    torch.export.save(export(model, (SMALL.draw("cpu"),), dynamic_shapes={"input": {0: Dim("B")}}), files["program"])
    torch.save((input,), files["args"])
    said = run_python(WITHOUT_A_COMPILER.format(**files), CXX="no-such-compiler")
    assert "True torch.Size([6, 4, 3, 3])" in said
    close(torch.load(files["result"]), model(input).detach())


@ON
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_six_sizes(device, training):
    torch._dynamo.reset()
    model, counter, graphs = Layer(16, 32, 3, 28, 1), CompileCounterWithBackend("aot_eager"), 0
    layer = model.make(device)
    compiled = torch.compile(lambda x: layer(x.relu()), fullgraph=True, dynamic=True, backend=counter)
    for batch, more in ((2, 2), (3, 2), (9, 8), (2, 14), (37, 4), (5, 100)):
        input = model.draw(device, batch=batch, more=more).requires_grad_(training)
        with torch.set_grad_enabled(training):
            found, expected = compiled(input), layer(input.relu())
        close(found, expected)
        if training:
            grads = (torch.autograd.grad(y.square().sum(), (input, *layer.parameters())) for y in (found, expected))
            for one, other in zip(*grads, strict=True):
                assert (one - other).norm() <= 1e-3 * other.norm()
        # The first is traced twice: at first the compiler takes the scale for a variable.
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


@ON
def test_compiled_inference_keeps_no_winners(device):
    layer, input = SMALL.make(device), SMALL.draw(device)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compiled(input)
        with torch.profiler.profile() as profile:
            compiled(input)
    names = {event.key for event in profile.key_averages()}
    assert "fused_kernels::conv2d_scale_min_auto" in names
    assert not any("winners" in name for name in names)


@ON
def test_compiled_for_a_kernel_that_is_not_there(device, monkeypatch):
    """The compiler gets PyTorch's operations, which it can fuse."""
    torch._dynamo.reset()
    monkeypatch.setattr(fk.auto, "has_scale_min", lambda device, dtype: False)
    counter = CompileCounterWithBackend("eager")
    layer, input = SMALL.make(device), SMALL.draw(device)
    close(torch.compile(layer, backend=counter, fullgraph=True)(input), layer(input))
    assert not any("fused_kernels" in name for name in calls(counter.graphs[0]))


@ON
def test_the_setting_is_read_when_a_program_is_called(device, set_conv_precision):
    """And not when it was traced."""
    torch._dynamo.reset()
    layer = Layer(64, 64, 3, 40)
    model, input = layer.make(device), layer.draw(device)
    set_conv_precision("ieee")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        for precision in ("ieee", "tf32", "ieee"):
            set_conv_precision(precision)
            torch.testing.assert_close(compiled(input), model(input), rtol=0, atol=0)


@ON
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_jit_trace_with_gradients(device):
    model, input = SMALL.make(device), SMALL.draw(device, batch=3, more=2).requires_grad_()
    traced = torch.jit.trace(model, SMALL.draw(device))
    assert "conv2d_scale_min_auto" in str(traced.graph)
    found, expected = traced(input), model(input)
    close(found, expected)
    wanted = (input, *model.parameters())
    for one, other in zip(*(torch.autograd.grad(y.sum(), wanted) for y in (found, expected)), strict=True):
        close(one, other)
    traced = torch.jit.trace(lambda x: fk.scale_min(x, 2.0), SMALL.draw(device))
    close(traced(input), fk.scale_min(input, 2.0))


@ON
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["ModelNew", "composite", "conv2d_scale_min"])
def test_a_jit_trace_saved_and_loaded_trains(name, mode, requires_grad, device):
    """Traced with gradients or without, it runs with and without them."""
    if name != "ModelNew" and fk.rungs[name].device not in (None, device):
        pytest.skip("not a rung of this device")
    model = fk.ModelNew(4, 6, 3, -1.5).to(device) if name == "ModelNew" else OneRung(name, device)
    model, input = model.requires_grad_(requires_grad), SMALL.draw(device)
    with mode(), warnings.catch_warnings():
        # Of a rung called by name the checks are traced.
        warnings.filterwarnings("ignore" if name != "ModelNew" else "error", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(model, input)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    input = SMALL.draw(device, batch=3).requires_grad_()
    for program in (traced, torch.jit.load(file)):
        with torch.no_grad():
            assert not program(input).requires_grad
            close(program(input), model(input))
        grads = []
        for function in (program, model):
            wanted = [input, *(p for p in function.parameters() if p.requires_grad)]
            grads.append(torch.autograd.grad(function(input).square().sum(), wanted))
        for one, other in zip(*grads, strict=True):
            close(one, other)


class OneRung(torch.nn.Module):
    """A rung with weights of its own."""

    def __init__(self, name, device):
        super().__init__()
        self.rung, self.conv = fk.rungs[name], torch.nn.Conv2d(4, 6, 3, device=device)

    def forward(self, input):
        return self.rung(input, self.conv.weight, self.conv.bias, -1.5)


NETWORKS = {
    "ModelNew": lambda: fk.ModelNew(4, 6, 3, -1.5),
    "Conv2dScaleMin": lambda: fk.Conv2dScaleMin(4, 6, 3, -1.5, padding="same"),
    "a network": lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), SMALL.make("cpu"), torch.nn.ReLU()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fx_traces_through_a_layer(name):
    model = NETWORKS[name]()
    graph = torch.fx.symbolic_trace(model)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(fk.conv2d_scale_min) == 1
    input, grads = SMALL.draw("cpu").requires_grad_(), []
    for function in (graph, pickle.loads(pickle.dumps(graph)), model):
        output = function(input)
        close(output, model(input))
        grads.append(torch.autograd.grad(output.square().sum(), [input, *function.parameters()]))
    for found in grads[:-1]:
        for one, other in zip(found, grads[-1], strict=True):
            close(one, other)


def unpacked(x, w, s):
    least, channels = fk.conv2d_scale_min(x, w, return_indices=True)
    return least + channels


FUNCTIONS = {
    "scale_min": lambda x, w, s: fk.scale_min(x, s),
    "its winners": lambda x, w, s: fk.scale_min(x, 2.0, return_indices=True)[1],
    "unpacked": unpacked,
    "conv2d_scale_min": lambda x, w, s: fk.conv2d_scale_min(x, w, scale=s, stride=2, padding="valid", precision="ieee"),
    "by keywords": lambda x, w, s: fk.conv2d_scale_min(input=x, weight=w, scale=2.0),
    "of a weight alone": lambda x, w, s: fk.conv2d_scale_min(torch.ones(1, 4, 5, 5), w),
    "of a scale alone": lambda x, w, s: fk.scale_min(torch.ones(1, 4, 5, 5), s),
    "a rung": lambda x, w, s: fk.rungs["composite"](x, w, None, s),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fx_traces_functions(name):
    function, args = FUNCTIONS[name], (SMALL.draw("cpu"), torch.randn(6, 4, 3, 3), -1.5)
    graph = torch.fx.symbolic_trace(function)
    assert len([node for node in graph.graph.nodes if "scale_min" in str(node.target) or "call_rung" in str(node.target)]) == 1
    close(graph(*args), function(*args))


FROM_A_PACKAGE = """
import torch
import fused_kernels

run = torch._inductor.aoti_load_package({package!r})
torch.save(run(torch.load({input!r})), {result!r})
"""


@ON
def test_an_aotinductor_package_runs_where_this_one_was_imported(device, run_python, tmp_path):
    # NOTE: where CXX links libstdc++ statically, any package of torch 2.11 crashes as it is loaded, a plain convolution's too.
    model, input = SMALL.make(device), SMALL.draw(device, batch=7)
    files = {name: str(tmp_path / f"{name}.pt2") for name in ("package", "input", "result")}
    torch.save(input, files["input"])
    with torch.no_grad():
        program = export(model, (SMALL.draw(device),), dynamic_shapes={"input": {0: Dim("B", min=2, max=64)}})
        torch._inductor.aoti_compile_and_package(program, package_path=files["package"])
        run_python(FROM_A_PACKAGE.format(**files), FUSED_KERNELS_CACHE=str(places.cache_dir()))
        close(torch.load(files["result"]), model(input))


@ON
@pytest.mark.parametrize("name", ["scale_min", "conv2d_scale_min"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name, requires_grad, device):
    input, weight = (torch.randn(shape, device=device, requires_grad=requires_grad) for shape in ((2, 4, 9, 11), (6, 4, 3, 2)))
    args = (input, 2.0) if name == "scale_min" else (input, weight, None, 2.0, [1, 2], [1, 1, 0, 1], [1, 1], 1, "ieee")
    for operator in (f"{name}_auto", f"{name}_winners_auto"):
        torch.library.opcheck(getattr(torch.ops.fused_kernels, operator).default, args)


@ON
def test_second_derivatives_of_an_exported_program(device):
    layer = Layer(2, 3, 2, 4)
    input = layer.draw(device, torch.float64, batch=1).requires_grad_()
    program = export(layer.make(device, torch.float64), (input.detach(),)).module()
    assert torch.autograd.gradcheck(program, input)
    assert torch.autograd.gradgradcheck(program, input)


@ON
@IN_NO_LOOP
def test_transforms_go_around_the_operator(device):
    """It has no rule for them: without a way around it the derivative would be zero."""
    model = SMALL.make(device, torch.float64)
    input = SMALL.draw(device, torch.float64)
    program = export(model, (input,)).module()
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(program)(input[:1].repeat(2, 1, 1, 1)), transform(model)(input[:1].repeat(2, 1, 1, 1))
        )


@ON
@pytest.mark.parametrize("how", ["exported", "decomposed", "jit"])
def test_vmap_of_a_program_runs_in_no_loop(how, device, capfd):
    model, batch = SMALL.make(device), torch.stack([SMALL.draw(device), SMALL.draw(device)])
    with torch.no_grad():
        found = torch.func.vmap(TRACES[how](model, (batch[0],)))(batch)
        close(found, torch.stack([model(input) for input in batch]))
    # From there torch warns past Python.
    assert "There is a performance drop" not in capfd.readouterr().err


# Of each device some that a rung takes and some that the library's convolution does, with each kind of copy before it.
GEOMETRIES = [
    ((2, 4, 9, 11), 6, 3, {}),
    ((2, 512, 7, 7), 512, 3, {"padding": 1}),
    ((2, 512, 7, 8), 512, 2, {"padding": "same"}),
    ((2, 64, 28, 28), 256, 1, {"stride": 2}),
    ((2, 256, 14, 14), 64, 1, {}),
    ((2, 64, 14, 14), 64, 3, {"padding": 1}),
    ((2, 32, 14, 14), 32, 3, {"groups": 4, "dilation": 2}),
]


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "out_channels", "kernel", "conv"), GEOMETRIES)
def test_without_python_of_tensor_scales(shape, out_channels, kernel, conv, dtype, device, without_python):
    """Bit for bit what an eager call gives; and of a bias that is float32, which on a CPU a library's convolution lacks."""
    input = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(out_channels, shape[1] // conv.get("groups", 1), kernel, kernel, device=device).to(dtype)
    bias, scales = torch.randn(out_channels, device=device), torch.randn(out_channels, device=device)
    geometry, _ = arguments.check_conv(
        input, weight, bias, *({"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | conv).values()
    )
    with torch.no_grad():
        expected = fk.conv2d_scale_min(input, weight, bias, scales, **conv, return_indices=True)
        operators = [getattr(torch.ops.fused_kernels, f"conv2d_scale_min_{name}auto") for name in ("", "winners_")]
        for _ in range(2):
            found = [operator(input, weight, bias, 1.0, *geometry, "auto", scales) for operator in operators]
            assert_bits(found[0], expected[0])
            assert_bits(found[1][0], expected[0])
            assert found[1][1].long().equal(expected[1])
            assert_bits(
                torch.ops.fused_kernels.scale_min_auto(input, 1.0, input[0, :, 0, 0].float()),
                fk.scale_min(input, input[0, :, 0, 0]),
            )


def assert_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@ON
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["auto", "ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "out_channels", "kernel", "conv"), GEOMETRIES)
def test_without_python(shape, out_channels, kernel, conv, dtype, precision, bias, device, without_python):
    """Bit for bit what an eager call gives, winners as well, and no Python in between."""
    for layout in ("nchw", "channels_last"):
        input = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
        weight = torch.randn(out_channels, shape[1] // conv.get("groups", 1), kernel, kernel, device=device).to(dtype)
        added = torch.randn(out_channels, device=device).to(dtype) if bias else None
        geometry, _ = arguments.check_conv(
            input, weight, added, *({"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | conv).values()
        )
        args, names = (input, weight, added, -1.5, *geometry, precision), set()
        with torch.no_grad():
            expected = fk.conv2d_scale_min(*args[:4], **conv, precision=precision, return_indices=True)
            operators = [getattr(torch.ops.fused_kernels, f"conv2d_scale_min_{name}auto") for name in ("", "winners_")]
            for _ in range(2):
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    found = operators[0](*args), *operators[1](*args)
                names = {event.key for event in profile.key_averages()}
        assert "fused_kernels::conv2d_scale_min_auto" in names
        assert not any("choice" in name or "in_python" in name for name in names)
        torch.testing.assert_close(found[1:], (expected[0], expected[1].to(found[2].dtype)), rtol=0, atol=0)
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@ON
def test_a_traced_program_of_several_calls(device, without_python):
    """Its interpreter keeps more on the stack than a call's arguments."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SMALL.make(device)

        def forward(self, x):
            least = self.layer(x)
            return fk.scale_min(x, 2.0) + least * self.layer(x + least)

    model, input = Twice(), SMALL.draw(device)
    with torch.no_grad():
        traced = torch.jit.trace(model, input)
        for _ in range(3):
            close(traced(input), model(input))


class Region(torch.nn.Module):
    """A network between convolutions, in a region of autocast or without one."""

    def __init__(self, network, region):
        super().__init__()
        channels = network.in_channels
        before, after = torch.nn.Conv2d(channels, channels, 1), torch.nn.Conv2d(1, 2, 1)
        self.network, self.region = torch.nn.Sequential(before, network, after), region

    def forward(self, input):
        with self.region:
            return self.network(input)


class Plain(torch.nn.Conv2d):
    """The layer by PyTorch's own operations."""

    def forward(self, input):
        return (super().forward(input) * -1.5).amin(1, keepdim=True)


TRACES = {
    "exported": lambda *args: export(*args).module(),
    "strict": lambda *args: export(*args, strict=True).module(),
    "decomposed": lambda *args: export(*args).run_decompositions().module(),
    "jit": torch.jit.trace,
    "compiled": lambda model, args: torch.compile(model, backend="aot_eager"),
}


@ON
@pytest.mark.parametrize("how", TRACES)
@pytest.mark.parametrize("inside", [None, True, False])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("traced_outside", [False, True])
def test_a_program_casts_where_one_of_convolutions_does(traced_outside, outside, inside, how, device, without_python):
    """Autocast ``inside`` the model, on or off, around the call, and around the tracing."""

    def autocast(enabled):
        # Its cache would put tensors of another run into a trace.
        return torch.autocast(device, torch.bfloat16, enabled, cache_enabled=False)

    region = contextlib.nullcontext() if inside is None else autocast(inside)
    ours, plain = Region(SMALL.make("cpu"), region).to(device), Region(Plain(4, 6, 3, padding=1), region).to(device)
    input = SMALL.draw(device)
    plain.load_state_dict(ours.state_dict())
    found = []
    with torch.no_grad():
        for model in (ours, plain):
            torch._dynamo.reset()
            with autocast(traced_outside):
                program = TRACES[how](model, (input,))
            with autocast(outside):
                found.append(program(input))
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


@ON
@pytest.mark.parametrize("layer", [SMALL, Layer(512, 512, 3, 7, 1)], ids=str)
def test_gradients_of_an_exported_program_under_autocast(layer, device, without_python):
    model, input = Region(layer.make("cpu"), contextlib.nullcontext()).to(device), layer.draw(device)
    program = export(model, (input,)).module()
    with torch.autocast(device, torch.bfloat16):
        losses = [function(input).float().square().mean() for function in (program, model)]
    found, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    assert {grad.dtype for grad in found} == {torch.float32}
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@ON
def test_a_transform_leaves_no_choice_behind(device, without_python):
    """While one is under way PyTorch's operations run, and only then."""
    input, operator = torch.randn(3, 5, 7, 9, device=device), torch.ops.fused_kernels.scale_min_auto.default
    with torch.autograd.forward_ad.dual_level():
        operator(input, 2.0)
    operator(input, 2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operator(input, 2.0)
    names = {event.key for event in profile.key_averages()}
    assert not any("in_python" in name or "choice" in name for name in names)


@ON
def test_wrong_arguments_are_one_sentence(device):
    """Also where nobody checked them before."""
    input, weight = torch.randn(2, 4, 9, 11, device=device), torch.randn(6, 4, 3, 3, device=device)
    conv, operator = ([1, 1], [0] * 4, [1, 1], 1, "auto"), torch.ops.fused_kernels.conv2d_scale_min_auto
    wrong = [
        lambda: operator(input[0], weight, None, 1.0, *conv),
        lambda: operator(input, weight.double(), None, 1.0, *conv),
        lambda: operator(input, weight, None, 1.0, *conv[:4], "bogus"),
        lambda: operator(input[:, :3], weight, None, 1.0, *conv),
        lambda: torch.ops.fused_kernels.scale_min_auto(input[0], 1.0),
    ]
    for function in wrong:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            function()
        sentence = str(caught.value).splitlines()[0]
        assert_one_sentence(sentence)
        assert "expected" in sentence


# ---- transforms of a backward pass that was recorded before ----

GRADIENTS = {
    "scale_min": (lambda input: fk.scale_min(input, 2.0), lambda input: (input * 2.0).amin(1, keepdim=True), [(2, 5, 4, 3)]),
    "conv2d_scale_min": (
        lambda *tensors: fk.conv2d_scale_min(*tensors, 2.0, stride=(1, 2), padding="valid", groups=2),
        lambda *tensors: (torch.nn.functional.conv2d(*tensors, (1, 2), 0, 1, 2) * 2.0).amin(1, keepdim=True),
        [(2, 4, 6, 7), (6, 2, 3, 2), (6,)],
    ),
    "tensor scale": (
        lambda input, weight, bias, scale: fk.conv2d_scale_min(input, weight, bias, scale, stride=(1, 2)),
        lambda input, weight, bias, scale: (torch.conv2d(input, weight, bias, (1, 2)) * scale).amin(1, keepdim=True),
        [(2, 4, 6, 7), (6, 4, 3, 2), (6,), (6, 1, 1)],
    ),
    "tensor scale alone": (
        lambda input, scale: fk.scale_min(input, scale),
        lambda input, scale: (input * scale).amin(1, keepdim=True),
        [(2, 5, 4, 3), (1, 5, 1, 1)],
    ),
    "padded": (
        lambda *tensors: fk.conv2d_scale_min(*tensors, scale=2.0, padding="same", dilation=2),
        lambda *tensors: (torch.nn.functional.conv2d(*tensors, None, 1, "same", 2) * 2.0).amin(1, keepdim=True),
        [(2, 4, 6, 7), (6, 4, 3, 2)],
    ),
}


class Function(torch.nn.Module):
    """A function to export."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.fixture(params=["eager", "in Python", "exported"])
def recorded(request, monkeypatch):
    """How the backward pass comes about: without Python, in Python while that is built, or by a program."""
    have_rules(monkeypatch, in_python=request.param == "in Python")
    if request.param == "exported":
        return lambda function, tensors: export(Function(function), tuple(t.detach() for t in tensors)).module()
    return lambda function, tensors: function


def same_of_both(name, recorded, device, derive):
    """Compare what ``derive`` gives for our function and for PyTorch's, of the output, another one like it, and the tensors."""
    fused, plain, shapes = GRADIENTS[name]
    tensors = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]
    outputs = [function(*tensors) for function in (recorded(fused, tensors), plain)]
    other = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64, device=device).view_as(outputs[0])
    torch.testing.assert_close(*(derive(output, other, tensors) for output in outputs))


@ON
@IN_NO_LOOP
@pytest.mark.parametrize("name", GRADIENTS)
def test_transforms_of_a_backward_pass(name, recorded, device):
    def derive(output, direction, tensors):
        def backward(grad):
            return torch.autograd.grad(output, tensors, grad, retain_graph=True)

        with torch.autograd.forward_ad.dual_level():
            duals = backward(torch.autograd.forward_ad.make_dual(direction, direction + 1))
            tangents = [torch.autograd.forward_ad.unpack_dual(dual).tangent for dual in duals]
        forward = torch.func.jvp(backward, (direction,), (direction + 1,))
        return tangents, forward, torch.func.vmap(backward)(torch.stack([direction, 1 - direction]))

    same_of_both(name, recorded, device, derive)


@ON
@IN_NO_LOOP
@pytest.mark.parametrize("name", GRADIENTS)
def test_second_derivatives_of_batched_gradients(name, recorded, device):
    def derive(output, other, tensors):
        weight, batch = other.clone().requires_grad_(), other.new_tensor([1.0, 2.0])
        grads = torch.autograd.grad((output * weight).sum(), tensors, batch, is_grads_batched=True, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (weight, *tensors), allow_unused=True)

    same_of_both(name, recorded, device, derive)
