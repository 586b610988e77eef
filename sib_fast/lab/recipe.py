"""What ``sib-fast train`` runs: a Lightning module, and a trainer that keeps to the output folder.

An epoch is a function of the settings and its number alone, so that one cut short can be run again.
"""

from __future__ import annotations

import dataclasses
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sib_fast.lab.annotation import PartlyAnnotated
from sib_fast.lab.fit import quiet
from sib_fast.lab.networks import NetworkSpec, classifier_parameters, save_network
from sib_fast.lab.parts import hold_statistics, optimiser_and_schedule
from sib_fast.lab.results import write_atomically
from sib_fast.lab.transforms import mix, random_backgrounds

if TYPE_CHECKING:
    from sib_fast.lab.config import TrainConfig
    from sib_fast.lab.datasets import LabelledImages
    from sib_fast.masks import GivenMask


CHECKPOINT = Path("checkpoints") / "last.ckpt"
LOG = Path("logs") / "metrics.csv"


class _ProgressBar(RichProgressBar):
    def get_metrics(self, *arguments: object) -> dict[str, object]:
        # the logger's version number is the name of the network, which the line above the bar says already
        return {name: value for name, value in super().get_metrics(*arguments).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning's counts from 0; padded as there, since "Validation" takes its place
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))


def _seed(*key: int) -> None:
    """Python's, numpy's and torch's CPU generators; CUDA's are left alone, since a data set must not disturb them."""
    state = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])  # noqa: NPY002 - what a data set's transforms may draw from
    torch.default_generator.manual_seed(int(state[1]))


class _SeededItems(Dataset[Any]):
    """Items whose random augmentation depends on (seed, epoch, index) alone: not on workers, devices, or a restart.

    spec: its normalisation replaces the data's own.
    """

    def __init__(self, data: LabelledImages, spec: NetworkSpec, seed: int):
        self.data, self.seed = data, seed
        # (image · std + mean − spec.mean) / spec.std
        ours, theirs = ((torch.tensor(s.mean), torch.tensor(s.std)) for s in (spec, data))
        self.scale, self.shift = ((v.view(3, 1, 1)) for v in (theirs[1] / ours[1], (theirs[0] - ours[0]) / ours[1]))
        self.normalise = (spec.mean, spec.std) != (data.mean, data.std)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor | GivenMask]:
        epoch, index = key
        with isolate_rng(include_cuda=False):
            _seed(self.seed, epoch, index)
            image, label, mask = self.data[index]
        return (image * self.scale + self.shift if self.normalise else image), label, mask


class _EpochSampler(DistributedSampler):
    """This process's share of the images as (epoch, index); the order depends on (seed, epoch)."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


class _Data(lightning.LightningDataModule):
    def __init__(self, config: TrainConfig, spec: NetworkSpec, train: LabelledImages, val: LabelledImages):
        super().__init__()
        self.config, self.spec, self.val = config, spec, val
        self.train = train if config.annotated == 1 else PartlyAnnotated(train, config.annotated, config.seed)

    def _loader(self, data: LabelledImages, train: bool) -> DataLoader[Any]:
        config, trainer = self.config, self.trainer
        assert trainer is not None
        # batch norm and S-IB want full batches; validation counts every image, see Training.validation_step
        sampler = _EpochSampler(data, trainer.world_size, trainer.global_rank, train, config.seed, drop_last=train)
        # Lightning tells the sampler its epoch only after it has made the first iterator, whose workers are at work by then
        sampler.set_epoch(len(trainer.lightning_module.rows))
        return DataLoader(
            _SeededItems(data, self.spec, config.seed),
            config.batch_size,
            sampler=sampler,
            drop_last=train,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=config.device == "cuda",
            # every new iterator draws a number, by default from the generator that dropout draws from
            generator=torch.Generator(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val, False)


class Training(lightning.LightningModule):
    """One network, plain or S-IB as the criterion is, and the log of its epochs.

    Attributes: rows: what the loggers got, one dict per finished epoch: means over the epoch's images of every term of the
                criterion, accuracies, validation loss, the learning rate of its last step. It is part of the checkpoint, and
                a resumed run writes its logs anew from it: no gap, nothing twice, whatever the process was doing when it died.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        criterion: nn.Module,
        total_steps: int,
        val_size: int,
        classes: int = 10,
        classifier: frozenset[str] = frozenset(),
    ):
        super().__init__()
        self.config = config
        self.model, self.criterion = model, criterion
        self.total_steps, self.val_size = total_steps, val_size
        self.classes, self.classifier = classes, classifier
        self.rows: list[dict[str, float]] = []
        self.lr = 0.0
        self._sums: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        # here and not earlier: hooks do not travel to the processes of ddp_spawn
        self.config.attach(self.criterion, self.model)

    def teardown(self, stage: str) -> None:
        if self.config.differentiates:
            self.criterion.remove()

    def on_train_epoch_start(self) -> None:
        self._sums.clear()
        hold_statistics(self.model)
        _seed(self.config.seed, self.current_epoch, self.global_rank)
        torch.cuda.manual_seed(torch.initial_seed())  # does nothing without CUDA

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        image, target, mask = batch
        if self.config.random_backgrounds:
            image = random_backgrounds(image, mask, self.config.random_backgrounds)
        kinds = [name for name in ("mixup", "cutmix") if getattr(self.config, name) > 0]
        label = target
        if kinds:
            kind = kinds[int(torch.randint(len(kinds), ()))]
            image, target, mask = mix(kind, getattr(self.config, kind), image, target, self.classes, mask)
        given = {"mask": mask} if self.config.true_masks else {}
        logits = self.model(image)
        loss = self.criterion(logits, target, **given)
        terms = self.criterion.terms if self.config.differentiates else {"loss": loss.detach(), "base": loss.detach()}
        for name, value in terms.items():
            self._count(name, value)
        self._count("train_accuracy", logits.detach().argmax(1) == label)
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train_loss", terms["loss"], prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> None:
        image, target, _ = batch
        logits = self.model(image).float()
        loss = nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=self.config.label_smoothing)
        # the sampler fills up the last processes' shares with images that the first ones have already
        place = batch_index * self.config.batch_size + torch.arange(len(target), device=self.device)
        counted = place * self.trainer.world_size + self.global_rank < self.val_size
        self._count("val_loss", loss, counted)
        self._count("val_accuracy", logits.argmax(1) == target, counted)

    def _count(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Adds to (sum, number), on the device. torchmetrics' MeanMetric either drops NaN or (1.9) the weights, and Lightning's
        own means keep a term of an earlier epoch where S-IB was not active since."""
        weights = torch.ones_like(values, dtype=torch.float64) if counted is None else counted.double()
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def mean(self, name: str) -> float:
        """Over the epoch so far and all processes, which must all ask."""
        total, number = self.trainer.strategy.reduce(self._sums[name].clone(), reduce_op="sum").tolist()
        return total / number

    def on_train_epoch_end(self) -> None:
        means = {name: self.mean(name) for name in self._sums}
        self.rows.append({"epoch": self.current_epoch, "step": self.global_step, "lr": self.lr, **means})
        self._log_row(self.rows[-1])

    def _log_row(self, row: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
            logger.save()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = self.rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rows = checkpoint["rows"]
        for row in self.rows:
            self._log_row(row)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimiser_and_schedule(self.config, self.model, self.classifier, self.total_steps)


class _SaveNetworks(Callback):
    """``network.pt`` after every epoch and ``best.pt`` after one of higher validation accuracy, with the weights that were
    validated. Stands before the weight averaging, which puts the raw weights back when its turn comes."""

    def __init__(self, out: Path, spec: NetworkSpec):
        self.out, self.spec = out, spec

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        accuracy = pl_module.mean("val_accuracy")
        if not trainer.is_global_zero:
            return
        notes = {"epoch": trainer.current_epoch, "val_accuracy": accuracy}
        spec = dataclasses.replace(self.spec, training=self.spec.training | notes)
        save_network(self.out / "network.pt", spec, pl_module.model)
        if accuracy > max((row["val_accuracy"] for row in pl_module.rows), default=-1.0):
            save_network(self.out / "best.pt", spec, pl_module.model)


class _AtomicCheckpoints(TorchCheckpointIO):
    """Lightning writes to the system's temporary folder and moves the file, which between two file systems is a copy onto the
    only checkpoint there is: a kill in its middle would leave none."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), content.getvalue())


def train_network(
    config: TrainConfig,
    spec: NetworkSpec,
    model: nn.Module,
    criterion: nn.Module,
    train: LabelledImages,
    val: LabelledImages,
    resume: bool,
) -> None:
    """Train the model; everything lands in ``config.out``: networks, checkpoint, logs.

    Args:    resume: go on from the checkpoint; the logs are written anew from it.
    Errors:  KeyboardInterrupt when the user interrupts; OSError when the disk is full.
    """
    logs = config.out / LOG.parent
    steps = config.steps_per_epoch(len(train))
    classifier = classifier_parameters(spec) if config.part_lr else frozenset()
    module = Training(config, model, criterion, steps * config.epochs, len(val), len(spec.classes), classifier)
    callbacks: list[Callback] = [_SaveNetworks(config.out, spec)]
    if config.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=config.ema))
    if config.progress:
        callbacks.append(_ProgressBar(leave=False))
    last = {"dirpath": config.out / CHECKPOINT.parent, "filename": CHECKPOINT.stem, "enable_version_counter": False}
    callbacks.append(ModelCheckpoint(**last, save_on_train_epoch_end=True))
    with quiet():
        tensorboard = TensorBoardLogger(logs, name="", version="tensorboard", default_hp_metric=False)
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            accelerator=config.device,
            devices=config.devices,
            strategy=config.strategy,
            precision=config.precision,
            accumulate_grad_batches=config.accumulate,
            # whole groups of accumulated batches: Lightning would end an epoch with a step of fewer
            limit_train_batches=steps * config.accumulate,
            logger=[CSVLogger(logs.parent, name="", version=logs.name, flush_logs_every_n_steps=1), tensorboard],
            default_root_dir=config.out,
            callbacks=callbacks,
            plugins=[_AtomicCheckpoints()],
            use_distributed_sampler=False,
            enable_progress_bar=config.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        if trainer.is_global_zero:
            shutil.rmtree(logs, ignore_errors=True)
            tensorboard.log_hyperparams(spec.training)
        try:
            data = _Data(config, spec, train, val)
            trainer.fit(module, datamodule=data, ckpt_path=config.out / CHECKPOINT if resume else None, weights_only=True)
        except SystemExit as error:
            # Lightning turns an interrupt into an exit
            if trainer.interrupted:
                raise KeyboardInterrupt from error
            raise
