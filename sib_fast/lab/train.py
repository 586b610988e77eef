"""``sib-fast train``: one network, plain or S-IB, on one of the data sets; a thin recipe over Lightning.

Importing this module needs no extra: Lightning and torchvision are imported when a run starts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sib_fast._backends import BACKENDS, resolve
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.lab.config import (
    COMPOSED,
    PARTS,
    PRECISIONS,
    RECIPES,
    SCHEDULES,
    STRATEGIES,
    EvidenceOptions,
    SIBOptions,
    TrainConfig,
)
from sib_fast.lab.networks import LITE, SMALL, TIMM, NetworkSpec, classifier_parameters, load_network, timm_config
from sib_fast.lab.parts import freeze, groups, hold_statistics
from sib_fast.lab.results import Interrupted, environment, remove_partials, report_interrupt, write_atomically
from sib_fast.ops.foreground_mask import KERNELS as MASK_KERNELS

if TYPE_CHECKING:
    from rich.console import Console

    from sib_fast.lab.datasets import LabelledImages
    from sib_fast.lab.pretrained import Report, Weights

_SETTINGS = "settings.json"
_FORMAT = "sib_fast.train.1"
# They change no bit of the result (threads: none that is not lost to rounding), so that --resume may change them.
_FREE_TO_CHANGE = {"out", "root", "workers", "threads", "strategy", "progress"}
_COMPOSED_ONLY = ("train_size", "test_size", "correlation")


def run(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> NetworkSpec:
    """Train; ``config.out`` then holds ``network.pt``, ``best.pt``, ``logs/``, ``checkpoints/last.ckpt``, ``settings.json``, and
    ``init.json`` where weights were loaded: which were, and which not.

    All of it is there, for what has been trained so far, after every epoch. ``resume=True`` goes on after the last finished
    epoch; on the CPU the result then has the bits of a run that was never interrupted.

    Returns: what ``network.pt`` says about itself; ``training["val_accuracy"]`` among it.
    Errors:  ValueError for settings that do not fit each other, the data or the run to be resumed, before any training;
             FileNotFoundError for missing data; ConnectionError for weights out of reach; ImportError without the lab extra;
             OSError when the disk is full;
             Interrupted, whose text says what is kept, when the user interrupts.
    """
    console = console or _console()
    with _threads(config.threads):
        backend = _check_backend(config)
        train, val = _open_data(config)
        from sib_fast.lab.recipe import CHECKPOINT, LOG, train_network

        go_on = resume and (config.out / CHECKPOINT).is_file()
        spec, model, report = _network(config, train, go_on)
        all_annotated = train.annotated == len(train)
        _rehearse(config, model, all_annotated)
        from lightning.pytorch.utilities import rank_zero_only

        main_process = rank_zero_only.rank == 0  # Lightning starts this function once more for every further device
        if main_process:
            _claim_folder(config, resume, backend)
            if report is not None:
                write_atomically(config.out / "init.json", (json.dumps(report.document(), indent=1) + "\n").encode())
                console.print(f"train: init from {report}", soft_wrap=True)
            if config.progress:
                method = " + ".join(
                    ["plain" if config.sib is None else "S-IB"] + ([f"evidence {config.term.evidence}"] if config.term else [])
                )
                known = "" if all_annotated or not config.needs_masks else f" ({train.annotated} with a mask)"
                console.print(f"{method} {config.arch} on {config.data}, {len(train)} images{known}, {config.epochs} epochs …")
        try:
            train_network(config, spec, model, config.criterion(all_annotated), train, val, go_on)
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
        if config.sib is not None:
            with (config.out / LOG).open(newline="") as file:
                console.print(_weight_of_background(config.sib, list(csv.DictReader(file))[-1]), end="", soft_wrap=True)
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
    smallest = max(getattr(role, "minimum_batch", 1) for role in (criterion.estimator, criterion.background))
    if config.batch_size < smallest:
        raise ValueError(f"train: batch_size must be at least {smallest} for S-IB, got {config.batch_size}")
    if config.sib.gather and config.devices == 1:
        raise ValueError("train: gather must come with more than one device, got devices 1")
    try:
        return resolve("train", config.sib.backend, torch.device(config.device), MASK_KERNELS)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _open_data(config: TrainConfig) -> tuple[LabelledImages, LabelledImages]:
    if config.data not in COMPOSED:
        for name in _COMPOSED_ONLY:
            if getattr(config, name) != getattr(TrainConfig, name):
                raise ValueError(f"train: {name} must come with data {' or '.join(COMPOSED)}, got data {config.data!r}")
    elif config.data == "digits" and config.augment:
        raise ValueError("train: augment must not be given with data digits, whose images are random compositions")
    train, val = (config.open(split) for split in ("train", "test"))
    if config.needs_masks and not train.has_masks:
        name = "true_masks" if config.true_masks else "random_backgrounds"
        hint = f"; your own belong in {config.root}/masks/train, docs/data.md" if config.data == "folder" else ""
        raise ValueError(f"train: {name} must come with data that has masks, got data {config.data!r}{hint}")
    if config.annotated < 1 and train.annotated < len(train):
        raise ValueError(
            f"train: annotated must be 1 for data whose masks are those of some images, got {config.annotated} for "
            f"{train.annotated} masks of {len(train)} images"
        )
    if config.steps_per_epoch(len(train)) < 1:
        needed = f"{config.batch_size} x {config.accumulate} x {config.devices}"
        raise ValueError(
            f"train: batch_size x accumulate x devices must not exceed the {len(train)} training images, got {needed}"
        )
    return train, val


def _network(config: TrainConfig, data: LabelledImages, go_on: bool) -> tuple[NetworkSpec, nn.Module, Report | None]:
    """The network as training begins, weights loaded and parts frozen. go_on: its checkpoint has the weights."""
    weights = None
    if config.init is not None and not go_on:
        from sib_fast.lab.pretrained import initialise, read_weights

        weights = read_weights(config.init, config.arch)
    spec = _spec(config, data, weights)
    if config.init is not None and go_on:
        earlier, _ = load_network(config.out / "network.pt")
        spec = dataclasses.replace(spec, mean=earlier.mean, std=earlier.std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = spec.build()
    report = None if weights is None else initialise(model, spec, weights)
    if config.freeze or config.freeze_batch_norm or config.part_lr:
        classifier = classifier_parameters(spec)
        freeze(model, config.freeze, config.freeze_batch_norm, classifier)
        groups(model, config.lr, config.part_lr, classifier)  # a part that does not exist is said now
    return spec, model, report


def _spec(config: TrainConfig, data: LabelledImages, weights: Weights | None = None) -> NetworkSpec:
    options: dict[str, Any] = {} if config.width is None else {"width": config.width}
    if config.arch in ("googlenet", "inception_v3"):
        # their training mode returns a tuple for the auxiliary losses; init_weights unset would warn
        options = {"aux_logits": False, "init_weights": True}
    if config.arch.startswith("vit_"):
        options = {"image_size": config.image_size}
    if config.arch.startswith(TIMM) and timm_config(config.arch).get("fixed_input_size"):
        options = {"img_size": config.image_size}
    mean, std = data.mean, data.std
    if weights is not None and weights.mean is not None and weights.std is not None:
        mean, std = weights.mean, weights.std
    if config.normalise is not None:
        mean, std = ((float(v),) * 3 for v in config.normalise)
    # notes are strings and numbers
    notes = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in config.flat().items()
        if value is not None
    }
    return NetworkSpec(config.arch, tuple(data.classes), config.image_size, mean, std, options, notes)


def _rehearse(config: TrainConfig, model: nn.Module, all_annotated: bool) -> None:
    """A loss of a copy, on noise: what does not fit the network says so now, not after a data set has been read for hours."""
    if config.sib is not None:  # the processes whose images could be gathered do not exist yet
        config = dataclasses.replace(config, sib=dataclasses.replace(config.sib, gather=False))
    probe, criterion = copy.deepcopy(model).train(), config.criterion(all_annotated)
    hold_statistics(probe)
    count = max(2, *(getattr(getattr(criterion, role, None), "minimum_batch", 2) for role in ("estimator", "background")))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training says them
            torch.manual_seed(config.seed)
            x, target = torch.randn(count, 3, config.image_size, config.image_size), torch.zeros(count, dtype=torch.int64)
            config.attach(criterion, probe)
            given = {"mask": torch.ones(count, 1, *x.shape[2:])} if config.true_masks else {}
            criterion(probe(x), target, **given)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"train: arch must take S-IB or plain steps at image_size {config.image_size}, got {reason}") from error


def _weight_of_background(sib: SIBOptions, row: dict[str, str]) -> str:
    """A line on how much the background term weighed in an epoch; empty where docs/weights.md has no rule for it."""
    base, background = (float(row.get(name) or "nan") for name in ("base", "background"))
    weighted = sib.criterion().lambda_bg * background
    if sib.background == "hsic" or not (weighted > 0 and base > 0):
        return ""
    share = weighted / base
    return f"lambda_bg x background was {share:.2g} of the base loss in the last epoch; docs/weights.md aims at about 1\n"


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
    evidence = parser.add_argument_group("evidence at a feature map (see sib_fast.EvidenceTerm), beside --sib or --plain")
    defaults = vars(TrainConfig()) | vars(SIBOptions()) | vars(EvidenceOptions()) | {"evidence": None}

    def option(group: Any, name: str, text: str, kind: Any = None, **kwargs: Any) -> None:
        value = defaults[name]
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if isinstance(value, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= {"type": kind, "metavar": kwargs.get("metavar", name.rpartition("_")[2].upper())}
        text += "" if value in (None, ()) or isinstance(value, bool) else f" (default: {shown})"
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

    option(own, "data", "digits, folder, pets, voc, dogs, cub or cutouts", str, metavar="NAME")
    option(own, "root", "folder of the data, docs/data.md", Path, metavar="FOLDER")
    option(own, "masks", "of the data: auto, segmentation or box", str, metavar="KIND")
    option(own, "true_masks", "the data's masks in the place of the loss's own")
    option(own, "annotated", "share of the training images whose mask is known; for the others the loss keeps its own", float)
    option(own, "arch", f"{', '.join(SMALL)}, {LITE}, timm:NAME or a classification network of torchvision", str, metavar="NAME")
    option(own, "init", "weights to begin with: DEFAULT, a name of torchvision's, or a file (.pt, .pth, .safetensors)", str)
    option(own, "width", "channels of the first layer of a small architecture", int)
    option(own, "image_size", "height and width of the images", int)
    option(own, "normalise", "of every channel, in the place of the data's own", float, nargs=2, metavar=("MEAN", "STD"))
    option(own, "augment", "random crops and flips")
    option(own, "mixup", "Beta parameter of MixUp; 0 is off", float, metavar="ALPHA")
    option(own, "cutmix", "Beta parameter of CutMix; 0 is off", float, metavar="ALPHA")
    option(own, "random_backgrounds", "share of images that get another's background, by the data's masks", float)
    option(own, "train_size", "training images of digits and cutouts", int)
    option(own, "test_size", "test images of digits and cutouts", int)
    option(own, "correlation", "excess probability of a class's own background, of digits and cutouts", float)

    option(training, "epochs", "passes over the training images", int)
    option(training, "batch_size", "images per step and device", int)
    option(training, "accumulate", "batches that make one step", int)
    option(training, "lr", "AdamW's learning rate, the schedule's peak", float)
    option(training, "part_lr", "rates of parts: classifier, stem or a module's name", str, nargs="*", metavar="NAME=RATE")
    option(training, "freeze", "parts that do not learn: stem, classifier or a module's name", str, nargs="*", metavar="NAME")
    option(training, "freeze_batch_norm", "batch norm keeps its statistics and weights")
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
    option(sib, "estimator", f"of the foreground term: {', '.join(ESTIMATORS)}", str, metavar="NAME")
    option(sib, "background", f"background term: {', '.join(BACKGROUNDS)}", str, metavar="NAME")
    option(sib, "objective", "exp, expm1 or linear", str)
    option(sib, "mask", "how the mask is made of the VJP", str)
    option(sib, "window_size", "side of the mask's density window, odd", int)
    option(sib, "temperature", "of the mask's soft quantiles", float)
    option(sib, "slope", "of the mask's sigmoids", float)
    option(sib, "quantiles", "of the mask", float, nargs=4, metavar=("LO", "HI", "GATE", "AREA"))
    option(sib, "vjp_scale", "power of two, for 16-mixed", float)
    option(sib, "gather", "statistics over the images of all devices")
    option(sib, "backend", f"of the ops: auto, {', '.join(BACKENDS)}", str, metavar="NAME")
    option(sib, "every", "S-IB at every k-th step only", int)
    option(sib, "every_weight", "sum or mean", str)
    option(sib, "layer", "take the VJP at this layer's output", str, metavar="NAME")
    option(sib, "prepare", "the package's layers, whose second derivative is faster")

    option(evidence, "evidence", "area or share: adds the term", str, metavar="KIND")
    option(evidence, "evidence_form", "rectified, absolute or squared (default: absolute for area, rectified for share)", str)
    option(evidence, "evidence_weight", "of the term", float)
    option(evidence, "evidence_at", "module whose output is the map; by default the last before pooling", str, metavar="NAME")
    option(evidence, "evidence_window", "side of the own mask's density window, odd", int)
    option(evidence, "evidence_area", "the area is not lowered below it", float)
    option(evidence, "evidence_every", "the term at every k-th step only; beside --sib its --every holds for both", int)


def settings(args: argparse.Namespace) -> TrainConfig:
    """Of a parsed command line. Errors: ValueError for options that contradict each other or a resumed run."""
    given = {name: value for name, value in vars(args).items() if name in _NAMES and value is not None}
    base = stored_settings(given.get("out", TrainConfig.out)) if args.resume else {}
    merged = base | given
    plain = merged.get("method") == "plain"
    if plain:
        for field in dataclasses.fields(SIBOptions):
            if field.name in given:
                raise ValueError(f"train: {field.name} must not be given for plain training, got {given[field.name]!r}")
    recipe = args.recipe
    backgrounds_alone = plain and merged.get("evidence") != "share" and merged.get("random_backgrounds")
    if "annotated" in given and not backgrounds_alone:  # which says that the loss is to use masks
        given.setdefault("true_masks", True)
    if recipe is None and not args.resume and given.get("data", "digits") == "digits":
        recipe = "digits"
    return TrainConfig.from_flat(base | RECIPES.get(recipe, {}) | given)


_OPTIONS = (TrainConfig, SIBOptions, EvidenceOptions)
_NAMES = {"method"} | {f.name for c in _OPTIONS for f in dataclasses.fields(c)} - set(PARTS)


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0, 2 for bad options, 1 for a full disk, 130 if interrupted."""
    try:
        run(settings(args), resume=args.resume)
    except (ValueError, ImportError, FileNotFoundError, ConnectionError) as error:
        print(f"sib-fast train: {str(error).removeprefix('train: ')}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sib-fast train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return report_interrupt("train", error)
    return 0
