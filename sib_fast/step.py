"""compile_step: forward, VJP, head and loss in one torch.compile region."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel

from sib_fast import _checks
from sib_fast.criterion import Criterion
from sib_fast.loss import SIBLoss
from sib_fast.masks import GivenMask
from sib_fast.network_checks import check_before_compiling, check_module
from sib_fast.nn.convolution import Conv1d, Conv2d, Conv3d

_OP = "compile_step"
# Modes of torch.compile that replay CUDA graphs, whose results the next replay overwrites.
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class StepOutput(NamedTuple):
    """What a compiled step returns: loss 0-d, in the graph; logits [N, K], detached; terms as `SIBLoss.terms`, detached."""

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


def _vjp_leaf(x: Tensor) -> Tensor:
    """A leaf inside the compiled region, which dynamo does not let a traced function make: so it goes into the graph untraced.

    The compiler differentiates with respect to the region's inputs only, so that no gradient of x is computed but the VJP.
    """
    return x.detach().requires_grad_()


def compile_step(model: nn.Module, criterion: SIBLoss, **compile_options: Any) -> CompiledStep:
    """The S-IB training step up to the loss as one compiled function: `step(x, target) -> StepOutput(loss, logits, terms)`.

        step = sib_fast.compile_step(model, criterion)      # model as it is: not itself under torch.compile
        out = step(x, target)
        out.loss.backward()                                 # the optimiser, a GradScaler and hooks of parameters stay yours

    Forward, VJP, head and loss are traced into one graph (fullgraph), so that the second derivative is an ordinary backward
    of compiled code: compiling the model alone cannot be differentiated twice. The criterion may be attached to this model or
    to none; attached or not, x is passed to it explicitly. Where the criterion is not active (validation, a step between with
    `every` > 1) the compiled function is the plain one: forward and base loss.

    A second batch size compiles once more, for all sizes. Up to torch 2.12 every size compiles, unless `prepare` has swapped the
    model's convolutions: torch's own do not trace with symbolic sizes there.

    Shapes:  x [N, C, H, W]; target as SIBLoss takes it; optionally mask, as SIBLoss takes it.
    Scale:   SIBLoss's.
    Args:    compile_options: torch.compile's (backend, mode, options, dynamic). fullgraph is always True. mode="reduce-overhead"
             on a GPU replays the step as CUDA graphs; logits and terms are then copied out, so that they outlive the next step.
             The loss does not: call backward before the next step.
    Errors:  TypeError for a model or criterion of another type; ValueError for fullgraph=False; RuntimeError if this torch
             cannot trace torch.autograd.grad, if the criterion is attached to another model, or if the model cannot be
             differentiated twice inside a compiled region: custom autograd.Functions (their second derivative would be dropped
             in silence), compiled modules, DistributedDataParallel and what `SIBLoss.attach` refuses.
    Source:  SPEC 2-6.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(criterion, Criterion) and criterion.evidence is not None:
        raise RuntimeError(
            f"{_OP}: criterion must have no evidence term, got {criterion.evidence}: its map is captured by a hook, outside of a "
            "compiled region. With EvidenceLoss only the layers above the map are differentiated twice: compile those below, "
            "model.trunk = torch.compile(model.trunk), and leave the step eager"
        )
    if not isinstance(criterion, SIBLoss):
        raise TypeError(f"{_OP}: criterion must be a SIBLoss, got {type(criterion).__name__}")
    if compile_options.pop("fullgraph", True) is not True:
        raise ValueError(
            f"{_OP}: fullgraph must be True, got False: a graph break between the forward pass and the VJP would leave compiled "
            "code that has no second derivative"
        )
    import torch._dynamo.config as dynamo_config

    if not hasattr(dynamo_config, "trace_autograd_ops"):
        raise RuntimeError(
            f"{_OP}: torch must be able to trace torch.autograd.grad (torch._dynamo.config.trace_autograd_ops), got torch "
            f"{torch.__version__}: use the criterion without compiling, or a later torch"
        )
    if isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            f"{_OP}: DistributedDataParallel must not be used: its reducer runs outside the compiled region, and gradients would "
            "not be synchronised. Use SIBLoss.attach with the uncompiled model"
        )
    check_module(_OP, model)
    torch.compiler.allow_in_graph(_vjp_leaf)  # here and not as a decorator: it imports the compiler
    if criterion._attachment is not None and not criterion._attachment.holds(model):
        raise RuntimeError(f"{_OP}: criterion must be attached to this model or to none, got one attached to another model")
    if criterion._attachment is not None and criterion._attachment.of_layer:
        raise RuntimeError(
            f"{_OP}: criterion must be attached to the model's input or to none, got one attached to a layer: call it uncompiled"
        )
    return CompiledStep(model, criterion, compile_options)


def _needs_fixed_sizes(model: nn.Module) -> bool:
    """Up to torch 2.12 the double backward of torch's own convolution does not trace with symbolic sizes; a prepared one does."""
    torchs_own = (m for m in model.modules() if isinstance(m, _ConvNd) and not isinstance(m, (Conv1d, Conv2d, Conv3d)))
    return torch.__version__ < (2, 13) and any(torchs_own)


def _of_its_own(method: Callable) -> Callable:
    """The same method with a code object of its own: dynamo counts recompilations by code object, over all instances."""
    function = method.__func__
    twin = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return MethodType(twin, method.__self__)


class CompiledStep:
    """What `compile_step` returns; call it as step(x, target). model, criterion: as given, to be trained and saved as ever."""

    def __init__(self, model: nn.Module, criterion: SIBLoss, compile_options: dict[str, Any]) -> None:
        self.model, self.criterion = model, criterion
        self._copies_out = compile_options.get("mode") in _CUDA_GRAPH_MODES
        self._checked = False
        fixed = {"dynamic": False} if _needs_fixed_sizes(model) else {}
        self._active = torch.compile(_of_its_own(self._active_step), fullgraph=True, **fixed | compile_options)
        self._plain = torch.compile(_of_its_own(self._plain_step), fullgraph=True, **compile_options)

    def _active_step(self, x: Tensor, target: Tensor, mask: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaf = x if x.requires_grad else _vjp_leaf(x)
        logits = self.model(leaf.clone())  # which it may change in place; a compiler leaves out a copy that nobody changes
        loss = self.criterion.active_loss(logits, target, leaf, mask)
        return loss, logits.detach(), self.criterion.terms

    def _plain_step(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = self.model(x)
        loss = self.criterion.plain_loss(logits, target)
        return loss, logits.detach(), self.criterion.terms

    def __call__(self, x: Tensor, target: Tensor, mask: Tensor | GivenMask | None = None) -> StepOutput:
        _checks.require_tensor(_OP, "x", x)
        if x.is_inference():
            x = x.clone()
        active = self.criterion.active
        if active and not self._checked:
            check_before_compiling(_OP, self.model, x)
            self._checked = True
        if active:
            self.criterion.check_values(target, mask)
        copies_out = self._copies_out and x.is_cuda
        if copies_out:
            torch.compiler.cudagraph_mark_step_begin()
        import torch._dynamo.config as dynamo_config

        with ExitStack() as stack:
            # Around the call and not at import: compilation happens here, and other users' code must not be traced otherwise.
            stack.enter_context(dynamo_config.patch(trace_autograd_ops=True))
            if self.criterion._attachment is not None:
                stack.enter_context(self.criterion._attachment.paused())
            loss, logits, terms = self._active(x, target, mask) if active else self._plain(x, target)
        if copies_out:
            logits, terms = logits.clone(), {name: term.clone() for name, term in terms.items()}
        self.criterion.terms = terms
        if not active:
            self.criterion.warn_if_trained(loss)
        self.criterion.count_call()
        return StepOutput(loss, logits, terms)
