"""activation: PyTorch's activations, with a double backward that is one pass and makes no zeros.

Where f'' is zero almost everywhere, the second derivative has one part, the first derivative's own kernel applied to u. PyTorch
returns an activation-sized tensor of zeros for the other part and adds it to a gradient. Where f'' is not zero, PyTorch
composes the two parts from about ten pointwise ops; here one kernel writes both, on the CPU and on CUDA.

Values and first derivatives are PyTorch's own kernels. No autograd.Function on the way of a compiled step (see batch_norm).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sib_fast import _checks, _extension
from sib_fast._backends import REFERENCE, resolve
from sib_fast.ops.activation import reference

_OP = "activation"
_aten = torch.ops.aten


class _Kind(NamedTuple):
    """f, and what its derivatives need.

    parameters: how many floats f takes. saves_result: f' is known from y = f(x), which the next layer keeps anyway.
    first(grad_y, saved, *parameters) = grad_y·f'. second(product, saved, *parameters) = product·∂f'/∂saved; None where that is
    zero. kernel: number in csrc/common/activation.h; None where there is nothing to fuse.
    """

    parameters: int
    saves_result: bool
    forward: Callable[..., Tensor]
    forward_: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., Tensor] | None = None
    kernel: int | None = None


def _hardsigmoid_first(grad_y: Tensor, x: Tensor) -> Tensor:
    # PyTorch's CPU kernel multiplies by a float32 sixth whatever the dtype.
    if x.dtype == torch.float64:
        return torch.where((x > -3) & (x < 3), grad_y / 6, 0.0)
    return _aten.hardsigmoid_backward(grad_y, x)


def _sigmoids(z: Tensor) -> tuple[Tensor, Tensor]:
    """σ(z) and 1 − σ(z), which by subtraction would cancel."""
    return torch.sigmoid(z), torch.sigmoid(-z)


def _hardswish_second(product: Tensor, x: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), product / 3, 0.0)


def _silu_second(product: Tensor, x: Tensor) -> Tensor:
    s, rest = _sigmoids(x)
    return product * s * rest * (2 + x * (rest - s))


def _gelu_second(product: Tensor, x: Tensor) -> Tensor:
    return product * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)) * (2 - x * x)


def _gelu_tanh_second(product: Tensor, x: Tensor) -> Tensor:
    # With z = sqrt(8/π)·(x + 0.044715·x³) and s = σ(z), f = x·s.
    k = math.sqrt(8 / math.pi)
    z1, z2 = k * (1 + 3 * 0.044715 * x * x), k * 6 * 0.044715 * x
    s, rest = _sigmoids(k * (x + 0.044715 * x**3))
    return product * s * rest * (2 * z1 + x * ((rest - s) * z1 * z1 + z2))


def _mish_second(product: Tensor, x: Tensor) -> Tensor:
    # t = tanh(softplus(x)) = n/(n + 2), n = e^x(e^x + 2); beyond 20, 1 − t is below a rounding of a double.
    e = torch.exp(x.clamp(max=20))
    n, s = e * (e + 2), torch.sigmoid(x)
    t, rest = n / (n + 2), 2 / (n + 2)
    slope = rest * (1 + t)
    return product * slope * s * (2 + x * (1 - s - 2 * t * s))


def _elu_second(product: Tensor, x: Tensor, alpha: float) -> Tensor:
    return product * torch.where(x < 0, alpha * torch.exp(x.clamp(max=0)), 0.0)


def _softplus_second(product: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    s, rest = _sigmoids(x * beta)
    return product * torch.where(x * beta >= threshold, 0.0, beta * s * rest)


KINDS: dict[str, _Kind] = {
    "relu": _Kind(0, True, _aten.relu, _aten.relu_, lambda g, y: _aten.threshold_backward(g, y, 0)),
    "hardtanh": _Kind(2, True, _aten.hardtanh, _aten.hardtanh_, _aten.hardtanh_backward),
    "leaky_relu": _Kind(
        1, True, _aten.leaky_relu, _aten.leaky_relu_, lambda g, y, slope: _aten.leaky_relu_backward(g, y, slope, True)
    ),
    "hardsigmoid": _Kind(0, False, _aten.hardsigmoid, _aten.hardsigmoid_, _hardsigmoid_first),
    "hardswish": _Kind(
        0,
        False,
        _aten.hardswish,
        _aten.hardswish_,
        _aten.hardswish_backward,
        _hardswish_second,
        0,
    ),
    "silu": _Kind(0, False, _aten.silu, _aten.silu_, _aten.silu_backward, _silu_second, 1),
    "gelu": _Kind(0, False, _aten.gelu, _aten.gelu_, _aten.gelu_backward, _gelu_second, 2),
    "gelu_tanh": _Kind(
        0,
        False,
        lambda x: _aten.gelu(x, approximate="tanh"),
        lambda x: _aten.gelu_(x, approximate="tanh"),
        lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
        _gelu_tanh_second,
        3,
    ),
    "mish": _Kind(0, False, _aten.mish, _aten.mish_, _aten.mish_backward, _mish_second, 4),
    "elu": _Kind(
        1,
        False,
        _aten.elu,
        _aten.elu_,
        lambda g, x, alpha: _aten.elu_backward(g, alpha, 1, 1, False, x),
        _elu_second,
        5,
    ),
    "softplus": _Kind(
        2,
        False,
        _aten.softplus,
        lambda x, beta, threshold: x.copy_(_aten.softplus(x, beta, threshold)),
        _aten.softplus_backward,
        _softplus_second,
        6,
    ),
    "sigmoid": _Kind(0, True, _aten.sigmoid, _aten.sigmoid_, _aten.sigmoid_backward, lambda product, y: product * (1 - 2 * y), 7),
    "tanh": _Kind(0, True, _aten.tanh, _aten.tanh_, _aten.tanh_backward, lambda product, y: -2 * product * y, 8),
}
KERNELS = ["cpu", "cuda"]

_LIBRARY = torch.library.Library("sib_fast_activation", "DEF")
_LIBRARY.define("forward(Tensor x, str kind, float[] parameters) -> Tensor")
_LIBRARY.define("forward_(Tensor(a!) x, str kind, float[] parameters) -> ()")
_LIBRARY.define("backward(Tensor grad_y, Tensor saved, str kind, float[] parameters) -> Tensor")
_LIBRARY.define(
    "double_backward(Tensor u, Tensor grad_y, Tensor saved, str kind, float[] parameters, bool need_grad_y, bool need_saved) "
    "-> (Tensor to_grad_y, Tensor to_saved)"
)
_OPS = torch.ops.sib_fast_activation


def activation(x: Tensor, kind: str, *parameters: float, inplace: bool = False, backend: str = "auto") -> Tensor:
    """f(x) element by element, differentiable twice with one pass per derivative.

    Shapes:  x of any shape, floating point -> the same shape, dtype and layout; x itself with inplace.
    Args:    kind: "relu", "hardtanh" (low, high), "leaky_relu" (slope >= 0), "hardsigmoid", "hardswish", "sigmoid", "tanh",
             "silu", "gelu", "gelu_tanh", "mish", "elu" (alpha), "softplus" (beta, threshold); the names in brackets are
             `parameters`. inplace: write into x. Kinds whose derivative is known from the result (relu, hardtanh,
             leaky_relu, sigmoid, tanh) then keep one tensor alive; the others copy x first, as PyTorch does.
    Order:   any for relu, hardtanh, leaky_relu, hardsigmoid; twice for the rest, a third derivative raises
             (backend="reference" has every order).
    Errors:  TypeError, ValueError for bad arguments; RuntimeError for a backend that is not usable.
    Source:  as torch.nn.functional's; the derivative at a kink is PyTorch's.
    """
    _checks.require_tensor(_OP, "x", x)
    _checks.require_choice(_OP, "kind", kind, tuple(KINDS))
    _checks.require_floating(_OP, "x", x)
    if len(parameters) != KINDS[kind].parameters:
        raise ValueError(f"{_OP}: parameters must be {KINDS[kind].parameters} numbers for {kind!r}, got {len(parameters)}")
    if kind == "leaky_relu" and not parameters[0] >= 0:
        raise ValueError(f"{_OP}: the slope must be at least 0, so that y tells the sign of x, got {parameters[0]!r}")
    if backend == REFERENCE:
        y = reference.activation(x, kind, *parameters)
        return x.copy_(y) if inplace else y
    if backend != "auto":
        resolve(_OP, backend, x.device, KERNELS)
    given = [float(p) for p in parameters]
    if inplace:
        _OPS.forward_(x, kind, given)
        return x
    return _OPS.forward(x, kind, given)


def _forward(x, kind, parameters):
    return KINDS[kind].forward(x, *parameters)


def _forward_(x, kind, parameters):
    KINDS[kind].forward_(x, *parameters)


def _backward(grad_y, saved, kind, parameters):
    return KINDS[kind].first(grad_y, saved, *parameters)


# Where each device type's kernel is registered, and whether it has gelu's f' (erf, for which the CPU's has no vector code).
_KERNEL_OF = {"cpu": ("sib_fast", False), "cuda": ("sib_fast", True)}


def _double_backward_fused(u, grad_y, saved, kind, parameters, need_grad_y, need_saved):
    """Both parts in one pass."""
    namespace, has_erf = _KERNEL_OF[saved.device.type]
    u, grad_y, saved = _laid_out_alike(u, grad_y, saved)
    rule = KINDS[kind]
    a, b, *_ = *parameters, 0.0, 0.0
    apart = need_grad_y and kind == "gelu" and not has_erf
    to_grad_y, to_saved = getattr(torch.ops, namespace)._activation_double_backward(
        u, grad_y, saved, rule.kernel, a, b, need_grad_y and not apart, need_saved
    )
    return rule.first(u, saved, *parameters) if apart else to_grad_y, to_saved


def _double_backward_composed(u, grad_y, saved, kind, parameters, need_grad_y, need_saved):
    """Both parts by PyTorch's ops, for devices without a kernel."""
    rule = KINDS[kind]
    u, grad_y, saved = _laid_out_alike(u, grad_y, saved)
    to_grad_y = rule.first(u, saved, *parameters) if need_grad_y else u.new_empty((0,))
    if not need_saved:
        return to_grad_y, u.new_empty((0,))
    wide = _checks.accumulation_dtype(saved.dtype)
    product = u.to(wide) * grad_y.to(wide)
    return to_grad_y, rule.second(product, saved.to(wide), *parameters).to(saved.dtype)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or _is_channels_last(x) else x.contiguous()


def _laid_out_alike(u: Tensor, grad_y: Tensor, saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three contiguous, or all channels last as `saved` is; no copy of what lies so already."""
    if saved.is_contiguous() or not _is_channels_last(saved):
        return u.contiguous(), grad_y.contiguous(), saved.contiguous()
    u, grad_y = (t if _is_channels_last(t) else t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (u, grad_y))
    return u, grad_y, saved


for _name, _function in (("forward", _forward), ("forward_", _forward_), ("backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sib_fast_activation::{_name}", _function, lib=_LIBRARY)
_LIBRARY.impl("double_backward", _double_backward_composed, "CompositeExplicitAutograd")
for _name in _KERNEL_OF:
    if _extension.MISSING[_name] is None:
        _LIBRARY.impl("double_backward", _double_backward_fused, _name.upper())


@torch.library.register_fake("sib_fast_activation::double_backward", lib=_LIBRARY)
def _fake_double_backward(u, grad_y, saved, kind, parameters, need_grad_y, need_saved):
    return tuple(torch.empty_like(_dense(saved)) if need else u.new_empty((0,)) for need in (need_grad_y, need_saved))


def _setup_forward(ctx, inputs, output):
    x, kind, parameters = inputs
    ctx.kind, ctx.parameters = kind, parameters
    ctx.save_for_backward(output if KINDS[kind].saves_result else x)
    ctx.set_materialize_grads(False)


def _autograd_of_forward(ctx, grad_y):
    if grad_y is None:  # nothing came back through f': without this, a pass over zeros
        return None, None, None
    return _OPS.backward(grad_y, *ctx.saved_tensors, ctx.kind, ctx.parameters), None, None


def _setup_backward(ctx, inputs, output):
    grad_y, saved, kind, parameters = inputs
    ctx.kind, ctx.parameters = kind, parameters
    # grad_y matters to the second derivative only through f''.
    ctx.save_for_backward(*((saved,) if KINDS[kind].second is None else (saved, grad_y)))
    ctx.set_materialize_grads(False)


def _autograd_of_backward(ctx, u):
    if u is None:
        return None, None, None, None
    saved, *grad_y = ctx.saved_tensors
    need_grad_y, need_saved = ctx.needs_input_grad[:2]
    if not grad_y:
        return _OPS.backward(u, saved, ctx.kind, ctx.parameters) if need_grad_y else None, None, None, None
    to_grad_y, to_saved = _OPS.double_backward(u, *grad_y, saved, ctx.kind, ctx.parameters, need_grad_y, need_saved)
    return to_grad_y if need_grad_y else None, to_saved if need_saved else None, None, None


def _setup_double_backward(ctx, inputs, output):
    """Nothing is kept: there is no third derivative."""


def _third_derivative(ctx, *_):
    raise NotImplementedError(f"{_OP}: the third derivative exists only with backend='reference'")


for _name, _gradient, _setup in (
    ("forward", _autograd_of_forward, _setup_forward),
    ("backward", _autograd_of_backward, _setup_backward),
    ("double_backward", _third_derivative, _setup_double_backward),
):
    torch.library.register_autograd(f"sib_fast_activation::{_name}", _gradient, setup_context=_setup, lib=_LIBRARY)


class _InPlace(torch.autograd.Function):
    """The graph of forward_, at the dispatcher's Autograd key: dynamo sees the op, not this Function.

    before: x as it was, where the derivative needs it, otherwise None.
    """

    @staticmethod
    def forward(ctx, x, before, kind, parameters):
        ctx.kind, ctx.parameters, ctx.result = kind, parameters, before is None
        with torch._C._AutoDispatchBelowAutograd():
            _OPS.forward_(x, kind, parameters)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x if before is None else before)
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return None, None, None, None
        grad = _OPS.backward(grad_y, *ctx.saved_tensors, ctx.kind, ctx.parameters)
        return (grad, None, None, None) if ctx.result else (None, grad, None, None)


def _forward_with_graph(x, kind, parameters):
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.forward_(x, kind, parameters)
    _InPlace.apply(x, None if KINDS[kind].saves_result else x.clone(), kind, parameters)
    return None


_LIBRARY.impl("forward_", _forward_with_graph, "Autograd")
