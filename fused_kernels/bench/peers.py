"""What the rungs are timed against: eager, torch.compile and cuDNN's graph API."""

import contextlib
import functools
import importlib
import logging

import torch
from torch.nn import functional as F

from .. import reference
from .clock import compare
from .workloads import layout_name

# What torch.compile searches longest with. The same kernels as "max-autotune", without the CUDA graph: its replay would first
# copy the whole input to a fixed address, half a millisecond that the peer does not have to pay.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


def eager(work):
    """Give a workload's operation in PyTorch's own, as a function of its tensors."""

    def function(input, weight, bias, scale=work.scale):
        return reference.scale_min(F.conv2d(input, weight, bias, **work.options), scale)

    return function


def compile_modes(device, quick):
    """Name the modes of torch.compile to time: label, mode."""
    modes = [("compile", "default")]
    if device.type == "cuda" and not quick:
        modes.append(("compile-max-autotune", MAX_AUTOTUNE))
    return modes


def compiled(function, mode, *args):
    """Compile a function, and bind its arguments."""
    _import_cpp_extension()
    return functools.partial(torch.compile(function, mode=mode, dynamic=False), *args)


def _import_cpp_extension():
    """Import quietly what torch.compile imports: where nvcc is and no GPU, that warns."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module(logger.name)
    finally:
        logger.setLevel(before)


def cudnn_graph(work):
    """Give convolution, bias and minimum as one graph of cuDNN's, run by the fastest of the plans that it proposes.

    The scale is folded into weight and bias beforehand, outside the timing: in the peer's favour, and exact for a power of two.
    """
    try:
        import cudnn
    except ImportError as error:
        raise RuntimeError("no Python package cudnn; pip install nvidia-cudnn-frontend") from error

    kinds = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
    kind, single = getattr(cudnn.data_type, kinds[work.input.dtype]), cudnn.data_type.FLOAT
    weight, bias = work.weight * work.scale, (work.bias * work.scale).view(1, -1, 1, 1)
    batch, _, height, width = work.output_shape
    channel_stride = 1 if layout_name(work.input) == "channels_last" else height * width
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)

    reasons = []
    # Some versions of cuDNN reduce into float32 only: then the cast of the small result is part of the call.
    for output_kind, output_dtype in {kind: work.input.dtype, single: torch.float32}.items():
        try:
            graph = cudnn.pygraph(handle=handle, io_data_type=kind, intermediate_data_type=single, compute_data_type=single)
            x, w, b = (graph.tensor_like(tensor) for tensor in (work.input, weight, bias))
            conv = graph.conv_fprop(image=x, weight=w, padding=[0, 0], stride=[1, 1], dilation=[1, 1])
            smallest = graph.reduction(input=graph.bias(input=conv, bias=b), mode=cudnn.reduction_mode.MIN)
            smallest.set_output(True).set_data_type(output_kind)
            smallest.set_dim([batch, 1, height, width]).set_stride([height * width, channel_stride, width, 1])
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            plans = _cudnn_plans(graph)
        except Exception as error:
            reasons.append(str(error))
            continue
        output = torch.empty((batch, 1, height, width), dtype=output_dtype, device=work.input.device)
        tensors = {x: work.input, w: weight, b: bias, smallest: output}

        def call(index, workspace, graph=graph, tensors=tensors, output=output):
            graph.execute_plan_at_index(tensors, workspace, index=index, handle=handle)
            return output.to(work.input.dtype)

        functions = {index: functools.partial(call, index, workspace) for index, workspace in plans.items()}
        if functions:
            timings = compare(functions, work.input.device, bytes=work.bytes, seconds=0.0)
            return functions[min(timings, key=lambda index: timings[index].p50)]
        reasons.append("none of the plans that it proposes can be built")
    raise RuntimeError("cuDNN has no plan for the fused graph: " + "; ".join(reasons))


def _cudnn_plans(graph, most=6):
    """Build the first few plans that cuDNN proposes, best guess first; give index -> workspace."""
    plans = {}
    for index in range(graph.get_execution_plan_count()):
        if len(plans) == most:
            break
        with contextlib.suppress(Exception):
            graph.build_plan_at_index(index)
            size = graph.get_workspace_size_plan_at_index(index)
            plans[index] = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
    return plans
