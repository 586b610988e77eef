"""Sets of image files: what their modules list, how annotations are read, and the one class that serves the items."""

from __future__ import annotations

import csv
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sib_fast.lab.datasets.base import LabelledImages
from sib_fast.lab.transforms import IMAGENET_MEAN, IMAGENET_STD, JointTransform, read_rgb
from sib_fast.masks import GivenMask, boxes_to_mask


class Sample(NamedTuple):
    """annotation: whatever the set's ``read_mask`` reads the object from: a path, a box; None for an image without."""

    image: str
    label: int
    annotation: Any = None


class Listing(NamedTuple):
    """A split as its module found it. ``read_mask(sample, height, width)`` -> bool [1, height, width], None without masks.

    upright: the annotations are of the pictures as viewers show them, turned by EXIF, as people draw on their own ones.
    """

    classes: tuple[str, ...]
    samples: list[Sample]
    mask_kind: str
    read_mask: Callable[[Sample, int, int], Tensor] | None
    upright: bool = False


class ImageFiles(LabelledImages):
    """Images read when they are asked for; picklable, so that DataLoader workers may be forked or spawned."""

    def __init__(self, listing: Listing, image_size: int, augment: bool):
        super().__init__(listing.classes, image_size, IMAGENET_MEAN, IMAGENET_STD, listing.mask_kind)
        self.samples = listing.samples
        self._read_mask, self._upright = listing.read_mask, listing.upright
        self._transform = JointTransform(image_size, augment)
        self._partly = self.annotated < len(self)

    def is_annotated(self, index: int) -> bool:
        return self.has_masks and self.samples[index].annotation is not None

    @property
    def labels(self) -> list[int]:
        return [sample.label for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | GivenMask]:
        sample = self.samples[index]
        image = read_rgb(sample.image, self._upright)
        mask = None
        if self._read_mask and sample.annotation is not None:
            mask = self._read_mask(sample, *image.shape[-2:])
        image, mask = self._transform(image, mask)
        if mask is None or self._partly:
            # default_collate batches the two fields, and the batch is again a GivenMask
            values = torch.zeros(1, *image.shape[-2:], dtype=torch.bool) if mask is None else mask
            mask = GivenMask(values, torch.tensor(mask is not None))
        return image, torch.tensor(sample.label), mask


def require(op: str, source: str, paths: Iterable[str | Path]) -> None:
    """FileNotFoundError for the first of the paths that does not exist, ValueError for the first file without content.

    Every folder is listed once: sets have 10^4 files.
    """
    wanted = [os.path.split(os.path.abspath(path)) for path in paths]
    present = {
        folder: {e.name: e for e in os.scandir(folder)} if os.path.isdir(folder) else {} for folder in {f for f, _ in wanted}
    }
    missing = [os.path.join(folder, name) for folder, name in wanted if name not in present[folder]]
    if missing:
        count = f" ({len(missing)} of {len(wanted)} are missing)" if len(wanted) > 1 else ""
        raise FileNotFoundError(f"{op}: root must hold {missing[0]}, got no such file or folder{count}; {source}")
    found = [present[folder][name] for folder, name in wanted]
    empty = [entry.path for entry in found if entry.is_file() and entry.stat().st_size == 0]
    if empty:
        raise ValueError(f"{op}: {empty[0]} must not be empty, got 0 bytes ({len(empty)} of {len(wanted)} files are); {source}")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what a file manager or an archiver of macOS left: ``._x.jpg``, ``.DS_Store``, ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def class_names(op: str, path: Path, names: Mapping[int, str]) -> tuple[str, ...]:
    """Names of the labels 0, 1, 2, …; a gap would shift what a logit means."""
    if not names or sorted(names) != list(range(len(names))):
        raise ValueError(f"{op}: {path} must name every class from 1 on, got {sorted(k + 1 for k in names)}")
    return tuple(names[k] for k in range(len(names)))


def read_values(op: str, path: str, height: int, width: int, mode: str | None = None) -> np.ndarray:
    """The stored values of an annotation image, a palette's indices rather than its colours; mode: convert to it first.

    Shapes:  -> [height, width] uint8. Errors: ValueError for a damaged file, for colours, or for another size.
    """
    try:
        with Image.open(path) as file:
            values = np.array(file.convert(mode) if mode else file)
    except Exception as error:
        raise ValueError(f"{op}: {path} must be a readable annotation image, got {error!r}") from error
    if values.shape != (height, width) or values.dtype != np.uint8:
        raise ValueError(
            f"{op}: {path} must hold one 8-bit value per pixel of its {width}x{height} image, "
            f"got {'x'.join(map(str, values.shape[1::-1] + values.shape[2:]))} {values.dtype}"
        )
    return values


def masks_by_name(folder: Path) -> dict[str, str]:
    """Masks by their path below the folder without suffix; a name that ends in _mask or -mask counts without it."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            place = path.relative_to(folder).with_suffix("").as_posix()
            for ending in ("_mask", "-mask"):
                place = place.removesuffix(ending)
            found.setdefault(place, str(path))
    return found


def read_object(op: str, path: str, height: int, width: int) -> Tensor:
    """A mask as people draw them: an image of the picture's proportions, of any size.

    Object is what is not zero; where the values go up to 255, as in soft and in JPEG masks, what is at least 128. Colours count
    by their brightest channel, and opacity where the colours are all alike.

    Shapes:  -> [1, height, width] bool. Errors: ValueError for a damaged file or other proportions.
    """
    try:
        with Image.open(path) as file:
            values = np.array(file)
    except Exception as error:  # whatever a decoder throws at a damaged file
        raise ValueError(f"{op}: mask must be a readable image, got {error!r} in {path}") from error
    if values.ndim == 3:
        colours = values[..., :3] if values.shape[2] in (3, 4) else values[..., :1]
        opacity = values[..., -1] if values.shape[2] in (2, 4) else None
        plain = opacity is not None and (colours == colours[:1, :1]).all()
        values = opacity if plain else colours.max(axis=2)
    inside = values >= 128 if values.dtype == np.uint8 and values.max() == 255 else values != 0
    its_height, its_width = inside.shape
    slack = max(width, height, its_width, its_height)  # of a pixel at either side
    if abs(width * its_height - its_width * height) > slack:
        turned = abs(height * its_height - its_width * width) <= slack
        hint = "; it must be of the picture as viewers show it, turned by its EXIF orientation" if turned else ""
        raise ValueError(
            f"{op}: mask must have the image's proportions, got {its_width}x{its_height} for {width}x{height} in {path}{hint}"
        )
    mask = Image.fromarray(inside.astype(np.uint8) * 255)
    if mask.size != (width, height):
        mask = mask.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(mask) >= 128)[None]


def own_mask(op: str, sample: Sample, height: int, width: int) -> Tensor:
    """``read_mask`` of a listing whose annotations are paths from :func:`masks_by_name`."""
    return read_object(op, sample.annotation, height, width)


def own_boxes(op: str, sample: Sample, height: int, width: int) -> Tensor:
    """``read_mask`` of a listing whose annotations are corners from :func:`boxes_by_name`."""
    return box_mask(op, sample.image, sample.annotation, height, width)


def boxes_by_name(op: str, path: Path) -> dict[str, list[tuple[float, ...]]]:
    """A table of boxes with the columns image, x0, y0, x1, y1: a path, and corners in pixels of that file; several lines of an
    image make a union.

    Errors:  FileNotFoundError; ValueError for missing columns and for corners that make no box.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{op}: boxes must be an existing file, got {path}")
    wanted = ["image", "x0", "y0", "x1", "y1"]
    found: dict[str, list[tuple[float, ...]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not set(wanted) <= set(reader.fieldnames):
            raise ValueError(f"{op}: boxes must have the columns {', '.join(wanted)}, got {reader.fieldnames} in {path}")
        for row in reader:
            try:
                corners = tuple(float(row[name]) for name in wanted[1:])
                if not (corners[0] < corners[2] and corners[1] < corners[3]):
                    raise ValueError("x0 < x1 and y0 < y1")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{op}: boxes must have four numbers a line, got {dict(row)} in {path}: {error}") from error
            found.setdefault(Path(row["image"]).as_posix(), []).append(corners)
    return found


class VocObject(NamedTuple):
    name: str
    box: tuple[float, float, float, float]


def read_voc_xml(op: str, path: str) -> tuple[tuple[float, float], list[VocObject]]:
    """An annotation in the format of Pascal VOC, which ImageNet and Stanford Dogs share.

    Returns: (width, height) of the annotated image, and its objects with (x0, y0, x1, y1). A VOC object can have parts
             with names and boxes of their own, which are not objects.
    Errors:  ValueError naming the file.
    """
    try:
        tree = ElementTree.parse(path)
        size = (_number(tree, "size/width"), _number(tree, "size/height"))
        objects = []
        for node in tree.findall("object"):
            x0, y0, x1, y1 = (_number(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            objects.append(VocObject((node.findtext("name") or "").strip(), (x0, y0, x1, y1)))
        if not objects or min(size) <= 0:
            raise ValueError(f"{len(objects)} objects, size {size}")
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise ValueError(f"{op}: {path} must be a Pascal VOC annotation with objects, got {error!r}") from error
    return size, objects


def _number(node: ElementTree.Element | ElementTree.ElementTree, tag: str) -> float:
    text = node.findtext(tag)
    if text is None:
        raise ValueError(f"no {tag}")
    return float(text)


def box_mask(op: str, where: str, boxes: Iterable[tuple[float, ...]], height: int, width: int) -> Tensor:
    """The union of boxes as a mask. Shapes: -> [1, height, width] bool. Errors: ValueError where no pixel lies inside."""
    boxes = list(boxes)
    mask = boxes_to_mask(torch.tensor(boxes), height, width).bool()
    if not mask.any():
        raise ValueError(f"{op}: {where} must hold a box with a pixel of its {width}x{height} image inside, got {boxes}")
    return mask
