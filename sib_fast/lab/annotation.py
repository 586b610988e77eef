"""Masks for a part of the images alone, as users have them; the loss keeps its own mask elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sib_fast.lab.datasets import LabelledImages
from sib_fast.masks import GivenMask


def choose_annotated(labels: Sequence[int], share: float, seed: int) -> frozenset[int]:
    """Indices of round(share · N) images, but one at least where share > 0; of every class its share, give or take one image.

    A larger share of the same seed holds a smaller one's: within a class the images stand in an order drawn once, the k-th of n
    at (k + u) / n with one u in [0, 1) a class, and those that stand first over all classes are chosen.
    """
    classes = np.asarray(labels)
    rng = np.random.default_rng([seed, 2])  # the data's own streams are 0 and 1
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        place[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
    count = max(round(share * len(classes)), int(share > 0))
    return frozenset(np.argsort(place, kind="stable")[:count].tolist())


class PartlyAnnotated(Dataset[tuple[Tensor, Tensor, GivenMask]]):
    """A data set whose masks are given for some images; the others' are "not annotated", which SIBLoss takes as it is.

    Attributes: annotated: indices of the images whose masks are given.
    """

    def __init__(self, data: LabelledImages, share: float, seed: int):
        self.data = data
        self.mean, self.std = data.mean, data.std
        self.annotated = choose_annotated(data.labels, share, seed)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, GivenMask]:
        image, label, mask = self.data[index]
        if isinstance(mask, GivenMask):
            return image, label, mask
        given = index in self.annotated
        return image, label, GivenMask(mask if given else torch.zeros_like(mask), torch.tensor(given))
