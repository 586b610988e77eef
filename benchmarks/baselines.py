"""The heads that are compared: from a VJP and an input to the two S-IB terms and the gradient of their sum.

naive   the authors' way, sib_fast.lab.naive: four full sorts, a w×w average pool, normalised copies, centring matrices
tuned   what a careful PyTorch user writes without kernels: one sort for three ranks, windows of ranks instead of all,
        separable pooling, centring without matrices. The honest peer: most of naive's time is one pooling kernel
ours    sib_fast's ops and default estimator, backend "auto"

All compute the same number: tests/test_benchmarks.py compares values and gradients in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sib_fast
from sib_fast.lab.naive import naive_foreground_mask, naive_hsic_biased

WINDOW, TEMPERATURE, SLOPE, EPS = 31, 0.1, 10.0, 1e-8


def _objective(foreground: Tensor, background: Tensor) -> Tensor:
    return 1000.0 * torch.exp(background) + 0.01 * torch.exp(-foreground)


def naive_head(vjp: Tensor, x: Tensor) -> Tensor:
    mask = naive_foreground_mask(vjp, WINDOW, TEMPERATURE, SLOPE, EPS)
    foreground = naive_hsic_biased((vjp * mask).flatten(1), (x * mask).flatten(1))
    return _objective(foreground, (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean())


def _windowed_quantile(ascending: Tensor, level: float) -> Tensor:
    position = level * (ascending.shape[1] - 1)
    first = max(0, int(position) - 3)
    last = min(ascending.shape[1], int(position) + 4)
    ranks = torch.arange(first, last, dtype=torch.float64)
    weights = torch.softmax(-(ranks - position).abs() / TEMPERATURE, 0).to(ascending.dtype)
    return (ascending[:, first:last] * weights).sum(1, keepdim=True)


def _tuned_mask(vjp: Tensor) -> Tensor:
    images, _, height, width = vjp.shape
    g = vjp.mean(1).abs().flatten(1)
    ascending = g.sort(dim=1).values
    lo, hi, gate = (_windowed_quantile(ascending, q) for q in (0.05, 0.95, 0.8))
    h = torch.sigmoid((g - gate) * (SLOPE / ((hi - lo).clamp_min(0) + EPS))).view(images, 1, height, width)
    half = WINDOW // 2
    d = F.avg_pool2d(h, (1, WINDOW), stride=1, padding=(0, half))
    d = F.avg_pool2d(d, (WINDOW, 1), stride=1, padding=(half, 0))
    t = _windowed_quantile(d.flatten(1).sort(dim=1).values, 0.8)
    return torch.sigmoid(SLOPE * (d - t.view(-1, 1, 1, 1)))


def tuned_head(vjp: Tensor, x: Tensor) -> Tensor:
    mask = _tuned_mask(vjp)
    a, b = (vjp * mask).flatten(1), (x * mask).flatten(1)
    k, el = F.normalize(a, dim=1), F.normalize(b, dim=1)
    k, el = k @ k.T, el @ el.T
    el = el - el.mean(0, keepdim=True) - el.mean(1, keepdim=True) + el.mean()
    foreground = (k * el).sum() / (vjp.shape[0] - 1) ** 2
    return _objective(foreground, (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean())


def our_head(vjp: Tensor, x: Tensor) -> Tensor:
    mask = sib_fast.foreground_mask(vjp, window_size=WINDOW, temperature=TEMPERATURE, slope=SLOPE, eps=EPS)
    statistics = sib_fast.region_statistics(vjp, x, mask)
    foreground = sib_fast.estimators.hsic_biased(statistics.gram_vjp, statistics.gram_x)
    return _objective(foreground, sib_fast.estimators.background.variance(statistics))


HEADS = {"naive": naive_head, "tuned": tuned_head, "ours": our_head}


def forward_and_backward(name: str, vjp: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value of the head and its gradient with respect to the VJP: what a training step asks of it."""
    leaf = vjp.detach().requires_grad_()
    value = HEADS[name](leaf, x)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def natural_inputs(images: int, channels: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A VJP of 1e-4, smooth at a few pixels, and an input. Random: zeros would hide work."""
    generator = torch.Generator().manual_seed(0)
    noise, x = (torch.randn(images, channels, size, size, generator=generator) for _ in range(2))
    return (1e-4 * F.avg_pool2d(noise, 3, stride=1, padding=1)).to(dtype), x.to(dtype)
