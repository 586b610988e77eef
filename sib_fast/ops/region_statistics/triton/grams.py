"""The forward: Grams and variances of both regions (SPEC 4)."""

from __future__ import annotations

import triton
import triton.language as tl

from sib_fast.ops.region_statistics.triton.operands import CHAIN, PARTIAL, operand, product, square, unit_of


@triton.jit(do_not_specialize=["inner", "units", "units_per_split", "splits"])
def gram_partials_kernel(
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
        at, pixel, inside = unit_of(
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
                at, pixel, inside = unit_of(
                    unit, channels, pixels, width, stride_c, stride_h, stride_w, inner, BLOCK_D, ORDER, LINEAR
                )  # fmt: skip
                r = tl.load(map_i + at[None, :], mask=in_i & inside[None, :], other=0.0).to(acc_type)
                m = tl.load(mask_i + pixel[None, :], mask=in_i & inside[None, :], other=0.0)
                rows = r * tl.where(region == 0, m, 1 - m)
                if DIAGONAL:
                    part = square(rows, part, PRECISION)
                else:
                    r_j = tl.load(map_j + at[None, :], mask=in_j & inside[None, :], other=0.0).to(acc_type)
                    m_j = tl.load(mask_j + pixel[None, :], mask=in_j & inside[None, :], other=0.0)
                    big, small = operand(rows, PRECISION)
                    part = product(big, small, tl.trans(r_j * tl.where(region == 0, m_j, 1 - m_j)), part, PRECISION)
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


@triton.jit
def _gram(
    diagonal_ptr, across_ptr, gram_ptr, region, first_row, first, images, splits_diagonal, splits_across,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Some rows × columns of one Gram from its partial sums: float64, in a fixed order, mirrored, so symmetric to the bit."""
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
        part = begin + tl.arange(0, BATCH)
        at = part.to(tl.int64)[:, None] * (BLOCK_N * BLOCK_N) + in_slot[None, :]
        total += tl.load(base + at, mask=(part < splits)[:, None], other=0.0).to(tl.float64)
    value = tl.sum(total, axis=0)
    exists = (column >= row) & (column < images)
    tl.store(gram_ptr + row.to(tl.int64) * images + column, value, mask=exists)
    tl.store(gram_ptr + column.to(tl.int64) * images + row, value, mask=exists)


@triton.jit
def _variances(
    moments_ptr, background_variance_ptr, vjp_variance_ptr, background_mean_ptr, vjp_mean_ptr, image, images, splits,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Means and unbiased variances of an image from its splits: M2 = Σ M2_s + Σ n_s (mean_s - mean)², all in float64."""
    part = tl.arange(0, SPLITS)
    exists = part < splits
    at = moments_ptr + image.to(tl.int64) * splits + part
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


@triton.jit(do_not_specialize=["diagonal_splits", "across_splits", "x_diagonal_splits", "x_across_splits"])
def merge_kernel(
    diagonal_ptr, across_ptr, x_diagonal_ptr, x_across_ptr, moments_ptr, gram_vjp_ptr, gram_x_ptr, background_gram_vjp_ptr,
    background_gram_x_ptr, background_variance_ptr, vjp_variance_ptr, background_mean_ptr, vjp_mean_ptr,
    images, diagonal_splits, across_splits, x_diagonal_splits, x_across_splits,
    REGIONS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """All that follows from the partial sums of both maps: every Gram, and the VJP's variances and means.

    Shapes    diagonal [regions, side, splits, BLOCK_N, BLOCK_N], across [regions, side·(side-1)/2, …], moments [5, N, splits]
              -> Grams [N, N]; variances, means [N].
    Launch    grid (blocks of ROWS rows, blocks of BLOCK columns, 2·regions Grams and one layer for the variances); blocks
              below the diagonal leave at once.
    Traffic   reads the upper half of the partials once.
    """
    first_row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * BLOCK
    layer = tl.program_id(2)
    if layer == 2 * REGIONS:
        if first == 0:
            for i in tl.static_range(ROWS):
                if first_row + i < images:
                    _variances(
                        moments_ptr, background_variance_ptr, vjp_variance_ptr, background_mean_ptr, vjp_mean_ptr,
                        first_row + i, images, diagonal_splits, SPLITS,
                    )  # fmt: skip
    elif first + BLOCK > first_row:
        region = layer // 2
        gram = gram_vjp_ptr
        if REGIONS == 2:  # noqa: SIM102 (known at compile time, the inner one is not)
            if region == 1:
                gram = background_gram_vjp_ptr
        if layer % 2 == 1:
            diagonal_ptr, diagonal_splits = x_diagonal_ptr, x_diagonal_splits
            across_ptr, across_splits = x_across_ptr, x_across_splits
            gram = gram_x_ptr
            if REGIONS == 2:  # noqa: SIM102
                if region == 1:
                    gram = background_gram_x_ptr
        _gram(diagonal_ptr, across_ptr, gram, region, first_row, first, images, diagonal_splits, across_splits,
              BLOCK_N, ROWS, BLOCK, BATCH)  # fmt: skip
