"""layer_norm, group_norm: norms by a row's own statistics whose double backward is one fused op (SPEC 10, a row for a channel).

Group norm is layer norm whose rows are groups of channels and whose weight is a channel's. Registered ops and no
autograd.Function, for the reason that batch_norm has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sib_fast import _checks, _extension
from sib_fast._backends import REFERENCE, resolve
from sib_fast._needs import needed
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._derivatives import no_third_derivative, register_derivatives
from sib_fast.ops._registration import register_fakes
from sib_fast.ops.layer_norm import reference

_OP = "layer_norm"
KERNELS = ["cpu", "cuda"]


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Layer norm over the last dimensions, differentiable twice with one fused pass per derivative.

    Shapes:  x [*, *normalized_shape] float64, float32, bfloat16 or float16; weight, bias normalized_shape or None -> y of x's
             shape and dtype, contiguous; another layout of x is copied once.
    Scale:   statistics over the elements of normalized_shape. float32 at least, sums in float64, whatever x is.
    Order:   twice; a third derivative raises (backend="reference" has every order).
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable or a third derivative.
    Source:  Ba, Kiros and Hinton 2016; SPEC 10 with a row in the place of a channel.
    """
    _checks.require_tensor(_OP, "x", x)
    _checks.require_floating(_OP, "x", x)
    normalized = tuple(normalized_shape)
    if not normalized or 0 in normalized or tuple(x.shape[-len(normalized) :]) != normalized:
        raise ValueError(f"{_OP}: x must have shape [*, *normalized_shape], got {list(x.shape)} for {normalized}")
    chosen = _chosen(_OP, x, weight, bias, normalized, eps, backend)
    if chosen == REFERENCE:
        acc = _checks.accumulation_dtype(x.dtype)
        weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
        return reference.layer_norm(x.to(acc), normalized, weight, bias, eps).to(x.dtype)
    refuse_transforms(_OP)
    return _by_kernel(chosen, x.contiguous(), weight, bias, math.prod(normalized), 1, 1, eps)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Group norm, differentiable twice with one fused pass per derivative.

    Shapes:  x [N, C, *] float64, float32, bfloat16 or float16; weight, bias [C] or None -> y of x's shape and dtype,
             contiguous, or channels last where x is, by a copy each way; another layout of x is copied once.
    Scale:   statistics over the C/num_groups·* elements of a group. float32 at least, sums in float64, whatever x is.
    Order:   twice; a third derivative raises (backend="reference" has every order).
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable or a third derivative.
    Source:  Wu and He 2018; SPEC 10 with a group in the place of a channel.
    """
    op = "group_norm"
    _checks.require_tensor(op, "x", x)
    _checks.require_floating(op, "x", x)
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have shape [N, C, ...], got {list(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels of x, got {num_groups}")
    chosen = _chosen(op, x, weight, bias, (channels,), eps, backend)
    if chosen == REFERENCE:
        acc = _checks.accumulation_dtype(x.dtype)
        weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
        return reference.group_norm(x.to(acc), num_groups, weight, bias, eps).to(x.dtype)
    refuse_transforms(op)
    spatial = math.prod(x.shape[2:])
    length = channels // num_groups * spatial
    y = _by_kernel(chosen, x.contiguous(), weight, bias, length, num_groups, spatial, eps)
    if x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y


def _chosen(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float, backend: str
) -> str:
    """The backend that runs, after the checks that both norms share."""
    _checks.require_positive(op, "eps", eps)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _checks.require_same_shape(op, name, parameter, "x", shape)
            _checks.require_same_device(op, name, parameter, "x", x)
    return resolve(op, backend, x.device, KERNELS)


def _by_kernel(
    chosen: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, length: int, groups: int, spatial: int, eps: float
) -> Tensor:
    acc = _checks.accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(acc).reshape(-1) for p in (weight, bias))
    return _FORWARD[chosen](x, weight, bias, length, groups, spatial, eps)[0]


def _setup_forward(ctx, inputs, output):
    x, weight, bias, *ctx.rows, _ = inputs
    _, mean, invstd = output
    ctx.mark_non_differentiable(mean, invstd)
    ctx.save_for_backward(x, weight, mean, invstd)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad_y, *_):
    if grad_y is None:
        return None, None, None, None, None, None, None
    x, weight, mean, invstd = ctx.saved_tensors
    has_weight = weight is not None
    needs = (needed(ctx, 0), has_weight and needed(ctx, 1), ctx.has_bias and needed(ctx, 1 + has_weight))
    grads = ops._layer_norm_backward(grad_y.contiguous(), x, weight, mean, invstd, *ctx.rows, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None


def _setup_backward(ctx, inputs, output):
    grad_y, x, weight, mean, invstd, *ctx.rows, need_x, need_weight, need_bias = inputs
    ctx.save_for_backward(grad_y, x, weight, mean, invstd)
    ctx.needs = (need_x, need_weight, need_bias)
    ctx.set_materialize_grads(False)


def _double_backward(ops, ctx, u, u_weight, u_bias):
    """u, u_weight, u_bias: cotangents of grad_x, grad_weight and grad_bias."""
    grad_y, x, weight, mean, invstd = ctx.saved_tensors
    given = zip((u, u_weight, u_bias), ctx.needs, strict=True)
    u, u_weight, u_bias = (part.contiguous() if need and part is not None else None for part, need in given)
    u = torch.zeros_like(x) if u is None else u
    needs = (needed(ctx, 0), needed(ctx, 1), weight is not None and needed(ctx, 2))
    grads = ops._layer_norm_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, *ctx.rows, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 8


# ---- the registered ops: a CPU and a CUDA kernel each, and derivatives once a namespace -------------------------------------

_FORWARD = {}


def add_kernels(backend: str, namespace: str) -> None:
    """Makes `backend` run the ops of torch.ops.<namespace>, which exist in this process."""
    ops = getattr(torch.ops, namespace)
    if ops._layer_norm not in _FORWARD.values():
        derivatives = (
            ("_layer_norm", partial(_backward, ops), _setup_forward),
            ("_layer_norm_backward", partial(_double_backward, ops), _setup_backward),
            ("_layer_norm_double_backward", no_third_derivative(_OP), None),
        )
        register_derivatives(namespace, derivatives)
    _FORWARD[backend] = ops._layer_norm


def _like(x, need):
    return torch.empty_like(x) if need else x.new_empty((0,))


def _of_channels(x, length, groups, spatial, need):
    channels = groups * (length // spatial) if need else 0
    return x.new_empty((channels,), dtype=_checks.accumulation_dtype(x.dtype))


def _fake_forward(x, weight, bias, length, groups, spatial, eps):
    row = x.new_empty((x.numel() // length,), dtype=torch.float64)
    return torch.empty_like(x), row, torch.empty_like(row)


def _fake_backward(grad_y, x, weight, mean, invstd, length, groups, spatial, need_x, need_weight, need_bias):
    channels = (_of_channels(x, length, groups, spatial, need) for need in (need_weight, need_bias))
    return _like(x, need_x), *channels


def _fake_double_backward(
    u, u_weight, u_bias, grad_y, x, weight, mean, invstd, length, groups, spatial, need_grad_y, need_x, need_weight
):
    return _like(x, need_grad_y), _like(x, need_x), _of_channels(x, length, groups, spatial, need_weight)


FAKES = (
    ("_layer_norm", _fake_forward),
    ("_layer_norm_backward", _fake_backward),
    ("_layer_norm_double_backward", _fake_double_backward),
)

if _extension.MISSING["cpu"] is None:
    register_fakes("sib_fast", FAKES)
    for _backend in ("cpu", "cuda"):
        add_kernels(_backend, "sib_fast")
