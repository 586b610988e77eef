"""What all data sets have in common, whether they are files or made in memory."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from sib_fast.masks import GivenMask


class LabelledImages(Dataset[tuple[Tensor, Tensor, Tensor | GivenMask]]):
    """Labelled images with or without object masks; an item is described at :func:`open_dataset`.

    Attributes:
        classes: their names, in the order of the labels.
        image_size: side of the square images.
        mean, std: an image in [0, 1] became (image - mean) / std, per channel.
        mask_kind: ``"segmentation"``, ``"box"`` (weak: the corners of a box are background) or ``"none"``.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        mask_kind: str,
    ):
        self.classes = classes
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.mask_kind = mask_kind

    @property
    def labels(self) -> list[int]:
        """Of every image, in order; no image is read for it."""
        raise NotImplementedError

    @property
    def has_masks(self) -> bool:
        return self.mask_kind != "none"

    def is_annotated(self, index: int) -> bool:
        """Whether an image has a mask; no image is read for it. Where some have none, every item's mask is a GivenMask."""
        return self.has_masks

    @property
    def annotated(self) -> int:
        """How many images have a mask."""
        return sum(map(self.is_annotated, range(len(self))))

    def denormalise(self, image: Tensor) -> Tensor:
        """Pixels in [0, 1] for display. Shapes: image [..., 3, H, W] -> the same."""
        mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)
