"""Image classification sets with object masks, read from their official folder layouts; nothing is downloaded.

One file per set. What each set is, where it comes from and what its masks mean: docs/data.md.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sib_fast import _checks
from sib_fast.lab.datasets.base import LabelledImages

NAMES = ("digits", "folder", "pets", "voc", "dogs", "cub", "cutouts")
"""Every name has a module of that name here, with ``MASKS`` (what it offers) and ``open_split``."""

__all__ = ["NAMES", "LabelledImages", "open_dataset"]


def open_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    *,
    image_size: int,
    augment: bool = False,
    masks: str = "auto",
    **options: Any,
) -> LabelledImages:
    """A data set by name; an item is ``(image, label, mask)``, and PyTorch's own collate function makes batches of them.

    Args:
        name: one of :data:`NAMES`.
        root: the folder that the official archives were unpacked in (docs/data.md); None for ``digits``.
        split: ``"train"`` or ``"test"``; ``"val"`` is another name for the latter, as most sets have two parts.
        image_size: side S of the square images.
        augment: random resized crops and flips; ``digits`` are random compositions as they are, and take none.
        masks: ``"auto"`` (the best there is), or ``"segmentation"`` or ``"box"`` where the set has them.
        options: ``digits``: ``size``, ``correlation``, ``seed``; ``cutouts``: these and the others of
            :class:`sib_fast.lab.datasets.cutouts.Cutouts`.

    Shapes:  image [3, S, S] float32, normalised; label [] int64; mask [1, S, S] bool, true on the object. In a set without
             masks, or with masks for some images, the third is a :class:`sib_fast.masks.GivenMask` that says whether there is
             one, which SIBLoss takes as it is.
    Errors:  ValueError for an unknown name, split or kind of mask, and for damaged files, naming them;
             FileNotFoundError that says which file is missing and what to download;
             ImportError without torchvision or the lab extra.
    """
    _checks.require_choice("open_dataset", "name", name, NAMES)
    _checks.require_choice("open_dataset", "split", split, ("train", "test", "val"))
    try:
        module = importlib.import_module(f"sib_fast.lab.datasets.{name}")
    except ImportError as error:
        raise ImportError(
            f"{name}: needs torchvision and the lab extra, got {error}; install the torchvision that goes with your torch "
            "(https://pytorch.org/get-started), and pip install 'sib_fast[lab]'"
        ) from error
    _checks.require_choice(name, "masks", masks, ("auto", *module.MASKS))
    if name == "digits":
        return module.open_split(split, image_size, **options)
    if root is None:
        raise ValueError(f"{name}: root must be given, got None; docs/data.md says what belongs in it")
    from sib_fast.lab.datasets.files import ImageFiles

    if name == "cutouts":
        return module.open_split(Path(root).expanduser(), split, masks, image_size=image_size, augment=augment, **options)
    return ImageFiles(module.open_split(Path(root).expanduser(), split, masks, **options), image_size, augment)
