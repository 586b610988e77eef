"""CUB-200-2011: 200 species of birds with a bounding box each, and segmentations from a second archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sib_fast.lab.datasets.files import Listing, Sample, box_mask, class_names, read_values, require

MASKS = ("segmentation", "box")

# The tables and their columns after the first, which is the number of an image or, in classes.txt, of a class.
_TABLES = {
    "images.txt": (str,),
    "classes.txt": (str,),
    "image_class_labels.txt": (int,),
    "train_test_split.txt": (int,),
    "bounding_boxes.txt": (float, float, float, float),
}


def open_split(root: Path, split: str, masks: str) -> Listing:
    """``masks="auto"`` takes segmentations where their folder is, boxes otherwise; ``mask_kind`` says which."""
    base = root / "CUB_200_2011"
    source = f"download CUB_200_2011.tgz from https://data.caltech.edu/records/65de6-vp158 and unpack it in {root}"
    require("cub", source, [base / "images", *(base / name for name in _TABLES)])
    images, classes, *per_image = (_read_table(base / name, columns) for name, columns in _TABLES.items())
    for name, table in zip(list(_TABLES)[2:], per_image, strict=True):
        if table.keys() != images.keys():
            difference = min(table.keys() ^ images.keys())
            raise ValueError(f"cub: {base / name} must list the images of images.txt, got a difference at image {difference}")
    labels, in_train, boxes = per_image
    # "001.Black_footed_Albatross"
    names = class_names("cub", base / "classes.txt", {k - 1: name.partition(".")[2] for k, (name,) in classes.items()})
    for name, table, choices in (("image_class_labels", labels, classes), ("train_test_split", in_train, (0, 1))):
        wrong = [f"image {k}: {v}" for k, (v,) in table.items() if v not in choices]
        if wrong:
            raise ValueError(f"cub: {base / name}.txt must hold numbers {min(choices)} to {max(choices)}, got {wrong[0]}")

    # the archive of segmentations makes a folder beside the other one, and many move it into that
    segmentations = base / "segmentations" if (base / "segmentations").is_dir() else root / "segmentations"
    kind = ("segmentation" if segmentations.is_dir() else "box") if masks == "auto" else masks
    samples = []
    for key in (k for k, (flag,) in in_train.items() if flag == (split == "train")):
        (path,), (label,) = images[key], labels[key]
        annotation = str(segmentations / Path(path).with_suffix(".png")) if kind == "segmentation" else (key, boxes[key])
        samples.append(Sample(str(base / "images" / path), label - 1, annotation))
    require("cub", source, [s.image for s in samples])
    if kind == "box":
        return Listing(names, samples, kind, read_box)
    source = f"download segmentations.tgz from https://data.caltech.edu/records/w9d68-gec53 and unpack it in {root}"
    require("cub", source, [s.annotation for s in samples])
    return Listing(names, samples, kind, read_segmentation)


def _read_table(path: Path, columns: tuple[type, ...]) -> dict[int, tuple[Any, ...]]:
    table = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            key, *values = line.split()
            table[int(key)] = tuple(column(value) for column, value in zip(columns, values, strict=True))
        except ValueError as error:
            kinds = " ".join(column.__name__ for column in (int, *columns))
            raise ValueError(f"cub: {path} line {number} must be '{kinds}', got {line!r}") from error
    return table


def read_box(sample: Sample, height: int, width: int) -> Tensor:
    """x, y, width and height in pixels."""
    image, (x, y, across, down) = sample.annotation
    return box_mask("cub", f"bounding_boxes.txt, image {image},", [(x, y, x + across, y + down)], height, width)


def read_segmentation(sample: Sample, height: int, width: int) -> Tensor:
    """A pixel's grey is the share of the annotators who called it bird; half of them decide."""
    return torch.from_numpy(read_values("cub", sample.annotation, height, width, mode="L") >= 128)[None]
