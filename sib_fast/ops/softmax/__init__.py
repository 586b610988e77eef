"""softmax: PyTorch's softmax along the last dimension, with a double backward that is one pass.

    grad_x = y·(gy − c),  c = Σ y·gy;   given u, the cotangent of grad_x, with b = Σ y·u:
    to gy  y·(u − b)      to y  u·(gy − c) − b·gy

Values and first derivatives are PyTorch's own kernels; PyTorch composes the second of some seven passes over what is the largest
activation of a transformer. Registered ops and no autograd.Function, for the reason that batch_norm has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks, _extension
from sib_fast._backends import REFERENCE, resolve
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._derivatives import no_third_derivative, register_derivatives
from sib_fast.ops._registration import register_fakes
from sib_fast.ops.softmax import reference

_OP = "softmax"
KERNELS = ["cpu", "cuda"]
# The namespace of each device type's kernel: a double backward is not told a backend.
_KERNEL_OF = {"cpu": "sib_fast", "cuda": "sib_fast"}
_aten = torch.ops.aten
_LIBRARY = torch.library.Library("sib_fast_softmax", "DEF")
_LIBRARY.define("forward(Tensor x) -> Tensor")
_LIBRARY.define("backward(Tensor grad_y, Tensor y) -> Tensor")
_LIBRARY.define(
    "double_backward(Tensor u, Tensor grad_y, Tensor y, bool need_grad_y, bool need_y) -> (Tensor to_grad_y, Tensor to_y)"
)
_OPS = torch.ops.sib_fast_softmax


def softmax(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Softmax along the last dimension, differentiable twice with one pass per derivative.

    Shapes:  x [*, L] floating point -> the same shape and dtype.
    Order:   twice; a third derivative raises (backend="reference" has every order).
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable.
    Source:  as torch.nn.functional.softmax.
    """
    _checks.require_tensor(_OP, "x", x)
    _checks.require_floating(_OP, "x", x)
    if x.ndim < 1:
        raise ValueError(f"{_OP}: x must have shape [*, L], got {list(x.shape)}")
    if backend == REFERENCE:
        return reference.softmax(x)
    if backend != "auto":
        resolve(_OP, backend, x.device, KERNELS)
    refuse_transforms(_OP)
    return _OPS.forward(x)


def _forward(x):
    return _aten._softmax(x, -1, False)


def _backward(grad_y, y):
    return _aten._softmax_backward_data(grad_y, y, -1, y.dtype)


def _double_backward_composed(u, grad_y, y, need_grad_y, need_y):
    """Both parts by PyTorch's ops: for devices without a kernel."""
    to_grad_y = _backward(u, y) if need_grad_y else y.new_empty((0,))
    if not need_y:
        return to_grad_y, y.new_empty((0,))
    acc = _checks.accumulation_dtype(y.dtype)
    dtype, u, grad_y, y = y.dtype, u.to(acc), grad_y.to(acc), y.to(acc)
    b, c = ((y * t).sum(-1, keepdim=True) for t in (u, grad_y))
    return to_grad_y, (u * (grad_y - c) - b * grad_y).to(dtype)


def _double_backward_fused(u, grad_y, y, need_grad_y, need_y):
    """Both parts in one pass."""
    ops = getattr(torch.ops, _KERNEL_OF[y.device.type])
    u, grad_y, y = (t.contiguous() for t in (u, grad_y, y))
    return ops._softmax_double_backward(u, grad_y, y, need_grad_y, need_y)


def _fake_double_backward(u, grad_y, y, need_grad_y, need_y):
    return tuple(
        torch.empty_like(y, memory_format=torch.contiguous_format) if need else y.new_empty((0,))
        for need in (need_grad_y, need_y)
    )


for _name, _function in (("forward", _forward), ("backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sib_fast_softmax::{_name}", _function, lib=_LIBRARY)
_LIBRARY.impl("double_backward", _double_backward_composed, "CompositeExplicitAutograd")
torch.library.register_fake("sib_fast_softmax::double_backward", _fake_double_backward, lib=_LIBRARY)
for _name in _KERNEL_OF:
    if _extension.MISSING[_name] is None:
        _LIBRARY.impl("double_backward", _double_backward_fused, _name.upper())
FAKES = (("_softmax_double_backward", _fake_double_backward),)
if _extension.MISSING["cpu"] is None:
    register_fakes("sib_fast", FAKES)


def _setup_forward(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.set_materialize_grads(False)


def _autograd_of_forward(ctx, grad_y):
    return None if grad_y is None else _OPS.backward(grad_y, *ctx.saved_tensors)


def _setup_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _autograd_of_backward(ctx, u):
    if u is None:
        return None, None
    needs = ctx.needs_input_grad
    grads = _OPS.double_backward(u, *ctx.saved_tensors, *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


register_derivatives(
    "sib_fast_softmax",
    (
        ("forward", _autograd_of_forward, _setup_forward),
        ("backward", _autograd_of_backward, _setup_backward),
        ("double_backward", no_third_derivative(_OP), None),
    ),
    _LIBRARY,
)
