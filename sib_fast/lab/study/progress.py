"""Where a study stands, while it runs: what is being trained, which of how many, and about how long the rest takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sib_fast.lab.study.variants import LABELS, find_variant

if TYPE_CHECKING:
    from rich.console import Console

Task = tuple[str, str, int]  # architecture, variant, seed
Tell = Callable[[str, float], None]  # what a network is at, and the share of its training and scoring that is done

_LINE_EVERY = 20.0  # seconds between lines where there is no terminal


def work(task: Task, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Of training and of scoring a network, in forward and backward passes of an image. Only the time left depends on it."""
    from sib_fast.lab.study.measures import method_options

    passes = find_variant(*task[:2]).passes
    maps = sum(max(method_options(method).values(), default=1) + 2 for method in settings["methods"])
    return settings["epochs"] * settings["train_size"] * passes, 0.8 * settings["explained"] * maps


def duration(seconds: float) -> str:
    """For people: "8 s", "2 min 40 s", "1 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def name(task: Task, several: bool) -> str:
    """A network in a line of progress. several: there is more than one architecture."""
    variant, _, override = task[1].partition(":")
    words = [LABELS[variant], override, task[0] if several else "", f"seed {task[2]}"]
    return ", ".join(filter(None, words))


class Progress:
    """A bar on a terminal, a line now and then elsewhere; nothing where it is not wanted.

    Args:    tasks: what is to be trained. settings: the study's. wanted: False shows only what :meth:`say` is given.
    """

    def __init__(self, console: Console, tasks: Sequence[Task], settings: Mapping[str, Any], wanted: bool):
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        self.console, self.wanted = console, wanted
        self.several = len({arch for arch, _, _ in tasks}) > 1
        self.works = {task: sum(work(task, settings)) for task in tasks}
        self.shares = dict.fromkeys(tasks, 0.0)
        self.stages: dict[Task, str] = {}
        # nothing is known until the first message: before it, processes start and import
        self.begin: float | None = None
        self.last_line = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
            BarColumn(20),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[left]}"),
        )
        live = wanted and console.is_terminal and bool(tasks)
        self.bar = Bar(*columns, console=console, transient=True, disable=not live, expand=True)
        self.row = self.bar.add_task("starting", total=1.0, left="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    @property
    def share(self) -> float:
        """Of all the work, done."""
        return sum(self.works[t] * s for t, s in self.shares.items()) / sum(self.works.values())

    @property
    def left(self) -> float | None:
        """Seconds, at the speed so far; None as long as there is none."""
        if self.begin is None or not self.share:
            return None
        return (time.monotonic() - self.begin) * (1 - self.share) / self.share

    def update(self, task: Task, stage: str, share: float) -> None:
        if self.begin is None:
            self.begin = time.monotonic()
            self.last_line = -math.inf  # the first one at once
        self.shares[task], self.stages[task] = share, stage
        if share >= 1:
            del self.stages[task]
        self._show()

    def _show(self) -> None:
        doing = " · ".join(f"{name(task, self.several)}: {stage}" for task, stage in self.stages.items())
        left = "" if self.left is None else f"about {duration(self.left)} left"
        self.bar.update(self.row, description=doing, completed=self.share, left=left)
        if self.wanted and not self.console.is_terminal and time.monotonic() - self.last_line > _LINE_EVERY:
            self.say(f"  {100 * self.share:.0f} %, {left or 'starting'}: {doing}")

    def finish(self, task: Task, text: str) -> None:
        """A network is done: a line that stays."""
        self.update(task, "", 1.0)
        done = sum(share >= 1 for share in self.shares.values())
        self.say(f"[{done}/{len(self.shares)}] {name(task, self.several)}: {text}")

    def say(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.bar.console.print(text, soft_wrap=True, markup=False)
