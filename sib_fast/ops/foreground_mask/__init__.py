"""foreground_mask: from a vector-Jacobian product to a soft mask of where its density is (SPEC 3)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from sib_fast import _checks
from sib_fast._backends import REFERENCE, resolve
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._registration import register_head_op
from sib_fast.ops.foreground_mask import reference

_OP = "foreground_mask"
# In the order in which "auto" asks: CUDA C++ before Triton until a measurement says otherwise.
KERNELS = ["cpu", "cuda", "triton"]
_LEVELS = 4  # lo, hi, gate (of g), area (of d)


class Limits(NamedTuple):
    """What the kernels of a backend take: an explicit request for more is refused, "auto" asks the next backend."""

    window: int  # entries of a rank window
    width: int  # pixels of a row


LIMITS = {"cuda": Limits(window=32, width=12288), "triton": Limits(window=256, width=1 << 31)}


class MaskOptions(NamedTuple):
    """The op's settings, in the order of the registered schemas."""

    window_size: int
    temperature: float
    slope: float
    quantiles: tuple[float, float, float, float]
    eps: float


def foreground_mask(
    vjp: Tensor,
    *,
    window_size: int = 31,
    temperature: float = 0.1,
    slope: float = 10.0,
    quantiles: Sequence[float] = (0.05, 0.95, 0.8, 0.8),
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """Soft mask of the region where the VJP is dense, differentiable once in `vjp` (with backend="reference": any order).

    A pixel counts by how far |mean over channels of vjp| lies above its image's `quantiles[2]` level, in units of the
    range between levels `quantiles[0]` and `quantiles[1]`; the counts are averaged over a window, and the mask is high
    where that average exceeds its own `quantiles[3]` level.

    Shapes:  vjp [N, C, H, W] float64, float32, bfloat16 or float16, any strides -> mask [N, 1, H, W] in (0, 1), float64
             for float64 and float32 for all others. Any N, C, H, W >= 1.
    Args:    window_size: odd width of the averaging window, zero padding that counts. temperature: of the soft quantiles,
             in ranks. slope: of both sigmoids. quantiles: (lo, hi, gate, area). eps: added to the value range.
             backend: "auto" or one of `sib_fast.BACKENDS`.
    Scale:   per image; multiplying an image's vjp by a positive number leaves its mask unchanged (up to eps).
    Errors:  TypeError, ValueError for bad arguments, and for a backend whose kernels do not take so wide a map or so high a
             temperature; RuntimeError for a backend that is not usable; NotImplementedError when a kernel's gradient is
             differentiated again.
    Source:  arXiv 2511.09239, differentiable adaptive mask; the authors' script; SPEC 3 and 6.
    """
    _checks.require_map(_OP, "vjp", vjp)
    _checks.require_window(_OP, window_size)
    _checks.require_positive(_OP, "temperature", temperature)
    _checks.require_positive(_OP, "slope", slope)
    _checks.require_positive(_OP, "eps", eps)
    levels = _checks.require_quantiles(_OP, quantiles)
    options = MaskOptions(window_size, float(temperature), float(slope), levels, float(eps))
    chosen = _chosen(vjp, options, backend)
    if chosen == REFERENCE:
        with torch.autocast(vjp.device.type, enabled=False):
            return reference.foreground_mask(vjp, **options._asdict())
    refuse_transforms(_OP)
    return _ForegroundMask.apply(vjp, None, options, chosen)


def mask_with_ranks(vjp: Tensor, rank_pixels: Tensor | None, options: MaskOptions, backend: str) -> Tensor:
    """The kernel's mask with the pixels of all ranks given: one rank flip moves a whole window, so tests fix them (SPEC 7).

    Shapes:  rank_pixels int32 [N, 4, rank_window_length], -1 where a window leaves the ranks 0 … P-1.
    """
    return _ForegroundMask.apply(vjp, rank_pixels, options, _chosen(vjp, options, backend))


def selected_ranks(vjp: Tensor, options: MaskOptions, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel selects, for tests: mean_map [N, H, W], levels [N, 4], rank_pixels int32 [N, 4, L]."""
    return _FORWARD[_chosen(vjp, options, backend)](vjp.detach(), None, *options)[1:]


def _chosen(vjp: Tensor, options: MaskOptions, backend: str) -> str:
    """The backend that runs: of those that take the image and the options."""
    refusals = {name: _refusal(vjp, options.temperature, name, limits) for name, limits in LIMITS.items()}
    if (refusal := refusals.get(backend)) is not None:
        raise ValueError(f"{_OP}: {refusal}. Use backend='auto', which takes another, or 'reference'")
    return resolve(_OP, backend, vjp.device, [name for name in KERNELS if refusals.get(name) is None], depth=2)


def _refusal(vjp: Tensor, temperature: float, backend: str, limits: Limits) -> str | None:
    """Why a backend with these limits does not take the map, or None."""
    height, width = vjp.shape[2:]
    if width > limits.width:
        return f"vjp must be at most {limits.width} pixels wide for backend={backend!r}, got {width}"
    # First without the size of the image, which may be symbolic and seldom matters.
    if rank_window_length(temperature, limits.window, vjp.dtype) > limits.window:
        length = rank_window_length(temperature, height * width, vjp.dtype)
        if length > limits.window:
            return (
                f"temperature must leave a rank window of at most {limits.window} entries for backend={backend!r}, "
                f"got {temperature!r}, which takes {length} of {vjp.dtype}"
            )
    return None


def rank_window_length(temperature: float, pixels: int, dtype: torch.dtype) -> int:
    """Entries of a rank window: outside it the soft quantile's weights vanish next to the values' rounding (SPEC 3)."""
    return 2 * min(ceil((40.0 if dtype == torch.float64 else 17.0) * temperature) + 1, pixels) + 1


class _ForegroundMask(torch.autograd.Function):
    """The mask by a kernel; its gradient by hand.

    Shapes:  vjp [N, C, H, W] -> mask [N, 1, H, W]. Saved: mask, mean_map [N, H, W], levels [N, 4], rank_pixels.
    Order:   once. A second derivative raises, in `_ForegroundMaskGrad`; `once_differentiable` would not be enough, since
             with a detached seed it drops the second-order term in silence.
    Source:  SPEC 3 and 6.
    """

    @staticmethod
    def forward(ctx, vjp, rank_pixels, options, backend):
        mask, mean_map, levels, ranks = _FORWARD[backend](vjp, rank_pixels, *options)
        ctx.save_for_backward(mask, mean_map, levels, ranks)
        ctx.rest = (vjp.shape[1], options, backend)
        ctx.dtype = vjp.dtype
        return mask

    @staticmethod
    def backward(ctx, grad_mask):
        channels, options, backend = ctx.rest
        mask, mean_map, levels, ranks = ctx.saved_tensors
        plane = _ForegroundMaskGrad.apply(grad_mask, mask, mean_map, levels, ranks, channels, options, backend)
        # One plane for all channels: nothing of the size of vjp is written here.
        return plane.expand(-1, channels, -1, -1).to(ctx.dtype), None, None, None


class _ForegroundMaskGrad(torch.autograd.Function):
    """The first derivative as a node of its own, so that a second one is an error and never a silent zero."""

    @staticmethod
    def forward(ctx, grad_mask, mask, mean_map, levels, ranks, channels, options, backend):
        return _BACKWARD[backend](grad_mask.contiguous(), mask, mean_map, levels, ranks, channels, *options)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "foreground_mask: the second derivative exists only with backend='reference' (the loss needs the first one only)"
        )


# ---- the registered ops, one pair per backend -------------------------------------------------------------------------------

_FORWARD, _BACKWARD = {}, {}


def add_kernels(backend: str, namespace: str) -> None:
    """Makes `backend` run the ops of torch.ops.<namespace>, which exist in this process."""
    ops = getattr(torch.ops, namespace)
    _FORWARD[backend], _BACKWARD[backend] = ops._foreground_mask.default, ops._foreground_mask_backward.default


def _fake_forward(vjp, rank_pixels, window_size, temperature, slope, quantiles, eps):
    images, _, height, width = vjp.shape
    acc = _checks.accumulation_dtype(vjp.dtype)
    length = rank_window_length(temperature, height * width, vjp.dtype)
    return (
        vjp.new_empty((images, 1, height, width), dtype=acc),
        vjp.new_empty((images, height, width), dtype=acc),
        vjp.new_empty((images, _LEVELS), dtype=acc),
        vjp.new_empty((images, _LEVELS, length), dtype=torch.int32),
    )


def _fake_backward(grad_mask, mask, mean_map, levels, rank_pixels, channels, window_size, temperature, slope, quantiles, eps):
    return mask.new_empty(mask.shape)


FAKES = (("_foreground_mask", _fake_forward), ("_foreground_mask_backward", _fake_backward))
_OPTIONS = "int window_size, float temperature, float slope, float[] quantiles, float eps"

register_head_op(
    _OP,
    KERNELS,
    (
        f"_foreground_mask(Tensor vjp, Tensor? rank_pixels, {_OPTIONS}) "
        "-> (Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels)",
        "_foreground_mask_backward(Tensor grad_mask, Tensor mask, Tensor mean_map, Tensor levels, Tensor rank_pixels, "
        f"int channels, {_OPTIONS}) -> Tensor",
    ),
    FAKES,
    add_kernels,
)
