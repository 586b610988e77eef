"""Training in memory, as the study does it: a Lightning module of a few lines, a log, no checkpoint."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Recipe(lightning.LightningModule):
    """AdamW with a one-cycle schedule; the criterion decides whether this is plain or S-IB training.

    Nothing below knows about S-IB: an attached :class:`sib_fast.SIBLoss` is called as cross entropy is.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, lr: float, weight_decay: float, given_masks: bool = False):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.lr = lr
        self.weight_decay = weight_decay
        self.given_masks = given_masks
        self._values: dict[str, list[Tensor]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        image, target, mask = batch
        extra = {"mask": mask} if self.given_masks else {}
        loss = self.criterion(self.model(image), target, **extra)
        terms = getattr(self.criterion, "terms", {"loss": loss.detach()})
        for name, value in terms.items():
            self._values.setdefault(name, []).append(value)
        return loss

    def on_train_epoch_end(self) -> None:
        # once an epoch: Lightning's log at every step took a tenth of the step of a small network
        self.log_dict({name: torch.stack(values).double().mean() for name, values in self._values.items()})
        self._values.clear()

    def configure_optimizers(self) -> dict[str, object]:
        optimiser = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.lr, total_steps=steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _EpochDone(Callback):
    def __init__(self, tell: Callable[[int], None]):
        self.tell = tell

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.tell(trainer.current_epoch + 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No notes on devices, workers or cloud services for as long as a network trains; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # the number of workers is the user's choice; a log written again on resuming is ours
            for note in ("does not have many workers", "is not empty", "dirpath has changed"):
                warnings.filterwarnings("ignore", message=f".*{note}.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fit(
    model: nn.Module,
    criterion: nn.Module,
    data: Dataset[tuple[Tensor, Tensor, Tensor]],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: str,
    log_folder: Path,
    epoch_done: Callable[[int], None] = lambda epochs: None,
    precision: str = "32-true",
    given_masks: bool = False,
) -> tuple[int, float, dict[str, float]]:
    """Train the model in place, metrics of every epoch in ``log_folder/metrics.csv``.

    Args:    epoch_done: called with the number of finished epochs after each of them.
             precision: Lightning's, e.g. "bf16-mixed". given_masks: hand the data's masks to the criterion.
    Returns: steps taken, seconds they took, and the last epoch's mean of every logged term.
    Errors:  KeyboardInterrupt when the user interrupts.
    """
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator=device,
            devices=1,
            precision=precision,
            logger=CSVLogger(log_folder.parent, name="", version=log_folder.name),
            default_root_dir=log_folder,
            callbacks=[_EpochDone(epoch_done)],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        begin = time.perf_counter()
        try:
            trainer.fit(Recipe(model, criterion, lr, weight_decay, given_masks), loader)
        except SystemExit as error:
            # Lightning turns an interrupt into an exit
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise
        seconds = time.perf_counter() - begin
    terms = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return trainer.global_step, seconds, terms
