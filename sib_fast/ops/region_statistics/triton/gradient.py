"""The backward: the gradients of both maps and of the mask (SPEC 6)."""

from __future__ import annotations

import triton
import triton.language as tl

from sib_fast.ops.region_statistics.triton.operands import CHAIN, PLANES, at_pixel, operand, product


@triton.jit
def symmetrised_kernel(
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
    big, small = operand(value, PRECISION)
    tl.store(to, big)
    if PRECISION == "tf32x3":
        tl.store(to + part, small)


@triton.jit(do_not_specialize=["steps_per_split", "splits", "items", "items_per_program"])
def gradient_kernel(
    map_ptr, mask_ptr, sym_ptr, sym_low_ptr, sym_background_ptr, sym_background_low_ptr, grad_map_ptr, grad_mask_ptr,
    grad_background_variance_ptr, background_mean_ptr, grad_map_variance_ptr, map_mean_ptr,
    images, channels, pixels, width, elements, padded,
    stride_n, stride_c, stride_h, stride_w, grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    steps_per_split, splits, items, items_per_program,
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
        at = channel.to(tl.int64) * stride_c + at_pixel(pixel, width, stride_h, stride_w, LINEAR)
        of_a = tl.zeros([BLOCK_N, BLOCK_D], acc_type)
        of_v = tl.zeros([BLOCK_N, BLOCK_D], acc_type)
        if not RESIDENT:
            for chain in range(0, images, CHAIN):
                part = of_a if STEP == 0 else tl.zeros([BLOCK_N, BLOCK_D], acc_type)
                part_v = of_v if STEP == 0 else tl.zeros([BLOCK_N, BLOCK_D], acc_type)
                for begin in range(chain, tl.minimum(chain + CHAIN, images), BLOCK_K):
                    k = (begin + lane_k).to(tl.int64)
                    in_k = (k < images)[:, None] & inside[None, :]
                    at_sym = rows * padded + k[None, :]
                    value = tl.load(map_ptr + k[:, None] * stride_n + at[None, :], mask=in_k, other=0.0).to(acc_type)
                    m = tl.load(mask_ptr + k[:, None] * pixels + pixel[None, :], mask=in_k, other=0.0)
                    big = tl.load(sym_ptr + at_sym)
                    small = tl.load(sym_low_ptr + at_sym) if PRECISION == "tf32x3" else big
                    part = product(big, small, value * m, part, PRECISION)
                    if BACKGROUND:
                        big_v = tl.load(sym_background_ptr + at_sym)
                        small_v = tl.load(sym_background_low_ptr + at_sym) if PRECISION == "tf32x3" else big_v
                        part_v = product(big_v, small_v, value * (1 - m), part_v, PRECISION)
                if STEP == 0:
                    of_a = part
                    of_v = part_v
                else:
                    of_a += part
                    of_v += part_v
        in_tile = in_row & inside[None, :]
        value = tl.load(map_ptr + rows * stride_n + at[None, :], mask=in_tile, other=0.0).to(acc_type)
        m = tl.load(mask_ptr + rows * pixels + pixel[None, :], mask=in_tile, other=0.0)
        if RESIDENT:
            of_a = product(big, small, value * m, of_a, PRECISION)
            if BACKGROUND:
                of_v = product(big_v, small_v, value * (1 - m), of_v, PRECISION)

        difference = of_a
        from_v = of_v + slope_v * (value * (1 - m) - mean_v) if VARIANCE else of_v
        if VARIANCE or BACKGROUND:
            difference = of_a - from_v
        if NEED_MAP:
            grad = m * of_a
            if VARIANCE or BACKGROUND:
                grad += (1 - m) * from_v
            if VARIANCE:
                grad += slope_r * (value - mean_r)
            to = channel.to(tl.int64) * grad_stride_c + at_pixel(pixel, width, grad_stride_h, grad_stride_w, LINEAR)
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
def mask_gradient_kernel(partials_ptr, grad_mask_ptr, size, slots, BLOCK: tl.constexpr):
    """grad_mask [N, P] from its shares [slots, N, P], added in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], grad_mask_ptr.dtype.element_ty)
    for first in range(0, slots, 8):
        for i in tl.static_range(8):  # eight loads on their way, added in turn
            slot = tl.full((), first + i, tl.int64)
            total += tl.load(partials_ptr + slot * size + at, mask=(at < size) & (first + i < slots), other=0.0)
    tl.store(grad_mask_ptr + at, total, mask=at < size)
