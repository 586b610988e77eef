"""An op whose double backward hands the gradient of its input on to its backward, which adds it while writing its own.

In the last pass of a step the input x of a layer has two gradients: to_x, from the double backward of the layer, and grad_x,
from its backward. The engine adds them where they meet, which is at x: two activations read and one written, for each layer.

Here they meet in the layer. Its node gives x out once more, as an output that nobody sees but the node itself, which passes it
to its backward op in the place of x. To the engine to_x is then a cotangent of that output: it arrives with grad_y and is added
by the backward op. Who needs what, which runs first, how often, in which pass, thread or recomputation, and what is left of a
pass that failed: the engine's own bookkeeping of edges, and none of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARIES: dict[str, torch.library.Library] = {}  # a registration lives as long as its library


def register_autograd_with_handover(namespace: str, name: str, backward: Callable, setup_context: Callable) -> None:
    """torch.library.register_autograd for an op (x, ...) -> a tuple of tensors, with two differences.

    setup_context(ctx, inputs, output): inputs[0] is x as the node gives it out; it must be saved and given to the backward op.
    backward(ctx, *gradients): one more gradient, the last, what was handed over for x. It goes to x with the rest, or alone.

    An autograd.Function at the dispatcher's Autograd key, as torch.library's own are: dynamo sees the op only. Not
    register_autograd, since an op cannot return its input.
    """
    op = getattr(getattr(torch.ops, namespace), name).default

    def below(arguments: tuple, keyset: torch._C.DispatchKeySet) -> tuple:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *arguments: Any) -> tuple:
        x, *rest, keyset = arguments
        output = below((x, *rest), keyset)
        # Not where x needs no gradient: what is given out would ask for one.
        own = x.detach() if x.requires_grad else None
        setup_context(ctx, (x if own is None else own, *rest), output)
        return *output, own

    def with_graph(keyset: torch._C.DispatchKeySet, *arguments: Any) -> tuple:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments, keyset)[:-1]
        return below(arguments, keyset)

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *gradients: (*backward(ctx, *gradients), None)),
    }
    # Named as torch.library names them: network_checks takes what is named otherwise for a Function of the user's.
    function = type(f"GeneratedBackwardFor_{namespace}_{name}_default", (torch.autograd.Function,), members)
    library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    library.impl(name, with_graph, "Autograd", with_keyset=True)
