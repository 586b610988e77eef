"""The foreground mask as SPEC 3 writes it: sorts, soft quantiles, a box mean and two sigmoids, in plain autograd.

Every order of derivative exists. Kernels are tested against this; it never passes through the autograd.Function.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from sib_fast import _checks


def soft_quantile(values: Tensor, level: float, temperature: float, order: Tensor | None = None) -> Tensor:
    """Q_q(v) = Σ_k w_k v_(k) with w_k = softmax_k(-|k - q(P-1)|/τ), over rows.

    Shapes:  values [N, P] -> [N]; order int64 [N, P], a permutation to use in place of the stable ascending sort.
    """
    pixels = values.shape[1]
    position = level * (pixels - 1)
    ranks = torch.arange(pixels, dtype=torch.float64, device=_checks.float64_device(values.device))
    weights = torch.softmax(-(ranks - position).abs() / temperature, dim=0).to(values.dtype).to(values.device)
    if order is None:
        order = values.argsort(dim=1, stable=True)
    ascending = values.gather(1, order)
    nearest = ascending[:, floor(position + 0.5), None]
    # About the value at the nearest rank: exact on ties, where the plain sum leaves rounding that 1/r would blow up.
    return (nearest + ((ascending - nearest) * weights).sum(dim=1, keepdim=True)).squeeze(1)


def foreground_mask(
    vjp: Tensor,
    *,
    window_size: int,
    temperature: float,
    slope: float,
    quantiles: Sequence[float],
    eps: float,
    orders: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """M = σ(slope·(d - Q(d))), d the box mean of σ(slope·(g - Q(g))/r), g = |mean_c R|.

    Shapes:  vjp [N, C, H, W] -> mask [N, 1, H, W], float64 for float64 and float32 otherwise.
             orders: two int64 [N, P], the ascending orders of g and of d to use in place of their own.
    """
    images, _, height, width = vjp.shape
    low, high, gate_level, area_level = quantiles
    order_g, order_d = orders if orders is not None else (None, None)
    compute = torch.float64 if vjp.dtype == torch.float64 else torch.float32

    g = vjp.to(compute).mean(dim=1).flatten(1).abs()
    if order_g is None:
        order_g = g.argsort(dim=1, stable=True)
    lo = soft_quantile(g, low, temperature, order_g)
    hi = soft_quantile(g, high, temperature, order_g)
    gate = soft_quantile(g, gate_level, temperature, order_g)
    r = F.relu(hi - lo) + eps
    e = (g - gate[:, None]) / r[:, None]
    h = torch.sigmoid(slope * e).view(images, 1, height, width)
    d = F.avg_pool2d(h, window_size, stride=1, padding=window_size // 2, count_include_pad=True)
    t = soft_quantile(d.flatten(1), area_level, temperature, order_d)
    return torch.sigmoid(slope * (d - t[:, None, None, None]))
