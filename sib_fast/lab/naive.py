"""The S-IB head as one writes it first: the baseline that the table's third row times.

Plain PyTorch after the authors' script, step by step: four full sorts per image, a non-separable box filter, normalised
masks, explicit centring matrices. It shares no code with the package's ops, so it also checks them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_vjp(logits: Tensor, x: Tensor) -> Tensor:
    """R = d(1/2 sum ||softmax(logits)||^2)/dx, kept in the graph (SPEC 2). Shapes: [N, K], [N, C, H, W] -> as x."""
    energy = 0.5 * logits.softmax(dim=1).square().sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


def naive_soft_quantile(values: Tensor, level: float, temperature: float) -> Tensor:
    """Soft quantile of every row by a full sort (SPEC 3). Shapes: [N, P] -> [N, 1]."""
    count = values.shape[1]
    ranked = values.sort(dim=1, stable=True).values
    rank = torch.arange(count, dtype=values.dtype, device=values.device)
    weight = torch.softmax(-(rank - level * (count - 1)).abs() / temperature, dim=0)
    return (ranked * weight).sum(dim=1, keepdim=True)


def naive_foreground_mask(
    vjp: Tensor, window_size: int = 31, temperature: float = 0.1, slope: float = 10.0, eps: float = 1e-8
) -> Tensor:
    """Density mask of the VJP (SPEC 3). Shapes: [N, C, H, W] -> [N, 1, H, W] in (0, 1)."""
    n, _, height, width = vjp.shape
    magnitude = vjp.mean(dim=1).abs().flatten(1)
    low = naive_soft_quantile(magnitude, 0.05, temperature)
    high = naive_soft_quantile(magnitude, 0.95, temperature)
    normalised = (magnitude - low) / ((high - low).clamp(min=0) + eps)
    high_pixels = torch.sigmoid(slope * (normalised - naive_soft_quantile(normalised, 0.8, temperature)))
    density = F.avg_pool2d(
        high_pixels.view(n, 1, height, width), window_size, stride=1, padding=window_size // 2, count_include_pad=True
    )
    threshold = naive_soft_quantile(density.flatten(1), 0.8, temperature).view(n, 1, 1, 1)
    return torch.sigmoid(slope * (density - threshold))


def naive_hsic_biased(a: Tensor, b: Tensor) -> Tensor:
    """Biased linear-kernel HSIC of L2-normalised rows (SPEC 5). Shapes: [N, D], [N, D] -> []."""
    n = a.shape[0]
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    centring = torch.eye(n, dtype=a.dtype, device=a.device) - 1 / n
    return torch.trace(a @ a.T @ centring @ (b @ b.T) @ centring) / (n - 1) ** 2


def naive_sib_loss(
    logits: Tensor,
    target: Tensor,
    x: Tensor,
    *,
    lambda_fg: float = 0.01,
    lambda_bg: float = 1000.0,
    window_size: int = 31,
    temperature: float = 0.1,
    slope: float = 10.0,
    objective: str = "exp",
) -> Tensor:
    """Cross entropy plus the S-IB terms, with autograd for every derivative (SPEC 2-5).

    Args:
        objective: ``"exp"`` adds lambda_bg exp(bg) + lambda_fg exp(-fg), ``"expm1"`` lambda_bg expm1(bg) +
            lambda_fg expm1(-fg), ``"linear"`` lambda_bg bg - lambda_fg fg.

    Shapes:  logits [N, K]; target [N] int64; x [N, C, H, W], requiring grad and in the graph of logits -> [].
    Errors:  ValueError for an unknown objective.
    """
    vjp = naive_vjp(logits, x)
    mask = naive_foreground_mask(vjp, window_size, temperature, slope)
    image = x.detach()
    foreground = naive_hsic_biased((vjp * mask).flatten(1), (image * mask).flatten(1))
    background = (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean()
    base = F.cross_entropy(logits, target)
    if objective == "exp":
        return base + lambda_bg * background.exp() + lambda_fg * (-foreground).exp()
    if objective == "expm1":
        return base + lambda_bg * background.expm1() + lambda_fg * (-foreground).expm1()
    if objective == "linear":
        return base + lambda_bg * background - lambda_fg * foreground
    raise ValueError(f"naive_sib_loss: objective must be 'exp', 'expm1' or 'linear', got {objective!r}")
