"""The versions of an image that Xiao et al. 2021 ("Noise or Signal", the Backgrounds Challenge) ask a network about.

What is object and what is background comes from the mask; backgrounds come from the other images that are tested. An image's
background is given away only with its own object taken out: over the object's box (every connected part of the mask has one,
with a margin, so that neither outline nor shadow stays), the largest rectangle of background is continued by reflection. An
object pasted on it therefore stands on nothing of another object. Their Only-BG-T repeats the rectangle; reflected it has no
seams, which a network could see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ORIGINAL, MIXED_SAME, MIXED_RAND, MIXED_NEXT = "Original", "Mixed-Same", "Mixed-Rand", "Mixed-Next"
ONLY_FG, NO_FG, ONLY_BG_B, ONLY_BG_T = "Only-FG", "No-FG", "Only-BG-B", "Only-BG-T"

VERSIONS = {
    ORIGINAL: "the image as it is",
    MIXED_SAME: "the object on the background of another image of its class",
    MIXED_RAND: "the object on the background of an image of a random class",
    MIXED_NEXT: "the object on the background of an image of the next class",
    ONLY_FG: "the object alone, on black",
    NO_FG: "the background with the object's outline in black",
    ONLY_BG_B: "the background with the object's box in black",
    ONLY_BG_T: "the background with the object's box filled with background",
}
WITH_OBJECT = (ORIGINAL, MIXED_SAME, MIXED_RAND, MIXED_NEXT, ONLY_FG)
MIXED = (MIXED_SAME, MIXED_RAND, MIXED_NEXT)

_MARGIN = 32  # the object's box grows by this fraction of the image's shorter side: masks are not exact
_LEAST_TILE = 16  # no side of the rectangle that is continued is below this fraction of it
_GRID = 64  # cells a side among which the rectangle is looked for


@dataclass(frozen=True)
class Backgrounds:
    """Every image's own background, without its object.

    Shapes:  hole [N, 1, H, W] bool, what is filled; tile [N, 4] int64 (top, left, height, width), a height of 0 where an image
             has no rectangle of background large enough to continue; outlined [N] bool: the object's box left none, so its
             outline is the hole.
    """

    hole: Tensor
    tile: Tensor
    outlined: Tensor

    @property
    def usable(self) -> Tensor:
        """Which images have a background to give. Shapes: -> [N] bool."""
        return self.tile[:, 2] > 0

    def of(self, images: Tensor, index: int) -> Tensor:
        """Only-BG-T of one image. Shapes: images [N, C, H, W] -> [C, H, W]."""
        top, left, height, width = self.tile[index].tolist()
        rows, columns = (
            _reflected(torch.arange(size), first, length)
            for size, first, length in ((images.shape[2], top, height), (images.shape[3], left, width))
        )
        return torch.where(self.hole[index], images[index][:, rows][:, :, columns], images[index])


def backgrounds(masks: Tensor) -> Backgrounds:
    """Shapes: masks [N, 1, H, W] bool, true on the object."""
    short = min(masks.shape[2:])
    margin, least = max(1, short // _MARGIN), max(2, short // _LEAST_TILE)
    grown = F.max_pool2d(masks.float(), 2 * margin + 1, stride=1, padding=margin) > 0
    boxes = torch.stack([_boxes(mask[0], margin) for mask in masks])[:, None]
    tiles, holes, outlined = [], [], []
    for i in range(len(masks)):
        tile, hole = _largest_rectangle(boxes[i, 0], least), boxes[i]
        outlined.append(not tile[2])
        if not tile[2]:
            tile, hole = _largest_rectangle(grown[i, 0], least), grown[i]
        tiles.append(tile)
        holes.append(hole)
    return Backgrounds(torch.stack(holes), torch.tensor(tiles), torch.tensor(outlined))


def _boxes(mask: Tensor, margin: int) -> Tensor:
    """The union of the boxes of a mask's connected parts. Shapes: [H, W] bool -> the same."""
    from scipy import ndimage

    result = torch.zeros_like(mask)
    for rows, columns in ndimage.find_objects(ndimage.label(mask.numpy(), structure=np.ones((3, 3)))[0]):
        above, before = max(0, rows.start - margin), max(0, columns.start - margin)
        result[above : rows.stop + margin, before : columns.stop + margin] = True
    return result


def _largest_rectangle(hole: Tensor, least: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest rectangle outside the hole, to the grid; zeros if a side is below `least`."""
    height, width = hole.shape
    cell = -(-max(height, width) // _GRID)
    free = F.max_pool2d(hole[None, None].float(), cell, ceil_mode=True)[0, 0].numpy() == 0
    best, found = 0, (0, 0, 0, 0)
    above = np.zeros(free.shape[1], dtype=int)  # free cells above, this row's among them
    for row, line in enumerate(free):
        above = np.where(line, above + 1, 0)
        rising: list[tuple[int, int]] = []  # first column and height of the rectangles that still go on
        for column, high in enumerate([*above.tolist(), 0]):
            first = column
            while rising and rising[-1][1] >= high:
                first, tall = rising.pop()
                top, left = (row + 1 - tall) * cell, first * cell
                down, across = min(tall * cell, height - top), min((column - first) * cell, width - left)
                if min(down, across) >= least and down * across > best:
                    best, found = down * across, (top, left, down, across)
            rising.append((first, high))
    return found


def _reflected(position: Tensor, first: int, length: int) -> Tensor:
    """Where a position reads in a line that goes on by reflection at the ends of [first, first + length)."""
    turn = (position - first) % (2 * length)
    return first + torch.minimum(turn, 2 * length - 1 - turn)


@dataclass(frozen=True)
class Shot:
    """One picture of every image. donor [N] int64: whose background it gets, −1 for none, where the version needs one."""

    version: str
    donor: Tensor | None = None


def draw_shots(labels: Tensor, usable: Tensor, classes: int, draws: int, same_draws: int, seed: int) -> list[Shot]:
    """All versions; Mixed-Rand `draws` times, Mixed-Same `same_draws` times. No image gets its own background.

    Mixed-Rand draws the class first, each with equal probability and the image's own among them, as the paper does.
    Shapes:  labels [N] int64; usable [N] bool.
    """
    rng = np.random.default_rng(seed)
    givers = {k: np.flatnonzero(((labels == k) & usable).numpy()) for k in range(classes)}
    given = [k for k in givers if len(givers[k])]

    def one(image: int, wanted: list[int]) -> int:
        choices = [k for k in wanted if len(givers[k]) > (givers[k][0] == image)]
        if not choices:
            return -1
        pool = givers[choices[rng.integers(len(choices))]]
        return int(rng.choice(pool[pool != image]))

    def all_of(wanted: list[list[int]]) -> Tensor:
        return torch.tensor([one(i, classes_of) for i, classes_of in enumerate(wanted)])

    names = labels.tolist()
    following = [next((k for step in range(1, classes) if (k := (y + step) % classes) in given), None) for y in names]
    return [
        Shot(ORIGINAL),
        *(Shot(MIXED_SAME, all_of([[y] for y in names])) for _ in range(same_draws)),
        *(Shot(MIXED_RAND, all_of([given] * len(names))) for _ in range(draws)),
        Shot(MIXED_NEXT, all_of([[] if k is None else [k] for k in following])),
        Shot(ONLY_FG),
        Shot(NO_FG),
        Shot(ONLY_BG_B),
        Shot(ONLY_BG_T, torch.where(usable, torch.arange(len(labels)), -1)),
    ]


def compose(shot: Shot, images: Tensor, masks: Tensor, own: Backgrounds, index: int) -> Tensor | None:
    """The picture that a shot makes of an image in [0, 1], black being 0; None where the image has no such version.

    Shapes:  images [N, C, H, W], masks [N, 1, H, W] bool -> [C, H, W].
    """
    image, mask = images[index], masks[index]
    if shot.version == ORIGINAL:
        return image
    if shot.version in (ONLY_FG, NO_FG, ONLY_BG_B):
        black = {ONLY_FG: ~mask, NO_FG: mask, ONLY_BG_B: own.hole[index]}[shot.version]
        return image.masked_fill(black, 0)
    assert shot.donor is not None
    giver = int(shot.donor[index])
    if giver < 0:
        return None
    background = own.of(images, giver)
    return background if shot.version == ONLY_BG_T else torch.where(mask, image, background)
