"""Small pictures of what the network was shown, as JPEG: one example in every version, and the images where it is worst."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sib_fast.lab.shortcut.images import Images
from sib_fast.lab.shortcut.versions import (
    MIXED_RAND,
    MIXED_SAME,
    ONLY_BG_T,
    ONLY_FG,
    Backgrounds,
    Shot,
    compose,
)

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


def example_strip(
    images: Images,
    own: Backgrounds,
    shots: Sequence[Shot],
    predictions: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
) -> Strip:
    """The first image that has most versions, each version once."""
    first = {shot.version: c for c, shot in reversed(list(enumerate(shots)))}
    columns = sorted(first.values())
    index = int((predictions[:, columns] >= 0).sum(axis=1).argmax())
    return _strip(images, own, shots, predictions, probabilities, names, index, columns)


def worst_strips(
    images: Images,
    own: Backgrounds,
    shots: Sequence[Shot],
    predictions: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    maps: Mapping[str, Tensor | str],
    count: int,
) -> tuple[Strip, ...]:
    """Where another background takes most from the true class: first the images whose right answer it makes wrong.

    Every one with its worst background of Mixed-Rand, and the first method's map where the image was explained.
    """
    labels = images.labels.numpy()
    of = {v: [c for c, shot in enumerate(shots) if shot.version == v] for v in (MIXED_SAME, MIXED_RAND)}
    truth = np.take_along_axis(probabilities, labels[:, None, None], axis=2)[:, :, 0]
    random = np.where(np.isfinite(truth[:, of[MIXED_RAND]]), truth[:, of[MIXED_RAND]], np.inf)
    worst = np.array(of[MIXED_RAND])[random.argmin(axis=1)]
    fall = truth[:, 0] - random.min(axis=1)
    at = np.arange(len(labels))
    turned = (predictions[:, 0] == labels) & (predictions[at, worst] != labels)
    order = sorted(np.flatnonzero(np.isfinite(fall) & (fall > 0)), key=lambda i: (not turned[i], -fall[i]))
    single = [c for c, shot in enumerate(shots) if shot.version in (ONLY_BG_T, ONLY_FG)]
    method = next((name for name, values in maps.items() if isinstance(values, Tensor)), None)
    strips = []
    for i in order[:count]:
        strip = _strip(
            images, own, shots, predictions, probabilities, names, int(i), [0, of[MIXED_SAME][0], int(worst[i]), *single]
        )
        if method is not None and i < len(maps[method]):
            strip = Strip(strip.name, strip.label, (*strip.cells, _map_cell(maps[method][i], images.masks[i], method)))
        strips.append(strip)
    return tuple(strips)


def _strip(
    images: Images,
    own: Backgrounds,
    shots: Sequence[Shot],
    predictions: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    index: int,
    columns: Sequence[int],
) -> Strip:
    cells = []
    for column in columns:
        picture = compose(shots[column], images.pixels, images.masks, own, index)
        if picture is None:
            continue
        answer = int(predictions[index, column])
        said = f"{names[answer]}, {probabilities[index, column, answer]:.2f}"
        cells.append(Cell(shots[column].version, jpeg(picture), said, answer == int(images.labels[index])))
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
