"""Small pictures of what the network was shown, as JPEG: one example in every version, and the images where it is worst."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sib_fast.lab.shortcut.answers import Answers
from sib_fast.lab.shortcut.versions import MIXED_RAND, MIXED_SAME, ONLY_BG_T, ONLY_FG, compose

_SIDE = 160  # greatest side in pixels
_QUALITY = 82


@dataclass(frozen=True)
class Cell:
    """right: whether the answer is the true class; None where there is no answer."""

    title: str
    jpeg: bytes
    said: str
    right: bool | None


@dataclass(frozen=True)
class Strip:
    """One image in several versions."""

    name: str
    label: str
    cells: tuple[Cell, ...]


def example_strip(answers: Answers) -> Strip:
    """The first image that has most versions, each version once."""
    columns = sorted({shot.version: column for column, shot in reversed(list(enumerate(answers.shots)))}.values())
    index = int((answers.predictions[:, columns] >= 0).sum(axis=1).argmax())
    return _strip(answers, index, columns)


def worst_first(answers: Answers) -> list[tuple[int, int]]:
    """(image, its worst shot of Mixed-Rand) where another background takes probability from the true class, most first.

    Images whose right answer it makes wrong come before all others.
    """
    labels, columns = answers.labels, np.array(answers.columns(MIXED_RAND))
    random = answers.truth[:, columns]
    least = np.where(np.isfinite(random), random, np.inf).argmin(axis=1)
    worst, at = columns[least], np.arange(len(labels))
    fall = answers.truth[:, 0] - random[at, least]
    turned = (answers.predictions[:, 0] == labels) & (answers.predictions[at, worst] != labels)
    order = sorted(np.flatnonzero(fall > 0).tolist(), key=lambda i: (not turned[i], -fall[i]))
    return [(i, int(worst[i])) for i in order]


def worst_strips(answers: Answers, worst: Sequence[tuple[int, int]], maps: Tensor | None, method: str) -> tuple[Strip, ...]:
    """Of `worst_first`. maps [len(worst), 1, H, W]: where the network finds the evidence for its answer to the original."""
    single = [column for version in (ONLY_FG, ONLY_BG_T) for column in answers.columns(version)]
    strips = []
    for place, (i, shot) in enumerate(worst):
        strip = _strip(answers, i, [0, answers.columns(MIXED_SAME)[0], shot, *single])
        if maps is not None:
            cell = _map_cell(maps[place], answers.images.masks[i], method)
            strip = Strip(strip.name, strip.label, (*strip.cells, cell))
        strips.append(strip)
    return tuple(strips)


def _strip(answers: Answers, index: int, columns: Sequence[int]) -> Strip:
    cells, images = [], answers.images
    for column in columns:
        picture = compose(answers.shots[column], images.pixels, images.masks, answers.own, index)
        if picture is None:
            continue
        answer = int(answers.predictions[index, column])
        said = f"{answers.names[answer]}, {answers.probabilities[index, column, answer]:.2f}"
        cells.append(Cell(answers.shots[column].version, jpeg(picture), said, answer == int(images.labels[index])))
    return Strip(images.names[index], images.classes[int(images.labels[index])], tuple(cells))


def _map_cell(values: Tensor, mask: Tensor, method: str) -> Cell:
    peak = values.max()
    inside = float((values * mask).sum() / values.sum()) if peak > 0 else 0.0
    heat = (values / peak if peak > 0 else values).clamp(0, 1)
    # black, red, yellow, white: dark where nothing counts, in print too
    colours = torch.cat([(3 * heat).clamp(0, 1), (3 * heat - 1).clamp(0, 1), (3 * heat - 2).clamp(0, 1)])
    edge = torch.zeros_like(mask)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[:, :, 1:] |= mask[:, :, 1:] != mask[:, :, :-1]
    colours = torch.where(edge, colours.new_tensor((0.35, 0.8, 1.0)).view(3, 1, 1), colours)
    return Cell(f"Original, {method.replace('_', ' ')}", jpeg(colours), f"{inside:.0%} inside the outline", None)


def jpeg(picture: Tensor) -> bytes:
    """Shapes: [C, H, W] in [0, 1]; other than three channels as their mean."""
    from PIL import Image

    if len(picture) != 3:
        picture = picture.mean(dim=0, keepdim=True).expand(3, -1, -1)
    file = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    scale = _SIDE / max(file.size)
    # small images are enlarged by whole pixels, as they are
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    file = file.resize((max(1, round(file.width * scale)), max(1, round(file.height * scale))), kind)
    content = io.BytesIO()
    file.save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()
