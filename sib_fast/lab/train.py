"""``sib-fast train``: one network, plain or S-IB, on one of the data sets; a thin recipe over Lightning.

Importing this module needs no extra: Lightning and torchvision are imported when a run starts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import errno
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sib_fast import EvidenceLoss, EvidenceTerm, SIBLoss, prepare
from sib_fast._backends import resolve
from sib_fast.lab.networks import SMALL, NetworkSpec, load_network
from sib_fast.lab.results import Interrupted, environment, remove_partials, report_interrupt, write_atomically
from sib_fast.ops.foreground_mask import KERNELS as MASK_KERNELS

if TYPE_CHECKING:
    from rich.console import Console

    from sib_fast.lab.datasets import LabelledImages

SCHEDULES = ("one_cycle", "cosine", "constant")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp", "ddp_spawn")
_SETTINGS = "settings.json"
_FORMAT = "sib_fast.train.1"
# They change no bit of the result (threads: none that is not lost to rounding), so that --resume may change them.
_FREE_TO_CHANGE = {"out", "root", "workers", "threads", "strategy", "progress"}
_DIGITS_ONLY = ("train_size", "test_size", "correlation")

RECIPES: dict[str, dict[str, Any]] = {
    # docs/demo.md says how these were found
    "digits": {
        "data": "digits",
        "arch": "small_conv_net",
        "image_size": 32,
        "epochs": 50,
        "batch_size": 32,
        "lr": 3e-3,
        "weight_decay": 1e-2,
        "schedule": "one_cycle",
        "lambda_fg": 1.0,
        "lambda_bg": 1e6,
        "window_size": 7,
        "objective": "expm1",
    },
    # The authors' script; its schedule is in a file that they did not publish.
    "paper-dogs": {
        "data": "dogs",
        "arch": "resnet50",
        "image_size": 224,
        "augment": False,
        "normalise": (0.5, 0.5),
        "epochs": 90,
        "batch_size": 97,
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "schedule": "constant",
        "seed": 43,
        "lambda_fg": 0.01,
        "lambda_bg": 1000.0,
        "window_size": 31,
        "objective": "exp",
    },
}


@dataclass(frozen=True)
class SIBOptions:
    """What makes a training S-IB; the arguments of :class:`sib_fast.SIBLoss` with its defaults, and three more.

    Not `train_in_eval_mode`: the networks trained here are in training mode.

    Attributes:
        lambda_bg: None is SIBLoss's default.
        layer: name of the layer whose feature map takes the image's place, as ``SIBLoss.attach`` takes it.
        prepare: give the network the package's layers, whose second derivative is faster.
        true_masks: the data's masks in the place of the loss's own.
        evidence, evidence_form, evidence_weight: of a :class:`sib_fast.EvidenceTerm` beside the S-IB terms; alone, at about the
            price of a plain step, where both lambdas are 0.
    """

    lambda_fg: float = 0.01
    lambda_bg: float | None = None
    scalar: str = "energy"
    normalise_cotangent: bool = False
    estimator: str = "hsic_biased"
    background: str = "variance"
    objective: str = "exp"
    mask: str = "density"
    window_size: int = 31
    temperature: float = 0.1
    slope: float = 10.0
    quantiles: tuple[float, ...] = (0.05, 0.95, 0.8, 0.8)
    vjp_scale: float | None = None
    gather: bool = False
    backend: str = "auto"
    every: int = 1
    every_weight: str = "sum"
    layer: str | None = None
    prepare: bool = True
    true_masks: bool = False
    evidence: str | None = None
    evidence_form: str = "rectified"
    evidence_weight: float = 1.0

    def criterion(self, label_smoothing: float = 0.0, accumulation_steps: int = 1) -> SIBLoss | EvidenceLoss:
        """A new criterion. Errors: as :class:`sib_fast.SIBLoss`."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("layer", "prepare", "true_masks", "evidence_form", "evidence_weight"):
            del arguments[name]
        if self.evidence is not None:
            term = {"evidence": self.evidence_form, "weight": self.evidence_weight}
            if self.lambda_fg == 0 == self.lambda_bg:
                return self._evidence_alone(term, label_smoothing, accumulation_steps)
            arguments["evidence"] = EvidenceTerm(self.evidence, **term)
        if self.lambda_bg is None:
            del arguments["lambda_bg"]
        base_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        return SIBLoss(**arguments, base_loss=base_loss, accumulation_steps=accumulation_steps)

    def _evidence_alone(self, term: dict[str, Any], label_smoothing: float, accumulation_steps: int) -> EvidenceLoss:
        for name in ("layer", "true_masks"):
            if getattr(self, name) and not (name == "true_masks" and self.evidence == "share"):
                raise ValueError(
                    f"train: {name} must not be given with evidence {self.evidence} alone, got {getattr(self, name)!r}"
                )
        shared = ("window_size", "temperature", "slope", "quantiles", "gather", "backend", "every", "every_weight")
        return EvidenceLoss(
            self.evidence,
            **term,
            **{name: getattr(self, name) for name in shared},
            base_loss=nn.CrossEntropyLoss(label_smoothing=label_smoothing),
            accumulation_steps=accumulation_steps,
        )

    def attach(self, criterion: SIBLoss | EvidenceLoss, model: nn.Module) -> None:
        if isinstance(criterion, SIBLoss):
            criterion.attach(model, self.layer)
        else:
            criterion.attach(model)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that one network depends on; each field is an option of ``sib-fast train``.

    Attributes:
        data, root: of :func:`sib_fast.lab.datasets.open_dataset`; its train part is trained on, its test part validated on.
        arch: as :func:`sib_fast.lab.networks.build_network` takes it.
        sib: None trains plainly.
        out: folder for everything that the run writes.
        width: channels of the first layer of a small architecture, None for its default.
        normalise: (mean, standard deviation) of every channel in the place of the data's own.
        augment: random crops and flips of the training images.
        epochs, batch_size, lr, weight_decay: AdamW. ``batch_size`` images on every device.
        accumulate: batches whose gradients make one step.
        schedule: ``"one_cycle"`` or ``"cosine"`` with ``lr`` as peak, or ``"constant"``.
        warm_up_epochs: of ``"cosine"``: the rate rises linearly.
        ema: decay of an exponential moving average of the weights, which is then validated and saved; None: none.
        precision: Lightning's; parameters stay in float32, or float64.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``, which is resolved at once.
        devices, strategy: processes, and how Lightning starts them.
        workers: processes that load images, on every device.
        threads: of torch's pool, for the run only; None leaves the pool as it is.
        seed: fixes initial weights, order of the images, augmentation, dropout, and the embedded data.
        train_size, test_size, correlation: of the embedded data.
        progress: show progress bars.

    Errors:  ValueError, naming the option, for a value out of range.
    """

    data: str = "digits"
    root: Path | None = None
    arch: str = "resnet18"
    sib: SIBOptions | None = SIBOptions()
    out: Path = Path("runs/train")
    width: int | None = None
    image_size: int = 224
    normalise: tuple[float, float] | None = None
    augment: bool = False
    epochs: int = 50
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    schedule: str = "one_cycle"
    warm_up_epochs: float = 0.0
    ema: float | None = None
    precision: str = "32-true"
    device: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    workers: int = 0
    threads: int | None = None
    seed: int = 0
    train_size: int = 512
    test_size: int = 1000
    correlation: float = 0.4
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "root", None if self.root is None else Path(self.root))
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        for name, known in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("device", ("auto", "cpu", "cuda")),
            ("strategy", STRATEGIES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"train: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "devices",
            "image_size",
            "train_size",
            "test_size",
            "width",
            "threads",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"train: {name} must not be negative, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"train: lr must be positive and finite, got {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"train: weight_decay must be finite and not negative, got {self.weight_decay}")
        for name in ("label_smoothing", "ema"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.warm_up_epochs < self.epochs:
            raise ValueError(f"train: warm_up_epochs must be in [0, epochs), got {self.warm_up_epochs} of {self.epochs}")
        if self.warm_up_epochs and self.schedule != "cosine":
            raise ValueError(f"train: warm_up_epochs must come with schedule cosine, got {self.schedule}")
        if self.normalise is not None and not (len(self.normalise) == 2 and self.normalise[1] > 0):
            raise ValueError(f"train: normalise must be a mean and a positive standard deviation, got {self.normalise}")
        if self.width is not None and self.arch not in SMALL:
            raise ValueError(f"train: width must come with arch {' or '.join(SMALL)}, got arch {self.arch!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("train: device must be usable, got 'cuda' where torch.cuda.is_available() is False")
        if self.device == "cuda" and self.devices > torch.cuda.device_count():
            raise ValueError(f"train: devices must not exceed this machine's {torch.cuda.device_count()}, got {self.devices}")
        if self.device == "cpu" and self.precision == "16-mixed":
            raise ValueError("train: precision must not be 16-mixed on the CPU: use bf16-mixed")

    @classmethod
    def from_flat(cls, settings: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`flat`; what is left out has its default."""
        own, sib = ({f.name for f in dataclasses.fields(c)} for c in (cls, SIBOptions))
        options = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items() if name != "method"
        }
        plain = settings.get("method", "sib") == "plain"
        chosen = None if plain else SIBOptions(**{name: value for name, value in options.items() if name in sib})
        return cls(**{name: value for name, value in options.items() if name in own}, sib=chosen)

    def flat(self) -> dict[str, Any]:
        """Method, fields and S-IB options as JSON keeps them."""
        fields = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items() if name != "sib"}
        flat = {"method": "plain" if self.sib is None else "sib", **fields, **(vars(self.sib) if self.sib else {})}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def criterion(self) -> nn.Module:
        """A new criterion, not attached. Errors: as :class:`sib_fast.SIBLoss`."""
        if self.sib is None:
            return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)
        return self.sib.criterion(self.label_smoothing, self.accumulate)

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps, all of the same number of images; what is left over takes part in another epoch's order."""
        return images // self.devices // self.batch_size // self.accumulate

    def open(self, split: str) -> LabelledImages:
        """Errors: as :func:`sib_fast.lab.datasets.open_dataset`."""
        from sib_fast.lab.datasets import open_dataset

        options: dict[str, Any] = {}
        if self.data == "digits":
            size = self.train_size if split == "train" else self.test_size
            options = {"size": size, "correlation": self.correlation, "seed": self.seed}
        augment = self.augment and split == "train"
        return open_dataset(self.data, self.root, split, image_size=self.image_size, augment=augment, **options)


# ---- a run ----------------------------------------------------------------------------------------------------------


def run(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> NetworkSpec:
    """Train; ``config.out`` then holds ``network.pt``, ``best.pt``, ``logs/``, ``checkpoints/last.ckpt``, ``settings.json``.

    All of it is there, for what has been trained so far, after every epoch. ``resume=True`` goes on after the last finished
    epoch; on the CPU the result then has the bits of a run that was never interrupted.

    Returns: what ``network.pt`` says about itself; ``training["val_accuracy"]`` among it.
    Errors:  ValueError for settings that do not fit each other, the data or the run to be resumed, before any training;
             FileNotFoundError for missing data; ImportError without the lab extra; OSError when the disk is full;
             Interrupted, whose text says what is kept, when the user interrupts.
    """
    console = console or _console()
    with _threads(config.threads):
        backend = _check_backend(config)
        train, val = _open_data(config)
        spec = _spec(config, train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = spec.build()
            _rehearse(config, model)
        from lightning.pytorch.utilities import rank_zero_only

        from sib_fast.lab.recipe import CHECKPOINT, LOG, train_network

        main_process = rank_zero_only.rank == 0  # Lightning starts this function once more for every further device
        if main_process:
            _claim_folder(config, resume, backend)
            if config.progress:
                method = "plain" if config.sib is None else "S-IB"
                console.print(f"{method} {config.arch} on {config.data}, {len(train)} images, {config.epochs} epochs …")
        go_on = resume and (config.out / CHECKPOINT).is_file()
        try:
            train_network(config, spec, model, config.criterion(), train, val, go_on)
        except KeyboardInterrupt as error:
            raise Interrupted(_kept(config) if main_process else "") from error
        except BaseException as error:
            if main_process:
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                reason = "a full disk" if full else type(error).__name__
                console.print(f"train: stopped by {reason}. {_kept(config)}", soft_wrap=True)
            raise
    spec, _ = load_network(config.out / "network.pt")
    if main_process:
        accuracy = spec.training["val_accuracy"]
        console.print(f"validation accuracy {accuracy:.4f}; network: {config.out / 'network.pt'}", soft_wrap=True)
        console.print(f"best epoch's: {config.out / 'best.pt'}; log: {config.out / LOG}", soft_wrap=True)
    return spec


def _console() -> Console:
    try:
        import lightning  # noqa: F401
        import tensorboard  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f"train: needs the lab extra, got {error}; pip install 'sib_fast[lab]'") from error
    return Console(highlight=False)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_backend(config: TrainConfig) -> str:
    """The backend that will run the S-IB ops. Errors: ValueError for one that cannot, or for what SIBLoss refuses."""
    if config.sib is None:
        return "none"
    criterion = config.sib.criterion()
    smallest = max((getattr(role, "minimum_batch", 1) for role in criterion._roles()), default=1)
    if config.batch_size < smallest:
        raise ValueError(f"train: batch_size must be at least {smallest} for S-IB, got {config.batch_size}")
    if config.sib.gather and config.devices == 1:
        raise ValueError("train: gather must come with more than one device, got devices 1")
    try:
        return resolve("train", config.sib.backend, torch.device(config.device), MASK_KERNELS)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _open_data(config: TrainConfig) -> tuple[LabelledImages, LabelledImages]:
    if config.data != "digits":
        for name in _DIGITS_ONLY:
            if getattr(config, name) != getattr(TrainConfig, name):
                raise ValueError(f"train: {name} must come with data digits, got data {config.data!r}")
    elif config.augment:
        raise ValueError("train: augment must not be given with data digits, whose images are random compositions")
    train, val = (config.open(split) for split in ("train", "test"))
    if config.sib is not None and config.sib.true_masks and not train.has_masks:
        raise ValueError(f"train: true_masks must come with data that has masks, got data {config.data!r}")
    if config.steps_per_epoch(len(train)) < 1:
        needed = f"{config.batch_size} x {config.accumulate} x {config.devices}"
        raise ValueError(
            f"train: batch_size x accumulate x devices must not exceed the {len(train)} training images, got {needed}"
        )
    return train, val


def _spec(config: TrainConfig, data: LabelledImages) -> NetworkSpec:
    options: dict[str, Any] = {} if config.width is None else {"width": config.width}
    if config.arch in ("googlenet", "inception_v3"):
        # their training mode returns a tuple for the auxiliary losses; init_weights unset would warn
        options = {"aux_logits": False, "init_weights": True}
    if config.arch.startswith("vit_"):
        options = {"image_size": config.image_size}
    mean, std = data.mean, data.std
    if config.normalise is not None:
        mean, std = ((float(v),) * 3 for v in config.normalise)
    # notes are strings and numbers
    notes = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in config.flat().items()
        if value is not None
    }
    return NetworkSpec(config.arch, tuple(data.classes), config.image_size, mean, std, options, notes)


def _rehearse(config: TrainConfig, model: nn.Module) -> None:
    """A loss of a copy, on noise: what does not fit the network says so now, not after a data set has been read for hours."""
    if config.sib is not None:  # the processes whose images could be gathered do not exist yet
        config = dataclasses.replace(config, sib=dataclasses.replace(config.sib, gather=False))
    probe, criterion = copy.deepcopy(model).train(), config.criterion()
    roles = criterion._roles() if config.sib is not None else ()
    count = max((2, *(getattr(role, "minimum_batch", 2) for role in roles)))
    x, target = torch.randn(count, 3, config.image_size, config.image_size), torch.zeros(count, dtype=torch.int64)
    try:
        if config.sib is not None:
            config.sib.attach(criterion, prepare(probe) if config.sib.prepare else probe)
        criterion(probe(x), target)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"train: arch must take S-IB or plain steps at image_size {config.image_size}, got {reason}") from error


def _claim_folder(config: TrainConfig, resume: bool, backend: str) -> None:
    path, settings = config.out / _SETTINGS, config.flat()
    if resume:
        earlier = stored_settings(config.out)
        free = _FREE_TO_CHANGE | ({"epochs"} if config.schedule == "constant" else set())
        for name in ["method", *sorted((earlier.keys() | settings.keys()) - free)]:
            if earlier.get(name) != settings.get(name):
                raise ValueError(
                    f"train: resume needs the earlier run's settings, {name} {earlier.get(name)!r}, got {settings.get(name)!r}"
                )
        remove_partials(config.out)
    elif path.exists():
        raise ValueError(f"train: out must be a new folder, got {config.out}, which holds a run: --resume goes on with it")
    config.out.mkdir(parents=True, exist_ok=True)
    where = environment(torch.get_num_threads(), config.device, backend)
    document = {"format": _FORMAT, "settings": settings, "environment": where}
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())


def stored_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in a folder, as :meth:`TrainConfig.flat` has them. Errors: ValueError where there is none."""
    try:
        document = json.loads((out / _SETTINGS).read_text())
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r}")
        return document["settings"]
    except FileNotFoundError as error:
        raise ValueError(f"train: resume needs an earlier run in {out}, got no {_SETTINGS} there") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"train: {out / _SETTINGS} must be written by this version, got {error}") from error


def _kept(config: TrainConfig) -> str:
    """What a run that was cut short leaves, and how to go on."""
    from sib_fast.lab.recipe import CHECKPOINT

    finished = (config.out / CHECKPOINT).is_file()
    holds = "the network and the checkpoint of the latest finished epoch" if finished else "no finished epoch yet"
    return f"{config.out} holds {holds}; sib-fast train --resume --out {config.out} goes on from there."


# ---- the command line -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sib-fast train``. One that is not given is absent from the result, so that recipes can tell."""
    own = parser.add_argument_group("network and data")
    training = parser.add_argument_group("training")
    machine = parser.add_argument_group("machine")
    sib = parser.add_argument_group("S-IB (see sib_fast.SIBLoss)")
    defaults = vars(TrainConfig()) | vars(SIBOptions())

    def option(group: Any, name: str, text: str, kind: Any = None, **kwargs: Any) -> None:
        value = defaults[name]
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if isinstance(value, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= {"type": kind, "metavar": kwargs.get("metavar", name.rpartition("_")[2].upper())}
        text += "" if value is None or isinstance(value, bool) else f" (default: {shown})"
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS, help=text, **kwargs)

    method = parser.add_mutually_exclusive_group()
    method.add_argument("--sib", dest="method", action="store_const", const="sib", help="S-IB training (the default)")
    method.add_argument("--plain", dest="method", action="store_const", const="plain", help="plain training")
    parser.set_defaults(method=None)
    parser.add_argument(
        "--recipe", choices=RECIPES, help="named settings, which options override (default: digits with data digits, else none)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder; it has its settings there")
    option(parser, "out", "folder for network, logs and checkpoint", Path, metavar="FOLDER")

    option(own, "data", "digits, folder, pets, voc, dogs or cub", str, metavar="NAME")
    option(own, "root", "folder of the data, docs/data.md", Path, metavar="FOLDER")
    option(own, "arch", f"{', '.join(SMALL)} or a classification network of torchvision", str, metavar="NAME")
    option(own, "width", "channels of the first layer of a small architecture", int)
    option(own, "image_size", "height and width of the images", int)
    option(own, "normalise", "of every channel, in the place of the data's own", float, nargs=2, metavar=("MEAN", "STD"))
    option(own, "augment", "random crops and flips")
    option(own, "train_size", "training images of digits", int)
    option(own, "test_size", "test images of digits", int)
    option(own, "correlation", "excess probability of a digit class's own background", float)

    option(training, "epochs", "passes over the training images", int)
    option(training, "batch_size", "images per step and device", int)
    option(training, "accumulate", "batches that make one step", int)
    option(training, "lr", "AdamW's learning rate, the schedule's peak", float)
    option(training, "weight_decay", "AdamW's", float)
    option(training, "label_smoothing", "of the cross entropy", float)
    option(training, "schedule", ", ".join(SCHEDULES), str, metavar="NAME")
    option(training, "warm_up_epochs", "of schedule cosine", float)
    option(training, "ema", "decay of a moving average of the weights", float)
    option(training, "seed", "of everything random", int)

    option(machine, "precision", ", ".join(PRECISIONS), str, metavar="NAME")
    option(machine, "device", "auto, cpu or cuda", str, metavar="NAME")
    option(machine, "devices", "processes, each with a device", int)
    option(machine, "strategy", f"how Lightning starts them: {', '.join(STRATEGIES)}", str, metavar="NAME")
    option(machine, "workers", "processes that load images, per device", int)
    option(machine, "threads", "torch threads", int)
    option(machine, "progress", "progress bars")

    option(sib, "lambda_fg", "weight of the foreground term", float)
    option(sib, "lambda_bg", "weight of the background term", float)
    option(sib, "scalar", "that the VJP is taken of", str)
    option(sib, "normalise_cotangent", "every image's VJP counts alike, however sure the network is of it")
    option(sib, "estimator", "dependence estimator of the foreground term", str)
    option(sib, "background", "background term: variance, hsic or relative_variance", str)
    option(sib, "objective", "exp, expm1 or linear", str)
    option(sib, "mask", "how the mask is made of the VJP", str)
    option(sib, "true_masks", "the data's masks in its place")
    option(sib, "window_size", "side of the mask's density window, odd", int)
    option(sib, "temperature", "of the mask's soft quantiles", float)
    option(sib, "slope", "of the mask's sigmoids", float)
    option(sib, "quantiles", "of the mask", float, nargs=4, metavar=("LO", "HI", "GATE", "AREA"))
    option(sib, "vjp_scale", "power of two, for 16-mixed", float)
    option(sib, "gather", "statistics over the images of all devices")
    option(sib, "backend", "of the ops: auto, reference, triton, cuda or cpu", str, metavar="NAME")
    option(sib, "every", "S-IB at every k-th step only", int)
    option(sib, "every_weight", "sum or mean", str)
    option(sib, "layer", "take the VJP at this layer's output", str, metavar="NAME")
    option(
        sib, "evidence", "area or share: a term on the evidence at the last map; alone with both lambdas 0", str, metavar="KIND"
    )
    option(sib, "evidence_form", "rectified, absolute or squared", str)
    option(sib, "evidence_weight", "of that term", float)
    option(sib, "prepare", "the package's layers, whose second derivative is faster")


def settings(args: argparse.Namespace) -> TrainConfig:
    """Of a parsed command line. Errors: ValueError for options that contradict each other or a resumed run."""
    given = {name: value for name, value in vars(args).items() if name in _NAMES and value is not None}
    base = stored_settings(given.get("out", TrainConfig.out)) if args.resume else {}
    if (base | given).get("method") == "plain":
        for field in dataclasses.fields(SIBOptions):
            if field.name in given:
                raise ValueError(f"train: {field.name} must not be given for plain training, got {given[field.name]!r}")
    recipe = args.recipe
    if recipe is None and not args.resume and given.get("data", "digits") == "digits":
        recipe = "digits"
    return TrainConfig.from_flat(base | RECIPES.get(recipe, {}) | given)


_NAMES = {"method"} | {f.name for c in (TrainConfig, SIBOptions) for f in dataclasses.fields(c) if f.name != "sib"}


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0, 2 for bad options, 1 for a full disk, 130 if interrupted."""
    try:
        run(settings(args), resume=args.resume)
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"sib-fast train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sib-fast train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return report_interrupt("train", error)
    return 0
