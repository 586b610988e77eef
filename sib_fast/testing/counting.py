"""What a step asks of the machine, seen where PyTorch dispatches it: every op with its shapes, and who is still alive after."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OpLog(TorchDispatchMode):
    """Records, in order, the name of every op and the shapes of its tensor arguments; and weakly every storage it returned.

    ops: [(name, shapes)]. calls: [(name, arguments that are no tensors)]. Storages are held weakly: recording keeps none alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, tuple]] = []
        self.calls: list[tuple[str, tuple]] = []
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A 0-d tensor's shape is (), as a list of one: told apart from no tensor at all by its rank only where it matters.
        self.ops.append((str(func), tuple(tuple(t.shape) for t in tensors if t.ndim)))
        self.calls.append((str(func), tuple(a for a in args if not isinstance(a, Tensor))))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._storages[id(storage)] = weakref.ref(storage)
        return out

    def alive(self, at_least: int) -> list[torch.UntypedStorage]:
        """The recorded storages of so many bytes that something still holds."""
        held = [reference() for reference in self._storages.values()]
        return [storage for storage in held if storage is not None and storage.nbytes() >= at_least]
