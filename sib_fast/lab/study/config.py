"""The options of a study: what its networks depend on, and which of them it trains."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sib_fast.lab.data import OBJECT_SHARE


@dataclass(frozen=True)
class StudyConfig:
    """Everything a study depends on; each field is an option of ``sib-fast study``.

    Attributes:
        out: folder for results, networks, logs and the report. A run in the same folder with the same settings goes on
            where an earlier one stopped, and may add architectures, variants and seeds.
        architectures: of :data:`sib_fast.lab.study.variants.ARCHITECTURES`.
        variants: of :data:`sib_fast.lab.study.variants.LABELS`; ``sib:lambda_bg=3e5`` is `sib` with another weight.
        seeds: of data, initial weights and batches; networks of one seed are paired.
        epochs, batch_size, lr, weight_decay, width, train_size, image_size, correlation: of the training.
        object_share, contrast: of the composites, see :class:`sib_fast.lab.data.EmbeddedDigits`.
        test_size: composites of each of the two test sets.
        explained: how many of the shifted composites are explained.
        methods: explanation methods, of :data:`sib_fast.lab.study.measures.METHODS`.
        randomisation: compare the maps with those of a network with random weights.
        protocol: of :data:`sib_fast.lab.study.records.PROTOCOLS`: what the report compares and asks.
        jobs: networks trained at a time, one thread each.
        timing_steps: training steps of each kind to time at the end; 0 leaves the timing out.
        progress: show what is being trained and the time left.

    Errors:  ValueError, naming the option, for a value out of range.
    """

    out: Path = Path("runs/study")
    architectures: tuple[str, ...] = ("small_conv_net", "small_resnet")
    variants: tuple[str, ...] = ("plain", "sib", "sib_relative", "background_only", "unmasked")
    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    epochs: int = 50
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 1e-2
    width: int = 16
    train_size: int = 512
    image_size: int = 32
    correlation: float = 0.4
    object_share: tuple[float, ...] = OBJECT_SHARE
    contrast: float = 1.0
    test_size: int = 5000
    explained: int = 500
    methods: tuple[str, ...] = ()
    randomisation: bool = True
    protocol: str = "s-ib"
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    timing_steps: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        from sib_fast.explain import METHODS as EXPLAINERS
        from sib_fast.lab.study.measures import METHODS
        from sib_fast.lab.study.records import PROTOCOLS
        from sib_fast.lab.study.variants import ARCHITECTURES, find_variant

        for name in ("architectures", "variants", "seeds", "methods", "object_share"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "methods", self.methods or tuple(EXPLAINERS))
        for name, known in (("architectures", ARCHITECTURES), ("methods", METHODS)):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
                raise ValueError(f"study: {name} must be distinct and among {', '.join(known)}, got {' '.join(chosen) or 'none'}")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"study: variants must be distinct, got {' '.join(self.variants) or 'none'}")
        for variant in self.variants:
            find_variant(self.architectures[0], variant)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"study: seeds must be distinct and not negative, got {list(self.seeds)}")
        for name in ("epochs", "batch_size", "width", "train_size", "test_size", "explained", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"study: {name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.batch_size <= self.train_size:
            raise ValueError(f"study: batch_size must lie in [2, {self.train_size}], got {self.batch_size}")
        if self.timing_steps < 0:
            raise ValueError(f"study: timing_steps must not be negative, got {self.timing_steps}")
        if self.explained > self.test_size:
            raise ValueError(f"study: explained must not exceed test_size {self.test_size}, got {self.explained}")
        if self.image_size < 16:
            raise ValueError(f"study: image_size must be at least 16, got {self.image_size}")
        if len(self.object_share) != 2 or not 0 < self.object_share[0] <= self.object_share[1] <= 1:
            raise ValueError(f"study: object_share must be two ascending numbers in (0, 1], got {list(self.object_share)}")
        if not 0 < self.contrast <= 1:
            raise ValueError(f"study: contrast must be in (0, 1], got {self.contrast}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"study: protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if not 0 <= self.correlation <= 1:
            raise ValueError(f"study: correlation must be in [0, 1], got {self.correlation}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"study: lr must be positive and finite, got {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"study: weight_decay must be finite and not negative, got {self.weight_decay}")

    def settings(self) -> dict[str, Any]:
        """What a network's numbers depend on besides its architecture, variant and seed, as JSON keeps it."""
        free = {"out", "jobs", "timing_steps", "progress", "protocol", "architectures", "variants", "seeds"}
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items() if k not in free}
        # no option: it is here so that networks of the two layouts, whose rounding differs, do not mix in one folder
        return fields | {"memory_format": "channels_last"}

    def command(self) -> str:
        """The command line that makes this configuration."""
        words = ["sib-fast", "study"]
        default = StudyConfig()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != getattr(default, field.name) and field.name not in ("jobs", "progress"):
                if isinstance(value, bool):
                    words.append(f"--no-{field.name.replace('_', '-')}")
                    continue
                words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        return shlex.join(words)

    def planned(self) -> list[tuple[str, str, int]]:
        """Networks in the order of training: every variant of a seed before the next seed, so that pairs are complete early."""
        return [(arch, variant, seed) for seed in self.seeds for arch in self.architectures for variant in self.variants]
