"""Tensors that a graph calculates again instead of keeping: the node that made one says how.

A graph that will be differentiated keeps what its nodes saved. Where a node saves what the node before it made from tensors that
are saved anyway, keeping it buys one pass over memory with an activation. Held is that node, which the graph holds too: no
cycle, and what it saved is freed after this node has run, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_sib_fast_again"


def offer(ctx: Any, calculate: Callable[[Any], Tensor]) -> None:
    """Says that calculate(ctx), from ctx.saved_tensors alone, is this node's first result, to the bit."""
    setattr(ctx, _ATTRIBUTE, calculate)


def calculation_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """What calculates this tensor again; None where the node that made it does not offer that, or none did."""
    node = tensor.grad_fn
    calculate = getattr(node, _ATTRIBUTE, None) if tensor.output_nr == 0 else None
    return None if calculate is None else partial(calculate, node)
