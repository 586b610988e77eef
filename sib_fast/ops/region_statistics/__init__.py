"""region_statistics: Gram matrices and variances of foreground and background in one pass (SPEC 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks
from sib_fast._backends import REFERENCE, resolve
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._flops import register_flops
from sib_fast.ops._registration import register_head_op
from sib_fast.ops.region_statistics import reference
from sib_fast.types import RegionStatistics

_OP = "region_statistics"
# In the order in which "auto" asks: Triton before CUDA C++ until a measurement says otherwise.
KERNELS = ["cpu", "triton", "cuda"]
# How the products of float32 and half maps are formed: float32 arithmetic, or tensor cores with each float32 split into two
# tf32 numbers (three products, 22 bits), or rounded to one (11 bits).
PRECISIONS = ("ieee", "tf32x3", "tf32")


def region_statistics(
    vjp: Tensor,
    x: Tensor,
    mask: Tensor,
    *,
    background_grams: bool = False,
    backend: str = "auto",
    precision: str | None = None,
) -> RegionStatistics:
    """Gram matrices of the masked VJP and input, and the VJP's variances, of both regions in one pass.

    With rows of D = C·H·W elements, a = vjp·mask, b = x·mask, v = vjp·(1-mask), c = x·(1-mask):
    gram_vjp = a aᵀ, gram_x = b bᵀ, background_variance = Var(v), vjp_variance = Var(vjp), and with `background_grams`
    background_gram_vjp = v vᵀ, background_gram_x = c cᵀ. Differentiable once in vjp, x and mask (backend="reference": any
    order). The masked tensors never exist in memory.

    precision: "ieee", "tf32x3" or "tf32", what a GPU's kernels compute products in; None follows
    torch.get_float32_matmul_precision(), "highest" as tf32x3 and the others as tf32. float64 and the CPU are always IEEE.

    Shapes:  vjp, x [N, C, H, W] float64 (both) or any of float32, bfloat16, float16 (each), any strides;
             mask [N, 1, H, W] floating point -> Grams float64 [N, N], variances float64 [N], on the device of vjp, or on the
             CPU where it has no float64 (Apple's MPS). Any N >= 1; C·H·W >= 2.
    Scale:   Grams are plain sums over D; variances unbiased, 1/(D-1). Normalisation is the estimator's.
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable or tensors on several
             devices; NotImplementedError when a kernel's gradient is differentiated again.
    Source:  arXiv 2511.09239; SPEC 4 and 6.
    """
    _checks.require_map(_OP, "vjp", vjp)
    _checks.require_map(_OP, "x", x)
    _checks.require_same_shape(_OP, "x", x, "vjp", vjp.shape)
    _checks.require_tensor(_OP, "mask", mask)
    images, channels, height, width = vjp.shape
    _checks.require_same_shape(_OP, "mask", mask, "vjp", (images, 1, height, width))
    _checks.require_floating(_OP, "mask", mask)
    _checks.require_same_device(_OP, "x", x, "vjp", vjp)
    _checks.require_same_device(_OP, "mask", mask, "vjp", vjp)
    if (vjp.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{_OP}: vjp and x must both be float64 or neither, got {vjp.dtype} and {x.dtype}")
    if channels * height * width < 2:
        raise ValueError(f"{_OP}: vjp must have C·H·W >= 2, since its variance is unbiased, got {list(vjp.shape)}")
    if precision is not None and precision not in PRECISIONS:
        listed = ", ".join(repr(name) for name in PRECISIONS)
        raise ValueError(f"{_OP}: precision must be None or one of {listed}, got {precision!r}")
    chosen = resolve(_OP, backend, vjp.device, KERNELS)
    if chosen == REFERENCE:
        with torch.autocast(vjp.device.type, enabled=False):
            return reference.region_statistics(vjp, x, mask, background_grams=background_grams)
    refuse_transforms(_OP)
    mask = mask.to(_checks.accumulation_dtype(vjp.dtype)).contiguous()
    mode = _precision_of(precision, chosen, vjp.dtype)
    return RegionStatistics(*_RegionStatistics.apply(vjp, x, mask, bool(background_grams), chosen, mode))


# Dynamo has no rule for the getter; a changed setting fails its guards on global state all the same, so that it is asked anew.
def _matmul_precision() -> str:
    return torch.get_float32_matmul_precision()


# What torch.compiler.assume_constant_result does, which would import the compiler with this package.
_matmul_precision._dynamo_marked_constant = True


def _precision_of(requested: str | None, backend: str, dtype: torch.dtype) -> str:
    """The entry of PRECISIONS that a kernel of `backend` is given."""
    if backend == "cpu" or dtype == torch.float64:
        return "ieee"
    if requested is not None:
        return requested
    return "tf32x3" if _matmul_precision() == "highest" else "tf32"


class _RegionStatistics(torch.autograd.Function):
    """Grams and variances of both regions in one pass; the gradient by hand.

    Shapes:  vjp, x [N, C, H, W]; mask [N, 1, H, W] -> gram_vjp, gram_x [N, N]; background_variance, vjp_variance [N];
             with background_grams two more Grams. Saved: the inputs and the two means [N].
    Dtypes:  sums: products in float32 over at most 1,024 elements, added in float64.
    Order:   once. A second derivative raises, in `_RegionStatisticsGrad`.
    Source:  SPEC 4 and 6.
    """

    @staticmethod
    def forward(ctx, vjp, x, mask, background_grams, backend, precision):
        out = _FORWARD[backend](vjp, x, mask, background_grams, precision)
        background_mean, vjp_mean = out[4:6]
        ctx.save_for_backward(vjp, x, mask, background_mean, vjp_mean)
        ctx.rest = (background_grams, backend, precision)
        return (*out[:4], *out[6:]) if background_grams else tuple(out[:4])

    @staticmethod
    def backward(ctx, *grads):
        background_grams, backend, precision = ctx.rest
        vjp, x, mask, background_mean, vjp_mean = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        made = _RegionStatisticsGrad.apply(
            *(grads if background_grams else (*grads, None, None)),
            vjp, x, mask, background_mean, vjp_mean, *needs, precision, backend,
        )  # fmt: skip
        left, dtypes = iter(made), (vjp.dtype, x.dtype, mask.dtype)
        return (*(next(left).to(dtype) if need else None for need, dtype in zip(needs, dtypes, strict=True)), None, None, None)


class _RegionStatisticsGrad(torch.autograd.Function):
    """The first derivative as a node of its own, so that a second one is an error and never a silent zero."""

    @staticmethod
    def forward(ctx, *arguments):
        *arguments, backend = arguments
        grads = [g if g is None else g.contiguous() for g in arguments[:6]]
        made = _BACKWARD[backend](*grads, *arguments[6:])
        return tuple(g for g, need in zip(made, arguments[11:14], strict=True) if need)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "region_statistics: the second derivative exists only with backend='reference' (the loss needs the first one only)"
        )


# ---- the registered ops, one pair per backend -------------------------------------------------------------------------------

_FORWARD, _BACKWARD = {}, {}


def add_kernels(backend: str, namespace: str) -> None:
    """Makes `backend` run the ops of torch.ops.<namespace>, which exist in this process."""
    ops = getattr(torch.ops, namespace)
    _FORWARD[backend], _BACKWARD[backend] = ops._region_statistics.default, ops._region_statistics_backward.default
    register_flops(ops._region_statistics, _flops_of_forward)
    register_flops(ops._region_statistics_backward, _flops_of_backward)


def _gram_flops(rows: Tensor) -> int:
    """One product of N rows of D elements at its full 2N²D, symmetric or not (SPEC 8)."""
    return 2 * rows.shape[0] * rows.numel()


def _flops_of_forward(vjp, x, mask, background_grams, precision, *, out_val):
    return (2 if background_grams else 1) * (_gram_flops(vjp) + _gram_flops(x))


def _flops_of_backward(*arguments, out_val):
    """A Gram's gradient times its rows, where the map or the mask asks for it."""
    of_background, vjp, x, need_vjp, need_x, need_mask = (arguments[i] for i in (4, 6, 7, 11, 12, 13))
    products = (need_vjp or need_mask) * _gram_flops(vjp) + (need_x or need_mask) * _gram_flops(x)
    return products * (1 if of_background is None else 2)


def _fake_forward(vjp, x, mask, background_grams, precision):
    images = vjp.shape[0]

    def new(*shape):
        return vjp.new_empty(shape, dtype=torch.float64)

    background = (new(images, images) if background_grams else None for _ in range(2))
    return (new(images, images), new(images, images), *(new(images) for _ in range(4)), *background)


def _fake_backward(
    grad_gram_vjp, grad_gram_x, grad_background_variance, grad_vjp_variance, grad_background_gram_vjp,
    grad_background_gram_x, vjp, x, mask, background_mean, vjp_mean, need_vjp, need_x, need_mask, precision,
):  # fmt: skip
    acc = _checks.accumulation_dtype(vjp.dtype)

    def like(tensor, need):
        return torch.empty_like(tensor, dtype=acc) if need else None

    return like(vjp, need_vjp), like(x, need_x), mask.new_empty(mask.shape) if need_mask else None


FAKES = (("_region_statistics", _fake_forward), ("_region_statistics_backward", _fake_backward))

register_head_op(
    _OP,
    KERNELS,
    (
        "_region_statistics(Tensor vjp, Tensor x, Tensor mask, bool background_grams, str precision) -> (Tensor gram_vjp, Tensor "
        "gram_x, Tensor background_variance, Tensor vjp_variance, Tensor background_mean, Tensor vjp_mean, Tensor "
        "background_gram_vjp, Tensor background_gram_x)",
        "_region_statistics_backward(Tensor grad_gram_vjp, Tensor grad_gram_x, Tensor grad_background_variance, Tensor "
        "grad_vjp_variance, Tensor? grad_background_gram_vjp, Tensor? grad_background_gram_x, Tensor vjp, Tensor x, Tensor "
        "mask, Tensor background_mean, Tensor vjp_mean, bool need_vjp, bool need_x, bool need_mask, str precision) -> (Tensor "
        "grad_vjp, Tensor grad_x, Tensor grad_mask)",
    ),
    FAKES,
    add_kernels,
)
