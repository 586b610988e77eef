"""How a program walks a map, and how it multiplies: what the Grams and the gradient have in common."""

from __future__ import annotations

import triton
import triton.language as tl

# How a program walks a map (`unit_of`). Pixels or channels fastest, as they lie in memory; FLAT_*: rows of pixels or
# channels too short for a block run on into the next, at one division an element column.
PLANES, CHANNELS, FLAT_PIXELS, FLAT_CHANNELS = (tl.constexpr(order) for order in range(4))
PARTIAL = tl.constexpr(1024)  # products per float32 partial sum, then float64 (SPEC 7)
CHAIN = tl.constexpr(512)  # products per uninterrupted tensor-core sum: its error grows with its length


@triton.jit
def to_tf32(t):
    """Rounded to tf32, ties away from zero. The tensor cores would truncate, and a truncated square is biased."""
    rounded = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(t == t, rounded, t)  # the addition would turn the GPU's NaN, 0x7fffffff, into a zero


@triton.jit
def operand(t, PRECISION: tl.constexpr):
    """t as it is multiplied: IEEE itself, else its nearest tf32; and what that leaves, which only tf32x3 multiplies."""
    big = t if PRECISION == "ieee" else to_tf32(t)
    return big, t - big


@triton.jit
def product(a_big, a_small, b, acc, PRECISION: tl.constexpr):
    """acc + a b, a as `operand` gives it. tf32x3: both as sums of two tf32, the product of the two small parts left out (2^-22).

    The three products are a chain of their own, added to acc in float32: one dot with "tf32x3" would also replace NaNs,
    at two instructions an element.
    """
    b_big, b_small = operand(b, PRECISION)
    if PRECISION == "tf32x3":
        part = tl.dot(a_small, b_big, input_precision="tf32")
        part = tl.dot(a_big, b_small, part, input_precision="tf32")
        acc += tl.dot(a_big, b_big, part, input_precision="tf32")
    else:
        acc = tl.dot(a_big, b_big, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def square(a, acc, PRECISION: tl.constexpr):
    """acc + U with (U + Uᵀ)/2 = a aᵀ. tf32x3: small·bigᵀ and big·smallᵀ are each other's transposes, so one is enough."""
    big, small = operand(a, PRECISION)
    right = tl.trans(big)
    if PRECISION == "tf32x3":
        part = tl.dot(small + small, right, input_precision="tf32")
        acc += tl.dot(big, right, part, input_precision="tf32")
    else:
        acc = tl.dot(big, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def at_pixel(pixel, width, stride_h, stride_w, LINEAR: tl.constexpr):
    if LINEAR:
        return pixel.to(tl.int64) * stride_w
    return (pixel // width).to(tl.int64) * stride_h + (pixel % width).to(tl.int64) * stride_w


@triton.jit
def unit_of(
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
    at = channel.to(tl.int64) * stride_c + at_pixel(pixel, width, stride_h, stride_w, LINEAR)
    return at, pixel, inside
