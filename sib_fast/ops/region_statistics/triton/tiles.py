"""Launch configurations: which tile a batch gets on which architecture. Fixed, so that the bits do not depend on a tuner."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

MOST_RESIDENT_PAIRS = 64  # images whose S and background S a program holds: with 128 they would take 320 KiB of 227


class Tile(NamedTuple):
    """Launch of a Gram tile of block_n images, or of a gradient tile of block_n images × block_d columns."""

    block_n: int
    block_d: int
    warps: int
    stages: int
    block_k: int = 0  # gradient: images per product; block_n where S stays in shared memory


# One table per architecture: "80" (163 KiB of shared memory a block), "86" (99 KiB: 8.6, 8.9 and what has no table of its
# own), "120" (99 KiB), "90" and "100" (227 KiB). "tensor": tf32x3 and tf32. Chosen by compiling, never timed [E]: in tf32x3
# no stack frame or spills on the architectures of a table (tests/triton/test_region_statistics.py compiles them again). Plain
# tf32 has 8 to 16 bytes of stack in Gram tiles of 64 on 8.x.
# What else was compiled (registers/stack bytes, tf32x3, triton 3.8): Gram 128×128 with 32 columns 255/24 on sm_90 (with 16:
# 240/0) and with 16 columns 255/56 on sm_80, 254/16 on sm_120; resident S 128×64 255/168 on sm_90 (128×32: 176/0), 128×32
# 32/4488 on sm_80; S 64×64 32/5424 on sm_80; Gram 64×32 with three stages 255/16 on sm_120. Triton 3.6: streamed 128×64 255/368
# on sm_90, with the variances (64×64: 236/0). Triton 3.6 and 3.7 leave 8 to 32 bytes in Grams of the other architectures.
SMALLEST = "86"
SHARED_MEMORY = {"80": 163 * 1024, "86": 99 * 1024, "120": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024}
# The interpreter has no registers, and takes as long for an operation on a large block as on a small one.
_LARGE = tuple(Tile(n, 1024, 4, 1, n) for n in (16, 32, 64, 128))
_INTERPRETER = dict.fromkeys(("tensor", "ieee", "float64"), _LARGE)
_GRAM_IEEE = (Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(64, 16, 8, 2))
_GRAM_FLOAT64 = (Tile(16, 16, 4, 3), Tile(32, 16, 8, 2))
_GRADIENT_IEEE = (Tile(16, 64, 4, 2, 16), Tile(64, 32, 8, 2, 16))
_GRADIENT_FLOAT64 = (Tile(16, 32, 4, 2, 16), Tile(32, 32, 4, 2, 16))


def _with_fallbacks(tensor: tuple[Tile, ...], ieee: tuple[Tile, ...], float64: tuple[Tile, ...]) -> dict[str, tuple[Tile, ...]]:
    return {"tensor": tensor, "ieee": ieee, "float64": float64}


# 8.x: the first IEEE tile and the float64 tile of 32 images of the other tables spill there.
_GRAM_80 = _with_fallbacks(
    (Tile(16, 16, 4, 3), Tile(32, 32, 8, 3), Tile(64, 16, 8, 3)),
    (Tile(16, 32, 4, 2), *_GRAM_IEEE[1:]),
    _GRAM_FLOAT64[:1],
)
_GRAM_90 = _with_fallbacks(
    (Tile(16, 16, 4, 3), Tile(32, 32, 8, 3), Tile(64, 32, 8, 3), Tile(128, 16, 8, 3)), _GRAM_IEEE, _GRAM_FLOAT64
)
_GRAM_120 = _with_fallbacks((Tile(16, 16, 4, 3), Tile(32, 32, 8, 3), Tile(64, 32, 8, 2)), _GRAM_IEEE, _GRAM_FLOAT64[:1])
_RESIDENT_80 = _with_fallbacks((Tile(16, 64, 4, 3, 16), Tile(32, 32, 4, 3, 32)), (), ())
_RESIDENT_120 = _with_fallbacks((Tile(16, 32, 4, 3, 16), Tile(32, 32, 4, 3, 32)), (), ())
_RESIDENT_90 = _with_fallbacks(
    (Tile(16, 64, 4, 3, 16), Tile(32, 64, 4, 3, 32), Tile(64, 64, 8, 2, 64), Tile(128, 32, 8, 2, 128)), (), ()
)
# float64 with 32 images: 254/160 on sm_120, 255/32 on sm_86. Gram in float64: of 16 on sm_80 with two stages 72/8 (triton
# 3.8), with four 64/16 (3.6); of 32 with four warps 96/16 on sm_90 (3.7). On sm_120, where float64 has 1/64 of float32's rate
# whatever the registers, two and three stages have up to 40/24.
_STREAMED_80 = _with_fallbacks((Tile(64, 32, 8, 3, 32), Tile(128, 32, 8, 3, 16)), _GRADIENT_IEEE, _GRADIENT_FLOAT64[:1])
_STREAMED_120 = _STREAMED_80
_STREAMED_90 = _with_fallbacks((Tile(64, 64, 8, 3, 16),), _GRADIENT_IEEE, _GRADIENT_FLOAT64)
GRAM = {
    "interpreter": _INTERPRETER, "80": _GRAM_80, "86": _GRAM_80, "120": _GRAM_120, "90": _GRAM_90, "100": _GRAM_90
}  # fmt: skip
RESIDENT_GRADIENT = {
    "interpreter": _INTERPRETER, "80": _RESIDENT_80, "86": _RESIDENT_80,
    "120": _RESIDENT_120, "90": _RESIDENT_90, "100": _RESIDENT_90
}  # fmt: skip
STREAMED_GRADIENT = {
    "interpreter": _INTERPRETER, "80": _STREAMED_80, "86": _STREAMED_80,
    "120": _STREAMED_120, "90": _STREAMED_90, "100": _STREAMED_90
}  # fmt: skip


def kind_of(dtype: torch.dtype, precision: str) -> str:
    return "float64" if dtype == torch.float64 else "ieee" if precision == "ieee" else "tensor"


@functools.cache
def architecture_of(capability: tuple[int, int], shared_memory: int) -> str:
    """The table for a device: its own where there is one, otherwise the one that needs the least shared memory."""
    name = {(8, 0): "80", (9, 0): "90", (10, 0): "100", (10, 3): "100", (12, 0): "120", (12, 1): "120"}.get(capability, SMALLEST)
    return name if shared_memory >= SHARED_MEMORY[name] else SMALLEST


class Machine(NamedTuple):
    """What a launch depends on beside the shape: the table of its architecture, and the multiprocessors that share its work."""

    table: str
    multiprocessors: int

    @property
    def programs(self) -> int:
        """That a launch is cut into: two rounds of one to a multiprocessor, which is what the large tiles' registers allow."""
        return 2 * self.multiprocessors


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """Of MIG's parts too, whose multiprocessors are counted. The interpreter's is cut as an H200's."""
    if device.type != "cuda":
        return Machine("interpreter", 132)
    properties = torch.cuda.get_device_properties(device)
    table = architecture_of((properties.major, properties.minor), properties.shared_memory_per_block_optin)
    return Machine(table, properties.multi_processor_count)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def gram_tile(images: int, tiles: tuple[Tile, ...]) -> Tile:
    """The smallest tile that holds all images; otherwise the one with the fewest products, half as many paying for the
    smaller tile's second reading of its rows."""
    for tile in tiles:
        if images <= tile.block_n:
            return tile

    def cost(tile: Tile) -> float:
        side = ceil(images, tile.block_n)
        return side * (side + 1) // 2 * tile.block_n**2 * (1.0 if tile is tiles[-1] else 1.5)

    return min(tiles[-2:], key=cost)


def gradient_tile(images: int, background: bool, resident: tuple[Tile, ...], streamed: tuple[Tile, ...]) -> Tile:
    """The smallest tile that holds all images beside S; otherwise the one that wastes fewer rows, by a quarter at least."""
    for tile in resident:
        if images <= tile.block_n and not (background and tile.block_n > MOST_RESIDENT_PAIRS):
            return tile
    return min(streamed, key=lambda t: ceil(images, t.block_n) * t.block_n * (1.0 if t is streamed[-1] else 1.25))
