"""region_statistics in Triton: Grams and variances of both regions, and their gradient (SPEC 4 and 6).

Launch configurations are fixed: no autotuning, so that the bits do not depend on what else ran on the machine. Whatever
groups a sum (tile, split, chain) follows from the shape and the table below; the order within a sum is the program's.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sib_fast._backends import INTERPRETING_TRITON as INTERPRETING

# How a program walks a map (`_unit`). Pixels or channels fastest, as they lie in memory; FLAT_*: rows of pixels or
# channels too short for a block run on into the next, at one division an element column.
PLANES, CHANNELS, FLAT_PIXELS, FLAT_CHANNELS = (tl.constexpr(order) for order in range(4))
PARTIAL = tl.constexpr(1024)  # products per float32 partial sum, then float64 (SPEC 7)
CHAIN = tl.constexpr(512)  # products per uninterrupted tensor-core sum: its error grows with its length
_PROGRAMS = 264  # programs that share a launch's work: two for each SM of an H200. By constant: the split sets the bits
_MOST_RESIDENT_PAIRS = 64  # images whose S and background S a program holds: with 128 they would take 320 KiB of 227
_LEAST_PRODUCTS = (
    4096 if INTERPRETING else 256
)  # per split: below this the partial Gram costs more bytes than the rows it is made of


# ---- operands ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _tf32(t):
    """Rounded to tf32, ties away from zero. The tensor cores would truncate, and a truncated square is biased."""
    rounded = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(t == t, rounded, t)  # the addition would turn the GPU's NaN, 0x7fffffff, into a zero


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. tf32x3: each factor as a sum of two tf32, the product of the two small parts left out (2^-22).

    The three products are a chain of their own, added to acc in float32: one dot with "tf32x3" would also replace NaNs,
    at two instructions an element.
    """
    if PRECISION == "tf32x3":
        a_big = _tf32(a)
        b_big = _tf32(b)
        part = tl.dot(a - a_big, b_big, input_precision="tf32")
        part = tl.dot(a_big, b - b_big, part, input_precision="tf32")
        acc += tl.dot(a_big, b_big, part, input_precision="tf32")
    elif PRECISION == "tf32":
        acc = tl.dot(_tf32(a), _tf32(b), acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _square(a, acc, PRECISION: tl.constexpr):
    """acc + U with (U + Uᵀ)/2 = a aᵀ. tf32x3: small·bigᵀ and big·smallᵀ are each other's transposes, so one is enough."""
    if PRECISION == "tf32x3":
        big = _tf32(a)
        small = a - big
        right = tl.trans(big)
        part = tl.dot(small + small, right, input_precision="tf32")
        acc += tl.dot(big, right, part, input_precision="tf32")
    elif PRECISION == "tf32":
        big = _tf32(a)
        acc = tl.dot(big, tl.trans(big), acc, input_precision="tf32")
    else:
        acc = tl.dot(a, tl.trans(a), acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _at_pixel(pixel, width, stride_h, stride_w, LINEAR: tl.constexpr):
    if LINEAR:
        return pixel.to(tl.int64) * stride_w
    return (pixel // width).to(tl.int64) * stride_h + (pixel % width).to(tl.int64) * stride_w


@triton.jit
def _unit(
    unit, channels, pixels, width, stride_c, stride_h, stride_w,
    inner, BLOCK_D: tl.constexpr, ORDER: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """The unit-th block of BLOCK_D elements of a row: offsets in the map, pixels, and which of them exist."""
    column = tl.arange(0, BLOCK_D)
    if ORDER == PLANES:  # channels vary fastest from block to block: a block of the mask is read again while it is near
        channel = unit % channels + 0 * column
        pixel = (unit // channels) * BLOCK_D + column
        inside = pixel < pixels
    elif ORDER == CHANNELS:
        chunks = (channels + BLOCK_D - 1) // BLOCK_D
        channel = (unit % chunks) * BLOCK_D + column
        pixel = unit // chunks + 0 * column
        inside = channel < channels
    else:
        element = unit * BLOCK_D + column
        inside = element < channels * pixels
        if ORDER == FLAT_PIXELS:
            channel, pixel = element // inner, element % inner
        else:
            channel, pixel = element % inner, element // inner
    at = channel.to(tl.int64) * stride_c + _at_pixel(pixel, width, stride_h, stride_w, LINEAR)
    return at, pixel, inside


# ---- forward ----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["inner", "units", "units_per_split", "splits"])
def _gram_partials_kernel(
    map_ptr, mask_ptr, partials_ptr, moments_ptr, images, channels, pixels, width,
    stride_n, stride_c, stride_h, stride_w, inner, units, units_per_split, splits,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ORDER: tl.constexpr, LINEAR: tl.constexpr,
    DIAGONAL: tl.constexpr, MOMENTS: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one Gram over one split of D; on the VJP's diagonal tiles also the moments of R and of R(1-M).

        rows = map·M (region 0) or map·(1-M) (region 1)      partial = rows_i rows_jᵀ            (SPEC 4)

    Shapes    map [N, C, H, W] any strides, mask [N, P] -> partials [regions, tiles, splits, BLOCK_N, BLOCK_N] float32, or
              float64 where a split holds more than one partial sum (FOLD); moments [5, N, splits] float64 (count, mean and M2
              of R, mean and M2 of R(1-M)).
    Launch    grid (splits × tiles, regions): the first of a grid's axes alone may be longer than 65,535. Only tiles i <= j;
              a diagonal tile loads its rows once. The other map is another launch: one program with both Grams needs 255
              registers and spills.
    Sums      chains of at most CHAIN products (tf32x3: BLOCK_D), float32 up to PARTIAL, then float64. Moments: float64
              sums of differences from the split's first element, so that neither a large mean nor R² = 1e-42 loses digits.
    Traffic   map and mask once a row tile and column tile; writes BLOCK_N² words a split.
    Twins     csrc/cpu/region_statistics_kernels.cpp; truth: reference.py.
    """
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    region = tl.program_id(1)
    side = (images + BLOCK_N - 1) // BLOCK_N
    if DIAGONAL:
        tile_i = program
        tile_j = program
        tile = program
        tiles = side
    else:
        tile_i = program // side
        tile_j = program % side
        if tile_i >= tile_j:
            return
        tile = tile_j * (tile_j - 1) // 2 + tile_i
        tiles = side * (side - 1) // 2
    acc_type: tl.constexpr = mask_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK_N)
    row_i = (tile_i * BLOCK_N + lane).to(tl.int64)
    row_j = (tile_j * BLOCK_N + lane).to(tl.int64)
    in_i = (row_i < images)[:, None]
    in_j = (row_j < images)[:, None]
    map_i = map_ptr + row_i[:, None] * stride_n
    map_j = map_ptr + row_j[:, None] * stride_n
    mask_i = mask_ptr + row_i[:, None] * pixels
    mask_j = mask_ptr + row_j[:, None] * pixels
    begin = split * units_per_split
    end = tl.minimum(begin + units_per_split, units)
    UNITS: tl.constexpr = PARTIAL // BLOCK_D
    # In tf32x3 every product is a chain of its own already.
    STEP: tl.constexpr = UNITS if PRECISION == "tf32x3" or BLOCK_D > CHAIN else CHAIN // BLOCK_D

    if MOMENTS:
        GROUP: tl.constexpr = 4  # neighbours of a row that one thread holds: their sum needs no exchange
        at, pixel, inside = _unit(
            begin, channels, pixels, width, stride_c, stride_h, stride_w, inner, BLOCK_D, ORDER, LINEAR
        )  # fmt: skip
        first = in_i & (tl.arange(0, BLOCK_D) == 0)[None, :]
        r = tl.load(map_i + at[None, :], mask=first, other=0.0).to(acc_type)
        m = tl.load(mask_i + pixel[None, :], mask=first, other=0.0)
        shift_r = tl.sum(r, axis=1)[:, None]
        shift_v = tl.sum(r * (1 - m), axis=1)[:, None]
        sum_r = tl.zeros([BLOCK_N, BLOCK_D // GROUP], tl.float64)
        sum_v = tl.zeros([BLOCK_N, BLOCK_D // GROUP], tl.float64)
        square_r = tl.zeros([BLOCK_N, BLOCK_D // GROUP], tl.float64)
        square_v = tl.zeros([BLOCK_N, BLOCK_D // GROUP], tl.float64)
        count = tl.zeros([BLOCK_D], tl.int32)

    for chunk in range(begin, end, UNITS):
        total = tl.zeros([BLOCK_N, BLOCK_N], acc_type)
        for chain in range(chunk, tl.minimum(chunk + UNITS, end), STEP):
            part = total if STEP == UNITS else tl.zeros([BLOCK_N, BLOCK_N], acc_type)
            for unit in range(chain, tl.minimum(chain + STEP, end)):
                at, pixel, inside = _unit(
                    unit, channels, pixels, width, stride_c, stride_h, stride_w, inner, BLOCK_D, ORDER, LINEAR
                )  # fmt: skip
                r = tl.load(map_i + at[None, :], mask=in_i & inside[None, :], other=0.0).to(acc_type)
                m = tl.load(mask_i + pixel[None, :], mask=in_i & inside[None, :], other=0.0)
                rows = r * tl.where(region == 0, m, 1 - m)
                if DIAGONAL:
                    part = _square(rows, part, PRECISION)
                else:
                    r_j = tl.load(map_j + at[None, :], mask=in_j & inside[None, :], other=0.0).to(acc_type)
                    m_j = tl.load(mask_j + pixel[None, :], mask=in_j & inside[None, :], other=0.0)
                    part = _product(rows, tl.trans(r_j * tl.where(region == 0, m_j, 1 - m_j)), part, PRECISION)
                if MOMENTS:
                    d = tl.where(inside[None, :], r - shift_r, 0.0).to(tl.float64)
                    e = tl.where(inside[None, :], r * (1 - m) - shift_v, 0.0).to(tl.float64)
                    d = tl.reshape(d, [BLOCK_N, BLOCK_D // GROUP, GROUP])
                    e = tl.reshape(e, [BLOCK_N, BLOCK_D // GROUP, GROUP])
                    sum_r += tl.sum(d, axis=2)
                    sum_v += tl.sum(e, axis=2)
                    square_r += tl.sum(d * d, axis=2)
                    square_v += tl.sum(e * e, axis=2)
                    count += inside.to(tl.int32)
            if STEP == UNITS:
                total = part
            else:
                total += part
        if DIAGONAL:
            total = 0.5 * (total + tl.trans(total))
        slot = ((region * tiles + tile).to(tl.int64) * splits + split) * (BLOCK_N * BLOCK_N)
        to = partials_ptr + slot + lane[:, None] * BLOCK_N + lane[None, :]
        if FOLD:
            if chunk > begin:
                tl.store(to, tl.load(to) + total)
            else:
                tl.store(to, total.to(tl.float64))
        else:
            tl.store(to, total)

    if MOMENTS:  # noqa: SIM102 (known at compile time, the inner one is not)
        if region == 0:
            n = tl.sum(count, axis=0).to(tl.float64)
            to = moments_ptr + row_i * splits + split
            plane = splits.to(tl.int64) * images
            exists = row_i < images
            total_r = tl.sum(sum_r, axis=1)
            total_v = tl.sum(sum_v, axis=1)
            tl.store(to, n + 0 * total_r, mask=exists)
            tl.store(to + plane, tl.sum(shift_r, axis=1).to(tl.float64) + total_r / n, mask=exists)
            tl.store(to + 2 * plane, tl.sum(square_r, axis=1) - total_r * total_r / n, mask=exists)
            tl.store(to + 3 * plane, tl.sum(shift_v, axis=1).to(tl.float64) + total_v / n, mask=exists)
            tl.store(to + 4 * plane, tl.sum(square_v, axis=1) - total_v * total_v / n, mask=exists)


@triton.jit(do_not_specialize=["splits_diagonal", "splits_across"])
def _gram_kernel(
    diagonal_ptr, across_ptr, gram_ptr, background_ptr, images, splits_diagonal, splits_across,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """The Grams of one map from their partial sums: float64, in a fixed order, mirrored, so symmetric to the bit.

    Shapes    diagonal [regions, side, splits, BLOCK_N, BLOCK_N], across [regions, side·(side-1)/2, …] -> Grams [N, N].
    Launch    grid (blocks of ROWS rows, blocks of BLOCK columns, regions); blocks below the diagonal leave at once.
    Traffic   reads the upper half of the partials once.
    """
    first_row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * BLOCK
    region = tl.program_id(2)
    if first + BLOCK <= first_row:
        return
    element = tl.arange(0, ROWS * BLOCK)
    row = first_row + element // BLOCK
    column = first + element % BLOCK
    side = (images + BLOCK_N - 1) // BLOCK_N
    tile_i = first_row // BLOCK_N
    tile_j = first // BLOCK_N
    if tile_i == tile_j:
        splits = splits_diagonal
        base = diagonal_ptr + (region * side + tile_i).to(tl.int64) * splits * (BLOCK_N * BLOCK_N)
    else:
        splits = splits_across
        tile = region * (side * (side - 1) // 2) + tile_j * (tile_j - 1) // 2 + tile_i
        base = across_ptr + tile.to(tl.int64) * splits * (BLOCK_N * BLOCK_N)
    in_slot = (row % BLOCK_N) * BLOCK_N + column % BLOCK_N
    total = tl.zeros([BATCH, ROWS * BLOCK], tl.float64)
    for begin in range(0, splits, BATCH):
        split = begin + tl.arange(0, BATCH)
        at = split.to(tl.int64)[:, None] * (BLOCK_N * BLOCK_N) + in_slot[None, :]
        total += tl.load(base + at, mask=(split < splits)[:, None], other=0.0).to(tl.float64)
    value = tl.sum(total, axis=0)
    out = gram_ptr
    if region == 1:
        out = background_ptr
    exists = (column >= row) & (column < images)
    tl.store(out + row.to(tl.int64) * images + column, value, mask=exists)
    tl.store(out + column.to(tl.int64) * images + row, value, mask=exists)


@triton.jit(do_not_specialize=["splits"])
def _variance_kernel(
    moments_ptr, background_variance_ptr, vjp_variance_ptr, background_mean_ptr, vjp_mean_ptr, images, splits,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Means and unbiased variances of an image from its splits: M2 = Σ M2_s + Σ n_s (mean_s - mean)², all in float64."""
    image = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    exists = split < splits
    at = moments_ptr + image.to(tl.int64) * splits + split
    plane = splits.to(tl.int64) * images
    n = tl.load(at, mask=exists, other=0.0)
    count = tl.sum(n, axis=0)
    for which in tl.static_range(2):
        mean_s = tl.load(at + (1 + 2 * which) * plane, mask=exists, other=0.0)
        m2_s = tl.load(at + (2 + 2 * which) * plane, mask=exists, other=0.0)
        mean = tl.sum(n * mean_s, axis=0) / count
        d = tl.where(exists, mean_s - mean, 0.0)
        variance = tl.sum(m2_s + n * d * d, axis=0) / (count - 1)
        if which == 0:
            tl.store(vjp_mean_ptr + image, mean)
            tl.store(vjp_variance_ptr + image, variance)
        else:
            tl.store(background_mean_ptr + image, mean)
            tl.store(background_variance_ptr + image, variance)


# ---- backward ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _symmetrised_kernel(
    grad_0, grad_1, grad_2, grad_3, out_ptr, images, padded, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """S = Ġ + Ġᵀ of every Gram, zero beyond N, as the gradient kernel multiplies it: [Grams, 2, padded, padded].

    tf32x3: S as a sum of two tf32, once for all programs. Otherwise S alone, the second part unwritten and unread.
    """
    which = tl.program_id(2)
    grad = grad_0
    if which == 1:
        grad = grad_1
    elif which == 2:
        grad = grad_2
    elif which == 3:
        grad = grad_3
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    exists = (i < images) & (j < images)
    own = tl.load(grad + i * images + j, mask=exists, other=0.0)
    mirrored = tl.load(grad + j * images + i, mask=exists, other=0.0)
    value = (own + mirrored).to(out_ptr.dtype.element_ty)
    part = padded.to(tl.int64) * padded
    to = out_ptr + which * 2 * part + i * padded + j
    if PRECISION == "tf32x3":
        big = _tf32(value)
        tl.store(to, big)
        tl.store(to + part, value - big)
    elif PRECISION == "tf32":
        tl.store(to, _tf32(value))
    else:
        tl.store(to, value)


@triton.jit
def _sym_product(big, small, b, acc, PRECISION: tl.constexpr):
    """acc + S b, with S = big + small in tf32x3 and S = big, already rounded, otherwise."""
    if PRECISION == "tf32x3":
        b_big = _tf32(b)
        part = tl.dot(small, b_big, input_precision="tf32")
        part = tl.dot(big, b - b_big, part, input_precision="tf32")
        acc += tl.dot(big, b_big, part, input_precision="tf32")
    elif PRECISION == "tf32":
        acc = tl.dot(big, _tf32(b), acc, input_precision="tf32")
    else:
        acc = tl.dot(big, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit(do_not_specialize=["steps", "steps_per_split", "splits", "items", "items_per_program"])
def _gradient_kernel(
    map_ptr, mask_ptr, sym_ptr, sym_low_ptr, sym_background_ptr, sym_background_low_ptr, grad_map_ptr, grad_mask_ptr,
    grad_background_variance_ptr, background_mean_ptr, grad_map_variance_ptr, map_mean_ptr,
    images, channels, pixels, width, elements, padded,
    stride_n, stride_c, stride_h, stride_w, grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    steps, steps_per_split, splits, items, items_per_program,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ORDER: tl.constexpr, LINEAR: tl.constexpr,
    RESIDENT: tl.constexpr, BACKGROUND: tl.constexpr, VARIANCE: tl.constexpr, NEED_MAP: tl.constexpr,
    NEED_MASK: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one map, and its share of the mask's, for some images × some columns of every channel.

        p = S (map·M)      q = [S_v (map·(1-M))] + v̇·2/(D-1)·(map·(1-M) - mean)                   (SPEC 6)
        grad_map = M·p + (1-M)·q + ṙ·2/(D-1)·(map - mean)      grad_mask (+)= Σ_c map·(p - q)

    Shapes    map, grad_map [N, C, H, W] any strides, mask [N, P], S [padded, padded]; grad_mask [splits, N, P], all written.
    Launch    grid row tiles × programs. A program takes `items_per_program` items in turn; an item is a block of pixels
              (PLANES) or one pixel (CHANNELS) with one split of the channels, one step a channel or block of channels.
              RESIDENT: one row tile holds all images and S stays in shared memory; otherwise S streams past in BLOCK_K.
    Traffic   reads map and mask once (a row tile each, from L2 but the first time), writes grad_map and grad_mask once. The
              products S (map·M) exist in registers only.
    Sums      over images: chains of at most CHAIN products, then float32.
    Twins     csrc/cpu/region_statistics_kernels.cpp; truth: reference.py under autograd.
    """
    row_tiles = 1 if RESIDENT else (images + BLOCK_N - 1) // BLOCK_N
    tile_n = tl.program_id(0) % row_tiles
    first_item = tl.program_id(0) // row_tiles * items_per_program
    last_item = tl.minimum(first_item + items_per_program, items)
    acc_type: tl.constexpr = mask_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_D)
    lane_k = tl.arange(0, BLOCK_K)
    row = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    exists = row < images
    rows = row[:, None]
    in_row = exists[:, None]
    # In tf32x3 every product is a chain of its own already.
    STEP: tl.constexpr = 0 if PRECISION == "tf32x3" else CHAIN
    if RESIDENT:
        at_sym = rows * padded + lane_k[None, :]
        big = tl.load(sym_ptr + at_sym)
        small = tl.load(sym_low_ptr + at_sym) if PRECISION == "tf32x3" else big
        if BACKGROUND:
            big_v = tl.load(sym_background_ptr + at_sym)
            small_v = tl.load(sym_background_low_ptr + at_sym) if PRECISION == "tf32x3" else big_v
    if VARIANCE:
        scale = 2.0 / (elements - 1).to(tl.float64)
        slope_v = (tl.load(grad_background_variance_ptr + row, mask=exists, other=0.0) * scale).to(acc_type)[:, None]
        slope_r = (tl.load(grad_map_variance_ptr + row, mask=exists, other=0.0) * scale).to(acc_type)[:, None]
        mean_v = tl.load(background_mean_ptr + row, mask=exists, other=0.0).to(acc_type)[:, None]
        mean_r = tl.load(map_mean_ptr + row, mask=exists, other=0.0).to(acc_type)[:, None]

    grad_m = tl.zeros([BLOCK_N, BLOCK_D], acc_type)
    for index in range(first_item * steps_per_split, last_item * steps_per_split):
        item = index // steps_per_split
        split = item % splits
        step = split * steps_per_split + index % steps_per_split
        if ORDER == PLANES:
            pixel = (item // splits) * BLOCK_D + column
            channel = step + 0 * column
        else:
            pixel = item // splits + 0 * column
            channel = step * BLOCK_D + column
        inside = (pixel < pixels) & (channel < channels)
        at = channel.to(tl.int64) * stride_c + _at_pixel(pixel, width, stride_h, stride_w, LINEAR)
        product = tl.zeros([BLOCK_N, BLOCK_D], acc_type)
        product_v = tl.zeros([BLOCK_N, BLOCK_D], acc_type)
        if not RESIDENT:
            for chain in range(0, images, CHAIN):
                part = product if STEP == 0 else tl.zeros([BLOCK_N, BLOCK_D], acc_type)
                part_v = product_v if STEP == 0 else tl.zeros([BLOCK_N, BLOCK_D], acc_type)
                for begin in range(chain, tl.minimum(chain + CHAIN, images), BLOCK_K):
                    k = (begin + lane_k).to(tl.int64)
                    in_k = (k < images)[:, None] & inside[None, :]
                    at_sym = rows * padded + k[None, :]
                    value = tl.load(map_ptr + k[:, None] * stride_n + at[None, :], mask=in_k, other=0.0).to(acc_type)
                    m = tl.load(mask_ptr + k[:, None] * pixels + pixel[None, :], mask=in_k, other=0.0)
                    big = tl.load(sym_ptr + at_sym)
                    small = tl.load(sym_low_ptr + at_sym) if PRECISION == "tf32x3" else big
                    part = _sym_product(big, small, value * m, part, PRECISION)
                    if BACKGROUND:
                        big_v = tl.load(sym_background_ptr + at_sym)
                        small_v = tl.load(sym_background_low_ptr + at_sym) if PRECISION == "tf32x3" else big_v
                        part_v = _sym_product(big_v, small_v, value * (1 - m), part_v, PRECISION)
                if STEP == 0:
                    product = part
                    product_v = part_v
                else:
                    product += part
                    product_v += part_v
        in_tile = in_row & inside[None, :]
        value = tl.load(map_ptr + rows * stride_n + at[None, :], mask=in_tile, other=0.0).to(acc_type)
        m = tl.load(mask_ptr + rows * pixels + pixel[None, :], mask=in_tile, other=0.0)
        if RESIDENT:
            product = _sym_product(big, small, value * m, product, PRECISION)
            if BACKGROUND:
                product_v = _sym_product(big_v, small_v, value * (1 - m), product_v, PRECISION)

        difference = product
        from_v = product_v + slope_v * (value * (1 - m) - mean_v) if VARIANCE else product_v
        if VARIANCE or BACKGROUND:
            difference = product - from_v
        if NEED_MAP:
            grad = m * product
            if VARIANCE or BACKGROUND:
                grad += (1 - m) * from_v
            if VARIANCE:
                grad += slope_r * (value - mean_r)
            to = channel.to(tl.int64) * grad_stride_c + _at_pixel(pixel, width, grad_stride_h, grad_stride_w, LINEAR)
            tl.store(grad_map_ptr + rows * grad_stride_n + to[None, :], grad, mask=in_tile)
        if NEED_MASK:
            grad_m += value * difference
            if (index + 1) % steps_per_split == 0:
                plane = grad_mask_ptr + (split.to(tl.int64) * images + rows) * pixels
                if ORDER == PLANES:
                    to_mask = plane + pixel[None, :]
                    if ADD:
                        grad_m += tl.load(to_mask, mask=in_row & (pixel < pixels)[None, :], other=0.0)
                    tl.store(to_mask, grad_m, mask=in_row & (pixel < pixels)[None, :])
                else:
                    to_mask = plane + item // splits
                    total = tl.sum(grad_m, axis=1)[:, None]
                    if ADD:
                        total += tl.load(to_mask, mask=in_row, other=0.0)
                    tl.store(to_mask, total, mask=in_row)
                grad_m = tl.zeros([BLOCK_N, BLOCK_D], acc_type)


@triton.jit(do_not_specialize=["slots"])
def _mask_gradient_kernel(partials_ptr, grad_mask_ptr, size, slots, BLOCK: tl.constexpr):
    """grad_mask [N, P] from its shares [slots, N, P], added in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], grad_mask_ptr.dtype.element_ty)
    for _ in range(slots):
        total += tl.load(partials_ptr + at, mask=at < size, other=0.0)
        partials_ptr += size
    tl.store(grad_mask_ptr + at, total, mask=at < size)


# ---- launch configurations --------------------------------------------------------------------------------------------------


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
# 32/4488 on sm_80; S 64×64 32/5424 on sm_80. Triton 3.6: streamed 128×64 255/368 on sm_90, with the variances (64×64: 236/0).
SMALLEST = "86"
SHARED_MEMORY = {"80": 163 * 1024, "86": 99 * 1024, "120": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024}
# The interpreter has no registers, and takes as long for an operation on a large block as on a small one.
_LARGE = tuple(Tile(n, 1024, 4, 1, n) for n in (16, 32, 64, 128))
_INTERPRETER = dict.fromkeys(("tensor", "ieee", "float64"), _LARGE)
_GRAM_IEEE = (Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(64, 16, 8, 2))
_GRAM_FLOAT64 = (Tile(16, 16, 4, 2), Tile(32, 16, 4, 2))
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
_GRAM_120 = _with_fallbacks((Tile(16, 16, 4, 3), Tile(32, 32, 8, 3), Tile(64, 32, 8, 3)), _GRAM_IEEE, _GRAM_FLOAT64[:1])
_RESIDENT_80 = _with_fallbacks((Tile(16, 64, 4, 3, 16), Tile(32, 32, 4, 3, 32)), (), ())
_RESIDENT_120 = _with_fallbacks((Tile(16, 32, 4, 3, 16), Tile(32, 32, 4, 3, 32)), (), ())
_RESIDENT_90 = _with_fallbacks(
    (Tile(16, 64, 4, 3, 16), Tile(32, 64, 4, 3, 32), Tile(64, 64, 8, 2, 64), Tile(128, 32, 8, 2, 128)), (), ()
)
# float64 with 32 images: 254/160 on sm_120, 255/32 on sm_86
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


def _kind(dtype: torch.dtype, precision: str) -> str:
    return "float64" if dtype == torch.float64 else "ieee" if precision == "ieee" else "tensor"


@functools.cache
def _architecture_of(capability: tuple[int, int], shared_memory: int) -> str:
    """The table for a device: its own where there is one, otherwise the one that needs the least shared memory."""
    name = {(8, 0): "80", (9, 0): "90", (10, 0): "100", (10, 3): "100", (12, 0): "120", (12, 1): "120"}.get(capability, SMALLEST)
    return name if shared_memory >= SHARED_MEMORY[name] else SMALLEST


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return _architecture_of((properties.major, properties.minor), properties.shared_memory_per_block_optin)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _gram_tile(images: int, tiles: tuple[Tile, ...]) -> Tile:
    """The smallest tile that holds all images; otherwise the one with the fewest products, half as many paying for the
    smaller tile's second reading of its rows."""
    for tile in tiles:
        if images <= tile.block_n:
            return tile

    def cost(tile: Tile) -> float:
        side = _ceil(images, tile.block_n)
        return side * (side + 1) // 2 * tile.block_n**2 * (1.0 if tile is tiles[-1] else 1.5)

    return min(tiles[-2:], key=cost)


def _gradient_tile(images: int, background: bool, resident: tuple[Tile, ...], streamed: tuple[Tile, ...]) -> Tile:
    """The smallest tile that holds all images beside S; otherwise the one that wastes fewer rows, by a quarter at least."""
    for tile in resident:
        if images <= tile.block_n and not (background and tile.block_n > _MOST_RESIDENT_PAIRS):
            return tile
    return min(streamed, key=lambda t: _ceil(images, t.block_n) * t.block_n * (1.0 if t is streamed[-1] else 1.25))


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
            return CHANNELS.value, 1, pixels * _ceil(channels, block_d)
        return FLAT_CHANNELS.value, channels, _ceil(channels * pixels, block_d)
    if pixels < 256 and pixels % block_d and flat:
        return FLAT_PIXELS.value, pixels, _ceil(channels * pixels, block_d)
    return PLANES.value, 1, channels * _ceil(pixels, block_d)


def _guard(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# ---- the ops ----------------------------------------------------------------------------------------------------------------


def _partials(map_: Tensor, mask: Tensor, tile: Tile, regions: int, moments: bool, precision: str):
    """Launches the partial sums of one map: diagonal and across partials, their splits, and the moments."""
    images, channels, height, width = map_.shape
    pixels = height * width
    walk = _walk(map_)
    order, inner, units = _order(map_, walk, tile.block_d)
    side = _ceil(images, tile.block_n)

    def splits_of(tiles: int) -> tuple[int, int]:
        per = max(_ceil(units, max(1, _PROGRAMS // (tiles * regions))), _LEAST_PRODUCTS // tile.block_d)
        return per, _ceil(units, per)

    launches = [(True, side, side, *splits_of(side))]
    if side > 1:
        across = side * (side - 1) // 2
        launches.append((False, side * side, across, *splits_of(across)))
    fold = any(per * tile.block_d > PARTIAL.value for *_, per, _ in launches)
    dtype = torch.float64 if fold else mask.dtype
    partials, counts = [], []
    moment_slots = mask.new_empty((5, images, launches[0][4]), dtype=torch.float64) if moments else None
    for diagonal, programs, tiles, per, splits in launches:
        out = mask.new_empty((regions, tiles, splits, tile.block_n, tile.block_n), dtype=dtype)
        _gram_partials_kernel[(splits * programs, regions)](
            map_, mask, out, moment_slots if diagonal else None, images, channels, pixels, walk.width,
            walk.stride_n, walk.stride_c, walk.stride_h, walk.stride_w, inner, units, per, splits,
            BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, ORDER=order, LINEAR=walk.linear,
            DIAGONAL=diagonal, MOMENTS=moments and diagonal, FOLD=fold, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        partials.append(out)
        counts.append(splits)
    return partials, counts, moment_slots


def forward(vjp: Tensor, x: Tensor, mask: Tensor, background_grams: bool, precision: str = "tf32x3") -> tuple[Tensor, ...]:
    """The registered op `_region_statistics`: Grams, variances, means, background Grams, all float64."""
    images = vjp.shape[0]
    regions = 2 if background_grams else 1
    tile = _gram_tile(images, GRAM[_architecture(vjp.device)][_kind(mask.dtype, precision)])
    block, rows = min(64, tile.block_n), 16 if INTERPRETING else 1

    def new(*shape: int) -> Tensor:
        return vjp.new_empty(shape, dtype=torch.float64)

    grams = [new(images, images) for _ in range(2)]
    background = [new(images, images) if background_grams else new(0) for _ in range(2)]
    vectors = [new(images) for _ in range(4)]
    with _guard(vjp):
        for index, map_ in enumerate((vjp, x)):
            partials, splits, moments = _partials(map_, mask, tile, regions, index == 0, precision)
            _gram_kernel[(_ceil(images, rows), _ceil(images, block), regions)](
                partials[0], partials[-1], grams[index], background[index] if background_grams else grams[index],
                images, splits[0], splits[-1], BLOCK_N=tile.block_n, ROWS=rows, BLOCK=block, BATCH=16, num_warps=4,
            )  # fmt: skip
            if moments is not None:
                _variance_kernel[(images,)](
                    moments, *vectors, images, splits[0], SPLITS=triton.next_power_of_2(splits[0]), num_warps=4
                )  # fmt: skip
    return (*grams, *vectors, *background)


def backward(
    grad_gram_vjp: Tensor, grad_gram_x: Tensor, grad_background_variance: Tensor, grad_vjp_variance: Tensor,
    grad_background_gram_vjp: Tensor | None, grad_background_gram_x: Tensor | None, vjp: Tensor, x: Tensor, mask: Tensor,
    background_mean: Tensor, vjp_mean: Tensor, need_vjp: bool, need_x: bool, need_mask: bool, precision: str = "tf32x3",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The registered op `_region_statistics_backward`: gradients in the layouts of vjp and x, and of the mask."""
    images, channels, height, width = vjp.shape
    pixels = height * width
    kind = _kind(mask.dtype, precision)
    tables = _architecture(vjp.device)
    background = grad_background_gram_vjp is not None
    tile = _gradient_tile(images, background, RESIDENT_GRADIENT[tables][kind], STREAMED_GRADIENT[tables][kind])
    resident = tile.block_k == tile.block_n >= images
    row_tiles = _ceil(images, tile.block_n)
    unit = max(tile.block_n, tile.block_k)
    padded = _ceil(images, unit) * unit
    block = min(32, unit)

    def grad_like(map_: Tensor, need: bool) -> Tensor:
        return torch.empty_like(map_, dtype=mask.dtype) if need else map_.new_empty((0,), dtype=mask.dtype)

    grad_vjp, grad_x = grad_like(vjp, need_vjp), grad_like(x, need_x)
    grad_mask = mask.new_empty(mask.shape if need_mask else (0,))
    # x first: where both maps' shares are one plane each, the VJP's part adds to what x's wrote.
    parts = []
    for map_, grad, need, which in ((x, grad_x, need_x, 1), (vjp, grad_vjp, need_vjp, 0)):
        if not (need or need_mask):
            continue
        walk = _walk(map_)
        by_channel = (walk.channels_fastest and channels >= tile.block_d) or (pixels < 16 and channels > pixels)
        blocks = pixels if by_channel else _ceil(pixels, tile.block_d)
        steps = _ceil(channels, tile.block_d) if by_channel else channels
        per = _ceil(steps, max(1, min(steps, _PROGRAMS // (blocks * row_tiles))))
        parts.append((map_, grad, need, which, walk, by_channel, blocks, steps, per, _ceil(steps, per)))
    slots = sum(part[-1] for part in parts)
    shared = slots > len(parts)  # some map's channels are split, so the shares of a pixel meet in a launch of their own
    shares = mask.new_empty((slots, images, pixels)) if shared and need_mask else grad_mask
    grams = [grad_gram_vjp, grad_gram_x, grad_background_gram_vjp, grad_background_gram_x]
    grams = grams if background else grams[:2]
    with _guard(vjp):
        sym = mask.new_empty((len(grams), 2, padded, padded))
        _symmetrised_kernel[(padded // block, padded // block, len(grams))](
            *grams, *grams[: 4 - len(grams)], sym, images, padded, BLOCK=block, PRECISION=precision, num_warps=4
        )
        first = 0
        for map_, grad, need, which, walk, by_channel, blocks, steps, per, splits in parts:
            out = _walk(grad) if need else walk
            items = blocks * splits
            in_turn = _ceil(items, max(1, _PROGRAMS // row_tiles)) if resident else 1
            variance = which == 0
            _gradient_kernel[(row_tiles * _ceil(items, in_turn),)](
                map_, mask, sym[which, 0], sym[which, 1], *(sym[2 + which] if background else (None, None)),
                grad if need else None, shares[first:] if need_mask and shared else grad_mask if need_mask else None,
                *((grad_background_variance, background_mean, grad_vjp_variance, vjp_mean) if variance else (None,) * 4),
                images, channels, pixels, width, channels * pixels, padded,
                walk.stride_n, walk.stride_c, walk.stride_h, walk.stride_w,
                out.stride_n, out.stride_c, out.stride_h, out.stride_w,
                steps, per, splits, items, in_turn,
                BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, BLOCK_K=tile.block_k,
                ORDER=(CHANNELS if by_channel else PLANES).value, LINEAR=walk.linear and out.linear,
                RESIDENT=resident, BACKGROUND=background, VARIANCE=variance, NEED_MAP=need, NEED_MASK=need_mask,
                ADD=not shared and first > 0, PRECISION=precision,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            first += splits
        if shared and need_mask:
            size = images * pixels
            _mask_gradient_kernel[(_ceil(size, 1024),)](shares, grad_mask, size, slots, BLOCK=1024, num_warps=4)
    return grad_vjp, grad_x, grad_mask
