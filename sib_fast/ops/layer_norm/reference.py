"""Layer norm and group norm, as on paper, in plain autograd: any order of derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = γ·(x − mean)/sqrt(variance + eps) + β over the last dimensions.

    Shapes:  x [*, *normalized_shape]; weight, bias normalized_shape or None -> y as x.
    """
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The same over the channels and pixels of a group of channels.

    Shapes:  x [N, C, *]; weight, bias [C] or None -> y as x.
    """
    rows = x.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(rows, dim=2, correction=0, keepdim=True)
    y = ((rows - mean) / (variance + eps).sqrt()).reshape(x.shape)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y
