"""Batch norm with batch statistics, as on paper, in plain autograd: any order of derivative."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ·(x − mean)/sqrt(variance + eps) + β over all dimensions but the second.

    Shapes:  x [N, C, *]; weight, bias [C] or None -> y as x; mean, biased variance [C].
    """
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    variance, mean = torch.var_mean(x, dim=dims, correction=0)
    y = (x - mean.view(shape)) / (variance + eps).sqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y, mean, variance
