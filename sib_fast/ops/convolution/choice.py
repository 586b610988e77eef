"""Which way each derivative of a convolution goes: one row of rules a device type, made from benchmarks/convolution_choice.py.

Rules on shapes, fixed here: a choice timed at run time would change bits from run to run. They read metadata only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def always(*_: object) -> bool:
    return True


def never(*_: object) -> bool:
    return False


class Rules(NamedTuple):
    """Of one device type: each says whether its way is taken, for the tensors and geometry that it is given.

    second(x, weight, groups): the double backward by the ordinary forward and weight-gradient kernels, not PyTorch's own.
    input_by_phases(x, weight, stride, dilation, groups): the input gradient as a convolution of stride 1 and an interleaving.
    weight_in_channels_last(grad_y, x, weight, groups): the weight gradient in channels last, whatever the layout.
    evidence: the file of measurements, or why this is taken without one.
    """

    second: Callable[..., bool]
    input_by_phases: Callable[..., bool]
    weight_in_channels_last: Callable[..., bool]
    evidence: str


def _phases_on_the_cpu(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
    """Where oneDNN's strided input gradient was found slower: 7×7 of stride 2 and 4×4 of stride 4 at 3 channels, 2.5 and 3
    times; from 3×3 down, and at 64 channels, it was as fast or faster."""
    few = weight.shape[1] <= 4 and min(weight.shape[2:]) >= 4
    return x.ndim == 4 and groups == 1 and few and min(stride) >= 2 and max(dilation) == 1


def _channels_last_on_the_cpu(grad_y: Tensor, x: Tensor, weight: Tensor, groups: int) -> bool:
    """Where oneDNN's depthwise weight gradient was found faster in channels last, the conversion counted: kernels of 5×5 and
    7×7, three times on maps of 28×28 and more, level at 14×14, the other way round below; at 3×3 the conversion takes what is
    gained."""
    depthwise = x.ndim == 4 and groups == x.shape[1] == weight.shape[0] > 1
    return depthwise and min(weight.shape[2:]) >= 5 and grad_y.shape[2] * grad_y.shape[3] >= 14 * 14


RULES = {
    "cpu": Rules(always, _phases_on_the_cpu, _channels_last_on_the_cpu, "docs/measured.md"),
    # Safe without a measurement: `second` runs what a plain step of the same layer runs, its forward and its weight gradient at
    # the layer's own shapes, for which cuDNN is tuned, so it costs at most those two. PyTorch's runs a forward convolution whose
    # kernel is the whole map, and one such per group: a depthwise layer of 384 channels is 384 of them, 384 launches at least.
    # The other two replace a library's kernel by more traffic, which only a measurement can justify.
    "cuda": Rules(always, never, never, "unverified on any GPU: an argument, not a measurement"),
}
_UNKNOWN = Rules(never, never, never, "no measurement, no argument: PyTorch's own")


def rules_of(device: torch.device) -> Rules:
    """The row of this device's type; PyTorch's own ways where there is none."""
    return RULES.get(device.type, _UNKNOWN)
