"""inspect: what `prepare` would change in a model, what it leaves and why, and what cannot be differentiated twice."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sib_fast import network_checks
from sib_fast._copy import copy_of
from sib_fast.nn._others import fast_calls
from sib_fast.nn.prepare import SWAPS, class_below, fast_class, plain_class, prepare

_OP = "inspect"
STATUSES = ("obstacle", "swap", "prepared", "kept")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)

_WHY = {
    nn.Hardsigmoid: "PyTorch's has no second derivative",
    nn.MultiheadAttention: "self-attention without masks and weights becomes products and a fused softmax; any other call stays "
    "PyTorch's, which may run fused attention, without a second derivative",
}
_CALLS = {
    "group_norm": "its forward calls F.group_norm, whose double backward becomes one fused op",
    "layer_norm": "its forward calls F.layer_norm, whose double backward becomes one fused op",
    "scaled_dot_product_attention": "its forward calls F.scaled_dot_product_attention, which becomes products and a fused "
    "softmax; with a mask that is no learned bias it stays PyTorch's, which may have no second derivative",
}


@dataclass(frozen=True)
class Entry:
    """Modules, or ops of the graph, that share one finding.

    status: "obstacle" cannot be differentiated twice; "swap" prepare changes it; "prepared" is fast already; "kept" stays
    PyTorch's or the user's. kind: the class or op. names: where, as `named_modules` says it, empty for what was found in the
    graph. becomes: the class after prepare, otherwise None. why, fix: sentences; fix is empty where there is nothing to do.
    """

    status: str
    kind: str
    names: tuple[str, ...]
    becomes: str | None
    why: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """What `inspect` found. `print(report)` is a table; `as_dict()` is for machines.

    entries: findings, obstacles first. twice_differentiable: the outcome of differentiating the model twice on the example's
    shape, with and (prepared) without its present layers; None if there was no example, or if the model does not run on fake
    tensors, and then error says why.
    """

    entries: tuple[Entry, ...]
    twice_differentiable: bool | None
    twice_differentiable_prepared: bool | None
    error: str | None

    def of(self, status: str) -> tuple[Entry, ...]:
        """The entries of one status."""
        return tuple(entry for entry in self.entries if entry.status == status)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        words = {True: "yes", False: "NO", None: "not tried"}
        rows = [("", "modules", "kind", "becomes", "why")]
        rows += [(e.status, str(len(e.names) or "graph"), e.kind, e.becomes or "", e.why) for e in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for row, entry in zip(rows, (None, *self.entries), strict=True):
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
            lines.append(f"{cells}  {row[4]}".rstrip())
            if entry is not None and entry.fix:
                shown = ", ".join(name or "(root)" for name in entry.names[:3]) + (", …" if len(entry.names) > 3 else "")
                lines.append("    fix: " + entry.fix + (f" [{shown}]" if shown else ""))
        lines.append(f"can be differentiated twice: {words[self.twice_differentiable]}")
        lines.append(f"after sib_fast.prepare(model): {words[self.twice_differentiable_prepared]}")
        if self.error:
            lines.append(f"error: {self.error}")
        return "\n".join(lines)


def inspect(model: nn.Module, example_input: Tensor | None = None) -> Report:
    """Looks at a model and changes nothing: what `prepare` would swap, what it leaves, what has no second derivative.

    With an example the model is also differentiated twice on tensors without data, in training mode, on a copy: nothing is
    computed, and no parameter, buffer, gradient or random state changes. Your forward hooks run on such tensors.

    Shapes:  example_input as the model takes it, on the model's device; only its shape and dtype matter.
    Errors:  TypeError if model is no module or example_input no tensor. What is wrong with the model is in the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if example_input is not None and not isinstance(example_input, Tensor):
        raise TypeError(f"{_OP}: example_input must be a tensor or None, got {type(example_input).__name__}")
    found = list(_in_modules(model))
    outcome = prepared_outcome = error = None
    if example_input is not None:
        outcome, error, in_graph = _differentiate_twice(model, example_input)
        found += in_graph
        prepared_outcome = outcome
        if outcome is False:
            prepared_outcome = _differentiate_twice(prepare(copy_of(model)), example_input)[0]
    merged: dict[tuple, list[str]] = {}
    for entry in found:
        key = (entry.status, entry.kind, entry.becomes, entry.why, entry.fix)
        merged.setdefault(key, []).extend(entry.names)
    entries = [Entry(s, kind, tuple(names), becomes, why, fix) for (s, kind, becomes, why, fix), names in merged.items()]
    entries.sort(key=lambda entry: STATUSES.index(entry.status))
    return Report(tuple(entries), outcome, prepared_outcome, error)


def _name_of(kind: type) -> str:
    module = kind.__module__
    return f"torch.nn.{kind.__name__}" if module.startswith("torch.nn.modules") else f"{module}.{kind.__name__}"


def _in_modules(model: nn.Module) -> Iterator[Entry]:
    for name, module in model.named_modules():
        kind = class_below(module)
        obstacle = network_checks.obstacle_in(module)
        fast = fast_class(kind)
        if fast is not None:
            calls = () if kind in SWAPS else fast_calls(kind)
            why = "; ".join(_CALLS[call] for call in calls) or _WHY.get(kind, "its double backward becomes one fused op")
            yield Entry("swap", _name_of(kind), (name,), _name_of(fast), why)
        elif plain_class(kind) is not None:
            yield Entry("prepared", _name_of(kind), (name,), None, "swapped already")
        elif obstacle is not None:
            why, _, fix = obstacle.partition(". ")
            yield Entry("obstacle", _name_of(kind), (name,), None, why, fix)
        elif isinstance(module, nn.MultiheadAttention):
            why = "may run fused attention, which has no second derivative; an example input tells"
            yield Entry("kept", _name_of(kind), (name,), None, why, "run the forward under sdpa_kernel(SDPBackend.MATH)")
        elif isinstance(module, tuple(SWAPS)):
            parent = next(_name_of(plain) for plain in SWAPS if isinstance(module, plain))
            yield Entry("kept", _name_of(kind), (name,), None, f"a subclass of {parent} has a forward of its own")
        elif isinstance(module, nn.RNNBase):
            why = "on a GPU it is cuDNN's, which has no second derivative"
            fix = "on a GPU run the forward under torch.backends.cudnn.flags(enabled=False)"
            yield Entry("kept", _name_of(kind), (name,), None, why, fix)
        elif isinstance(module, _NORMS):
            yield Entry("kept", _name_of(kind), (name,), None, "right, but its double backward is composed of many ops")
        elif not any(True for _ in module.children()):
            yield Entry("kept", _name_of(kind), (name,), None, "no faster layer here")


def _differentiate_twice(model: nn.Module, example: Tensor) -> tuple[bool | None, str | None, list[Entry]]:
    """(outcome, what went wrong, what the graph shows)."""
    try:
        output, leaf, mode = network_checks.forward_on_fake_tensors(model, example, train=True)
    except Exception as error:
        return None, f"the model does not run on fake tensors: {type(error).__name__}: {str(error)[:300]}", []
    in_graph = []
    for name, message in network_checks.obstacles_in_graph(output.grad_fn, leaf):
        why, _, fix = message.partition(". ")
        in_graph.append(Entry("obstacle", name, (), None, why, fix))
    for name in network_checks.custom_functions(output.grad_fn):
        why = "a custom autograd.Function: right if its backward is made of differentiable operations; compile_step refuses it"
        fix = "register an op, with torch.library.register_autograd on it and on its backward op"
        in_graph.append(Entry("kept", name, (), None, why, fix))
    leaves = [node.variable for node in network_checks.nodes_of(output.grad_fn) if hasattr(node, "variable")]
    weights = [variable for variable in leaves if variable is not leaf]
    try:
        with mode, torch.enable_grad():
            (vjp,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
            torch.autograd.grad(vjp.sum(), weights, allow_unused=True)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if not in_graph or all(entry.status != "obstacle" for entry in in_graph):
            fix = "replace the layer that runs this op, or compose it of others; sib_fast.prepare may do so"
            in_graph.append(Entry("obstacle", "an op without a second derivative", (), None, message, fix))
        return False, None, in_graph
    return True, None, in_graph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a function that makes the model, as module:name, for example torchvision.models:resnet50; or timm:<a name of timm's>"
    parser.add_argument("model", help=what)
    parser.add_argument("--shape", type=int, nargs="+", default=[2, 3, 224, 224], help="of an example input")


def _maker(said: str) -> Callable[[], nn.Module]:
    """The function that the command was given. Errors: ValueError where there is none of this name."""
    module, _, name = said.partition(":")
    try:
        found = importlib.import_module(module)
        if module == "timm" and found.is_model(name):  # its names may have a tag, which no function has
            return functools.partial(found.create_model, name)
        return getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{_OP}: model must name a function that makes it, as torchvision.models:resnet50 or timm:resnet50d, got {said!r}: "
            f"{error}"
        ) from error


def main(args: argparse.Namespace) -> int:
    """`sib-fast inspect`: prints the table; exit status 1 if the model cannot be differentiated twice, prepared or not, and 2 if
    there is no such model."""
    try:
        make = _maker(args.model)
    except ValueError as error:
        print(f"sib-fast {error}", file=sys.stderr)
        return 2
    report = inspect(make(), torch.zeros(args.shape))
    print(report)
    return 0 if report.twice_differentiable_prepared else 1
