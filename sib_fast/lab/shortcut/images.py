"""The images that a network is asked about: gathered from any data set that gives (image, label, mask), or from two folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sib_fast.masks import GivenMask, collate

_OP = "diagnose"
_PATIENCE = 20  # items read without one that can be used, after which the reason is an error: all will be like them
_UNREAD = "no mask: not annotated"  # in the place of an item that the data knows to have none
_OUTSIDE = 1e-3  # by this much may a pixel leave [0, 1]: rounding


@dataclass(frozen=True)
class Images:
    """What is tested, in memory: 0.6 MB an image at 224 px.

    Attributes:
        pixels: [N, C, H, W] float32 in [0, 1]. labels: [N] int64. masks: [N, 1, H, W] bool.
        names: of each image: its file, or its place in the data.
        classes: in the order of the labels.
        mask_kind: "segmentation" or "box".
        left_out: (name, reason) of what could not be tested.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    mask_kind: str
    left_out: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.labels)


def gather(
    data: Any,
    count: int,
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    tell: Any = lambda share: None,
) -> Images:
    """`count` images with a usable mask: a random sample of a data set with a length, the first ones of another iterable.

    Args:    data: items (image [C, H, W], label, mask), or batches of them. The mask: [1, H, W] or [H, W] as
             `sib_fast.masks.collate` takes it, boxes [K, 4], None or a GivenMask. classes, mean, std: of the data's own
             attributes by default; without them "0", "1", …, and pixels as they are, which must then lie in [0, 1].
    Errors:  ValueError where nothing can be used, for labels out of range, for images of several sizes.
    """
    mean, std = (given if given is not None else getattr(data, name, None) for given, name in ((mean, "mean"), (std, "std")))
    if (mean is None) != (std is None):
        raise ValueError(f"{_OP}: mean and std must be given together, got {mean} and {std}")
    pixels, labels, masks, names, left_out = [], [], [], [], []
    read = 0
    for name, item in _items(data, seed):
        read += item is not _UNREAD
        try:
            if isinstance(item, Exception):
                raise item
            image, label, mask = (None, 0, None) if item is _UNREAD else _read(item)
            reason = _unusable(mask)
        except (ValueError, OSError) as error:
            reason = str(error)
            image = None
        if reason:
            left_out.append((name, reason))
            if not pixels and read >= _PATIENCE:
                break
            continue
        assert image is not None
        if pixels and image.shape != pixels[0].shape:
            raise ValueError(
                f"{_OP}: data must give images of one size, got {list(pixels[0].shape)} and {list(image.shape)} ({name}): "
                "resize and crop image and mask together"
            )
        pixels.append(_to_pixels(image, mean, std))
        labels.append(label)
        masks.append(mask)
        names.append(name)
        tell(len(pixels) / count)
        if len(pixels) == count:
            break
    if len(pixels) < 2:
        why = f"; {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"{_OP}: data must give two images or more with object and background, got {len(pixels)}{why}")
    greatest, known = max(labels), tuple(map(str, classes or getattr(data, "classes", ())))
    known = known or tuple(map(str, range(greatest + 1)))
    if min(labels) < 0 or greatest >= len(known):
        raise ValueError(f"{_OP}: labels must lie in [0, {len(known)}), as there are {len(known)} classes, got {greatest}")
    kind = getattr(data, "mask_kind", "segmentation")
    together = torch.stack(pixels)
    if together.min() < -_OUTSIDE or together.max() > 1 + _OUTSIDE:
        hint = "normalised images need their mean and std" if mean is None else "mean and std are not those of the images"
        raise ValueError(
            f"{_OP}: data must give images in [0, 1] after its normalisation is undone, "
            f"got {float(together.min()):g} to {float(together.max()):g}: {hint}"
        )
    return Images(together.clamp_(0, 1), torch.tensor(labels), torch.stack(masks), tuple(names), known, kind, tuple(left_out))


def _items(data: Any, seed: int) -> Iterator[tuple[str, Any]]:
    """(name, item), or the exception in the place of an item that cannot be read. Batches are taken apart."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        # A torch generator would be the global one's neighbour; this one is nobody's.
        is_annotated = getattr(data, "is_annotated", lambda _: True)
        for index in np.random.default_rng(seed).permutation(len(data)).tolist():
            name = _name(data, index)
            try:
                yield name, data[index] if is_annotated(index) else _UNREAD
            except (ValueError, OSError) as error:
                yield name, error
        return
    number = 0
    for item in data:
        image = item[0]
        if isinstance(image, Tensor) and image.ndim == 4:
            for i in range(len(image)):
                mask = item[2]
                yield f"item {number}", (image[i], item[1][i], _nth(mask, i))
                number += 1
        else:
            yield f"item {number}", item
            number += 1


def _nth(mask: Any, i: int) -> Any:
    if mask is None:
        return None
    # A NamedTuple collates to itself with batched fields
    return GivenMask(mask[0][i], mask[1][i]) if isinstance(mask, (tuple, list)) and len(mask) == 2 else mask[i]


def _name(data: Any, index: int) -> str:
    """The file, where a data set lists its samples as this package's or torchvision's do."""
    samples = getattr(data, "samples", ())
    sample = samples[index] if len(samples) == len(data) else None
    path = sample[0] if isinstance(sample, tuple) and sample else None  # a Sample's first field too
    return str(path) if isinstance(path, (str, Path)) else f"item {index}"


def _read(item: Any) -> tuple[Tensor, int, Tensor | None]:
    """Image, label and mask bool [1, H, W], None for "not annotated"."""
    try:
        image, label, mask = item
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_OP}: data must give (image, label, mask), got {type(item).__name__}") from error
    if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{_OP}: data must give images as floating-point tensors [C, H, W], got {got}")
    if isinstance(mask, GivenMask):
        mask = mask.values if bool(mask.annotated) else None
    if isinstance(mask, Tensor) and mask.ndim == 4 and len(mask) == 1:
        mask = mask[0]
    given = collate([mask], *image.shape[1:])
    return image.detach().float().cpu(), int(label), (given.values[0] >= 0.5) if given.annotated[0] else None


def _unusable(mask: Tensor | None) -> str:
    """Why an image cannot be tested; empty if it can."""
    if mask is None:
        return _UNREAD
    if not mask.any():
        return "an empty mask: no object in what the network sees"
    return "a full mask: no background in what the network sees" if mask.all() else ""


def _to_pixels(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    if mean is None or std is None:
        return image
    shift, scale = (image.new_tensor(tuple(value)).view(-1, 1, 1) for value in (mean, std))
    return image * scale + shift


# ---- a folder of images, and masks or boxes beside it -------------------------------------------------------------------


def open_folder(images: Path, masks: Path | None, boxes: Path | None, image_size: int) -> Any:
    """A data set of `images/<class>/<image>` with `masks/<class>/<same name>.<any suffix>`, or a CSV of boxes.

    :func:`sib_fast.lab.datasets.files.read_object` reads a mask. A CSV has the columns image, x0, y0, x1, y1: the path below
    `images`, corners in pixels; several lines make a union. A picture without a mask or box is left out, and named. Pictures are
    turned as their EXIF orientation says, and masks and boxes are of what is then seen.

    Errors:  FileNotFoundError, ValueError.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from sib_fast.lab.datasets.files import (
        ImageFiles,
        Listing,
        Sample,
        boxes_by_name,
        is_hidden,
        masks_by_name,
        own_boxes,
        own_mask,
    )

    if (masks is None) == (boxes is None):
        raise ValueError(f"{_OP}: masks or boxes must be given with images, one of the two, got {masks} and {boxes}")
    for name, path in (("images", images), ("masks", masks)):
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"{_OP}: {name} must be an existing folder, got {path}")
    folders = sorted(p for p in images.iterdir() if p.is_dir() and not is_hidden(p.name))
    files = {
        folder.name: sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and not any(map(is_hidden, p.parts[-2:]))
        )
        for folder in folders
    }
    classes = tuple(name for name, found in files.items() if found)
    if not classes:
        raise ValueError(f"{_OP}: images must hold <class>/<image>, got no image in a class folder of {images}")
    corners = {} if boxes is None else boxes_by_name(_OP, boxes)
    found_masks = {} if masks is None else masks_by_name(masks)
    samples = []
    for label, name in enumerate(classes):
        for path in files[name]:
            place = path.relative_to(images)
            annotation = corners.get(place.as_posix()) if masks is None else found_masks.get(place.with_suffix("").as_posix())
            samples.append(Sample(str(path), label, annotation))
    if boxes is not None and not any(sample.annotation for sample in samples):
        raise ValueError(
            f"{_OP}: boxes must name images by their path below {images}, got none of them in {boxes}: "
            f"{next(iter(corners), '')!r}"
        )
    kind, read = ("segmentation", own_mask) if boxes is None else ("box", own_boxes)
    listing = Listing(classes, samples, kind, partial(read, _OP), upright=True)
    return ImageFiles(listing, image_size, augment=False)


def first_of(names: Iterable[str], most: int = 6) -> str:
    """A list of names for a sentence, cut where it is long."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")
