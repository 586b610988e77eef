"""Masks: makers that turn a VJP into a soft mask, and masks that are given (segmentations, boxes)."""

from sib_fast.masks.density import DensityMask
from sib_fast.masks.given import GivenMask, boxes_to_mask, check_given, collate, labels_to_mask, resolve_given

MASKS = {"density": DensityMask}

__all__ = ["MASKS", "DensityMask", "GivenMask", "boxes_to_mask", "check_given", "collate", "labels_to_mask", "resolve_given"]
