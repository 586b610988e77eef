"""foreground_mask in Triton, forward and backward (SPEC 3 and 6): for a CUDA machine without a compiler. README.md has the plan.

The only file of this op that imports triton; the registered ops import it at their first call. Every kernel launches on
the current stream, its configuration depends on the shape of one image and on the options only (never on N, so an image's
bits do not depend on its batch), and nothing is read back to the host.
"""

from __future__ import annotations

from math import floor, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sib_fast._checks import accumulation_dtype
from sib_fast.ops.foreground_mask import rank_window_length

# ---- sizes ------------------------------------------------------------------------------------------------------------------

# The scratch of an image, int32, zeroed by one memset: histograms of g, of d, counters of candidates, a flag for NaN.
_BINS = tl.constexpr(256)  # of the first histogram: tl.histogram costs about one popc a pixel and 32 bins
_SUBBINS = tl.constexpr(64)  # of each further one, per window
_GATE_WINDOWS = tl.constexpr(3)  # lo, hi, gate
_HISTOGRAM_D = tl.constexpr(256 + 2 * 3 * 64)
_COUNTERS = tl.constexpr(256 + 2 * 3 * 64 + 256 + 2 * 64)
_NOT_A_NUMBER = tl.constexpr(256 + 2 * 3 * 64 + 256 + 2 * 64 + 4)
_SCRATCH = tl.constexpr(1040)

_CAPACITY = 1024  # candidates of a window that are ranked pair by pair; more take the exact search of _separate
_LONGEST_WINDOW = 256  # ranks; beyond it one stable sort is cheaper than ranking pair by pair
_MOST_SPIKES = 64  # ranks of t whose share of grad_h is added pixel by pixel; more are put into grad_d first
_RANK_BLOCK = 1024  # pixels of a step of _separate; 2,048 made float64 spill on sm_80 and sm_90
_RANK_REGISTERS = 128  # of _rank_kernel: left alone, ptxas spills one register on sm_120 to fit a third block of a few programs
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


# ---- small functions of kernels ---------------------------------------------------------------------------------------------


@triton.jit
def _key(values, WIDE: tl.constexpr):
    """Bits of |values|, which order like it; NaN is the largest."""
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    return values.to(kind, bitcast=True) & magnitude


@triton.jit
def _sigmoid(x, WIDE: tl.constexpr):
    """1/(1 + exp(-x)). float32: exp2 of a product in two parts, since exp's own error grows with |x|."""
    bound: tl.constexpr = 700.0 if WIDE else 88.0  # beyond it exp overflows
    x = tl.where(x > bound, bound, x)  # not minimum(): a NaN must stay one
    x = tl.where(x < -bound, -bound, x)
    if WIDE:
        result = 1.0 / (1.0 + tl.exp(-x))
    else:
        high = x * -1.4426950408889634
        low = tl.fma(x, tl.full(x.shape, -1.4426950408889634, tl.float32), -high) + x * -1.925963e-8
        power = tl.exp2(high)
        result = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + (power + power * (low * 0.6931471805599453)))
    return result


@triton.jit
def _window(window, half, pixels, position_0, position_1, position_2):
    """Of window 0, 1 or 2: q(P-1), the rank of entry 0, and the ranks wanted, both included."""
    zero = tl.full((), 0, tl.float64)
    position = tl.where(window == 0, zero + position_0, tl.where(window == 1, zero + position_1, zero + position_2))
    first = tl.floor(position).to(tl.int32) - half
    return position, first, tl.maximum(first, 0), tl.minimum(first + 2 * half, pixels - 1)


@triton.jit
def _bits_above(span, BITS: tl.constexpr):
    """The smallest shift that leaves `span` less than 2^BITS."""
    shift = 0
    while (span >> shift) >= (1 << BITS):
        shift += 1
    return shift


@triton.jit
def _end_of_bin(low, high, which, shift):
    """The last key of a bin of [low, high]. As a distance from low: a NaN's bin may end beyond the largest integer."""
    one = tl.full((), 1, low.dtype)
    return low + tl.minimum(high - low, (which.to(low.dtype) << shift) + ((one << shift) - 1))


@triton.jit
def _interval(histogram, window, start, stop, PASSES: tl.constexpr, WINDOWS: tl.constexpr, ORIGIN: tl.constexpr,
              SHIFT: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Keys [low, high] that hold the ranks start … stop, as PASSES further histograms narrowed them.

    Returns low, high, base (keys below low) and size (keys inside).
    """
    key: tl.constexpr = tl.int64 if WIDE else tl.int32
    largest: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    bins = tl.arange(0, _BINS)
    counts = tl.load(histogram + bins)
    seen = tl.cumsum(counts, 0)
    first = tl.sum((seen <= start).to(tl.int32), 0)
    last = tl.sum((seen <= stop).to(tl.int32), 0)
    base = tl.sum(tl.where(bins < first, counts, 0), 0)
    size = tl.sum(tl.where((bins >= first) & (bins <= last), counts, 0), 0)
    # The outermost bins reach to the ends of the keys.
    low = tl.where(first == 0, 0, (first + ORIGIN).to(key) << SHIFT)
    high = tl.where(last == _BINS - 1, largest, ((last + ORIGIN + 1).to(key) << SHIFT) - 1)
    subbins = tl.arange(0, _SUBBINS)
    for i in tl.static_range(PASSES):
        shift = _bits_above(high - low, 6)
        counts = tl.load(histogram + _BINS + (i * WINDOWS + window) * _SUBBINS + subbins)
        seen = base + tl.cumsum(counts, 0)
        first = tl.sum((seen <= start).to(tl.int32), 0)
        last = tl.sum((seen <= stop).to(tl.int32), 0)
        base += tl.sum(tl.where(subbins < first, counts, 0), 0)
        size = tl.sum(tl.where((subbins >= first) & (subbins <= last), counts, 0), 0)
        high = _end_of_bin(low, high, last, shift)
        low += first.to(key) << shift
    return low, high, base, size


@triton.jit
def _weights(pixel, rank, nearest, position, temperature):
    """exp of the soft quantile's exponents, about the nearest rank's, so that no temperature makes all of them vanish."""
    exponent = tl.abs(nearest - position) - tl.abs(rank.to(tl.float64) - position)
    return tl.where(pixel >= 0, tl.exp(exponent / temperature), 0.0)


@triton.jit
def _total_weight(pixels_of_ranks, first, length, position, temperature, BLOCK_L: tl.constexpr):
    nearest = tl.floor(position + 0.5)
    total = tl.zeros([BLOCK_L], tl.float64)
    for j in range(0, length, BLOCK_L):
        entry = j + tl.arange(0, BLOCK_L)
        pixel = tl.load(pixels_of_ranks + entry, mask=entry < length, other=-1)
        total += _weights(pixel, first + entry, nearest, position, temperature)
    return tl.sum(total, 0)


@triton.jit
def _ordered_sum(partials, count, BLOCK: tl.constexpr):
    """Σ of float64 partials, in an order that `count` alone decides."""
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _steepness(levels, slope, eps, WIDE: tl.constexpr):
    """gate and slope/r of an image, r = max(hi - lo, 0) + eps."""
    low, high, gate = tl.load(levels), tl.load(levels + 1), tl.load(levels + 2)
    spread = high - low
    spread = tl.where(spread < 0, 0.0, spread) + eps  # not maximum(): a NaN must stay one
    steep = slope / spread.to(tl.float64)
    return gate, steep if WIDE else steep.to(tl.float32)


# ---- selection --------------------------------------------------------------------------------------------------------------


@triton.jit
def _mean_map_kernel(vjp, mean_map, scratch, stride_n, stride_c, stride_h, stride_w, channels, width, pixels, tiles,
                     FLAT: tl.constexpr, UNROLL: tl.constexpr, HISTOGRAM: tl.constexpr, ORIGIN: tl.constexpr,
                     SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """mean_c R and the first histogram of its absolute value.

    Shapes    vjp [N, C, H, W], any strides; out mean_map [N, P], all written; scratch int32 [N, _SCRATCH], added to.
    Launch    N·⌈P/BLOCK⌉ programs. FLAT: a plane is one strided run.
    Traffic   reads vjp once, writes N·P. The histogram hides behind the loads [E].
    Order     channels in groups of UNROLL, then the groups, each in order: the same bits for every layout.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    if FLAT:
        at = pixel.to(tl.int64) * stride_w
    else:
        at = (pixel // width).to(tl.int64) * stride_h + (pixel % width).to(tl.int64) * stride_w
    image = vjp + n * stride_n
    total = tl.zeros([BLOCK], acc)
    for c in range(0, channels, UNROLL):
        group = tl.zeros([BLOCK], acc)
        for j in tl.static_range(UNROLL):
            channel = tl.full((), c + j, tl.int64)
            group += tl.load(image + channel * stride_c + at, mask=inside & (c + j < channels), other=0.0).to(acc)
        total += group
    count = tl.zeros([BLOCK], acc) + channels
    mean = total / count if WIDE else tl.div_rn(total, count)
    tl.store(mean_map + n * pixels + pixel, mean, mask=inside)
    if HISTOGRAM:
        octave = (_key(mean, WIDE) >> SHIFT).to(tl.int32) - ORIGIN
        octave = tl.minimum(tl.maximum(octave, 0), _BINS - 1)
        counts = tl.histogram(octave, _BINS, mask=inside)
        bins = tl.arange(0, _BINS)
        tl.atomic_add(scratch + n * _SCRATCH + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _narrow_kernel(plane, scratch, histogram_at, pixels, tiles, half, position_0: tl.float64, position_1: tl.float64,
                   position_2: tl.float64, PASSES: tl.constexpr, WINDOWS: tl.constexpr, ORIGIN: tl.constexpr,
                   SHIFT: tl.constexpr, KEYED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One more histogram per window, of the keys in the interval that PASSES earlier ones left.

    Shapes    plane [N, P] (KEYED: it holds keys already); scratch int32 [N, _SCRATCH], added to.
    Launch    N·⌈P/BLOCK⌉ programs; each finds the intervals itself, which spares a launch.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    value = tl.load(plane + n * pixels + pixel, mask=inside, other=0)
    key = value if KEYED else _key(value, WIDE)
    histogram = scratch + n * _SCRATCH + histogram_at
    subbins = tl.arange(0, _SUBBINS)
    for window in tl.static_range(WINDOWS):
        _, _, start, stop = _window(window, half, pixels, position_0, position_1, position_2)
        low, high, _, _ = _interval(histogram, window, start, stop, PASSES, WINDOWS, ORIGIN, SHIFT, WIDE)
        subbin = ((key - low) >> _bits_above(high - low, 6)).to(tl.int32)
        counts = tl.histogram(subbin, _SUBBINS, mask=inside & (key >= low) & (key <= high))
        to = histogram + _BINS + (PASSES * WINDOWS + window) * _SUBBINS + subbins
        tl.atomic_add(to, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _collect_kernel(plane, scratch, histogram_at, counter_at, keys, key_pixels, pixels, tiles, half,
                    position_0: tl.float64, position_1: tl.float64, position_2: tl.float64, PASSES: tl.constexpr,
                    WINDOWS: tl.constexpr, ORIGIN: tl.constexpr, SHIFT: tl.constexpr, KEYED: tl.constexpr, WIDE: tl.constexpr,
                    CAPACITY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The (key, pixel) pairs of every window's interval, unless there are more than CAPACITY.

    Shapes    out keys, key_pixels [N, 3, CAPACITY]: the first `size` of _interval are written.
    Launch    N·⌈P/BLOCK⌉ programs.
    Order     programs take places as they come: the set is the same in every run, its order is not, and ranks ignore it.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    value = tl.load(plane + n * pixels + pixel, mask=inside, other=0)
    key = value if KEYED else _key(value, WIDE)
    histogram = scratch + n * _SCRATCH + histogram_at
    for window in tl.static_range(WINDOWS):
        _, _, start, stop = _window(window, half, pixels, position_0, position_1, position_2)
        low, high, _, size = _interval(histogram, window, start, stop, PASSES, WINDOWS, ORIGIN, SHIFT, WIDE)
        if size <= CAPACITY:
            chosen = inside & (key >= low) & (key <= high)
            count = tl.sum(chosen.to(tl.int32), 0)
            if count > 0:
                taken = tl.atomic_add(scratch + n * _SCRATCH + counter_at + window, count, sem="relaxed")
                at = (n * _GATE_WINDOWS + window) * CAPACITY + taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
                tl.store(keys + at, key, mask=chosen)
                tl.store(key_pixels + at, pixel, mask=chosen)


@triton.jit
def _order_statistic(plane, pixels, rank, low, high, base, KEYED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The key of `rank`, known to be in [low, high] with `base` keys below, and the number of keys below it."""
    bins = tl.arange(0, _BINS)
    while low < high:
        shift = _bits_above(high - low, 8)
        counts = tl.zeros([_BINS], tl.int32)
        for p in range(0, pixels, BLOCK):
            pixel = p + tl.arange(0, BLOCK)
            value = tl.load(plane + pixel, mask=pixel < pixels, other=0)
            key = value if KEYED else _key(value, WIDE)
            inside = (pixel < pixels) & (key >= low) & (key <= high)
            counts += tl.histogram(((key - low) >> shift).to(tl.int32), _BINS, mask=inside)
        found = tl.sum((base + tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
        base += tl.sum(tl.where(bins < found, counts, 0), 0)
        high = _end_of_bin(low, high, found, shift)
        low += found.to(low.dtype) << shift
    return low, base


@triton.jit
def _separate(plane, pixels, start, stop, low, high, base, keys, key_pixels, ranks, first, KEYED: tl.constexpr,
              WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """For more candidates than are ranked pair by pair: many equal values, or a very large image.

    Finds the keys of the ranks `start` and `stop` exactly. Pixels that hold one of those two keys are ranked by a count in
    the order of the pixels, and written to `ranks`; what lies strictly between is less than a window, and goes to `keys`.
    Returns the rank of the lowest of those, and their number.
    """
    lower, below_lower = _order_statistic(plane, pixels, start, low, high, base, KEYED, WIDE, BLOCK)
    upper, below_upper = _order_statistic(plane, pixels, stop, lower, high, below_lower, KEYED, WIDE, BLOCK)
    at_lower, at_upper, between = below_lower, below_upper, 0
    for p in range(0, pixels, BLOCK):
        pixel = p + tl.arange(0, BLOCK)
        value = tl.load(plane + pixel, mask=pixel < pixels, other=0)
        key = value if KEYED else _key(value, WIDE)
        equal = ((pixel < pixels) & (key == lower)).to(tl.int32)
        rank = at_lower + tl.cumsum(equal, 0) - equal
        tl.store(ranks + rank - first, pixel, mask=(equal > 0) & (rank >= start) & (rank <= stop))
        at_lower += tl.sum(equal, 0)
        if upper != lower:
            equal = ((pixel < pixels) & (key == upper)).to(tl.int32)
            rank = at_upper + tl.cumsum(equal, 0) - equal
            tl.store(ranks + rank - first, pixel, mask=(equal > 0) & (rank <= stop))
            at_upper += tl.sum(equal, 0)
            inner = ((pixel < pixels) & (key > lower) & (key < upper)).to(tl.int32)
            place = between + tl.cumsum(inner, 0) - inner
            tl.store(keys + place, key, mask=inner > 0)
            tl.store(key_pixels + place, pixel, mask=inner > 0)
            between += tl.sum(inner, 0)
    return at_lower, between


@triton.jit
def _rank_kernel(plane, scratch, histogram_at, keys, key_pixels, rank_pixels, levels, pixels, half, length, scale: tl.float64,
                 temperature: tl.float64, position_0: tl.float64, position_1: tl.float64, position_2: tl.float64,
                 SELECT: tl.constexpr, LEVEL: tl.constexpr, PASSES: tl.constexpr, WINDOWS: tl.constexpr, ORIGIN: tl.constexpr,
                 SHIFT: tl.constexpr, KEYED: tl.constexpr, WIDE: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """The pixels of a window's ranks, ties by lower pixel, and the soft quantile that they make.

    Shapes    out rank_pixels int32 [N, 4, L], -1 outside the ranks 0 … P-1 (SELECT; otherwise read); levels [N, 4].
    Launch    one program per image and window.
    Order     a candidate's rank is the number of pairs (key, pixel) below its own: no order of arrival can change it.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = (tl.program_id(0) // WINDOWS).to(tl.int64)
    window = tl.program_id(0) % WINDOWS
    position, first, start, stop = _window(window, half, pixels, position_0, position_1, position_2)
    plane += n * pixels
    scratch += n * _SCRATCH
    ranks = rank_pixels + (n * 4 + LEVEL + window) * length
    if SELECT:
        for j in range(0, length, BLOCK_L):
            entry = j + tl.arange(0, BLOCK_L)
            outside = (first + entry < 0) | (first + entry >= pixels)
            tl.store(ranks + entry, tl.full([BLOCK_L], -1, tl.int32), mask=(entry < length) & outside)
        keys += (n * _GATE_WINDOWS + window) * CAPACITY
        key_pixels += (n * _GATE_WINDOWS + window) * CAPACITY
        low, high, base, size = _interval(
            scratch + histogram_at, window, start, stop, PASSES, WINDOWS, ORIGIN, SHIFT, WIDE
        )  # fmt: skip
        if size > CAPACITY:
            base, size = _separate(
                plane, pixels, start, stop, low, high, base, keys, key_pixels, ranks, first, KEYED, WIDE, BLOCK
            )  # fmt: skip
            tl.debug_barrier()  # the pairs that one thread stored are read by others below
        for i in range(0, size, CHUNK):
            mine = i + tl.arange(0, CHUNK)
            key = tl.load(keys + mine, mask=mine < size, other=0)
            pixel = tl.load(key_pixels + mine, mask=mine < size, other=0)
            below = tl.zeros([CHUNK], tl.int32)
            for j in range(0, size, CHUNK):
                other = j + tl.arange(0, CHUNK)
                other_key = tl.load(keys + other, mask=other < size, other=0)[None, :]
                other_pixel = tl.load(key_pixels + other, mask=other < size, other=0)[None, :]
                less = (other_key < key[:, None]) | ((other_key == key[:, None]) & (other_pixel < pixel[:, None]))
                below += tl.sum((less & (other < size)[None, :]).to(tl.int32), 1)
            rank = base + below
            tl.store(ranks + rank - first, pixel, mask=(mine < size) & (rank >= start) & (rank <= stop))
        tl.debug_barrier()  # as above

    nearest = tl.floor(position + 0.5)
    nearest_pixel = tl.load(ranks + nearest.to(tl.int32) - first)
    centre = tl.load(plane + nearest_pixel)
    centre = (centre.to(acc) * (scale + tl.zeros([1], acc)).to(acc)) if KEYED else tl.abs(centre) + tl.zeros([1], acc)
    total, shift = tl.zeros([BLOCK_L], tl.float64), tl.zeros([BLOCK_L], tl.float64)
    for j in range(0, length, BLOCK_L):
        entry = j + tl.arange(0, BLOCK_L)
        pixel = tl.load(ranks + entry, mask=entry < length, other=-1)
        value = tl.load(plane + pixel, mask=pixel >= 0, other=0)
        # d as the mask's kernel has it, to the bit: where all d are equal, d - t must be 0.
        value = (value.to(acc) * (scale + tl.zeros([1], acc)).to(acc)) if KEYED else tl.abs(value)
        weight = _weights(pixel, first + entry, nearest, position, temperature)
        total += weight
        # About the value at the nearest rank: exact on ties, where the plain sum leaves rounding that 1/r would blow up.
        shift += tl.where(pixel >= 0, weight * (value.to(tl.float64) - centre.to(tl.float64)), 0.0)
    level = centre.to(tl.float64) + tl.sum(shift, 0) / tl.sum(total, 0)
    if KEYED:  # integers cannot carry a NaN of h
        level = tl.where(tl.load(scratch + _NOT_A_NUMBER) != 0, float("nan"), level)
    tl.store(levels + n * 4 + LEVEL + window + tl.arange(0, 1), level.to(acc))


# ---- box mean ---------------------------------------------------------------------------------------------------------------
# Along one axis: a tile of TILE entries begins REACH + 1 before its first output; with c its inclusive prefix sums, output o
# is c[o + window] - c[o]. Of TILE entries, TILE - window are outputs.


@triton.jit
def _windowed(values, window, AXIS: tl.constexpr, TILE: tl.constexpr, OTHER: tl.constexpr):
    """Window sums along AXIS of a tile [OTHER, TILE] (AXIS 1) or [TILE, OTHER] (AXIS 0); entries beyond the outputs are junk."""
    prefix = tl.cumsum(values, AXIS)
    end = tl.minimum(tl.arange(0, TILE) + window, TILE - 1)
    if AXIS == 1:  # noqa: SIM108 - the compiler takes one branch, by AXIS; a conditional expression would need both shapes equal
        index = tl.broadcast_to(end[None, :], (OTHER, TILE))
    else:
        index = tl.broadcast_to(end[:, None], (TILE, OTHER))
    return tl.gather(prefix, index, AXIS) - prefix


@triton.jit
def _tile_of(width, height, row_blocks, chunks, reach, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Of a program of a kernel along rows: image, y, first output x, and x of every entry."""
    tiles = row_blocks * chunks
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    y = (tile // chunks) * ROWS + tl.arange(0, ROWS)
    x_first = (tile % chunks) * (TILE - 2 * reach - 1)
    return n, tile, y, x_first, x_first - reach - 1 + tl.arange(0, TILE)


@triton.jit
def _gate_rows_kernel(mean_map, levels, scratch, sums, height, width, row_blocks, chunks, reach, slope: tl.float64,
                      eps: tl.float64, fixed: tl.float64, WIDE: tl.constexpr, TILE: tl.constexpr,
                      ROWS: tl.constexpr):  # fmt: skip
    """h = sigmoid(slope (g - gate)/r) in fixed point, and its window sums along the rows.

    Shapes    mean_map [N, H, W]; levels [N, 4]; out sums int [N, H, W], all written.
    Launch    N·⌈H/ROWS⌉·⌈W/(TILE - window)⌉ programs.
    Order     integers, modulo 2^32 or 2^64: exact whatever the order, and equal windows tie to the bit.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    key: tl.constexpr = tl.int64 if WIDE else tl.int32
    n, _, y, x_first, x = _tile_of(width, height, row_blocks, chunks, reach, TILE, ROWS)
    inside = (y < height)[:, None] & ((x >= 0) & (x < width))[None, :]
    plane = n * height * width + y.to(tl.int64)[:, None] * width
    gate, steep = _steepness(levels + n * 4, slope, eps, WIDE)
    g = tl.abs(tl.load(mean_map + plane + x[None, :], mask=inside, other=0.0))
    h = _sigmoid((g - gate) * steep, WIDE)
    broken = inside & (h != h)
    if tl.max(broken.to(tl.int32)) > 0:
        tl.atomic_max(scratch + n * _SCRATCH + _NOT_A_NUMBER, 1, sem="relaxed")
    h = tl.where(inside & (h == h), h, 0.0)
    values = (h * (fixed + tl.zeros([1, 1], acc)).to(acc) + 0.5).to(key)
    values = tl.where(inside, values, 0)
    window = _windowed(values, 2 * reach + 1, 1, TILE, ROWS)
    out = tl.arange(0, TILE)
    x_out = x_first + out
    written = (y < height)[:, None] & ((out < TILE - 2 * reach - 1) & (x_out < width))[None, :]
    tl.store(sums + plane + x_out[None, :], window.to(key), mask=written)


@triton.jit
def _box_columns_kernel(sums, box, scratch, histogram_at, height, width, column_blocks, chunks, reach,
                        HISTOGRAM: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
                        COLUMNS: tl.constexpr):  # fmt: skip
    """d = box(h) as integers, which are their own keys, and their first histogram.

    Shapes    sums, out box int [N, H, W]; scratch [N, _SCRATCH], added to.
    Launch    N·⌈W/COLUMNS⌉·⌈H/(TILE - window)⌉ programs.
    """
    key: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles = column_blocks * chunks
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x = (tile // chunks) * COLUMNS + tl.arange(0, COLUMNS)
    y_first = (tile % chunks) * (TILE - 2 * reach - 1)
    y = y_first - reach - 1 + tl.arange(0, TILE)
    plane = n * height * width
    inside = ((y >= 0) & (y < height))[:, None] & (x < width)[None, :]
    values = tl.load(sums + plane + y.to(tl.int64)[:, None] * width + x[None, :], mask=inside, other=0)
    window = _windowed(values, 2 * reach + 1, 0, TILE, COLUMNS).to(key)
    out = tl.arange(0, TILE)
    y_out = y_first + out
    written = ((out < TILE - 2 * reach - 1) & (y_out < height))[:, None] & (x < width)[None, :]
    tl.store(box + plane + y_out.to(tl.int64)[:, None] * width + x[None, :], window, mask=written)
    if HISTOGRAM:
        octave = tl.where(written, (window >> SHIFT).to(tl.int32), 0)
        counts = tl.histogram(tl.reshape(octave, [TILE * COLUMNS]), _BINS, mask=tl.reshape(written, [TILE * COLUMNS]))
        bins = tl.arange(0, _BINS)
        tl.atomic_add(scratch + n * _SCRATCH + histogram_at + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _mask_kernel(box, levels, mask, pixels, tiles, scale: tl.float64, slope: tl.float64, WIDE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """M = sigmoid(slope (d - t)).

    Shapes    box int [N, P] and mask [N, P] are the same memory: a thread overwrites what it read.
    Launch    N·⌈P/BLOCK⌉ programs.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(box + n * pixels + pixel, mask=pixel < pixels, other=0).to(acc) * (scale + tl.zeros([1], acc)).to(acc)
    u = (d - tl.load(levels + n * 4 + 3)) * (slope + tl.zeros([1], acc)).to(acc)
    tl.store(mask + n * pixels + pixel, _sigmoid(u, WIDE), mask=pixel < pixels)


# ---- backward ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _area_gradient(mask, grad_mask, at, inside, slope, WIDE: tl.constexpr):
    """z = slope M (1 - M) grad_M."""
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    m = tl.load(mask + at, mask=inside, other=0.0)
    return (slope + tl.zeros([1, 1], acc)).to(acc) * m * (1.0 - m) * tl.load(grad_mask + at, mask=inside, other=0.0)


@triton.jit
def _spread_kernel(grad_d, partials, rank_pixels, pixels, half, length, parts, temperature: tl.float64, position: tl.float64,
                   BLOCK_L: tl.constexpr):  # fmt: skip
    """grad_d = z, at the pixels of t's ranks: -= w_k Σz. For windows of so many ranks that the box takes them with the rest.

    Shapes    grad_d [N, P], z on entry; partials float64 [N, parts] of Σz.
    Launch    one program per image; a pixel holds at most one rank, so no two threads meet.
    """
    n = tl.program_id(0).to(tl.int64)
    position = tl.full((), 0, tl.float64) + position
    first = tl.floor(position).to(tl.int32) - half
    ranks = rank_pixels + (n * 4 + 3) * length
    unit = _ordered_sum(partials + n * parts, parts, 256) / _total_weight(ranks, first, length, position, temperature, BLOCK_L)
    for j in range(0, length, BLOCK_L):
        entry = j + tl.arange(0, BLOCK_L)
        pixel = tl.load(ranks + entry, mask=entry < length, other=-1)
        weight = _weights(pixel, first + entry, tl.floor(position + 0.5), position, temperature)
        at = grad_d + n * pixels + pixel
        z = tl.load(at, mask=pixel >= 0, other=0.0)
        tl.store(at, z - (weight * unit).to(z.dtype), mask=pixel >= 0)


@triton.jit
def _area_rows_kernel(mask, grad_mask, sums, plane_out, partials, height, width, row_blocks, chunks, reach, slope: tl.float64,
                      FROM: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Window sums of grad_d along the rows.

    FROM "mask" computes z of mask and grad_mask and adds it up; "z" writes z instead of its window sums, and adds it up;
    "plane" takes `mask` for grad_d itself.

    Shapes    mask, grad_mask, out sums [N, H, W]; partials float64 [N, programs of an image] of Σz.
    Launch    N·⌈H/ROWS⌉·⌈W/(TILE - window)⌉ programs.
    Order     prefix sums in float64, a fixed tree per tile; the result is rounded once. Σz: one partial a program.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n, tile, y, x_first, x = _tile_of(width, height, row_blocks, chunks, reach, TILE, ROWS)
    inside = (y < height)[:, None] & ((x >= 0) & (x < width))[None, :]
    plane = n * height * width + y.to(tl.int64)[:, None] * width
    if FROM == "plane":
        z = tl.load(mask + plane + x[None, :], mask=inside, other=0.0)
    else:
        z = _area_gradient(mask, grad_mask, plane + x[None, :], inside, slope, WIDE)
        # A pixel counts where it is an output, not where it is halo.
        own = inside & ((x >= x_first) & (x < x_first + TILE - 2 * reach - 1))[None, :]
        total = tl.sum(tl.sum(tl.where(own, z, 0.0).to(tl.float64), 1), 0)
        tl.store(partials + n * row_blocks * chunks + tile, total)
    if FROM == "z":
        tl.store(plane_out + plane + x[None, :], z, mask=own)
    else:
        window = _windowed(z.to(tl.float64), 2 * reach + 1, 1, TILE, ROWS)
        out = tl.arange(0, TILE)
        x_out = x_first + out
        written = (y < height)[:, None] & ((out < TILE - 2 * reach - 1) & (x_out < width))[None, :]
        tl.store(sums + plane + x_out[None, :], window.to(acc), mask=written)


@triton.jit
def _gate_columns_kernel(sums, mean_map, levels, rank_pixels, partials, grad_plane, sums_of_gate, height, width, column_blocks,
                         chunks, reach, reach_x, half, length, parts, channels, slope: tl.float64, eps: tl.float64,
                         temperature: tl.float64, position: tl.float64, scale: tl.float64, SPIKES: tl.constexpr,
                         WIDE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """grad_h = box(grad_d), then grad_g = slope h (1 - h) grad_h / r, without the ranks of lo, hi and gate.

    Shapes    sums, mean_map, out grad_plane [N, H, W] = sgn grad_g / C; partials float64 [N, parts] of Σz;
              out sums_of_gate float64 [N, programs of an image, 2]: Σ grad_g and Σ grad_g·slope·e.
    Launch    N·⌈W/COLUMNS⌉·⌈H/(TILE - window)⌉ programs.
    Order     as along the rows. -w_k Σz of t's ranks is added apart (SPIKES): in the running sums it would cost digits.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    tiles = column_blocks * chunks
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x = (tile // chunks) * COLUMNS + tl.arange(0, COLUMNS)
    y_first = (tile % chunks) * (TILE - 2 * reach - 1)
    y = y_first - reach - 1 + tl.arange(0, TILE)
    plane = n * height * width
    inside = ((y >= 0) & (y < height))[:, None] & (x < width)[None, :]
    values = tl.load(sums + plane + y.to(tl.int64)[:, None] * width + x[None, :], mask=inside, other=0.0)
    grad_h = _windowed(values.to(tl.float64), 2 * reach + 1, 0, TILE, COLUMNS)
    out = tl.arange(0, TILE)
    y_out = y_first + out
    if SPIKES:
        position = tl.full((), 0, tl.float64) + position
        first = tl.floor(position).to(tl.int32) - half
        nearest = tl.floor(position + 0.5)
        ranks = rank_pixels + (n * 4 + 3) * length
        unit = _ordered_sum(partials + n * parts, parts, 256)
        unit /= _total_weight(ranks, first, length, position, temperature, BLOCK_L)
        for j in range(length):
            pixel = tl.load(ranks + j)
            if pixel >= 0:
                rank = (first + j).to(tl.float64)
                weight = tl.exp((tl.abs(nearest - position) - tl.abs(rank - position)) / temperature)
                near_y = tl.abs(y_out - pixel // width) <= reach
                near_x = tl.abs(x - pixel % width) <= reach_x
                grad_h -= tl.where(near_y[:, None] & near_x[None, :], weight * unit, 0.0)
    grad_h = (grad_h * scale).to(acc)
    written = ((out < TILE - 2 * reach - 1) & (y_out < height))[:, None] & (x < width)[None, :]
    at = plane + y_out.to(tl.int64)[:, None] * width + x[None, :]
    m = tl.load(mean_map + at, mask=written, other=0.0)
    gate, steep = _steepness(levels + n * 4, slope, eps, WIDE)
    u = (tl.abs(m) - gate) * steep
    h = _sigmoid(u, WIDE)
    grad_g = tl.where(written, steep * h * (1.0 - h) * grad_h, 0.0)
    count = tl.zeros([1, 1], acc) + channels
    sign = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0)).to(acc)
    tl.store(grad_plane + at, sign * (grad_g / count), mask=written)
    alpha = tl.sum(tl.sum(grad_g.to(tl.float64), 1), 0)
    product = tl.where(written, grad_g.to(tl.float64) * u.to(tl.float64), 0.0)
    to = sums_of_gate + (n * tiles + tile) * 2
    tl.store(to, alpha)
    tl.store(to + 1, tl.sum(tl.sum(product, 1), 0))


@triton.jit
def _gate_ranks_kernel(grad_plane, mean_map, levels, rank_pixels, sums_of_gate, pixels, half, length, parts, channels,
                       slope: tl.float64, temperature: tl.float64, position_0: tl.float64, position_1: tl.float64,
                       position_2: tl.float64, WIDE: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """At the pixels of the ranks: lo -= w_k ρ, hi += w_k ρ, gate -= w_k α; α = Σ grad_g, ρ = -Σ grad_g e, 0 where hi <= lo.

    Launch    one program per image: a pixel may hold a rank of each level, so the levels take turns.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = tl.program_id(0).to(tl.int64)
    grad_plane += n * pixels
    mean_map += n * pixels
    alpha, rho = tl.zeros([128], tl.float64), tl.zeros([128], tl.float64)
    for i in range(0, parts, 128):
        part = i + tl.arange(0, 128)
        at = sums_of_gate + (n * parts + part) * 2
        alpha += tl.load(at, mask=part < parts, other=0.0)
        rho -= tl.load(at + 1, mask=part < parts, other=0.0)
    open_range = tl.load(levels + n * 4 + 1) > tl.load(levels + n * 4)
    alpha_sum = tl.sum(alpha, 0)
    rho_sum = tl.where(open_range, tl.sum(rho, 0) / slope, 0.0)
    count = tl.zeros([1], acc) + channels
    for level in tl.static_range(3):
        position, first, _, _ = _window(level, half, pixels, position_0, position_1, position_2)
        ranks = rank_pixels + (n * 4 + level) * length
        factor = -rho_sum if level == 0 else (rho_sum if level == 1 else -alpha_sum)
        unit = factor / _total_weight(ranks, first, length, position, temperature, BLOCK_L)
        for j in range(0, length, BLOCK_L):
            entry = j + tl.arange(0, BLOCK_L)
            pixel = tl.load(ranks + entry, mask=entry < length, other=-1)
            weight = _weights(pixel, first + entry, tl.floor(position + 0.5), position, temperature)
            m = tl.load(mean_map + pixel, mask=pixel >= 0, other=0.0)
            sign = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0)).to(acc)
            before = tl.load(grad_plane + pixel, mask=pixel >= 0, other=0.0)
            tl.store(grad_plane + pixel, before + sign * ((weight * unit).to(acc) / count), mask=pixel >= 0)
        tl.debug_barrier()  # the next level may read what another thread has just stored


# ---- launches ---------------------------------------------------------------------------------------------------------------

# Keys are histogrammed first by quarter octaves of 2^-56 … 2^8 (g, floats) and by their leading 8 bits (d, integers).
_OF_FLOATS = {False: {"ORIGIN": 4 * (127 - 56), "SHIFT": 21}, True: {"ORIGIN": 4 * (1023 - 56), "SHIFT": 50}}
_OF_INTEGERS = {False: {"ORIGIN": 0, "SHIFT": 23}, True: {"ORIGIN": 0, "SHIFT": 54}}
_ROWS = 8  # of a box tile along the rows: 2,048 entries at TILE = 256, 16 a thread
_COLUMNS = {False: 32, True: 16}  # of a box tile along the columns: whole sectors
_GATHER = 64 * 1024  # bytes of shared memory that the gather of a box tile may take; the smallest limit is 99 KiB


def _lines(most: int, tile: int, size: int) -> int:
    """Rows or columns of a box tile of `tile` entries each, `size` bytes an entry."""
    return max(1, min(most, _GATHER // (tile * size)))


def _warps(entries: int, per_thread: int) -> int:
    """Warps that leave a thread about `per_thread` entries of a tile: beyond 16 of 8 bytes the box kernels spill."""
    return min(16, max(4, entries // (32 * per_thread)))


def _passes(plan: _Plan, of_floats: bool) -> int:
    """Histograms after the first one, from the shape alone: for data without many ties they leave some hundred candidates."""
    few, many = (4096, 1 << 17) if of_floats else (1 << 16, 1 << 22)
    return 0 if plan.pixels <= few else 1 if plan.pixels <= many else 2


def _block_l(plan: _Plan) -> int:
    return min(1024, max(16, triton.next_power_of_2(plan.length)))


def _sorted_ranks(plane: Tensor, plan: _Plan, positions: tuple[float, ...]) -> Tensor:
    """The rank windows of one stable sort of |plane| [N, P]. Shapes: -> int32 [N, levels, L]."""
    order = plane.abs().sort(dim=1, stable=True).indices
    offsets = torch.arange(plan.length, device=plane.device) - plan.half
    windows = []
    for position in positions:
        ranks = floor(position) + offsets
        pixels = order.index_select(1, ranks.clamp(0, plan.pixels - 1))
        windows.append(torch.where((ranks >= 0) & (ranks < plan.pixels), pixels, -1))
    return torch.stack(windows, dim=1).to(torch.int32)


def _rank(plan, plane, scratch, candidates, rank_pixels, levels, temperature, *, of_d, select, scale=0.0) -> None:
    """Ranks and levels of g (lo, hi, gate) or of d (t): narrow, collect, rank."""
    images = plane.shape[0]
    positions = (*plan.positions[3:], 0.0, 0.0) if of_d else plan.positions[:3]
    windows = 1 if of_d else 3
    histogram_at, counter_at = (_HISTOGRAM_D.value, _COUNTERS.value + 3) if of_d else (0, _COUNTERS.value)
    shared = {"WINDOWS": windows, "KEYED": of_d, "WIDE": plan.wide, "BLOCK": _BLOCK}
    shared |= (_OF_INTEGERS if of_d else _OF_FLOATS)[plan.wide]
    passes = _passes(plan, not of_d)
    if select:
        for done in range(passes):
            _narrow_kernel[images * plan.tiles,](
                plane, scratch, histogram_at, plan.pixels, plan.tiles, plan.half, *positions, PASSES=done, num_warps=8, **shared,
            )  # fmt: skip
        _collect_kernel[images * plan.tiles,](
            plane, scratch, histogram_at, counter_at, *candidates, plan.pixels, plan.tiles, plan.half, *positions,
            PASSES=passes, CAPACITY=_CAPACITY, num_warps=8, **shared,
        )  # fmt: skip
    _rank_kernel[images * windows,](
        plane, scratch, histogram_at, *candidates, rank_pixels, levels, plan.pixels, plan.half, plan.length, scale, temperature,
        *positions, SELECT=select, LEVEL=3 if of_d else 0, PASSES=passes, CAPACITY=_CAPACITY, CHUNK=64, BLOCK_L=_block_l(plan),
        num_warps=8, maxnreg=_RANK_REGISTERS, **shared | {"BLOCK": _RANK_BLOCK},
    )  # fmt: skip


def _scale_of(window_size: int) -> float:
    return 1.0 / (float(window_size) * float(window_size))


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
    select = rank_pixels is None and plan.length <= _LONGEST_WINDOW
    ranks = (
        vjp.new_empty((images, 4, plan.length), dtype=torch.int32)
        if rank_pixels is None
        else rank_pixels.clone(memory_format=torch.contiguous_format)
    )
    scratch = vjp.new_zeros((images, _SCRATCH.value), dtype=torch.int32)
    sums = vjp.new_empty((images, height, width), dtype=plan.key)
    room = (images, 3, _CAPACITY) if select else (1,)
    candidates = (vjp.new_empty(room, dtype=plan.key), vjp.new_empty(room, dtype=torch.int32))
    box = mask.view(plan.key)  # d, until the last kernel turns it into the mask
    g_rows, d_rows = mean_map.view(images, -1), box.view(images, -1)
    with torch.cuda.device_of(vjp):
        _mean_map_kernel[images * plan.tiles,](
            vjp, mean_map, scratch, *vjp.stride(), channels, width, plan.pixels, plan.tiles,
            FLAT=height == 1 or vjp.stride(2) == width * vjp.stride(3), UNROLL=min(8, triton.next_power_of_2(channels)),
            HISTOGRAM=select, WIDE=plan.wide, BLOCK=_BLOCK, num_warps=8 if plan.wide else 4, **_OF_FLOATS[plan.wide],
        )  # fmt: skip
        if rank_pixels is None and not select:
            ranks[:, :3] = _sorted_ranks(g_rows, plan, plan.positions[:3])
        _rank(plan, g_rows, scratch, candidates, ranks, levels, temperature, of_d=False, select=select)
        rows = _lines(_ROWS, plan.tile_x, plan.key.itemsize)
        row_blocks, chunks = triton.cdiv(height, rows), triton.cdiv(width, plan.tile_x - 2 * plan.reach_x - 1)
        _gate_rows_kernel[images * row_blocks * chunks,](
            mean_map, levels, scratch, sums, height, width, row_blocks, chunks, plan.reach_x, slope, eps, float(2**plan.bits),
            WIDE=plan.wide, TILE=plan.tile_x, ROWS=rows, num_warps=_warps(rows * plan.tile_x, 16),
        )  # fmt: skip
        columns = _lines(_COLUMNS[plan.wide], plan.tile_y, plan.key.itemsize)
        column_blocks, chunks = triton.cdiv(width, columns), triton.cdiv(height, plan.tile_y - 2 * plan.reach_y - 1)
        _box_columns_kernel[images * column_blocks * chunks,](
            sums, box, scratch, _HISTOGRAM_D.value, height, width, column_blocks, chunks, plan.reach_y,
            HISTOGRAM=select, SHIFT=_OF_INTEGERS[plan.wide]["SHIFT"], WIDE=plan.wide, TILE=plan.tile_y, COLUMNS=columns,
            num_warps=_warps(columns * plan.tile_y, 16 if plan.wide else 32),
        )  # fmt: skip
        if rank_pixels is None and not select:
            ranks[:, 3:] = _sorted_ranks(d_rows, plan, plan.positions[3:])
        scale = _scale_of(window_size) / float(2**plan.bits)
        _rank(plan, d_rows, scratch, candidates, ranks, levels, temperature, of_d=True, select=select, scale=scale)
        _mask_kernel[images * plan.tiles,](
            box, levels, mask, plan.pixels, plan.tiles, scale, slope, WIDE=plan.wide, BLOCK=_BLOCK
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
    """The gradient of every channel of vjp, one plane per image.

    Shapes:  grad_mask, mask [N, 1, H, W]; mean_map [N, H, W]; levels [N, 4]; rank_pixels int32 [N, 4, L] -> [N, 1, H, W].
    Launches: three kernels; five for windows of more than _MOST_SPIKES ranks.
    """
    images, _, height, width = mask.shape
    plan = _plan(height, width, mask.dtype, window_size, temperature, quantiles)
    grad_mask, mask, mean_map = grad_mask.contiguous(), mask.contiguous(), mean_map.contiguous()
    rank_pixels, levels = rank_pixels.contiguous(), levels.contiguous()
    # Sums are float64 here, whatever the planes are.
    lines = _lines(_ROWS, plan.tile_x, torch.float64.itemsize)
    row_blocks, row_chunks = triton.cdiv(height, lines), triton.cdiv(width, plan.tile_x - 2 * plan.reach_x - 1)
    columns = _lines(16, plan.tile_y, torch.float64.itemsize)
    column_blocks, column_chunks = triton.cdiv(width, columns), triton.cdiv(height, plan.tile_y - 2 * plan.reach_y - 1)
    row_parts, column_parts = row_blocks * row_chunks, column_blocks * column_chunks
    spikes = plan.length <= _MOST_SPIKES
    sums = torch.empty_like(mask)
    grad_d = mask if spikes else torch.empty_like(mask)
    grad_plane = torch.empty_like(mask)
    area_sums = mask.new_empty((images, row_parts), dtype=torch.float64)
    gate_sums = mask.new_empty((images, column_parts, 2), dtype=torch.float64)
    rows = {"WIDE": plan.wide, "TILE": plan.tile_x, "ROWS": lines, "num_warps": _warps(lines * plan.tile_x, 16)}

    def along_rows(source, origin):
        _area_rows_kernel[images * row_parts,](
            source, grad_mask, sums, grad_d, area_sums, height, width, row_blocks, row_chunks, plan.reach_x, slope,
            FROM=origin, **rows,
        )  # fmt: skip

    with torch.cuda.device_of(mask):
        if spikes:
            along_rows(mask, "mask")
        else:
            along_rows(mask, "z")
            _spread_kernel[images,](
                grad_d, area_sums, rank_pixels, plan.pixels, plan.half, plan.length, row_parts, temperature, plan.positions[3],
                BLOCK_L=_block_l(plan),
            )  # fmt: skip
            along_rows(grad_d, "plane")
        _gate_columns_kernel[images * column_parts,](
            sums, mean_map, levels, rank_pixels, area_sums, grad_plane, gate_sums, height, width, column_blocks, column_chunks,
            plan.reach_y, plan.reach_x, plan.half, plan.length, row_parts, channels, slope, eps, temperature, plan.positions[3],
            _scale_of(window_size), SPIKES=spikes, WIDE=plan.wide, TILE=plan.tile_y, COLUMNS=columns, BLOCK_L=_block_l(plan),
            num_warps=_warps(columns * plan.tile_y, 16),
        )  # fmt: skip
        _gate_ranks_kernel[images,](
            grad_plane, mean_map, levels, rank_pixels, gate_sums, plan.pixels, plan.half, plan.length, column_parts, channels,
            slope, temperature, *plan.positions[:3], WIDE=plan.wide, BLOCK_L=_block_l(plan),
        )  # fmt: skip
    return grad_plane
