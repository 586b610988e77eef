"""How well a map sits on the object: torchmetrics accumulators over (map, true mask).

    metrics = sib_fast.explain.metrics.localisation()         # a MetricCollection of all of them
    metrics.update(explain(model, x, y, "grad_cam"), mask)
    metrics.compute()                                         # 0-d tensors by name

Images on which a score is not defined (an empty mask, a full one where the outside is needed, a map that is zero everywhere)
are left out and counted: `metric.undefined` of `metric.images`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from sib_fast import _checks
from sib_fast.masks.given import require_mask_values


class _Localisation(Metric):
    """Mean over images of a score of (map, mask), where it is defined.

    Shapes:  update(maps [N, 1, H, W] floating point, mask [N, 1, H, W] bool, in [0, 1] or integers that are all 0 and 1
             or all 0 and 255, where >= 0.5 is the object).
             Maps enter by their positive part: negative evidence is not evidence of the object.
    Errors:  TypeError, ValueError for other shapes and dtypes, and for maps that are not finite.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, *parameters: float, **options: object) -> None:
        super().__init__(**options)
        # A MetricCollection lets metrics share one state once theirs have the same names and values, as after a batch on which
        # nothing is defined. So the name says what is summed: the score and its parameters.
        self._sum = f"sum of {type(self).__qualname__}{parameters}"
        self.add_state(self._sum, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor, mask: Tensor) -> None:
        scores = self.scores(maps, mask)
        defined = ~scores.isnan()
        setattr(self, self._sum, self.total + scores[defined].sum())
        self.defined += defined.sum()
        self.images += len(scores)

    def scores(self, maps: Tensor, mask: Tensor) -> Tensor:
        """Score of each image, float64 [N], NaN where it is not defined."""
        name = type(self).__name__
        _checks.require_map(name, "maps", maps)
        _checks.require_same_shape(name, "maps", maps, "mask", (maps.shape[0], 1, *maps.shape[2:]))
        _checks.require_tensor(name, "mask", mask)
        _checks.require_same_shape(name, "mask", mask, "maps", maps.shape)
        if not torch.isfinite(maps).all():
            raise ValueError(f"{name}: maps must be finite, got NaN or Inf")
        require_mask_values(name, "mask", mask)
        inside = (mask if mask.dtype == torch.bool else mask >= 0.5).flatten(1)
        maps = _checks.to_float64(maps.detach())
        return self._scores(maps.clamp_min(0).flatten(1), inside.to(maps.device))

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def total(self) -> Tensor:
        """The sum of the defined scores."""
        return getattr(self, self._sum)

    def compute(self) -> Tensor:
        """The mean, NaN if it was defined on no image."""
        return self.total / self.defined

    @property
    def undefined(self) -> int:
        return int(self.images - self.defined)


def _where(defined: Tensor, value: Tensor) -> Tensor:
    return torch.where(defined, value, torch.nan)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return _where(whole > 0, part / torch.where(whole > 0, whole, 1.0))


class EnergyPointingGame(_Localisation):
    """Share of the map's mass inside the object (relevance mass accuracy). Wang et al. 2020 (Score-CAM); Arras et al. 2022.

    Undefined for a zero map and an empty mask. A uniform map scores the object's share of the image: see `EnergyGain`.
    """

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        return _where(inside.any(1), _ratio((maps * inside).sum(1), maps.sum(1)))


class EnergyGain(_Localisation):
    """Energy inside over the object's share of the image: 1 for a uniform map, more on the object. Area-normalised energy."""

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        return _ratio(_ratio((maps * inside).sum(1), maps.sum(1)), inside.double().mean(1))


class RelevanceRankAccuracy(_Localisation):
    """Of the |mask| pixels with the highest relevance, the share inside the object. Arras et al. 2022.

    Ties at the boundary count by the share of the tied pixels that lie inside, so that the order of pixels does not matter.
    Undefined for an empty mask and a zero map.
    """

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        count = inside.sum(1)
        last = (count - 1).clamp_min(0)
        threshold = maps.sort(dim=1, descending=True).values.gather(1, last[:, None])
        above, tied = maps > threshold, maps == threshold
        seats = count - above.sum(1)  # for the tied
        share = (tied & inside).sum(1).double() / tied.sum(1)
        score = ((above & inside).sum(1) + seats * share) / count.clamp_min(1)
        return _where((count > 0) & (maps.amax(1) > 0), score)


class PointingGame(_Localisation):
    """Whether the highest pixel lies in the object; several equally high ones count by their share. Zhang et al. 2018.

    Without the 15 pixels of tolerance of the original. Undefined for an empty mask and a zero map.
    """

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        top = maps == maps.amax(1, keepdim=True)
        share = (top & inside).sum(1).double() / top.sum(1)
        return _where(inside.any(1) & (maps.amax(1) > 0), share)


class IoU(_Localisation):
    """Intersection over union of the object and the map above `threshold` of its range. Undefined as the pointing game."""

    def __init__(self, threshold: float = 0.5, **options: object) -> None:
        super().__init__(threshold, **options)
        if not 0 < threshold < 1:
            raise ValueError(f"IoU: threshold must lie in (0, 1), got {threshold!r}")
        self.threshold = threshold

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
        shown = maps >= low + self.threshold * (high - low)
        union = (shown | inside).sum(1)
        return _where(inside.any(1) & (high[:, 0] > 0), (shown & inside).sum(1).double() / union.clamp_min(1))


class BackgroundSuppression(_Localisation):
    """Mean relevance outside the object over the mean inside: 0 is all on the object, 1 uniform. Lower is better.

    Reported as log10, so that the mean over images is not that of its outliers. Undefined where either side has no pixels or
    the inside no relevance; an outside of 0 counts as `floor`.
    """

    higher_is_better = False

    def __init__(self, floor: float = 1e-6, **options: object) -> None:
        super().__init__(floor, **options)
        if not floor > 0:
            raise ValueError(f"BackgroundSuppression: floor must be positive, got {floor!r}")
        self.floor = floor

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        outside = ~inside
        within = _ratio((maps * inside).sum(1), inside.sum(1).double())
        without = _ratio((maps * outside).sum(1), outside.sum(1).double())
        ratio = _where(within > 0, without / torch.where(within > 0, within, 1.0))
        return ratio.clamp_min(self.floor).log10()


class BackgroundVariance(_Localisation):
    """Var(map outside) / Var(map), the map zero inside: what training lowers, with the true mask. Scale-free; lower is better.

    Undefined for a constant map.
    """

    higher_is_better = False

    def _scores(self, maps: Tensor, inside: Tensor) -> Tensor:
        whole = maps.var(dim=1, unbiased=True)
        return _ratio((maps * ~inside).var(dim=1, unbiased=True), whole)


def localisation() -> MetricCollection:
    """All of the above, by these names."""
    return MetricCollection(
        {
            "energy": EnergyPointingGame(),
            "energy_gain": EnergyGain(),
            "rank_accuracy": RelevanceRankAccuracy(),
            "pointing_game": PointingGame(),
            "iou": IoU(),
            "log_background": BackgroundSuppression(),
            "background_variance": BackgroundVariance(),
        }
    )
