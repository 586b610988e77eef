"""Batch norm with given statistics (eval mode, and batch norm frozen in fine-tuning), its double backward one op.

It is linear in x, and its gradient with respect to x is itself once more, with mean and bias 0, of grad_y. So the double
backward is the gradient of that: in the notation of SPEC 10 u takes the place of grad_y, and grad_y that of x. aten has a fused
op for each of the two, on every device and in every layout; PyTorch composes its second derivative of many. On the CPU the
gradients are a kernel's of ours: aten's adds up a channel in float32 where channels come last (8e-6 of grad_weight at
16×64×112×112, where ours is at 3e-8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks, _extension
from sib_fast._needs import needed
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._derivatives import register_derivatives
from sib_fast.ops._registration import register_fakes
from sib_fast.ops.batch_norm import _as_laid_out, _dense

_LIBRARY = torch.library.Library("sib_fast_running_batch_norm", "DEF")
_LIBRARY.define("forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor variance, float eps) -> Tensor")
_LIBRARY.define(
    "backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? mean, Tensor variance, float eps, bool need_x, bool need_weight, "
    "bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
_OPS = torch.ops.sib_fast_running_batch_norm


def running_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """y = γ·(x − mean)/sqrt(variance + eps) + β with statistics that do not depend on x.

    Shapes:  x [N, C, *]; weight, bias [C] or None; mean, variance [C] -> y as x, in x's dtype and layout.
    Scale:   all of a channel's numbers in x's accumulation dtype, whatever dtype they are kept in; y rounded once.
    Order:   any.
    Errors:  PyTorch's own.
    Source:  Ioffe and Szegedy 2015; SPEC 10.
    """
    refuse_transforms("running_batch_norm")
    acc = _checks.accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    return _OPS.forward(x, weight, bias, mean.to(acc), variance.to(acc), eps)


def _or_zero(mean: Tensor | None, variance: Tensor) -> Tensor:
    return torch.zeros_like(variance) if mean is None else mean


def _forward(x, weight, bias, mean, variance, eps):
    return torch.ops.aten.native_batch_norm(x, weight, bias, _or_zero(mean, variance), variance, False, 0.0, eps)[0]


def _fused(grad_y, x, weight, mean, variance, eps, needs):
    """All three gradients in one op; x dense, grad_y in its layout."""
    if x.device.type == "cpu" and _extension.MISSING["cpu"] is None:
        return torch.ops.sib_fast._running_batch_norm_backward(grad_y, x, weight, mean, variance, eps, needs[0])
    return torch.ops.aten.native_batch_norm_backward(
        grad_y, x, weight, _or_zero(mean, variance), variance, None, None, False, eps, needs
    )


def _backward(grad_y, x, weight, mean, variance, eps, *needs):
    if x.numel() == 0:  # an integer division by 0 in aten, which ends the process
        grads = torch.empty_like(x), torch.zeros_like(variance), torch.zeros_like(variance)
    else:
        x = _dense(x)
        grads = _fused(_as_laid_out(grad_y, x), x, weight, mean, variance, eps, needs)
    return tuple(grad if need else x.new_empty((0,)) for grad, need in zip(grads, needs, strict=True))


def _fake_fused(grad_y, x, weight, mean, variance, eps, need_x):
    return torch.empty_like(x) if need_x else x.new_empty((0,)), torch.empty_like(variance), torch.empty_like(variance)


if _extension.MISSING["cpu"] is None:
    register_fakes("sib_fast", (("_running_batch_norm_backward", _fake_fused),))
for _name, _function in (("forward", _forward), ("backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sib_fast_running_batch_norm::{_name}", _function, lib=_LIBRARY)


def _linear(x, weight, variance, eps):
    """The part of forward that is linear in x: mean and bias 0."""
    return _OPS.forward(x, weight, None, None, variance, eps)


def _setup_forward(ctx, inputs, output):
    x, weight, bias, mean, variance, ctx.eps = inputs
    ctx.save_for_backward(x, weight, mean, variance)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _autograd_of_forward(ctx, grad_y):
    if grad_y is None:
        return None, None, None, None, None, None
    x, weight, mean, variance = ctx.saved_tensors
    need_weight = weight is not None and needed(ctx, 1)
    need_bias = ctx.has_bias and needed(ctx, 1 if weight is None else 2)
    need_x = needed(ctx, 0)
    if not need_weight and not need_bias:  # as in a VJP: x need not be read
        return _linear(grad_y, weight, variance, ctx.eps) if need_x else None, None, None, None, None, None
    needs = (need_x, need_weight, need_bias)
    grads = _OPS.backward(grad_y, x, weight, mean, variance, ctx.eps, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def _setup_backward(ctx, inputs, output):
    grad_y, x, weight, mean, variance, ctx.eps, *ctx.needs = inputs
    ctx.save_for_backward(grad_y, x, weight, mean, variance)
    ctx.set_materialize_grads(False)


def _autograd_of_backward(ctx, u, u_weight, u_bias):
    """u, u_weight, u_bias: cotangents of grad_x, grad_weight and grad_bias. The last two are rare: their part is composed."""
    grad_y, x, weight, mean, variance = ctx.saved_tensors
    need_grad_y, need_x, need_weight = ctx.needs_input_grad[:3]
    u, u_weight, u_bias = (part if need else None for part, need in zip((u, u_weight, u_bias), ctx.needs, strict=True))
    to_grad_y = to_x = to_weight = None
    rare = u_weight is not None or u_bias is not None
    if u is not None and need_weight and weight is not None:
        needs = (need_grad_y and not rare, True, False)
        to_grad_y, to_weight, _ = _OPS.backward(u, grad_y, weight, None, variance, ctx.eps, *needs)
    elif u is not None and need_grad_y and not rare:
        to_grad_y = _linear(u, weight, variance, ctx.eps)
    if rare and need_grad_y:
        acc = _checks.accumulation_dtype(x.dtype)
        if u_weight is not None:
            to_grad_y = _OPS.forward(x.to(acc), u_weight, u_bias, mean, variance, ctx.eps)
        else:
            to_grad_y = u_bias.view([1, -1, *[1] * (x.ndim - 2)]).expand_as(x)
        if u is not None:
            to_grad_y = to_grad_y + _linear(u.to(acc), weight, variance, ctx.eps)
        to_grad_y = to_grad_y.to(x.dtype)
    if need_x and u_weight is not None:
        to_x = _linear(grad_y, u_weight, variance, ctx.eps)
    return to_grad_y if need_grad_y else None, to_x, to_weight, None, None, None, None, None, None


register_derivatives(
    "sib_fast_running_batch_norm",
    (
        ("forward", _autograd_of_forward, _setup_forward),
        ("backward", _autograd_of_backward, _setup_backward),
    ),
    _LIBRARY,
)
