"""``sib-fast diagnose``: the shortcut test from the command line. Importing this module needs no extra."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sib_fast import _checks
from sib_fast.explain import METHODS
from sib_fast.lab.datasets import NAMES, open_dataset
from sib_fast.lab.networks import LITE
from sib_fast.lab.results import remove_partials
from sib_fast.lab.shortcut.images import open_folder
from sib_fast.lab.shortcut.run import Tell, diagnose
from sib_fast.lab.shortcut.subject import Subject, open_network, read_mapping, read_names
from sib_fast.lab.study.progress import duration

_OP = "diagnose"
_LINE_EVERY = 20.0  # seconds between lines where there is no terminal
# Settings of the training that its data is opened with again, unless others are given
_NOTED = ("data", "root", "correlation", "seed", "test_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sib-fast diagnose``."""
    network = parser.add_argument_group("network")
    data = parser.add_argument_group("images with masks or boxes")
    test = parser.add_argument_group("test")

    def option(group: Any, name: str, text: str, kind: Any = None, **kwargs: Any) -> None:
        group.add_argument(f"--{name}", type=kind, help=text, **kwargs)

    option(network, "checkpoint", "a network that sib-fast train wrote, or with --arch a state dict (.pt, .pth, .safetensors)",
           Path, required=True, metavar="FILE")  # fmt: skip
    option(
        network,
        "arch",
        f"what the state dict is of: {LITE}, timm:<name> or a classification network of torchvision",
        metavar="NAME",
    )
    option(
        network,
        "classes",
        "a file with the names of the network's classes, one a line, in the order of the logits",
        Path,
        metavar="FILE",
    )
    option(
        network,
        "map",
        "JSON {class of the data: [indices or names of logits]}, where the classes are others",
        Path,
        metavar="FILE",
    )
    option(network, "image-size", "side of the images (default: the network's own, or 224)", int, metavar="PIXELS")
    option(
        network, "mean", "of every channel (default: the network's own, or ImageNet's)", float, nargs=3, metavar=("R", "G", "B")
    )
    option(network, "std", "as --mean", float, nargs=3, metavar=("R", "G", "B"))

    option(data, "data", f"{', '.join(NAMES)} (default: what the network was trained on, where its file says)", metavar="NAME")
    option(data, "root", "folder of the data, docs/data.md", Path, metavar="FOLDER")
    option(data, "split", "train, test or val (default: test)", default="test", metavar="NAME")
    option(data, "images", "in the place of --data: your own, FOLDER/<class>/<image>", Path, metavar="FOLDER")
    option(
        data,
        "masks",
        "of --images: FOLDER/<class>/<the image's name>.<any suffix>, not zero at the object",
        Path,
        metavar="FOLDER",
    )
    option(data, "boxes", "of --images, in the place of masks: CSV with image,x0,y0,x1,y1", Path, metavar="FILE")
    option(data, "correlation", "of digits and cut-outs: excess probability of a class's own background", float)

    option(test, "count", "images to test, drawn at random (default: %(default)s)", int, default=500, metavar="N")
    option(test, "backgrounds", "random backgrounds of every object (default: %(default)s)", int, default=5, metavar="K")
    option(
        test,
        "explained",
        "images that are explained by every method, 0 for none (default: %(default)s)",
        int,
        default=50,
        metavar="N",
    )
    option(test, "methods", f"of {' '.join(METHODS)} (default: all)", nargs="*", default=list(METHODS), metavar="METHOD")
    option(test, "layer", "for the CAMs (default: the last feature map)", metavar="NAME")
    option(test, "shown", "worst images on the page (default: %(default)s)", int, default=8, metavar="N")
    option(test, "seed", "of every draw (default: %(default)s)", int, default=0)
    option(test, "batch-size", "images at a time (default: %(default)s)", int, default=32, metavar="N")
    option(test, "threads", "torch threads (default: torch's own)", int, metavar="N")
    option(test, "device", "cpu or cuda (default: cuda where there is one)", metavar="NAME")
    test.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show where it stands")
    option(test, "out", "folder for diagnosis.html and diagnosis.json (default: %(default)s)", Path,
           default=Path("runs/diagnosis"), metavar="FOLDER")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run with the options of :func:`add_arguments`. Returns 0 whatever the verdict, 2 for bad options, 1 for a full disk."""
    before = torch.get_num_threads()
    try:
        from sib_fast.lab.shortcut.report import lines

        _checks.require_package(_OP, "rich", "lab")
        if args.out.is_file():
            raise ValueError(f"{_OP}: out must be a folder, got the file {args.out}")
        torch.set_num_threads(args.threads or before)
        subject = open_network(
            args.checkpoint, args.arch, image_size=args.image_size, mean=args.mean, std=args.std,
            classes=None if args.classes is None else read_names(args.classes),
        )  # fmt: skip
        subject.model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        data = _open_data(args, subject)
        with _progress(args.progress) as tell:
            found = diagnose(
                subject, data, mapping=None if args.map is None else read_mapping(args.map), images=args.count,
                explained=args.explained, methods=args.methods, layer=args.layer, backgrounds_each=args.backgrounds,
                batch_size=args.batch_size, shown=args.shown, seed=args.seed, tell=tell,
                command=shlex.join(["sib-fast", *sys.argv[1:]]),
            )  # fmt: skip
        try:
            files = found.save(args.out)
        finally:
            if args.out.is_dir():
                remove_partials(args.out)
        print("\n".join([*lines(found), "", *map(str, files)]))
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        print(f"sib-fast {_OP}: {str(error).removeprefix(f'{_OP}: ')}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sib-fast {_OP}: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


def _open_data(args: argparse.Namespace, subject: Subject) -> Any:
    size = subject.image_size or 224
    if args.images is not None:
        if args.data is not None:
            raise ValueError(f"{_OP}: images must take the place of data, got both: {args.images} and {args.data!r}")
        return open_folder(args.images, args.masks, args.boxes, size)
    if args.masks is not None or args.boxes is not None:
        raise ValueError(f"{_OP}: masks and boxes must come with images, got {args.masks or args.boxes} without")
    notes = {name: (subject.notes or {}).get(name) for name in _NOTED}
    name = args.data or notes["data"]
    if name is None:
        raise ValueError(
            f"{_OP}: data or images must be given, got neither, and {args.checkpoint} does not say what it was trained on"
        )
    noted = notes if name == notes["data"] else {}
    root, options = args.root or noted.get("root"), {}
    if name in ("digits", "cutouts"):
        options = {"correlation": noted.get("correlation"), "seed": noted.get("seed"), "size": noted.get("test_size")}
    if args.correlation is not None:
        options["correlation"] = args.correlation
    options = {key: value for key, value in options.items() if value is not None}
    data = open_dataset(name, root, args.split, image_size=size, **options)
    if not data.has_masks:
        raise ValueError(f"{_OP}: data must have masks or boxes, got {name!r}, which has none: --images FOLDER --masks FOLDER")
    return data


@contextmanager
def _progress(wanted: bool) -> Iterator[Tell]:
    """A bar on a terminal, a line now and then elsewhere, nothing where it is not wanted."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console, begin = Console(highlight=False), time.monotonic()
    latest = begin
    live = wanted and console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:3.0f} %  {task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:
        row = bar.add_task("starting", total=1.0, left="")

        def tell(stage: str, share: float) -> None:
            nonlocal latest
            now = time.monotonic()
            left = f"about {duration((now - begin) * (1 - share) / share)} left" if share > 0.01 else ""
            bar.update(row, description=stage, completed=share, left=left)
            if wanted and not live and now - latest > _LINE_EVERY:
                latest = now
                console.print(f"  {100 * share:.0f} %, {left or 'starting'}: {stage}", soft_wrap=True, markup=False)

        yield tell
