"""Layers that are not torch.nn's: those of other packages that `prepare` knows, each with a forward of its own that was read, and
whatever calls PyTorch's attention. Their fast classes are made on demand."""

from __future__ import annotations

import functools
import importlib
import sys
from types import FunctionType

import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast.nn import _functional
from sib_fast.nn._torchs_own import Layer
from sib_fast.nn.batch_norm import BatchNorm2d, SyncBatchNorm
from sib_fast.nn.layer_norm import LayerNorm, has_kernel
from sib_fast.ops.activation import activation


class _LayerNorm(LayerNorm):
    """Before a subclass of torch.nn.LayerNorm: the same numbers by the fused op. timm's own fast path stays."""

    def _fast(self, input: Tensor) -> Tensor:
        if not has_kernel(input) or getattr(self, "_fast_norm", False):
            return self._torchs_own(input)
        return self._normalised(input)


class _LayerNorm2d(_LayerNorm):
    """Layer norm over the channels of a map [N, C, H, W], by its channels last view."""

    def _normalised(self, input: Tensor) -> Tensor:
        return super()._normalised(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
    ("torchvision.models.convnext", "LayerNorm2d"): _LayerNorm2d,
    ("timm.layers.norm", "LayerNorm"): _LayerNorm,
    ("timm.layers.norm", "LayerNorm2d"): _LayerNorm2d,
    ("timm.layers.norm_act", "BatchNormAct2d"): _BatchNormAct2d,
    ("timm.layers.norm_act", "SyncBatchNormAct"): _SyncBatchNormAct,
    ("timm.layers.activations", "GELU"): _GELU,
    ("timm.layers.activations", "GELUTanh"): _GELUTanh,
}


def calls_attention(kind: type[nn.Module]) -> bool:
    """Whether the class's forward calls F.scaled_dot_product_attention, and the class can be found by its name."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or "scaled_dot_product_attention" not in forward.__code__.co_names:
        return False
    return forward.__globals__.get("F") is F and getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind


def _with_our_attention(forward: FunctionType) -> FunctionType:
    """The same code, so that whatever else it does stays as it is, with `_functional` in the place of torch.nn.functional."""
    # Without its module's name, by which dynamo would look for what is not there.
    names = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    code, defaults, closure = forward.__code__, forward.__defaults__, forward.__closure__
    own = FunctionType(code, names | {"F": _functional}, forward.__name__, defaults, closure)
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
    if calls_attention(kind):
        return type(kind.__name__, (kind,), members | {"forward": _with_our_attention(kind.forward)})
    return None


def __getattr__(name: str) -> type[nn.Module]:
    """By this a pickled model finds the classes that are made on demand."""
    module, _, kind = name.replace("/", ".").rpartition(".")
    fast = other_class(getattr(importlib.import_module(module), kind)) if module else None
    if fast is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fast
