"""Biased HSIC, background variance and objective as SPEC 5 writes them, in plain autograd.

Every order of derivative exists. Kernels are tested against this; it never passes through the autograd.Function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks

NORM_FLOOR = 1e-12  # of a row's norm, as in torch.nn.functional.normalize


def hsic_objective(
    base: Tensor,
    gram_vjp: Tensor,
    gram_x: Tensor,
    background_variance: Tensor,
    *,
    lambda_fg: float,
    lambda_bg: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """fg = tr(K_R Z K_x Z)/(N−1)², bg = mean_i Var(v_i), loss = objective(base, fg, bg).

    Shapes:  base []; gram_vjp, gram_x [N, N], background_variance [N] float64 -> loss, fg, bg [] in base's dtype.
    """
    kernel_vjp, kernel_x = normalised(gram_vjp), normalised(gram_x)
    foreground = (kernel_vjp * centred(kernel_x)).sum() / (gram_vjp.shape[0] - 1) ** 2
    background = background_variance.mean()
    wide = _checks.to_float64(base)
    if objective == "exp":
        loss = wide + lambda_bg * torch.exp(background) + lambda_fg * torch.exp(-foreground)
    elif objective == "expm1":
        loss = wide + lambda_bg * torch.expm1(background) + lambda_fg * torch.expm1(-foreground)
    else:
        loss = wide + lambda_bg * background - lambda_fg * foreground
    return tuple(term.to(base.dtype).to(base.device) for term in (loss, foreground, background))


def normalised(gram: Tensor) -> Tensor:
    """K = G/(n nᵀ), n = max(sqrt(diag G), 1e-12); a row at the floor has no gradient through its norm."""
    diagonal = gram.diagonal()
    alive = diagonal > NORM_FLOOR * NORM_FLOOR
    # sqrt is kept away from 0, where its own gradient is infinite.
    norm = torch.where(alive, torch.where(alive, diagonal, 1.0).sqrt(), NORM_FLOOR)
    return gram / (norm[:, None] * norm[None, :])


def centred(kernel: Tensor) -> Tensor:
    """Z K Z with Z = I − 11ᵀ/N."""
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()
