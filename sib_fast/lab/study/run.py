"""The study's command: which networks, on how many processes, and what is on disk when it stops."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sib_fast.lab.data import OBJECT_SHARE
from sib_fast.lab.results import Interrupted, environment, remove_partials, report_interrupt, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from sib_fast.lab.study.progress import Progress, Task, Tell

_QUICK = {
    "out": Path("runs/quick"),
    "architectures": ("small_conv_net",),
    "variants": ("plain", "sib"),
    "seeds": (100, 101, 102),
    "test_size": 1000,
    "explained": 200,
    "timing_steps": 20,
}


_ADDED = ("object_share", "contrast", "randomisation")  # settings that a study from before them has at their defaults


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


def missing(config: StudyConfig) -> list[Task]:
    """The networks that are not there yet, in the order of training."""
    from sib_fast.lab.study.records import file_stem

    return [p for p in config.planned() if not (config.out / "results" / f"{file_stem(*p)}.json").exists()]


def announce(config: StudyConfig, planned: list[Task], command: str) -> None:
    """Write the folder's description before anything runs there. Errors: ValueError as :func:`run`."""
    config.out.mkdir(parents=True, exist_ok=True)
    _save(config.out, _open(config, planned, command) | {"status": "running"})


def run(config: StudyConfig, console: Console | None = None, part_of: tuple[list[Task], str] | None = None) -> Path:
    """Train and score what is missing in ``config.out``, then write the report.

    Every network is on disk before its process takes the next. On an interrupt or an error the report is still written,
    of what is there, and the same command goes on from there.

    Args:    part_of: all that is planned for the folder and the command, where this is a stage of more.
    Returns: the path of report.html.
    Errors:  ValueError for settings that do not fit the folder's earlier run; ImportError without the extras; an error
             in one network is raised after the networks that were already running are done; Interrupted, whose text says
             what is kept, after an interrupt, for which no running network is waited for.
    """
    try:
        from rich.console import Console

        from sib_fast.lab.study.progress import Progress
    except ImportError as error:
        raise ImportError(f"study: needs extras, got {error}; pip install 'sib_fast[lab,explain]'") from error

    console = console or Console(highlight=False)
    planned = config.planned()

    def finished() -> list[Task]:
        left = set(missing(config))
        return [p for p in planned if p not in left]

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    for folder in ("results", "networks", "logs"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    study = _open(config, *part_of or (planned, config.command()))
    remove_partials(config.out)
    todo = missing(config)
    if len(todo) < len(planned):
        say(f"study: {len(planned) - len(todo)} of {len(planned)} networks are there already")
    if todo:
        at_a_time = f", {min(config.jobs, len(todo))} at a time" if len(todo) > 1 else ""
        say(f"study: training {len(todo)} networks{at_a_time}, into {config.out}. Ctrl-C stops; the same command goes on.")
    _save(config.out, study | {"status": "running"})
    picture = _PictureOnce(config)
    try:
        with Progress(console, todo, config.settings(), config.progress) as progress:
            picture.make(finished(), progress.say)

            def report_done(task: Task, record: dict[str, Any]) -> None:
                progress.finish(task, _line(record))
                picture.make(finished(), progress.say)

            _train(config, todo, progress, report_done)
        if config.timing_steps:
            _time(config, study, say)
        _save(config.out, study | {"status": "complete"})
        for line in write_pages(config.out):
            say(line)
    except BaseException as error:
        with contextlib.suppress(KeyboardInterrupt):  # a second one leaves the report as it is
            _save(config.out, study | {"status": "interrupted"})
            if finished():
                say(f"study: stopping; the report of what is there goes to {config.out} (Ctrl-C again does without)")
                write_pages(config.out)
        if isinstance(error, KeyboardInterrupt):
            kept = f"{len(finished())} of {len(planned)} networks are finished and kept in {config.out}"
            raise Interrupted(f"{kept}; the same command goes on from there.") from error
        raise
    return config.out / "report.html"


class _PictureOnce:
    """The picture is made as soon as its networks are there: it is what one waits for."""

    def __init__(self, config: StudyConfig):
        self.config, self.made = config, False
        # a comparison in a picture needs two
        self.shown = [(config.architectures[0], variant, config.seeds[0]) for variant in config.variants[:2]]

    def make(self, finished: list[Task], say: Callable[[str], None]) -> None:
        from sib_fast.lab.study.picture import save_picture
        from sib_fast.lab.study.records import file_stem

        if self.made or not set(self.shown) <= set(finished):
            return
        files = [self.config.out / "networks" / f"{file_stem(*task)}.pt" for task in self.shown]
        if missing := [path for path in files if not path.exists()]:  # as where records were moved without their networks
            self.made = True
            say(f"picture: left out, {missing[0]} is missing")
            return
        (arch, _, seed), config = self.shown[0], self.config
        path = save_picture(config.out, arch, [variant for _, variant, _ in self.shown], seed, config.settings())
        self.made = True
        say(f"picture: {path}")


def _time(config: StudyConfig, study: dict[str, Any], say: Callable[[str], None]) -> None:
    from sib_fast.lab.study.timing import time_steps

    for arch in config.architectures:
        say(f"timing a training step of each kind, {arch} …")
        study["step_seconds"][arch] = time_steps(arch, config.settings(), config.timing_steps)


def write_pages(out: Path) -> list[str]:
    """Write the report of what is there. Returns: the lines that a finished run ends with."""
    from sib_fast.lab.study.records import load_study
    from sib_fast.lab.study.report import closing_lines, write_report

    study = load_study(out)
    write_report(study)
    return closing_lines(study, _program())


def _program() -> str:
    """How this command was called, for the commands that are suggested."""
    here = Path(sys.executable)
    found = shutil.which("sib-fast")
    if found and Path(found).parent == here.parent:
        return "sib-fast"
    with contextlib.suppress(ValueError):
        here = here.relative_to(Path.cwd())
    return shlex.join([str(here), "-m", "sib_fast"])


def _open(config: StudyConfig, plan: list[Task], command: str) -> dict[str, Any]:
    """The study's description: new, or the folder's with what this run adds. Errors: ValueError where settings differ."""
    from sib_fast.lab.study.variants import ARCHITECTURES, LABELS, find_variant

    path = config.out / "study.json"
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": config.settings(), "planned": []}
    defaults = {k: v for k, v in StudyConfig().settings().items() if k in _ADDED}
    for name, value in config.settings().items():
        # a folder from before there was such an option has its default
        before = earlier["settings"].get(name, defaults.get(name))
        if before != value:
            raise ValueError(
                f"study: {name} must be {before!r} as in the earlier run in {config.out}, got {value!r}; "
                "take another folder for other settings"
            )
    planned = [*map(tuple, earlier["planned"])]
    planned += [p for p in plan if p not in planned]
    names = {variant: arch for arch, variant, _ in reversed(planned)}
    ordered = sorted(names, key=lambda n: (list(LABELS).index(n.partition(":")[0]), n))
    return {
        "settings": config.settings(),
        "architectures": {arch: label for arch, label in ARCHITECTURES.items() if any(arch == p[0] for p in planned)},
        "variants": {name: find_variant(names[name], name).label for name in ordered},
        "baseline": "plain" if "plain" in names else ordered[0],
        "protocol": config.protocol,
        "planned": planned,
        "command": " && ".join(dict.fromkeys([*filter(None, earlier.get("command", "").split(" && ")), command])),
        "environment": environment(1, "cpu", "auto"),
        "step_seconds": earlier.get("step_seconds", {}),
    }


def _save(out: Path, study: dict[str, Any]) -> None:
    write_atomically(out / "study.json", (json.dumps(study, indent=1) + "\n").encode())


def _line(record: dict[str, Any]) -> str:
    from sib_fast.lab.study.progress import duration

    accuracy = record["accuracy"]
    shares = (accuracy["in_distribution"], accuracy["shifted"], record["vjp"]["energy"])
    usual, other, inside = (f"{100 * share:.0f} %" for share in shares)
    took = f"trained in {duration(record['train_seconds'])}, scored in {duration(record['evaluate_seconds'])}"
    return f"{usual} of the test images recognised, {other} on other backgrounds; {inside} of its gradient on the object ({took})"


def _train(
    config: StudyConfig, missing: list[Task], progress: Progress, report_done: Callable[[Task, dict[str, Any]], None]
) -> None:
    settings, out = config.settings(), config.out
    if config.jobs == 1 or len(missing) <= 1:
        for task in missing:
            report_done(task, _run_task(task, settings, out, lambda stage, share, task=task: progress.update(task, stage, share)))
        return
    # spawn: a forked child would inherit the parent's thread pools without their threads
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    others = multiprocessing.active_children()
    with concurrent.futures.ProcessPoolExecutor(config.jobs, context, _start_worker, (messages,)) as pool:
        futures: dict[concurrent.futures.Future, Task] = {}
        try:
            with _no_interrupts():
                futures = {pool.submit(_run_in_worker, task, settings, out): task for task in missing}
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 0.25, concurrent.futures.FIRST_COMPLETED)
                while not messages.empty():
                    progress.update(*messages.get())
                for future in done:
                    report_done(futures[future], future.result())
        except KeyboardInterrupt:
            # killed, not asked: every file is the old or the new one whatever a process was doing
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
            raise
        except BaseException:
            # What runs is waited for, and listened to: a worker whose messages nobody takes stands still.
            running = [future for future in futures if not future.cancel()]
            while concurrent.futures.wait(running, 0.25).not_done:
                while not messages.empty():
                    messages.get()
            raise


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that are started within never see Ctrl-C, which a terminal sends to all of them; ours arrives afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_messages: Any = None  # of a worker process: the queue to the study


def _start_worker(messages: Any) -> None:
    global _messages
    _messages = messages
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A study that is killed takes its processes with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(task: Task, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    return _run_task(task, settings, out, lambda stage, share: _messages.put((task, stage, share)))


def _run_task(task: Task, settings: dict[str, Any], out: Path, tell: Tell) -> dict[str, Any]:
    import torch

    from sib_fast.lab.study.network import run_network
    from sib_fast.lab.study.variants import find_variant

    arch, variant, seed = task
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits of a network must not depend on the number of cores
    try:
        return run_network(arch, find_variant(arch, variant), seed, settings, out, tell)
    finally:
        torch.set_num_threads(before)


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
    from sib_fast.lab.study.plan import run_plan

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
