"""The heads that are compared: from a VJP and an input to the S-IB loss of them and its gradient.

naive            the authors' way, sib_fast.lab.naive: four full sorts, a w×w average pool, normalised copies, centring matrices
tuned            what a careful PyTorch user writes without kernels: one sort for three ranks, windows of ranks instead of all,
                 separable pooling, centring without matrices. The honest peer: most of naive's time is one pooling kernel
naive_compiled, tuned_compiled   the same under torch.compile
ours             sib_fast's ops, backend "auto"; ours_<backend>[_<precision>] the same on one backend, in one product mode

All compute the same number: tests/test_benchmarks.py compares values and gradients in float64. Half-precision inputs are
widened to float32 by the baselines first, as the loss needs it (near 1001 bfloat16 has a spacing of 4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sib_fast
from sib_fast import _backends
from sib_fast.lab.naive import naive_foreground_mask, naive_hsic_biased

try:  # the N×N part in one op, where this version has it
    from sib_fast.ops.hsic_objective import hsic_objective
except ImportError:
    hsic_objective = None

Head = Callable[[Tensor, Tensor], Tensor]
LAMBDA_FG, LAMBDA_BG = 0.01, 1000.0
WINDOW, TEMPERATURE, SLOPE, EPS = 31, 0.1, 10.0, 1e-8


def _objective(foreground: Tensor, background: Tensor) -> Tensor:
    return LAMBDA_BG * torch.exp(background) + LAMBDA_FG * torch.exp(-foreground)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def naive_head(vjp: Tensor, x: Tensor) -> Tensor:
    vjp, x = _widened(vjp, x)
    mask = naive_foreground_mask(vjp, WINDOW, TEMPERATURE, SLOPE, EPS)
    foreground = naive_hsic_biased((vjp * mask).flatten(1), (x * mask).flatten(1))
    return _objective(foreground, (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean())


def _windowed_quantile(ascending: Tensor, level: float) -> Tensor:
    position = level * (ascending.shape[1] - 1)
    first = max(0, int(position) - 3)
    last = min(ascending.shape[1], int(position) + 4)
    ranks = torch.arange(first, last, dtype=torch.float64, device=ascending.device)
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
    vjp, x = _widened(vjp, x)
    mask = _tuned_mask(vjp)
    a, b = (vjp * mask).flatten(1), (x * mask).flatten(1)
    k, el = F.normalize(a, dim=1), F.normalize(b, dim=1)
    k, el = k @ k.T, el @ el.T
    el = el - el.mean(0, keepdim=True) - el.mean(1, keepdim=True) + el.mean()
    foreground = (k * el).sum() / (vjp.shape[0] - 1) ** 2
    return _objective(foreground, (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean())


def our_head(vjp: Tensor, x: Tensor, backend: str = "auto", precision: str | None = None) -> Tensor:
    """precision: of region_statistics' products on a GPU; None is the default that the op chooses."""
    mask = sib_fast.foreground_mask(
        vjp, window_size=WINDOW, temperature=TEMPERATURE, slope=SLOPE, eps=EPS, backend=backend
    )  # fmt: skip
    mode = {} if precision is None else {"precision": precision}
    statistics = sib_fast.region_statistics(vjp, x, mask, backend=backend, **mode)
    if hsic_objective is not None:
        base = torch.zeros((), dtype=torch.float64, device=vjp.device)
        options = {"lambda_fg": LAMBDA_FG, "lambda_bg": LAMBDA_BG, "objective": "exp", "backend": backend}
        return hsic_objective(base, statistics.gram_vjp, statistics.gram_x, statistics.background_variance, **options)[0]
    foreground = sib_fast.estimators.hsic_biased(statistics.gram_vjp, statistics.gram_x)
    return _objective(foreground, sib_fast.estimators.background.variance(statistics))


HEADS: dict[str, Head] = {"naive": naive_head, "tuned": tuned_head, "ours": our_head}


def usable_backends(device: torch.device) -> list[str]:
    """The kernel backends that run on `device` in this process."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return []
    return [name for name, where in _backends.KERNEL_DEVICES.items() if where == device.type and _backends.why_not(name) is None]


def heads_for(device: torch.device, *, compiled: bool = False, precisions: tuple[str, ...] = ()) -> dict[str, Head]:
    """Every head that runs on `device`: baselines, ours by "auto" and by each backend, in each product mode asked for."""
    heads: dict[str, Head] = {"naive": naive_head, "tuned": tuned_head}
    if compiled:  # static shapes: what a user who compiles for one batch size gets
        for name in list(heads):
            heads[f"{name}_compiled"] = torch.compile(heads[name], dynamic=False)
    heads["ours"] = our_head
    for backend in usable_backends(device):
        heads[f"ours_{backend}"] = _ours(backend, None)
        for precision in precisions:
            heads[f"ours_{backend}_{precision}"] = _ours(backend, precision)
    return heads


def _ours(backend: str, precision: str | None) -> Head:
    return lambda vjp, x: our_head(vjp, x, backend, precision)


def value_and_gradient(head: Head, vjp: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value of the head and its gradient with respect to the VJP: what a training step asks of it."""
    leaf = vjp.detach().requires_grad_()
    value = head(leaf, x)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def forward_and_backward(name: str, vjp: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_gradient(HEADS[name], vjp, x)


def natural_inputs(
    images: int, channels: int, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A VJP of 1e-4, smooth at a few pixels, and an input. Random: zeros would hide work."""
    generator = torch.Generator(device).manual_seed(0)
    noise, x = (torch.randn(images, channels, size, size, generator=generator, device=device) for _ in range(2))
    return (1e-4 * F.avg_pool2d(noise, 3, stride=1, padding=1)).to(dtype), x.to(dtype)
