"""A deep copy of a model as it stands, whatever it keeps of earlier forward passes and of the process it lives in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Model = TypeVar("_Model", bound=nn.Module)


class _WithoutGraphs(TorchFunctionMode):
    """PyTorch refuses to copy a tensor that is in a graph: a kept feature map, an old-style weight norm's weight. Numbers do."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copy_of(model: _Model, instead: dict[int, Any] | None = None) -> _Model:
    """copy.deepcopy(model), where tensors leave their graphs and what cannot be copied is shared: locks, files, process groups.

    instead: what stands in the copy for an object of this id, as deepcopy's memo.
    """
    with _WithoutGraphs():
        try:
            return copy.deepcopy(model, dict(instead or {}))
        except Exception:
            return copy.deepcopy(model, _uncopyable(model) | (instead or {}))


def _uncopyable(model: nn.Module) -> dict[int, Any]:
    """By their ids, the attributes and hooks of the model's modules that deepcopy fails at."""
    modules = list(model.modules())
    # No part of an attribute: whatever refers to a module is judged by itself.
    known = {id(part): part for m in modules for part in (m, *m._parameters.values(), *m._buffers.values())}
    found = {}
    for module in modules:
        for attribute in vars(module).values():
            for value in attribute.values() if isinstance(attribute, dict) else (attribute,):
                try:
                    copy.deepcopy(value, dict(known))
                except Exception:
                    found[id(value)] = value
    return found
