"""The study's command: which networks, on how many processes, and what is on disk when it stops."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sib_fast.lab.results import environment, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

_QUICK = {
    "out": Path("runs/quick"),
    "architectures": ("small_conv_net",),
    "variants": ("plain", "sib"),
    "seeds": (100, 101, 102),
    "test_size": 1000,
    "explained": 200,
    "timing_steps": 20,
}


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
        test_size: composites of each of the two test sets.
        explained: how many of the shifted composites are explained.
        methods: explanation methods.
        jobs: networks trained at a time, one thread each.
        timing_steps: training steps of each kind to time at the end; 0 leaves the timing out.
        progress: show a progress bar.

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
    test_size: int = 5000
    explained: int = 500
    methods: tuple[str, ...] = ()
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    timing_steps: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        from sib_fast.explain import METHODS
        from sib_fast.lab.study.variants import ARCHITECTURES, find_variant

        for name in ("architectures", "variants", "seeds", "methods"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "methods", self.methods or tuple(METHODS))
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
        if not 0 <= self.correlation <= 1:
            raise ValueError(f"study: correlation must be in [0, 1], got {self.correlation}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"study: lr must be positive and finite, got {self.lr}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"study: weight_decay must be finite and not negative, got {self.weight_decay}")

    def settings(self) -> dict[str, Any]:
        """What a network's numbers depend on besides its architecture, variant and seed, as JSON keeps it."""
        free = {"out", "jobs", "timing_steps", "progress", "architectures", "variants", "seeds"}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        return fields | {"methods": list(self.methods)}

    def command(self) -> str:
        """The command line that makes this configuration."""
        words = ["sib-fast", "study"]
        default = StudyConfig()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != getattr(default, field.name) and field.name not in ("jobs", "progress"):
                words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        return shlex.join(words)

    def planned(self) -> list[tuple[str, str, int]]:
        """Networks in the order of training: every variant of a seed before the next seed, so that pairs are complete early."""
        return [(arch, variant, seed) for seed in self.seeds for arch in self.architectures for variant in self.variants]


def run(config: StudyConfig, console: Console | None = None) -> Path:
    """Train and score what is missing in ``config.out``, then write the report.

    Every network is on disk before its process takes the next. On an interrupt or an error the report is still written,
    of what is there, and the same command goes on from there.

    Returns: the path of report.html.
    Errors:  ValueError for settings that do not fit the folder's earlier run; ImportError without the extras; an error
             in one network is raised after the networks that were already running are done.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from sib_fast.lab.study.picture import save_picture
        from sib_fast.lab.study.records import file_stem, load_study
        from sib_fast.lab.study.report import console_tables, write_report
        from sib_fast.lab.study.timing import time_steps
    except ImportError as error:
        raise ImportError(f"study: needs extras, got {error}; pip install 'sib_fast[lab,explain]'") from error

    console = console or Console(highlight=False)
    for folder in ("results", "networks", "logs"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    study = _open(config)
    done = [p for p in config.planned() if (config.out / "results" / f"{file_stem(*p)}.json").exists()]
    missing = [p for p in config.planned() if p not in done]
    if done:
        console.print(f"study: {len(done)} of {len(done) + len(missing)} networks are there already")
    _save(config.out, study | {"status": "running"})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    status = "interrupted"
    try:
        with Progress(*columns, console=console, transient=True, disable=not config.progress) as progress:
            bar = progress.add_task("networks", total=len(missing))

            def report_done(record: dict[str, Any]) -> None:
                progress.advance(bar)
                progress.console.print(_line(record), soft_wrap=True)

            _train(config, missing, report_done)
        if config.timing_steps:
            console.print("timing one training step of each kind …")
            study["step_seconds"] = {a: time_steps(a, config.settings(), config.timing_steps) for a in config.architectures}
        # a comparison in a picture needs two
        save_picture(config.out, config.architectures[0], config.variants[:2], config.seeds[0], config.settings())
        status = "complete"
    finally:
        _save(config.out, study | {"status": status})
        finished = load_study(config.out)
        if finished.networks:
            write_report(finished)
        if status != "complete":
            console.print(f"study: interrupted. The same command goes on from what is in {config.out}.", soft_wrap=True)
    for table in console_tables(finished):
        console.print(table)
    for arch, seconds in study.get("step_seconds", {}).items():
        console.print(_step_table(arch, seconds, config))
    console.print(f"report: {config.out / 'report.html'}", soft_wrap=True)
    return config.out / "report.html"


def _open(config: StudyConfig) -> dict[str, Any]:
    """The study's description: new, or the folder's with what this run adds. Errors: ValueError where settings differ."""
    from sib_fast.lab.study.variants import ARCHITECTURES, LABELS, find_variant

    path = config.out / "study.json"
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": config.settings(), "planned": []}
    for name, value in config.settings().items():
        if earlier["settings"].get(name) != value:
            raise ValueError(
                f"study: {name} must be {earlier['settings'].get(name)!r} as in the earlier run in {config.out}, got {value!r}; "
                "take another folder for other settings"
            )
    planned = [*map(tuple, earlier["planned"])]
    planned += [p for p in config.planned() if p not in planned]
    names = {variant: arch for arch, variant, _ in reversed(planned)}
    ordered = sorted(names, key=lambda n: (list(LABELS).index(n.partition(":")[0]), n))
    return {
        "settings": config.settings(),
        "architectures": {arch: label for arch, label in ARCHITECTURES.items() if any(arch == p[0] for p in planned)},
        "variants": {name: find_variant(names[name], name).label for name in ordered},
        "baseline": "plain" if "plain" in names else ordered[0],
        "planned": planned,
        "command": " && ".join(dict.fromkeys([*filter(None, earlier.get("command", "").split(" && ")), config.command()])),
        "environment": environment(1, "cpu", "auto"),
    }


def _save(out: Path, study: dict[str, Any]) -> None:
    write_atomically(out / "study.json", (json.dumps(study, indent=1) + "\n").encode())


def _line(record: dict[str, Any]) -> str:
    accuracy = record["accuracy"]
    return (
        f"{record['arch']}, {record['variant']}, seed {record['seed']}: accuracy {accuracy['in_distribution']:.3f}, shifted "
        f"{accuracy['shifted']:.3f}, VJP inside the object {record['vjp']['energy']:.3f}; {record['train_seconds']:.0f} + "
        f"{record['evaluate_seconds']:.0f} s"
    )


def _step_table(arch: str, seconds: dict[str, float], config: StudyConfig) -> Any:
    import torch
    from rich.table import Table

    from sib_fast.lab.study.timing import LABELS

    table = Table(title=f"Seconds per training step, {arch}", title_justify="left", caption_justify="left")
    threads = torch.get_num_threads()
    table.caption = f"median of {config.timing_steps}, interleaved on one batch of {config.batch_size}; CPU, {threads} threads"
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("plain = 1", justify="right")
    for name, label in LABELS.items():
        table.add_row(label, f"{seconds[name]:.4f}", f"{seconds[name] / seconds['plain']:.2f}×")
    return table


def _train(config: StudyConfig, missing: list[tuple[str, str, int]], report_done: Callable[[dict[str, Any]], None]) -> None:
    if config.jobs == 1 or len(missing) <= 1:
        for task in missing:
            report_done(_task(*task, config.settings(), config.out))
        return
    # spawn: a forked child would inherit the parent's thread pools without their threads
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.jobs, mp_context=context) as pool:
        futures = [pool.submit(_task, *task, config.settings(), config.out) for task in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                report_done(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _task(arch: str, variant: str, seed: int, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    import torch

    from sib_fast.lab.study.network import run_network
    from sib_fast.lab.study.variants import find_variant

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits of a network must not depend on the number of cores
    try:
        return run_network(arch, find_variant(arch, variant), seed, settings, out)
    finally:
        torch.set_num_threads(before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sib-fast study``; their defaults are :class:`StudyConfig`'s."""
    quick = " ".join(f"--{k.replace('_', '-')} {_shown(v)}" for k, v in _QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"a study of minutes; other defaults: {quick}")
    texts = {
        "out": ("FOLDER", "results, networks, logs and the report; an earlier run's is continued"),
        "architectures": ("NAME", "small_conv_net, small_resnet"),
        "variants": ("NAME", "ways of training, or all; sib:lambda_bg=3e5 is sib with another weight"),
        "seeds": ("SEED", "of data, weights and batches; networks of a seed are paired"),
        "epochs": ("N", "passes over the training images"),
        "batch_size": ("N", "images per step"),
        "lr": ("RATE", "peak learning rate"),
        "weight_decay": ("RATE", "AdamW's"),
        "width": ("N", "channels of the first layer"),
        "train_size": ("N", "training images"),
        "image_size": ("PIXELS", "height and width of the images"),
        "correlation": ("P", "excess probability of the class's own background in training"),
        "test_size": ("N", "composites of each test set"),
        "explained": ("N", "shifted composites that are explained"),
        "methods": ("NAME", "explanation methods (default: all)"),
        "jobs": ("N", "networks at a time, one thread each"),
        "timing_steps": ("N", "training steps of each kind to time at the end, 0 for none"),
    }
    kinds: dict[str, Callable[[str], Any]] = {"out": Path, "seeds": int, "lr": float, "weight_decay": float, "correlation": float}
    for name in ("epochs", "batch_size", "width", "train_size", "image_size", "test_size", "explained", "jobs", "timing_steps"):
        kinds[name] = int
    for field in dataclasses.fields(StudyConfig):
        if field.name not in texts:
            continue
        metavar, text = texts[field.name]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        shown = f"{text} (default: {_shown(default)})" if default != () else text
        repeated = {"nargs": "+"} if isinstance(default, tuple) else {}
        flag = f"--{field.name.replace('_', '-')}"
        # no default here: --quick changes some, and only what was given on the command line must win over it
        parser.add_argument(
            flag, default=argparse.SUPPRESS, type=kinds.get(field.name, str), metavar=metavar, help=shown, **repeated
        )
    parser.add_argument("--no-progress", dest="progress", action="store_false", default=argparse.SUPPRESS, help="no progress bar")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0, 2 for a bad option, 130 after an interrupt."""
    try:
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(StudyConfig) if hasattr(args, f.name)}
        if given.get("variants") == ["all"]:
            from sib_fast.lab.study.variants import LABELS

            given["variants"] = tuple(LABELS)
        run(StudyConfig(**(_QUICK if args.quick else {}) | given))
    except (ValueError, ImportError) as error:
        print(f"sib-fast study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
