"""region_statistics in Triton: Grams and variances of both regions, and their gradient (SPEC 4 and 6).

Here: cuts and launches. `tiles`: launch configurations; `operands`, `grams`, `gradient`: kernels. No autotuning, so that the
bits do not depend on what else ran on the machine. Whatever groups a sum (tile, split, chain) follows from the shape, the
table of the architecture and the device's number of multiprocessors; the order within a sum is the program's. So a device
repeats its own bits, and two devices of one architecture and one number of multiprocessors have the same.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sib_fast._backends import INTERPRETING_TRITON as INTERPRETING
from sib_fast.ops.region_statistics.triton import tiles
from sib_fast.ops.region_statistics.triton.gradient import gradient_kernel, mask_gradient_kernel, symmetrised_kernel
from sib_fast.ops.region_statistics.triton.grams import gram_partials_kernel, merge_kernel
from sib_fast.ops.region_statistics.triton.operands import CHANNELS, FLAT_CHANNELS, FLAT_PIXELS, PARTIAL, PLANES
from sib_fast.ops.region_statistics.triton.tiles import ceil

# Of a split: below this the partial Gram costs more bytes than the rows it is made of.
_LEAST_PRODUCTS = 4096 if INTERPRETING else 256


class _Walk(NamedTuple):
    """A map as the kernels index it. width, stride_h, stride_w: of pixels; linear: pixel offset = pixel·stride_w."""

    width: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int
    linear: bool
    channels_fastest: bool


def _walk(map_: Tensor) -> _Walk:
    _, channels, height, width = map_.shape
    stride_n, stride_c, stride_h, stride_w = map_.stride()
    if width == 1:
        stride_w = stride_h
    linear = height == 1 or width == 1 or stride_h == width * stride_w
    adjacent = stride_w == 1 or height * width == 1
    return _Walk(width, stride_n, stride_c, stride_h, stride_w, linear, channels > 1 and stride_c == 1 and not adjacent)


def _order(map_: Tensor, walk: _Walk, block_d: int) -> tuple[int, int, int]:
    """Order, length of the inner axis where rows run together, and the number of blocks of the forward."""
    channels, pixels = map_.shape[1], map_.shape[2] * map_.shape[3]
    flat = channels * pixels < 2**31 - block_d
    if walk.channels_fastest or pixels == 1:
        if channels >= 64 or not flat:
            return CHANNELS.value, 1, pixels * ceil(channels, block_d)
        return FLAT_CHANNELS.value, channels, ceil(channels * pixels, block_d)
    if pixels < 256 and pixels % block_d and flat:
        return FLAT_PIXELS.value, pixels, ceil(channels * pixels, block_d)
    return PLANES.value, 1, channels * ceil(pixels, block_d)


def _guard(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class _Cut(NamedTuple):
    """How one map's rows are cut for the tiles on the Gram's diagonal, or for those across it."""

    programs: int  # a split
    tiles: int
    units: int  # a split
    splits: int


def _cuts(units: int, images: int, tile: tiles.Tile, regions: int, programs: int) -> list[_Cut]:
    """Equal splits, the last one shorter; at the diagonal, and across it where there are several row tiles."""
    side = ceil(images, tile.block_n)
    cuts = []
    for launched, count in ((side, side), (side * side, side * (side - 1) // 2)):
        if count > 0:
            per = max(ceil(units, max(1, programs // (count * regions))), _LEAST_PRODUCTS // tile.block_d)
            cuts.append(_Cut(launched, count, per, ceil(units, per)))
    return cuts


def forward(vjp: Tensor, x: Tensor, mask: Tensor, background_grams: bool, precision: str = "tf32x3") -> tuple[Tensor | None, ...]:
    """The registered op `_region_statistics`: Grams, variances, means, background Grams (None unless asked for), all float64."""
    images, channels, height, width = vjp.shape
    regions = 2 if background_grams else 1
    machine = tiles.machine_of(vjp.device)
    tile = tiles.gram_tile(images, tiles.GRAM[machine.table][tiles.kind_of(mask.dtype, precision)])
    walks = [_walk(map_) for map_ in (vjp, x)]
    orders = [_order(map_, walk, tile.block_d) for map_, walk in zip((vjp, x), walks, strict=True)]
    cuts = [_cuts(units, images, tile, regions, machine.programs) for *_, units in orders]
    # Where a split is longer than a float32 sum may be, all partial Grams are float64: both maps', which one launch merges.
    fold = any(cut.units * tile.block_d > PARTIAL.value for of_map in cuts for cut in of_map)

    def new(*shape: int) -> Tensor:
        return vjp.new_empty(shape, dtype=torch.float64)

    grams = [new(images, images) for _ in range(2)]
    background = [new(images, images) if background_grams else None for _ in range(2)]
    vectors = [new(images) for _ in range(4)]
    moments = new(5, images, cuts[0][0].splits)
    partials = []
    with _guard(vjp):
        for map_, walk, (order, inner, units), of_map in zip((vjp, x), walks, orders, cuts, strict=True):
            made = [
                mask.new_empty(
                    (regions, cut.tiles, cut.splits, tile.block_n, tile.block_n), dtype=torch.float64 if fold else mask.dtype
                )
                for cut in of_map
            ]
            for on_diagonal, out, cut in zip((True, False), made, of_map, strict=False):
                with_moments = on_diagonal and not partials
                gram_partials_kernel[(cut.splits * cut.programs, regions)](
                    map_, mask, out, moments if with_moments else None, images, channels, height * width, walk.width,
                    walk.stride_n, walk.stride_c, walk.stride_h, walk.stride_w, inner, units, cut.units, cut.splits,
                    BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, ORDER=order, LINEAR=walk.linear,
                    DIAGONAL=on_diagonal, MOMENTS=with_moments, FOLD=fold, PRECISION=precision,
                    num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
            partials.append((made[0], made[-1]))
        block, rows = min(64, tile.block_n), 16 if INTERPRETING else 1
        splits = [of_map[at].splits for of_map in cuts for at in (0, -1)]
        merge_kernel[(ceil(images, rows), ceil(images, block), 2 * regions + 1)](
            *partials[0], *partials[1], moments, *grams, *background, *vectors, images, *splits,
            REGIONS=regions, SPLITS=triton.next_power_of_2(splits[0]), BLOCK_N=tile.block_n, ROWS=rows, BLOCK=block, BATCH=16,
            num_warps=4,
        )  # fmt: skip
    return (*grams, *vectors, *background)


def backward(
    grad_gram_vjp: Tensor, grad_gram_x: Tensor, grad_background_variance: Tensor, grad_vjp_variance: Tensor,
    grad_background_gram_vjp: Tensor | None, grad_background_gram_x: Tensor | None, vjp: Tensor, x: Tensor, mask: Tensor,
    background_mean: Tensor, vjp_mean: Tensor, need_vjp: bool, need_x: bool, need_mask: bool, precision: str = "tf32x3",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The registered op `_region_statistics_backward`: gradients in the layouts of vjp and x, and of the mask, or None."""
    images, channels, height, width = vjp.shape
    pixels = height * width
    kind = tiles.kind_of(mask.dtype, precision)
    machine = tiles.machine_of(vjp.device)
    background = grad_background_gram_vjp is not None
    tile = tiles.gradient_tile(
        images, background, tiles.RESIDENT_GRADIENT[machine.table][kind], tiles.STREAMED_GRADIENT[machine.table][kind]
    )
    resident = tile.block_k == tile.block_n >= images
    row_tiles = ceil(images, tile.block_n)
    unit = max(tile.block_n, tile.block_k)
    padded = ceil(images, unit) * unit
    block = min(32, unit)

    grad_vjp, grad_x = (torch.empty_like(of, dtype=mask.dtype) if need else None for of, need in ((vjp, need_vjp), (x, need_x)))
    grad_mask = mask.new_empty(mask.shape) if need_mask else None
    # x first: where both maps' shares are one plane each, the VJP's part adds to what x's wrote.
    parts = []
    for map_, grad, which in ((x, grad_x, 1), (vjp, grad_vjp, 0)):
        if grad is None and not need_mask:
            continue
        walk = _walk(map_)
        by_channel = (walk.channels_fastest and channels >= tile.block_d) or (pixels < 16 and channels > pixels)
        blocks = pixels if by_channel else ceil(pixels, tile.block_d)
        steps = ceil(channels, tile.block_d) if by_channel else channels
        per = ceil(steps, max(1, min(steps, machine.programs // (blocks * row_tiles))))
        parts.append((map_, grad, which, walk, by_channel, blocks, per, ceil(steps, per)))
    slots = sum(part[-1] for part in parts)
    shared = slots > len(parts)  # some map's channels are split, so the shares of a pixel meet in a launch of their own
    shares = mask.new_empty((slots, images, pixels)) if shared and need_mask else grad_mask
    grams = [grad_gram_vjp, grad_gram_x, grad_background_gram_vjp, grad_background_gram_x]
    grams = grams if background else grams[:2]
    with _guard(vjp):
        sym = mask.new_empty((len(grams), 2, padded, padded))
        symmetrised_kernel[(padded // block, padded // block, len(grams))](
            *grams, *grams[: 4 - len(grams)], sym, images, padded, BLOCK=block, PRECISION=precision, num_warps=4
        )
        first = 0
        for map_, grad, which, walk, by_channel, blocks, per, splits in parts:
            out = walk if grad is None else _walk(grad)
            items = blocks * splits
            in_turn = ceil(items, max(1, machine.programs // row_tiles)) if resident else 1
            variance = which == 0
            gradient_kernel[(row_tiles * ceil(items, in_turn),)](
                map_, mask, sym[which, 0], sym[which, 1], *(sym[2 + which] if background else (None, None)),
                grad, shares[first:] if need_mask and shared else grad_mask,
                *((grad_background_variance, background_mean, grad_vjp_variance, vjp_mean) if variance else (None,) * 4),
                images, channels, pixels, width, channels * pixels, padded,
                walk.stride_n, walk.stride_c, walk.stride_h, walk.stride_w,
                out.stride_n, out.stride_c, out.stride_h, out.stride_w,
                per, splits, items, in_turn,
                BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, BLOCK_K=tile.block_k,
                ORDER=(CHANNELS if by_channel else PLANES).value, LINEAR=walk.linear and out.linear,
                RESIDENT=resident, BACKGROUND=background, VARIANCE=variance, NEED_MAP=grad is not None, NEED_MASK=need_mask,
                ADD=not shared and first > 0, PRECISION=precision,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            first += splits
        if shared and need_mask:
            size = images * pixels
            mask_gradient_kernel[(ceil(size, 1024),)](shares, grad_mask, size, slots, BLOCK=1024, num_warps=4)
    return grad_vjp, grad_x, grad_mask
