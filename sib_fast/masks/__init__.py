"""Masks: makers that turn a VJP into a soft mask, and masks that are given (segmentations, boxes)."""

from sib_fast.masks.density import DensityMask
from sib_fast.masks.given import (
    GivenMask,
    boxes_to_mask,
    check_given,
    collate,
    is_fully_annotated,
    labels_to_mask,
    require_given,
    resolve_given,
)

MASKS = {"density": DensityMask}

__all__ = [
    "MASKS",
    "DensityMask",
    "GivenMask",
    "boxes_to_mask",
    "check_given",
    "collate",
    "is_fully_annotated",
    "labels_to_mask",
    "require_given",
    "resolve_given",
]
