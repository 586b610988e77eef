"""What the tests of several ops do with an op: both derivatives of it, the same numbers elsewhere in memory, threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def second_order(function: Callable, x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """y, its gradients, and the gradients of a function of those: every path of a norm's double backward."""
    g = torch.Generator("cpu").manual_seed(1)

    def drawn(like):
        return torch.randn(like.shape, generator=g, dtype=torch.float64, device="cpu").to(like.device, dtype)

    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    cotangent = drawn(x).requires_grad_()
    present = [t for t in leaves if t is not None]
    y = function(*leaves)
    first = torch.autograd.grad(y, present, cotangent, create_graph=True)
    weights = [drawn(t) for t in first]
    scalar = sum((t * w).sum() for t, w in zip(first, weights, strict=True))
    # grad_bias does not depend on the bias, nor anything on it: it has no second derivative.
    second = torch.autograd.grad(scalar, [cotangent, *(t for t in leaves[:2] if t is not None)])
    return [t.detach() for t in (y, *first, *second)]


def step(maps: Sequence[Tensor], channels: Sequence[Tensor], normalise: Callable) -> list[Tensor]:
    """y, its gradients, and the gradients of those, from x, grad_y, u and weight, bias."""
    x, grad_y, u = maps
    leaf, weight, bias = (t.detach().requires_grad_() for t in (x, *channels))
    cotangent = grad_y.detach().requires_grad_()
    y = normalise(leaf, weight, bias)
    first = torch.autograd.grad(y, (leaf, weight, bias), cotangent, create_graph=True)
    scalars = (first[0], first[1].sum(), first[2].sum())
    second = torch.autograd.grad(scalars, (cotangent, leaf, weight), (u, *(torch.ones_like(s) for s in scalars[1:])))
    return [y.detach(), *(t.detach() for t in first), *second]


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def assert_written_and_threads_change_no_bit(run: Callable[[], Sequence[Tensor]]) -> None:
    """For a test with poisoned memory."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.isfinite(t).all() for t in result)
        assert same_bits(result, results[0])


def at_offset(t: Tensor, offset: int) -> Tensor:
    """t's numbers, `offset` elements behind the start of a buffer whose other elements are NaN; its layout as it is."""
    held = torch.full((t.numel() + 16,), float("nan"), dtype=t.dtype)
    view = held.as_strided(t.shape, t.stride(), offset)
    view.copy_(t)
    return view


def identity_with(backward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A layer that changes nothing and whose gradient is what `backward` makes of y's."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return backward(grad)

    return Layer.apply
