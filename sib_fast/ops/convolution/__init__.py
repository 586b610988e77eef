"""convolution: PyTorch's own convolution, whose double backward takes the ordinary weight-gradient kernel.

PyTorch computes the weight's part of the double backward as a forward convolution with a kernel as large as the map, and
one group at a time. The same number comes out of the kernel that every backward pass uses, with the cotangent of grad_input
in the place of the input (SPEC 10). No arithmetic of our own: ops, each registered with its gradient, so that a compiled
step keeps the second derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast.ops.convolution import reference

_OP = "convolution"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_LIBRARY = torch.library.Library("sib_fast_convolution", "DEF")
_LIBRARY.define(f"forward(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor")
_LIBRARY.define(
    f"backward(Tensor grad_y, Tensor x, Tensor weight, {_GEOMETRY}, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
_OPS = torch.ops.sib_fast_convolution


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution of any rank with a fast double backward; arguments as torch.nn.functional.conv2d's, spelled out.

    Shapes:  x [N, C, *], weight [K, C/groups, *], bias [K] or None -> y [N, K, *], in x's dtype and layout.
    Order:   twice; a third derivative is PyTorch's own, through the ops that the second one is made of.
    Errors:  PyTorch's own.
    Source:  SPEC 10.
    """
    return _OPS.forward(x, weight, bias, stride, padding, dilation, groups)


def _forward(x, weight, bias, stride, padding, dilation, groups):
    return reference.convolution(x, weight, bias, stride, padding, dilation, groups)


def _gradients(grad_y, x, weight, stride, padding, dilation, groups, needs):
    """aten's fused backward: grad_x, grad_weight, grad_bias, each None unless needed."""
    return torch.ops.aten.convolution_backward(
        grad_y,
        x,
        weight,
        [weight.shape[0]] if needs[2] else None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        needs,
    )


def _backward(grad_y, x, weight, stride, padding, dilation, groups, need_x, need_weight, need_bias):
    grads = _gradients(grad_y, x, weight, stride, padding, dilation, groups, [need_x, need_weight, need_bias])
    return tuple(grad if grad is not None else x.new_empty((0,)) for grad in grads)


for _name, _function in (("forward", _forward), ("backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sib_fast_convolution::{_name}", _function, lib=_LIBRARY)


def _setup_forward(ctx, inputs, output):
    x, weight, bias, *geometry = inputs
    ctx.save_for_backward(x, weight)
    ctx.geometry, ctx.has_bias = geometry, bias is not None
    ctx.set_materialize_grads(False)


def _autograd_of_forward(ctx, grad_y):
    if grad_y is None:
        return None, None, None, None, None, None, None
    x, weight = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
    grads = _OPS.backward(grad_y, x, weight, *ctx.geometry, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None


def _setup_backward(ctx, inputs, output):
    grad_y, x, weight, *geometry, need_x, need_weight, need_bias = inputs
    ctx.save_for_backward(grad_y, x, weight)
    ctx.geometry, ctx.needs = geometry, (need_x, need_weight, need_bias)
    ctx.set_materialize_grads(False)


def _autograd_of_backward(ctx, u, u_weight, u_bias):
    """u, u_weight, u_bias: cotangents of grad_x, grad_weight and grad_bias."""
    grad_y, x, weight = ctx.saved_tensors
    need_grad_y, need_x, need_weight = ctx.needs_input_grad[:3]
    u, u_weight, u_bias = (part if need else None for part, need in zip((u, u_weight, u_bias), ctx.needs, strict=True))
    to_grad_y = to_x = to_weight = None
    if u is not None:
        if need_grad_y:
            to_grad_y = _OPS.forward(u, weight, None, *ctx.geometry)
        if need_weight:
            to_weight = _OPS.backward(grad_y, u, weight, *ctx.geometry, False, True, False)[1]
    if u_weight is not None:
        if need_grad_y:
            part = _OPS.forward(x, u_weight, None, *ctx.geometry)
            to_grad_y = part if to_grad_y is None else to_grad_y + part
        if need_x:
            to_x = _OPS.backward(grad_y, x, u_weight, *ctx.geometry, True, False, False)[0]
    if u_bias is not None and need_grad_y:
        part = u_bias.view(1, -1, *[1] * (grad_y.ndim - 2)).expand_as(grad_y)
        to_grad_y = part if to_grad_y is None else to_grad_y + part
    return to_grad_y, to_x, to_weight, None, None, None, None, None, None, None


torch.library.register_autograd("sib_fast_convolution::forward", _autograd_of_forward, setup_context=_setup_forward, lib=_LIBRARY)
torch.library.register_autograd(
    "sib_fast_convolution::backward", _autograd_of_backward, setup_context=_setup_backward, lib=_LIBRARY
)
