"""batch_norm: batch norm with batch statistics whose double backward is one fused op (SPEC 10).

Not an autograd.Function: inside a compiled step that calls autograd.grad, dynamo drops the second derivative of a Function
in silence. The op and its backward op are registered, each with its gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sib_fast import _checks, _extension
from sib_fast._again import offer
from sib_fast._backends import REFERENCE, resolve
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._derivatives import no_third_derivative, register_derivatives
from sib_fast.ops._handover import register_autograd_with_handover
from sib_fast.ops._registration import register_fakes
from sib_fast.ops.batch_norm import reference

_OP = "batch_norm"
KERNELS = ["cpu", "cuda"]


def batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the batch's own statistics, differentiable twice with one fused pass pair per derivative.

    Shapes:  x [N, C, *] float64, float32, bfloat16 or float16; weight, bias [C] or None -> y of x's shape, dtype and layout
             (contiguous or channels last; any other is copied once); mean and biased variance [C], float64 (reference: x's
             accumulation dtype), not differentiable with a kernel.
    Scale:   statistics over the N·* elements of a channel. float32 at least, sums in float64, whatever x is.
    Order:   twice; a third derivative raises (backend="reference" has every order).
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable or a third derivative.
    Source:  Ioffe and Szegedy 2015; SPEC 10.
    """
    _checks.require_tensor(_OP, "x", x)
    _checks.require_floating(_OP, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{_OP}: x must have shape [N, C, ...], got {list(x.shape)}")
    channels = x.shape[1]
    if x.numel() <= channels:
        raise ValueError(f"{_OP}: x must have more than one value per channel, got {list(x.shape)}")
    _checks.require_positive(_OP, "eps", eps)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _checks.require_same_shape(_OP, name, parameter, "x", (channels,))
            _checks.require_same_device(_OP, name, parameter, "x", x)
    acc = _checks.accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    chosen = resolve(_OP, backend, x.device, KERNELS)
    if chosen == REFERENCE:
        y, mean, variance = reference.batch_norm(x.to(acc), weight, bias, eps)
        return y.to(x.dtype), mean, variance
    refuse_transforms(_OP)
    # Never a view of x: an in-place ReLU on a view of the result would copy it, forward and backward.
    y, mean, variance, _ = _FORWARD[chosen](_dense(x), weight, bias, eps)
    return y, mean, variance


def _is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """x where it is contiguous or channels last, otherwise a contiguous copy."""
    return x if x.is_contiguous() or _is_channels_last(x) else x.contiguous()


def _as_laid_out(tensor: Tensor, x: Tensor) -> Tensor:
    """tensor in the layout of x, which is dense; no copy where it has that already."""
    if x.is_contiguous():
        return tensor.contiguous()
    return tensor if _is_channels_last(tensor) else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _setup_forward(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, variance, invstd = output
    ctx.mark_non_differentiable(mean, variance, invstd)
    ctx.save_for_backward(x, weight, mean, invstd)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad_y, _mean, _variance, _invstd, handed):
    """handed: what this op's double backward has for x in the same pass."""
    need_x = ctx.needs_input_grad[0]
    if grad_y is None:
        return handed if need_x else None, None, None, None
    x, weight, mean, invstd = ctx.saved_tensors
    addend = None if handed is None or not need_x else _as_laid_out(handed, x)
    grad_x, grad_weight, grad_bias = ops._batch_norm_backward(_as_laid_out(grad_y, x), x, weight, mean, invstd, addend, need_x)
    return grad_x if need_x else None, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None


def _setup_backward(ops, ctx, inputs, output):
    grad_y, x, weight, mean, invstd, addend, need_x = inputs
    ctx.save_for_backward(grad_y, x, weight, mean, invstd)
    ctx.need_x = need_x
    if need_x and addend is None:
        offer(ctx, partial(_grad_x_again, ops))
    ctx.set_materialize_grads(False)


def _grad_x_again(ops, ctx):
    return ops._batch_norm_backward(*ctx.saved_tensors, None, True)[0]


def _double_backward(ops, ctx, u, u_weight, u_bias):
    grad_y, x, weight, mean, invstd = ctx.saved_tensors
    to_addend = u if ctx.need_x and ctx.needs_input_grad[5] else None
    u = torch.zeros_like(x) if u is None or not ctx.need_x else _as_laid_out(u, x)
    need_grad_y, need_x = ctx.needs_input_grad[:2]
    parts = [None if part is None else part.contiguous() for part in (u_weight, u_bias)]
    to_grad_y, to_x, to_weight = ops._batch_norm_double_backward(u, *parts, grad_y, x, weight, mean, invstd, need_grad_y, need_x)
    to_weight = None if weight is None else to_weight
    return to_grad_y if need_grad_y else None, to_x if need_x else None, to_weight, None, None, to_addend, None


# ---- the registered ops: a CPU and a CUDA kernel each, and derivatives once a namespace -------------------------------------

_FORWARD = {}


def add_kernels(backend: str, namespace: str) -> None:
    """Makes `backend` run the ops of torch.ops.<namespace>, which exist in this process."""
    ops = getattr(torch.ops, namespace)
    if ops._batch_norm not in _FORWARD.values():
        register_autograd_with_handover(namespace, "_batch_norm", partial(_backward, ops), _setup_forward)
        derivatives = (
            ("_batch_norm_backward", partial(_double_backward, ops), partial(_setup_backward, ops)),
            ("_batch_norm_double_backward", no_third_derivative(_OP), None),
        )
        register_derivatives(namespace, derivatives)
    _FORWARD[backend] = ops._batch_norm


def _fake_forward(x, weight, bias, eps):
    channel = x.new_empty((x.shape[1],), dtype=torch.float64)
    return torch.empty_like(x), channel, torch.empty_like(channel), torch.empty_like(channel)


def _fake_backward(grad_y, x, weight, mean, invstd, addend, need_x):
    channel = x.new_empty((x.shape[1],), dtype=_checks.accumulation_dtype(x.dtype))
    return torch.empty_like(x) if need_x else x.new_empty((0,)), channel, torch.empty_like(channel)


def _fake_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, need_grad_y, need_x):
    def like(need):
        return torch.empty_like(x) if need else x.new_empty((0,))

    return like(need_grad_y), like(need_x), x.new_empty((x.shape[1],), dtype=_checks.accumulation_dtype(x.dtype))


FAKES = (
    ("_batch_norm", _fake_forward),
    ("_batch_norm_backward", _fake_backward),
    ("_batch_norm_double_backward", _fake_double_backward),
)

if _extension.MISSING["cpu"] is None:
    register_fakes("sib_fast", FAKES)
    for _backend in ("cpu", "cuda"):
        add_kernels(_backend, "sib_fast")
