"""Named inputs of the ops. Each states what makes it hard; tests and benchmarks share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A named VJP map, its input and a mask, made from a fixed seed.

    Shapes:  make() -> vjp, x [N, C, H, W]; mask [N, 1, H, W] in (0, 1).
    """

    id: str
    shape: tuple[int, int, int, int]
    window_size: int
    vjp: Callable[[Tensor], Tensor]
    why: str

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(seed)
        like = {"generator": generator, "dtype": torch.float64, "device": "cpu"}  # the same numbers for every device
        noise, x = (torch.randn(self.shape, **like) for _ in range(2))
        images, _, height, width = self.shape
        mask = torch.rand((images, 1, height, width), **like)
        # Rounded to the dtype before anything is compared, so that every precision sees the same numbers.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        noise, x, mask = (t.to(torch.get_default_device()) for t in (noise, x.to(dtype), mask.to(dtype).to(wide)))
        return self.vjp(noise).to(dtype), x, mask


def _natural(noise: Tensor) -> Tensor:
    """Like a network's VJP: 1e-4 in scale, smooth at a few pixels, heavier in one corner than elsewhere."""
    height, width = noise.shape[2:]
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    down = torch.linspace(-1, 1, height, dtype=noise.dtype)[:, None]
    across = torch.linspace(-1, 1, width, dtype=noise.dtype)[None, :]
    return 1e-4 * smooth * torch.exp(-2 * (down - 0.3) ** 2 - 2 * (across + 0.4) ** 2)


def _constant(noise: Tensor) -> Tensor:
    return torch.full_like(noise, 1e-5)


def _one_zero_image(noise: Tensor) -> Tensor:
    out = _natural(noise)
    out[0] = 0
    return out


def _ties(noise: Tensor) -> Tensor:
    """Few distinct values and many exact zeros, as a bf16 network's VJP has."""
    coarse = (noise * 3).round() / 3
    return 1e-4 * torch.where(noise.abs() < 0.4, 0.0, coarse)


def _outlier(noise: Tensor) -> Tensor:
    """One value of 1e4 times the others' range: a histogram by value would put everything else into one bin."""
    out = 1e-4 * noise
    out[:, :, 0, 0] = 1e4
    return out


def _tiny(noise: Tensor) -> Tensor:
    """So small that the 1e-8 added to the value range matters, as late in a saturated network's training."""
    return 1e-9 * noise


PROBLEMS = [
    Problem("natural", (4, 3, 48, 40), 15, _natural, "what training sees"),
    Problem("odd-size", (3, 5, 37, 53), 31, _natural, "no tile divides it"),
    Problem("many-images", (21, 3, 16, 16), 5, _natural, "batch that is no multiple of a register tile"),
    Problem("wide-window", (2, 3, 9, 11), 15, _natural, "window larger than the image"),
    Problem("two-images", (2, 1, 24, 24), 7, _natural, "smallest batch of the estimator"),
    Problem("feature-map", (3, 70, 7, 7), 3, _natural, "more channels than pixels"),
    Problem("one-row", (2, 3, 1, 50), 5, _natural, "H = 1"),
    Problem("single-pixel", (3, 4, 1, 1), 3, _natural, "P = 1: every rank is the same pixel"),
    Problem("constant", (2, 3, 20, 20), 5, _constant, "all ties, range 0"),
    Problem("one-zero-image", (3, 3, 24, 20), 7, _one_zero_image, "a saturated image among others"),
    Problem("ties", (3, 3, 32, 32), 9, _ties, "30 % exact zeros, few distinct values"),
    Problem("outlier", (2, 3, 32, 32), 9, _outlier, "range of 1e8"),
    Problem("tiny", (2, 3, 32, 32), 9, _tiny, "below eps"),
    Problem("strip-edge", (2, 3, 17, 64), 9, _natural, "rows one more than two strips of the box filter"),
]


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in every layout that a caller may bring."""
    images, channels, height, width = tensor.shape
    padded = tensor.new_zeros((images, channels, height + 3, 2 * width))
    strided = padded[:, :, 1 : height + 1, ::2]
    strided.copy_(tensor)
    return {
        "contiguous": tensor.contiguous(),
        "channels_last": tensor.contiguous(memory_format=torch.channels_last),
        "strided": strided,
        "transposed": tensor.transpose(2, 3).contiguous().transpose(2, 3),
        "flipped-batch": tensor.flip(0).contiguous().flip(0),
        "channel-slice": torch.cat([tensor, tensor], dim=1)[:, :channels],
        "channels_last-slice": torch.cat([tensor, tensor], dim=1).contiguous(memory_format=torch.channels_last)[:, :channels],
    }
