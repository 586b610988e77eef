"""FSDP2: what makes `fully_shard`ed models differentiable twice. Everything else of FSDP2 is used as its documentation says."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn, optim
from torch.distributed.fsdp import FSDPModule

_OP = "allow_double_backward"
_Model = TypeVar("_Model", bound=nn.Module)


def allow_double_backward(model: _Model, optimizer: optim.Optimizer) -> _Model:
    """Keeps the parameters of an FSDP2 model gathered from the VJP to the end of the step. Returns the model.

    By default FSDP2 frees them after the first backward pass, which is the VJP, and the second fails with "data is not
    allocated yet". Kept gathered, they must be freed before the optimiser's step, or the next forward pass would run on
    the old weights: a hook of the optimiser does that. Costs the memory of the gathered parameters between the passes.

    Errors:  TypeError if model was not passed through `fully_shard`, or optimizer is none.
    Source:  pytorch#172543 (set_reshard_after_backward).
    """
    if not isinstance(model, FSDPModule):
        raise TypeError(
            f"{_OP}: model must be an FSDP2 module, got {type(model).__name__}: call torch.distributed.fsdp.fully_shard first"
        )
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(f"{_OP}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    model.set_reshard_after_backward(False)
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def free(*_: Any) -> None:
        for shard in shards:
            shard.reshard()

    optimizer.register_step_pre_hook(free)
    model._sib_fast_double_backward = True
    return model
