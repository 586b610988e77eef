"""Layers that are not torch.nn's: those of other packages that `prepare` knows, each with a forward of its own that was read, and
whatever calls a function that `_functional` has. Their fast classes are made on demand."""

from __future__ import annotations

import dis
import functools
import importlib
import sys
from itertools import pairwise
from types import FunctionType

import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast.nn import _functional
from sib_fast.nn._torchs_own import Layer
from sib_fast.nn.batch_norm import BatchNorm2d, SyncBatchNorm
from sib_fast.ops.activation import activation


class _GELU(Layer):
    """Before timm's GELU, which is no subclass of torch.nn's and whose `inplace` does nothing."""

    _op_name = "gelu"

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, self._op_name)


class _GELUTanh(_GELU):
    _op_name = "gelu_tanh"


class _BatchNormAct(Layer):
    """timm's batch norm with dropout and activation behind it, which are modules of their own."""

    def _behind(self, y: Tensor) -> Tensor:
        return self.act(self.drop(y))


class _BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    pass


class _SyncBatchNormAct(_BatchNormAct, SyncBatchNorm):
    pass


# (module, name) of the class -> what goes before it.
_OTHERS: dict[tuple[str, str], type[Layer]] = {
    ("timm.layers.norm_act", "BatchNormAct2d"): _BatchNormAct2d,
    ("timm.layers.norm_act", "SyncBatchNormAct"): _SyncBatchNormAct,
    ("timm.layers.activations", "GELU"): _GELU,
    ("timm.layers.activations", "GELUTanh"): _GELUTanh,
}

_FUNCTIONS = ("group_norm", "layer_norm", "scaled_dot_product_attention")  # of `_functional`


def fast_calls(kind: type[nn.Module]) -> tuple[str, ...]:
    """Which of these the class's forward calls as F.…, whatever name the file has for torch.nn.functional.

    None where the class cannot be found by its name, as a pickled model must.
    """
    forward = kind.forward
    if not isinstance(forward, FunctionType) or getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return ()
    steps = pairwise(dis.get_instructions(forward))
    of_f = {b.argval for a, b in steps if a.opname == "LOAD_GLOBAL" and forward.__globals__.get(a.argval) is F}
    return tuple(name for name in _FUNCTIONS if name in of_f)


def _with_our_functions(forward: FunctionType) -> FunctionType:
    """The same code, so that whatever else it does stays as it is, with `_functional` in the place of torch.nn.functional."""
    # Without its module's name, by which dynamo would look for what is not there.
    names = {name: _functional if value is F else value for name, value in forward.__globals__.items() if name != "__name__"}
    code, defaults, closure = forward.__code__, forward.__defaults__, forward.__closure__
    own = FunctionType(code, names, forward.__name__, defaults, closure)
    return functools.update_wrapper(own, forward, assigned=("__annotations__", "__kwdefaults__", "__doc__"))


@functools.cache
def other_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The fast class for a layer that is not torch.nn's, a subclass of it that holds it as `plain`; None for any other class."""
    members = {
        "__module__": __name__,
        "__qualname__": f"{kind.__module__}.{kind.__qualname__}".replace(".", "/"),
        "__doc__": kind.__doc__,
        "plain": kind,
    }
    if fast := _OTHERS.get((kind.__module__, kind.__name__)):
        return type(kind.__name__, (fast, kind), members)
    if fast_calls(kind):
        return type(kind.__name__, (kind,), members | {"forward": _with_our_functions(kind.forward)})
    return None


def __getattr__(name: str) -> type[nn.Module]:
    """By this a pickled model finds the classes that are made on demand."""
    module, _, kind = name.replace("/", ".").rpartition(".")
    fast = other_class(getattr(importlib.import_module(module), kind)) if module else None
    if fast is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fast
