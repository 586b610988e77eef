"""The embedded data set: real handwritten digits on natural photographs, with exact object masks.

Everything comes from files inside the scikit-learn and scikit-image wheels, so nothing is downloaded. The digit is
the class; each class also has a photograph of its own. In training a digit lies on its own photograph with a given
excess probability, which a network can exploit instead of the digit; the shifted test set draws the photograph
independently of the class, so exploiting it costs accuracy there.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "test"]

SOURCES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "brick",
    "grass",
    "gravel",
    "motorcycle",
    "china",
    "flower",
)
"""Background photographs; ``SOURCES[k]`` is the one that belongs to class ``k``."""

NUM_CLASSES = len(SOURCES)
TEST_DIGITS = 500  # of 1797; the files list the writers one after another, so the last digits are other writers'
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25

_STRIPS = 4  # vertical strips of a photograph, alternately train and test: disjoint, yet both see all of the scene
_CROP_SIDE = (80, 110)  # source pixels; the narrowest strip (chelsea, 451 px wide) is 112 px
_BRIGHTNESS = 0.8  # photographs are dimmed, or white ink on the sky of "china" would be invisible
OBJECT_SHARE = (0.55, 0.8)  # side of the digit's square over the side of the image
_INK_GAIN = 1.5  # the 8x8 digits are antialiased counts; the gain makes the middle of a stroke opaque
_OPACITY = (0.8, 1.0)
_INTENSITY = (0.8, 1.0)
_ALPHA_FLOOR = 0.1  # below it interpolation ringing would smear the mask over pixels that show no ink


def _lab_import_error(error: ImportError) -> ImportError:
    return ImportError(f"lab.data: needs scikit-learn, scikit-image and pillow, got {error}; pip install 'sib_fast[lab]'")


@functools.cache
def load_digits() -> tuple[Tensor, Tensor]:
    """The 1797 digits of scikit-learn as opacities.

    Shapes:  -> opacity [1797, 8, 8] float32 in [0, 1]; label [1797] int64.
    Errors:  ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise _lab_import_error(error) from error
    digits = load()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long()


@functools.cache
def load_photograph(source: int) -> Tensor:
    """Photograph ``SOURCES[source]``; grey ones are repeated over the three channels.

    Shapes:  -> [3, height, width] float32 in [0, 1], at the photograph's own size.
    Errors:  ImportError without scikit-learn, scikit-image or pillow.
    """
    name = SOURCES[source]
    try:
        if name in ("china", "flower"):
            from sklearn.datasets import load_sample_image

            pixels = load_sample_image(f"{name}.jpg")
        else:
            import skimage.data

            # motorcycle is the left view of a stereo pair; the loader returns both views and the disparity
            pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
    except ImportError as error:
        raise _lab_import_error(error) from error
    image = torch.from_numpy(np.array(pixels)).float() / 255
    return image.expand(3, -1, -1).contiguous() if image.ndim == 2 else image.permute(2, 0, 1).contiguous()


def background_crop(source: int, top: int, left: int, side: int, image_size: int) -> Tensor:
    """A square of a photograph, resampled to the image size and normalised as the images are.

    Shapes:  -> [3, image_size, image_size] float32.
    """
    square = load_photograph(source)[:, top : top + side, left : left + side]
    return _normalise(_BRIGHTNESS * _resample(square, image_size))


def strips(split: Split, width: int) -> list[tuple[int, int]]:
    """Column ranges ``[begin, end)`` of a photograph that belong to a split; those of the two splits are disjoint."""
    edges = [width * i // _STRIPS for i in range(_STRIPS + 1)]
    first = 0 if split == "train" else 1
    return [(edges[i], edges[i + 1]) for i in range(first, _STRIPS, 2)]


class EmbeddedDigits(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Digits blended into photographs, all of it in memory; an item is ``(image, label, mask)``.

    The photograph is the class's own with probability ``correlation + (1 - correlation) / 10``, otherwise any other
    with equal probability. Digits, places, sizes and opacities depend on ``(seed, split)`` alone: two sets that differ
    only in ``correlation`` show the same objects with the same masks, so their accuracies are paired.

    Args:
        split: ``"train"`` or ``"test"``; digits and photograph regions of the two are disjoint.
        size: number of images; each digit of the split is used equally often, up to one.
        correlation: in [0, 1]; 0 makes the background independent of the class.
        image_size: height and width, at least 16.
        seed: a non-negative integer; equal arguments give equal bits.
        object_share: least and greatest side of a digit's square over the image's, in (0, 1]; the ink covers about two fifths
            of the square.
        contrast: factor in (0, 1] of the ink's opacity.

    Shapes:  images [size, 3, image_size, image_size] float32, (pixel - 0.5) / 0.25; labels [size] int64;
             masks [size, 1, image_size, image_size] bool, true where the digit's opacity is above 0;
             digits [size] int64, index into ``load_digits()``; crops [size, 4] int64, (source, top, left, side).
    Errors:  ValueError for arguments out of range; ImportError without the lab extra.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        *,
        correlation: float = 0.4,
        image_size: int = 32,
        seed: int = 0,
        object_share: tuple[float, float] = OBJECT_SHARE,
        contrast: float = 1.0,
    ):
        if split not in ("train", "test"):
            raise ValueError(f"EmbeddedDigits: split must be 'train' or 'test', got {split!r}")
        if size < 1:
            raise ValueError(f"EmbeddedDigits: size must be at least 1, got {size}")
        if not 0 <= correlation <= 1:
            raise ValueError(f"EmbeddedDigits: correlation must be in [0, 1], got {correlation}")
        if image_size < 16:
            raise ValueError(f"EmbeddedDigits: image_size must be at least 16, got {image_size}")
        if seed < 0:
            raise ValueError(f"EmbeddedDigits: seed must not be negative, got {seed}")
        if not 0 < object_share[0] <= object_share[1] <= 1:
            raise ValueError(f"EmbeddedDigits: object_share must be two ascending numbers in (0, 1], got {object_share}")
        if not 0 < contrast <= 1:
            raise ValueError(f"EmbeddedDigits: contrast must be in (0, 1], got {contrast}")
        self.split: Split = split
        self.correlation = correlation
        self.image_size = image_size
        self.seed = seed
        self.object_share, self.contrast = object_share, contrast

        object_rng, background_rng = (np.random.default_rng([seed, split == "test", stream]) for stream in (0, 1))
        opacity, label = load_digits()
        first, last = (0, len(label) - TEST_DIGITS) if split == "train" else (len(label) - TEST_DIGITS, len(label))
        rounds = -(-size // (last - first))
        order = np.concatenate([object_rng.permutation(np.arange(first, last)) for _ in range(rounds)])[:size]
        self.digits = torch.from_numpy(order)
        self.labels = label[self.digits]
        self.crops = torch.stack([self._draw_crop(background_rng, int(k)) for k in self.labels])

        self.images = torch.empty(size, 3, image_size, image_size)
        self._alphas, self._inks = torch.empty(size, 1, image_size, image_size), torch.empty(size, 1, 1, 1)
        for i in range(size):
            self._alphas[i], self._inks[i] = self._draw_object(object_rng, opacity[self.digits[i]])
            self.images[i] = torch.lerp(self._background(i), _normalise(self._inks[i]), self._alphas[i])
        self.masks = self._alphas > 0

    def _background(self, index: int) -> Tensor:
        return background_crop(*self.crops[index].tolist(), self.image_size)

    def backgrounds(self, count: int) -> Tensor:
        """The first images without their objects. Shapes: -> [count, 3, image_size, image_size] float32."""
        return torch.stack([self._background(i) for i in range(count)])

    def on(self, backgrounds: Tensor) -> Tensor:
        """The first objects, as they are in the images, on other backgrounds.

        Shapes:  [n, 3, image_size, image_size] -> the same.
        """
        count = len(backgrounds)
        return torch.lerp(backgrounds, _normalise(self._inks[:count]), self._alphas[:count])

    def _draw_crop(self, rng: np.random.Generator, label: int) -> Tensor:
        # all five numbers are drawn whatever the outcome, so that the correlation does not shift later images
        own, other, strip, top, left = rng.random(5)
        source = label if own < self.correlation else int(other * NUM_CLASSES)
        side = int(rng.integers(_CROP_SIDE[0], _CROP_SIDE[1] + 1))
        _, height, width = load_photograph(source).shape
        ranges = strips(self.split, width)
        begin, end = ranges[int(strip * len(ranges))]
        return torch.tensor([source, int(top * (height - side + 1)), begin + int(left * (end - begin - side + 1)), side])

    def _draw_object(self, rng: np.random.Generator, opacity: Tensor) -> tuple[Tensor, float]:
        size = self.image_size
        least, greatest = (round(share * size) for share in self.object_share)
        side = int(rng.integers(least, greatest + 1))
        top, left = rng.integers(0, size - side + 1, 2)
        # a border of zeros lets strokes that touch the edge of the 8x8 field fade out instead of being cut
        ink = _resample(F.pad(opacity, (1, 1, 1, 1))[None], side)[0].mul_(_INK_GAIN).clamp_(0, 1)
        ink[ink < _ALPHA_FLOOR] = 0
        alpha = torch.zeros(1, size, size)
        alpha[0, top : top + side, left : left + side] = ink * (self.contrast * rng.uniform(*_OPACITY))
        return alpha, float(rng.uniform(*_INTENSITY))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], self.labels[index], self.masks[index]


def _resample(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def _normalise(pixel: Tensor) -> Tensor:
    return (pixel - PIXEL_MEAN) / PIXEL_STD


def denormalise(image: Tensor) -> Tensor:
    """Pixels in [0, 1] for display; the inverse of the data set's normalisation. Shapes: any -> the same."""
    return (image * PIXEL_STD + PIXEL_MEAN).clamp(0, 1)
