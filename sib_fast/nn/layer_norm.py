"""LayerNorm and GroupNorm whose double backward is fused: drop-in for torch.nn's, same parameters and state_dict."""

from __future__ import annotations

from torch import Tensor, nn

from sib_fast._backends import REFERENCE, automatic
from sib_fast.nn._autocast import widened
from sib_fast.nn._torchs_own import Layer
from sib_fast.ops.layer_norm import KERNELS, group_norm, layer_norm


def has_kernel(input: Tensor) -> bool:
    """Composed of plain operations, the reference is slower than what it would replace."""
    return automatic(input.device, KERNELS) != REFERENCE


class LayerNorm(Layer, nn.LayerNorm):
    """torch.nn.LayerNorm with a fused double backward; PyTorch's own where there is no kernel. Source: SPEC 10.

    Shapes: [*, *normalized_shape].
    """

    def _fast(self, input: Tensor) -> Tensor:
        return self._normalised(input) if has_kernel(input) else self._torchs_own(input)

    def _normalised(self, input: Tensor) -> Tensor:
        return layer_norm(widened(input), self.normalized_shape, self.weight, self.bias, eps=self.eps)


class GroupNorm(Layer, nn.GroupNorm):
    """torch.nn.GroupNorm with a fused double backward; PyTorch's own where there is no kernel, and for one value per group.

    Shapes: [N, C, *]. Source: SPEC 10.
    """

    def _fast(self, input: Tensor) -> Tensor:
        if not has_kernel(input) or input.numel() <= input.shape[0] * self.num_groups:
            return self._torchs_own(input)
        return group_norm(widened(input), self.num_groups, self.weight, self.bias, eps=self.eps)
