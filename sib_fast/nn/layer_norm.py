"""LayerNorm and GroupNorm whose double backward is fused: drop-in for torch.nn's, same parameters and state_dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast._backends import REFERENCE, automatic
from sib_fast.nn._autocast import widened
from sib_fast.nn._torchs_own import Layer
from sib_fast.ops import layer_norm as ops


def _has_kernel(input: Tensor) -> bool:
    """Composed of plain operations, the reference is slower than what it would replace."""
    return automatic(input.device, ops.KERNELS) != REFERENCE


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.nn.functional's, with a fused double backward where there is a kernel, and x is not nested."""
    if x.is_nested or not _has_kernel(x):
        return F.layer_norm(x, shape, weight, bias, eps)
    return ops.layer_norm(widened(x), shape, weight, bias, eps=eps)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch.nn.functional's, with a fused double backward where there is a kernel, and more than one value in a group."""
    if not _has_kernel(x) or x.numel() <= x.shape[0] * groups:
        return F.group_norm(x, groups, weight, bias, eps)
    return ops.group_norm(widened(x), groups, weight, bias, eps=eps)


class LayerNorm(Layer, nn.LayerNorm):
    """torch.nn.LayerNorm with a fused double backward; PyTorch's own where there is no kernel. Source: SPEC 10.

    Shapes: [*, *normalized_shape].
    """

    def _fast(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(Layer, nn.GroupNorm):
    """torch.nn.GroupNorm with a fused double backward; PyTorch's own where there is no kernel, and for one value per group.

    Shapes: [N, C, *]. Source: SPEC 10.
    """

    def _fast(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
