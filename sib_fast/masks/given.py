"""Masks that are given: segmentations, boxes, and images that nobody annotated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sib_fast import _checks

_OP = "given mask"
# The weight of a pixel that is neither: both regions see it, and M² + (1−M)², what it counts for in the two, is least here.
_IGNORED = 0.5
# By this much may a resized mask lie outside [0, 1]: the rounding of interpolation, not bicubic's overshoot.
_ROUNDING = 1e-3


class GivenMask(NamedTuple):
    """A batch of annotations. Images that are not annotated keep the loss's own mask.

    Shapes:  values [N, 1, H, W]: bool, floating point in [0, 1], or integers that are all 0 and 1 or all 0 and 255; annotated
             bool [N].
    """

    values: Tensor
    annotated: Tensor

    def to(self, device: torch.device | str) -> GivenMask:
        return GivenMask(self.values.to(device), self.annotated.to(device))


def boxes_to_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Union of boxes as a mask: 1 where a pixel's centre lies inside a box.

    Shapes:  boxes [K, 4] or [4], (x0, y0, x1, y1) in pixels, x0 <= x < x1 -> [1, height, width] float32. K = 0 gives zeros.
    Errors:  ValueError for another shape.
    """
    boxes = _checks.require_tensor(_OP, "boxes", boxes)
    boxes = boxes[None] if boxes.ndim == 1 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{_OP}: boxes must have shape [K, 4] or [4] (x0, y0, x1, y1), got {list(boxes.shape)}")
    x0, y0, x1, y1 = boxes.to(torch.float32).unbind(1)
    across = torch.arange(width, device=boxes.device) + 0.5
    down = torch.arange(height, device=boxes.device) + 0.5
    inside_x = (across >= x0[:, None]) & (across < x1[:, None])
    inside_y = (down >= y0[:, None]) & (down < y1[:, None])
    return (inside_y[:, :, None] & inside_x[:, None, :]).any(0, keepdim=True).to(torch.float32)


def labels_to_mask(labels: Tensor, *, foreground: int | Iterable[int], ignore: int | Iterable[int] = ()) -> Tensor:
    """A segmentation of class labels as a mask: 1 on the foreground's labels, 0.5 where labels are ignored, 0 elsewhere.

        labels_to_mask(voc, foreground=range(1, 21), ignore=255)      # every object; foreground=15: persons
        labels_to_mask(trimap, foreground=1, ignore=3)                # Oxford-IIIT Pet: 3 is the border

    A pixel enters the foreground's statistics with M and the background's with 1−M, so that no M leaves it out of both. An
    ignored pixel gets 0.5: it counts a quarter in each (both are quadratic), and no other weight makes its sum smaller.
    Before any resizing or cropping with interpolation: labels cannot be averaged, the mask can.

    Shapes:  labels integer, any shape -> float32 of the same shape.
    Errors:  TypeError for labels of another dtype; ValueError for no foreground label, or one that is ignored too.
    """
    op = "labels_to_mask"
    _checks.require_tensor(op, "labels", labels)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{op}: labels must be an integer tensor, got {labels.dtype}")
    wanted, ignored = (tuple([v] if isinstance(v, int) else v) for v in (foreground, ignore))
    if not wanted:
        raise ValueError(f"{op}: foreground must hold at least one label, got none")
    if set(wanted) & set(ignored):
        raise ValueError(f"{op}: ignore must hold other labels than foreground, got {sorted(set(wanted) & set(ignored))} in both")
    labels = labels.to(torch.int64)
    mask = torch.zeros_like(labels, dtype=torch.float32)
    for values, weight in ((wanted, 1.0), (ignored, _IGNORED)):
        mask = mask.masked_fill(torch.isin(labels, torch.tensor(values, dtype=torch.int64, device=labels.device)), weight)
    return mask


def collate(annotations: Sequence[Tensor | None], height: int, width: int) -> GivenMask:
    """One batch from per-image annotations: a segmentation [1, H, W] or [H, W], boxes [K, 4], or None for "not annotated".

    A segmentation is bool, floating point in [0, 1], or integers that are all 0 and 1 or all 0 and 255; class labels go through
    `labels_to_mask`. Boxes are (x0, y0, x1, y1) in pixels. A [K, 4] tensor is read as boxes unless H×W is that shape itself.
    Works as part of a DataLoader's collate_fn.
    Errors:  ValueError for an annotation of another shape or with other values, TypeError for no tensor, naming its index.
    """
    values = torch.zeros(len(annotations), 1, height, width)
    annotated = torch.zeros(len(annotations), dtype=torch.bool)
    for i, annotation in enumerate(annotations):
        if annotation is None:
            continue
        name = f"annotation {i}"
        _checks.require_tensor(_OP, name, annotation)
        annotated[i] = True
        shape = list(annotation.shape)
        if shape in ([height, width], [1, height, width]):
            require_mask_values(_OP, name, annotation)
            values[i, 0] = _as_mask(annotation, torch.float32).reshape(height, width)
        elif annotation.ndim in (1, 2) and shape[-1] == 4:
            _require_box_values(name, annotation, height, width)
            values[i] = boxes_to_mask(annotation, height, width)
        else:
            raise ValueError(
                f"{_OP}: annotation {i} must be a segmentation [{height}, {width}] or [1, {height}, {width}], boxes [K, 4], "
                f"or None, got shape {shape}"
            )
    return GivenMask(values, annotated)


def _as_mask(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers, which are 0 and 1 or 0 and 255, as 0 and 1. Metadata only: `check_given` is what looks at the values."""
    return values.to(dtype) if values.is_floating_point() else (values != 0).to(dtype)


def require_mask_values(op: str, name: str, values: Tensor) -> None:
    """Raises ValueError unless values are bool, floats in [0, 1], or integers that are all 0 and 1 or all 0 and 255."""
    if values.dtype == torch.bool or values.numel() == 0:
        return
    least, greatest = (v.item() for v in values.aminmax())
    if values.is_floating_point():
        # NaN and Inf are not masked anywhere: they show in the loss.
        slack = max(_ROUNDING, 2 * torch.finfo(values.dtype).eps)
        if (math.isfinite(least) and least < -slack) or (math.isfinite(greatest) and greatest > 1 + slack):
            raise ValueError(
                f"{op}: {name} must lie in [0, 1], got values from {least:g} to {greatest:g}: divide by 255, clamp what bicubic "
                "resizing overshot, or make a mask of class labels with sib_fast.masks.labels_to_mask"
            )
    elif not (least >= 0 and ((values == 0) | (values == greatest)).all() and greatest in (0, 1, 255)):
        found = values.unique()[:6].tolist()
        raise ValueError(
            f"{op}: {name} must hold 0 and 1 or 0 and 255 alone, got {found}{' …' if len(found) == 6 else ''}: say which labels "
            "are the object and which count for neither with sib_fast.masks.labels_to_mask(labels, foreground=…, ignore=…)"
        )


def _require_box_values(name: str, boxes: Tensor, height: int, width: int) -> None:
    if boxes.numel() == 0:
        return
    x0, y0, x1, y1 = boxes.reshape(-1, 4).unbind(1)
    if not ((x0 <= x1) & (y0 <= y1)).all():
        raise ValueError(
            f"{_OP}: {name} must hold boxes with x0 <= x1 and y0 <= y1, got {boxes.tolist()}: (x, y, width, height) becomes "
            "(x, y, x + width, y + height)"
        )
    if boxes.is_floating_point() and height * width > 1 and boxes.min() >= 0 and boxes.max() <= 1:
        raise ValueError(
            f"{_OP}: {name} must hold boxes in pixels, got {boxes.tolist()} for an image of {height}×{width}: multiply by its "
            "width and height"
        )


def check_given(op: str, mask: object) -> None:
    """Raises ValueError for a given mask whose values are none. Reads them, which on a device is a synchronisation.

    What is wrong with its type, shape or device is `resolve_given`'s to say.
    """
    values, annotated = mask if isinstance(mask, GivenMask) else (mask, None)
    if not isinstance(values, Tensor) or values.is_complex() or values.is_meta:
        return
    if isinstance(annotated, Tensor) and annotated.dtype == torch.bool and annotated.shape == values.shape[:1]:
        values = values[annotated.to(values.device)]
    require_mask_values(op, "mask", values)


def resolve_given(
    op: str, mask: Tensor | GivenMask, vjp: Tensor, image_size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Checks a given mask against the VJP. Returns (values [N, 1, H, W] in the VJP's dtype, annotated [N] or None).

    Integers are read as 0 and 1 or 0 and 255; whether they are is for `check_given`.
    image_size: where the VJP is one of a feature map; a mask of the image's size is then averaged down to it.
    """
    values, annotated = require_given(op, mask, vjp)
    images, _, height, width = vjp.shape
    if image_size is not None and tuple(values.shape) == (images, 1, *image_size):
        values = torch.nn.functional.adaptive_avg_pool2d(values, (height, width))
    _checks.require_same_shape(op, "mask", values, "x", (images, 1, height, width))
    return values, annotated


def require_given(op: str, mask: Tensor | GivenMask, vjp: Tensor) -> tuple[Tensor, Tensor | None]:
    """Checks all of a given mask but its size. Returns (values [N, 1, H, W] in the VJP's dtype, annotated or None)."""
    values, annotated = mask if isinstance(mask, GivenMask) else (mask, None)
    _checks.require_tensor(op, "mask", values)
    images, _, height, width = (*vjp.shape[:2], *values.shape[2:]) if values.ndim == 4 else vjp.shape
    _checks.require_same_shape(op, "mask", values, "x", (images, 1, height, width))
    if values.is_floating_point() or values.is_complex():
        _checks.require_floating(op, "mask", values)
    _checks.require_same_device(op, "mask", values, "x", vjp)
    if annotated is not None:
        _checks.require_tensor(op, "mask.annotated", annotated)
        _checks.require_same_shape(op, "mask.annotated", annotated, "x", (images,))
        _checks.require_same_device(op, "mask.annotated", annotated, "x", vjp)
        if annotated.dtype != torch.bool:
            raise TypeError(f"{op}: mask.annotated must be bool, got {annotated.dtype}")
    return _as_mask(values, vjp.dtype), annotated


def is_fully_annotated(annotated: Tensor) -> bool:
    """Whether every image is annotated, as far as it is known without a synchronisation: on a device it is not."""
    return annotated.device.type == "cpu" and bool(annotated.all())
