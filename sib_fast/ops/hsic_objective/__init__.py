"""hsic_objective: from the statistics of a batch to the S-IB loss, the whole N×N part in one op (SPEC 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks
from sib_fast._backends import REFERENCE, resolve
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._registration import register_head_op
from sib_fast.ops.hsic_objective import reference

_OP = "hsic_objective"
# In the order in which "auto" asks: the work is a few microseconds, so CUDA C++, whose launches cost less, before Triton.
KERNELS = ["cpu", "cuda", "triton"]
# The kernels' numbers for the objectives (csrc/common/objective.h).
OBJECTIVES = {"exp": 0, "linear": 1, "expm1": 2}
MINIMUM_BATCH = 2


def hsic_objective(
    base: Tensor,
    gram_vjp: Tensor,
    gram_x: Tensor,
    background_variance: Tensor,
    *,
    lambda_fg: float,
    lambda_bg: float,
    objective: str = "exp",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The default S-IB loss of a batch from its statistics: (loss, foreground, background).

    foreground = tr(K_R Z K_x Z)/(N-1)², biased HSIC of the L2-normalised Grams; background = mean of background_variance;
    objective "exp":    loss = base + lambda_bg·exp(background) + lambda_fg·exp(−foreground)
    objective "linear": loss = base + lambda_bg·background − lambda_fg·foreground
    objective "expm1":  as "exp" without its constants lambda_bg + lambda_fg.
    Differentiable once in base, the Grams and the variances (backend="reference": any order). NaN and Inf show.

    Shapes:  base 0-d float32 or float64; gram_vjp, gram_x [N, N] and background_variance [N] float64, as from
             `region_statistics` -> three 0-d tensors of base's dtype. N >= 2. All arithmetic is float64.
             Where base's device has no float64, the Grams and variances are on the CPU, and the work is done there.
             The Grams must be symmetric, which is not checked: of a Gram's row and column the kernels read the row.
    Scale:   foreground 1/(N-1)²; background the mean over images; base as it comes.
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable or tensors on several
             devices; NotImplementedError when a kernel's gradient is differentiated again.
    Source:  arXiv 2511.09239; Gretton et al. 2005; SPEC 5 and 6.
    """
    _checks.require_tensor(_OP, "base", base)
    if base.ndim != 0:
        raise ValueError(f"{_OP}: base must be 0-d, got shape {list(base.shape)}")
    if base.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{_OP}: base must be float32 or float64, got {base.dtype}")
    for name, gram in (("gram_vjp", gram_vjp), ("gram_x", gram_x)):
        _checks.require_tensor(_OP, name, gram)
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(f"{_OP}: {name} must have shape [N, N], got {list(gram.shape)}")
    images = gram_vjp.shape[0]
    if images < MINIMUM_BATCH:
        raise ValueError(f"{_OP}: the batch must hold N >= {MINIMUM_BATCH} images, got {images}")
    _checks.require_same_shape(_OP, "gram_x", gram_x, "gram_vjp", gram_vjp.shape)
    _checks.require_tensor(_OP, "background_variance", background_variance)
    _checks.require_same_shape(_OP, "background_variance", background_variance, "gram_vjp", (images,))
    for name, tensor in (("gram_vjp", gram_vjp), ("gram_x", gram_x), ("background_variance", background_variance)):
        if tensor.dtype != torch.float64:
            raise TypeError(f"{_OP}: {name} must be float64, got {tensor.dtype}")
        if tensor.device != _checks.float64_device(base.device):
            _checks.require_same_device(_OP, name, tensor, "base", base)
    _checks.require_choice(_OP, "objective", objective, tuple(OBJECTIVES))
    chosen = resolve(_OP, backend, base.device, KERNELS)
    if chosen == REFERENCE:
        return reference.hsic_objective(
            base, gram_vjp, gram_x, background_variance, lambda_fg=lambda_fg, lambda_bg=lambda_bg, objective=objective
        )
    refuse_transforms(_OP)
    return _HSICObjective.apply(
        base,
        gram_vjp.contiguous(),
        gram_x.contiguous(),
        background_variance.contiguous(),
        float(lambda_fg),
        float(lambda_bg),
        OBJECTIVES[objective],
        chosen,
    )


class _HSICObjective(torch.autograd.Function):
    """Estimator, background term and objective at once; the gradient by hand.

    Shapes:  base [], gram_vjp, gram_x [N, N], background_variance [N] -> loss, foreground, background []. Saved: the inputs
             but base, rows [4, N] (1/norm of R and x, row means of K_R and K_x), totals [4] (foreground, background, grand
             means).
    Order:   once. A second derivative raises, in `_HSICObjectiveGrad`.
    Source:  SPEC 5 and 6.
    """

    @staticmethod
    def forward(ctx, base, gram_vjp, gram_x, background_variance, lambda_fg, lambda_bg, objective, backend):
        weights = lambda_fg, lambda_bg, objective
        loss, foreground, background, rows, totals = _FORWARD[backend](base, gram_vjp, gram_x, background_variance, *weights)
        ctx.save_for_backward(background_variance, gram_vjp, gram_x, rows, totals)
        ctx.rest = (weights, backend)
        ctx.set_materialize_grads(False)  # the loss alone is differentiated: no launches that fill zeros for the terms
        return loss, foreground, background

    @staticmethod
    def backward(ctx, grad_loss, grad_foreground, grad_background):
        weights, backend = ctx.rest
        need_base, *needs = ctx.needs_input_grad[:4]
        grads = (None, None, None)
        if any(needs):
            cotangents = grad_loss, grad_foreground, grad_background
            made = iter(_HSICObjectiveGrad.apply(*cotangents, *ctx.saved_tensors, *weights, *needs, backend))
            grads = tuple(next(made) if need else None for need in needs)
        # d loss/d base = 1: no kernel, and no second derivative to refuse.
        grads = (grad_loss, *grads)
        return (*(g if need else None for g, need in zip(grads, (need_base, *needs), strict=True)), None, None, None, None)


class _HSICObjectiveGrad(torch.autograd.Function):
    """The first derivative as a node of its own, so that a second one is an error and never a silent zero."""

    @staticmethod
    def forward(ctx, *arguments):
        # The variances, which the gradient depends on through totals, are here to be part of the graph.
        to_loss, to_foreground, to_background, _, *arguments, backend = arguments
        made = _BACKWARD[backend](to_loss, to_foreground, to_background, *arguments)
        return tuple(g for g, need in zip(made, arguments[-3:], strict=True) if need)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "hsic_objective: the second derivative exists only with backend='reference' (the loss needs the first one only)"
        )


# ---- the registered ops, one pair per backend -------------------------------------------------------------------------------

_FORWARD, _BACKWARD = {}, {}


def add_kernels(backend: str, namespace: str) -> None:
    """Makes `backend` run the ops of torch.ops.<namespace>, which exist in this process."""
    ops = getattr(torch.ops, namespace)
    _FORWARD[backend], _BACKWARD[backend] = ops._hsic_objective.default, ops._hsic_objective_backward.default


def _fake_forward(base, gram_vjp, gram_x, background_variance, lambda_fg, lambda_bg, objective):
    scalars = (base.new_empty(()) for _ in range(3))
    return (*scalars, gram_vjp.new_empty((4, gram_vjp.shape[0])), gram_vjp.new_empty((4,)))


def _fake_backward(
    grad_loss, grad_foreground, grad_background, gram_vjp, gram_x, rows, totals, lambda_fg, lambda_bg, objective,
    need_vjp, need_x, need_variance,
):  # fmt: skip
    images = gram_vjp.shape[0]
    shapes = (((images, images), need_vjp), ((images, images), need_x), ((images,), need_variance))
    return tuple(gram_vjp.new_empty(shape) if need else None for shape, need in shapes)


FAKES = (("_hsic_objective", _fake_forward), ("_hsic_objective_backward", _fake_backward))

register_head_op(
    _OP,
    KERNELS,
    (
        "_hsic_objective(Tensor base, Tensor gram_vjp, Tensor gram_x, Tensor background_variance, float lambda_fg, float "
        "lambda_bg, int objective) -> (Tensor loss, Tensor foreground, Tensor background, Tensor rows, Tensor totals)",
        "_hsic_objective_backward(Tensor? grad_loss, Tensor? grad_foreground, Tensor? grad_background, Tensor gram_vjp, "
        "Tensor gram_x, Tensor rows, Tensor totals, float lambda_fg, float lambda_bg, int objective, bool need_vjp, bool "
        "need_x, bool need_variance) -> (Tensor grad_gram_vjp, Tensor grad_gram_x, Tensor grad_background_variance)",
    ),
    FAKES,
    add_kernels,
)
