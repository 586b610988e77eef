"""Where evidence is read: the last feature map before pooling, found in the graph of the logits, and what lies above it.

Only the graph is looked at, once per network. What it does not know counts as non-linear.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from sib_fast.network_checks import nodes_of

# Cells a side below which a map says little of where.
ENOUGH_CELLS = 7


class Candidate(NamedTuple):
    """A module that ran, and the [N, C, H, W] tensor that it returned."""

    name: str
    module: nn.Module
    output: Tensor


# Prefixes of autograd nodes' names. A map goes through these as it is, or is averaged: no cell, no channel gets another weight.
_KEEPS = (
    "AdaptiveAvgPool",
    "Alias",
    "AsStrided",
    "AvgPool",
    "Clone",
    "Contiguous",
    "Expand",
    "Flatten",
    "Mean",
    "MkldnnReshape",
    "NativeDropout",
    "Permute",
    "ReshapeAlias",
    "SelectBackward",
    "Slice",
    "Squeeze",
    "Sum",
    "Transpose",
    "TBackward",
    "ToCopy",
    "Unsqueeze",
    "UnsafeView",
    "View",
    "_DDPSink",
    "GeneratedBackwardFor_sib_fast_pooling_average",
)
# Linear whatever they are given.
_LINEAR = (
    *_KEEPS,
    "Add",
    "Cat",
    "ConstantPad",
    "FeatureDropout",
    "FftC2R",
    "FusedDropout",
    "Gather",
    "Index",
    "MaskedFill",
    "Narrow",
    "Neg",
    "PixelShuffle",
    "PixelUnshuffle",
    "ReflectionPad",
    "Repeat",
    "ReplicationPad",
    "Roll",
    "Rsub",
    "Split",
    "Stack",
    "Sub",
    "Unbind",
    "Unfold",
    "Upsample",
    # An op in place on a view, as Dropout(inplace=True) behind a flatten; which op it was is not shown.
    "CopySlices",
)
# Linear where only one of their tensors comes from the map.
_BILINEAR = (
    "Addbmm",
    "Addmm",
    "Addmv",
    "Baddbmm",
    "Bmm",
    "Convolution",
    "Dot",
    "Linear",
    "Mkldnn",
    "Mm",
    "Mul",
    "Mv",
    "ThnnConv",
    "GeneratedBackwardFor_sib_fast_convolution_forward",
)
_RUNNING_NORM = ("GeneratedBackwardFor_sib_fast_running_batch_norm_forward",)
_BATCH_NORM = (
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "MiopenBatchNorm",
    "BatchNormBackward",
    "SyncBatchNorm",
    "GeneratedBackwardFor_sib_fast__batch_norm",
    "GeneratedBackwardFor_sib_fast_synchronised_batch_norm",
)
_LAYER_NORM = ("NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "GeneratedBackwardFor_sib_fast__layer_norm")
_ATTENTION = (
    "Softmax",
    "SafeSoftmax",
    "ScaledDotProduct",
    "GeneratedBackwardFor_sib_fast_softmax",
    "GeneratedBackwardFor_sib_fast_attention",
)
_AVERAGES = ("AdaptiveAvgPool", "AvgPool", "Mean", "Sum", "GeneratedBackwardFor_sib_fast_pooling_average")
_POOLS = (*_AVERAGES, "AdaptiveMaxPool", "MaxPool", "Amax", "Max", "GeneratedBackwardFor_sib_fast_pooling")


def _is(node: Node, prefixes: tuple[str, ...]) -> bool:
    name = node.name().rpartition("::")[2]
    return name.startswith(prefixes) or name.removeprefix("_").startswith(prefixes)


def _node_of(tensor: Tensor) -> Node:
    return torch.autograd.graph.get_gradient_edge(tensor).node


def _inputs(node: Node) -> list[Node]:
    return [below for below, _ in node.next_functions if below is not None]


def _between(root: Node, target: Node) -> list[Node]:
    """The nodes on the paths from root down to target, root included and target not; none where there is no path."""
    leads: dict[Node, bool] = {target: True}
    stack = [root]
    while stack:
        node = stack[-1]
        if node in leads:
            stack.pop()
            continue
        below = _inputs(node)
        unknown = [n for n in below if n not in leads]
        if unknown:
            stack.extend(unknown)
        else:
            leads[node] = any(leads[n] for n in below)
            stack.pop()
    return [node for node, on_path in leads.items() if on_path and node is not target]


def _normalises_by_the_batch(node: Node) -> bool:
    # Statistics of its own batch; PyTorch's node is the same in eval mode, which is linear, and says which.
    return _is(node, _BATCH_NORM) and not _is(node, _RUNNING_NORM) and getattr(node, "_saved_training", True) is not False


def _non_linear(path: Sequence[Node], target: Node) -> Node | None:
    """A node among these that is not linear in the target, where there is one."""
    from_target = {*path, target}
    for node in path:
        if _is(node, _LINEAR) or _is(node, _RUNNING_NORM) or (_is(node, _BATCH_NORM) and not _normalises_by_the_batch(node)):
            continue
        # A quotient's own tensors are its numerator and its denominator.
        sources = sum(below in from_target for below in _inputs(node))
        if sources == 1 and (_is(node, _BILINEAR) or (_is(node, ("Div",)) and node.next_functions[0][0] in from_target)):
            continue
        return node
    return None


def _reaches(node: Node, wanted: Callable[[Node], bool], through: tuple[str, ...]) -> Node | None:
    """The first node that `wanted` holds for, going down from a node through nodes of these names only."""
    stack, seen = list(_inputs(node)), set()
    while stack:
        below = stack.pop()
        if wanted(below):
            return below
        if below not in seen and _is(below, through):
            seen.add(below)
            stack.extend(_inputs(below))
    return None


def last_map(op: str, logits: Tensor, candidates: Iterable[Candidate]) -> Candidate:
    """The last of these before pooling that the logits are made of, the outermost module of those that returned one tensor.

    Errors: RuntimeError where there is none, or where evidence at it would be zero, constant or of tokens by construction.
    """
    if logits.grad_fn is None:
        raise RuntimeError(
            f"{op}: logits must have a graph, got logits that do not require grad: run the forward pass with grad enabled"
        )
    reached = set(nodes_of(logits.grad_fn))
    maps = [c for c in candidates if c.output.shape[0] == logits.shape[0] and _node_of(c.output) in reached]
    wide = next((c for c in reversed(maps) if _cells(c) > 1 and not _is_pooled(c)), None)
    # A last stage that shrank to one cell is the place too, and is refused with what a larger input would give; what a pooling
    # made one cell of is behind it.
    chosen = next((c for c in reversed(maps) if c is wide or (_cells(c) == 1 and not _was_pooled(c, wide))), None)
    if chosen is None:
        raise RuntimeError(
            f"{op}: the model must have a module, run once, that returns a [N, C, H, W] map from which the logits are made, got "
            "none (of layers under no_grad a graph shows nothing): name it with at=..., or pass features=... in the explicit form"
        )
    target = _node_of(chosen.output)
    tokens = next((node for node in _between(logits.grad_fn, target) if _is(node, _ATTENTION)), None)
    if tokens is not None:
        raise RuntimeError(
            f"{op}: the last map must not lie below attention, got {chosen.name!r} with {tokens.name()} above it: a vision "
            "transformer's patches are tokens from there on, and after the last attention only the class token is read, so that "
            "there is no evidence at a patch. Name a map with at=... and evidence='absolute'"
        )
    normalised = _reaches_from(target, lambda node: _is(node, _LAYER_NORM))
    if normalised is not None:
        raise RuntimeError(
            f"{op}: the last map must be one whose cells can be empty, got {chosen.name!r}, which {normalised.name()} has just "
            "made: every cell of it has the same size, as in Swin, and 0 does not mean that nothing is there. Name another map "
            "with at=..., or this one with evidence='absolute'"
        )
    return chosen


def _cells(candidate: Candidate) -> int:
    return math.prod(candidate.output.shape[2:])


def _reaches_from(target: Node, wanted: Callable[[Node], bool]) -> Node | None:
    return target if wanted(target) else (_reaches(target, wanted, _KEEPS) if _is(target, _KEEPS) else None)


def _is_pooled(candidate: Candidate) -> bool:
    # By its class too: of layers under no_grad the graph shows nothing.
    return isinstance(candidate.module, nn.AdaptiveAvgPool2d | nn.AvgPool2d) or _is(_node_of(candidate.output), _AVERAGES)


def _was_pooled(candidate: Candidate, wide: Candidate | None) -> bool:
    top, bottom = _node_of(candidate.output), None if wide is None else _node_of(wide.output)
    path = nodes_of(top) if bottom is None else [top, *_between(top, bottom)]
    return any(_is(node, _POOLS) for node in path if node is not bottom)


def check_place(
    op: str, logits: Tensor, features: Tensor, rectified: bool, name: str | None = None, image_size: tuple[int, int] | None = None
) -> None:
    """Raises RuntimeError or ValueError for a map at which evidence says nothing; warns of one with few cells.

    rectified: the form of the evidence, which counts nothing that speaks against a class.
    """
    where = "features" if name is None else f"the map at {name!r}"
    height, width = features.shape[2:]
    larger = f"; a larger image gives more ({_larger(image_size, (height, width))})" if image_size else ""
    if height * width == 1:
        raise ValueError(
            f"{op}: {where} must have more than one cell, got [{height}, {width}]: there is no place in it{larger}. Or name an "
            "earlier map with at=... and evidence='absolute'"
        )
    target = _node_of(features)
    path = _between(logits.grad_fn, target) if logits.grad_fn is not None else []
    if not path:
        raise RuntimeError(
            f"{op}: logits must be computed from {where}, got a graph that does not reach it: there is no evidence in it"
        )
    for node in path:
        if not (_normalises_by_the_batch(node) or _is(node, _LAYER_NORM)):
            continue
        if _reaches(node, lambda below: below is target, _KEEPS) is not None:
            kind = "batch norm in training mode" if _normalises_by_the_batch(node) else "a normalisation, as in ConvNeXt,"
            raise RuntimeError(
                f"{op}: {where} must not lie directly below a normalisation, got {kind} ({node.name()}) on it: the logits do not "
                "depend on the map's size, so that Σ R⊙A is 0 by construction, and what speaks for a class in one place speaks "
                "against it in another. Take the map behind the normalisation and its activation"
            )
    bent = _non_linear(path, target) if rectified else None
    if bent is not None:
        raise RuntimeError(
            f"{op}: evidence must not be 'rectified' at a map with non-linear layers above it, got {where} with {bent.name()} "
            "above it: evidence against a class is clipped to 0 there, so that a network satisfies the term by using the "
            "background in the negative, for free. Use evidence='absolute' (or 'squared'), or the last map before pooling"
        )
    if min(height, width) < ENOUGH_CELLS:
        warnings.warn(
            f"{op}: {where} has {height}×{width} cells, fewer than {ENOUGH_CELLS}×{ENOUGH_CELLS}, which says little of where"
            f"{larger}",
            stacklevel=4,
        )


def _larger(image_size: tuple[int, int], cells: tuple[int, int]) -> str:
    sides = [side * -(-ENOUGH_CELLS // n) if n < ENOUGH_CELLS else side for side, n in zip(image_size, cells, strict=True)]
    gives = [n * -(-ENOUGH_CELLS // n) if n < ENOUGH_CELLS else n for n in cells]
    return f"{sides[0]}×{sides[1]} pixels in the place of {image_size[0]}×{image_size[1]}: about {gives[0]}×{gives[1]} cells"
