"""prepare and restore: give a model's layers their fast double backward, in place, and take it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from sib_fast.nn import activation
from sib_fast.nn._others import other_class
from sib_fast.nn.attention import MultiheadAttention
from sib_fast.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from sib_fast.nn.convolution import Conv1d, Conv2d, Conv3d
from sib_fast.nn.layer_norm import GroupNorm, LayerNorm
from sib_fast.nn.pooling import AvgPool2d, MaxPool2d

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LayerNorm: LayerNorm,
    nn.GroupNorm: GroupNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.ELU: activation.ELU,
    nn.GELU: activation.GELU,
    nn.Hardsigmoid: activation.Hardsigmoid,
    nn.Hardswish: activation.Hardswish,
    nn.Hardtanh: activation.Hardtanh,
    nn.LeakyReLU: activation.LeakyReLU,
    nn.Mish: activation.Mish,
    nn.ReLU: activation.ReLU,
    nn.ReLU6: activation.ReLU6,
    nn.Sigmoid: activation.Sigmoid,
    nn.SiLU: activation.SiLU,
    nn.Softplus: activation.Softplus,
    nn.Tanh: activation.Tanh,
}
_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
_PLAIN = {fast: plain for plain, fast in SWAPS.items()}
_Model = TypeVar("_Model", bound=nn.Module)


def fast_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """What `prepare` makes of a module of this very class; None where it leaves it alone: a subclass has a forward of its own."""
    return SWAPS.get(kind) or other_class(kind)


def plain_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that `prepare` made this one of, otherwise None."""
    return _PLAIN.get(kind) or vars(kind).get("plain")


def class_below(module: nn.Module) -> type[nn.Module]:
    """The module's class without those that torch.nn.utils.parametrize and FSDP2's fully_shard put in its place."""
    return _classes(module)[-1]


def _classes(module: nn.Module) -> list[type[nn.Module]]:
    """The module's class, and what it was made of, down to the one that somebody wrote."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nothing is sharded by it
    classes, parametrised = [type(module)], parametrize.is_parametrized(module)
    while True:
        bases = classes[-1].__bases__
        if fsdp is not None and len(bases) == 2 and issubclass(bases[0], fsdp.FSDPModule):
            classes.append(bases[1])
        elif parametrised:
            classes.append(bases[0])
            parametrised = False
        else:
            return classes


def _remade(classes: list[type[nn.Module]], base: type[nn.Module]) -> type[nn.Module]:
    """The first of `classes` on another base than the last: made again, as the class itself may serve other modules too."""
    for kind, below in reversed(list(pairwise(classes))):
        members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        base = type(kind.__name__, tuple(base if one is below else one for one in kind.__bases__), members)
    return base


def _swap(
    op: str, model: _Model, other_class: Callable[[type[nn.Module]], type[nn.Module] | None], recompute: bool = False
) -> _Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS):
            vars(module).pop("recompute", None)
        classes = _classes(module)
        other = other_class(classes[-1])
        if other is not None:
            module.__class__ = _remade(classes, other)
        if recompute and isinstance(module, _CONVOLUTIONS):
            module.recompute = True
    return model


def prepare(model: _Model, *, recompute: bool = False, only: Iterable[type[nn.Module]] | None = None) -> _Model:
    """Swaps every torch.nn layer that `sib_fast.nn` has under the same name, in place. Returns the same model.

    The modules stay the same objects: parameters, buffers, state_dict, hooks and references to them are untouched. Works
    before or after DDP, FSDP2, `SIBLoss.attach` and torch.nn.utils.parametrize. Pays for any loss on an input gradient, not
    only S-IB; without a second derivative it gains nothing. Under torch.func and forward-mode AD, and while the model is
    traced, scripted or exported, the layers run PyTorch's own forward. Subclasses and other packages' layers are left alone, but
    for timm's BatchNormAct2d, SyncBatchNormAct, GELU and GELUTanh. So are calls of torch.nn.functional, but for three: a module
    of any class whose forward calls F.layer_norm, F.group_norm or F.scaled_dot_product_attention, with F imported as usual,
    keeps its forward and gets functions with a fast second derivative (of attention: one at all).

    Args:    recompute: the graph of the VJP keeps one activation a convolution less where batch norm follows it, and calculates
             it again in the final backward pass: about half of what an S-IB step of a ResNet holds beyond a plain one, for one
             more pass of each batch norm's gradient; equal bits (docs/step.md). only: swap layers of these classes alone, for
             example (nn.Conv2d,); default all.
    Errors:  TypeError if model is no module, ValueError if `only` names a class that has no fast layer.
    """
    chosen = None if only is None else set(only)
    for kind in chosen or ():
        if fast_class(kind) is None:
            raise ValueError(f"prepare: only must hold classes that sib_fast.nn has a layer for, got {kind.__name__}")
    return _swap("prepare", model, lambda kind: fast_class(kind) if chosen is None or kind in chosen else None, recompute)


def restore(model: _Model) -> _Model:
    """Undoes `prepare`, in place. Returns the same model. Errors: TypeError if model is no module."""
    return _swap("restore", model, plain_class)
