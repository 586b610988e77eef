"""Which pixels hold the ranks of a soft quantile (SPEC 3): histograms that narrow an interval of keys, then pairs counted."""

from __future__ import annotations

import triton
import triton.language as tl

# The scratch of an image, int32, zeroed by one memset: histograms of g, of d, counters of candidates, a flag for NaN.
BINS = tl.constexpr(256)  # of the first histogram: tl.histogram costs about one popc a pixel and 32 bins
SUBBINS = tl.constexpr(64)  # of each further one, per window
GATE_WINDOWS = tl.constexpr(3)  # lo, hi, gate
HISTOGRAM_D = tl.constexpr(256 + 2 * 3 * 64)
COUNTERS = tl.constexpr(256 + 2 * 3 * 64 + 256 + 2 * 64)
NOT_A_NUMBER = tl.constexpr(256 + 2 * 3 * 64 + 256 + 2 * 64 + 4)
SCRATCH = tl.constexpr(1040)


@triton.jit
def _key(values, WIDE: tl.constexpr):
    """Bits of |values|, which order like it; NaN is the largest."""
    kind: tl.constexpr = tl.int64 if WIDE else tl.int32
    magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    return values.to(kind, bitcast=True) & magnitude


@triton.jit
def rank_window(window, half, pixels, position_0, position_1, position_2):
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
def _keys_of(plane, pixel, pixels, KEYED: tl.constexpr, WIDE: tl.constexpr):
    """Keys of some pixels of a plane, and which of them exist. KEYED: the plane holds keys."""
    inside = pixel < pixels
    value = tl.load(plane + pixel, mask=inside, other=0)
    return value if KEYED else _key(value, WIDE), inside


@triton.jit
def _ranks_in(counts, seen, bins, start, stop):
    """Of bins with `counts` keys each, `seen` up to their ends: the bins of ranks start and stop, keys before, keys inside."""
    first = tl.sum((seen <= start).to(tl.int32), 0)
    last = tl.sum((seen <= stop).to(tl.int32), 0)
    before = tl.sum(tl.where(bins < first, counts, 0), 0)
    return first, last, before, tl.sum(tl.where((bins >= first) & (bins <= last), counts, 0), 0)


@triton.jit
def _interval(counts, seen, histogram, window, start, stop, PASSES: tl.constexpr, WINDOWS: tl.constexpr, ORIGIN: tl.constexpr,
              SHIFT: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Keys [low, high] that hold the ranks start … stop, as PASSES further histograms narrowed them.

    counts, seen: the first histogram and its running sums, which a caller with several windows reads once.
    Returns low, high, base (keys below low) and size (keys inside).
    """
    key: tl.constexpr = tl.int64 if WIDE else tl.int32
    largest: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    first, last, base, size = _ranks_in(counts, seen, tl.arange(0, BINS), start, stop)
    # The outermost bins reach to the ends of the keys.
    low = tl.where(first == 0, 0, (first + ORIGIN).to(key) << SHIFT)
    high = tl.where(last == BINS - 1, largest, ((last + ORIGIN + 1).to(key) << SHIFT) - 1)
    subbins = tl.arange(0, SUBBINS)
    for i in tl.static_range(PASSES):
        shift = _bits_above(high - low, 6)
        counts = tl.load(histogram + BINS + (i * WINDOWS + window) * SUBBINS + subbins)
        first, last, before, size = _ranks_in(counts, base + tl.cumsum(counts, 0), subbins, start, stop)
        base += before
        high = _end_of_bin(low, high, last, shift)
        low += first.to(key) << shift
    return low, high, base, size


@triton.jit
def rank_weights(pixel, rank, nearest, position, temperature):
    """exp of the soft quantile's exponents, about the nearest rank's, so that no temperature makes all of them vanish."""
    exponent = tl.abs(nearest - position) - tl.abs(rank.to(tl.float64) - position)
    return tl.where(pixel >= 0, tl.exp(exponent / temperature), 0.0)


@triton.jit
def total_weight(pixels_of_ranks, first, length, position, temperature, BLOCK_L: tl.constexpr):
    nearest = tl.floor(position + 0.5)
    total = tl.zeros([BLOCK_L], tl.float64)
    for j in range(0, length, BLOCK_L):
        entry = j + tl.arange(0, BLOCK_L)
        pixel = tl.load(pixels_of_ranks + entry, mask=entry < length, other=-1)
        total += rank_weights(pixel, first + entry, nearest, position, temperature)
    return tl.sum(total, 0)


@triton.jit
def mean_map_kernel(vjp, mean_map, scratch, stride_n, stride_c, stride_h, stride_w, channels, width, pixels, tiles,
                    FLAT: tl.constexpr, UNROLL: tl.constexpr, HISTOGRAM: tl.constexpr, ORIGIN: tl.constexpr,
                    SHIFT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """mean_c R and the first histogram of its absolute value.

    Shapes    vjp [N, C, H, W], any strides; out mean_map [N, P], all written; scratch int32 [N, SCRATCH], added to.
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
        octave = tl.minimum(tl.maximum(octave, 0), BINS - 1)
        counts = tl.histogram(octave, BINS, mask=inside)
        bins = tl.arange(0, BINS)
        tl.atomic_add(scratch + n * SCRATCH + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _block_of_keys(plane, scratch, histogram_at, pixels, tiles, KEYED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image; the pixels of its block, their keys, which exist; the image's histograms, the first and its sums."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    key, inside = _keys_of(plane + n * pixels, pixel, pixels, KEYED, WIDE)
    histogram = scratch + n * SCRATCH + histogram_at
    octaves = tl.load(histogram + tl.arange(0, BINS))
    return n, pixel, key, inside, histogram, octaves, tl.cumsum(octaves, 0)


@triton.jit
def narrow_kernel(plane, scratch, histogram_at, pixels, tiles, half, position_0: tl.float64, position_1: tl.float64,
                  position_2: tl.float64, PASSES: tl.constexpr, WINDOWS: tl.constexpr, ORIGIN: tl.constexpr,
                  SHIFT: tl.constexpr, KEYED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One more histogram per window, of the keys in the interval that PASSES earlier ones left.

    Shapes    plane [N, P] (KEYED: it holds keys already); scratch int32 [N, SCRATCH], added to.
    Launch    N·⌈P/BLOCK⌉ programs; each finds the intervals itself, which spares a launch.
    """
    _, _, key, inside, histogram, octaves, seen = _block_of_keys(plane, scratch, histogram_at, pixels, tiles, KEYED, WIDE, BLOCK)
    subbins = tl.arange(0, SUBBINS)
    for window in tl.static_range(WINDOWS):
        _, _, start, stop = rank_window(window, half, pixels, position_0, position_1, position_2)
        low, high, _, _ = _interval(octaves, seen, histogram, window, start, stop, PASSES, WINDOWS, ORIGIN, SHIFT, WIDE)
        subbin = ((key - low) >> _bits_above(high - low, 6)).to(tl.int32)
        counts = tl.histogram(subbin, SUBBINS, mask=inside & (key >= low) & (key <= high))
        to = histogram + BINS + (PASSES * WINDOWS + window) * SUBBINS + subbins
        tl.atomic_add(to, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _order_statistic(plane, pixels, rank, low, high, base, KEYED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The key of `rank`, known to be in [low, high] with `base` keys below, and the number of keys below it."""
    bins = tl.arange(0, BINS)
    while low < high:
        shift = _bits_above(high - low, 8)
        counts = tl.zeros([BINS], tl.int32)
        for p in range(0, pixels, BLOCK):
            pixel = p + tl.arange(0, BLOCK)
            key, inside = _keys_of(plane, pixel, pixels, KEYED, WIDE)
            counts += tl.histogram(((key - low) >> shift).to(tl.int32), BINS, mask=inside & (key >= low) & (key <= high))
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
        key, inside = _keys_of(plane, pixel, pixels, KEYED, WIDE)
        equal = (inside & (key == lower)).to(tl.int32)
        rank = at_lower + tl.cumsum(equal, 0) - equal
        tl.store(ranks + rank - first, pixel, mask=(equal > 0) & (rank >= start) & (rank <= stop))
        at_lower += tl.sum(equal, 0)
        if upper != lower:
            equal = (inside & (key == upper)).to(tl.int32)
            rank = at_upper + tl.cumsum(equal, 0) - equal
            tl.store(ranks + rank - first, pixel, mask=(equal > 0) & (rank <= stop))
            at_upper += tl.sum(equal, 0)
            inner = (inside & (key > lower) & (key < upper)).to(tl.int32)
            place = between + tl.cumsum(inner, 0) - inner
            tl.store(keys + place, key, mask=inner > 0)
            tl.store(key_pixels + place, pixel, mask=inner > 0)
            between += tl.sum(inner, 0)
    return at_lower, between


@triton.jit
def collect_kernel(plane, scratch, histogram_at, counter_at, keys, key_pixels, pixels, tiles, half,
                   position_0: tl.float64, position_1: tl.float64, position_2: tl.float64, PASSES: tl.constexpr,
                   WINDOWS: tl.constexpr, ORIGIN: tl.constexpr, SHIFT: tl.constexpr, KEYED: tl.constexpr, WIDE: tl.constexpr,
                   CAPACITY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The (key, pixel) pairs of every window's interval, unless there are more than CAPACITY.

    Shapes    out keys, key_pixels [N, 3, CAPACITY]: the first `size` of _interval are written.
    Launch    N·⌈P/BLOCK⌉ programs.
    Order     programs take places as they come: the set is the same in every run, its order is not, and ranks ignore it.
    """
    n, pixel, key, inside, histogram, octaves, seen = _block_of_keys(
        plane, scratch, histogram_at, pixels, tiles, KEYED, WIDE, BLOCK
    )
    for window in tl.static_range(WINDOWS):
        _, _, start, stop = rank_window(window, half, pixels, position_0, position_1, position_2)
        low, high, _, size = _interval(octaves, seen, histogram, window, start, stop, PASSES, WINDOWS, ORIGIN, SHIFT, WIDE)
        if size <= CAPACITY:
            chosen = inside & (key >= low) & (key <= high)
            count = tl.sum(chosen.to(tl.int32), 0)
            if count > 0:
                taken = tl.atomic_add(scratch + n * SCRATCH + counter_at + window, count, sem="relaxed")
                at = (n * GATE_WINDOWS + window) * CAPACITY + taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
                tl.store(keys + at, key, mask=chosen)
                tl.store(key_pixels + at, pixel, mask=chosen)


@triton.jit
def rank_kernel(plane, scratch, histogram_at, keys, key_pixels, rank_pixels, levels, pixels, half, length, scale: tl.float64,
                temperature: tl.float64, position_0: tl.float64, position_1: tl.float64, position_2: tl.float64,
                SELECT: tl.constexpr, LEVEL: tl.constexpr, PASSES: tl.constexpr, WINDOWS: tl.constexpr, ORIGIN: tl.constexpr,
                SHIFT: tl.constexpr, KEYED: tl.constexpr, WIDE: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
                BLOCK: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """The pixels of a window's ranks, ties by lower pixel, and the soft quantile that they make.

    Shapes    out rank_pixels int32 [N, 4, L], -1 outside the ranks 0 … P-1 (SELECT; otherwise read); levels [N, 4].
    Launch    one program per image and window. By the last program that collects an image it would spare a launch, and halve
              the programs that collect at once (111 registers for 64).
    Order     a candidate's rank is the number of pairs (key, pixel) below its own: no order of arrival can change it.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = (tl.program_id(0) // WINDOWS).to(tl.int64)
    window = tl.program_id(0) % WINDOWS
    position, first, start, stop = rank_window(window, half, pixels, position_0, position_1, position_2)
    plane += n * pixels
    scratch += n * SCRATCH
    ranks = rank_pixels + (n * 4 + LEVEL + window) * length
    if SELECT:
        for j in range(0, length, BLOCK_L):
            entry = j + tl.arange(0, BLOCK_L)
            outside = (first + entry < 0) | (first + entry >= pixels)
            tl.store(ranks + entry, tl.full([BLOCK_L], -1, tl.int32), mask=(entry < length) & outside)
        keys += (n * GATE_WINDOWS + window) * CAPACITY
        key_pixels += (n * GATE_WINDOWS + window) * CAPACITY
        histogram = scratch + histogram_at
        octaves = tl.load(histogram + tl.arange(0, BINS))
        low, high, base, size = _interval(
            octaves, tl.cumsum(octaves, 0), histogram, window, start, stop, PASSES, WINDOWS, ORIGIN, SHIFT, WIDE
        )
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
    unit = tl.full([1], scale, acc)
    centre = centre.to(acc) * unit if KEYED else tl.abs(centre) + tl.zeros([1], acc)
    total, shift = tl.zeros([BLOCK_L], tl.float64), tl.zeros([BLOCK_L], tl.float64)
    for j in range(0, length, BLOCK_L):
        entry = j + tl.arange(0, BLOCK_L)
        pixel = tl.load(ranks + entry, mask=entry < length, other=-1)
        value = tl.load(plane + pixel, mask=pixel >= 0, other=0)
        # d as the mask's kernel has it, to the bit: where all d are equal, d - t must be 0.
        value = value.to(acc) * unit if KEYED else tl.abs(value)
        weight = rank_weights(pixel, first + entry, nearest, position, temperature)
        total += weight
        # About the value at the nearest rank: exact on ties, where the plain sum leaves rounding that 1/r would blow up.
        shift += tl.where(pixel >= 0, weight * (value.to(tl.float64) - centre.to(tl.float64)), 0.0)
    level = centre.to(tl.float64) + tl.sum(shift, 0) / tl.sum(total, 0)
    if KEYED:  # integers cannot carry a NaN of h
        level = tl.where(tl.load(scratch + NOT_A_NUMBER) != 0, float("nan"), level)
    tl.store(levels + n * 4 + LEVEL + window + tl.arange(0, 1), level.to(acc))
