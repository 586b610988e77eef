"""Other packages' layers that `prepare` knows: each has a forward of its own that was read, and a fast class made on demand."""

from __future__ import annotations

import functools
import importlib

from torch import Tensor, nn

from sib_fast.nn._torchs_own import Layer
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


# (module, name) of the class -> what goes before it.
_OTHERS: dict[tuple[str, str], type[Layer]] = {
    ("torchvision.models.convnext", "LayerNorm2d"): _LayerNorm2d,
    ("timm.layers.norm", "LayerNorm"): _LayerNorm,
    ("timm.layers.norm", "LayerNorm2d"): _LayerNorm2d,
    ("timm.layers.activations", "GELU"): _GELU,
    ("timm.layers.activations", "GELUTanh"): _GELUTanh,
}


@functools.cache
def other_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The fast class for another package's layer, a subclass of it that holds it as `plain`; None for any other class."""
    fast = _OTHERS.get((kind.__module__, kind.__name__))
    if fast is None:
        return None
    name = f"{kind.__module__.replace('.', '_')}_{kind.__name__}"
    return type(name, (fast, kind), {"__module__": __name__, "__doc__": kind.__doc__, "plain": kind})


def __getattr__(name: str) -> type[nn.Module]:
    """By this a pickled model finds the classes that are made on demand."""
    for module, kind in _OTHERS:
        if name == f"{module.replace('.', '_')}_{kind}":
            return other_class(getattr(importlib.import_module(module), kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
