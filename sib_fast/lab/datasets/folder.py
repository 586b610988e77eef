"""A folder of your own images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val/``), as torchvision's ImageFolder has them.

Masks of yours, if there are any, lie in the same folders below ``masks/``.
But for what file managers leave: hidden files and folders, macOS's resource forks among them (``._x.jpg``), are no images.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from sib_fast.lab.datasets.files import Listing, Sample, is_hidden, masks_by_name, read_object, require

MASKS = ("segmentation",)
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
    annotations = root / "masks" / folder.name
    if masks == "auto" and not annotations.is_dir():
        return Listing(tuple(classes), [Sample(path, label) for path, label in images], "none", None)
    return Listing(tuple(classes), _with_masks(images, folder, annotations), "segmentation", read_mask)


def _with_masks(images: list[tuple[str, int]], folder: Path, annotations: Path) -> list[Sample]:
    found = masks_by_name(annotations) if annotations.is_dir() else {}
    names = [Path(path).relative_to(folder).with_suffix("").as_posix() for path, _ in images]
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"folder: {annotations} must hold a mask for every image, got none for {missing[0]} ({len(missing)} of {len(names)} "
            f"are missing); without the folder {annotations} the images count as images without masks"
        )
    require("folder", _SOURCE, [found[name] for name in names])
    return [Sample(path, label, found[name]) for (path, label), name in zip(images, names, strict=True)]


def read_mask(sample: Sample, height: int, width: int) -> Tensor:
    return read_object("folder", sample.annotation, height, width)


def _classes(folder: Path) -> dict[str, int]:
    names = [name for name in find_classes(folder)[0] if not is_hidden(name)]
    if not names:
        raise FileNotFoundError(f"no class folder in {folder}")
    return {name: k for k, name in enumerate(names)}


def _is_image(path: Path) -> bool:
    return has_file_allowed_extension(path.name, IMG_EXTENSIONS) and not any(map(is_hidden, path.parts))
