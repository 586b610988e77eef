"""Region statistics as SPEC 4 writes them: masked copies, Gram matrices, variances, in plain autograd.

Every order of derivative exists. Kernels are tested against this; it never passes through the autograd.Function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks
from sib_fast.types import RegionStatistics


def region_statistics(vjp: Tensor, x: Tensor, mask: Tensor, *, background_grams: bool) -> RegionStatistics:
    """G_R = a aᵀ, G_x = b bᵀ with a = R·M, b = x·M; unbiased variance of v = R·(1-M) and of R, per image.

    Shapes:  vjp, x [N, C, H, W]; mask [N, 1, H, W]. Computed in float64 for float64 and float32 otherwise; the results
             are float64 [N, N] and [N], on the CPU where the device has no float64.
    """
    compute = torch.float64 if vjp.dtype == torch.float64 else torch.float32
    vjp, x, mask = vjp.to(compute), x.to(compute), mask.to(compute)
    a, b, v = (vjp * mask).flatten(1), (x * mask).flatten(1), (vjp * (1 - mask)).flatten(1)

    def gram(rows: Tensor) -> Tensor:
        return _checks.to_float64(rows @ rows.T)

    return RegionStatistics(
        gram_vjp=gram(a),
        gram_x=gram(b),
        background_variance=_checks.to_float64(v.var(dim=1, unbiased=True)),
        vjp_variance=_checks.to_float64(vjp.flatten(1).var(dim=1, unbiased=True)),
        background_gram_vjp=gram(v) if background_grams else None,
        background_gram_x=gram((x * (1 - mask)).flatten(1)) if background_grams else None,
    )
