"""Image files as RGB tensors, and the transforms that move an image and its object mask together."""

from __future__ import annotations

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from sib_fast.masks import GivenMask

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_image(path: str, mode: str, upright: bool = False) -> Image.Image:
    """An image file in a mode of Pillow, ``"RGB"`` or ``"RGBA"``. upright: turned as its EXIF orientation says, as viewers show
    it; otherwise the stored pixels, which the annotations of published sets refer to.

    Errors:  FileNotFoundError; ValueError for a file that is no image, is cut short, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"mode {file.mode}, which a conversion would clip")
            image = ImageOps.exif_transpose(file) if upright else file
            # Pillow warns when a palette with several transparent entries loses them in one step
            image = image.convert("RGBA") if "transparency" in file.info else image
            return image.convert(mode)
    except FileNotFoundError:
        raise
    except Exception as error:  # what Pillow's many decoders throw at a damaged file
        raise ValueError(f"dataset: {path} must be a readable image of 8 bits a channel, got {error!r}") from error


def read_rgb(path: str, upright: bool = False) -> Tensor:
    """An image file as RGB. Palette, grey, CMYK and RGBA images are converted; alpha is dropped.

    Shapes:  -> [3, H, W] uint8. Errors: as :func:`read_image`.
    """
    return v2.functional.pil_to_tensor(read_image(path, "RGB", upright))


def normalise(pixels: Tensor) -> Tensor:
    """Shapes: [3, H, W] uint8 -> float32, (pixel - mean) / std with ImageNet's."""
    return v2.functional.normalize(pixels.to(torch.float32) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))


class JointTransform:
    """Crops, resizes, flips and normalises an image; its mask goes through the same as a fourth channel.

    A mask pixel is true where at least half of it is object. torchvision's own masks (``tv_tensors.Mask``) are resized by
    nearest neighbours, which reads every pixel's corner, not its middle: measured against the image, a disc of a 500 px
    image moves by half a pixel at 224 px, IoU 0.985.

    Args:
        image_size: side S of the square result.
        augment: a random resized crop and a horizontal flip, drawn from torch's generator; otherwise the shorter side is
            resized to 8/7 S (256 for 224) and the middle is cropped, the same at every call.

    Shapes:  image [3, H, W] uint8, mask [1, H, W] bool or None -> image [3, S, S] float32, (pixel - mean) / std with
             ImageNet's; mask [1, S, S] bool or None. A crop can miss the object: the mask is then false everywhere.
    """

    def __init__(self, image_size: int, augment: bool):
        if image_size < 1:
            raise ValueError(f"dataset: image_size must be at least 1, got {image_size}")
        self._geometry = (
            v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()])
            if augment
            else v2.Compose([v2.Resize(round(image_size * 8 / 7)), v2.CenterCrop(image_size)])
        )

    def __call__(self, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        planes = image if mask is None else torch.cat([image, mask.to(torch.uint8) * 255])
        planes = self._geometry(planes)
        return normalise(planes[:3]), None if mask is None else planes[3:] >= 128


def mix(
    kind: str, alpha: float, images: Tensor, targets: Tensor, classes: int, mask: Tensor | GivenMask | None
) -> tuple[Tensor, Tensor, Tensor | GivenMask | None]:
    """MixUp or CutMix of every image with its neighbour in the batch; masks go with the images. Draws from torch's generator.

    A mask says what share of a pixel is object. CutMix moves pixels, and the masks' with them: exact. MixUp blends two
    pixels, and the masks by the same weights, λM + (1−λ)M': object in both is 1, background in both is 0. Object in one
    alone is λ or 1−λ, so that at even weights it is 0.5, which counts for neither region (`labels_to_mask`), and near λ = 1,
    where the other image is all but invisible, so is its object. A union would call that object foreground of full weight.
    A mixed image is annotated where both were: of the other half nothing is known.

    Args:    kind: ``"mixup"`` or ``"cutmix"``. alpha: λ is drawn from Beta(alpha, alpha), one a batch.
    Shapes:  images [N, C, H, W]; targets int64 [N]; mask [N, 1, H, W] -> the same, targets as probabilities [N, classes].
    Source:  Zhang et al. 2018; Yun et al. 2019, whose weight is the share of pixels that are left.
    """
    weight = torch.distributions.Beta(alpha, alpha).sample().item()
    soft = torch.nn.functional.one_hot(targets, classes).to(images.dtype)
    if kind == "mixup":

        def blend(values: Tensor) -> Tensor:
            return torch.lerp(values.roll(1, 0), values, weight)
    else:
        height, width = images.shape[-2:]
        side = (1 - weight) ** 0.5
        down, across = (int(v * length) for v, length in zip(torch.rand(2).tolist(), (height, width), strict=True))
        half = (side * height / 2, side * width / 2)
        top, bottom = max(0, round(down - half[0])), min(height, round(down + half[0]))
        left, right = max(0, round(across - half[1])), min(width, round(across + half[1]))
        weight = 1 - (bottom - top) * (right - left) / (height * width)

        def blend(values: Tensor) -> Tensor:
            mixed = values.clone()
            mixed[..., top:bottom, left:right] = values.roll(1, 0)[..., top:bottom, left:right]
            return mixed

    targets = torch.lerp(soft.roll(1, 0), soft, weight)
    if isinstance(mask, GivenMask):
        mask = GivenMask(blend(mask.values.to(images.dtype)), mask.annotated & mask.annotated.roll(1, 0))
    elif mask is not None:
        mask = blend(mask.to(images.dtype))
    return blend(images), targets, mask


def random_backgrounds(
    images: Tensor, mask: Tensor | GivenMask, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """Background randomisation: a share of the images get the background of another one of the batch, and keep label and object.

    The giver is the image before it in the batch, of those with a mask. Its own object is taken out: where that would show, there
    is the mean colour of the giver's background. An image without a mask neither gives nor gets, since its object would come
    along or be lost; one whose mask is empty gets nothing, one whose mask is full gives nothing. Without a giver nothing changes.

    Args:    share: probability in [0, 1] of each image. generator: of the draws, on the CPU; torch's by default.
    Shapes:  images [N, C, H, W]; mask [N, 1, H, W], object from 0.5 on -> [N, C, H, W].
    Source:  Xiao et al. 2021 train on such images (Mixed-Rand).
    """
    values = mask.values if isinstance(mask, GivenMask) else mask
    inside = values.to(images.dtype) >= 0.5
    covered, outside = inside.to(images.dtype), (~inside).flatten(1)
    members = outside.any(1)
    if isinstance(mask, GivenMask):
        members &= mask.annotated
    # the k-th of the members gets from the (k−1)-th, without asking the device how many there are
    place = members.cumsum(0) - 1
    order = torch.argsort(~members, stable=True)
    giver = order[(place - 1) % members.sum().clamp_min(1)]
    mean = (images * (1 - covered)).sum((2, 3), keepdim=True) / (1 - covered).sum((2, 3), keepdim=True).clamp_min(1)
    background = torch.where(inside, mean, images)[giver]
    drawn = (torch.rand(len(images), generator=generator) < share).to(images.device)
    chosen = drawn & members & inside.flatten(1).any(1)
    return torch.where(chosen.view(-1, 1, 1, 1) & ~inside, background, images)
