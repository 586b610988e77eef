"""Derivatives of registered ops: each gradient is a call of the next op, and the double backward has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def register_derivatives(
    namespace: str, derivatives: Sequence[tuple[str, Callable, Callable | None]], library: torch.library.Library | None = None
) -> None:
    """(op, its gradient, what the gradient's context keeps of inputs and output or None), for ops of torch.ops.<namespace>."""
    for name, gradient, setup in derivatives:
        torch.library.register_autograd(f"{namespace}::{name}", gradient, setup_context=setup, lib=library)


def no_third_derivative(op: str) -> Callable:
    """The gradient of a double backward. Nothing is kept for it."""

    def refuse(ctx, *_):
        raise NotImplementedError(f"{op}: the third derivative exists only with backend='reference'")

    return refuse
