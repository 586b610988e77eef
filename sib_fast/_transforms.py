"""Whether a function transform or forward-mode AD is at work: what differentiates by other rules than the ones our ops register.

`torch.func` (vmap, grad, jvp and what is made of them) and `torch.autograd.forward_ad` want a rule of their own for each op. A
registered op without one loses its tangents in silence, so the layers run PyTorch's own there, and an op that is called directly
refuses.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def _depth() -> int:
    return torch._C._functorch.get_dynamic_layer_stack_depth()


# A constant for dynamo, without a node in the graph; it guards the stack of transforms for every graph. torch 2.14 does so by
# itself, 2.11 cannot trace the call. This is what torch.compiler.assume_constant_result sets, which would import dynamo.
_depth._dynamo_marked_constant = True


def transformed() -> bool:
    """Inside a torch.func transform or a dual level."""
    return _depth() > 0 or forward_ad._current_level >= 0


def refuse_transforms(op: str) -> None:
    """Raises NotImplementedError there. Called by every op that has a kernel or a registered derivative, before it runs it."""
    if transformed():
        raise NotImplementedError(
            f"{op}: a kernel must not be used inside torch.func transforms or forward-mode AD, got one without a rule for them. "
            "Call the layer of sib_fast.nn, which runs PyTorch's own there, or backend='reference' where the op has it"
        )
