"""Are maps faithful, or merely prettier? Insertion and deletion, and the dependence of maps on the network's weights."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sib_fast import _checks
from sib_fast.explain.methods import _plain_copy, explain
from sib_fast.vjp import two_classes

# Far from the seeds that people initialise with: a network that was made from seed 0 must not be drawn again.
_FIRST_SEED = 0x51B_FA57
# Spectral norm's vectors belong to the weight before: as many power iterations as torch begins with find the new one's.
_ITERATIONS = 15


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

    Weights are drawn by each layer's `reset_parameters`; those that weight or spectral norm, or another parametrisation,
    computes are drawn as the layer draws them and then written through it.

    Shapes:  x [N, C, H, W] -> Spearman correlations [N], float64; NaN where a map is constant.
    Errors:  ValueError for a parametrised weight that cannot be drawn anew. UserWarning, once a class, for parameters of modules
             without `reset_parameters`, which stay as they are.
    Source:  Adebayo et al. 2018, model parameter randomisation.
    """
    random = _plain_copy(model)
    generator_devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=generator_devices), torch.no_grad():
        torch.manual_seed(_FIRST_SEED + seed)
        for name, module in random.named_modules():
            _draw(name, module)
    maps = [explain(net, x, target, method, **options).flatten(1) for net in (model, random)]
    return _spearman(*maps)


class _Drawn:
    """A layer to its `reset_parameters`, with tensors to fill in the place of weights that are computed from others."""

    def __init__(self, layer: nn.Module, weights: dict[str, Tensor]) -> None:
        vars(self).update(weights)
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _draw(name: str, layer: nn.Module) -> None:
    """A layer's own weights anew."""
    if isinstance(layer, parametrize.ParametrizationList):
        return  # with the layer that has it
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    computed = dict.fromkeys(getattr(layer, "parametrizations", {}), _through_parametrisations)
    for hook in layer._forward_pre_hooks.values():  # torch.nn.utils.weight_norm and spectral_norm
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            computed[hook.name] = partial(_through_hook, hook)
    if reset is None:
        if own := [weight for weight, _ in layer.named_parameters(recurse=False)]:
            warnings.warn(
                f"randomisation: {type(layer).__name__} must have reset_parameters() to be drawn anew, got none: its "
                f"{', '.join(own)} stay{'s' if len(own) == 1 else ''} as trained",
                stacklevel=3,
            )
        if not computed:
            return
    if not computed:
        reset()
        return
    empty = {weight: torch.full_like(getattr(layer, weight), math.nan) for weight in computed}
    if reset is not None:
        reset.__func__(_Drawn(layer, empty))
    for weight, write in computed.items():
        try:
            if empty[weight].isnan().any():
                raise RuntimeError(f"{type(layer).__name__} does not draw it")
            write(layer, weight, empty[weight])
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"randomisation: {'.'.join(filter(None, (name, weight)))} must be a weight that can be drawn anew, got a "
                f"parametrised one: {error}. Remove the parametrisation from a copy first"
            ) from error


def _through_parametrisations(layer: nn.Module, weight: str, value: Tensor) -> None:
    setattr(layer, weight, value)
    layer.parametrizations[weight].train()
    for _ in range(_ITERATIONS):
        getattr(layer, weight)
    layer.parametrizations[weight].eval()


def _through_hook(hook: WeightNorm | SpectralNorm, layer: nn.Module, weight: str, value: Tensor) -> None:
    if isinstance(hook, WeightNorm):
        getattr(layer, f"{weight}_v").copy_(value)
        getattr(layer, f"{weight}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
    else:
        getattr(layer, f"{weight}_orig").copy_(value)
        for _ in range(_ITERATIONS):
            hook.compute_weight(layer, do_power_iteration=True)


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
