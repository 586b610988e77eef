"""Evidence at a feature map: where in it a network finds its class, and terms that are ratios of that (SPEC 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sib_fast import _checks
from sib_fast.distributed import global_mean
from sib_fast.masks import MASKS, DensityMask, GivenMask, is_fully_annotated, require_given
from sib_fast.vjp import SCALARS, carried_on, vjp_map

_OP = "EvidenceTerm"


def _rectified(vjp: Tensor, features: Tensor) -> Tensor:
    return (vjp * features).sum(dim=1, keepdim=True).relu()


def _absolute(vjp: Tensor, features: Tensor) -> Tensor:
    return (vjp * features).abs().sum(dim=1, keepdim=True)


def _squared(vjp: Tensor, features: Tensor) -> Tensor:
    return vjp.square().sum(dim=1, keepdim=True)


FORMS = {"rectified": _rectified, "absolute": _absolute, "squared": _squared}


def _area(evidence: Tensor, mask: Tensor | None) -> Tensor:
    """Inverse participation ratio of the cells: 1/P for one cell, 1 for a constant map."""
    cells = evidence.flatten(1)
    return cells.sum(1).square() / (cells.shape[1] * cells.square().sum(1))


def _share(evidence: Tensor, mask: Tensor) -> Tensor:
    return ((1 - mask) * evidence).flatten(1).sum(1) / evidence.flatten(1).sum(1)


KINDS = {"area": _area, "share": _share}
# What selection runs chose for each (docs/study-evidence/protocol.md); a function of the user's is read as Grad-CAM shows it.
_FORM = {"area": "absolute", "share": "rectified"}
_NORMALISED = {"area": True, "share": False}


class Evidence(NamedTuple):
    """What a term came to. value: 0-d, in the graph; terms: detached 0-d tensors; vjp, mask: of the map, for checks."""

    value: Tensor
    terms: dict[str, Tensor]
    vjp: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class EvidenceTerm:
    """A term on the evidence map at the last feature map before pooling, beside S-IB's (`SIBLoss(evidence=...)`) or alone
    (`EvidenceLoss`): a description, which holds no tensors.

    With A the map, R_A the VJP of the scalar at A, and e the evidence, one number per cell of A:
    "area" is the part of the map that the evidence takes up, with a hinge; it needs neither mask nor image. "share" is the part
    of the evidence that lies on the background, 1 − M, where M is a mask brought to A's cells (a cell with some object is none of
    the background) and not differentiated. Both lie in [0, 1], whatever the scale of R_A and the size of the image.

    Args:    kind: "area", "share", or a function (evidence [N, 1, h, w], mask [N, 1, h, w] or None) -> [N].
             evidence: "rectified", relu(Σ_k R_A⊙A), what Grad-CAM shows; "absolute", Σ_k |R_A⊙A|, or "squared", Σ_k R_A², which
             alone are meant for maps with non-linear layers above them; or a function (R_A, A) -> [N, 1, h, w]. None, the
             default, is "absolute" for "area" and "rectified" for the rest, as selection runs chose.
             weight: of the term. at: name of the module, or the module, whose output is A; by default found in the first forward
             pass. scalar: as `vjp_map`'s. normalise_cotangent: `vjp_map`'s; None, the default, is False for "share" alone.
             target_area: "area" is not lowered below it, so that one cell is not the optimum; 0 is no hinge.
             mask: "density" of the VJP at the image, with window_size, temperature, slope and quantiles as in `foreground_mask`
             (None: those of the SIBLoss beside it, or SIBLoss's defaults); "given": every call of the loss brings one, and the
             image is not differentiated to; a function (vjp) -> [N, 1, H, W]; or None, for a function kind that takes no mask.
    Scale:   a mean over the images that have evidence; one without any (a dead map) counts in no mean.
    Errors:  ValueError, TypeError for bad arguments.
    Source:  SPEC 11; Selvaraju et al. 2017 (Grad-CAM) for the rectified form.
    """

    kind: str | Callable[[Tensor, Tensor | None], Tensor] = "area"
    evidence: str | Callable[[Tensor, Tensor], Tensor] | None = None
    weight: float = 1.0
    at: str | nn.Module | None = None
    scalar: str | Callable = "energy"
    normalise_cotangent: bool | None = None
    target_area: float = 0.1
    mask: str | Callable[[Tensor], Tensor] | None = "density"
    window_size: int | None = None
    temperature: float | None = None
    slope: float | None = None
    quantiles: Sequence[float] | None = None

    def __post_init__(self) -> None:
        _checks.require_choice(_OP, "kind", self.kind, tuple(KINDS), or_callable=True)
        if self.evidence is None:
            object.__setattr__(self, "evidence", _FORM.get(self.name, "rectified"))
        if self.normalise_cotangent is None:
            object.__setattr__(self, "normalise_cotangent", _NORMALISED.get(self.name, True))
        _checks.require_choice(_OP, "evidence", self.evidence, tuple(FORMS), or_callable=True)
        _checks.require_choice(_OP, "scalar", self.scalar, SCALARS, or_callable=True)
        if self.mask is not None:
            _checks.require_choice(_OP, "mask", self.mask, (*MASKS, "given"), or_callable=True)
        elif self.kind == "share":
            raise ValueError(f"{_OP}: mask must be given a maker for kind='share', got None: 'density', 'given' or a function")
        if not self.weight >= 0:
            raise ValueError(f"{_OP}: weight must be at least 0, got {self.weight!r}")
        if not 0 <= self.target_area < 1:
            raise ValueError(f"{_OP}: target_area must be in [0, 1), got {self.target_area!r}")
        if not (self.at is None or isinstance(self.at, str | nn.Module)):
            raise TypeError(f"{_OP}: at must be a module or its name, got {type(self.at).__name__}")
        if self.window_size is not None:
            _checks.require_window(_OP, self.window_size)
        for name in ("temperature", "slope"):
            if getattr(self, name) is not None:
                _checks.require_positive(_OP, name, getattr(self, name))
        if self.quantiles is not None:
            object.__setattr__(self, "quantiles", _checks.require_quantiles(_OP, self.quantiles))

    @property
    def name(self) -> str:
        """In `terms`."""
        return self.kind if isinstance(self.kind, str) else "evidence"

    @property
    def uses_mask(self) -> bool:
        return self.kind != "area" and self.mask is not None

    @property
    def makes_mask(self) -> bool:
        """Whether a mask may have to be made of a VJP, because none was given."""
        return self.uses_mask and self.mask != "given"

    def maker(self, backend: str, like: DensityMask | None = None) -> Callable[[Tensor], Tensor]:
        """What makes the mask of a VJP. like: the one that settings which are None are taken of."""
        if callable(self.mask):
            return self.mask
        like = DensityMask(backend=backend) if like is None else like
        own = {name: getattr(self, name) for name in ("window_size", "temperature", "slope", "quantiles")}
        return like.with_settings(**{name: value for name, value in own.items() if value is not None})

    def of(
        self,
        op: str,
        logits: Tensor,
        labels: Tensor | None,
        features: Tensor,
        given: Tensor | GivenMask | None,
        own_mask: Callable[[Tensor], Tensor],
        compute: torch.dtype,
        gather: bool = False,
    ) -> Evidence:
        """The term of one batch. own_mask: makes a mask [N, 1, H, W] of R_A, called only if an image has none given."""
        # A label's cotangent has norm one as it is.
        normalise = self.normalise_cotangent and self.scalar not in ("label_logit", "predicted_logit")
        vjp = vjp_map(logits, features, self.scalar, labels, create_graph=True, normalise_cotangent=normalise).to(compute)
        size = features.shape[2:]
        mask = self._cells(op, given, size, vjp, lambda: own_mask(vjp.detach())) if self.uses_mask else None
        built_in = isinstance(self.kind, str)
        # A ratio does not depend on the size of R, whose squares would underflow or overflow.
        sized = _over_greatest(vjp)[0] if built_in and self.evidence == "squared" else vjp
        form = FORMS[self.evidence] if isinstance(self.evidence, str) else self.evidence
        evidence = form(sized, features.to(compute))
        _checks.require_same_shape(op, "evidence", evidence, "features", (len(logits), 1, *size))
        if not evidence.requires_grad:
            raise RuntimeError(
                f"{op}: the evidence must depend on the network's parameters, but it came back without a graph: a layer "
                "(compiled code, a custom autograd.Function) cuts it, or every parameter is frozen"
            )
        if built_in:
            evidence, live = _over_greatest(evidence)
            evidence = torch.where(live[:, None, None, None], evidence, 1.0)
        else:
            live = evidence.detach().flatten(1).sum(1) != 0
        values = (KINDS[self.kind] if built_in else self.kind)(evidence, mask)
        _checks.require_same_shape(op, self.name, values, "features", (len(logits),))
        lowered = (values - self.target_area).relu() if self.kind == "area" and self.target_area else values
        value, dead = global_mean(lowered, live, gather=gather)
        shown = value.detach() if lowered is values else global_mean(values.detach(), live, gather=gather)[0]
        terms = {self.name: shown, "evidence_dead": dead.to(compute)}
        if mask is not None:
            terms["object_cells"] = mask.mean()
        return Evidence(value, terms, vjp, mask)

    def _cells(
        self, op: str, given: Tensor | GivenMask | None, size: Sequence[int], vjp: Tensor, own: Callable[[], Tensor]
    ) -> Tensor:
        """The mask of A's cells, not differentiated: the given one, for images without annotation the own one."""
        if given is not None:
            values, annotated = require_given(op, given, vjp)
            values = _to_cells(op, values, size)
            if annotated is None or is_fully_annotated(annotated):
                return values
        if not self.makes_mask:
            raise ValueError(
                f"{op}: mask must be given for mask='given', got {'None' if given is None else 'an image without one'}: "
                "mask='density' makes one of the VJP at the image"
            )
        made = _to_cells(op, own().detach().to(vjp.dtype), size)
        return made if given is None else torch.where(annotated[:, None, None, None], values, made)


def _over_greatest(map_: Tensor) -> tuple[Tensor, Tensor]:
    """Every image's map over its greatest entry, which is not differentiated, and whether it has any.

    What lies below the smallest numbers that can be divided by, without overflow in the derivative, is nothing and stays.
    """
    greatest = torch.linalg.vector_norm(map_.detach(), float("inf"), dim=(1, 2, 3), keepdim=True)
    nothing = greatest < torch.finfo(map_.dtype).tiny * 1024  # NaN stays NaN
    return map_ / torch.where(nothing, 1.0, greatest), ~nothing.flatten()


def _to_cells(op: str, mask: Tensor, size: Sequence[int]) -> Tensor:
    """The greatest of the mask's values in every cell: one with some object is none of the background.

    Where sizes do not divide, windows overlap by a pixel, so that every pixel lies in the cells that it touches.
    """
    if mask.shape[2] < size[0] or mask.shape[3] < size[1]:
        raise ValueError(f"{op}: mask must have at least the map's {list(size)} cells, got {list(mask.shape[2:])}")
    return mask if tuple(mask.shape[2:]) == tuple(size) else torch.nn.functional.adaptive_max_pool2d(mask, tuple(size))


def image_mask(op: str, features: Tensor, x: Tensor | None, maker: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Makes the own mask of R_A: of the VJP at the image, R_A carried on from A, without graph and weight gradients."""

    def make(vjp: Tensor) -> Tensor:
        if x is None:
            raise RuntimeError(
                f"{op}: x must be given for a mask of the VJP at the image, got None: criterion(logits, target, x, "
                "features=features) with x.requires_grad_() before the forward pass, criterion.attach(model), or give the masks"
            )
        with torch.no_grad():
            mask = maker(carried_on(op, features, x, vjp))
        _checks.require_same_shape(op, "mask", mask, "x", (x.shape[0], 1, *x.shape[2:]))
        return mask

    return make
