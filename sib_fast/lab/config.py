"""What one network of ``sib-fast train`` depends on: its settings, their defaults and limits, and named sets of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sib_fast import EvidenceLoss, EvidenceTerm, SIBLoss, prepare
from sib_fast.lab.networks import SMALL
from sib_fast.lab.parts import read_rates

if TYPE_CHECKING:
    from sib_fast.lab.datasets import LabelledImages

COMPOSED = ("digits", "cutouts")
"""The data sets whose images are put together here, and how many is a setting."""
SCHEDULES = ("one_cycle", "cosine", "constant")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
PARTS = ("sib", "term")
"""Fields of TrainConfig whose own fields are options."""
STRATEGIES = ("auto", "ddp", "ddp_spawn")

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
    """What makes a training S-IB; the arguments of :class:`sib_fast.SIBLoss` with its defaults, and two more.

    Not `train_in_eval_mode`: the networks trained here are in training mode.

    Attributes:
        lambda_bg: None is SIBLoss's default.
        layer: name of the layer whose feature map takes the image's place, as ``SIBLoss.attach`` takes it.
        prepare: give the network the package's layers, whose second derivative is faster.
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

    def criterion(
        self, label_smoothing: float = 0.0, accumulation_steps: int = 1, evidence: EvidenceTerm | None = None
    ) -> SIBLoss:
        """A new criterion. Errors: as :class:`sib_fast.SIBLoss`."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("layer", "prepare"):
            del arguments[name]
        if self.lambda_bg is None:
            del arguments["lambda_bg"]
        base_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        return SIBLoss(**arguments, base_loss=base_loss, accumulation_steps=accumulation_steps, evidence=evidence)


@dataclass(frozen=True)
class EvidenceOptions:
    """A term on the evidence at a feature map, beside S-IB's terms or, in plain training, beside the base loss.

    Attributes:
        evidence: ``"area"`` or ``"share"``, and the others are :class:`sib_fast.EvidenceTerm`'s of the same names:
            evidence_form: ``evidence``. evidence_weight: ``weight``. evidence_at: ``at``. evidence_window: ``window_size``.
            evidence_area: ``target_area``.
        evidence_every: :class:`sib_fast.EvidenceLoss`'s ``every``. Beside S-IB it is 1: S-IB's ``every`` holds for both.
    """

    evidence: str = "area"
    evidence_form: str | None = None
    evidence_weight: float = EvidenceTerm.weight
    evidence_at: str | None = None
    evidence_window: int | None = None
    evidence_area: float = EvidenceTerm.target_area
    evidence_every: int = 1

    def arguments(self, given: bool) -> dict[str, Any]:
        """Of EvidenceTerm and EvidenceLoss. given: every image comes with a mask, so that none has to be made."""
        arguments = {
            "kind": self.evidence,
            "evidence": self.evidence_form,
            "weight": self.evidence_weight,
            "at": self.evidence_at,
            "target_area": self.evidence_area,
        }
        if self.evidence == "share":
            arguments |= {"mask": "given" if given else "density", "window_size": self.evidence_window}
        return arguments


@dataclass(frozen=True)
class TrainConfig:
    """Everything that one network depends on; each field is an option of ``sib-fast train``.

    Attributes:
        data, root: of :func:`sib_fast.lab.datasets.open_dataset`; its train part is trained on, its test part validated on.
        masks: of the data: ``"auto"``, ``"segmentation"`` or ``"box"``.
        arch: as :func:`sib_fast.lab.networks.build_network` takes it.
        init: weights to begin with, as :func:`sib_fast.lab.pretrained.read_weights` takes them; None draws them.
        freeze: parts that do not learn, as :func:`sib_fast.lab.parts.part` names them; their batch norms keep their statistics.
        freeze_batch_norm: the same of every batch norm.
        sib: None trains without S-IB's terms.
        term: on the evidence at a feature map; None: none.
        true_masks: the data's masks in the place of the loss's own.
        annotated: share of the training images whose mask true_masks and random_backgrounds know; for the others the loss keeps
            its own, and they keep their background.
        out: folder for everything that the run writes.
        width: channels of the first layer of a small architecture, None for its default.
        normalise: (mean, standard deviation) of every channel in the place of the data's own, or of those of `init`.
        augment: random crops and flips of the training images.
        mixup, cutmix: parameter of the Beta distribution that the weights of two images are drawn from, see
            :func:`sib_fast.lab.transforms.mix`; 0: off. With both, each batch is one or the other.
        random_backgrounds: share of the training images that get another one's background, by the data's masks, see
            :func:`sib_fast.lab.transforms.random_backgrounds`; before mixing.
        epochs, batch_size, lr, weight_decay: AdamW. ``batch_size`` images on every device.
        accumulate: batches whose gradients make one step.
        part_lr: ``("classifier=1e-3", …)``, rates of parts in the place of ``lr``.
        schedule: ``"one_cycle"`` or ``"cosine"`` with ``lr`` as peak, or ``"constant"``.
        warm_up_epochs: of ``"cosine"``: the rate rises linearly.
        ema: decay of an exponential moving average of the weights, which is then validated and saved; None: none.
        precision: Lightning's; parameters stay in float32, or float64.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``, which is resolved at once.
        devices, strategy: processes, and how Lightning starts them.
        workers: processes that load images, on every device.
        threads: of torch's pool, for the run only; None leaves the pool as it is.
        seed: fixes initial weights, order of the images, augmentation, dropout, which images are annotated, and the data that is
            put together here.
        train_size, test_size, correlation: of the data that is put together here, digits and cutouts.
        progress: show progress bars.

    Errors:  ValueError, naming the option, for a value out of range.
    """

    data: str = "digits"
    root: Path | None = None
    masks: str = "auto"
    arch: str = "resnet18"
    init: str | None = None
    freeze: tuple[str, ...] = ()
    freeze_batch_norm: bool = False
    sib: SIBOptions | None = SIBOptions()
    term: EvidenceOptions | None = None
    true_masks: bool = False
    annotated: float = 1.0
    out: Path = Path("runs/train")
    width: int | None = None
    image_size: int = 224
    normalise: tuple[float, float] | None = None
    augment: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    random_backgrounds: float = 0.0
    epochs: int = 50
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    part_lr: tuple[str, ...] = ()
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
        for name in ("mixup", "cutmix"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"train: {name} must be finite and not negative, got {getattr(self, name)}")
        if self.term is not None and self.sib is not None and self.term.evidence_every != 1:
            raise ValueError(
                f"train: evidence_every must be 1 beside S-IB, whose every holds for both, got {self.term.evidence_every}"
            )
        read_rates(self.part_lr)
        if self.true_masks and not self.reads_masks:
            raise ValueError(
                "train: true_masks must not be given for plain training, got True: masks go with --sib or --evidence share"
            )
        if not 0 <= self.annotated <= 1:
            raise ValueError(f"train: annotated must be in [0, 1], got {self.annotated}")
        if not 0 <= self.random_backgrounds <= 1:
            raise ValueError(f"train: random_backgrounds must be in [0, 1], got {self.random_backgrounds}")
        if self.annotated < 1 and not self.needs_masks:
            raise ValueError(f"train: annotated must come with true_masks or random_backgrounds, got annotated {self.annotated}")
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
        own, sib, term = ({f.name for f in dataclasses.fields(c)} for c in (cls, SIBOptions, EvidenceOptions))
        options = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items() if name != "method"
        }
        plain = settings.get("method", "sib") == "plain"
        chosen = None if plain else SIBOptions(**{name: value for name, value in options.items() if name in sib})
        beside = {name: value for name, value in options.items() if name in term}
        if beside and beside.get("evidence") is None:
            name = min(beside.keys() - {"evidence"}, default="evidence")
            raise ValueError(f"train: {name} must come with evidence area or share, got {beside.get(name)!r}")
        return cls(
            **{name: value for name, value in options.items() if name in own},
            sib=chosen,
            term=EvidenceOptions(**beside) if beside else None,
        )

    def flat(self) -> dict[str, Any]:
        """Method, fields and S-IB options as JSON keeps them."""
        fields = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items() if name not in PARTS
        }
        parts = (vars(part) for part in (self.sib, self.term) if part is not None)
        flat = {"method": "plain" if self.sib is None else "sib", **fields}
        for part in parts:
            flat |= part
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def criterion(self, all_annotated: bool = True) -> nn.Module:
        """A new criterion, not attached. all_annotated: every image of the data that has masks has one.

        Errors:  as :class:`sib_fast.SIBLoss` and :class:`sib_fast.EvidenceLoss`.
        """
        given = self.true_masks and self.annotated == 1 and all_annotated
        arguments = {} if self.term is None else self.term.arguments(given)
        if self.sib is not None:
            term = EvidenceTerm(**arguments) if arguments else None
            return self.sib.criterion(self.label_smoothing, self.accumulate, term)
        base_loss = nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)
        if self.term is None:
            return base_loss
        return EvidenceLoss(**arguments, base_loss=base_loss, accumulation_steps=self.accumulate, every=self.term.evidence_every)

    @property
    def differentiates(self) -> bool:
        """Whether the criterion is attached to the network."""
        return self.sib is not None or self.term is not None

    @property
    def reads_masks(self) -> bool:
        return self.sib is not None or (self.term is not None and self.term.evidence == "share")

    @property
    def needs_masks(self) -> bool:
        """Whether the data's masks are used."""
        return self.true_masks or self.random_backgrounds > 0

    def attach(self, criterion: Any, model: nn.Module) -> None:
        """Prepare the model, as the settings have it, and attach the criterion, if it is one to attach."""
        if self.differentiates and (self.sib is None or self.sib.prepare):
            prepare(model)
        if self.sib is not None:
            criterion.attach(model, self.sib.layer)
        elif self.term is not None:
            criterion.attach(model)

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps, all of the same number of images; what is left over takes part in another epoch's order."""
        return images // self.devices // self.batch_size // self.accumulate

    def open(self, split: str) -> LabelledImages:
        """Errors: as :func:`sib_fast.lab.datasets.open_dataset`."""
        from sib_fast.lab.datasets import open_dataset

        options: dict[str, Any] = {}
        if self.data in COMPOSED:
            size = self.train_size if split == "train" else self.test_size
            options = {"size": size, "correlation": self.correlation, "seed": self.seed}
        augment = self.augment and split == "train"
        return open_dataset(self.data, self.root, split, image_size=self.image_size, augment=augment, masks=self.masks, **options)
