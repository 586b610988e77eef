"""Objects with an alpha channel on background photographs: exact masks, and a background kind per class with a given correlation.

    objects/<class>/<name>.png                 an object, its alpha is its mask
    objects/<class>/<group>/<name>.png         objects of one group: mirrored, recoloured, the same thing from another side
    backgrounds/<kind>/<name>.jpg              a background; groups as above
    kinds.json                                 optional: {"<class>": "<kind>"}, the kind that a class is seen on

Groups are what training and test images share none of, objects and backgrounds alike; a file without a group is one of its own.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sib_fast import _checks
from sib_fast.lab.datasets.base import LabelledImages
from sib_fast.lab.datasets.files import is_hidden, require
from sib_fast.lab.transforms import IMAGENET_MEAN, IMAGENET_STD, JointTransform, normalise, read_image
from sib_fast.masks import GivenMask

MASKS = ("segmentation", "box")
BACKGROUNDS = ("correlated", "shifted", "grey")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))
_SOURCE = "the layout is objects/<class>/<image with alpha> and backgrounds/<kind>/<image>, docs/data.md"
_TEST_SHARE = 0.3  # of the groups of every class and kind
_GREY = 128
# Of the image's side: the longer side of an object. Of a photograph's shorter side: a background's crop.
_OBJECT_SHARE = (0.45, 0.8)
_CROP_SHARE = (0.5, 1.0)

Groups = dict[str, list[list[str]]]


class Composite(NamedTuple):
    """How one image is made. background: None is plain grey. place: the object's longer side as a share of the image's, and how
    far down and across it lies, of what its size leaves; crop: the same of a square of the background, of its shorter side."""

    label: int
    object: str
    background: str | None
    kind: str | None
    mirrored: bool
    place: tuple[float, float, float]
    crop: tuple[float, float, float]


class Cutouts(LabelledImages):
    """Composites made when they are asked for, each a function of (split_seed, seed, split, index) and the files alone.

    Labels are balanced: image i has class i mod K. Every object of the split is shown once before one is shown again.

    Args:
        root: folder of the layout above.
        split: ``"train"`` or ``"test"``: no object group and no background group is in both.
        size: number of images.
        correlation: a class has its own background kind with this probability, otherwise one of all kinds.
        backgrounds: ``"correlated"``; ``"shifted"``: a kind of another class, never the own; ``"grey"``: no photograph.
            All else of an image is the same in the three.
        seed: of the composites. split_seed: of which groups are for tests; fixed unless given, so that tests of any seed show
            nothing that a training of any seed has seen.
        augment: random crops and flips, drawn from torch's generator.

    Attributes: kinds: the kind of every class. composites: how every image is made.
    Shapes:  image [3, S, S] float32, normalised as ImageNet's; label [] int64; mask [1, S, S] bool, alpha of half or more, or
             the box around it.
    Errors:  ValueError for arguments out of range, damaged files, an object without alpha or a class or kind of one group;
             FileNotFoundError for a missing folder.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        image_size: int,
        *,
        size: int = 1000,
        correlation: float = 0.95,
        backgrounds: str = "correlated",
        masks: str = "auto",
        seed: int = 0,
        split_seed: int = 0,
        augment: bool = False,
    ):
        if size < 1:
            raise ValueError(f"cutouts: size must be at least 1, got {size}")
        if image_size < 8:
            raise ValueError(f"cutouts: image_size must be at least 8, got {image_size}")
        if not 0 <= correlation <= 1:
            raise ValueError(f"cutouts: correlation must be in [0, 1], got {correlation}")
        for name, value in (("seed", seed), ("split_seed", split_seed)):
            if value < 0:
                raise ValueError(f"cutouts: {name} must not be negative, got {value}")
        _checks.require_choice("cutouts", "backgrounds", backgrounds, BACKGROUNDS)
        objects, photographs = read_tree(root)
        classes = tuple(objects)
        super().__init__(classes, image_size, IMAGENET_MEAN, IMAGENET_STD, "segmentation" if masks == "auto" else masks)
        self.kinds = _read_kinds(root, classes, tuple(photographs))
        self._transform = JointTransform(image_size, True) if augment else None

        objects, photographs = (
            {name: _part(name, groups, split, split_seed) for name, groups in tree.items()} for tree in (objects, photographs)
        )
        test = split != "train"
        shown = {name: _rounds([seed, test, *name.encode()], paths, -(-size // len(classes))) for name, paths in objects.items()}
        rng = np.random.default_rng([seed, test, 0])
        self.composites = [
            self._draw(rng, i % len(classes), shown[classes[i % len(classes)]][i // len(classes)], photographs, correlation)
            for i in range(size)
        ]
        if backgrounds == "grey":
            self.composites = [c._replace(background=None, kind=None) for c in self.composites]
        elif backgrounds == "shifted":
            # drawn apart, so that objects and places are those of the other forms
            rng = np.random.default_rng([seed, test, 1])
            self.composites = [self._shift(rng, c, photographs) for c in self.composites]

    def _draw(
        self, rng: np.random.Generator, label: int, path: str, photographs: dict[str, list[str]], correlation: float
    ) -> Composite:
        # all numbers are drawn whatever the outcome, so that the correlation does not shift later images
        own, other, which, mirrored, scale, down, across, share, top, left = rng.random(10)
        kind = self.kinds[label] if own < correlation else list(photographs)[int(other * len(photographs))]
        background = photographs[kind][int(which * len(photographs[kind]))]
        place, crop = (_between(_OBJECT_SHARE, scale), down, across), (_between(_CROP_SHARE, share), top, left)
        return Composite(label, path, background, kind, mirrored < 0.5, place, crop)

    def _shift(self, rng: np.random.Generator, composite: Composite, photographs: dict[str, list[str]]) -> Composite:
        which, background = rng.random(2)
        others = [kind for kind in photographs if kind != self.kinds[composite.label]]
        kind = others[int(which * len(others))]
        return composite._replace(kind=kind, background=photographs[kind][int(background * len(photographs[kind]))])

    @property
    def labels(self) -> list[int]:
        return [composite.label for composite in self.composites]

    def __len__(self) -> int:
        return len(self.composites)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | GivenMask]:
        composite = self.composites[index]
        image, mask = compose(composite, self.image_size)
        if self._transform is None:
            image = normalise(image)
        else:
            image, mask = self._transform(image, mask)
        if self.mask_kind == "box":
            mask = _around(mask)
        return image, torch.tensor(composite.label), mask


def open_split(root: Path, split: str, masks: str, *, image_size: int, augment: bool = False, **options: object) -> Cutouts:
    """options: as of :class:`Cutouts`."""
    part = "train" if split == "train" else "test"
    return Cutouts(root, part, image_size, masks=masks, augment=augment, **options)  # type: ignore[arg-type]


def read_tree(root: Path) -> tuple[Groups, Groups]:
    """Groups of files of every class and of every kind, all in the order of their names.

    Errors:  FileNotFoundError for a missing folder; ValueError for fewer than two of anything.
    """
    require("cutouts", _SOURCE, [root / "objects", root / "backgrounds"])
    trees = []
    for folder in (root / "objects", root / "backgrounds"):
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
        if len(names) < 2:
            raise ValueError(f"cutouts: {folder} must hold at least two folders, got {names}; {_SOURCE}")
        trees.append({name: _groups(folder / name) for name in names})
    return trees[0], trees[1]


def _groups(folder: Path) -> list[list[str]]:
    entries = sorted(p for p in folder.iterdir() if not is_hidden(p.name))
    groups = [_images(p) if p.is_dir() else [str(p)] for p in entries if p.is_dir() or p.suffix.lower() in SUFFIXES]
    groups = [paths for paths in groups if paths]
    if len(groups) < 2:
        raise ValueError(
            f"cutouts: {folder} must hold at least two images or groups, one for training and one for tests, got {len(groups)}"
        )
    require("cutouts", _SOURCE, [path for paths in groups for path in paths])
    return groups


def _images(folder: Path) -> list[str]:
    paths = (p for p in folder.rglob("*") if not any(map(is_hidden, p.relative_to(folder).parts)))
    return sorted(str(p) for p in paths if p.suffix.lower() in SUFFIXES)


def _read_kinds(root: Path, classes: tuple[str, ...], kinds: tuple[str, ...]) -> tuple[str, ...]:
    """By default the classes take the kinds in turn, both in the order of their names."""
    path = root / "kinds.json"
    if not path.is_file():
        return tuple(kinds[k % len(kinds)] for k in range(len(classes)))
    try:
        chosen = json.loads(path.read_text())
        wrong = [name for name in classes if chosen[name] not in kinds]
        if wrong or len(chosen) != len(classes):
            raise ValueError(f"{wrong or sorted(set(chosen) - set(classes))}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cutouts: {path} must give every class {list(classes)} one of the kinds {list(kinds)}, got {error!r}"
        ) from error
    return tuple(chosen[name] for name in classes)


def _part(name: str, groups: list[list[str]], split: str, seed: int) -> list[str]:
    """The files of the groups that a split has: at least one group on either side."""
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(groups))
    tests = min(max(1, round(_TEST_SHARE * len(groups))), len(groups) - 1)
    return [path for k in sorted(order[:tests] if split == "test" else order[tests:]) for path in groups[k]]


def _rounds(seed: list[int], paths: list[str], count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [paths[k] for _ in range(-(-count // len(paths))) for k in rng.permutation(len(paths))]


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + share * (ends[1] - ends[0])


@lru_cache(maxsize=1024)
def _object(path: str) -> Image.Image:
    image = read_image(path, "RGBA")
    low, high = image.getchannel("A").getextrema()
    if low == 255 or high < 128:
        what = "no transparent pixel" if low == 255 else "no opaque pixel"
        raise ValueError(f"cutouts: {path} must have an alpha channel that cuts an object out, got {what}")
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a >= 8)).getbbox())


@lru_cache(maxsize=256)
def _photograph(path: str, limit: int) -> Image.Image:
    """With a shorter side of at most `limit`: the smallest crop then still has a pixel for every pixel of the image."""
    image = read_image(path, "RGB")
    scale = limit / min(image.size)
    return image if scale >= 1 else image.resize([max(limit, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)


def compose(composite: Composite, size: int) -> tuple[Tensor, Tensor]:
    """One image as its drawing says. Shapes: -> [3, size, size] uint8, [1, size, size] bool: alpha of half or more."""
    if composite.background is None:
        canvas = Image.new("RGB", (size, size), (_GREY,) * 3)
    else:
        photograph = _photograph(composite.background, round(size / _CROP_SHARE[0]))
        share, down, across = composite.crop
        side = max(1, round(share * min(photograph.size)))
        left, top = (int(place * (length - side + 1)) for place, length in zip((across, down), photograph.size, strict=True))
        canvas = photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    thing = _object(composite.object)
    share, down, across = composite.place
    width, height = (max(1, round(share * size * length / max(thing.size))) for length in thing.size)
    # Pillow resizes premultiplied: the colour of transparent pixels, often black, does not bleed into the outline
    thing = thing.resize((width, height), Image.Resampling.BICUBIC)
    if composite.mirrored:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = int(across * (size - width + 1)), int(down * (size - height + 1))
    alpha = thing.getchannel("A")
    canvas.paste(thing, (left, top), alpha)
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, top : top + height, left : left + width] = pil_to_tensor(alpha) >= 128
    return pil_to_tensor(canvas), mask


def _around(mask: Tensor) -> Tensor:
    """The box around a mask; nothing around nothing. Shapes: [1, H, W] bool -> the same."""
    _, rows, columns = mask.nonzero(as_tuple=True)
    box = torch.zeros_like(mask)
    if len(rows):
        box[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return box
