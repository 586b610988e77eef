"""The embedded digits (sib_fast.lab.data) behind the interface of the other sets."""

from __future__ import annotations

from torch import Tensor

from sib_fast.lab.data import NUM_CLASSES, PIXEL_MEAN, PIXEL_STD, TEST_DIGITS, EmbeddedDigits, load_digits
from sib_fast.lab.datasets.base import LabelledImages

MASKS = ("segmentation",)


class Digits(LabelledImages):
    """Attributes: as :class:`LabelledImages`, and ``embedded``, the set in memory."""

    def __init__(self, embedded: EmbeddedDigits):
        classes = tuple(str(k) for k in range(NUM_CLASSES))
        super().__init__(classes, embedded.image_size, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3, "segmentation")
        self.embedded = embedded

    @property
    def labels(self) -> list[int]:
        return self.embedded.labels.tolist()

    def __len__(self) -> int:
        return len(self.embedded)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedded[index]


def open_split(split: str, image_size: int, size: int | None = None, **options: float) -> Digits:
    """size: number of images; every digit of the split once by default. options: as of :class:`EmbeddedDigits`."""
    digits = len(load_digits()[1])
    if split == "train":
        return Digits(EmbeddedDigits("train", size or digits - TEST_DIGITS, image_size=image_size, **options))
    return Digits(EmbeddedDigits("test", size or TEST_DIGITS, image_size=image_size, **options))
