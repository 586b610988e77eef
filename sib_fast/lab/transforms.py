"""Image files as RGB tensors, and the transforms that move an image and its object mask together."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_rgb(path: str) -> Tensor:
    """An image file as RGB. Palette, grey, CMYK and RGBA images are converted; alpha is dropped.

    Shapes:  -> [3, H, W] uint8, the file's own orientation: annotations refer to the stored pixels, not to EXIF's view.
    Errors:  FileNotFoundError; ValueError for a file that is no image, is cut short, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"mode {file.mode}, which a conversion would clip")
            # Pillow warns when a palette with several transparent entries loses them in one step
            image = file.convert("RGBA") if "transparency" in file.info else file
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:  # what Pillow's many decoders throw at a damaged file
        raise ValueError(f"dataset: {path} must be a readable image of 8 bits a channel, got {error!r}") from error


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
        pixels = v2.functional.normalize(planes[:3].to(torch.float32) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
        return pixels, None if mask is None else planes[3:] >= 128
