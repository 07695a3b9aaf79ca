"""The ladder: one entry per rung, from the plain PyTorch model upwards.

A rung's name is its file's name under ``csrc/``, its operator's name, its key in the records and its label in every plot.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.overrides import handle_torch_function, has_torch_function

from . import arguments, build, jobs, places, progress, toolchain
from .dispatch import OVERLOADS, is_jit_tracing, is_transformed, operator, require, wants_gradient
from .problem import check_problem

TRITON = Path(__file__).parent / "triton_kernels"


@dataclass(frozen=True)
class Rung:
    """One way to compute an operator; call it with the operator's own arguments.

    Attributes
    ----------
    name : str
        The rung's name.
    operator : {"scale_min", "conv2d_scale_min", "to_channels_last", "scale_min_backward", "grad_input", "grad_weight"}
        What it computes, and so the arguments that it takes; the last four are steps of others, and no rungs by themselves.
    idea : str
        What it does that the rung before it does not.
    device : {"cpu", "cuda"} or None
        Where it runs; None for rungs made of PyTorch's own operations, which run anywhere.
    min_capability : tuple of int
        The oldest GPU that it runs on.
    only_capability : tuple of int, optional
        The only compute capability that it runs on, where its instructions exist on no other.
    dtypes : tuple of torch.dtype
        What it takes.
    float32_precisions : tuple of str
        The precisions whose promise it keeps for float32.
    strides_and_groups : bool
        Whether it takes a convolution with a stride or groups other than one.
    most_taps_per_channel : int, optional
        So many places of the filter it takes for each input channel; by default any number.
    winners : bool
        Whether its source can also be compiled to give each pixel's winner, from which gradients are made.
    tensor_scales : bool
        Whether the scale may be a tensor; an edited source must have the argument `scales` for that.
    in_triton : bool
        Whether it is written in Triton, which compiles it when it is called, for that kind of call, and keeps it; nothing else
        of it is built.
    namespace : str
        The namespace of its operator in ``torch.ops``.
    """

    name: str
    operator: Literal["scale_min", "conv2d_scale_min", "to_channels_last", "scale_min_backward", "grad_input", "grad_weight"]
    idea: str
    device: Literal["cpu", "cuda"] | None = None
    min_capability: tuple[int, int] = (8, 0)
    only_capability: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = arguments.DTYPES
    float32_precisions: tuple[str, ...] = ("ieee", "tf32")
    strides_and_groups: bool = True
    most_taps_per_channel: int | None = None
    winners: bool = False
    tensor_scales: bool = True
    in_triton: bool = False
    namespace: str = build.NAMESPACE
    edited_source: str | None = None

    def why_unavailable(self, device=None, dtype=None):
        """Say in one sentence why this rung can't run on this machine, or None.

        It can where its libraries can be built, or are there.

        Parameters
        ----------
        device : torch.device, optional
            Which GPU to ask about; by default the current one.
        dtype : torch.dtype, optional
            Which library to ask about; by default all of them.
        """
        if self.device is None:
            return None
        if self.device == "cpu":
            missing = toolchain.why_no_compiler()
        elif reason := self._why_no_gpu(device):
            return reason
        elif self.in_triton:
            return toolchain.why_no_triton() or _failed.get((self.namespace, self.name, None))
        else:
            missing = toolchain.why_no_nvcc(torch.cuda.get_device_capability(device))
        missing = missing or places.why_none()
        asked = [overload for overload in self.overloads if overload == OVERLOADS.get(dtype)] or self.overloads
        for overload in asked:
            if reason := _failed.get((self.namespace, self.name, overload)):
                return reason
            if missing and not build.find(**self.library(overload)):
                return missing
        return None

    def _why_no_gpu(self, device):
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU on this machine"
        capability = torch.cuda.get_device_capability(device)
        if not self.runs_on(capability):
            need, have = (".".join(map(str, pair)) for pair in (self.only_capability or self.min_capability, capability))
            newer = "" if self.only_capability else " or newer"
            return f"{self.name} needs a GPU of compute capability {need}{newer}, this one has {have}"
        return None

    def runs_on(self, capability):
        """Tell whether a GPU of this compute capability has the instructions that it needs."""
        return capability == self.only_capability if self.only_capability else capability >= self.min_capability

    def why_not(self, dtype, precision="ieee", stride=1, groups=1, weight_shape=None):
        """Say in one sentence why this rung doesn't take such an input, or None.

        The ``precision`` matters for float32 alone; without ``weight_shape``, (C', C, k_h, k_w), no filter is too large.
        """
        if dtype not in self.dtypes:
            return f"{self.name} does not take {str(dtype).removeprefix('torch.')}"
        if dtype == torch.float32 and precision not in self.float32_precisions:
            return f"{self.name} computes float32 at the precision {' or '.join(self.float32_precisions)}, not {precision}"
        if not self.strides_and_groups and (groups != 1 or stride not in (1, (1, 1))):
            return f"{self.name} takes a stride of 1 and one group, not a stride of {stride} and {groups} groups"
        if weight_shape is not None and self.most_taps_per_channel:
            _, channels, *kernel = weight_shape
            if math.prod(kernel) > self.most_taps_per_channel * channels:
                most = f"at most {self.most_taps_per_channel} filter taps for each channel"
                return f"{self.name} takes {most}, not {math.prod(kernel)} for {channels}"
        return None

    @property
    def source_file(self):
        """The path of its kernel, or None for rungs made of PyTorch's own operations."""
        if self.device is None:
            return None
        if self.in_triton:
            return TRITON / f"{self.name}.py"
        return build.CSRC / self.device / f"{self.name}.{'cu' if self.device == 'cuda' else 'cpp'}"

    @property
    def source(self):
        """The text of its kernel."""
        return self.edited_source if self.edited_source is not None else self.source_file.read_text(encoding="utf-8")

    def excerpt(self, start):
        """Give the part of the source from the first line that holds ``start`` to the ``}`` that ends it."""
        lines = self.source.splitlines()
        first = next(i for i, line in enumerate(lines) if start in line)
        last = next(i for i in range(first, len(lines)) if lines[i].startswith("}"))
        return "\n".join(lines[first : last + 1])

    @property
    def overloads(self):
        """The names of the dtypes for which it has a library each; only None where one library takes them all."""
        if self.in_triton:
            return ()
        if self.edited_source is not None and not build.takes_one_dtype(self.edited_source):
            return (None,)
        return tuple(OVERLOADS[dtype] for dtype in self.dtypes)

    @property
    def variants(self):
        """The overload of each of its libraries, and whether it gives winners."""
        return [(overload, winners) for overload in self.overloads for winners in ((False, True) if self.winners else (False,))]

    def library(self, overload, winners=False, arch=None):
        """Give the arguments for :func:`fused_kernels.build.make`; ``overload``: one of ``overloads``."""
        if arch is None and self.only_capability:
            arch = toolchain.architecture(self.only_capability)
        where = {"device": self.device, "namespace": self.namespace, "arch": arch}
        return {"name": self.name, "source": self.source, **where, "winners": winners, "dtype": overload}

    def load(self, arch=None, winners=False, overloads=None, at_once=None):
        """Build the kernel if need be and register it.

        Parameters
        ----------
        arch, winners, at_once
            As for :func:`fused_kernels.build.make`.
        overloads : sequence of str, optional
            The dtypes to build for, such as "float32"; by default every one that it takes. Several are built at a time.

        Raises
        ------
        RuntimeError
            No visible GPU can run it, or there is no toolchain or no place to build in (an UnavailableError); or the compiler
            failed, and the message holds what it said.
        """
        if self.device is None:
            return
        if arch is None and self.device == "cuda":
            missing = [self._why_no_gpu(device) for device in range(torch.cuda.device_count()) or (None,)]
            if all(missing):
                raise build.UnavailableError(f"{self.name} cannot run here: {missing[0]}")
        if self.in_triton:
            if reason := toolchain.why_no_triton():
                raise build.UnavailableError(f"{self.name} cannot run here: {reason}")
            return
        overloads = self.overloads if overloads is None else overloads
        jobs.map_all(lambda one: build.load(**self.library(one, winners, arch), at_once=at_once), overloads, len(overloads))

    def __call__(self, *args, **kwargs):
        """Run it: ``(input, scale)``, or ``(input, weight, bias, scale, *, stride, padding, dilation, groups, precision)``.

        Raises
        ------
        ValueError, TypeError
            An argument is off; the sentence says which, what was expected and what came.
        RuntimeError
            The kernel cannot be built here, or cannot take these arguments.
        """
        if has_torch_function(given := (*args, *kwargs.values())):
            return handle_torch_function(call_rung, given, self, *args, **kwargs)
        if self.device and is_transformed():
            # Without a rule of its own, torch would take the operator's derivative for zero.
            raise RuntimeError(f"{self.name} has no rule for torch.func's transforms and forward-mode gradients")
        call = self._scale_min if self.operator == "scale_min" else self._conv2d_scale_min
        if args and arguments.is_unbatched(args[0]):
            return arguments.unbatched(call, *args, **kwargs)
        return call(*args, **kwargs)

    def _scale_min(self, input, scale):
        arguments.check_input(input)
        return self._run(input, *self._split(scale, input.shape[1], input))

    def _split(self, scale, channels, input):
        """Give the scale as operators take it: a number, then each channel's factor if it is a tensor."""
        scale = arguments.as_scale(scale)
        if type(scale) is float:
            return (scale,)
        is_single = arguments.check_scale(scale, channels, input.device)
        if not self.takes_scales:
            raise RuntimeError(f"scale: {self.name} expected a number, got a tensor of shape {tuple(scale.shape)}")
        return 1.0, arguments.scale_per_channel(scale, is_single, channels, input)

    def _conv2d_scale_min(
        self, input, weight, bias=None, scale=1.0, *, stride=1, padding=0, dilation=1, groups=1, precision="auto"
    ):
        problem = check_problem(input, weight, bias, stride, padding, dilation, groups, precision)
        scale, *scales = self._split(scale, weight.shape[0], input)
        *geometry, resolved = problem.conv
        if self.device:
            precision = resolved
            # A tensor on another device is refused by the operator.
            if input.device.type == self.device and (
                reason := self.why_not(input.dtype, precision, problem.stride, problem.groups, weight.shape)
            ):
                raise RuntimeError(reason)
        return self._run(input, weight, bias, scale, *geometry, precision, *scales)

    def _run(self, *args):
        # torch.jit traces a second time, without gradients, to compare: what keeps no winners is the same both times.
        by_winners = self.has_winners and wants_gradient(*args) and not is_jit_tracing()
        name = f"{self.name}_winners" if by_winners else self.name
        if self.device:
            # Who names a rung wants no other operations in its place.
            require(self.namespace, name, args[0])
        output = operator(name, args[0].dtype, self.namespace)(*args)
        return output[0] if by_winners else output

    @property
    def takes_scales(self):
        """Whether its operators have an argument for a tensor scale."""
        return self.tensor_scales and (self.edited_source is None or "scales" in self.edited_source)

    @property
    def has_winners(self):
        """Whether there is an operator that gives them: not of an edited source, which may be about anything else."""
        return self.winners and self.edited_source is None


def call_rung(rung, *args, **kwargs):
    """Call a rung: what torch.fx records, which wants a function with a name."""
    return rung(*args, **kwargs)


LADDER = (
    Rung("reference", "conv2d_scale_min", "PyTorch's own convolution, multiplication and minimum, one after the other"),
    Rung(
        "scale_min_naive",
        "scale_min",
        "one block per pixel, one thread per channel, one thread reduces",
        "cuda",
        tensor_scales=False,
    ),
    Rung("scale_min_coalesced", "scale_min", "one thread per pixel: neighbours read neighbours", "cuda", tensor_scales=False),
    Rung("scale_min_vectorized", "scale_min", "wide loads, several in flight, both layouts", "cuda", winners=True),
    Rung("scale_min_triton", "scale_min", "the same loads, found by a compiler", "cuda", winners=True, in_triton=True),
    Rung(
        "conv_direct",
        "conv2d_scale_min",
        "convolution, scale and min in one kernel: no intermediate in memory",
        "cuda",
        dtypes=(torch.float32,),
        winners=True,
    ),
    Rung(
        "conv_mma",
        "conv2d_scale_min",
        "implicit GEMM on tensor cores, its minimum taken in registers",
        "cuda",
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        float32_precisions=("tf32",),
        winners=True,
    ),
    Rung(
        "conv_triton",
        "conv2d_scale_min",
        "implicit GEMM over pixels in one row, whose pipeline a compiler writes: no nvcc",
        "cuda",
        dtypes=(torch.float16, torch.bfloat16),
        winners=True,
        in_triton=True,
    ),
    Rung(
        "conv_wgmma",
        "conv2d_scale_min",
        "Hopper's wgmma fed by TMA, warp-specialized: the weights stay in shared memory, rows stream past",
        "cuda",
        only_capability=(9, 0),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        float32_precisions=("tf32",),
        strides_and_groups=False,
        winners=True,
    ),
    Rung(
        "conv_wgmma_ieee",
        "conv2d_scale_min",
        "float32's accuracy from tensor cores: split operands, three products for one, sums rounded outside",
        "cuda",
        only_capability=(9, 0),
        dtypes=(torch.float32,),
        float32_precisions=("ieee",),
        strides_and_groups=False,
        most_taps_per_channel=12,
        winners=True,
    ),
    Rung(
        "composite",
        "conv2d_scale_min",
        "the library's convolution in the layout for tensor cores, then scale_min, bias and all",
    ),
    Rung("scale_min", "scale_min", "vector instructions and threads, one pass over the input", "cpu", winners=True),
    Rung("conv2d_scale_min", "conv2d_scale_min", "the convolution's output never leaves the cache", "cpu", winners=True),
)

# What the composite does to input and weights before the library's convolution.
COPY = Rung(
    "to_channels_last",
    "to_channels_last",
    "input and weights transposed into the layout for tensor cores, in one launch",
    "cuda",
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
)

# Gradients from winners: of scale_min's input, of a convolution's input, and of its weights and bias.
BACKWARD = (
    Rung("scale_min_vectorized_backward", "scale_min_backward", "only writes: each element once, in wide stores", "cuda"),
    Rung("grad_input_gather", "grad_input", "each pixel gathers its winners' weights", "cuda"),
    Rung(
        "grad_input_mma",
        "grad_input",
        "the weights in shared memory, gathered by ldmatrix, added by tensor cores",
        "cuda",
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        float32_precisions=("tf32",),
        strides_and_groups=False,
    ),
    Rung(
        "grad_weight_gather",
        "grad_weight",
        "lists of the pixels that a channel wins, summed in registers",
        "cuda",
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    ),
    Rung("grad_weight_private", "grad_weight", "blocks with private sums, each with one owner", "cuda"),
    Rung(
        "grad_weight_sorted",
        "grad_weight",
        "pixels sorted by winner, summed by tensor cores in registers",
        "cuda",
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        float32_precisions=("tf32",),
    ),
    Rung("scale_min_backward", "scale_min_backward", "only writes: each element once, while it is in cache", "cpu"),
    Rung("grad_input", "grad_input", "each pixel gathers its winners' weights, in cache", "cpu"),
    Rung("grad_weight", "grad_weight", "threads with private sums", "cpu"),
)

rungs = {rung.name: rung for rung in LADDER}
steps = {rung.name: rung for rung in BACKWARD}


# ---- what is there ----


def why_unavailable(name, device_index, dtype):
    """Say why a rung's library, or the copy's, for a dtype can't be had for this GPU, or None."""
    # Asked once per process: to find the compilers takes longer than a small kernel.
    key = (name, device_index, dtype)
    if key not in _availability:
        _availability[key] = (COPY if name == COPY.name else rungs[name]).why_unavailable(device_index, dtype)
    return _availability[key]


def first_available(names, device_index, dtype):
    """Name the first that can be had; if none, the caller runs PyTorch's own operations, and one warning a process says why."""
    for name in names:
        if not why_unavailable(name, device_index, dtype):
            return name
    if names:
        progress.warn_once("kernels", f"{INSTEAD}: {why_unavailable(names[0], device_index, dtype)}")
    return None


def note_unavailable(rung, overload, reason):
    """Note that a library can't be had though nothing had told so before, and forget every choice that was made."""
    _failed[rung.namespace, rung.name, overload] = reason
    _availability.clear()
    for forget in when_unavailable:
        forget()


INSTEAD = "PyTorch's own operations run in place of a kernel"
# What to call then.
when_unavailable = []
_availability, _failed = {}, {}
# What torch.compiler.assume_constant_result sets; that function would import the compiler, one second, for this line.
why_unavailable._dynamo_marked_constant = True
first_available._dynamo_marked_constant = True
