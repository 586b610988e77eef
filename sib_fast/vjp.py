"""vjp_map, vjp_leaf: a scalar of the logits, differentiated with respect to a tensor of the graph, kept in the graph (SPEC 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sib_fast import _checks, _needs

_OP = "vjp_map"
SCALARS = ("energy", "logit_sum", "label_logit", "label_log_probability", "predicted_logit")
_NEEDS_LABELS = ("label_logit", "label_log_probability")
# Under fp16 autocast the VJP of a network underflows layer by layer. The cosine of R to float32 was 0.78 without a scale
# and 0.99 with 2^10 (issue 2; a power of two, so that dividing it out again is exact).
FLOAT16_SCALE = 1024.0


def energy_cotangent(logits: Tensor) -> Tensor:
    """∂E/∂logits of E = ½ Σ_images ‖softmax(logits)‖², which is p ⊙ (p − ‖p‖²), without cancellation.

    Near saturation p − ‖p‖² of the top class cancels: in float32 it is off by 10 % at a logit gap of 17 and 0 at 20. So
    in float64, and for the top class as p·Σ_others p − Σ_others p², equal on the simplex and free of cancellation.

    Shapes:  logits [N, K] -> float64 [N, K].
    """
    p = torch.softmax(logits.to(torch.float64), dim=1)
    top = _one_hot(p.argmax(dim=1), p) != 0
    others = p.masked_fill(top, 0.0)
    of_top = p * others.sum(1, keepdim=True) - (others * others).sum(1, keepdim=True)
    of_other = p - (p * p).sum(1, keepdim=True)
    return p * torch.where(top, of_top, of_other)


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    """1 at [i, index[i]]. torch.nn.functional.one_hot reads the indices' values, which is a synchronisation."""
    return torch.zeros_like(like, dtype=torch.float64).scatter(1, index[:, None], 1.0)


def _cotangent(logits: Tensor, scalar: str | Callable, labels: Tensor | None, create_graph: bool) -> Tensor:
    if callable(scalar):
        # With respect to the wide logits: a half-precision cotangent would have lost its small entries before the scale.
        wide = logits.to(torch.float64)
        value = scalar(wide, labels)
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.requires_grad:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            graph = " without a graph" if isinstance(value, Tensor) and not value.requires_grad else ""
            raise ValueError(f"{_OP}: scalar must return a 0-d tensor computed from the logits, got {got}{graph}")
        return torch.autograd.grad(value, wide, create_graph=create_graph, retain_graph=True)[0]
    if scalar == "energy":
        return energy_cotangent(logits)
    if scalar == "logit_sum":
        return torch.ones_like(logits, dtype=torch.float64)
    index = logits.argmax(dim=1) if scalar == "predicted_logit" else labels
    chosen = _one_hot(index, logits)
    if scalar == "label_log_probability":
        return chosen - torch.softmax(logits.to(torch.float64), dim=1)
    return chosen


def vjp_leaf(x: Tensor) -> Tensor:
    """x as a leaf for a loss on its gradient: read by `vjp_map` or `torch.autograd.grad`, and by nothing else.

        x = sib_fast.vjp_leaf(x)      # instead of x.requires_grad_()
        vjp = sib_fast.vjp_map(model(x), x)

    `loss.backward()` fills the gradient of every leaf, so with `x.requires_grad_()` each step ends with the input gradient of
    the first layer, which nobody reads. For this leaf a prepared first convolution does not compute it, and `.grad` stays None.
    `SIBLoss.attach` does the same by itself.

    Shapes:  x of any shape, floating point -> the same numbers, sharing memory; no gradient flows to x itself.
    Errors:  TypeError if x is no floating-point tensor.
    """
    op = "vjp_leaf"
    _checks.require_tensor(op, "x", x)
    _checks.require_floating(op, "x", x)
    x = x.clone() if x.is_inference() else x
    return _needs.mark_vjp_leaf(x.detach().requires_grad_())


def vjp_map(
    logits: Tensor,
    x: Tensor,
    scalar: str | Callable[[Tensor, Tensor | None], Tensor] = "energy",
    labels: Tensor | None = None,
    create_graph: bool = True,
    scale: float | None = None,
) -> Tensor:
    """R = ∂s/∂x of a scalar s of the logits, itself differentiable: the map that input-gradient losses train on.

    Shapes:  logits [N, K] in the graph of x; x [N, C, H, W] (or any shape), requiring grad -> R of the shape of x, float64
             if x is, otherwise float32.
    Args:    scalar: "energy" (½ Σ ‖softmax‖², the default and the authors'), "logit_sum", "label_logit",
             "label_log_probability" or "predicted_logit", summed over images; or a function (logits float64, labels) ->
             0-d tensor. labels: int64 [N], for the two label scalars. create_graph: keep R in the graph, so that a loss can
             be differentiated through it. scale: a power of two that the cotangent is multiplied by and R divided by,
             against underflow; default 2^10 for float16 logits (fp16 autocast), otherwise 1.
    Scale:   a sum over images, so R of one image does not depend on the batch's size (batch norm aside).
    Errors:  TypeError, ValueError for bad arguments; RuntimeError if logits have no graph, x does not require grad, the
             graph of logits does not reach x, or the network cannot be differentiated twice.
    Source:  arXiv 2511.09239, VJP-based gradient reconstruction; SPEC 2.
    """
    _checks.require_tensor(_OP, "logits", logits)
    _checks.require_tensor(_OP, "x", x)
    _checks.require_choice(_OP, "scalar", scalar, SCALARS, or_callable=True)
    _checks.require_floating(_OP, "logits", logits)
    _checks.require_floating(_OP, "x", x)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"{_OP}: logits must have shape [N, classes], got {list(logits.shape)}")
    if scalar in _NEEDS_LABELS:
        if labels is None:
            raise ValueError(f"{_OP}: labels must be given for scalar={scalar!r}, got None")
        _checks.require_tensor(_OP, "labels", labels)
        if labels.dtype != torch.int64:
            raise TypeError(f"{_OP}: labels must be int64 class indices, got {labels.dtype}")
        _checks.require_same_shape(_OP, "labels", labels, "logits", logits.shape[:1])
    if scale is None:
        scale = FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
    if not (scale > 0 and math.frexp(scale)[0] == 0.5):
        raise ValueError(f"{_OP}: scale must be a power of two, so that dividing it out is exact, got {scale!r}")
    if not x.requires_grad:
        raise RuntimeError(f"{_OP}: x must require grad before the forward pass: call x.requires_grad_(), then model(x)")
    if not logits.requires_grad:
        raise RuntimeError(
            f"{_OP}: logits must have a graph, got logits that do not require grad: run the forward pass with grad enabled "
            "and x.requires_grad_() before it"
        )
    # Under no_grad the cotangent would lose its graph, and R half of its derivative, in silence.
    with torch.autocast(logits.device.type, enabled=False), torch.set_grad_enabled(create_graph or callable(scalar)):
        cotangent = _cotangent(logits, scalar, labels, create_graph) * scale
        try:
            (vjp,) = torch.autograd.grad(
                logits, x, cotangent.to(logits.dtype), create_graph=create_graph, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "double backward" in str(error):
                raise RuntimeError(
                    f"{_OP}: the network must be differentiable twice, and a torch.compile'd module is not: {error} "
                    "Compile nothing, or the whole step instead of the model"
                ) from error
            raise
        if vjp is None:
            raise RuntimeError(
                f"{_OP}: logits must be computed from x, but their graph does not reach it: pass the tensor that the "
                "model was called with"
            )
        if create_graph and not vjp.requires_grad and scalar == "energy":
            raise RuntimeError(
                f"{_OP}: the network's backward must be differentiable, but R came back without a graph: a layer (compiled "
                "code, a custom autograd.Function) cuts it"
            )
        vjp = vjp.to(_checks.accumulation_dtype(x.dtype))
        return vjp if scale == 1.0 else vjp / scale
