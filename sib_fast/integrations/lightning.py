"""Lightning: a callback that attaches the criterion, logs its terms and refuses what would break it in silence."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from sib_fast import prepare
from sib_fast.criterion import Criterion

_OP = "SIBCallback"


class SIBCallback(Callback):
    """Attaches a LightningModule's SIBLoss or EvidenceLoss to its network for `fit`; logs the terms by the module's own logger.

    The module's `training_step` stays `loss = self.criterion(self.model(x), target)`. With `every` > 1 a step is one of
    `trainer.global_step`: all micro-batches of `accumulate_grad_batches` and all calls of an LBFGS closure, unless the criterion
    was given accumulation_steps > 1. Warns when training starts in eval mode, which Lightning keeps (2.2 and later).

    Args:    criterion, model: names of the two attributes on the LightningModule. prefix: of the logged names. fast: give
             the network the package's layers (`sib_fast.prepare`).
    Errors:  TypeError if the attributes are no criterion and no module; RuntimeError for DDPStrategy(static_graph=True), which
             Lightning's own advice may suggest and with which DDP stops synchronising in silence, and as `SIBLoss.attach`.
    """

    def __init__(self, criterion: str = "criterion", model: str = "model", *, prefix: str = "sib/", fast: bool = True) -> None:
        self._names = (criterion, model)
        self.prefix = prefix
        self.fast = fast
        self._step: AbstractContextManager | None = None  # the criterion's `one_step`, while a step is under way
        self._begun_at = 0

    def _parts(self, module: lightning.LightningModule) -> tuple[Criterion, nn.Module]:
        criterion, model = (getattr(module, name, None) for name in self._names)
        wanted_kinds = ((Criterion, "SIBLoss or EvidenceLoss"), (nn.Module, "Module"))
        for name, value, (kind, wanted) in zip(self._names, (criterion, model), wanted_kinds, strict=True):
            if not isinstance(value, kind):
                raise TypeError(
                    f"{_OP}: {type(module).__name__}.{name} must be a {wanted}, got {type(value).__name__}: name the "
                    "attributes, SIBCallback(criterion=..., model=...)"
                )
        return criterion, model

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        criterion, model = self._parts(pl_module)
        if stage != "fit":
            return
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
            raise RuntimeError(
                f"{_OP}: DDPStrategy(static_graph=True) must not be used: with a gradient taken before backward it stops "
                "synchronising gradients in silence. Leave static_graph at False, whatever Lightning's log line advises"
            )
        if self.fast:
            prepare(model)
        if not criterion.attached:
            criterion.attach(model)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end_step()
            self._parts(pl_module)[0].remove()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        criterion, model = self._parts(pl_module)
        off = [name for name, part in zip(self._names, (criterion, model), strict=True) if not part.training]
        if self._names[0] in off or (off and not criterion.train_in_eval_mode):
            criterion._warned_of_eval_mode = True  # once is enough
            warnings.warn(
                f"{_OP}: criterion and model must be in training mode for the {criterion._what}, got {' and '.join(off)} in eval "
                "mode, which Lightning keeps: the base loss alone will be trained. Call train() of both before fit; or, to "
                f"fine-tune with frozen batch norm, give {criterion._op}(train_in_eval_mode=True) and leave the "
                "criterion in training mode",
                stacklevel=2,
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        criterion = self._parts(pl_module)[0]
        if self._step is None and criterion.accumulation_steps == 1:
            self._step, self._begun_at = criterion.one_step(), trainer.global_step
            self._step.__enter__()

    def _end_step(self, error: BaseException | None = None) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None if error is None else type(error), error, None)

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        self._end_step(exception)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        terms = {f"{self.prefix}{name}": value for name, value in self._parts(pl_module)[0].terms.items()}
        pl_module.log_dict(terms, batch_size=1)
        if trainer.global_step != self._begun_at:
            self._end_step()
