"""The ways of training that a study compares, and their settings (docs/study/protocol.md says how those were chosen)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sib_fast import SIBLoss


def _no_mask(vjp: Tensor) -> Tensor:
    """All background."""
    return torch.zeros_like(vjp[:, :1])


_MASKS: dict[str, str | Callable[[Tensor], Tensor]] = {"density": "density", "none": _no_mask, "true": "density"}


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes:
        name: as in files and on the command line; with overrides, ``"sib:lambda_bg=3e5"``.
        label: for people.
        sib: arguments of :class:`sib_fast.SIBLoss`, or None for cross entropy alone.
        mask: ``"density"``, ``"none"`` (the whole map is background) or ``"true"`` (the data's masks).
        precision: Lightning's.
    """

    name: str
    label: str
    sib: dict[str, Any] | None = None
    mask: str = "density"
    precision: str = "32-true"

    def criterion(self, model: nn.Module) -> nn.Module:
        """What the recipe calls with logits and targets; an S-IB criterion is attached to the model."""
        if self.sib is None:
            return nn.CrossEntropyLoss()
        return SIBLoss(**_COMMON | self.sib, mask=_MASKS[self.mask]).attach(model)

    def settings(self) -> dict[str, Any]:
        """Everything that tells this variant from another, as JSON keeps it."""
        return {"precision": self.precision} if self.sib is None else self._sib_settings()

    def _sib_settings(self) -> dict[str, Any]:
        return _COMMON | self.sib | {"mask": self.mask, "precision": self.precision}


# expm1 has the gradient of the paper's exp, and a value that can be read
_COMMON: dict[str, Any] = {"objective": "expm1", "window_size": 7}

# Found on seeds 0 and 1 by the rule of docs/study/protocol.md; the grids are in docs/study/selection.csv.
_SIB_WEIGHTS = {"small_conv_net": {"lambda_fg": 1.0, "lambda_bg": 1e6}, "small_resnet": {"lambda_fg": 1.0, "lambda_bg": 1e6}}
_RELATIVE_WEIGHTS = {"small_conv_net": {"lambda_bg": 0.1}, "small_resnet": {"lambda_bg": 0.3}}
_UNMASKED_WEIGHTS = {"small_conv_net": {"lambda_bg": 1e5}, "small_resnet": {"lambda_bg": 1e5}}
_FOREGROUND_WEIGHTS = {"small_conv_net": {"lambda_fg": 3.0}, "small_resnet": {"lambda_fg": 3.0}}  # the residual one's not sought

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
}


def variants(arch: str) -> dict[str, Variant]:
    """All variants with the settings for an architecture of :data:`ARCHITECTURES`, in the order of tables."""
    sib = _SIB_WEIGHTS[arch]
    made = {
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
    }
    return {name: Variant(name, LABELS[name], **fields) for name, fields in made.items()}


def find_variant(arch: str, spec: str) -> Variant:
    """A variant by name, with other numbers for its weights if asked: ``"sib"``, ``"sib:lambda_bg=3e5,lambda_fg=0"``.

    Errors:  ValueError for an unknown name or anything after the colon that is not ``argument=number``.
    """
    name, _, overrides = spec.partition(":")
    if name not in LABELS:
        raise ValueError(f"study: variants must be among {', '.join(LABELS)}, got {spec!r}")
    variant = variants(arch)[name]
    if not overrides:
        return variant
    if variant.sib is None:
        raise ValueError(f"study: variants must not override the settings of {name}, which has none, got {spec!r}")
    sib = dict(variant.sib)
    for pair in overrides.split(","):
        key, _, value = pair.partition("=")
        try:
            if key not in ("lambda_fg", "lambda_bg"):
                raise ValueError
            sib[key] = float(value)
        except ValueError as error:
            wanted = "lambda_fg=<number> or lambda_bg=<number> after the colon"
            raise ValueError(f"study: variants must have {wanted}, got {spec!r}") from error
    return dataclasses.replace(variant, name=spec, label=f"{variant.label}, {overrides.replace(',', ', ')}", sib=sib)
