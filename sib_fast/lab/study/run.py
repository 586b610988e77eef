"""Run a study: which networks are missing, on how many processes, and what is on disk when it stops."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sib_fast.lab.results import Interrupted, environment, remove_partials, write_atomically
from sib_fast.lab.study.config import StudyConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sib_fast.lab.study.progress import Progress, Task, Tell

_ADDED = ("object_share", "contrast", "randomisation")  # settings that a study from before them has at their defaults


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
