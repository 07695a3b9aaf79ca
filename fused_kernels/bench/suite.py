"""One run: what ``python -m fused_kernels bench`` measures, part by part."""

import torch

from . import forward
from . import training as steps
from .environment import default_device, run_info


def run(device=None, *, dtypes=None, quick=False, layers=False, training=False, machine=None, seconds=0.3, each=None):
    """Check and time the whole model and scale_min alone: rungs, peers and ceilings, all in this process.

    And the public function on other shapes, where there is a choice to make.

    Rungs and peers of one dtype, precision and layout are timed in turns; those of the whole model on a GPU then one by one
    for three seconds each as well, until clock and power have settled ("sustained"). What this machine lacks is skipped, with
    a printed reason.

    Parameters
    ----------
    device : torch.device, optional
        By default :func:`default_device`.
    dtypes : sequence of torch.dtype, optional
        By default float32, bfloat16 and float16 on a GPU, float32 and bfloat16 on a CPU or if ``layers``; float32 alone if
        ``quick``, or on a CPU if ``training``.
    quick : bool
        One dtype and shape, without sustained times, and without torch.compile's max-autotune, whose search takes minutes.
    layers : bool
        In place of all that, the public function on ``LAYERS``.
    training : bool
        In place of all that, training steps of the whole model, and their parts; with ``layers``, training steps of those.
    machine : str, optional
        By default :func:`machine`.
    seconds : float
        Time measured for each entry.
    each : callable, optional
        Called with the new records of every part as soon as they are there: the whole takes minutes.

    Returns
    -------
    list of Record
    """
    device = torch.device(device or default_device())
    info = run_info(device, machine)
    if dtypes is None:
        most = 1 if quick else 2 if layers or device.type == "cpu" else 3
        most = 1 if training and device.type == "cpu" else most
        dtypes = [torch.float32, torch.bfloat16, torch.float16][:most]
    if training and layers:
        parts = steps.layers(info, device, dtypes, seconds / 10)
    elif training:
        parts = steps.whole_model(info, device, dtypes, quick, seconds)
    elif layers:
        parts = forward.layers(info, device, dtypes, seconds / 5)
    else:
        parts = forward.everything(info, device, dtypes, quick, seconds)
    done = []
    for part in parts:
        done += part
        if each:
            each(part)
    return done
