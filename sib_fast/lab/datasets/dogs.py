"""Stanford Dogs: 120 breeds with bounding boxes, the set of the method's authors."""

from __future__ import annotations

from pathlib import Path

from scipy.io import loadmat
from torch import Tensor

from sib_fast.lab.datasets.files import Listing, Sample, box_mask, class_names, read_voc_xml, require

MASKS = ("box",)


def open_split(root: Path, split: str, masks: str) -> Listing:
    """``lists.tar`` holds its files without a folder; copies of the set often put them in ``lists/``, so both are read."""
    source = (
        "download images.tar, annotation.tar and lists.tar from http://vision.stanford.edu/aditya86/ImageNetDogs/ and "
        f"unpack all three in {root}"
    )
    folder = root / "lists" if (root / "lists").is_dir() else root
    lists = {part: folder / f"{part}_list.mat" for part in ("train", "test")}
    require("dogs", source, [root / "Images", root / "Annotation", *lists.values()])
    entries = {part: _read_list(path) for part, path in lists.items()}
    # "n02086240-Shih-Tzu/n02086240_11.jpg": the breed follows the first hyphen
    names = {label: image.split("/")[0].partition("-")[2] for part in entries.values() for image, _, label in part}
    samples = [
        Sample(str(root / "Images" / image), label, str(root / "Annotation" / annotation))
        for image, annotation, label in entries["train" if split == "train" else "test"]
    ]
    require("dogs", source, [path for s in samples for path in (s.image, s.annotation)])
    return Listing(class_names("dogs", folder, names), samples, "box", read_boxes)


def _read_list(path: Path) -> list[tuple[str, str, int]]:
    """MATLAB's cell arrays [n, 1] of strings ``file_list`` and ``annotation_list``, and ``labels`` [n, 1] from 1 on."""
    try:
        content = loadmat(path)
        images, annotations = ([str(cell.item()) for cell in content[f"{name}_list"].ravel()] for name in ("file", "annotation"))
        labels = [int(label) - 1 for label in content["labels"].ravel()]
        return list(zip(images, annotations, labels, strict=True))
    except Exception as error:  # what a reader of a binary format throws at a damaged file
        raise ValueError(f"dogs: {path} must be a list of lists.tar, got {error!r}") from error


def read_boxes(sample: Sample, height: int, width: int) -> Tensor:
    """The union of the dogs' boxes, scaled where the annotated image had another size than the file."""
    size, dogs = read_voc_xml("dogs", sample.annotation)
    across, down = width / size[0], height / size[1]
    boxes = [(x0 * across, y0 * down, x1 * across, y1 * down) for x0, y0, x1, y1 in (dog.box for dog in dogs)]
    return box_mask("dogs", sample.annotation, boxes, height, width)
