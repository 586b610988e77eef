"""vjp_map, vjp_leaf: a scalar of the logits, differentiated with respect to a tensor of the graph, kept in the graph (SPEC 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sib_fast import _checks, _needs

_OP = "vjp_map"
SCALARS = ("energy", "multilabel_energy", "logit_sum", "label_logit", "label_log_probability", "predicted_logit")
LABEL_SCALARS = ("label_logit", "label_log_probability")
# Under fp16 autocast the VJP of a network underflows layer by layer. The cosine of R to float32 was 0.78 without a scale
# and 0.99 with 2^10 (a power of two, so that dividing it out again is exact).
FLOAT16_SCALE = 1024.0
# A cotangent below this is zero to every dtype that a network runs in; dividing by it could overflow in the derivative.
_NO_COTANGENT = 1e-200


def energy_cotangent(logits: Tensor) -> Tensor:
    """∂E/∂logits of E = ½ Σ_images ‖softmax(logits)‖², which is p ⊙ (p − ‖p‖²), without cancellation.

    Near saturation p − ‖p‖² of the top class cancels: in float32 it is off by 10 % at a logit gap of 17 and 0 at 20. So
    in float64, and for the top class as p·Σ_others p − Σ_others p², equal on the simplex and free of cancellation.

    One logit z stands for the two classes (0, z), whose energy is the multi-label one.

    Shapes:  logits [N, K] -> float64 [N, K].
    """
    if logits.shape[1] == 1:
        return multilabel_energy_cotangent(logits)
    p = torch.softmax(_checks.to_float64(logits), dim=1)
    top = _one_hot(p.argmax(dim=1), p) != 0
    others = p.masked_fill(top, 0.0)
    of_top = p * others.sum(1, keepdim=True) - (others * others).sum(1, keepdim=True)
    of_other = p - (p * p).sum(1, keepdim=True)
    return p * torch.where(top, of_top, of_other)


def multilabel_energy_cotangent(logits: Tensor) -> Tensor:
    """∂E/∂logits of E = ½ Σ_images Σ_labels (σ² + (1−σ)²), which is σ(1−σ)(2σ−1), without cancellation.

    As σ(z)·σ(−z)·tanh(z/2), whose factors, and whose derivatives in the sum that autograd makes, are accurate at both ends.

    Shapes:  logits [N, K] -> float64 [N, K].
    """
    z = _checks.to_float64(logits)
    return torch.sigmoid(z) * torch.sigmoid(-z) * torch.tanh(0.5 * z)


def two_classes(logits: Tensor) -> Tensor:
    """The logits of the classes that the softmax is taken over: [N, K] as it is; one logit z as (0, z)."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    """1 at [i, index[i]]. torch.nn.functional.one_hot reads the indices' values, which is a synchronisation."""
    return torch.zeros_like(like, dtype=torch.float64).scatter(1, index[:, None], 1.0)


def _cotangent(logits: Tensor, scalar: str | Callable, labels: Tensor | None, create_graph: bool) -> Tensor:
    """∂s/∂logits. Shapes: logits [N, K], labels [N] -> float64 [N, K]."""
    wide = _checks.to_float64(logits)
    if isinstance(labels, Tensor):
        labels = labels.to(wide.device)
    if callable(scalar):
        # With respect to the wide logits: a half-precision cotangent would have lost its small entries before the scale.
        value = _checks.require_number(_OP, "scalar", scalar(wide, labels), "the logits")
        return torch.autograd.grad(value, wide, create_graph=create_graph, retain_graph=True)[0]
    if scalar == "energy":
        return energy_cotangent(wide)
    if scalar == "multilabel_energy":
        return multilabel_energy_cotangent(wide)
    if scalar == "logit_sum":
        return torch.ones_like(wide)
    index = two_classes(logits).argmax(dim=1).to(wide.device) if scalar == "predicted_logit" else labels
    chosen = _one_hot(index, two_classes(wide))
    if logits.shape[1] == 1:
        # The log-odds of the class, z of class 1 and −z of class 0: (0, z) itself gives class 0 a logit without a derivative.
        sign = chosen[:, 1:] - chosen[:, :1]
        return sign * torch.sigmoid(-sign * wide) if scalar == "label_log_probability" else sign
    if scalar == "label_log_probability":
        p = torch.softmax(wide, dim=1)
        others = p.masked_fill(chosen != 0, 0.0).sum(dim=1, keepdim=True)  # 1 − p, without cancellation
        return torch.where(chosen != 0, others, -p)
    return chosen


def normalised(cotangent: Tensor) -> Tensor:
    """Every image's cotangent over its own Euclidean norm, which is not differentiated. One that is zero stays zero.

    Over the greatest entry first: the squares of a cotangent of 1e-170 would underflow in float64 too.

    Shapes:  float64 [N, K] -> the same.
    """
    size = cotangent.detach().abs().amax(dim=1, keepdim=True)
    size = torch.where(size < _NO_COTANGENT, 1.0, size)  # NaN stays NaN
    cotangent = cotangent / size
    norm = cotangent.detach().norm(dim=1, keepdim=True)
    return cotangent / torch.where(norm < _NO_COTANGENT, 1.0, norm)


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
    normalise_cotangent: bool = False,
) -> Tensor:
    """R = ∂s/∂x of a scalar s of the logits, itself differentiable: the map that input-gradient losses train on.

    Shapes:  logits [N, K] in the graph of x; x [N, C, H, W] (or any shape), requiring grad -> R of the shape of x, float64
             if x is, otherwise float32.
    Args:    scalar: "energy" (½ Σ ‖softmax‖², the default and the authors'), "multilabel_energy" (½ Σ over labels of
             σ² + (1−σ)², for heads whose logits are labels of their own), "logit_sum", "label_logit",
             "label_log_probability" or "predicted_logit", summed over images; or a function (logits float64, labels) ->
             0-d tensor. One logit z [N, 1] means the two classes (0, z): both energies are σ² + (1−σ)² halved, the
             probability of class 1 is σ(z), and the logit of a label is its log-odds, z or −z. labels: int64 [N], for the two
             label scalars. create_graph: keep R in the graph, so that a loss can be differentiated through it. scale: a power
             of two that the cotangent is multiplied by and R divided by, against underflow; default 2^10 for float16 logits
             (fp16 autocast), otherwise 1. normalise_cotangent: divide ∂s/∂logits of every image by its norm, which is not
             differentiated, so that a confident image's R neither underflows nor drowns in what train-mode batch norm mixes
             into it; R of an image alone changes by a positive factor.
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
    if scalar in LABEL_SCALARS:
        if labels is None:
            raise ValueError(f"{_OP}: labels must be given for scalar={scalar!r}, got None")
        _checks.require_tensor(_OP, "labels", labels)
        if labels.dtype != torch.int64:
            raise TypeError(f"{_OP}: labels must be int64 class indices, got {labels.dtype}")
        _checks.require_same_shape(_OP, "labels", labels, "logits", logits.shape[:1])
        _checks.require_same_device(_OP, "labels", labels, "logits", logits)
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
        cotangent = _cotangent(logits, scalar, labels, create_graph)
        cotangent = (normalised(cotangent) if normalise_cotangent else cotangent) * scale
        cotangent = cotangent.to(logits.dtype).to(logits.device)
        try:
            (vjp,) = torch.autograd.grad(logits, x, cotangent, create_graph=create_graph, retain_graph=True, allow_unused=True)
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
        if create_graph and not vjp.requires_grad and scalar in ("energy", "multilabel_energy"):
            raise RuntimeError(
                f"{_OP}: the network's backward must be differentiable, but R came back without a graph: a layer (compiled "
                "code, a custom autograd.Function) cuts it"
            )
        vjp = vjp.to(_checks.accumulation_dtype(x.dtype))
        return vjp if scale == 1.0 else vjp / scale


def carried_on(op: str, features: Tensor, x: Tensor, vjp: Tensor) -> Tensor:
    """The VJP at x of which `vjp` is the part at a feature map: R_A through the layers between, outside of every graph.

    A second call and not a joint one for both: the layers below the map are then differentiated once, their weights not at all,
    and nothing of it is kept. Batch norm mixes images as in `vjp_map`; the scale is the one that `vjp_map` would take.

    Shapes:  features [N, C', h, w] in the graph of x; vjp of the shape of features -> the shape of x, float64 if x is, otherwise
             float32.
    Errors:  RuntimeError if x does not require grad, the graph of features does not reach it, or the layers between are compiled
             in a way that allows one backward pass only.
    """
    if not x.requires_grad:
        raise RuntimeError(f"{op}: x must require grad before the forward pass: call x.requires_grad_(), then model(x)")
    scale = FLOAT16_SCALE if features.dtype == torch.float16 else 1.0
    grad = None
    if features.requires_grad and features.grad_fn is not None:
        cotangent = (vjp * scale).to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            try:
                (grad,) = torch.autograd.grad(features, x, cotangent, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "donated buffer" in str(error):
                    raise RuntimeError(
                        f"{op}: layers that are compiled below the map must be compiled to allow two backward passes: set "
                        "torch._functorch.config.donated_buffer = False before the first forward pass, or give the masks "
                        "(mask='given'), which needs none at the image"
                    ) from error
                raise
    if grad is None:
        raise RuntimeError(
            f"{op}: features must be computed from x, but their graph does not reach it: pass the tensor that the model was "
            "called with, run no layer under no_grad, or give the masks (mask='given'), which needs no image"
        )
    grad = grad.to(_checks.accumulation_dtype(x.dtype))
    return grad if scale == 1.0 else grad / scale


def own_share(
    logits: Tensor, x: Tensor, scalar: str | Callable, labels: Tensor | None, scale: float | None, normalise_cotangent: bool
) -> float:
    """How much of R of the image with the least cotangent is its own: ‖own‖²/(‖own‖² + ‖others'‖²).

    1 where the network keeps images apart, less where train-mode batch norm mixes them (SPEC 2). Two more backward passes,
    and it reads values: for debugging. Arguments as `vjp_map`'s.
    """
    with torch.autocast(logits.device.type, enabled=False), torch.set_grad_enabled(callable(scalar)):
        cotangent = _cotangent(logits, scalar, labels, create_graph=False).detach()
    image = int(cotangent.abs().amax(dim=1).argmin())
    cotangent = normalised(cotangent) if normalise_cotangent else cotangent
    own = torch.zeros_like(cotangent)
    own[image] = cotangent[image]
    # A linear scalar: its cotangent is the part.
    parts = [
        vjp_map(logits, x, lambda z, _, part=part: (z * part).sum(), create_graph=False, scale=scale)[image]
        for part in (own, cotangent - own)
    ]
    greatest = max(float(part.abs().max()) for part in parts)
    own_energy, others = ((part / (greatest or 1.0)).square().sum().item() for part in parts)
    return own_energy / (own_energy + others) if greatest else 1.0
