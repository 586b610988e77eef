"""The two-part rule of SPEC 7: ranks fixed, a kernel is no further from float64 than float32 autograd is."""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast.ops.foreground_mask import MaskOptions, rank_window_length, reference


def assert_no_worse_than(
    got: Tensor, low: Tensor, exact: Tensor, *, factor: float = 1.5, floor: float = 8.0, what: str = ""
) -> None:
    """‖got − exact‖ <= factor·‖low − exact‖ + floor·eps·‖exact‖ (relative L2), and got has no unwritten element.

    got: the kernel. low: plain autograd in the same precision. exact: plain autograd in float64. eps: of low's dtype.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)} != {list(exact.shape)}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    eps = torch.finfo(low.dtype).eps
    got, low, exact = got.double(), low.double(), exact.double()
    error, allowed = (got - exact).norm(), factor * (low - exact).norm() + floor * eps * exact.norm()
    # Where the truth is 0 by cancellation the reference's own result says what rounding leaves.
    assert error <= allowed, f"{what}: error {error:.3e} > allowed {allowed:.3e} (|exact| {exact.norm():.3e})"


def exact_orders(vjp: Tensor, options: MaskOptions) -> tuple[Tensor, Tensor]:
    """Ascending orders [N, P] of g and of d in the float64 run: ranks that both sides of a comparison are given."""
    wide = vjp.double()
    order_g = wide.mean(dim=1).flatten(1).abs().argsort(dim=1, stable=True)
    d = box_of_gate(wide, options)
    return order_g, d.flatten(1).argsort(dim=1, stable=True)


def box_of_gate(vjp: Tensor, options: MaskOptions) -> Tensor:
    """d of SPEC 3, [N, 1, H, W], by the reference's own steps."""
    images, _, height, width = vjp.shape
    g = vjp.mean(dim=1).flatten(1).abs()
    lo, hi, gate = (reference.soft_quantile(g, q, options.temperature) for q in options.quantiles[:3])
    e = (g - gate[:, None]) / (torch.relu(hi - lo) + options.eps)[:, None]
    h = torch.sigmoid(options.slope * e).view(images, 1, height, width)
    return torch.nn.functional.avg_pool2d(
        h, options.window_size, stride=1, padding=options.window_size // 2, count_include_pad=True
    )


def rank_pixels_of(orders: tuple[Tensor, Tensor], options: MaskOptions, dtype: torch.dtype) -> Tensor:
    """Windows int32 [N, 4, L] of two full orders, as the kernels take them; -1 outside the ranks 0 … P-1."""
    pixels = orders[0].shape[1]
    length = rank_window_length(options.temperature, pixels, dtype)
    offsets = torch.arange(length) - (length - 1) // 2
    windows = []
    for level, quantile in enumerate(options.quantiles):
        order = orders[0] if level < 3 else orders[1]
        ranks = int(quantile * (pixels - 1)) + offsets
        inside = (ranks >= 0) & (ranks < pixels)
        windows.append(torch.where(inside, order[:, ranks.clamp(0, pixels - 1)], -1))
    return torch.stack(windows, dim=1).to(torch.int32)
