"""The box mean and both sigmoids, forward and backward (SPEC 3 and 6).

Along one axis: a tile of TILE entries begins REACH + 1 before its first output; with c its inclusive prefix sums, output o
is c[o + window] - c[o]. Of TILE entries, TILE - window are outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sib_fast.ops.foreground_mask.triton.select import BINS, NOT_A_NUMBER, SCRATCH, rank_weights, rank_window, total_weight


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
def _steepness(levels, slope, eps, WIDE: tl.constexpr):
    """gate and slope/r of an image, r = max(hi - lo, 0) + eps."""
    low, high, gate = tl.load(levels), tl.load(levels + 1), tl.load(levels + 2)
    spread = high - low
    spread = tl.where(spread < 0, 0.0, spread) + eps  # not maximum(): a NaN must stay one
    steep = slope / spread.to(tl.float64)
    return gate, steep if WIDE else steep.to(tl.float32)


@triton.jit
def _ordered_sum(partials, count, BLOCK: tl.constexpr):
    """Σ of float64 partials, in an order that `count` alone decides."""
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


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
def _tile_of(line_blocks, chunks, reach, TILE: tl.constexpr, LINES: tl.constexpr):
    """Of a program: image, number of the tile, the lines across, the first output along, and the place of every entry along."""
    tiles = line_blocks * chunks
    tile = tl.program_id(0) % tiles
    first = (tile % chunks) * (TILE - 2 * reach - 1)
    lines = (tile // chunks) * LINES + tl.arange(0, LINES)
    return (tl.program_id(0) // tiles).to(tl.int64), tile, lines, first, first - reach - 1 + tl.arange(0, TILE)


@triton.jit
def _outputs(first, reach, extent, TILE: tl.constexpr):
    """Where a tile's outputs stand along its axis, and which entries are outputs."""
    out = tl.arange(0, TILE)
    return first + out, (out < TILE - 2 * reach - 1) & (first + out < extent)


@triton.jit
def _sign(m, acc: tl.constexpr):
    return tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, 0.0)).to(acc)


@triton.jit
def gate_rows_kernel(mean_map, levels, scratch, sums, height, width, row_blocks, chunks, reach, slope: tl.float64,
                     eps: tl.float64, fixed: tl.float64, WIDE: tl.constexpr, TILE: tl.constexpr,
                     ROWS: tl.constexpr):  # fmt: skip
    """h = sigmoid(slope (g - gate)/r) in fixed point, and its window sums along the rows.

    Shapes    mean_map [N, H, W]; levels [N, 4]; out sums int [N, H, W], all written.
    Launch    N·⌈H/ROWS⌉·⌈W/(TILE - window)⌉ programs.
    Order     integers, modulo 2^32 or 2^64: exact whatever the order, and equal windows tie to the bit.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    key: tl.constexpr = tl.int64 if WIDE else tl.int32
    n, _, y, x_first, x = _tile_of(row_blocks, chunks, reach, TILE, ROWS)
    inside = (y < height)[:, None] & ((x >= 0) & (x < width))[None, :]
    plane = n * height * width + y.to(tl.int64)[:, None] * width
    gate, steep = _steepness(levels + n * 4, slope, eps, WIDE)
    g = tl.abs(tl.load(mean_map + plane + x[None, :], mask=inside, other=0.0))
    h = _sigmoid((g - gate) * steep, WIDE)
    broken = inside & (h != h)
    if tl.max(broken.to(tl.int32)) > 0:
        tl.atomic_max(scratch + n * SCRATCH + NOT_A_NUMBER, 1, sem="relaxed")
    h = tl.where(inside & (h == h), h, 0.0)
    values = (h * tl.full([1, 1], fixed, acc) + 0.5).to(key)
    values = tl.where(inside, values, 0)
    window = _windowed(values, 2 * reach + 1, 1, TILE, ROWS)
    x_out, is_output = _outputs(x_first, reach, width, TILE)
    written = (y < height)[:, None] & is_output[None, :]
    tl.store(sums + plane + x_out[None, :], window.to(key), mask=written)


@triton.jit
def box_columns_kernel(sums, box, scratch, histogram_at, height, width, column_blocks, chunks, reach,
                       HISTOGRAM: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
                       COLUMNS: tl.constexpr):  # fmt: skip
    """d = box(h) as integers, which are their own keys, and their first histogram.

    Shapes    sums, out box int [N, H, W]; scratch [N, SCRATCH], added to.
    Launch    N·⌈W/COLUMNS⌉·⌈H/(TILE - window)⌉ programs.
    """
    key: tl.constexpr = tl.int64 if WIDE else tl.int32
    n, _, x, y_first, y = _tile_of(column_blocks, chunks, reach, TILE, COLUMNS)
    plane = n * height * width
    inside = ((y >= 0) & (y < height))[:, None] & (x < width)[None, :]
    values = tl.load(sums + plane + y.to(tl.int64)[:, None] * width + x[None, :], mask=inside, other=0)
    window = _windowed(values, 2 * reach + 1, 0, TILE, COLUMNS).to(key)
    y_out, is_output = _outputs(y_first, reach, height, TILE)
    written = is_output[:, None] & (x < width)[None, :]
    tl.store(box + plane + y_out.to(tl.int64)[:, None] * width + x[None, :], window, mask=written)
    if HISTOGRAM:
        octave = tl.where(written, (window >> SHIFT).to(tl.int32), 0)
        counts = tl.histogram(tl.reshape(octave, [TILE * COLUMNS]), BINS, mask=tl.reshape(written, [TILE * COLUMNS]))
        bins = tl.arange(0, BINS)
        tl.atomic_add(scratch + n * SCRATCH + histogram_at + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def mask_kernel(box, levels, mask, pixels, tiles, scale: tl.float64, slope: tl.float64, WIDE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """M = sigmoid(slope (d - t)).

    Shapes    box int [N, P] and mask [N, P] are the same memory: a thread overwrites what it read.
    Launch    N·⌈P/BLOCK⌉ programs.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(box + n * pixels + pixel, mask=pixel < pixels, other=0).to(acc) * tl.full([1], scale, acc)
    u = (d - tl.load(levels + n * 4 + 3)) * tl.full([1], slope, acc)
    tl.store(mask + n * pixels + pixel, _sigmoid(u, WIDE), mask=pixel < pixels)


@triton.jit
def area_rows_kernel(mask, grad_mask, sums, partials, tickets, height, width, row_blocks, chunks, reach, slope: tl.float64,
                     WIDE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """z = slope M (1 - M) grad_M, its sum, and its window sums along the rows.

    Shapes    mask, grad_mask, out sums [N, H, W]; partials float64 [N, programs of an image] of Σz; tickets int32 [N], zeroed
              for the next launch.
    Launch    N·⌈H/ROWS⌉·⌈W/(TILE - window)⌉ programs.
    Order     prefix sums in float64, a fixed tree per tile; the result is rounded once. Σz: one partial a program.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n, tile, y, x_first, x = _tile_of(row_blocks, chunks, reach, TILE, ROWS)
    inside = (y < height)[:, None] & ((x >= 0) & (x < width))[None, :]
    plane = n * height * width + y.to(tl.int64)[:, None] * width
    m = tl.load(mask + plane + x[None, :], mask=inside, other=0.0)
    to_m = tl.load(grad_mask + plane + x[None, :], mask=inside, other=0.0)
    z = tl.full([1, 1], slope, acc) * m * (1.0 - m) * to_m
    # A pixel counts where it is an output, not where it is halo.
    own = inside & ((x >= x_first) & (x < x_first + TILE - 2 * reach - 1))[None, :]
    total = tl.sum(tl.sum(tl.where(own, z, 0.0).to(tl.float64), 1), 0)
    tl.store(partials + n * row_blocks * chunks + tile, total)
    if tile == 0:
        tl.store(tickets + n, 0)
    window = _windowed(z.to(tl.float64), 2 * reach + 1, 1, TILE, ROWS)
    x_out, is_output = _outputs(x_first, reach, width, TILE)
    tl.store(sums + plane + x_out[None, :], window.to(acc), mask=(y < height)[:, None] & is_output[None, :])


@triton.jit
def _gate_ranks(grad_plane, mean_map, levels, rank_pixels, sums_of_gate, pixels, half, length, parts, channels, slope,
                temperature, position_0, position_1, position_2, WIDE: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """At the pixels of the ranks: lo -= w_k ρ, hi += w_k ρ, gate -= w_k α; α = Σ grad_g, ρ = -Σ grad_g e, 0 where hi <= lo.

    All arguments are of one image. A pixel may hold a rank of each level, so the levels take turns.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    alpha, rho = tl.zeros([128], tl.float64), tl.zeros([128], tl.float64)
    for i in range(0, parts, 128):
        part = i + tl.arange(0, 128)
        at = sums_of_gate + part * 2
        alpha += tl.load(at, mask=part < parts, other=0.0)
        rho -= tl.load(at + 1, mask=part < parts, other=0.0)
    open_range = tl.load(levels + 1) > tl.load(levels)
    alpha_sum = tl.sum(alpha, 0)
    rho_sum = tl.where(open_range, tl.sum(rho, 0) / slope, 0.0)
    count = tl.zeros([1], acc) + channels
    for level in tl.static_range(3):
        position, first, _, _ = rank_window(level, half, pixels, position_0, position_1, position_2)
        ranks = rank_pixels + level * length
        factor = -rho_sum if level == 0 else (rho_sum if level == 1 else -alpha_sum)
        unit = factor / total_weight(ranks, first, length, position, temperature, BLOCK_L)
        for j in range(0, length, BLOCK_L):
            entry = j + tl.arange(0, BLOCK_L)
            pixel = tl.load(ranks + entry, mask=entry < length, other=-1)
            weight = rank_weights(pixel, first + entry, tl.floor(position + 0.5), position, temperature)
            m = tl.load(mean_map + pixel, mask=pixel >= 0, other=0.0)
            before = tl.load(grad_plane + pixel, mask=pixel >= 0, other=0.0)
            tl.store(grad_plane + pixel, before + _sign(m, acc) * ((weight * unit).to(acc) / count), mask=pixel >= 0)
        tl.debug_barrier()  # the next level may read what another thread has just stored


@triton.jit
def gate_columns_kernel(sums, mean_map, levels, rank_pixels, partials, grad_plane, sums_of_gate, tickets, height, width,
                        column_blocks, chunks, reach, reach_x, half, length, parts, channels, slope: tl.float64, eps: tl.float64,
                        temperature: tl.float64, position_0: tl.float64, position_1: tl.float64, position_2: tl.float64,
                        position_3: tl.float64, scale: tl.float64, WIDE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
                        BLOCK_L: tl.constexpr):  # fmt: skip
    """grad_h = box(grad_d), then grad_g = slope h (1 - h) grad_h / r, and what the ranks of lo, hi and gate add to it.

    Shapes    sums, mean_map, out grad_plane [N, H, W] = sgn grad_g / C; partials float64 [N, parts] of Σz; tickets int32 [N],
              zero on entry; out sums_of_gate float64 [N, programs of an image, 2]: Σ grad_g and Σ grad_g·slope·e.
    Launch    N·⌈W/COLUMNS⌉·⌈H/(TILE - window)⌉ programs; the last of an image to finish, by its ticket, adds the ranks.
    Order     as along the rows. -w_k Σz of t's ranks is added apart: in the running sums it would cost digits. Which program
              comes last changes nothing: α and ρ are added in the order of the programs' numbers.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    n, tile, x, y_first, y = _tile_of(column_blocks, chunks, reach, TILE, COLUMNS)
    plane = n * height * width
    inside = ((y >= 0) & (y < height))[:, None] & (x < width)[None, :]
    values = tl.load(sums + plane + y.to(tl.int64)[:, None] * width + x[None, :], mask=inside, other=0.0)
    grad_h = _windowed(values.to(tl.float64), 2 * reach + 1, 0, TILE, COLUMNS)
    y_out, is_output = _outputs(y_first, reach, height, TILE)
    position = tl.full((), 0, tl.float64) + position_3
    first = tl.floor(position).to(tl.int32) - half
    ranks = rank_pixels + (n * 4 + 3) * length
    unit = _ordered_sum(partials + n * parts, parts, 256) / total_weight(ranks, first, length, position, temperature, BLOCK_L)
    for j in range(length):
        pixel = tl.load(ranks + j)
        near_y = tl.abs(y_out - pixel // width) <= reach
        near_x = (tl.abs(x - pixel % width) <= reach_x) & (pixel >= 0)
        if tl.max(near_x.to(tl.int32), 0) > 0:  # a rank out of reach is no work
            weight = rank_weights(pixel, first + j, tl.floor(position + 0.5), position, temperature)
            grad_h -= tl.where(near_y[:, None] & near_x[None, :], weight * unit, 0.0)
    grad_h = (grad_h * scale).to(acc)
    written = is_output[:, None] & (x < width)[None, :]
    at = plane + y_out.to(tl.int64)[:, None] * width + x[None, :]
    m = tl.load(mean_map + at, mask=written, other=0.0)
    gate, steep = _steepness(levels + n * 4, slope, eps, WIDE)
    u = (tl.abs(m) - gate) * steep
    h = _sigmoid(u, WIDE)
    grad_g = tl.where(written, steep * h * (1.0 - h) * grad_h, 0.0)
    count = tl.zeros([1, 1], acc) + channels
    tl.store(grad_plane + at, _sign(m, acc) * (grad_g / count), mask=written)
    alpha = tl.sum(tl.sum(grad_g.to(tl.float64), 1), 0)
    product = tl.where(written, grad_g.to(tl.float64) * u.to(tl.float64), 0.0)
    tiles = column_blocks * chunks
    sums_of_gate += n * tiles * 2
    tl.store(sums_of_gate + tile * 2, alpha)
    tl.store(sums_of_gate + tile * 2 + 1, tl.sum(tl.sum(product, 1), 0))
    tl.debug_barrier()  # what every thread of this program stored, before the ticket
    if tl.atomic_add(tickets + n, 1, sem="acq_rel") == tiles - 1:
        _gate_ranks(grad_plane + plane, mean_map + plane, levels + n * 4, rank_pixels + n * 4 * length, sums_of_gate,
                    height * width, half, length, tiles, channels, slope, temperature, position_0, position_1, position_2,
                    WIDE, BLOCK_L)  # fmt: skip
