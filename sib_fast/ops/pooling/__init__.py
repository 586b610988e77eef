"""pooling: PyTorch's 2d pooling, whose double backward makes no zeros.

Pooling is linear once the maxima are chosen, so its second derivative has one part: u pooled as the input was. PyTorch returns
an input-sized tensor of zeros for the other part and adds it to a gradient; the first pooling's input is the largest
activation of many networks. No arithmetic of our own: registered ops, so that a compiled step keeps the second derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast._transforms import refuse_transforms
from sib_fast.ops._derivatives import register_derivatives
from sib_fast.ops.pooling import reference  # noqa: F401  the oracle of the tests

_aten = torch.ops.aten
_MAX = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
_AVERAGE = "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override"
_LIBRARY = torch.library.Library("sib_fast_pooling", "DEF")
_LIBRARY.define(f"max(Tensor x, {_MAX}) -> (Tensor y, Tensor indices)")
_LIBRARY.define(f"max_backward(Tensor grad_y, Tensor x, Tensor indices, {_MAX}) -> Tensor")
_LIBRARY.define(f"average(Tensor x, {_AVERAGE}) -> Tensor")
_LIBRARY.define(f"average_backward(Tensor grad_y, Tensor x, {_AVERAGE}) -> Tensor")
_OPS = torch.ops.sib_fast_pooling


def max_pool2d(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """Maximum over windows; arguments as torch.nn.functional.max_pool2d's, spelled out.

    Shapes:  x [N, C, H, W] -> [N, C, H', W'] in x's dtype.
    Order:   any.
    Errors:  PyTorch's own.
    Source:  torch.nn.functional.max_pool2d.
    """
    refuse_transforms("max_pool2d")
    return _OPS.max(x, kernel_size, stride, padding, dilation, ceil_mode)[0]


def avg_pool2d(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Mean over windows; arguments as torch.nn.functional.avg_pool2d's, spelled out.

    Shapes:  x [N, C, H, W] -> [N, C, H', W'] in x's dtype.
    Order:   any.
    Errors:  PyTorch's own.
    Source:  torch.nn.functional.avg_pool2d.
    """
    refuse_transforms("avg_pool2d")
    return _OPS.average(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _max(x, *geometry):
    return _aten.max_pool2d_with_indices(x, *geometry)


def _max_backward(grad_y, x, indices, *geometry):
    return _aten.max_pool2d_with_indices_backward(grad_y, x, *geometry, indices)


def _average(x, *geometry):
    return _aten.avg_pool2d(x, *geometry)


def _average_backward(grad_y, x, *geometry):
    return _aten.avg_pool2d_backward(grad_y, x, *geometry)


for _name, _function in (
    ("max", _max),
    ("max_backward", _max_backward),
    ("average", _average),
    ("average_backward", _average_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sib_fast_pooling::{_name}", _function, lib=_LIBRARY)


def _setup_max(ctx, inputs, output):
    x, *ctx.geometry = inputs
    _, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, indices)
    ctx.set_materialize_grads(False)


def _autograd_of_max(ctx, grad_y, _):
    grad = None if grad_y is None else _OPS.max_backward(grad_y, *ctx.saved_tensors, *ctx.geometry)
    return grad, *[None] * len(ctx.geometry)


def _gather(u: Tensor, indices: Tensor) -> Tensor:
    """u at the maxima, in the layout of the indices, which is y's: torch.gather alone always returns a contiguous tensor."""
    if indices.is_contiguous():
        return u.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
    last = indices.permute(0, 2, 3, 1)
    return u.permute(0, 2, 3, 1).flatten(1, 2).gather(1, last.flatten(1, 2)).view(last.shape).permute(0, 3, 1, 2)


def _setup_max_backward(ctx, inputs, output):
    _, _, indices, *ctx.geometry = inputs
    ctx.save_for_backward(indices)
    ctx.set_materialize_grads(False)


def _autograd_of_max_backward(ctx, u):
    to_grad_y = None
    if u is not None and ctx.needs_input_grad[0]:
        (indices,) = ctx.saved_tensors
        to_grad_y = _gather(u, indices)
    return to_grad_y, None, None, *[None] * len(ctx.geometry)


def _setup_average(ctx, inputs, output):
    x, *ctx.geometry = inputs
    ctx.save_for_backward(x)
    ctx.set_materialize_grads(False)


def _autograd_of_average(ctx, grad_y):
    grad = None if grad_y is None else _OPS.average_backward(grad_y, *ctx.saved_tensors, *ctx.geometry)
    return grad, *[None] * len(ctx.geometry)


def _setup_average_backward(ctx, inputs, output):
    _, _, *ctx.geometry = inputs
    ctx.set_materialize_grads(False)


def _autograd_of_average_backward(ctx, u):
    wanted = u is not None and ctx.needs_input_grad[0]
    return _OPS.average(u, *ctx.geometry) if wanted else None, None, *[None] * len(ctx.geometry)


register_derivatives(
    "sib_fast_pooling",
    (
        ("max", _autograd_of_max, _setup_max),
        ("max_backward", _autograd_of_max_backward, _setup_max_backward),
        ("average", _autograd_of_average, _setup_average),
        ("average_backward", _autograd_of_average_backward, _setup_average_backward),
    ),
    _LIBRARY,
)
