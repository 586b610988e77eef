"""A folder of your own images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val/``), as torchvision's ImageFolder has them.

But for what file managers leave: hidden files and folders, macOS's resource forks among them (``._x.jpg``), are no images.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from sib_fast.lab.datasets.files import Listing, Sample, is_hidden, require

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
        numbers, classes = _classes(folder), list(_classes(train))
        images = make_dataset(folder, numbers, is_valid_file=lambda path: _is_image(Path(path).relative_to(folder)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"folder: {folder} must hold images in every class folder, got {error}; {_SOURCE}") from error
    if list(numbers) != classes:
        # The classes that are found are numbered: one more or less would shift the labels of all that follow
        differing = sorted(set(numbers) ^ set(classes))
        raise ValueError(f"folder: {folder} must have the class folders of {train}, got a difference in {differing}")
    require("folder", _SOURCE, [path for path, _ in images])
    return Listing(tuple(classes), [Sample(path, label) for path, label in images], "none", None)


def _classes(folder: Path) -> dict[str, int]:
    names = [name for name in find_classes(folder)[0] if not is_hidden(name)]
    if not names:
        raise FileNotFoundError(f"no class folder in {folder}")
    return {name: k for k, name in enumerate(names)}


def _is_image(path: Path) -> bool:
    return has_file_allowed_extension(path.name, IMG_EXTENSIONS) and not any(map(is_hidden, path.parts))
