"""Oxford-IIIT Pet: 37 breeds of cats and dogs with trimaps, where ``torchvision.datasets.OxfordIIITPet`` has them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sib_fast.lab.datasets.files import Listing, Sample, class_names, read_values, require

MASKS = ("segmentation",)


def open_split(root: Path, split: str, masks: str) -> Listing:
    """The official lists, read here: torchvision's class keeps its paths and labels to itself, and decodes to tell one."""
    base = root / "oxford-iiit-pet"
    source = (
        "download images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/ and unpack both "
        f"in {base}"
    )
    lists = {"train": base / "annotations" / "trainval.txt", "test": base / "annotations" / "test.txt"}
    require("pets", source, [base / "images", base / "annotations" / "trimaps", *lists.values()])
    entries = {name: _read_list(path) for name, path in lists.items()}
    names = {label: image.rsplit("_", 1)[0].replace("_", " ").title() for part in entries.values() for image, label in part}
    samples = [
        Sample(str(base / "images" / f"{image}.jpg"), label, str(base / "annotations" / "trimaps" / f"{image}.png"))
        for image, label in entries["train" if split == "train" else "test"]
    ]
    require("pets", source, [path for s in samples for path in (s.image, s.annotation)])
    return Listing(class_names("pets", base / "annotations", names), samples, "segmentation", read_trimap)


def _read_list(path: Path) -> list[tuple[str, int]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if len(words) != 4 or not words[1].isdigit():
            raise ValueError(f"pets: {path} line {number} must be 'image class species breed', got {line!r}")
        entries.append((words[0], int(words[1]) - 1))
    return entries


def read_trimap(sample: Sample, height: int, width: int) -> Tensor:
    """1 is the animal, 2 the background, 3 a band over the outline and what was not classified. 3 counts as object: the
    outline is evidence about the animal, and as background it would be punished most where explanations are strongest."""
    values = read_values("pets", sample.annotation, height, width)
    if values.min() < 1 or values.max() > 3:
        raise ValueError(f"pets: {sample.annotation} must be a trimap of values 1, 2 and 3, got {values.min()} to {values.max()}")
    return torch.from_numpy(values != 2)[None]
