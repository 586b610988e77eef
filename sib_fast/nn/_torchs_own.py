"""The base of every fast layer: when PyTorch's own forward runs, decided here and nowhere else.

It runs where a fast layer could not be right, or would put into a file what only this package can run: under `torch.func` and
forward-mode AD (`sib_fast._transforms`), and while a model is traced, scripted or exported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sib_fast._transforms import transformed


def torchs_own_runs() -> bool:
    """Under a transform, or traced or exported. Every part of it is a constant to dynamo: no node in the graph."""
    # The flag and not torch.compiler.is_exporting(), which dynamo of torch 2.11 takes for true in every compiled region.
    return transformed() or torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def fx_call(layer: Layer, proxy: Proxy, *arguments: Any) -> Any:
    """A layer's call in an FX graph: a leaf, as FX makes of torch.nn's layers by itself; the root is traced."""
    tracer = proxy.tracer
    if layer is tracer.root:
        return layer._torchs_own(*arguments)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})


class _TakenOverBy:
    """In the place of an attribute by which a tool marks the modules it takes over, and then looks for torch.nn's classes."""

    def __init__(self, tool: str) -> None:
        self.tool = tool

    def __get__(self, layer: nn.Module | None, kind: type) -> Any:
        if layer is None:
            return self
        raise AttributeError(self.tool)  # as if there were none

    def __set__(self, layer: nn.Module, value: Any) -> None:
        raise RuntimeError(
            f"prepare: {type(layer).__name__} must be PyTorch's own for {self.tool}, got sib_fast.nn's, which it would leave out "
            "without a word. Call sib_fast.restore(model) first"
        )


class Layer:
    """Goes before the class of torch.nn in a fast layer's bases. `_fast` is the layer's forward, `_torchs_own` PyTorch's."""

    qconfig = _TakenOverBy("torch.ao.quantization")
    _backpack_extend = _TakenOverBy("BackPACK")
    _torchs_own: Callable[..., Any]
    _fast: Callable[..., Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        plain = (base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Layer))
        forward = next(plain, nn.Module).forward
        # No call of super(), which torch.jit.script does not know; it compiles a method under its function's name, one each.
        own = FunctionType(forward.__code__, forward.__globals__, "_torchs_own", forward.__defaults__, forward.__closure__)
        cls._torchs_own = update_wrapper(own, forward, assigned=("__annotations__", "__kwdefaults__", "__module__"))

    def forward(self, input: Tensor):  # without a result type: MaxPool2d's may be a pair
        if torch.jit.is_scripting():
            return self._torchs_own(input)
        else:  # noqa: RET505  the compiler of torch.jit.script leaves this branch out, and reads what stands after the if
            if isinstance(input, Proxy):
                return fx_call(self, input, input)
            return self._torchs_own(input) if torchs_own_runs() else self._fast(input)
