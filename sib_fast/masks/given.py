"""Masks that are given: segmentations, boxes, and images that nobody annotated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sib_fast import _checks

_OP = "given mask"


class GivenMask(NamedTuple):
    """A batch of annotations. Images that are not annotated keep the loss's own mask.

    Shapes:  values [N, 1, H, W] in [0, 1], floating point; annotated bool [N].
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


def collate(annotations: Sequence[Tensor | None], height: int, width: int) -> GivenMask:
    """One batch from per-image annotations: a segmentation [1, H, W] or [H, W], boxes [K, 4], or None for "not annotated".

    A [K, 4] tensor is read as boxes unless H×W is that shape itself. Works as part of a DataLoader's collate_fn.
    Errors:  ValueError for an annotation of another shape, TypeError for no tensor, naming its index.
    """
    values = torch.zeros(len(annotations), 1, height, width)
    annotated = torch.zeros(len(annotations), dtype=torch.bool)
    for i, annotation in enumerate(annotations):
        if annotation is None:
            continue
        _checks.require_tensor(_OP, f"annotation {i}", annotation)
        annotated[i] = True
        shape = list(annotation.shape)
        if shape in ([height, width], [1, height, width]):
            values[i, 0] = annotation.reshape(height, width).to(torch.float32)
        elif annotation.ndim in (1, 2) and shape[-1] == 4:
            values[i] = boxes_to_mask(annotation, height, width)
        else:
            raise ValueError(
                f"{_OP}: annotation {i} must be a segmentation [{height}, {width}] or [1, {height}, {width}], boxes [K, 4], "
                f"or None, got shape {shape}"
            )
    return GivenMask(values, annotated)


def resolve_given(
    op: str, mask: Tensor | GivenMask, vjp: Tensor, image_size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Checks a given mask against the VJP. Returns (values [N, 1, H, W] in the VJP's dtype, annotated [N] or None).

    image_size: where the VJP is one of a feature map; a mask of the image's size is then averaged down to it.
    """
    values, annotated = mask if isinstance(mask, GivenMask) else (mask, None)
    _checks.require_tensor(op, "mask", values)
    images, _, height, width = vjp.shape
    if image_size is not None and tuple(values.shape) == (images, 1, *image_size):
        values = torch.nn.functional.adaptive_avg_pool2d(values.to(vjp.dtype), (height, width))
    _checks.require_same_shape(op, "mask", values, "x", (images, 1, height, width))
    if values.dtype != torch.bool:
        _checks.require_floating(op, "mask", values)
    _checks.require_same_device(op, "mask", values, "x", vjp)
    if annotated is not None:
        _checks.require_tensor(op, "mask.annotated", annotated)
        _checks.require_same_shape(op, "mask.annotated", annotated, "x", (images,))
        _checks.require_same_device(op, "mask.annotated", annotated, "x", vjp)
        if annotated.dtype != torch.bool:
            raise TypeError(f"{op}: mask.annotated must be bool, got {annotated.dtype}")
    return values.to(vjp.dtype), annotated
