"""What a network answers to every version of every image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sib_fast.lab.shortcut.images import Images
from sib_fast.lab.shortcut.subject import OTHER, ClassMap, Subject, map_classes
from sib_fast.lab.shortcut.versions import Backgrounds, Shot, compose


@dataclass(frozen=True)
class Answers:
    """Of N images and S shots.

    Attributes:
        predictions: [N, S] int64, −1 where an image has no such version.
        probabilities: [N, S, classes + 1] float32, NaN there; the last column is another class.
    """

    images: Images
    own: Backgrounds
    shots: Sequence[Shot]
    class_map: ClassMap
    predictions: np.ndarray
    probabilities: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `predictions` holds."""
        return (*self.images.classes, OTHER)

    @property
    def labels(self) -> np.ndarray:
        return self.images.labels.numpy()

    @property
    def truth(self) -> np.ndarray:
        """Probability of the true class. Shapes: -> [N, S]."""
        return np.take_along_axis(self.probabilities, self.labels[:, None, None], axis=2)[:, :, 0]

    def columns(self, version: str) -> list[int]:
        """The shots of a version."""
        return [column for column, shot in enumerate(self.shots) if shot.version == version]


def ask(
    subject: Subject,
    images: Images,
    own: Backgrounds,
    shots: Sequence[Shot],
    mapping: Mapping[str, Sequence[int | str]] | None,
    batch_size: int,
    step: Callable[[str, float], None],
) -> Answers:
    """step: is told the version and how many images went through the network, or had no such version."""
    class_map = map_classes(subject.logits(images.pixels[:2]).shape[1], subject.classes, images.classes, mapping)
    shape = (len(images), len(shots))
    predictions = np.full(shape, -1)
    probabilities = np.full((*shape, len(images.classes) + 1), np.nan, dtype=np.float32)
    for column, shot in enumerate(shots):
        for begin in range(0, len(images), batch_size):
            indices = range(begin, min(begin + batch_size, len(images)))
            made = {i: x for i in indices if (x := compose(shot, images.pixels, images.masks, own, i)) is not None}
            if made:
                logits = subject.logits(torch.stack(list(made.values())))
                rows = list(made)
                predictions[rows, column] = class_map.predictions(logits).numpy()
                probabilities[rows, column] = class_map.probabilities(logits).float().numpy()
            step(shot.version, len(indices))
    return Answers(images, own, shots, class_map, predictions, probabilities)
