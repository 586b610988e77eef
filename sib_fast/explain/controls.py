"""Are maps faithful, or merely prettier? Insertion and deletion, and the dependence of maps on the network's weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast import _checks
from sib_fast.explain.methods import _plain_copy, explain
from sib_fast.vjp import two_classes

# Far from the seeds that people initialise with: a network that was made from seed 0 must not be drawn again.
_FIRST_SEED = 0x51B_FA57


def insertion_deletion(
    model: nn.Module, x: Tensor, target: Tensor, maps: Tensor, *, steps: int = 16, baseline: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Areas under the class probability as the most relevant pixels are put into a blank image, or blanked out of the image.

    A faithful map inserts high and deletes low. Pixels go in `steps` equal groups by relevance, ties by position.

    Shapes:  x [N, C, H, W]; target int64 [N]; maps [N, 1, H, W] -> insertion [N], deletion [N], float64. One logit z is the
             classes (0, z).
    Scale:   trapezoidal rule over the share of pixels, in [0, 1].
    Args:    baseline: the value of a blank pixel, a number or a tensor that broadcasts to x; 0 is the mean of normalised images.
    Errors:  TypeError, ValueError for bad arguments.
    Source:  Petsiuk, Das, Saenko 2018 (RISE).
    """
    op = "insertion_deletion"
    _checks.require_map(op, "x", x)
    _checks.require_same_shape(op, "maps", maps, "x", (x.shape[0], 1, *x.shape[2:]))
    _checks.require_same_shape(op, "target", target, "x", x.shape[:1])
    pixels = x.shape[2] * x.shape[3]
    if not 1 <= steps <= pixels:
        raise ValueError(f"{op}: steps must lie in [1, {pixels}], got {steps!r}")
    blank = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=x.device).expand_as(order))
    rank = rank.view(x.shape[0], 1, *x.shape[2:])
    curves = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for first, second in ((x, blank), (blank, x)):  # shown so far, not yet
                curve = []
                for step in range(steps + 1):
                    shown = rank < round(step * pixels / steps)
                    logits = model(torch.where(shown, first, second))
                    probabilities = _checks.to_float64(two_classes(logits)).softmax(dim=1)
                    curve.append(probabilities.gather(1, target[:, None].to(probabilities.device))[:, 0])
                curves.append(torch.trapezoid(torch.stack(curve, dim=1), dx=1 / steps, dim=1))
    finally:
        for module, training in modes.items():  # of each: model.train() would thaw what was frozen
            module.training = training
    return curves[0], curves[1]


def randomisation(
    model: nn.Module, x: Tensor, target: Tensor | None = None, method: str = "saliency", *, seed: int = 0, **options: Any
) -> Tensor:
    """How much of a map survives when every weight is drawn anew: rank correlation of the two maps, per image.

    Near 0 for a method that explains the network; near 1 for one that draws the image's edges whatever the network knows.

    Shapes:  x [N, C, H, W] -> Spearman correlations [N], float64; NaN where a map is constant.
    Source:  Adebayo et al. 2018, model parameter randomisation.
    """
    random = _plain_copy(model)
    generator_devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=generator_devices):
        torch.manual_seed(_FIRST_SEED + seed)
        for module in random.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    maps = [explain(net, x, target, method, **options).flatten(1) for net in (model, random)]
    return _spearman(*maps)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of mid-ranks, row by row."""
    return F.cosine_similarity(*(_centred_ranks(t) for t in (a, b)), dim=1, eps=0.0)


def _centred_ranks(values: Tensor) -> Tensor:
    ascending = values.sort(dim=1).values
    # Ties share the mean of their ranks.
    first = torch.searchsorted(ascending, values.contiguous(), right=False)
    last = torch.searchsorted(ascending, values.contiguous(), right=True) - 1
    ranks = _checks.to_float64(first + last) / 2
    return ranks - ranks.mean(dim=1, keepdim=True)
