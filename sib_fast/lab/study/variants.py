"""The ways of training that a study compares, and their settings (docs/study*/protocol.md say how those were chosen)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sib_fast import SIBLoss
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.masks import DensityMask

MAP = "features"
"""The module of both small networks whose output is the last feature map before pooling."""
CENTRE_SHARE = 0.2


def centred(size: int) -> Tensor:
    """A centred square of :data:`CENTRE_SHARE` of the image: a guess that has seen nothing.

    Shapes:  -> [1, size, size] float32.
    """
    side = size - 2 * round((1 - math.sqrt(CENTRE_SHARE)) * size / 2)
    first = (size - side) // 2
    mask = torch.zeros(1, size, size)
    mask[:, first : first + side, first : first + side] = 1
    return mask


def others(count: int, generator: torch.Generator) -> Tensor:
    """For every image another one, each once. Shapes: -> [count] int64, a cyclic permutation; of one image, itself."""
    order = torch.randperm(count, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def random_masks(masks: Tensor, seed: int) -> Tensor:
    """For every image the mask of another one, moved anywhere on the torus: sizes and forms of objects, and no place.

    Shapes:  [N, 1, H, W] -> the same.
    """
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = masks.shape
    moved = masks[others(count, generator)]
    shifts = (torch.randint(0, side, (count,), generator=generator).tolist() for side in (height, width))
    return torch.stack([mask.roll(shift, (-2, -1)) for mask, shift in zip(moved, zip(*shifts, strict=True), strict=True)])


def _no_mask(vjp: Tensor) -> Tensor:
    """All background."""
    return torch.zeros_like(vjp[:, :1])


def _next_ones(vjp: Tensor) -> Tensor:
    """The density mask of the next image of the batch."""
    return DensityMask(window_size=_WINDOW)(vjp).roll(1, 0)


def cam_entropy(evidence: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy of the evidence's distribution over the cells, of that of a constant map; 0 for a map of zeros.

    Shapes:  [N, 1, h, w], non-negative -> [N].
    """
    cells = evidence.flatten(1)
    whole = cells.sum(1, keepdim=True)
    share = cells / torch.where(whole > 0, whole, 1)
    # not special.entr, whose derivative at 0 is infinite
    logarithm = share.clamp_min(torch.finfo(share.dtype).tiny).log()
    return -(share * logarithm).sum(1) / math.log(cells.shape[1])


class FeatureNorm(nn.Module):
    """Cross entropy and the mean of \\|A\\| at the last feature map: sparse features, with no word of where.

    Attributes: terms: detached 0-d tensors of the latest call.
    """

    def __init__(self, model: nn.Module, weight: float):
        super().__init__()
        self.weight, self.terms, self._map = weight, {}, torch.empty(0)
        model.get_submodule(MAP).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        base, norm = nn.functional.cross_entropy(logits, target), self._map.abs().mean()
        loss = base + self.weight * norm
        self.terms = {"loss": loss.detach(), "base": base.detach(), "norm": norm.detach()}
        return loss


class Cutout(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """A set whose images lose a square at a random place, the colour of blank, at every look. Source: DeVries, Taylor 2017,
    but for the square lying wholly in the image."""

    def __init__(self, data: EmbeddedDigits, side: int):
        self.data, self.side = data, side
        self.generator = torch.Generator().manual_seed(data.seed)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, label, mask = self.data[index]
        places = image.shape[-1] - self.side + 1
        top, left = torch.randint(0, places, (2,), generator=self.generator).tolist()
        image = image.clone()
        image[:, top : top + self.side, left : left + self.side] = 0
        return image, label, mask


# What an own mask is made by; the others are handed to the criterion with the images.
_MASKS: dict[str, str | Callable[[Tensor], Tensor]] = {"density": "density", "none": _no_mask, "next": _next_ones}
_GIVEN: dict[str, Callable[[EmbeddedDigits], Tensor]] = {
    "true": lambda data: data.masks,
    "centre": lambda data: centred(data.image_size).bool().expand(len(data), -1, -1, -1),
    "random": lambda data: random_masks(data.masks, data.seed),
}


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes:
        name: as in files and on the command line; with overrides, ``"sib:lambda_bg=3e5"``.
        label: for people.
        sib: arguments of :class:`sib_fast.SIBLoss`, or None.
        evidence: ``kind`` and arguments of :class:`sib_fast.EvidenceLoss`, or of :class:`sib_fast.EvidenceTerm` beside ``sib``.
        norm: ``weight`` of :class:`FeatureNorm`.
        cutout: ``side`` of :class:`Cutout`'s square.
        layer: the module whose output S-IB takes the VJP at, None for the image.
        mask: ``"density"``, ``"none"`` (the whole map is background), ``"next"`` (the density mask of another image of the
            batch); or given with the images: ``"true"`` (the data's), ``"centre"``, ``"random"``.
        precision: Lightning's.
    """

    name: str
    label: str
    sib: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None
    norm: dict[str, Any] | None = None
    cutout: dict[str, Any] | None = None
    layer: str | None = None
    mask: str = "density"
    precision: str = "32-true"

    @property
    def given_masks(self) -> bool:
        """Whether the criterion is handed a mask with every batch."""
        return self.mask in _GIVEN

    def training_set(self, data: EmbeddedDigits) -> Dataset[tuple[Tensor, Tensor, Tensor]]:
        """The set as this variant is shown it: with the masks that it is handed, and with squares cut out."""
        if self.mask in _GIVEN and self.mask != "true":
            data = copy.copy(data)
            data.masks = _GIVEN[self.mask](data)
        return data if self.cutout is None else Cutout(data, **self.cutout)

    def criterion(self, model: nn.Module) -> nn.Module:
        """What the recipe calls with logits and targets; one that looks at the network is attached to it."""
        if self.norm is not None:
            return FeatureNorm(model, **self.norm)
        mask = _MASKS.get(self.mask, "density")
        if self.sib is not None:
            term = {} if self.evidence is None else {"evidence": self._evidence("EvidenceTerm", mask)}
            return SIBLoss(**_COMMON | self.sib, mask=mask, **term).attach(model, self.layer)
        if self.evidence is not None:
            return self._evidence("EvidenceLoss", mask).attach(model)
        return nn.CrossEntropyLoss()

    def _evidence(self, form: str, mask: Any) -> Any:
        import sib_fast

        assert self.evidence is not None
        if self.given_masks:
            options: dict[str, Any] = {"mask": "given"}
        else:
            options = {"mask": mask, "window_size": _WINDOW} if self.evidence["kind"] == "share" else {"mask": None}
        return getattr(sib_fast, form)(**self.evidence | options)

    def settings(self) -> dict[str, Any]:
        """Everything that tells this variant from another, as JSON keeps it."""
        found: dict[str, Any] = {} if self.sib is None else _COMMON | self.sib | {"mask": self.mask}
        if self.evidence is not None:
            kind = self.evidence["kind"]
            found |= {"kind": kind if isinstance(kind, str) else kind.__name__}
            found |= {"evidence_" + k if k in ("every",) else k: v for k, v in self.evidence.items() if k != "kind"}
            found |= {"mask": self.mask, "window_size": _WINDOW} if kind == "share" else {}
        found |= {f"norm_{k}": v for k, v in (self.norm or {}).items()} | {
            f"cutout_{k}": v for k, v in (self.cutout or {}).items()
        }
        return found | ({} if self.layer is None else {"layer": self.layer}) | {"precision": self.precision}

    @property
    def passes(self) -> float:
        """Of a step, about, in those of plain training. Only the time left depends on it."""
        sib = 0.0 if self.sib is None else 1.2 / self.sib.get("every", 1)
        own_mask = self.evidence is not None and self.evidence["kind"] == "share" and not self.given_masks and self.sib is None
        evidence = 0.0 if self.evidence is None else (0.6 if own_mask else 0.1) / self.evidence.get("every", 1)
        return 1.0 + sib + evidence


_WINDOW = 7
# expm1 has the gradient of the paper's exp, and a value that can be read
_COMMON: dict[str, Any] = {"objective": "expm1", "window_size": _WINDOW}

# Found on seeds 0 and 1 by the rule of docs/study/protocol.md; the grids are in docs/study/selection.csv.
_SIB_WEIGHTS = {"small_conv_net": {"lambda_fg": 1.0, "lambda_bg": 1e6}, "small_resnet": {"lambda_fg": 1.0, "lambda_bg": 1e6}}
_RELATIVE_WEIGHTS = {"small_conv_net": {"lambda_bg": 0.1}, "small_resnet": {"lambda_bg": 0.3}}
_UNMASKED_WEIGHTS = {"small_conv_net": {"lambda_bg": 1e5}, "small_resnet": {"lambda_bg": 1e5}}
_FOREGROUND_WEIGHTS = {"small_conv_net": {"lambda_fg": 3.0}, "small_resnet": {"lambda_fg": 3.0}}  # the residual one's not sought

# By the rules of docs/study-evidence/protocol.md; every choice is in docs/study-evidence/selection.csv.
_TERM: dict[str, Any] = {"evidence": "rectified", "scalar": "energy", "normalise_cotangent": True, "weight": 1.0}
_AREA: dict[str, Any] = _TERM | {"kind": "area", "target_area": 0.1, "evidence": "absolute"}
_SHARE: dict[str, Any] = _TERM | {"kind": "share", "normalise_cotangent": False}
_NORM = {"weight": 0.1}
_MAP_GRADIENT = {"lambda_fg": 0.0, "lambda_bg": 1e7}
_CUTOUT = {"side": 12}

ARCHITECTURES = {"small_conv_net": "small convolutional network", "small_resnet": "small residual network"}
LABELS = {
    "plain": "plain training",
    "sib": "S-IB",
    "sib_relative": "S-IB, relative background variance",
    "foreground_only": "S-IB, foreground term only",
    "background_only": "S-IB, background term only",
    "unmasked": "control: penalty on the whole map, no mask",
    "lazy_sum": "S-IB at every 4th step, 4× weight",
    "lazy_mean": "S-IB at every 4th step, same weight",
    "true_mask": "S-IB with the true mask (upper bound)",
    "sib_bf16": "S-IB under bf16 autocast",
    "area": "effective area",
    "share": "background share, own mask",
    "sib_area": "S-IB + effective area",
    "sib_share": "S-IB + background share",
    "share_true": "control: share, true mask",
    "share_centre": "control: share, fixed centre mask",
    "share_others": "control: share, masks of other images",
    "share_random": "control: share, a fixed random mask per image",
    "feature_norm": "control: mean |A| at the last map",
    "map_gradient": "control: gradient penalty at the last map",
    "cam_entropy": "control: entropy of the evidence",
    "cutout": "control: cutout",
}


def variants(arch: str) -> dict[str, Variant]:
    """All variants with the settings for an architecture of :data:`ARCHITECTURES`, in the order of tables."""
    sib = _SIB_WEIGHTS[arch]
    made: dict[str, dict[str, Any]] = {
        "plain": {},
        "sib": {"sib": sib},
        "sib_relative": {"sib": {"lambda_fg": 1.0, "background": "relative_variance"} | _RELATIVE_WEIGHTS[arch]},
        "foreground_only": {"sib": {"lambda_bg": 0.0} | _FOREGROUND_WEIGHTS[arch]},
        "background_only": {"sib": sib | {"lambda_fg": 0.0}},
        "unmasked": {"sib": {"lambda_fg": 0.0} | _UNMASKED_WEIGHTS[arch], "mask": "none"},
        "lazy_sum": {"sib": sib | {"every": 4}},
        "lazy_mean": {"sib": sib | {"every": 4, "every_weight": "mean"}},
        "true_mask": {"sib": sib, "mask": "true"},
        "sib_bf16": {"sib": sib, "precision": "bf16-mixed"},
        "area": {"evidence": _AREA},
        "share": {"evidence": _SHARE},
        "sib_area": {"sib": sib, "evidence": _AREA},
        "sib_share": {"sib": sib, "evidence": _SHARE},
        "share_true": {"evidence": _SHARE, "mask": "true"},
        "share_centre": {"evidence": _SHARE, "mask": "centre"},
        "share_others": {"evidence": _SHARE, "mask": "next"},
        "share_random": {"evidence": _SHARE, "mask": "random"},
        "feature_norm": {"norm": _NORM},
        "map_gradient": {"sib": _MAP_GRADIENT, "mask": "none", "layer": MAP},
        "cam_entropy": {"evidence": _TERM | {"kind": cam_entropy, "evidence": "absolute"}},
        "cutout": {"cutout": _CUTOUT},
    }
    return {name: Variant(name, LABELS[name], **fields) for name, fields in made.items()}


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# What may follow the colon of a variant's name, by the field that it changes.
_OVERRIDES: dict[str, dict[str, Callable[[str], Any]]] = {
    "sib": {"lambda_fg": float, "lambda_bg": float},
    "evidence": {
        "weight": float,
        "evidence": str,
        "scalar": str,
        "normalise_cotangent": _truth,
        "target_area": float,
        "every": int,
        "at": str,
    },
    "norm": {"weight": float},
    "cutout": {"side": int},
}


def find_variant(arch: str, spec: str) -> Variant:
    """A variant by name, with other settings if asked: ``"sib"``, ``"sib:lambda_bg=3e5"``, ``"share:evidence=absolute"``.

    Errors:  ValueError for an unknown name or anything after the colon that is not ``argument=value``.
    """
    name, _, overrides = spec.partition(":")
    if name not in LABELS:
        raise ValueError(f"study: variants must be among {', '.join(LABELS)}, got {spec!r}")
    variant = variants(arch)[name]
    if not overrides:
        return variant
    fields = {field: dict(value) for field in _OVERRIDES if (value := getattr(variant, field)) is not None}
    known = {key: field for field in fields for key in _OVERRIDES[field]}
    if not known:
        raise ValueError(f"study: variants must not override the settings of {name}, which has none, got {spec!r}")
    for pair in overrides.split(","):
        key, _, value = pair.partition("=")
        try:
            fields[known[key]][key] = _OVERRIDES[known[key]][key](value)
        except (KeyError, ValueError) as error:
            wanted = " or ".join(f"{key}=<{_SHOWN.get(_OVERRIDES[known[key]][key], 'name')}>" for key in known)
            raise ValueError(f"study: variants must have {wanted} after the colon, got {spec!r}") from error
    return dataclasses.replace(variant, name=spec, label=f"{variant.label}, {overrides.replace(',', ', ')}", **fields)


_SHOWN: dict[Callable[[str], Any], str] = {float: "number", int: "number", _truth: "true or false"}
