"""A small network that contains the operation, to train: an image classifier made of maxout units, and its data.

A maxout unit (Goodfellow et al., 2013) is a maximum over the pieces of a convolution, its output channels: a non-linearity that
is learned. With a scale of -1 that is our operation: ``max(conv(x)) = -min(-1 * conv(x))``. The data are drawn, not downloaded:
shapes at random places, in random sizes, directions and contrasts, in front of a slope, under noise.
"""

import contextlib
import itertools
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from . import reference
from .modules import Conv2dScaleMin

CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "stripes", "chequers")
IMPLEMENTATIONS = ("eager", "eager, one convolution", "fused")
SPREAD = 0.1  # of a unit's pieces at first, where those of nn.Conv2d have one


# ---- data ----


def draw(count, seed=0, size=24):
    """Draw grey images of shapes, the same from the same seed on every machine, up to rounding.

    Parameters
    ----------
    count : int
        How many; of each class about as many.
    seed : int
    size : int
        Height and width.

    Returns
    -------
    Tensor
        Images, shape (count, 1, size, size), float32, on the CPU.
    Tensor
        Their classes, as places in :data:`CLASSES`.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    radius, angle = uniform(0.6, 0.85), uniform(0, 2 * torch.pi)
    center_x, center_y = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    contrast = uniform(0.7, 1.4)
    slope_x, slope_y = uniform(-0.5, 0.5), uniform(-0.5, 0.5)
    noise = 0.15 * torch.randn(count, size, size, generator=generator)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    from_x, from_y = x - center_x, y - center_y
    u = (from_x * angle.cos() + from_y * angle.sin()) / radius
    v = (from_y * angle.cos() - from_x * angle.sin()) / radius
    images = slope_x * x + slope_y * y + noise
    for label, name in enumerate(CLASSES):
        mine = labels == label
        # An edge is about a pixel wide.
        inside = torch.sigmoid(-_distance(name, u[mine], v[mine]) * radius[mine] * size)
        images[mine] += contrast[mine] * inside
    return images[:, None], labels


def _distance(name, u, v):
    """Give about how far a point is outside a shape of radius one, negative inside."""
    far, square = torch.hypot(u, v), torch.maximum(u.abs(), v.abs()) - 0.85
    if name == "disc":
        return far - 1
    if name == "ring":
        return (far - 0.75).abs() - 0.25
    if name == "square":
        return square
    if name == "frame":
        return (square + 0.2).abs() - 0.2
    if name == "triangle":
        return torch.stack([v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v]).amax(0) - 0.55
    if name == "cross":
        return torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.25, square - 0.15)
    pattern = torch.sin(5 * u) if name == "stripes" else torch.sin(3.7 * u) * torch.sin(3.7 * v)
    return torch.maximum(square, -0.3 * pattern)


# ---- network ----


class EagerUnit(nn.Conv2d):
    """What :class:`fused_kernels.Conv2dScaleMin` computes, one of PyTorch's operations after the other, for a scale of -1."""

    def forward(self, input):
        """Map ``(N, in_channels, H, W)`` to ``(N, 1, H', W')``."""
        return reference.scale_min(super().forward(input), -1.0)


class MaxoutLayer(nn.Module):
    """Maxout units side by side: each a maximum over the output channels of a convolution of its own.

    A unit's pieces begin close together and learn to differ. Drawn apart, one of them would be large nearly anywhere: their
    maximum would say little about the image.

    Parameters
    ----------
    in_channels : int
    units : int
        How many; each makes a channel of the output.
    pieces : int
        What each takes its maximum over.
    kernel_size : int
        Odd; the image keeps its size.
    implementation : {"eager", "eager, one convolution", "fused"}
        Which operations do it: PyTorch's, a unit after the other, each as :class:`fused_kernels.Model` does it; PyTorch's, as
        one convolution for all units and a maximum over the pieces, without any scale; or a
        :class:`fused_kernels.Conv2dScaleMin` for each unit. All draw the same weights from the same seed.
    """

    def __init__(self, in_channels, units, pieces, kernel_size, implementation="fused"):
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {implementation!r}")
        self.implementation = implementation
        padding = kernel_size // 2

        def unit():
            if implementation == "fused":
                return Conv2dScaleMin(in_channels, pieces, kernel_size, -1.0, padding=padding)
            return EagerUnit(in_channels, pieces, kernel_size, padding=padding)

        self.units = nn.ModuleList(unit() for _ in range(units))
        with torch.no_grad():
            for parameter in self.units.parameters():
                parameter.copy_(parameter[:1].lerp(parameter, SPREAD))

    def forward(self, input):
        """Map ``(N, in_channels, H, W)`` to ``(N, units, H, W)``."""
        if self.implementation == "eager, one convolution":
            weight, bias = (torch.cat([getattr(unit, name) for unit in self.units]) for name in ("weight", "bias"))
            output = F.conv2d(input, weight, bias, padding=self.units[0].padding)
            return output.unflatten(1, (len(self.units), -1)).max(2).values
        return -torch.cat([unit(input) for unit in self.units], 1)


class Classifier(nn.Module):
    """Two layers of maxout units, a mean over 2 x 2 pixels after each, and a linear layer over the means of nine regions.

    Parameters
    ----------
    units, pieces : int
        Of each layer, as for :class:`MaxoutLayer`.
    implementation : str
        As for :class:`MaxoutLayer`.
    kernel_size : int
    """

    def __init__(self, units=8, pieces=32, implementation="fused", kernel_size=5):
        super().__init__()
        self.layers = nn.ModuleList(
            MaxoutLayer(channels, units, pieces, kernel_size, implementation) for channels in (1, units)
        )
        # A maximum over many pieces is far from zero.
        self.norms = nn.ModuleList(nn.BatchNorm2d(units) for _ in self.layers)
        self.head = nn.Linear(9 * units, len(CLASSES))

    def forward(self, images):
        """Map ``(N, 1, H, W)`` to a score of each class, ``(N, 8)``."""
        x = images
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.avg_pool2d(norm(layer(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 3).flatten(1))


# ---- training ----


@dataclass(frozen=True)
class Training:
    """What came out of a training.

    Attributes
    ----------
    losses : list of float
        The loss of each step's batch.
    accuracy : float
        The share of images put in their class, of images that were not trained on.
    step_ms : float
        The median time of a step: forward, backward and the optimizer's.
    peak_bytes : int or None
        The most memory taken at a time, beyond what was taken before; None on a CPU.
    model : Classifier
        What learned, in evaluation mode.
    """

    losses: list
    accuracy: float
    step_ms: float
    peak_bytes: int | None
    model: Classifier


def train(
    implementation="fused",
    *,
    steps=100,
    batch=32,
    units=8,
    pieces=32,
    images=4096,
    held_out=1024,
    learning_rate=0.015,
    device=None,
    dtype=torch.float32,
    autocast=None,
    seed=0,
):
    """Train a :class:`Classifier` with Adam on :func:`draw`'s images.

    Weights, images and their order follow from the seed alone. So do all results, bit for bit on one machine, with fused units;
    with PyTorch's on a GPU as far as cuDNN's algorithms always add in the same order.

    Parameters
    ----------
    implementation, units, pieces
        As for :class:`Classifier`.
    steps, batch : int
        How many steps, of how many images each.
    images, held_out : int
        How many to train on, again and again in another order, and how many to judge by.
    learning_rate : float
        At first; it falls to zero by a cosine.
    device : torch.device, optional
        By default the CPU.
    dtype : torch.dtype
        Of the images and the weights.
    autocast : torch.dtype, optional
        What autocast computes convolutions in; by default there is no autocast.
    seed : int

    Returns
    -------
    Training
    """
    device = torch.device(device or "cpu")
    on_gpu = device.type == "cuda"
    data, labels = (tensor.to(device) for tensor in draw(images, seed))
    data = data.to(dtype)
    tests, test_labels = (tensor.to(device) for tensor in draw(held_out, seed + 1))
    order = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // images)
    places = torch.cat([torch.randperm(images, generator=order) for _ in range(rounds)]).to(device)

    before = _start_of_memory(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(units, pieces, implementation).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, marks = [], [_mark(device)]
    for step in range(steps):
        chosen = places[step * batch : (step + 1) * batch]
        with _autocast(device, autocast):
            scores = model(data[chosen])
        loss = F.cross_entropy(scores.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        marks.append(_mark(device))
    losses = torch.stack(losses).tolist()
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None

    model.eval()
    with torch.no_grad(), _autocast(device, autocast):
        found = torch.cat([model(some).argmax(1) for some in tests.to(dtype).split(batch)])
    accuracy = (found == test_labels).double().mean().item()
    return Training(losses, accuracy, _median_ms(marks), peak, model)


def _autocast(device, dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _start_of_memory(device):
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _mark(device):
    """Mark this moment, on a GPU in its own course of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _median_ms(marks):
    """Give the median time from mark to mark: of the few steps that build and choose kernels it knows nothing."""
    pairs = list(itertools.pairwise(marks))
    if isinstance(marks[0], float):
        times = [1e3 * (end - start) for start, end in pairs]
    else:
        times = [start.elapsed_time(end) for start, end in pairs]
    return torch.tensor(times).median().item()
