"""LayerNorm and GroupNorm whose double backward is fused: drop-in for torch.nn's, same parameters and state_dict."""

from __future__ import annotations

import functools
import importlib

from torch import Tensor, nn

from sib_fast._backends import REFERENCE, automatic
from sib_fast.nn._autocast import widened
from sib_fast.nn._torchs_own import Layer
from sib_fast.ops.layer_norm import KERNELS, group_norm, layer_norm


def _has_kernel(input: Tensor) -> bool:
    """Composed of plain operations, the reference is slower than what it would replace."""
    return automatic(input.device, KERNELS) != REFERENCE


class LayerNorm(Layer, nn.LayerNorm):
    """torch.nn.LayerNorm with a fused double backward; PyTorch's own where there is no kernel. Source: SPEC 10.

    Shapes: [*, *normalized_shape].
    """

    def _fast(self, input: Tensor) -> Tensor:
        return self._normalised(input) if _has_kernel(input) else self._torchs_own(input)

    def _normalised(self, input: Tensor) -> Tensor:
        return layer_norm(widened(input), self.normalized_shape, self.weight, self.bias, eps=self.eps)


class _OtherLayerNorm(LayerNorm):
    """Before another package's subclass of torch.nn.LayerNorm: the same numbers by the fused op. timm's own fast path stays."""

    def _fast(self, input: Tensor) -> Tensor:
        if not _has_kernel(input) or getattr(self, "_fast_norm", False):
            return self._torchs_own(input)
        return self._normalised(input)


class _OtherLayerNorm2d(_OtherLayerNorm):
    """Layer norm over the channels of a map [N, C, H, W], by its channels last view."""

    def _normalised(self, input: Tensor) -> Tensor:
        return super()._normalised(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Subclasses with a forward of their own that was read and is known: (module, name) of the class -> what goes before it.
_OTHERS = {
    ("torchvision.models.convnext", "LayerNorm2d"): _OtherLayerNorm2d,
    ("timm.layers.norm", "LayerNorm"): _OtherLayerNorm,
    ("timm.layers.norm", "LayerNorm2d"): _OtherLayerNorm2d,
}


@functools.cache
def other_layer_norm(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The fast class for another package's layer norm, a subclass of it that holds it as `plain`; None for any other class."""
    fast = _OTHERS.get((kind.__module__, kind.__name__))
    if fast is None:
        return None
    name = f"{kind.__module__.replace('.', '_')}_{kind.__name__}"
    return type(name, (fast, kind), {"__module__": __name__, "__doc__": kind.__doc__, "plain": kind})


def __getattr__(name: str) -> type[nn.Module]:
    """By this a pickled model finds the classes that are made on demand."""
    for module, kind in _OTHERS:
        if name == f"{module.replace('.', '_')}_{kind}":
            return other_layer_norm(getattr(importlib.import_module(module), kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class GroupNorm(Layer, nn.GroupNorm):
    """torch.nn.GroupNorm with a fused double backward; PyTorch's own where there is no kernel, and for one value per group.

    Shapes: [N, C, *]. Source: SPEC 10.
    """

    def _fast(self, input: Tensor) -> Tensor:
        if not _has_kernel(input) or input.numel() <= input.shape[0] * self.num_groups:
            return self._torchs_own(input)
        return group_norm(widened(input), self.num_groups, self.weight, self.bias, eps=self.eps)
