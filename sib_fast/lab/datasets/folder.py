"""A folder of your own images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val/``), as torchvision's ImageFolder has them.

Masks of yours, if there are any, lie in the same folders below ``masks/``, or there are boxes in ``boxes/train.csv``, … ; both
may be those of some of the images. Images are turned as their EXIF orientation says, and annotations are of what is then seen.
But for what file managers leave: hidden files and folders, macOS's resource forks among them (``._x.jpg``), are no images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from sib_fast.lab.datasets.files import Listing, Sample, boxes_by_name, is_hidden, masks_by_name, own_boxes, own_mask, require

MASKS = ("segmentation", "box")
_SOURCE = "the layout is train/<class>/<image> and test/<class>/<image>, or val/ in the place of test/"


def open_split(root: Path, split: str, masks: str) -> Listing:
    """Where both ``val`` and ``test`` exist, they are the two that their names say. ``masks="auto"``: those that there are."""
    train, folder = root / "train", root / split
    if split != "train" and not folder.is_dir():
        other = root / {"val": "test", "test": "val"}[split]
        folder = other if other.is_dir() else folder
    require("folder", _SOURCE, [train, folder])
    try:
        numbers, classes = _classes(folder), list(_classes(train))
        images = make_dataset(folder, numbers, is_valid_file=lambda path: _is_image(Path(path).relative_to(folder)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"folder: {folder} must hold images in every class folder, got {error}; {_SOURCE}") from error
    if list(numbers) != classes:
        # The classes that are found are numbered: one more or less would shift the labels of all that follow
        differing = sorted(set(numbers) ^ set(classes))
        raise ValueError(f"folder: {folder} must have the class folders of {train}, got a difference in {differing}")
    require("folder", _SOURCE, [path for path, _ in images])
    annotations, table = root / "masks" / folder.name, root / "boxes" / f"{folder.name}.csv"
    if masks == "auto":
        masks = "segmentation" if annotations.is_dir() else "box" if table.is_file() else "none"
    if masks == "none":
        return Listing(tuple(classes), [Sample(path, label) for path, label in images], "none", None, upright=True)
    if masks == "box":
        names = [Path(path).relative_to(folder).as_posix() for path, _ in images]
        samples = _annotated(images, names, boxes_by_name("folder", table), table)
        return Listing(tuple(classes), samples, "box", partial(own_boxes, "folder"), upright=True)
    names = [Path(path).relative_to(folder).with_suffix("").as_posix() for path, _ in images]
    found = masks_by_name(annotations) if annotations.is_dir() else {}
    require("folder", _SOURCE, found.values())
    samples = _annotated(images, names, found, annotations)
    return Listing(tuple(classes), samples, "segmentation", partial(own_mask, "folder"), upright=True)


def _annotated(images: list[tuple[str, int]], names: list[str], found: dict[str, Any], where: Path) -> list[Sample]:
    """Some images may have no annotation, but no annotation may have no image: it would be one that a wrong name has lost."""
    strays = sorted(found.keys() - set(names))
    if strays or not found:
        got = f"{strays[0]!r} ({len(strays)} of {len(found)} have no image)" if strays else "none at all"
        raise ValueError(
            f"folder: {where} must hold annotations of images by their path, such as {names[0]!r}, got {got}; images without "
            "an annotation are fine"
        )
    return [Sample(path, label, found.get(name)) for (path, label), name in zip(images, names, strict=True)]


def _classes(folder: Path) -> dict[str, int]:
    names = [name for name in find_classes(folder)[0] if not is_hidden(name)]
    if not names:
        raise FileNotFoundError(f"no class folder in {folder}")
    return {name: k for k, name in enumerate(names)}


def _is_image(path: Path) -> bool:
    return has_file_allowed_extension(path.name, IMG_EXTENSIONS) and not any(map(is_hidden, path.parts))
