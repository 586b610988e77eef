"""activation: PyTorch's activations, with a double backward that is one pass and makes no zeros.

Where f'' is zero almost everywhere, the second derivative has one part, the first derivative's own kernel applied to u. PyTorch
returns an activation-sized tensor of zeros for the other part and adds it to a gradient. Where f'' is not zero, PyTorch
composes the two parts from about ten pointwise ops; here one kernel writes both, on the CPU and on CUDA.

Values and first derivatives are PyTorch's own, to the bit. Where f has two slopes (relu, hardtanh, leaky_relu) and a kernel
exists, one bit an element is kept for them, otherwise y. No autograd.Function on the way of a compiled step (see batch_norm).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sib_fast import _checks, _extension
from sib_fast._backends import REFERENCE, automatic, resolve
from sib_fast._transforms import refuse_transforms
from sib_fast.ops._derivatives import no_third_derivative, register_derivatives
from sib_fast.ops.activation import reference

_OP = "activation"
_aten = torch.ops.aten


class _Kind(NamedTuple):
    """f, and what its derivatives need.

    parameters: how many floats f takes. saves_result: f' is known from y = f(x), which the next layer keeps anyway.
    first(grad_y, saved, *parameters) = grad_y·f'. second(product, saved, *parameters) = product·∂f'/∂saved; None where that is
    zero. kernel: number in csrc/common/activation.h; None where there is nothing to fuse. bits: number in
    csrc/common/activation_bits.h, where one bit an element says which of two slopes f' is; otherwise None.
    """

    parameters: int
    saves_result: bool
    forward: Callable[..., Tensor]
    forward_: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., Tensor] | None = None
    kernel: int | None = None
    bits: int | None = None


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
    "relu": _Kind(0, True, _aten.relu, _aten.relu_, lambda g, y: _aten.threshold_backward(g, y, 0), bits=0),
    "hardtanh": _Kind(2, True, _aten.hardtanh, _aten.hardtanh_, _aten.hardtanh_backward, bits=1),
    "leaky_relu": _Kind(
        1,
        True,
        _aten.leaky_relu,
        _aten.leaky_relu_,
        lambda g, y, slope: _aten.leaky_relu_backward(g, y, slope, True),
        bits=2,
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
# Of the CPU's kernels with bits: gcc has vector code for these only by integers, slower than PyTorch's own.
_SLOW_HALVES = {"relu": (torch.float16,), "hardtanh": (torch.float16,), "leaky_relu": (torch.float16, torch.bfloat16)}

_LIBRARY = torch.library.Library("sib_fast_activation", "DEF")
_LIBRARY.define("forward(Tensor x, str kind, float[] parameters) -> Tensor")
_LIBRARY.define("forward_(Tensor(a!) x, str kind, float[] parameters) -> ()")
# The bits lie as y does in memory: a compiler may not hand over a tensor that lies otherwise than the traced one.
for _schema in (
    "forward_bits(Tensor x, str kind, float[] parameters) -> (Tensor y, Tensor bits)",
    "forward_bits_(Tensor(a!) x, str kind, float[] parameters) -> Tensor bits",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.needs_exact_strides,))
# saved: x, y, or where order is given the bits of a tensor whose dimensions lie in that order in memory, outermost first.
_LIBRARY.define("backward(Tensor grad_y, Tensor saved, str kind, float[] parameters, int[]? order=None) -> Tensor")
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
             leaky_relu, sigmoid, tanh) then keep no other tensor alive; the others copy x first, as PyTorch does.
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
        y = reference.activation(x.clone() if inplace else x, kind, *parameters)
        return x.copy_(y) if inplace else y
    if backend != "auto":
        resolve(_OP, backend, x.device, KERNELS)
    refuse_transforms(_OP)
    given = [float(p) for p in parameters]
    if inplace:
        _OPS.forward_(x, kind, given)
        return x
    return _OPS.forward_bits(x, kind, given)[0] if _keeps_bits(x, kind) else _OPS.forward(x, kind, given)


def _keeps_bits(x: Tensor, kind: str) -> bool:
    """Whether there will be a backward that reads bits: without one PyTorch's kernel writes y alone."""
    if not (torch.is_grad_enabled() and x.requires_grad) or KINDS[kind].bits is None:
        return False
    if x.device.type == "cpu" and x.dtype in _SLOW_HALVES[kind]:
        return False
    return automatic(x.device, KERNELS) != REFERENCE


def _forward(x, kind, parameters):
    return KINDS[kind].forward(x, *parameters)


def _forward_(x, kind, parameters):
    KINDS[kind].forward_(x, *parameters)


# Where each device type's kernel is registered, and whether it has gelu's f' (erf, for which the CPU's has no vector code).
_KERNEL_OF = {"cpu": ("sib_fast", False), "cuda": ("sib_fast", True)}


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions of x from the outermost in memory to the innermost; None if its elements do not lie without gaps."""
    order = list(range(x.ndim)) if x.is_contiguous() else sorted(range(x.ndim), key=x.stride, reverse=True)
    return order if _lies(x, order) else None


def _lies(x: Tensor, order: list[int]) -> bool:
    return x.permute(order).is_contiguous()


def _write_bits(x, y, kind, parameters):
    """f(x) into y, which lies as x does without gaps, or is x; returns the bits."""
    a, b, *_ = *parameters, 0.0, 0.0
    namespace, _ = _KERNEL_OF[x.device.type]
    return getattr(torch.ops, namespace)._activation_bits(x, y, KINDS[kind].bits, a, b)


def _forward_bits(x, kind, parameters):
    y = torch.empty_like(x)
    return y, _write_bits(x if _memory_order(x) is not None else y.copy_(x), y, kind, parameters)


def _forward_bits_(x, kind, parameters):
    return _write_bits(x, x, kind, parameters)


def _backward(grad_y, saved, kind, parameters, order=None):
    if order is None:
        return KINDS[kind].first(grad_y, saved, *parameters)
    namespace, _ = _KERNEL_OF[grad_y.device.type]
    slope = parameters[0] if kind == "leaky_relu" else 0.0
    return getattr(torch.ops, namespace)._activation_bits_backward(_laid_out(grad_y, order), saved, KINDS[kind].bits, slope)


def _laid_out(grad: Tensor, order: list[int]) -> Tensor:
    """grad with its dimensions in that order in memory, without gaps; no copy of what lies so already, and no view."""
    if _lies(grad, order):
        return grad
    strides, run = [0] * grad.ndim, 1
    for d in reversed(order):
        strides[d], run = run, run * grad.shape[d]
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


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
for _name, _function in (("forward", _forward), ("forward_", _forward_)):
    torch.library.register_fake(f"sib_fast_activation::{_name}", _function, lib=_LIBRARY)
_LIBRARY.impl("double_backward", _double_backward_composed, "CompositeExplicitAutograd")
for _name in _KERNEL_OF:
    if _extension.MISSING[_name] is None:
        _LIBRARY.impl("double_backward", _double_backward_fused, _name.upper())
        _LIBRARY.impl("forward_bits", _forward_bits, _name.upper())
        _LIBRARY.impl("forward_bits_", _forward_bits_, _name.upper())


@torch.library.register_fake("sib_fast_activation::forward_bits", lib=_LIBRARY)
def _fake_forward_bits(x, kind, parameters):
    return torch.empty_like(x), _fake_forward_bits_(x, kind, parameters)


@torch.library.register_fake("sib_fast_activation::forward_bits_", lib=_LIBRARY)
def _fake_forward_bits_(x, kind, parameters):
    return x.new_empty(((x.numel() + 511) // 512 * 64,), dtype=torch.uint8)


@torch.library.register_fake("sib_fast_activation::backward", lib=_LIBRARY)
def _fake_backward(grad_y, saved, kind, parameters, order=None):
    return _backward(grad_y, saved, kind, parameters) if order is None else torch.empty_like(_laid_out(grad_y, order))


@torch.library.register_fake("sib_fast_activation::double_backward", lib=_LIBRARY)
def _fake_double_backward(u, grad_y, saved, kind, parameters, need_grad_y, need_saved):
    return tuple(torch.empty_like(_dense(saved)) if need else u.new_empty((0,)) for need in (need_grad_y, need_saved))


def _keep(ctx, kind, parameters, saved, order=None):
    """What f' is known from, and for the bits also how they lie."""
    ctx.kind, ctx.parameters, ctx.order = kind, parameters, order
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)  # nothing came back through f': without this, a pass over zeros


def _setup_forward(ctx, inputs, output):
    x, kind, parameters = inputs
    _keep(ctx, kind, parameters, [output if KINDS[kind].saves_result else x])


def _setup_forward_bits(ctx, inputs, output):
    y, bits = output
    ctx.mark_non_differentiable(bits)
    _keep(ctx, *inputs[1:], [bits], _memory_order(y))


def _first_derivative(ctx, grad_y):
    return None if grad_y is None else _OPS.backward(grad_y, *ctx.saved_tensors, ctx.kind, ctx.parameters, ctx.order)


def _autograd_of_forward(ctx, grad_y, _=None):
    return _first_derivative(ctx, grad_y), None, None


def _setup_backward(ctx, inputs, output):
    grad_y, saved, kind, parameters, order = inputs
    # grad_y matters to the second derivative only through f''.
    _keep(ctx, kind, parameters, [saved] if KINDS[kind].second is None else [saved, grad_y], order)


def _autograd_of_backward(ctx, u):
    if u is None:
        return None, None, None, None, None
    need_grad_y, need_saved = ctx.needs_input_grad[:2]
    if KINDS[ctx.kind].second is None:
        return _first_derivative(ctx, u) if need_grad_y else None, None, None, None, None
    saved, grad_y = ctx.saved_tensors
    to_grad_y, to_saved = _OPS.double_backward(u, grad_y, saved, ctx.kind, ctx.parameters, need_grad_y, need_saved)
    return to_grad_y if need_grad_y else None, to_saved if need_saved else None, None, None, None


register_derivatives(
    "sib_fast_activation",
    (
        ("forward", _autograd_of_forward, _setup_forward),
        ("forward_bits", _autograd_of_forward, _setup_forward_bits),
        ("backward", _autograd_of_backward, _setup_backward),
        ("double_backward", no_third_derivative(_OP), None),
    ),
    _LIBRARY,
)


class _InPlace(torch.autograd.Function):
    """The graph of forward_, at the dispatcher's Autograd key: dynamo sees the op, not this Function.

    before: x as it was, where the derivative needs it, otherwise None. order: where bits are kept, x's dimensions in memory.
    """

    of_registered_op = True  # for network_checks

    @staticmethod
    def forward(ctx, x, before, kind, parameters, order):
        with torch._C._AutoDispatchBelowAutograd():
            if order is None:
                _OPS.forward_(x, kind, parameters)
                saved = x if before is None else before
            else:
                saved = _OPS.forward_bits_(x, kind, parameters)
        ctx.mark_dirty(x)
        _keep(ctx, kind, parameters, [saved], order)
        return x

    @staticmethod
    def backward(ctx, grad_y):
        # Through x, whose place in the graph a view's base shares; `before` is a tensor to save, and gets what f'' has for it.
        return _first_derivative(ctx, grad_y), None, None, None, None


def _refused(x: Tensor) -> bool:
    """Whether autograd refuses a write into x: a leaf, a view of one, one of several views that an op returned."""
    if not x._is_view():
        return x.is_leaf
    return x._base.is_leaf or torch._C._autograd._get_creation_meta(x) != torch._C._autograd.CreationMeta.DEFAULT


def _forward_with_graph(x, kind, parameters):
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.forward_(x, kind, parameters)
    rule = KINDS[kind]
    if _refused(x) or (x._is_view() and rule.saves_result and rule.second is not None):
        # By autograd's own write. It refuses before it writes; and a Function that saves what a view has become, and is asked for
        # its derivative, is run twice: by the view's base and by itself.
        x.copy_(_OPS.forward(x, kind, parameters))
        return None
    # A view with gaps has no bits in its memory's order: it is kept itself.
    order = _memory_order(x) if _keeps_bits(x, kind) else None
    _InPlace.apply(x, None if rule.saves_result else x.clone(), kind, parameters, order)
    return None


_LIBRARY.impl("forward_", _forward_with_graph, "Autograd")
