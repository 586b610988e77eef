"""Which gradients of a layer's inputs the backward pass that is running now needs: a layer asks, and computes no other.

`ctx.needs_input_grad` of a Python backward is fixed in forward. PyTorch's own C++ layers ask the engine instead, and so must
ours: `autograd.grad(logits, x)` needs no weight gradient, which is as much work as everything else that a convolution does.

The opposite waste is the final `loss.backward()`: it names no inputs, so the engine prunes nothing and reaches the leaf that
`SIBLoss.attach` or the user made for the VJP. PyTorch then computes the input gradient of the first layer for nobody (3 % of a
ResNet-18 step on a CPU, four times the layer's weight gradient). That leaf is marked, and needed only where it is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

_ATTRIBUTE = "_sib_fast_vjp_leaf"
# Casts and normalisation of the input, as autocast and models put before their first layer: one tensor in, one out.
_PASS_ON = ("ToCopyBackward", "SubBackward", "AddBackward", "MulBackward", "DivBackward", "AliasBackward", "CloneBackward")


def mark_vjp_leaf(leaf: Tensor) -> Tensor:
    """Marks a leaf whose gradient only a VJP reads, and returns it. What reaches its `.grad` all the same is dropped at once."""
    setattr(leaf, _ATTRIBUTE, True)
    leaf.register_post_accumulate_grad_hook(_drop_gradient)
    return leaf


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None


def needed(ctx: Any, tensor: int) -> bool:
    """Whether the running backward pass needs the gradient of a node's input. ctx: the node; tensor: counts its tensor inputs."""
    node = ctx.next_functions[tensor][0]
    if node is None:
        return False
    leaf = _marked_leaf(node)
    try:
        if leaf is not None and torch._C._will_engine_execute_node(leaf):
            return False  # a pass that names no inputs: the engine fills the leaf's .grad
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # It refuses to answer for a leaf that autograd.grad was asked for: needed.
        return True


def _marked_leaf(node: Node) -> Node | None:
    """The marked leaf that this node leads to and to nothing else, if there is one."""
    while node.name().startswith(_PASS_ON):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1:
            return None
        node = parents[0]
    return node if getattr(getattr(node, "variable", None), _ATTRIBUTE, False) else None
