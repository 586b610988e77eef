"""The mark on a tensor whose gradient only a VJP reads, so that a layer can leave it out of every other backward pass.

`SIBLoss.attach` differentiates with respect to a leaf of its own making. The final `loss.backward()` reaches that leaf too,
and PyTorch then computes the input gradient of the first layer for nobody: `loss.backward()` names no inputs, so the engine
cannot prune. On two CPU cores it was 3 % of a ResNet-18 step, three times the layer's weight gradient. A layer that sees the
mark on its input asks `wanted` in its backward and skips that product outside a VJP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_ATTRIBUTE = "_sib_fast_input_probe"


class InputProbe:
    """One leaf's mark. reading: a VJP with respect to it is being taken. On the tensor, not global: steps may run in threads."""

    __slots__ = ("reading",)

    def __init__(self) -> None:
        self.reading = False


def mark(leaf: Tensor) -> Tensor:
    """Marks a leaf and returns it. What reaches its `.grad` all the same is dropped at once."""
    setattr(leaf, _ATTRIBUTE, InputProbe())
    leaf.register_post_accumulate_grad_hook(_drop_gradient)
    return leaf


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None


def probe_of(tensor: Tensor) -> InputProbe | None:
    """The mark of a tensor, None for any other: what a layer keeps for its backward."""
    return getattr(tensor, _ATTRIBUTE, None)


def wanted(probe: InputProbe | None) -> bool:
    """Whether a layer must compute the gradient of an input with this mark now."""
    return probe is None or probe.reading


@contextmanager
def reading(tensor: Tensor) -> Iterator[None]:
    """Within it a VJP with respect to this tensor is taken; does nothing for a tensor without a mark."""
    probe = probe_of(tensor)
    if probe is None:
        yield
        return
    probe.reading = True
    try:
        yield
    finally:
        probe.reading = False
