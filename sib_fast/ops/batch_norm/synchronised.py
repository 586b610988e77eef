"""Batch norm with the statistics of all processes of a group, differentiable twice (SPEC 10). PyTorch's is once.

Every process holds a part of the batch. A mean over the batch is a sum over the parts, so each derivative is a local pass, one
collective of a few numbers a channel, and a local pass. The gradients of weight and bias are the local part's, as PyTorch's:
DistributedDataParallel adds them up. Composed of PyTorch's ops: any device and backend, no kernel.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sib_fast import _checks
from sib_fast._transforms import refuse_transforms

_LIBRARY = torch.library.Library("sib_fast_batch_norm", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, float eps, str group) -> "
    "(Tensor y, Tensor mean, Tensor variance, Tensor invstd, Tensor count)"
)
_LIBRARY.define(
    "backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor count, bool need_x, str group) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
_LIBRARY.define(
    "double_backward(Tensor u, Tensor? u_weight, Tensor? u_bias, Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, "
    "Tensor invstd, Tensor count, bool need_x, str group) -> (Tensor to_grad_y, Tensor to_x, Tensor to_weight)"
)
_OPS = torch.ops.sib_fast_batch_norm


def synchronised_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of the whole group's batch; every process of the group must call it.

    Shapes:  x [N, C, *] of this process; weight, bias [C] or None -> y as x; mean and biased variance [C] and the number of
             elements of a channel [1] over the group, float64, not differentiable.
    Scale:   statistics over all processes; the gradients of weight and bias are this process's part.
    Order:   twice; a third derivative raises.
    Errors:  torch.distributed's own.
    Source:  SPEC 10, its means taken over the group.
    """
    refuse_transforms("SyncBatchNorm")
    acc = _checks.accumulation_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    y, mean, variance, _, count = _OPS.forward(x, weight, bias, eps, group.group_name)
    return y, mean, variance, count


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _reduced(sums: list[Tensor], group: str) -> Tensor:
    """The sums [C], added over the group in one collective: [len(sums), C] float64."""
    together = torch.stack([s.to(torch.float64) for s in sums])
    dist.all_reduce(together, group=_group(group))
    return together


def _sum(values: Tensor) -> Tensor:
    """Over all dimensions but the second, in float64."""
    return values.sum([d for d in range(values.ndim) if d != 1], dtype=torch.float64)


def _to(x: Tensor, channel: Tensor) -> Tensor:
    """A per-channel float64 value [C], in the dtype that x is calculated in, to be broadcast against x."""
    return channel.to(_checks.accumulation_dtype(x.dtype)).view([1, -1, *[1] * (x.ndim - 2)])


def _or(channel: Tensor | None, like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value) if channel is None else channel.to(torch.float64)


def _normalised(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (x - _to(x, mean)) * _to(x, invstd)


def _forward(x, weight, bias, eps, group):
    wide = x.to(_checks.accumulation_dtype(x.dtype))
    local = x.new_full((x.shape[1],), x.numel() / x.shape[1], dtype=torch.float64)
    mean = _sum(wide) / local.clamp(min=1)
    squares = _sum((wide - _to(x, mean)).square())
    # Chan's rule over the parts, in the order of ranks.
    together = torch.stack([local, mean, squares])
    parts = [torch.empty_like(together) for _ in range(_group(group).size())]
    dist.all_gather(parts, together, group=_group(group))
    counts, means, m2 = torch.stack(parts, dim=1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    variance = (m2 + counts * (means - mean).square()).sum(0) / count
    invstd = (variance + eps).rsqrt()
    y = _normalised(wide, mean, invstd)
    if weight is not None:
        y = y * _to(x, weight)
    if bias is not None:
        y = y + _to(x, bias)
    return y.to(x.dtype), mean, variance, invstd, count[:1].clone()


def _backward(grad_y, x, weight, mean, invstd, count, need_x, group):
    acc = _checks.accumulation_dtype(x.dtype)
    g, hat = grad_y.to(acc), _normalised(x.to(acc), mean, invstd)
    grad_bias, grad_weight = _sum(g), _sum(g * hat)
    if not need_x:
        return x.new_empty((0,)), grad_weight.to(acc), grad_bias.to(acc)
    A, B = _reduced([grad_bias, grad_weight], group) / count
    grad_x = _to(x, _or(weight, mean, 1.0) * invstd) * (g - _to(x, A) - hat * _to(x, B))
    return grad_x.to(x.dtype), grad_weight.to(acc), grad_bias.to(acc)


def _double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, count, need_x, group):
    acc = _checks.accumulation_dtype(x.dtype)
    u, g, hat = u.to(acc), grad_y.to(acc), _normalised(x.to(acc), mean, invstd)
    gamma, u_gamma, u_beta = _or(weight, mean, 1.0), _or(u_weight, mean, 0.0), _or(u_bias, mean, 0.0)
    sum_u, sum_ux, sum_ug, sum_g, sum_gx = local = [_sum(t) for t in (u, u * hat, u * g, g, g * hat)]
    # u_gamma is this process's own: its products are summed here, before the group's sums.
    U, T, V, A, B, omega_1, omega_hat = _reduced([*local, u_gamma * sum_g, u_gamma * sum_gx], group) / count
    kappa, scale = V - A * U - B * T, gamma * invstd
    to_weight = invstd * (sum_ug - A * sum_u - B * sum_ux)  # of this process; over the group invstd·n·kappa
    to_grad_y = _to(x, scale) * (u - _to(x, U) - hat * _to(x, T)) + _to(x, u_gamma) * hat + _to(x, u_beta)
    if not need_x:
        return to_grad_y.to(x.dtype), x.new_empty((0,)), to_weight.to(acc)
    omega = _to(x, u_gamma) * g - _to(x, scale * T) * g - _to(x, scale * B) * u
    omega_1, omega_hat = omega_1 - scale * (A * T + B * U), omega_hat - 2 * scale * B * T
    to_x = _to(x, invstd) * (omega - _to(x, omega_1) - hat * _to(x, omega_hat + scale * kappa))
    return to_grad_y.to(x.dtype), to_x.to(x.dtype), to_weight.to(acc)


def _fake_forward(x, weight, bias, eps, group):
    channel = x.new_empty((x.shape[1],), dtype=torch.float64)
    return torch.empty_like(x), channel, *(torch.empty_like(channel) for _ in range(2)), channel.new_empty((1,))


def _fake_channel(x):
    return x.new_empty((x.shape[1],), dtype=_checks.accumulation_dtype(x.dtype))


def _fake_backward(grad_y, x, weight, mean, invstd, count, need_x, group):
    return torch.empty_like(x) if need_x else x.new_empty((0,)), _fake_channel(x), _fake_channel(x)


def _fake_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, count, need_x, group):
    return torch.empty_like(x), torch.empty_like(x) if need_x else x.new_empty((0,)), _fake_channel(x)


def _setup_forward(ctx, inputs, output):
    x, weight, bias, _, ctx.group = inputs
    _, mean, variance, invstd, count = output
    ctx.mark_non_differentiable(mean, variance, invstd, count)
    ctx.save_for_backward(x, weight, mean, invstd, count)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _autograd_of_forward(ctx, grad_y, *_):
    if grad_y is None:
        return None, None, None, None, None
    x, weight, mean, invstd, count = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_bias = _OPS.backward(grad_y, x, weight, mean, invstd, count, need_x, ctx.group)
    return grad_x if need_x else None, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None, None


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.need_x, ctx.group = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd_of_backward(ctx, u, u_weight, u_bias):
    grad_y, x, weight, mean, invstd, count = ctx.saved_tensors
    if u is None or not ctx.need_x:
        u = torch.zeros_like(x)
    need_grad_y, need_x = ctx.needs_input_grad[:2]
    to_grad_y, to_x, to_weight = _OPS.double_backward(
        u, u_weight, u_bias, grad_y, x, weight, mean, invstd, count, need_x, ctx.group
    )
    to_weight = None if weight is None else to_weight
    return to_grad_y if need_grad_y else None, to_x if need_x else None, to_weight, None, None, None, None, None


def _setup_double_backward(ctx, inputs, output):
    """Nothing is kept: there is no third derivative."""


def _third_derivative(ctx, *_):
    raise NotImplementedError("SyncBatchNorm: a third derivative does not exist; use BatchNorm with backend='reference'")


for _name, _function, _fake, _gradient, _setup in (
    ("forward", _forward, _fake_forward, _autograd_of_forward, _setup_forward),
    ("backward", _backward, _fake_backward, _autograd_of_backward, _setup_backward),
    ("double_backward", _double_backward, _fake_double_backward, _third_derivative, _setup_double_backward),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sib_fast_batch_norm::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"sib_fast_batch_norm::{_name}", _gradient, setup_context=_setup, lib=_LIBRARY)
