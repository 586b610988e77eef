"""Parts of a network by name: what is frozen, and what learns at a rate of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sib_fast.lab.config import TrainConfig

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
_NORMS = nn.modules.batchnorm._BatchNorm


def part(op: str, model: nn.Module, name: str, classifier: Iterable[str]) -> list[str]:
    """Names of the parameters that a part has.

    Args:    name: ``"classifier"``; ``"stem"``, what comes before the second layer with weights, unless the network has a module
                   of that name; otherwise a module or a parameter.
    Errors:  ValueError for a name that has no parameters, with those of the network's children.
    """
    names = [n for n, _ in model.named_parameters()]
    found = [n for n in names if n == name or n.startswith(f"{name}.")]
    if not found and name == "classifier":
        found = [n for n in names if n in set(classifier)]
    if not found and name == "stem":
        layers = [n for n, m in model.named_modules() if isinstance(m, _WEIGHTED)]
        second = next((i for i, n in enumerate(names) if len(layers) > 1 and n.startswith(f"{layers[1]}.")), 0)
        found = names[:second]
    if not found:
        children = ", ".join(n for n, m in model.named_children() if any(True for _ in m.parameters()))
        raise ValueError(f"train: {op} must name stem, classifier or a part of the network ({children}, …), got {name!r}")
    return found


def freeze(model: nn.Module, parts: Sequence[str], batch_norm: bool, classifier: Iterable[str]) -> None:
    """No gradient for the parameters of these parts and, with batch_norm, for every batch norm's. Errors: as :func:`part`."""
    frozen = {n for name in parts for n in part("freeze", model, name, classifier)}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if batch_norm:
        for module in model.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"train: freeze must leave something to train, got {' '.join(parts)}")


def hold_statistics(model: nn.Module) -> None:
    """Batch norms whose parameters are frozen use their running statistics and leave them alone; `train()` undoes it."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.eval()


def read_rates(parts: Sequence[str]) -> dict[str, float]:
    """Of ``("classifier=1e-3", …)``. Errors: ValueError for what is not NAME=RATE with a positive rate."""
    rates = {}
    for text in parts:
        name, equals, rate = text.partition("=")
        try:
            rates[name] = float(rate)
            if not (name and equals and rates[name] > 0 and math.isfinite(rates[name])):
                raise ValueError
        except ValueError as error:
            raise ValueError(f"train: part_lr must be NAME=RATE with a positive rate, got {text!r}") from error
    return rates


def groups(model: nn.Module, lr: float, parts: Sequence[str], classifier: Iterable[str]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser; a parameter of several parts has the last one's rate, and of none `lr`."""
    rate_of = {name: lr for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in read_rates(parts).items():
        rate_of |= {n: rate for n in part("part_lr", model, name, classifier) if n in rate_of}
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in rate_of:
            found.setdefault(rate_of[name], []).append(parameter)
    # the rate of most of the network first: it is what the log shows
    return [{"params": found[rate], "lr": rate} for rate in sorted(found, key=lambda rate: rate != lr)]


def optimiser_and_schedule(config: TrainConfig, model: nn.Module, classifier: Iterable[str], total_steps: int) -> dict[str, Any]:
    """AdamW and the schedule, as Lightning takes them; every group's own rate is the peak of its schedule."""
    parts = groups(model, config.lr, config.part_lr, classifier)
    optimiser = torch.optim.AdamW(parts, lr=config.lr, weight_decay=config.weight_decay)
    if config.schedule == "constant":
        return {"optimizer": optimiser}
    if config.schedule == "one_cycle":
        rates = [group["lr"] for group in parts]
        schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=total_steps)
    else:
        warm_up = round(total_steps * config.warm_up_epochs / config.epochs)

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total_steps - warm_up)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
