"""convolution: PyTorch's own convolution, whose double backward takes the ordinary weight-gradient kernel.

PyTorch computes the weight's part of the double backward as a forward convolution with a kernel as large as the map, and
one group at a time. The same number comes out of the kernel that every backward pass uses, with the cotangent of grad_input
in the place of the input (SPEC 10). No kernel of our own: ops, each registered with its gradient, so that a compiled step
keeps the second derivative.

More savings. Gradients that the running pass does not need are not computed (`sib_fast._needs`). What the VJP leaves for the
second derivative need not be kept where it can be calculated again (`sib_fast._again`). The input gradient of a network's first
layer, which a plain step never computes, goes by phases where it is strided and has few channels. The weight gradient of a
depthwise layer of large kernels goes in channels last, that of many channels on a small map by a convolution whose kernel is
the map. Where each is done, choice.py says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast._again import calculation_of
from sib_fast._needs import needed
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._flops import register_flops
from sib_fast.ops.convolution import reference
from sib_fast.ops.convolution.choice import rules_of

_OP = "convolution"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, bool recompute"
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
    recompute: bool = False,
) -> Tensor:
    """Convolution of any rank with a fast double backward; arguments as torch.nn.functional.conv2d's, spelled out.

    Shapes:  x [N, C, *], weight [K, C/groups, *], bias [K] or None -> y [N, K, *], in x's dtype and layout.
    Args:    recompute: where the gradient of y comes out of a batch norm, the graph of the first derivative keeps none of it and
             calculates it again: half of what that graph keeps of both layers, for one pass over two activations. Equal bits.
    Order:   twice; a third derivative is PyTorch's own, through the ops that the second one is made of.
    Errors:  PyTorch's own.
    Source:  SPEC 10.
    """
    refuse_transforms(_OP)
    return _OPS.forward(x, weight, bias, stride, padding, dilation, groups, recompute)


def _forward(x, weight, bias, stride, padding, dilation, groups, recompute):
    if torch.is_autocast_enabled(x.device.type):  # it would cast here what the caller has decided already
        with torch.autocast(x.device.type, enabled=False):
            return reference.convolution(x, weight, bias, stride, padding, dilation, groups)
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


def _taps(kernel: int, stride: int, padding: int) -> tuple[list[tuple[int, int, int]], int, int]:
    """Along one dimension, grad_x[stride·a + r] = Σ grad_y[a + offset]·weight[k]: (r, offset, k) for every k; lowest, highest
    offset."""
    taps = []
    for k in range(kernel):
        r = (k - padding) % stride
        taps.append((r, (r + padding - k) // stride, k))
    offsets = [offset for _, offset, _ in taps]
    return taps, min(offsets), max(offsets)


def _input_gradient_by_phases(grad_y, x, weight, stride, padding):
    """Every stride-th pixel of grad_x is an ordinary convolution of grad_y with every stride-th tap of the kernel, flipped: one
    convolution of stride 1 with stride² times the channels, then an interleaving."""
    outputs, inputs = weight.shape[:2]
    (rows, low_h, high_h), (columns, low_w, high_w) = (_taps(weight.shape[d + 2], stride[d], padding[d]) for d in range(2))
    kernel = weight.new_zeros((inputs, *stride, outputs, high_h - low_h + 1, high_w - low_w + 1))
    for r, offset, k in rows:
        for q, across, m in columns:
            kernel[:, r, q, :, offset - low_h, across - low_w] = weight[:, :, k, m].t()
    # Padding on both sides for every window that touches grad_y; what it makes too many is cut off below.
    reach = [max(high_h - low_h, -low_h, high_h), max(high_w - low_w, -low_w, high_w)]
    out = reference.convolution(grad_y, kernel.flatten(0, 2), None, [1, 1], reach, [1, 1], 1)
    height, width = (-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
    missing = [
        max(0, start + size - have)
        for start, size, have in zip((reach[0] + low_h, reach[1] + low_w), (height, width), out.shape[2:], strict=True)
    ]
    if max(missing) > 0:  # pixels beyond the last window have no gradient
        out = torch.nn.functional.pad(out, [0, missing[1], 0, missing[0]])
    out = out[:, :, reach[0] + low_h :, reach[1] + low_w :][:, :, :height, :width]
    out = out.unflatten(1, (inputs, *stride)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    return torch.empty_like(x).copy_(out[:, :, : x.shape[2], : x.shape[3]])


def _weight_gradient_in_channels_last(grad_y, x, weight, *geometry):
    grad_y, x, w = (t.contiguous(memory_format=torch.channels_last) for t in (grad_y, x, weight))
    return torch.empty_like(weight).copy_(_gradients(grad_y, x, w, *geometry, [False, True, False])[1])


def _weight_gradient_by_map(grad_y, x, weight, stride, padding, dilation):
    """grad_W[k, c] = Σ over images and pixels of grad_y[·, k]·x[·, c]: images as channels, grad_y's map as the kernel."""
    rows, columns = weight.shape[2:]
    out = reference.convolution(x.transpose(0, 1), grad_y.transpose(0, 1), None, dilation, padding, stride, 1)
    return torch.empty_like(weight).copy_(out[:, :, :rows, :columns].transpose(0, 1))


def _backward(grad_y, x, weight, stride, padding, dilation, groups, recompute, need_x, need_weight, need_bias):
    geometry = (stride, padding, dilation, groups)
    rules = rules_of(x.device)
    phases = need_x and rules.input_by_phases(x, weight, stride, dilation, groups)
    channels_last = need_weight and rules.weight_in_channels_last(grad_y, x, weight, groups)
    by_map = need_weight and not channels_last and rules.weight_by_map(grad_y, x, weight, groups)
    weight_apart = channels_last or by_map
    needs, grads = [need_x and not phases, need_weight and not weight_apart, need_bias], [None, None, None]
    if any(needs):
        grads = list(_gradients(grad_y, x, weight, *geometry, needs))
    if phases:
        grads[0] = _input_gradient_by_phases(grad_y, x, weight, stride, padding)
    if channels_last:
        grads[1] = _weight_gradient_in_channels_last(grad_y, x, weight, *geometry)
    if by_map:
        grads[1] = _weight_gradient_by_map(grad_y, x, weight, stride, padding, dilation)
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
        return None, None, None, None, None, None, None, None
    x, weight = ctx.saved_tensors
    needs = (needed(ctx, 0), needed(ctx, 1), ctx.has_bias and needed(ctx, 2))
    grads = _OPS.backward(grad_y, x, weight, *ctx.geometry, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None, None


def _setup_backward(ctx, inputs, output):
    grad_y, x, weight, *geometry, recompute, need_x, need_weight, need_bias = inputs
    ctx.grad_y_again = calculation_of(grad_y) if recompute else None
    ctx.save_for_backward(grad_y if ctx.grad_y_again is None else None, x, weight)
    geometry.append(recompute)
    ctx.geometry, ctx.needs = geometry, (need_x, need_weight, need_bias)
    ctx.set_materialize_grads(False)


def _autograd_of_backward(ctx, u, u_weight, u_bias):
    """u, u_weight, u_bias: cotangents of grad_x, grad_weight and grad_bias."""
    grad_y, x, weight = ctx.saved_tensors
    need_grad_y, need_x, need_weight = ctx.needs_input_grad[:3]
    u, u_weight, u_bias = (part if need else None for part, need in zip((u, u_weight, u_bias), ctx.needs, strict=True))
    reads_grad_y = (u is not None and need_weight) or (u_weight is not None and need_x) or u_bias is not None
    if reads_grad_y and ctx.grad_y_again is not None:
        grad_y = ctx.grad_y_again()
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
    return to_grad_y, to_x, to_weight, *[None] * 8


torch.library.register_autograd("sib_fast_convolution::forward", _autograd_of_forward, setup_context=_setup_forward, lib=_LIBRARY)
torch.library.register_autograd(
    "sib_fast_convolution::backward", _autograd_of_backward, setup_context=_setup_backward, lib=_LIBRARY
)


# ---- flops: what PyTorch counts for the op that ours stands for, whichever way it goes ---------------------------------------


def _flops_of_forward(x, weight, bias, stride, padding, dilation, groups, recompute, *, out_val):
    from torch.utils.flop_counter import flop_registry

    count = flop_registry[torch.ops.aten.convolution]
    return count(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups, out_val=out_val)


def _flops_of_backward(grad_y, x, weight, stride, padding, dilation, groups, recompute, *needs, out_val):
    from torch.utils.flop_counter import flop_registry

    count = flop_registry[torch.ops.aten.convolution_backward]
    return count(grad_y, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, needs, out_val=out_val)


register_flops(_OPS.forward, _flops_of_forward)
register_flops(_OPS.backward, _flops_of_backward)
