"""``sib-fast study``: a study or a plan of them from the command line. Importing this module needs no extra."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sib_fast.lab.results import report_interrupt
from sib_fast.lab.study.config import StudyConfig
from sib_fast.lab.study.plan import run_plan
from sib_fast.lab.study.run import run

_QUICK = {
    "out": Path("runs/quick"),
    "architectures": ("small_conv_net",),
    "variants": ("plain", "sib"),
    "seeds": (100, 101, 102),
    "test_size": 1000,
    "explained": 200,
    "timing_steps": 20,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sib-fast study``; their defaults are :class:`StudyConfig`'s."""
    quick = " ".join(f"--{k.replace('_', '-')} {_shown(v)}" for k, v in _QUICK.items())
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="run the stages of a file, with no option beside it but out, jobs and no-progress",
    )
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
        "object_share": ("SHARE", "least and greatest side of a digit's square over the image's"),
        "contrast": ("FACTOR", "of the ink's opacity"),
        "test_size": ("N", "composites of each test set"),
        "explained": ("N", "shifted composites that are explained"),
        "methods": ("NAME", "explanation methods (default: those of sib_fast.explain)"),
        "protocol": ("NAME", "what the report compares and asks: s-ib, evidence"),
        "jobs": ("N", "networks at a time, one thread each"),
        "timing_steps": ("N", "training steps of each kind to time at the end, 0 for none"),
    }
    kinds: dict[str, Callable[[str], Any]] = {"out": Path, "seeds": int, "lr": float}
    kinds |= dict.fromkeys(("weight_decay", "correlation", "object_share", "contrast"), float)
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
    parser.add_argument(
        "--no-randomisation",
        dest="randomisation",
        action="store_false",
        default=argparse.SUPPRESS,
        help="leave out the comparison with the maps of random weights",
    )
    parser.add_argument(
        "--no-progress", dest="progress", action="store_false", default=argparse.SUPPRESS, help="only a line per finished network"
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _run_plan(path: Path, quick: bool, given: dict[str, Any]) -> None:
    beside = [*(["quick"] if quick else []), *(name for name in given if name not in ("out", "jobs", "progress"))]
    if beside:
        raise ValueError(f"study: plan must stand alone but for out, jobs and no-progress, got {', '.join(beside)}")
    out = given.pop("out", StudyConfig.out)
    run_plan(path, out, **given)


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0, 2 for a bad option, 130 after an interrupt."""
    try:
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(StudyConfig) if hasattr(args, f.name)}
        if given.get("variants") == ["all"]:
            from sib_fast.lab.study.variants import LABELS

            given["variants"] = tuple(LABELS)
        if args.plan is None:
            run(StudyConfig(**(_QUICK if args.quick else {}) | given))
        else:
            _run_plan(args.plan, args.quick, given)
    except (ValueError, ImportError) as error:
        print(f"sib-fast study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return report_interrupt("study", error)
    return 0
