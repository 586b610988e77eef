"""Pascal VOC 2012 as a classification set: those images of its segmentation task that show objects of one class only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import VOCSegmentation

from sib_fast.lab.datasets.files import Listing, Sample, read_values, read_voc_xml, require

MASKS = ("segmentation",)

# In the order of the values 1 … 20 of the segmentations.
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_VOID = 255


def open_split(root: Path, split: str, masks: str) -> Listing:
    """Labels come from ``Annotations/*.xml``, which also name the objects that segmentations leave out as difficult."""
    base = root / "VOCdevkit" / "VOC2012"
    source = (
        "download VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and unpack it "
        f"in {root}; it makes VOCdevkit/VOC2012"
    )
    part = "train" if split == "train" else "val"
    folders = [base / name for name in ("JPEGImages", "Annotations", "SegmentationClass")]
    require("voc", source, [*folders, base / "ImageSets" / "Segmentation" / f"{part}.txt"])
    files = VOCSegmentation(str(root), year="2012", image_set=part)
    annotations = [str(base / "Annotations" / f"{Path(image).stem}.xml") for image in files.images]
    require("voc", source, [*files.images, *files.masks, *annotations])
    samples = []
    for image, segmentation, annotation in zip(files.images, files.masks, annotations, strict=True):
        names = {thing.name for thing in read_voc_xml("voc", annotation)[1]}
        if not names <= set(CLASSES):
            raise ValueError(f"voc: {annotation} must name classes of Pascal VOC, got {sorted(names - set(CLASSES))}")
        if len(names) == 1:
            samples.append(Sample(image, CLASSES.index(names.pop()), segmentation))
    return Listing(CLASSES, samples, "segmentation", read_segmentation)


def read_segmentation(sample: Sample, height: int, width: int) -> Tensor:
    """The class's pixels and the void ones: the band around every object, and objects too difficult to outline, which are
    of the same class here. As background, void would hold the outline, where explanations are strongest."""
    values = read_values("voc", sample.annotation, height, width)
    wrong = values[(values > len(CLASSES)) & (values != _VOID)]
    if wrong.size:
        raise ValueError(f"voc: {sample.annotation} must hold the classes 0 to {len(CLASSES)} or 255, got {wrong[0]}")
    return torch.from_numpy((values == sample.label + 1) | (values == _VOID))[None]
