"""hsic_objective in Triton: two launches forward, one backward; the twins of csrc/cuda/hsic_objective_cuda.cu.

    K_ij = G_ij/(n_i n_j)     (ZKZ)_ij = K_ij − mean_i − mean_j + grand mean     (symmetric: row = column means)
    fg·(N−1)² = Σ K_R·K_x − 2N Σ_i mean_i^R mean_i^x + N² · grand means          (Z and ZKZ exist nowhere)

Everything is float64. Scalars that carry a fraction are declared float64: Triton would pass a Python float as float32.
What depends on N alone is divided out on the host: a float64 division is a call, and its saved registers spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile of rows × columns held by one program: 4×128 doubles over 8 warps are 2 a thread and operand. N = 128 makes 32
# programs of one step each. Left to itself ptxas (CUDA 13) spills two words on sm_90 or sm_100 for one more block of
# occupancy, at 4 warps and at 8 (tests/triton/test_hsic_objective_aot.py): hence the limit, above the 54 to 80 in use.
TILE = {"ROWS": 4, "COLUMNS": 128, "num_warps": 8, "maxnreg": 96}
COMBINE, COMBINE_WARPS = 256, 4
EXP, LINEAR, EXPM1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _inverse_norm(diagonal):
    """1/max(norm, 1e-12). A NaN counts as a row at the floor; it shows in the Gram's elements."""
    floor = tl.full((), 1e-12, tl.float64)
    alive = diagonal > floor * floor
    return 1.0 / tl.where(alive, tl.sqrt(tl.where(alive, diagonal, 1.0)), floor)


@triton.jit
def _expm1(x):
    """exp(x) − 1 without its cancellation, from exp and log (Kahan): (e − 1)·x/log(e), e the rounded exp(x)."""
    e = tl.exp(x)
    corrected = (e - 1.0) * x / tl.log(tl.where((e > 0.0) & (e < float("inf")) & (e != 1.0), e, 2.0))
    return tl.where(e == 1.0, x, tl.where((e > 0.0) & (e < float("inf")), corrected, e - 1.0))


@triton.jit
def hsic_rows_kernel(gram_vjp, gram_x, rows, products, images, mean_scale: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1/norms and row means of both normalised Grams, and products_i = Σ_j K_R,ij·K_x,ij.

    Shapes:  Grams [N, N] -> rows [4, N] (1/norm of R and x, row means of K_R and K_x), products [N]; all float64.
    Launch:  one program per ROWS rows, COLUMNS columns a step.
    Order:   a tile's element (i, j mod COLUMNS) accumulates over the steps, then one sum along the row.
    """
    count = images.to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = i < count
    product = tl.zeros((ROWS, COLUMNS), tl.float64)
    sum_vjp = tl.zeros((ROWS, COLUMNS), tl.float64)
    sum_x = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, images, COLUMNS):
        j = first + tl.arange(0, COLUMNS).to(tl.int64)
        column = j < count
        at = i[:, None] * count + j[None, :]
        inside = row[:, None] & column[None, :]
        inverse_vjp = _inverse_norm(tl.load(gram_vjp + j * (count + 1), mask=column, other=1.0))[None, :]
        inverse_x = _inverse_norm(tl.load(gram_x + j * (count + 1), mask=column, other=1.0))[None, :]
        k = tl.load(gram_vjp + at, mask=inside, other=0.0) * inverse_vjp  # the row's own norm at the end
        el = tl.load(gram_x + at, mask=inside, other=0.0) * inverse_x
        product += k * el
        sum_vjp += k
        sum_x += el
    own_vjp = _inverse_norm(tl.load(gram_vjp + i * (count + 1), mask=row, other=1.0))
    own_x = _inverse_norm(tl.load(gram_x + i * (count + 1), mask=row, other=1.0))
    tl.store(rows + i, own_vjp, mask=row)
    tl.store(rows + count + i, own_x, mask=row)
    tl.store(rows + 2 * count + i, tl.sum(sum_vjp, axis=1) * own_vjp * mean_scale, mask=row)
    tl.store(rows + 3 * count + i, tl.sum(sum_x, axis=1) * own_x * mean_scale, mask=row)
    tl.store(products + i, tl.sum(product, axis=1) * own_vjp * own_x, mask=row)


@triton.jit
def hsic_combine_kernel(
    base, rows, products, variance, images, mean_scale: tl.float64, hsic_scale: tl.float64, lambda_fg: tl.float64,
    lambda_bg: tl.float64, totals, loss, foreground, background, OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over rows, then foreground, background and loss: one program.

    Shapes:  base, loss, foreground, background []; rows [4, N]; products, variance [N]; totals [4] = foreground,
             background, grand means of K_R and K_x.
    Order:   lane j adds rows j, j + BLOCK, …; then one sum over the lanes.
    """
    count = images.to(tl.int64)
    product = tl.zeros((BLOCK,), tl.float64)
    mean_product = tl.zeros((BLOCK,), tl.float64)
    sum_vjp = tl.zeros((BLOCK,), tl.float64)
    sum_x = tl.zeros((BLOCK,), tl.float64)
    sum_variance = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, images, BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = i < count
        mean_vjp = tl.load(rows + 2 * count + i, mask=inside, other=0.0)
        mean_x = tl.load(rows + 3 * count + i, mask=inside, other=0.0)
        product += tl.load(products + i, mask=inside, other=0.0)
        mean_product += mean_vjp * mean_x
        sum_vjp += mean_vjp
        sum_x += mean_x
        sum_variance += tl.load(variance + i, mask=inside, other=0.0)
    n = count.to(tl.float64)
    grand_vjp = tl.sum(sum_vjp, axis=0) * mean_scale
    grand_x = tl.sum(sum_x, axis=0) * mean_scale
    centred = tl.sum(product, axis=0) - 2.0 * n * tl.sum(mean_product, axis=0) + n * n * grand_vjp * grand_x
    fg = centred * hsic_scale
    bg = tl.sum(sum_variance, axis=0) * mean_scale
    value = tl.load(base).to(tl.float64)
    if OBJECTIVE == EXP:
        value += lambda_bg * tl.exp(bg) + lambda_fg * tl.exp(-fg)
    elif OBJECTIVE == LINEAR:
        value += lambda_bg * bg - lambda_fg * fg
    else:
        value += lambda_bg * _expm1(bg) + lambda_fg * _expm1(-fg)
    tl.store(totals, fg)
    tl.store(totals + 1, bg)
    tl.store(totals + 2, grand_vjp)
    tl.store(totals + 3, grand_x)
    tl.store(loss, value.to(loss.dtype.element_ty))
    tl.store(foreground, fg.to(foreground.dtype.element_ty))
    tl.store(background, bg.to(background.dtype.element_ty))


@triton.jit
def hsic_gradient_kernel(
    to_loss, to_foreground, to_background, gram_vjp, gram_x, rows, totals, images, mean_scale: tl.float64,
    hsic_scale: tl.float64, lambda_fg: tl.float64, lambda_bg: tl.float64, grad_vjp, grad_x, grad_variance,
    OBJECTIVE: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_FOREGROUND: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
    NEED_VJP: tl.constexpr, NEED_X: tl.constexpr, NEED_VARIANCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of both Grams and of the variances.

        grad_K_R = ḟ/(N−1)²·Z K_x Z     grad_G_R,ij = grad_K_R,ij/(n_i n_j) − [i = j]·Σ_j grad_K_R,ij K_R,ij/n_i²

    The second term only for a row whose norm is above the floor; x likewise.

    Shapes:  cotangents []; grad_vjp, grad_x [N, N]; grad_variance [N]; the rest as in the forward.
    Launch:  one program per ROWS rows, COLUMNS columns a step; every element is stored once, the diagonal at the end.
    """
    count = images.to(tl.int64)
    slope_foreground = tl.full((), 1.0, tl.float64) * lambda_fg
    slope_background = tl.full((), 1.0, tl.float64) * lambda_bg
    if OBJECTIVE != LINEAR:
        slope_foreground *= tl.exp(-tl.load(totals))
        slope_background *= tl.exp(tl.load(totals + 1))
    scale = tl.full((), 0.0, tl.float64)
    variance = tl.full((), 0.0, tl.float64)
    if HAS_LOSS:
        scale -= tl.load(to_loss).to(tl.float64) * slope_foreground
        variance += tl.load(to_loss).to(tl.float64) * slope_background
    if HAS_FOREGROUND:
        scale += tl.load(to_foreground).to(tl.float64)
    if HAS_BACKGROUND:
        variance += tl.load(to_background).to(tl.float64)
    scale *= hsic_scale
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = i < count
    if NEED_VARIANCE:
        tl.store(grad_variance + i, tl.zeros((ROWS,), tl.float64) + variance * mean_scale, mask=row)
    own_vjp = tl.load(rows + i, mask=row, other=0.0)
    own_x = tl.load(rows + count + i, mask=row, other=0.0)
    shift_vjp = tl.load(totals + 2) - tl.load(rows + 2 * count + i, mask=row, other=0.0)
    shift_x = tl.load(totals + 3) - tl.load(rows + 3 * count + i, mask=row, other=0.0)
    along_vjp = tl.zeros((ROWS, COLUMNS), tl.float64)
    along_x = tl.zeros((ROWS, COLUMNS), tl.float64)
    if NEED_VJP or NEED_X:
        for first in range(0, images, COLUMNS):
            j = first + tl.arange(0, COLUMNS).to(tl.int64)
            column = j < count
            at = i[:, None] * count + j[None, :]
            inside = row[:, None] & column[None, :]
            off_diagonal = inside & (i[:, None] != j[None, :])
            inverse_vjp = tl.load(rows + j, mask=column, other=0.0)[None, :]
            inverse_x = tl.load(rows + count + j, mask=column, other=0.0)[None, :]
            mean_vjp = tl.load(rows + 2 * count + j, mask=column, other=0.0)[None, :]
            mean_x = tl.load(rows + 3 * count + j, mask=column, other=0.0)[None, :]
            k = tl.load(gram_vjp + at, mask=inside, other=0.0) * own_vjp[:, None] * inverse_vjp
            el = tl.load(gram_x + at, mask=inside, other=0.0) * own_x[:, None] * inverse_x
            if NEED_VJP:
                grad_k = scale * (el + (shift_x[:, None] - mean_x))
                along_vjp += tl.where(inside, grad_k * k, 0.0)
                tl.store(grad_vjp + at, grad_k * (own_vjp[:, None] * inverse_vjp), mask=off_diagonal)
            if NEED_X:
                grad_el = scale * (k + (shift_vjp[:, None] - mean_vjp))
                along_x += tl.where(inside, grad_el * el, 0.0)
                tl.store(grad_x + at, grad_el * (own_x[:, None] * inverse_x), mask=off_diagonal)
        own = i * (count + 1)
        gram_ii_vjp = tl.load(gram_vjp + own, mask=row, other=0.0)
        gram_ii_x = tl.load(gram_x + own, mask=row, other=0.0)
        floor = tl.full((), 1e-12, tl.float64)
        # shift holds one mean of the row; on the diagonal the column's is the same number.
        if NEED_VJP:
            grad_k = scale * (gram_ii_x * own_x * own_x + (shift_x - (tl.load(totals + 3) - shift_x)))
            norm = tl.where(gram_ii_vjp > floor * floor, tl.sum(along_vjp, axis=1), 0.0)
            tl.store(grad_vjp + own, (grad_k - norm) * (own_vjp * own_vjp), mask=row)
        if NEED_X:
            grad_el = scale * (gram_ii_vjp * own_vjp * own_vjp + (shift_vjp - (tl.load(totals + 2) - shift_vjp)))
            norm = tl.where(gram_ii_x > floor * floor, tl.sum(along_x, axis=1), 0.0)
            tl.store(grad_x + own, (grad_el - norm) * (own_x * own_x), mask=row)


def _scales(images: int) -> tuple[float, float]:
    """1/N and 1/(N−1)²."""
    return 1.0 / images, 1.0 / (images - 1) ** 2


def forward(
    base: Tensor,
    gram_vjp: Tensor,
    gram_x: Tensor,
    background_variance: Tensor,
    lambda_fg: float,
    lambda_bg: float,
    objective: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = gram_vjp.shape[0]
    rows, products, totals = gram_vjp.new_empty(4, images), gram_vjp.new_empty(images), gram_vjp.new_empty(4)
    loss, foreground, background = base.new_empty(()), base.new_empty(()), base.new_empty(())
    scales = _scales(images)
    with torch.cuda.device_of(gram_vjp):
        hsic_rows_kernel[(triton.cdiv(images, TILE["ROWS"]),)](gram_vjp, gram_x, rows, products, images, scales[0], **TILE)
        hsic_combine_kernel[(1,)](
            base, rows, products, background_variance, images, *scales, lambda_fg, lambda_bg, totals, loss, foreground,
            background, OBJECTIVE=objective, BLOCK=COMBINE, num_warps=COMBINE_WARPS,
        )  # fmt: skip
    return loss, foreground, background, rows, totals


def backward(
    grad_loss: Tensor | None, grad_foreground: Tensor | None, grad_background: Tensor | None, gram_vjp: Tensor, gram_x: Tensor,
    rows: Tensor, totals: Tensor, lambda_fg: float, lambda_bg: float, objective: int, need_vjp: bool, need_x: bool,
    need_variance: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    images = gram_vjp.shape[0]
    shapes = (((images, images), need_vjp), ((images, images), need_x), ((images,), need_variance))
    grads = [gram_vjp.new_empty(shape) if need else None for shape, need in shapes]
    cotangents = grad_loss, grad_foreground, grad_background
    with torch.cuda.device_of(gram_vjp):
        hsic_gradient_kernel[(triton.cdiv(images, TILE["ROWS"]),)](
            *(totals if g is None else g for g in cotangents), gram_vjp, gram_x, rows, totals, images, *_scales(images),
            lambda_fg, lambda_bg, *grads, OBJECTIVE=objective, HAS_LOSS=grad_loss is not None,
            HAS_FOREGROUND=grad_foreground is not None, HAS_BACKGROUND=grad_background is not None, NEED_VJP=need_vjp,
            NEED_X=need_x, NEED_VARIANCE=need_variance, **TILE,
        )  # fmt: skip
    return tuple(grads)
