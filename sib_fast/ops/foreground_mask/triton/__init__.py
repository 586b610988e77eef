"""foreground_mask in Triton, forward and backward (SPEC 3 and 6): for a CUDA machine without a compiler. README.md has the plan.

Here: launches. `select`: which pixels hold the ranks. `box`: the box mean and the sigmoids, both ways. Imported by the
registered ops at their first call. Every kernel launches on the current stream, its configuration depends on the shape of
one image and on the options only (never on N or the device, so an image's bits depend on neither its batch nor the number of
multiprocessors), and nothing is read back to the host.
"""

from __future__ import annotations

from math import floor, log2
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sib_fast._checks import accumulation_dtype
from sib_fast.ops.foreground_mask import rank_window_length
from sib_fast.ops.foreground_mask.triton import box, select

_CAPACITY = 1024  # candidates of a window that are ranked pair by pair; more take the exact search of _separate
_RANK_BLOCK = 1024  # pixels of a step of _separate; 2,048 made float64 spill on sm_80 and sm_90
_RANK_REGISTERS = 128  # of rank_kernel: left alone, ptxas spills one register on sm_120 to fit a third block of a few programs
_BLOCK = 2048  # pixels of an elementwise program: 16 a thread, four 16-byte loads of float32 in flight


class _Plan(NamedTuple):
    """What the launches depend on: one image's shape and the options."""

    height: int
    width: int
    pixels: int
    wide: bool  # float64: keys of 63 bits in int64, otherwise 31 bits in int32
    length: int  # entries of a rank window
    half: int
    positions: tuple[float, ...]  # q(P-1), by level
    reach_y: int
    reach_x: int
    bits: int  # of h in fixed point
    tile_y: int  # extents of a box tile, powers of two
    tile_x: int

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.pixels, _BLOCK)

    @property
    def key(self) -> torch.dtype:
        return torch.int64 if self.wide else torch.int32

    @property
    def scalar(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32


def _tile(extent: int, reach: int) -> int:
    """Entries of a tile along one axis, window - 1 of them halo: the whole axis, or at least twice the window."""
    window = 2 * reach + 1
    return max(16, min(triton.next_power_of_2(extent + window), max(256, triton.next_power_of_2(2 * window))))


def _plan(height: int, width: int, dtype: torch.dtype, window_size: int, temperature: float, quantiles) -> _Plan:
    pixels, wide = height * width, dtype == torch.float64
    length = rank_window_length(temperature, pixels, dtype)
    # Beyond the image there is nothing to add up.
    reach_y, reach_x = (min(window_size // 2, extent - 1) for extent in (height, width))
    summands = min(2 * reach_y + 1, height) * min(2 * reach_x + 1, width)
    return _Plan(
        height=height,
        width=width,
        pixels=pixels,
        wide=wide,
        length=length,
        half=(length - 1) // 2,
        positions=tuple(float(q) * (pixels - 1) for q in quantiles),
        reach_y=reach_y,
        reach_x=reach_x,
        # The largest window sum, `summands` times 1, must fit a key.
        bits=floor(log2(((1 << 62) if wide else (1 << 31) - 1) / summands)),
        tile_y=_tile(height, reach_y),
        tile_x=_tile(width, reach_x),
    )


# ---- launches ---------------------------------------------------------------------------------------------------------------

# Keys are histogrammed first by quarter octaves of 2^-56 … 2^8 (g, floats) and by their leading 8 bits (d, integers).
_OF_FLOATS = {False: {"ORIGIN": 4 * (127 - 56), "SHIFT": 21}, True: {"ORIGIN": 4 * (1023 - 56), "SHIFT": 50}}
_OF_INTEGERS = {False: {"ORIGIN": 0, "SHIFT": 23}, True: {"ORIGIN": 0, "SHIFT": 54}}
_ROWS = 8  # of a box tile along the rows: 2,048 entries at TILE = 256, 16 a thread
_COLUMNS = {False: 32, True: 16}  # of a box tile along the columns: whole sectors
_GATHER = 64 * 1024  # bytes of shared memory that the gather of a box tile may take; the smallest limit is 99 KiB


def _passes(plan: _Plan, of_floats: bool) -> int:
    """Histograms after the first one, from the shape alone: for data without many ties they leave some hundred candidates."""
    few, many = (4096, 1 << 17) if of_floats else (1 << 16, 1 << 22)
    return 0 if plan.pixels <= few else 1 if plan.pixels <= many else 2


def _block_l(plan: _Plan) -> int:
    return min(1024, max(16, triton.next_power_of_2(plan.length)))


def _rank(plan, plane, scratch, candidates, rank_pixels, levels, temperature, *, of_d, chosen, scale=0.0) -> None:
    """Ranks and levels of g (lo, hi, gate) or of d (t): narrow, collect, rank. chosen: the ranks' pixels are there already."""
    images = plane.shape[0]
    positions = (*plan.positions[3:], 0.0, 0.0) if of_d else plan.positions[:3]
    windows = 1 if of_d else 3
    histogram_at, counter_at = (select.HISTOGRAM_D.value, select.COUNTERS.value + 3) if of_d else (0, select.COUNTERS.value)
    shared = {"WINDOWS": windows, "KEYED": of_d, "WIDE": plan.wide, "BLOCK": _BLOCK, "num_warps": 8}
    shared |= (_OF_INTEGERS if of_d else _OF_FLOATS)[plan.wide]
    passes = _passes(plan, not of_d)
    grid = (images * plan.tiles,)
    if not chosen:
        for done in range(passes):
            select.narrow_kernel[grid](
                plane, scratch, histogram_at, plan.pixels, plan.tiles, plan.half, *positions, PASSES=done, **shared
            )
        select.collect_kernel[grid](
            plane, scratch, histogram_at, counter_at, *candidates, plan.pixels, plan.tiles, plan.half, *positions,
            PASSES=passes, CAPACITY=_CAPACITY, **shared,
        )  # fmt: skip
    select.rank_kernel[images * windows,](
        plane, scratch, histogram_at, *candidates, rank_pixels, levels, plan.pixels, plan.half, plan.length, scale, temperature,
        *positions, SELECT=not chosen, LEVEL=3 if of_d else 0, PASSES=passes, CAPACITY=_CAPACITY, CHUNK=64,
        BLOCK_L=_block_l(plan), maxnreg=_RANK_REGISTERS, **shared | {"BLOCK": _RANK_BLOCK},
    )  # fmt: skip


def _scale_of(window_size: int) -> float:
    return 1.0 / (float(window_size) * float(window_size))


class _Tiling(NamedTuple):
    """Of a box kernel along one axis: lines a tile, blocks of lines, tiles along the axis; and what the launch is told."""

    lines: int
    blocks: int
    chunks: int
    warps: int

    @property
    def programs(self) -> int:
        """Of an image."""
        return self.blocks * self.chunks


def _tiling(tile: int, most: int, size: int, across: int, along: int, reach: int, per_thread: int = 16) -> _Tiling:
    """Tiles of at most `most` lines of `tile` entries of `size` bytes; beyond 16 warps of 8 bytes an entry the kernels spill."""
    lines = max(1, min(most, _GATHER // (tile * size)))
    warps = min(16, max(4, lines * tile // (32 * per_thread)))
    return _Tiling(lines, triton.cdiv(across, lines), triton.cdiv(along, tile - 2 * reach - 1), warps)


def forward(
    vjp: Tensor,
    rank_pixels: Tensor | None,
    window_size: int,
    temperature: float,
    slope: float,
    quantiles: list[float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mask and what its gradient needs.

    Shapes:  vjp [N, C, H, W], any strides; rank_pixels int32 [N, 4, L] or None
             -> mask [N, 1, H, W], mean_map [N, H, W], levels [N, 4], rank_pixels [N, 4, L].
    Launches: one memset and eight kernels up to 4,096 pixels, nine up to 2^16, ten up to 2^17; two less with ranks given.
    """
    images, channels, height, width = vjp.shape
    plan = _plan(height, width, vjp.dtype, window_size, temperature, quantiles)
    acc = accumulation_dtype(vjp.dtype)
    mask = vjp.new_empty((images, 1, height, width), dtype=acc)
    mean_map = vjp.new_empty((images, height, width), dtype=acc)
    levels = vjp.new_empty((images, 4), dtype=acc)
    scratch = vjp.new_zeros((images, select.SCRATCH.value), dtype=torch.int32)
    sums = vjp.new_empty((images, height, width), dtype=plan.key)
    chosen = rank_pixels is not None
    if chosen:
        ranks, candidates = rank_pixels.clone(memory_format=torch.contiguous_format), (sums, levels)  # which nothing reads
    else:
        ranks = vjp.new_empty((images, 4, plan.length), dtype=torch.int32)
        candidates = tuple(vjp.new_empty((images, 3, _CAPACITY), dtype=kind) for kind in (plan.key, torch.int32))
    d = mask.view(plan.key)  # until the last kernel turns it into the mask
    g_rows, d_rows = mean_map.view(images, -1), d.view(images, -1)
    rows = _tiling(plan.tile_x, _ROWS, plan.key.itemsize, height, width, plan.reach_x)
    columns = _tiling(
        plan.tile_y, _COLUMNS[plan.wide], plan.key.itemsize, width, height, plan.reach_y, per_thread=16 if plan.wide else 32
    )
    scale = _scale_of(window_size) / float(2**plan.bits)
    with torch.cuda.device_of(vjp):
        select.mean_map_kernel[images * plan.tiles,](
            vjp, mean_map, scratch, *vjp.stride(), channels, width, plan.pixels, plan.tiles,
            FLAT=height == 1 or vjp.stride(2) == width * vjp.stride(3), UNROLL=min(8, triton.next_power_of_2(channels)),
            HISTOGRAM=not chosen, WIDE=plan.wide, BLOCK=_BLOCK, num_warps=8 if plan.wide else 4, **_OF_FLOATS[plan.wide],
        )  # fmt: skip
        _rank(plan, g_rows, scratch, candidates, ranks, levels, temperature, of_d=False, chosen=chosen)
        box.gate_rows_kernel[images * rows.programs,](
            mean_map, levels, scratch, sums, height, width, rows.blocks, rows.chunks, plan.reach_x, slope, eps,
            float(2**plan.bits), WIDE=plan.wide, TILE=plan.tile_x, ROWS=rows.lines, num_warps=rows.warps,
        )  # fmt: skip
        box.box_columns_kernel[images * columns.programs,](
            sums, d, scratch, select.HISTOGRAM_D.value, height, width, columns.blocks, columns.chunks, plan.reach_y,
            HISTOGRAM=not chosen, SHIFT=_OF_INTEGERS[plan.wide]["SHIFT"], WIDE=plan.wide, TILE=plan.tile_y,
            COLUMNS=columns.lines, num_warps=columns.warps,
        )  # fmt: skip
        _rank(plan, d_rows, scratch, candidates, ranks, levels, temperature, of_d=True, chosen=chosen, scale=scale)
        box.mask_kernel[images * plan.tiles,](
            d, levels, mask, plan.pixels, plan.tiles, scale, slope, WIDE=plan.wide, BLOCK=_BLOCK
        )  # fmt: skip
    return mask, mean_map, levels, ranks


def backward(
    grad_mask: Tensor,
    mask: Tensor,
    mean_map: Tensor,
    levels: Tensor,
    rank_pixels: Tensor,
    channels: int,
    window_size: int,
    temperature: float,
    slope: float,
    quantiles: list[float],
    eps: float,
) -> Tensor:
    """The gradient of every channel of vjp, one plane per image, by two launches.

    Shapes:  grad_mask, mask [N, 1, H, W]; mean_map [N, H, W]; levels [N, 4]; rank_pixels int32 [N, 4, L] -> [N, 1, H, W].
    """
    images, _, height, width = mask.shape
    plan = _plan(height, width, mask.dtype, window_size, temperature, quantiles)
    grad_mask, mask, mean_map = grad_mask.contiguous(), mask.contiguous(), mean_map.contiguous()
    rank_pixels, levels = rank_pixels.contiguous(), levels.contiguous()
    # Sums are float64 here, whatever the planes are.
    size = torch.float64.itemsize
    rows = _tiling(plan.tile_x, _ROWS, size, height, width, plan.reach_x)
    columns = _tiling(plan.tile_y, 16, size, width, height, plan.reach_y)
    sums, grad_plane = torch.empty_like(mask), torch.empty_like(mask)
    tickets = mask.new_empty((images,), dtype=torch.int32)
    area_sums = mask.new_empty((images, rows.programs), dtype=torch.float64)
    gate_sums = mask.new_empty((images, columns.programs, 2), dtype=torch.float64)
    with torch.cuda.device_of(mask):
        box.area_rows_kernel[images * rows.programs,](
            mask, grad_mask, sums, area_sums, tickets, height, width, rows.blocks, rows.chunks, plan.reach_x, slope,
            WIDE=plan.wide, TILE=plan.tile_x, ROWS=rows.lines, num_warps=rows.warps,
        )  # fmt: skip
        box.gate_columns_kernel[images * columns.programs,](
            sums, mean_map, levels, rank_pixels, area_sums, grad_plane, gate_sums, tickets, height, width, columns.blocks,
            columns.chunks, plan.reach_y, plan.reach_x, plan.half, plan.length, rows.programs, channels, slope, eps, temperature,
            *plan.positions, _scale_of(window_size), WIDE=plan.wide, TILE=plan.tile_y, COLUMNS=columns.lines,
            BLOCK_L=_block_l(plan), num_warps=columns.warps, maxnreg=min(255, 65536 // (32 * columns.warps)),
        )  # fmt: skip
    return grad_plane
