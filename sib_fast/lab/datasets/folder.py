"""A folder of your own images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val/``), through torchvision's ImageFolder."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from sib_fast.lab.datasets.files import Listing, Sample, require

MASKS = ()
_SOURCE = "the layout is train/<class>/<image> and test/<class>/<image>, or val/ in the place of test/"


def open_split(root: Path, split: str, masks: str) -> Listing:
    """Where both ``val`` and ``test`` exist, they are the two that their names say."""
    train, folder = root / "train", root / split
    if split != "train" and not folder.is_dir():
        other = root / {"val": "test", "test": "val"}[split]
        folder = other if other.is_dir() else folder
    require("folder", _SOURCE, [train, folder])
    try:
        images = ImageFolder(str(folder))
        classes = find_classes(str(train))[0]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"folder: {folder} must hold images in every class folder, got {error}; {_SOURCE}") from error
    if images.classes != classes:
        # ImageFolder numbers the classes that it finds: one more or less would shift the labels of all that follow
        differing = sorted(set(images.classes) ^ set(classes))
        raise ValueError(f"folder: {folder} must have the class folders of {train}, got a difference in {differing}")
    return Listing(tuple(classes), [Sample(path, label) for path, label in images.samples], "none", None)
