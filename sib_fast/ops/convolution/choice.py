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
    weight_by_map(grad_y, x, weight, groups): the weight gradient as a convolution of x whose kernel is grad_y's map.
    evidence: the file of measurements, or why this is taken without one.
    """

    second: Callable[..., bool]
    input_by_phases: Callable[..., bool]
    weight_in_channels_last: Callable[..., bool]
    weight_by_map: Callable[..., bool]
    evidence: str


def _phases_on_the_cpu(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
    """oneDNN's strided input gradient of a first layer takes 1.4 to 2.3 times as long; at 3×3 in channels last it is level, at 64
    channels in twice as fast."""
    if x.ndim != 4 or groups > 1 or weight.shape[1] > 4 or min(stride) < 2 or max(dilation) > 1:
        return False
    return min(weight.shape[2:]) >= (3 if x.is_contiguous() else 4)


def _channels_last_on_the_cpu(grad_y: Tensor, x: Tensor, weight: Tensor, groups: int) -> bool:
    """oneDNN's weight gradient, the conversion counted: depthwise at 5×5 and 7×7 it takes 1.4 to 3.9 times as long in the
    contiguous layout, with four channels a group 1.1 times and more; depthwise at 3×3 the conversion takes what is gained."""
    if x.ndim != 4 or groups == 1:
        return False
    depthwise = groups == x.shape[1] == weight.shape[0]
    if depthwise:
        return min(weight.shape[2:]) >= 5 and grad_y.shape[2] * grad_y.shape[3] >= 7 * 7
    return x.is_contiguous() and 1 < weight.shape[1] <= 4


def _map_on_the_cpu(grad_y: Tensor, x: Tensor, weight: Tensor, groups: int) -> bool:
    """Many channels on small maps at stride 1: 1.2 to 1.6 times faster at 7×7, level or a little faster at 14×14; slower with a
    stride."""
    if x.ndim != 4 or groups > 1 or min(weight.shape[:2]) < 256 or not 1 < min(weight.shape[2:]) <= max(weight.shape[2:]) <= 3:
        return False
    return x.shape[2:] == grad_y.shape[2:] and grad_y.shape[2] * grad_y.shape[3] <= 14 * 14


RULES = {
    "cpu": Rules(
        always,
        _phases_on_the_cpu,
        _channels_last_on_the_cpu,
        _map_on_the_cpu,
        "benchmarks/results/amd-epyc-2-cores/convolution_choice.json",
    ),
    # Safe without a measurement: `second` runs what a plain step of the same layer runs, its forward and its weight gradient at
    # the layer's own shapes, for which cuDNN is tuned, so it costs at most those two. PyTorch's runs a forward convolution whose
    # kernel is the whole map, and one such per group: a depthwise layer of 384 channels is 384 of them, 384 launches at least.
    # The other three replace a library's kernel by more traffic, which only a measurement can justify.
    "cuda": Rules(always, never, never, never, "unverified on any GPU: an argument, not a measurement"),
}
_UNKNOWN = Rules(never, never, never, never, "no measurement, no argument: PyTorch's own")


def rules_of(device: torch.device) -> Rules:
    """The row of this device's type; PyTorch's own ways where there is none."""
    return RULES.get(device.type, _UNKNOWN)
